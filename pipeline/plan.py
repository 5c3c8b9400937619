"""What a recipe means for its store: the chain with its fingerprints, the parts, and which of them are done."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..transforms import urls
from . import dedup
from .ingest import input_tables, read_dataset
from .journal import newest
from .parts import Footers, Parts, look, together
from .recipe import Recipe, RecipeError, Steps, only_parts
from .stage import Stage, Step, fingerprint
from .store import FORMAT, Store
from .work import Job

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
    inputs: Footers
    done: Mapping[str, Footers]
    compaction: int | None = 0

    @property
    def rows(self) -> int:
        """Rows that go into the first step."""
        return int(self.inputs.total(self.parts)["rows"])

    def missing(self, step: Step) -> tuple[int, ...]:
        """The parts that a step has to do, in order."""
        return self._where(~self._done(step))

    def without(self) -> tuple[int, ...]:
        """The parts that an adopted result does not have, so that nothing can be done for them."""
        return self._where(~self._done(*(step for step in self.steps if step.adopted)))

    def todo(self) -> tuple[int, ...]:
        """The parts for which any step has something to do."""
        return self._where(~self._done(*self.steps) & self._done(*(step for step in self.steps if step.adopted)))

    def _done(self, *steps: Step) -> npt.NDArray[np.bool_]:
        """For each part whether all these steps are done."""
        there = np.ones(len(self.parts), np.bool_)
        for step in steps:
            there &= self.done[step.name].among(self.parts)
        return there

    def _where(self, wanted: npt.NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(np.asarray(self.parts, np.int64)[wanted].tolist())

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
            rows=self.rows / max(1, len(self.parts)),
        )


def make_plan(recipe: Recipe, until: str | None = None, write: bool = False) -> Plan:
    """Look at the store: chain, parts, and what is done. `until` ends the chain after that step.

    `write` says that the store is written by this command; then footers that had to be read are kept for the next look.
    Raises StoreError, StoreFault and RecipeError.
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
    ingests = dataset["ingests"] if dataset else []
    count = sum(ingest["parts"] for ingest in ingests)
    parts = only_parts(recipe, count)
    if parts is not None and count and not parts:
        raise RecipeError(f"dataset.only_parts: {recipe.dataset.only_parts!r} names none of the {count} parts")
    chosen = tuple(range(count) if parts is None else parts)
    inputs, done = _there(store, ingests, steps, chosen, write)
    compaction = number if journal["state"] == "done" else None
    return Plan(recipe, store, dataset, steps, chosen, inputs, done, compaction)


def _to_compare(download: Step, chosen: tuple[int, ...], there: Footers) -> list[int]:
    """The parts whose images dedup compares: the chosen ones, but for what an adopted download does not have."""
    return [part for part in chosen if part in there or not download.adopted]


def _there(
    store: Store, ingests: Sequence[Mapping[str, Any]], steps: tuple[Step, ...], chosen: tuple[int, ...], write: bool
) -> tuple[Footers, dict[str, Footers]]:
    """The footers of the input tables, and by step those of the tables that were made from a parent that is there."""

    def ask(folder: str, parts: Parts) -> Footers:
        found = look(store, folder, parts)
        return found.keep() if write else found

    spans = {i["first"]: (f"input/{i['id']}", i["first"] + i["parts"]) for i in ingests if i["parts"]}
    inputs = together(store, {first: ask(folder, range(first, end)) for first, (folder, end) in spans.items()})
    done: dict[str, Footers] = {}
    parent = inputs
    for step in steps:
        parent = ask(step.folder, parent.parts).children_of(parent)
        if dedup.of((step,)) is not None:
            fit = dedup.fitting(parent, _to_compare(steps[0], chosen, done["download"]))
            parent = parent.only(np.fromiter((part in fit for part in parent), np.bool_, len(parent)))
        done[step.name] = parent
    return inputs, done


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
