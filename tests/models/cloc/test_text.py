"""Tokenizers: learned ones, saved ones, somebody else's; and that a text's embedding is its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.models.cloc.test_model import TEXTS, tiny, words
from vesl.models.cloc.shards import DataError
from vesl.models.cloc.text import END, PAD, Text, learn_text, load_text, read_texts, split_reference
from vesl.models.contract import ModelError
from vesl.transforms.records import Caption, Region, Sample
from vesl.transforms.shards import add_member, encode, end_tar
from vesl.transforms.takedown import Takedown

HOSTILE = [
    "",
    " ",
    "\n\t",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x01\x7f",
    "ǅ İ ß ﬃ",
    "e\u0301 é",
    "a" * 5000,
    "\ufffd\ufeff",
    "‮abc",
]


def written(text: Text, ids: np.ndarray) -> str:
    found: str = text.tokenizer.decode([i for i in ids.tolist() if i not in (text.pad_id, text.end_id)])
    return found.strip()


def test_learning_is_deterministic() -> None:
    first, again = learn_text(iter(TEXTS), 290), learn_text(TEXTS, 290)
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert first.tokenizer.backend_tokenizer.to_str() == again.tokenizer.backend_tokenizer.to_str()
    assert first.size == 290 == len(first.tokenizer)
    assert (first.tokenizer.convert_tokens_to_ids([PAD, END])) == [first.pad_id, first.end_id] == [0, 1]
    assert learn_text(["one"] * 9, 5000).size < 400  # what there is to learn may be less


def test_rows_are_padded_texts_with_an_end() -> None:
    text = words()
    ids = text(["a dog", "two dogs and a ball over the sea", ""], 16)
    assert (ids.dtype, ids.shape[0]) == (np.int64, 3)
    ends = [int((row == text.end_id).argmax()) for row in ids]
    assert max(ends) == ids.shape[1] - 1  # as wide as the longest
    assert ends[2] == 0
    for row, end in zip(ids, ends, strict=True):
        assert text.end_id not in row[:end]
        assert text.pad_id not in row[:end]
        assert (row[end + 1 :] == text.pad_id).all()
    assert written(text, ids[1]) == "two dogs and a ball over the sea"


@pytest.mark.parametrize("context", [1, 2, 5])
def test_a_cut_keeps_the_end_token(context: int) -> None:
    long, whole = words()(["the blue door of a house over the sea"], context), words()(["the blue door of a house"], 99)
    assert long.shape == (1, context)
    assert long[0, -1] == words().end_id
    assert long[0, :-1].tolist() == whole[0, : context - 1].tolist()


def test_letters_of_any_size_and_any_text() -> None:
    text = words()
    assert (text(["A RED Kite ÄÉ"], 40) == text(["a red kite äé"], 40)).all()
    for hostile in HOSTILE:
        ids = text([hostile], 50)
        assert ids.shape[1] <= 50
        assert (ids[0] == text.end_id).sum() == 1
        assert ids.max() < text.size
    assert written(text, text(["日本語 👩‍👩‍👧 Zürich"], 60)[0]) == "日本語 👩‍👩‍👧 zürich"


def test_a_saved_one_is_the_same(tmp_path: Path) -> None:
    words().save(tmp_path)
    again = load_text(str(tmp_path))
    assert (again.end_id, again.pad_id, again.size) == (words().end_id, words().pad_id, words().size)
    texts = [t for t in HOSTILE if t.strip()] + TEXTS
    assert (again(texts, 40) == words()(texts, 40)).all()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("A red kite").input_ids == words()(["a red kite"], 40)[0].tolist()
    assert theirs(["a dog"] * 2, padding="max_length", max_length=9, return_tensors="np").input_ids.shape == (2, 9)


def foreign(special: dict[str, Any], template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, as BERT's or GPT-2's families set theirs up."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "kite", "dog", "over", "the", "sea"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(template, None, [("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


def test_a_tokenizer_like_berts(tmp_path: Path) -> None:
    tokenizer = foreign({"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}, "[CLS] $A [SEP]")
    tokenizer.save_pretrained(tmp_path)
    text = load_text(str(tmp_path))
    assert text(["A red KITE", "dog"], 10).tolist() == [[2, 4, 5, 6, 3], [2, 7, 3, 0, 0]]
    assert text(["a red kite over the sea"], 4).tolist() == [[2, 4, 5, 3]]


def test_a_tokenizer_that_adds_no_end(tmp_path: Path) -> None:
    text = Text(foreign({"eos_token": "[SEP]"}, None))
    assert text(["a red kite", "dog"], 10).tolist() == [[4, 5, 6, 3], [7, 3, 3, 3]]  # padded with ends, as GPT-2 is
    assert text(["a red kite over the sea", "a red"], 3).tolist() == [[4, 5, 3], [4, 5, 3]]


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no end token"):
        Text(foreign({"pad_token": "[PAD]"}, None))
    for texts in ([], ["", "  \n"]):
        with pytest.raises(ModelError, match="no text to learn a tokenizer from"):
            learn_text(texts, 300)
    with pytest.raises(ModelError, match=r"^train.model.tokenizer: ") as caught:
        load_text(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ModelError, match=r"^train.model.tokenizer: ") as caught:
        load_text(str(tmp_path))
    assert "\n" not in str(caught.value)
    for reference in ("org/name", "t5", "org/name@", "@", "a/b/c@1"):
        with pytest.raises(ModelError, match=r"is neither a folder nor org/name@revision"):
            load_text(reference)
    assert split_reference("org/name@v1", "x") == ("org/name", "v1")
    assert split_reference(str(tmp_path), "x") == (str(tmp_path), None)


def test_special_tokens_within_a_text_are_plain_words() -> None:
    """Strangers' texts must not end where they say so."""
    for text, name in ((words(), END), (words(), PAD)):
        ids = text([f"a dog {name} a ball", "a dog"], 40)
        assert int((ids[0] == text.end_id).argmax()) > int((ids[1] == text.end_id).argmax()) + 3
        assert text.pad_id not in ids[0]
        assert written(text, ids[0]) == f"a dog {name} a ball"


