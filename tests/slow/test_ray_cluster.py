"""Ray with nodes that are killed: a cluster of three nodes, all simulated on this machine."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.pipeline.test_engine_ray import STEPS
from tests.standins import captioner
from tests.world import ROOT, World, without_time
from vesl.models.contract import PlainCaptioner
from vesl.pipeline.engines import Engine, Event, Resources
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


@pytest.mark.parametrize(("step", "freezes"), [*((step, False) for step in STEPS), ("caption", True)])
def test_a_node_killed_in_the_middle_of_a_step(nodes: list[Any], world: World, step: str, freezes: bool) -> None:
    """The node that has the step's only actor dies after the first part; so the other parts' steps move.

    Or it freezes, as a machine does that is out of memory or off the network: Ray takes it for dead, after a while.
    """
    want, at_once = prepared(world), step not in ("download", "caption")  # no part of these takes long enough
    if step == "download":
        for path, image in list(world.server._paths.items()):
            world.server.add(path, lambda peer, image=image: (peer.wait(0.4), image(peer))[1])
    cluster, *workers = nodes
    events: list[Event] = []
    killed: list[int] = []
    frozen: list[psutil.Process] = []

    def made() -> int:
        return len(list(Path(world.store).glob(f"{step}/*/*.parquet")))

    def kill() -> None:
        while not (made() and (at_once or list(Path(world.store).glob(f"{step}/*/*.wip/lease-*")))):
            time.sleep(0.01)
        title = f"ray::MapWorker(MapBatches({step.capitalize()}))"
        children = {node: raylet(node).children() for node in workers}
        (victim,) = [node for node in workers if any(child.cmdline()[0].startswith(title) for child in children[node])]
        workers.remove(victim)
        if freezes:
            frozen.extend([raylet(victim), *children[victim]])
            for process in frozen:
                process.suspend()
        else:
            cluster.remove_node(victim, allow_graceful=False)  # SIGKILL
            for child in children[victim]:  # which would end soon, but not before they have done a little more
                child.kill()
        killed.append(made())

    plan = _ingest(world.load(), None)
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill)
        engine.run(plan.job(), plan.todo(), Engine(kind="ray", workers=2), events.append)
        killing.result()
    assert len([process for process in frozen if process.status() == "stopped"]) == len(frozen)
    for process in frozen:
        process.kill()
    assert 0 < killed[0] < len(plan.parts)
    assert [event for event in events if event.kind == "lost"] == []
    if not at_once:
        assert ("retry", step) in {(event.kind, event.step) for event in events}
    found = {
        name: data
        for name, data in without_time(world.contents(*STEPS)).items()
        if not name.endswith(("step.json", "index.json"))
    }
    assert found == {name: data for name, data in want.items() if not name.endswith(("step.json", "index.json"))}
    told = [(event.step, event.part) for event in events if event.kind == "done"]
    assert sorted(told) == sorted((name, part) for name in STEPS for part in plan.parts)


def test_a_cluster_is_joined_by_its_address_in_the_recipe(nodes: list[Any], world: World) -> None:
    want, (cluster, *workers) = prepared(world), nodes
    world.document["engine"] = {"kind": "ray", "address": cluster.address, "workers": 1}
    world.write()
    world.bare, seen = False, set[str]()
    process = subprocess.Popen(world.command("run"), cwd=ROOT, env=world.env({}), stderr=subprocess.DEVNULL)
    while process.poll() is None:
        with suppress(psutil.Error):
            seen |= {child.name() for node in workers for child in raylet(node).children()}
            assert "raylet" not in {child.name() for child in psutil.Process(process.pid).children(recursive=True)}
        time.sleep(0.2)
    assert process.returncode == 0
    assert any(name.startswith("ray::MapWo") for name in seen)
    assert without_time(world.contents(*STEPS)) == want


def sick_captioner() -> PlainCaptioner:
    """Notes in $SICK_NODES on which node it is asked for `sick`, and hangs there if it is the first one."""
    import ray

    usual, nodes = captioner(), Path(os.environ["SICK_NODES"])

    def caption(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        if any("sick" in text for text in alt_texts):
            node = ray.get_runtime_context().get_node_id()
            with nodes.open("a") as file:
                file.write(f"{node}\n")
            if nodes.read_text().startswith(node):
                time.sleep(600)
        return usual(images, alt_texts)

    return caption


class Occupant:
    """Has all of a node."""

    def ready(self) -> None:
        """It is there."""


def test_a_part_that_hangs_on_a_node_is_tried_on_another(nodes: list[Any], world: World, tmp_path: Path) -> None:
    """Though a worker that is ended comes up again where there is room for it: on the same node, here."""
    import ray

    world.list_urls("a", world.images(20, captions={7: "sick"}))
    world.document["steps"]["caption"]["model"] = "tests.slow.test_ray_cluster:sick_captioner@1"
    world.write()
    plan, events, asked, (_, first, second) = _ingest(world.load(), "caption"), list[Event](), tmp_path / "asked", nodes
    there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(second.node_id, soft=False)
    occupant = ray.remote(Occupant).options(num_cpus=2, scheduling_strategy=there).remote()
    ray.get(occupant.ready.remote())

    def working() -> bool:
        return any(child.name().startswith("ray::MapWo") for child in raylet(first).children())

    def make_room() -> None:
        """Once no worker is left on the first node, and none has come up there for longer than that takes."""
        while not over.is_set() and (not asked.exists() or working()):
            time.sleep(0.1)
        over.wait(10)
        ray.kill(occupant)

    over = threading.Event()
    options = Engine(kind="ray", workers=1, silence_limit_s=15, caption=Resources(runtime_env=env(SICK_NODES=asked)))
    with ThreadPoolExecutor(1) as pool:
        freeing = pool.submit(make_room)
        try:
            engine.run(plan.job(), plan.todo(), options, events.append)
        finally:
            over.set()
        freeing.result()
    assert asked.read_text().splitlines() == [first.node_id, second.node_id]
    assert [event.kind for event in events if event.kind == "lost"] == []
    done = sorted(event.part for event in events if event.kind == "done" and event.step == "caption")
    assert done == sorted(plan.parts)
    assert not list(Path(world.store).rglob("lease-*"))


def env(**variables: object) -> dict[str, Any]:
    return {"env_vars": {name: str(value) for name, value in variables.items()}}


@pytest.mark.parametrize("step", ["download", "caption", "pack"])
def test_the_driver_killed_and_started_again(world: World, step: str) -> None:
    want = prepared(world)
    command = [*world.command("run"), "--set", "engine.kind=ray"]
    world.bare = False
    process = subprocess.Popen(command, cwd=ROOT, env=world.env({"STANDIN_WAIT_S": "0.3"}), stderr=subprocess.DEVNULL)
    while not list(Path(world.store).glob(f"{step}/*/*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    working = [child.name() for child in alive if child.name().startswith(("raylet", "gcs", "ray::MapWo"))]
    for other in alive:  # Ray's own agents, which outlive their node for a while
        other.kill()
    assert not working
    assert without_time(world.contents(*STEPS)) != want
    done = world.run("run", "--set", "engine.kind=ray")
    assert done.returncode == 0, done.stderr
    assert without_time(world.contents(*STEPS)) == want
    assert not list(Path(world.store).rglob("*.wip"))
