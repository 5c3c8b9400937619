"""Where one part ends and the next begins, a model does not wait: engines `local` and `ray`."""

import json
import os
import signal
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.world import World
from vesl.models.contract import Written

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


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_the_next_part_is_prepared_while_the_model_is_at_the_last(world: World, log: Path, kind: str) -> None:
    if kind == "ray":
        pytest.importorskip("ray")
    texts = {i: f"ball {i}" for i in range(30)}
    world.list_urls("a", world.images(30, captions=texts))
    done = world.run("run", "--until", "caption", "--set", f"engine.kind={kind}")
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


def test_a_step_of_ray_may_have_an_environment_of_its_own(
    world: World, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its workers see is theirs alone: here the place of the log, which the driver and other steps do not have."""
    pytest.importorskip("ray")
    monkeypatch.delenv("BORDERS_LOG")
    environment = {"env_vars": {"BORDERS_LOG": str(log)}}
    world.document["engine"] = {"kind": "ray", "caption": {"workers": 1, "runtime_env": environment}}
    world.write()
    world.list_urls("a", world.images(4, captions={i: f"ball {i}" for i in range(4)}))
    done = world.run("run", "--until", "caption")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert {outcome for outcome, _ in captions(world).values()} == {"kept"}
    assert "called" in log.read_text()
