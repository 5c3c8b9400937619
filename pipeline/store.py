"""The store: every result of a data set, as files in a folder or a bucket.

A part's Parquet file is created last and only if it is absent, so its existence is the mark that the work is done, a
retry can neither lose nor double anything, and two runs on one store cannot contradict each other.

    dataset.json   input/<ingest>/part-NNNNN.parquet   <step>/<fingerprint>/part-NNNNN.parquet   runs/<run>/

Anything unfinished lies in a folder `<name>.wip/` beside the file that it is for.

A bucket's driver repeats a request that fails (s3fs: five times, and botocore five within each, with backoff). What it
does not repeat, or gave up within the store's patience, is repeated here as a whole operation; only then is it a fault.
"""

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import merge_offset_ranges

from .faults import code, passes

FORMAT = 1  # of the store's layout and footers
_FOOTER = b"vesl"
_END_BYTES = 1 << 15  # of a table, in which its footer is looked for first
_GAP_BYTES, _BLOCK_BYTES = 1 << 16, 1 << 26  # of ranges that are read in one request
_LISTERS = 32  # pieces of a long listing that are asked for at a time
_PATIENCE_S = 60.0  # from an operation's begin, in which it is tried again; VESL_STORE_PATIENCE_S is another value
_WAIT_S, _LONGEST_WAIT_S = 0.5, 15.0  # before another try, doubled each time
_NAMES_A_FILE = (FileNotFoundError, FileExistsError)
T = TypeVar("T")


class StoreError(Exception):
    """The store cannot be used: one line that says which and why."""


class StoreFault(OSError):  # noqa: N818  (as OSError: whoever expects a fault of a disk gets this one too)
    """The store failed, or a file of it is damaged: one line that names the file and says what to do. Exit code 1."""


