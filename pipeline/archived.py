"""The images of archives, read by the places that ingest noted (`archives` says what kinds there are).

What lies there now need not be what ingest saw: every way to be wrong costs the rows that it concerns, with a reason.
An archive that has another stamp now would give rows the images of others, so none of them is read.
"""

import os
import re
import shutil
import stat
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ..transforms.outcomes import Drop
from .archives import ENDINGS, image_of, samples, stamp
from .fetch import Made, cores
from .request import Fetched
from .respect import RespectRule, check_domain

T = TypeVar("T")

_PAUSES_S = (1.0, 5.0)  # between tries to open one in a bucket
_OPEN = 2  # archives, and row groups of a table, at a time in each worker
_HOST = re.compile(r"[a-z][a-z0-9+.-]*://(?:[^/?#]*@)?([^/?#:]+)")  # of a normalised URL
_WAITING = 128  # images that were read and that nobody has taken yet
_GROUP_BYTES = 1 << 30  # of a row group that is read at once; img2dataset's have 100 images


class Archives:
    """Reads images out of archives. `options` go to fsspec; `max_bytes` limits an image.

    No server is asked, so of the wishes of owners only those are known that name their domains.
    """

    def __init__(self, options: Mapping[str, Any], max_bytes: int, respect: RespectRule) -> None:
        self._options, self._max_bytes, self._respect = options, max_bytes, respect
        self._threads = ThreadPoolExecutor(min(8, cores()), "archive")
        self._lock, self._places = threading.Lock(), threading.Semaphore(_WAITING)
        self._open: dict[str, tuple[_Tar | _Folder | _Table | Drop, str]] = {}  # with their stamps

    def submit(self, url: str | None, place: Mapping[str, Any], use: Callable[[Fetched], T]) -> Future[Made[T]]:
        """Begin to read the image of a row with this URL; returns at once. `use` turns it into the row's result."""
        return self._threads.submit(self._row, url, place, use)

    def _row(self, url: str | None, place: Mapping[str, Any], use: Callable[[Fetched], T]) -> Made[T]:
        self._places.acquire()
        made: T | Exception
        try:
            if self._respect.blocked and (host := _HOST.match(url or "")):
                check_domain(host[1].lower(), self._respect)
            made = use(Fetched(self.read(**place)))
        except Exception as error:  # noqa: BLE001  (it is this row's result; the guard of the step looks at it)
            error.__traceback__ = error.__context__ = error.__cause__ = None
            made = error
        return Made(made, self._places.release)

    def read(self, path: str, member: str | None, row: int | None, stamp: str | None = None) -> bytes:
        """The bytes of an image.

        Raises Drop: archive_missing, archive_damaged, archive_changed, archive_unreadable, too_large, empty.
        """
        try:
            with self._lock:
                if path not in self._open:
                    while len(self._open) >= _OPEN:
                        del self._open[next(iter(self._open))]  # who still reads it holds it
                    self._open[path] = self._opened(path, row)
                archive, now = self._open[path]
            if stamp and now and stamp != now:
                raise Drop("archive_changed", f"{path}: its stamp was {stamp}, and is {now} now")
            if isinstance(archive, Drop):
                raise Drop(archive.reason, archive.detail)
            data = archive.read(member or "", row or 0, self._max_bytes)
        except (Drop, MemoryError):
            raise
        except FileNotFoundError:
            raise Drop("archive_missing", path) from None
        except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
            raise Drop("archive_unreadable", f"{path}: {type(error).__name__}: {error}") from None
        if not data:
            raise Drop("empty")
        return data

    def _opened(self, path: str, row: int | None) -> "tuple[_Tar | _Folder | _Table | Drop, str]":
        """An archive, or why there is none, and its stamp; that is empty where not even as much can be read."""
        now = ""
        fs = LocalFileSystem() if os.path.isabs(path) else None  # by the letter, where fsspec would see a protocol
        name = path
        if fs is None:
            fs, name = fsspec.url_to_fs(path, **{**self._options, "use_listings_cache": False})
        kind: Callable[[Any, str], _Tar | _Folder | _Table]
        kind = _Table if row is not None else _Tar if path.lower().endswith(".tar") else _Folder
        pauses_s = iter(() if isinstance(fs, LocalFileSystem) else _PAUSES_S)
        while True:
            try:
                now = stamp(fs, name, kind is _Folder)
                return kind(fs, name), now
            except FileNotFoundError:
                return Drop("archive_missing", path), now
            except pa.ArrowInvalid as error:
                return Drop("archive_damaged", f"{path}: {error}"), now
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
                if (pause_s := next(pauses_s, None)) is None:  # remembered, so that not every row waits for it again
                    return Drop("archive_unreadable", f"{path}: {type(error).__name__}: {error}"), now
                time.sleep(pause_s)


