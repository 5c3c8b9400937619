"""One part of a store without the samples that go: its tables, tars and shards, linked anew. No model is opened.

A table loses rows, a tar loses members, and the hashes by which tables cite their parents and their tars follow. What
is rewritten says by itself how far it is, so that a part may be done again from the start after a death, to the same
bytes: of two tables that cite one another the child is written first, while the parent on disk still tells which
content it was made from; files that a table cites are written before it and removed after it.
"""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms.records import ADDS, INPUT, step_schema
from ..transforms.shards import add_member, close_tar, dump
from .listing import cited, part_of, tables
from .stage import part_name
from .store import Store, StoreError, encode_table
from .work import counted

GONE = "taken_down"  # stands for a key in other samples' texts, and for the texts of a run's record
_KEY = re.compile(r"\b[0-9a-f]{24}\b")
_IMAGES = 256  # read together
References = dict[str, dict[str, Any]]  # of images, by key, as a shard's JSON has them
Places = dict[str, References]  # of images that have moved, by folder


@dataclass(frozen=True)
class Gone:
    """The keys that go: `keys` (string) of the part at hand, `everyone` of all parts, as other samples may name them.

    `everyone` may be empty where no sample names another.
    """

    keys: pa.Array
    everyone: frozenset[str]

    def rows(self, table: pa.Table) -> pa.Table:
        """A table without their rows, and without their names in the details of other rows."""
        kept = table.filter(pc.invert(pc.is_in(table["key"], self.keys)))
        if self.everyone and "detail" in kept.column_names:
            texts = kept["detail"].to_pylist()
            clean = [text and self.text(text) for text in texts]
            if clean != texts:
                place = kept.schema.get_field_index("detail")
                kept = kept.set_column(place, kept.schema.field(place), pa.array(clean, pa.string()))
        return kept

    def text(self, text: str) -> str:
        """A text without their names."""
        return _KEY.sub(lambda found: GONE if found[0] in self.everyone else found[0], text)


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
    def of(store: Store, name: str, gone: Gone) -> "_Table":
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


def part(store: Store, number: int, inputs: Sequence[str], listing: Mapping[str, Sequence[str]], gone: Gone) -> None:
    """Rewrite the tables and files of one part, but for its input tables.

    `listing` has the part's files of every result, by folder.
    """
    roots = [_Table.of(store, name, gone) for name in inputs]
    names = [f"{folder}/{name}" for folder, inside in listing.items() for name in tables(inside).values()]
    found = [_Table.of(store, name, gone) for name in names]
    places: Places = {}
    for table in found:
        if "tar" in table.footer and table.changed:
            folder = table.name.rpartition("/")[0]
            with _whole(f"{folder}/{table.footer['tar']['name']}", table.name):
                places[folder] = _images(store, table)
    for table in found:
        if "shards" in table.footer:
            _shards(store, table, places, gone)
    heirs = {table.before: table.content for table in (*roots, *found)}
    for table in found:
        parent = heirs.get(table.footer["parent"], table.footer["parent"])
        table.changed |= parent != table.footer["parent"]
        table.footer["parent"] = parent
    _write(store, _children_first(found))
    for folder, inside in listing.items():
        own = next((table.footer for table in found if table.name.rpartition("/")[0] == folder), {})
        _tidy(store, folder, inside, cited(own))


def inputs(store: Store, names: Iterable[str], gone: Mapping[int, pa.Array]) -> None:
    """Rewrite input tables, each with the keys that go of its part."""
    nobody = pa.array([], pa.string())
    _write(store, (_Table.of(store, name, Gone(gone.get(part_of(name) or 0, nobody), frozenset())) for name in names))


def _children_first(found: list[_Table]) -> list[_Table]:
    """The tables in an order in which each comes after those that cite it."""
    order: list[_Table] = []

    def visit(table: _Table) -> None:
        if all(table is not seen for seen in order):
            for child in found:
                if child.footer["parent"] == table.content:
                    visit(child)
            order.append(table)

    for table in found:
        visit(table)
    return order


def _write(store: Store, found: Iterable[_Table]) -> None:
    for table in found:
        if table.changed:
            store.replace(table.name, encode_table(table.rows, table.footer))


@contextmanager
def _whole(name: str, above: str) -> Iterator[None]:
    """Say what to do where a file turns out to be damaged or gone; `above` is what is made anew with it."""
    try:
        yield
    except (tarfile.TarError, ValueError, LookupError, EOFError, FileNotFoundError) as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise StoreError(
            f"{name} is damaged ({text}): nothing can be taken out of it. Remove {above} from the store and run this "
            "again; `vesl run` then makes it anew"
        ) from None


