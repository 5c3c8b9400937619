"""Captions from the web and from models are hostile text; here they become one line of valid Unicode."""

import html
import re
import unicodedata

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
