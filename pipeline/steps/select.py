"""select: detections -> verdicts. The only step that decides; it works on columns and opens no model."""

import importlib
import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ...models import check_pinned
from ...models.contract import ModelError
from ...transforms.filters import ImageRule, Own, SelectRule, drop_images, judge
from ...transforms.found import Bools, Found
from ...transforms.options import added, operational
from ...transforms.records import ADDS, step_schema
from ..stage import Function

_OWN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)@.+")


@dataclass(frozen=True)
class Select:
    """Applies `rule` to every detection, then `image` to every image. One without regions stays by default, for the
    image-text loss.

    own: a rule of the user's own, `module:function@revision`, importable by the workers. The function takes
    transforms/found.py's `Found`, the detections of some images that the rules on single detections left, and returns
    bool [n], true where one stays; what it rejects gets the verdict `own_rule`. It must judge an image by that image
    alone, as images come in batches of any size. The revision is the user's to raise when the function changes.
    scores_of: the fingerprint of the step before, on whose scores the thresholds were chosen. A threshold belongs to
    one detector and one way to make phrases: a chain that comes to `select` with other scores is refused.
    """

    name: ClassVar[str] = "select"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["select"]
    opens_model: ClassVar[bool] = False

    rule: SelectRule = field(default_factory=SelectRule)
    empty: Literal["keep", "reject"] = "keep"
    image: ImageRule = added(ImageRule())  # noqa: RUF009  (it makes a field)
    own: str | None = added(None)
    scores_of: str | None = operational(None)

    def __post_init__(self) -> None:
        if self.own is not None and not _OWN.fullmatch(self.own):
            check_pinned("own", self.own, "my_rules:sharp@1")
            raise ModelError(f"own: {self.own!r} is not module:function@revision")

    @property
    def reads(self) -> tuple[str, ...]:
        """The phrases, and what the score step says, only where a rule asks for them."""
        phrases = self.rule.reads_phrases or self.image.min_grounded is not None or self.own is not None
        agreement = self.rule.min_agreement is not None
        return ("width", "height", "detections", *["phrases"] * phrases, *["agreement"] * agreement)

    def open(self) -> Function:
        """Import the user's own rule, if there is one. Raises ModelError where that cannot be done."""
        own = _open_own(self.own) if self.own else None

        def select(batch: pa.Table) -> pa.Table:
            if self.rule.min_agreement is not None and "agreement" not in batch.column_names:
                raise ModelError("steps.select.rule.min_agreement: the recipe has no step `score`")
            columns = {name: batch[name].combine_chunks() for name in self.reads}
            given = (columns["detections"], columns["width"], columns["height"])
            phrases, agreement = columns.get("phrases"), columns.get("agreement")
            verdicts = judge(*given, self.rule, phrases=phrases, agreement=agreement, own=own)
            outcome, reason = pa.repeat(pa.scalar("kept"), len(batch)), pa.nulls(len(batch), pa.string())
            if self.empty == "reject" or self.image != ImageRule():
                empty = self.empty == "reject"
                reason = drop_images(*given, verdicts, self.rule, self.image, empty=empty, phrases=phrases)
                outcome = pc.if_else(reason.is_null(), "kept", "rejected")
                verdicts = pc.if_else(reason.is_null(), verdicts, pa.nulls(len(batch), verdicts.type))
            details = pa.nulls(len(batch), pa.string())
            table = [batch["key"].combine_chunks(), outcome, reason, details, verdicts]
            return pa.Table.from_arrays(table, schema=step_schema(self.name))

        return select


def _open_own(reference: str) -> Own:
    """Import a user's rule and watch over what it answers: nonsense is no image's fault, so it ends the run."""
    match = _OWN.fullmatch(reference)
    assert match is not None
    module, function = match.groups()
    what = f"steps.select.own: {reference}"
    try:
        rule = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{what}: {error}") from None
    if not callable(rule):
        raise ModelError(f"{what}: is not a function")

    def own(found: Found) -> Bools:
        keep = rule(found)
        if not isinstance(keep, np.ndarray) or keep.dtype != np.bool_ or keep.shape != (len(found),):
            said = f"{keep.dtype} {list(keep.shape)}" if isinstance(keep, np.ndarray) else type(keep).__name__
            raise ModelError(f"{what}: answered with {said} instead of a numpy array bool [{len(found)}]")
        return keep

    return own
