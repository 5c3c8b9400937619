"""Second opinions on detections: how well a region and its phrase agree, by a model that did not ground them.

What a score means depends on the model: the cosine of region and phrase for one that embeds both, the overlap with the
nearest of its own boxes for one that grounds. So a threshold belongs to one model, as a grounder's does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import BUILT_IN, hub, open_grounder
from ..contract import Detections, Grounder, ModelError, Scorer
from ..options import Grounding, Scoring

Floats = npt.NDArray[np.float32]
_GROUNDERS = ("owlv2", "owlvit", "grounding-dino")


def open_scorer(options: Scoring) -> Scorer:
    """Load the scorer that the architecture calls for. Raises ModelError."""
    if options.model in BUILT_IN["grounder"]:
        return _second(options)
    folder = hub.find(options.model)
    kind = hub.config(folder).get("model_type")
    if kind in _GROUNDERS:
        return _second(options)
    if kind in ("clip", "siglip"):
        try:
            from . import similarity
        except ImportError as error:
            raise ModelError(
                f"model {options.model}: needs `pip install 'vesl[models]'` ({error.name} is missing)"
            ) from None
        return similarity.open_scorer(options, folder)
    known = ", ".join(("clip", "siglip", *_GROUNDERS))
    raise ModelError(f"model {options.model}: {kind!r} cannot score regions; there are {known}")


def _second(options: Scoring) -> "SecondGrounder":
    grounding = Grounding(
        options.model,
        score_floor=options.floor,
        template=options.template,
        image_px=options.image_px,
        dtype=options.dtype,
        device=options.device,
        compile=options.compile,
    )
    return SecondGrounder(open_grounder(grounding), options.above)


class SecondGrounder:
    """Asks another grounder for the same phrases; a detection's score is its overlap with that one's nearest box."""

    def __init__(self, grounder: Grounder, above: float) -> None:
        self._grounder, self._above = grounder, above

    def prepare(
        self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]], claims: Sequence[Detections]
    ) -> tuple[Any, list[list[int]], Sequence[Detections]]:
        """Ask for the phrases of the detections that are scored, and for no others."""
        asked = [np.unique(claim.phrases[claim.scores >= self._above]).tolist() for claim in claims]
        texts = [[own[k] for k in numbers] for own, numbers in zip(phrases, asked, strict=True)]
        return self._grounder.prepare(jpegs, texts), asked, claims

    def __call__(self, prepared: tuple[Any, list[list[int]], Sequence[Detections]]) -> list[Floats]:
        """Return each detection's best IoU with a box of the same phrase, 0 where there is none."""
        given, asked, claims = prepared
        found = self._grounder(given)
        return [
            overlaps(claim, other, np.asarray(numbers, np.int16), self._above)
            for claim, other, numbers in zip(claims, found, asked, strict=True)
        ]


def overlaps(claim: Detections, other: Detections, asked: npt.NDArray[np.int16], above: float) -> Floats:
    """Best IoU of each claim [n] with what another grounder found for the same phrase; NaN for claims below `above`.

    `asked` [q] says which of the image's phrases the other grounder's phrase numbers stand for.
    """
    from ...transforms.boxes import iou

    best = np.full(len(claim.scores), np.nan, np.float32)
    scored = np.flatnonzero(claim.scores >= above)
    if len(scored):
        same = claim.phrases[scored, None] == asked[other.phrases][None, :]
        best[scored] = np.where(same, iou(claim.boxes[scored], other.boxes), 0).max(axis=1, initial=0)
    return best
