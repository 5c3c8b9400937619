"""Images/s of a step over the best possible, preparing being dearer than the model: `python -m tests.bench.overlap`.

The model sleeps for a fixed time a batch; preparing a batch takes 1.3 times the CPU that two threads have in that time,
so two cores can at best be always busy with preparing, over all borders of parts.
The best possible is measured in the same run: the same work in two threads that do nothing else, on a machine that does
nothing else, and beside the same engine while it but waits for a model: what its own processes take is not there for
preparing. With `--cost 0.7` the model is what holds up, and the best possible is that it never waits.

Wants two cores to itself. Starting the engine, opening the model and the first part are not in it, and Ray has no cause
to start a second worker for the downloads, which are there.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

from tests.webserver import WebServer
from tests.world import ROOT, World
from vesl.models.contract import Written

PARTS, BATCHES, BATCH = 16, 8, 8
MODEL_S = float(os.environ.get("OVERLAP_MODEL_S", "0.15"))
SETTLE_S = 5.0
_PAGE = bytes(1 << 20)


def work(mebibytes: int) -> None:
    """CPU time outside of Python's lock, as decoding and resizing have it."""
    digest = hashlib.sha256()
    for _ in range(mebibytes):
        digest.update(_PAGE)


class Sleeper:
    """Notes when it does what in the file OVERLAP_LOG."""

    def __init__(self) -> None:
        self._mebibytes = int(os.environ["OVERLAP_MEBIBYTES"])

    def _note(self, what: str) -> None:
        with open(os.environ["OVERLAP_LOG"], "a", encoding="utf-8") as log:
            log.write(json.dumps([time.monotonic(), what]) + "\n")

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Sequence[str]:
        self._note("prepare")
        work(self._mebibytes)
        return alt_texts

    def __call__(self, prepared: Sequence[str]) -> list[list[Written]]:
        time.sleep(MODEL_S)
        self._note("called")
        return [[Written(f"{text} on a table")] for text in prepared]


def open_sleeper() -> Sleeper:
    return Sleeper()


def two_threads(mebibytes: int, batches: int) -> float:
    """Seconds that the preparing alone takes."""
    start = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [mebibytes] * batches))
    return time.monotonic() - start


def spent(process: psutil.Process) -> Counter[str]:
    """CPU seconds of a process and all below it, so far, by what they are."""
    found: Counter[str] = Counter()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            scripts = [os.path.basename(word) for word in one.cmdline() if word.endswith(".py")]
            times = one.cpu_times()
            found["driver" if one == process else (scripts or [one.name()])[0]] += times.user + times.system
    return found


def watch(command: list[str], environment: dict[str, str], log: Path) -> tuple[list[float], Counter[str]]:
    """When the model was called, and the CPU seconds by process from the end of the first part to that of the last."""

    def calls() -> list[float]:
        lines = log.read_text().splitlines() if log.exists() else []
        return sorted(at for at, what in map(json.loads, lines) if what == "called")

    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as running:
        process, before, after = psutil.Process(running.pid), Counter[str](), Counter[str]()
        while running.poll() is None:
            time.sleep(1.0)
            if (count := len(calls())) >= BATCHES:
                before = before or spent(process)
                after = after if count == PARTS * BATCHES and after else spent(process)
    assert running.returncode == 0
    return calls(), after - before


def beside(command: list[str], environment: dict[str, str], log: Path, mebibytes: int, batches: int) -> float:
    """Seconds that the preparing alone takes while the engine waits for a model that takes for ever."""
    environment = environment | {"OVERLAP_MEBIBYTES": "0", "OVERLAP_MODEL_S": "600"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **quiet) as waiting:
        try:
            while not log.exists():  # until the first batch is prepared
                time.sleep(1.0)
            time.sleep(SETTLE_S)
            return two_threads(mebibytes, batches)
        finally:
            waiting.send_signal(signal.SIGINT)
            waiting.wait()
            log.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--cost", type=float, default=1.3)
    arguments = parser.parse_args()
    batches = PARTS * BATCHES
    mebibytes = round(arguments.cost * MODEL_S * 100 / (two_threads(100, 8) / 8))
    for kind in arguments.engines:
        with tempfile.TemporaryDirectory() as folder, WebServer() as server:
            world = World(Path(folder), server)
            world.document["dataset"]["rows_per_part"] = BATCHES * BATCH
            world.document["steps"]["caption"]["model"] = "tests.bench.overlap:open_sleeper@1"
            resources = {"workers": 1, "batch": BATCH, "threads": 2}
            world.document["engine"] = {"kind": kind, "workers": 2, "download": {"workers": 1}, "caption": resources}
            world.bare = kind != "ray"
            world.write()
            world.list_urls("a", world.images(batches * BATCH))
            log = Path(folder) / "log"
            environment = {"OVERLAP_LOG": str(log), "OVERLAP_MEBIBYTES": str(mebibytes)}
            done = world.run("run", "--until", "download", env=environment)
            assert done.returncode == 0, done.stderr
            command, counted = world.command("run", "--until", "caption"), batches - BATCHES
            left_s = max(beside(command, world.env(environment), log, mebibytes, counted), counted * MODEL_S)
            called, spent = watch(command, world.env(environment), log)
        assert len(called) == batches
        took_s = called[-1] - called[BATCHES - 1]
        best_s = max(two_threads(mebibytes, counted), counted * MODEL_S)
        print(
            f"{kind}: {counted * BATCH / took_s:.1f} images/s in {took_s:.1f} s, {best_s / took_s:.3f} of the best"
            f" possible ({best_s:.1f} s), {left_s / took_s:.3f} of that beside the engine as it waits ({left_s:.1f} s)",
            flush=True,
        )
        used = ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.most_common() if seconds >= 0.05)
        print(f"{kind}: CPU seconds of {2 * took_s:.1f} there were: {used}")


if __name__ == "__main__":
    main()