def test_no_texts() -> None:
    assert words()([], 16).shape[0] == 0


@pytest.mark.parametrize("padding", ["pad", "end"])
def test_padding_changes_no_embedding(padding: str) -> None:
    model, text = tiny().double(), Text(words().tokenizer)
    text.pad_id = text.pad_id if padding == "pad" else text.end_id
    short, long = "a dog", "the blue door of a house over"
    alone = model.text(torch.from_numpy(text([short], 16)))
    ids = torch.from_numpy(text([long, short, TEXTS[1]], 16))
    assert (ids[1] == text.pad_id).sum() > 3
    torch.testing.assert_close(model.text(ids)[1:2], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.text(ids[:1]), model.text(ids)[:1], rtol=1e-6, atol=1e-6)
    assert (model.text(ids)[0] - alone).abs().max() > 1e-3


def shard(folder: Path, documents: list[bytes]) -> None:
    """Samples of JSON alone, as the pack step would lay them."""
    with (folder / "shard-00000-000.tar").open("w+b") as tar:
        for i, document in enumerate(documents):
            add_member(tar, f"{i:024x}.json", document)
        end_tar(tar)
        size = tar.tell()
    entry = {"name": "shard-00000-000.tar", "samples": len(documents), "regions": 0, "bytes": size, "sha256": "0" * 64}
    (folder / "index.json").write_text(json.dumps({"complete": True, "samples": len(documents), "shards": [entry]}))


def test_the_texts_of_shards(tmp_path: Path) -> None:
    good = Sample(
        key="0" * 24, url="", sha256="0" * 64, width=1, height=1, alt_text="alt",
        captions=(Caption("a caption", "m@1"),), regions=(Region((0, 0, 1, 1), "a phrase", 0.5, 0, (0, 1)),), select="",
    )  # fmt: skip
    odd: list[Any] = [[], 3, None, {"alt_text": 7}, {"captions": {"text": "x"}}, {"regions": ["x", {"phrase": None}]}]
    documents = [encode(good), *(json.dumps(each).encode() for each in odd), b"{", b"[" * 100_000, b"\xff\xfe"]
    shard(tmp_path, [*documents, json.dumps({"alt_text": "last"}).encode()])
    assert list(read_texts(str(tmp_path), 100)) == ["alt", "a caption", "a phrase", "last"]
    assert list(read_texts(str(tmp_path), 1)) == ["alt", "a caption", "a phrase"]
    assert list(read_texts(str(tmp_path), 100, takedown=Takedown(keys=frozenset({"0" * 24})))) == ["last"]
    with pytest.raises(DataError):
        list(read_texts(str(tmp_path / "none"), 1))
