"""Which parts of a caption are asked for in the image: the pure part of the phrases step.

Phrases are cut from the caption, never rewritten, so that a region can cite the characters it answers to. A tagger
(models/tagger.py) supplies the tokens, or `words` where no model is needed; offsets count characters of the original
caption throughout. Every kind of phrase takes time that grows with the caption's length alone, whatever it says.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from .trees import STOP_WORDS, Token, Tree, is_gap, is_symbol, is_web_word, says_something

Kind = Literal["paper", "owl-st", "grit", "fg-clip"]
Spans = Iterable[tuple[int, int]]  # of characters, [start, end), in order of their starts


# How many phrases an image gets where the recipe does not say: the paper's 20, and OWL-ST's 300, which is also what the
# others get (their papers state no limit).
_LIMITS: dict[Kind, int] = {"paper": 20, "owl-st": 300, "grit": 300, "fg-clip": 300}


@dataclass(frozen=True)
class PhraseRule:
    """Which phrases an image gets, and how many. The defaults are the paper's where it says (CLOC, section 4).

    kind: `paper`, what the grammar of Chen et al. 2024 (CLOC, appendix C) finds; `owl-st`, every run of up to 10 words
    (Minderer et al. 2023), without any model; `fg-clip`, the parser's noun chunks (Xie et al. 2025); `grit`, those
    grown to referring expressions (Peng et al. 2023, KOSMOS-2, section 2). `noun_phrases` says more.
    max_phrases: the first that many, in the order of the captions; None: 20 for `paper`, 300 for the others.
    dedup: of phrases that differ in case and white space only, the first stays (a detector would be asked the same).
    max_chars: of each caption, no more than that is read.
    Raises ValueError for negative limits.
    """

    max_phrases: int | None = None
    dedup: bool = True
    max_chars: int = 2000
    kind: Kind = "paper"

    def __post_init__(self) -> None:
        if self.kind not in _LIMITS:
            raise ValueError(f"kind: {self.kind!r} is not one of {', '.join(_LIMITS)}")
        for name in ("max_phrases", "max_chars"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, is {getattr(self, name)}")
        # Resolved here, so that fingerprints and `vesl plan` see the number, and 20 is the same as nothing said.
        object.__setattr__(self, "max_phrases", self.limit)

    @property
    def limit(self) -> int:
        """How many phrases an image gets at most."""
        return _LIMITS[self.kind] if self.max_phrases is None else self.max_phrases

    @property
    def tags(self) -> bool:
        """Whether the tokens must come from a tagger; else `words` makes them."""
        return self.kind != "owl-st"

    @property
    def parses(self) -> bool:
        """Whether the tokens must have heads and labels."""
        return self.kind in ("grit", "fg-clip")


# Nouns for what no box can hold, in lower case, singular: feelings, ideas, times, events of speech, and the words by
# which captions speak about themselves. KOSMOS-2 names time, love and freedom and says no more; this list is our own.
# Words that as often name a thing (light, work, fire, party, fashion, nature) are left out on purpose.
_ABSTRACT = """
    anger anxiety atmosphere attitude autumn balance beauty beginning belief benefit birth career challenge chaos
    childhood choice combination comfort concentration concept confidence connection contrast creativity culture day
    decade desire detail direction ease effect emotion energy evening event faith fear feeling focus fortune freedom
    friendship future glory grace happiness harmony hate health hope idea imagination importance inspiration
    intelligence joy kind leadership leisure life lifestyle loneliness love loyalty luxury manner meaning memory mix
    mixture moment month mood morning mystery night nostalgia passion past patriotism peace period pleasure
    possibility power presence promise protection quality quantity reality relationship relaxation religion romance
    sadness safety scene security sense serenity silence solitude sophistication sort spirit spirituality strength
    stress success suffering summer time tranquility trust type unity variety version view violence warmth way
    wealth week weekend well-being wellness winter wisdom wonder year
