"""`vesl calibrate`: what the stored scores are worth on a small labelled set, and the threshold for a wanted precision.

It reads what `ground` stored and opens no model. The other rules of the recipe's select step are applied as they are:
boxes that it would drop at any threshold say nothing about the threshold. What has to be recognised as the same phrase
or the same box is in transforms/calibration.py.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from rich.console import Console
from rich.table import Table

from ..transforms.boxes import area
from ..transforms.calibration import (
    Curve,
    Estimate,
    LabelledImage,
    Marks,
    choose,
    curve,
    match,
    parse_labels,
    thresholds,
)
from ..transforms.captions import visible
from ..transforms.filters import SelectRule, judge
from ..transforms.found import normalise
from .plan import Plan
from .recipe import RecipeError
from .takedown import NAMED_BY, obeyed
from .takedown import match as named
from .work import incoming

_WORDS = {"1 word": (0, 1), "2 words": (1, 2), "3 words": (2, 3), "4 words and more": (3, np.inf)}
_AREAS = {"below 1 % of the image": (-1, 0.01), "1 to 10 %": (0.01, 0.1), "above 10 %": (0.1, np.inf)}
_READERS, _AHEAD = 32, 256  # tables looked into at a time, and before any is read
_SHOWN = 12  # thresholds in the table
_FEW = 100  # images below which intervals near 1 are not what they say (30 of them, at 0.98: 9 of 10 hold the truth)
_NEED = ("sha256", "width", "height", "phrases", "detections")


@dataclass
class Gathered:
    """What the labels and the store say together; `images` have both."""

    detections: list[tuple[int, float, bool, int, float]] = field(default_factory=list)  # fields of Marks
    truths: list[tuple[int, float, bool, int, float]] = field(default_factory=list)
    images: int = 0
    labelled: int = 0
    unspoken: int = 0  # detections of phrases that the labels do not speak about
    unsure: int = 0  # detections of phrases that they speak about in part
    unasked: int = 0  # labelled boxes whose phrase was not asked for in their image

    def add(self, row: dict[str, Any], verdicts: Sequence[str], label: LabelledImage) -> None:
        """Match the detections of one image that pass the other rules."""
        phrases = [normalise(phrase["text"]) for phrase in row["phrases"]]
        found: dict[str, list[dict[str, Any]]] = {phrase: [] for phrase in phrases}
        for detection, verdict in zip(row["detections"], verdicts, strict=True):
            if verdict == "kept":
                found[phrases[detection["phrase"]]].append(detection)
        for phrase, detections in found.items():
            if phrase in label.unsure:
                self.unsure += len(detections)
            elif phrase not in label.truths:
                self.unspoken += len(detections)
            else:
                self._match(phrase, detections, label.truths[phrase])
        sure = label.truths.keys() - label.unsure
        self.unasked += sum(len(label.truths[phrase]) for phrase in sure - found.keys())
        self.images += 1

    def _match(self, phrase: str, detections: list[dict[str, Any]], truths: Sequence[tuple[float, ...]]) -> None:
        boxes = np.array([d["box"] for d in detections], np.float64).reshape(-1, 4)
        there = np.array(truths, np.float64).reshape(-1, 4)
        scores = np.array([d["score"] for d in detections], np.float32)
        taken, words = match(boxes, scores, there), len(phrase.split())
        best = np.full(len(there), -np.inf)
        best[taken[taken >= 0]] = scores[taken >= 0]
        for score, truth, size in zip(scores.tolist(), taken.tolist(), area(boxes).tolist(), strict=True):
            self.detections.append((self.images, score, truth >= 0, words, size))
        for score, size in zip(best.tolist(), area(there).tolist(), strict=True):
            self.truths.append((self.images, score, True, words, size))


def marks(rows: Sequence[tuple[int, float, bool, int, float]]) -> Marks:
    """Rows of Marks' fields as arrays."""
    columns = list(zip(*rows, strict=True)) or [()] * 5
    kinds = (np.int64, np.float32, np.bool_, np.int64, np.float64)
    return Marks(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


def read_labels(path: str) -> list[LabelledImage]:
    """Read the labels' file. Raises RecipeError, one line, for one that is none."""
    try:
        return parse_labels(json.loads(Path(path).read_bytes()))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or no labels
        what = f"is not JSON: {error}" if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) else error
        raise RecipeError(visible(f"{path}: {what}")) from None


