"""What a captioner and a grounder are: two moments, open (build the model on the worker) and call (one batch).

A recipe names a model as `name@revision`: a built-in name (`tiny@1`, `alt_text@1`) or `module:function@revision` of the
user's own: a function without arguments that returns a `Captioner`, or one that takes the score floor and returns a
`Grounder`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image


class ModelError(Exception):
    """A model cannot be opened: one line that says what is missing or wrong, and what to do about it."""


class Captioner(Protocol):
    """Writes captions for a batch of images."""

    def __call__(self, images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        """Take upright RGB images and their web captions ("" where there is none); return each image's captions."""
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

    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        """Take upright RGB images and each image's own phrases (maybe none); return every scored pair per image."""
        ...
