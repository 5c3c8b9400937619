"""The Ray engine on a real local Ray of two CPUs, started once: same bytes, same events, and no fault that stops it."""

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.world import ROOT, World, without_time
from vesl.models.contract import ModelError
from vesl.pipeline import leases
from vesl.pipeline.engines import Engine, EngineError, Event, Resources, local, ray_chain, ray_steps, signs
from vesl.pipeline.engines import ray as engine
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.run import _ingest
from vesl.pipeline.store import wip
from vesl.pipeline.work import Job

STEPS = ("download", "caption", "phrases", "ground", "select", "pack")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    environment = {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}"}  # for the stand-in models
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,  # so it is told; Ray does not look
        log_to_driver=False,
        include_dashboard=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": environment},
    )
    yield ray
    ray.shutdown()


def carry(plan: Plan, **options: Any) -> list[Event]:
    events: list[Event] = []
    engine.run(plan.job(), plan.todo(), Engine(kind="ray", **{"workers": 1, **options}), events.append)
    return events


def planned(world: World, *overrides: str, until: str | None = None) -> Plan:
    """The plan, after ingest. A short chain starts fewer actors, each some two seconds of a core."""
    return _ingest(world.load(*overrides), until)


def one_hangs_and_one_is_leased(
    world: World, parts: int
) -> tuple[Plan, int, int, list[Event], Callable[[Event], None]]:
    """A plan, a part of which the captioner hangs, the next one, and events with a listener for them.

    Another run has the next one's lease, until that is waited for.
    """
    world.list_urls("a", world.images(5 * parts, captions={4: "hang"}))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    plan, events = planned(world, until="caption"), list[Event]()
    alts = [plan.store.read_table(name, ["alt_text"])["alt_text"].to_pylist() for name in plan.job().inputs]
    bad = next(part for part, texts in enumerate(alts) if "hang" in texts)
    other = (bad + 1) % parts
    lease = f"{wip(plan.steps[1].table(other))}/lease-00000"
    plan.store.create(lease, b"{}")

    def listen(event: Event) -> None:
        events.append(event)
        if event.kind == "wait":
            plan.store.remove(lease)

    return plan, bad, other, events, listen


def workers() -> list[str]:
    """The actors of Ray Data on this machine that are ours."""
    names = [child.name() for child in psutil.Process().children(recursive=True) if child.status() != "zombie"]
    return [name for name in names if name.startswith("ray::MapWo")]


