"""The evaluation of a model: five kinds of sets, each measured by one frozen definition (paper: appendix B).

Common to all: values are fractions in 0..1, never rounded. A score is the cosine; a tie counts against the model (see
metrics.ranks). Texts that differ in case and white space only are one text and go to the encoder in the first spelling
seen. Images are decoded as they lie in the file: EXIF orientation is not applied, because boxes are annotated in raw
pixels (and the usual evaluations of the other kinds do not apply it either). Every value has a 95 % bootstrap interval
over images (metrics.estimate). What cannot be used is left out and counted under a reason of SKIPPED.

regions: boxes to names. Annotations: classes are all `categories` of the file, also those without a region; `_` in a
    name is a space; categories of one name are one class. Shards: classes are the phrases of the set's regions. A
    region is right if no other class scores as high as its own. `top1`: share of regions that are right; `macc`: that
    share within each class, averaged over the classes that occur. `_templates`: a class's vector is the mean of its
    unit vectors under each template, renormalised; without the suffix it is that of the bare name.
retrieval: regions to texts and back. The candidates are all regions, and all different texts, of the set's images.
    `r2t_k`: share of regions with one of their texts at rank k or better. `t2r_k`: share of (region, text) pairs whose
    text finds one of the regions that have this text at rank k or better; a text that several regions have is so
    asked once and counted for each.
grounding: texts to boxes. Every different text of an image is asked once. `acc50`: share whose predicted box, clipped
    to the image, has an IoU of at least 0.5 with any of the boxes that have the text in that image; `miou`: mean of the
    largest such IoU.
zeroshot: images to class names. `top1`, `top5`: share of images whose class has that rank or better; `macc`: top1
    within each class, averaged over the classes that occur; `_templates` as above. Classes of one name are one class.
pairs: images to captions and back. `i2t_k`: share of images with one of their captions at rank k or better among all
    different captions; `t2i_k`: share of (image, caption) pairs whose caption finds an image that has it.
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from ...transforms.outcomes import Drop
from ..contract import ModelError
from . import metrics
from .options import Evaluation
from .sets import Labels, Picture, SetError, Source, open_set, say

if TYPE_CHECKING:
    from rich.table import Table

Rows = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # name of the set, images done, images in all

BATCH = 32  # images at a time
TEXTS = 256  # texts at a time
_THREADS = 4


class Encoder(Protocol):
    """The model as the evaluation sees it: RGB images, boxes x0, y0, x1, y1 in 0..1 of the image, unit rows of D."""

    by: str  # what makes a box a feature; set to each set's own (Evaluation.by)

    def encode_image(self, images: Sequence[Image.Image]) -> Rows:
        """Return float32 [n, D]."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Rows:
        """Return float32 [t, D]."""
        ...

    def encode_regions(self, images: Sequence[Image.Image], boxes: Sequence[Rows]) -> list[Rows]:
        """Take float32 [r_i, 4] of each image; return float32 [r_i, D]."""
        ...

    def ground(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Rows]:
        """Return a box for each text of each image, float32 [t_i, 4]."""
        ...


