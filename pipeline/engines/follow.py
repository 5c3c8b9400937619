"""How an engine on other machines tells what happens: the store says which parts are done, whoever did them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from ..leases import Waiting
from ..stage import Step, part_name
from ..store import Store, wip
from ..work import Job, piece
from . import Event, Listener

_READERS = 8
_AWAY_S = 30.0  # between two looks at a store that is away, at most
_LOOK_S = 0.5
_SAVED_EVERY_S = 15.0  # between two looks at what is saved of unfinished parts
_AT_ONCE = 5000  # footers, that are told before the next are read
_REST = 20  # times what the listing took, at least, until the next: it grows with the number of parts


def follow(
    job: Job,
    parts: Sequence[int],
    running: Callable[[], bool],
    listen: Listener,
    poll_s: float = 1.0,
    told: set[tuple[str, int]] | None = None,
) -> None:
    """Tell every published part of every step as `done`, until `running` says no; those there at the start not fresh.

    Now and then also how many rows of others are `saved`. `running` is asked each `poll_s`, and may itself tell of a
    part sooner than the store, noting it in `told`: those are not told again.
    Runs in the driver's main thread, so that what `listen` raises ends the run. A store that is away is asked again,
    ever less often, while the workers go on; it raises only where it still is after the end.
    """
    store = job.store
    wanted = {part_name(part): part for part in parts}
    told = set() if told is None else told
    fresh, away_s, looked, rest_until = False, 0.0, time.monotonic(), 0.0
    while True:
        going = running()  # asked before the last look, so that nothing is missed
        now = time.monotonic()
        if going and now < rest_until:
            time.sleep(poll_s)
            continue
        look = now - looked > _SAVED_EVERY_S
        looked = now if look else looked
        found, room = list[Event](), _AT_ONCE
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                listed = list(pool.map(lambda step: store.names(step.folder, "part-"), job.steps))
                rest_until = time.monotonic() + _REST * (time.monotonic() - now)
                for step, names in zip(job.steps, listed, strict=True):
                    there = {wanted[name[:-8]] for name in names if name.endswith(".parquet") and name[:-8] in wanted}
                    new = [part for part in sorted(there) if (step.name, part) not in told][:room]
                    room -= len(new)
                    begun = {wanted[name[:-4]] for name in names if name.endswith(".wip") and name[:-4] in wanted}
                    for part, footer in zip(new, pool.map(store.footer, map(step.table, new)), strict=True):
                        found += [Event("done", step.name, part, footer=footer, fresh=fresh)] if footer else []
                    if look:
                        found += [e for e in pool.map(partial(_saved, store, step), sorted(begun - there)) if e.rows]
            away_s = 0.0
        except OSError:  # a store that is away
            away_s = min(_AWAY_S, 2 * away_s + poll_s)
            if not going and away_s == _AWAY_S:
                raise
        for event in found:
            told.update([(event.step, event.part)] if event.kind == "done" else [])
            listen(event)
        if not room and not away_s:  # there are more
            rest_until = 0.0
            continue
        fresh = fresh or not away_s
        if not going and not away_s:
            return
        time.sleep(away_s or poll_s)


def _saved(store: Store, step: Step, part: int) -> Event:
    spans = map(piece, store.names(wip(step.table(part))))
    return Event("saved", step.name, part, rows=max((span[1] for span in spans if span), default=0))


def others(waiting: Waiting[int], listen: Listener) -> list[int]:
    """Wait for what another run is at work on; return the parts that may be tried now, none if none is waited for."""
    if waiting:
        listen(Event("wait", "", -1, text=str(waiting)))
    while waiting:
        if free := waiting.free():
            return free
        time.sleep(_LOOK_S)
    return []
