"""`vesl run`: ingest what is new, carry the parts through what is missing, write the index, keep a record."""

import os
import platform
import random
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from threading import Lock, Thread
from typing import Any

import pyarrow.compute as pc
from rich.console import Console

from ..transforms.captions import visible
from ..transforms.options import identity
from . import dedup, leases
from .compact import finish
from .engines import Engine, Event, Listener
from .hosts import network_hint
from .ingest import ingest
from .journal import beating, compacting, newest, sign
from .listing import part_of
from .plan import Plan, chain, make_plan, provenance
from .progress import Display, Tally
from .recipe import Recipe
from .retry import retry
from .store import Store, StoreError, to_json, wip
from .takedown import obeyed
from .work import FILES, Job, tidy

_RECORD_EVERY_S = 5.0
_SAY_EVERY_S = 5.0  # of the pass that compares all images
_INGEST = ("kept", "duplicate_url", "no_url", "malformed", "taken_down")
_INGEST_MORE = ("no_image", "bad_hash")  # of archives, and of lists with hashes
_JUDGED_FROM = 100  # rows of a step before its failures may end a run early
_EXAMPLES, _EXAMPLES_FROM = 3, 20  # rows that are shown, and parts that are searched for them
_KEEP_EVERY = 5000  # parts' steps done, after which footers are kept
_KEEP_REST = 20  # times as long as that took, before it is done again: a bucket's listings take minutes


class OverLimitError(Exception):
    """Too many rows of a step failed: one line that says which step, which reasons and what to do. Exit code 3."""


def run(recipe: Recipe, until: str | None = None, retry_failed: bool = False) -> tuple[Plan, bool]:
    """Do what is missing for a recipe, up to and with the step `until`; return the plan and whether all parts are done.

    With `retry_failed`, rows whose last attempt failed by a fault that may pass are tried again, as parts of their own.
    Raises RecipeError, IngestError, StoreError, ModelError (one line each) and OverLimitError.
    """
    plan = _ingest(recipe, until)
    if retry_failed:
        again = retry(plan)
        print(f"retry: {again['kept'] if again else 0:,} rows failed by a fault that may pass", file=sys.stderr)
        plan = make_plan(recipe, until, write=True)
    if without := plan.without():
        print(f"{len(without)} of {len(plan.parts)} parts are not in the adopted result: left out", file=sys.stderr)
    if plan.todo():
        _work(plan)
        plan = make_plan(recipe, until, write=True)
    if plan.steps[-1].name == "pack":
        _undisturbed(plan)
        write_index(plan)
    for count in (tally := Tally.of(plan)).counts:
        check_limit(plan, tally, count)
    return plan, not plan.todo()


def _ingest(recipe: Recipe, until: str | None) -> Plan:
    store = Store(recipe.store, recipe.storage_options)
    store.check(write=True)
    chain(recipe, store)  # so that a recipe error shows before a long read
    obeyed(store)  # and a takedown list that cannot be read, before any work
    finish(store, lambda line: print(line, file=sys.stderr))
    read, last = 0, time.monotonic()
    console = Console(stderr=True)

    def report(rows: int) -> None:
        nonlocal read, last
        read += rows
        if time.monotonic() - last > 1:
            last = time.monotonic()
            console.print(f"ingest: {read:,} rows read", end="\r" if console.is_terminal else "\n", highlight=False)

    d = recipe.dataset
    first = not store.exists("dataset.json")
    hashes = (d.sha256_column, d.md5_column, d.phash_column)
    lists = (d.source, d.url_column, d.caption_column, d.rows_per_part, recipe.storage_options)
    dataset = ingest(store, d.name, *lists, report, hashes)
    if read or first:
        last_one = dataset["ingests"][-1]
        names = (*_INGEST, *(name for name in _INGEST_MORE if name in last_one))
        counts = ", ".join(f"{last_one.get(name, 0):,} {name}" for name in names)
        console.print(f"ingest: {last_one['rows']:,} rows ({counts}) in {last_one['parts']} parts", highlight=False)
    return make_plan(recipe, until, write=True)


def _undisturbed(plan: Plan) -> None:
    """Raise StoreError where a compaction goes on, or did since the plan was begun, which then no longer fits."""
    if busy := compacting(plan.store):
        raise StoreError(f"store {plan.store.url}: {busy}; run again when it has ended")
    if newest(plan.store)[0] != plan.compaction:
        raise StoreError(f"store {plan.store.url}: a compaction went on meanwhile; run again")


