"""`vesl run`: ingest what is new, carry the parts through what is missing, write the index, keep a record."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from ..transforms.options import identity
from .engines import Engine, Event, Listener
from .ingest import ingest
from .plan import Plan, chain, make_plan, provenance
from .progress import Display, Tally
from .recipe import Recipe
from .stage import part_name
from .store import Store, to_json
from .work import Job

_RECORD_EVERY_S = 5.0
_JUDGED_FROM = 100  # rows of a step before its failures may end a run early


class OverLimitError(Exception):
    """Too many rows of a step failed: one line that says which step, which reasons and what to do. Exit code 3."""


def run(recipe: Recipe, until: str | None = None) -> tuple[Plan, bool]:
    """Do what is missing for a recipe, up to and with the step `until`; return the plan and whether all parts are done.

    Raises RecipeError, IngestError, StoreError, ModelError (one line each) and OverLimitError.
    """
    plan = _ingest(recipe, until)
    if without := plan.without():
        print(f"{len(without)} of {len(plan.parts)} parts are not in the adopted result: left out", file=sys.stderr)
    if todo := plan.todo():
        _work(plan, todo)
        plan = make_plan(recipe, until)
    if plan.steps[-1].name == "pack":
        write_index(plan)
    for count in (tally := Tally.of(plan)).counts:
        check_limit(recipe, tally, count, at_end=True)
    return plan, not plan.todo()


def _ingest(recipe: Recipe, until: str | None) -> Plan:
    store = Store(recipe.store, recipe.storage_options)
    store.check(write=True)
    chain(recipe, store)  # so that a recipe error shows before a long read
    read, last = 0, time.monotonic()
    console = Console(stderr=True)

    def report(rows: int) -> None:
        nonlocal read, last
        read += rows
        if time.monotonic() - last > 1:
            last = time.monotonic()
            console.print(f"ingest: {read:,} rows read", end="\r" if console.is_terminal else "\n", highlight=False)

    d = recipe.dataset
    before = store.exists("dataset.json")
    dataset = ingest(
        store, d.name, d.source, d.url_column, d.caption_column, d.rows_per_part, recipe.storage_options, report
    )
    if read or not before:
        last_one = dataset["ingests"][-1]
        counts = ", ".join(f"{last_one[name]:,} {name}" for name in ("kept", "duplicate_url", "no_url", "malformed"))
        console.print(f"ingest: {last_one['rows']:,} rows ({counts}) in {last_one['parts']} parts", highlight=False)
    return make_plan(recipe, until)


def _work(plan: Plan, todo: tuple[int, ...]) -> None:
    store, job = plan.store, plan.job()
    for step in plan.steps:
        if not step.adopted:
            store.create(f"{step.folder}/step.json", to_json(step.inputs))
    _sweep(plan)
    tally = Tally([step.name for step in plan.steps], sum(plan.inputs[part]["rows"] for part in todo))
    with Display(tally) as display, Record(plan, tally) as record:

        def listen(event: Event) -> None:
            tally.take(event)
            record.take(event)
            display.update()
            if event.kind in ("retry", "lost"):
                will = "trying again" if event.kind == "retry" else "given up; run again to try once more"
                display.say(f"{event.step} part {event.part}: {event.text}; {will}")
            if event.kind == "done":
                check_limit(plan.recipe, tally, event.step, at_end=False)

        carry(plan.recipe.engine)(job, todo, plan.recipe.engine, listen)


def carry(engine: Engine) -> Callable[[Job, Sequence[int], Engine, Listener], None]:
    """The engine's function. Its module is imported here, as it brings a large library."""
    if engine.kind == "ray":
        from .engines import ray

        return ray.run
    if engine.kind == "beam":
        from .engines import beam

        return beam.run
    from .engines import local

    return local.run


def _sweep(plan: Plan) -> None:
    """Remove what killed runs left beside finished files; what is unfinished is swept when its part is done."""
    finished = {step.folder: {part_name(part) for part in plan.done[step.name]} | {"index"} for step in plan.steps}
    for folder, stems in {"": {"dataset"}, **finished}.items():
        for name in plan.store.names(folder):
            stem = name.removesuffix(".wip")
            if stem != name and stem in stems:
                plan.store.sweep(f"{folder}/{stem}" if folder else stem)


