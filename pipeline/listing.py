"""What lies in a store, whoever made it: for the commands that look at all results and not at one recipe's."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .store import Store

NO_STEPS = ("input", "runs", "takedown")
_READERS = 16
_PART = re.compile(r"part-(\d{5,})\.parquet")
_FILE_OF = re.compile(r"(?:part|shard)-(\d{5,})[.-].*")
_FINGERPRINT = re.compile(r"[0-9a-f]{12}")


def folders(store: Store) -> list[str]:
    """Every `<step>/<fingerprint>`, and what looks like one (a training's folder)."""
    steps = [name for name in store.names("") if name not in NO_STEPS and "." not in name]
    return [f"{step}/{name}" for step in steps for name in store.names(step) if _FINGERPRINT.fullmatch(name)]


def results(store: Store) -> dict[str, list[str]]:
    """Every result `<step>/<fingerprint>` with the names in its folder; each folder is listed once."""
    with ThreadPoolExecutor(_READERS) as pool:
        every = folders(store)
        found = dict(zip(every, pool.map(store.names, every), strict=True))
    return {folder: names for folder, names in found.items() if is_result(names)}


def is_result(names: Iterable[str]) -> bool:
    """Whether a folder with these names inside is a step's."""
    return any(name == "step.json" or _PART.fullmatch(name) for name in names)


def tables(names: Iterable[str]) -> dict[int, str]:
    """The names of tables among those of a folder, by part."""
    return {int(match[1]): name for name in names if (match := _PART.fullmatch(name))}


def part_of(name: str) -> int | None:
    """The part that a file of a result belongs to by its name; None for those of the whole result."""
    match = _FILE_OF.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def input_files(store: Store) -> list[str]:
    """Every input table, also of an ingest that was killed before it was entered in `dataset.json`."""
    every = [f"input/{name}" for name in store.names("input") if "." not in name]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(zip(every, pool.map(store.names, every), strict=True))
    return [f"{folder}/{name}" for folder, names in found for name in tables(names).values()]


def cited(footer: dict[str, Any]) -> set[str | None]:
    """The names of the tars that belong to a part's table, of any step."""
    return {footer.get("tar", {}).get("name"), *(shard["name"] for shard in footer.get("shards", ()))}
