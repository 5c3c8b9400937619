"""The grammar against the regular expression that it stands for; captions as the web has them."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesl.transforms.phrases import STOP_WORDS, WEB_WORDS, PhraseRule, Token, cut, noun_phrases

ALL = PhraseRule(max_phrases=10_000, dedup=False)


def tokens(tagged: str) -> tuple[list[Token], str]:
    """`a/DT red/JJ car/NN` as tokens, and the caption that they come from."""
    made: list[Token] = []
    text = ""
    for item in tagged.split(" "):
        word, _, tag = item.rpartition("/")
        text += " " * bool(text)
        made.append(Token(word, len(text), len(text) + len(word), tag))
        text += word
    return made, text


def texts(*tagged: str, rule: PhraseRule = ALL) -> list[str]:
    made = [tokens(one) for one in tagged]
    found = noun_phrases([one for one, _ in made], [text for _, text in made], rule)
    assert all(made[caption][1][start:end] == text for text, caption, start, end in found)
    return [text for text, *_ in found]


@pytest.mark.parametrize(
    ("tagged", "expected"),
    [
        ("a/DT red/JJ car/NN on/IN the/DT old/JJ stone/NN bridge/NN", ["a red car", "the old stone bridge"]),
        ("A/DT Golden/JJ Retriever/NNP ,/, bigger/JJR dogs/NNS", ["A Golden Retriever", "bigger dogs"]),
        ("the/DT very/RB tall/JJ man/NN", ["tall man"]),
        ("all/PDT the/DT cats/NNS", ["the cats"]),
        ("the/DT the/DT red/JJ the/DT cat/NN", ["the cat"]),
        ("red/JJ and/CC green/JJ apples/NNS", ["green apples"]),
        ("dogs/NNS the/DT cats/NNS", ["dogs", "the cats"]),
        ("the/DT red/JJ", []),
        ("3/CD red/JJ", []),
        ("", []),
        # web words are borders
        ("free/JJ stock/NN photo/NN of/IN a/DT red/JJ car/NN wallpaper/NN HD/NNP", ["a red car"]),
        ("a/DT photo/NN studio/NN", ["studio"]),
        ("red/JJ image/NN car/NN", ["car"]),
        ("beach/NN IMG_0234.JPG/NN sunset/NN www.shop.com/NN https://a.b/c/NN", ["beach", "sunset"]),
        ("t-shirt/NN in/IN u.s./NNP", ["t-shirt", "u.s."]),
        # stop words and what has no letter
        ("the/DT one/NN with/IN others/NNS", []),
        ("something/NN red/JJ", []),
        ("The/DT Others/NNPS", []),
        ("2021/NN ☆☆/NN ||/NN 😀/NN the/DT 7/NN", []),
        ("the/DT 7/NN cats/NNS", ["the 7 cats"]),
        ("漢字/NN année/NN", ["漢字 année"]),
    ],
)
def test_phrases(tagged: str, expected: list[str]) -> None:
    assert texts(tagged) == expected


def test_white_space_inside_a_phrase_stays_and_a_line_break_ends_it() -> None:
    text = "A  big\tRed\nCar"
    spans = [(0, 1, "DT"), (2, 3, "_SP"), (3, 6, "JJ"), (6, 7, "_SP"), (7, 10, "NN"), (10, 11, "_SP"), (11, 14, "NN")]
    made = [Token(text[start:end], start, end, tag) for start, end, tag in spans]
    assert noun_phrases([made], [text], PhraseRule()) == [("A  big\tRed", 0, 0, 10), ("Car", 0, 11, 14)]


def test_captions_share_the_limit_and_the_de_duplication() -> None:
    one, two = (
        "a/DT Red/JJ car/NN and/CC dogs/NNS",
        "A/DT red/JJ Car/NN and/CC a/DT cat/NN in/IN dogs/NNS at/IN home/NN",
    )
    assert texts(one, two, rule=PhraseRule()) == ["a Red car", "dogs", "a cat", "home"]
    assert texts(one, two, rule=PhraseRule(max_phrases=3)) == ["a Red car", "dogs", "a cat"]
    assert texts(one, two, rule=PhraseRule(dedup=False)) == ["a Red car", "dogs", "A red Car", "a cat", "dogs", "home"]
    assert texts(one, two, rule=PhraseRule(max_phrases=0)) == []
    (made, text), (made_two, text_two) = tokens(one), tokens(two)
    assert noun_phrases([made, [], made_two], [text, "", text_two], PhraseRule())[2] == ("a cat", 2, 14, 19)
    assert len(texts(" of/IN ".join(f"thing{i}/NN" for i in range(30)), rule=PhraseRule())) == 20
    with pytest.raises(ValueError, match="zip"):
        noun_phrases([made], [text, text_two], PhraseRule())


def test_offsets_are_of_the_caption_as_given() -> None:
    text = "İİ Bus"  # lower() of it has eight characters
    made = [Token("İİ", 0, 2, "JJ"), Token("Bus", 3, 6, "NN")]
    assert noun_phrases([made], [text], PhraseRule()) == [("İİ Bus", 0, 0, 6)]


TAGS = st.sampled_from(["DT", "JJ", "JJR", "NN", "NNS", "NNP", "IN", "PDT", "VBG", ""])


@given(st.lists(st.tuples(TAGS, st.sampled_from(["x", "photo"])), max_size=30))
def test_the_grammar_is_the_regular_expression(items: list[tuple[str, str]]) -> None:
    made = [Token(word, 8 * i, 8 * i + len(word), tag) for i, (tag, word) in enumerate(items)]
    text = "".join(f"{word:8}" for _, word in items)
    tags = [("WEB" if word == "photo" else tag) for tag, word in items]
    line = "".join(f"<{tag:4}>" for tag in tags)  # six characters a tag
    expected = []
    for match in re.finditer(r"(?:<DT\s*>)?(?:<JJ[^<>]*>)*(?:<NN[^<>]*>)+", line):
        first, last = match.start() // 6, match.end() // 6 - 1
        expected.append((made[first].start, made[last].end))
    assert [(start, end) for _, _, start, end in noun_phrases([made], [text], ALL)] == expected


def test_time_grows_with_the_length_alone() -> None:
    for tags in (["JJ"], ["DT"], ["DT", "JJ"], ["NN"]):
        made = [Token("x", i, i + 1, tags[i % len(tags)]) for i in range(200_000)]
        start = time.process_time()
        noun_phrases([made], ["x" * len(made)], ALL)
        assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("caption", "head"),
    [
        ("short", "short"),
        ("0123456789", "0123456789"),
        ("a red car goes", "a red car "),
        ("a red cars goes", "a red cars"),
        ("a red ca  goes", "a red ca  "),
        ("0123456789abc", "0123456789"),
        ("  23456789abc", "  23456789"),
        ("          abc", "          "),
        ("", ""),
    ],
)
def test_cut_ends_between_words(caption: str, head: str) -> None:
    assert cut(caption, PhraseRule(max_chars=10)) == head


@given(st.text(st.sampled_from("ab \n\u2003é😀"), max_size=30), st.integers(0, 12))
def test_cut_is_a_head_that_breaks_no_word(caption: str, limit: int) -> None:
    head = cut(caption, PhraseRule(max_chars=limit))
    assert caption.startswith(head)
    assert len(head) <= limit
    rest = caption[len(head) :]
    whole = not rest or not head or rest[0].isspace() or head[-1].isspace()
    assert whole or (len(head) == limit and len(head.split()) == 1)
    assert head or not caption or limit == 0


def test_word_lists_match_what_they_are_compared_with() -> None:
    for words in (WEB_WORDS, STOP_WORDS):
        assert all(word == word.lower().strip() for word in words)
    assert 50 <= len(WEB_WORDS) <= 80
    assert WEB_WORDS.isdisjoint(STOP_WORDS)
    with pytest.raises(ValueError, match="max_phrases"):
        PhraseRule(max_phrases=-1)
