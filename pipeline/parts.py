"""The footers of a step's tables, as columns: what 200,000 parts need to be known of, in seconds and little memory.

Reading a footer costs a request, so `run` keeps what it has read beside the tables, in `<step>/<fp>/footers.parquet`,
as soon as that is worth it. It is no authority: a table counts if the folder's listing has it, and what is kept of it
is believed while the listing shows it unchanged. So the file may be old, or removed at any time.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
KEPT = "footers.parquet"
_READERS = 32  # footers read at a time
_AT_ONCE = 5000  # of them in memory as Python's objects
_WORTH = 500  # footers, from which they are kept
_LONG = 5000  # parts, from which a listing is asked for in pieces
_DROPPED = pa.list_(pa.struct([("outcome", pa.string()), ("reason", pa.string()), ("rows", pa.int64())]))
_SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        ("stamp", pa.string()),  # of the file, as the listing has it
        ("parent", pa.uint64()),  # 16 hex digits of the content hash that the footer has
        ("content", pa.uint64()),
        ("rows", pa.int64()),
        ("kept", pa.int64()),
        ("dropped", _DROPPED),
        ("size", pa.int64()),  # bytes of the table and of the files that it cites
        ("footer", pa.string()),  # the whole of it, as JSON
    ]
)
_LIGHT = [name for name in _SCHEMA.names if name != "footer"]


class Footers(Mapping[int, Footer]):
    """Footers by part, in rising order; whole ones are read only if one is asked for."""

    def __init__(self, light: pa.Table, load: Callable[[], pa.ChunkedArray], fresh: int = 0) -> None:
        self._light, self._load = light, load
        self.fresh = fresh  # how many are not kept yet
        self.parts: npt.NDArray[np.int32] = light["part"].to_numpy()
        self._place = np.full(int(self.parts.max(initial=-1)) + 1, -1, np.int32)
        self._place[self.parts] = np.arange(len(self.parts))
        self._documents: pa.ChunkedArray | None = None

    def __getitem__(self, part: int) -> Footer:
        if part not in self:
            raise KeyError(part)
        if self._documents is None:
            self._documents = self._load()
        return dict(json.loads(self._documents[int(self._place[part])].as_py()))

    def __contains__(self, part: object) -> bool:
        return isinstance(part, int) and 0 <= part < len(self._place) and bool(self._place[part] >= 0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.parts.tolist())

    def __len__(self) -> int:
        return len(self.parts)

    def among(self, parts: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """For each of the parts whether it is here."""
        asked = np.asarray(parts, np.int64)
        inside = asked < len(self._place)
        inside[inside] = self._place[asked[inside]] >= 0
        return inside

    def only(self, wanted: npt.NDArray[np.bool_]) -> "Footers":
        """Those where `wanted`, one for each footer, is true."""
        mask = pa.array(wanted)
        return Footers(self._light.filter(mask), lambda: self._load().filter(mask))

    def children_of(self, parents: "Footers") -> "Footers":
        """Those of tables that were made from the tables of `parents`."""
        fits = parents.among(self.parts)
        places = parents._place[self.parts[fits]]
        fits[fits] = parents._light["content"].to_numpy()[places] == self._light["parent"].to_numpy()[fits]
        return self if fits.all() else self.only(fits)

    def total(self, parts: Sequence[int]) -> dict[str, Any]:
        """What a footer says of its rows, added up over those of the parts that are here; also `parts` and `bytes`."""
        mine = self._light.take(self._place[np.asarray(parts, np.int64)[self.among(parts)]])
        counts: dict[str, Any] = {"kept": pc.sum(mine["kept"]).as_py() or 0, "rejected": {}, "failed": {}}
        dropped = pa.Table.from_struct_array(mine["dropped"].combine_chunks().flatten())
        for row in dropped.group_by(["outcome", "reason"]).aggregate([("rows", "sum")]).to_pylist():
            counts[row["outcome"]][row["reason"]] = row["rows_sum"]
        rows, size = (pc.sum(mine[name]).as_py() or 0 for name in ("rows", "size"))
        return {"parts": len(mine), "rows": rows, "counts": counts, "bytes": size}

    def whole(self) -> pa.Table:
        """All there is to keep."""
        return self._light.append_column("footer", self._load()).cast(_SCHEMA)


def look(store: Store, folder: str, parts: Sequence[int] | npt.NDArray[np.int32]) -> Footers:
    """The footers of those of the parts whose tables are in the folder. Raises StoreFault for one that is damaged."""
    if not len(parts):
        return Footers(_SCHEMA.empty_table(), lambda: pa.chunked_array([], pa.string()))
    stems = sorted({part_name(part)[:7] for part in parts}) if len(parts) >= _LONG else ["part-"]
    asked = np.zeros(int(np.max(parts)) + 1, np.bool_)
    asked[np.asarray(parts)] = True
    there = [(int(n[5:-8]), stamp, size) for n, stamp, size in store.stamps(folder, stems) if n[5:-8].isdigit()]
    there = sorted(item for item in there if item[0] < len(asked) and asked[item[0]])
    kept = _kept(store, folder) if len(there) >= _WORTH else None
    light = _SCHEMA.empty_table().select(_LIGHT) if kept is None else kept
    place = np.full(len(asked), -1, np.int64)
    inside = light["part"].to_numpy() < len(asked)
    place[light["part"].to_numpy()[inside]] = np.flatnonzero(inside)
    at = place[np.fromiter((part for part, _, _ in there), np.int64, len(there))]
    mine = light["stamp"].take(pa.array(at, mask=at < 0))
    same = pc.equal(mine, pa.array([stamp for _, stamp, _ in there], pa.string())).fill_null(False).to_numpy()
    if len(light) == len(there) and same.all():
        return Footers(light, lambda: _documents(store, folder, light))
    fresh = _read(store, folder, [about for about, known in zip(there, same.tolist(), strict=True) if not known])
    places = pa.array(at[same])
    both = pa.concat_tables([light.take(places), fresh.select(_LIGHT)])
    order = pc.sort_indices(both, [("part", "ascending")])

    def load() -> pa.ChunkedArray:
        before = _documents(store, folder, light).take(places).chunks if len(places) else []
        return pa.chunked_array([*before, *fresh["footer"].chunks], pa.string()).take(order)

    return Footers(both.take(order), load, len(fresh))


def together(pieces: Sequence[Footers]) -> Footers:
    """The footers of several folders with rising parts, as one."""
    if len(pieces) == 1:
        return pieces[0]
    light = pa.concat_tables([_SCHEMA.empty_table().select(_LIGHT), *(piece._light for piece in pieces)])
    return Footers(light, lambda: pa.chunked_array([c for piece in pieces for c in piece._load().chunks], pa.string()))


def keep(store: Store, folder: str, found: Footers) -> Footers:
    """Keep the footers of a folder's tables for the next look, if enough of them had to be read; return the same."""
    if found.fresh < _WORTH:
        return found
    sink, whole = io.BytesIO(), found.whole()
    pq.write_table(whole, sink, compression="zstd")
    store.replace(f"{folder}/{KEPT}", sink.getvalue())
    light = whole.select(_LIGHT)
    return Footers(light, lambda: _documents(store, folder, light))


