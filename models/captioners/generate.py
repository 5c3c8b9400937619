"""Captioners of transformers that write token by token: any image-text-to-text model through its chat template.

Each row (one image under one prompt) is processed alone and padded on the left only when rows meet on the device: a
row's tensors never depend on its neighbours, any part of a batch can be run again, and no padding stands between a
prompt and its answer. BLIP and Florence-2, which know no chat, are in `tasks.py`.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.models.auto import processing_auto as processors
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ...transforms.images import decode, within
from ...transforms.outcomes import Drop
from .. import hub
from ..contract import Captioner, ModelError, Written
from ..device import Pieces, moved, pinned, place, quiet
from ..options import ALT_CHARS, Captioning

_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_WORDS = ("tokenizer.json", "vocab.*", "*.model", "tekken.json")  # without any, transformers makes an empty tokenizer
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # [1, tokens]; the rest is of the image
# Of a checkpoint's generation settings, those that say what its tokens mean; how to choose among them is up to us.
_KEPT: tuple[str, ...] = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_KEPT += ("forced_bos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
# What transformers raises on folders that are not whole, do not fit each other, or are of no kind it knows.
_COMPLAINTS: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
_COMPLAINTS += (AssertionError, ArithmeticError, SafetensorError, TemplateError, StrictDataclassError)


@dataclass(frozen=True)
class Row:
    """One image under one prompt: the model's inputs, each with a first dimension of its own, and its luck."""

    inputs: dict[str, torch.Tensor]
    seed: int


def open_captioner(options: Captioning) -> Captioner:
    """Load the captioner whose files `model` names. Raises ModelError, one line that says what to do about it."""
    folder = hub.find(options.model)
    kind = hub.config(folder).get("model_type")
    if kind in ("blip", "florence2"):
        from . import tasks

        return tasks.open_captioner(options, folder, kind)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"model {options.model}: transformers {transformers.__version__} knows no image-text-to-text model {kind!r}"
            f"; a newer release may, and models that bring code of their own are not loaded"
        )
    return Chat(options, folder)


