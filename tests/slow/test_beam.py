"""Engine `beam` when workers or the driver die, with other numbers of workers, and over many parts. Run by hand."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.pipeline.test_engine_beam import MADE, BeamEngine, carry, forget, of, tables
from tests.webserver import WebServer
from tests.world import ROOT, World, without_time
from vesl.pipeline.engines import beam
from vesl.pipeline.ingest import ingest
from vesl.pipeline.plan import make_plan
from vesl.pipeline.progress import Tally
from vesl.pipeline.run import _ingest
from vesl.pipeline.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
MULTI = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
DRIVER = """
import sys
from pathlib import Path
from tests.pipeline.test_engine_beam import BeamEngine
from vesl.pipeline.engines import beam
from vesl.pipeline.plan import make_plan
from vesl.pipeline.recipe import load
plan = make_plan(load(sys.argv[1]))
beam.run(plan.job(), plan.todo(), BeamEngine(options=tuple(sys.argv[2:])), lambda event: None)
"""


def sdk_workers() -> list[psutil.Process]:
    """Beam's worker processes under this one; a shell before the worker that it started."""
    there = psutil.Process().children(recursive=True)
    return [process for process in there if any("sdk_worker_main" in word for word in process.cmdline())]


def ready(world: World, captions: dict[int, str] | None = None, count: int = 15) -> dict[str, bytes]:
    """Let engine `local` make everything; return its bytes and forget them but for the downloads."""
    world.list_urls("a", world.images(count, captions=captions))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["limits"] = {"failed_fraction": 0.5}
    world.write()
    done = world.run("run")
    assert done.returncode == 0, done.stderr
    want = tables(world, "download", *MADE)
    forget(world, *MADE)
    return want


@pytest.mark.parametrize("options", [(), MULTI], ids=["in-process", "multi_processing"])
def test_rows_that_kill_their_worker(world: World, options: tuple[str, ...]) -> None:
    want = ready(world, {4: "kill", 9: "kill too"})
    events = carry(world, *options)
    assert tables(world, "download", *MADE) == want
    assert Tally.of(make_plan(world.load())).counts["caption"].failed == {"crashed": 2}
    assert not of(events, "lost")
    assert len(of(events, "done")) == len(set(of(events, "done"))) == 18
    assert not sdk_workers()


@pytest.mark.parametrize("options", [(), MULTI], ids=["in-process", "multi_processing"])
def test_a_row_that_freezes_its_worker(world: World, options: tuple[str, ...]) -> None:
    """Nothing in the worker can end it then, and Beam does not notice."""
    world.list_urls("a", world.images(15, captions={4: "freeze"}))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    _ingest(world.load(), None)
    events = carry(world, *options, silence_limit_s=20)
    told = [(event.kind, event.text) for event in events if event.kind in ("retry", "lost")]
    silent = "a worker gave no sign of life in 20 s (engine.silence_limit_s), so the pipeline was ended"
    alone = "no batch was finished in engine.silence_limit_s = 20, so its worker was ended"
    assert set(told[:-2]) == {("retry", silent)}  # twice for each part that a worker was at
    assert told[-2:] == [("retry", alone), ("lost", f"{alone}, 2 times")]
    (lost,) = [event.part for event in events if event.kind == "lost"]
    every = {(step, part) for step in ("download", *MADE) for part in range(3)}
    assert every - set(of(events, "done")) == {(step, lost) for step in MADE}
    assert not [process for process in psutil.Process().children(recursive=True) if process.status() == "stopped"]


def test_a_worker_that_is_frozen_before_it_begins(world: World) -> None:
    want, frozen = ready(world), list[psutil.Process]()
    forget(world, "download")

    def freeze_the_first() -> None:
        while not frozen:
            for worker in sdk_workers():
                if "python" in worker.name():
                    worker.suspend()
                    frozen.append(worker)
                    break
            time.sleep(0.01)

    threading.Thread(target=freeze_the_first, daemon=True).start()
    begun = time.monotonic()
    events = carry(world, *MULTI, silence_limit_s=5)
    assert 60 < time.monotonic() - begun < 180
    assert not frozen[0].is_running()
    assert not of(events, "lost")
    assert len(of(events, "done")) == len(set(of(events, "done"))) == 18
    assert without_time(tables(world, "download", *MADE)) == without_time(want)


