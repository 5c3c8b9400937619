"""What shards by reference cost the trainer's loader, against shards with the images inside. By hand, about a minute:

OMP_NUM_THREADS=1 python -m tests.bench.reference_read

4 parts of 750 photographs (512 px), of which a filter kept 30 %, scattered at random. Both kinds in turns, in one run:
samples a second from a local disk; and what a bucket would be asked for, bytes and requests: where the images of a
chunk are asked for one by one, as the loader does, and were neighbours of up to a megabyte apart merged into one.
"""

import hashlib
import io
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.utils import merge_offset_ranges

from tests.bench.data_speed import BATCH, PHOTOS, PX, speed
from tests.models.cloc.test_data import Words, sample
from tests.photos import photo
from vesl.models.cloc.loader import _CHUNK, Loader
from vesl.models.cloc.options import Data
from vesl.models.cloc.shards import Cursor, Order
from vesl.transforms.shards import add_member, close_tar, encode

PARTS, ROWS, KEPT = 4, 750, 0.3
GAPS = (1 << 16, 1 << 18, 1 << 20)
Place = dict[str, Any]


def write(store: Path) -> list[list[Place]]:
    """A store's image tars and both kinds of shards; where the kept images of each part lie."""
    jpegs, chance, places = [], random.Random(0), []
    for name in PHOTOS:
        image, buffer = photo(name), io.BytesIO()
        scale = 512 / max(image.size)
        image.resize((round(image.width * scale), round(image.height * scale))).save(buffer, "JPEG", quality=92)
        jpegs.append(buffer.getvalue())
    indices: dict[str, list[dict[str, Any]]] = {"embed": [], "reference": []}
    for folder in ("download", *indices):
        (store / folder).mkdir()
    for part in range(PARTS):
        tar, kept = f"download/part-{part:05}.tar", []
        with (store / tar).open("w+b") as file:
            for row in range(ROWS):
                data = jpegs[row % len(jpegs)]
                place = {"tar": tar, "offset": add_member(file, f"{part}{row:05}.jpg", data), "size": len(data)}
                if chance.random() < KEPT:
                    kept.append((f"{part}{row:05}", data, place))
            close_tar(file)
        places.append([place for _, _, place in kept])
        for kind, shards in indices.items():
            name = f"shard-{part:05}-000.tar"
            with (store / kind / name).open("w+b") as file:
                for key, data, place in kept:
                    about = sample(key, 8, sha256=hashlib.sha256(data).hexdigest())
                    if kind == "embed":
                        add_member(file, f"{key}.jpg", data)
                    add_member(file, f"{key}.json", encode(about, place if kind == "reference" else None))
                shards.append({"name": name, "samples": len(kept), **close_tar(file)})
    for kind, shards in indices.items():
        (store / kind / "index.json").write_text(json.dumps({"complete": True, "shards": shards}))
    return places


def batches(store: Path, kind: str, workers: int, shuffle: int) -> Iterator[Any]:
    options = Data(workers=workers, shuffle=shuffle)
    return iter(
        Loader(str(store / kind), options, Words(), batch=BATCH, image_px=PX, context=77, seed=0, images=str(store))
    )


def asked(places: list[list[Place]], shuffle: int | None, gap: int | None) -> tuple[int, int]:
    """(requests, bytes) for the images of one epoch, in the loader's chunks; without `shuffle`, in the files' order."""
    epoch = [place for part in places for place in part]
    if shuffle:
        counts = np.array([len(part) for part in places])
        order, starts = Order(counts, 0, shuffle, 0, 1, 1), np.cumsum(counts) - counts
        windows = [order.window(0, Cursor(0, window)) for window in range(order.windows(0))]
        epoch = [epoch[starts[w] + i] for which, index in windows for w, i in zip(which, index, strict=True)]
    requests, size = 0, 0
    for start in range(0, len(epoch), _CHUNK):
        chunk = epoch[start : start + _CHUNK]
        names, firsts = [p["tar"] for p in chunk], [p["offset"] for p in chunk]
        ends = [p["offset"] + p["size"] for p in chunk]
        if gap is not None:
            names, firsts, ends = merge_offset_ranges(names, firsts, ends, max_gap=gap)
        requests, size = requests + len(names), size + sum(ends) - sum(firsts)
    return requests, size


def main() -> None:
    """Measure in turns, as other work on the machine comes and goes; print medians and ratios."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        places = write(store)
        inside, alone = (sum(p.stat().st_size for p in (store / k).glob("*.tar")) for k in ("embed", "reference"))
        count = sum(map(len, places))
        print(
            f"{count} of {PARTS * ROWS} kept; shards {inside / 1e6:.1f} MB embedded, {alone / 1e6:.2f} MB by reference"
        )
        for workers in (2, 1):
            found: dict[str, list[tuple[float, float]]] = {"embed": [], "reference": []}
            for _ in range(3):
                for kind, speeds in found.items():
                    speeds.append(speed(batches(store, kind, workers, 1000), seconds))
            rates = {kind: np.median(speeds, axis=0) for kind, speeds in found.items()}
            wall, cpu = rates["reference"] / rates["embed"]
            told = ", ".join(f"{kind} {rate[0]:.0f}" for kind, rate in rates.items())
            print(f"{workers} workers, local disk: {told} samples/s: {wall:.2f} times, {cpu:.2f} a CPU second")
        for shuffle in (None, 1000):
            for gap in (None, *GAPS):
                requests, size = asked(places, shuffle, gap)
                how = "one by one" if gap is None else f"merged over {gap >> 10} KiB"
                ratio = (size + alone) / inside
                order = "shuffled over 1000" if shuffle else "in order"
                print(f"bucket, {order}, {how}: {requests / count:.2f} requests a sample, {ratio:.2f} times the bytes")


if __name__ == "__main__":
    main()
