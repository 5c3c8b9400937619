"""Compaction: what the takedown lists name goes out of every file of the store, and what is left is linked anew.

Only the parts touched are rewritten (`rewrite.py`). Killed at any moment, it is done again from the start, to the same
bytes: the input tables, from which the samples named are known, come last of all. The journal says that there is
something to finish, and for which lists: with more of them the links of what is half rewritten would be lost, so
lists that came meanwhile have their turn after that.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import journal, rewrite
from .ingest import claim, input_tables, read_dataset
from .listing import part_of, tables
from .recipe import Recipe
from .rewrite import GONE, Gone
from .stage import part_name
from .store import Store, StoreError
from .takedown import Named, add, list_names, who

_READERS = 32
_AT_ONCE = 4  # parts; each has its tables in memory
_ROWS = 100_000  # of a file of copies, looked at together
_NOBODY = pa.array([], pa.string())
Say = Callable[[str], None]


def command(recipe: Recipe, path: str, remove: bool) -> int:
    """`vesl takedown`: store the list in the file `path`, say whom all lists name, or `remove` what they name."""
    store = Store(recipe.store, recipe.storage_options)
    store.check(write=True)
    if store.read_json("dataset.json") is None and store.read_json(claim(0)) is None:
        raise StoreError(f"store {store.url}: holds no data set yet; `vesl run` makes one")
    name, new = add(store, path)
    print(f"{name}: {'stored; every reader obeys it from now on' if new else 'is stored already'}", flush=True)
    if remove:
        samples, parts = compact(store, lambda line: print(line, file=sys.stderr))
        print(f"removed {samples:,} samples of {parts:,} parts from every step and shard")
    elif (found := who(store)).keys:
        parts_told = spans(found.keys)
        print(
            f"the lists name {found.count:,} samples that are in the store, in {parts_told}; `--compact` removes them"
        )
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
    mine = journal.begin(store)
    samples, parts = 0, set[int]()
    with journal.beating(mine.note):
        turns = [mine.lists] if mine.lists else []
        while turns or set(mine.lists) != set(list_names(store)):
            lists = turns.pop() if turns else list_names(store)
            named = who(store, lists)
            _remove(store, mine, lists, named, say)
            samples, parts = samples + named.count, parts | named.keys.keys()
        journal.end(mine)
    return samples, len(parts)


def finish(store: Store, say: Say = lambda line: None) -> None:
    """Finish a compaction that was killed. Raises StoreError where it is still at work."""
    if journal.newest(store)[1]["state"] != "done":
        if busy := journal.compacting(store):
            raise StoreError(f"store {store.url}: {busy}; run again when it has ended")
        say("finishing a compaction that was interrupted")
        compact(store, say)


def _remove(store: Store, mine: journal.Journal, lists: tuple[str, ...], named: Named, say: Say) -> None:
    """Take those out whom these lists name; `mine` may bring parts and lists that an interrupted compaction left."""
    every = pa.concat_arrays([_NOBODY, *named.keys.values()]).unique()
    dedups = [folder for folder in named.results if folder.startswith("dedup/")]
    everyone = frozenset(every.to_pylist()) if dedups else frozenset[str]()
    inherited = mine.parts if set(mine.lists) == set(lists) else ()
    parts = sorted({*inherited, *named.keys, *_citing(store, dedups, named, everyone)})
    mine.lists, mine.parts = (*lists, *([named.hidden] if named.hidden else [])), tuple(parts)
    if not parts:
        return
    mine.note()
    files = _files(named, set(parts))
    inputs = defaultdict[int | None, list[str]](list)
    for name in named.rows:
        inputs[part_of(name)].append(name)

    def rewritten(part: int) -> None:
        gone = Gone(named.keys.get(part, _NOBODY), everyone)
        rewrite.part(store, part, inputs[part], files[part], gone)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for i, _ in enumerate(pool.map(rewritten, parts)):
            if i % 100 == 0:
                say(f"compaction: {i} of {len(parts)} parts")
    for folder, names in named.results.items():
        _folder(store, folder, names, set(parts), Gone(every, everyone))
    _records(store, set(parts))
    rewrite.inputs(store, (name for part in parts for name in inputs[part]), named.keys)
    for folder in {name.rpartition("/")[0] for name in named.rows}:
        for name in (name for name in store.names(folder) if name.endswith(".wip")):
            store.sweep(f"{folder}/{name}")
    _recount(store, named.rows)


def _files(named: Named, parts: set[int]) -> dict[int, dict[str, list[str]]]:
    """The names of each part's files, by folder."""
    found: dict[int, dict[str, list[str]]] = {part: defaultdict(list) for part in parts}
    for folder, names in named.results.items():
        for name in names:
            if (part := part_of(name)) in found:
                found[part][folder].append(name)
    return found


