"""What the rules of the select step see: the detections of some images as arrays, made of Arrow columns.

It is also what a rule of a user's own gets, so its fields and properties are for users to rely on.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Bools = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
V = TypeVar("V", bound=np.generic)

# Prepositions after which a phrase says more of its noun: the head of `a man in a hat` is `man`.
_AFTER_HEAD = r" (?:of|in|on|at|by|for|from|with|without|near|under|over|behind|beside) .*$"


@dataclass(frozen=True)
class Found:
    """Detections of some images. The arrays are read-only.

    boxes: float32 [n, 4], x0, y0, x1, y1 in 0..1 of the image, x right, y down. scores: float32 [n].
    phrases: int16 [n], index in the phrases of the detection's own image; negative where missing.
    images: int64 [n], not falling: row of `widths` and `heights`, float64 [images], pixels of the stored images.
    agreement: float32 [n], what the score step's model says; NaN where it says nothing.
    firsts: int64 [images + 1]: image i owns the phrases firsts[i] .. firsts[i + 1] of `texts`, string [phrases], as
    they stand in the captions, and of `captions`, int64 [phrases], index in the image's captions. No phrases are there
    where no rule asks for them.
    """

    boxes: Float32
    scores: Float32
    phrases: npt.NDArray[np.int16]
    images: Int64
    agreement: Float32
    widths: Float64
    heights: Float64
    firsts: Int64
    texts: pa.StringArray
    captions: Int64

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: npt.NDArray[Any]) -> "Found":
        """The detections of some rows (indices, or a mask) of the same images."""
        names = ("boxes", "scores", "phrases", "images", "agreement")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @cached_property
    def extent(self) -> tuple[Float64, Float64]:
        """Width and height of each box, float64 [n], as shares of the image's."""
        x0, y0, x1, y1 = self.boxes.T.astype(np.float64)
        with np.errstate(all="ignore"):
            return x1 - x0, y1 - y0

    @cached_property
    def extent_px(self) -> tuple[Float64, Float64]:
        """Width and height of each box, float64 [n], in pixels of the stored image."""
        width, height = self.extent
        with np.errstate(all="ignore"):
            return width * self.widths[self.images], height * self.heights[self.images]

    @cached_property
    def rows(self) -> Int64:
        """Row of `texts` of each detection's phrase, int64 [n]; -1 where its image has no such phrase."""
        rows = self.firsts[self.images] + self.phrases
        return np.where((self.phrases >= 0) & (rows < self.firsts[self.images + 1]), rows, -1)

    @cached_property
    def owners(self) -> Int64:
        """The image of each phrase, int64 [phrases]."""
        return np.repeat(np.arange(len(self.widths)), np.diff(self.firsts))

    @cached_property
    def normal(self) -> pa.StringArray:
        """Each phrase as `normalised` has it."""
        return normalised(self.texts)

    @cached_property
    def words(self) -> Int64:
        """Words of each phrase, int64 [phrases]: pieces between white space, one at least."""
        return numbers(pc.count_substring(self.normal, " "), np.int64, 0) + 1

    @cached_property
    def heads(self) -> pa.StringArray:
        """The head noun of each phrase: see `head_nouns`."""
        return head_nouns(self.normal)

    def of_phrase(self, values: npt.NDArray[V], other: Any) -> npt.NDArray[V]:
        """Each detection's own of `values` [phrases]; `other` where its phrase is not there."""
        there = self.rows >= 0
        found = np.full(len(self), other, values.dtype)
        found[there] = values[self.rows[there]]
        return found


def normalised(texts: pa.StringArray) -> pa.StringArray:
    """What decides whether two phrases are the same: lower case, single spaces between words, none around.

    Null is as the empty text. Rules, calibration, exports and the report all mean this when they speak of a phrase.
    """
    lower = pc.utf8_trim_whitespace(pc.utf8_lower(pc.fill_null(texts, "")))
    return pc.binary_join(pc.utf8_split_whitespace(lower), " ")


@lru_cache(1 << 16)
def normalise(phrase: str) -> str:
    """The same for one phrase."""
    return str(normalised(pa.array([phrase], pa.string()))[0].as_py())


