"""Captions from the web and from models are hostile text; here they become one line of valid Unicode."""

import unicodedata

MAX_CHARS = 10_000
# Line and paragraph ends, controls, surrogates: never part of a caption. Joiners and direction marks stay, as
# several scripts and emoji need them.
_GAPS = frozenset({"Cc", "Cs", "Co", "Cn", "Zl", "Zp"})


def clean(text: str) -> str:
    """Canonical composition (NFC), no control characters or surrogates, single spaces, at most MAX_CHARS characters."""
    text = text[: 4 * MAX_CHARS]
    if not text.isascii() or not text.isprintable():
        text = "".join(" " if unicodedata.category(c) in _GAPS else c for c in text)
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())[:MAX_CHARS].rstrip()