def evaluate(
    encoder: Encoder,
    sets: Mapping[str, Evaluation],
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on every set: {set: {"kind", "metrics": {name: {"value", "low", "high"}}, "counts", "skipped"}}.

    JSON-able. `seed` is that of the bootstrap. All sets are read before the first image is encoded. Raises SetError for
    a set that cannot be read or has nothing to evaluate, ModelError where the encoder's answers have a wrong shape.
    """
    sources = {name: open_set(name, spec, storage_options or {}) for name, spec in sets.items()}
    return {name: _run(encoder, name, sets[name], sources[name], progress, seed) for name in sets}


def table(results: Mapping[str, Any]) -> "Table":
    """The results for a terminal, in per cent."""
    from rich.markup import escape
    from rich.table import Table

    shown = Table("set", "kind", "metric")
    for title in ("%", "95 % interval", "images", "skipped"):
        shown.add_column(title, justify="right")
    for name, result in results.items():
        first, last = [escape(name), result["kind"]], [result["counts"]["images"], sum(result["skipped"].values())]
        for metric, x in result["metrics"].items():
            value, low, high = (f"{100 * x[key]:.1f}" for key in ("value", "low", "high"))
            shown.add_row(*first, metric, value, f"{low} to {high}", *map(str, last))
            first, last = ["", ""], []
        shown.add_section()
    return shown


# ---- running ----


def _run(
    encoder: Encoder, name: str, spec: Evaluation, source: Source, progress: Progress | None, seed: int
) -> dict[str, Any]:
    encoder.by = spec.by
    skipped, labels, answers, done = source.skipped.copy(), list[Labels](), list[Rows](), 0
    with closing(_batches(source.pictures)) as batches:
        for batch in batches:
            images = []
            for loaded in batch:
                if isinstance(loaded, Drop):
                    skipped[loaded.reason] += 1
                    continue
                skipped.update(loaded[1].notes)
                if loaded[1].texts:
                    images.append(loaded[0])
                    labels.append(loaded[1])
                else:
                    skipped["unlabelled"] += 1
            if images:
                answers += _ask(encoder, spec.kind, images, labels[-len(images) :])
            done += len(batch)
            if progress:
                progress(name, done, len(source.pictures))
    clipped = skipped.pop("clipped", 0)
    if not labels:
        raise SetError(f"{name}: nothing is left to evaluate ({say(skipped)}): check its paths and its kind")
    found, counts = _MEASURES[spec.kind](encoder, spec, source.classes, labels, answers, seed)
    counts = {"images": len(labels), **counts, **({"clipped_boxes": clipped} if clipped else {})}
    return {"kind": spec.kind, "metrics": found, "counts": counts, "skipped": dict(sorted((+skipped).items()))}


Batch = list[tuple[Image.Image, Labels] | Drop]


def _try(picture: Picture) -> tuple[Image.Image, Labels] | Drop:
    try:
        return picture()
    except Drop as drop:
        return drop


def _batches(pictures: Sequence[Picture]) -> Generator[Batch]:
    """Batches in order; the next one is decoded in threads while the caller computes."""

    pool, ahead = ThreadPoolExecutor(_THREADS, "evaluate"), deque[list[Future[tuple[Image.Image, Labels] | Drop]]]()
    try:
        for start in range(0, len(pictures), BATCH):
            ahead.append([pool.submit(_try, picture) for picture in pictures[start : start + BATCH]])
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        for batch in ahead:
            yield [future.result() for future in batch]
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(encoder: Encoder, kind: str, images: list[Image.Image], labels: list[Labels]) -> list[Rows]:
    """One array for each image: features of its regions or of itself [1, D], or the boxes of its different texts."""
    if kind == "grounding":
        answers = encoder.ground(images, [_phrases(label)[0] for label in labels])
        return _shaped(answers, [len(_phrases(label)[0]) for label in labels], "ground", 4)
    if kind in ("regions", "retrieval"):
        boxes = [label.boxes.astype(np.float32) for label in labels]
        return _shaped(encoder.encode_regions(images, boxes), [len(box) for box in boxes], "encode_regions")
    rows = _shaped([encoder.encode_image(images)], [len(images)], "encode_image")[0]
    return list(rows[:, None])


def _shaped(answers: Sequence[npt.ArrayLike], lengths: list[int], what: str, width: int | None = None) -> list[Rows]:
    arrays = [np.asarray(answer, np.float32) for answer in answers]
    if [a.shape[:1] for a in arrays] != [(n,) for n in lengths] or any(a.ndim != 2 for a in arrays):
        shapes = ", ".join(str(a.shape) for a in arrays[:3])
        raise ModelError(
            f"{what} answers with {len(arrays)} arrays ({shapes}, ...) where rows {lengths[:3]}... are due"
        )
    widths = {a.shape[1] for a in arrays}
    if len(widths | ({width} if width else set())) > 1:
        raise ModelError(f"{what} answers with rows of {sorted(widths)} numbers where {width or 'one number'} is due")
    return arrays


def _phrases(labels: Labels) -> tuple[list[str], metrics.Ints]:
    return metrics.distinct(text for _, text in labels.texts)


# ---- measuring: each returns its metrics and counts ----

Measured = tuple[dict[str, dict[str, float]], dict[str, int]]


def _encode(encoder: Encoder, texts: Sequence[str], width: int) -> Rows:
    rows = []
    for start in range(0, len(texts), TEXTS):
        part = texts[start : start + TEXTS]
        rows += _shaped([encoder.encode_text(part)], [len(part)], "encode_text", width)
    return metrics.unit(np.concatenate(rows))


def _rows(labels: Sequence[Labels], answers: Sequence[Rows]) -> tuple[Rows, metrics.Ints, metrics.Ints, list[str]]:
    """All features [R, D]; and of every (box, text) pair the row [P], the image [P] and the text."""
    counts = np.array([len(answer) for answer in answers])
    starts = np.cumsum(counts) - counts
    row = np.array([start + box for start, label in zip(starts, labels, strict=True) for box, _ in label.texts])
    image = np.repeat(np.arange(len(labels)), [len(label.texts) for label in labels])
    return metrics.unit(np.concatenate(answers)), row, image, [text for label in labels for _, text in label.texts]


def _recognise(
    encoder: Encoder, spec: Evaluation, classes: Sequence[str], labels: list[Labels], answers: list[Rows], seed: int
) -> Measured:
    features, row, image, texts = _rows(labels, answers)
    names, place = metrics.distinct([*classes, *texts])
    truth = place[len(classes) :]
    width = features.shape[1]
    versions = {"": _encode(encoder, names, width)}
    if spec.templates:
        filled = [_encode(encoder, [t.replace("{}", name) for name in names], width) for t in spec.templates]
        versions["_templates"] = metrics.unit(np.mean(filled, axis=0))
    found: dict[str, dict[str, float]] = {}
    for suffix, vectors in versions.items():
        rank = metrics.ranks(features, vectors, row, truth)
        scores = [rank <= 1, rank <= 5] if spec.kind == "zeroshot" else [rank <= 1]
        for k, value in zip((1, 5), metrics.estimate(scores, image, seed=seed), strict=False):
            found[f"top{k}{suffix}"] = value
        found[f"macc{suffix}"] = metrics.estimate(scores[:1], image, truth, seed)[0]
    counts = {"regions": len(features)} if spec.kind == "regions" else {}
    return found, {**counts, "classes": len(names), "classes_seen": len(np.unique(truth))}


def _retrieve(
    encoder: Encoder, spec: Evaluation, classes: Sequence[str], labels: list[Labels], answers: list[Rows], seed: int
) -> Measured:
    features, row, image, texts = _rows(labels, answers)
    names, text = metrics.distinct(texts)
    _, once = np.unique(row * len(names) + text, return_index=True)  # an image may have a caption twice
    row, text, image = row[once], text[once], image[once]
    vectors = _encode(encoder, names, features.shape[1])
    there = metrics.ranks(features, vectors, row, text)
    back = metrics.ranks(vectors, features, text, row)[text]
    of_row = image[np.unique(row, return_index=True)[1]]
    a, b = ("i", "t") if spec.kind == "pairs" else ("r", "t")
    found: dict[str, dict[str, float]] = {}
    for way, rank, where in ((f"{a}2{b}", there, of_row), (f"{b}2{a}", back, image)):
        values = metrics.estimate([rank <= k for k in (1, 5, 10)], where, seed=seed)
        found |= {f"{way}_{k}": value for k, value in zip((1, 5, 10), values, strict=True)}
    counts = {"regions": len(features)} if spec.kind == "retrieval" else {}
    return found, {**counts, "texts": len(names), "pairs": len(row)}


def _ground(
    encoder: Encoder, spec: Evaluation, classes: Sequence[str], labels: list[Labels], answers: list[Rows], seed: int
) -> Measured:
    counts = [len(answer) for answer in answers]
    starts = np.cumsum(counts) - counts
    owner = np.concatenate([start + _phrases(label)[1] for start, label in zip(starts, labels, strict=True)])
    boxes = np.concatenate([label.boxes[[box for box, _ in label.texts]] for label in labels])
    best = metrics.best_iou(np.concatenate(answers), boxes, owner)
    image = np.repeat(np.arange(len(labels)), counts)
    acc50, miou = metrics.estimate([best >= 0.5, best], image, seed=seed)
    return {"acc50": acc50, "miou": miou}, {"phrases": len(best), "boxes": len(boxes)}


_MEASURES = {
    "regions": _recognise,
    "zeroshot": _recognise,
    "retrieval": _retrieve,
    "pairs": _retrieve,
    "grounding": _ground,
}
