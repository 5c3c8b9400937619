"""Engine `beam` on Beam's local runner, in one process and in several, and over a job service with LOOPBACK."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests.pipeline.test_engine_ray import one_hangs_and_one_is_leased
from tests.webserver import WebServer
from tests.world import World
from vesl.models.contract import ModelError
from vesl.pipeline import leases
from vesl.pipeline.engines import Engine, EngineError, Event, Resources, beam, worker
from vesl.pipeline.engines.beam_steps import _hints, through
from vesl.pipeline.ingest import ingest
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.run import _ingest
from vesl.pipeline.store import Store, wip

MADE = ("caption", "phrases", "ground", "select", "pack")


@dataclass(frozen=True)
class BeamEngine(Engine):
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpus(Resources):
    gpus: float = 1
    accelerator: str = "nvidia-l4"
    memory: str = "24GiB"


def carry(world: World, *options: str, until: str | None = None, **limits: Any) -> list[Event]:
    """Run the engine on what is missing; return the events."""
    plan, events = make_plan(world.load(), until), []
    engine = BeamEngine(options=options, **limits)
    beam.run(plan.job(), plan.todo(), engine, events.append)
    return events


def of(events: Sequence[Event], kind: str) -> list[tuple[str, int]]:
    return [(event.step, event.part) for event in events if event.kind == kind]


def tables(world: World, *steps: str) -> dict[str, bytes]:
    """What the engine makes: tables, images and shards, but no documents."""
    return {name: data for name, data in world.contents(*steps).items() if not name.endswith(".json")}


def forget(world: World, *steps: str) -> None:
    for step in steps:
        shutil.rmtree(Path(world.store) / step, ignore_errors=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What engine `local` made of 14 images in 3 parts."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("made"), server)
        world.list_urls("a", world.images(14, captions={3: "please raise", 8: "silence"}))
        world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
        world.document["limits"] = {"failed_fraction": 0.5}
        world.write()
        done = world.run("run")
        assert done.returncode == 0, done.stderr
        yield world


@pytest.fixture(scope="module")
def job_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of Beam's job service in a process of its own."""
    port = tmp_path_factory.mktemp("service") / "port"
    module = "apache_beam.runners.portability.local_job_service_main"
    command = [sys.executable, "-m", module, "--port", "0", "--port_file", str(port)]
    service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (port.exists() and port.read_text().strip()):
        assert service.poll() is None
        time.sleep(0.1)
    yield f"localhost:{port.read_text().strip()}"
    service.kill()
    service.wait()


def portable(address: str) -> tuple[str, ...]:
    return ("--runner=PortableRunner", f"--job_endpoint={address}", "--environment_type=LOOPBACK")


@pytest.mark.parametrize("mode", ["in-process", pytest.param("multi_processing", marks=pytest.mark.slow), "portable"])
def test_same_bytes_as_the_local_engine(
    made: World, mode: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = portable(request.getfixturevalue("job_service")) if mode == "portable" else ()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    want = tables(made, "download", *MADE)
    forget(made, *MADE)
    events = carry(made, *options, workers=2 if mode == "multi_processing" else None)
    assert tables(made, "download", *MADE) == want
    assert sorted(of(events, "done")) == sorted((step, part) for step in ("download", *MADE) for part in range(3))
    assert {event.step for event in events if event.kind == "done" and not event.fresh} == {"download"}
    assert not list(tmp_path.iterdir())
    assert {step for step, _ in of(events, "open")} == {"caption", "phrases", "ground"}
    assert not of(events, "retry") + of(events, "lost")
    assert not list((Path(made.store) / "runs").glob(".beam-*"))


def test_how_many_threads_and_processes() -> None:
    runner = "--runner=FnApiRunner"
    threads = ["--direct_running_mode=multi_threading", "--direct_num_workers=3", runner]
    assert beam._flags(BeamEngine()) == threads
    assert beam._flags(BeamEngine(options=("--job_name=x",))) == [*threads, "--job_name=x"]
    assert beam._flags(BeamEngine(workers=1)) == [runner]
    several = ["--direct_running_mode=multi_processing", "--direct_num_workers=4", runner]
    assert beam._flags(BeamEngine(workers=4)) == several
    own = "--direct_running_mode=in_memory"
    assert beam._flags(BeamEngine(workers=4, options=(own,))) == [runner, own]
    for name, elsewhere in (("DirectRunner", False), ("FnApiRunner", False), ("DataflowRunner", True)):
        named = BeamEngine(workers=4, options=(f"--runner={name}",))
        assert beam._flags(named) == [f"--runner={name}"]
        assert beam._elsewhere(named) == elsewhere
    assert not beam._elsewhere(BeamEngine())


def test_in_one_process_a_step_of_one_part_goes_on_while_another_part_waits_for_the_web(world: World) -> None:
    world.list_urls("a", world.images(15))
    plan, asked, events = _ingest(world.load(), "caption"), list[int](), list[Event]()

    def wait_for_a_caption(part: int, peer: Any, image: Any) -> None:
        """In the part that is asked for first; longer than anybody waits for an image."""
        asked.append(part)
        deadline = time.monotonic() + 20
        while asked[0] == part and not list(Path(world.store).glob("caption/*/*.parquet")):
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)
        image(peer)

    for part, name in enumerate(plan.job().inputs):
        for url in plan.store.read_table(name, ["url"])["url"].to_pylist():
            path = url.removeprefix(world.server.url)
            image = world.server._paths[path]
            world.server.add(path, lambda peer, part=part, image=image: wait_for_a_caption(part, peer, image))
    beam.run(plan.job(), plan.todo(), BeamEngine(), events.append)
    counts = [event.footer["counts"] for event in events if (event.kind, event.step) == ("done", "download")]
    assert counts == [{"kept": 5, "rejected": {}, "failed": {}}] * 3


