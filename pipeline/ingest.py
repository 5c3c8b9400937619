"""Input: lists of URLs become parts, once, in an order that does not depend on luck.

Reading, ordering and de-duplication are DuckDB's, which spills to disk, so memory stays bounded however long the lists
are. Ingests are append-only: a new file makes a new ingest with parts of its own, keys of earlier ingests win, and a
published part never changes.
"""

import csv
import difflib
import glob
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ..transforms import urls
from ..transforms.records import INPUT
from .stage import fingerprint, part_name
from .store import FORMAT, Store, encode_table

MEMORY = "768MB"  # DuckDB's share; Arrow's batches and the interpreter come on top
_BATCH = 50_000
_HEAD_BYTES = 1 << 22  # of a text file, to learn its columns
_KINDS = {".parquet": "parquet", ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
Report = Callable[[int], None]


class IngestError(Exception):
    """The source cannot be read as the recipe says: one line. Exit code 2."""


@dataclass(frozen=True)
class Source:
    """One list of URLs. `token` changes when its content does."""

    path: str
    kind: str
    size: int
    token: str
    fs: Any


def ingest(
    store: Store,
    name: str,
    patterns: tuple[str, ...],
    url_column: str,
    caption_column: str | None,
    rows_per_part: int,
    options: Mapping[str, Any] | None = None,
    report: Report = lambda rows: None,
) -> dict[str, Any]:
    """Take in the files that the store has not seen; return `dataset.json`.

    Each ingest there counts its rows: `rows` in the files = `kept` + `duplicate_url` + `no_url` + `malformed`. A row
    without a URL, or whose URL or line cannot be read, makes no sample; a URL that is malformed does, and ends in
    `download` with its reason. Raises IngestError. Killed at any moment and run again, the result is the same.
    """
    dataset = read_dataset(store) or {
        "name": name,
        "format": FORMAT,
        "url_normalisation": urls.NORMALISATION,
        "columns": [url_column, caption_column],
        "ingests": [],
    }
    _agree(store, dataset, name, [url_column, caption_column])
    known = {(f["path"], f["size"], f["token"]) for i in dataset["ingests"] for f in i["files"]}
    new = [f for f in _expand(patterns, options or {}) if (f.path, f.size, f.token) not in known]
    if not new:
        return dataset
    files = [{"path": f.path, "size": f.size, "token": f.token} for f in new]
    earlier = [i["id"] for i in dataset["ingests"]]
    identity = fingerprint({"earlier": earlier, "files": files, "rows_per_part": rows_per_part})
    with tempfile.TemporaryDirectory(prefix="vesl-ingest-") as scratch:
        counts = _stage(new, url_column, caption_column, f"{scratch}/rows.parquet", report)
        first = sum(i["parts"] for i in dataset["ingests"])
        kept, parts = _publish(store, dataset, identity, first, rows_per_part, scratch)
    counts |= {"kept": kept, "duplicate_url": counts["rows"] - counts["no_url"] - counts["malformed"] - kept}
    dataset["ingests"].append({"id": identity, "files": files, "first": first, "parts": parts, **counts})
    store.write_json("dataset.json", dataset)
    return dataset


def read_dataset(store: Store) -> dict[str, Any] | None:
    """`dataset.json`, or None for a store without one."""
    return store.read_json("dataset.json")  # type: ignore[no-any-return]


def input_tables(dataset: Mapping[str, Any]) -> list[str]:
    """The input table of every part, by part number."""
    return [
        f"input/{ingest['id']}/{part_name(part)}.parquet"
        for ingest in dataset["ingests"]
        for part in range(ingest["first"], ingest["first"] + ingest["parts"])
    ]


def _agree(store: Store, dataset: Mapping[str, Any], name: str, columns: list[str | None]) -> None:
    if dataset["format"] != FORMAT or dataset["url_normalisation"] != urls.NORMALISATION:
        raise IngestError(f"store {store.url}: was written by another version of vesl; use that one, or another store")
    if dataset["name"] != name:
        raise IngestError(f"store {store.url}: holds the data set {dataset['name']!r}, not {name!r}; use another store")
    if dataset["columns"] != columns:
        raise IngestError(
            f"store {store.url}: was filled from the columns {dataset['columns']}, the recipe says {columns}; "
            "published parts never change, so use another store"
        )


def _expand(patterns: tuple[str, ...], options: Mapping[str, Any]) -> list[Source]:
    found: list[Source] = []
    for pattern in patterns:
        try:
            remote = "://" in pattern and not pattern.startswith("file://")
            fs, path = fsspec.url_to_fs(pattern, **(options if remote else {}))
            if isinstance(fs, LocalFileSystem):
                paths = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)] or [path]
            else:
                paths = fs.glob(path) or [path]
            infos = [(p, fs.info(p)) for p in sorted(paths)]
        except FileNotFoundError:
            raise IngestError(f"dataset.source: no file matches {pattern}") from None
        except Exception as error:  # noqa: BLE001  (every driver has errors of its own)
            raise IngestError(f"dataset.source: {pattern}: {type(error).__name__}: {error}") from None
        for p, info in infos:
            token = str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or "")
            found.append(Source(p, _kind(p), int(info["size"] or 0), token, fs))
    unique = {(f.path, f.token): f for f in found}  # two patterns may match one file
    return list(unique.values())


