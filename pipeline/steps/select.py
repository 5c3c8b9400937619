"""select: detections -> verdicts. The only step that decides; it works on columns and opens no model."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc

from ...transforms.filters import SelectRule, judge
from ...transforms.records import ADDS, step_schema
from ..stage import Function


@dataclass(frozen=True)
class Select:
    """Applies `rule` to every detection. An image without regions stays, for the image-text loss, by default."""

    name: ClassVar[str] = "select"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["select"]
    reads: ClassVar[tuple[str, ...]] = ("width", "height", "detections")
    opens_model: ClassVar[bool] = False

    rule: SelectRule = field(default_factory=SelectRule)
    empty: Literal["keep", "reject"] = "keep"

    def open(self) -> Function:
        """Return the function; there is nothing to load."""

        def select(batch: pa.Table) -> pa.Table:
            detections, widths, heights = (batch[name].combine_chunks() for name in ("detections", "width", "height"))
            verdicts = judge(detections, widths, heights, self.rule)
            outcome, reason = pa.repeat(pa.scalar("kept"), len(batch)), pa.nulls(len(batch), pa.string())
            if self.empty == "reject":
                kept = pc.equal(verdicts.flatten(), "kept")
                rows = pc.filter(pc.list_parent_indices(verdicts), kept)
                some = pc.is_in(pa.array(range(len(batch)), pa.int64()), rows.cast(pa.int64()))
                outcome = pc.if_else(some, "kept", "rejected")
                reason = pc.if_else(some, pa.scalar(None, pa.string()), "no_regions")
                verdicts = pc.if_else(some, verdicts, pa.nulls(len(batch), verdicts.type))
            details = pa.nulls(len(batch), pa.string())
            columns = [batch["key"].combine_chunks(), outcome, reason, details, verdicts]
            return pa.Table.from_arrays(columns, schema=step_schema(self.name))

        return select
