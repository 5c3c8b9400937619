"""How many samples a second one core judges: `OMP_NUM_THREADS=1 python tests/bench/select_speed.py`."""

import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vesl.transforms.filters import SelectRule, judge
from vesl.transforms.records import DETECTION

RULES = {
    "paper": SelectRule(),
    "paper, sizes": SelectRule(min_side_px=16, min_area=0.001, max_area=0.95),
    "phrase NMS": SelectRule(score=0.15, phrase_nms_iou=0.5),
    "NMS": SelectRule(score=0.15, nms_iou=0.5),
    "both": SelectRule(score=0.05, nms_iou=0.5, phrase_nms_iou=0.5),
}


def detections(images: int, per_image: int, seed: int = 0) -> pa.ListArray:
    """Two phrases per box on average, boxes in a few clusters, scores falling off fast from a floor of 0.05."""
    rng = np.random.default_rng(seed)
    n = images * per_image
    centres = rng.random((images, max(1, per_image // 6), 2))
    which = rng.integers(0, centres.shape[1], (images, per_image // 2))
    centre = np.take_along_axis(centres, which[:, :, None], axis=1) + rng.normal(0, 0.02, (*which.shape, 2))
    half = rng.random((*which.shape, 2)) * 0.2 + 0.01
    box = np.clip(np.concatenate([centre - half, centre + half], axis=2), 0, 1).astype(np.float32)
    box = np.take_along_axis(box, rng.integers(0, per_image // 2, (images, per_image))[:, :, None], axis=1)
    values = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(box.reshape(-1)), type=DETECTION.field("box").type),
            pa.array(rng.integers(0, 12, n), pa.int16()),
            pa.array(np.minimum(0.05 + rng.exponential(0.15, n), 1).astype(np.float32)),
        ],
        fields=list(DETECTION),
    )
    return pa.ListArray.from_arrays(pa.array(np.arange(0, n + 1, per_image), pa.int32()), values)


def main() -> None:
    for per_image in (12, 60, 200):
        images = 240_000 // per_image
        column = detections(images, per_image)
        sizes = pa.array(np.full(images, 640), pa.int32())
        for name, rule in RULES.items():
            best = float("inf")
            for _ in range(3):
                start = time.process_time()
                verdicts = judge(column, sizes, sizes, rule)
                best = min(best, time.process_time() - start)
            kept = pc.sum(pc.equal(verdicts.values, "kept")).as_py() / images
            each_us = best / images * 1e6
            print(
                f"{per_image:4} detections, {name:13}{1e6 / each_us:9,.0f} samples/s {each_us:6.1f} us, {kept:.1f} kept"
            )


if __name__ == "__main__":
    main()
