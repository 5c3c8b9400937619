"""What a recipe means for its store: the chain with its fingerprints, the parts, and which of them are done."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..transforms import urls
from .ingest import input_tables, read_dataset
from .recipe import Recipe, RecipeError, Steps, only_parts
from .stage import Stage, Step, fingerprint
from .store import FORMAT, Store
from .work import Job

INPUT_FINGERPRINT = fingerprint({"step": "input", "format": FORMAT, "url_normalisation": urls.NORMALISATION})


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its store. `done` has the parts with a table, per step."""

    recipe: Recipe
    store: Store
    dataset: Mapping[str, Any] | None
    steps: tuple[Step, ...]
    parts: tuple[int, ...]
    done: Mapping[str, frozenset[int]]

    def missing(self, step: Step) -> tuple[int, ...]:
        """The parts that a step has to do, in order."""
        return tuple(part for part in self.parts if part not in self.done[step.name])

    def todo(self) -> tuple[int, ...]:
        """The parts for which any step has something to do; of an adopted result, those that it has."""
        adopted = [self.done[step.name] for step in self.steps if step.adopted]
        return tuple(
            part
            for part in self.parts
            if all(part in there for there in adopted) and any(part not in self.done[s.name] for s in self.steps)
        )

    def job(self) -> Job:
        """What the workers need to know."""
        engine = self.recipe.engine
        return Job(
            store_url=self.recipe.store,
            storage_options=self.recipe.storage_options,
            steps=self.steps,
            inputs=tuple(input_tables(self.dataset)) if self.dataset else (),
            batch={step.name: engine.of(step.name).batch or 32 for step in self.steps},
            save_every_s=engine.save_every_s,
        )


def make_plan(recipe: Recipe, until: str | None = None) -> Plan:
    """Look at the store (and write nothing): chain, parts, and what is done. `until` ends the chain after that step.

    Raises StoreError and RecipeError.
    """
    store = Store(recipe.store, recipe.storage_options)
    store.check()
    dataset = read_dataset(store)
    steps = chain(recipe, store)
    if until is not None:
        steps = steps[: [step.name for step in steps].index(until) + 1]
    count = len(input_tables(dataset)) if dataset else 0
    chosen = only_parts(recipe)
    parts = tuple(part for part in range(count) if chosen is None or part in chosen)
    done = {step.name: _done(store, step) for step in steps}
    return Plan(recipe, store, dataset, steps, parts, done)


def _done(store: Store, step: Step) -> frozenset[int]:
    names = store.names(step.folder, "part-")
    return frozenset(int(name[5:-8]) for name in names if name.endswith(".parquet"))


def chain(recipe: Recipe, store: Store) -> tuple[Step, ...]:
    """The steps of a recipe with their fingerprints. A step that is adopted brings the results that it was made from.

    Raises RecipeError where the store does not have what a `use` names.
    """
    steps: list[Step] = []
    for field in dataclasses.fields(Steps):
        stage: Stage = getattr(recipe.steps, field.name)
        parent = steps[-1].fingerprint if steps else INPUT_FINGERPRINT
        steps.append(Step(stage, parent))
        adopted = recipe.use.get(field.name)
        for i in range(len(steps) - 1, -1, -1):  # towards the input, as far as the adopted result's own chain
            if adopted is None:
                break
            step = steps[i]
            inputs = store.read_json(f"{step.name}/{adopted}/step.json")
            if inputs is None:
                there = ", ".join(store.names(step.name)) or "none"
                raise RecipeError(f"steps.{field.name}.use: the store has no {step.name}/{adopted}; there is: {there}")
            steps[i] = Step(step.stage, inputs["parent"], adopted)
            adopted = inputs["parent"] if i else None
    return tuple(steps)


def provenance(plan: Plan) -> list[dict[str, Any]]:
    """The fingerprint chain, as `index.json` shows it: what each step's fingerprint hashes, adopted results as made."""
    chain = []
    for step in plan.steps:
        inputs = plan.store.read_json(f"{step.folder}/step.json") if step.adopted else step.inputs
        chain.append({"fingerprint": step.fingerprint, "adopted": step.adopted is not None, **inputs})
    return chain
