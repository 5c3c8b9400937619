"""Images as they are stored: upright RGB JPEG without metadata, made once, from bytes that strangers wrote.

The container is cleaned first, so what was decoded as a check is, byte for byte, what is stored. Pillow's plugins are
opened directly: `Image.open` would add its own, process-wide pixel limit, and formats nobody asked for.
"""

import hashlib
import io
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
from .outcomes import Drop

MAX_ICC_BYTES = 1 << 20  # of a profile carried over when re-encoding; a larger one is applied instead

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


@dataclass(frozen=True)
class ImageRule:
    """Options that can change a stored image. Limits on sides and pixels are of the source, read from its header.

    Raises ValueError for a value that no rule can mean.
    """

    max_side_px: int = 1024  # longer images are scaled down, aspect kept (never up)
    min_side_px: int = 32
    max_aspect: float = 10.0  # long side / short side
    max_pixels: int = 64_000_000  # decoding takes about 16 bytes a pixel at worst
    quality: int = 92  # of the JPEG where re-encoding is needed

    def __post_init__(self) -> None:
        limits = {"max_side_px": 16, "min_side_px": 1, "max_aspect": 1, "max_pixels": 1, "quality": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")
        if self.quality > 95:  # above it, JPEG files only grow
            raise ValueError(f"quality: {self.quality} is more than 95")


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
    phash: int | None  # perceptual hash of `jpeg`


def normalise(data: bytes, rule: ImageRule) -> StoredImage:
    """Make the stored image. The same bytes, rule and Pillow version give the same result; safe in threads.

    Raises Drop: not_an_image, decode_error, too_many_pixels, too_small, bad_aspect.
    """
    name = sniff(data)
    with _decoding():
        core = CLEANERS[name](data)
        image = _OPENERS[name](io.BytesIO(core.data), "")
    if name == "BMP" and image.info["compression"] in (1, 2):
        raise Drop("not_an_image", "run-length coded BMP")  # its decoder is slow Python: an easy way to hold a worker
    _check_size(image.size, rule)
    turn = orientation(core.exif or image.info.get("exif") or b"")
    source_size = image.size if turn < 5 else image.size[::-1]
    scale = min(1.0, rule.max_side_px / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    with _decoding():
        if isinstance(image, Jpeg.JpegImageFile):
            image.draft(None, size)  # scales by 2, 4 or 8 while decoding, never below `size`
        image.load()
        if core.plain and image.mode == "RGB" and turn == 1 and scale == 1.0:
            jpeg = core.data
        else:
            rgb, icc = _rgb(image, size)
            if turn in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[turn])
            size = rgb.size
            buffer = io.BytesIO()
            rgb.save(buffer, "JPEG", quality=rule.quality, icc_profile=icc)
            jpeg = buffer.getvalue()
        near = phash(jpeg)
    return StoredImage(
        jpeg, hashlib.sha256(jpeg).hexdigest(), hashlib.sha256(data).hexdigest(), name, *source_size, *size, near
    )


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


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a GIF frame beyond its canvas
        raise Drop("too_many_pixels", str(error)) from error
    except _PILLOW_ERRORS as error:
        raise Drop("decode_error", f"{type(error).__name__}: {error}") from error


def _check_size(size: tuple[int, int], rule: ImageRule) -> None:
    short, long = sorted(size)
    detail = f"{size[0]}x{size[1]}"
    if short * long > rule.max_pixels:
        raise Drop("too_many_pixels", detail)
    if short < rule.min_side_px:
        raise Drop("too_small", detail)
    if long > rule.max_aspect * short:
        raise Drop("bad_aspect", detail)


def _rgb(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, bytes | None]:
    """Scale a loaded image of any mode to `size` and bring it to RGB; also the colour profile that then applies."""
    icc = image.info.get("icc_profile") or b""
    image = _widen(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
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
    return image.convert("RGB"), None


def _widen(image: Image.Image) -> Image.Image:
    """Bring an image to a mode that can be scaled: L, LA, RGB, RGBA or CMYK, of 8 bits a channel."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # where Pillow would clip at 255
    see_through = image.info.get("transparency")
    if isinstance(see_through, tuple) and max(see_through) > 255:
        image.info["transparency"] = tuple(level >> 8 for level in see_through)  # of a 16-bit PNG, read as 8 bits
    if image.mode == "RGBA" and image.format == "BMP" and image.getchannel("A").getextrema() == (0, 0):
        return image.convert("RGB")  # an unused fourth byte, not transparency
    if image.mode in ("LA", "RGBA", "CMYK"):
        return image
    if see_through is not None or image.mode in ("PA", "La", "RGBa"):
        return image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
