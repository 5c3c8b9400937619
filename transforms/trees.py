"""The tokens of a caption, what they say by themselves, and the dependency trees that a parser hangs them on."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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


class Tree:
    """The dependency trees of a caption, white space left out; places count in `tokens`, heads out of range are roots.

    left[i]: the leftmost token below i. reach[i]: how far i goes to the right without a gap, a border, or a word that
    begins something new. after[i]: the first border (web word, line break, symbol of a list) at or after i. solid[i]:
    the last token up to i that an expression may end in.
    Tokens on a circle of heads, which no parser makes, stay as if nothing depended on them.
    """

    def __init__(self, given: Sequence[Token]) -> None:
        kept = [place for place, token in enumerate(given) if not is_gap(token)]
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
        if not is_symbol(token):
            return is_web_word(token.text)
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
        while first < stop and (is_symbol(self.tokens[first]) or self.tokens[first].tag == "CC"):
            first += 1
        while first < stop and (is_symbol(self.tokens[stop - 1]) or not self.tokens[stop - 1].tag.startswith("NN")):
            stop -= 1
        if any(map(says_something, self.tokens[first:stop])):
            yield first, stop - 1

    def grown(self, noun: int) -> int:
        """The last token of the referring expression of a noun."""
        return max(noun, self.solid[self.reach[noun]])


def is_gap(token: Token) -> bool:
    """White space that is no border."""
    return token.text.isspace() and "\n" not in token.text and "\r" not in token.text


def is_symbol(token: Token) -> bool:
    """Neither a word nor a number."""
    return not any(map(str.isalnum, token.text))


def _is_open(token: Token) -> bool:
    return token.tag in _OPEN_TAGS or token.text.lower() in _OPEN_WORDS or is_symbol(token)


def is_web_word(text: str) -> bool:
    """Also `photo.jpg`, `www.example.com` and `stock_photo`, which taggers leave whole and take for nouns."""
    word = text.lower()
    return word in WEB_WORDS or (not word.isalnum() and not WEB_WORDS.isdisjoint(_PARTS.split(word)))


def says_something(token: Token) -> bool:
    """A word that is no stop word."""
    return token.text.lower() not in STOP_WORDS and any(map(str.isalpha, token.text))
