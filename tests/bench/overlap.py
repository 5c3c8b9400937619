"""Images/s of a step over the best possible, preparing being dearer than the model: `python -m tests.bench.overlap`.

The model sleeps for a fixed time a batch; preparing a batch takes 1.3 times the CPU that two threads have in that time,
so two cores can at best be always busy with preparing, over all borders of parts.
The best possible is the same work in two threads that do nothing else, on a machine that does nothing else, right
before and right after each run. As a machine's speed varies, also told is the CPU time of preparing, by that of these
two threads. With `--cost 0.7` the model is what holds up, and the best possible is that it never waits.

Wants two cores to itself. Starting the engine and opening the model are not in it, nor are the first part and the last,
and Ray has no cause to start a second worker for the downloads, which are there.
"""

import argparse
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median

import psutil

from tests.webserver import WebServer
from tests.world import ROOT, World
from vesl.models.contract import Written

PARTS, BATCHES, BATCH = 16, 8, 8
ALONE = 40  # batches
MODEL_S = 0.15
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

    def _note(self, what: str, seconds: float = 0.0) -> None:
        with open(os.environ["OVERLAP_LOG"], "a", encoding="utf-8") as log:
            log.write(json.dumps([time.monotonic(), what, seconds]) + "\n")

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Sequence[str]:
        begun = time.thread_time()
        work(self._mebibytes)
        self._note("prepared", time.thread_time() - begun)
        return alt_texts

    def __call__(self, prepared: Sequence[str]) -> list[list[Written]]:
        time.sleep(MODEL_S)
        self._note("called")
        return [[Written(f"{text} on a table")] for text in prepared]


def open_sleeper() -> Sleeper:
    return Sleeper()


def two_threads(mebibytes: int, batches: int) -> tuple[float, float]:
    """Seconds, and CPU seconds, that the preparing of a batch takes alone, two at a time."""
    start, begun = time.monotonic(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [mebibytes] * batches))
    return (time.monotonic() - start) / batches, (time.process_time() - begun) / batches


def spent(process: psutil.Process) -> Counter[str]:
    """CPU seconds of a process and all below it, so far, by what they are."""
    found: Counter[str] = Counter()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            scripts = [os.path.basename(word) for word in one.cmdline() if word.endswith(".py")]
            times = one.cpu_times()
            found["driver" if one == process else (scripts or [one.name().partition(".")[0]])[0]] += (
                times.user + times.system
            )
    return found


def watch(command: list[str], environment: dict[str, str], log: Path) -> Counter[str]:
    """CPU seconds a second by process, from the end of the first part until the last two are left."""
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as running:
        process, looks = psutil.Process(running.pid), list[tuple[float, Counter[str]]]()
        while running.poll() is None:
            time.sleep(2.0)
            called = log.read_text().count("called") if log.exists() else 0
            if called >= (BATCHES, (PARTS - 2) * BATCHES, PARTS * BATCHES + 1)[len(looks)]:  # a look takes time
                looks.append((time.monotonic(), spent(process)))
    assert running.returncode == 0
    (first, before), (last, after) = looks
    return Counter({name: (after[name] - before[name]) / (last - first) for name in after})


def measure(kind: str, mebibytes: int) -> tuple[float, str]:
    """A run: its images/s over the best possible, and what else is to be told of it."""
    with tempfile.TemporaryDirectory() as folder, WebServer() as server:
        world = World(Path(folder), server)
        world.document["dataset"]["rows_per_part"] = BATCHES * BATCH
        world.document["steps"]["caption"]["model"] = "tests.bench.overlap:open_sleeper@1"
        resources = {"workers": 1, "batch": BATCH, "threads": 2}
        world.document["engine"] = {"kind": kind, "workers": 2, "download": {"workers": 1}, "caption": resources}
        world.bare = kind != "ray"
        world.write()
        world.list_urls("a", world.images(PARTS * BATCHES * BATCH))
        log = Path(folder) / "log"
        environment = world.env({"OVERLAP_LOG": str(log), "OVERLAP_MEBIBYTES": str(mebibytes)})
        done = world.run("run", "--until", "download")
        assert done.returncode == 0, done.stderr
        alone = [two_threads(mebibytes, ALONE)]
        by_process = watch(world.command("run", "--until", "caption"), environment, log)
        alone.append(two_threads(mebibytes, ALONE))
        notes = [json.loads(line) for line in log.read_text().splitlines()]
    called = sorted(at for at, what, _ in notes if what == "called")
    begin, end, counted = called[BATCHES - 1], called[-BATCHES - 1], len(called) - 2 * BATCHES
    assert counted == (PARTS - 2) * BATCHES
    best_s = max(fmean(seconds for seconds, _ in alone), MODEL_S)
    share = sum(cpu for at, what, cpu in notes if what == "prepared" and begin < at <= end) / (end - begin)
    whole = fmean(cpu / seconds for seconds, cpu in alone)
    used = ", ".join(f"{name} {cpu * 1000:.0f}" for name, cpu in by_process.most_common() if cpu >= 0.0015)
    return counted * best_s / (end - begin), (
        f"{counted * BATCH / (end - begin):.1f} images/s in {end - begin:.1f} s; CPU time of preparing"
        f" {share / whole:.3f} of that alone ({share:.2f} of {whole:.2f} cores); ms of CPU a second: {used}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--cost", type=float, default=1.3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    mebibytes = round(arguments.cost * MODEL_S * 100 / two_threads(100, 8)[0])
    for kind in arguments.engines:
        ratios = []
        for _ in range(arguments.rounds):
            ratio, said = measure(kind, mebibytes)
            ratios.append(ratio)
            print(f"{kind}: {ratio:.3f} of the best possible; {said}", flush=True)
        print(f"{kind}: median {median(ratios):.3f} of the best possible", flush=True)


if __name__ == "__main__":
    main()
