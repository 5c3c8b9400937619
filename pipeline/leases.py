"""Leases: which run is at work on which part, so that runs on one store share the work and none is done twice.

A lease is a file among a part's unfinished work, `part-00042.wip/lease-00000`; so publishing the part ends it. Its
holder counts in it, every few seconds. Who meets the lease of another run goes on with other parts, and takes it over
where it did not change for long by the watcher's own clock: clocks of two machines are never compared. To take over is
to create the next number, which only one can.

A lease saves work and guards nothing: where two runs hold one after all, the first table that is created counts.

An attempt that ends gives its lease back, so a lease of the same run that nobody holds any more tells of a worker that
died.
"""

import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Generic, NamedTuple, TypeVar

from .journal import beating, is_dead, sign
from .store import Store, wip

T = TypeVar("T")
SILENT_S = 120.0  # that a lease may stay unchanged
POLL_S = 2.0  # between two looks at the leases of other runs
_BEAT_S = 15.0
_LEASE = re.compile(r"lease-(\d{5,})")
_READERS = 16
_TRIES = 5  # to be the first


class LeasedError(Exception):
    """Another run is at work on this step of this part."""


class Held(NamedTuple):
    """A lease: its file, and how many attempts of the same run died with the part."""

    name: str
    deaths: int


@contextmanager
def lease(store: Store, table: str, run: str) -> Iterator[Held]:
    """Hold the lease of a part's table for a run; for none where `run` is empty.

    Raises LeasedError where another run holds it. The lease of a process of the same run, or of one of this machine
    that is dead, is taken over: no two are given the same part by one run.
    """
    if not run:
        yield Held("", 0)
        return
    number = _take(store, table, run)
    name, signed, beats = f"{wip(table)}/{_name(number)}", _sign(run), 0

    def beat() -> None:
        nonlocal beats
        beats += 1
        if _newest(store, table) == number:  # else the part is published, or another run's
            store.replace(name, _encode(signed | {"beats": beats}))

    try:
        deaths = sum(_fell(_read(store, table, before), run) for before in range(number))
        with beating(beat, _BEAT_S):
            yield Held(name, deaths)
    finally:
        with suppress(Exception):  # it would but be silent
            _release(store, table, number, run if number else "")


def _take(store: Store, table: str, run: str) -> int:
    """Create the lease; return its number. Lower ones stay below it, so that who looks for none finds them."""
    number = 0
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # another run has just published, and swept the folder away
            if store.claim(f"{wip(table)}/{_name(number)}", _encode(_sign(run))):
                return number
        newest = _newest(store, table)
        if newest is not None and not _ours(_read(store, table, newest), run):
            break
        number = 0 if newest is None else newest + 1  # none: it was released meanwhile
    raise LeasedError(table)


def _release(store: Store, table: str, number: int, mourning: str = "") -> None:
    """Remove the lease and those before it, down to one that tells of a death in the run `mourning`."""
    for name in reversed(store.names(wip(table), "lease-")):
        if (found := _number(name)) is None or found > number:
            continue
        if found < number and mourning and _fell(_read(store, table, found), mourning):
            break  # without a gap: who takes the next one begins at the lowest number
        store.remove(f"{wip(table)}/{name}")
    if store.local:
        with suppress(OSError):  # it is gone, or has unfinished work in it
            os.rmdir(store.path(wip(table)))


def _newest(store: Store, table: str) -> int | None:
    numbers = [_number(name) for name in store.names(wip(table), "lease-")]
    return max((number for number in numbers if number is not None), default=None)


def _name(number: int) -> str:
    return f"lease-{number:05d}"


def _number(name: str) -> int | None:
    match = _LEASE.fullmatch(name)
    return int(match[1]) if match else None


def _read(store: Store, table: str, number: int) -> dict[str, Any]:
    with suppress(ValueError):
        return store.read_json(f"{wip(table)}/{_name(number)}") or {}
    return {}


def _encode(signed: Mapping[str, Any]) -> bytes:
    return json.dumps(signed).encode()


def _sign(run: str) -> dict[str, Any]:
    return {"run": run, **sign(), "id": uuid.uuid4().hex}


def _ours(signed: Mapping[str, Any], run: str) -> bool:
    """Whether a lease may be taken at once: it is of the same run, or its holder is known to be dead."""
    return bool(signed.get("run") == run) or is_dead(signed)


def _fell(signed: Mapping[str, Any], run: str) -> bool:
    """Whether a lease that is over was of an attempt of this run; not what its driver claimed from another run."""
    return bool(signed.get("run") == run) and not signed.get("claimed")


def give_back(store: Store, folders: Iterable[str], run: str) -> list[tuple[str, dict[str, Any]]]:
    """Remove the leases that a run still has below these folders: of workers that died, or that it ended.

    Return the tables that these were at work on, and what they signed; also where another run has it now.
    """
    fell, every = list[tuple[str, dict[str, Any]]](), list(folders)
    with ThreadPoolExecutor(_READERS) as pool:  # a bucket's listings take long
        listed = list(pool.map(lambda folder: store.names(folder, "part-"), every))
    for folder, names in zip(every, listed, strict=True):
        for name in names:
            table = f"{folder}/{name.removesuffix('.wip')}.parquet"
            if not name.endswith(".wip") or (number := _newest(store, table)) is None:
                continue
            signatures = [_read(store, table, before) for before in range(number + 1)]
            fell += [(table, signed) for signed in signatures if _fell(signed, run)]
            if signatures[-1].get("run") == run:
                _release(store, table, number)
    return fell


class Waiting(Generic[T]):
    """What a driver leaves to other runs for now.

    The driver looks at the leases, not the workers: so one clock watches each of them for all the time.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store, self._run = store, run
        self._tasks: dict[str, T] = {}  # by table
        self._seen: dict[str, tuple[Any, float]] = {}  # by table: its lease, and since when it is like that
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, table: str, task: T) -> None:
        """Wait for the end of a lease."""
        self._tasks[table] = task

    def free(self) -> list[T]:
        """The tasks that may be tried now; looks every few seconds, else there are none."""
        if not self._tasks or time.monotonic() - self._looked < POLL_S:
            return []
        with ThreadPoolExecutor(_READERS) as pool:
            answers = list(pool.map(self._is_free, self._tasks))
        self._looked = time.monotonic()
        tables = [table for table, free in zip(self._tasks, answers, strict=True) if free]
        for table in tables:
            self._seen.pop(table, None)
        return [self._tasks.pop(table) for table in tables]

    def _is_free(self, table: str) -> bool:
        try:
            number = _newest(self._store, table)
            signed = _read(self._store, table, number) if number is not None else {}
            if number is None or _ours(signed, self._run):
                return True
            before, since = self._seen.get(table, (None, 0.0))
            if before != (number, signed):
                self._seen[table] = (number, signed), time.monotonic()
                return False
            # The claim is one of this run, so whichever of its workers comes first may have it.
            claim, signature = f"{wip(table)}/{_name(number + 1)}", _encode(_sign(self._run) | {"claimed": True})
            return time.monotonic() - since > SILENT_S and self._store.claim(claim, signature)
        except OSError:  # a store that is away for a moment
            return False

    def __str__(self) -> str:
        names = list(self._tasks)
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"waiting for another run, which is at work on {', '.join(names[:3])}{rest}"
