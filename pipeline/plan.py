"""What a recipe means for its store: the chain with its fingerprints, the parts, and which of them are done."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..transforms import urls
from . import dedup
from .ingest import input_tables, read_dataset
from .journal import newest
from .recipe import Recipe, RecipeError, Steps, only_parts
from .stage import Stage, Step, fingerprint
from .store import FORMAT, Store
from .work import Job

Footer = Mapping[str, Any]
_READERS = 32  # footers read at a time
INPUT_FINGERPRINT = fingerprint({"step": "input", "format": FORMAT, "url_normalisation": urls.NORMALISATION})


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its store.

    `inputs` has the footers of the input tables by part, `done` those of the parts that are done, per step. A table
    that was made from a parent that is no longer there is not done. `compaction` is the number of the store's newest
    when the plan was begun, None where that was not done.
    """

    recipe: Recipe
    store: Store
    dataset: Mapping[str, Any] | None
    steps: tuple[Step, ...]
    parts: tuple[int, ...]
    inputs: Mapping[int, Footer]
    done: Mapping[str, Mapping[int, Footer]]
    compaction: int | None = 0

    @property
    def rows(self) -> int:
        """Rows that go into the first step."""
        return sum(self.inputs[part]["rows"] for part in self.parts)

    def missing(self, step: Step) -> tuple[int, ...]:
        """The parts that a step has to do, in order."""
        return tuple(part for part in self.parts if part not in self.done[step.name])

    def without(self) -> tuple[int, ...]:
        """The parts that an adopted result does not have, so that nothing can be done for them."""
        adopted = [self.done[step.name] for step in self.steps if step.adopted]
        return tuple(part for part in self.parts if not all(part in there for there in adopted))

    def todo(self) -> tuple[int, ...]:
        """The parts for which any step has something to do."""
        blocked = set(self.without())
        missing = {part for step in self.steps for part in self.missing(step)}
        return tuple(part for part in self.parts if part in missing and part not in blocked)

    def to_compare(self) -> list[int]:
        """The parts whose images dedup compares with each other."""
        return _to_compare(self.steps[0], self.parts, self.done["download"])

    def job(self) -> Job:
        """What the workers need to know."""
        engine = self.recipe.engine
        return Job(
            store_url=self.recipe.store,
            storage_options=self.recipe.storage_options,
            steps=self.steps,
            inputs=tuple(input_tables(self.dataset)) if self.dataset else (),
            batch={step.name: engine.of(step.name).batch or 32 for step in self.steps},
            threads={step.name: engine.of(step.name).threads for step in self.steps},
            save_every_s=engine.save_every_s,
            workers={step.name: engine.workers_of(step.name) for step in self.steps},
        )


def make_plan(recipe: Recipe, until: str | None = None, write: bool = False) -> Plan:
    """Look at the store: chain, parts, and what is done. `until` ends the chain after that step.

    `write` says that the store is about to be written; nothing is written here. Raises StoreError and RecipeError.
    """
    store = Store(recipe.store, recipe.storage_options)
    store.check(write)
    number, journal = newest(store)
    dataset = read_dataset(store)
    steps = chain(recipe, store)
    if until is not None:
        known = [step.name for step in steps]
        if until not in known:
            raise RecipeError(f"--until {until}: the recipe has no such step; it has {', '.join(known)}")
        steps = steps[: known.index(until) + 1]
    tables = input_tables(dataset) if dataset else []
    parts = only_parts(recipe, len(tables))
    if parts is not None and tables and not parts:
        raise RecipeError(f"dataset.only_parts: {recipe.dataset.only_parts!r} names none of the {len(tables)} parts")
    chosen = tuple(range(len(tables)) if parts is None else parts)
    with ThreadPoolExecutor(_READERS) as pool:
        inputs = dict(enumerate(pool.map(_footer(store), tables)))
        done: dict[str, Mapping[int, Footer]] = {}
        parent = inputs
        for step in steps:
            names = {step.table(part): part for part in parent}
            there = {f"{step.folder}/{name}" for name in store.names(step.folder, "part-")}
            found = [name for name in names if name in there]
            footers = dict(zip(map(names.__getitem__, found), pool.map(_footer(store), found), strict=True))
            parent = {p: f for p, f in footers.items() if f and f["parent"] == parent[p]["content"]}
            if dedup.of((step,)) is not None:
                parent = dedup.fitting(parent, _to_compare(steps[0], chosen, done["download"]))
            done[step.name] = parent
    compaction = number if journal["state"] == "done" else None
    return Plan(recipe, store, dataset, steps, chosen, inputs, done, compaction)


def _to_compare(download: Step, chosen: tuple[int, ...], there: Mapping[int, Footer]) -> list[int]:
    """The parts whose images dedup compares: the chosen ones, but for what an adopted download does not have."""
    return [part for part in chosen if part in there or not download.adopted]


def _footer(store: Store) -> Callable[[str], Footer]:
    def read(name: str) -> Footer:
        return store.footer(name) or {}

    return read


def chain(recipe: Recipe, store: Store) -> tuple[Step, ...]:
    """The steps of a recipe with their fingerprints. A step that is adopted brings the results that it was made from.

    Raises RecipeError where the store does not have what a `use` names, and for scores that `scores_of` does not name.
    """
    steps: list[Step] = []
    for field in dataclasses.fields(Steps):
        stage: Stage | None = getattr(recipe.steps, field.name)
        if stage is None:  # an optional step that the recipe does not have
            continue
        parent = steps[-1].fingerprint if steps else INPUT_FINGERPRINT
        steps.append(Step(stage, parent))
        adopted = recipe.use.get(field.name)
        for i in range(len(steps) - 1, -1, -1):  # towards the input, as far as the adopted result's own chain
            if adopted is None:
                break
            step = steps[i]
            if recipe.use.get(step.name, adopted) != adopted:
                raise RecipeError(
                    f"steps.{step.name}.use: {field.name}/{recipe.use[field.name]} was made from "
                    f"{step.name}/{adopted}; leave out steps.{step.name}.use"
                )
            inputs = store.read_json(f"{step.name}/{adopted}/step.json")
            if inputs is None:
                there = ", ".join(store.names(step.name)) or "none"
                raise RecipeError(f"steps.{field.name}.use: the store has no {step.name}/{adopted}; there is: {there}")
            steps[i] = Step(step.stage, inputs["parent"], adopted)
            adopted = inputs["parent"] if i else None
    for before, step in itertools.pairwise(steps):
        if (scores_of := getattr(step.stage, "scores_of", None)) not in (None, step.parent):
            raise RecipeError(
                f"steps.{step.name}.scores_of: its thresholds were chosen on the scores of {scores_of}, but these are "
                f"of {before.name}/{step.parent}, from another detector or other phrases; choose anew, or leave it out"
            )
    return tuple(steps)


def provenance(plan: Plan) -> list[dict[str, Any]]:
    """The fingerprint chain, as `index.json` shows it: what each step's fingerprint hashes, adopted results as made."""
    chain = []
    for step in plan.steps:
        inputs = plan.store.read_json(f"{step.folder}/step.json") if step.adopted else step.inputs
        chain.append({"fingerprint": step.fingerprint, "adopted": step.adopted is not None, **inputs})
    return chain