def _kept(store: Store, folder: str) -> pa.Table | None:
    try:
        return store.read_table(f"{folder}/{KEPT}", _LIGHT).cast(pa.schema([_SCHEMA.field(name) for name in _LIGHT]))
    except (
        FileNotFoundError,
        StoreFault,
        KeyError,
        ValueError,
        pa.ArrowException,
    ):  # none, or none that this version wrote
        return None


def _documents(store: Store, folder: str, light: pa.Table) -> pa.ChunkedArray:
    """The whole footers of these tables, as kept; where another run has written anew what was kept, as they are."""
    try:
        kept = store.read_table(f"{folder}/{KEPT}", ["part", "stamp", "footer"])
    except FileNotFoundError:
        kept = _SCHEMA.empty_table().select(["part", "stamp", "footer"])
    if kept["part"].equals(light["part"]) and kept["stamp"].equals(light["stamp"]):
        return kept["footer"]
    names, stamps = (table.select(["part", "stamp"]).to_pylist() for table in (kept, light))
    place = {(row["part"], row["stamp"]): i for i, row in enumerate(names)}
    found = []
    for row in stamps:
        at = place.get((row["part"], row["stamp"]))
        footer = None if at is not None else store.footer(f"{folder}/{part_name(row['part'])}.parquet")
        found.append(kept["footer"][at].as_py() if at is not None else _json(footer or {}))
    return pa.chunked_array([found], pa.string())


def _json(footer: Footer) -> str:
    return json.dumps(footer, ensure_ascii=False, sort_keys=True)


def _read(store: Store, folder: str, wanted: Sequence[tuple[int, str, int]]) -> pa.Table:
    """The footers of parts (number, stamp and size of the table); a table that is gone meanwhile is left out."""
    tables = [_SCHEMA.empty_table()]
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(wanted), _AT_ONCE):
            some = wanted[start : start + _AT_ONCE]
            footers = pool.map(lambda about: store.footer(f"{folder}/{part_name(about[0])}.parquet"), some)
            rows = [_row(*about, footer) for about, footer in zip(some, footers, strict=True) if footer]
            tables.append(pa.Table.from_pylist(rows, _SCHEMA))
    return pa.concat_tables(tables)


def _row(part: int, stamp: str, size: int, footer: dict[str, Any]) -> dict[str, Any]:
    counts = footer.get("counts", {})
    dropped = [
        {"outcome": outcome, "reason": reason, "rows": rows}
        for outcome in ("rejected", "failed")
        for reason, rows in counts.get(outcome, {}).items()
    ]
    files = [footer.get("tar", {}), *footer.get("shards", ())]
    return {
        "part": part,
        "stamp": stamp,
        "parent": int(footer.get("parent", "0")[:16], 16),
        "content": int(footer["content"][:16], 16),
        "rows": footer["rows"],
        "kept": counts.get("kept", footer["rows"]),
        "dropped": dropped,
        "size": size + sum(file.get("bytes", 0) for file in files),
        "footer": _json(footer),
    }
