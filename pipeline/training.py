"""`vesl train` and `vesl eval`: find what the recipe names (shards, scenes, takedown lists) and call the trainer."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress

from ..models.cloc.options import Data, Evaluation, Train
from ..models.cloc.scenes import Scenes
from ..models.contract import ModelError
from .journal import unfinished
from .recipe import Recipe, RecipeError, Training
from .store import Store


def train(training: Training, recipe: Recipe | None) -> int:
    """Train to the end and say where the model is. Returns 0, or the exit code of a run that a signal stopped."""
    _check_installed()
    from ..models.cloc.ranks import StoppedError
    from ..models.cloc.train import fingerprint
    from ..models.cloc.train import train as run

    _log_to_terminal()
    options = dataclasses.replace(training.train, data=_data(training, recipe))
    store = Store(training.store, training.storage_options)
    if options.folder is None and not store.local:
        raise RecipeError("train.folder: is missing; a run's folder is a local one, and the store is not")
    if "://" in (options.folder or ""):
        raise RecipeError(f"train.folder: {options.folder}: a run's folder is a local one")
    try:
        index = Store(str(options.data.shards), training.storage_options).read("index.json")
    except FileNotFoundError:
        raise RecipeError(f"{options.data.shards}: has no index.json; `vesl run` makes the shards") from None
    folder = Path(options.folder or f"{store.root}/train/{fingerprint(options, index)}")
    sets = _evaluations(training, recipe)
    if _rank() == 0:
        _check_abilities(sets, options)
        _check_sets(sets, training)
        if text := unfinished(store):
            print(f"vesl: {text}", file=sys.stderr)
        print(f"run: {folder}", flush=True)
    try:
        run(
            options,
            folder,
            evaluations=sets,
            storage_options=training.storage_options,
            images=options.data.images or training.store,
            takedown=f"{training.store.rstrip('/')}/takedown",
        )
    except StoppedError as stopped:
        print(f"vesl: {stopped}", file=sys.stderr)
        return 130 if stopped.number == signal.SIGINT else 1
    if _rank() == 0:
        print(f"model: {folder / 'model'}")
    return 0


def evaluate(training: Training, recipe: Recipe | None, checkpoint: str) -> int:
    """Measure `checkpoint` on the sets of `train.evaluate`, print a table, and write it beside the model as JSON."""
    _check_installed()
    _log_to_terminal()
    from ..models.cloc.encoder import Encoder
    from ..models.cloc.evaluate import evaluate as measure
    from ..models.cloc.evaluate import table
    from ..models.cloc.sets import SetError

    sets = _evaluations(training, recipe)
    if not sets:
        raise RecipeError("train.evaluate: names no evaluation set")
    encoder = Encoder.open(checkpoint)
    path = Path(checkpoint)
    written = path / "eval.json" if path.is_dir() else path.with_suffix(".eval.json")
    _check_sets(sets, training)
    results: dict[str, Any] = {}
    for name, spec in sets.items():
        try:
            results |= measure(encoder, {name: spec}, storage_options=training.storage_options)
        except SetError as error:
            raise RecipeError(f"train.evaluate: {error}") from None
        written.write_text(json.dumps(results, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(results))
    console.print(f"results: {written}", highlight=False, soft_wrap=True)
    return 0


def _data(training: Training, recipe: Recipe | None) -> Data:
    """The data options with the shards named."""
    data = training.train.data
    shards = data.shards
    if shards is None and training.train.scenes is not None:
        shards = f"{_scenes(training)}/train"
    elif shards is None and recipe is not None:
        from .plan import make_plan

        shards = f"{training.store.rstrip('/')}/{make_plan(recipe).steps[-1].folder}"
    elif shards is None:
        raise RecipeError("train.data.shards: is missing (or `train.scenes`, or `dataset` and `steps` to make them)")
    return dataclasses.replace(data, shards=shards)


def _scenes(training: Training) -> str:
    """Draw the recipe's scenes where they are not there yet; the other ranks wait for the first."""
    from ..models.cloc.scene_shards import generate

    options, store = training.train.scenes, Store(training.store, training.storage_options)
    assert options is not None
    if not store.local:
        raise RecipeError("train.scenes: are drawn into a local store only")
    folder = Path(store.root) / "scenes" / _fingerprint(options)
    if _rank() == 0:
        try:
            with _drawing(options.train + options.test) as progress:
                generate(folder, options, progress)
        except ValueError as error:
            raise RecipeError(f"train.scenes: {error}") from None
    waited = 0
    while not all(_is_complete(folder / split / "index.json") for split in ("train", "test")):
        time.sleep(1)
        waited += 1
        if waited % 60 == 0:
            print(f"vesl: waits for the first process to draw {folder}, which all nodes must share", file=sys.stderr)
    return str(folder)


def _is_complete(index: Path) -> bool:
    try:
        return bool(json.loads(index.read_bytes())["complete"])
    except FileNotFoundError:
        return False


def _fingerprint(options: Scenes) -> str:
    return hashlib.sha256(json.dumps(dataclasses.asdict(options), sort_keys=True).encode()).hexdigest()[:12]


def _evaluations(training: Training, recipe: Recipe | None) -> Mapping[str, Evaluation]:
    """The evaluation sets; one without a place is the test scenes or, where there are none, the training shards."""
    found = {}
    for name, spec in training.train.evaluate.items():
        if not (spec.annotations or spec.images or spec.shards):
            scenes = training.train.scenes is not None
            shards = f"{_scenes(training)}/test" if scenes else _data(training, recipe).shards
            spec = dataclasses.replace(spec, shards=shards)
        found[name] = spec
    return found


def _check_abilities(sets: Mapping[str, Evaluation], options: Train) -> None:
    """Refuse sets that ask what the model will not be trained for. Raises RecipeError."""
    regions = options.objective.region_weight > 0
    for name, spec in sets.items():
        if spec.kind == "grounding" and not (regions and options.objective.grounding != "none"):
            raise RecipeError(f"train.evaluate.{name}: this objective trains no grounding; leave the set out")
        if spec.kind in ("regions", "retrieval") and spec.by == "prompter" and not regions:
            raise RecipeError(f"train.evaluate.{name}: a plain CLIP has no Prompter; give `by: roialign` or `by: crop`")


def _check_sets(sets: Mapping[str, Evaluation], training: Training) -> None:
    """Say now what is wrong with a set, and not after days of training. Raises RecipeError."""
    from ..models.cloc.sets import SetError, open_set

    try:
        for name, spec in sets.items():
            open_set(name, spec, training.storage_options)
    except SetError as error:
        raise RecipeError(f"train.evaluate: {error}") from None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


@contextmanager
def _drawing(total: int) -> Iterator[Callable[[int], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing scenes", total=total)
        yield lambda count: progress.advance(task, count)


def _log_to_terminal() -> None:
    from transformers.utils.logging import disable_progress_bar

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    if _rank() == 0:
        logging.getLogger("vesl").setLevel(logging.INFO)


def _check_installed() -> None:
    missing = [name for name in ("torch", "transformers", "tensorboard") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(f"the trainer needs {', '.join(missing)}: pip install 'vesl[train]'")
