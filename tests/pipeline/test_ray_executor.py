"""How Ray Data's executor is paced: what makes a pool grow, and what an executor waits for."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.data._internal.actor_autoscaler import ActorPoolScalingRequest, BacklogAwareActorAutoscaler
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from vesl.pipeline.engines import ray_executor, signs
from vesl.pipeline.engines.ray_executor import Executor, Patient


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, list[float]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_executor, "time", clock)
    monkeypatch.setattr(signs, "time", clock)
    return clock


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Patient:
    """One that Ray would let grow by two at any time."""
    grow = ActorPoolScalingRequest.upscale(delta=2)
    monkeypatch.setattr(BacklogAwareActorAutoscaler, "__init__", lambda *args, **options: None)
    monkeypatch.setattr(BacklogAwareActorAutoscaler, "_derive_target_scaling_config", lambda *args: grow)
    return Patient()


def pool(size: int = 1, at_once: int = 1, least: int = 1) -> Any:
    return SimpleNamespace(current_size=lambda: size, min_size=lambda: least, max_actor_concurrency=lambda: at_once)


class Operator:
    def __init__(self, seconds: float | None) -> None:
        self.metrics = SimpleNamespace(average_total_task_completion_time_s=seconds)


def waits(blocks: int) -> Any:
    return SimpleNamespace(total_enqueued_input_blocks=lambda: blocks)


@pytest.mark.parametrize(
    ("of", "seconds", "blocks", "delta"),
    [
        (pool(), 10.0, 5, 0),  # what waits is done in 50 s
        (pool(), 10.0, 6, 2),
        (pool(size=4), 10.0, 23, 0),
        (pool(size=4), 10.0, 24, 2),
        (pool(at_once=2), 20.0, 5, 0),  # a block's time is that of two
        (pool(at_once=2), 20.0, 6, 2),
        (pool(), 3600.0, 0, 0),
        (pool(), 0.05, 499, 0),
        (pool(), 0.05, 500, 2),  # as many as may wait, and nobody knows how many are behind them
        (pool(size=1, least=2), 0.001, 1, 2),  # fewer than the recipe asks for
    ],
)
def test_a_pool_grows_where_much_waits(patient: Patient, of: Any, seconds: float, blocks: int, delta: int) -> None:
    assert patient._derive_target_scaling_config(of, Operator(seconds), waits(blocks)).delta == delta


def test_until_a_block_is_done_it_is_taken_to_be_nearly(patient: Patient, clock: Clock) -> None:
    slow, quick = Operator(None), Operator(None)
    assert patient._derive_target_scaling_config(pool(), slow, waits(10)).delta == 0
    clock.sleep(5.9)
    assert patient._derive_target_scaling_config(pool(), slow, waits(10)).delta == 0
    clock.sleep(0.2)
    assert patient._derive_target_scaling_config(pool(), slow, waits(10)).delta == 2
    assert patient._derive_target_scaling_config(pool(), quick, waits(10)).delta == 0


def test_a_pool_may_shrink_at_any_time(patient: Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = ActorPoolScalingRequest.downscale(delta=-1)
    monkeypatch.setattr(BacklogAwareActorAutoscaler, "_derive_target_scaling_config", lambda *args: shrink)
    assert patient._derive_target_scaling_config(pool(size=2), Operator(10.0), waits(0)) == shrink
    end = ActorPoolScalingRequest.downscale(delta=-1, force=True, reason="consumed all inputs")
    monkeypatch.setattr(BacklogAwareActorAutoscaler, "_derive_target_scaling_config", lambda *args: end)
    assert patient._derive_target_scaling_config(pool(size=9), Operator(10.0), waits(0)).delta == -9


def test_what_came_out_is_heard_before_what_ended_the_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "shutdown", lambda self, force: None)  # when it is let go
    monkeypatch.setattr(ray_executor.ray, "get", lambda refs: refs)
    bundles = [SimpleNamespace(block_refs=refs, blocks=refs, size_bytes=lambda: 10) for refs in (["a", "b"], ["c"])]
    metrics = SimpleNamespace(num_external_outqueue_blocks=3, num_external_outqueue_bytes=20)
    queue = SimpleNamespace(pop=lambda _: bundles.pop(0) if bundles else None)
    state = SimpleNamespace(output_queue=queue, _exception=ValueError("a node is gone"), _finished=False)
    executor, alive, heard = Executor.__new__(Executor), True, list[str]()
    monkeypatch.setattr(Executor, "is_alive", lambda self: alive)
    executor._output_node = (SimpleNamespace(metrics=metrics), state)

    def hear() -> None:
        for block in executor.output():
            heard.append(block)

    with pytest.raises(ValueError, match="a node is gone"):
        hear()
    assert heard == ["a", "b", "c"]
    assert (metrics.num_external_outqueue_blocks, metrics.num_external_outqueue_bytes) == (0, 0)
    state._exception = None
    assert list(executor.output()) == []
    alive = False
    with pytest.raises(RuntimeError, match="thread ended"):
        list(executor.output())
    state._finished = True
    assert list(executor.output()) == []


def test_a_step_waits_until_a_task_has_something_to_say(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    happened, speaks = list[str](), {4: "b"}
    tasks = [SimpleNamespace(get_waitable=lambda name=name: name) for name in "abc"]
    steps = [SimpleNamespace(get_active_tasks=lambda: tasks[:1]), SimpleNamespace(get_active_tasks=lambda: tasks[1:])]

    def wait(refs: list[str], *, timeout: float, fetch_local: bool) -> tuple[list[str], list[str]]:
        assert (refs, timeout, fetch_local) == (["a", "b", "c"], 1.0, False)
        happened.append("wait")
        ready = speaks.get(happened.count("wait"))
        clock.sleep(0.25 if ready else timeout)
        return [ready] if ready else [], refs

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", lambda self, topology: not happened.append("step"))
    monkeypatch.setattr(StreamingExecutor, "start", lambda self: None)
    monkeypatch.setattr(ray_executor, "Patient", lambda *args, **options: None)
    monkeypatch.setattr(ray_executor.ray, "wait", wait)
    monkeypatch.setattr(Executor, "shutdown", lambda self, force: None)  # when it is let go
    executor = Executor.__new__(Executor)
    executor._data_context, executor._topology = SimpleNamespace(autoscaling_config=None), {}  # type: ignore[assignment]
    executor._resource_manager, never = None, SimpleNamespace(due=lambda: False)
    executor._silence = executor._starts = never  # type: ignore[assignment]
    executor.start()
    assert executor._scheduling_loop_step([SimpleNamespace(get_active_tasks=list)])
    assert happened == ["step"]
    for _ in range(10):
        assert executor._scheduling_loop_step(steps)
    assert happened[1:] == ["wait"] * 4 + ["step"] + ["wait"] * 5 + ["step", "wait"]


class Name(str):
    def hex(self) -> str:
        return str(self)


class Actor:
    """Is asked to give signs of life, and gives them or not."""

    def __init__(self, name: str) -> None:
        self.name = self._actor_id = Name(name)
        self.asked, self.lives, self.state = 0, self, SimpleNamespace(is_restarting=False)

    def remote(self) -> str:
        self.asked += 1
        return f"{self.name} {self.asked}"


def test_an_actor_that_gives_no_sign_of_life_is_killed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    well, frozen, restarting, ended = Actor("well"), Actor("frozen"), Actor("restarting"), list[str]()
    restarting.state.is_restarting = True

    def wait(refs: list[str], *, num_returns: int, timeout: float, fetch_local: bool) -> tuple[list[str], list[str]]:
        assert (num_returns, timeout) == (len(refs), 0)
        return [ref for ref in refs if not ref.startswith("frozen")], []

    def kill(actor: Actor, no_restart: bool) -> None:
        assert not no_restart
        ended.append(actor.name)

    monkeypatch.setattr(ray_executor.ray, "wait", wait)
    monkeypatch.setattr(ray_executor.ray, "kill", kill)
    monkeypatch.setattr(StreamingExecutor, "__init__", lambda *args: None)
    monkeypatch.setattr(Executor, "shutdown", lambda self, force: None)  # when it is let go
    executor, step = Executor(None, "", 80.0), Step("Caption", 0, 3)
    step._actor_pool._running_actors = {actor: actor.state for actor in (well, frozen, restarting)}
    clock.sleep(3600)  # a machine that stood still has not waited
    for look in range(9):
        assert executor.killed() == ended == []
        executor._look_after([step])
        clock.sleep(9.9)
        executor._look_after([step])  # too early
        clock.sleep(500.0 if look == 3 else 0.1)
    assert ended == ["frozen"]
    text = "a worker of caption gave no sign of life in 80 s (engine.silence_limit_s), so it was ended"
    assert executor.killed() == [text]
    assert (well.asked, frozen.asked, restarting.asked) == (9, 1, 0)
    executor._look_after([step])  # Ray starts it again
    assert (well.asked, frozen.asked, restarting.asked) == (10, 2, 0)


def test_an_actor_whose_start_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """But not one that waits for its turn, nor one that starts again and again on other nodes."""
    new, waits, again, moves = (Actor(name) for name in ("new", "waits", "again", "moves"))
    names = ("new", "waits", "again", "moves", "somebody else's")
    # Where an actor waits for a place, Ray still says the process that it had.
    known = {name: {"Pid": 7, "Address": {"Port": int(name != "waits")}, "NumRestarts": 0} for name in names}
    ended, job = list[tuple[str, bool]](), "0a000000"
    again.state.is_restarting = moves.state.is_restarting = True
    monkeypatch.setattr(ray_executor.ray._private.state, "actors", lambda job_id: known if job_id.hex() == job else {})
    monkeypatch.setattr(ray_executor.ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: job))
    monkeypatch.setattr(ray_executor.ray, "kill", lambda actor, no_restart: ended.append((actor.name, no_restart)))
    monkeypatch.setattr(StreamingExecutor, "__init__", lambda *args: None)
    monkeypatch.setattr(Executor, "shutdown", lambda self, force: None)  # when it is let go
    executor, step = Executor(None, "", 8.0), Step("Ground", 0, 3)
    step._actor_pool._pending_actors = {"1": new, "2": waits, "3": Actor("unknown")}
    step._actor_pool._running_actors = {actor: actor.state for actor in (again, moves, Actor("well"))}
    for look in range(9):
        assert executor.killed() == ended == []
        executor._look_after_starts([step])
        clock.sleep(60 / 8 - 0.1)
        executor._look_after_starts([step])  # too early
        clock.sleep(0.1)
        known["moves"]["NumRestarts"] = look // 5
    assert ended == [("new", True), ("again", False)]
    text = "a worker of ground had not started after 60 s (engine.silence_limit_s, a minute at least), so it was ended"
    assert executor.killed() == [text] * 2


def test_what_ray_says_is_a_line_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    said = {"pid": "raylet", "is_err": False}
    usual = ray_executor.ray._private.worker.print_to_stdstream
    with ray_executor.terse():
        tell: Any = ray_executor.ray._private.worker.print_to_stdstream
        for _ in range(2):
            tell({"lines": ["Task a failed. There are 3 retries remaining, so the task will be retried."], **said})
            tell({"lines": ["A worker died or was killed while executing a task by an error. Lease ID: 0c"], **said})
            tell({"lines": ["1 worker was killed\n\nas memory ran  out", "x" * 9999], **said}, ignore_prefix=False)
    assert ray_executor.ray._private.worker.print_to_stdstream is usual
    out, err = capfd.readouterr()
    lines = ["vesl: ray: 1 worker was killed as memory ran out", f"vesl: ray: {'x' * 500}"]
    assert (out, sorted(err.splitlines())) == ("", lines)


class Step(ActorPoolMapOperator):
    def __init__(self, name: str, pending: int, running: int) -> None:
        pool = SimpleNamespace(num_pending_actors=lambda: pending, num_running_actors=lambda: running)
        self._named, self._actor_pool = f"MapBatches({name})", pool  # type: ignore[assignment]

    @property
    def name(self) -> str:
        return self._named


def test_only_steps_without_any_worker_are_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executor, "shutdown", lambda self, force: None)  # when it is let go
    executor = Executor.__new__(Executor)
    executor._topology = None
    assert executor.starting() == []
    steps = (Step("Download", 0, 1), Step("Caption", 1, 0), Step("Ground", 1, 1), Step("Pack", 0, 0))
    executor._topology = dict.fromkeys(steps)  # type: ignore[assignment]
    assert executor.starting() == ["caption"]