def test_the_steps_in_a_pipeline_of_ones_own(made: World) -> None:
    import apache_beam
    from apache_beam.testing.util import assert_that, equal_to

    want = tables(made, "caption")
    forget(made, "caption")
    job = make_plan(made.load(), until="caption").job()
    pipeline = apache_beam.Pipeline()
    downloaded = pipeline | apache_beam.Create(range(3)) | through(job, 0)
    captioned = downloaded.parts | through(job, 1, Gpus())
    assert_that(captioned.parts, equal_to([0, 1, 2]))
    assert_that(captioned.lost, equal_to([]), label="none is lost")
    assert downloaded.parts.producer.full_label.startswith("vesl.download/")
    assert captioned.parts.producer.full_label.startswith("vesl.caption/")
    hints = captioned.parts.producer.resource_hints
    assert set(hints.values()) == {b"type:nvidia-l4;count:1;install-nvidia-driver", b"25769803776"}
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query(apache_beam.metrics.MetricsFilter().with_namespace("vesl"))["counters"]
    assert {counter.key.metric.name: counter.committed for counter in counters} == {
        "download.parts": 3, "download.parts_found_done": 3, "download.kept": 14,
        "caption.parts": 3, "caption.parts_found_done": 0, "caption.kept": 12,
        "caption.failed.error": 1, "caption.rejected.empty_caption": 1,
    }  # fmt: skip
    assert tables(made, "caption") == want


