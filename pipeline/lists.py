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
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
_BATCH = 20_000
_FIELD_CHARS = 1 << 17  # a longer field is a quote that was never closed
_LINE_CHARS = 1 << 24  # a longer line is no record
_HEAD_ROWS = 1000  # of a JSONL file, to learn its columns

Cell = str | None


class IngestError(Exception):
    """The source cannot be read as the recipe says: one line. Exit code 2."""


@dataclass(frozen=True)
class UrlList:
    """One file of URLs. `token` changes when its content does."""

    path: str
    kind: str
    size: int
    token: str
    fs: Any


@dataclass(frozen=True)
class Rows:
    """Some rows of a list in its order, and how many lines between them were no rows."""

    urls: list[Cell]
    captions: list[Cell]
    malformed: int = 0


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
            infos = [(p, fs.info(p)) for p in paths]
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
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise IngestError(f"dataset.source: {path}: expected a name that ends in {', '.join(_KINDS)} (.gz may follow)")
    return kind


def read_list(source: UrlList, url_column: str, caption_column: str | None) -> Iterator[Rows]:
    """Stream the rows of a list. Raises IngestError where the file or its columns are not what they should be."""
    wanted = (url_column, caption_column)
    try:
        with source.fs.open(source.path, "rb") as raw:
            if source.kind == "parquet":
                yield from _parquet(source, raw, wanted)
                return
            stream = gzip.GzipFile(fileobj=raw) if source.path.lower().endswith(".gz") else raw
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")
            yield from _json(source, text, wanted) if source.kind == "jsonl" else _csv(source, text, wanted)
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        first = str(error).strip().split("\n", 1)[0]
        raise IngestError(f"dataset.source: {source.path}: {type(error).__name__}: {first}") from None


def _require_columns(source: UrlList, columns: list[str], wanted: tuple[str, str | None]) -> None:
    for key, column in zip(("url_column", "caption_column"), wanted, strict=True):
        if column is not None and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.3) or columns[:1]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise IngestError(f"dataset.{key}: {source.path} has no column {column!r}{hint}")


def _parquet(source: UrlList, raw: Any, wanted: tuple[str, str | None]) -> Iterator[Rows]:
    file = pq.ParquetFile(raw)
    _require_columns(source, file.schema_arrow.names, wanted)
    for batch in file.iter_batches(_BATCH, columns=[c for c in dict.fromkeys(wanted) if c]):
        nothing: list[Cell] = [None] * len(batch)
        urls, captions = (nothing if c is None else _texts(source, batch.column(c), c) for c in wanted)
        yield Rows(urls, captions)


def _texts(source: UrlList, column: pa.Array, name: str) -> list[Cell]:
    """A column as text: strings and bytes (older writers mark no UTF-8), numbers as they print."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_nested(column.type):
        raise IngestError(f"dataset.source: {source.path}: the column {name!r} is of type {column.type}, not text")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        column = column.cast(pa.string()).cast(pa.binary())
    return [None if value is None else value.decode(errors="replace") for value in column.to_pylist()]


def _json(source: UrlList, text: io.TextIOWrapper, wanted: tuple[str, str | None]) -> Iterator[Rows]:
    records = _json_records(text)
    head = list(itertools.islice(records, _HEAD_ROWS))
    keys = dict.fromkeys(key for record in head if record for key in record)
    if head:  # an empty file has nothing wrong with it
        _require_columns(source, list(keys), wanted)
    records = itertools.chain(head, records)
    while chunk := list(itertools.islice(records, _BATCH)):
        good = [record for record in chunk if record is not None]
        urls, captions = ([_cell(r.get(c)) if c else None for r in good] for c in wanted)
        yield Rows(urls, captions, len(chunk) - len(good))


def _json_records(text: io.TextIOWrapper) -> Iterator[dict[str, Any] | None]:
    for line in _lines(text):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        yield record if isinstance(record, dict) else None


def _cell(value: Any) -> Cell:
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


def _csv(source: UrlList, text: io.TextIOWrapper, wanted: tuple[str, str | None]) -> Iterator[Rows]:
    records = _tsv_records(_lines(text)) if source.kind == "tsv" else _csv_records(_lines(text))
    header = next(records, None) or []
    _require_columns(source, header, wanted)
    places = [None if c is None else header.index(c) for c in wanted]
    while chunk := list(itertools.islice(records, _BATCH)):
        good = [record for record in chunk if record is not None and len(record) <= len(header)]
        urls, captions = ([r[p] if p is not None and p < len(r) else None for r in good] for p in places)
        yield Rows(urls, captions, len(chunk) - len(good))


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
