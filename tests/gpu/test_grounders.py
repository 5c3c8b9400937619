"""Grounders on an accelerator: `pytest -m gpu tests/gpu/test_grounders.py -s` prints the figures.

VESL_GPU_TESTS=cpu runs the same at a tiny size on the CPU, to see that this file works; its figures say nothing.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.bench.grounders import grounding_dino, owlv2, photograph

DRY = os.environ.get("VESL_GPU_TESTS") == "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not (DRY or torch.cuda.is_available()), reason="no accelerator here")]

SHAPES = [(1024, 768), (1024, 683), (1000, 750), (768, 1024), (1024, 576), (800, 800)]
BATCH, BATCHES, PHRASES, THREADS = (2, 2, 3, 2) if DRY else (32, 12, 20, 12)


def made(which: str) -> Any:
    if which == "owl":
        return owlv2(32, device="cpu") if DRY else owlv2(448, large=True, device="cuda")
    return grounding_dino(64, tiny=True, device="cpu") if DRY else grounding_dino(800, device="cuda")


def batches() -> list[tuple[list[bytes], list[list[str]]]]:
    """Of web images' sizes, small where it is a dry run; no phrase stands in two of them."""
    size = 8 if DRY else 1
    jpegs = [photograph(w // size, h // size, k) for k, (w, h) in enumerate(SHAPES)]
    return [
        (
            [jpegs[(at + k) % len(jpegs)] for k in range(BATCH)],
            [[f"phrase {n} of image {BATCH * at + k}" for n in range(PHRASES)] for k in range(BATCH)],
        )
        for at in range(BATCHES)
    ]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def forwards_of(grounder: Any, which: str) -> Iterator[list[Callable[[], Any]]]:
    """Collects the calls of the bare network that the step makes, with their inputs, to make them again."""
    calls: list[Callable[[], Any]] = []
    names = ("_embed", "_score") if which == "owl" else ("_network",)
    inner = {name: getattr(grounder, name) for name in names}

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            calls.append(lambda: function(*inputs))
            return function(*inputs)

        return call

    for name, function in inner.items():
        setattr(grounder, name, recorded(function))
    yield calls
    for name, function in inner.items():
        setattr(grounder, name, function)


def busy(run: Callable[[], object]) -> float:
    """The share of the time in which a kernel runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        run()
        wait()
        took = time.perf_counter() - start
    kernels = [event.time_range for event in profile.events() or [] if event.device_type.name == "CUDA"]
    covered = end = 0.0
    for span in sorted(kernels, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return covered / 1e6 / took


@pytest.mark.parametrize("which", ["owl", "dino"])
def test_the_step_keeps_up_with_the_bare_model(which: str) -> None:
    """Images/s of preparing, grounding and taking apart, over those of the network alone on the same tensors."""
    work = batches()
    grounder = made(which)

    def step(pool: ThreadPoolExecutor, some: list[Any]) -> int:
        return sum(len(found) for found in map(grounder, pool.map(lambda one: grounder.prepare(*one), some)))

    with ThreadPoolExecutor(THREADS) as pool:
        with forwards_of(grounder, which) as calls:
            step(pool, work[:2])  # also warms up
        half = calls[len(calls) // 2 :]
        with torch.inference_mode():
            for _ in range(2):
                wait()
                start = time.perf_counter()
                for call in half:
                    call()
                wait()
                bare = BATCH / (time.perf_counter() - start)
        del calls, half
        if which == "owl":
            grounder._memory = type(grounder._memory)(200_000)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        wait()
        start = time.perf_counter()
        assert step(pool, work) == BATCH * BATCHES
        wait()
        whole = BATCH * BATCHES / (time.perf_counter() - start)
        share = float("nan") if DRY else busy(lambda: step(pool, work[:4]))
    peak = float("nan") if DRY else torch.cuda.max_memory_allocated() / 2**30
    print(
        f"\n{which}: step {whole:.1f} images/s, bare model {bare:.1f}, ratio {whole / bare:.3f} (target 0.95), "
        f"GPU busy {share:.0%}, peak {peak:.1f} GiB"
    )
    assert DRY or whole / bare > 0.5
