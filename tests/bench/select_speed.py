"""How many samples a second one core judges: `OMP_NUM_THREADS=1 python tests/bench/select_speed.py [samples]`.

The whole step is timed, from the columns as they are read to the table as it is stored; making the samples is not.
"""

import sys
import time
from collections import Counter

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vesl.pipeline.steps.select import Select
from vesl.transforms.filters import ImageRule, SelectRule
from vesl.transforms.records import DETECTION, PHRASE

EVERYTHING = Select(
    SelectRule(
        score=0.1,
        score_by_words=(0.12, 0.1, 0.08),
        score_by_head={"man": 0.15, "table": 0.2, "sky": 0.3},
        phrases_per_box=2,
        nms_iou=0.9,
        phrase_nms_iou=0.5,
        min_side_px=16,
        min_area=0.001,
        max_area=0.9,
        max_aspect=6,
        whole_image=0.95,
        border_px=0,
        regions_per_phrase=3,
        max_phrases=10,
        max_regions=8,
        stop_phrases=("a photo", "the background"),
        stop_heads=("image", "picture", "view", "scene"),
        min_grounded=0.4,
    ),
    empty="reject",
    image=ImageRule(min_side_px=64, max_aspect=4, min_best_score=0.3, min_grounded=0.3),
)
STAGES = {
    "paper": Select(),
    "sizes": Select(SelectRule(min_side_px=16, min_area=0.001, max_area=0.95)),
    "phrase NMS": Select(SelectRule(score=0.15, phrase_nms_iou=0.5)),
    "NMS": Select(SelectRule(score=0.15, nms_iou=0.5)),
    "both": Select(SelectRule(score=0.05, nms_iou=0.5, phrase_nms_iou=0.5)),
    "everything": EVERYTHING,
}
_ADJECTIVES = ("", "red ", "big ", "old wooden ", "small dark ")
_NOUNS = ("man", "woman", "dog", "table", "sky", "tree", "car", "glass of water", "view", "house in the snow", "hat")
_PART, _PHRASES = 5000, 12


def part(images: int, per_image: int, seed: int) -> pa.Table:
    """Two phrases per box on average, boxes in a few clusters, scores falling off fast from a floor of 0.05."""
    rng = np.random.default_rng(seed)
    n = images * per_image
    boxes = max(1, per_image // 2)
    centres = rng.random((images, max(1, per_image // 6), 2))
    which = rng.integers(0, centres.shape[1], (images, boxes))
    centre = np.take_along_axis(centres, which[:, :, None], axis=1) + rng.normal(0, 0.02, (*which.shape, 2))
    half = rng.random((*which.shape, 2)) * 0.2 + 0.01
    box = np.clip(np.concatenate([centre - half, centre + half], axis=2), 0, 1).astype(np.float32)
    box = np.take_along_axis(box, rng.integers(0, boxes, (images, per_image))[:, :, None], axis=1)
    detections = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(box.reshape(-1)), type=DETECTION.field("box").type),
            pa.array(rng.integers(0, _PHRASES, n), pa.int16()),
            pa.array(np.minimum(0.05 + rng.exponential(0.15, n), 1).astype(np.float32)),
        ],
        fields=list(DETECTION),
    )
    texts = np.array([f"a {adjective}{noun}" for adjective in _ADJECTIVES for noun in _NOUNS])
    said = images * _PHRASES
    phrases = pa.StructArray.from_arrays(
        [
            pa.array(texts[rng.integers(0, len(texts), said)], pa.string()),
            pa.array(np.tile(np.arange(_PHRASES) // 6, images), pa.int16()),
            pa.array(np.zeros(said, np.int32)),
            pa.array(np.ones(said, np.int32)),
        ],
        fields=list(PHRASE),
    )
    columns = {
        "key": pa.array([f"{row:024x}" for row in range(images)]),
        "width": pa.array(rng.integers(200, 1025, images), pa.int32()),
        "height": pa.array(rng.integers(200, 1025, images), pa.int32()),
        "detections": pa.ListArray.from_arrays(_every(per_image, images), detections),
        "phrases": pa.ListArray.from_arrays(_every(_PHRASES, images), phrases),
    }
    return pa.table(columns)


def _every(step: int, count: int) -> pa.Array:
    ends: npt.NDArray[np.int32] = np.arange(count + 1, dtype=np.int32) * step
    return pa.array(ends)


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    for per_image in (12, 60, 200):
        seconds = dict.fromkeys(STAGES, 0.0)
        kept: Counter[str] = Counter()
        for seed in range(samples // _PART):
            table = part(_PART, per_image, seed)
            for name, stage in STAGES.items():
                select, start = stage.open(), time.process_time()
                verdicts = select(table)["verdicts"]
                seconds[name] += time.process_time() - start
                kept[name] += pc.sum(pc.equal(pc.list_flatten(verdicts), "kept")).as_py()
        for name in STAGES:
            each_us = seconds[name] / samples * 1e6
            print(
                f"{per_image:4} detections, {name:11}{1e6 / each_us:9,.0f} samples/s {each_us:7.1f} us, "
                f"{kept[name] / samples:5.1f} kept"
            )


if __name__ == "__main__":
    main()
