"""How many samples a second `vesl export` writes: `OMP_NUM_THREADS=1 python -m tests.bench.export_speed [samples]`.

Seconds of a core, all threads together, from the store's tables to the files. An export that is made again finds its
parts done: of COCO that leaves the two documents. The store is that of `report_speed`: 12 detections an image, of which
some 4 are kept.
"""

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.report_speed import write
from vesl.pipeline.export import FORMATS, export
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import load


def main() -> None:
    samples = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as scratch:
        recipe, _ = write(Path(scratch), samples, 12)
        plan = make_plan(load(str(recipe)))
        for kind in FORMATS:
            for way in ("first", "again"):
                start, clock = time.process_time(), time.monotonic()
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    totals = export(plan, kind, f"{scratch}/{kind}")
                seconds, wall = time.process_time() - start, time.monotonic() - clock
                each = f"{seconds / samples * 1e6:6.0f} us, {totals['regions'] / samples:.1f} regions each"
                print(f"{kind:13}{way:6}{samples / seconds:9,.0f} samples/s a core {each}, {wall:.1f} s", flush=True)


if __name__ == "__main__":
    main()
