"""Each kind of phrase against a plain statement of what it is; captions as the web has them."""

import itertools
import random
import re
import time
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vesl.transforms.phrases import (
    ABSTRACT_WORDS,
    Kind,
    PhraseRule,
    cut,
    noun_phrases,
    words,
)
from vesl.transforms.trees import STOP_WORDS, WEB_WORDS, Token

ALL = PhraseRule(max_phrases=10_000, dedup=False)
NGRAMS = PhraseRule(kind="owl-st")


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
    for listed in (WEB_WORDS, STOP_WORDS, ABSTRACT_WORDS):
        assert all(word == word.lower().strip() for word in listed)
    assert 50 <= len(WEB_WORDS) <= 80
    assert WEB_WORDS.isdisjoint(STOP_WORDS)
    with pytest.raises(ValueError, match="max_phrases"):
        PhraseRule(max_phrases=-1)


def test_each_kind_has_its_limit() -> None:
    assert {kind: PhraseRule(kind=kind).max_phrases for kind in get_args(Kind)} == {
        "paper": 20,
        "owl-st": 300,
        "grit": 300,
        "fg-clip": 300,
    }
    assert PhraseRule() == PhraseRule(max_phrases=20)
    assert PhraseRule(kind="grit", max_phrases=0).max_phrases == 0
    assert [kind for kind in get_args(Kind) if PhraseRule(kind=kind).parses] == ["grit", "fg-clip"]
    assert [kind for kind in get_args(Kind) if not PhraseRule(kind=kind).tags] == ["owl-st"]
    with pytest.raises(ValueError, match="kind: 'glip' is not one of paper"):
        PhraseRule(kind="glip")  # type: ignore[arg-type]


def ngrams(text: str, rule: PhraseRule = NGRAMS) -> list[str]:
    found = noun_phrases([words(text)], [text], rule)
    assert all(text[start:end] == phrase for phrase, _, start, end in found)
    return [phrase for phrase, *_ in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red  car", ["a red", "a red  car", "red", "red  car", "car"]),
        ("of the", []),
        ("it's, don't they’re", []),
        ("dog, (cat)!", ["dog", "dog, (cat", "cat"]),
        ("dog,cat;bird", ["dog", "dog,cat", "dog,cat;bird", "cat", "cat;bird", "bird"]),
        ("dog|cat | bird\nfish - frog", ["dog", "cat", "bird", "fish", "frog"]),
        ("salt & pepper", ["salt", "salt & pepper", "pepper"]),
        ("car Photos IMG_1.jpg of https://a.b/c house stock-photo sugar-free", ["car", "house", "sugar-free"]),
        ("2021 (((( 7 😀", []),
        ("red 7", ["red", "red 7"]),
        ("e\u0301te\u0301! हिन्दी?", ["e\u0301te\u0301", "e\u0301te\u0301! हिन्दी", "हिन्दी"]),
        ("Red car red CAR", ["Red", "Red car", "Red car red", "Red car red CAR", "car", "car red", "car red CAR"]),
        ("", []),
    ],
)
def test_ngrams(text: str, expected: list[str]) -> None:
    assert ngrams(text) == expected


def test_ngrams_have_ten_words_and_an_image_three_hundred() -> None:
    text = " ".join(f"w{i}x" for i in range(40))
    found = ngrams(text)
    assert len(found) == 300
    assert found[9] == " ".join(text.split()[:10])
    assert found[10] == "w1x"
    assert len(ngrams(text, replace(NGRAMS, max_phrases=1000))) == 10 * 40 - 45


@given(st.lists(st.sampled_from(["a", "of", "Red", "car", "dog,", "(cat)", "photo", "\n", "|", "-", "7"]), max_size=40))
def test_ngrams_are_all_there_are(items: list[str]) -> None:
    text = " ".join(items)
    places = [match.span() for match in re.finditer(r"\w+|[^\w\s,()]|\n", text)]
    expected = []
    for first in range(len(places)):
        for last in range(first, min(first + 10, len(places))):
            said = [text[start:end].lower() for start, end in places[first : last + 1]]
            if not {"photo", "\n", "|", "-"} & set(said) and not set(said) <= {"a", "of", "7"}:
                expected.append((places[first][0], places[last][1]))
    rule = PhraseRule(kind="owl-st", max_phrases=1000, dedup=False)
    found = [(start, end) for _, _, start, end in noun_phrases([words(text)], [text], rule)]
    assert found == expected == sorted(set(found))
    once = ngrams(text, replace(rule, dedup=True))
    assert len({" ".join(phrase.lower().split()) for phrase in once}) == len(once)
    assert ngrams(text) == once[:300]


