"""A recipe: one YAML file that says what to do, read into the frozen dataclasses that live beside the code they steer.

Every mistake ends as one RecipeError with the file, the key and the nearest valid key.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..models.cloc.options import Train
from ..models.contract import ModelError
from .engines import Engine
from .steps.caption import Caption
from .steps.dedup import Dedup
from .steps.download import Download
from .steps.ground import Ground
from .steps.pack import Pack
from .steps.phrases import Phrases
from .steps.score import Score
from .steps.select import Select

T = TypeVar("T")


class RecipeError(Exception):
    """A mistake in a recipe: one line that says where and what to do. Exit code 2."""


@dataclass(frozen=True)
class Dataset:
    """What goes in: lists of URLs (Parquet, CSV, TSV, JSONL, also gzipped) and archives of images, by path or glob."""

    name: str
    source: tuple[str, ...]
    url_column: str | None = None  # without it, the known spellings of both are found (see `lists`)
    caption_column: str | None = None
    sha256_column: str | None = None  # of what the images, as downloaded, should be
    md5_column: str | None = None
    phash_column: str | None = None
    rows_per_part: int = 5000  # of lists; an archive is one part
    only_parts: str | None = None  # such as 0-3 or 0,4,7: a smoke run on a sample


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The options of each step, in the order of the chain. `use: <fingerprint>` in a step adopts an earlier result."""

    download: Download = field(default_factory=Download)
    dedup: Dedup | None = None  # optional: `dedup: {}` adds it
    caption: Caption
    phrases: Phrases = field(default_factory=Phrases)
    ground: Ground
    score: Score | None = None
    select: Select = field(default_factory=Select)
    pack: Pack = field(default_factory=Pack)


@dataclass(frozen=True)
class Limits:
    """Shares of failed rows per step over which a run ends with exit code 3. Half of the web's links are dead."""

    failed_fraction: float = 0.05
    download_failed_fraction: float = 0.9


@dataclass(frozen=True)
class Prices:
    """What `vesl plan` reckons with: of an hour of one CPU core and of one GPU, and of a GB (1e9 bytes) for a month."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    storage_gb_month: float = 0.0
    unit: str = ""  # such as USD
    images: int | None = None  # input rows of another data set that `vesl plan` shows beside this one's


@dataclass(frozen=True)
class Recipe:
    """One run's configuration. `storage_options` go to fsspec for the store and the source, and nowhere else."""

    dataset: Dataset
    store: str
    steps: Steps
    limits: Limits = Limits()
    prices: Prices = Prices()
    engine: Engine = field(default_factory=Engine)
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    use: Mapping[str, str] = field(default_factory=dict)  # from `steps.<name>.use`


@dataclass(frozen=True)
class Training:
    """What `vesl train` and `vesl eval` read of a recipe; one that only trains has no more than this."""

    store: str
    train: Train
    storage_options: Mapping[str, Any] = field(default_factory=dict)