def without_scores(rule: SelectRule) -> SelectRule:
    """The rule without whatever depends on thresholds or on a second model.

    What is left rejects a detection for its own sake or for a better one's, so that what it keeps above any threshold
    is what the whole rule with that threshold keeps.
    """
    return dataclasses.replace(
        rule, score=0.0, score_by_words=(), score_by_head={}, min_agreement=None, min_grounded=None
    )


def gather(plan: Plan, labels: Sequence[LabelledImage]) -> Gathered:
    """Find the labelled images among what is grounded, part by part. Raises RecipeError where there is none."""
    names = [step.name for step in plan.steps]
    select, takedown = plan.steps[names.index("select")], obeyed(plan.store)
    rule, job = without_scores(getattr(select.stage, "rule", SelectRule())), plan.job()
    by = {label.key or label.sha256 or "": label for label in labels}
    wanted, gathered = pa.array(by, pa.string()), Gathered(labelled=len(by))
    parts = sorted(plan.done["ground"].keys() & set(plan.parts))
    if not parts:
        raise RecipeError(f"store {plan.store.url}: ground has not done any part yet; `vesl run` does")
    for part in _having(plan, parts, wanted):
        needed = (*_NEED, *NAMED_BY) if takedown else _NEED
        rows = incoming(plan.store, job, names.index("ground") + 1, part, tuple(dict.fromkeys(needed))).rows
        rows = rows.filter(_either(rows, wanted))
        rows = rows.filter(pc.invert(named(rows, takedown))) if takedown else rows
        detections, widths, heights, phrases = (
            rows[name].combine_chunks() for name in ("detections", "width", "height", "phrases")
        )
        verdicts = judge(detections, widths, heights, rule, phrases=phrases).to_pylist()
        for row, given in zip(rows.to_pylist(), verdicts, strict=True):
            label = by.pop(row["key"], None) or by.pop(row["sha256"], None)
            if label is not None:  # else a copy of an image that was met before, or one that is labelled twice
                gathered.add(row, given, label)
        if not by:
            break
    if not gathered.images:
        raise RecipeError(f"none of the {gathered.labelled} labelled images is in the store with its detections")
    return gathered


def _having(plan: Plan, parts: Sequence[int], wanted: pa.Array) -> Iterator[int]:
    """The parts that have any of these keys or sha256, in order."""

    def find(part: int) -> bool:
        there = plan.store.read_table(plan.steps[0].table(part), ["key", "sha256"])
        return pc.any(_either(there, wanted)).as_py() or False

    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(parts), _AHEAD):  # not all at once: the first ones may do
            some = parts[first : first + _AHEAD]
            yield from (part for part, found in zip(some, pool.map(find, some), strict=True) if found)


def _either(rows: pa.Table, wanted: pa.Array) -> pa.ChunkedArray:
    return pc.or_(pc.is_in(rows["key"], wanted), pc.is_in(rows["sha256"], wanted))


def calibrate(plan: Plan, path: str, wanted: float, out: str | None, console: Console) -> None:
    """Print what the scores are worth and the threshold for the precision `wanted`; draw it into `out`.

    Raises RecipeError, one line, for labels or arguments that cannot be used.
    """
    if not 0 < wanted < 1:
        raise RecipeError(f"--precision {wanted}: must be between 0 and 1")
    gathered = gather(plan, read_labels(path))
    detections, truths, images = marks(gathered.detections), marks(gathered.truths), gathered.images
    _print_counts(gathered, console)
    if not gathered.detections:
        raise RecipeError(f"{path}: no stored detection is of a phrase that the labels speak about")
    at = thresholds(detections.score)
    whole = curve(detections, truths, images, at)
    _print_curve(whole, console)
    score = choose(detections, images, at, wanted)
    groups: dict[str, tuple[Curve, float | None]] = {}
    for name, limits in (_WORDS | _AREAS).items():
        some, theirs = (_within(m, "words" if name in _WORDS else "area", limits) for m in (detections, truths))
        steps = thresholds(some.score)
        groups[name] = curve(some, theirs, images, steps), choose(some, images, steps, wanted)
    _print_groups({"all": (whole, score), **groups}, wanted, console)
    _print_recipe(plan, score, [groups[name][1] for name in _WORDS], wanted, console)
    if out is not None:
        _draw(out, whole, score, groups, wanted)
        console.print(out, markup=False, highlight=False, soft_wrap=True)


def _within(of: Marks, what: str, limits: tuple[float, float]) -> Marks:
    values = getattr(of, what)
    return of.where((values > limits[0]) & (values <= limits[1]))