def head_nouns(normal: pa.StringArray) -> pa.StringArray:
    """The head noun of normalised phrases: the last word before the first preposition, or the last word of all.

    An approximation that is right for what the NP grammar and noun chunks find (`a big red ball`: ball; `a glass of
    water`: glass), and knows no grammar: the head of `a dog sitting on a bench` is `sitting`. Plurals stay.
    """
    noun_last = pc.replace_substring_regex(normal, _AFTER_HEAD, "")
    return pc.replace_substring_regex(noun_last, "^.* ", "")


def blocks(
    detections: pa.ListArray,
    widths: pa.Array,
    heights: pa.Array,
    phrases: pa.ListArray | None,
    agreement: pa.ListArray | None,
    rows: int,
) -> Iterator[tuple[slice, slice, Found]]:
    """Cut columns (see filters.judge) into pieces of `rows` images: which images, which detections, and what of them.

    Raises ValueError where the columns do not fit each other.
    """
    counts = {"widths": widths, "heights": heights, "phrases": phrases, "agreement": agreement}
    if wrong := {name: len(one) for name, one in counts.items() if one is not None and len(one) != len(detections)}:
        there = ", ".join(f"{n} {name}" for name, n in wrong.items())
        raise ValueError(f"{len(detections)} rows of detections, {there}")
    ends = offsets(detections)
    boxes, indices, scores = _detections(detections.flatten())
    width, height = numbers(widths, np.float64, 0), numbers(heights, np.float64, 0)
    firsts, texts, captions = _phrases(phrases, len(detections))
    agreed = np.full(len(scores), np.nan, np.float32)
    if agreement is not None:
        agreed = numbers(agreement.flatten(), np.float32, np.nan)
        if not np.array_equal(offsets(agreement), ends):
            raise ValueError("not every detection has its agreement")
    for first in range(0, len(detections), rows):
        images = slice(first, min(first + rows, len(detections)))
        own, of = ends[first : images.stop + 1], firsts[first : images.stop + 1]
        these, said = slice(own[0], own[-1]), slice(of[0], of[-1])
        yield (
            images,
            these,
            Found(
                boxes=boxes[these],
                scores=scores[these],
                phrases=indices[these],
                images=np.repeat(np.arange(len(own) - 1), np.diff(own)),
                agreement=agreed[these],
                widths=width[images],
                heights=height[images],
                firsts=of - of[0],
                texts=texts[said],
                captions=captions[said],
            ),
        )


def offsets(lists: pa.ListArray) -> Int64:
    """Where each row of a list column begins among its flattened values, and the end: int64 [rows + 1]."""
    return np.concatenate([[0], np.cumsum(numbers(pc.list_value_length(lists), np.int64, 0))])


def _detections(detections: pa.StructArray) -> tuple[Float32, npt.NDArray[np.int16], Float32]:
    """Boxes float32 [n, 4], phrases int16 [n], scores float32 [n]; NaN, -1 and NaN where null."""
    fields = _fields(detections)
    box = fields["box"]
    values = numbers(box.flatten(), np.float32, np.nan).reshape(-1, 4)  # leaves null boxes out
    if box.null_count:
        whole = np.full((len(box), 4), np.nan, dtype=np.float32)
        whole[np.asarray(box.is_valid())] = values
        values = whole
    return values, numbers(fields["phrase"], np.int16, -1), numbers(fields["score"], np.float32, np.nan)


def _phrases(phrases: pa.ListArray | None, rows: int) -> tuple[Int64, pa.StringArray, Int64]:
    if phrases is None:
        return np.zeros(rows + 1, np.int64), pa.array([], pa.string()), np.zeros(0, np.int64)
    fields = _fields(phrases.flatten())
    return offsets(phrases), fields["text"], numbers(fields["caption"], np.int64, -1)


def _fields(structs: pa.StructArray) -> dict[str, pa.Array]:
    names = [field.name for field in structs.type]
    return dict(zip(names, structs.flatten(), strict=True))  # unlike field(), minds the struct's nulls and offset


def numbers(array: pa.Array, dtype: Any, null: float) -> npt.NDArray[Any]:
    """An Arrow array as numpy's, with `null` where it has no value."""
    if array.null_count:
        array = pc.fill_null(array, pa.scalar(null, array.type))
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype)
