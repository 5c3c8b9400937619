"""Captions from the web and from models are hostile text; here they become one line of valid Unicode.

And what a model wrote is examined: what is no caption is told apart, by its reason, and what is one is kept.
"""

import html
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from .refusals import refuses

MAX_CHARS = 10_000
# Controls, surrogates, private and unassigned characters, line and paragraph ends: never part of a caption. Joiners and
# direction marks stay, as several scripts and emoji need them.
_GAPS = frozenset({"Cc", "Cs", "Co", "Cn", "Zl", "Zp"})
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--.{0,300}?-->")


def clean(text: str) -> str:
    """Plain text of at most MAX_CHARS characters: no HTML tags, entities resolved, no controls, single spaces.

    Canonically composed (NFC). What only looks like a tag ("2 < 3 > 1") stays.
    """
    text = text[: 4 * MAX_CHARS]
    text = html.unescape(_TAG.sub(" ", text))
    if not text.isascii() or not text.isprintable():
        text = "".join(" " if unicodedata.category(c) in _GAPS else c for c in text)
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())[:MAX_CHARS].rstrip()


def visible(text: object) -> str:
    """Text from strangers for a terminal: nothing in it moves the cursor, rings, hides or turns the rest around."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


@dataclass(frozen=True)
class CaptionRule:
    """What of a model's writing is no caption. Refusals are known in English, Spanish, French, German, Portuguese,
    Russian, Chinese and Japanese; the rest in any script.

    A loop is a block of words that stands `loop_times` times or more in a row, over at least `loop_words` words ("no,
    no, no" is none, nor is what stands within quotation marks). `min_distinct` is of three-word sequences: the share
    that is new; what goes round in small variations has little. 0 switches each of these off.
    """

    refusals: bool = True
    echoes: bool = True
    loop_times: int = 3
    loop_words: int = 12
    min_distinct: float = 0.35
    language: str | None = None  # ISO 639 code, such as "en": what is surely another is rejected
    language_sure: float = 0.6  # how sure (0..1) one has to be that it is another

    def __post_init__(self) -> None:
        if self.loop_times < 2 and self.loop_times != 0:
            raise ValueError(f"loop_times: {self.loop_times} is neither 0 (off) nor at least 2")
        if self.loop_words < 0:
            raise ValueError(f"loop_words: {self.loop_words} is negative")
        for name in ("min_distinct", "language_sure"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share between 0 and 1")
        if self.language is not None and not re.fullmatch("[a-z]{2,3}", self.language):
            raise ValueError(f"language: {self.language!r} is not a code such as 'en'")


LanguageOf = Callable[[str], tuple[str, float]]  # the likeliest language's code, and how sure that is (0..1)


@dataclass(frozen=True)
class Examined:
    """A usable text and what was done to it, or "" and the reason alone."""

    text: str
    notes: tuple[str, ...] = ()


_FEW_LETTERS = 20  # of so few, nobody can tell the language
_FEW_WORDS = 5  # what is left before a loop must have as many to be a caption
_DISTINCT_FROM = 30  # three-word sequences; with fewer, repeating some is no sign
_LONGEST_LOOP = 64  # words in a block: makes the search linear


def examine(
    text: str, rule: CaptionRule, *, prompt: str = "", complete: bool = True, language_of: LanguageOf | None = None
) -> Examined:
    """Judge what a model wrote to `prompt`, as it was sent. Takes time in proportion to the text's length.

    Notes: echo_removed (the prompt stood before the answer), loop_cut (kept to the last whole sentence before a loop),
    cut_at_sentence (likewise, where the token limit cut it, so not `complete`), unfinished (that has no whole sentence;
    only the last word is cut). Reasons: empty_caption, refusal, prompt_echo, repetition, wrong_language.
    """
    text, notes = clean(text), []
    if not _said(text):
        return Examined("", ("empty_caption",))
    if rule.echoes and (end := _echo(text, prompt)):
        text = _AFTER_ECHO.sub("", text[end:], count=1)
        if not _said(text):
            return Examined("", ("prompt_echo",))
        notes.append("echo_removed")
    if rule.refusals and refuses(text):
        return Examined("", ("refusal",))
    if (start := _loop(text, rule)) is not None:
        text = text[: max(_sentence_ends(text[:start]), default=0)]
        if sum(1 for _ in islice(_WORD.finditer(text), _FEW_WORDS)) < _FEW_WORDS:
            return Examined("", ("repetition",))
        notes.append("loop_cut")
    elif not complete:
        end = max(_sentence_ends(text), default=0)
        notes.append("cut_at_sentence" if end else "unfinished")
        text = text[:end] if end else text.rpartition(" ")[0].rstrip(" ,;:-–—(\"'“‘") or text
    if _goes_round(text, rule):
        return Examined("", ("repetition",))
    if not speaks(text, rule, language_of):
        return Examined("", ("wrong_language",))
    return Examined(text, tuple(notes))


def speaks(text: str, rule: CaptionRule, language_of: LanguageOf | None) -> bool:
    """Whether a text may be in the wanted language: only what is surely in another is not."""
    if rule.language is None or language_of is None:
        return True
    if sum(c.isalpha() for c in text) < _FEW_LETTERS and text.isascii():
        return True
    code, sure = language_of(text)
    return code == rule.language or sure < rule.language_sure


# Words, and single characters of the scripts that put no spaces between words (Thai to Khmer, kana, Han).
_WORD = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_]+(?:['’][^\W_]+)*")
_SAID = re.compile(r"[^\W_]")


def _said(text: str) -> bool:
    return _SAID.search(text) is not None


# -- Sentences

# A run of marks is looked at from its beginning only: this and the possessive quantifiers keep the search linear.
_END = re.compile(r"(?:(?<![.!?…])[.!?…]++[\"'”’)\]»]*+(?=\s|$)|[。！？｡]++[」』”’）]*+)")
_ABBREVIATED = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]?|mr|mrs|ms|dr|prof|st|mt|jr|sr|no|vs|etc|approx|fig|ft|inc|"
    r"co|ltd|ave|rd|blvd|gen|sgt|capt|lt|col|rev)\.[\"'”’)\]»]*$",
    re.IGNORECASE,
)


def _sentence_ends(text: str) -> Iterator[int]:
    """Where sentences end, after their marks. An abbreviation or a list's number ends none, nor does "... and"."""
    begin = 0
    for match in _END.finditer(text):
        end = match.end()
        follows = text[end : end + 2].lstrip()[:1]
        if follows.islower() or not any(c.isalpha() for c in text[begin : match.start()]):
            continue
        if match[0].startswith(".") and _ABBREVIATED.search(text[max(begin, match.start() - 12) : end]):
            continue
        yield end
        begin = end


# -- The prompt, said back

# A prompt that begins like a caption ("a photo of") is meant as one's beginning: it belongs to what is written.
_CAPTION_LIKE = frozenset({"a", "an", "the", "this", "there", "it", "in", "on", "photo", "picture", "image"})
_AFTER_ECHO = re.compile(r"^[\s.:;,!?>\])”’|#*–—-]*(?:(?:assistant|answer|response|caption|description)\s*:\s*)?", re.I)
_ROLE = re.compile(r"[\s#*<>|\[\]]*(?:(?:user|human|question|prompt|instruction|q)\s*:\s*)?[\"“']?", re.IGNORECASE)

_CLOSED = re.compile(r"[\s.:;,!?]*[\"”']")


def _echo(text: str, prompt: str) -> int:
    """Where the prompt ends that a text begins with (all of it, or all of the text): 0 where it does not."""
    asked = _WORD.findall(clean(prompt).casefold())
    if not asked or (len(asked) < 8 and asked[0] in _CAPTION_LIKE):
        return 0
    role = _ROLE.match(text)
    begin = role.end() if role else 0
    words = list(islice(_WORD.finditer(text, begin), len(asked)))
    if [word[0].casefold() for word in words] != asked[: len(words)] or (len(words) < len(asked) and len(words) < 4):
        return 0
    if not words:
        return 0
    end = words[-1].end()
    closed = _CLOSED.match(text, end) if text[begin - 1 : begin] in ('"', "“", "'") else None
    return closed.end() if closed else end


# -- Loops

_STUTTER = re.compile(r"(\S{1,8}?)\1{19,}")  # "hahaha...", "!!!!!...": within one word, or without any
_QUOTED = re.compile(  # of at most 400 characters: a mark that is never closed opens nothing
    r"\"[^\"]{1,400}+\"|“[^“”]{1,400}+”|«[^«»]{1,400}+»|「[^「」]{1,400}+」|(?<!\w)'[^']{1,400}+'(?!\w)"
)


def _loop(text: str, rule: CaptionRule) -> int | None:
    """Where a loop's second round begins (a character's position), the first loop's; None where there is none."""
    if not rule.loop_times:
        return None
    spans = [match.span() for match in _QUOTED.finditer(text)]
    opened = [start for start, _ in spans]

    def quoted(start: int, end: int) -> bool:
        at = bisect_right(opened, start) - 1
        return at >= 0 and end <= spans[at][1]

    stutters = (m for m in _STUTTER.finditer(text) if not quoted(*m.span()))
    first = next((m.start() + len(m[1]) for m in stutters), None)
    words = list(_WORD.finditer(text))
    ids = _numbered([word[0].casefold() for word in words])
    for period in range(1, min(_LONGEST_LOOP, len(words) // rule.loop_times) + 1):
        rounds = max(rule.loop_times, -(-rule.loop_words // period))
        same = np.concatenate(([False], ids[period:] == ids[:-period], [False]))
        edges = np.flatnonzero(same[1:] != same[:-1])
        starts, ends = edges[::2], edges[1::2]
        for i in np.flatnonzero(ends - starts >= (rounds - 1) * period).tolist():
            begin, again, end = int(starts[i]), int(starts[i]) + period, int(ends[i]) + period
            if not quoted(words[begin].start(), words[end - 1].end()):
                at = words[again].start()
                first = at if first is None else min(first, at)
                break
    return first


def _goes_round(text: str, rule: CaptionRule) -> bool:
    ids = _numbered(_WORD.findall(text.casefold()))
    if len(ids) - 2 < _DISTINCT_FROM:
        return False
    base = int(ids.max()) + 1
    threes = (ids[:-2] * base + ids[1:-1]) * base + ids[2:]
    return len(np.unique(threes)) < rule.min_distinct * len(threes)


def _numbered(words: list[str]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    numbers: dict[str, int] = {}
    return np.fromiter((numbers.setdefault(word, len(numbers)) for word in words), np.int64, len(words))
