"""Samples a second of the trainer's loader, as a ratio to the plain `webdataset` pipeline. By hand, under a minute:

OMP_NUM_THREADS=1 python -m tests.bench.data_speed

Both shuffle, decode, resize, pad and batch the same 512 px photographs with as many processes; ours also parses and
checks regions, draws them, tokenises and keeps its place. The plain pipeline once decodes whole images, as it does of
itself, and once lets the JPEG decoder do part of the scaling, as ours does.
"""

import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import webdataset as wds
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch.utils.data import DataLoader

from tests.models.cloc.test_data import Words, sample, write_shard
from tests.photos import photo
from vesl.models.cloc.loader import Loader
from vesl.models.cloc.options import Data
from vesl.transforms.shards import encode

PHOTOS = (
    "skimage/data/coffee.png",
    "skimage/data/chelsea.png",
    "skimage/data/astronaut.png",
    "skimage/data/motorcycle_left.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)
SAMPLES, SHARDS, PX, BATCH = 3000, 4, 224, 32


def write(folder: Path) -> None:
    """Shards of photographs with a long side of 512 px and eight regions each."""
    jpegs = []
    for place in PHOTOS:
        image, buffer = photo(place), io.BytesIO()
        scale = 512 / max(image.size)
        image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue())
    shards = []
    for number in range(SHARDS):
        members = []
        for i in range(SAMPLES // SHARDS):
            key = f"{number:03}{i:06}"
            members += [(f"{key}.jpg", jpegs[i % len(jpegs)]), (f"{key}.json", encode(sample(key, 8)))]
        size = write_shard(folder / f"shard-{number:05}-000.tar", members)
        shards.append({"name": f"shard-{number:05}-000.tar", "samples": SAMPLES // SHARDS, "bytes": size})
    (folder / "index.json").write_text(json.dumps({"complete": True, "shards": shards}))


def ours(folder: Path, workers: int) -> Iterator[Any]:
    options = Data(workers=workers, shuffle=1000)
    return iter(Loader(str(folder), options, Words(), batch=BATCH, image_px=PX, context=77, seed=0))


def fit(image: Image.Image) -> np.ndarray:
    width, height = (round(side * PX / max(image.size)) for side in image.size)
    square = np.zeros((3, PX, PX), np.uint8)
    square[:, :height, :width] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    return square


def drafted(key: str, data: bytes) -> Image.Image | None:
    if not key.endswith("jpg"):
        return None
    image = JpegImageFile(io.BytesIO(data), "")
    image.draft(None, (PX * image.width // max(image.size), PX * image.height // max(image.size)))
    return image.convert("RGB")


def plain(folder: Path, workers: int, draft: bool = False) -> Iterator[Any]:
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    data = wds.WebDataset(urls, shardshuffle=100, repeat=True, nodesplitter=None).shuffle(1000)
    data = data.decode(drafted, "pil") if draft else data.decode("pil")
    data = data.to_tuple("jpg", "json").map_tuple(fit, lambda document: document).batched(BATCH)
    return iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4))


def speed(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Samples a second, and a second of the processes' CPU time (which other work on the machine does not move)."""
    for _ in itertools.islice(batches, 12):  # these wait for processes, windows and buffers
        pass
    start, busy, read = time.monotonic(), cpu_s(), 0
    while time.monotonic() - start < seconds:
        next(batches)
        read += BATCH
    return read / (time.monotonic() - start), read / (cpu_s() - busy)


def cpu_s() -> float:
    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


def main() -> None:
    """Measure in turns, as other work on the machine comes and goes; print medians and their ratios."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    kinds: dict[str, Callable[..., Iterator[Any]]] = {
        "ours": ours,
        "webdataset": plain,
        "webdataset, draft": lambda *told: plain(*told, draft=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for workers in (2, 1):
            found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
            for _, (kind, batches) in itertools.product(range(3), kinds.items()):
                found[kind].append(speed(batches(Path(folder), workers), seconds))
            middle = {kind: np.median(speeds, axis=0) for kind, speeds in found.items()}
            for kind, rate in middle.items():
                wall, cpu = middle["ours"] / rate
                print(
                    f"{workers} workers  {kind:18}{rate[0]:6.0f} samples/s, {rate[1]:5.0f} a CPU second;"
                    f"  ours is {wall:.2f} and {cpu:.2f} times that",
                    flush=True,
                )


if __name__ == "__main__":
    main()