def _work(plan: Plan) -> None:
    store, todo = plan.store, plan.todo()
    for step in plan.steps:
        if not step.adopted:
            store.create(f"{step.folder}/step.json", to_json(step.inputs))
    _sweep(plan)
    tally = Tally([step.name for step in plan.steps], plan.inputs.total(todo)["rows"])
    lost, whole = list[Event](), False
    with Display(tally) as display, Record(plan, tally) as record:
        _undisturbed(plan)  # now that the record holds off any that would begin

        def listen(event: Event) -> None:
            tally.take(event)
            record.take(event)
            display.update()
            if event.kind == "wait":
                display.say(event.text)
            lost.extend([event] if event.kind == "lost" else [])
            if event.kind in ("retry", "lost"):
                will = "trying again" if event.kind == "retry" else "given up; run again to try once more"
                display.say(f"{event.step} part {event.part}: {event.text}; {will}")
            if event.kind == "done":
                check_limit(plan, tally, event.step, event.part)

        try:
            _carry_all(plan, record.name, listen, display.say)
            whole = not lost
        finally:
            if not whole:  # else every part is published, which ends its lease, and the listing is spared
                with suppress(OSError):  # it must not hide why the run ends; who waits finds them silent
                    leases.give_back(store, [step.folder for step in plan.steps if not step.adopted], record.name)


def _carry_all(plan: Plan, run: str, listen: Listener, say: Callable[[str], None]) -> None:
    """The engine carries the parts; where all parts must be compared first, up to there, and then on.

    Their order is the run's own: so runs on one store seldom meet, and what is done first is a sample of the whole.
    """
    engine, job, at = plan.recipe.engine, replace(plan.job(), run=run), dedup.of(plan.steps)
    told = set[tuple[str, int]]()

    def listen_once(event: Event) -> None:  # the second time, a part's first steps are found done
        place = (event.step, event.part)
        if event.kind != "done" or place not in told:
            told.update([place] if event.kind == "done" else [])
            listen(event)

    if at is not None and plan.missing(plan.steps[at]):
        missing = {part for step in plan.steps[:at] for part in plan.missing(step)}
        if first := [part for part in plan.todo() if part in missing]:
            carry(engine)(replace(job, steps=job.steps[:at]), _shuffled(first, run), engine, listen_once)
        until = plan.steps[-1].name
        if not _compare(make_plan(plan.recipe, until), listen_once, say):
            return
        plan = make_plan(plan.recipe, until)
    if todo := plan.todo():
        carry(engine)(job, _shuffled(todo, run), engine, listen_once)


def _shuffled(parts: Sequence[int], run: str) -> list[int]:
    return random.Random(run).sample(parts, len(parts))  # noqa: S311  (no secret)


def _compare(plan: Plan, listen: Listener, say: Callable[[str], None]) -> bool:
    """The pass over all parts between two carries; whether it could be made."""
    wanted, there = plan.to_compare(), plan.done["download"]
    if without := [part for part in wanted if part not in there]:
        parts = ", ".join(map(str, without[:5])) + (", ..." if without[5:] else "")
        say(f"dedup: {len(without)} of {len(wanted)} parts are not downloaded ({parts}), so nothing after it can start")
        return False
    last = time.monotonic()

    def now_and_then(line: str) -> None:
        nonlocal last
        if time.monotonic() - last > _SAY_EVERY_S:
            last = time.monotonic()
            say(line)

    memory = plan.recipe.engine.dedup.memory
    downloads = {part: there[part] for part in wanted}
    ingests = plan.dataset["ingests"] if plan.dataset else []
    retried = next((ingest["first"] for ingest in ingests if ingest.get("retry")), None)
    for part, footer, fresh in dedup.run_pass(plan.job(), downloads, retried, memory, say, now_and_then):
        listen(Event("done", "dedup", part, footer=footer, fresh=fresh))
    return True


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
    """Remove what killed runs left beside finished files. Tars beside no table are noted for who does that part."""
    store, steps = plan.store, {step.folder: step for step in plan.steps if not step.adopted}
    with ThreadPoolExecutor(len(plan.steps) + 1) as pool:  # a bucket's listings take long
        listed = dict(zip(["", *steps], pool.map(store.names, ["", *steps]), strict=True))
    if "dataset.wip" in listed.pop(""):
        store.sweep("dataset")
    if store.local:  # a bucket has no scratch files, and many records to list
        for run in store.names("runs"):
            for name in store.names(f"runs/{run}"):
                if name.endswith(".wip"):
                    store.sweep(f"runs/{run}/{name.removesuffix('.wip')}")
    for folder, names in listed.items():
        step, done = steps[folder], plan.done[steps[folder].name]
        for name in names:
            if name == "index.wip":
                store.sweep(f"{folder}/index")
            elif (part := part_of(name)) is None or part not in plan.inputs:
                continue
            elif name.endswith(".wip") and part in done:
                tidy(store, step, part, done[part])
            elif name.endswith(".tar") and part not in done:
                store.claim(f"{wip(step.table(part))}/{FILES}", b"")


