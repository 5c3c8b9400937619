"""download: URL -> stored image. The images of a part lie in one tar beside its table, under their content's hash."""

import hashlib
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa

from ...transforms.images import ImageRule, StoredImage, normalise
from ...transforms.outcomes import Drop
from ...transforms.records import ADDS
from ...transforms.shards import add_member, end_tar, read_range
from ..fetch import Batch, Fetcher, FetchRule
from ..request import Fetched
from ..respect import RespectRule
from ..stage import Function, InTwo, Place, answer, part_name
from ..store import Store

_PLACE = ("offset", "size")
_EMITS = pa.schema([*(f for f in ADDS["download"] if f.name not in _PLACE), ("image", pa.binary())])


@dataclass(frozen=True)
class Download:
    """Fetches each URL safely and normalises the image once, for every later step."""

    name: ClassVar[str] = "download"
    version: ClassVar[int] = 3
    emits: ClassVar[pa.Schema] = _EMITS
    reads: ClassVar[tuple[str, ...]] = ("url",)
    opens_model: ClassVar[bool] = False

    place: ClassVar[Place | None] = None  # set by `at`; no option, so no field

    image: ImageRule = field(default_factory=ImageRule)
    fetch: FetchRule = field(default_factory=FetchRule)
    respect: RespectRule = field(default_factory=RespectRule)

    def at(self, place: Place) -> "Download":
        """The same step, that knows the store and how many workers share the limits per host."""
        placed = copy(self)
        object.__setattr__(placed, "place", place)
        return placed

    def open(self) -> Function:
        """Return the function: to prepare a batch is to begin with it, so that many are under way at a time."""

        def use(fetched: Fetched) -> dict[str, Any]:
            return _row(fetched, normalise(fetched.body, self.image))

        def finish(batch: pa.Table, under_way: Batch[dict[str, Any]]) -> pa.Table:
            return answer(batch, self.name, [_kept(result) for result in under_way.result()], _EMITS)

        fetcher = Fetcher(self.fetch, use, lambda row: len(row["image"]), self.place, self.respect)
        function = InTwo(lambda batch: fetcher.submit(batch["url"].to_pylist()), finish)
        weakref.finalize(function, fetcher.close)
        return function

    def cited(self, footer: Mapping[str, Any]) -> set[str]:
        """The part's tar."""
        return {footer["tar"]["name"]}

    def prefix(self, part: int) -> str:
        """How a part's tars begin."""
        return f"{part_name(part)}."

    def sink(self, store: Store, folder: str, part: int) -> "ImageTar":
        """Open the part's tar."""
        return ImageTar(store, folder, part)


def _kept(found: dict[str, Any] | Exception) -> dict[str, Any] | Drop:
    if isinstance(found, MemoryError):
        return Drop("out_of_memory")
    if isinstance(found, Exception) and not isinstance(found, Drop):
        return Drop("error", f"{type(found).__name__}: {found}")
    return found


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