@given(st.text(st.characters(), max_size=60))
def test_words_of_any_text_are_cut_from_it(text: str) -> None:
    end = 0
    for word in words(text):
        assert end <= word.start < word.end
        assert word.text == text[word.start : word.end]
        end = word.end
    left = "".join(
        text[a:b]
        for a, b in zip([0, *(w.end for w in words(text))], [*(w.start for w in words(text)), len(text)], strict=True)
    )
    assert not any(map(str.isalnum, left))
    ngrams(text)


def parsed(given: str) -> tuple[list[Token], str]:
    """`a/DT/det/1 car/NN/ROOT/1` as tokens with labels and heads, and the caption that they come from."""
    made: list[Token] = []
    text = ""
    for item in given.split():
        word, tag, dep, head = item.rsplit("/", 3)
        text += " " * bool(text)
        made.append(Token(word, len(text), len(text) + len(word), tag, int(head), dep))
        text += word
    return made, text


def spans(tokens: list[Token], text: str, kind: Kind) -> list[tuple[int, int]]:
    found = noun_phrases([tokens], [text], PhraseRule(kind=kind, max_phrases=10**6, dedup=False))
    assert all(text[start:end] == phrase for phrase, _, start, end in found)
    return [(start, end) for _, _, start, end in found]


@pytest.mark.parametrize(
    ("given", "chunks", "expressions"),
    [
        (
            "a/DT/det/1 dog/NN/ROOT/1 in/IN/prep/1 a/DT/det/4 field/NN/pobj/2 of/IN/prep/4 flowers/NNS/pobj/5",
            ["a dog", "a field", "flowers"],
            ["a dog in a field of flowers"],
        ),
        (  # a conjunction ends an expression, what it joins is one of its own, and `with` announces nothing
            "man/NN/ROOT/0 with/IN/prep/0 hat/NN/pobj/1 and/CC/cc/2 dog/NN/conj/2 that/WDT/nsubj/6 barks/VBZ/relcl/4",
            ["man", "hat", "dog"],
            ["man with hat", "dog that barks"],
        ),
        ("man/NN/ROOT/0 with/IN/prep/0 and/CC/cc/1 without/IN/conj/1 hat/NN/pobj/3", ["man", "hat"], ["man", "hat"]),
        # web words are borders, to the left and to the right
        (
            "photo/NN/compound/1 studio/NN/ROOT/1 in/IN/prep/1 a/DT/det/5 big/JJ/amod/5 photo/NN/pobj/2",
            ["studio"],
            ["studio"],
        ),
        # a comma after a noun is a border in what the parser takes for one noun phrase
        (
            "dog/NN/compound/4 ,/,/punct/4 big/JJ/amod/4 ,/,/punct/4 car/NN/ROOT/4",
            ["dog", "big , car"],
            ["dog", "big , car"],
        ),
        (
            "love/NN/ROOT/0 of/IN/prep/0 memories/NNS/pobj/1 of/IN/prep/2 cats/NNS/pobj/3",
            ["love", "memories", "cats"],
            ["cats"],
        ),
        ("the/DT/det/1 others/NNS/ROOT/1 7/NN/ROOT/2 he/PRP/ROOT/3", [], []),
        # a gap: what follows the verb depends on the noun, and is not next to it
        ("man/NN/nsubj/1 sits/VBZ/ROOT/1 with/IN/prep/0 hat/NN/pobj/2", ["man", "hat"], ["man", "hat"]),
        ("dog/NN//0 car/NN//-1", [], []),  # not parsed
    ],
)  # fmt: skip
def test_chunks_and_expressions(given: str, chunks: list[str], expressions: list[str]) -> None:
    tokens, text = parsed(given)
    assert [text[start:end] for start, end in spans(tokens, text, "fg-clip")] == chunks
    assert [text[start:end] for start, end in spans(tokens, text, "grit")] == expressions


