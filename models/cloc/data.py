"""Shards to batches: a sample becomes a row, rows become a `Batch`, in loading processes of their own.

A bad sample is counted by reason and skipped, a bad region costs that region only; see REASONS and NOTES.
"""

import atexit
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import re
import signal
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...transforms.images import ImageRule
from ...transforms.outcomes import Drop
from ...transforms.takedown import Takedown
from .options import Data
from .shards import Cursor, DataError, Folder, Order, Window, read_index, start, windows

if TYPE_CHECKING:
    from torch import Tensor

_LOG = logging.getLogger(__name__)

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

_MAX_JSON_BYTES, _MAX_IMAGE_BYTES, _MAX_PIXELS = 1 << 22, 1 << 26, ImageRule.max_pixels
_CHUNK = 64  # samples whose bytes are fetched together
_PREFETCH, _PREFETCH_BYTES = 4, 1 << 31  # batches per worker, and their images over all workers of a rank at most
_MAX_CHARS = 1 << 13  # of a text; no tokenizer makes fewer than `context` tokens of more
_GRACE_S = 6  # DataLoader waits for its processes for 5
_MAX_WARNINGS = 100
_GIVE_UP = 1000  # samples skipped in a row (and the whole of a worker's share): nothing there can be used
_TAR = re.compile(r"(?!.*\.\.)[\w+=-][\w.+=-]*(/[\w+=-][\w.+=-]*)*", re.ASCII)
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
    alt_text = _clean(alt_text)
    texts = [text for caption in _dicts(captions) if (text := _clean(caption.get("text")))]
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
    return Row(key, caption, boxes, phrases, sha256 if isinstance(sha256, str) else "", _reference(image))


def _dicts(found: object) -> Iterator[dict[str, Any]]:
    return (item for item in (found if isinstance(found, list) else ()) if isinstance(item, dict))


def _clean(text: object) -> str:
    """A text that any tokenizer can take: words with single spaces, no lone surrogates, an end; "" for no text."""
    if not isinstance(text, str):
        return ""
    text = " ".join(text[: 4 * _MAX_CHARS].split())[:_MAX_CHARS]
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _region(region: dict[str, Any]) -> tuple[Box, str] | None:
    box, phrase = region.get("box"), _clean(region.get("phrase"))
    if not phrase or not isinstance(box, list) or len(box) != 4 or not all(type(x) in (float, int) for x in box):
        return None
    x0, y0, x1, y1 = box
    return ((x0, y0, x1, y1), phrase) if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 else None


def _reference(image: object) -> tuple[str, int, int] | None:
    if not isinstance(image, dict):
        return None
    tar, offset, size = image.get("tar"), image.get("offset"), image.get("size")
    if not isinstance(tar, str) or not _TAR.fullmatch(tar) or type(offset) is not int or type(size) is not int:
        return None
    return (tar, offset, size) if offset >= 0 and 0 < size <= _MAX_IMAGE_BYTES else None


class _Rows:
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


@dataclass
class _Packet:
    """What a loading process sends: a batch, where its stream goes on after it, and what was met on the way to it."""

    worker: int
    cursor: Cursor
    counts: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    batch: Batch | None = None
    fatal: str = ""  # there will be no more

    def skip(self, window: Window, position: int, drop: Drop) -> None:
        """Count a sample that is not used."""
        self.counts[drop.reason] += 1
        if drop.reason == "error":
            self.warnings.append(f"{window.name(position)}: {drop}")

    def pin_memory(self) -> "_Packet":
        """Called by DataLoader where there is an accelerator."""
        if self.batch is not None:
            for name, value in list(vars(self.batch).items()):
                if isinstance(value, torch.Tensor):
                    setattr(self.batch, name, value.pin_memory())
        return self


