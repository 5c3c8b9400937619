"""ground: image and phrases -> every scored pair of a box and a phrase above a low floor. It decides nothing."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from ...models import check_reference, open_grounder
from ...models.contract import Detections
from ...transforms.records import ADDS
from ..stage import Function, answer, decoded


@dataclass(frozen=True)
class Ground:
    """Grounds with `model`, given as `name@revision`. Thresholds belong into `select`, which reruns in seconds."""

    name: ClassVar[str] = "ground"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["ground"]
    reads: ClassVar[tuple[str, ...]] = ("image", "phrases")
    opens_model: ClassVar[bool] = True

    model: str
    score_floor: float = 0.02
    max_detections: int = 300  # per image, the highest scores; `truncated` tells where there were more

    def __post_init__(self) -> None:
        check_reference("grounder", self.model)
        if self.max_detections < 1:
            raise ValueError(f"max_detections: {self.max_detections} is not a positive number")

    def open(self) -> Function:
        """Load the grounder."""
        grounder = open_grounder(self.model, self.score_floor)

        def ground(batch: pa.Table) -> pa.Table:
            phrases = [[phrase["text"] for phrase in row] for row in batch["phrases"].to_pylist()]
            found = grounder(decoded(batch), phrases)
            results = [_row(d, len(p), self) for d, p in zip(found, phrases, strict=True)]
            return answer(batch, self.name, results, self.emits)

        return ground


def _row(found: Detections, phrases: int, options: Ground) -> dict[str, Any]:
    """Check what a model says, put it in falling order of score, cut it. Raises ValueError for nonsense."""
    boxes = np.asarray(found.boxes, np.float32).reshape(-1, 4)
    labels, scores = np.asarray(found.phrases), np.asarray(found.scores, np.float32)
    if not len(boxes) == len(labels) == len(scores):
        raise ValueError(f"the grounder gave {len(boxes)} boxes, {len(labels)} phrases and {len(scores)} scores")
    if len(labels) and not (labels.min() >= 0 and labels.max() < phrases):
        raise ValueError(f"the grounder named phrase {labels.max()} of {phrases}")
    if not np.isfinite(boxes).all() or not np.isfinite(scores).all():
        raise ValueError("the grounder gave a box or a score that is not a number")
    above = np.flatnonzero(scores >= options.score_floor)
    order = above[np.lexsort((labels[above], -scores[above]))][: options.max_detections]
    rows = zip(boxes[order].tolist(), labels[order].tolist(), scores[order].tolist(), strict=True)
    return {
        "detections": [{"box": box, "phrase": label, "score": score} for box, label, score in rows],
        "truncated": len(above) > options.max_detections,
    }
