"""The store: every result of a data set, as files in a folder or a bucket.

A part's Parquet file is created last and only if it is absent, so its existence is the mark that the work is done, a
retry can neither lose nor double anything, and two runs on one store cannot contradict each other.

    dataset.json   input/<ingest>/part-NNNNN.parquet   <step>/<fingerprint>/part-NNNNN.parquet   runs/<run>/

Anything unfinished lies in a folder `<name>.wip/` beside the file that it is for.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import merge_offset_ranges

FORMAT = 1  # of the store's layout and footers
_FOOTER = b"vesl"
_GAP_BYTES, _BLOCK_BYTES = 1 << 16, 1 << 26  # of ranges that are read in one request


class StoreError(Exception):
    """The store cannot be used: one line that says which and why."""


class Store:
    """Files under one fsspec URL. Paths are relative to it, with forward slashes."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        """Open `url`; raises StoreError where its scheme, its driver or its options are not usable."""
        self.url = url
        try:
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
        """Raise StoreError unless the store can be used; a local folder is made if it is to be written."""
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
                self.fs.ls(bucket, detail=False)
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no bucket {bucket}, or none that may be listed") from None
        except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
            raise StoreError(f"store {self.url}: {type(error).__name__}: {error}") from None

    def exists(self, name: str) -> bool:
        """Whether a file or folder of that name is there."""
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(name)))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Byte ranges [start, end) of one file. Raises FileNotFoundError, and ValueError where the file is shorter."""
        if self.local:
            with open(self.path(name), "rb") as file:
                found = [os.pread(file.fileno(), end - start, start) for start, end in ranges]
        else:
            found = self._read_merged(self.path(name), ranges)
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
        try:
            if self.local:
                return sorted(name for name in os.listdir(path) if name.startswith(prefix))
            found = self.fs.find(path, prefix=prefix) if prefix else self.fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        inside = (name.removeprefix(path).strip("/").split("/", 1)[0] for name in found)
        return sorted({name for name in inside if name.startswith(prefix) and name})

    def create(self, name: str, data: bytes) -> bool:
        """Create a file atomically, only if it is absent; False where it was there before (and stays as it was).

        Either way the work is done, so what unfinished attempts left of it is removed.
        """
        try:
            if self.local:
                self._write_local(name, data, os.link)
            else:
                self.fs.pipe_file(self.path(name), data, mode="create")
            created = True
        except FileExistsError:
            created = False
        self.sweep(name)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a file atomically, over an older one if there is one."""
        if self.local:
            self._write_local(name, data, os.replace)
            self.sweep(name)
        else:
            self.fs.pipe_file(self.path(name), data)

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
        path = Path(self.path(wip(name))) / f"{uuid.uuid4().hex}.tmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x+b") as file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def publish(self, spooled: BinaryIO, name: str) -> None:
        """Move a spooled file to its name, over an older one (whose content is the same, or is no longer cited)."""
        spooled.flush()
        if self.local:
            os.fsync(spooled.fileno())
            os.replace(spooled.name, self.path(name))
        else:
            spooled.seek(0)
            with self.fs.open(self.path(name), "wb") as file:
                shutil.copyfileobj(spooled, file, 1 << 24)

    def sweep(self, name: str) -> None:
        """Remove what unfinished attempts at `name` left."""
        if self.local:
            shutil.rmtree(self.path(wip(name)), ignore_errors=True)
        elif self.fs.exists(self.path(wip(name))):
            self.fs.rm(self.path(wip(name)), recursive=True)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

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
        """The named columns of a Parquet file, in the order given. Raises FileNotFoundError."""
        with self.fs.open(self.path(name), "rb") as file:
            return pq.ParquetFile(file).read(columns=None if columns is None else list(columns))

    def footer(self, name: str) -> dict[str, Any] | None:
        """What a table's writer said of it, or None where there is no such table. Reads the file's end only."""
        try:
            with self.fs.open(self.path(name), "rb") as file:
                metadata = pq.read_metadata(file).metadata or {}
        except FileNotFoundError:
            return None
        return dict(json.loads(metadata[_FOOTER]))


def wip(name: str) -> str:
    """The folder for unfinished work on a file: `a/part-00001.parquet` has `a/part-00001.wip`."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}.wip" if folder else f"{base.split('.', 1)[0]}.wip"


def to_json(document: Any) -> bytes:
    """JSON with sorted keys and indentation, as every document of the store has it."""
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def encode_table(table: pa.Table, footer: Mapping[str, Any]) -> bytes:
    """A Parquet file whose footer holds `footer` and `content`, the sha256 of the columns as they lie in the file.

    The bytes depend on the rows and the footer only, not on how the table was put together.
    """
    table = table.replace_schema_metadata(None).combine_chunks()
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table, row_group_size=16_384)
        content = hashlib.sha256(sink.getbuffer()).hexdigest()
        document = json.dumps({**footer, "content": content}, sort_keys=True, ensure_ascii=False)
        writer.add_key_value_metadata({_FOOTER.decode(): document})
    return sink.getvalue()
