"""What a detector's score is worth: precision and recall over the threshold, from a small labelled set of images.

The labels are COCO's JSON, read strictly; detections are matched to them once, and everything after that is counts per
image. Detections of one image err together, so intervals are of clustered data, the image being the cluster.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from .boxes import clip, from_pixels, iou, valid
from .found import normalise
from .urls import KEY_DIGITS, keys

Floats = npt.NDArray[np.floating[Any]]
Float64 = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

IOU = 0.5  # from which on a box is the labelled one
_SLACK_PX = 1.0  # by which a labelled box may leave its image: annotation tools round
_STEPS = 60  # thresholds on a curve
_STARTS = (2, 4, 8, 16)  # of the search for a threshold: where one detection in so many is above it
_URLS = ("url", "coco_url", "flickr_url")


@dataclass
class LabelledImage:
    """One image of the labels: how the store knows it, and what is said of which phrase.

    truths: phrase -> boxes x0, y0, x1, y1 in 0..1, none where the phrase is said to be absent. unsure: phrases with
    crowds or said to be labelled in part, which neither praise nor blame a detector. Phrases are as `normalise` has
    them; of any other, nothing is said.
    """

    key: str | None
    sha256: str | None
    truths: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)


def parse_labels(document: Any) -> list[LabelledImage]:
    """Read a COCO instances document. Raises ValueError, saying where and what, for anything that is not one.

    An image is known to the store by the first of: `key`, `sha256`, a `file_name` that is one of these before its
    extension, `url` (or COCO's `coco_url`, `flickr_url`). `width` and `height` are those that its boxes are pixels of;
    they need not be the stored image's. `bbox` is x, y, width, height. A phrase is the annotation's `phrase`, also
    within `attributes` (where CVAT keeps it), or its category's name. `negatives` of an image lists phrases that are
    absent; LVIS's `neg_category_ids` and `not_exhaustive_category_ids` are understood.
    """
    if not isinstance(document, dict):
        raise ValueError("is not a COCO document, which is an object with images, annotations and categories")
    lists = {name: document.get(name, []) for name in ("images", "annotations", "categories")}
    for name, rows in lists.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{name}: is not a list of objects")
    if not lists["images"]:
        raise ValueError("images: there are none")
    names = _categories(lists["categories"])
    images: dict[Any, tuple[LabelledImage, tuple[float, float]]] = {}
    for i, row in enumerate(lists["images"]):
        where = f"images[{i}]"
        if not isinstance(row.get("id"), int | str) or row["id"] in images:
            raise ValueError(f"{where}: needs an `id` that no other has, not {row.get('id')!r:.60}")
        image = LabelledImage(*_identity(row, where))
        for phrase in _phrases(row, where, "negatives") + _names(row, where, "neg_category_ids", names):
            image.truths.setdefault(phrase, [])
        image.unsure.update(_names(row, where, "not_exhaustive_category_ids", names))
        images[row["id"]] = image, (_side(row, where, "width"), _side(row, where, "height"))
    for i, row in enumerate(lists["annotations"]):
        _annotate(row, f"annotations[{i}]", images, names)
    [(most, times)] = Counter(image.key or image.sha256 for image, _ in images.values()).most_common(1)
    if times > 1:
        raise ValueError(f"images: {most} is there {times} times")
    if not any(image.truths for image, _ in images.values()):
        raise ValueError("there are no annotations and no negatives")
    return [image for image, _ in images.values()]


def _categories(rows: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    for i, row in enumerate(rows):
        if not isinstance(row.get("name"), str) or not isinstance(row.get("id"), int):
            raise ValueError(f"categories[{i}]: needs a number `id` and a text `name`")
    return {row["id"]: row["name"] for row in rows}


def _annotate(row: Any, where: str, images: Mapping[Any, Any], names: Mapping[int, str]) -> None:
    found = images.get(row["image_id"]) if isinstance(row.get("image_id"), int | str) else None
    if found is None:
        raise ValueError(f"{where}: there is no image {row.get('image_id')!r:.60}")
    image, (width, height) = found
    attributes = row.get("attributes")
    inner = attributes.get("phrase") if isinstance(attributes, dict) else None
    category = row.get("category_id")
    phrase = row.get("phrase") or inner or (names.get(category) if isinstance(category, int) else None)
    if not isinstance(phrase, str) or not normalise(phrase):
        raise ValueError(f"{where}: has no `phrase`, and no category gives it one")
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(v) for v in box):
        raise ValueError(f"{where}: `bbox` is not x, y, width, height")
    x, y, w, h = map(float, box)
    pixels = np.array([[x, y, x + w, y + h]])
    inside = clip(pixels, width, height)
    if not valid(inside).all() or np.abs(pixels - inside).max() > _SLACK_PX:
        raise ValueError(f"{where}: the box {box} is not within its image of {width:g} x {height:g} pixels")
    phrase = normalise(phrase)
    image.truths.setdefault(phrase, []).append(tuple(from_pixels(inside, width, height)[0].tolist()))
    if row.get("iscrowd"):
        image.unsure.add(phrase)


def _identity(row: Mapping[str, Any], where: str) -> tuple[str | None, str | None]:
    stem = str(row.get("file_name", "")).replace("\\", "/").rpartition("/")[2].partition(".")[0].lower()
    for name, digits in (("key", KEY_DIGITS), ("sha256", 64), ("", KEY_DIGITS), ("", 64)):
        text = row.get(name) if name else stem
        if isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text.lower()):
            return (text.lower(), None) if digits == KEY_DIGITS else (None, text.lower())
        if name in row:
            raise ValueError(f"{where}: `{name}` is not {digits} hex digits: {text!r:.80}")
    url = next((row[name] for name in _URLS if isinstance(row.get(name), str) and row[name]), None)
    if url is None:
        raise ValueError(f"{where}: has no `key`, `sha256`, `url` and no `file_name` such as KEY.jpg")
    return keys([url])[1][0], None


def _phrases(row: Mapping[str, Any], where: str, name: str) -> list[str]:
    given = row.get(name, [])
    if not isinstance(given, list) or not all(isinstance(phrase, str) and normalise(phrase) for phrase in given):
        raise ValueError(f"{where}: `{name}` is not a list of phrases")
    return [normalise(phrase) for phrase in given]


def _names(row: Mapping[str, Any], where: str, name: str, names: Mapping[int, str]) -> list[str]:
    given = row.get(name, [])
    if not isinstance(given, list) or not all(isinstance(number, int) and number in names for number in given):
        raise ValueError(f"{where}: `{name}` is not a list of ids of categories")
    return [normalise(names[number]) for number in given]


def _side(row: Mapping[str, Any], where: str, name: str) -> float:
    value = row.get(name)
    if not _is_number(value) or not 0 < float(value) < 1e9:  # type: ignore[arg-type]
        raise ValueError(f"{where}: `{name}` is not a number of pixels: {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e12


def match(boxes: Floats, scores: Floats, truths: Floats) -> npt.NDArray[np.int64]:
    """Give each detection of one phrase in one image its truth: the index in `truths`, or -1; int64 [n].

    boxes [n, 4], scores [n], truths [k, 4]. In falling score (equal: as stored) a detection takes the truth that it
    overlaps most of those still free, from an IoU of 0.5 on. So a detection's truth depends on none with a lower score,
    and one matching serves every threshold.
    """
    overlap = iou(boxes, truths)
    taken = np.full(len(boxes), -1, np.int64)
    for i in np.argsort(-scores, kind="stable") if len(truths) else ():
        best = int(np.argmax(overlap[i]))
        if overlap[i, best] >= IOU:
            taken[i] = best
            overlap[:, best] = -1.0
    return taken


@dataclass(frozen=True)
class Marks:
    """Detections or truths as marks on the score: [n] each, `image` counting from 0.

    Of detections, `score` is their own, and `true` says whether a truth is theirs. Of truths, `score` is that of the
    detection that took it, -inf where none did, and all are `true`. words: in the phrase; area: share of the image.
    """

    image: Ints
    score: Floats
    true: Bools
    words: Ints
    area: Floats

    def where(self, chosen: Bools) -> "Marks":
        """Some of them; images keep their numbers."""
        return Marks(*(getattr(self, name)[chosen] for name in ("image", "score", "true", "words", "area")))


@dataclass(frozen=True)
class Estimate:
    """Ratios with their intervals, float64 [...] each; NaN in 0..1 where there is nothing to divide."""

    value: Float64
    low: Float64
    high: Float64


def estimate(hits: Floats, counts: Floats, level: float = 0.95) -> Estimate:
    """The ratio sum(hits) / sum(counts) over clusters, with an interval that holds it in `level` of all samples.

    hits, counts [..., clusters], 0 <= hits <= counts: the clusters (images) are the sample, what is within one may be
    dependent in any way and their sizes may vary. Wilson's interval at the effective sample size (Kish: the number over
    the design effect) with the linearised variance of a ratio (Cochran, Sampling Techniques, 6.4):

    - the design effect is at least 1, and that of whole clusters where nothing or everything is a hit, as then the data
      say nothing of dependence;
    - the part of it above 1 grows by (t / z)^2, t of as many degrees of freedom as clusters carry the variance (after
      Satterthwaite), since near 1 few clusters hold all the errors.
    """
    sizes, n = counts.sum(-1), (counts > 0).sum(-1)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    with np.errstate(all="ignore"):
        p = hits.sum(-1) / sizes
        squares = (hits - p[..., None] * counts) ** 2
        carried = squares.sum(-1)
        binomial = sizes * p * (1 - p)
        whole = np.maximum((np.square(counts, dtype=np.float64)).sum(-1) / sizes, 1.0)
        clear = (binomial > 0) & (n > 1)
        effect = np.maximum(np.where(clear, carried * n / (n - 1) / binomial, whole), 1.0)
        freedom = np.clip(carried**2 / (squares**2).sum(-1), 3, np.maximum(n - 1, 3))
        grown = 1 + (effect - 1) * (_student(z, freedom) / z) ** 2
        effect = np.where(clear, np.minimum(grown, np.maximum(effect, whole)), effect)
        square = _student(z, np.maximum(n - 1, 3)) ** 2 * effect / sizes
        centre, half = p + square / 2, np.sqrt(square * (p * (1 - p) + square / 4))
        low, high = (centre - half) / (1 + square), (centre + half) / (1 + square)
    empty = sizes == 0
    return Estimate(p, np.where(empty, 0.0, np.clip(low, 0, 1)), np.where(empty, 1.0, np.clip(high, 0, 1)))


def _student(z: float, freedom: Float64) -> Float64:
    """Student's quantile from the normal's, by Fisher's expansion; within 1 % from 3 degrees of freedom on."""
    third, fifth, seventh = z**3, z**5, z**7
    first = (third + z) / 4
    second = (5 * fifth + 16 * third + 3 * z) / 96
    last = (3 * seventh + 19 * fifth + 17 * third - 15 * z) / 384
    result: Float64 = z + first / freedom + second / freedom**2 + last / freedom**3
    return result


