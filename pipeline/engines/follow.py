"""How an engine on other machines tells what happens: the store says which parts are done, whoever did them."""

import time
from collections.abc import Callable, Sequence

from ..stage import part_name
from ..work import Job
from . import Event, Listener


def follow(job: Job, parts: Sequence[int], running: Callable[[], bool], listen: Listener, poll_s: float = 1.0) -> None:
    """Tell every published part of every step as `done`, until `running` says no; those there at the start not fresh.

    Runs in the driver's main thread, so that what `listen` raises ends the run.
    """
    store = job.open_store()
    wanted = {f"{part_name(part)}.parquet": part for part in parts}
    told: dict[str, set[int]] = {step.name: set() for step in job.steps}
    fresh = False
    while True:
        going = running()  # asked before the last look, so that nothing is missed
        for step in job.steps:
            there = {wanted[name] for name in store.names(step.folder, "part-") if name in wanted}
            for part in sorted(there - told[step.name]):
                told[step.name].add(part)
                if footer := store.footer(step.table(part)):
                    listen(Event("done", step.name, part, footer=footer, fresh=fresh))
        fresh = True
        if not going:
            return
        time.sleep(poll_s)