def _citing(store: Store, folders: Iterable[str], named: Named, everyone: frozenset[str]) -> set[int]:
    """The parts in which another sample's row names one that goes, as the copy of an earlier image does."""
    found = [(part, f"{f}/{name}") for f in folders for part, name in tables(named.results[f]).items() if everyone]

    def cites(place: tuple[int, str]) -> bool:
        details = store.read_table(place[1], ["detail"])["detail"].drop_null()
        keys = pc.struct_field(pc.extract_regex(details, r"(?P<key>[0-9a-f]{24})"), "key")
        return not everyone.isdisjoint(keys.to_pylist())

    with ThreadPoolExecutor(_READERS) as pool:
        return {part for (part, _), hit in zip(found, pool.map(cites, found), strict=True) if hit}


def _folder(store: Store, folder: str, names: Iterable[str], parts: set[int], gone: Gone) -> None:
    """Put right what a step says of all its parts: the index of its shards; the files of copies of a pass of dedup.

    Such a file is named by the tables that were compared, which are others now, and is of no use once its verdicts are
    in the parts' tables: it is removed where it knows what goes.
    """
    for name in names:
        if name == "index.json":
            _index(store, folder, parts)
        elif name.startswith("copies-") and name.endswith(".parquet") and _knows(store, f"{folder}/{name}", gone):
            store.remove(f"{folder}/{name}")
        elif name.endswith(".wip") and part_of(name) is None:
            store.sweep(f"{folder}/{name}")


def _knows(store: Store, name: str, gone: Gone) -> bool:
    with store.fs.open(store.path(name), "rb") as file:
        pieces = map(pa.Table.from_batches, ([batch] for batch in pq.ParquetFile(file).iter_batches(_ROWS)))
        return any(not gone.rows(piece).equals(piece) for piece in pieces)


def _index(store: Store, folder: str, parts: set[int]) -> None:
    document = store.read_json(f"{folder}/index.json")
    listed = sorted({part for shard in document["shards"] if (part := part_of(shard["name"])) in parts})
    with ThreadPoolExecutor(_READERS) as pool:
        footers = pool.map(lambda part: store.footer(f"{folder}/{part_name(part)}.parquet"), listed)
        fresh = {entry["name"]: entry for footer in footers if footer for entry in footer["shards"]}
    shards = []
    for shard in document["shards"]:
        if part_of(shard["name"]) not in parts:
            shards.append(shard)
        elif shard["name"] in fresh:
            shards.append(fresh[shard["name"]])
    fitting = document | {"shards": shards, **{n: sum(shard[n] for shard in shards) for n in ("samples", "regions")}}
    if fitting != document:
        store.write_json(f"{folder}/index.json", fitting)


def _records(store: Store, parts: set[int]) -> None:
    """Take the texts of events of these parts out of the runs' records: an error may quote what it was about."""

    def clean(run: str) -> None:
        if run.startswith(".beam-"):  # notes of a run that was killed
            return store.fs.rm(store.path(f"runs/{run}"), recursive=True)  # type: ignore[no-any-return]
        for name in store.names(f"runs/{run}", "events-"):
            events = store.read_json(f"runs/{run}/{name}") or []
            cleaned = [e | {"text": GONE} if e.get("text") and e.get("part") in parts else e for e in events]
            if cleaned != events:
                store.write_json(f"runs/{run}/{name}", cleaned)

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(clean, store.names("runs")))


def _recount(store: Store, rows: Mapping[str, int]) -> None:
    """Let the counts of the ingests add up again: rows that are no longer there are `taken_down`."""
    dataset = read_dataset(store)
    for place, ingest in enumerate(dataset["ingests"] if dataset else []):
        kept = sum(rows.get(table, 0) for table in input_tables({"ingests": [ingest]}))
        if kept == ingest["kept"]:
            continue
        ingest["taken_down"] = ingest.get("taken_down", 0) + ingest["kept"] - kept
        ingest["kept"] = kept
        if store.read_json(claim(place)) not in (None, ingest):
            store.write_json(claim(place), ingest)
    if dataset is not None and store.read_json("dataset.json") not in (None, dataset):
        store.write_json("dataset.json", dataset)
