"""`vesl gc`: which results of a store the recipes at hand still name, and removing those that none does.

What a named result was made from stays too: its whole chain, as `step.json` tells it. So does the download whose tars
shards by reference cite, as it is part of that chain. Input, takedown lists and the records of runs always stay.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from . import journal
from .listing import cited, folders, is_result, part_of, tables
from .plan import chain
from .recipe import RecipeError, load_training
from .store import Store, StoreError

_AT_ONCE = 500  # files removed in one request
_READERS = 32


@dataclass
class Result:
    """One `<step>/<fingerprint>`: its tables by part, its files, name in the store -> (bytes, time of change);
    `recipes` that need it."""

    folder: str
    tables: dict[int, str]
    files: dict[str, tuple[int, float]]
    recipes: list[str] = field(default_factory=list)
    leftovers: set[str] = field(default_factory=set)  # tars that no table cites, and unfinished work on done parts

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(size for size, _ in self.files.values())

    @property
    def changed(self) -> float:
        """When the newest file was written."""
        return max((when for _, when in self.files.values()), default=0.0)


def command(url: str, recipes: Sequence[str], remove: bool) -> int:
    """List what is there and who names it; `remove` what nobody does. Returns the exit code.

    Raises RecipeError for a recipe that cannot be read or has another store, StoreError while a run is at work.
    """
    store, needed = named(url, recipes)
    store.check(write=False)
    if not store.names(""):
        raise StoreError(f"store {url}: there is nothing")
    if remove and not recipes:
        raise RecipeError("gc --remove: name every recipe whose results are to stay")
    if remove:
        _alone(store)  # before what is there is looked at, and after
    found = results(store, needed)
    _print(found, bool(recipes))
    unneeded = [result for result in found if not result.recipes]
    spare = sum(r.bytes for r in unneeded) + sum(r.files[n][0] for r in found if r.recipes for n in r.leftovers)
    if not recipes:
        print("no recipe was given, so it is not known what is still needed: nothing is removed")
    elif not remove:
        print(f"{_size(spare)} could go: `--remove` removes what no recipe names, and leftovers")
    else:
        _alone(store)
        for result in found:
            clear(store, result)
        print(f"removed {len(unneeded)} results and leftovers, {_size(spare)}")
    return 0


def _alone(store: Store) -> None:
    """Raise StoreError where a run or a compaction is at work, or not ended."""
    if busy := journal.at_work(store):
        raise StoreError(f"store {store.url}: {busy}; nothing was removed")
    if journal.newest(store)[1]["state"] != "done":
        raise StoreError(
            f"store {store.url}: a compaction was interrupted; `vesl run` finishes it; nothing was removed"
        )


def named(url: str, recipes: Sequence[str]) -> tuple[Store, dict[str, list[str]]]:
    """The store, and for each folder that a recipe's own chain or training names, the recipes that do."""
    found: dict[str, list[str]] = {}
    store = Store(url)
    loaded = [(path, *load_training(path)) for path in recipes]
    if loaded:
        store = Store(url, loaded[0][1].storage_options)
    for path, training, recipe in loaded:
        own = Store(training.store, training.storage_options)
        if (own.fs.protocol, own.root) != (store.fs.protocol, store.root):
            raise RecipeError(f"{path}: store: is {training.store}, not {url}")
        folders = [step.folder for step in chain(recipe, store)] if recipe else []
        for shards in (training.train.data.shards, *(spec.shards for spec in training.train.evaluate.values())):
            place = Store(shards, training.storage_options).root if shards else ""
            if place.startswith(f"{store.root}/"):
                folders.append(place.removeprefix(f"{store.root}/"))
        for folder in folders:
            found.setdefault(folder, []).append(path)
    return store, found


