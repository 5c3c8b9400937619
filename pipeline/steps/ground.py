"""ground: image and phrases -> every scored pair of a box and a phrase above a low floor. It decides nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...models import check, open_grounder
from ...models.contract import Detections
from ...models.options import Grounding
from ...transforms.records import ADDS, DETECTION, step_schema
from ..stage import Function, InTwo


@dataclass(frozen=True)
class Ground(Grounding):
    """Grounds with one model. Thresholds belong into `select`, which reruns in seconds."""

    name: ClassVar[str] = "ground"
    version: ClassVar[int] = 2
    emits: ClassVar[pa.Schema] = ADDS["ground"]
    reads: ClassVar[tuple[str, ...]] = ("image", "phrases")
    opens_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    def open(self) -> Function:
        """Load the grounder."""
        grounder = open_grounder(self)

        def asked(batch: pa.Table) -> list[list[str]]:
            phrases = batch["phrases"].combine_chunks()
            texts = pc.struct_field(phrases.flatten(), "text").to_pylist()
            ends = np.cumsum(phrases.value_lengths().to_numpy(zero_copy_only=False)).tolist()
            return [texts[start:end] for start, end in zip([0, *ends], ends, strict=False)]

        def prepare(batch: pa.Table) -> Any:
            return grounder.prepare(batch["image"].to_pylist(), asked(batch))

        def finish(batch: pa.Table, prepared: Any) -> pa.Table:
            phrases = [len(texts) for texts in asked(batch)]
            found = grounder(prepared)
            if len(found) != len(phrases):
                raise ValueError(f"the grounder answered for {len(found)} images of {len(phrases)}")
            return _table(batch, found, phrases, self)

        return InTwo(prepare, finish)


_NONE = Detections(np.empty((0, 4), np.float32), np.empty(0, np.int16), np.empty(0, np.float32))


def _table(batch: pa.Table, found: Sequence[Detections], phrases: Sequence[int], options: Ground) -> pa.Table:
    """Put together the step's table. Raises ValueError for nonsense."""
    rows = [_best(detections, count, options) for detections, count in zip(found, phrases, strict=True)]
    ends = np.cumsum([0, *(len(row.scores) for row, _ in rows)])
    best = [_NONE, *(row for row, _ in rows)]
    boxes, labels, scores = (np.concatenate([getattr(row, name) for row in best]) for name in vars(_NONE))
    box = pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4).cast(DETECTION.field("box").type)
    detections = pa.StructArray.from_arrays([box, pa.array(labels), pa.array(scores)], fields=list(DETECTION))
    columns = [
        batch["key"].combine_chunks(),
        pa.repeat(pa.scalar("kept"), len(rows)),
        *[pa.nulls(len(rows), pa.string())] * 2,
        pa.ListArray.from_arrays(pa.array(ends, pa.int32()), detections, type=options.emits.field("detections").type),
        pa.array([truncated for _, truncated in rows]),
    ]
    return pa.Table.from_arrays(columns, schema=step_schema(options.name))


def _best(found: Detections, phrases: int, options: Ground) -> tuple[Detections, bool]:
    """Check what a model says, put it in falling order of score, cut it, and say whether something was cut off.

    Raises ValueError for nonsense.
    """
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
    best = Detections(boxes[order], labels[order].astype(np.int16), scores[order])
    return best, len(above) > options.max_detections
