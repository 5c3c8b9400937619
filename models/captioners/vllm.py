"""Captions by vLLM inside the worker: its engine steps in a thread, so that batches prepared ahead keep it full."""

import queue
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any

from ...transforms.images import decode, within
from ...transforms.outcomes import Drop
from .. import hub
from ..contract import ModelError, Written
from ..options import Captioning
from .openai import prompts

Answers = list[list["Future[Written | Drop]"]]  # images by prompts
Asked = tuple[dict[str, Any], "Future[Written | Drop]"]  # a request of vLLM's, and where its answer goes


def open_captioner(options: Captioning) -> "VLLM":
    """Load the engine. Raises ModelError where vLLM or a GPU is missing, or where vLLM cannot run the model."""
    what = f"model {options.model}"
    if options.device == "cpu":
        raise ModelError(f"{what}: device: cpu, but backend: vllm runs on a GPU only")
    try:
        from vllm import EngineArgs, LLMEngine, SamplingParams  # isort: skip  (the others take seconds: it tells first)
        import torch
        from transformers import AutoProcessor
    except ImportError as error:
        raise ModelError(
            f"{what}: backend: vllm needs `pip install vllm` and a GPU ({error.name} is missing)"
        ) from None
    if not torch.cuda.is_available():
        raise ModelError(f"{what}: backend: vllm needs a GPU, and PyTorch sees none here")
    folder = hub.find(options.model)
    try:
        engine = LLMEngine.from_engine_args(EngineArgs(**engine_arguments(options, folder)))
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        templates = chat(options, processor.apply_chat_template)
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        raise ModelError(f"{what}: vLLM cannot load it: {' '.join(str(error).split())[:400]}") from error
    sampling = SamplingParams(
        max_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    return VLLM(options, engine, sampling, templates)


def engine_arguments(options: Captioning, folder: Path) -> dict[str, Any]:
    """What the engine is built from."""
    return {
        "model": str(folder),
        "dtype": options.dtype,
        "seed": options.seed,
        "limit_mm_per_prompt": {"image": 1},
        "trust_remote_code": False,
        "load_format": "safetensors",
    }


def chat(options: Captioning, template: Callable[..., Any]) -> Callable[[str], list[str]]:
    """The function that writes out the prompts for a web caption, each as one turn of the user after the image."""

    def written(alt_text: str) -> list[str]:
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts(options, alt_text)
        ]
        return [template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]

    written("")  # a model without a template is known at once
    return written


class VLLM:
    """Captions by an engine. `prepare` hands requests over and returns; calling waits for the answers, in order."""

    def __init__(self, options: Captioning, engine: Any, sampling: Any, templates: Callable[[str], list[str]]) -> None:
        self._options, self._templates = options, templates
        self._queue: queue.SimpleQueue[Asked | None] = queue.SimpleQueue()
        Thread(target=_work, args=(engine, sampling, self._queue), name="vllm", daemon=True).start()
        weakref.finalize(self, self._queue.put, None)

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Answers:
        """Decode, scale, write the prompts out, and ask."""
        asked: Answers = []
        for jpeg, alt_text in zip(jpegs, alt_texts, strict=True):
            image = within(decode(jpeg), self._options.max_pixels)
            asked.append([Future() for _ in self._options.prompts])
            for prompt, answer in zip(self._templates(alt_text), asked[-1], strict=True):
                self._queue.put(({"prompt": prompt, "multi_modal_data": {"image": image}}, answer))
        return asked

    def __call__(self, prepared: Answers) -> list[list[Written | Drop]]:
        """Wait. Raises what the engine raised for a request, ModelError where the engine died."""
        return [[answer.result() for answer in answers] for answers in prepared]


def _work(engine: Any, sampling: Any, asked: "queue.SimpleQueue[Asked | None]") -> None:
    """The engine's loop: take in what is asked, step, hand out what is finished, until there comes a None."""
    waiting: dict[str, Future[Written | Drop]] = {}
    numbers = count()
    dead: str | None = None
    while True:
        try:
            item = asked.get(block=not waiting)
        except queue.Empty:
            try:
                for output in engine.step():
                    if output.finished:
                        waiting.pop(output.request_id).set_result(read(output))
            except Exception as error:  # noqa: BLE001  (nobody else would hear of it, and all would wait for ever)
                dead = f"vLLM's engine died: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
                for answer in waiting.values():
                    answer.set_exception(ModelError(dead))
                waiting.clear()
            continue
        if item is None:
            return
        request, answer = item
        if dead:
            answer.set_exception(ModelError(dead))
            continue
        name = str(next(numbers))
        try:
            engine.add_request(name, request, sampling)
            waiting[name] = answer
        except Exception as error:  # noqa: BLE001  (it is raised where the answer is waited for)
            answer.set_exception(error)


def read(output: Any) -> Written | Drop:
    """What a finished request says."""
    first = output.outputs[0]
    return Written(first.text, complete=first.finish_reason != "length")
