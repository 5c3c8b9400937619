"""Where the time of a stored image goes, in milliseconds of CPU, and a peer beside it; by hand.

    python -m tests.bench.image_speed [--side 512] [--quality 92]

JPEG photographs (with noise, as sensors have it) of 0.2 to 12 megapixels, one of each size, and 12 megapixels in other
formats. The peer is what img2dataset's resizer does for resize_mode keep_ratio_largest with only_if_bigger: decode with
OpenCV, scale by its area average, encode, sha256; it has no perceptual hash and keeps no colour profile. Then decoding
and encoding by simplejpeg, a binding of libjpeg-turbo, where it is installed. The least of several tries counts.
"""

import argparse
import hashlib
import importlib.util
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL import JpegImagePlugin as Jpeg

from tests.photos import photo
from vesl.transforms.containers import CLEANERS
from vesl.transforms.hashes import phash
from vesl.transforms.images import ImageRule, Resize, normalise

SIDES = (512, 700, 800, 1024, 1600, 2400, 4000)
FILTERS = (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.HAMMING, Image.Resampling.BOX)


def photograph(side: int, kind: str = "JPEG", **options: Any) -> bytes:
    """An encoded picture of `side` x 3/4 `side` pixels."""
    pixels = np.asarray(photo("skimage/data/coffee.png").resize((side, side * 3 // 4), Image.Resampling.LANCZOS))
    noisy = pixels + np.random.default_rng(0).normal(0, 4, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()


def cpu_ms(do: Callable[[], Any], tries: int = 7) -> float:
    """The least CPU time of the process: the AVIF decoder has threads of its own."""
    do()
    took = []
    for _ in range(tries):
        start = time.process_time()
        do()
        took.append(time.process_time() - start)
    return 1000 * min(took)


def peer(side: int, quality: int) -> Callable[[bytes], tuple[bytes, str]]:
    """Decode, scale, encode and digest with OpenCV."""
    import cv2

    cv2.setNumThreads(1)

    def make(data: bytes) -> tuple[bytes, str]:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        height, width = image.shape[:2]
        if max(width, height) > side:
            scale = side / max(width, height)
            image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
        done = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        return done, hashlib.sha256(data).hexdigest()

    return make


def parts(data: bytes, side: int, quality: int) -> str:
    """The stages of one JPEG apart."""
    size = Resize(side).fit(*Jpeg.JpegImageFile(io.BytesIO(data), "").size).size

    def decoded() -> Image.Image:
        image = Jpeg.JpegImageFile(io.BytesIO(data), "")
        image.draft(None, size)
        image.load()
        return image

    def encoded() -> bytes:
        file = io.BytesIO()
        small.save(file, "JPEG", quality=quality)
        return file.getvalue()

    image = decoded()
    small = image.resize(size)
    took = {
        "clean": lambda: CLEANERS["JPEG"](data),
        "decode": decoded,
        **{f.name.lower(): lambda f=f: image.resize(size, f) for f in FILTERS if image.size != size},
        "encode": encoded,
        "phash": lambda: phash(small),
        "sha256": lambda: hashlib.sha256(data).hexdigest(),
    }
    if importlib.util.find_spec("simplejpeg"):
        import simplejpeg

        pixels = np.asarray(small)
        took["simplejpeg decode"] = lambda: simplejpeg.decode_jpeg(data, min_width=size[0], min_height=size[1])
        took["encode "] = lambda: simplejpeg.encode_jpeg(pixels, quality, "RGB", "420")
    return ", ".join(f"{name} {cpu_ms(do):.2f}" for name, do in took.items())


def main() -> None:
    """Print a line for each picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--quality", type=int, default=92)
    given = parser.parse_args()
    rule, other = ImageRule(Resize(given.side), quality=given.quality), peer(given.side, given.quality)
    sums = [0.0, 0.0]
    for side in SIDES:
        data = photograph(side, quality=88)
        both = [cpu_ms(lambda: normalise(data, rule)), cpu_ms(lambda: other(data))]  # noqa: B023
        sums = [a + b for a, b in zip(sums, both, strict=True)]
        print(f"JPEG {side} px: {both[0]:.1f} ms, peer {both[1]:.1f} ms; {parts(data, given.side, given.quality)}")
    print(f"all JPEGs: {sums[0]:.1f} ms, peer {sums[1]:.1f} ms: {sums[0] / sums[1]:.2f}x")
    for kind, options in {"PNG": {"compress_level": 6}, "WEBP": {}, "AVIF": {"speed": 10}, "GIF": {}}.items():
        data = photograph(4000, kind, **options)
        both = [cpu_ms(lambda: normalise(data, rule), 2), cpu_ms(lambda: other(data), 2)]  # noqa: B023
        print(f"{kind} 4000 px: {both[0]:.0f} ms, peer {both[1]:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