def test_a_model_is_opened_once_per_process_and_called_by_one_thread(
    made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_WAIT_S", "0.05")
    plan = make_plan(made.load("steps.caption.model=tests.pipeline.test_engine_beam:jealous@1"), until="caption")
    events: list[Event] = []
    options = ("--direct_running_mode=multi_threading", "--direct_num_workers=3")
    beam.run(plan.job(), plan.todo(), BeamEngine(options=options), events.append)
    assert len(of(events, "open")) == 1
    tally = [event.footer["counts"] for event in events if (event.kind, event.step) == ("done", "caption")]
    assert [count["failed"] for count in tally] == [{}, {}, {}]


def jealous() -> Any:
    """A captioner that bears one caller only."""
    busy: list[bool] = []

    def caption(images: Sequence[Any], alt_texts: Sequence[str]) -> list[list[str]]:
        assert not busy
        busy.append(True)
        time.sleep(0.2)
        busy.clear()
        return [[text] for text in alt_texts]

    return caption


def test_a_part_that_cannot_be_read_is_lost_and_the_others_go_on(made: World, tmp_path: Path) -> None:
    forget(made, *MADE)
    (tar,) = Path(made.store).glob("download/*/part-00001.*.tar")
    shutil.move(tar, tmp_path)
    try:
        events = carry(made, until="caption")
    finally:
        shutil.move(tmp_path / tar.name, tar)
    assert of(events, "retry") == [("caption", 1)] * 2
    assert of(events, "lost") == [("caption", 1)]
    assert "FileNotFoundError" in next(event.text for event in events if event.kind == "lost")
    assert {p for s, p in of(events, "done") if s == "caption"} == {0, 2}
    assert of(carry(made, until="caption"), "lost") == []


def test_a_store_in_a_bucket(world: World, tmp_path: Path, s3_options: dict[str, Any]) -> None:
    world.document |= {"store": f"s3://bucket/{tmp_path.name}", "storage_options": s3_options}
    world.write()
    world.list_urls("a", world.images(4))
    recipe = world.load()
    store = Store(recipe.store, recipe.storage_options)
    ingest(store, "world", recipe.dataset.source, "url", "alt", 2, s3_options, lambda rows: None)
    events = carry(world, until="caption")
    assert sorted(of(events, "done")) == [(step, part) for step in ("caption", "download") for part in (0, 1)]
    assert all(event.fresh for event in events)
    assert of(events, "open") == []
    assert store.names("runs") == []


def test_a_model_that_cannot_be_opened(made: World) -> None:
    plan = make_plan(made.load("steps.caption.model=no.such.module:model@1"))
    with pytest.raises(ModelError, match=r"^.*No module named 'no'.*$"):
        beam.run(plan.job(), plan.todo(), BeamEngine(), lambda event: None)


@pytest.mark.parametrize("mode", [pytest.param("multi_processing", marks=pytest.mark.slow), "portable"])
def test_whatever_listen_raises_ends_the_run(
    made: World, mode: str, job_service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STANDIN_WAIT_S", "3")
    revision = {"multi_processing": 2, "portable": 3}[mode]
    plan = make_plan(made.load(f"steps.caption.model=tests.standins:captioner@{revision}"), until="caption")
    engine = BeamEngine(workers=2) if mode == "multi_processing" else BeamEngine(options=portable(job_service))
    raised: list[float] = []

    def listen(event: Event) -> None:
        if event.kind == "open":
            raised.append(time.monotonic())
            raise KeyError("enough")

    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with pytest.raises(KeyError, match="enough"):
        beam.run(plan.job(), plan.todo(), engine, listen)
    assert time.monotonic() - raised[0] < 3
    assert {process.pid for process in psutil.Process().children(recursive=True)} == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--runner=NoSuchRunner",), "NoSuchRunner"),
        (("--direct_num_workers=many",), "invalid int value: 'many'"),
    ],
)
def test_a_pipeline_that_cannot_start_is_one_line(made: World, options: tuple[str, ...], text: str) -> None:
    plan = make_plan(made.load("steps.select.rule.score=0.77"))
    with pytest.raises(EngineError) as caught:
        beam.run(plan.job(), plan.todo(), BeamEngine(options=options), lambda event: None)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beam_is_not_installed(made: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam, "find_spec", lambda name: None)
    plan: Plan = make_plan(made.load())
    with pytest.raises(EngineError, match=r"pip install 'vesl\[beam\]'"):
        beam.run(plan.job(), (0,), replace(plan.recipe.engine), lambda event: None)


@pytest.mark.parametrize(
    ("frozen", "pipelines", "left"),
    [
        (True, ["found 1", "ends well", "found 0", "made 1", "found 2", "nothing"], 0),
        (False, ["nothing", "nothing"], 1),
    ],
)
def test_a_pipeline_in_which_a_worker_froze_before_anything_was_done_is_repeated_once(
    world: World, monkeypatch: pytest.MonkeyPatch, frozen: bool, pipelines: list[str], left: int
) -> None:
    """One that breaks in another way is not; one that ends well, or in which a part is done, begins the count anew."""
    world.list_urls("a", world.images(15))
    world.write()
    _ingest(world.load(), None)

    def pipeline(driver: Any, parts: Sequence[int], notes: object) -> str | None:
        driver.silent = set() if frozen else None
        what, _, part = pipelines.pop(0).partition(" ")
        if what in ("found", "made"):
            driver.hear(Event("done", "caption" if what == "found" else "download", int(part), fresh=what == "made"))
        driver.left += [0] * (what == "ends")  # another run has left it
        return f"{len(pipelines)} left" if what != "ends" else None

    monkeypatch.setattr(beam._Driver, "_pipeline", pipeline)
    with pytest.raises(EngineError, match=f"^engine beam: {left} left$"):
        carry(world, until="caption")


