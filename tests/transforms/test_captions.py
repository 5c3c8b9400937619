import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesl.transforms.captions import MAX_CHARS, clean, visible


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  a \t red\n\nball ", "a red ball"),
        ("<b>a red</b> ball<br/>on <a href='x'>it</a><!-- hidden -->", "a red ball on it"),
        ("salt &amp; pepper&nbsp;mill &#39;old&#39;", "salt & pepper mill 'old'"),
        ("2 < 3 > 1 and <3", "2 < 3 > 1 and <3"),
        ("a\x00b\x1b[31m\x7f\u2028c", "a b [31m c"),
        ("half \ud83d pair", "half pair"),
        ("cafe\u0301", "café"),
        ("👩\u200d👩\u200d👧 family", "👩\u200d👩\u200d👧 family"),
        ("<script>alert(1)</script>", "alert(1)"),
        ("", ""),
        ("a \ue000 b \uffff c \u0378 d", "a b c d"),  # private use, no characters
        ("ﬁne ① ½ Å", "ﬁne ① ½ Å"),  # composed, not replaced by look-alikes
        ("1 &lt; 2", "1 < 2"),
        ("press &lt;b&gt; for bold", "press <b> for bold"),  # what is escaped is text and no tag
        ("x" * (MAX_CHARS - 1) + " y", "x" * (MAX_CHARS - 1)),
    ],
)
def test_clean(text: str, plain: str) -> None:
    assert clean(text) == plain


def test_length_is_bounded() -> None:
    assert len(clean("word " * 100_000)) <= MAX_CHARS
    assert len(clean("<" * 1_000_000)) <= MAX_CHARS


@given(st.text(alphabet=st.characters()))
def test_any_text_becomes_one_valid_line(text: str) -> None:
    once = clean(text)
    assert once == once.strip()
    assert "\n" not in once
    once.encode()
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in once)


def test_visible() -> None:
    assert (
        visible("a \x1b]0;owned\x07\x1b[2J b\u202e\n漢字 😀") == "a \ufffd]0;owned\ufffd\ufffd[2J b\ufffd\ufffd漢字 😀"
    )
