"""How fast the built-in models are on one core: python tests/bench/tiny_speed.py [rounds]."""

import importlib.util
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

FILES = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/motorcycle_left.png",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
PHRASES = ["a woman", "a cat", "a cup of coffee", "a red motorcycle", "a temple", "an orange flower"]


def load(path: str) -> Image.Image:
    """Open an installed photograph with its longer side at 512 px."""
    package, _, name = path.partition("/")
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    image = Image.open(Path(spec.submodule_search_locations[0]) / name).convert("RGB")
    image.thumbnail((512, 512))
    return image


def main() -> None:
    """Print opening time, images/s of a core (by CPU time and by the clock) and peak memory."""
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # before numpy and torch are imported, which read them then
    import torch

    from vesl.models import tiny

    torch.set_num_threads(1)
    images = [load(path) for path in FILES] * (int(sys.argv[1]) if len(sys.argv) > 1 else 3)
    start = time.perf_counter()
    caption, ground = tiny.open_captioner(), tiny.open_grounder(tiny.FLOOR)
    print(f"open both     {time.perf_counter() - start:6.1f} s")

    def caption_all() -> None:
        caption(images, [""] * len(images))

    def ground_all() -> None:
        ground(images, [PHRASES] * len(images))

    def joint() -> None:
        caption_all()
        ground_all()

    caption_all()  # so that the first round pays for no memory
    rounds: dict[str, Callable[[], None]] = {"caption": caption_all, "ground": ground_all, "joint": joint}
    for name, work in rounds.items():
        clock, cpu = time.perf_counter(), time.process_time()
        work()
        clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        print(f"{name:8} {len(images) / cpu:6.2f} images/s of a core, {len(images) / clock:6.2f} by the clock")
    print(f"peak memory   {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:6.0f} MB")


if __name__ == "__main__":
    main()
