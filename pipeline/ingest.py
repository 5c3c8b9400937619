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
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms import urls
from ..transforms.records import ARCHIVED, INPUT, INPUT_MORE, input_schema
from ..transforms.takedown import Takedown
from .archives import ARCHIVES, apart, read_archives, without_companions
from .lists import Columns, IngestError, Rows, UrlList, find_lists, read_list
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
    url_column: str | None,
    caption_column: str | None,
    rows_per_part: int,
    options: Mapping[str, Any] | None = None,
    report: Report = lambda rows: None,
    hash_columns: tuple[str | None, str | None, str | None] = (None, None, None),
) -> dict[str, Any]:
    """Take in the files that the store has not seen, first the lists, then the archives; return `dataset.json`.

    Each ingest there counts its rows: `rows` in the files = `kept` + `duplicate_url` + `no_url` + `malformed` +
    `taken_down`. A line that cannot be read, a row without a URL, or one that a takedown list names makes no sample; a
    URL that is malformed does, and ends in `download` with its reason. `hash_columns` names those of the sha256, md5
    and perceptual hash that images should have; what is no such hash is null in the parts, and counted in `bad_hash`.
    An archive is one part; images that it says it has not are counted in `no_image`.

    Raises IngestError, also where nothing in a file's column of hashes is one. Killed at any moment and run again, the
    result is the same; of two runs that ingest at once, one goes first and the other goes on from it.
    """
    asked = Columns(url_column, caption_column, *hash_columns)
    sources = without_companions(find_lists(patterns, options or {}))
    while True:
        dataset = read_dataset(store) or {
            "name": name,
            "format": FORMAT,
            "url_normalisation": urls.NORMALISATION,
            "columns": asked.named,
            "ingests": [],
        }
        columns = _agree(store, dataset, name, asked)
        known = {(f["path"], f["size"], f["token"]) for i in dataset["ingests"] for f in i["files"]}
        new = [f for f in sources if (f.path, f.size, f.token) not in known]
        if new:
            lists, archives = apart(new, columns)
            entry = _ingest(store, dataset, lists or archives, columns, rows_per_part, report)
            # The claim on this place in the row of ingests; of several, the first creator's counts.
            store.create(claim(len(dataset["ingests"])), to_json(entry))
            continue  # and look again: for more, and as a compaction may have changed the counts of earlier ones
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


def _agree(store: Store, dataset: Mapping[str, Any], name: str, asked: Columns) -> Columns:
    """The columns to read, so that they fit those that the store was filled from. Raises IngestError."""
    if dataset["format"] != FORMAT or dataset["url_normalisation"] != urls.NORMALISATION:
        raise IngestError(f"store {store.url}: was written by another version of vesl; use that one, or another store")
    if dataset["name"] != name:
        raise IngestError(f"store {store.url}: holds the data set {dataset['name']!r}, not {name!r}; use another store")
    for columns in (asked, replace(asked, captions=False)):  # the second where no spelling of captions was looked for
        if dataset["columns"] == columns.named:
            return columns
    raise IngestError(
        f"store {store.url}: was filled from the columns {dataset['columns']}, the recipe says {asked.named}; "
        "published parts never change, so use another store"
    )