def _kind(path: str) -> str:
    suffixes = [s.lower() for s in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    kind = _KINDS.get(suffixes[-1] if suffixes else "")
    if kind is None:
        raise IngestError(f"dataset.source: {path}: expected a name that ends in {', '.join(_KINDS)} (.gz may follow)")
    return kind


def _connect(scratch: str) -> duckdb.DuckDBPyConnection:
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": MEMORY,
        "temp_directory": scratch,
        "preserve_insertion_order": True,
    }
    return duckdb.connect(config=settings)


def _reader(db: duckdb.DuckDBPyConnection, query: str) -> pa.RecordBatchReader:
    reader: pa.RecordBatchReader = db.sql(query).to_arrow_reader(_BATCH)
    return reader


def _stage(
    sources: list[Source], url_column: str, caption_column: str | None, target: str, report: Report
) -> dict[str, int]:
    """Write every readable row of the files with its key and its place in the order of all rows to one scratch file."""
    schema = pa.schema([*INPUT, ("place", pa.int64())])
    counts = {"rows": 0, "no_url": 0, "malformed": 0}
    with pq.ParquetWriter(target, schema, compression="lz4", use_dictionary=["source"]) as writer:
        for source in sources:
            row = 0
            for batch in _rows(source, url_column, caption_column, counts):
                texts = batch.column(0).to_pylist()
                rows = pa.array(range(row, row + len(texts)), pa.int64())
                places = pa.array(range(counts["rows"], counts["rows"] + len(texts)), pa.int64())
                normal, keys = urls.keys(texts)
                names = pa.repeat(pa.scalar(source.path), len(texts))
                table = pa.table([keys, normal, batch.column(1), names, rows, places], schema=schema)
                usable = pa.array([bool(text and text.strip()) for text in texts])
                writer.write_table(table.filter(usable))
                counts["no_url"] += len(texts) - usable.true_count
                counts["rows"] += len(texts)
                row += len(texts)
                report(len(texts))
    counts["rows"] += counts["malformed"]
    return counts


def _rows(
    source: Source, url_column: str, caption_column: str | None, counts: dict[str, int]
) -> Iterator[pa.RecordBatch]:
    """Stream (url, alt_text) of one file in its order, as text; count the lines that are no rows as `malformed`."""
    with tempfile.TemporaryDirectory(prefix="vesl-read-") as scratch, _connect(scratch) as db:
        path = source.path
        if not isinstance(source.fs, LocalFileSystem):
            db.register_filesystem(source.fs)
            path = source.fs.unstrip_protocol(path)
        try:
            scan = _scan(source, path, db, (url_column, caption_column))
            caption = f"CAST({_quoted(caption_column)} AS VARCHAR)" if caption_column else "NULL::VARCHAR"
            query = f"SELECT CAST({_quoted(url_column)} AS VARCHAR), {caption} FROM {scan}"
            yield from _reader(db, query)
            if source.kind in ("csv", "tsv"):
                [(lines,)] = db.sql("SELECT count(DISTINCT line) FROM reject_errors").fetchall()
                counts["malformed"] += lines
        except (duckdb.Error, OSError, EOFError) as error:
            first = str(error).strip().split("\n", 1)[0]
            raise IngestError(f"dataset.source: {source.path}: {first}") from None


