"""Who is at work on a store: runs by their records, a compaction by its journal. Neither begins beside the other.

Each writes its own sign before it looks for the other's, so of two that begin at once at least one stops; and each
renews its sign from a thread, so that a long silence means a death. Compactions stand in a row,
`takedown/compaction-NNNNN.json`: each creates the next number, which only one can.
"""

import functools
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from .store import Store, StoreError, to_json
from .takedown import FOLDER

_SILENT_S, _SILENT_HERE_S = 600.0, 86_400.0  # until a run or a compaction is not believed to be at work
_BEAT_S = 30.0
_READERS = 32
_JOURNAL = re.compile(r"compaction-(\d{5,})\.json")


@dataclass
class Journal:
    """A compaction's: the lists that it obeys and the parts that they touch, as soon as something is rewritten.

    Until its state is `done`, the next one takes both over.
    """

    store: Store
    name: str
    lists: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def document(self, state: str) -> dict[str, Any]:
        """As it is stored."""
        told = {"state": state, "lists": list(self.lists), "parts": list(self.parts)}
        return told | (sign() | {"updated": round(time.time(), 3)} if state == "running" else {})

    def note(self, state: str = "running") -> None:
        """Write it."""
        with self._lock:
            self.store.write_json(self.name, self.document(state))


def newest(store: Store) -> tuple[int, dict[str, Any]]:
    """The number of the newest compaction and its journal; 0 and an empty one where there was none."""
    found = [
        (int(match[1]), name) for name in store.names(FOLDER, "compaction-") if (match := _JOURNAL.fullmatch(name))
    ]
    number, name = max(found, default=(0, ""))
    return number, (store.read_json(f"{FOLDER}/{name}") if name else None) or {"state": "done"}


def begin(store: Store) -> Journal:
    """Take the next place in the row of compactions, with what the one before left undone.

    Raises StoreError where a run or another compaction is at work.
    """
    number, before = newest(store)
    if busy := at_work(store):
        raise StoreError(f"store {store.url}: {busy}; wait for its end, or stop it")
    lists, parts = (tuple(before[name]) if before["state"] != "done" else () for name in ("lists", "parts"))
    journal = Journal(store, f"{FOLDER}/compaction-{number + 1:05d}.json", lists, parts)
    if not store.create(journal.name, to_json(journal.document("running"))):
        raise StoreError(f"store {store.url}: another compaction has just begun; wait for its end")
    if busy := at_work(store):
        journal.note("stopped" if journal.lists else "done")
        raise StoreError(f"store {store.url}: {busy}; wait for its end, or stop it")
    return journal


def end(journal: Journal) -> None:
    """Say that all is done; journals of earlier ones are of no use any more."""
    journal.note("done")
    for name in journal.store.names(FOLDER, "compaction-"):
        if name.endswith(".wip"):
            journal.store.sweep(f"{FOLDER}/{name}")
        elif f"{FOLDER}/{name}" != journal.name:
            journal.store.remove(f"{FOLDER}/{name}")


def at_work(store: Store) -> str | None:
    """A run or a compaction of another process that seems to be at work on the store, in words, or None."""
    with ThreadPoolExecutor(_READERS) as pool:
        records = list(pool.map(lambda name: store.read_json(f"runs/{name}/run.json"), store.names("runs")))
    busy = [_who(record, "a run") for record in records if record and alive(record)]
    return busy[0] if busy else compacting(store)


def compacting(store: Store) -> str | None:
    """A compaction of another process that seems to be at work, in words, or None."""
    journal = newest(store)[1]
    return _who(journal, "a compaction") if alive(journal) else None


def unfinished(store: Store) -> str | None:
    """That a compaction is not at its end, so that results may not fit together, in words; else None."""
    if newest(store)[1]["state"] == "done":
        return None
    if busy := compacting(store):
        return f"{busy}; what is said here may change"
    return "a compaction was interrupted, so some parts may seem missing; the next `vesl run` finishes it first"


def alive(record: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a record may still be at work: on this machine, whether it is there."""
    if record["state"] != "running" or (record["pid"] == os.getpid() and is_here(record)):
        return False
    if is_dead(record):
        return False
    return bool(time.time() - record["updated"] < (_SILENT_HERE_S if is_here(record) else _SILENT_S))


def sign() -> dict[str, Any]:
    """Who this process is."""
    return {"machine": _machine(), "host": platform.node(), "pid": os.getpid()}


@functools.cache
def _machine() -> str:
    """Where a process id means something: this start of this machine, and this container of it."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def is_here(signed: Mapping[str, Any]) -> bool:
    """Whether who signed is, or was, a process of this machine."""
    if "machine" not in signed:  # by an earlier version
        return bool(signed.get("host") == platform.node())
    return bool(signed["machine"] == _machine())


def is_dead(signed: Mapping[str, Any]) -> bool:
    """Whether who signed is known to be dead, as it was a process of this machine."""
    if not is_here(signed):
        return False
    try:
        os.kill(signed["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


@dataclass(eq=False)
class _Beat:
    call: Callable[[], None]
    every_s: float
    due: float
    at_it: threading.Lock = field(default_factory=threading.Lock)


class _Heart:
    """The thread of this process that beats for all who want it; one for each part would be a tenth of a small one."""

    def __init__(self) -> None:
        self._beats: set[_Beat] = set()
        self._changed = threading.Condition()
        self._wakes = 0.0
        self._thread: threading.Thread | None = None

    def add(self, beat: _Beat) -> None:
        with self._changed:
            self._beats.add(beat)
            if self._thread is None or not self._thread.is_alive():  # a fork has no threads
                self._thread = threading.Thread(target=self._live, daemon=True, name="vesl-beat")
                self._thread.start()
            elif beat.due < self._wakes:
                self._changed.notify()

    def remove(self, beat: _Beat) -> None:
        """Afterwards it beats no more, nor is it just beating."""
        with self._changed:
            self._beats.discard(beat)
        with beat.at_it:
            pass

    def _live(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                due = [beat for beat in self._beats if beat.due <= now]
                if not due:
                    self._wakes = min((beat.due for beat in self._beats), default=now + _BEAT_S)
                    self._changed.wait(self._wakes - now)
            for beat in due:
                with beat.at_it, suppress(Exception):  # a store that is away for a moment
                    if beat in self._beats:
                        beat.call()
                beat.due = time.monotonic() + beat.every_s


_HEART = _Heart()


@contextmanager
def beating(call: Callable[[], None], every_s: float = _BEAT_S) -> Iterator[None]:
    """Call `call` now and then, from a thread, until the block ends."""
    beat = _Beat(call, every_s, time.monotonic() + every_s)
    _HEART.add(beat)
    try:
        yield
    finally:
        _HEART.remove(beat)


def _who(record: Mapping[str, Any], what: str) -> str:
    silence = time.time() - record["updated"]
    return f"{what} is at work on {record['host']} (process {record['pid']}, last sign {silence:.0f} s ago)"