def _ingest(
    store: Store,
    dataset: Mapping[str, Any],
    new: list[UrlList],
    columns: Columns,
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
    archived = new[0].kind in ARCHIVES
    more = ["archived"] if archived else list(columns.expected)
    if archived:
        inputs["archives"] = sorted({source.kind for source in new})
    identity = fingerprint(inputs)
    first = sum(i["parts"] for i in dataset["ingests"])
    with scratch_folder() as scratch:
        counts = _collect(new, columns, takedown, f"{scratch}/rows.parquet", report, more)
        kept, parts = publish(
            store, identity, first, None if archived else rows_per_part, scratch, input_tables(dataset)
        )
    dropped = sum(counts.get(name, 0) for name in ("no_url", "malformed", "taken_down", "no_image"))
    counts |= {"kept": kept, "duplicate_url": counts["rows"] - dropped - kept}
    entry = {"id": identity, "files": files, "first": first, "parts": parts, **counts, "dataset": about}
    return entry | ({"more": more} if more else {})


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
    columns: Columns,
    takedown: Takedown,
    target: str,
    report: Report,
    more: Sequence[str],
) -> dict[str, int]:
    """Write every readable row of the files with its key and its place in the order of all rows to one scratch file."""
    schema = pa.schema([*INPUT, *map(INPUT_MORE.field, more), ("place", pa.int64())])
    archived = "archived" in more
    expected = () if archived else columns.expected
    counts = {"rows": 0, "no_url": 0, "malformed": 0, "taken_down": 0}
    counts |= dict.fromkeys(["no_image"] if archived else ["bad_hash"] if expected else [], 0)
    place = 0
    with pq.ParquetWriter(target, schema, compression="lz4", use_dictionary=["source"]) as writer:
        for source, batches in read_archives(sources) if archived else ((s, read_list(s, columns)) for s in sources):
            row = given = good = 0
            for rows in batches:
                normal, keys, usable = _keys(rows)
                size = len(usable)
                no_image = rows.archived.count(None)
                names = pa.repeat(pa.scalar(source.path), size)
                numbers, places = (pa.array(range(start, start + size), pa.int64()) for start in (row, place))
                hashes, values, fit = rows.expected(expected)
                given, good = given + values, good + fit
                extra = [pa.array(rows.archived, ARCHIVED)] if archived else list(hashes.values())
                table = pa.table([keys, normal, rows.captions, names, numbers, *extra, places], schema=schema)
                table = table.filter(pa.array(usable, pa.bool_()))
                allowed = table.filter(pc.invert(match(table, takedown))) if takedown else table
                writer.write_table(allowed)
                counts["taken_down"] += len(table) - len(allowed)
                counts["no_url"] += size - no_image - sum(usable)
                if archived:
                    counts["no_image"] += no_image
                counts["malformed"] += rows.malformed
                counts["rows"] += size + rows.malformed
                row, place = row + size, place + size
                report(size + rows.malformed)
            if given and not good:
                named = ", ".join(f"{kind}_column" for kind in ("sha256", "md5", "phash") if getattr(columns, kind))
                raise IngestError(f"dataset: {source.path} has no hash of its kind in the columns of {named}")
            if expected:
                counts["bad_hash"] += given - good
    return counts


def _keys(rows: Rows) -> tuple[list[str], list[str], list[bool]]:
    """The normalised URLs and the keys of rows, and whether they make samples."""
    normal, keys = urls.keys(rows.urls)
    usable = [bool(url and url.strip()) for url in rows.urls]
    if rows.archived:
        keys = [key if has else content or "" for key, has, content in zip(keys, usable, rows.contents, strict=True)]
        usable = [place is not None and bool(key) for place, key in zip(rows.archived, keys, strict=True)]
    return normal, keys, usable


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
    store: Store, identity: str, first: int, rows_per_part: int | None, scratch: str, earlier: Sequence[str] = ()
) -> tuple[int, int]:
    """Order the rows staged in `rows.parquet` by key, the first of each key only, and cut them into parts.

    Those of archives are first ordered by these. Without `rows_per_part` all stay in their order, and each file that
    has any is a part. Keys of the `earlier` input tables are left out. Returns how many rows and parts there are now.
    """
    with connect(store, scratch) as db:
        db.execute(f"CREATE VIEW staged AS SELECT * FROM read_parquet({_literal(f'{scratch}/rows.parquet')})")
        known = ""
        if earlier:
            db.execute(f"CREATE VIEW known AS {scan(store, earlier, 'key')}")
            known = "ANTI JOIN known USING (key)"
        db.execute(f"CREATE TABLE chosen AS SELECT min(place) AS place FROM staged {known} GROUP BY key")
        schema = input_schema(pq.read_schema(f"{scratch}/rows.parquet").names)
        order = "staged.place" if rows_per_part is None else "staged.key"
        if rows_per_part is not None and "archived" in schema.names:  # a retry: no archive is to be opened twice
            order = "staged.archived.path NULLS FIRST, staged.key"
        if rows_per_part is None:
            grouped = "SELECT count(*) FROM staged SEMI JOIN chosen USING (place) GROUP BY source"
            sizes = [size for (size,) in db.sql(f"{grouped} ORDER BY min(place)").fetchall()]
        else:
            [(kept,)] = db.sql("SELECT count(*) FROM chosen").fetchall()
            parts = -(-kept // rows_per_part)
            sizes = [kept * (part + 1) // parts - kept * part // parts for part in range(parts)]
        columns = ", ".join(f'staged."{name}"' for name in schema.names)
        query = f"SELECT {columns} FROM staged SEMI JOIN chosen USING (place) ORDER BY {order}"
        reader: pa.RecordBatchReader = db.sql(query).to_arrow_reader(_BATCH)
        pending: list[pa.Table] = []
        for part, size in enumerate(sizes):
            while sum(map(len, pending)) < size:
                pending.append(pa.Table.from_batches([reader.read_next_batch()]))
            rows = pa.concat_tables(pending)
            table = rows.slice(0, size).cast(schema)
            pending = [rows.slice(size)]
            data = encode_table(table, {"ingest": identity, "part": first + part, "rows": size})
            store.create(f"input/{identity}/{part_name(first + part)}.parquet", data)
    return sum(sizes), len(sizes)
