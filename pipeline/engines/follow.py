"""How an engine on other machines tells what happens: the store says which parts are done, whoever did them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ..leases import Waiting
from ..stage import part_name
from ..work import Job
from . import Event, Listener

_READERS = 8
_AWAY_S = 30.0  # between two looks at a store that is away, at most
_LOOK_S = 0.5


def follow(
    job: Job,
    parts: Sequence[int],
    running: Callable[[], bool],
    listen: Listener,
    poll_s: float = 1.0,
    told: set[tuple[str, int]] | None = None,
) -> None:
    """Tell every published part of every step as `done`, until `running` says no; those there at the start not fresh.

    Runs in the driver's main thread, so that what `listen` raises ends the run. `told` are those that were told before,
    and are not again. A store that is away is asked again, ever less often, while the workers go on; it raises only
    where it still is after the end.
    """
    store = job.open_store()
    wanted = {f"{part_name(part)}.parquet": part for part in parts}
    told = set() if told is None else told
    fresh, away_s = False, 0.0
    while True:
        going = running()  # asked before the last look, so that nothing is missed
        found: list[Event] = []
        try:
            for step in job.steps:
                there = {wanted[name] for name in store.names(step.folder, "part-") if name in wanted}
                new = [part for part in sorted(there) if (step.name, part) not in told]
                with ThreadPoolExecutor(_READERS) as pool:
                    footers = list(pool.map(store.footer, map(step.table, new)))
                for part, footer in zip(new, footers, strict=True):
                    if footer:
                        found.append(Event("done", step.name, part, footer=footer, fresh=fresh))
            away_s = 0.0
        except OSError:  # a store that is away
            away_s = min(_AWAY_S, 2 * away_s + poll_s)
            if not going and away_s == _AWAY_S:
                raise
        for event in found:
            told.add((event.step, event.part))
            listen(event)
        fresh = fresh or not away_s
        if not going and not away_s:
            return
        time.sleep(away_s or poll_s)


def others(waiting: Waiting[int], listen: Listener) -> list[int]:
    """Wait for what another run is at work on; return the parts that may be tried now, none if none is waited for."""
    if waiting:
        listen(Event("wait", "", -1, text=str(waiting)))
    while waiting:
        if free := waiting.free():
            return free
        time.sleep(_LOOK_S)
    return []