def thresholds(scores: Floats) -> Float64:
    """The thresholds of a curve, rising: 0 and quantiles of the scores, of three digits. They do not see the truth."""
    if not len(scores):
        return np.zeros(1)
    steps = np.quantile(np.asarray(scores, np.float64), np.arange(_STEPS) / _STEPS)
    return np.unique([0.0, *(float(f"{step:.3g}") for step in steps)])


def per_image(marks: Marks, images: int, at: Float64) -> tuple[Float64, Float64]:
    """True marks and all marks above each threshold by image, float64 [thresholds, images] each.

    `at` rises. Above is as `select` has it: greater, compared as float32.
    """
    above = np.searchsorted(at.astype(np.float32), marks.score.astype(np.float32), side="left")
    place = marks.image * (len(at) + 1) + above

    def count(weights: Floats | None) -> Float64:
        table = np.bincount(place, weights, images * (len(at) + 1)).reshape(images, -1).astype(np.float64)
        return np.ascontiguousarray(table[:, ::-1].cumsum(axis=1)[:, -2::-1].T)

    return count(marks.true.astype(np.float64)), count(None)


@dataclass(frozen=True)
class Curve:
    """What is above each of the thresholds [k]: how many detections, how many of them true, how much is found."""

    at: Float64
    detections: Ints
    precision: Estimate
    recall: Estimate