def check_limit(recipe: Recipe, tally: Tally, step: str, at_end: bool) -> None:
    """Raise OverLimitError where more rows of a step failed than the recipe allows; few rows are judged at the end."""
    limits, count = recipe.limits, tally.counts[step]
    limit = limits.download_failed_fraction if step == "download" else limits.failed_fraction
    if count.failed_fraction <= limit or (count.rows < _JUDGED_FROM and not at_end):
        return
    reasons = ", ".join(f"{name} {n}" for name, n in count.failed.most_common(3))
    key = "limits.download_failed_fraction" if step == "download" else "limits.failed_fraction"
    raise OverLimitError(
        f"{step}: {count.failed.total()} of {count.rows} rows failed ({reasons}), over {key} = {limit:g}; "
        f"see `vesl report` for the reasons, then mend the cause or raise the limit"
    )


def write_index(plan: Plan) -> None:
    """Write `index.json` of the pack step from its parts' footers, if it says something new."""
    pack = plan.steps[-1]
    shards: list[dict[str, Any]] = []
    for _, footer in sorted(plan.done["pack"].items()):
        shards += footer["shards"]
    document = {
        "complete": bool(plan.inputs) and plan.inputs.keys() == plan.done["pack"].keys(),
        "samples": sum(shard["samples"] for shard in shards),
        "regions": sum(shard["regions"] for shard in shards),
        "shards": shards,
        "recipe": described(plan.recipe),
        "chain": provenance(plan),
    }
    name = f"{pack.folder}/index.json"
    if plan.done["pack"] and not (plan.store.exists(name) and plan.store.read(name) == to_json(document)):
        plan.store.write_json(name, document)


def described(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe can change a result; so neither credentials nor how and where it runs."""
    d = recipe.dataset
    return {
        "dataset": {"name": d.name, "url_column": d.url_column, "caption_column": d.caption_column},
        "steps": {name: identity(stage) for name, stage in vars(recipe.steps).items() if stage is not None},
        "use": dict(recipe.use),
    }


class Record:
    """What happened when, in `runs/<run>/`: never part of a result's bytes."""

    def __init__(self, plan: Plan, tally: Tally) -> None:
        host = platform.node()
        self._name = f"runs/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{host}-{os.getpid()}"
        self._store, self._tally = plan.store, tally
        self._head = {
            "host": host,
            "pid": os.getpid(),
            "started": time.time(),
            "steps": {step.name: step.fingerprint for step in plan.steps},
            "recipe": described(plan.recipe),
        }
        self._events: list[dict[str, Any]] = []
        self._chunks, self._last = 0, 0.0

    def __enter__(self) -> "Record":
        self._write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self._write("done" if kind is None else f"ended: {kind.__name__}")
        self._flush()

    def take(self, event: Event) -> None:
        """Note an event; write about every few seconds."""
        if event.kind != "rows":
            told = {"kind": event.kind, "step": event.step, "part": event.part, "seconds": round(event.seconds, 3)}
            told |= {"fresh": event.fresh} if event.kind == "done" else {}
            told |= {"text": event.text} if event.text else {}
            self._events.append({"at": round(time.time(), 3), **told})
        if time.monotonic() - self._last > _RECORD_EVERY_S:
            self._write("running")
        if len(self._events) >= 1000:
            self._flush()

    def _write(self, state: str) -> None:
        self._last = time.monotonic()
        document: Mapping[str, Any] = {
            **self._head,
            "state": state,
            "updated": time.time(),
            "progress": self._tally.snapshot(),
            "seconds_left": round(self._tally.seconds_left()),
        }
        self._store.write_json(f"{self._name}/run.json", document)

    def _flush(self) -> None:
        if self._events:
            self._store.write_json(f"{self._name}/events-{self._chunks:05d}.json", self._events)
            self._events, self._chunks = [], self._chunks + 1


def last_runs(store: Store, count: int = 10) -> list[dict[str, Any]]:
    """The records of the newest runs, newest first."""
    found = (store.read_json(f"runs/{name}/run.json") for name in store.names("runs")[: -count - 1 : -1])
    return [dict(document) for document in found if document]
