"""The processes of a run: the group that torchrun made, and the signals that ask a process to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from ..contract import ModelError


class StoppedError(Exception):
    """The run was asked to stop by a signal, its `number`, and has saved its state."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def joined() -> Iterator[tuple[int, int, torch.device]]:
    """Join the group that torchrun made, if it did: (rank, world, this rank's device)."""
    rank, world, local = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    mine = world > 1 and not dist.is_initialized()
    if mine:
        device_id = device if cuda else None
        patience = timedelta(hours=2)  # an evaluation is waited for
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=device_id)
    try:
        yield rank, world, device
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Signals that ask to stop, as they come; a second SIGINT interrupts at once."""
    found: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if found and number == signal.SIGINT:
            raise KeyboardInterrupt
        found.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree(step: int, folder: Path, world: int) -> None:
    """Raise ModelError where the ranks would go on from different steps."""
    if world > 1:
        steps: list[Any] = [None] * world
        dist.all_gather_object(steps, step)
        dist.barrier()  # see `Run.save` in train.py
        if len(set(steps)) > 1:
            raise ModelError(
                f"{folder}: the processes do not see the same checkpoints: all nodes must share this folder"
            )
