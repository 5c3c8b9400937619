"""Which detections become regions, and which images stay: the select step on Arrow columns, no Python loop over rows.

A grounder stores every pair of a box and a phrase above a low floor; what to keep is decided here, again and again if
need be, without opening a model. Every detection gets a verdict: `kept`, or the rule that rejected it. The options are
here, the rules themselves in rules.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from . import rules
from .found import Bools, Found, blocks, normalised, numbers, offsets
from .options import added

# In the order of application: a detection carries the first that applies, and what an earlier rule rejected plays no
# part in a later one. Codes are positions in this order.
VERDICTS: dict[str, str] = {
    "kept": "becomes a region",
    "invalid_box": "no box within the image: missing, not finite, outside 0..1, or without extent",
    "invalid_phrase": "the index of its phrase is missing, negative, or (where a rule reads the phrases) too large",
    "invalid_score": "the score is missing or not finite",
    "stop_phrase": "its phrase, or the phrase's head noun, is on the recipe's stop list",
    "low_score": "the score is not above the threshold",
    "low_agreement": "what the second model says is below the limit, or missing",
    "small": "a side has fewer pixels, or the box a smaller share of the image, than the limit",
    "large": "the box has a larger share of the image than the limit",
    "whole_image": "the box spans the image from side to side and from top to bottom, or nearly so",
    "bad_aspect": "the box is longer for its width than the limit",
    "border": "the box touches the image's border, or nearly so",
    "ungrounded_caption": "too few phrases of its caption were found in the image",
    "own_rule": "the recipe's own rule (steps.select.own) rejects it",
    "other_phrase": "the same box has a better phrase",
    "duplicate_in_phrase": "it overlaps a better box of the same phrase by more than the limit",
    "duplicate_box": "it overlaps a better box, of whatever phrase, by more than the limit",
    "over_per_phrase": "its phrase has as many better regions as the limit allows",
    "over_phrases": "the image has as many phrases with better regions as the limit allows",
    "over_limit": "the image has as many better regions as the limit allows",
}
_CODE = {name: np.int8(code) for code, name in enumerate(VERDICTS)}
_NAMES = pa.array(VERDICTS, pa.string())
_FOUND_FROM = _CODE["small"]  # from this verdict on, a detection counts as having found its phrase

_ROWS = 2048  # of images judged at a time: the working set stays near the caches (and below 2**16, see rules.ranking)

Own = Callable[[Found], Bools]  # a user's rule: which detections stay, bool [n]
Rejects = Callable[[Found], Bools]  # a rule of ours with its numbers: which go, bool [n]


def _check(options: Any, names: str, least: float, most: float) -> None:
    for name in names.split():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:  # NaN too
            raise ValueError(f"{name} must be within {least}..{most:g}, not {value}")


@dataclass(frozen=True)
class SelectRule:
    """What a detection must be to become a region. The defaults are the paper's (Chen et al. 2024, CLOC, section 4).

    score: kept above it, compared as float32 (a score of 0.1 is not above 0.1). score_by_words: thresholds instead for
    phrases of one word, two words, ..., the last also for longer ones. score_by_head: thresholds instead of both by
    head noun (see found.head_nouns).
    best_phrase_per_box: of detections with the same box, only the best `phrases_per_box` are kept.
    phrase_nms_iou, nms_iou: IoU above which the better of two boxes stays alone, among boxes of one phrase and
    among all (where one box may keep several phrases, the second of them is then a duplicate too); None: off.
    min_side_px: pixels of the stored image. min_area, max_area: share of the image. max_regions: best that stay.
    max_aspect: longer side over shorter, in pixels. whole_image: rejected where both sides reach that share of the
    image's. border_px: rejected where no more pixels than that lie between the box and the border (0: it touches).
    regions_per_phrase: best that stay of a phrase. max_phrases: phrases that stay, those with the best regions.
    stop_phrases, stop_heads: phrases, and head nouns of phrases, that make no region; case and white space are ignored.
    min_agreement: the least that the score step's model must say.
    min_grounded: a caption's regions go where a smaller share of its phrases was found in the image, which means that a
    valid detection passes the stop lists, the threshold and min_agreement. Phrases on a stop list do not count.

    Better is: higher score; where equal, lower phrase index; where equal, earlier stored.
    Raises ValueError for a value that no rule can mean.
    """

    score: float = 0.1
    best_phrase_per_box: bool = True
    nms_iou: float | None = None
    phrase_nms_iou: float | None = None
    min_side_px: float = 0.0
    min_area: float = 0.0
    max_area: float = 1.0
    max_regions: int = 100
    score_by_words: tuple[float, ...] = added(())
    score_by_head: Mapping[str, float] = added({})
    phrases_per_box: int = added(1)
    max_aspect: float | None = added(None)
    whole_image: float | None = added(None)
    border_px: float | None = added(None)
    regions_per_phrase: int | None = added(None)
    max_phrases: int | None = added(None)
    stop_phrases: tuple[str, ...] = added(())
    stop_heads: tuple[str, ...] = added(())
    min_agreement: float | None = added(None)
    min_grounded: float | None = added(None)

    def __post_init__(self) -> None:
        _check(self, "score min_side_px max_regions border_px regions_per_phrase max_phrases", 0, math.inf)
        _check(self, "nms_iou phrase_nms_iou min_area max_area whole_image min_grounded", 0, 1)
        _check(self, "phrases_per_box max_aspect", 1, math.inf)
        if self.min_agreement is not None and not math.isfinite(self.min_agreement):
            raise ValueError(f"min_agreement must be finite, not {self.min_agreement}")
        thresholds: dict[str, Any] = {f"score_by_words[{i}]": score for i, score in enumerate(self.score_by_words)}
        thresholds |= {f"score_by_head.{head}": score for head, score in self.score_by_head.items()}
        for name, score in thresholds.items():
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score < math.inf:
                raise ValueError(f"{name}: {score!r} is not a threshold")
        if words := [head for head in self.score_by_head if not isinstance(head, str)]:
            raise ValueError(f"score_by_head: {words[0]!r} is not a text; put it in quotes")
        # As they are compared, so that fingerprints see the same where the meaning is the same.
        for name in ("stop_phrases", "stop_heads"):
            listed = normalised(pa.array(getattr(self, name), pa.string())).to_pylist()
            object.__setattr__(self, name, tuple(sorted(set(listed))))
        heads = normalised(pa.array(list(self.score_by_head), pa.string())).to_pylist()
        by_head = dict(zip(heads, map(float, self.score_by_head.values()), strict=True))
        if len(by_head) < len(self.score_by_head):
            raise ValueError("score_by_head: the same word stands twice")
        object.__setattr__(self, "score_by_head", by_head)

    @property
    def reads_phrases(self) -> bool:
        """Whether a rule looks at the phrases themselves."""
        lists = (self.score_by_words, self.score_by_head, self.stop_phrases, self.stop_heads)
        return any(lists) or self.min_grounded is not None


@dataclass(frozen=True)
class ImageRule:
    """What an image must be to stay, beside what `empty` says of images without regions; None: whatever it is.

    min_side_px: pixels of the stored image. max_aspect: longer side over shorter. min_best_score: the least that its
    best region must score. min_grounded: the least share of its phrases that were found, as SelectRule counts them; an
    image without phrases has nothing that could be wrong.
    Raises ValueError for a value that no rule can mean.
    """

    min_side_px: float | None = None
    max_aspect: float | None = None
    min_best_score: float | None = None
    min_grounded: float | None = None

    def __post_init__(self) -> None:
        _check(self, "min_side_px min_best_score", 0, math.inf)
        _check(self, "min_grounded", 0, 1)
        _check(self, "max_aspect", 1, math.inf)


def judge(
    detections: pa.ListArray,
    widths: pa.Array,
    heights: pa.Array,
    rule: SelectRule,
    *,
    phrases: pa.ListArray | None = None,
    agreement: pa.ListArray | None = None,
    own: Own | None = None,
) -> pa.ListArray:
    """Give every detection its verdict, a key of VERDICTS: list<string>, row by row as long (or null) as
    `detections`.

    detections: list<struct<box: fixed_size_list<float32>[4], phrase: int16, score: float32>>, boxes in 0..1 of the
    image; null and empty lists, null members and slices are welcome. widths, heights: pixels of the stored images, any
    numeric type; where null, a side counts as 0 pixels. phrases: list<struct<text, caption, ...>>, needed where the
    rule `reads_phrases` and by some rules of a user's own. agreement: list<float32>, as long as `detections`.
    own: applied to what the rules on single detections left, in the stored order; it must judge an image by the image
    alone. An image's verdicts then depend on nothing but its own row.
    Raises ValueError where the columns differ in length or one is missing, and whatever `own` raises.
    """
    if rule.reads_phrases and phrases is None:
        raise ValueError("a rule needs the phrases")
    if rule.min_agreement is not None and agreement is None:
        raise ValueError("min_agreement needs the score step's agreement")
    ends = offsets(detections)
    codes = np.zeros(ends[-1], dtype=np.int8)
    for _, these, found in blocks(detections, widths, heights, phrases, agreement, _ROWS):
        codes[these] = _judge(found, rule, phrases is not None, own)
    verdicts = pa.DictionaryArray.from_arrays(pa.array(codes), _NAMES).cast(pa.string())
    mask = detections.is_null() if detections.null_count else None
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), verdicts, mask=mask)


def drop_images(
    detections: pa.ListArray,
    widths: pa.Array,
    heights: pa.Array,
    verdicts: pa.ListArray,
    rule: SelectRule,
    image: ImageRule,
    *,
    empty: bool,
    phrases: pa.ListArray | None = None,
) -> pa.StringArray:
    """Say why an image does not stay: a reason of the select step for each row, or null; the first that applies.

    In this order: `too_small`, `bad_aspect`, `ungrounded`, `no_regions` (if `empty`), `low_best_score`. The columns are
    those of `judge`, and the verdicts that it gave for the same rule. Raises ValueError where phrases are needed.
    """
    if image.min_grounded is not None and phrases is None:
        raise ValueError("a rule needs the phrases")
    codes = numbers(pc.index_in(verdicts.flatten(), _NAMES), np.int8, -1)
    reasons = np.full(len(detections), None, object)
    for images, these, found in blocks(detections, widths, heights, phrases, None, _ROWS):
        for reason, rejected in reversed(list(_image_tests(found, codes[these], rule, image, empty))):
            reasons[images][rejected] = reason
    return pa.array(reasons, pa.string())


def _image_tests(
    found: Found, codes: npt.NDArray[np.int8], rule: SelectRule, image: ImageRule, empty: bool
) -> Iterator[tuple[str, Bools]]:
    short, long = np.minimum(found.widths, found.heights), np.maximum(found.widths, found.heights)
    if image.min_side_px is not None:
        yield "too_small", short < image.min_side_px
    if image.max_aspect is not None:
        yield "bad_aspect", long > image.max_aspect * short
    if image.min_grounded is not None:
        shares = rules.grounded_share(found, *_grounding(found, codes, rule), found.owners)
        low = np.zeros(len(found.widths), np.bool_)
        low[found.owners[shares < image.min_grounded]] = True
        yield "ungrounded", low
    best = np.full(len(found.widths), -np.inf, np.float32)
    kept = codes == 0
    np.maximum.at(best, found.images[kept], found.scores[kept])
    if empty:
        yield "no_regions", best == -np.inf
    if image.min_best_score is not None:
        yield "low_best_score", best < np.float32(image.min_best_score)


def _judge(found: Found, rule: SelectRule, read: bool, own: Own | None) -> npt.NDArray[np.int8]:
    """Codes int8 [n] of some images' detections."""
    codes = np.zeros(len(found), dtype=np.int8)
    for verdict, rejects in reversed(list(_alone(rule, read))):
        np.putmask(codes, rejects(found), _CODE[verdict])
    if rule.min_grounded is not None:
        low = rules.ungrounded_caption(found, *_grounding(found, codes, rule), rule.min_grounded)
        codes[low & (codes == 0)] = _CODE["ungrounded_caption"]
    left = np.flatnonzero(codes == 0)
    if own is not None and len(left):
        keep = own(found.take(left))
        codes[left[~keep]] = _CODE["own_rule"]
        left = left[keep]
    survivors = found.take(left)
    order = rules.ranking(survivors)
    left, survivors = left[order], survivors.take(order)
    for verdict, rejects in _compared(rule):
        rejected = rejects(survivors)
        if rejected.any():
            codes[left[rejected]] = _CODE[verdict]
            left, survivors = left[~rejected], survivors.take(~rejected)
    return codes