"""
ABSTRACT_WORDS = frozenset(_ABSTRACT.split())

_LONGEST = 10  # words of an n-gram
_TAIL = re.compile("n?['’](?:t|s|d|ll|m|re|ve)$")  # of a contraction that no tagger has cut: it's, aren't
_PIECE = re.compile(r"[^\s,;|]+|[\n\r|]")


def cut(caption: str, rule: PhraseRule) -> str:
    """The head of a caption that is read: at most max_chars characters, ending before a word that would not fit whole.

    Offsets into the head are offsets into the caption. Tag this, not the caption: a tagger's time grows with the text.
    """
    if len(caption) <= rule.max_chars:
        return caption
    head = caption[: rule.max_chars]
    words = head.rsplit(None, 1)
    if caption[rule.max_chars].isspace() or head[-1:].isspace() or len(words) < 2:
        return head
    return head[: -len(words[1])]


def words(text: str) -> list[Token]:
    """The words of a caption without any model, untagged, and the borders between them.

    A word is what stands between white space, commas, semicolons and bars, without the punctuation at its ends. Line
    breaks, bars and symbols that stand alone are tokens too, for n-grams end there; a lone `&` is none.
    """
    found = []
    for match in _PIECE.finditer(text):
        start, end = match.span()
        while start < end and unicodedata.category(text[start])[0] not in "LNM":  # a mark may end a Hindi word
            start += 1
        while start < end and unicodedata.category(text[end - 1])[0] not in "LNM":
            end -= 1
        if start < end:
            found.append(Token(text[start:end], start, end))
        elif match.group() != "&":
            found.append(Token(match.group(), *match.span()))
    return found


def noun_phrases(
    captions: Sequence[Sequence[Token]], texts: Sequence[str], rule: PhraseRule
) -> list[tuple[str, int, int, int]]:
    """Find an image's phrases in its captions: (text, caption, start, end) with text = texts[caption][start:end].

    captions[i] are the tokens of texts[i], in order: parsed where the rule `parses`, tagged where it `tags`, else from
    `words`. In every kind a word of WEB_WORDS and a line break are borders that no phrase contains (papers remove such
    words before; as borders they leave every phrase one piece of the caption), a phrase needs a token that has a letter
    and is no stop word, and the captions of an image share one limit and one de-duplication.

    paper: what the grammar `{<DT>?<JJ.*>*<NN.*>+}` matches, greedily from the left (Chen et al. 2024, appendix C).
    owl-st: runs of 1 to 10 words, by position, then length, with the commas between them (Minderer et al. 2023).
    fg-clip: noun chunks by the dependency tree: a noun with all that belongs to it on its left. FG-CLIP parses with
    spaCy; unlike the grammar's, these keep numbers, possessors and adverbs (`two very small dogs`, `the man's hat`).
    grit: those chunks whose noun is not in ABSTRACT_WORDS, each grown by the prepositions, participles and relative
    clauses that follow it without a gap, up to a conjunction; only what no other contains (Peng et al. 2023, section
    2). There the box is found by the chunk and handed to the expression; here the expression itself is asked for.
    Raises ValueError where there are not as many texts as captions.
    """
    found: list[tuple[str, int, int, int]] = []
    seen: set[str] = set()
    for index, (tokens, text) in enumerate(zip(captions, texts, strict=True)):
        for start, end in _FINDERS[rule.kind](tokens):
            if len(found) >= rule.limit:
                return found
            phrase = text[start:end]
            same = " ".join(phrase.lower().split())
            if not (rule.dedup and same in seen):
                seen.add(same)
                found.append((phrase, index, start, end))
    return found


def _chunks(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    """What the grammar matches. One pass, however the tags fall."""
    tokens = [token for token in tokens if not is_gap(token)]
    tags = ["" if is_web_word(token.text) else token.tag for token in tokens]
    tags.append("")
    place = 0
    while place < len(tokens):
        noun = place + (tags[place] == "DT")
        while tags[noun].startswith("JJ"):
            noun += 1
        end = noun
        while tags[end].startswith("NN"):
            end += 1
        if end > noun and any(map(says_something, tokens[place:end])):
            yield tokens[place].start, tokens[end - 1].end
        # A phrase that failed at `end` cannot begin later and succeed: all between are determiner and adjectives.
        place = max(end, place + 1)


def _ngrams(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    border = [is_symbol(token) or all(map(is_web_word, token.text.split("-"))) for token in tokens]
    says = [says_something(token) and _TAIL.sub("", token.text.lower()) not in STOP_WORDS for token in tokens]
    for first in range(len(tokens)):
        said = False
        for last in range(first, min(first + _LONGEST, len(tokens))):
            if border[last]:
                break
            said = said or says[last]
            if said:
                yield tokens[first].start, tokens[last].end


def _noun_chunks(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    tree = Tree(tokens)
    return ((tree.tokens[first].start, tree.tokens[noun].end) for first, noun in tree.chunks())


def _expressions(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    tree = Tree(tokens)
    furthest = -1
    for first, noun in tree.chunks():
        word = tree.tokens[noun].text.lower()
        if not ABSTRACT_WORDS.isdisjoint((word, word.removesuffix("s"), re.sub("ies$", "y", word))):
            continue
        last = tree.grown(noun)
        if last > furthest:  # the chunks before began further left
            furthest = last
            yield tree.tokens[first].start, tree.tokens[last].end


_FINDERS: dict[Kind, Callable[[Sequence[Token]], Spans]] = {
    "paper": _chunks,
    "owl-st": _ngrams,
    "grit": _expressions,
    "fg-clip": _noun_chunks,
}
