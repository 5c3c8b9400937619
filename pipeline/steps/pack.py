"""pack: everything known of the kept samples -> region-text WebDataset shards. A shard never crosses parts.

With `images: reference` a shard has the JSON alone, which says where in the store the image lies: a new filter then
writes a few kilobytes a sample, where embedded images would be written anew.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, Literal

import pyarrow as pa

from ...transforms.options import added
from ...transforms.records import ADDS, OUTCOME, Sample
from ...transforms.shards import add_member, close_tar, encode
from ..stage import Function, answer
from ..store import Store

PLACE = ("tar", "offset", "size")  # of an image in the store
_EMITS = pa.schema([("image", pa.binary()), ("json", pa.binary()), ("regions", pa.int32())])


@dataclass(frozen=True)
class Pack:
    """Writes each sample's members; a new shard begins where the next sample would pass `max_shard_bytes`."""

    name: ClassVar[str] = "pack"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = _EMITS
    opens_model: ClassVar[bool] = False

    max_shard_bytes: int = 1 << 29
    images: Literal["embed", "reference"] = added("embed")

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes: {self.max_shard_bytes} is not a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        """The images' bytes only where they are written."""
        sample = ("url", "alt_text", "sha256", "width", "height", "captions", "phrases", "detections", "verdicts")
        return (*sample, "select", *(("image",) if self.images == "embed" else PLACE))

    def open(self) -> Function:
        """Return the function; there is nothing to load."""

        def pack(batch: pa.Table) -> pa.Table:
            results = []
            for row in batch.to_pylist():
                sample = Sample.from_row(row)
                place = {name: row[name] for name in PLACE} if self.images == "reference" else None
                document = encode(sample, place)
                results.append({"image": row.get("image"), "json": document, "regions": len(sample.regions)})
            return answer(batch, self.name, results, _EMITS)

        return pack

    def cited(self, footer: Mapping[str, Any]) -> set[str]:
        """The part's shards."""
        return {shard["name"] for shard in footer["shards"]}

    def prefix(self, part: int) -> str:
        """How a part's shards begin."""
        return f"shard-{part:05d}-"

    def sink(self, store: Store, folder: str, part: int) -> "Shards":
        """Open the part's shards."""
        return Shards(store, folder, part, self.max_shard_bytes)


class Shards:
    """The shards of one part, one open at a time."""

    def __init__(self, store: Store, folder: str, part: int, max_bytes: int) -> None:
        self._store, self._folder, self._part, self._max_bytes = store, folder, part, max_bytes
        self._done: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self._file: BinaryIO | None = None

    @property
    def _name(self) -> str:
        return f"shard-{self._part:05d}-{len(self._done):03d}.tar"

    def add(self, batch: pa.Table) -> pa.Table:
        """Append the kept samples; the columns `shard` and `position` (of the sample in its shard) stand for them."""
        places: list[tuple[str | None, int | None]] = []
        columns = (batch[name].to_pylist() for name in ("key", "image", "json", "regions"))
        for key, image, document, regions in zip(*columns, strict=True):
            places.append((None, None) if document is None else self._write(key, image, document, regions))
        table = batch.select([field.name for field in OUTCOME])
        for i, field in enumerate(ADDS["pack"]):
            table = table.append_column(field, pa.array([place[i] for place in places], field.type))
        return table

    def _write(self, key: str, image: bytes | None, document: bytes, regions: int) -> tuple[str, int]:
        if self._file and self._file.tell() + len(image or b"") + len(document) > self._max_bytes:
            self._finish()
        if self._file is None:
            self._file = self._stack.enter_context(self._store.spool(f"{self._folder}/{self._name}"))
            self._samples = self._regions = 0
        if image is not None:
            add_member(self._file, f"{key}.jpg", image)
        add_member(self._file, f"{key}.json", document)
        self._samples += 1
        self._regions += regions
        return self._name, self._samples - 1

    def _finish(self) -> None:
        assert self._file is not None
        about = {"samples": self._samples, "regions": self._regions, **close_tar(self._file)}
        target = f"{self._folder}/{self._name}"
        self._store.publish(self._file, target)
        self._stack.close()
        self._store.sweep(target)
        self._done.append({"name": self._name, **about})
        self._file = None

    def blobs(self, rows: pa.Table) -> None:
        """Packing again is quicker than saving half of it."""

    def close(self, rows: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
        """Publish the last shard. Its samples lie as they came, in the order of the rows."""
        if self._file:
            self._finish()
        return rows, {"shards": self._done}

    def abort(self) -> None:
        """Drop the unfinished shard."""
        self._stack.close()
