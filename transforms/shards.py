"""The region-text shard: a WebDataset tar of `KEY.jpg` and `KEY.json`, with bytes that depend on its content only.

A shard by reference has `KEY.json` alone, which says where in the store the image lies.

Written by the pack step, read by the trainer, and by anybody with the public `webdataset` library.
"""

import hashlib
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Protocol

import numpy as np

from .records import Caption, Region, Sample

_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes; whatever size they state
_EXTENDED_BYTES = 1 << 16  # of an extended header that is read; no good name needs one
_EXTENDED = re.compile(rb"^\d+ (size|path)=([^\n]*)", re.MULTILINE)  # linear: a stranger wrote what it is searched in


class _Writable(Protocol):
    def write(self, data: bytes, /) -> object: ...
    def tell(self) -> int: ...


def add_member(tar: _Writable, name: str, data: bytes) -> int:
    """Append a member with fixed mode, owner and time; return the offset of its first byte in the tar.

    `name` has at most 100 ASCII characters (else ValueError from tarfile).
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(data)
    tar.write(bytes(-len(data) % _BLOCK))
    return offset


def end_tar(tar: _Writable) -> None:
    """Write the end mark that `tar` expects and pad to a whole record."""
    tar.write(bytes(2 * _BLOCK))
    tar.write(bytes(-tar.tell() % _RECORD))


def close_tar(tar: BinaryIO) -> dict[str, Any]:
    """End a tar; return its size and hash as `bytes` and `sha256`."""
    end_tar(tar)
    size = tar.tell()
    tar.seek(0)
    return {"sha256": hashlib.file_digest(tar, "sha256").hexdigest(), "bytes": size}  # type: ignore[arg-type]


def _short(value: float) -> float:
    """The shortest decimal that is the same float32: 0.1 and not 0.10000000149011612."""
    return float(str(np.float32(value)))


def encode(sample: Sample, image: Mapping[str, Any] | None = None) -> bytes:
    """A sample as UTF-8 `KEY.json`: fixed key order, no spaces; coordinates and scores exact as float32.

    Where the image is not in the shard, `image` says where it lies: {"tar": its path in the store, "offset", "size"}.
    """
    document = {
        "key": sample.key,
        "url": sample.url,
        "sha256": sample.sha256,
        "width": sample.width,
        "height": sample.height,
        "alt_text": sample.alt_text,
        "captions": [{"text": c.text, "model": c.model} for c in sample.captions],
        "regions": [
            {
                "box": [_short(x) for x in r.box],
                "phrase": r.phrase,
                "score": _short(r.score),
                "caption": r.caption,
                "span": list(r.span),
            }
            for r in sample.regions
        ],
        "select": sample.select,
    }
    return dump(document if image is None else document | {"image": dict(image)})


def dump(document: Mapping[str, Any]) -> bytes:
    """JSON as shards have it. Raises ValueError for a number that JSON does not have."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes) -> Sample:
    """Read `KEY.json` from anywhere. Raises ValueError, saying what is wrong, for anything outside the contract."""
    try:
        document = json.loads(data.decode())
        sample = Sample(
            **{k: document[k] for k in ("key", "url", "sha256", "width", "height", "alt_text", "select")},
            captions=tuple(Caption(text=c["text"], model=c["model"]) for c in document["captions"]),
            regions=tuple(_region(r) for r in document["regions"]),
        )
    except (KeyError, TypeError, OverflowError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"not a region-text sample: {type(error).__name__}: {error}") from None
    _check(sample)
    return sample


def _region(region: dict[str, Any]) -> Region:
    x0, y0, x1, y1 = (float(x) for x in region["box"])
    start, end = region["span"]
    return Region((x0, y0, x1, y1), region["phrase"], float(region["score"]), region["caption"], (start, end))


def _check(sample: Sample) -> None:
    texts = (sample.key, sample.url, sample.sha256, sample.alt_text, sample.select)
    if not all(isinstance(x, str) for x in texts) or not all(isinstance(c.text, str) for c in sample.captions):
        raise ValueError("a text field is not a string")
    if not all(type(x) is int and x > 0 for x in (sample.width, sample.height)):
        raise ValueError(f"the size {sample.width!r} x {sample.height!r} is not a pair of positive integers")
    for i, region in enumerate(sample.regions):
        x0, y0, x1, y1 = region.box
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(f"region {i}: the box {region.box} is not x0 < x1, y0 < y1 in 0..1")
        if not math.isfinite(region.score):
            raise ValueError(f"region {i}: the score is {region.score}")
        start, end = region.span
        indices = (region.caption, start, end)
        if not all(type(x) is int and x >= 0 for x in indices) or region.caption >= len(sample.captions):
            raise ValueError(f"region {i}: there is no caption {region.caption!r} with a span {region.span!r}")
        if sample.captions[region.caption].text[start:end] != region.phrase or start >= end:
            raise ValueError(f"region {i}: the span {region.span} does not cut {region.phrase!r} out of its caption")


def members(tar: BinaryIO, end: int) -> Iterator[tuple[str | None, int, int]]:
    """(name, offset, size) of what lies in a tar of `end` bytes from anybody, in order; folders are passed over.

    The name is empty where it is that of no file (a link, a device), None where it cannot be known. Raises
    tarfile.HeaderError where the rest cannot be read: a header that is none, a member that would go beyond the end, or
    no mark at the end.
    """
    at = 0
    extended: dict[bytes, bytes] | None = {}  # of the next member; None: it cannot be known
    while at < end:
        tar.seek(at)
        block = tar.read(_BLOCK)
        if block == bytes(_BLOCK):  # the end mark
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
            size = 0 if info.type in _WITHOUT_DATA else int((extended or {}).get(b"size", info.size))
        except ValueError:
            raise tarfile.HeaderError("a size that is no number") from None
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if size < 0 or start + size > end or info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.HeaderError("a size that cannot be")
        if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME):
            if size > _EXTENDED_BYTES:
                extended = None
            elif extended is not None:
                data = tar.read(size)
                long = info.type == tarfile.GNUTYPE_LONGNAME
                extended |= {b"path": data.rstrip(b"\0")} if long else dict(_EXTENDED.findall(data))
        elif info.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if not info.isreg():
                name: str | None = ""
            elif extended is None:
                name = None
            else:
                name = extended.get(b"path", b"").decode("utf-8", "replace") or info.name
            extended = {}
            if info.type != tarfile.DIRTYPE:
                yield name, start, size
    raise tarfile.HeaderError("no end mark")


def read_range(tar: BinaryIO, offset: int, size: int) -> bytes:
    """Read a member's bytes by its place. Raises ValueError where the tar is shorter than that."""
    tar.seek(offset)
    data = tar.read(size)
    if len(data) != size:
        raise ValueError(f"the tar ends {size - len(data)} bytes before the member does")
    return data
