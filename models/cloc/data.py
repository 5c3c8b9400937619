"""Samples to batches: a sample becomes a row, rows become a `Batch`; loader.py reads them from shards.

A bad sample is counted by reason and skipped, a bad region costs that region only; see REASONS and NOTES.
"""

import hashlib
import io
import json
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from ...transforms.images import ImageRule
from ...transforms.outcomes import Drop
from ...transforms.takedown import Takedown
from .options import Data

if TYPE_CHECKING:
    from torch import Tensor

REASONS = {  # why a sample was skipped
    "shard_unreadable": "its shard cannot be read (any more)",
    "missing_sample": "its shard has fewer samples than index.json says",
    "no_json": "an image without KEY.json",
    "bad_json": "KEY.json is no JSON object of that key, or is larger than 4 MiB",
    "no_image": "neither KEY.jpg nor a reference to an image that could be followed",
    "taken_down": "a takedown list names it",
    "no_caption": "no caption with text in it",
    "image_unreadable": "the referenced image cannot be read",
    "image_changed": "the referenced image is not the one that was packed (sha256)",
    "image_too_large": "more bytes or pixels than a stored image has",
    "decode_error": "no whole JPEG",
    "error": "anything else (class and message are logged)",
}
NOTES = {  # what was met in samples and shards that are used nevertheless; `read` and `used` count samples
    "bad_region": "a region without text, or with a box that is not x0 < x1, y0 < y1 in 0..1",
    "duplicate_member": "a second member of one name; the first counts",
    "bad_member": "a link, a device, an absolute name, a name with folders or one too long",
    "bad_tar": "a shard that ends early or has a broken header",
}

MAX_JSON_BYTES, MAX_IMAGE_BYTES, _MAX_PIXELS = 1 << 22, 1 << 26, ImageRule.max_pixels
_MAX_CHARS = 1 << 13  # of a text; no tokenizer makes fewer than `context` tokens of more
_TAR = re.compile(r"[\w+=-][\w.+=-]*(/[\w+=-][\w.+=-]*)*", re.ASCII)
_BAD_JPEG = (OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error)

Box = tuple[float, float, float, float]


class Tokenizer(Protocol):
    """Texts to token ids: int64, (texts, longest of them), right-padded, each ending in the end token."""

    def __call__(self, texts: list[str], context: int) -> np.ndarray:
        """Lower-case, tokenise, cut to `context` tokens (the end token stays), pad to the longest."""
        ...


@dataclass
class Batch:
    """N images with M region slots each; U different phrases, so that no text is encoded twice.

    Slots without a region have `valid` false, a zero box and phrase 0; U is at least 1 (a lone end token if the batch
    has no region).
    """

    images: "Tensor"  # (N, 3, S, S) uint8: long side resized, padded to a square below or to the right with zeros
    captions: "Tensor"  # (N, L) int64 token ids
    boxes: "Tensor"  # (N, M, 4) float32: x0, y0, x1, y1 in 0..1 of the padded square
    valid: "Tensor"  # (N, M) bool
    phrases: "Tensor"  # (U, K) int64 token ids, padded to the longest of the batch
    phrase: "Tensor"  # (N, M) int64: row of `phrases`
    text_id: "Tensor"  # (N, M) int64: hash of the normalised phrase, equal on every rank; 0 where not valid
    keys: tuple[str, ...]


def text_id(phrase: str) -> int:
    """Name a phrase by the hash of its case-folded words: 1..2**63 - 1, equal on every machine."""
    words = " ".join(phrase.casefold().split()).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") >> 1 or 1


def fill_square(square: npt.NDArray[np.uint8], image: Image.Image, size: tuple[int, int]) -> tuple[float, float]:
    """Scale an RGB image into the top left of a black square, uint8 (3, S, S): its long side becomes S.

    `size` is the (width, height) of the whole image, of which `image` may be a draft. Returns (x, y), the part of the
    square that it fills: a box in 0..1 of the image, times (x, y, x, y), is the same box in 0..1 of the square.
    """
    side = square.shape[1]
    width, height = _scaled(size, side)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    for plane, channel in zip(square, image.split(), strict=True):
        plane[:height, :width] = channel
    return width / side, height / side


def _scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    width, height = (max(1, round(length * side / max(size))) for length in size)
    return width, height


def _decode(out: npt.NDArray[np.uint8], jpeg: bytes) -> tuple[float, float]:
    """Decode a stored image into `out`, uint8 (3, S, S) of zeros; return what part (x, y) of the square it fills.

    The decoder itself halves a large image as often as it can without going below S.
    Raises Drop: image_too_large (before anything is decoded), decode_error.
    """
    try:
        image = JpegImageFile(io.BytesIO(jpeg), "")
        size = image.size
        if size[0] * size[1] > _MAX_PIXELS:
            raise Drop("image_too_large", f"{size[0]}x{size[1]}")
        image.draft(None, _scaled(size, out.shape[1]))
        return fill_square(out, image.convert("RGB"), size)
    except _BAD_JPEG as error:
        raise Drop("decode_error", f"{type(error).__name__}: {error}") from None


