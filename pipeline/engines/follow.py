"""How an engine on other machines tells what happens: the store says which parts are done, whoever did them."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

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
    fresh, last, away_s, looked, rest_until = False, False, 0.0, time.monotonic(), 0.0
    listed: deque[tuple[Step, int]] = deque()  # published, and not told yet
    while True:
        going = running()  # asked before the last look, so that nothing is missed
        now = time.monotonic()
        if going and now < rest_until and not listed:
            time.sleep(poll_s)
            continue
        found: list[Event] = []
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                if not listed:
                    saved = now - looked > _SAVED_EVERY_S
                    looked = now if saved else looked
                    folders = list(pool.map(lambda step: store.names(step.folder, "part-"), job.steps))
                    last, rest_until = not going, time.monotonic() + _REST * (time.monotonic() - now)
                    for step, names in zip(job.steps, folders, strict=True):
                        there = {wanted[n[:-8]] for n in names if n.endswith(".parquet") and n[:-8] in wanted}
                        listed.extend((step, part) for part in sorted(there))
                        begun = {wanted[n[:-4]] for n in names if n.endswith(".wip") and n[:-4] in wanted} - there
                        if saved:
                            found += [e for e in pool.map(partial(_saved, store, step), sorted(begun)) if e.rows]
                listed = deque((step, part) for step, part in listed if (step.name, part) not in told)
                tables = [step.table(part) for step, part in islice(listed, _AT_ONCE)]
                for footer in pool.map(store.footer, tables):
                    step, part = listed.popleft()
                    found += [Event("done", step.name, part, footer=footer, fresh=fresh)] if footer else []
            away_s = 0.0
        except OSError:  # a store that is away
            away_s = min(_AWAY_S, 2 * away_s + poll_s)
            if not going and away_s == _AWAY_S:
                raise
        for event in found:
            told.update([(event.step, event.part)] if event.kind == "done" else [])
            listen(event)
        if away_s or not listed:
            fresh = fresh or not away_s
            if last and not away_s:
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
