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

Kind = Literal["paper", "owl-st", "grit", "fg-clip"]
Spans = Iterable[tuple[int, int]]  # of characters, [start, end), in order of their starts


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a caption: text = caption[start:end], and its Penn Treebank tag (`DT`, `JJ`, `NNS`, ...).

    Of a parsed caption also the place of its head among the caption's tokens (its own place: a root) and the label of
    the arc between them, as spaCy's English models name it (`nsubj`, `prep`, ...).
    """

    text: str
    start: int
    end: int
    tag: str = ""
    head: int = -1
    dep: str = ""


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


# Words that speak of a file, a page or a shop rather than of what is to be seen, in lower case. The paper drops about
# 60 such words (after OWL-ST: Minderer et al. 2024, appendix A.2); this list is our own, in their spirit.
_WEB = """
    image images img photo photos photograph photographs photography pic pics picture pictures screenshot thumbnail
    thumbnails wallpaper wallpapers background backgrounds clipart illustration illustrations vector vectors
    video videos stock royalty free premium download downloads uploaded preview hd 4k resolution
    jpg jpeg png gif svg webp pdf
    http https www com html url blog website online
    amazon ebay etsy alibaba aliexpress pinterest instagram facebook twitter tumblr youtube shutterstock gettyimages
    sale shipping wholesale
"""
WEB_WORDS = frozenset(_WEB.split())
_PARTS = re.compile(r"[\W_]+")

# Words that name nothing by themselves, in lower case: articles, pronouns, prepositions, auxiliaries, quantities,
# sides, and the tails of contractions as taggers cut them.
_STOP = """
    a an the this that these those such
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one ones oneself who whom whose which what whoever whatever
    someone somebody something anyone anybody anything everyone everybody everything none nobody nothing
    about above across after against along amid among around as at before behind below beneath beside besides between
    beyond by despite down during except for from in inside into like near of off on onto out outside over past per
    since than through throughout till to toward towards under underneath until unto up upon via with within without
    and but or nor so yet if because although though while whereas whether unless
    be am is are was were been being do does did doing done have has had having can could may might must shall should
    will would ought need dare
    all any both each either enough every few fewer less least little lot lots many more most much neither no not only
    other others another own same front back top bottom side several some sundry various
    again ago already also always away else ever even far further here there hence how however instead just maybe
    never now often once perhaps quite rather really soon still then thence thus together too very well when whence
    where why yes
    two three four five six seven eight nine ten first second third last next
    'd 'll 'm 're 's 've n't ’d ’ll ’m ’re ’s ’ve n’t etc e.g. i.e.
