"""Where a model computes, in which precision, and what happens when the device's memory runs out."""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .contract import ModelError
from .options import Captioning, Grounding, Scoring

T = TypeVar("T")


def place(options: Captioning | Grounding | Scoring) -> tuple[torch.device, torch.dtype]:
    """The device and the precision that the options ask for. Raises ModelError where they ask for a GPU in vain."""
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ModelError(f"model {options.model}: device: cuda, but PyTorch sees no GPU here; auto takes what there is")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    if options.dtype != "auto":
        dtype: torch.dtype = getattr(torch, options.dtype)
        return device, dtype
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return device, torch.bfloat16 if fast else torch.float32


def pinned(tensors: Any) -> Any:
    """The same tensor, list, tuple or mapping of tensors in page-locked memory, where there is a GPU to copy to."""
    if not torch.cuda.is_available():
        return tensors
    return _each(tensors, lambda tensor: tensor.pin_memory())


def moved(tensors: Any, device: torch.device) -> Any:
    """The same tensor, list, tuple or mapping of tensors on a device; from pinned memory without waiting."""
    return _each(tensors, lambda tensor: tensor.to(device, non_blocking=True))


def _each(tensors: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tensors, torch.Tensor):
        return change(tensors)
    if isinstance(tensors, dict):
        return {name: _each(value, change) for name, value in tensors.items()}
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(_each(value, change) for value in tensors)
    return tensors


class Pieces:
    """Runs a batch in pieces that fit into the device's memory: what is too much once is halved from then on."""

    def __init__(self) -> None:
        self.size: int | None = None  # rows at a time that are known to be not too many; None: no limit met

    def __call__(
        self, rows: int, run: Callable[[int, int], list[T]], fits: Callable[[int, int], bool] = lambda start, end: True
    ) -> list[T]:
        """Call run(start, end) over all rows, as many at a time as fits(start, end) admits, one in any case.

        Gives the results in one list. Raises torch.OutOfMemoryError where one row alone is too much.
        """
        done: list[T] = []
        while len(done) < rows:
            start = len(done)
            ends = range(start + 2, start + min(rows - start, self.size or rows) + 1)
            step = 1 + bisect_left(ends, True, key=lambda end, start=start: not fits(start, end))
            try:
                done += run(start, start + step)
                continue
            except torch.OutOfMemoryError:
                if step == 1:
                    raise
            # Out of the except block: there the traceback would hold the tensors of the failed attempt.
            self.size = step // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return done
