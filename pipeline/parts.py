"""The footers of a step's tables, as columns: what 200,000 parts need to be known of, in seconds and little memory.

Reading a footer costs a request, so `run` keeps what it has read beside the tables, in `<step>/<fp>/footers.parquet`,
as soon as that is worth it. It is no authority: a table counts if the folder's listing has it, and what is kept of it
is believed while the listing shows it unchanged. So the file may be old, or removed at any time.
"""

import bisect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .stage import part_name
from .store import Store, StoreFault

Footer = Mapping[str, Any]
Parts = Sequence[int] | npt.NDArray[np.int64]
KEPT = "footers.parquet"
_READERS, _READERS_HERE = 32, 8  # of footers at a time, of a bucket's and of a folder's
_AT_ONCE = 200  # footers that a reader makes columns of
_WORTH = 500  # footers, from which they are kept
_LONG = 5000  # parts, from which a listing is asked for in pieces
_SCHEMA = pa.schema(
    [
        ("part", pa.int64()),
        ("stamp", pa.uint64()),  # of the file, as the listing has it
        ("parent", pa.uint64()),  # 16 hex digits of the content hash that the footer has
        ("content", pa.uint64()),
        ("rows", pa.int64()),
        ("bytes", pa.int64()),  # of the table and of the files that it cites
        ("counts", pa.struct([("kept", pa.int64())])),  # and those that occur, such as `rejected too_small`
        ("footer", pa.large_string()),  # the whole of it, as JSON; in memory, null where it is kept
    ]
)
_LIGHT = _SCHEMA.names[:-1]


class Footers(Mapping[int, Footer]):
    """Footers by part, in rising order. They are columns in memory; whole ones are read where one is asked for."""

    def __init__(self, store: Store, folders: Sequence[tuple[int, str]], table: pa.Table) -> None:
        """`folders` has the tables' folders, each with its first part; `table` the columns of _SCHEMA."""
        self._store, self._folders, self._table = store, folders, table
        self.parts: npt.NDArray[np.int64] = table["part"].to_numpy()
        self._place = np.full(int(self.parts.max(initial=-1)) + 1, -1, np.int32)
        self._place[self.parts] = np.arange(len(self.parts))
        self._whole: pa.ChunkedArray | None = None

    def __getitem__(self, part: int) -> Footer:
        if part not in self:
            raise KeyError(part)
        if self._whole is None:
            self._whole = self.whole()
        if text := self._whole[int(self._place[part])].as_py():
            return dict(json.loads(text))
        _, folder = self._folders[bisect.bisect(self._folders, part, key=lambda item: item[0]) - 1]
        return self._store.footer(f"{folder}/{part_name(part)}.parquet") or {}

    def __contains__(self, part: object) -> bool:
        return isinstance(part, int) and 0 <= part < len(self._place) and bool(self._place[part] >= 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.parts.tolist())

    def __len__(self) -> int:
        return len(self.parts)

    @property
    def fresh(self) -> int:
        """How many are not kept yet."""
        return len(self) - int(self._table["footer"].null_count)

    def among(self, parts: Parts) -> npt.NDArray[np.bool_]:
        """For each of the parts whether it is here."""
        asked = np.asarray(parts, np.int64)
        inside = asked < len(self._place)
        inside[inside] = self._place[asked[inside]] >= 0
        return inside

    def only(self, wanted: npt.NDArray[np.bool_]) -> "Footers":
        """Those where `wanted`, one for each footer, is true."""
        return Footers(self._store, self._folders, self._table.filter(pa.array(wanted)))

    def children_of(self, parents: "Footers") -> "Footers":
        """Those of tables that were made from the tables of `parents`."""
        fits = parents.among(self.parts)
        places = parents._place[self.parts[fits]]
        fits[fits] = parents._table["content"].to_numpy()[places] == self._table["parent"].to_numpy()[fits]
        return self if fits.all() else self.only(fits)

    def total(self, parts: Parts) -> dict[str, Any]:
        """What a footer says of its rows, added up over those of the parts that are here; also `parts` and `bytes`."""
        places = self._place[np.asarray(parts, np.int64)[self.among(parts)]]
        mine = self._table.select(["rows", "bytes", "counts"]).take(places)
        counts: dict[str, Any] = {"kept": 0, "rejected": {}, "failed": {}}
        for field in mine["counts"].type:
            outcome, _, reason = field.name.partition(" ")
            if rows := pc.sum(pc.struct_field(mine["counts"], field.name)).as_py():
                counts |= {outcome: counts[outcome] | {reason: rows} if reason else rows}
        rows, size = (pc.sum(mine[name]).as_py() or 0 for name in ("rows", "bytes"))
        return {"parts": len(mine), "rows": rows, "counts": counts, "bytes": size}

    def whole(self) -> pa.ChunkedArray:
        """Each footer as JSON; null for one that was kept, and is not any more as another run keeps others."""
        firsts = [first for first, _ in self._folders]
        bounds = [*np.searchsorted(self.parts, firsts).tolist(), len(self)]
        chunks: list[pa.Array] = []
        for (_, folder), start, end in zip(self._folders, bounds[:-1], bounds[1:], strict=True):
            mine = self._table.slice(start, end - start)
            footers = mine["footer"]
            if footers.null_count:
                kept = _kept(self._store, folder, ["part", "stamp", "footer"])
                footers = pc.coalesce(footers, kept["footer"].take(_places(kept, mine)))
            chunks += footers.chunks
        return pa.chunked_array(chunks, pa.large_string())

    def keep(self) -> "Footers":
        """Keep the footers of one folder for the next look, if enough of them had to be read; return the same."""
        if self.fresh < _WORTH:
            return self
        [(_, folder)], at, sink = self._folders, len(_LIGHT), io.BytesIO()
        pq.write_table(self._table.set_column(at, "footer", self.whole()), sink, compression="zstd")
        self._store.replace(f"{folder}/{KEPT}", sink.getvalue())
        return Footers(self._store, self._folders, _unread(self._table.select(_LIGHT)))