@pytest.mark.parametrize("step", ["download", *MADE])
def test_a_worker_process_killed_in_each_step(world: World, step: str) -> None:
    want = ready(world)
    forget(world, "download")
    killed: list[int] = []

    def kill_in_the_middle() -> None:
        """Whoever has a lease of the step, and stopped, so that it has it for sure."""
        while not killed:
            time.sleep(0.002)
            for lease in Path(world.store).glob(f"{step}/*/part-*.wip/lease-*"):
                with suppress(OSError, ValueError):  # it ended, or is half written
                    worker = json.loads(lease.read_text())["pid"]
                    os.kill(worker, signal.SIGSTOP)
                    held = lease.exists()
                    os.kill(worker, signal.SIGKILL if held else signal.SIGCONT)
                    killed.extend([worker] * held)
                    break

    threading.Thread(target=kill_in_the_middle, daemon=True).start()
    events = carry(world, *MULTI)
    assert killed
    assert of(events, "retry")
    assert len(of(events, "done")) == len(set(of(events, "done"))) == 18
    assert without_time(tables(world, "download", *MADE)) == without_time(want)


@pytest.mark.parametrize("options", [(), MULTI], ids=["in-process", "multi_processing"])
@pytest.mark.parametrize("step", ["caption", "ground", "pack"])
def test_the_driver_killed_and_started_again(world: World, options: tuple[str, ...], step: str, tmp_path: Path) -> None:
    want, temporary = ready(world), tmp_path / "temporary"
    command = [sys.executable, "-c", DRIVER, str(world.recipe), *options]
    temporary.mkdir()
    env = world.env({"STANDIN_WAIT_S": "0.3", "TMPDIR": str(temporary)})
    driver = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(Path(world.store).glob(f"{step}/*/part-*")):
        assert driver.poll() is None
        time.sleep(0.002)
    children = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(temporary.iterdir())
    assert tables(world, "pack") != {name: data for name, data in want.items() if name.startswith("pack")}
    subprocess.run(command, cwd=ROOT, env=world.env(), check=True, timeout=280)
    assert tables(world, "download", *MADE) == want


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_bytes_do_not_depend_on_workers(world: World, workers: int) -> None:
    want = ready(world)
    events = carry(world, workers=workers)
    assert tables(world, "download", *MADE) == want
    assert len(of(events, "done")) == 18


def test_two_thousand_parts(tmp_path: Path) -> None:
    """What the engine itself costs, where every part is found done: two steps, so a third of the whole chain."""
    with WebServer() as server:
        world = World(tmp_path, server)
        world.document["dataset"]["rows_per_part"] = 1
        world.write()
        world.list_urls("a", [(f"ftp://a.example/{i}.jpg", "x") for i in range(2000)])
        recipe = world.load()
        ingest(Store(recipe.store), "world", recipe.dataset.source, "url", "alt", 1, {}, lambda rows: None)
        plan = make_plan(recipe, until="caption")
        seconds = []
        for _ in range(2):
            start = time.monotonic()
            memory = Peak()
            beam.run(plan.job(), plan.parts, BeamEngine(), lambda event: None)
            seconds.append(time.monotonic() - start)
            print(f"{seconds[-1]:.1f} s for 2,000 parts through 2 steps; driver {memory.stop() >> 20} MiB more")
        assert (seconds[1] - 6) / 2000 * 3 < 0.020


class Peak:
    """How much more memory this process came to use."""

    def __init__(self) -> None:
        self._most = self._first = psutil.Process().memory_info().rss
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self._most = max(self._most, psutil.Process().memory_info().rss)

    def stop(self) -> int:
        self._over.set()
        self._thread.join()
        return self._most - self._first