def check_limit(plan: Plan, tally: Tally, step: str, part: int | None = None) -> None:
    """Raise OverLimitError where more rows of a step failed than the recipe allows, with examples.

    `part` has just been done, and few rows are not judged yet; without it, it is the end, and all are. Says so where
    downloads look as if the network, and not the web, were broken.
    """
    limits, count = plan.recipe.limits, tally.counts[step]
    limit = limits.download_failed_fraction if step == "download" else limits.failed_fraction
    if part is None and step == "download" and (hint := network_hint(count.rows, count.failed)):
        print(f"vesl: {hint}", file=sys.stderr)
    if count.failed_fraction <= limit or (count.rows < _JUDGED_FROM and part is not None):
        return
    reasons = ", ".join(f"{name} {n}" for name, n in count.failed.most_common(3))
    key = "limits.download_failed_fraction" if step == "download" else "limits.failed_fraction"
    raise OverLimitError(
        f"{step}: {count.failed.total()} of {count.rows} rows failed ({reasons}), over {key} = {limit:g}; "
        f"see `vesl report` for the reasons, then mend the cause or raise the limit"
        f"{_examples(plan, step, count.failed.most_common(1)[0][0], part)}"
    )


def _examples(plan: Plan, step: str, reason: str, part: int | None) -> str:
    """What a few rows that failed for this reason say, a line each, in the part that was just done or in the first."""
    [at] = [one for one in plan.steps if one.name == step]
    found: list[str] = []
    for number in list(plan.done[step])[:_EXAMPLES_FROM] if part is None else [part]:
        with suppress(OSError):  # they are only examples
            rows = plan.store.read_table(at.table(number), ["key", "reason", "detail"])
            told = rows.filter((pc.field("reason") == reason) & (pc.field("detail") != "")).slice(0, _EXAMPLES)
            found += [visible(f"{row['key']}: {row['detail'][:200]}") for row in told.to_pylist()]
        if len(found) >= _EXAMPLES:
            break
    return "\n  ".join(["; such as", *found[:_EXAMPLES]]) if found else ""


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
        self.name = f"runs/{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{host}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        self._store, self._tally = plan.store, tally
        self._head = {
            **sign(),
            "started": time.time(),
            "steps": {step.name: step.fingerprint for step in plan.steps},
            "recipe": described(plan.recipe),
        }
        self._events: list[dict[str, Any]] = []
        self._chunks, self._last = 0, 0.0
        self._document: dict[str, Any] = {}
        self._writing, self._beats = Lock(), beating(self._beat)
        self._plan, self._unkept, self._keeper, self._resting = plan, 0, Thread(), 0.0

    def __enter__(self) -> "Record":
        self._write("running")
        self._beats.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        self._beats.__exit__(None, None, None)
        self._write("done" if kind is None else f"ended: {kind.__name__}")
        self._flush()

    def take(self, event: Event) -> None:
        """Note an event; write about every few seconds."""
        if event.kind not in ("rows", "saved"):
            told = {"kind": event.kind, "step": event.step, "part": event.part, "seconds": round(event.seconds, 3)}
            told |= {"fresh": event.fresh} if event.kind == "done" else {}
            told |= {"rows": event.rows} if event.kind in ("done", "spent") else {}
            told |= {"text": event.text} if event.text else {}
            self._events.append({"at": round(time.time(), 3), **told})
        if time.monotonic() - self._last > _RECORD_EVERY_S:
            self._write("running")
        self._unkept += event.kind == "done" and event.fresh
        if self._unkept >= _KEEP_EVERY and time.monotonic() > self._resting and not self._keeper.is_alive():
            self._unkept, self._keeper = 0, Thread(target=self._keep, daemon=True, name="vesl-keep")
            self._keeper.start()
        if len(self._events) >= 1000:
            self._flush()

    def _write(self, state: str) -> None:
        self._last = time.monotonic()
        with self._writing:
            self._document = {
                **self._head,
                "state": state,
                "updated": time.time(),
                "progress": self._tally.snapshot(),
                "seconds_left": round(self._tally.seconds_left()),
            }
            self._store.write_json(f"{self.name}/run.json", self._document)

    def _beat(self) -> None:
        """Say that this run is alive, also where nothing happens for long."""
        with self._writing:
            self._store.write_json(f"{self.name}/run.json", self._document | {"updated": time.time()})

    def _keep(self) -> None:
        """So that `vesl plan` and `vesl status` need not read the footers of all that a long run has done."""
        begun = time.monotonic()
        with suppress(OSError, StoreError):
            make_plan(self._plan.recipe, self._plan.steps[-1].name, write=True)
        self._resting = time.monotonic() + _KEEP_REST * (time.monotonic() - begun)

    def _flush(self) -> None:
        if self._events:
            self._store.write_json(f"{self.name}/events-{self._chunks:05d}.json", self._events)
            self._events, self._chunks = [], self._chunks + 1


def last_runs(store: Store, count: int = 10) -> list[dict[str, Any]]:
    """The records of the newest runs, newest first."""
    found = (store.read_json(f"runs/{name}/run.json") for name in store.names("runs")[: -count - 1 : -1])
    return [dict(document) for document in found if document]