def _scan(source: Source, path: str, db: duckdb.DuckDBPyConnection, wanted: tuple[str, str | None]) -> str:
    """The SQL that scans a file as rows of text. Raises IngestError where a wanted column is not in it."""
    file = "'" + path.replace("'", "''") + "'"
    if source.kind == "parquet":
        _require(
            source, [row[0] for row in db.execute(f"DESCRIBE SELECT * FROM read_parquet({file})").fetchall()], wanted
        )
        return f"read_parquet({file})"
    with source.fs.open(source.path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if source.path.lower().endswith(".gz") else raw
        head = stream.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace")
    if source.kind == "jsonl":
        _require(source, _json_keys(head), wanted)
        columns = _struct([c for c in wanted if c])
        options = "format='newline_delimited', ignore_errors=true, maximum_object_size=16777216"
        return f"read_json({file}, {options}, columns={columns})"
    delimiter = "\t" if source.kind == "tsv" else ","
    header = next(csv.reader(io.StringIO(head, newline=""), delimiter=delimiter), [])
    _require(source, header, wanted)
    return (
        f"read_csv({file}, auto_detect=false, header=true, columns={_struct(header)}, delim='{delimiter}', quote='\"', "
        "escape='\"', null_padding=true, parallel=false, store_rejects=true)"
    )


def _json_keys(head: str) -> list[str]:
    """The keys of the records at a file's beginning, in order of appearance."""
    keys: dict[str, None] = {}
    for line in head.splitlines():
        with suppress(ValueError, RecursionError):  # a broken line becomes a row without a URL, and is counted
            record = json.loads(line)
            keys |= dict.fromkeys(record) if isinstance(record, dict) else {}
    return list(keys)


def _struct(columns: list[str]) -> str:
    return "{" + ", ".join("'" + c.replace("'", "''") + "': 'VARCHAR'" for c in columns) + "}"


def _quoted(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _require(source: Source, columns: list[str], wanted: tuple[str, str | None]) -> None:
    for key, column in zip(("url_column", "caption_column"), wanted, strict=True):
        if column is not None and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1, cutoff=0.3) or columns[:1]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise IngestError(f"dataset.{key}: {source.path} has no column {column!r}{hint}")


def _publish(
    store: Store, dataset: Mapping[str, Any], identity: str, first: int, rows_per_part: int, scratch: str
) -> tuple[int, int]:
    """Order the staged rows by key, the first of each key only, without earlier ingests' keys; cut them into parts."""
    with _connect(scratch) as db:
        db.execute(f"CREATE VIEW staged AS SELECT * FROM read_parquet('{scratch}/rows.parquet')")
        known = ""
        if tables := input_tables(dataset):
            if not store.local:
                db.register_filesystem(store.fs)
            paths = [store.path(t) if store.local else store.fs.unstrip_protocol(store.path(t)) for t in tables]
            db.execute("CREATE VIEW known AS SELECT key FROM read_parquet($1)".replace("$1", repr(paths)))
            known = "ANTI JOIN known USING (key)"
        db.execute(f"CREATE TABLE chosen AS SELECT min(place) AS place FROM staged {known} GROUP BY key")
        [(kept,)] = db.sql("SELECT count(*) FROM chosen").fetchall()
        parts = -(-kept // rows_per_part)
        columns = ", ".join(f"staged.{_quoted(name)}" for name in INPUT.names)
        query = f"SELECT {columns} FROM staged SEMI JOIN chosen USING (place) ORDER BY staged.key"
        reader = _reader(db, query)
        pending: list[pa.Table] = []
        for part in range(parts):
            size = kept * (part + 1) // parts - kept * part // parts
            while sum(map(len, pending)) < size:
                pending.append(pa.Table.from_batches([reader.read_next_batch()]))
            rows = pa.concat_tables(pending)
            table = rows.slice(0, size).cast(INPUT)
            pending = [rows.slice(size)]
            data = encode_table(table, {"ingest": identity, "part": first + part, "rows": size})
            store.create(f"input/{identity}/{part_name(first + part)}.parquet", data)
    return kept, parts
