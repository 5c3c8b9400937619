"""Killed at any moment, run again: the same result, and nothing left behind."""

import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.webserver import Handler, Peer, body
from tests.world import ROOT, World, jpeg, without_time

MADE = ("pack", "select", "phrases", "ground", "caption")
LATE_S = 3.0  # from an answer to the disk: a second between two saves, a batch that is gathered, a busy machine


def start(world: World, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        world.command("run"), cwd=ROOT, env=world.env(env), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def kill(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 of the driver alone; its workers must end by themselves."""
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def kill_at_random(world: World, times: int, seed: int) -> int:
    """Run to the end once, then kill another run again and again; compare. Returns how often there was one to kill."""
    begun = time.monotonic()
    assert world.run("run").returncode == 0
    seconds = time.monotonic() - begun
    want, layout = without_time(world.contents(*MADE)), world.files()
    chance, killed = random.Random(seed), 0
    for _ in range(times):
        os.rename(world.store, f"{world.store}-{_}")
        for _attempt in range(3):  # the run that goes on is killed too
            process = start(world)
            time.sleep(chance.uniform(0.1, 0.7) * seconds)
            if process.poll() is None:
                kill(process)
                killed += 1
        assert world.run("run").returncode == 0
        assert without_time(world.contents(*MADE)) == want
        assert {n for n in world.files() if not n.startswith("runs/")} == {
            n for n in layout if not n.startswith("runs/")
        }
        assert not [str(p) for p in Path(world.store).rglob("*") if p.name.endswith((".wip", ".tmp"))]
    return killed


def test_killed_at_random_moments(world: World) -> None:
    world.list_urls("a", world.images(20))
    assert kill_at_random(world, times=1, seed=2026) > 0


def test_killed_in_the_middle_of_a_slow_part_goes_on_from_there(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(40))
    world.document["dataset"]["rows_per_part"] = 40
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.document["engine"] |= {"save_every_s": 1, "caption": {"batch": 2}}
    world.write()
    asked = tmp_path / "asked.txt"
    asked.touch()
    env = {"STANDIN_WAIT_S": "0.15", "STANDIN_LOG": str(asked)}
    process = start(world, env)
    while len(asked.read_text().splitlines()) < 25:
        assert process.poll() is None
        time.sleep(0.05)
    kill(process)
    before = asked.read_text().splitlines()
    assert world.run("run", env=env).returncode == 0
    repeated = set(before) & set(asked.read_text().splitlines()[len(before) :])
    assert len(repeated) <= 1 / 0.15 + 4  # a second's work between two saves, and two batches
    (table,) = Path(world.store).glob("caption/*/part-00000.parquet")
    assert pq.read_table(table).num_rows == 40
    assert not list(Path(world.store).rglob("*.wip"))


def test_what_was_fetched_before_a_kill_is_not_fetched_again(world: World) -> None:
    """With the options as they are: slow rows hold up no other, and what is done is saved as it comes."""
    count, answered, free = 160, dict[str, float](), threading.Event()

    def serve(i: int, data: bytes) -> Handler:
        def answer(peer: Peer) -> None:
            if i % 8 == 0:
                free.wait(30)  # one in each eight has not answered at the kill
            else:
                peer.wait(0.2)
            body(data)(peer)
            answered.setdefault(f"/{i}.jpg", time.monotonic())

        return answer

    rows = [(world.server.add(f"/{i}.jpg", serve(i, jpeg(i))), "a red ball") for i in range(count)]
    world.list_urls("a", rows)
    world.document["dataset"]["rows_per_part"] = count
    world.document["steps"]["download"]["fetch"] |= {"host_concurrency": 40, "host_rate_per_s": 20}
    world.write()
    process = start(world)
    while len(answered) < 70:
        assert process.poll() is None
        time.sleep(0.02)
    killed = time.monotonic()
    kill(process)
    before = dict(answered)
    free.set()
    world.document["steps"]["download"]["fetch"]["host_rate_per_s"] = None
    world.write()
    assert world.run("run").returncode == 0
    again = {path for path, hits in world.server.hits.items() if hits > 1}
    late = {path for path, moment in before.items() if killed - moment < LATE_S}
    assert len(before) >= 70
    assert len(late) < 65
    assert again & before.keys() <= late
    (table,) = Path(world.store).glob("pack/*/part-00000.parquet")
    assert pq.read_table(table)["outcome"].to_pylist() == ["kept"] * count


def test_interrupted_by_the_keyboard(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(10))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    asked = tmp_path / "asked.txt"
    asked.touch()
    process = subprocess.Popen(
        world.command("run"),
        cwd=ROOT,
        env=world.env({"STANDIN_WAIT_S": "2", "STANDIN_LOG": str(asked)}),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs the tests may ignore it
    )
    while not asked.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "run the same command again to go on" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_twenty_random_moments(world: World) -> None:
    world.list_urls("a", world.images(40))
    assert kill_at_random(world, times=8, seed=1) >= 20
