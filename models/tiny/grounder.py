"""The tiny grounder: for each phrase, the candidates of a scene that show it, each a different thing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..contract import Detections, PlainGrounder
from . import regions
from .regions import COLOURS, Box, iou, overlap, window
from .scene import Scene, eyes
from .vocabulary import plain

NMS_IOU = 0.5  # boxes of one phrase overlap no more than this
LEAST = 0.01  # boxes are weighed against each other down to here, whatever the floor, so that a floor only cuts


def open_grounder(score_floor: float) -> PlainGrounder:
    """Open the grounder; it reports pairs at or above score_floor (and LEAST). Raises ModelError as `eyes` does."""
    sight = eyes()

    def find(scene: Scene, phrase: str) -> list[tuple[Box, float]]:
        tint = [k for k, name in enumerate(COLOURS) if name in plain(phrase.lower().replace("grey", "gray"))[0].split()]
        kept: list[tuple[Box, float]] = []
        candidates, lit = sight.locate(scene, sight.relevance(phrase))
        taken, framed = np.zeros_like(lit), np.zeros_like(lit)
        colour = regions.colours(scene.pixels)
        for region, whole_score in candidates:
            if whole_score < LEAST:
                break
            # What a better box of this phrase explains counts once: its cells, and the evidence in and just around it.
            own = lit[window(region.box, *lit.shape)]
            nested = max((overlap(region.box, box) for box, _ in kept), default=0.0)
            new = (1 - float(taken[region.mask].mean())) * (1 - 0.6 * nested)
            if kept and own.any():
                new *= 1 - float(framed[window(region.box, *lit.shape)][own].mean())
            if tint:
                new *= 0.4 + 0.6 * min(1.0, float(np.isin(colour[region.mask], tint).mean()) / 0.15)
            score = whole_score * new
            if score >= LEAST and all(iou(region.box, box) <= NMS_IOU for box, _ in kept):
                kept.append((region.box, score))
                taken |= region.mask
                rows, columns = window(region.box, *lit.shape)
                framed[max(rows.start - 3, 0) : rows.stop + 3, max(columns.start - 3, 0) : columns.stop + 3] = True
        return [pair for pair in kept if pair[1] >= score_floor]

    def ground(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        answers = []
        for image, asked in zip(images, phrases, strict=True):
            scene = sight.look(image) if asked else None
            pairs = [(box, k, score) for k, phrase in enumerate(asked) if scene for box, score in find(scene, phrase)]
            boxes = np.array([box for box, _, _ in pairs], np.float32).reshape(-1, 4)
            numbers = np.array([k for _, k, _ in pairs], np.int16)
            answers.append(Detections(boxes, numbers, np.array([score for _, _, score in pairs], np.float32)))
        return answers

    return ground
