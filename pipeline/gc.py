"""`vesl gc`: which results of a store the recipes at hand still name, and removing those that none does.

What a named result was made from stays too: its whole chain, as `step.json` tells it. So does the download whose tars
shards by reference cite, as it is part of that chain. Input, takedown lists and the records of runs always stay.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from .compact import JOURNAL, at_work
from .plan import chain
from .recipe import RecipeError, load_training
from .stage import part_name
from .store import Store, StoreError
from .takedown import part_of, step_tables

_AT_ONCE = 500  # files removed in one request


@dataclass
class Result:
    """One `<step>/<fingerprint>`: its files, name -> (bytes, time of change); `recipes` that need it."""

    folder: str
    tables: set[str]
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
    found = results(store, needed)
    _print(found, bool(recipes))
    unneeded = [result for result in found if not result.recipes]
    spare = sum(r.bytes for r in unneeded) + sum(r.files[n][0] for r in found if r.recipes for n in r.leftovers)
    if not recipes:
        print("no recipe was given, so it is not known what is still needed: nothing is removed")
    elif not remove:
        print(f"{_size(spare)} could go: `--remove` removes what no recipe names, and leftovers")
    else:
        if busy := at_work(store):
            raise StoreError(f"store {url}: {busy}; nothing was removed")
        if (store.read_json(JOURNAL) or {}).get("state") == "running":
            raise StoreError(f"store {url}: a compaction was interrupted; `vesl run` finishes it; nothing was removed")
        for result in found:
            clear(store, result)
        print(f"removed {len(unneeded)} results and leftovers, {_size(spare)}")
    return 0


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
    for folder, tables in step_tables(store).items():
        files = {name: _about(info) for name, info in _files(store, folder).items()}
        found[folder] = Result(folder, tables, files)
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
    infos = store.fs.find(store.path(folder), detail=True)
    return {path.removeprefix(f"{store.root}/"): info for path, info in infos.items()}


def _about(info: Mapping[str, Any]) -> tuple[int, float]:
    when = info.get("mtime") or info.get("LastModified") or info.get("created") or 0.0
    return int(info["size"] or 0), when.timestamp() if isinstance(when, datetime) else float(when)


def _leftovers(store: Store, result: Result) -> set[str]:
    """Of a result that stays: unfinished work beside finished tables, and tars that a finished part does not cite."""
    done = {part_name(part_of(table)): table for table in result.tables}
    found: set[str] = set()
    tars: dict[str, str] = {}  # and their parts
    for name in result.files:
        inside, _, below = name.removeprefix(f"{result.folder}/").partition("/")
        stem = inside.partition(".")[0]
        part = f"part-{stem.split('-')[1]}" if stem.startswith(("part-", "shard-")) else ""
        if part in done and below:
            found.add(name)
        elif part in done and inside.endswith(".tar"):
            tars[name] = part
    cited = {}
    for part in set(tars.values()):
        footer = store.footer(done[part]) or {}
        cited[part] = {footer.get("tar", {}).get("name"), *(shard["name"] for shard in footer.get("shards", ()))}
    return found | {name for name, part in tars.items() if name.rpartition("/")[2] not in cited[part]}


def clear(store: Store, result: Result) -> None:
    """Remove a result that no recipe needs, or the leftovers of one; tables go first, as they say what is done."""
    names = sorted(result.leftovers) if result.recipes else sorted(result.files, key=_rank)
    for rank in (0, 1, 2):
        batch = [store.path(name) for name in names if _rank(name) == rank]
        for start in range(0, len(batch), _AT_ONCE):
            store.fs.rm(batch[start : start + _AT_ONCE])
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
