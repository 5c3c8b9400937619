"""Where one part ends and the next begins, a model does not wait: all engines."""

import json
import os
import signal
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.world import World
from vesl.models.captioners import vllm
from vesl.models.contract import Written
from vesl.models.options import Captioning

CALL_S = 0.2


class Slow:
    """Notes what it does when, in the file BORDERS_LOG; a web caption with `kill` in it ends the process."""

    def __init__(self) -> None:
        self._log = open(os.environ["BORDERS_LOG"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def _note(self, what: str, texts: Sequence[str]) -> None:
        self._log.write(json.dumps([time.monotonic(), what, list(texts)]) + "\n")

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Sequence[str]:
        self._note("prepare", alt_texts)
        return alt_texts

    def __call__(self, prepared: Sequence[str]) -> list[list[Written]]:
        self._note("call", prepared)
        time.sleep(CALL_S)
        if any("kill" in text for text in prepared):
            os.kill(os.getpid(), signal.SIGKILL)
        self._note("called", prepared)
        return [[Written(f"{text} on a table")] for text in prepared]


def slow() -> Slow:
    return Slow()


@pytest.fixture
def log(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    world.document["steps"]["caption"]["model"] = "tests.pipeline.test_borders:slow@1"
    world.document["engine"] = {"workers": 2, "caption": {"workers": 1, "batch": 2, "threads": 1}}
    world.write()
    monkeypatch.setenv("BORDERS_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


class Continuous:
    """Has vLLM's engine's methods; like it, it is at many requests at once, and new ones join at any step."""

    def __init__(self) -> None:
        self._log = open(os.environ["BORDERS_LOG"], "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        self._left: dict[str, tuple[str, int]] = {}  # by request: its prompt, and the steps it still takes

    def add_request(self, name: str, request: dict[str, Any], sampling: Any) -> None:
        self._left[name] = request["prompt"], 8

    def step(self) -> list[Any]:
        self._log.write(json.dumps([prompt for prompt, _ in self._left.values()]) + "\n")
        time.sleep(CALL_S / 8)
        done = [name for name, (_, left) in self._left.items() if left == 1]
        said = {name: self._left.pop(name)[0] for name in done}
        self._left = {name: (prompt, left - 1) for name, (prompt, left) in self._left.items()}
        first = {name: SimpleNamespace(text=f"{text} on a table", finish_reason="stop") for name, text in said.items()}
        return [SimpleNamespace(request_id=name, finished=True, outputs=[first[name]]) for name in done]


def continuous() -> vllm.VLLM:
    options = Captioning("x/y@1", "vllm", ("{alt_text}",))
    return vllm.VLLM(options, Continuous(), None, lambda alt_text: [alt_text])


def captions(world: World) -> dict[str, tuple[str, str]]:
    """What became of each row: (outcome, caption), by the number in the web caption."""
    found = {}
    for path in sorted((Path(world.store) / "input").glob("*/part-*.parquet")):
        (table,) = (Path(world.store) / "caption").glob(f"*/{path.name}")
        rows = {row["key"]: row for row in pq.read_table(table).to_pylist()}
        for row in pq.read_table(path).to_pylist():
            mine = rows[row["key"]]
            found[row["alt_text"]] = (mine["outcome"], (mine["captions"] or [{"text": mine["reason"]}])[0]["text"])
    return found


SLOW_RAY = pytest.param("ray", marks=pytest.mark.slow)  # half a minute


@pytest.fixture(params=["local", "ray", "beam"])
def engine(world: World, log: Path, request: pytest.FixtureRequest) -> str:
    """Beam's workers take several parts at a time where they have threads, as they have on a cluster."""
    pytest.importorskip({"beam": "apache_beam", "ray": "ray"}.get(request.param, "vesl"))
    world.document["engine"]["kind"] = request.param
    world.bare = request.param != "ray"
    if request.param == "beam":
        world.document["engine"]["options"] = ["--direct_running_mode=multi_threading", "--direct_num_workers=3"]
    world.write()
    return str(request.param)


def test_the_next_part_is_prepared_while_the_model_is_at_the_last(world: World, log: Path, engine: str) -> None:
    texts = {i: f"ball {i}" for i in range(30)}
    world.list_urls("a", world.images(30, captions=texts))
    done = world.run("run", "--until", "caption")
    assert done.returncode == 0, done.stderr
    assert captions(world) == {text: ("kept", f"{text} on a table") for text in texts.values()}

    events = [json.loads(line) for line in log.read_text().splitlines()]
    inputs = sorted((Path(world.store) / "input").glob("*/part-*.parquet"))
    part_of = {text: k for k, path in enumerate(inputs) for text in pq.read_table(path)["alt_text"].to_pylist()}
    first_prepared: dict[int, float] = {}
    last_called: dict[int, float] = {}
    at_work = 0
    for at, what, given in sorted(events):
        (part,) = {part_of[text] for text in given}  # no batch has rows of two parts
        if what == "prepare":
            first_prepared.setdefault(part, at)
        elif what == "call":
            at_work += 1
            assert at_work == 1  # parts take turns
        else:
            at_work -= 1
            last_called[part] = at
    order = sorted(first_prepared, key=first_prepared.__getitem__)
    assert len(order) == len(inputs) == 6
    ahead = [first_prepared[after] < last_called[before] for before, after in pairwise(order)]
    assert any(ahead)  # of a busy machine's parts, some come too late


@pytest.mark.parametrize("engine", ["local", SLOW_RAY, "beam"], indirect=True)
def test_vllm_has_requests_of_two_parts_at_once(world: World, log: Path, engine: str) -> None:
    world.document["steps"]["caption"]["model"] = "tests.pipeline.test_borders:continuous@1"
    world.write()
    texts = {i: f"ball {i}" for i in range(30)}
    world.list_urls("a", world.images(30, captions=texts))
    for arguments in (("download", "--set", "engine.kind=local", "--set", "engine.options=[]"), ("caption",)):
        done = world.run("run", "--until", *arguments)
        assert done.returncode == 0, done.stderr
    assert captions(world) == {text: ("kept", f"{text} on a table") for text in texts.values()}
    inputs = sorted((Path(world.store) / "input").glob("*/part-*.parquet"))
    part_of = {text: k for k, path in enumerate(inputs) for text in pq.read_table(path)["alt_text"].to_pylist()}
    steps = [{part_of[text] for text in json.loads(line)} for line in log.read_text().splitlines()]
    assert any(len(parts) == 2 for parts in steps)  # of a busy machine's parts, some come too late
    assert max(len(parts) for parts in steps) == 2


@pytest.mark.parametrize("culprits", [(4,), (4, 17)])
def test_a_row_that_kills_at_a_border_costs_itself_alone(world: World, log: Path, culprits: tuple[int, ...]) -> None:
    texts = {i: f"{'kill' if i in culprits else 'ball'} {i}" for i in range(20)}
    world.list_urls("a", world.images(20, captions=texts))
    done = world.run("run", "--until", "caption", "--set", "limits.failed_fraction=0.5")
    assert done.returncode == 0, done.stderr
    found = captions(world)
    for i, text in texts.items():
        want = ("failed", "crashed") if i in culprits else ("kept", f"{text} on a table")
        assert found[text] == want


@pytest.mark.slow
def test_a_step_of_ray_may_have_an_environment_of_its_own(
    world: World, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its workers see is theirs alone: here the place of the log, which the driver and other steps do not have."""
    pytest.importorskip("ray")
    monkeypatch.delenv("BORDERS_LOG")
    environment = {"env_vars": {"BORDERS_LOG": str(log)}}
    world.bare = False
    world.document["engine"] = {"kind": "ray", "caption": {"workers": 1, "runtime_env": environment}}
    world.write()
    world.list_urls("a", world.images(4, captions={i: f"ball {i}" for i in range(4)}))
    done = world.run("run", "--until", "caption")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert {outcome for outcome, _ in captions(world).values()} == {"kept"}
    assert "called" in log.read_text()
