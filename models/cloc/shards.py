"""Region-text shards as an endless stream: what stands where in an epoch, and how its bytes are reached.

The order is a pure function of (seed, epoch), so the work splits without loss or repeats and a stream goes on from a
cursor at no cost: the shards in random order, laid end to end on a circle of N positions, cut at a random place. Rank r
of W has the positions [rN/W, (r+1)N/W), each of its workers a piece of them, and each piece falls into windows whose
samples are permuted. A window's shards are open while it is read, and the next window's are being opened meanwhile.
Nothing is ever extracted from an archive: its headers are walked once, and members are read by their place.
"""

import errno
import hashlib
import json
import os
import re
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
from fsspec.implementations.local import LocalFileSystem

from ...transforms.outcomes import Drop
from ...transforms.shards import members
from ..contract import ModelError

_T = TypeVar("_T")
_PAUSES_S: tuple[float, ...] = (0.5, 2.0, 5.0)  # between tries, where the store may only be busy
_BLOCK, _BLOCKS = 1 << 24, 4  # a bucket's shard is copied in requests of so many bytes, so many at once
_SHARD = re.compile(r"[\w.+=-]+\.tar", re.ASCII)
_MEMBER = re.compile(r"(?:\./)?([\w+=-]{1,200})\.(jpg|json)", re.ASCII)
_OURS_TO_MEND = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EDQUOT)


class DataError(ModelError):
    """The training data cannot be read: one line that says which and why."""


class Folder:
    """A folder or a bucket's prefix; may be sent to another process. Faults that may pass are tried again."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """Raises DataError where the URL's scheme, its driver or its options are not usable."""
        self.url, self._options = url, {**(options or {}), "use_listings_cache": False}
        try:
            fs, root = fsspec.url_to_fs(url, **self._options)
        except (ValueError, ImportError, TypeError) as error:
            raise DataError(f"{url}: {error}") from None
        self._root, self.local = root.rstrip("/"), isinstance(fs, LocalFileSystem)

    @property
    def _fs(self) -> Any:
        return fsspec.url_to_fs(self.url, **self._options)[0]  # from its cache, which knows one process from another

    def path(self, name: str) -> str:
        """The full path of a file, as the file system names it."""
        return f"{self._root}/{name}"

    def sizes(self) -> dict[str, int]:
        """The names in the folder, and their bytes. Raises FileNotFoundError, or what the driver raises."""
        found = patiently(lambda: self._fs.ls(self._root, detail=True))
        return {entry["name"].rstrip("/").rpartition("/")[2]: int(entry.get("size") or 0) for entry in found}

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError, or what the driver raises."""
        return bytes(patiently(lambda: self._fs.cat_file(self.path(name))))

    def open(self, name: str) -> BinaryIO:
        """A file to read here and there: a bucket's is copied to one without a name, gone with us even by a kill."""
        if self.local:
            return patiently(lambda: open(self.path(name), "rb", buffering=0))
        path = self.path(name)
        size = int(patiently(lambda: self._fs.info(path))["size"])
        copy = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  (the caller closes it)
        try:
            for at in range(0, size, _BLOCK * _BLOCKS):
                starts = list(range(at, min(size, at + _BLOCK * _BLOCKS), _BLOCK))
                for block in self.ranges([(name, start, min(_BLOCK, size - start)) for start in starts]):
                    if isinstance(block, Exception):
                        raise block
                    copy.write(block)
        except BaseException:
            copy.close()
            raise
        return copy

    def ranges(self, wanted: Sequence[tuple[str, int, int]]) -> list[bytes | Exception]:
        """(name, offset, size) of many pieces, at once where it is a bucket; an exception in place of what failed."""
        if self.local:
            return [self._piece(*piece) for piece in wanted]
        found: list[bytes | Exception] = [ValueError("not read")] * len(wanted)
        todo = list(range(len(wanted)))
        for pause in (*_PAUSES_S, None):
            paths = [self.path(wanted[i][0]) for i in todo]
            starts, ends = [wanted[i][1] for i in todo], [wanted[i][1] + wanted[i][2] for i in todo]
            try:
                pieces = self._fs.cat_ranges(paths, starts, ends, on_error="return")
            except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
                pieces = [error] * len(todo)
            for i, data in zip(todo, pieces, strict=True):
                short = not isinstance(data, Exception) and len(data) != wanted[i][2]
                found[i] = ValueError(f"{wanted[i][0]} is shorter than the place that is cited") if short else data
            todo = [i for i in todo if _may_pass(found[i])]
            if not todo or pause is None:
                break
            time.sleep(pause)
        return found

    def _piece(self, name: str, offset: int, size: int) -> bytes | Exception:
        try:
            with open(self.path(name), "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
            return data if len(data) == size else ValueError(f"{name} is shorter than the place that is cited")
        except OSError as error:
            return error


def _may_pass(found: object) -> bool:
    lasting = isinstance(found, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError))
    ours = isinstance(found, OSError) and found.errno in (errno.EINVAL, *_OURS_TO_MEND)
    return isinstance(found, Exception) and not lasting and not ours


