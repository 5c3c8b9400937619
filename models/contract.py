"""What captioners, grounders and scorers are: open (build the model on the worker), prepare (a batch, ahead), call.

`prepare` is what threads do while the device is busy with the batches before: decode, resize, tokenise, or send a
request. It is called by several threads at once and touches no device. Calls come one at a time, in the order of the
batches. A recipe names a model as `name@revision`: see `models/__init__.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..transforms.images import decode
from ..transforms.outcomes import Drop

Out = TypeVar("Out", covariant=True)


class ModelError(Exception):
    """A model cannot be opened: one line that says what is missing or wrong, and what to do about it."""


@dataclass(frozen=True)
class Written:
    """A caption as a model wrote it; not `complete` where the token limit cut it off."""

    text: str
    complete: bool = True


class Captioner(Protocol):
    """Writes captions for a batch of images."""

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Any:
        """Take stored JPEGs (upright RGB) and their web captions ("" where there is none)."""
        ...

    def __call__(self, prepared: Any) -> list[list[Written | Drop]]:
        """Return each image's captions, one for each prompt, or why there is none (a reason of the caption step)."""
        ...


@dataclass(frozen=True)
class Detections:
    """The pairs (box, phrase) that a grounder found in one image, in any order.

    boxes: float32 [n, 4], x0, y0, x1, y1 in 0..1 of the image, x right, y down, x0 < x1 and y0 < y1.
    phrases: int16 [n], index in the phrases asked for. scores: float32 [n], comparable within one grounder only.
    One box that answers to several phrases stands once for each, with the same coordinates.
    """

    boxes: npt.NDArray[np.float32]
    phrases: npt.NDArray[np.int16]
    scores: npt.NDArray[np.float32]


class Grounder(Protocol):
    """Finds the boxes that phrases speak of."""

    def prepare(self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]]) -> Any:
        """Take stored JPEGs (upright RGB) and each image's own phrases (maybe none)."""
        ...

    def __call__(self, prepared: Any) -> list[Detections]:
        """Return every scored pair of each image."""
        ...


class Scorer(Protocol):
    """Says how well phrases fit the boxes that a grounder gave them."""

    def prepare(self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]], claims: Sequence[Detections]) -> Any:
        """Take stored JPEGs (upright RGB), each image's phrases, and the detections to be judged."""
        ...

    def __call__(self, prepared: Any) -> list[npt.NDArray[np.float32]]:
        """Return a score for each detection [n] of each image; NaN where it was not looked at."""
        ...


# What a user's own model, or a small one, may be instead: one function of the decoded images.
PlainCaptioner = Callable[[Sequence[Image.Image], Sequence[str]], list[list[str]]]
PlainGrounder = Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], list[Detections]]
PlainScorer = Callable[
    [Sequence[Image.Image], Sequence[Sequence[str]], Sequence[Detections]], list[npt.NDArray[np.float32]]
]


class Plain(Generic[Out]):
    """A function of decoded images and their texts as a model in two moments: decoding runs ahead."""

    def __init__(self, function: Callable[..., list[Out]]) -> None:
        self._function = function

    def prepare(self, jpegs: Sequence[bytes], *given: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """Decode."""
        return [decode(jpeg) for jpeg in jpegs], *given

    def __call__(self, prepared: tuple[Sequence[Any], ...]) -> list[Out]:
        """Compute."""
        return self._function(*prepared)


def plain_captioner(function: PlainCaptioner) -> Captioner:
    """Make a captioner of a function that takes images and alt texts and returns each image's captions as texts."""

    def write(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[Written | Drop]]:
        return [[Written(text) for text in texts] for texts in function(images, alt_texts)]

    return Plain(write)
