"""Checkpoints: everything a run needs to continue as if it had never stopped.

One file a step, written beside its place and moved there, so that a file with its final name is whole unless the disk
damaged it later; then the one before it is taken, and said so.
"""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..contract import ModelError

log = logging.getLogger(__name__)
_PATTERN = "step-*.pt"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` (tensors and plain values) as the checkpoint of `step`; keep the newest `keep`, at least one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    unfinished = path.with_suffix(".wip")
    try:
        with unfinished.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch hides that the disk is full
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot be written (is the disk full?): {str(error).splitlines()[0]}") from None
    unfinished.replace(path)
    for old in sorted(folder.glob(_PATTERN))[: -max(keep, 1)]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict[str, Any]:
    """One checkpoint, on the CPU. Only tensors and plain values are read (no pickled code). Raises ModelError where
    it is damaged, OSError where it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            if part := parts.testzip():  # torch.load compares no checksums
                raise zipfile.BadZipFile(part)
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"{path}: there is no such checkpoint") from None
    except (MemoryError, OSError):  # says nothing of the file
        raise
    except Exception as error:  # noqa: BLE001  (what a damaged file raises depends on where it is damaged)
        raise ModelError(f"{path}: is damaged or no checkpoint ({type(error).__name__})") from None
    return state


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    Raises ModelError where there are checkpoints, but every one is damaged: starting anew is the user's decision.
    """
    paths = sorted(folder.glob(_PATTERN), reverse=True)
    for path in paths:
        try:
            return path, load(path)
        except ModelError as error:
            log.warning("%s; trying the one before it", error)
    if paths:
        raise ModelError(f"{folder}: no checkpoint can be read; remove the folder to start anew")
    return None