def _grounding(found: Found, codes: npt.NDArray[np.int8], rule: SelectRule) -> tuple[Bools, Bools]:
    """Which detections have found their phrase, bool [n], and which phrases count, bool [phrases]."""
    return (codes == 0) | (codes >= _FOUND_FROM), ~rules.stopped(found, rule.stop_phrases, rule.stop_heads)


def _alone(rule: SelectRule, read: bool) -> Iterator[tuple[str, Rejects]]:
    """The rules on one detection that are on, in the order of VERDICTS."""
    yield "invalid_box", rules.invalid_box
    yield "invalid_phrase", partial(rules.invalid_phrase, read=read)
    yield "invalid_score", lambda found: ~np.isfinite(found.scores)
    if rule.stop_phrases or rule.stop_heads:
        yield "stop_phrase", partial(rules.stop_phrase, phrases=rule.stop_phrases, heads=rule.stop_heads)
    thresholds = partial(rules.low_score, score=rule.score, by_words=rule.score_by_words, by_head=rule.score_by_head)
    yield "low_score", thresholds
    if rule.min_agreement is not None:
        yield "low_agreement", partial(rules.low_agreement, least=rule.min_agreement)
    if rule.min_side_px or rule.min_area:
        yield "small", partial(rules.small, side_px=rule.min_side_px, area=rule.min_area)
    if rule.max_area < 1:
        yield "large", partial(rules.large, area=rule.max_area)
    if rule.whole_image is not None:
        yield "whole_image", partial(rules.whole_image, share=rule.whole_image)
    if rule.max_aspect is not None:
        yield "bad_aspect", partial(rules.bad_aspect, limit=rule.max_aspect)
    if rule.border_px is not None:
        yield "border", partial(rules.at_border, margin_px=rule.border_px)


def _compared(rule: SelectRule) -> Iterator[tuple[str, Rejects]]:
    """The rules that compare detections and are on, in the order of VERDICTS."""
    if rule.best_phrase_per_box:
        yield "other_phrase", partial(rules.other_phrase, limit=rule.phrases_per_box)
    if rule.phrase_nms_iou is not None:
        yield "duplicate_in_phrase", partial(rules.duplicate_in_phrase, iou=rule.phrase_nms_iou)
    if rule.nms_iou is not None:
        yield "duplicate_box", partial(rules.duplicate_box, iou=rule.nms_iou)
    if rule.regions_per_phrase is not None:
        yield "over_per_phrase", partial(rules.over_per_phrase, limit=rule.regions_per_phrase)
    if rule.max_phrases is not None:
        yield "over_phrases", partial(rules.over_phrases, limit=rule.max_phrases)
    yield "over_limit", partial(rules.over_limit, limit=rule.max_regions)