class _Tar:
    """An open tar and where its images lie. One in a bucket is copied to a file without a name on this machine."""

    def __init__(self, fs: Any, path: str) -> None:
        self._path = path
        if isinstance(fs, LocalFileSystem):
            self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  (open as long as this is)
        else:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            with fs.open(path, "rb", block_size=1 << 24, cache_type="readahead") as source:
                shutil.copyfileobj(source, self._file, 1 << 24)
        self._places: dict[str, tuple[int, int]] = {}
        self._broken = False
        try:
            for stem, sample in samples(self._file, os.fstat(self._file.fileno()).st_size):
                if image := image_of(sample):
                    self._places.setdefault(stem, image)
        except tarfile.HeaderError:
            self._broken = True

    def read(self, member: str, row: int, max_bytes: int) -> bytes:
        if member not in self._places:
            raise Drop(
                "archive_damaged" if self._broken else "archive_missing", f"{self._path} has no image {member!r}"
            )
        offset, size = self._places[member]
        _check(size, max_bytes)
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) < size:
            raise Drop("archive_damaged", f"{self._path} ends in the middle of {member!r}")
        return data


class _Folder:
    """A folder of files. No link in it is followed."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path

    def read(self, member: str, row: int, max_bytes: int) -> bytes:
        for ending in ENDINGS:
            path = f"{self._path}/{member}.{ending}"
            try:
                if not isinstance(self._fs, LocalFileSystem):
                    _check(int(self._fs.info(path)["size"]), max_bytes)
                    return bytes(self._fs.cat_file(path, end=max_bytes))
                with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                        raise Drop("archive_damaged", f"{path} is not a file")
                    _check(os.fstat(file.fileno()).st_size, max_bytes)
                    return file.read(max_bytes)
            except FileNotFoundError:
                pass
        raise Drop("archive_missing", f"{self._path} has no image {member!r}")


class _Table:
    """A Parquet file with a column of images. Row groups are read one by one, the last ones kept."""

    def __init__(self, fs: Any, path: str) -> None:
        self._path = path
        raw = fs.open(path, "rb")
        names = pq.read_schema(raw).names
        self._column = next((name for name in ENDINGS if name in names), None)
        if self._column is None:
            raise pa.ArrowInvalid("no column of images")
        # As a dictionary, since a page of a few bytes may say the same image a million times.
        self._file = pq.ParquetFile(raw, read_dictionary=[self._column])
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._groups: dict[int, pa.ChunkedArray] = {}
        self._lock = threading.Lock()

    def read(self, member: str, row: int, max_bytes: int) -> bytes:
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group >= len(self._ends):
            raise Drop("archive_missing", f"{self._path} has no row {row}")
        try:
            with self._lock:
                if group not in self._groups:
                    while len(self._groups) >= _OPEN:
                        del self._groups[next(iter(self._groups))]
                    if self._file.metadata.row_group(group).total_byte_size > _GROUP_BYTES:
                        raise Drop("archive_damaged", f"{self._path} has a row group of more than {_GROUP_BYTES} bytes")
                    self._groups[group] = self._file.read_row_group(group, columns=[self._column]).column(0)
                images = self._groups[group]
            value = images[row - (int(self._ends[group - 1]) if group else 0)].as_py()
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the machine's; those of a bad page have none
                raise
            raise Drop("archive_damaged", f"{self._path}: {error}") from None
        if not isinstance(value, bytes):
            raise Drop("archive_missing", f"{self._path} has no image in row {row}")
        _check(len(value), max_bytes)
        return value


def _check(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise Drop("too_large", f"{size} bytes")
