"""URL lists as they come: Parquet, CSV, TSV and JSONL from anybody, read in bounded memory, every bad line counted.

Text formats are read line by line by Python's own parsers: a list from the web has unclosed quotes, broken encodings
and half records in it, and one of them must cost one line, not the rest of the file.
"""

import csv
import difflib
import glob
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ..transforms.records import INPUT_MORE

_KINDS = {
    ".tar": "tar",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_BATCH = 20_000
_FIELD_CHARS = 1 << 17  # a longer field is a quote that was never closed
_LINE_CHARS = 1 << 24  # a longer line is no record
_HEAD_ROWS = 1000  # of a JSONL file, to learn its columns
# Of LAION, COYO-700M, DataComp, Recap-DataComp-1B and what img2dataset writes, in any case.
_URLS = ("url", "image_url")
_CAPTIONS = ("caption", "text", "alt", "alt_text", "re_caption")

Cell = str | None
# What bytes that are no list set off; the last two are a column's name that is no text, and one that is there twice.
UNREADABLE = (OSError, EOFError, zlib.error, pa.ArrowException, UnicodeDecodeError, KeyError)


class IngestError(Exception):
    """The source cannot be read as the recipe says: one line. Exit code 2."""


@dataclass(frozen=True)
class UrlList:
    """One file of URLs, or an archive. `token` changes when its content does."""

    path: str
    kind: str
    size: int
    token: str
    fs: Any


@dataclass(frozen=True)
class Columns:
    """The columns of a list, as the recipe names them; None for what there is not.

    Without `url`, the known spellings are found in each file by itself, and those of `caption` too, unless `captions`
    says that there are none.
    """

    url: str | None = None
    caption: str | None = None
    sha256: str | None = None
    md5: str | None = None
    phash: str | None = None
    captions: bool = True

    @property
    def cells(self) -> tuple[str | None, ...]:
        """In the order of the cells of `Rows`."""
        return self.url, self.caption, self.sha256, self.md5, self.phash

    @property
    def named(self) -> list[str | None]:
        """As `dataset.json` has them. Older stores know no hashes, and `url` where nothing else was named."""
        url = self.url or (None if self.captions and not self.caption else "url")
        return [url, *(self.cells[1:] if any(self.cells[2:]) else self.cells[1:2])]

    @property
    def expected(self) -> tuple[str, ...]:
        """The columns of input tables that those of hashes become."""
        return tuple(f"expected_{kind}" for kind in ("sha256", "md5", "phash") if getattr(self, kind))

    def within(self, source: UrlList, names: list[str]) -> "Columns":
        """The columns among those of a file that are meant. Raises IngestError where that is none, or not clear."""
        for key, name in zip(("url", "caption", "sha256", "md5", "phash"), self.cells, strict=True):
            if name is not None and name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.3) or names[:1]
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise IngestError(f"dataset.{key}_column: {source.path} has no column {name!r}{hint}")
        if self.url is not None:
            return self
        urls = ["url"] if "url" in names else _spelled(names, _URLS)
        captions = [self.caption] if self.caption or not self.captions else _spelled(names, _CAPTIONS) or [None]
        for key, found in {"url": urls, "caption": captions}.items():
            if len(found) != 1:
                what = (
                    f"several that may be it: {_shown(found)}"
                    if found
                    else f"none that is known to be it: {_shown(names)}"
                )
                raise IngestError(f"dataset.{key}_column: name a column; {source.path} has {what}")
        return replace(self, url=urls[0], caption=captions[0])


def _spelled(names: list[str], known: tuple[str, ...]) -> list[str | None]:
    return [name for name in names if name.strip().lower() in known]


def _shown(names: Sequence[str | None]) -> str:
    return ", ".join(str(name)[:60] for name in names[:30]) or "(nothing)"