def _images(store: Store, table: _Table) -> References:
    """Publish the tar of a download table that has lost rows; say where each of its images lies now."""
    folder, tar = table.name.rpartition("/")[0], table.footer["tar"]
    keys, offsets, sizes = (table.rows[name].to_pylist() for name in ("key", "offset", "size"))
    stem = part_name(table.footer["part"])
    stored = [i for i, size in enumerate(sizes) if size is not None]
    with store.spool(f"{folder}/{stem}.tar") as file:
        for first in range(0, len(stored), _IMAGES):
            some = stored[first : first + _IMAGES]
            images = store.read_ranges(f"{folder}/{tar['name']}", [(offsets[i], offsets[i] + sizes[i]) for i in some])
            for i, image in zip(some, images, strict=True):
                offsets[i] = add_member(file, f"{keys[i]}.jpg", image)
        about = close_tar(file)
        name = f"{stem}.{about['sha256'][:16]}.tar"
        store.publish(file, f"{folder}/{name}")
    store.sweep(table.name)
    table.footer["tar"] = {"name": name, **about}
    place = table.rows.schema.get_field_index("offset")
    table.change(table.rows.set_column(place, table.rows.field(place), pa.array(offsets, pa.int64())))
    return {keys[i]: {"tar": f"{folder}/{name}", "offset": offsets[i], "size": sizes[i]} for i in stored}


def _shards(store: Store, table: _Table, places: Places, gone: Gone) -> None:
    """Rewrite the shards of a pack table that hold a sample that goes, or cite an image that has moved."""
    folder = table.name.rpartition("/")[0]
    about = store.read_json(f"{folder}/step.json") if places else None
    moving = about is not None and about["options"].get("images") == "reference"
    if not (moving or table.changed):
        return
    shards, lost = [], Counter(table.lost["shard"].to_pylist())
    for entry in table.footer["shards"]:
        new = entry
        if moving or entry["name"] in lost:
            with _whole(f"{folder}/{entry['name']}", folder):
                new = _shard(store, folder, entry, places, (gone, lost[entry["name"]]))
        shards += [new] if new else []
    table.footer["shards"] = shards
    seen: Counter[str] = Counter()
    positions: list[int | None] = []
    for shard in table.rows["shard"].to_pylist():
        positions.append(None if shard is None else seen[shard])
        seen[shard] += 1
    place = table.rows.schema.get_field_index("position")
    table.change(table.rows.set_column(place, table.rows.field(place), pa.array(positions, pa.int32())))


def _shard(
    store: Store, folder: str, entry: dict[str, Any], places: Places, going: tuple[Gone, int]
) -> dict[str, Any] | None:
    """Rewrite one shard; its entry in the footer and the index, None where nothing is left and it is removed.

    `going`: who, and how many of its samples. Raises ValueError, LookupError or tarfile.TarError for a damaged one.
    """
    name, samples, regions, keys = f"{folder}/{entry['name']}", 0, 0, frozenset(going[0].keys.to_pylist())
    try:
        source = store.fs.open(store.path(name), "rb")
    except FileNotFoundError:  # an earlier attempt has removed it
        return None
    with source, store.spool(name) as file:
        with tarfile.open(fileobj=source, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                reader = tar.extractfile(member)
                if key in keys or reader is None:
                    continue
                data = reader.read()
                if kind == "json":
                    document = json.loads(data)
                    samples, regions = samples + 1, regions + len(document["regions"])
                    if image := document.get("image"):
                        document["image"] = places.get(image["tar"].rpartition("/")[0], {}).get(key, image)
                        data = dump(document)
                add_member(file, member.name, data)
        if samples + going[1] != entry["samples"]:  # to tarfile, a damaged header is the end
            raise ValueError(f"it has {samples} of {entry['samples'] - going[1]} samples that stay")
        if samples:
            about = close_tar(file)
            store.publish(file, name)
    store.sweep(name)
    if not samples:
        store.remove(name)
        return None
    return {**entry, "samples": samples, "regions": regions, **about}


def _tidy(store: Store, folder: str, names: Iterable[str], stays: set[str | None]) -> None:
    """Remove of a part's files what its table does not cite: old tars, what killed attempts left, unfinished work."""
    for name in sorted(names):
        if name.endswith(".wip"):
            store.sweep(f"{folder}/{name}")
        elif name.endswith(".tar") and name not in stays:
            store.remove(f"{folder}/{name}")
