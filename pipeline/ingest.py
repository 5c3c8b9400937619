"""Input: lists of URLs become parts, once, in an order that does not depend on luck.

Ordering and de-duplication are DuckDB's, which spills to disk, so memory stays bounded however long the lists are.
Ingests are append-only: a new file makes a new ingest with parts of its own, keys of earlier ingests win, and a
published part never changes.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms import urls
from ..transforms.records import INPUT
from ..transforms.takedown import Takedown
from .lists import IngestError, UrlList, find_lists, read_list
from .stage import fingerprint, part_name
from .store import FORMAT, Store, encode_table, to_json
from .takedown import match, obeyed

MEMORY = "768MB"  # DuckDB's share; Arrow's batches and the interpreter come on top
_BATCH = 50_000
_SCRATCH = "vesl-ingest-"
Report = Callable[[int], None]


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

    Each ingest there counts its rows: `rows` in the files = `kept` + `duplicate_url` + `no_url` + `malformed` +
    `taken_down`. A line that cannot be read, a row without a URL, or one that a takedown list names makes no sample; a
    URL that is malformed does, and ends in `download` with its reason. Raises IngestError. Killed at any moment and run
    again, the result is the same; of two runs that ingest at once, one goes first and the other goes on from it.
    """
    columns = [url_column, caption_column]
    sources = find_lists(patterns, options or {})
    while True:
        dataset = read_dataset(store) or {
            "name": name,
            "format": FORMAT,
            "url_normalisation": urls.NORMALISATION,
            "columns": columns,
            "ingests": [],
        }
        _agree(store, dataset, name, columns)
        known = {(f["path"], f["size"], f["token"]) for i in dataset["ingests"] for f in i["files"]}
        new = [f for f in sources if (f.path, f.size, f.token) not in known]
        if new:
            entry = _ingest(store, dataset, new, url_column, caption_column, rows_per_part, report)
            # The claim on this place in the row of ingests; of several, the first creator's counts.
            claimed = store.create(claim(len(dataset["ingests"])), to_json(entry))
            if claimed or store.read_json(claim(len(dataset["ingests"]))) != entry:
                continue  # and look again, as a compaction may have changed the counts of earlier ones
            dataset["ingests"].append(entry)
        if store.read_json("dataset.json") != dataset and dataset["ingests"]:
            store.write_json("dataset.json", dataset)
        return dataset


def read_dataset(store: Store) -> dict[str, Any] | None:
    """`dataset.json` with every claimed ingest, or None for a store without one."""
    dataset = store.read_json("dataset.json")
    first = store.read_json(claim(0)) if dataset is None else None
    if first is not None:  # its writer was killed right after the claim
        dataset = {**first["dataset"], "ingests": []}
    while dataset is not None and (entry := store.read_json(claim(len(dataset["ingests"])))):
        dataset["ingests"].append(entry)
    return dataset  # type: ignore[no-any-return]


def claim(place: int) -> str:
    """The name of the file by which an ingest takes its place in the row of ingests."""
    return f"input/{place:05d}.json"


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


