"""Images as they are stored: upright RGB JPEG without metadata, made once, from bytes that strangers wrote.

The container is cleaned first, so what was decoded as a check is, byte for byte, what is stored. Pillow's plugins are
opened directly: `Image.open` would add its own, process-wide pixel limit, and formats nobody asked for.
"""

import hashlib
import io
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import AvifImagePlugin as Avif
from PIL import BmpImagePlugin as Bmp
from PIL import GifImagePlugin as Gif
from PIL import Image, ImageCms, ImageFile
from PIL import JpegImagePlugin as Jpeg
from PIL import PngImagePlugin as Png
from PIL import WebPImagePlugin as WebP

from .containers import CLEANERS, orientation, sniff
from .hashes import phash
from .options import added
from .outcomes import Drop

MAX_ICC_BYTES = 1 << 20  # of a profile carried over when re-encoding; a larger one is applied instead
MAX_JPEG_SIDE_PX = 65_500  # libjpeg's own limit
# Less than half of Lanczos' time; about as near to its result as the area average of OpenCV (within 3 dB either way),
# but up to the factor _NEAR, which is left where half of 683 rows become 342, it blurs, and Lanczos costs little.
_FILTER, _NEAR_FILTER, _NEAR = Image.Resampling.HAMMING, Image.Resampling.LANCZOS, 1.01

# What Pillow and lcms raise on hostile bytes; MemoryError is not among them, it belongs to the machine.
_PILLOW_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError)
_PILLOW_ERRORS += (ArithmeticError, AttributeError, AssertionError, RuntimeError, struct.error, zlib.error)
_PILLOW_ERRORS += (ImageCms.PyCMSError,)
_OPENERS: dict[str, Callable[[io.BytesIO, str], ImageFile.ImageFile]] = {
    "JPEG": Jpeg.JpegImageFile,
    "PNG": Png.PngImageFile,
    "WEBP": WebP.WebPImageFile,
    "GIF": Gif.GifImageFile,
    "BMP": Bmp.BmpImageFile,
    "AVIF": Avif.AvifImageFile,
}
_UPRIGHT = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Fit(NamedTuple):
    """Where a picture goes. All in pixels; the source is upright, or turned with everything else."""

    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of what is kept of the source
    size: tuple[int, int]  # width, height that it is scaled to
    canvas: tuple[int, int]  # of the stored image

    @property
    def place(self) -> tuple[int, int]:
        """The picture's left and top in the stored image, whose other pixels are white."""
        return (self.canvas[0] - self.size[0]) // 2, (self.canvas[1] - self.size[1]) // 2


@dataclass(frozen=True)
class Resize:
    """How large an image is stored. Which of its sides is measured, and becomes `side_px`, depends on `mode`:

    - `keep_ratio`: the longer side; the whole picture stays (img2dataset: keep_ratio_largest)
    - `keep_ratio_shorter`: the shorter side; the whole picture stays (img2dataset: keep_ratio)
    - `pad`: the longer side; white borders then make a square, with the picture in its middle (img2dataset: border)
    - `crop`: the shorter side; of the longer, the middle is kept, so that it is a square (img2dataset: center_crop)
    - `none`: no side; the image keeps its size

    Boxes of later steps are of the stored image, borders included; `fit` of the source's size says where the picture
    lies in it. Raises ValueError for a side that no JPEG has.
    """

    side_px: int = 1024
    mode: Literal["keep_ratio", "keep_ratio_shorter", "pad", "crop", "none"] = "keep_ratio"
    only_if_larger: bool = True  # an image whose measured side is within side_px stays as it is; else it is scaled up

    def __post_init__(self) -> None:
        if not 16 <= self.side_px <= MAX_JPEG_SIDE_PX:
            raise ValueError(f"side_px: {self.side_px} is not between 16 and {MAX_JPEG_SIDE_PX}")

    def fit(self, width: int, height: int) -> Fit:
        """Where a source of this size goes."""
        whole, side, short = (0.0, 0.0, float(width), float(height)), self.side_px, min(width, height)
        measured = max(width, height) if self.mode in ("keep_ratio", "pad") else short
        if self.mode == "none" or (self.only_if_larger and measured <= side):
            return Fit(whole, (width, height), (width, height))
        if self.mode == "crop":
            x, y = (width - short) / 2, (height - short) / 2
            return Fit((x, y, x + short, y + short), (side, side), (side, side))
        size = (max(1, round(width * side / measured)), max(1, round(height * side / measured)))
        return Fit(whole, size, (side, side) if self.mode == "pad" else size)