def test_same_bytes_as_the_local_engine_in_an_operator_for_each_step(
    cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vesl.pipeline.engines.ray_executor import Executor

    executors: list[Any] = []
    start = Executor.start
    monkeypatch.setattr(Executor, "start", lambda self: executors.append(self) or start(self))
    rows = [*world.images(16, captions={3: "please raise", 7: "silence"}), (f"{world.server.url}/none.jpg", "gone")]
    world.list_urls("a", rows)
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    plan = planned(world)
    local.run(plan.job(), plan.todo(), Engine(workers=1), lambda event: None)
    want = without_time(world.contents(*STEPS))
    os.rename(world.store, f"{world.store}-local")
    events = carry(planned(world), ground=Resources(workers=2, min_workers=2, cpus=0.3, gpus=0.5))
    assert without_time(world.contents(*STEPS)) == want
    for kind in ("done", "spent"):
        told = sorted((e.step, e.part, e.fresh) for e in events if e.kind == kind)
        assert told == sorted((step, part, True) for step in STEPS for part in range(4))
    assert sum(e.rows for e in events if (e.kind, e.step) == ("spent", "download")) == 17
    assert all(e.seconds > 0 for e in events if e.kind == "spent")
    assert {e.step for e in events if e.kind == "open"} == {"caption", "phrases", "ground"}
    assert {e.kind for e in events} == {"done", "spent", "open"}
    assert not list(Path(world.store).rglob("*.wip"))

    assert executors[0]._no_progress_guard._timeout_s == -1
    operators = list(executors[0]._topology)
    names = [op.name.partition("[")[0] for op in operators]
    assert names == ["Input", "StreamingRepartition", *(f"MapBatches({step.capitalize()})" for step in STEPS)]
    assert operators[1]._ray_remote_args["num_cpus"] == 0
    for op in operators[2:]:
        pool, resources = op._actor_pool, op._ray_remote_args
        share = (0.3, 0.5, 2, 2) if op.name == "MapBatches(Ground)" else (0.16, 0, 1, 1)
        assert (resources["num_cpus"], resources.get("num_gpus", 0), pool.min_size(), pool.max_size()) == share
    deadline = time.monotonic() + 60
    while workers():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_row_that_kills_its_worker_fails_as_crashed(cluster: Any, world: World) -> None:
    world.list_urls("a", world.images(10, captions={4: "kill"}))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    events = carry(planned(world, until="caption"))
    counts = [event.footer["counts"] for event in events if (event.kind, event.step) == ("done", "caption")]
    assert sum(count["kept"] for count in counts) == 9
    assert [count["failed"] for count in counts if count["failed"]] == [{"crashed": 1}]
    texts = [event.text for event in events if event.kind == "retry"]
    assert "the worker died, 2 times in this run" in texts
    assert "the worker died (exit code -9: some library: assertion failed)" in texts
    assert not list(Path(world.store).rglob("*.wip"))


def test_a_part_that_cannot_be_read_is_lost_and_the_others_finish_in_waves_that_overlap(
    cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vesl.pipeline.engines.ray_executor.WAVE", 1)
    world.list_urls("a", world.images(15))
    plan = planned(world, "steps.caption.model=tests.standins:captioner@1", until="caption")
    Path(world.store, plan.job().inputs[1]).write_bytes(b"PAR1 nonsense")
    events = carry(plan, caption=Resources(runtime_env={"env_vars": {"STANDIN_WAIT_S": "1.2"}}))
    troubles = [(e.kind, e.step, e.part) for e in events if e.kind not in ("done", "open", "spent")]
    assert troubles == [("retry", "download", 1)] * 2 + [("lost", "download", 1)]
    assert all("no whole Parquet file" in event.text for event in events if event.kind == "lost")
    done = [(e.step, e.part) for e in events if e.kind == "done"]
    assert sorted(done) == [("caption", 0), ("caption", 2), ("download", 0), ("download", 2)]
    assert done.index(("download", 2)) < done.index(("caption", 0))
    assert [e.step for e in events if e.kind == "open"] == ["caption"]


def downloaded(world: World, images: int) -> tuple[Plan, Job, list[list[str]]]:
    """A plan up to the captions, whose downloads are done, its job, and the alt texts of its parts.

    The model is given one row at a time, and reads two ahead.
    """
    world.list_urls("a", world.images(images))
    plan = planned(world, "steps.caption.model=tests.standins:captioner@1", until="caption")
    job = replace(plan.job(), batch=plan.job().batch | {"caption": 1}, threads={"caption": 1})
    local.run(replace(job, steps=job.steps[:1]), plan.todo(), Engine(workers=2), lambda event: None)
    return plan, job, [plan.store.read_table(name, ["alt_text"])["alt_text"].to_pylist() for name in job.inputs]


def test_a_slow_part_holds_no_other_while_an_actor_idles(cluster: Any, world: World, tmp_path: Path) -> None:
    plan, job, texts = downloaded(world, 20)
    [slow, *others], path, done = plan.todo(), tmp_path / "others-done", list[int]()

    def listen(event: Event) -> None:
        if (event.kind, event.step) == ("done", "caption"):
            done.append(event.part)
            if len(done) == len(others):
                path.touch()

    held = {"env_vars": {"STANDIN_HOLD": f"{texts[slow][0]} until {path}", "STANDIN_WAIT_S": "0.2"}}
    caption = Resources(workers=2, min_workers=2, runtime_env=held)
    engine.run(job, plan.todo(), Engine(kind="ray", workers=1, caption=caption), listen)
    assert (sorted(done[:-1]), done[-1]) == (sorted(others), slow)


@pytest.mark.parametrize("together", [1, 2])  # in one block
def test_a_part_is_begun_while_the_model_is_at_the_last_row_of_another(
    cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(ray_chain, "_together", lambda *_: together)
    plan, job, texts = downloaded(world, 10)
    one, other = plan.todo()
    begun = Path(world.store, wip(job.steps[1].table(other)))
    caption = Resources(runtime_env={"env_vars": {"STANDIN_HOLD": f"{texts[one][-1]} until {begun}"}})
    events: list[Event] = []
    engine.run(job, plan.todo(), Engine(kind="ray", workers=1, caption=caption), events.append)
    done = [(e.part, e.footer["counts"]["failed"]) for e in events if (e.kind, e.step) == ("done", "caption")]
    assert done == [(one, {}), (other, {})]


def test_a_model_that_cannot_be_opened_ends_the_run(cluster: Any, world: World) -> None:
    world.list_urls("a", world.images(5))
    with pytest.raises(ModelError, match="No module named 'no'"):
        carry(planned(world, "steps.caption.model=no.such.module:model@1", until="caption"))


def test_what_the_listener_raises_ends_the_run_at_once(cluster: Any, world: World) -> None:
    rows = world.images(15)
    world.list_urls("a", rows)
    plan = planned(world, until="download")
    keys = {part: plan.store.read_table(plan.job().inputs[part], ["url"])["url"].to_pylist() for part in range(3)}
    for url in [*keys[1], *keys[2]]:
        path = url.removeprefix(world.server.url)
        world.server.add(path, lambda peer: time.sleep(60))
    raised = 0.0

    def listen(event: Event) -> None:
        nonlocal raised
        raised = time.monotonic()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.run(plan.job(), plan.todo(), Engine(kind="ray", workers=2), listen)
    assert time.monotonic() - raised < 6
    while workers():
        assert time.monotonic() - raised < 12
        time.sleep(0.1)


def test_another_version_on_a_worker_is_refused(cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.list_urls("a", world.images(5))
    monkeypatch.setattr(ray_chain, "version", lambda: "99.1")
    with pytest.raises(EngineError, match=r"has vesl 0\.\d.*, the driver 99\.1: install the same on both"):
        carry(planned(world, until="download"))
    assert not Path(world.store, "download").exists()


@pytest.mark.parametrize(
    ("knows", "says"),
    [
        (", stay: frozenset[str] = frozenset()", r"has vesl 0\.\d.*: install the same on both"),
        ("", "a worker has another vesl or none: install vesl 0"),
    ],
)
def test_other_code_on_the_workers_is_refused_also_where_it_does_not_know_ours(
    cluster: Any, world: World, tmp_path: Path, knows: str, says: str
) -> None:
    world.list_urls("a", world.images(5))
    for name in ("models", "pipeline", "transforms"):
        shutil.copytree(ROOT / name, tmp_path / "vesl" / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "vesl/pipeline/engines/ray_executor.py").write_text("class Paced:\n    pass\n")
    steps = tmp_path / "vesl/pipeline/engines/ray_steps.py"
    theirs = steps.read_text().replace(", stay: frozenset[str] = frozenset()", knows).replace(", stay  #", ", ()  #")
    steps.write_text(theirs)
    other = Resources(runtime_env={"env_vars": {"PYTHONPATH": f"{tmp_path}:{ROOT}"}})
    plan = planned(world, "steps.caption.model=tests.standins:captioner@1", until="caption")
    with pytest.raises(EngineError, match=says):
        carry(plan, download=other, caption=other)


def test_what_the_machine_does_not_have_is_refused(cluster: Any, world: World) -> None:
    world.list_urls("a", world.images(5))
    with pytest.raises(EngineError, match=r"needs 2 GPUs, there are 1"):
        carry(planned(world), ground=Resources(gpus=2))
    typed = {step: Resources(gpus=0.5, accelerator=kind) for step, kind in (("caption", "L4"), ("ground", "A100"))}
    with pytest.raises(EngineError, match=r"^ray: no node has accelerators of the type A100, L4$"):
        carry(planned(world), **typed)


def test_what_a_cluster_does_not_have_may_yet_come(
    cluster: Any, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.list_urls("a", world.images(5))
    joined = Engine(kind="ray", address="10.0.0.1:6379", ground=Resources(gpus=2, accelerator="L4"))
    plan = planned(world)
    capsys.readouterr()
    data = ray_chain.dataset(plan.job(), plan.todo(), joined)
    says = "vesl: ray: an actor for each step needs 2 GPUs, there are 1; waiting until the cluster has them\n"
    assert capsys.readouterr().err == says
    (ground,) = [op for op in data._logical_plan.dag.post_order_iter() if op.name == "MapBatches(Ground)"]
    assert (ground.ray_remote_args["num_gpus"], ground.ray_remote_args["accelerator_type"]) == (2, "L4")


def test_what_ray_refuses_is_said_in_a_line(cluster: Any, world: World) -> None:
    world.list_urls("a", world.images(5))
    with pytest.raises(EngineError, match=r"^ray: TypeError: runtime_env\['env_vars'\] must be") as caught:
        carry(planned(world), ground=Resources(runtime_env={"env_vars": {"A": 1}}))
    assert "\n" not in str(caught.value)


def test_workers_that_do_not_start_are_told_of(cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class EnoughError(Exception):
        pass

    def write(text: str) -> int:
        said.append(text)
        raise EnoughError

    world.list_urls("a", world.images(5))
    monkeypatch.setattr(engine, "_SLOW_S", 3.0)
    plan, said = planned(world, until="caption"), list[str]()
    monkeypatch.setattr(sys.stderr, "write", write)
    with pytest.raises(EnoughError):
        carry(plan, caption=Resources(runtime_env={"py_executable": "/none/python"}))
    assert "caption: still without a worker: the cluster has nothing free" in said[0]


def test_a_cluster_of_a_run_alone_has_no_process_that_nobody_needs(world: World) -> None:
    pytest.importorskip("ray")
    rows = world.images(5)
    world.list_urls("a", rows)
    world.document["engine"] = {"kind": "ray", "workers": 1}
    world.bare = False
    world.write()
    path, found = rows[0][0].removeprefix(world.server.url), list[str]()
    image = world.server._paths[path]

    def look(peer: Any) -> None:
        (driver,) = [child for child in psutil.Process().children() if "vesl.pipeline.cli" in child.cmdline()]
        found.extend(" ".join(child.cmdline()) for child in driver.children(recursive=True))
        image(peer)

    world.server.add(path, look)
    done = world.run("run", "--until", "download")
    assert done.returncode == 0, done.stderr
    assert any(name.startswith("ray::MapWorker(MapBatches(Download))") for name in found)
    dashboard = util.find_spec("aiohttp_cors") is not None  # of `ray[default]`
    for told in ("dashboard/dashboard.py", "ray::_StatsActor"):
        assert any(told in name for name in found) == dashboard
    for needless in ("ray::_AutoscalingCoordinator", "ray::ActorLocationTracker", "monitor.py"):
        assert not [name for name in found if needless in name]


def test_resources_follow_the_recipe_and_fit_the_cluster() -> None:
    class Ground:
        name = "ground"

    step: Any = Ground()
    has = {"CPU": 64.0, "GPU": 8.0}
    usual = ray_chain.resources(step, 6, Engine(), has)
    assert usual == {"num_cpus": 0.16, "num_gpus": 0, "accelerator_type": None, "min_size": 1, "max_size": 64}
    assert usual["num_cpus"] * usual["max_size"] * 6 <= 64
    half = ray_chain.resources(step, 6, Engine(ground=Resources(gpus=0.5)), has)
    assert (half["num_gpus"], half["max_size"]) == (0.5, 16)
    typed = ray_chain.resources(step, 6, Engine(ground=Resources(accelerator="L4")), has)
    assert (typed["num_gpus"], typed["max_size"], typed["accelerator_type"]) == (1, 8, "L4")
    bounds = ray_chain.resources(step, 6, Engine(workers=3, ground=Resources(workers=8, min_workers=2, cpus=4)), has)
    assert bounds == {"num_cpus": 4, "num_gpus": 0, "accelerator_type": None, "min_size": 2, "max_size": 8}


def test_what_a_round_leaves_is_for_the_next_also_where_it_ends_early(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[tuple[list[int], set[str]]] = []

    def carry(
        job: Job,
        parts: list[int],
        options: Engine,
        waiting: object,
        told: set[tuple[str, int]],
        hung: dict[int, str],
        shunned: frozenset[str],
        free: list[int],
        listen: object,
    ) -> None:
        rounds.append((list(parts), set(shunned)))
        if len(rounds) == 1:
            told.update({("caption", 0), (engine._LOST, 1), ("download", 3)})
            hung[2] = "a node"
            free.append(9)  # of another run, that ended; it was left for this round in an earlier one
        if len(rounds) == 1:
            raise engine._DiedError("ray: gone")
        told.update(("caption", part) for part in parts)
        free.extend([7] * (len(rounds) == 2))

    monkeypatch.setattr(engine, "_cluster", lambda options: nullcontext())
    monkeypatch.setattr(engine, "_carry", carry)
    job = make_plan(world.load(), "caption").job()
    engine.run(job, [0, 1, 2, 3], Engine(kind="ray"), lambda event: None)
    assert rounds == [([0, 1, 2, 3], set()), ([3, 9], set()), ([7], set()), ([2], {"a node"})]


def test_a_node_that_the_chain_needs_is_not_left(world: World) -> None:
    job = make_plan(world.load(), "caption").job()
    cpu, gpu = {"CPU": 2.0, "memory": 1e9}, {"CPU": 2.0, "GPU": 1.0, "accelerator_type:L4": 1.0}
    plain, two, four = Engine(), Engine(caption=Resources(gpus=2)), Engine(caption=Resources(accelerator="L4"))
    nodes: dict[str, dict[str, float]]
    for options, nodes, needed in (
        (plain, {"a": cpu}, "a"),
        (plain, {"head": {"memory": 1e9}, "a": cpu}, "a"),
        (plain, {"a": cpu, "b": cpu}, ""),
        (Engine(caption=Resources(cpus=2)), {"a": cpu, "b": cpu}, "ab"),  # too few together
        (Engine(caption=Resources(cpus=2)), {"a": cpu, "b": cpu, "c": cpu}, ""),
        (Engine(caption=Resources(cpus=4)), {"a": cpu, "b": cpu, "c": cpu, "d": {"CPU": 4.0}}, "d"),
        (two, {"a": cpu | {"GPU": 4.0}, "b": gpu, "c": gpu}, "a"),  # the others have two, but one each
        (Engine(download=Resources(cpus=2), caption=Resources(cpus=2)), {"a": cpu, "b": cpu, "c": {"CPU": 1.0}}, "ab"),
        (two, {"head": cpu, "a": cpu | {"GPU": 3.0}, "b": cpu | {"GPU": 2.0}}, ""),
        (four, {"a": cpu, "b": gpu, "c": gpu}, ""),
        (four, {"a": cpu, "b": gpu, "c": cpu | {"GPU": 1.0}}, "b"),
        (four, {"a": cpu, "b": cpu}, "ab"),  # such a node may yet come
    ):
        assert ray_chain._needed(nodes, job, options) == frozenset(needed), (options, nodes)


def test_outcomes_are_counted_for_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, dict[str, str]]] = []

    class Metric:
        def inc(self, value: int, tags: dict[str, str]) -> None:
            counted.append((value, tags))

    monkeypatch.setattr(ray_steps, "_metric", Metric)
    ray_steps.count({"step": "select", "counts": {"kept": 7, "rejected": {"no_region": 2}, "failed": {"error": 1}}})
    assert counted == [
        (7, {"step": "select", "outcome": "kept", "reason": ""}),
        (2, {"step": "select", "outcome": "rejected", "reason": "no_region"}),
        (1, {"step": "select", "outcome": "failed", "reason": "error"}),
    ]


def test_without_the_package_the_error_says_what_to_install(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.list_urls("a", world.images(5))
    plan = planned(world)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"the engine ray needs `pip install 'vesl\[ray\]'`"):
        carry(plan)


def test_a_part_that_hangs_is_given_up_and_one_of_another_run_is_waited_for(
    cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.1)
    plan, bad, other, events, listen = one_hangs_and_one_is_leased(world, 2)
    options = Engine(kind="ray", workers=1, silence_limit_s=7)
    engine.run(replace(plan.job(), run="runs/mine"), plan.todo(), options, listen)
    told = [(e.kind, e.step, e.part) for e in events if e.kind not in ("open", "spent")]
    assert told.count(("lost", "caption", bad)) == 1
    assert told[told.index(("lost", "caption", bad)) - 1] == ("retry", "caption", bad)
    (wait,) = [e.text for e in events if e.kind == "wait"]
    assert wait.endswith(f"at work on {plan.steps[1].table(other)}")
    assert told.index(("wait", "", -1)) < told.index(("done", "caption", other))
    assert {e.text for e in events if e.kind == "lost"} == {
        "no batch was finished in engine.silence_limit_s = 7, so its worker was ended, 2 times"
    }
    leases.give_back(plan.store, [step.folder for step in plan.steps], "runs/mine")  # as `vesl run` does at its end
    assert not list(Path(world.store).rglob("lease-*"))


@pytest.mark.slow
def test_a_part_that_freezes_its_worker_is_given_up_and_the_rest_is_done(
    cluster: Any, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in the worker can end it then, and Ray does not notice."""
    world.list_urls("a", world.images(10, captions={4: "freeze"}))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    events = carry(planned(world, until="caption"), silence_limit_s=8)
    (bad,) = [event.part for event in events if event.kind == "lost"]
    told = [(event.kind, event.text) for event in events if event.part == bad and event.kind in ("retry", "lost")]
    why = "no batch was finished in engine.silence_limit_s = 8, so its worker was ended"
    assert told == [("retry", "the worker died, 2 times in this run"), ("retry", why), ("lost", f"{why}, 2 times")]
    assert [event.kind for event in events if event.step == "caption" and event.kind == "done"] == ["done"]
    line = "vesl: ray: a worker of caption gave no sign of life in 8 s (engine.silence_limit_s), so it was ended\n"
    assert capsys.readouterr().err.endswith(line * 2)
    assert not [process for process in psutil.Process().children(recursive=True) if process.status() == "stopped"]


@pytest.mark.slow
def test_a_worker_that_is_frozen_while_it_starts_is_replaced(
    cluster: Any, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    def stop_the_first() -> None:
        while not stopped:
            time.sleep(0.001)
            for actor in ray._private.state.actors().values():
                starts = actor["State"] == "PENDING_CREATION" and actor["Pid"]
                if starts and actor["ActorClassName"] == "MapWorker(MapBatches(Caption))":
                    os.kill(actor["Pid"], signal.SIGSTOP)
                    stopped.append(actor["Pid"])
                    break

    monkeypatch.setattr(signs, "_STARTS_S", 15.0)
    stopped = list[int]()
    world.list_urls("a", world.images(10))
    world.write()
    threading.Thread(target=stop_the_first, daemon=True).start()
    events = carry(planned(world, until="caption"), silence_limit_s=8)
    assert stopped
    assert {event.kind for event in events} <= {"done", "spent", "open", "saved"}
    assert sorted(event.part for event in events if event.step == "caption" and event.kind == "done") == [0, 1]
    why = "had not started after 15 s (engine.silence_limit_s, a minute at least), so it was ended"
    assert capsys.readouterr().err.endswith(f"vesl: ray: a worker of caption {why}\n")
    end = time.monotonic() + 20  # Ray gives it a few seconds
    while psutil.pid_exists(stopped[0]):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_parts_travel_together_where_they_are_many_and_small() -> None:
    small = ((1, 2, 0), (40, 2, 5), (200, 2, 10), (2000, 2, 0), (10**6, 64, 10), (10**6, 4000, 10))
    assert [ray_chain._together(*of) for of in small] == [1, 1, 6, 62, 64, 15]
    large = ((2000, 2, 100), (10**6, 4, 400.5), (10**6, 4, 10_000), (10**6, 4, math.inf))
    assert [ray_chain._together(*of) for of in large] == [10, 2, 1, 1]