def look(store: Store, folder: str, parts: Parts) -> Footers:
    """The footers of those of the parts whose tables are in the folder. Raises StoreFault for one that is damaged."""
    if not len(parts):
        return Footers(store, [(0, folder)], _NOTHING)
    asked = np.asarray(parts, np.int64)
    stems = {part_name(part)[:7] for part in (np.unique(asked // 1000) * 1000).tolist()}
    there = store.stamps(folder, sorted(stems) if len(asked) >= _LONG else ["part-"])
    there = there.filter(pa.array(np.isin(there["part"].to_numpy(), asked)))
    kept = _kept(store, folder, _LIGHT) if len(there) >= _WORTH else _NOTHING.select(_LIGHT)
    places = _places(kept, there)
    table = _unread(kept.take(places.drop_null()))
    if places.null_count:
        fresh = _read(store, folder, there.filter(pc.is_null(places)))
        table = pa.concat_tables([table, *fresh], promote_options="permissive")
    return Footers(store, [(0, folder)], table.sort_by("part") if len(kept) else table)


def together(store: Store, pieces: Mapping[int, Footers]) -> Footers:
    """The footers of several folders with rising parts, each by its first part, as one."""
    folders = [(first, folder) for first, piece in pieces.items() for _, folder in piece._folders]
    tables = [_NOTHING, *(piece._table for piece in pieces.values())]
    return Footers(store, folders, pa.concat_tables(tables, promote_options="permissive"))


_NOTHING = _SCHEMA.empty_table()


def _kept(store: Store, folder: str, names: Sequence[str]) -> pa.Table:
    """These columns of what is kept, all of which this version wrote, or nothing."""
    try:
        kept = store.read_table(f"{folder}/{KEPT}", names).select(names)
    except (FileNotFoundError, StoreFault, KeyError):
        return _NOTHING.select(names)
    fits = all(kept[name].type == _SCHEMA.field(name).type for name in names if name != "counts")
    return kept if fits else _NOTHING.select(names)


def _unread(light: pa.Table) -> pa.Table:
    return light.append_column("footer", pa.nulls(len(light), pa.large_string()))


def _places(kept: pa.Table, asked: pa.Table) -> pa.ChunkedArray:
    """For each table asked for its row in what is kept; null where that is not there, or of another stamp."""
    at = pc.index_in(asked["part"], kept["part"])
    return pc.if_else(pc.equal(kept["stamp"].take(at), asked["stamp"]), at, None)


def _read(store: Store, folder: str, wanted: pa.Table) -> Iterator[pa.Table]:
    """The footers of tables by part, stamp and size; a table that is gone meanwhile is left out."""

    def read(start: int) -> pa.Table:
        rows = [
            _row(**about, footer=footer)
            for about in wanted.slice(start, step).to_pylist()
            if (footer := store.footer(f"{folder}/{part_name(about['part'])}.parquet"))
        ]
        types = {field.name: None if field.name == "counts" else field.type for field in _SCHEMA}
        return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in types.items()})

    readers = _READERS_HERE if store.local else _READERS
    step = min(_AT_ONCE, len(wanted) // readers + 1)
    with ThreadPoolExecutor(readers) as pool:
        yield from pool.map(read, range(0, len(wanted), step))


def _row(part: int, stamp: int, size: int, footer: dict[str, Any]) -> dict[str, Any]:
    counts = footer.get("counts", {})
    dropped = {
        f"{outcome} {reason}": rows
        for outcome in ("rejected", "failed")
        for reason, rows in counts.get(outcome, {}).items()
    }
    files = [footer.get("tar", {}), *footer.get("shards", ())]
    return {
        "part": part,
        "stamp": stamp,
        "parent": int(footer.get("parent", "0")[:16], 16),
        "content": int(footer["content"][:16], 16),
        "rows": footer["rows"],
        "bytes": size + sum(file.get("bytes", 0) for file in files),
        "counts": {"kept": counts.get("kept", footer["rows"]), **dropped},
        "footer": json.dumps(footer, ensure_ascii=False, sort_keys=True),
    }