def test_a_part_that_froze_its_worker_is_charged_once_also_where_another_run_has_it(world: World) -> None:
    world.list_urls("a", world.images(10))
    world.write()
    _ingest(world.load(), None)
    plan = make_plan(world.load(), "caption")
    job = replace(plan.job(), run="mine")
    driver = beam._Driver(job, BeamEngine(), lambda event: None, plan.store, "runs/.beam-x")
    for part, runs in enumerate((["mine", "other"], ["mine"])):
        for number, run in enumerate(runs):
            signed = leases._sign(run) | {"pid": 7 + part}
            plan.store.create(f"{wip(job.steps[1].table(part))}/lease-{number:05d}", json.dumps(signed).encode())
    driver.silent = {7}
    assert driver._suspects() == [(1, 0)]
    assert driver._suspects() == []
    assert plan.store.names(wip(job.steps[1].table(0))) == ["lease-00000", "lease-00001"]


@pytest.mark.slow  # half a minute; on Ray and local they always run
def test_a_part_that_hangs_is_given_up_and_one_of_another_run_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(leases, "POLL_S", 0.1)
    plan, bad, _, events, listen = one_hangs_and_one_is_leased(world, 3)
    engine = Engine(kind="beam", silence_limit_s=10, caption=Resources(workers=1), download=Resources(workers=1))
    beam.run(replace(plan.job(), run="mine"), plan.todo(), engine, listen)
    assert of(events, "retry") == of(events, "lost") == [("caption", bad)]
    assert len(of(events, "wait")) == 1
    assert sorted(of(events, "done")) == sorted(
        (step, part) for step in ("download", "caption") for part in range(3) if (step, part) != ("caption", bad)
    )
    assert sorted(set(of(events, "done"))) == sorted(set(of(events, "spent")))
    assert sum(event.rows for event in events if (event.kind, event.step) == ("spent", "caption")) == 10
    (text,) = [event.text for event in events if event.kind == "lost"]
    assert text == "no batch was finished in engine.silence_limit_s = 10, so its worker was ended, 2 times"
    leases.give_back(plan.store, [step.folder for step in plan.steps], "mine")  # as `vesl run` does at its end
    assert not list(Path(world.store).rglob("lease-*"))
    assert "engine beam has no workers of single steps: not used for caption\n" in capsys.readouterr().err


def test_a_kind_of_accelerator_asks_for_one() -> None:
    opens: Any = SimpleNamespace(opens_model=True)
    opens_none: Any = SimpleNamespace(opens_model=False)
    typed = Resources(accelerator="nvidia-l4")
    assert _hints(opens, typed) == {"accelerator": "type:nvidia-l4;count:1;install-nvidia-driver"}
    assert _hints(opens, Resources(gpus=1.5)) == {"accelerator": "count:2;install-nvidia-driver"}
    assert _hints(opens_none, typed) == _hints(opens, Resources()) == {}


def test_of_two_silent_attempts_the_one_whose_turn_it_is_with_the_model_is_blamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blamed, over, ended = SimpleQueue[str](), threading.Event(), threading.Event()
    monkeypatch.setattr(worker, "_TICK_S", 0.05)
    monkeypatch.setattr(worker.os, "_exit", lambda code: ended.set() or threading.Event().wait())
    monkeypatch.setattr(worker.Watch, "_wind", lambda *_: None)  # nobody would wind it up again
    turn = worker.Turn()
    watch = worker.Watch(Engine(silence_limit_s=0.5), turn)

    def attempt(name: str, busy: threading.Event) -> None:
        with watch.over(lambda why: blamed.put(name)):
            if name == "second":
                turn.take()
            busy.set()
            over.wait(20)
            turn.close()

    for name in ("first", "second"):
        threading.Thread(target=attempt, args=(name, busy := threading.Event()), daemon=True).start()
        busy.wait()
    try:
        assert blamed.get(timeout=10) == "second"
        assert ended.wait(10)  # before the real one is back
    finally:
        over.set()