class Store:
    """Files under one fsspec URL. Paths are relative to it, with forward slashes."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """Open `url`; raises StoreError where its scheme, its driver or its options are not usable."""
        self.url, self.options = url, dict(options or {})
        try:
            self.patience_s = float(os.environ.get("VESL_STORE_PATIENCE_S", _PATIENCE_S))
            # Another process or machine writes beside us, so a cached listing would be a wrong one.
            self.fs, root = fsspec.url_to_fs(url, **{**(options or {}), "use_listings_cache": False})
        except (ValueError, ImportError, TypeError) as error:
            raise StoreError(f"store {url}: {error}") from None
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of a file, as the file system names it."""
        return f"{self.root}/{name}"

    def check(self, write: bool) -> None:
        """Raise StoreError unless the store can be used, StoreFault where it is away for longer than is waited.

        A local folder is made if it is to be written.
        """
        try:
            if self.local:
                if write:
                    os.makedirs(self.root, exist_ok=True)
                if os.path.exists(self.root) and not os.path.isdir(self.root):
                    raise NotADirectoryError("is a file")
                if write and not os.access(self.root, os.W_OK | os.X_OK):
                    raise PermissionError("no permission to write")
                return
            bucket = self.root.lstrip("/").partition("/")[0]
            if not bucket:
                raise ValueError("names no bucket")
            try:
                self.ask("listed", "", lambda: self.fs.ls(bucket, detail=False))
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no bucket {bucket}, or none that may be listed") from None
        except Exception as error:
            why = error.__cause__ if isinstance(error, StoreFault) else error
            if why is not error and passes(why):
                raise
            raise StoreError(f"store {self.url}: {type(why).__name__}: {why}") from None

    def ask(self, what: str, name: str, call: Callable[[], T], finding: tuple[type[Exception], ...] = ()) -> T:
        """Call an operation on a file; in a bucket, again while its fault may pass and patience lasts.

        That a file is there or is not is an answer and comes out as it is, but for `finding`, which here is a fault.
        Raises StoreFault.
        """
        begun, tries, wait = time.monotonic(), 0, _WAIT_S
        while True:
            tries += 1
            try:
                return call()
            except Exception as error:
                answer = isinstance(error, _NAMES_A_FILE) and not isinstance(error, finding)
                if self.local or answer or isinstance(error, (ValueError, KeyError, EOFError, StoreFault)):
                    raise
                spent = time.monotonic() - begun
                if not (isinstance(error, finding) or passes(error)) or spent + wait > self.patience_s:
                    times = "once" if tries == 1 else f"{tries} times"
                    text = " ".join(str(error).split())[:300]
                    raise StoreFault(
                        f"{self.url.rstrip('/')}/{name} cannot be {what}: {type(error).__name__}: {text} (tried {times}"
                        f" in {spent:.0f} s); see to the store or its permissions, then run the same command again"
                    ) from error
            time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311  (workers must not come back all at once)
            wait = min(2 * wait, _LONGEST_WAIT_S)

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        return self.ask("looked for", name, lambda: bool(self.fs.exists(self.path(name))))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return self.ask("read", name, lambda: bytes(self.fs.cat_file(self.path(name))))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Byte ranges [start, end) of one file. Raises FileNotFoundError, and ValueError where the file is shorter."""
        if self.local:
            with open(self.path(name), "rb") as file:
                found = [os.pread(file.fileno(), end - start, start) for start, end in ranges]
        else:
            found = self.ask("read", name, lambda: self._read_merged(self.path(name), ranges))
        if any(len(data) != end - start for data, (start, end) in zip(found, ranges, strict=True)):
            raise ValueError(f"{name} is shorter than the table that cites it says")
        return found

    def _read_merged(self, path: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Neighbouring ranges in one request: a batch of images is one piece of its tar, but for their headers."""
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
        merged = merge_offset_ranges([path] * len(ranges), starts, ends, max_gap=_GAP_BYTES, max_block=_BLOCK_BYTES)
        blocks = dict(zip(merged[1], self.fs.cat_ranges(*merged, on_error="raise"), strict=True))
        found = []
        for start, end in ranges:
            first = max(at for at in blocks if at <= start)
            found.append(blocks[first][start - first : end - first])
        return found

    def names(self, folder: str, prefix: str = "") -> list[str]:
        """The names in a folder that begin with `prefix`, sorted; empty where there is no such folder."""
        path = self.path(folder) if folder else self.root

        def ask() -> list[str]:
            return list(self.fs.find(path, prefix=prefix) if prefix else self.fs.ls(path, detail=False))

        try:
            if self.local:
                return sorted(name for name in os.listdir(path) if name.startswith(prefix))
            found = self.ask("listed", folder, ask)
        except FileNotFoundError:
            return []
        inside = (name.removeprefix(path).strip("/").split("/", 1)[0] for name in found)
        return sorted({name for name in inside if name.startswith(prefix) and name})

    def stamps(self, folder: str, stems: Sequence[str]) -> pa.Table:
        """The parts' tables in a folder: `part`, `stamp` (uint64) and `size` in bytes, in rising order.

        A table that is written again has another stamp: of the time of its change and its size, or a bucket's ETag. A
        bucket is asked for the names that begin with each of `stems`, all at the same time.
        """
        path = self.path(folder)
        try:
            if self.local:
                return _stamped(*_stats(path))
            with ThreadPoolExecutor(_LISTERS) as pool:
                pieces = list(pool.map(lambda stem: self._listed(folder, path, stem), stems))
        except FileNotFoundError:
            return _stamped([], [], [])
        return _stamped(*([value for piece in pieces for value in piece[i]] for i in range(3)))

    def _listed(self, folder: str, path: str, stem: str) -> tuple[list[int], list[int], list[int]]:
        found = self.ask("listed", folder, lambda: self.fs.find(path, prefix=stem, detail=True))
        inside = ((name.removeprefix(path).strip("/"), info) for name, info in found.items())
        tables = [(int(name[5:-8]), info) for name, info in inside if _is_part(name)]
        tags = (str(info.get("ETag") or info.get("etag") or info.get("LastModified")) for _, info in tables)
        stamps = [int.from_bytes(hashlib.blake2b(tag.encode(), digest_size=8).digest()) for tag in tags]
        return [part for part, _ in tables], stamps, [int(info["size"] or 0) for _, info in tables]

    def create(self, name: str, data: bytes) -> bool:
        """The same as `settle`, and remove what unfinished attempts left of it: either way the work is done."""
        created = self.settle(name, data)
        self.sweep(name)
        return created

    def settle(self, name: str, data: bytes) -> bool:
        """Create a file atomically, only if it is absent; False where other bytes were there (and stay as they were).

        A bucket may create it and its answer get lost; the next try then finds our own bytes.
        """
        try:
            if self.local:
                self._write_local(name, data, os.link)
            else:  # an upload in pieces that was ended, its answer lost, is not found any more
                self.ask("written", name, lambda: self._create_remote(name, data), (FileNotFoundError,))
        except FileExistsError:
            return not self.local and self.read(name) == data
        return True

    def _create_remote(self, name: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except OSError as error:
            if code(error) in ("PreconditionFailed", "412"):  # not every server says which condition
                raise FileExistsError(name) from error
            raise

    def claim(self, name: str, data: bytes) -> bool:
        """Create a small file only if it is absent; whether it was. Others may see it half written, or sweep it."""
        try:
            if self.local:
                with _scratch(self.path(name)) as file:
                    file.write(data)
            else:
                self.ask("written", name, lambda: self._create_remote(name, data))
        except FileExistsError:
            return not self.local and self.read(name) == data
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Write a file atomically, over an older one if there is one."""
        if self.local:
            self._write_local(name, data, os.replace)
            self.sweep(name)
        else:
            self.ask("written", name, lambda: self.fs.pipe_file(self.path(name), data), (FileNotFoundError,))

    def _write_local(self, name: str, data: bytes, move: Callable[[str, str], None]) -> None:
        for attempt in range(5):
            try:
                with self.spool(name) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    return move(file.name, self.path(name))
            except FileNotFoundError:  # another process finished this very file and swept our scratch file away
                if attempt == 4:
                    raise

    @contextmanager
    def spool(self, name: str) -> Iterator[BinaryIO]:
        """Give a scratch file on this machine for a file that will be `name`; it is gone at the end, or with us."""
        if not self.local:  # it has no name, so that not even a kill leaves it behind
            with tempfile.TemporaryFile() as file:
                yield file
            return
        path = f"{self.path(wip(name))}/{uuid.uuid4().hex}.tmp"
        try:
            with _scratch(path) as file:
                yield file
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def publish(self, spooled: BinaryIO, name: str) -> None:
        """Move a spooled file to its name, over an older one (whose content is the same, or is no longer cited)."""
        spooled.flush()
        if self.local:
            os.fsync(spooled.fileno())
            os.replace(spooled.name, self.path(name))
        else:
            self.ask("written", name, lambda: self._upload(spooled, self.path(name)), (FileNotFoundError,))

    def _upload(self, spooled: BinaryIO, path: str) -> None:
        spooled.seek(0)
        file = self.fs.open(path, "wb")
        try:
            shutil.copyfileobj(spooled, file, 1 << 24)
            file.close()
        except BaseException:
            file.closed = True  # else closing it, now or when it is collected, would publish what is there of it
            with suppress(Exception):
                file.discard()
            raise

    def sweep(self, name: str) -> None:
        """Remove what unfinished attempts at `name` left."""
        if self.local:
            shutil.rmtree(self.path(wip(name)), ignore_errors=True)
        elif self.exists(wip(name)):
            with suppress(FileNotFoundError):  # another attempt swept it at the same time
                self.ask("removed", wip(name), lambda: self.fs.rm(self.path(wip(name)), recursive=True))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            self.ask("removed", name, lambda: self.fs.rm_file(self.path(name)))

    def read_json(self, name: str) -> Any:
        """A JSON document, or None where there is none."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            return None

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON document (sorted keys, one line feed at the end) over an older one."""
        self.replace(name, to_json(document))

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The named columns of a Parquet file, in the order given. Raises FileNotFoundError, and StoreFault."""
        return self.read_whole(name, columns)[0]

    def read_whole(self, name: str, columns: Sequence[str] | None = None) -> tuple[pa.Table, dict[str, Any]]:
        """The same, and what the table's writer said of it, in one go."""

        def read(file: Any) -> tuple[pa.Table, dict[str, Any]]:
            parquet = pq.ParquetFile(file, pre_buffer=not self.local)  # for fewer requests, by way of another thread
            several = parquet.metadata.num_row_groups > 1  # for one, threads cost more than they save
            rows = parquet.read(columns=None if columns is None else list(columns), use_threads=several)
            return rows, footer_of(parquet.metadata)

        return self._parquet(name, read)

    def footer(self, name: str) -> dict[str, Any] | None:
        """What a table's writer said of it, or None where there is no such table. Reads the file's end only.

        Raises StoreFault for a file that is not whole.
        """
        footer: dict[str, Any] | None = None
        try:
            if self.local:
                os.stat(self.path(name))  # that it is not there is told at a tenth of the time
            else:  # in one request instead of three
                end = self.ask("read", name, lambda: self.fs.cat_file(self.path(name), start=-_END_BYTES))
                with suppress(pa.ArrowInvalid):  # the footer is longer, or the file is damaged
                    footer = footer_of(pa.BufferReader(end))
            if footer is None:
                footer = self._parquet(name, footer_of)
        except FileNotFoundError:
            return None
        if not footer:
            raise self._damaged(name, "a Parquet file that vesl did not write")
        return footer

    def _parquet(self, name: str, read: Callable[[Any], T]) -> T:
        def once() -> T:
            path = self.path(name)
            with pa.OSFile(path) if self.local else self.fs.open(path, "rb") as file:  # Arrow's own spares a detour
                try:
                    return read(file)
                except OSError as error:
                    if type(error) is OSError and error.errno is None:  # not the disk's or the bucket's, but Arrow's
                        raise pa.ArrowInvalid(str(error)) from error
                    raise

        try:
            return self.ask("read", name, once)
        except (pa.ArrowInvalid, EOFError) as error:
            raise self._damaged(name, f"no whole Parquet file ({' '.join(str(error).split())[:120]})") from error

    def _damaged(self, name: str, what: str) -> StoreFault:
        return StoreFault(f"{self.url.rstrip('/')}/{name} is {what}: remove it, then run again to make it anew")


def _scratch(path: str) -> BinaryIO:
    """Open a new file, and make the folder for it. Another process may sweep that away at any moment."""
    for left in range(4, -1, -1):
        try:
            with suppress(FileNotFoundError):  # mostly it is there: a lease is in it
                return open(path, "x+b")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return open(path, "x+b")
        except (FileNotFoundError, FileExistsError):  # the second by `mkdir`, of a folder that it then does not find
            if not left:
                raise
    raise AssertionError


def _is_part(name: str) -> bool:
    return name[:5] == "part-" and name[-8:] == ".parquet" and name[5:-8].isdecimal()


def _stats(path: str) -> tuple[list[int], npt.NDArray[np.uint64], list[int]]:
    """A local folder's tables: parts, stamps and sizes. Asks relative to the folder, which is the quickest."""
    parts, times, sizes = list[int](), list[int](), list[int]()
    folder = os.open(path, os.O_RDONLY)
    try:
        for name in filter(_is_part, os.listdir(folder)):
            try:
                status = os.stat(name, dir_fd=folder)
            except FileNotFoundError:  # removed since the folder was read
                continue
            parts.append(int(name[5:-8]))
            times.append(status.st_mtime_ns)
            sizes.append(status.st_size)
    finally:
        os.close(folder)
    # Clocks tick in milliseconds, so no two times and sizes that may be met have the same sum, though it wraps around.
    return parts, np.array(times, np.uint64) * np.uint64(1_000_003) + np.array(sizes, np.uint64), sizes


def _stamped(parts: list[int], stamps: Any, sizes: list[int]) -> pa.Table:
    columns = [pa.array(parts, pa.int64()), pa.array(stamps, pa.uint64()), pa.array(sizes, pa.int64())]
    return pa.table(columns, ["part", "stamp", "size"]).sort_by("part")


def wip(name: str) -> str:
    """The folder for unfinished work on a file: `a/part-00001.parquet` has `a/part-00001.wip`."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}.wip" if folder else f"{base.split('.', 1)[0]}.wip"


def to_json(document: Any) -> bytes:
    """JSON with sorted keys and indentation, as every document of the store has it."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def footer_of(file: Any) -> dict[str, Any]:
    """What a table's writer said of it, from its file or metadata; empty where vesl did not write it."""
    metadata = file if isinstance(file, pq.FileMetaData) else pq.read_metadata(file)
    return dict(json.loads((metadata.metadata or {}).get(_FOOTER, b"{}")))


def encode_table(table: pa.Table, footer: Mapping[str, Any]) -> bytes:
    """A Parquet file whose footer holds `footer` and `content`, the sha256 of the columns as they lie in the file.

    The bytes depend on the rows and the footer only, not on how the table was put together.
    """
    return encode_both(table, footer)[0]


def encode_both(table: pa.Table, footer: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The same, and the whole footer as `footer_of` finds it there."""
    table = table.replace_schema_metadata(None).combine_chunks()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table, row_group_size=16_384)
        content = hashlib.sha256(sink.getbuffer()).hexdigest()
        document = json.dumps({**footer, "content": content}, sort_keys=True, ensure_ascii=False)
        writer.add_key_value_metadata({_FOOTER.decode(): document})
    return sink.getvalue(), json.loads(document)


def encode_piece(table: pa.Table, footer: Mapping[str, Any]) -> bytes:
    """The same for unfinished work, which is hardly ever read: without `content`, and at a tenth of the time."""
    sink = pa.BufferOutputStream()
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with pq.ParquetWriter(sink, table.schema, **plain) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_FOOTER.decode(): json.dumps(footer)})
    return bytes(sink.getvalue().to_pybytes())