class Generate:
    """What all of them share; a subclass says how a row is made of an image and a prompt."""

    side = "left"

    def __init__(self, options: Captioning, folder: Path) -> None:
        """Load model and processor and prepare one row of each prompt, so that what cannot work is known at once."""
        self.options = options
        self.processor = load_processor(options, folder)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.device, dtype = place(options)
        self.model = load_model(options, folder, dtype).to(self.device)
        own_generation(options, self.writer, self.tokenizer)
        self._control = _control_tokens(self.processor)
        self._pieces = Pieces()
        self._piece, self._seen = (0, 0), dict[int, tuple[int, Any]]()  # by a piece's start: its end and its features
        see = getattr(self.model.base_model, "get_image_features", None)
        if see is not None and len(options.prompts) > 1:
            self.model.base_model.get_image_features = self._once(see)
        if options.compile:
            # Not the whole model: images break its graph into many, until torch.compile gives it up. Florence-2 calls
            # the two halves of its BART by themselves. The limit: first and later tokens, one row and many, and so on.
            torch._dynamo.config.recompile_limit = 64
            text = self.writer.get_decoder()
            getattr(text, "decoder", text).compile(dynamic=True)
        with complaining(options, "its processor or chat template does not work"):
            trials = [self.row(Image.new("RGB", (96, 64), "grey"), p.format(alt_text="")) for p in options.prompts]
        for name, value in trials[0].items():
            if name not in _TEXT and value.shape[:2] == trials[0]["input_ids"].shape:
                raise ModelError(f"model {options.model}: not supported: its input {name} goes along with the text")

    @property
    def writer(self) -> Any:
        """The module whose `generate` writes."""
        return self.model

    @property
    def stops(self) -> set[int]:
        """The ids that end a text."""
        ends = self.writer.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    def row(self, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        """Make the model's inputs of an RGB image and a filled-in prompt, without padding."""
        raise NotImplementedError

    def generate(self, rows: Sequence[Row], luck: LogitsProcessorList) -> list[list[int]]:
        """Run the model; returns each row's new tokens."""
        inputs = self.inputs(rows)
        tokens = self.model.generate(**inputs, logits_processor=luck)
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]

    @property
    def pad(self) -> int:
        """The id that fills up rows; what stands there is masked."""
        return int(self.tokenizer.pad_token_id or 0)

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> list[list[Row]]:
        """Decode, scale, write the prompts out and tokenise: for each prompt, a row for each image."""
        found: list[list[Row]] = [[] for _ in self.options.prompts]
        for jpeg, alt_text in zip(jpegs, alt_texts, strict=True):
            image = within(decode(jpeg), self.options.max_pixels)
            said = self._control.sub(" ", alt_text[:ALT_CHARS])
            for k, prompt in enumerate(self.options.prompts):
                luck = hashlib.sha256(f"{self.options.seed} {k} ".encode() + hashlib.sha256(jpeg).digest())
                inputs = pinned(self.row(image, prompt.format(alt_text=said)), self.device)
                found[k].append(Row(inputs, int.from_bytes(luck.digest()[:8], "big", signed=True)))
        return found

    def __call__(self, prepared: list[list[Row]]) -> list[list[Written | Drop]]:
        """Write each image's captions, in the order of the prompts."""
        # By length, so that pieces of the batch are padded less; the same pieces for each prompt, as `_once` needs.
        lengths: list[int] = [
            max(row.inputs["input_ids"].shape[1] for row in rows) for rows in zip(*prepared, strict=True)
        ]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)

        def fits(start: int, end: int) -> bool:
            tokens = lengths[order[end - 1]] + self.options.max_new_tokens
            return (end - start) * tokens <= self.options.batch_tokens

        columns = []
        self._seen.clear()
        for rows in prepared:
            written = self._pieces(len(rows), partial(self._write, [rows[k] for k in order]), fits)
            columns.append([text for _, text in sorted(zip(order, written, strict=True), key=itemgetter(0))])
        self._seen.clear()
        return [list(row) for row in zip(*columns, strict=True)]

    @torch.inference_mode()
    def _write(self, prepared: Sequence[Row], start: int, end: int) -> list[Written]:
        rows, self._piece = prepared[start:end], (start, end)
        luck = LogitsProcessorList([Draw([row.seed for row in rows], self.options)] if self.options.temperature else [])
        stops, written = self.stops, []
        for tokens in self.generate(rows, luck):
            stop = next((k for k, token in enumerate(tokens) if token in stops), None)
            text = self.tokenizer.decode(tokens[:stop], skip_special_tokens=True)
            written.append(Written(text.strip(), stop is not None))
        return written

    def _once(self, see: Callable[..., Any]) -> Callable[..., Any]:
        """The same encoder of images, but what it made of a piece of the batch serves all prompts."""

        @wraps(see)  # with its signature, by which transformers chooses what to pass
        def seen(*values: Any, **named: Any) -> Any:
            start, end = self._piece
            if self._seen.get(start, (None,))[0] != end:
                self._seen.pop(start, None)  # of a piece that was too large: its memory is needed now
                self._seen[start] = end, see(*values, **named)
            return self._seen[start][1]

        return seen

    def inputs(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Rows put together on the device, where each comes from pinned memory by itself, in the model's precision."""
        batch = collate([moved(row.inputs, self.device) for row in rows], self.pad, self.side)
        return {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in batch.items()}


class Chat(Generate):
    """A model that is spoken to: one turn of the user, the image before the prompt."""

    def row(self, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        """Make the inputs of a chat of one turn."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        turn = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        inputs = self.processor(images=[image], text=[text], return_tensors="pt", **_once_begun(self.tokenizer, text))
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}


class Draw(LogitsProcessor):
    """Draws each row's next token from its own random numbers: [rows, vocabulary] logits to 0 for it, else -inf.

    The greedy choice that follows has no other. The numbers are drawn on the CPU, one a token, so neither the batch nor
    the kind of device has a say in them.
    """

    def __init__(self, seeds: Sequence[int], options: Captioning) -> None:
        self._seeds, self._options, self._step = seeds, options, 0
        streams = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (options.max_new_tokens,)
        self._numbers = torch.stack([torch.rand(shape, generator=stream, dtype=torch.float64) for stream in streams])

    def of(self, rows: Sequence[int]) -> "Draw":
        """The same draws for some of the rows, from the first step."""
        return Draw([self._seeds[k] for k in rows], self._options)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Take one step: temperature, then the smallest set of likely tokens that weighs top_p, then the draw."""
        number = self._numbers[:, self._step, None].to(scores.device)
        self._step += 1
        sure, order = (
            (scores.double() / self._options.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        )
        upto = sure.cumsum(-1)
        inside = upto - sure < self._options.top_p
        weight = (sure * inside).sum(-1, keepdim=True)
        place = torch.minimum((upto <= number * weight).sum(-1, keepdim=True), inside.sum(-1, keepdim=True) - 1)
        chosen = order.gather(-1, place.clamp(min=0))
        return torch.full_like(scores, -math.inf).scatter(-1, chosen, 0.0)


def collate(rows: Sequence[dict[str, torch.Tensor]], pad: int, side: str) -> dict[str, torch.Tensor]:
    """Put rows together: texts filled up to the longest on one side, what is of the images with zeros at the end."""
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch = {}
    for name, first in rows[0].items():
        values = [row[name] for row in rows]
        if name in _TEXT:
            fill = pad if name == "input_ids" else 0
            gaps = [longest - value.shape[1] for value in values]
            sides = [(gap, 0) if side == "left" else (0, gap) for gap in gaps]
            values = [torch.nn.functional.pad(value, gap, value=fill) for value, gap in zip(values, sides, strict=True)]
        else:  # tiles, or patches in rows and columns: the model knows by a mask or a size which are real
            largest = [max(value.shape[k] for value in values) for k in range(1, first.dim())]
            gaps_of = [[most - size for most, size in zip(largest, value.shape[1:], strict=True)] for value in values]
            values = [
                torch.nn.functional.pad(value, [end for gap in reversed(gaps) for end in (0, gap)])
                for value, gaps in zip(values, gaps_of, strict=True)
            ]
        batch[name] = torch.cat(values)
    return batch


def load_model(options: Captioning, folder: Path, dtype: torch.dtype) -> Any:
    """Load the weights, all of them. Raises ModelError."""
    with complaining(options, "transformers cannot load it as an image-text-to-text model"), quiet():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model {options.model}: its weights lack {len(missing)} tensors of its architecture, such as {missing[0]}"
            f"; fetch it again, or name a checkpoint that was converted for transformers"
        )
    return model.eval()


def load_processor(options: Captioning, folder: Path) -> Any:
    """Load what turns images and text into tensors, with or without torchvision. Raises ModelError."""
    if not any(path for pattern in _WORDS for path in folder.glob(pattern)):
        raise ModelError(
            f"model {options.model}: no tokenizer in {folder} ({', '.join(_WORDS)}); fetch the whole model"
        )
    with complaining(options, "its processor cannot be loaded"):
        try:
            processor = AutoProcessor.from_pretrained(folder, **_LOCAL)
        except ImportError:
            processor = _still_processor(folder)
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"model {options.model}: transformers has no processor of images and text for it")
    with complaining(options, "its image processor cannot be loaded"):
        # With torchvision installed, the default would scale images by it, to other pixels than without.
        processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **_LOCAL)
    return processor


