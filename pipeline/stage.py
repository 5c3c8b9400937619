"""What a stage is, and how its identity follows from its options.

A stage is a frozen dataclass of options that opens into a function: a batch of columns in, the same rows in the same
order out, each with its outcome. A step is a stage whose result is stored; its fingerprint names everything that can
change that result.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, ClassVar, Protocol, runtime_checkable

import pyarrow as pa

from ..transforms.options import identity
from ..transforms.outcomes import Drop, reason_of
from ..transforms.records import OUTCOME
from .store import Store

Function = Callable[[pa.Table], pa.Table]


class InTwo:
    """A function in two moments: `prepare` runs in threads, ahead, while `finish` is at work on the batches before.

    `prepare` must stand being called by several threads at once; `finish` gets what it made of the same batch.
    """

    def __init__(self, prepare: Callable[[pa.Table], Any], finish: Callable[[pa.Table, Any], pa.Table]) -> None:
        self.prepare, self.finish = prepare, finish
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def preparers(self, threads: int) -> ThreadPoolExecutor:
        """The threads that prepare, for all parts alike: the batches of one come before those of the next."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(threads, "prepare")
            return self._pool

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Do both."""
        return self.finish(batch, self.prepare(batch))


class ByRow(InTwo):
    """A function in two moments that begins with each row by itself, so that a slow one holds up no other.

    `begin` gets the columns of a row; `finish` gets what it returned for the rows of a batch, in any order of the part.
    """

    def __init__(
        self, begin: Callable[[dict[str, Any]], Future[Any]], finish: Callable[[pa.Table, list[Future[Any]]], pa.Table]
    ) -> None:
        super().__init__(lambda batch: [begin(row) for row in batch.to_pylist()], finish)
        self.begin = begin


class Stage(Protocol):
    """Options of one kind of work.

    Three of the columns that a stage may read lie in no table: `image`, the bytes of the stored JPEG, `tar`, the path
    in the store of the tar that it lies in, and `select`, the fingerprint of the select step.
    """

    name: ClassVar[str]
    version: ClassVar[int]  # raised when the meaning of a result changes without an option changing
    emits: ClassVar[pa.Schema]  # what the function adds to key, outcome, reason and detail

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of earlier steps that the function needs beside the key."""
        ...

    @property
    def opens_model(self) -> bool:
        """Whether opening loads a model."""
        ...

    def open(self) -> Function:
        """Build the model or client and return the function. Runs on the worker."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a stage's function runs: beside which store, and as one of how many workers of its step, at most."""

    store: Store
    workers: int


@runtime_checkable
class Placed(Protocol):
    """A stage whose function depends on its place."""

    def at(self, place: Place) -> Stage:
        """The same stage, to be opened there."""
        ...


class Sink(Protocol):
    """Takes the files' bytes out of a step's batches as they come, so that its table keeps only where they lie."""

    def add(self, batch: pa.Table) -> pa.Table:
        """Keep the batch's blobs; return the columns of the step's table."""
        ...

    def blobs(self, rows: pa.Table) -> pa.Table | None:
        """The inverse of `add` for rows that it returned, to save unfinished work; None where that is not worth it."""
        ...

    def close(self, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Publish the files of all `rows`, in their order; return the step's table and what its footer says of them."""
        ...

    def abort(self) -> None:
        """Drop what is unfinished."""
        ...


@runtime_checkable
class WithFiles(Protocol):
    """A stage whose step writes files beside its table."""

    def sink(self, store: Store, folder: str, part: int) -> Sink:
        """Open the files of one part."""
        ...

    def cited(self, footer: Mapping[str, Any]) -> set[str]:
        """The names of the files that belong to a part's table."""
        ...

    def prefix(self, part: int) -> str:
        """How the names of a part's files begin."""
        ...


@dataclass(frozen=True)
class Step:
    """A stage at its place in a chain. `parent` is the fingerprint of the step (or input) that it reads from."""

    stage: Stage
    parent: str
    adopted: str | None = None  # the fingerprint of an earlier result that the recipe uses as it is

    @property
    def name(self) -> str:
        """The stage's name, which is also the step's folder."""
        return self.stage.name

    @property
    def inputs(self) -> dict[str, Any]:
        """What the fingerprint hashes, as `step.json` shows it."""
        return {
            "step": self.stage.name,
            "version": self.stage.version,
            "parent": self.parent,
            "options": identity(self.stage),
        }

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of the hash of all that can change the result."""
        return self.adopted or fingerprint(self.inputs)

    @property
    def folder(self) -> str:
        """Where the results lie in the store."""
        return f"{self.name}/{self.fingerprint}"

    def table(self, part: int) -> str:
        """The name of a part's Parquet file, whose existence means done."""
        return f"{self.folder}/{part_name(part)}.parquet"


def fingerprint(inputs: dict[str, Any]) -> str:
    """12 hex digits of sha256 over canonical JSON."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]


def part_name(part: int) -> str:
    """`part-00042`; longer where there are more than 100,000 parts."""
    return f"part-{part:05d}"


def answer(batch: pa.Table, step: str, results: Sequence[dict[str, Any] | Drop], adds: pa.Schema) -> pa.Table:
    """Turn one result per row (its new columns, or a Drop) into the step's table for the batch.

    Raises KeyError for a Drop whose reason is not on the step's closed list, ValueError where rows are missing.
    """
    if len(results) != len(batch):
        raise ValueError(f"{step}: {len(results)} results for {len(batch)} rows")
    drops = [result if isinstance(result, Drop) else None for result in results]
    outcome = [reason_of(step, drop.reason).outcome if drop else "kept" for drop in drops]
    columns = [
        batch["key"].combine_chunks(),
        pa.array(outcome, pa.string()),
        pa.array([drop and drop.reason for drop in drops], pa.string()),
        pa.array(
            [drop and (drop.detail[:500].encode(errors="replace").decode() or None) for drop in drops], pa.string()
        ),
    ]
    for field in adds:
        values = [None if isinstance(result, Drop) else result[field.name] for result in results]
        columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=pa.schema([*OUTCOME, *adds]))