def results(store: Store, needed: Mapping[str, Sequence[str]]) -> list[Result]:
    """Every result in the store, with the recipes that need it: those that name it, or what was made from it."""
    found = {}
    for folder in folders(store):
        files = {name: _about(info) for name, info in _files(store, folder).items()}
        inside = {name.removeprefix(f"{folder}/").partition("/")[0] for name in files}
        if is_result(inside):
            found[folder] = Result(folder, tables(inside), files)
    by_fingerprint = {folder.rpartition("/")[2]: folder for folder in found}
    for folder, recipes in needed.items():
        while folder in found:
            found[folder].recipes += [name for name in recipes if name not in found[folder].recipes]
            inputs = store.read_json(f"{folder}/step.json")
            if inputs is None:
                raise StoreError(f"store {store.url}: {folder} has no step.json, so what it was made from is not known")
            folder = by_fingerprint.get(inputs["parent"], "")
    for result in found.values():
        result.leftovers = _leftovers(store, result) if result.recipes else set()
    return sorted(found.values(), key=lambda result: (result.folder.partition("/")[0], result.changed))


def _files(store: Store, folder: str) -> dict[str, Mapping[str, Any]]:
    infos = store.ask("listed", folder, lambda: store.fs.find(store.path(folder), detail=True))
    return {path.removeprefix(f"{store.root}/"): info for path, info in infos.items()}


def _about(info: Mapping[str, Any]) -> tuple[int, float]:
    when = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
    return int(info["size"] or 0), when.timestamp() if isinstance(when, datetime) else float(when)


def _leftovers(store: Store, result: Result) -> set[str]:
    """Of a result that stays: unfinished work beside finished tables, and tars that a finished part does not cite.

    Only tables of which there is a doubt are read: a part's one download is its own, as are shards that the index has.
    """
    found: set[str] = set()
    tars: dict[int, set[str]] = {}
    for name in result.files:
        inside, _, below = name.removeprefix(f"{result.folder}/").partition("/")
        part = part_of(inside)
        if part in result.tables and below:
            found.add(name)
        elif part in result.tables and part is not None and inside.endswith(".tar"):
            tars.setdefault(part, set()).add(inside)
    index = store.read_json(f"{result.folder}/index.json") if f"{result.folder}/index.json" in result.files else None
    indexed = {shard["name"] for shard in index["shards"]} if index else None

    def orphans(part: int) -> set[str]:
        if len(tars[part]) == 1 if indexed is None else tars[part] <= indexed:
            return set()
        footer = store.footer(f"{result.folder}/{result.tables[part]}")
        return tars[part] - cited(footer) if footer else set()

    with ThreadPoolExecutor(_READERS) as pool:
        return found | {f"{result.folder}/{name}" for some in pool.map(orphans, tars) for name in some}


def clear(store: Store, result: Result) -> None:
    """Remove a result that no recipe needs, or the leftovers of one; tables go first, as they say what is done."""
    names = sorted(result.leftovers) if result.recipes else sorted(result.files, key=_rank)
    for rank in (0, 1, 2):
        batch = [store.path(name) for name in names if _rank(name) == rank]
        for start in range(0, len(batch), _AT_ONCE):
            some = batch[start : start + _AT_ONCE]
            store.ask("removed", result.folder, partial(store.fs.rm, some))
    if store.local and not result.recipes:
        store.fs.rm(store.path(result.folder), recursive=True)


def _rank(name: str) -> int:
    return 2 if name.endswith("/step.json") else 0 if name.endswith(".parquet") else 1


def _print(found: Sequence[Result], judged: bool) -> None:
    table = Table("result", "parts", "size", "age", "leftovers", "needed by", box=None)
    for result in found:
        age = (time.time() - result.changed) / 86_400 if result.files else 0.0
        by = ", ".join(result.recipes) or ("nothing" if judged else "?")
        spare = _size(sum(result.files[name][0] for name in result.leftovers)) if result.leftovers else ""
        table.add_row(result.folder, str(len(result.tables)), _size(result.bytes), f"{age:.1f} d", spare, by)
    Console(width=160).print(table)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
