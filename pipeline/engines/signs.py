"""Signs of life: how a driver learns that a process at its work is frozen, which neither Ray nor Beam notices.

Stopped, in a paused container, or stuck beneath Python: such a process ends nothing and tells nothing, nor does it die.
"""

import os
import threading
import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..journal import is_dead, sign

K = TypeVar("K", bound=Hashable)
_LOOKS = 8  # that find the same, in the time that it may last: time alone may pass where nobody can do anything
_BEAT_S = 1.0
_STARTS_S = 60.0  # that a worker may need until it is at work, at least
_SIGN = "alive-"


class Unchanged(Generic[K]):
    """Finds what does not change in `limit_s`, in looks that are spread over that time."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self._at = limit_s, 0.0
        self._seen: dict[K, tuple[object, int]] = {}

    def due(self) -> bool:
        """Whether it is time for another look."""
        if (now := time.monotonic()) < self._at:
            return False
        self._at = now + self.limit_s / _LOOKS
        return True

    def look(self, found: Mapping[K, object]) -> list[K]:
        """What has had the same value for so long; its time begins anew. To be called at each look that is due."""
        before, self._seen, same = self._seen, {}, list[K]()
        for key, value in found.items():
            last, looks = before.get(key, (None, 0))
            if looks == 0 or value != last:
                self._seen[key] = value, 1
            elif looks < _LOOKS:
                self._seen[key] = value, looks + 1
            else:
                same.append(key)
        return same


def starts(limit_s: float) -> Unchanged[Any]:
    """The same for what begins, which always takes a while."""
    return Unchanged(max(limit_s, _STARTS_S))


class _Pulse:
    """The sign of this process in a folder: a file that is written anew every second, until the folder goes."""

    def __init__(self, folder: str) -> None:
        self.begun = self.busy = 0
        self.lock = threading.Lock()
        self._path = Path(folder, f"{_SIGN}{os.getpid()}")
        threading.Thread(target=self._beat, daemon=True, name="vesl-pulse").start()

    def _beat(self) -> None:
        written = self._path.with_name(f".{self._path.name}")
        while True:
            with suppress(Exception):  # it would but be silent
                if not os.path.lexists(self._path.parent):
                    return
                try:
                    written.write_text(f"{self.begun} {self.busy}")
                    written.replace(self._path)
                except OSError:  # a full disk; the file's time is a sign, too
                    os.utime(self._path)
            time.sleep(_BEAT_S)


_PULSES: dict[str, _Pulse] = {}  # of this process, by folder
_LOCK = threading.Lock()


def live(folder: str) -> _Pulse:
    """Show signs of life in a folder of this machine, from now on."""
    with _LOCK:
        if folder not in _PULSES:
            _PULSES[folder] = _Pulse(folder)
        return _PULSES[folder]


@contextmanager
def at_work(folder: str) -> Iterator[None]:
    """Show signs of life, also that there is work at hand; none where the folder is not on this machine."""
    if not os.path.isdir(folder):
        yield
        return
    pulse = live(folder)
    with pulse.lock:
        pulse.begun, pulse.busy = pulse.begun + 1, pulse.busy + 1
    try:
        yield
    finally:
        with pulse.lock:
            pulse.busy -= 1


class Silence:
    """Watches the processes that show signs of life in a folder, for `limit_s` each.

    With `all_here`, the workers are all of this machine, and something is wrong too where none of them is at work on
    anything for as long: one may be frozen since before its first sign.
    """

    def __init__(self, folder: str, limit_s: float, all_here: bool) -> None:
        self._folder, self._all_here = Path(folder), all_here
        self._processes, self._work = Unchanged[int](limit_s), starts(limit_s)

    def broken(self) -> tuple[set[int], str] | None:
        """The ids of processes that are frozen, none where nobody is at work, and why; None where all is well."""
        one, every = self._processes.due(), self._work.due()
        signs = dict[int, tuple[int, str]]()
        for path in self._folder.glob(f"{_SIGN}*") if one or every else ():
            if not is_dead(sign() | {"pid": (pid := int(path.name.removeprefix(_SIGN)))}):
                signs[pid] = path.stat().st_mtime_ns, path.read_text()
        if one and (frozen := self._processes.look(signs)):
            limit = f"in {self._processes.limit_s:g} s (engine.silence_limit_s)"
            return set(frozen), f"a worker gave no sign of life {limit}"
        work = {pid: text for pid, (_, text) in signs.items()}
        idle = self._all_here and all(text.endswith(" 0") for text in work.values())
        if every and self._work.look({"work": work} if idle else {}):
            limit = f"in {self._work.limit_s:g} s (engine.silence_limit_s, a minute at least)"
            return set(), f"no worker was at work on anything {limit}"
        return None