@dataclass
class _Read:
    """A sample on its way: its row and its image's bytes, or why they are not to be had."""

    position: int
    row: Row | None = None
    jpeg: bytes | None = None
    drop: Drop | None = None
    notes: Counter[str] = field(default_factory=Counter)

    def guard(self, call: Callable[..., None], *args: Any) -> None:
        """Do one thing with this sample; what goes wrong is this sample's fault alone."""
        try:
            if self.drop is None:
                call(*args)
        except Drop as drop:
            self.drop = drop
        except Exception as error:  # noqa: BLE001  (the guard: nobody knows what strangers put into their samples)
            self.drop = Drop("error", f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class _Stream:
    """All that a loading process needs to make batches; may be sent to one."""

    folder: Folder
    names: tuple[str, ...]
    order: Order
    images: Folder | None
    takedown: Takedown
    options: Data
    tokenizer: Tokenizer
    batch: int
    image_px: int
    context: int

    def packets(self, worker: int, at: Cursor, stopped: Callable[[], bool]) -> Iterator[_Packet]:
        """A worker's batches from a cursor on; without end, but for `stopped`, which is asked now and then."""
        packet, rows, skipped = _Packet(worker, at), self._rows(), 0
        first, end = self.order.bounds(worker)
        try:
            for window in windows(self.folder, self.names, self.order, worker, replace(at, position=0)):
                packet.warnings += window.warnings
                for read in self._reads(window, at.position):
                    if read.position % _CHUNK == 0 and stopped():
                        return
                    read.guard(self._add, rows, read)
                    packet.counts.update(read=1, used=not read.drop, **read.notes)
                    if read.drop:
                        packet.skip(window, read.position, read.drop)
                        skipped += 1
                        if skipped >= max(_GIVE_UP, end - first):
                            raise DataError(f"{self.folder.url}: none of {skipped} samples in a row can be used")
                        continue
                    skipped = 0
                    if len(rows.rows) == self.batch:
                        packet.cursor = replace(window.at, position=read.position + 1)
                        packet.batch = rows.batch(self.tokenizer, self.context)
                        yield packet
                        packet, rows = _Packet(worker, packet.cursor), self._rows()
                at = Cursor()
        except DataError as error:
            packet.fatal = str(error)
            yield packet

    def _rows(self) -> _Rows:
        return _Rows(self.batch, self.image_px, self.options.regions)

    def _add(self, rows: _Rows, read: _Read) -> None:
        assert read.row is not None
        assert read.jpeg is not None
        rows.add(read.row, read.jpeg)

    def _reads(self, window: Window, first: int) -> Iterator[_Read]:
        """The samples of a window from `first` on; where images come from a bucket, the next are fetched meanwhile."""
        chunks = (range(i, min(i + _CHUNK, len(window))) for i in range(first, len(window), _CHUNK))
        if self.images is None or self.images.local:
            for chunk in chunks:
                yield from self._read(window, chunk)
            return
        ahead = start(self._read, window, next(chunks, range(0)))
        for chunk in chunks:
            reads, ahead = ahead.result(), start(self._read, window, chunk)
            yield from reads
        yield from ahead.result()

    def _read(self, window: Window, chunk: range) -> list[_Read]:
        reads = [_Read(position) for position in chunk]
        for read in reads:
            read.guard(self._open, window, read)
        cited = [read for read in reads if read.row and read.row.reference and not (read.jpeg or read.drop)]
        if cited and self.images:
            places = [read.row.reference for read in cited if read.row and read.row.reference]
            for read, found in zip(cited, self.images.ranges(places), strict=True):
                read.guard(_take, read, found)
        return reads

    def _open(self, window: Window, read: _Read) -> None:
        shard, entry, notes = window.entry(read.position)
        read.notes.update(notes)
        if entry.json is None:
            raise Drop("no_json")
        if entry.json[1] > _MAX_JSON_BYTES:
            raise Drop("bad_json", f"{entry.json[1]} bytes")
        seed = hashlib.blake2b(f"{self.order.seed}/{window.at.epoch}/{entry.key}".encode(), digest_size=16).digest()
        chance = random.Random(seed)  # noqa: S311  (of the sample and the epoch alone, whoever reads it)
        row = read_row(shard.read(entry.json), entry.key, self.options, chance, self.takedown, read.notes)
        if entry.jpg and entry.jpg[1] > _MAX_IMAGE_BYTES:
            raise Drop("image_too_large", f"{entry.jpg[1]} bytes")
        if not entry.jpg and not (row.reference and self.images):
            raise Drop("no_image")
        read.row, read.jpeg = row, shard.read(entry.jpg) if entry.jpg else None


def _take(read: _Read, found: bytes | Exception) -> None:
    """Take the bytes of a referenced image. Raises Drop: image_unreadable, image_changed."""
    if isinstance(found, Exception):
        raise Drop("image_unreadable", f"{type(found).__name__}: {found}")
    if read.row and read.row.sha256 and hashlib.sha256(found).hexdigest() != read.row.sha256.lower():
        raise Drop("image_changed")
    read.jpeg = found


class _Processes(IterableDataset[_Packet]):
    """The stream as DataLoader sees it, in one of its processes; the first of them is the one whose turn is next."""

    def __init__(self, stream: _Stream, cursors: list[Cursor], turn: int, stop: Any) -> None:
        self._stream, self._cursors, self._turn, self._stop = stream, cursors, turn, stop

    def __iter__(self) -> Iterator[_Packet]:
        info = get_worker_info()
        assert info is not None
        worker = (info.id + self._turn) % len(self._cursors)
        return self._stream.packets(worker, self._cursors[worker], self._stop.is_set)


def _same(packet: Any) -> Any:
    return packet


def _settle(parent: int, stop: Any, _: int) -> None:
    """Begin a loading process: it ends with its parent, however that ends, and not by a signal to both."""

    def watch() -> None:
        left = _GRACE_S  # for an orderly end, which a store that does not answer may hold up
        while os.getppid() == parent and left:
            time.sleep(1)
            left -= stop.is_set()
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or a cluster sends them to the whole group
        signal.signal(number, signal.SIG_IGN)


class Loader:
    """Batches of one rank without end, over epoch after epoch; bad samples are counted and skipped.

    Iterating again, or in another process from `state()`, goes on exactly after the batches handed out so far.
    """

    def __init__(
        self,
        shards: str,
        options: Data,
        tokenizer: Tokenizer,
        *,
        batch: int,
        image_px: int,
        context: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        storage_options: Mapping[str, Any] | None = None,
        images: str | None = None,
        takedown: str | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Read index.json and the takedown lists of the folder `takedown` (one that is not there has none, unless the
        options name it). `batch` counts this rank's images; `context` is the longest text in tokens.

        Raises DataError, one line: no shards, a bad takedown list, or a state of other shards, ranks or workers.
        """
        folder = Folder(shards, storage_options)
        index = read_index(folder)
        self.samples, self.index_sha256 = int(index.counts.sum()), index.sha256
        workers = max(1, options.workers)
        if self.samples < world:
            raise DataError(f"{shards}: {self.samples} samples are too few for {world} ranks")
        workers = min(workers, self.samples // world)  # each has at least one sample
        order = Order(index.counts, seed, max(1, options.shuffle), rank, world, workers)
        lists = read_takedown(takedown or options.takedown, storage_options, needed=options.takedown is not None)
        where = Folder(images, storage_options) if images else None
        self._stream = _Stream(folder, index.names, order, where, lists, options, tokenizer, batch, image_px, context)
        self._processes = options.workers > 0
        self.counts: Counter[str] = Counter()
        self._cursors, self._turn = [Cursor()] * workers, 0
        self._said: set[str] = set()
        self._say(index.warnings)
        if state is not None:
            self._restore(state)

    def _identity(self) -> dict[str, Any]:
        order = self._stream.order
        told = {name: getattr(order, name) for name in ("seed", "shuffle", "rank", "world", "workers")}
        return {"index_sha256": self.index_sha256, **told}

    def state(self) -> dict[str, Any]:
        """What to continue from, for JSON: exactly after the batches handed out; of this rank alone."""
        cursors = [list(astuple(cursor)) for cursor in self._cursors]
        return {**self._identity(), "turn": self._turn, "cursors": cursors, "counts": dict(self.counts)}

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise DataError(
                    f"cannot go on where the data stopped: {name} was {state.get(name)}, now it is {now}; "
                    "take the same shards, ranks and workers again, or begin the data anew"
                )
        self._turn, self._cursors = int(state["turn"]), [Cursor(*cursor) for cursor in state["cursors"]]
        self.counts = Counter(state["counts"])

    def __iter__(self) -> Iterator[Batch]:
        for packet in self._packets():
            self.counts += packet.counts
            self._say(packet.warnings)
            self._cursors[packet.worker] = packet.cursor
            self._turn = (packet.worker + 1) % len(self._cursors)
            if packet.batch is None:
                raise DataError(f"{packet.fatal} ({', '.join(f'{k} {n}' for k, n in sorted(self.counts.items()))})")
            yield packet.batch

    def _packets(self) -> Iterator[_Packet]:
        cursors, turn = list(self._cursors), self._turn
        if not self._processes:
            yield from self._stream.packets(0, cursors[0], lambda: False)
            return
        stop = multiprocessing.get_context().Event()
        images_bytes = self._stream.batch * 3 * self._stream.image_px**2
        loader = DataLoader(
            _Processes(self._stream, cursors, turn, stop),
            batch_size=None,
            num_workers=len(cursors),
            collate_fn=_same,
            worker_init_fn=partial(_settle, os.getpid(), stop),
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=min(_PREFETCH, max(1, _PREFETCH_BYTES // (images_bytes * len(cursors)))),
            generator=torch.Generator(),  # else the default one, which is the training's, would move on
        )
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            iterator = iter(loader)
        finally:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            os.environ.update({} if before is None else {"TOKENIZERS_PARALLELISM": before})

        def end() -> None:
            stop.set()
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # what its end would do, but in order at exit

        atexit.register(end)
        try:
            yield from iterator
        finally:
            atexit.unregister(end)
            end()

    def _say(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            if warning not in self._said and len(self._said) < _MAX_WARNINGS:
                self._said.add(warning)
                _LOG.warning("%s", warning)


def read_takedown(url: str | None, storage_options: Mapping[str, Any] | None, needed: bool) -> Takedown:
    """Join all `*.txt` of a folder. Raises DataError for a malformed line, and for a folder that is needed."""
    if not url:
        return Takedown()
    folder = Folder(url, storage_options)
    try:
        names = sorted(name for name in folder.sizes() if name.endswith(".txt"))
        return Takedown.parse((folder.path(name), folder.read(name).decode()) for name in names)
    except FileNotFoundError:
        if needed:
            raise DataError(f"takedown: there is no folder {url}") from None
        return Takedown()
    except Exception as error:  # noqa: BLE001  (every driver has errors of its own; a list that is not read is no list)
        raise DataError(f"takedown: {error if type(error) is ValueError else f'{url}: {error!r}'}") from None