@dataclass(frozen=True)
class Row:
    """What one epoch takes of a sample, before its image is decoded; boxes in 0..1 of the image."""

    key: str
    caption: str
    boxes: tuple[Box, ...]
    phrases: tuple[str, ...]
    sha256: str
    reference: tuple[str, int, int] | None  # (tar, offset, bytes) of an image that lies elsewhere


def read_row(
    data: bytes, key: str, options: Data, chance: random.Random, takedown: Takedown, notes: Counter[str]
) -> Row:
    """Read `KEY.json` from anybody and draw from it: a caption or the alt text, and at most `regions` of its regions.

    Adds bad regions to `notes`. Raises Drop: bad_json, taken_down, no_caption.
    """
    try:
        document = json.loads(data)
        name, url, sha256, alt_text = (document.get(field, "") for field in ("key", "url", "sha256", "alt_text"))
        captions, regions, image = (document.get(field) for field in ("captions", "regions", "image"))
    except (ValueError, AttributeError, RecursionError) as error:
        raise Drop("bad_json", f"{type(error).__name__}: {error}") from None
    if name not in ("", key):
        raise Drop("bad_json", "its key is not its name's")
    if takedown and takedown.covers(
        key, url if isinstance(url, str) else "", sha256 if isinstance(sha256, str) else ""
    ):
        raise Drop("taken_down")
    alt_text = clean(alt_text)
    texts = [text for caption in _dicts(captions) if (text := clean(caption.get("text")))]
    luck, pick = chance.random(), chance.random()
    if alt_text and options.alt_text > 0 and (luck < options.alt_text or not texts):
        caption = alt_text
    elif texts:
        caption = texts[int(pick * len(texts))]
    else:
        raise Drop("no_caption")
    good = [found for region in _dicts(regions) if (found := _region(region))]
    notes["bad_region"] += (len(regions) if isinstance(regions, list) else regions is not None) - len(good)
    drawn = chance.sample(good, min(options.regions, len(good)))
    boxes, phrases = tuple(box for box, _ in drawn), tuple(phrase for _, phrase in drawn)
    return Row(key, caption, boxes, phrases, sha256 if isinstance(sha256, str) else "", reference(image))


def _dicts(found: object) -> Iterator[dict[str, Any]]:
    return (item for item in (found if isinstance(found, list) else ()) if isinstance(item, dict))


def clean(text: object) -> str:
    """A text that any tokenizer can take: words with single spaces, no lone surrogates, an end; "" for no text."""
    if not isinstance(text, str):
        return ""
    text = " ".join(text[: 4 * _MAX_CHARS].split())[:_MAX_CHARS]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _region(region: dict[str, Any]) -> tuple[Box, str] | None:
    box, phrase = region.get("box"), clean(region.get("phrase"))
    if not phrase or not isinstance(box, list) or len(box) != 4 or not all(type(x) in (float, int) for x in box):
        return None
    x0, y0, x1, y1 = box
    return ((x0, y0, x1, y1), phrase) if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 else None


def reference(image: object) -> tuple[str, int, int] | None:
    """The place (tar, offset, bytes) that the `image` of a JSON from anybody names, if it stays within a store."""
    if not isinstance(image, dict):
        return None
    tar, offset, size = image.get("tar"), image.get("offset"), image.get("size")
    if not isinstance(tar, str) or not _TAR.fullmatch(tar) or type(offset) is not int or type(size) is not int:
        return None
    return (tar, offset, size) if offset >= 0 and 0 < size <= MAX_IMAGE_BYTES else None


class Rows:
    """Rows on their way to a batch of `batch`."""

    def __init__(self, batch: int, image_px: int, regions: int) -> None:
        self.images = np.zeros((batch, 3, image_px, image_px), np.uint8)
        self.boxes = np.zeros((batch, regions, 4), np.float32)
        self.rows: list[Row] = []

    def add(self, row: Row, jpeg: bytes) -> None:
        """Append a row; its image is decoded here. Raises Drop, and nothing has changed."""
        n = len(self.rows)
        x, y = _decode(self.images[n], jpeg)
        if row.boxes:
            self.boxes[n, : len(row.boxes)] = np.array(row.boxes) * (x, y, x, y)
        self.rows.append(row)

    def batch(self, tokenizer: Tokenizer, context: int) -> Batch:
        """The finished batch; every different phrase is tokenised once."""
        ids = np.zeros(self.boxes.shape[:2], np.int64)
        slots = np.zeros_like(ids)
        places: dict[int, int] = {}
        texts: list[str] = []
        for n, row in enumerate(self.rows):
            for m, phrase in enumerate(row.phrases):
                ids[n, m] = name = text_id(phrase)
                slots[n, m] = places.setdefault(name, len(texts))
                if len(places) > len(texts):
                    texts.append(phrase)
        captions, phrases = tokenizer([row.caption for row in self.rows], context), tokenizer(texts or [""], context)
        return Batch(
            images=torch.from_numpy(self.images),
            captions=torch.from_numpy(captions),
            boxes=torch.from_numpy(self.boxes),
            valid=torch.from_numpy(ids != 0),
            phrases=torch.from_numpy(phrases),
            phrase=torch.from_numpy(slots),
            text_id=torch.from_numpy(ids),
            keys=tuple(row.key for row in self.rows),
        )