def curve(detections: Marks, truths: Marks, images: int, at: Float64) -> Curve:
    """Precision and recall over rising thresholds, with 95 % intervals at each (not for all of them at once)."""
    hits, counts = per_image(detections, images, at)
    found, _ = per_image(truths, images, at)
    every = np.bincount(truths.image, minlength=images).astype(np.float64)
    return Curve(
        at,
        counts.sum(-1).astype(np.int64),
        estimate(hits, counts),
        estimate(found, np.broadcast_to(every, found.shape)),
    )


def choose(detections: Marks, images: int, at: Float64, wanted: float, level: float = 0.95) -> float | None:
    """The lowest of the rising thresholds from which precision is surely at least `wanted`, or None.

    In at least `level` of all labelled sets the true precision above what is returned is no less than `wanted`, the
    choice among thresholds included: fixed-sequence tests (after Angelopoulos et al. 2021, Learn then Test, section
    3.2) walk down, as long as the lower bound holds, from four starts that depend on how many detections are above and
    not on which are true, each at a quarter of the risk.
    """
    hits, counts = per_image(detections, images, at)
    above = counts.sum(-1)
    holds = estimate(hits, counts, 1 - 2 * (1 - level) / len(_STARTS)).low >= wanted
    reached = []
    for share in _STARTS:
        start = int(np.flatnonzero(above * share >= len(detections.score)).max(initial=-1))
        fails = np.flatnonzero(~holds[: start + 1])
        lowest = int(fails.max(initial=-1)) + 1
        if lowest <= start:
            reached.append(lowest)
    return float(at[min(reached)]) if reached else None