def _ingest(
    store: Store,
    dataset: Mapping[str, Any],
    new: list[UrlList],
    url_column: str,
    caption_column: str | None,
    rows_per_part: int,
    report: Report,
) -> dict[str, Any]:
    """Publish the parts of one ingest; return its entry in `dataset.json`."""
    files = [{"path": f.path, "size": f.size, "token": f.token} for f in new]
    about = {key: value for key, value in dataset.items() if key != "ingests"}
    earlier = [i["id"] for i in dataset["ingests"]]
    inputs = {"about": about, "earlier": earlier, "files": files, "rows_per_part": rows_per_part}
    if takedown := obeyed(store):  # parts that were made without these lists, by a run that was killed, are not ours
        inputs["takedown"] = {kind: sorted(values) for kind, values in vars(takedown).items()}
    identity = fingerprint(inputs)
    first = sum(i["parts"] for i in dataset["ingests"])
    with scratch_folder() as scratch:
        counts = _collect(new, url_column, caption_column, takedown, f"{scratch}/rows.parquet", report)
        kept, parts = publish(store, identity, first, rows_per_part, scratch, input_tables(dataset))
    dropped = counts["no_url"] + counts["malformed"] + counts["taken_down"]
    counts |= {"kept": kept, "duplicate_url": counts["rows"] - dropped - kept}
    return {"id": identity, "files": files, "first": first, "parts": parts, **counts, "dataset": about}


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A folder for the rows on their way; those of processes that were killed are removed first."""
    for old in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        process = old.name.removeprefix(_SCRATCH).split("-")[0]
        if process.isdigit() and not _alive(int(process)):
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-") as folder:
        yield folder


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _collect(
    sources: list[UrlList],
    url_column: str,
    caption_column: str | None,
    takedown: Takedown,
    target: str,
    report: Report,
) -> dict[str, int]:
    """Write every readable row of the files with its key and its place in the order of all rows to one scratch file."""
    schema = pa.schema([*INPUT, ("place", pa.int64())])
    counts = {"rows": 0, "no_url": 0, "malformed": 0, "taken_down": 0}
    place = 0
    with pq.ParquetWriter(target, schema, compression="lz4", use_dictionary=["source"]) as writer:
        for source in sources:
            row = 0
            for rows in read_list(source, url_column, caption_column):
                usable = [bool(url and url.strip()) for url in rows.urls]
                normal, keys = urls.keys(rows.urls)
                size = len(usable)
                names = pa.repeat(pa.scalar(source.path), size)
                numbers, places = (pa.array(range(start, start + size), pa.int64()) for start in (row, place))
                table = pa.table([keys, normal, rows.captions, names, numbers, places], schema=schema)
                table = table.filter(pa.array(usable, pa.bool_()))
                allowed = table.filter(pc.invert(match(table, takedown))) if takedown else table
                writer.write_table(allowed)
                counts["taken_down"] += len(table) - len(allowed)
                counts["no_url"] += size - sum(usable)
                counts["malformed"] += rows.malformed
                counts["rows"] += size + rows.malformed
                row, place = row + size, place + size
                report(size + rows.malformed)
    return counts


def connect(store: Store, scratch: str | None = None) -> duckdb.DuckDBPyConnection:
    """DuckDB with bounded memory, able to read the store's tables; spills into `scratch`."""
    settings: dict[str, str | bool | int | float | list[str]] = {"memory_limit": MEMORY}
    if scratch is not None:
        settings["temp_directory"] = scratch
    db = duckdb.connect(config=settings)
    if not store.local:
        db.register_filesystem(store.fs)
    return db


def scan(store: Store, tables: Sequence[str], columns: str = "*") -> str:
    """SQL that reads tables of the store. Their paths are taken by the letter, where DuckDB would see patterns."""
    paths = [store.path(name) if store.local else store.fs.unstrip_protocol(store.path(name)) for name in tables]
    return f"SELECT {columns} FROM read_parquet([{', '.join(_literal(path) for path in paths)}])"


def _literal(path: str) -> str:
    return "'" + re.sub(r"[\[*?]", r"[\g<0>]", path).replace("'", "''") + "'"


def publish(
    store: Store, identity: str, first: int, rows_per_part: int, scratch: str, earlier: Sequence[str] = ()
) -> tuple[int, int]:
    """Order the rows staged in `rows.parquet` by key, the first of each key only, and cut them into parts.

    Keys of the `earlier` input tables are left out. Returns how many rows and parts there are now.
    """
    with connect(store, scratch) as db:
        db.execute(f"CREATE VIEW staged AS SELECT * FROM read_parquet({_literal(f'{scratch}/rows.parquet')})")
        known = ""
        if earlier:
            db.execute(f"CREATE VIEW known AS {scan(store, earlier, 'key')}")
            known = "ANTI JOIN known USING (key)"
        db.execute(f"CREATE TABLE chosen AS SELECT min(place) AS place FROM staged {known} GROUP BY key")
        [(kept,)] = db.sql("SELECT count(*) FROM chosen").fetchall()
        parts = -(-kept // rows_per_part)
        columns = ", ".join(f'staged."{name}"' for name in INPUT.names)
        query = f"SELECT {columns} FROM staged SEMI JOIN chosen USING (place) ORDER BY staged.key"
        reader: pa.RecordBatchReader = db.sql(query).to_arrow_reader(_BATCH)
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