@dataclass(frozen=True)
class ImageRule:
    """Options that can change a stored image. Limits on sides and pixels are of the source, read from its header.

    Raises ValueError for a value that no rule can mean.
    """

    resize: Resize = Resize()
    min_side_px: int = 32
    max_aspect: float = 10.0  # long side / short side
    max_pixels: int = 64_000_000  # of one image, or of all that a worker decodes at a time; up to 16 bytes each
    quality: int = 92  # of the JPEG where re-encoding is needed
    animated: Literal["first_frame", "drop"] = "first_frame"  # what is stored of a GIF, WebP, APNG or AVIF that moves
    max_side_px: int | None = added(None)  # an older name of resize.side_px, and soon None

    def __post_init__(self) -> None:
        limits = {"max_side_px": 16, "min_side_px": 1, "max_aspect": 1, "max_pixels": 1, "quality": 1}
        for name, least in limits.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: {value} is less than {least}")
        if self.quality > 95:  # above it, JPEG files only grow
            raise ValueError(f"quality: {self.quality} is more than 95")
        if self.max_side_px is not None:
            if self.resize.side_px not in (Resize.side_px, self.max_side_px):
                raise ValueError("max_side_px: is another name of resize.side_px; leave one of them out")
            object.__setattr__(self, "resize", replace(self.resize, side_px=self.max_side_px))
            object.__setattr__(self, "max_side_px", None)  # so that both spellings have one fingerprint


@dataclass(frozen=True)
class StoredImage:
    """An image as stored, and what it was made of. Sizes are in pixels of the upright image."""

    jpeg: bytes
    sha256: str  # of `jpeg`
    source_sha256: str  # of the bytes as downloaded
    source_format: str  # JPEG (MPO counts as one), PNG, WEBP, GIF, BMP or AVIF
    source_width: int
    source_height: int
    width: int
    height: int
    phash: int | None  # perceptual hash of the pixels that `jpeg` was kept or encoded for


def normalise(data: bytes, rule: ImageRule) -> StoredImage:
    """Make the stored image. The same bytes, rule and Pillow version give the same result; safe in threads.

    Raises Drop: not_an_image, decode_error, animated, too_many_pixels, too_small, bad_aspect.
    """
    name = sniff(data)
    with _decoding():
        core = CLEANERS[name](data)
        image = _OPENERS[name](io.BytesIO(core.data), "")
    if name == "JPEG":
        image.decodermaxblock = len(core.data)  # decoded in one piece: after each, a thread waits for its next turn
    if name == "BMP" and image.info["compression"] in (1, 2):
        raise Drop("not_an_image", "run-length coded BMP")  # its decoder is slow Python: an easy way to hold a worker
    if rule.animated == "drop" and (core.animated or (name in ("WEBP", "AVIF") and getattr(image, "n_frames", 1) > 1)):
        raise Drop("animated", name)
    fit = rule.resize.fit(*image.size)
    _check_size(image.size, fit.canvas, rule)
    turn = orientation(core.exif or image.info.get("exif") or b"")
    source_size = image.size if turn < 5 else image.size[::-1]
    with _decoding():
        fits = core.plain and image.mode == "RGB" and turn == 1 and fit.size == fit.canvas == image.size
        box = _draft(image, fit)
        with _room.take(image.width * image.height, rule.max_pixels):
            image.load()
            rgb, icc = (image, None) if fits else _rgb(image, box, fit.size)
    jpeg = core.data
    if not fits:
        rgb = _bordered(rgb.transpose(_UPRIGHT[turn]) if turn in _UPRIGHT else rgb, fit)
        jpeg = _encoded(rgb, rule.quality, icc)
    source = hashlib.sha256(data).hexdigest()
    stored = source if jpeg == data else hashlib.sha256(jpeg).hexdigest()
    return StoredImage(jpeg, stored, source, name, *source_size, *rgb.size, phash(rgb))


