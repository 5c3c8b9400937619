"""The gradients of one global batch, in one forward pass or, where memory is short, in several."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data import Batch
from .model import Features

Objective = Callable[[Features, Batch, int], tuple[Tensor, dict[str, Tensor]]]


def backward(
    model: nn.Module, batches: list[Batch], objective: Objective, step: int, autocast: Callable[[], Any]
) -> dict[str, Tensor]:
    """Add the gradients of one global batch to the parameters; returns the parts of its loss.

    With several micro-batches the contrast still runs over all of them (gradient caching, Gao et al. 2021): features
    are made without a graph, the loss gives their gradients, and each micro-batch is done again to pass them on.
    """
    if len(batches) == 1:
        with autocast():
            features = model(batches[0])
        loss, parts = objective(features, batches[0], step)
        loss.backward()
        return parts
    with torch.no_grad(), autocast():
        pieces = [vars(model(batch)) for batch in batches]
    names = [name for name, value in pieces[0].items() if value is not None]
    leaves = {n: _join([piece[n] for piece in pieces]).requires_grad_() for n in names}
    slots = {n: torch.cat([getattr(batch, n) for batch in batches]) for n in ("boxes", "valid", "text_id")}
    loss, parts = objective(Features(**leaves), replace(batches[0], **slots), step)  # type: ignore[arg-type]
    loss.backward()
    start = 0
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        wait = nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
        with wait:
            with autocast():
                piece = vars(model(batch))
            end = start + len(batch.images)
            graph = torch.zeros((), device=loss.device)
            for n in names:
                gradient = leaves[n].grad
                if gradient is not None and piece[n].requires_grad:
                    share = gradient[start:end] if gradient.ndim else gradient / len(batches)
                    graph = graph + (piece[n].float() * share).sum()
            graph.backward()
        start = end
    return parts


def _join(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces).float() if pieces[0].ndim else pieces[0].clone()


def split(batch: Batch, size: int) -> list[Batch]:
    """Micro-batches of `size` images; the different phrases are kept to those that each needs."""
    if size >= len(batch.images):
        return [batch]
    pieces = []
    for start in range(0, len(batch.images), size):
        rows = slice(start, start + size)
        used, phrase = batch.phrase[rows].unique(return_inverse=True)
        pieces.append(
            Batch(
                batch.images[rows], batch.captions[rows], batch.boxes[rows], batch.valid[rows], batch.phrases[used],
                phrase, batch.text_id[rows], batch.keys[rows],
            )
        )  # fmt: skip
    return pieces
