"""Where a model computes, in which precision, what stays in the device's memory and what happens when that runs out."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .contract import ModelError
from .options import Captioning, Grounding, Scoring

T = TypeVar("T")

_AGAIN = 200  # a piece that is too large in vain costs less than a hundredth of those before it


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


def pinned(tensors: Any, device: torch.device) -> Any:
    """The same tensor, list, tuple or mapping of tensors in page-locked memory, where they are copied to a GPU."""
    if device.type != "cuda":
        return tensors
    return _each(tensors, lambda tensor: tensor.pin_memory())


def moved(tensors: Any, device: torch.device) -> Any:
    """The same tensor, list, tuple or mapping of tensors on a device; from pinned memory without waiting."""
    return _each(tensors, lambda tensor: tensor.to(device, non_blocking=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and reports with which transformers loads a model off the user's terminal."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _each(tensors: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tensors, torch.Tensor):
        return change(tensors)
    if isinstance(tensors, dict):
        return {name: _each(value, change) for name, value in tensors.items()}
    if isinstance(tensors, (list, tuple)):
        return type(tensors)(_each(value, change) for value in tensors)
    return tensors


class Pieces:
    """Runs a batch in pieces that fit into the device's memory.

    What is too much once is halved from then on; after `_AGAIN` pieces that went well, twice as many are tried again,
    as the batch may have been an unusual one.
    """

    def __init__(self) -> None:
        self.size: int | None = None  # rows at a time that are known to be not too many; None: no limit met
        self._well = 0  # pieces of that size since it was set

    def __call__(
        self, rows: int, run: Callable[[int, int], list[T]], fits: Callable[[int, int], bool] = lambda start, end: True
    ) -> list[T]:
        """Call run(start, end) over all rows, as many at a time as fits(start, end) admits, one in any case.

        Gives the results in one list. Raises torch.OutOfMemoryError where one row alone is too much.
        """
        done: list[T] = []
        while len(done) < rows:
            start = len(done)
            step = min(rows - start, self.size or rows)
            while step > 1 and not fits(start, start + step):
                step -= 1
            try:
                done += run(start, start + step)
                self._went_well(step)
                continue
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                if step == 1:
                    raise torch.OutOfMemoryError(" ".join(str(error).split())) from None
            # Out of the except block: there the traceback would hold the tensors of the failed attempt.
            self.size, self._well = step // 2, 0
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return done

    def _went_well(self, step: int) -> None:
        self._well += step == self.size
        if self.size and self._well == _AGAIN:
            self.size, self._well = 2 * self.size, 0


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Also where not PyTorch's own allocator says so, but the driver, or a library that asked it for its workspace."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(sign in str(error) for sign in ("CUDA error: out of memory", "_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INIT"))


class Memory:
    """The embeddings of the texts used last, at most `most`, in one tensor [slots, d] that grows as they come."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # the one used last is last
        self._table: torch.Tensor | None = None

    def __call__(self, keys: Sequence[bytes], embed: Callable[[list[int]], torch.Tensor]) -> torch.Tensor:
        """Embeddings [u, d] of u different keys; embed(positions) makes those [v, d] of the keys not remembered."""
        new = [k for k, key in enumerate(keys) if key not in self._slots]
        fresh = embed(new) if new else None
        if fresh is not None and len(new) == len(keys):
            found = fresh
        else:
            assert self._table is not None  # something is remembered
            known = [(k, self._slots[key]) for k, key in enumerate(keys) if key in self._slots]
            found = self._table.new_empty(len(keys), self._table.shape[1])
            places, slots = torch.tensor(known).T.to(found.device)
            found[places] = self._table[slots]
            if fresh is not None:
                found[torch.tensor(new, device=found.device)] = fresh
        for key in keys:
            if key in self._slots:
                self._slots.move_to_end(key)
        if fresh is not None and self._most:
            self._store([keys[k] for k in new[-self._most :]], fresh[-self._most :])
        return found

    def _store(self, keys: Sequence[bytes], fresh: torch.Tensor) -> None:
        used = len(self._slots)
        slots = [self._slots.popitem(last=False)[1] for _ in range(used + len(keys) - self._most)]
        slots += range(used, used + len(keys) - len(slots))
        if self._table is None:
            self._table = fresh.new_empty(0, fresh.shape[1])
        if (need := max(slots) + 1) > len(self._table):
            larger = self._table.new_empty(min(self._most, max(need, 2 * len(self._table), 1024)), fresh.shape[1])
            larger[: len(self._table)] = self._table
            self._table = larger
        self._table[torch.tensor(slots, device=fresh.device)] = fresh
        self._slots.update(zip(keys, slots, strict=True))