def _print_counts(g: Gathered, console: Console) -> None:
    lines = [
        f"{g.images} of {g.labelled} labelled images are in the store with their detections",
        f"{len(g.detections)} detections of phrases that their labels speak about, {len(g.truths)} labelled boxes",
        f"left out: {g.unspoken} detections of phrases that the labels do not speak about, {g.unsure} of phrases "
        f"labelled in part, {g.unasked} labelled boxes whose phrase was not asked for",
    ]
    if g.images < _FEW:
        lines.append(f"fewer than {_FEW} images: intervals near 1 are too narrow, as few images hold all the errors")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _text(estimate: Estimate, i: int) -> str:
    value = estimate.value[i]
    return "" if np.isnan(value) else f"{value:.3f} ({estimate.low[i]:.3f} to {estimate.high[i]:.3f})"


def _print_curve(whole: Curve, console: Console) -> None:
    table = Table("score above", "detections", "precision (95 %)", "recall (95 %)", box=None)
    for i in np.unique(np.linspace(0, len(whole.at) - 1, _SHOWN).round().astype(int)):
        row = (f"{whole.at[i]:g}", str(whole.detections[i]), _text(whole.precision, i), _text(whole.recall, i))
        table.add_row(*row)
    console.print(table)


def _print_groups(groups: dict[str, tuple[Curve, float | None]], wanted: float, console: Console) -> None:
    table = Table("detections", "stored", f"threshold for {wanted:g}", "precision (95 %)", "recall (95 %)", box=None)
    for name, (found, score) in groups.items():
        cells = ["none is sure", "", ""]
        if score is not None:
            i = int(np.flatnonzero(found.at == score)[0])
            cells = [f"{score:g}", _text(found.precision, i), _text(found.recall, i)]
        table.add_row(name, str(found.detections[0]), *cells)
    console.print(table)


def _print_recipe(
    plan: Plan, score: float | None, by_words: list[float | None], wanted: float, console: Console
) -> None:
    if score is None:
        console.print(
            f"no threshold is sure to give a precision of {wanted:g}: label more, or want less", highlight=False
        )
        return
    model = next(getattr(step.stage, "model", "") for step in plan.steps if step.name == "ground")
    lines = [f"# {model}: with 95 % confidence, {wanted:g} of what passes is right, in images like the labelled ones"]
    before = next(b for b, step in zip(plan.steps, plan.steps[1:], strict=False) if step.name == "select")
    select = {"rule": {"score": score}, "scores_of": before.fingerprint}  # a chain with other scores is refused then
    lines += yaml.safe_dump({"steps": {"select": select}}, sort_keys=False).splitlines()
    if None not in by_words:
        lines += ["# or a threshold for phrases of 1, 2, 3, 4 and more words, each with that confidence for itself:"]
        lines += [f"#     score_by_words: {by_words}"]
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def _draw(
    out: str, whole: Curve, score: float | None, groups: dict[str, tuple[Curve, float | None]], wanted: float
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2)
    for name, estimate, colour in (("precision", whole.precision, "C0"), ("recall", whole.recall, "C1")):
        panels[0, 0].plot(whole.at, estimate.value, color=colour, label=name)
        panels[0, 0].fill_between(whole.at, estimate.low, estimate.high, color=colour, alpha=0.2, linewidth=0)
    if score is not None:
        panels[0, 0].axvline(score, color="black", linestyle=":", label=f"threshold {score:g}")
    panels[0, 0].set(title="All detections, with 95 % intervals", xlabel="score above", ylabel="share")
    panels[0, 1].plot(whole.recall.value, whole.precision.value, color="C2", marker=".")
    panels[0, 1].set(title="Precision over recall", xlabel="recall", ylabel="precision")
    for panel, names, title in ((panels[1, 0], _WORDS, "phrase length"), (panels[1, 1], _AREAS, "box size")):
        for name in names:
            found = groups[name][0]
            (line,) = panel.plot(found.at, found.precision.value, label=f"{name} ({found.detections[0]})")
            panel.fill_between(
                found.at, found.precision.low, found.precision.high, color=line.get_color(), alpha=0.12, linewidth=0
            )
        panel.set(title=f"Precision by {title}", xlabel="score above", ylabel="precision")
    for panel in panels.flat:
        panel.set_ylim(0, 1.02)
        panel.axhline(wanted, color="grey", linewidth=0.8) if panel is not panels[0, 1] else None
        panel.grid(alpha=0.3)
        if panel is not panels[0, 1]:
            panel.legend()
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        raise RecipeError(f"--out {out}: {error}") from None
