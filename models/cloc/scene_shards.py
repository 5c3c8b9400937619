"""Scenes on disk: shards of the region-text format and their `index.json`, as the pack step writes them."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from io import BufferedRandom
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

from ...transforms.shards import add_member, encode, end_tar
from .scenes import NOISE, VERSION, Scenes, Split, sample


def described(options: Scenes, split: Split) -> dict[str, Any]:
    """What decides the bytes of a part, as its index says it."""
    other = {"train": {"test"}, "test": {"train", *NOISE}}[split]
    kept = {name: value for name, value in asdict(options).items() if name not in other}
    return {"scenes": {"version": VERSION, "split": split, **kept, "objects": list(options.objects)}}


def generate(
    folder: str | Path, options: Scenes, progress: Callable[[int], object] = lambda count: None, workers: int = 2
) -> Path:
    """Write `folder`/train and `folder`/test where they are not complete; `progress` is told each shard's scenes.

    A part that was stopped is drawn again. Several may fill one folder at a time: what they write is the same. Raises
    ValueError, and draws nothing, where a part holds anything else; BrokenProcessPool where a process was killed.
    """
    root = Path(folder)
    complete = {split: _claim(root / split, described(options, split)) for split in get_args(Split)}
    for split in get_args(Split):
        if not complete[split]:
            shards = []
            for shard in _shards(root / split, options, split, workers):
                shards.append(shard)
                progress(shard["samples"])
            _write_index(root / split, described(options, split), shards, complete=True)
        for path in (root / split).glob("scenes-*.wip"):  # of stopped generations, or of one that is now too late
            path.unlink(missing_ok=True)
    return root


def _claim(folder: Path, recipe: dict[str, Any]) -> bool:
    """See to it that the folder's index has this recipe; True if it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = all(path.match("scenes-*.wip") for path in folder.iterdir())  # before another's index may appear
    try:
        index = json.loads((folder / "index.json").read_bytes())
        if index["recipe"] == recipe:
            return bool(index["complete"])
    except FileNotFoundError:
        if empty:
            _write_index(folder, recipe, [], complete=False)
            return False
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder} holds something else than these scenes: remove it, or name another folder")


def _write_index(folder: Path, recipe: dict[str, Any], shards: list[dict[str, Any]], complete: bool) -> None:
    totals = {name: sum(shard[name] for shard in shards) for name in ("samples", "regions")}
    index = {"complete": complete, **totals, "shards": shards, "recipe": recipe, "chain": []}
    with _writing(folder / "index.json") as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


@contextmanager
def _writing(path: Path) -> Iterator[BufferedRandom]:
    """A file that appears as `path` once it is whole."""
    unfinished = path.with_name(f"scenes-{uuid4().hex}.wip")
    with unfinished.open("w+b") as file:
        yield file
    with suppress(FileNotFoundError):  # another generation was first with everything, and has cleaned up
        unfinished.replace(path)


def _shards(folder: Path, options: Scenes, split: Split, workers: int) -> Iterator[dict[str, Any]]:
    """Write all shards of a part; what the index says of each, in order."""
    numbers = range(-(-getattr(options, split) // options.samples_per_shard))
    write = partial(_write_shard, folder, options, split)
    if workers == 1 or len(numbers) < 2:
        yield from map(write, numbers)
        return
    context = multiprocessing.get_context("spawn")  # nothing of this process's threads and locks
    pool = ProcessPoolExecutor(min(workers, len(numbers)), context, _begin)
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it until they are set up
        try:
            futures = [pool.submit(write, number) for number in numbers]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Set a process up to end at once with the one that started it, and at Ctrl-C, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # the pool's queue would never tell: the children themselves hold both its ends open


def _write_shard(folder: Path, options: Scenes, split: Split, number: int) -> dict[str, Any]:
    """Write one shard; return what the index says of it."""
    first = number * options.samples_per_shard
    last = min(first + options.samples_per_shard, getattr(options, split))
    name, regions = f"shard-{number:05d}-000.tar", 0  # as the pack step names them
    with _writing(folder / name) as tar:
        for i in range(first, last):
            jpeg, facts = sample(options, split, i)
            add_member(tar, f"{facts.key}.jpg", jpeg)
            add_member(tar, f"{facts.key}.json", encode(facts))
            regions += len(facts.regions)
        end_tar(tar)
        size = tar.tell()
        tar.seek(0)
        digest = hashlib.file_digest(tar, "sha256").hexdigest()
    return {"name": name, "samples": last - first, "regions": regions, "bytes": size, "sha256": digest}
