"""The tokenizer: learned from the shards' own texts, or somebody's, from a folder or the hub at a pinned revision."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ...transforms.takedown import Takedown
from ..contract import ModelError
from .data import MAX_JSON_BYTES, clean
from .shards import Folder, Shard, read_index

PAD, END = "<pad>", "<end>"


class Text:
    """Texts to token ids (data.Tokenizer), over any tokenizer of transformers with an end or separator token."""

    def __init__(self, tokenizer: Any) -> None:
        """Raises ModelError where the tokenizer has no token that can end a text."""
        self.tokenizer = tokenizer
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.end_id = next((i for i in ends if i is not None), None)
        if self.end_id is None:
            raise ModelError("the tokenizer has no end token; CLIP's text tower pools there")
        self.pad_id: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        self.size = len(tokenizer)

    def __call__(self, texts: list[str], context: int) -> np.ndarray:
        """Lower-cased ids as int64 (texts, longest of them), at most `context` long, each ending in the end token.

        The names of special tokens are plain words within a text: strangers' texts do not end where they say so.
        """
        if not texts:
            return np.zeros((0, 1), np.int64)
        options: dict[str, Any] = {"truncation": True, "max_length": context, "split_special_tokens": True}
        found = self.tokenizer([t.lower() for t in texts], padding=False, **options).input_ids
        rows = [ids if ids and ids[-1] == self.end_id else [*ids[: context - 1], self.end_id] for ids in found]
        out = np.full((len(rows), max(map(len, rows))), self.pad_id, np.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return out

    def save(self, folder: Path) -> None:
        """Write what `load_text` and transformers' `AutoTokenizer` read."""
        self.tokenizer.save_pretrained(folder)


def load_text(reference: str) -> Text:
    """A tokenizer from a local folder, or `org/name@revision` from the hub or its cache. Raises ModelError."""
    from transformers import AutoTokenizer

    name, revision = split_reference(reference, "train.model.tokenizer")
    try:
        return Text(AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ModelError(f"train.model.tokenizer: {reference}: {str(error).splitlines()[0]}") from None


def split_reference(reference: str, where: str) -> tuple[str, Any]:
    """A local folder and None, or a hub name and its revision. Raises ModelError for a hub name without a revision."""
    if Path(reference).is_dir():
        return reference, None
    name, at, revision = reference.rpartition("@")
    if not at or not revision or name.count("/") != 1:
        raise ModelError(f"{where}: {reference!r} is neither a folder nor org/name@revision")
    return name, revision


def learn_text(texts: Iterable[str], size: int) -> Text:
    """Learn a byte-level BPE of at most `size` tokens (Sennrich et al. 2016), the same for the same texts.

    Any text can be written in it. Raises ModelError where there is no text to learn from.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ModelError("the shards have no text to learn a tokenizer from")
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return Text(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END))


def read_texts(
    shards: str,
    limit: int,
    storage_options: Mapping[str, Any] | None = None,
    takedown: Takedown = Takedown(),  # noqa: B008  (it is frozen)
) -> Iterator[str]:
    """Alt texts, captions and phrases of the first `limit` samples; what is no sample, or is named, is passed over.

    Raises DataError where there are no shards.
    """
    folder = Folder(shards, storage_options)
    index = read_index(folder)

    def documents() -> Iterator[Any]:
        for name, samples in zip(index.names, index.counts.tolist(), strict=True):
            with closing(Shard(folder, name, samples)) as shard:
                for entry in shard.entries:
                    if entry.json and entry.json[1] < MAX_JSON_BYTES:
                        with suppress(ValueError, RecursionError):
                            yield json.loads(shard.read(entry.json))

    for document in islice(documents(), limit):
        if not isinstance(document, dict) or takedown.covers(*(str(document.get(k)) for k in ("key", "url", "sha256"))):
            continue
        found = [document.get("alt_text")]
        for name, key in (("captions", "text"), ("regions", "phrase")):
            items = document.get(name)
            found += [item.get(key) for item in items if isinstance(item, dict)] if isinstance(items, list) else []
        yield from filter(None, map(clean, found))
