"""The loading processes: which worker reads what, in what order, and how a run goes on where it stopped."""

import hashlib
import logging
import math
import multiprocessing.util
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...transforms.outcomes import Drop
from ...transforms.takedown import Takedown
from .data import MAX_IMAGE_BYTES, MAX_JSON_BYTES, Batch, Row, Rows, Tokenizer, read_row
from .options import Data
from .shards import Cursor, DataError, Folder, Order, Window, read_index, start, windows

_LOG = logging.getLogger(__name__)

_CHUNK = 64  # samples whose bytes are fetched together
_PREFETCH, _PREFETCH_BYTES = 4, 1 << 31  # batches per worker, and their images over all workers of a rank at most
_STOP_S, _SIGNAL_S = 6.0, 60.0  # until a loading process that is not needed, or was told to end, ends by itself
_MAX_WARNINGS = 100
_GIVE_UP = 1000, 100_000  # samples skipped in a row: between these, a worker's whole share, say that nothing is usable


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
                        if skipped >= min(max(end - first, _GIVE_UP[0]), _GIVE_UP[1]):
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

    def _rows(self) -> Rows:
        return Rows(self.batch, self.image_px, self.options.regions)

    def _add(self, rows: Rows, read: _Read) -> None:
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
        if entry.json[1] > MAX_JSON_BYTES:
            raise Drop("bad_json", f"{entry.json[1]} bytes")
        seed = hashlib.blake2b(f"{self.order.seed}/{window.at.epoch}/{entry.key}".encode(), digest_size=16).digest()
        chance = random.Random(seed)  # noqa: S311  (of the sample and the epoch alone, whoever reads it)
        row = read_row(shard.read(entry.json), entry.key, self.options, chance, self.takedown, read.notes)
        if entry.jpg and entry.jpg[1] > MAX_IMAGE_BYTES:
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


_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a terminal or a cluster sends them to the whole group of processes


@contextmanager
def _starting() -> Iterator[None]:
    """Hold back signals until `_settle` has seen to them, and keep tokenizers from starting threads of their own."""
    name = "TOKENIZERS_PARALLELISM"
    threads, mask = os.environ.get(name), signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if threads is None else {name: threads})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _settle(parent: int, stop: Any, _: int) -> None:
    """Begin a loading process: it ends with its parent, however that ends, but outlives a signal to both for a while:
    the parent may need it until it has saved its work.
    """
    deadline = math.inf

    def end_within(seconds: float) -> None:
        nonlocal deadline
        deadline = min(deadline, time.monotonic() + seconds)

    def watch() -> None:
        while os.getppid() == parent and time.monotonic() < deadline:
            time.sleep(1)
            if stop.is_set():
                end_within(_STOP_S)  # an orderly end, which a store that does not answer may hold up
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: end_within(_SIGNAL_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


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
        """Read index.json and the takedown lists: of the folder that the options name, else of `takedown`, if there is
        such a folder. `batch` counts this rank's images; `context` is the longest text in tokens.

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
        lists = read_takedown(takedown, storage_options, needed=False)
        lists |= read_takedown(options.takedown, storage_options, needed=True)
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
        with _starting():
            iterator = iter(loader)

        def end() -> None:
            stop.set()
            iterator._shutdown_workers()  # type: ignore[attr-defined]  # what its end would do, but in order at exit

        # Before multiprocessing waits for its children at exit: of this process, or of one that it has made.
        finalizer = multiprocessing.util.Finalize(None, end, exitpriority=100)
        try:
            yield from iterator
        finally:
            finalizer()

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