def load_training(path: str, overrides: Sequence[str] = ()) -> tuple[Training, Recipe | None]:
    """Read a recipe for the trainer; also the whole recipe, where it makes shards itself. Raises RecipeError."""
    document = _document(path, overrides)
    if "dataset" in document or "steps" in document:
        recipe = load(path, overrides)
        return Training(recipe.store, recipe.train, recipe.storage_options), recipe
    training = _build(Training, document, path, "")
    if not training.store:
        raise RecipeError(f"{path}: store: is empty")
    return training, None


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and what it inherits by `base:`, apply `a.b=c` overrides, check everything.

    Raises RecipeError.
    """
    document = _document(path, overrides)
    use: dict[str, str] = {}
    steps = document.get("steps")
    for name, options in (steps or {}).items() if isinstance(steps, dict) else ():
        if isinstance(options, dict) and "use" in options:
            use[name] = str(options.pop("use"))
    if isinstance(dataset := document.get("dataset"), dict) and isinstance(dataset.get("source"), str):
        dataset["source"] = [dataset["source"]]
    if "use" in document:
        raise RecipeError(f"{path}: use: unknown key; it belongs into a step, as in steps.caption.use")
    recipe = _build(Recipe, document, path, "")
    _check(recipe, path)
    return dataclasses.replace(recipe, use=use)


def _document(path: str, overrides: Sequence[str]) -> dict[str, Any]:
    document = _read(Path(path), ())
    for override in overrides:
        _override(document, override)
    return document


def _check(recipe: Recipe, path: str) -> None:
    _check_engine(recipe.engine, path)
    if (rows := recipe.dataset.rows_per_part) < 1:
        raise RecipeError(f"{path}: dataset.rows_per_part: {rows} is not a positive number")
    for name, share in dataclasses.asdict(recipe.limits).items():
        if not 0 <= share <= 1:
            raise RecipeError(f"{path}: limits.{name}: {share} is not a share between 0 and 1")
    for name in ("cpu_hour", "gpu_hour", "storage_gb_month", "images"):
        if (price := getattr(recipe.prices, name)) is not None and price < 0:
            raise RecipeError(f"{path}: prices.{name}: {price} is negative")
    for where, text in {"dataset.name": recipe.dataset.name, "store": recipe.store}.items():
        if not text:
            raise RecipeError(f"{path}: {where}: is empty")
    if recipe.steps.select.rule.min_agreement is not None and recipe.steps.score is None:
        raise RecipeError(f"{path}: steps.select.rule.min_agreement: needs the step `score`, which the recipe has not")
    if not recipe.dataset.source:
        raise RecipeError(f"{path}: dataset.source: names no file")
    only_parts(recipe, 0, path)


def _check_engine(engine: Engine, path: str) -> None:
    counts = {"engine.workers": engine.workers}
    for limit in ("part_time_limit_s", "silence_limit_s"):
        if (seconds := getattr(engine, limit)) is not None and seconds <= 0:
            raise RecipeError(f"{path}: engine.{limit}: {seconds} is not a positive number")
    for step in dataclasses.fields(Steps):
        resources = getattr(engine, step.name)
        for name in ("workers", "min_workers", "batch", "threads"):
            counts[f"engine.{step.name}.{name}"] = getattr(resources, name)
        for name in ("cpus", "gpus"):
            if (getattr(resources, name) or 0) < 0:
                raise RecipeError(f"{path}: engine.{step.name}.{name}: {getattr(resources, name)} is negative")
    for where, count in counts.items():
        if count is not None and count < 1:
            raise RecipeError(f"{path}: {where}: {count} is not a positive number")


def only_parts(recipe: Recipe, count: int, path: str = "recipe") -> list[int] | None:
    """Those of `count` parts that `dataset.only_parts` admits, in order, or None for all. Raises RecipeError."""
    text = recipe.dataset.only_parts
    if text is None:
        return None
    chosen: set[int] = set()
    try:
        for piece in text.split(","):
            first, dash, last = piece.partition("-")
            start, end = int(first), int(last if dash else first)
            if end < start:
                raise ValueError
            chosen |= set(range(start, min(end + 1, count)))
    except ValueError:
        raise RecipeError(f"{path}: dataset.only_parts: {text!r} is not like 0-3 or 0,4,7") from None
    return sorted(chosen)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                line = node.value[i][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice (line {line})")
        return super().construct_mapping(node, deep)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise RecipeError(f"{path}: base: inherits from itself")
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a safe loader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: {' '.join(str(getattr(error, 'problem', None) or error).split())}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: is not a mapping of keys to values")
    base = document.pop("base", None)
    if base is None:
        return document
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base: expected the path of another recipe, found {base!r}")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), document)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(document: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    if not equals or not all(name.split(".")):
        raise RecipeError(f"--set {text}: expected a.b=value")
    *folders, last = name.split(".")
    for part in folders:
        if document.get(part) is None:
            document[part] = {}
        document = document[part]
        if not isinstance(document, dict):
            raise RecipeError(f"--set {text}: {part} is not a block")
    try:
        document[last] = yaml.load(value, _Loader)  # noqa: S506  (a safe loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"--set {text}: the value is not valid YAML") from None


def _build(kind: type[T], value: Any, path: str, where: str) -> T:
    """Make a dataclass from a mapping, checking every key and type on the way down."""
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {where or 'recipe'}: expected a block of keys, found {value!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init and not (kind is Recipe and f.name == "use")}  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(fields)}"
            raise RecipeError(f"{path}: {prefix}{key}: unknown key; {hint}")
    arguments = {key: _convert(hints[key], item, path, prefix + key) for key, item in value.items()}
    for name, f in fields.items():
        if name in arguments:
            continue
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{path}: {prefix}{name}: is missing")
    # A block that is given in part keeps the other defaults of its place, not those of its type.
    for name, item in value.items():
        default = fields[name].default
        if dataclasses.is_dataclass(default) and isinstance(item, dict):
            given = {key: getattr(arguments[name], key) for key in item}
            arguments[name] = dataclasses.replace(default, **given)  # type: ignore[type-var]
    try:
        return kind(**arguments)
    except (ValueError, ModelError) as error:  # a stage's own checks
        raise RecipeError(f"{path}: {where}.{error}") from None


def _convert(hint: Any, value: Any, path: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, path, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise RecipeError(f"{path}: {where}: {value!r} is not one of {', '.join(map(str, arguments))}")
    if origin is tuple:
        if isinstance(value, list):
            return tuple(_convert(arguments[0], item, path, f"{where}[{i}]") for i, item in enumerate(value))
        raise RecipeError(f"{path}: {where}: expected a list, found {value!r}")
    if origin in (dict, Mapping):
        if isinstance(value, dict):
            if dataclasses.is_dataclass(arguments[1]):
                return {str(k): _convert(arguments[1], v, path, f"{where}.{k}") for k, v in value.items()}
            return value
        raise RecipeError(f"{path}: {where}: expected a block of keys, found {value!r}")
    return _plain(hint, value, path, where)


def _plain(hint: Any, value: Any, path: str, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is str and type(value) is int and where == "dataset.only_parts":  # `only_parts: 3` is a number in YAML
        return str(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise RecipeError(f"{path}: {where}: expected {_WORDS.get(hint, hint)}, found {value!r}")
    return value


_WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}