def patiently(call: Callable[[], _T]) -> _T:
    """Call, and call again after a while where the fault may pass. Raises the last one."""
    for pause in _PAUSES_S:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return call()


@dataclass(frozen=True)
class Index:
    """What `index.json` says: the shards and how many samples each has, int64 [shards]; the file's own hash."""

    names: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    sha256: str
    warnings: tuple[str, ...]


def read_index(folder: Folder) -> Index:
    """Read `index.json` and look, once, whether its shards are there. Raises DataError."""
    where = f"{folder.url}/index.json"
    try:
        data = folder.read("index.json")
        sizes = folder.sizes()
    except FileNotFoundError:
        raise DataError(f"{where} is not there; `vesl run` writes it with the shards") from None
    except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
        raise DataError(f"{where}: {type(error).__name__}: {error}") from None
    try:
        document = json.loads(data)
        names = tuple(str(shard["name"]) for shard in document["shards"])
        counts = [shard["samples"] for shard in document["shards"]]
        declared = [shard.get("bytes") for shard in document["shards"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where} is no index of shards: {type(error).__name__}: {error}") from None
    if bad := [name for name in names if not _SHARD.fullmatch(name)] or [n for n, k in Counter(names).items() if k > 1]:
        raise DataError(f"{where} is no index of shards: the name {bad[0]!r} is not allowed, or is there twice")
    if not all(type(count) is int and 0 <= count < 1 << 40 for count in counts):
        raise DataError(f"{where} is no index of shards: `samples` is not a number of samples")
    if missing := [name for name in names if name not in sizes]:
        raise DataError(
            f"{folder.url}: {len(missing)} of the {len(names)} shards of index.json are not there: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    if not sum(counts):
        raise DataError(f"{where} names no sample")
    warnings = [] if document.get("complete", True) else [f"{where} says that it is not complete: training on a part"]
    if other := [n for n, size in zip(names, declared, strict=True) if size is not None and size != sizes[n]]:
        warnings.append(f"{folder.url}: {len(other)} shards have not the size that index.json says: {other[0]}, ...")
    return Index(names, np.array(counts, np.int64), hashlib.sha256(data).hexdigest(), tuple(warnings))


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a worker's stream goes on: at a position of the permuted window `window` of its piece of `epoch`."""

    epoch: int = 0
    window: int = 0
    position: int = 0


@dataclass(frozen=True)
class Order:
    """Which sample a worker reads when. `counts` is int64 [shards]; `workers` counts those of each rank."""

    counts: npt.NDArray[np.int64]
    seed: int
    shuffle: int
    rank: int
    world: int
    workers: int

    def bounds(self, worker: int) -> tuple[int, int]:
        """A worker's positions [first, end) of every epoch."""
        total = int(self.counts.sum())
        first, end = self.rank * total // self.world, (self.rank + 1) * total // self.world
        return first + worker * (end - first) // self.workers, first + (worker + 1) * (end - first) // self.workers

    def windows(self, worker: int) -> int:
        """How many windows a worker has in an epoch; their sizes differ by one at most."""
        first, end = self.bounds(worker)
        return -(-(end - first) // self.shuffle)

    def window(self, worker: int, at: Cursor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The samples of a window, as they are read: index of the shard, and index in it; int64 [samples]."""
        first, end = self.bounds(worker)
        begin, stop = (first + i * (end - first) // self.windows(worker) for i in (at.window, at.window + 1))
        # RandomState's streams are frozen by numpy, so that a run goes on alike under a later version.
        random = np.random.RandomState(_words(self.seed, at.epoch))
        shards = random.permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        places = np.random.RandomState(_words(self.seed, at.epoch, begin)).permutation(np.arange(begin, stop))
        places = (places + int(random.random_sample() * ends[-1])) % ends[-1]
        which = np.searchsorted(ends, places, side="right")
        return shards[which], places - (ends - self.counts[shards])[which]

    def after(self, worker: int, at: Cursor) -> Cursor:
        """The beginning of the next window."""
        return Cursor(at.epoch, at.window + 1) if at.window + 1 < self.windows(worker) else Cursor(at.epoch + 1)


def _words(*parts: int) -> npt.NDArray[np.uint32]:
    return np.frombuffer(hashlib.blake2b(repr(parts).encode(), digest_size=32).digest(), np.uint32)


@dataclass
class Entry:
    """A sample's places in its tar: (offset, bytes) of `KEY.json` and, unless it is referenced, of `KEY.jpg`."""

    key: str
    json: tuple[int, int] | None = None
    jpg: tuple[int, int] | None = None


def walk(file: BinaryIO) -> tuple[list[Entry], Counter[str]]:
    """The samples of a tar from anybody, in order, those without JSON last; and what else was met, counted.

    Links, devices, names with folders, absolute names and whatever has an unreadable header are no samples
    (`bad_member`); of two members of one name the first counts (`duplicate_member`); a tar that ends early or has a
    broken header has the samples before it (`bad_tar`). Members of other kinds of name are nobody's fault.
    """
    found: dict[str, Entry] = {}
    notes: Counter[str] = Counter()
    try:
        for name, start, size in members(file, os.fstat(file.fileno()).st_size):
            match = _MEMBER.fullmatch(name or "")
            if match is None:
                notes["bad_member"] += not name or name.endswith((".jpg", ".json"))
                continue
            entry = found.setdefault(match[1], Entry(match[1]))
            notes["duplicate_member"] += getattr(entry, match[2]) is not None
            setattr(entry, match[2], getattr(entry, match[2]) or (start, size))
    except tarfile.HeaderError:
        notes["bad_tar"] += 1
    return sorted(found.values(), key=lambda entry: entry.json is None), +notes


class Shard:
    """An open shard."""

    def __init__(self, folder: Folder, name: str, samples: int) -> None:
        """Open and walk it; `samples` is what the index says. Raises what the driver raises."""
        self._file = folder.open(name)
        self.name = name
        self.entries, self.notes = walk(self._file)
        self.warning = f"{name}: it has {len(self.entries)} samples, index.json says {samples}"
        if len(self.entries) == samples:
            self.warning = ""

    def read(self, place: tuple[int, int]) -> bytes:
        """A member's bytes. Raises Drop: shard_unreadable."""
        try:
            data = os.pread(self._file.fileno(), place[1], place[0])
        except OSError as error:
            raise Drop("shard_unreadable", str(error)) from None
        if len(data) != place[1]:
            raise Drop("shard_unreadable", "it has become shorter")
        return data

    def close(self) -> None:
        """Close it; a copy is gone then."""
        self._file.close()


@dataclass
class Window:
    """Samples that are read together: for each its shard (None: not readable) and its index in it."""

    at: Cursor
    names: Sequence[str]
    shards: dict[int, Shard | None]
    which: npt.NDArray[np.int64]
    index: npt.NDArray[np.int64]
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.which)

    def name(self, position: int) -> str:
        """Where a sample lies, for a person."""
        return f"{self.names[int(self.which[position])]}, sample {self.index[position]}"

    def entry(self, position: int) -> tuple[Shard, Entry, Counter[str]]:
        """A sample's shard and places, and (with its first sample) what else was met in the shard.

        Raises Drop: shard_unreadable, missing_sample.
        """
        shard, i = self.shards[int(self.which[position])], int(self.index[position])
        if shard is None:
            raise Drop("shard_unreadable")
        if i >= len(shard.entries):
            raise Drop("missing_sample")
        return shard, shard.entries[i], shard.notes if i == 0 else Counter()


def windows(folder: Folder, names: Sequence[str], order: Order, worker: int, at: Cursor) -> Iterator[Window]:
    """A worker's windows without end, from the one at a cursor on. Raises DataError where this machine is full."""

    def load(at: Cursor, held: Mapping[int, Shard | None]) -> Window:
        which, index = order.window(worker, at)
        window = Window(at, names, {}, which, index)
        for i in np.unique(which).tolist():
            window.shards[i] = held.get(i)
            try:
                window.shards[i] = held.get(i) or Shard(folder, names[i], int(order.counts[i]))
            except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
                if isinstance(error, OSError) and error.errno in _OURS_TO_MEND:
                    raise DataError(
                        f"{names[i]}: {error} while {len(window.shards)} shards are open in {tempfile.gettempdir()}; "
                        "make room, raise `ulimit -n`, or lower train.data.shuffle or workers"
                    ) from None
                window.warnings.append(f"{names[i]} cannot be read: {type(error).__name__}: {error}")
        window.warnings += [shard.warning for shard in window.shards.values() if shard and shard.warning]
        return window

    held: dict[int, Shard | None] = {}
    ahead = start(load, at, held)
    try:
        while True:
            window = ahead.result()
            for i, shard in held.items():
                if shard and window.shards.get(i) is not shard:
                    shard.close()
            held = window.shards
            at = order.after(worker, at)
            ahead = start(load, at, held)
            yield window
    finally:
        for shard in held.values():
            if shard:
                shard.close()


def start(call: Callable[..., _T], *args: Any) -> "Future[_T]":
    """Run a function in a thread that nobody waits for when the process ends."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:  # noqa: BLE001  (handed to whoever asks for the result)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
