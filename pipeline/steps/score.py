"""score (optional): detections -> a second model's opinion of each, a column that `select` may use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...models import check, open_scorer
from ...models.contract import Detections
from ...models.options import Scoring
from ...transforms.records import ADDS
from ..stage import Function, InTwo, answer


@dataclass(frozen=True)
class Score(Scoring):
    """Asks one model. It decides nothing: thresholds belong into `select`."""

    name: ClassVar[str] = "score"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["score"]
    reads: ClassVar[tuple[str, ...]] = ("image", "phrases", "detections")
    opens_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    def open(self) -> Function:
        """Load the scorer."""
        scorer = open_scorer(self)

        def prepare(batch: pa.Table) -> Any:
            phrases = _ragged(pc.list_flatten(batch["phrases"]), batch["phrases"])
            texts = [pc.struct_field(own, "text").to_pylist() for own in phrases]
            return scorer.prepare(batch["image"].to_pylist(), texts, claims(batch["detections"]))

        def finish(batch: pa.Table, prepared: Any) -> pa.Table:
            return answer(batch, self.name, _rows(scorer(prepared), claims(batch["detections"])), self.emits)

        return InTwo(prepare, finish)


def _ragged(values: pa.ChunkedArray, lists: pa.ChunkedArray) -> list[pa.Array]:
    ends = np.cumsum(pc.list_value_length(lists).to_numpy()).tolist()
    flat = values.combine_chunks()
    return [flat.slice(start, end - start) for start, end in zip([0, *ends], ends, strict=False)]


def claims(detections: pa.ChunkedArray) -> list[Detections]:
    """The detections of each image as arrays."""
    found = []
    for own in _ragged(pc.list_flatten(detections), detections):
        box, phrase, score = (pc.struct_field(own, name) for name in ("box", "phrase", "score"))
        boxes = np.asarray(box.flatten(), np.float32).reshape(-1, 4)
        found.append(Detections(boxes, np.asarray(phrase, np.int16), np.asarray(score, np.float32)))
    return found


def _rows(found: Sequence[npt.NDArray[np.float32]], asked: Sequence[Detections]) -> list[dict[str, Any]]:
    if [len(scores) for scores in found] != [len(claim.scores) for claim in asked]:
        raise ValueError("the scorer did not answer with one score for each detection")
    return [{"agreement": [None if np.isnan(score) else score for score in scores.tolist()]} for scores in found]
