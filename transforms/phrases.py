"""Which parts of a caption are asked for in the image: the pure part of the phrases step.

Phrases are cut from the caption, never rewritten, so that a region can cite the characters it answers to. A tagger
(models/tagger.py) supplies the tokens; offsets count characters of the original caption throughout.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Token:
    """A token of a caption: text = caption[start:end], and its Penn Treebank tag (`DT`, `JJ`, `NNS`, ...)."""

    text: str
    start: int
    end: int
    tag: str


@dataclass(frozen=True)
class PhraseRule:
    """How many phrases an image gets. The defaults are the paper's where it says (Chen et al. 2024, CLOC, section 4).

    max_phrases: the first that many, in the order of the captions. dedup: of phrases that differ in case and white
    space only, the first stays (a detector would be asked the same).
    max_chars: of each caption, no more than that is read.
    Raises ValueError for negative limits.
    """

    max_phrases: int = 20
    dedup: bool = True
    max_chars: int = 2000

    def __post_init__(self) -> None:
        for name in ("max_phrases", "max_chars"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, is {getattr(self, name)}")


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


def noun_phrases(
    captions: Sequence[Sequence[Token]], texts: Sequence[str], rule: PhraseRule
) -> list[tuple[str, int, int, int]]:
    """Find an image's phrases in its captions: (text, caption, start, end) with text = texts[caption][start:end].

    captions[i] are the tokens of texts[i], in order. Phrases are what the grammar `{<DT>?<JJ.*>*<NN.*>+}` matches,
    greedily from the left (Chen et al. 2024, CLOC, appendix C), between borders: any other token, a line break, a word
    of WEB_WORDS (removed before tagging in the paper; as borders they leave every phrase one piece of the caption). A
    phrase needs a token that has a letter and is no stop word. The captions of an image share one
    limit and one de-duplication.
    Raises ValueError where there are not as many texts as captions.
    """
    found: list[tuple[str, int, int, int]] = []
    seen: set[str] = set()
    for index, (tokens, text) in enumerate(zip(captions, texts, strict=True)):
        for start, end in _chunks(tokens):
            if len(found) >= rule.max_phrases:
                return found
            phrase = text[start:end]
            same = " ".join(phrase.lower().split())
            if not (rule.dedup and same in seen):
                seen.add(same)
                found.append((phrase, index, start, end))
    return found


def _chunks(tokens: Sequence[Token]) -> Iterator[tuple[int, int]]:
    """Character spans of the phrases of one caption. One pass, however the tags fall."""
    tokens = [token for token in tokens if not token.text.isspace() or "\n" in token.text or "\r" in token.text]
    tags = ["" if _is_web_word(token) else token.tag for token in tokens]
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


def _is_web_word(token: Token) -> bool:
    """Also `photo.jpg`, `www.example.com` and `stock_photo`, which taggers leave whole and take for nouns."""
    word = token.text.lower()
    return word in WEB_WORDS or (not word.isalnum() and not WEB_WORDS.isdisjoint(_PARTS.split(word)))


def _says_something(token: Token) -> bool:
    return token.text.lower() not in STOP_WORDS and any(map(str.isalpha, token.text))
