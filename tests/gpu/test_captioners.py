"""The caption step against the bare loop of its model, in bf16: `pytest -m gpu tests/gpu/test_captioners.py -s`.

The model has the shape of Qwen2-VL-2B and random weights. CAPTIONERS=tiny runs the same code at toy size on the CPU,
where the figures mean nothing.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.captioners.test_generate import CHAT, LETTERS, QWEN, jpeg, tokenizer
from tests.world import World
from vesl.models import hub, open_captioner
from vesl.models.contract import Captioner
from vesl.models.options import Captioning
from vesl.pipeline.plan import make_plan
from vesl.pipeline.steps import caption as caption_step
from vesl.pipeline.work import Attempt, run_part

TINY = os.environ.get("CAPTIONERS") == "tiny"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not TINY and not torch.cuda.is_available(), reason="no accelerator here"),
]
IMAGES, BATCH, TOKENS = (8, 4, 4) if TINY else (512, 64, 64)
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": LETTERS + len(QWEN)}
SIGHT: dict[str, Any] = {"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 14}
SECTION = [1, 1, 2]
if not TINY:
    TEXT = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    TEXT |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936}
    SIGHT = {"embed_dim": 1280, "hidden_size": 1536, "depth": 32, "num_heads": 16, "patch_size": 14}
    SECTION = [16, 24, 24]


def made(folder: Path) -> str:
    """Save the model, as on the hub; returns its reference."""
    words = tokenizer(*QWEN, eos_token="<end>", pad_token="<pad>")
    words.chat_template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    rope = {"rope_type": "default", "type": "default", "mrope_section": SECTION, "rope_theta": 1e6}
    ids = {name: LETTERS + k for k, name in enumerate(("vision_start", "vision_end", "image", "video"))}
    ends = {"eos_token_id": LETTERS + 4, "pad_token_id": LETTERS + 5, "bos_token_id": None}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, **ends, "max_position_embeddings": 32_768, "rope_parameters": rope},
        vision_config=SIGHT,
        **{f"{name}_token_id": value for name, value in ids.items()},
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = transformers.Qwen2VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    transformers.Qwen2VLImageProcessorPil().save_pretrained(folder)
    return f"{folder}@{hub.digest(folder)}"


def timed(run: Callable[[], object]) -> float:
    """Seconds until it is done, on the device too."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def busy(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds in which the device computes, and seconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        seconds = timed(run)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6, seconds


def test_the_caption_step(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = [jpeg(640, 480, seed) for seed in range(IMAGES)]
    world.list_urls("a", [(world.server.add(f"/{k}.jpg", each), "a dog") for k, each in enumerate(data)])
    asked = {"model": made(tmp_path / "model"), "max_new_tokens": TOKENS, "max_pixels": 448 * 448, "dtype": "bfloat16"}
    world.document["dataset"]["rows_per_part"] = IMAGES
    world.document["steps"]["caption"] = asked
    world.document["engine"] = {"workers": 1, "caption": {"batch": BATCH, "threads": 2 if TINY else 8}}
    world.write()
    assert world.run("run", "--until", "download").returncode == 0
    job, opened = make_plan(world.load()).job(), []

    def opening(options: Captioning) -> Captioner:
        opened.append(open_captioner(options))
        return opened[-1]

    monkeypatch.setattr(caption_step, "open_captioner", opening)
    function = job.steps[1].stage.open()
    captioner = opened[0]
    ready = [captioner.prepare(data[k : k + BATCH], ["a dog"] * BATCH)[0] for k in range(0, IMAGES, BATCH)]
    there = [captioner.inputs(rows) for rows in ready]

    def bare() -> None:
        for inputs in there:
            captioner.model.generate(**inputs)

    with torch.inference_mode():
        captioner.model.generate(**there[0])  # warm
        alone = timed(bare)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    footers: list[Any] = []
    step = timed(lambda: footers.append(run_part(job, 1, 0, lambda stage: function, Attempt())[0]))
    assert footers[0]["rows"] == IMAGES
    print(f"\nstep {IMAGES / step:.1f} images/s, bare loop {IMAGES / alone:.1f}, one over the other {alone / step:.3f}")
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
        with torch.inference_mode():
            at_work, whole = busy(lambda: captioner.model.generate(**there[0]))
        print(f"device at work {at_work / whole:.2f} of a batch's time in the bare loop, peak {peak:.1f} GiB")
        assert alone / step > 0.8  # the aim is 0.95
