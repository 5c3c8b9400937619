"""Engines carry part references through the chain of steps; `local` uses the cores of this machine.

An engine is a function: it takes a job and the numbers of the parts to do, calls `work.run_part` for every step of
every part, and tells what happens as events. It never sees an image.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class EngineError(Exception):
    """An engine cannot be used: one line that says what to do."""


@dataclass(frozen=True)
class Resources:
    """What one step gets on the engine: parts at a time (default: all workers), rows per batch, and so on."""

    workers: int | None = None
    batch: int | None = None
    threads: int = 2  # in each worker, that decode and preprocess ahead of the model
    min_workers: int | None = None  # where the pool may grow and shrink between this and `workers`; on ray
    cpus: float | None = None  # for each worker; on ray
    gpus: float | None = None  # for each worker; on ray and beam
    runtime_env: Mapping[str, Any] = field(default_factory=dict)  # Ray's own: packages, variables; on ray
    accelerator: str | None = None  # its type: nvidia-l4 and the like on beam, L4 on ray
    memory: str | None = None  # such as 24GiB; on beam, and of dedup

    @property
    def gpus_each(self) -> float:
        """GPUs of a worker: one, where only their type is named."""
        return self.gpus if self.gpus is not None else float(self.accelerator is not None)


@dataclass(frozen=True)
class Engine:
    """Who carries the parts through the steps. Nothing here can change a result."""

    kind: Literal["local", "ray", "beam"] = "local"
    workers: int | None = None  # processes; default: one per core
    save_every_s: float = 60.0  # how much work of a slow part a crash may cost, at most; where saving is quick, 1 s
    part_time_limit_s: float | None = None  # for one attempt at a step of a part; the second that is over it, is lost
    silence_limit_s: float = 3600.0  # the same, from one finished batch to the next: a call that hangs
    address: str | None = None  # of a Ray cluster; default: RAY_ADDRESS, else one on this machine
    options: tuple[str, ...] = ()  # for Beam, such as --runner=...
    download: Resources = Resources(batch=128, threads=14)  # (14 + 2) x 128 rows under way, of a thousand in flight
    dedup: Resources = Resources()  # runs in the driver; only `memory` counts
    caption: Resources = Resources(batch=32)
    phrases: Resources = Resources(batch=256)
    ground: Resources = Resources(batch=32)
    score: Resources = Resources(batch=16)
    select: Resources = Resources(batch=4096)
    pack: Resources = Resources(batch=256)

    def workers_of(self, step: str) -> int:
        """How many workers do a step at a time, at most, as far as this machine can tell."""
        every = self.workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        return self.of(step).workers or every or 1

    def deadline(self, begun: float, heard: float) -> tuple[float, str]:
        """When an attempt that began at `begun` and finished something at `heard` is over a limit; which one."""
        silent = max(begun, heard) + self.silence_limit_s
        if self.part_time_limit_s is not None and begun + self.part_time_limit_s < silent:
            limit = self.part_time_limit_s
            return begun + limit, f"over engine.part_time_limit_s = {limit:g}, so its worker was ended"
        limit = self.silence_limit_s
        return silent, f"no batch was finished in engine.silence_limit_s = {limit:g}, so its worker was ended"

    def of(self, step: str) -> Resources:
        """What a step gets."""
        resources: Resources = getattr(self, step)
        return resources


@dataclass(frozen=True)
class Event:
    """Something happened to one step of one part.

    `rows`: so many more rows are done (of unfinished work). `saved`: so many in all, where only the store tells.
    `done`: published, or found done where not `fresh`; `footer` has the counts, and of these the worker did `rows` in
    `seconds`, without loading the model; the others were saved before. `spent`: the same two, where `done` is told by
    the store, which does not know them. `open`: a model was loaded, in `seconds`. `retry`: the attempt failed or its
    worker died; there will be another. `lost`: there will not. `wait`: nothing is left but what another run is at work
    on.
    """

    kind: Literal["rows", "saved", "done", "open", "retry", "lost", "wait", "spent"]
    step: str
    part: int
    rows: int = 0
    seconds: float = 0.0
    text: str = ""
    fresh: bool = True
    footer: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
