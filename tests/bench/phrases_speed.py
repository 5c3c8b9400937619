"""How many captions a second one core turns into phrases: `OMP_NUM_THREADS=1 python tests/bench/phrases_speed.py`.

Each step opens as in a run, with its model where the kind needs one; 200 captions of 40 words, one for each image.
"""

import random
import time
from typing import get_args

import pyarrow as pa

from vesl.pipeline.steps.phrases import Phrases
from vesl.transforms.phrases import Kind, PhraseRule

THINGS = ["dog", "cat", "woman", "man", "bench", "bridge", "car", "tree", "river", "house", "bicycle", "umbrella"]
LOOKS = ["red", "old", "wooden", "tall", "small", "happy", "striped", "broken", "green", "white"]
LINKS = ["next to", "behind", "in front of", "holding", "that looks at", "and", "near", "with", ", and"]


def caption(seed: int) -> str:
    """Forty words of nested noun phrases; the same for a seed."""
    draw = random.Random(seed)
    words: list[str] = []
    while len(words) < 40:
        words += f"a {draw.choice(LOOKS)} {draw.choice(THINGS)} {draw.choice(LINKS)}".split()
    return " ".join(words[:40]) + "."


def main() -> None:
    """Print a line for each kind."""
    captions = [[{"text": caption(seed), "model": "m@1"}] for seed in range(200)]
    batch = pa.table({"key": [f"{i:024x}" for i in range(200)], "captions": captions})
    for kind in get_args(Kind):
        start = time.perf_counter()
        function = Phrases(rule=PhraseRule(kind=kind)).open()
        opened = time.perf_counter() - start
        function(batch.slice(0, 5))
        times = []
        for _ in range(3):
            start = time.process_time()
            done = function(batch)
            times.append(time.process_time() - start)
        each = sum(map(len, done["phrases"].to_pylist())) / 200
        rate = 200 / min(times)
        print(f"{kind:8}{rate:8,.0f} captions/s, opened in {opened:4.1f} s, {each:5.1f} phrases a caption")


if __name__ == "__main__":
    main()