"""
STOP_WORDS = frozenset(_STOP.split())
_TAIL = re.compile("n?['’](?:t|s|d|ll|m|re|ve)$")  # of a contraction that no tagger has cut: it's, aren't

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
_PIECE = re.compile(r"[^\s,;|]+|[\n\r|]")

# Labels of arcs. A noun heads a chunk where its arc is one of _NOMINAL, or where it is joined to such a noun.
_NOMINAL = {"oprd", "nsubj", "dobj", "nsubjpass", "pcomp", "pobj", "dative", "appos", "attr", "ROOT"}
# What follows a noun and says which one: with a hat, sitting on a bench, that barks, and the 's of a possessor.
_MODIFIERS = {"prep", "acl", "relcl", "case"}
# What follows any other word and begins something new: conjunctions, insertions, what the parser could not attach.
_APART = {"cc", "preconj", "conj", "punct", "appos", "parataxis", "dep", "meta", "intj", "ROOT"}
# No expression ends in one of these tags or words: what they announce has been cut off.
_OPEN_TAGS = {"IN", "TO", "DT", "PDT", "CC", "WDT", "WP", "WP$", "WRB", "PRP$", "MD", "POS"}
_OPEN_WORDS = {"am", "is", "are", "was", "were", "be", "been", "being"}
_INNER_SYMBOLS = {"-", "–", "'", "’", '"', "“", "”", "/", "%"}  # which end no phrase where they touch a word


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
    tokens = [token for token in tokens if not _is_gap(token)]
    tags = ["" if _is_web_word(token.text) else token.tag for token in tokens]
    tags.append("")
    place = 0
    while place < len(tokens):
        noun = place + (tags[place] == "DT")
        while tags[noun].startswith("JJ"):
            noun += 1
        end = noun
        while tags[end].startswith("NN"):
            end += 1
        if end > noun and any(map(_says_something, tokens[place:end])):
            yield tokens[place].start, tokens[end - 1].end
        # A phrase that failed at `end` cannot begin later and succeed: all between are determiner and adjectives.
        place = max(end, place + 1)


def _ngrams(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    border = [_is_symbol(token) or all(map(_is_web_word, token.text.split("-"))) for token in tokens]
    says = [_says_something(token) and _TAIL.sub("", token.text.lower()) not in STOP_WORDS for token in tokens]
    for first in range(len(tokens)):
        said = False
        for last in range(first, min(first + _LONGEST, len(tokens))):
            if border[last]:
                break
            said = said or says[last]
            if said:
                yield tokens[first].start, tokens[last].end


def _noun_chunks(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    tree = _Tree(tokens)
    return ((tree.tokens[first].start, tree.tokens[noun].end) for first, noun in tree.chunks())


def _expressions(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    tree = _Tree(tokens)
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


class _Tree:
    """The dependency trees of a caption, white space left out; places count in `tokens`, heads out of range are roots.

    left[i]: the leftmost token below i. reach[i]: how far i goes to the right without a gap, a border, or a word that
    begins something new. after[i]: the first border (web word, line break, symbol of a list) at or after i. solid[i]:
    the last token up to i that an expression may end in.
    Tokens on a circle of heads, which no parser makes, stay as if nothing depended on them.
    """

    def __init__(self, given: Sequence[Token]) -> None:
        kept = [place for place, token in enumerate(given) if not _is_gap(token)]
        place_of = {place: new for new, place in enumerate(kept)}
        self.tokens = tokens = [given[place] for place in kept]
        self.heads = heads = [place_of.get(token.head, i) for i, token in enumerate(tokens)]
        self.solid: list[int] = list(range(len(tokens)))
        for i in range(1, len(tokens)):
            if _is_open(tokens[i]):
                self.solid[i] = self.solid[i - 1]
        self.after: list[int] = [*range(len(tokens)), len(tokens)]
        for i in reversed(range(len(tokens))):
            if not self._is_border(i):
                self.after[i] = self.after[i + 1]
        self.left = list(range(len(tokens)))
        self.reach = list(range(len(tokens)))
        children: list[list[int]] = [[] for _ in tokens]  # in the order of the caption
        for child, head in enumerate(heads):
            if child != head:
                children[head].append(child)
        pending = [len(below) for below in children]
        ready = [i for i, count in enumerate(pending) if not count]
        while ready:  # children before their heads
            i = ready.pop()
            self._measure(i, children[i])
            pending[heads[i]] -= 1
            if not pending[heads[i]] and heads[i] != i:
                ready.append(heads[i])

    def _measure(self, i: int, children: Sequence[int]) -> None:
        self.left[i] = min([i, *(self.left[child] for child in children)])
        noun = self.tokens[i].tag.startswith("NN")
        for child in children:
            if child > i:
                dep = self.tokens[child].dep
                apart = dep not in _MODIFIERS if noun else dep in _APART
                if apart or self.left[child] != self.reach[i] + 1 or self.after[self.left[child]] <= child:
                    break
                self.reach[i] = self.reach[child]

    def _is_border(self, i: int) -> bool:
        """A symbol is one after a noun only: `a big, red car` is one phrase, `dog, cat, red car` are three."""
        token = self.tokens[i]
        if not _is_symbol(token):
            return _is_web_word(token.text)
        if token.text.isspace() or "|" in token.text:
            return True
        if not i or not self.tokens[i - 1].tag.startswith("NN") or token.text == "&":
            return False
        apart = self.tokens[i - 1].end < token.start and token.end < self.tokens[min(i + 1, len(self.tokens) - 1)].start
        return apart or token.text not in _INNER_SYMBOLS

    def chunks(self) -> Iterator[tuple[int, int]]:
        """The first token and the noun of each chunk that says something, none inside another, in order."""
        anchor: list[int] = []  # follows the conjunctions that lead to the left
        for i, token in enumerate(self.tokens):
            anchor.append(anchor[self.heads[i]] if token.dep == "conj" and self.heads[i] < i else i)
        end = -1
        for noun, token in enumerate(self.tokens):
            if not token.tag.startswith("NN") or self.left[noun] <= end:
                continue
            joined = anchor[self.heads[noun]] if token.dep == "conj" else noun
            if self.tokens[joined].dep not in _NOMINAL:
                continue
            end = noun
            first = self.left[noun]
            while first <= noun:  # a chunk of keywords falls apart at its borders
                stop = min(self.after[first], noun + 1)
                yield from self._trimmed(first, stop)
                first = stop + 1

    def _trimmed(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        while first < stop and (_is_symbol(self.tokens[first]) or self.tokens[first].tag == "CC"):
            first += 1
        while first < stop and (_is_symbol(self.tokens[stop - 1]) or not self.tokens[stop - 1].tag.startswith("NN")):
            stop -= 1
        if any(map(_says_something, self.tokens[first:stop])):
            yield first, stop - 1

    def grown(self, noun: int) -> int:
        """The last token of the referring expression of a noun."""
        return max(noun, self.solid[self.reach[noun]])


def _is_gap(token: Token) -> bool:
    return token.text.isspace() and "\n" not in token.text and "\r" not in token.text


def _is_symbol(token: Token) -> bool:
    return not any(map(str.isalnum, token.text))


def _is_open(token: Token) -> bool:
    return token.tag in _OPEN_TAGS or token.text.lower() in _OPEN_WORDS or _is_symbol(token)


def _is_web_word(text: str) -> bool:
    """Also `photo.jpg`, `www.example.com` and `stock_photo`, which taggers leave whole and take for nouns."""
    word = text.lower()
    return word in WEB_WORDS or (not word.isalnum() and not WEB_WORDS.isdisjoint(_PARTS.split(word)))


def _says_something(token: Token) -> bool:
    return token.text.lower() not in STOP_WORDS and any(map(str.isalpha, token.text))
