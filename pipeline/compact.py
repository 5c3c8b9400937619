"""Compaction: what the takedown lists name goes out of every file of the store, and what is left is linked anew.

Only the parts touched are rewritten, and no model is opened: a table loses rows, a tar loses members, and the hashes by
which tables cite their parents and their tars follow.

Killed at any moment, it is done again from the start, to the same bytes. For that, what is rewritten says by itself how
far it is: of two tables that cite one another the child is written first, while the parent on disk still tells which
content it was made from; files that a table cites are written before it and removed after it; and the input tables,
from which the samples named are known, come last of all. The journal only says that there is something to finish.
"""

import functools
import io
import itertools
import json
import math
import os
import platform
import re
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms.records import ADDS, INPUT, step_schema
from ..transforms.shards import add_member, close_tar, dump
from .ingest import claim, input_tables, read_dataset
from .recipe import Recipe
from .stage import part_name
from .store import Store, StoreError, encode_table, to_json
from .takedown import FOLDER, add, input_files, part_of, step_tables, who
from .work import counted

JOURNAL = f"{FOLDER}/compaction.json"
GONE = "taken_down"  # stands for a key in other samples' texts, and for the texts of a run's record
_SILENT_S, _SILENT_HERE_S = 600.0, 86_400.0  # until a run or a compaction is not believed to be at work
_KEY = re.compile(r"\b[0-9a-f]{24}\b")
_SHARD = re.compile(r"shard-(\d{5,})-\d+\.tar")
_NOTE_EVERY_S = 30.0
_READERS = 32
_ROWS = 100_000  # of a file of copies, looked at together
Say = Callable[[str], None]
References = dict[str, dict[str, Any]]  # of images, by key, as a shard's JSON has them
Places = dict[str, References]  # of images that have moved, by folder


def command(recipe: Recipe, path: str, remove: bool) -> int:
    """`vesl takedown`: store the list in the file `path`, say whom all lists name, and `remove` what they name."""
    store = Store(recipe.store, recipe.storage_options)
    store.check(write=True)
    if store.read_json("dataset.json") is None and store.read_json(claim(0)) is None:
        raise StoreError(f"store {store.url}: holds no data set yet; `vesl run` makes one")
    name, new = add(store, path)
    print(f"{name}: {'stored; every reader obeys it from now on' if new else 'is stored already'}")
    found = who(store)
    count = sum(map(len, found.values()))
    if remove:
        samples, parts = compact(store, lambda line: print(line, file=sys.stderr))
        print(f"removed {samples:,} samples of {parts:,} parts from every step and shard")
    elif count:
        print(f"the lists name {count:,} samples that are in the store, in {spans(found)}; `--compact` removes them")
    else:
        print("the lists name no sample that is in the store")
    return 0


def spans(parts: Iterable[int]) -> str:
    """Numbers of parts for a person: `parts 0-3, 7`; of very many runs the first twenty."""
    runs: list[list[int]] = []
    for part in sorted(parts):
        if runs and part == runs[-1][1] + 1:
            runs[-1][1] = part
        else:
            runs.append([part, part])
    told = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:20]]
    return f"parts {', '.join(told)}{', ...' if len(runs) > 20 else ''}"


def compact(store: Store, say: Say = lambda line: None) -> tuple[int, int]:
    """Remove what the lists name; return how many samples and of how many parts went now.

    Raises StoreError where a run or another compaction is at work on the store.
    """
    if busy := at_work(store):
        raise StoreError(f"store {store.url}: {busy}; wait for its end, or stop it")
    journal = store.read_json(JOURNAL) or {}
    found = who(store)
    unfinished = set(journal["parts"]) if journal.get("state") == "running" else set()
    if not found and not unfinished:
        return 0, 0
    gone = _Gone(pa.concat_arrays([pa.array([], pa.string()), *found.values()]).unique())
    tables = step_tables(store)
    parts = sorted(unfinished | found.keys() | _citing(store, tables, gone))
    inputs = [name for name in input_files(store) if part_of(name) in set(parts)]
    of_part = {part: list(names) for part, names in itertools.groupby(sorted(inputs, key=part_of), part_of)}
    last = -math.inf
    for i, part in enumerate(parts):
        if time.monotonic() - last > _NOTE_EVERY_S:
            _note(store, "running", parts)
            say(f"compaction: {i} of {len(parts)} parts")
            last = time.monotonic()
        _part(store, part, of_part.get(part, []), tables, gone)
    for folder in tables:
        _folder(store, folder, set(parts), gone)
    for name in store.names("runs"):
        _record(store, f"runs/{name}", set(parts))
    _write(store, (_Table.of(store, name, gone) for name in inputs))
    for folder in {name.rpartition("/")[0] for name in input_files(store)}:
        for name in (name for name in store.names(folder) if name.endswith(".wip")):
            store.sweep(f"{folder}/{name}")
    _recount(store, set(parts))
    _note(store, "done", parts)
    return len(gone.keys), len(found)


