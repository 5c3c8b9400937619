"""Archives as a source: images that img2dataset downloaded, or that our own pack wrote, and that need no network.

Ingest reads what an archive says of its images, download reads the images by the places that ingest noted. Every
archive is one part, in its own order, so that a worker opens one and reads it from front to end.

    00000.tar, 00000.parquet        img2dataset's `webdataset`: the Parquet file beside a tar is read instead of the tar
    00000/, 00000.parquet           ... its `files`
    00000.parquet                   ... its `parquet`: the images are in a column
    anything.tar                    samples of the webdataset convention, such as our own shards: the tar is walked

An archive comes from anybody: nothing is extracted or unpickled, no link is followed, each size is held against what is
really there, and of the names in it only a sidecar's become part of a path, if they are letters and digits.
"""

import hashlib
import itertools
import json
import re
import tarfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, BinaryIO

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ..transforms.shards import members
from ..transforms.urls import KEY_DIGITS
from .lists import UNREADABLE, Columns, IngestError, Rows, UrlList, texts, unreadable

ENDINGS = ("jpg", "png", "webp", "jpeg", "gif", "bmp", "avif")  # img2dataset writes the first three
ARCHIVES = ("tar", "sidecar", "folder", "table")  # kinds of files: a tar; a sidecar of a tar, of a folder, of itself
_SIDECAR = {"key", "url", "status", "error_message"}
_NAME = re.compile(r"[\w+=-]{1,200}", re.ASCII)  # of a sample in a sidecar; it becomes part of a path
_BATCH = 20_000  # rows of a sidecar
_READERS = 16  # archives at a time
_END_BYTES = 1 << 16  # of an archive, that its stamp is made of
_WALK = 1000  # samples of a tar
_NAME_CHARS = 1000  # of a member
_TEXT_BYTES = 1 << 20  # of a member with a caption or with JSON


def without_companions(sources: Sequence[UrlList]) -> list[UrlList]:
    """The files of a source, less the Parquet files and statistics that belong to a tar or a table there."""
    found = {source.path for source in sources}

    def belongs(path: str) -> bool:
        statistics = re.fullmatch(r"(.*/\d+)_stats\.json", path)
        if statistics:
            return f"{statistics[1]}.parquet" in found
        return path.endswith(".parquet") and f"{path.removesuffix('.parquet')}.tar" in found

    return [source for source in sources if not belongs(source.path)]


def apart(sources: Sequence[UrlList], columns: Columns) -> tuple[list[UrlList], list[UrlList]]:
    """The lists of URLs among files, and the archives, whose `kind` is then one of ARCHIVES.

    A Parquet file that img2dataset wrote is an archive, unless the recipe names the URL's column: then it is a list, to
    be downloaded anew. Raises IngestError for an archive whose images are not beside it.
    """
    if columns.url is None:
        with ThreadPoolExecutor(_READERS) as pool:
            sources = list(pool.map(_kind, sources))
    archives = [source for source in sources if source.kind in ARCHIVES]
    return [source for source in sources if source.kind not in ARCHIVES], archives


def _kind(source: UrlList) -> UrlList:
    if source.kind != "parquet":
        return source
    try:
        with source.fs.open(source.path, "rb") as raw:
            names = set(pq.read_schema(raw).names)
    except UNREADABLE as error:
        raise unreadable(source, error) from None
    if not names >= _SIDECAR:
        return source
    stem = source.path.removesuffix(".parquet")
    if not names.isdisjoint(ENDINGS):
        return replace(source, kind="table")
    if source.fs.exists(f"{stem}.tar"):
        return replace(source, kind="sidecar")
    if source.fs.isdir(stem):
        return replace(source, kind="folder")
    raise IngestError(
        f"dataset.source: {source.path} is img2dataset's, but neither {stem}.tar nor the folder {stem} is there; "
        "name dataset.url_column to take it as a list of URLs"
    )