@dataclass(frozen=True)
class Rows:
    """Some rows of a list or an archive in its order, and how many lines between them were no rows.

    Hashes are as the list has them, but for numbers in the place of a perceptual hash: these are 16 hex digits. Only
    an archive has `contents`, keys of images without a URL, and `archived`, where each lies (None: nowhere).
    """

    malformed: int
    urls: list[Cell]
    captions: list[Cell]
    sha256: list[Cell] = field(default_factory=list)
    md5: list[Cell] = field(default_factory=list)
    phash: list[Cell] = field(default_factory=list)
    contents: list[Cell] = field(default_factory=list, kw_only=True)
    archived: list[dict[str, Any] | None] = field(default_factory=list, kw_only=True)

    def expected(self, names: Sequence[str]) -> tuple[dict[str, pa.Array], int, int]:
        """The columns `expected_...` of those names: lower-case hex digits, the perceptual hash as signed int64.

        What is no hash of its kind becomes null. Also returns how many values there were, and how many of them good.
        """
        columns, given, good = {}, 0, 0
        for name in names:
            cells = getattr(self, name.removeprefix("expected_"))
            some = [cell.strip().lower() if cell else "" for cell in cells]
            fits = [text if _HASHES[name].fullmatch(text) else None for text in some]
            given, good = given + sum(map(bool, some)), good + sum(map(bool, fits))
            values = [t and int.from_bytes(bytes.fromhex(t), signed=True) for t in fits] if "phash" in name else fits
            columns[name] = pa.array(values, INPUT_MORE.field(name).type)
        return columns, given, good


_HASHES = {
    f"expected_{kind}": re.compile(f"[0-9a-f]{{{digits}}}")
    for kind, digits in {"sha256": 64, "md5": 32, "phash": 16}.items()
}


def find_lists(patterns: tuple[str, ...], options: Mapping[str, Any]) -> list[UrlList]:
    """The files that paths and globs name, in order, each once. Raises IngestError."""
    found: dict[str, UrlList] = {}
    for pattern in patterns:
        try:
            fs, path = fsspec.url_to_fs(pattern, **options)
            if fs.exists(path) and fs.isfile(path):  # a file may have a name like a pattern
                paths = [path]
            elif isinstance(fs, LocalFileSystem):
                paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            else:
                paths = sorted(fs.glob(path))
            infos = [(p, info) for p in paths if (info := fs.info(p))["type"] != "directory"]
        except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
            raise IngestError(f"dataset.source: {pattern}: {type(error).__name__}: {error}") from None
        if not infos:
            raise IngestError(f"dataset.source: no file matches {pattern}")
        for p, info in infos:
            token = str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or "")
            found[p] = UrlList(p, _kind(p), int(info["size"] or 0), token, fs)
    return list(found.values())


def _kind(path: str) -> str:
    suffixes = [s.lower() for s in Path(path).suffixes]
    packed = suffixes[-1:] == [".gz"] and suffixes.pop()
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None or (packed and kind in ("tar", "parquet")):
        endings = ", ".join(_KINDS)
        raise IngestError(f"dataset.source: {path}: expected a name that ends in {endings} (.gz may follow text)")
    return kind


def read_list(source: UrlList, columns: Columns) -> Iterator[Rows]:
    """Stream the rows of a list. Raises IngestError where the file or its columns are not what they should be."""
    try:
        with source.fs.open(source.path, "rb") as raw:
            if source.kind == "parquet":
                yield from _parquet(source, raw, columns)
                return
            stream = gzip.GzipFile(fileobj=raw) if source.path.lower().endswith(".gz") else raw
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
            yield from _json(source, text, columns) if source.kind == "jsonl" else _csv(source, text, columns)
    except UNREADABLE as error:
        raise unreadable(source, error) from None


def unreadable(source: UrlList, error: Exception) -> IngestError:
    """The error for a file that cannot be read, on one line."""
    first = str(error).strip().split("\n", 1)[0]
    return IngestError(f"dataset.source: {source.path}: {type(error).__name__}: {first}")


def _parquet(source: UrlList, raw: Any, columns: Columns) -> Iterator[Rows]:
    file = pq.ParquetFile(raw)
    wanted = columns.within(source, file.schema_arrow.names).cells
    for batch in file.iter_batches(_BATCH, columns=[c for c in dict.fromkeys(wanted) if c]):
        nothing: list[Cell] = [None] * len(batch)
        yield Rows(
            0, *(nothing if c is None else texts(source, batch.column(c), c, i == 4) for i, c in enumerate(wanted))
        )