def finish(store: Store, say: Say = lambda line: None) -> None:
    """Finish a compaction that was killed. Raises StoreError where it is still at work."""
    journal = store.read_json(JOURNAL)
    if journal and journal["state"] == "running":
        if alive(journal):
            raise StoreError(f"store {store.url}: {_who(journal, 'a compaction')}; run again when it has ended")
        say("finishing a compaction that was interrupted")
        compact(store, say)


def at_work(store: Store) -> str | None:
    """A run or a compaction that seems to be at work on the store, in words, or None."""
    with ThreadPoolExecutor(_READERS) as pool:
        records = list(pool.map(lambda name: store.read_json(f"runs/{name}/run.json"), store.names("runs")))
    busy = [_who(record, "a run") for record in records if record and alive(record)]
    journal = store.read_json(JOURNAL)
    busy += [_who(journal, "a compaction")] if journal and alive(journal) else []
    return busy[0] if busy else None


def alive(record: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a record may still be at work: on this machine, whether it is there."""
    if record["state"] != "running":
        return False
    here = record["host"] == platform.node()
    if here and record["pid"] == os.getpid():
        return False
    if here:
        try:
            os.kill(record["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
    return bool(time.time() - record["updated"] < (_SILENT_HERE_S if here else _SILENT_S))


def _who(record: Mapping[str, Any], what: str) -> str:
    silence = time.time() - record["updated"]
    return f"{what} is at work on {record['host']} (process {record['pid']}, last sign {silence:.0f} s ago)"


def _note(store: Store, state: str, parts: Iterable[int]) -> None:
    head = {"host": platform.node(), "pid": os.getpid(), "updated": round(time.time(), 3)}
    store.write_json(JOURNAL, {"state": state, "parts": sorted(parts), **(head if state == "running" else {})})


@dataclass(frozen=True)
class _Gone:
    """The keys that go."""

    keys: pa.Array

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The same, to ask about one."""
        return frozenset(self.keys.to_pylist())

    def rows(self, table: pa.Table) -> pa.Table:
        """A table without their rows, and without their names in other rows."""
        kept = table.filter(pc.invert(pc.is_in(table["key"], self.keys)))
        for i, field in enumerate(kept.schema):
            if field.name in ("key", "url", "alt_text") or not pa.types.is_string(field.type):
                continue
            if pc.any(pc.match_substring_regex(kept[field.name], _KEY.pattern)).as_py():
                texts = [text and self.text(text) for text in kept[field.name].to_pylist()]
                if texts != kept[field.name].to_pylist():
                    kept = kept.set_column(i, field, pa.array(texts, field.type))
        return kept

    def text(self, text: str) -> str:
        """A text without their names."""
        return _KEY.sub(lambda found: GONE if found[0] in self.names else found[0], text)


def _citing(store: Store, tables: Mapping[str, set[str]], gone: _Gone) -> set[int]:
    """The parts in which another sample's row names one that goes, as the copy of an earlier image does."""
    names = sorted(name for folder in tables if folder.startswith("dedup/") for name in tables[folder])

    def cites(name: str) -> bool:
        details = store.read_table(name, ["detail"])["detail"].drop_null()
        found = pc.extract_regex(details, r"(?P<key>[0-9a-f]{24})")
        return bool(pc.any(pc.is_in(pc.struct_field(found, "key"), gone.keys)).as_py())

    with ThreadPoolExecutor(_READERS) as pool:
        return {part_of(name) for name, hit in zip(names, pool.map(cites, names), strict=True) if hit}


@dataclass
class _Table:
    """A table as it will be. `before` and `content` are the hashes of its columns as they are and will be."""

    name: str
    rows: pa.Table
    footer: dict[str, Any]
    before: str
    content: str
    changed: bool
    lost: pa.Table  # the rows that go

    @staticmethod
    def of(store: Store, name: str, gone: _Gone) -> "_Table":
        """Read a table and take the rows out."""
        rows, footer = store.read_table(name), store.footer(name)
        assert footer is not None
        before = footer.pop("content")
        lost = rows.filter(pc.is_in(rows["key"], gone.keys))
        table = _Table(name, rows, footer, before, before, False, lost)
        left = gone.rows(rows)
        if not left.equals(rows):
            table.change(left)
        return table

    def change(self, rows: pa.Table) -> None:
        """Take other rows."""
        name = self.footer.get("step")
        schema = step_schema(name) if name in ADDS else INPUT if name is None else rows.schema
        # As its step wrote it: reading has given the fields inside of lists another name.
        self.rows, self.changed = rows.cast(schema) if schema.names == rows.schema.names else rows, True
        self.footer["rows"] = len(rows)
        if "counts" in self.footer:
            self.footer["counts"] = counted(rows)
        self.content = _content(self.rows)


def _content(rows: pa.Table) -> str:
    metadata = pq.read_metadata(io.BytesIO(encode_table(rows, {}))).metadata
    return str(json.loads(metadata[b"vesl"])["content"])


def _part(store: Store, part: int, inputs: list[str], listed: Mapping[str, set[str]], gone: _Gone) -> None:
    """Rewrite the tables and files of one part, but for its input table."""
    base = f"{part_name(part)}.parquet"
    roots = [_Table.of(store, name, gone) for name in inputs]
    tables = [_Table.of(store, f"{f}/{base}", gone) for f in listed if f"{f}/{base}" in listed[f]]
    places: Places = {}
    for table in tables:
        if "tar" in table.footer and table.changed:
            places[table.name.rpartition("/")[0]] = _images(store, table)
    for table in tables:
        if "shards" in table.footer:
            _shards(store, table, places, gone)
    heirs = {table.before: table.content for table in (*roots, *tables)}
    for table in tables:
        parent = heirs.get(table.footer["parent"], table.footer["parent"])
        table.changed |= parent != table.footer["parent"]
        table.footer["parent"] = parent
    _write(store, _children_first(tables))
    for folder in listed:
        _tidy(store, folder, part, next((t for t in tables if t.name == f"{folder}/{base}"), None))


def _children_first(tables: list[_Table]) -> list[_Table]:
    """The tables in an order in which each comes after those that cite it."""
    order: list[_Table] = []

    def visit(table: _Table) -> None:
        if all(table is not seen for seen in order):
            for child in tables:
                if child.footer["parent"] == table.content:
                    visit(child)
            order.append(table)

    for table in tables:
        visit(table)
    return order


def _write(store: Store, tables: Iterable[_Table]) -> None:
    for table in tables:
        if table.changed:
            store.replace(table.name, encode_table(table.rows, table.footer))


def _images(store: Store, table: _Table) -> References:
    """Publish the tar of a download table that has lost rows; say where each of its images lies now."""
    folder, tar = table.name.rpartition("/")[0], table.footer["tar"]
    keys, offsets, sizes = (table.rows[name].to_pylist() for name in ("key", "offset", "size"))
    with store.spool(f"{folder}/{part_name(part_of(table.name))}.tar") as file:
        for i, (key, size) in enumerate(zip(keys, sizes, strict=True)):
            if size is not None:
                (image,) = store.read_ranges(f"{folder}/{tar['name']}", [(offsets[i], offsets[i] + size)])
                offsets[i] = add_member(file, f"{key}.jpg", image)
        about = close_tar(file)
        name = f"{part_name(part_of(table.name))}.{about['sha256'][:16]}.tar"
        store.publish(file, f"{folder}/{name}")
    table.footer["tar"] = {"name": name, **about}
    place = table.rows.schema.get_field_index("offset")
    table.change(table.rows.set_column(place, table.rows.field(place), pa.array(offsets, pa.int64())))
    found = zip(keys, offsets, sizes, strict=True)
    return {k: {"tar": f"{folder}/{name}", "offset": o, "size": s} for k, o, s in found if s is not None}


def _shards(store: Store, table: _Table, places: Places, gone: _Gone) -> None:
    """Rewrite the shards of a pack table that hold a sample that goes, or cite an image that has moved."""
    folder, hit = table.name.rpartition("/")[0], set(table.lost["shard"].to_pylist())
    moving = bool(places) and store.read_json(f"{folder}/step.json")["options"].get("images") == "reference"
    if not (moving or table.changed):
        return
    shards = []
    for entry in table.footer["shards"]:
        new = _shard(store, folder, entry, places, gone) if moving or entry["name"] in hit else entry
        shards += [new] if new else []
    table.footer["shards"] = shards
    seen: Counter[str] = Counter()
    positions: list[int | None] = []
    for shard in table.rows["shard"].to_pylist():
        positions.append(None if shard is None else seen[shard])
        seen[shard] += 1
    place = table.rows.schema.get_field_index("position")
    table.change(table.rows.set_column(place, table.rows.field(place), pa.array(positions, pa.int32())))


def _shard(store: Store, folder: str, entry: dict[str, Any], places: Places, gone: _Gone) -> dict[str, Any] | None:
    """Rewrite one shard; its entry in the footer and the index, None where nothing is left and it is removed."""
    name, samples, regions = f"{folder}/{entry['name']}", 0, 0
    try:
        source = store.fs.open(store.path(name), "rb")
    except FileNotFoundError:  # an earlier attempt has removed it
        return None
    with source, store.spool(name) as file:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                reader = tar.extractfile(member)
                if key in gone.names or reader is None:
                    continue
                data = reader.read()
                if kind == "json":
                    document = json.loads(data)
                    samples, regions = samples + 1, regions + len(document["regions"])
                    if image := document.get("image"):
                        document["image"] = places.get(image["tar"].rpartition("/")[0], {}).get(key, image)
                        data = dump(document)
                add_member(file, member.name, data)
        if not samples:
            store.remove(name)
            return None
        about = close_tar(file)
        store.publish(file, name)
    return {**entry, "samples": samples, "regions": regions, **about}


def _tidy(store: Store, folder: str, part: int, table: _Table | None) -> None:
    """Remove what a part's table does not cite: old tars, what killed attempts left, and unfinished work."""
    cited = set()
    if table is not None:
        cited = {table.footer.get("tar", {}).get("name"), *(s["name"] for s in table.footer.get("shards", ()))}
    for prefix in (f"{part_name(part)}.", f"shard-{part:05d}-"):
        for name in store.names(folder, prefix):
            if name.endswith(".wip"):
                store.sweep(f"{folder}/{name}")
            elif name.endswith(".tar") and name not in cited:
                store.remove(f"{folder}/{name}")


def _folder(store: Store, folder: str, parts: set[int], gone: _Gone) -> None:
    """Put right what a step says of all its parts: the index of its shards; the files of copies of a pass of dedup.

    Such a file is named by the tables that were compared, which are others now, and is of no use once its verdicts are
    in the parts' tables: it is removed where it knows what goes.
    """
    for name in store.names(folder):
        if name == "index.json":
            _index(store, folder, parts)
        elif name.startswith("copies-") and name.endswith(".parquet") and _knows(store, f"{folder}/{name}", gone):
            store.remove(f"{folder}/{name}")
        elif name.endswith(".wip") and not name.startswith(("part-", "shard-")):
            store.sweep(f"{folder}/{name}")


def _knows(store: Store, name: str, gone: _Gone) -> bool:
    with store.fs.open(store.path(name), "rb") as file:
        pieces = map(pa.Table.from_batches, ([batch] for batch in pq.ParquetFile(file).iter_batches(_ROWS)))
        return any(not gone.rows(piece).equals(piece) for piece in pieces)


def _index(store: Store, folder: str, parts: set[int]) -> None:
    document = store.read_json(f"{folder}/index.json")
    shards = []
    fresh: dict[int, dict[str, Any]] = {}
    for shard in document["shards"]:
        found = _SHARD.fullmatch(shard["name"])
        part = int(found[1]) if found else -1
        if part in parts and part not in fresh:
            footer = store.footer(f"{folder}/{part_name(part)}.parquet") or {"shards": []}
            fresh[part] = {entry["name"]: entry for entry in footer["shards"]}
        shards += [fresh[part][shard["name"]]] if part in parts and shard["name"] in fresh[part] else []
        shards += [shard] if part not in parts else []
    document |= {"shards": shards, **{n: sum(shard[n] for shard in shards) for n in ("samples", "regions")}}
    if to_json(document) != store.read(f"{folder}/index.json"):
        store.write_json(f"{folder}/index.json", document)


def _record(store: Store, folder: str, parts: set[int]) -> None:
    """Take the texts of events of these parts out of a run's record: an error may quote what it was about."""
    for name in store.names(folder, "events-"):
        events = store.read_json(f"{folder}/{name}")
        clean = [e | {"text": GONE} if e.get("text") and e.get("part") in parts else e for e in events or []]
        if clean != events:
            store.write_json(f"{folder}/{name}", clean)


def _recount(store: Store, parts: set[int]) -> None:
    """Let the counts of the ingests add up again: rows that are no longer there are `taken_down`."""
    dataset = read_dataset(store)
    for place, ingest in enumerate(dataset["ingests"] if dataset else []):
        if parts.isdisjoint(range(ingest["first"], ingest["first"] + ingest["parts"])):
            continue
        with ThreadPoolExecutor(_READERS) as pool:
            footers = pool.map(store.footer, input_tables({"ingests": [ingest]}))
            kept = sum(footer["rows"] for footer in footers if footer)
        if kept == ingest["kept"]:
            continue
        ingest["taken_down"] = ingest.get("taken_down", 0) + ingest["kept"] - kept
        ingest["kept"] = kept
        if store.read_json(claim(place)) not in (None, ingest):
            store.write_json(claim(place), ingest)
    if dataset is not None and store.read_json("dataset.json") not in (None, dataset):
        store.write_json("dataset.json", dataset)
