"""download: URL -> stored image. The images of a part lie in one tar beside its table, under their content's hash."""

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, Literal

import pyarrow as pa

from ...transforms.hashes import BITS, distance
from ...transforms.images import ImageRule, normalise
from ...transforms.options import added
from ...transforms.outcomes import Drop
from ...transforms.records import ADDS
from ...transforms.shards import add_member, end_tar, read_range
from ..archived import Archives
from ..fetch import Fetcher, FetchRule, Made, take_all
from ..peer import Peer
from ..request import Fetched
from ..respect import RespectRule
from ..stage import ByRow, Function, Place, answer, part_name
from ..store import Store

_PLACE = ("offset", "size")
_EXPECTED = ("expected_sha256", "expected_md5", "expected_phash")
_EMITS = pa.schema([*(f for f in ADDS["download"] if f.name not in _PLACE), ("image", pa.binary())])


@dataclass(frozen=True)
class Download:
    """Fetches each URL safely and normalises the image once, for every later step.

    What a list expects of the bytes (sha256, md5) is checked. With `max_drift_bits`, an image of other bytes stays
    where its perceptual hash is known and differs in no more bits from the expected one; its row says in how many.
    Images of an archive are read from it and then treated alike. Raises ValueError for a number of bits that no hash
    has, and for wishes that the backend cannot obey.
    """

    name: ClassVar[str] = "download"
    version: ClassVar[int] = 5  # the time of the fetch is kept since 4
    emits: ClassVar[pa.Schema] = _EMITS
    reads: ClassVar[tuple[str, ...]] = ("url", "archived", *_EXPECTED)
    opens_model: ClassVar[bool] = False

    place: ClassVar[Place | None] = None  # set by `at`; no option, so no field

    image: ImageRule = field(default_factory=ImageRule)
    fetch: FetchRule = field(default_factory=FetchRule)
    respect: RespectRule = field(default_factory=RespectRule)
    max_drift_bits: int | None = None
    backend: Literal["vesl", "img2dataset"] = added("vesl")  # who fetches; see `peer` for what the other one leaves out

    def __post_init__(self) -> None:
        if self.backend == "img2dataset" and (self.respect.robots_txt or self.respect.tdm_file):
            raise ValueError("backend: img2dataset cannot obey respect.robots_txt and respect.tdm_file")
        if self.max_drift_bits is not None and not 0 <= self.max_drift_bits < BITS:
            raise ValueError(f"max_drift_bits: {self.max_drift_bits} is not between 0 and {BITS - 1}")

    def at(self, place: Place) -> "Download":
        """The same step, that knows the store and how many workers share the limits per host."""
        placed = copy(self)
        object.__setattr__(placed, "place", place)
        return placed

    def open(self) -> Function:
        """Return the function: each row is begun with by itself, so that many are under way at a time."""

        def begin(row: dict[str, Any]) -> Future[Made[dict[str, Any]]]:
            if place := row.get("archived"):
                return archives.submit(row["url"], place, lambda found: self._image(row, found))
            return fetcher.submit(row["url"], lambda found: self._image(row, found))

        def finish(batch: pa.Table, begun: list[Future[Made[dict[str, Any]]]]) -> pa.Table:
            return answer(batch, self.name, [_result(made) for made in take_all(begun)], _EMITS)

        archives = Archives(self.place.store.options if self.place else {}, self.fetch.max_bytes, self.respect)
        fetcher: Fetcher[dict[str, Any]] | Peer[dict[str, Any]]
        if self.backend == "img2dataset":
            fetcher = Peer(self.fetch, self.respect)
        else:
            fetcher = Fetcher(self.fetch, lambda row: len(row["image"]), self.place, self.respect)
        function = ByRow(begin, finish)
        weakref.finalize(function, fetcher.close)
        return function

    def _image(self, row: Mapping[str, Any], fetched: Fetched) -> dict[str, Any]:
        """The new columns of a row, from what was fetched for it.

        No decoder sees bytes that the row does not expect, unless they may have drifted from what it does. Raises Drop.
        """
        wrong, near = _unexpected(row, fetched.body), row.get("expected_phash")
        if wrong and (self.max_drift_bits is None or near is None):
            raise Drop("hash_mismatch", wrong if self.max_drift_bits is None else f"{wrong}; perceptual hash unknown")
        try:
            image = normalise(fetched.body, self.image)
        except Drop as drop:
            if wrong:  # the better reason
                raise Drop("hash_mismatch", f"{wrong}; {drop}") from None
            raise
        drift = distance(image.phash, near) if wrong else None
        if wrong and (drift is None or drift > (self.max_drift_bits or 0)):
            apart = "perceptual hash unknown" if drift is None else f"perceptual hash {drift} bits away"
            raise Drop("hash_mismatch", f"{wrong}; {apart}")
        return {
            "sha256": image.sha256,
            "source_sha256": image.source_sha256,
            "source_format": image.source_format,
            "source_width": image.source_width,
            "source_height": image.source_height,
            "width": image.width,
            "height": image.height,
            "final_url": fetched.final_url,
            "content_type": fetched.content_type,
            "http": fetched.http,
            "phash": image.phash,
            "drift_bits": drift,
            "fetched_at": fetched.at,
            "image": image.jpeg,
        }

    def cited(self, footer: Mapping[str, Any]) -> set[str]:
        """The part's tar."""
        return {footer["tar"]["name"]}

    def prefix(self, part: int) -> str:
        """How a part's tars begin."""
        return f"{part_name(part)}."

    def sink(self, store: Store, folder: str, part: int) -> "ImageTar":
        """Open the part's tar."""
        return ImageTar(store, folder, part)


