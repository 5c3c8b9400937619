"""The containers of image files, walked before any decoder sees them; `images` is the caller.

Only what a decoder needs for the pixels of the first frame goes on: GPS positions are not stored, and no bomb in
comments, text or EXIF reaches a parser. All functions take hostile bytes and raise Drop, IndexError or struct.error.
"""

import re
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from .outcomes import Drop

MAX_SCANS = 100  # real progressive JPEGs have about ten; each scan costs a pass over all coefficients


class Core(NamedTuple):
    """What of a file goes to the decoder; `plain` is a JPEG that every decoder reads (baseline or progressive).

    `animated` says of a GIF or PNG that more frames were cut off; decoders of WebP and AVIF count them themselves.
    """

    data: bytes
    exif: bytes = b""
    plain: bool = False
    animated: bool = False


def sniff(data: bytes) -> str:
    """Tell the format by its first bytes. Raises Drop not_an_image for all but the six that are allowed."""
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:15] == b"WEBPVP8":
        return "WEBP"
    if data[4:8] == b"ftyp" and re.search(rb"avi[fs]", data[8 : min(int.from_bytes(data[:4]), 256)]):
        return "AVIF"
    for magic, name in ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b"BM", "BMP")):
        if data.startswith(magic):
            return name
    raise Drop("not_an_image", f"starts with {data[:12]!r}")


def orientation(exif: bytes) -> int:
    """Read the EXIF orientation, 1 where there is none. Reads nothing else: other entries may be bombs."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order:
        try:
            start = struct.unpack_from(order + "I", tiff, 4)[0]
            for entry in range(struct.unpack_from(order + "H", tiff, start)[0]):
                tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
                if tag == 0x0112:
                    return int(value) if kind == 3 and 2 <= value <= 8 else 1
        except struct.error:
            pass
    return 1


_MARKER = re.compile(rb"\xff([^\x00\xff])")  # stray and fill bytes between segments are passed over, as libjpeg does
_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def _clean_jpeg(data: bytes) -> Core:
    """Keep the tables, frames and scans up to the first end of image, and of the rest JFIF, Adobe and ICC (T.81, B)."""
    out, exif, plain, scans, at = [b"\xff\xd8"], b"", False, 0, 2
    while found := _MARKER.search(data, at):
        marker, at = found[1][0], found.end()
        if marker == 0xD9:
            return Core(b"".join([*out, b"\xff\xd9"]), exif, plain)
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            continue
        length = int.from_bytes(data[at : at + 2])
        body, at = data[at + 2 : at + length], at + length
        if length < 2 or at > len(data):
            break
        if kept := _kept(marker, body):
            out += b"\xff", bytes([marker]), (len(kept) + 2).to_bytes(2), kept
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            exif = exif or body
        plain = plain or marker in (0xC0, 0xC1, 0xC2)
        if marker == 0xDA:
            scans += 1
            end = _SCAN_END.search(data, at)
            if end is None or scans > MAX_SCANS:
                break
            out.append(data[at : end.start()])
            at = end.start()
    raise Drop("decode_error", "truncated JPEG" if scans <= MAX_SCANS else f"more than {MAX_SCANS} scans")


def _kept(marker: int, body: bytes) -> bytes:
    """What of a JPEG segment is kept: nothing of most; JFIF without its thumbnail; no tail behind Adobe's fields."""
    if 0xC0 <= marker <= 0xDF or (marker == 0xE2 and body[:12] == b"ICC_PROFILE\0"):
        return body
    if marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
        return body[:12] + b"\0\0"
    return body[:12] if marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12 else b""


def _clean_png(data: bytes) -> Core:
    """Keep the chunks of the still image, their checksums verified; text and animation go."""
    out, at, animated = [data[:8]], 8, False
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk, at = data[at : at + 12 + length], at + 12 + length
        if at > len(data):
            break
        if kind == b"acTL" and length == 8:
            animated = int.from_bytes(chunk[8:12]) > 1
        if kind not in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"eXIf", b"IEND"):
            continue
        if zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:]):
            out.append(chunk)
        elif not kind[0] & 0x20:  # an upper-case letter marks a chunk that one cannot do without
            raise Drop("decode_error", f"PNG checksum of {kind.decode()}")
        if kind == b"IEND":
            return Core(b"".join(out), animated=animated)
    raise Drop("decode_error", "truncated PNG")


def _clean_gif(data: bytes) -> Core:
    """Keep the screen, the palette and the first frame with its control block; Pillow joins comments in n squared."""
    colours, control, at = data[10], b"", 13
    at += 3 << (colours & 7) + 1 if colours & 0x80 else 0
    screen = data[:at]
    while data[at] == 0x21:  # an extension
        start, at = at, _skip_blocks(data, at + 2)
        if data[start + 1] == 0xF9:
            control = data[start:at]
    if data[at] != 0x2C:
        raise Drop("decode_error", "GIF without a frame")
    start, colours = at, data[at + 9]
    at += 10 + (3 << (colours & 7) + 1 if colours & 0x80 else 0) + 1  # descriptor, palette, code size
    end = _skip_blocks(data, at)
    return Core(screen + control + data[start:end] + b";", animated=_frame_follows(data, end))


def _frame_follows(data: bytes, at: int) -> bool:
    try:
        while data[at] == 0x21:
            at = _skip_blocks(data, at + 2)
        return data[at] == 0x2C
    except IndexError:  # cut off behind the first frame, which is whole
        return False


def _skip_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += data[at] + 1
    return at + 1


def _clean_avif(data: bytes) -> Core:
    """Hide the EXIF item, which Pillow would parse whole; the orientation of an AVIF is in its own properties."""
    out, at = bytearray(data), 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if length == 1:
            length = int.from_bytes(data[at + 8 : at + 16])
        end = at + length if length else len(data)
        if kind == b"meta":
            out[at:end] = out[at:end].replace(b"Exif", b"none")
        at = max(end, at + 8)
    return Core(bytes(out))


def _clean_webp(data: bytes) -> Core:
    """Cap the canvas that the decoder will allocate when it is opened. (Its other chunks are not parsed then.)"""
    if data[12:16] == b"VP8X":
        canvas = (int.from_bytes(data[24:27], "little") + 1) * (int.from_bytes(data[27:30], "little") + 1)
        if canvas > 16383 * 16383:  # what a WebP frame can be at most
            raise Drop("too_many_pixels", f"canvas of {canvas} pixels")
    return Core(data)


CLEANERS: dict[str, Callable[[bytes], Core]] = {
    "JPEG": _clean_jpeg,
    "PNG": _clean_png,
    "WEBP": _clean_webp,
    "GIF": _clean_gif,
    "BMP": Core,
    "AVIF": _clean_avif,
}