def decode(jpeg: bytes) -> Image.Image:
    """Decode a stored image: RGB, loaded. Raises OSError or SyntaxError where it is not a whole JPEG."""
    image = Jpeg.JpegImageFile(io.BytesIO(jpeg), "")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def within(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image itself, or, where it has more than `max_pixels`, a smaller one of the same aspect that has no more."""
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


class _Room:
    """Bounds the pixels that threads decode at a time: 40 bytes may ask for 1 GB, and come in a crowd."""

    def __init__(self) -> None:
        self._order, self._free, self._taken = threading.Lock(), threading.Condition(), 0

    @contextmanager
    def take(self, pixels: int, most: int) -> Iterator[None]:
        """Wait, in the order of coming, until `pixels` more are within `most`, or alone."""
        with self._order, self._free:
            self._free.wait_for(lambda: not self._taken or self._taken + pixels <= most)
            self._taken += pixels
        try:
            yield
        finally:
            with self._free:
                self._taken -= pixels
                self._free.notify_all()


_room = _Room()


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a GIF frame beyond its canvas
        raise Drop("too_many_pixels", str(error)) from error
    except _PILLOW_ERRORS as error:
        raise Drop("decode_error", f"{type(error).__name__}: {error}") from error


def _check_size(size: tuple[int, int], stored: tuple[int, int], rule: ImageRule) -> None:
    short, long = sorted(size)
    detail = f"{size[0]}x{size[1]}"
    if short * long > rule.max_pixels:
        raise Drop("too_many_pixels", detail)
    if short < rule.min_side_px:
        raise Drop("too_small", detail)
    if long > rule.max_aspect * short:
        raise Drop("bad_aspect", detail)
    if max(stored) > MAX_JPEG_SIDE_PX or stored[0] * stored[1] > rule.max_pixels:  # scaled up, or too long for a JPEG
        raise Drop("too_many_pixels", f"{detail}, to be stored as {stored[0]}x{stored[1]}")


def _draft(image: ImageFile.ImageFile, fit: Fit) -> tuple[float, float, float, float]:
    """Let a JPEG scale by 2, 4 or 8 while it is decoded; return where the box then is.

    Never below what is wanted, to whole pixels: half of 683 rows are 342. (Pillow would not halve them, for 342 twice.)
    """
    if isinstance(image, Jpeg.JpegImageFile):
        (width, height), (x0, y0, x1, y1) = image.size, fit.box
        wide, high = width * fit.size[0] / (x1 - x0), height * fit.size[1] / (y1 - y0)  # wanted of the whole
        by = next((n for n in (8, 4, 2) if math.ceil(width / n) >= wide and math.ceil(height / n) >= high), 1)
        if drafted := image.draft(None, (max(1, width // by), max(1, height // by))):
            scale = drafted[1][2] / width  # as it is; a picture of a few pixels is scaled less
            return x0 * scale, y0 * scale, x1 * scale, y1 * scale
    return fit.box


def _bordered(image: Image.Image, fit: Fit) -> Image.Image:
    if fit.size == fit.canvas:
        return image
    x, y = fit.place
    canvas = Image.new("RGB", fit.canvas, "white")
    canvas.paste(image, (x, y) if image.size == fit.size else (y, x))  # turned by a quarter, as the square is
    return canvas


def _encoded(image: Image.Image, quality: int, icc: bytes | None) -> bytes:
    # Only while it encodes into a file of the system does Pillow let other threads run.
    memory = hasattr(os, "memfd_create")
    file: BinaryIO
    with open(os.memfd_create("jpeg"), "w+b", buffering=0) if memory else io.BytesIO() as file:
        image.save(file, "JPEG", quality=quality, icc_profile=icc)
        file.seek(0)
        return file.read()


def _rgb(
    image: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[Image.Image, bytes | None]:
    """Scale the box of a loaded image of any mode to `size`, bring it to RGB; also the colour profile that applies."""
    icc = image.info.get("icc_profile") or b""
    image = _widen(image)
    if image.size != size or box != (0, 0, *size):
        factor = max((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        image = image.resize(size, _FILTER if factor > _NEAR else _NEAR_FILTER, box, reducing_gap=2.0)
    space = {"CMYK": b"CMYK", "L": b"GRAY", "LA": b"", "RGB": b"RGB ", "RGBA": b"RGB "}[image.mode]
    if image.mode in ("LA", "RGBA"):
        white = Image.new("RGBA", size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white.convert("RGB")
    if icc[16:20] == space and icc[36:40] == b"acsp":
        if image.mode == "RGB" and len(icc) <= MAX_ICC_BYTES:
            return image, icc
        try:
            profiles = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
            return converted or image.convert("RGB"), None
        except _PILLOW_ERRORS:
            pass  # not a profile after all
    return image if image.mode == "RGB" else image.convert("RGB"), None


def _widen(image: Image.Image) -> Image.Image:
    """Bring an image to a mode that can be scaled: L, LA, RGB, RGBA or CMYK, of 8 bits a channel."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # where Pillow would clip at 255
    see_through = image.info.get("transparency")
    if isinstance(see_through, tuple) and max(see_through) > 255:
        image.info["transparency"] = tuple(level >> 8 for level in see_through)  # of a 16-bit PNG, read as 8 bits
    if image.mode == "RGBA" and image.format == "BMP" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # an unused fourth byte, not transparency
    if see_through is not None or image.mode in ("PA", "La", "RGBa"):
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK"):
        return image  # `convert` would copy it
    return image.convert("L" if image.mode == "1" else "RGB")