def texts(source: UrlList, column: pa.Array, name: str, bits: bool = False) -> list[Cell]:
    """A column as text: strings and bytes (older writers mark no UTF-8), numbers as they print, or their 64 `bits`."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        raise IngestError(f"dataset.source: {source.path}: the column {name!r} is of type {column.type}, not text")
    if bits and pa.types.is_integer(column.type):
        return [None if value is None else _hex(value) for value in column.to_pylist()]
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.string()).cast(pa.binary())
    return [None if value is None else value.decode(errors="replace") for value in column.to_pylist()]


def _hex(number: int) -> str:
    return f"{number & (1 << 64) - 1:016x}" if -(1 << 63) <= number < 1 << 64 else str(number)


def _json(source: UrlList, text: io.TextIOWrapper, columns: Columns) -> Iterator[Rows]:
    records = _json_records(text)
    head = list(itertools.islice(records, _HEAD_ROWS))
    keys = dict.fromkeys(key for record in head if record for key in record)
    if head:  # an empty file has nothing wrong with it
        columns = columns.within(source, list(keys))
    records = itertools.chain(head, records)
    while chunk := list(itertools.islice(records, _BATCH)):
        good = [record for record in chunk if record is not None]
        cells = ([_cell(r.get(c), i == 4) if c else None for r in good] for i, c in enumerate(columns.cells))
        yield Rows(len(chunk) - len(good), *cells)


def _json_records(text: io.TextIOWrapper) -> Iterator[dict[str, Any] | None]:
    for line in _lines(text):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        yield record if isinstance(record, dict) else None


def _cell(value: Any, bits: bool = False) -> Cell:
    if bits and type(value) is int:
        return _hex(value)
    if value is None or isinstance(value, str):
        return value and value.encode(errors="replace").decode()  # half of a surrogate pair, from a caption cut short
    return json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines with their ends; of an endless one the first part only."""
    while line := text.readline(_LINE_CHARS):
        whole = line
        while not whole.endswith(("\n", "\r")) and (whole := text.readline(_LINE_CHARS)):
            pass
        yield line


def _csv(source: UrlList, text: io.TextIOWrapper, columns: Columns) -> Iterator[Rows]:
    records = _tsv_records(_lines(text)) if source.kind == "tsv" else _csv_records(_lines(text))
    header = next(records, None) or []
    places = [None if c is None else header.index(c) for c in columns.within(source, header).cells]
    while chunk := list(itertools.islice(records, _BATCH)):
        good = [record for record in chunk if record is not None and len(record) <= len(header)]
        cells = ([r[p] if p is not None and p < len(r) else None for r in good] for p in places)
        yield Rows(len(chunk) - len(good), *cells)


def _tsv_records(lines: Iterator[str]) -> Iterator[list[str] | None]:
    """Records of a TSV: tabs and line ends rule, and a quote is a quote, except around a whole well-quoted field."""
    for line in lines:
        text = line.rstrip("\r\n")
        if '"' in text and _sound([text], "\t"):
            yield next(csv.reader([text], delimiter="\t"))
        elif text:
            yield text.split("\t")


def _csv_records(lines: Iterator[str]) -> Iterator[list[str] | None]:
    """Records of a CSV; None for a line whose quote is never closed.

    A quoted field may hold line ends. Where one grows past all measure, or ends with the file or in the middle of
    another field, its quote was none: the line that opened it is given up and reading goes on with the next.
    """
    again: deque[str] = deque()  # lines to read once more
    taken: list[str] = []  # lines of the record that is being read

    def feed() -> Iterator[str]:
        while line := again.popleft() if again else next(lines, None):
            taken.append(line.replace("\0", ""))
            yield taken[-1]

    csv.field_size_limit(_FIELD_CHARS)
    while True:
        reader = csv.reader(feed())
        while True:
            taken.clear()
            try:
                record = next(reader)
            except StopIteration:
                return
            except csv.Error:
                record = None
            spread = len(taken) > 1 or (record and record[-1].endswith(("\n", "\r")))
            if record is None or (spread and not _sound(taken, ",")):
                again.extendleft(reversed(taken[1:]))
                yield None
                break  # with a new reader, as this one is in the middle of something
            if record:  # a blank line is no row
                yield record


def _sound(lines: list[str], delimiter: str) -> bool:
    """Whether lines make one record by the letter: what is quoted over several lines must be quoted well."""
    try:
        return len(list(csv.reader(lines, delimiter=delimiter, strict=True))) == 1
    except csv.Error:
        return False
