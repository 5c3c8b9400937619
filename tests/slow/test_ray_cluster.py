"""Ray with nodes that are killed: a cluster of three nodes, all simulated on this machine."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.pipeline.test_engine_ray import STEPS
from tests.world import ROOT, World, without_time
from vesl.pipeline.engines import Engine, Event
from vesl.pipeline.engines import ray as engine
from vesl.pipeline.run import _ingest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Two nodes that work, beside a head that does not; this process is in their cluster."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    for name, value in {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}", "STANDIN_WAIT_S": "0.1"}.items():
        monkeypatch.setenv(name, value)
    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    workers = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield [cluster, *workers]
    ray.shutdown()
    cluster.shutdown()


def prepared(world: World) -> dict[str, Any]:
    """A world and what the local engine makes of it."""
    world.list_urls("a", world.images(30))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert world.run("run").returncode == 0
    want = without_time(world.contents(*STEPS))
    os.rename(world.store, f"{world.store}-local")
    return want


def raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@pytest.mark.parametrize("step", STEPS)
def test_a_node_killed_in_the_middle_of_a_step(nodes: list[Any], world: World, step: str) -> None:
    want = prepared(world)
    cluster, *workers = nodes
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if len(workers) == 2 and (event.kind, event.step) == ("done", step):
            names = {n: [child.name() for child in raylet(n).children()] for n in workers}
            (victim, *_) = [
                n for n in workers if f"ray::MapWorker(Map({step.capitalize()}))"[:15] in names[n]
            ] or workers
            workers.remove(victim)
            cluster.remove_node(victim, allow_graceful=False)  # SIGKILL to all its processes

    plan = _ingest(world.load(), None)
    engine.run(plan.job(), plan.todo(), Engine(kind="ray", workers=2), listen)
    assert len(workers) == 1
    assert [event for event in events if event.kind == "lost"] == []
    made = {
        name: data
        for name, data in without_time(world.contents(*STEPS)).items()
        if not name.endswith(("step.json", "index.json"))
    }
    assert made == {name: data for name, data in want.items() if not name.endswith(("step.json", "index.json"))}
    told = [(event.step, event.part) for event in events if event.kind == "done"]
    assert sorted(told) == sorted((name, part) for name in STEPS for part in plan.parts)


def test_the_driver_killed_and_started_again(world: World) -> None:
    want = prepared(world)
    command = [*world.command("run"), "--set", "engine.kind=ray"]
    world.bare = False
    process = subprocess.Popen(command, cwd=ROOT, env=world.env({"STANDIN_WAIT_S": "0.3"}), stderr=subprocess.DEVNULL)
    while not list(Path(world.store).glob("caption/*/*.parquet")):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    working = [child.name() for child in alive if child.name().startswith(("raylet", "gcs", "ray::MapWo"))]
    for other in alive:  # Ray's own agents, which outlive their node for a while
        other.kill()
    assert not working
    done = world.run("run", "--set", "engine.kind=ray")
    assert done.returncode == 0, done.stderr
    assert without_time(world.contents(*STEPS)) == want
    assert not list(Path(world.store).rglob("*.wip"))
