"""dedup: which images are copies. Decided over the whole data set at once, so by `pipeline/dedup.py`, not on an engine.

This file has the options, and the evaluation images that must not be trained on.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from ...transforms.hashes import MAX_DISTANCE
from ...transforms.images import ImageRule, normalise
from ...transforms.options import operational
from ...transforms.outcomes import Drop
from ...transforms.records import ADDS
from ..stage import Function

IMAGES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif")
LISTS = (".parquet", ".csv", ".txt")
EVALUATION = pa.schema(
    [("name", pa.string()), ("sha256", pa.string()), ("source_sha256", pa.string()), ("phash", pa.int64())]
)
_ANY_SIZE = ImageRule(min_side_px=1, max_aspect=10_000)


@dataclass(frozen=True)
class Dedup:
    """Drops images that an earlier one of the data set equals, or nearly equals, and those that `evaluation` has.

    Near is a perceptual hash (`transforms/hashes.py`) that differs in at most `distance` bits of 64; null: exact copies
    only. `evaluation`: folders of images, images, and lists (.parquet, .csv with columns named `phash`, `sha256` or
    `source_sha256`; .txt with one hash a line; in text a phash is 16 hex digits). Their content belongs to the result's
    identity, wherever they lie. Raises ValueError where they cannot be read.
    """

    name: ClassVar[str] = "dedup"
    version: ClassVar[int] = 1
    emits: ClassVar[pa.Schema] = ADDS["dedup"]
    reads: ClassVar[tuple[str, ...]] = ()
    opens_model: ClassVar[bool] = False

    distance: int | None = 4
    evaluation: tuple[str, ...] = operational(())
    evaluation_sha256: str = field(init=False, default="")  # of their names and contents

    def __post_init__(self) -> None:
        if self.distance is not None and not 0 <= self.distance <= MAX_DISTANCE:
            raise ValueError(f"distance: {self.distance} is not between 0 and {MAX_DISTANCE}, or null")
        if self.evaluation:
            files = evaluation_files(self.evaluation)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = zip(files, pool.map(lambda path: _digest(path), files.values()), strict=True)
                lines = sorted(f"{digest} {name}\n" for name, digest in found)
            object.__setattr__(self, "evaluation_sha256", hashlib.sha256("".join(lines).encode()).hexdigest())

    def open(self) -> Function:
        """Never called: no batch of rows can be judged alone."""
        raise NotImplementedError


def evaluation_files(places: tuple[str, ...]) -> dict[str, Path]:
    """The images and lists that `evaluation` names, in order, by a name that does not depend on where they lie."""
    found: dict[str, Path] = {}
    for place in places:
        path = Path(place)
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES and p.is_file()]
            if not inside:
                raise ValueError(f"evaluation: {place}: a folder without images ({' '.join(IMAGES)})")
            found |= {f"{path.name}/{p.relative_to(path).as_posix()}": p for p in inside}
        elif not path.is_file():
            raise ValueError(f"evaluation: {place}: there is no such file or folder")
        elif path.suffix.lower() not in IMAGES + LISTS:
            raise ValueError(f"evaluation: {place}: is neither an image nor a list ({' '.join(LISTS)})")
        else:
            found[path.name] = path
    return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"evaluation: {path}: cannot be read: {error.strerror}") from None


def evaluation_table(places: tuple[str, ...]) -> tuple[pa.Table, list[str]]:
    """The hashes of all evaluation images, columns EVALUATION, and what is to be said of those that are no images.

    Raises ValueError for a list that cannot be understood.
    """
    said: list[str] = []

    def rows(item: tuple[str, Path]) -> list[dict[str, Any]]:
        name, path = item
        if path.suffix.lower() in LISTS:
            return [{"name": f"{name}:{n}", **row} for n, row in enumerate(_list(path), 1)]
        data = path.read_bytes()
        try:
            image = normalise(data, _ANY_SIZE)
        except Drop as drop:
            said.append(f"evaluation image {path} is found by its bytes only ({drop})")
            return [{"name": name, "source_sha256": hashlib.sha256(data).hexdigest()}]
        return [{"name": name, **{column: getattr(image, column) for column in EVALUATION.names[1:]}}]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [row for some in pool.map(rows, evaluation_files(places).items()) for row in some]
    return pa.Table.from_pylist(found, EVALUATION), sorted(said)


def _list(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a list, each with some of sha256, source_sha256 and phash."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
            lines = table.select([n for n in table.column_names if n in EVALUATION.names[1:]]).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            lines = list(csv.DictReader(io.StringIO(text)))
            if path.suffix.lower() == ".txt":
                words = text.split()
                lines = [{"phash" if len(word) == 16 else "sha256": word} for word in words]
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise ValueError(f"evaluation: {path}: {' '.join(str(error).split())}") from None
    for n, line in enumerate(lines, 1):
        row = {name: _hash(name, value, f"{path} row {n}") for name, value in line.items() if name in EVALUATION.names}
        row.pop("name", None)
        if not any(value is not None for value in row.values()):
            raise ValueError(f"evaluation: {path} row {n}: has neither phash, sha256 nor source_sha256")
        yield row


def _hash(name: str, value: Any, where: str) -> Any:
    if value is None or value == "" or (name == "phash" and isinstance(value, int) and -(1 << 63) <= value < 1 << 63):
        return None if value == "" else value
    digits = str(value).strip().lower()
    if name == "name":
        return digits
    if not re.fullmatch("[0-9a-f]{16}" if name == "phash" else "[0-9a-f]{64}", digits):
        raise ValueError(f"evaluation: {where}: {digits[:80]!r} is no {name} ({16 if name == 'phash' else 64} digits)")
    return int.from_bytes(bytes.fromhex(digits), "big", signed=True) if name == "phash" else digits