def test_white_space_counts_as_a_token_for_heads_only() -> None:
    text = "a  dog\tin\nbed"
    pieces = [(0, 1, "DT", 2, "det"), (2, 3, "_SP", 0, "dep"), (3, 6, "NN", 2, "ROOT"), (6, 7, "_SP", 2, "dep")]
    pieces += [(7, 9, "IN", 2, "prep"), (9, 10, "_SP", 4, "dep"), (10, 13, "NN", 4, "pobj")]
    tokens = [Token(text[start:end], start, end, tag, head, dep) for start, end, tag, head, dep in pieces]
    assert [text[start:end] for start, end in spans(tokens, text, "grit")] == ["a  dog", "bed"]
    text = text.replace("\n", " ")
    tokens = [replace(token, text=text[token.start : token.end]) for token in tokens]
    assert [text[start:end] for start, end in spans(tokens, text, "grit")] == [text]


LABELS = ["nsubj", "pobj", "conj", "prep", "relcl", "det", "amod", "punct", "cc", "ROOT"]
WORDS = ["cat", "red", "love", "photo", ",", "-", "the", "\n", " ", "dog"]  # each with any tag


def caption_of(draw: random.Random, heads: list[int]) -> tuple[list[Token], str]:
    said = [draw.choice(WORDS) for _ in heads]
    text = "".join(f"{word:6}" for word in said)
    tags = [draw.choice(["NN", "NN", "JJ", "IN", "DT", "VBG"]) for _ in heads]
    rows = enumerate(zip(said, tags, heads, strict=True))
    return [Token(w, 6 * i, 6 * i + len(w), tag, h, draw.choice(LABELS)) for i, (w, tag, h) in rows], text


def projective(draw: random.Random, count: int) -> list[int]:
    """Heads of a random tree over `count` tokens in which no two arcs cross."""
    heads = [0] * count
    todo = [(0, count, -1)]
    while todo:
        start, end, head = todo.pop()
        if start < end:
            root = draw.randrange(start, end)
            heads[root] = root if head < 0 else head
            for low, high in ((start, root), (root + 1, end)):
                cut = draw.randint(low, high)  # up to two children on each side
                todo += [(low, cut, root), (cut, high, root)]
    return heads


@given(st.lists(st.integers(-2, 30), max_size=30), st.randoms(use_true_random=False))
def test_chunks_are_apart_and_expressions_maximal_on_any_heads(heads: list[int], draw: random.Random) -> None:
    tokens, text = caption_of(draw, heads)
    chunks, expressions = spans(tokens, text, "fg-clip"), spans(tokens, text, "grit")
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(chunks))
    for found in (chunks, expressions):
        assert not any("photo" in text[start:end] or "\n" in text[start:end] for start, end in found)
    for one in expressions:
        assert not any(other != one and other[0] <= one[0] and one[1] <= other[1] for other in expressions)
    starts = {start for start, _ in chunks}
    assert all(start in starts for start, _ in expressions)
    for start, end in chunks:  # nothing but abstract nouns is lost
        word = text[start:end].split()[-1]
        assert word == "love" or any(a <= start and end <= b for a, b in expressions)


@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_expressions_cross_no_conjunction(count: int, draw: random.Random) -> None:
    heads = projective(draw, count)
    tokens, text = caption_of(draw, heads)
    chunk_end = dict(spans(tokens, text, "fg-clip"))
    for start, end in spans(tokens, text, "grit"):
        noun = chunk_end[start]
        for place, token in enumerate(tokens):
            if noun <= token.start < end and token.dep in ("cc", "conj"):  # only before a word that it belongs to
                above = heads[place]
                while above <= place and above != heads[above]:
                    above = heads[above]
                assert above > place


@pytest.mark.parametrize("shape", ["chain", "back", "star", "joined", "circle"])
def test_no_tree_is_too_deep_or_too_wide(shape: str) -> None:
    count = 20_000
    for tag, dep in (("NN", "prep"), ("IN", "pobj"), ("NN", "conj")):
        made = []
        for i in range(count):
            head = {"chain": max(i - 1, 0), "back": min(i + 1, count - 1), "star": 0, "joined": max(i - 1, 0)}.get(
                shape, (i + 1) % count
            )
            label = "ROOT" if head == i else "conj" if shape == "joined" else dep
            made.append(Token("x", 2 * i, 2 * i + 1, tag if i % 2 else "NN", head, label))
        text = "x " * count
        for kind in ("grit", "fg-clip"):
            start = time.process_time()
            spans(made, text, kind)
            assert time.process_time() - start < 1


@pytest.mark.parametrize("unit", ["(", "x ", "photo ", "|", "\n", "é", "x,", "'", "-", "a-"])
def test_ngrams_of_anything_are_quick(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    start = time.process_time()
    noun_phrases([words(text)], [text], NGRAMS)
    assert time.process_time() - start < 2
