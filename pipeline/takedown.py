"""`vesl takedown`: lists of what must not be used any more, kept in the store, and who they name.

A list is stored as the next version `takedown/NNNNN.txt` and never changes; all versions together are obeyed, at once,
by every reader. Removing the content itself is `compact`'s part.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from ..transforms.takedown import Takedown
from .listing import input_files, part_of, results, tables
from .store import Store, StoreError

if TYPE_CHECKING:
    from .plan import Plan

FOLDER = "takedown"
_READERS = 16  # tables read at a time
_VERSION = re.compile(r"(\d{5,})\.txt")
_OF_DOWNLOAD = ("sha256", "source_sha256", "final_url")
NAMED_BY = ("url", *_OF_DOWNLOAD)  # beside the key
_parsed: dict[tuple[str, tuple[str, ...]], Takedown] = {}  # the newest, as a version never changes


class TakedownError(Exception):
    """A list that cannot be used: one line that says which line of it. Exit code 2."""


def list_names(store: Store) -> tuple[str, ...]:
    """The names of the lists in the folder `takedown/`."""
    return tuple(name for name in store.names(FOLDER) if name.endswith(".txt"))


def obeyed(store: Store, only: Sequence[str] | None = None) -> Takedown:
    """All lists of the store, or `only` some of them that are there.

    Raises StoreError for a stored list that cannot be read: it must not be passed over.
    """
    lists = [name for name in list_names(store) if only is None or name in only]
    place = (store.url, tuple(lists))
    if place not in _parsed:
        try:
            found = Takedown.parse((f"{FOLDER}/{name}", store.read(f"{FOLDER}/{name}").decode()) for name in lists)
        except ValueError as error:  # also UnicodeDecodeError
            raise StoreError(f"store {store.url}: {error}; mend or remove this list") from None
        _parsed.clear()
        _parsed[place] = found
    return _parsed[place]


def named(plan: "Plan", takedown: Takedown) -> pa.Array:
    """The keys (string, in the order of the parts) of the plan's rows that lists name by key, URL, domain or sha256.

    A stored image is also named by the sha256 of the bytes that were downloaded and by the URL that they came from.
    """
    if not takedown:
        return pa.array([], pa.string())
    inputs, first = plan.job().inputs, plan.steps[0]
    given = [(inputs[p], [first.table(p)] if p in plan.done[first.name] else []) for p in plan.parts]
    return pa.concat_arrays([pa.array([], pa.string()), *(keys for keys, _ in _named_in(plan.store, given, takedown))])


def _named_in(
    store: Store, given: Sequence[tuple[str, Sequence[str]]], takedown: Takedown
) -> Iterator[tuple[pa.Array, int]]:
    """For each input table, given with its part's download tables, the keys (string) named, and how many rows stay."""

    def of_part(part: tuple[str, Sequence[str]]) -> tuple[pa.Array, int]:
        rows = store.read_table(part[0], ["key", "url"] if takedown.urls or takedown.domains else ["key"])
        found = [rows["key"].filter(match(rows, takedown))]
        for name in part[1] if takedown.sha256 or takedown.urls or takedown.domains else ():
            stored = store.read_table(name, ["key", *_OF_DOWNLOAD])
            found.append(stored["key"].filter(match(stored, takedown)))
        keys = pa.concat_arrays([chunk for column in found for chunk in column.chunks] or [pa.array([], pa.string())])
        return keys.unique(), pc.sum(pc.invert(pc.is_in(rows["key"], keys)), min_count=0).as_py()

    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(of_part, given)


def match(rows: pa.Table, takedown: Takedown) -> pa.Array:
    """Which rows are named, bool [rows], by those of key, url, sha256, source_sha256 and final_url that they have."""
    return takedown.match(
        rows["key"].combine_chunks(),
        urls=[rows[name].combine_chunks() for name in ("url", "final_url") if name in rows.column_names],
        hashes=[rows[name].combine_chunks() for name in ("sha256", "source_sha256") if name in rows.column_names],
    )


def add(store: Store, path: str) -> tuple[str, bool]:
    """Check the list in the file `path` and store it as the next version, unless one has the same bytes already.

    Returns its name, and whether it is new. Raises TakedownError for a file that is no list.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
        if not Takedown.parse([(path, text)]):
            raise ValueError(f"{path}: names nothing")
    except OSError as error:
        raise TakedownError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TakedownError(f"{path}: is not UTF-8 text") from None
    except ValueError as error:
        raise TakedownError(str(error)) from None
    obeyed(store)  # none is added beside one that cannot be read
    return _keep(store, text.encode())


@dataclass(frozen=True)
class Named:
    """Whom lists name in a store, and what was seen on the way: the rows of each input table that
    stay, the listing of results.

    `keys` are of the parts that have any.
    """

    keys: dict[int, pa.Array]
    rows: dict[str, int]
    results: dict[str, list[str]]
    hidden: str | None  # the name of a list that had to be added

    @property
    def count(self) -> int:
        """Samples."""
        return sum(map(len, self.keys.values()))


def who(store: Store, only: Sequence[str] | None = None) -> Named:
    """The whole store's samples that its lists, or `only` some of them, name. Reads and lists everything once.

    Samples that are known only by their stored image, and so not to whoever sees key and URL alone (the trainer, a
    later ingest), are first added to the lists by their keys.
    """
    lists, inputs, listing = obeyed(store, only), input_files(store), results(store)
    downloads = [(folder, tables(names)) for folder, names in listing.items() if folder.startswith("download/")]
    given = []
    for table in inputs:
        part = part_of(table)
        given.append((table, [f"{folder}/{there[part]}" for folder, there in downloads if part in there]))
    found: dict[int, pa.Array] = {}
    rows: dict[str, int] = {}
    hidden: list[str] = []
    plain = dataclasses.replace(lists, sha256=frozenset())
    for table, (keys, rows[table]) in zip(inputs, _named_in(store, given, lists), strict=True):
        if len(keys):
            part = part_of(table)
            assert part is not None
            found[part] = pa.concat_arrays([found.get(part, keys.slice(0, 0)), keys]).unique()
            known = store.read_table(table, ["key", "url"])
            hidden += pc.filter(keys, pc.invert(pc.is_in(keys, known["key"].filter(match(known, plain))))).to_pylist()
    more = None
    if hidden:
        text = "\n".join(["# known by their stored images only", *sorted(set(hidden)), ""])
        more = _keep(store, text.encode())[0].rpartition("/")[2]
    return Named(found, rows, listing, more)


def _keep(store: Store, data: bytes) -> tuple[str, bool]:
    """Store a list as the next version unless there is one with these bytes; its name, and whether it is new."""
    number = 0
    for name in store.names(FOLDER):
        if version := _VERSION.fullmatch(name):
            number = max(number, int(version[1]))
            if store.read(f"{FOLDER}/{name}") == data:
                return f"{FOLDER}/{name}", False
    while True:
        number += 1
        name = f"{FOLDER}/{number:05d}.txt"
        if store.create(name, data):
            return name, True
        if store.read(name) == data:
            return name, False