def _still_processor(folder: Path) -> Any:
    """The library's own processor, but for still images only: those of videos need torchvision and num2words."""
    kind = hub.config(folder)["model_type"]
    name = vars(processors)["PROCESSOR_MAPPING_NAMES"].get(kind) or ""
    for file in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):  # the last one decides
        if (folder / file).is_file():
            name = json.loads((folder / file).read_text(encoding="utf-8")).get("processor_class") or name
    # SmolVLM writes an image into a text as Idefics3 does.
    known = processors.processor_class_from_name("Idefics3Processor" if name == "SmolVLMProcessor" else name)
    if known is None:
        raise ValueError(f"transformers has no processor {name!r} for {kind!r}")

    class Still(known):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    makers: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    names = known.get_attributes()
    parts = [makers[name].from_pretrained(folder, **_LOCAL) if name in makers else None for name in names]
    settings, _ = known.get_processor_dict(folder, local_files_only=True)
    return Still.from_args_and_dict(parts, settings)


def own_generation(options: Captioning, model: Any, tokenizer: Any) -> None:
    """Settle how a model generates: its own token ids, our choices. Nothing else of its settings stays."""
    theirs = model.generation_config
    ours = {name: getattr(theirs, name, None) for name in _KEPT}
    for name in ("eos_token_id", "pad_token_id"):
        ours[name] = getattr(tokenizer, name) if ours[name] is None else ours[name]
    model.generation_config = GenerationConfig(
        max_new_tokens=options.max_new_tokens, do_sample=False, num_beams=1, **ours
    )


@contextmanager
def complaining(options: Captioning, trouble: str) -> Iterator[None]:
    """Turn what transformers raises into a ModelError of one line."""
    try:
        yield
    except ImportError as error:
        raise ModelError(f"model {options.model}: {trouble}: a package is missing: {_line(error)}") from None
    except _COMPLAINTS as error:
        raise ModelError(f"model {options.model}: {trouble}: {type(error).__name__}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _once_begun(tokenizer: Any, text: str) -> dict[str, bool]:
    """Keep the tokenizer from adding a beginning mark where the chat template has written one."""
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begun else {}


def _control_tokens(processor: Any) -> re.Pattern[str]:
    """What strangers must not write into a prompt: an image's place, the end of a turn, and other special tokens."""
    tokenizer = processor.tokenizer
    known = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    known |= {str(getattr(processor, f"{name}_token", None) or "") for name in ("image", "video", "audio", "boi")}
    known = {token for token in known if token.strip()}
    return re.compile("|".join(map(re.escape, sorted(known, key=lambda token: (-len(token), token)))) or r"(?!)")