def read_archives(sources: Sequence[UrlList]) -> Iterator[tuple[UrlList, list[Rows]]]:
    """What each archive says of its images, in order, read by several threads ahead. Raises IngestError."""
    pending: deque[Future[list[Rows]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            ahead = iter(sources)
            for source in sources:
                pending += (pool.submit(_read, one) for one in itertools.islice(ahead, _READERS - len(pending)))
                yield source, pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read(source: UrlList) -> list[Rows]:
    """What an archive says of its images, in its order; a row's place is None where it has none.

    Where there is a sidecar, nothing else is read but for the stamp: an ingest of 100 TB takes the sidecars' few GB.
    That is why an image is known by its URL's key, which is also that of the same URL in a list, and by its content
    only where no URL is known, in a tar that has to be walked. (The sidecar's sha256 and md5 are of what img2dataset
    downloaded, before it resized that, so they name no bytes that are there.) Raises IngestError.
    """
    stem = source.path.rpartition(".")[0]
    path = {"sidecar": f"{stem}.tar", "folder": stem}.get(source.kind, source.path)
    try:
        place = {"path": _url(source.fs, path), "stamp": stamp(source.fs, path, source.kind == "folder")}
        if source.kind == "tar" and source.fs.exists(f"{stem}.parquet"):
            source = replace(source, path=f"{stem}.parquet", kind="sidecar")
        if source.kind != "tar":
            return list(_sidecar(source, place))
        with source.fs.open(source.path, "rb") as file:
            return list(_walked(file, source.size, place))
    except UNREADABLE as error:
        raise unreadable(source, error) from None


def stamp(fs: Any, path: str, folder: bool) -> str:
    """What tells an archive from another that takes its place, and is the same for its copies on other machines.

    Its size and its two ends, as nobody reads 100 TB for that; of a folder, the names and sizes of its files.
    """
    if folder:
        inside = [(file["name"].rstrip("/").rpartition("/")[2], file["size"]) for file in fs.ls(path, detail=True)]
        size, said = len(inside), repr(sorted(inside)).encode()
    else:
        size = fs.size(path)
        ends = ((0, min(_END_BYTES, size)), (max(_END_BYTES, size - _END_BYTES), size))
        said = b"".join(fs.cat_file(path, start=start, end=end) for start, end in ends if start < end)
    return f"{size}-{hashlib.sha256(said).hexdigest()[:16]}"


def _url(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _sidecar(source: UrlList, holder: Mapping[str, str]) -> Iterator[Rows]:
    with source.fs.open(source.path, "rb") as raw:
        file = pq.ParquetFile(raw)
        names = file.schema_arrow.names
        if missing := _SIDECAR - set(names):
            raise IngestError(
                f"dataset.source: {source.path} is not img2dataset's: it has no column {sorted(missing)[0]!r}"
            )
        columns = ["url", "key", "status", *(["caption"] if "caption" in names else [])]
        first = 0
        for batch in file.iter_batches(_BATCH, columns=columns):
            cells = {name: texts(source, batch.column(name), name) for name in columns}
            archived: list[dict[str, Any] | None] = []
            for i, (key, status) in enumerate(zip(cells["key"], cells["status"], strict=True), first):
                good = status == "success" and key is not None and _NAME.fullmatch(key)
                table = source.kind == "table"
                place = {**holder, "member": None if table else key, "row": i if table else None}
                archived.append(place if good else None)
            nothing: list[str | None] = [None] * len(batch)
            yield Rows(0, cells["url"], cells.get("caption", nothing), contents=nothing, archived=archived)
            first += len(batch)


def _walked(file: BinaryIO, end: int, holder: Mapping[str, str]) -> Iterator[Rows]:
    """The samples of a tar without a sidecar. One that is broken has those before the break, and one malformed row."""
    rows, known = Rows(0, [], [], contents=[], archived=[]), set[str]()

    def add(stem: str, sample: dict[str, tuple[int, int]]) -> None:
        parts = {ending: _text(file, *sample[ending]) for ending in ("json", "txt") if ending in sample}
        try:
            document = json.loads(parts.get("json") or "{}")
        except (ValueError, RecursionError):
            document = {}
        said = document if isinstance(document, dict) else {}
        url, image = _string(said.get("url")), image_of(sample)
        rows.urls.append(url)
        rows.captions.append(parts.get("txt") or _string(said.get("caption")) or _string(said.get("alt_text")))
        unknown = image is not None and not (url and url.strip())
        rows.contents.append(_digest(file, *image)[:KEY_DIGITS] if unknown and image else None)
        new = image and stem not in known  # by its name, download would find the first
        rows.archived.append({**holder, "member": stem, "row": None} if new else None)
        known.update([stem] if image else [])

    broken = 0
    try:
        for stem, sample in samples(file, end):
            if len(rows.urls) == _WALK:
                yield rows
                rows = Rows(0, [], [], contents=[], archived=[])
            add(stem, sample)
    except tarfile.HeaderError:
        broken = 1
    yield replace(rows, malformed=broken)


def samples(file: BinaryIO, end: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Each sample's name and its members, ending -> (offset, size), of which the first of an ending counts.

    Members of one sample follow each other; those whose names cannot be known, or are longer than any good one, are of
    a sample without a name. Raises tarfile.HeaderError after the last sample before a break.
    """
    stem, sample, broken = "", dict[str, tuple[int, int]](), None
    try:
        for name, offset, size in members(file, end):
            if name == "":  # a link, a device
                continue
            now, ending = _split(name) if name and len(name) <= _NAME_CHARS else ("", "")
            if now != stem and sample:
                yield stem, sample
                sample = {}
            stem = now
            sample.setdefault(ending, (offset, size))
    except tarfile.HeaderError as error:
        broken = error
    if sample:
        yield stem, sample
    if broken:
        raise broken


def image_of(sample: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Where a sample's image lies."""
    return next((sample[ending] for ending in ENDINGS if ending in sample), None)


def _split(name: str) -> tuple[str, str]:
    """A member's sample and its ending: the name's first dot divides them."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, ending = base.partition(".")
    return f"{folder}{slash}{stem}", ending.lower()


def _text(file: BinaryIO, offset: int, size: int) -> str:
    if size > _TEXT_BYTES:
        return ""
    file.seek(offset)
    return file.read(size).decode("utf-8", "replace")


def _string(value: Any) -> str | None:
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _digest(file: BinaryIO, offset: int, size: int) -> str:
    file.seek(offset)
    digest = hashlib.sha256()
    while size > 0 and (data := file.read(min(size, 1 << 20))):
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()
