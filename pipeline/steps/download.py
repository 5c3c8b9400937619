"""download: URL -> stored image. The images of a part lie in one tar beside its table, under their content's hash."""

import hashlib
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pyarrow as pa

from ...transforms.hashes import BITS, distance
from ...transforms.images import ImageRule, StoredImage, normalise
from ...transforms.options import added
from ...transforms.outcomes import Drop
from ...transforms.records import ADDS
from ...transforms.shards import add_member, end_tar, read_range
from ..archived import Archives
from ..fetch import Batch, Fetcher, FetchRule
from ..peer import Peer, UnderWay
from ..request import Fetched
from ..respect import RespectRule
from ..stage import Function, InTwo, Place, answer, part_name
from ..store import Store

Begun = tuple[list[int], Batch[dict[str, Any]] | UnderWay[dict[str, Any]]]  # rows that the network is asked for
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
    version: ClassVar[int] = 4  # images are scaled by another filter, for less than half of the time, since 3
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
        """Return the function: to prepare a batch is to begin with it, so that many are under way at a time."""

        digests = {"sha256"}

        def use(fetched: Fetched) -> dict[str, Any]:
            md5 = hashlib.md5(fetched.body, usedforsecurity=False).hexdigest() if "md5" in digests else None
            try:
                return {**_row(fetched, normalise(fetched.body, self.image)), "md5": md5}
            except Drop as drop:  # other bytes than expected are the better reason; that shows where the row is known
                said = Drop(drop.reason, drop.detail)  # `drop` itself holds the body, by its frames
                return {"source_sha256": hashlib.sha256(fetched.body).hexdigest(), "md5": md5, "drop": said}

        def begin(batch: pa.Table) -> Begun:
            if "expected_md5" in batch.column_names and batch["expected_md5"].null_count < len(batch):
                digests.add("md5")
            urls = batch["url"].to_pylist()
            places = batch["archived"].to_pylist() if "archived" in batch.column_names else [None] * len(urls)
            web = [i for i, place in enumerate(places) if place is None]
            return web, fetcher.submit([urls[i] for i in web])

        def finish(batch: pa.Table, begun: Begun) -> pa.Table:
            web, under_way = begun
            found = archives.take(batch, without_network) if len(web) < len(batch) else {}
            found |= zip(web, under_way.result(), strict=True)
            expected = batch.select([name for name in _EXPECTED if name in batch.column_names]).to_pylist()
            results = [self._kept(found[i], wanted) for i, wanted in enumerate(expected or [{}] * len(batch))]
            return answer(batch, self.name, results, _EMITS)

        def without_network(fetched: Fetched) -> dict[str, Any]:
            return {**use(fetched), "final_url": None, "content_type": None, "http": None}

        archives = Archives(self.place.store.options if self.place else {}, self.fetch.max_bytes, self.respect)
        fetcher: Fetcher[dict[str, Any]] | Peer[dict[str, Any]]
        if self.backend == "img2dataset":
            fetcher = Peer(self.fetch, without_network, self.respect)
        else:
            fetcher = Fetcher(self.fetch, use, lambda row: len(row.get("image", b"")), self.place, self.respect)
        function = InTwo(begin, finish)
        weakref.finalize(function, fetcher.close)
        return function

    def _kept(self, found: dict[str, Any] | Exception, expected: Mapping[str, Any]) -> dict[str, Any] | Drop:
        if isinstance(found, MemoryError):
            return Drop("out_of_memory")
        if isinstance(found, Exception):
            return found if isinstance(found, Drop) else Drop("error", f"{type(found).__name__}: {found}")
        drop, drift = found.get("drop"), None
        for name, column in (("sha256", "source_sha256"), ("md5", "md5")):
            wanted = expected.get(f"expected_{name}")
            if wanted and wanted != found[column]:
                said = f"{name} {found[column][:16]}, expected {wanted[:16]}"
                if drop or self.max_drift_bits is None:
                    return Drop("hash_mismatch", f"{said}; {drop}" if drop else said)
                drift = distance(found["phash"], expected.get("expected_phash"))
                if drift is None or drift > self.max_drift_bits:
                    apart = "perceptual hash unknown" if drift is None else f"perceptual hash {drift} bits away"
                    return Drop("hash_mismatch", f"{said}; {apart}")
        return drop or {**found, "drift_bits": drift}

    def cited(self, footer: Mapping[str, Any]) -> set[str]:
        """The part's tar."""
        return {footer["tar"]["name"]}

    def prefix(self, part: int) -> str:
        """How a part's tars begin."""
        return f"{part_name(part)}."

    def sink(self, store: Store, folder: str, part: int) -> "ImageTar":
        """Open the part's tar."""
        return ImageTar(store, folder, part)


def _row(fetched: Fetched, image: StoredImage) -> dict[str, Any]:
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
        "image": image.jpeg,
    }


class ImageTar:
    """The images of one part: `KEY.jpg` in the order of the rows."""

    def __init__(self, store: Store, folder: str, part: int) -> None:
        self._store, self._folder, self._part = store, folder, part
        self._stack = ExitStack()
        self._file = self._stack.enter_context(store.spool(f"{folder}/{part_name(part)}.tar"))

    def add(self, batch: pa.Table) -> pa.Table:
        """Append the batch's images; the columns `offset` and `size` stand for them."""
        places: list[tuple[int | None, int | None]] = []
        for key, image in zip(batch["key"].to_pylist(), batch["image"].to_pylist(), strict=True):
            kept = image is not None
            places.append((add_member(self._file, f"{key}.jpg", image), len(image)) if kept else (None, None))
        table = batch.drop_columns(["image"])
        for i, name in enumerate(_PLACE):
            table = table.append_column(ADDS["download"].field(name), pa.array([p[i] for p in places], _type(name)))
        return table

    def blobs(self, rows: pa.Table) -> pa.Table:
        """Put the images back into rows that `add` returned."""
        places = zip(*(rows[name].to_pylist() for name in _PLACE), strict=True)
        images = [None if size is None else read_range(self._file, offset, size) for offset, size in places]
        self._file.seek(0, 2)
        return rows.drop_columns(list(_PLACE)).append_column("image", pa.array(images, pa.binary()))

    def close(self) -> dict[str, Any]:
        """Publish the tar under its content's hash."""
        end_tar(self._file)
        size = self._file.tell()
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()  # type: ignore[arg-type]  # reads any file
        name = f"{part_name(self._part)}.{digest[:16]}.tar"
        self._store.publish(self._file, f"{self._folder}/{name}")
        self._stack.close()
        return {"tar": {"name": name, "sha256": digest, "bytes": size}}

    def abort(self) -> None:
        """Drop the unfinished tar."""
        self._stack.close()


def _type(name: str) -> pa.DataType:
    return ADDS["download"].field(name).type
