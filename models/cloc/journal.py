"""What a run says of itself: a JSONL file, TensorBoard, and a progress bar."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "A10G": 70e12}  # bf16


class Journal:
    """The log of rank 0; a context manager. Lines after the step that is resumed from are taken back."""

    def __init__(self, folder: Path, step: int, steps: int, console: Console | None = None) -> None:
        """`step` done of `steps`."""
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= step]
            unfinished = self.path.with_suffix(".wip")
            unfinished.write_text("".join(f"{line}\n" for line in kept))
            unfinished.replace(self.path)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        console = console or Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=step, numbers="")

    def __enter__(self) -> "Journal":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.board.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=step)

    def write(self, step: int, values: Mapping[str, Any], numbers: str = "") -> None:
        """One line of the file and one point of each curve; a number that is not finite is written as null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, step)
        if numbers:
            self.progress.update(self.task, completed=step, numbers=numbers)
            if not self.progress.console.is_terminal:
                self.progress.console.print(f"step {step}: {numbers}", highlight=False, soft_wrap=True)


class Meter:
    """Where the time goes, between one line of the log and the next."""

    def __init__(self, device: torch.device, step: int) -> None:
        """Start the clock after `step`."""
        self.cuda = device.type == "cuda"
        name = torch.cuda.get_device_name() if self.cuda else ""
        self.peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), 0.0)
        self.flops = 0.0  # of one step on this rank
        self.start(step)

    def start(self, step: int) -> None:
        """Forget what was before: the next rates count from `step` and now."""
        self.since, self.wait, self.step = time.perf_counter(), 0.0, step

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for data."""
        start = time.perf_counter()
        yield
        self.wait += time.perf_counter() - start

    @contextmanager
    def counting(self, step: int, passes: int) -> Iterator[None]:
        """Around a step: count the operations of the first one, where the device's peak is known.

        `passes`: how often it goes through the network, a backward pass being two; more than three are recomputation,
        which is no use of the device, and taken off. 0: it cannot be counted.
        """
        if self.flops or not self.peak or not passes:
            yield
            return
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            yield
        self.flops = counter.get_total_flops() * 3 / passes
        self.start(step)

    def rates(self, step: int, batch: int) -> dict[str, float]:
        """Since the last call: samples/s of all ranks, share of the time that waited for data; on a GPU also MFU
        (counted operations over the device's peak) and the most memory held."""
        seconds, steps = max(time.perf_counter() - self.since, 1e-9), step - self.step
        found = {"samples_per_s": steps * batch / seconds, "data_wait": self.wait / seconds} if steps else {}
        if self.flops and steps:
            found["mfu"] = self.flops * steps / seconds / self.peak
        if self.cuda:
            found["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.start(step)
        return found


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # the last line of a killed run may be half a line