def _unexpected(row: Mapping[str, Any], body: bytes) -> str:
    """In which hash the bytes are not those that the row expects; empty where they are, or none is expected."""
    for kind in ("sha256", "md5"):
        if wanted := row.get(f"expected_{kind}"):
            found = hashlib.new(kind, body, usedforsecurity=False).hexdigest()
            if found != wanted:
                return f"{kind} {found[:16]}, expected {wanted[:16]}"
    return ""


def _result(made: dict[str, Any] | Exception) -> dict[str, Any] | Drop:
    if isinstance(made, MemoryError):
        return Drop("out_of_memory")
    if isinstance(made, Exception) and not isinstance(made, Drop):
        return Drop("error", f"{type(made).__name__}: {made}")
    return made


class ImageTar:
    """The images of one part: a file of them as they come, then the tar, `KEY.jpg` in the order of the rows."""

    def __init__(self, store: Store, folder: str, part: int) -> None:
        self._store, self._folder, self._part = store, folder, part
        self._stack = ExitStack()
        self._file = self._spool()

    def _spool(self) -> BinaryIO:
        return self._stack.enter_context(self._store.spool(f"{self._folder}/{part_name(self._part)}.tar"))

    def add(self, batch: pa.Table) -> pa.Table:
        """Append the batch's images; the columns `offset` and `size` stand for them."""
        images = batch["image"].to_pylist()
        places = [(None, None) if image is None else (self._file.tell(), self._file.write(image)) for image in images]
        return _placed(batch.drop_columns(["image"]), places)

    def blobs(self, rows: pa.Table) -> pa.Table:
        """Put the images back into rows that `add` returned."""
        images = pa.array(self._images(rows), pa.binary())
        self._file.seek(0, 2)
        return rows.drop_columns(list(_PLACE)).append_column("image", images)

    def _images(self, rows: pa.Table) -> Iterator[bytes | None]:
        for offset, size in zip(*(rows[name].to_pylist() for name in _PLACE), strict=True):
            yield None if size is None else read_range(self._file, offset, size)

    def close(self, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Publish the tar of the rows under its content's hash; return them with their places in it."""
        places: list[tuple[int | None, int | None]] = []
        tar = self._spool()
        for key, image in zip(rows["key"].to_pylist(), self._images(rows), strict=True):
            places.append((None, None) if image is None else (add_member(tar, f"{key}.jpg", image), len(image)))
        end_tar(tar)
        size = tar.tell()
        tar.seek(0)
        digest = hashlib.file_digest(tar, "sha256").hexdigest()  # type: ignore[arg-type]  # reads any file
        name = f"{part_name(self._part)}.{digest[:16]}.tar"
        self._store.publish(tar, f"{self._folder}/{name}")
        self._stack.close()
        return _placed(rows, places), {"tar": {"name": name, "sha256": digest, "bytes": size}}

    def abort(self) -> None:
        """Drop the unfinished tar."""
        self._stack.close()


def _placed(rows: pa.Table, places: Sequence[tuple[int | None, int | None]]) -> pa.Table:
    """The rows with the columns `offset` and `size`, in the order of the step's table."""
    for i, name in enumerate(_PLACE):
        field = ADDS["download"].field(name)
        column = pa.array([place[i] for place in places], field.type)
        there = rows.schema.get_field_index(name)
        rows = rows.append_column(field, column) if there < 0 else rows.set_column(there, field, column)
    return rows
