"""How Ray Data's executor is paced: what makes a pool grow, and what an executor does while nothing happens."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from ray.data._internal.actor_autoscaler import ActorPoolScalingRequest, BacklogAwareActorAutoscaler
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from vesl.pipeline.engines import ray_executor
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


def test_it_looks_less_often_the_longer_nothing_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(self: Any, topology: Any) -> bool:
        clock.now += 0.1
        return True

    monkeypatch.setattr(StreamingExecutor, "_scheduling_loop_step", look)
    executor = Executor.__new__(Executor)
    executor._ended, executor._moved = -1, 0.0
    metrics = SimpleNamespace(num_tasks_finished=0)
    topology = [SimpleNamespace(metrics=metrics)]
    executor._scheduling_loop_step(topology)
    assert not clock.slept  # it has just begun
    for _ in range(40):
        executor._scheduling_loop_step(topology)
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[0] == pytest.approx(0.01)
    assert clock.slept[-1] == 0.5
    metrics.num_tasks_finished = 1
    executor._scheduling_loop_step(topology)
    assert len(clock.slept) == 40
    executor._scheduling_loop_step(topology)
    assert clock.slept[-1] == pytest.approx(0.01)
