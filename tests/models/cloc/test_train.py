"""The loop as its users run it: processes that are killed, stopped and damaged between, and what comes out of them."""

import atexit
import dataclasses
import gc
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.models.cloc.test_model import TINY
from vesl.models.cloc import checkpoint
from vesl.models.cloc import train as module
from vesl.models.cloc.data import Batch
from vesl.models.cloc.encoder import Encoder
from vesl.models.cloc.journal import Journal
from vesl.models.cloc.model import Features
from vesl.models.cloc.options import Data, Loop, Objective, Train
from vesl.models.cloc.scene_shards import generate
from vesl.models.cloc.scenes import Scenes
from vesl.models.cloc.train import identity, learning_rate, train
from vesl.models.contract import ModelError

ROOT = Path(__file__).parents[3]
STEP = "import vesl.models.cloc.train as t; step = t.Run._step; import os, signal, time\n"
SLOW = STEP + "t.Run._step = lambda self, *a: (time.sleep(0.05), step(self, *a))[1]"
STOP = (
    STEP + "t.Run._step = lambda self, *a: (self.step == 2 and os.kill(os.getpid(), signal.SIGTERM), step(self, *a))[1]"
)


@cache
def _place() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def place() -> Path:
    """A folder that goes when this process does."""
    return Path(_place().name)


@dataclasses.dataclass
class Running:
    """A process of `vesl`."""

    nest: "Nest"
    pid: int
    out: Path
    err: Path

    def wait(self) -> "Done":
        """Its exit code (negative: a signal's number) and what it said."""
        code = self.nest.ask(wait=self.pid)
        return Done(code, self.out.read_text(), self.err.read_text())


@dataclasses.dataclass
class Done:
    code: int
    out: str
    err: str

    def assert_one_line(self) -> str:
        """A fault is told in one line."""
        lines = [line for line in self.err.splitlines() if line.startswith("vesl: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


class Nest:
    """A process that has imported everything, and from which those of `vesl` are forked: an import takes seconds."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, **pipes, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        self.folder = place()
        self.count = 0

    def ask(self, **request: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: object, patch: str = "", **environment: object) -> Running:
        """Start `vesl ARGUMENTS`; `patch` is run before."""
        self.count += 1
        out, err = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        env = {name: str(value) for name, value in environment.items()}
        pid = self.ask(arguments=[*map(str, arguments)], out=str(out), err=str(err), patch=patch, env=env)
        return Running(self, pid, out, err)

    def run(self, *arguments: object, patch: str = "", **environment: object) -> Done:
        return self.start(*arguments, patch=patch, **environment).wait()


def serve() -> None:
    """The nest's own process."""
    import torch.utils.tensorboard

    import vesl.models.cloc.train
    import vesl.pipeline.run
    import vesl.pipeline.training  # noqa: F401
    from vesl.pipeline.cli import main

    torch.set_num_threads(1)
    gc.freeze()
    for line in iter(sys.stdin.buffer.raw.readline, b""):  # type: ignore[attr-defined]
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        if pid := os.fork():
            print(pid, flush=True)
            continue
        for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ.update(request["env"])
        signal.alarm(100)  # a test that waits for it is not to wait for ever
        try:
            exec(request["patch"], {})
            main(request["arguments"])
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:  # noqa: BLE001  (told to whoever waits, as Python would)
            traceback.print_exc()
            code = 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # to tear everything down takes seconds as well


@cache
def nest() -> Nest:
    """One for all tests; it ends with this process."""
    found = Nest()
    atexit.register(found.process.communicate)
    return found


@cache
def scenes() -> str:
    """Shards to train and to test on."""
    options = Scenes(train=24, test=8, image_px=32, samples_per_shard=24)
    return str(generate(place() / "scenes", options))


LOOP = {
    "steps": 8, "batch": 4, "lr": 3e-3, "warmup_steps": 2, "precision": "fp32", "log_steps": 1, "save_steps": 2,
}  # fmt: skip


def recipe(folder: Path, **changes: Any) -> Path:
    """A recipe that trains on `scenes()` in `folder`; `changes` are of the loop, or of the block they name."""
    model = {name: value for name, value in vars(TINY).items() if value is not None}
    blocks = {name: changes.pop(name) for name in ("data", "objective", "model", "evaluate") if name in changes}
    block = {
        "folder": str(folder),
        "model": model | blocks.get("model", {}),
        "data": {"shards": f"{scenes()}/train", "regions": 3, "workers": 0, "shuffle": 8} | blocks.get("data", {}),
        "objective": {"conflict_from_step": 3} | blocks.get("objective", {}),
        "loop": LOOP | changes,
        "evaluate": blocks.get("evaluate", {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"store": str(folder / "store"), "train": block}))
    return path


def options_of(**changes: Any) -> Train:
    blocks = {name: changes.pop(name) for name in ("data", "objective") if name in changes}
    data = {"shards": f"{scenes()}/train", "regions": 3, "workers": 0, "shuffle": 8} | blocks.get("data", {})
    objective = {"conflict_from_step": 3} | blocks.get("objective", {})
    loop: Any = LOOP | changes
    return Train(model=TINY, loop=Loop(**loop), data=Data(**data), objective=Objective(**objective))


def lines(folder: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("samples_per_s", "data_wait")} for line in found]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def assert_same_run(one: Path, other: Path) -> None:
    """To the last bit: the log, the weights, the optimiser's state and the place in the data."""
    assert lines(one) == lines(other)
    for name in ("model.safetensors", "cloc.safetensors"):
        ours, theirs = load_file(one / "model" / name), load_file(other / "model" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    states = [checkpoint.load(checkpoints(folder)[-1]) for folder in (one, other)]
    assert states[0]["loader"] == states[1]["loader"]
    assert states[0]["step"] == states[1]["step"]
    moments = [[v for s in state["optimizer"]["state"].values() for v in s.values()] for state in states]
    assert len(moments[0]) > 50
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder: Path = tmp_path_factory.mktemp("finished")
    done = nest().run("train", recipe(folder))
    assert done.code == 0, done.err
    assert done.out == f"run: {folder}\nmodel: {folder}/model\n"
    return folder


def test_a_run_logs_saves_and_exports(finished: Path) -> None:
    found = lines(finished)
    assert [line["step"] for line in found] == [*range(1, 9)]
    assert {"loss", "image_text", "region_text", "grounding", "lambda", "scale", "grad_norm", "lr"} < found[0].keys()
    for line in found:
        assert line["loss"] == pytest.approx(
            line["image_text"] + line["lambda"] * (line["region_text"] + line["grounding"]), rel=1e-5
        )
        assert line["lr"] == pytest.approx(learning_rate(line["step"] - 1, Loop(**LOOP)))  # type: ignore[arg-type]
        assert line["skipped_steps"] == 0
        assert line["data/used"] >= 4 * line["step"]
    assert found[-1]["loss"] < found[0]["loss"]
    assert all(line["masked_share"] <= found[3]["masked_share"] + 1 for line in found)
    assert [path.name for path in checkpoints(finished)] == ["step-00000006.pt", "step-00000008.pt"]  # `keep` is 2
    assert (finished / "tokenizer" / "tokenizer.json").exists()
    assert list((finished / "tensorboard").iterdir())
    state = checkpoint.load(checkpoints(finished)[-1])
    assert state["index_sha256"] == state["loader"][0]["index_sha256"]


def test_the_conflict_filter_starts_at_its_step(finished: Path, tmp_path: Path) -> None:
    """An untrained tower finds all texts alike: a filter at 0 hides all negatives but none before its step."""
    for first in (0, 3, 5):
        options = options_of(steps=6, save_steps=99, objective={"conflict_from_step": first, "conflict_cosine": 0.0})
        train(options, tmp_path / str(first))
        masked = [line["masked_share"] for line in lines(tmp_path / str(first))]
        assert [share > 0.3 for share in masked] == [step >= first for step in range(6)]


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(finished: Path, tmp_path: Path) -> None:
    path, chance, before = recipe(tmp_path, data={"workers": 0}), random.Random(), ""
    for _ in range(2):
        running = nest().start("train", path, patch=SLOW)
        until = time.monotonic() + 60
        while [p.name for p in checkpoints(tmp_path)][-1:] in ([], [before]) and time.monotonic() < until:
            time.sleep(0.005)
        before = checkpoints(tmp_path)[-1].name
        time.sleep(chance.random() * 0.15)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait().code == -signal.SIGKILL
        assert not (tmp_path / "model").exists()
    done = nest().run("train", path)
    assert done.code == 0, done.err
    assert "going on from step" in done.err
    assert_same_run(tmp_path, finished)


def test_loading_processes_make_no_difference_to_a_resumed_run(tmp_path: Path) -> None:
    straight, stopped = (recipe(tmp_path / name, data={"workers": 2}, steps=5) for name in ("straight", "stopped"))
    assert nest().run("train", straight).code == 0
    assert nest().run("train", stopped, patch=STOP).code == 1
    assert nest().run("train", stopped).code == 0
    assert_same_run(straight.parent, stopped.parent)


def test_asked_to_stop_it_saves(finished: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, save_steps=100)
    done = nest().run("train", path, patch=STOP)
    assert done.code == 1
    assert done.assert_one_line() == "vesl: stopped after step 3 of 8; run again to go on"
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003.pt"]
    assert not (tmp_path / "model").exists()
    assert nest().run("train", path).code == 0
    assert_same_run(tmp_path, finished)
    again = nest().run("train", path)  # and a finished run is finished
    assert again.code == 0, again.err
    assert_same_run(tmp_path, finished)


def copy(finished: Path, folder: Path) -> Path:
    """The finished run as it was at step 6 and 8, in another folder."""
    for path in finished.rglob("*"):
        if path.is_file() and "model" not in path.relative_to(finished).parts:
            place = folder / path.relative_to(finished)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return recipe(folder)


def test_a_damaged_checkpoint_is_passed_over(finished: Path, tmp_path: Path) -> None:
    path = copy(finished, tmp_path)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')
    os.truncate(checkpoints(tmp_path)[-1], 5000)
    done = nest().run("train", path)
    assert done.code == 0, done.err
    assert "step-00000008.pt: is damaged" in done.err.replace("\n", "")
    assert "going on from step 6" in done.err
    assert_same_run(tmp_path, finished)
    for each in checkpoints(tmp_path):
        os.truncate(each, 5000)
    done = nest().run("train", path)
    assert done.code == 1
    assert "no checkpoint can be read; remove the folder to start anew" in done.assert_one_line()


def test_a_checkpoint_of_another_version(finished: Path, tmp_path: Path) -> None:
    path, newest = copy(finished, tmp_path), checkpoints(tmp_path)[-1]
    state = torch.load(newest, weights_only=True)
    del state["clip"]
    torch.save(state, newest)
    done = nest().run("train", path)
    assert done.code == 1
    assert "is of another version of vesl; name a new train.folder" in done.assert_one_line()
    with pytest.raises(ModelError, match="is not a model"):
        Encoder.open(newest)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lr": 1e-3}, "has another loop.lr;"),
        ({"batch": 8, "seed": 3}, "has another loop.batch, loop.seed;"),
        ({"objective": {"grounding": "none"}}, "has another objective.grounding;"),
        ({"model": {"embed_dim": 32}}, "has another model.embed_dim;"),
        ({"data": {"regions": 2}}, "has another data.regions;"),
    ],
)
def test_other_options_need_another_folder(finished: Path, tmp_path: Path, changes: Any, says: str) -> None:
    copy(finished, tmp_path)
    done = nest().run("train", recipe(tmp_path, **changes))
    assert done.code == 1
    assert says in done.assert_one_line()
    assert lines(tmp_path) == lines(finished)


def test_what_does_not_decide_the_result_may_change(finished: Path, tmp_path: Path) -> None:
    copy(finished, tmp_path)
    checkpoints(tmp_path)[-1].unlink()
    done = nest().run("train", recipe(tmp_path, save_steps=1, keep=1, log_steps=1))
    assert done.code == 0, done.err
    assert lines(tmp_path) == lines(finished)
    assert len(checkpoints(tmp_path)) == 1
    one, other = options_of(), options_of(log_steps=7, keep=9, data={"workers": 5, "shards": "elsewhere"})
    assert identity(one) == identity(other)
    assert identity(one) != identity(options_of(steps=9))


def test_other_shards_are_no_continuation(finished: Path, tmp_path: Path) -> None:
    copy(finished, tmp_path)
    generate(tmp_path / "other", Scenes(train=24, test=1, image_px=32, samples_per_shard=24, seed=5))
    done = nest().run("train", recipe(tmp_path, data={"shards": f"{tmp_path}/other/train"}))
    assert done.code == 1
    assert "index_sha256 was" in done.assert_one_line()


def test_a_missing_shard(tmp_path: Path) -> None:
    shards = Path(generate(tmp_path / "scenes", Scenes(train=8, test=1, image_px=32))) / "train"
    next(shards.glob("*.tar")).unlink()
    done = nest().run("train", recipe(tmp_path, data={"shards": str(shards)}))
    assert done.code == 1
    assert str(shards) in done.assert_one_line()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch": 6, "micro_batch": 4}, "train.loop.micro_batch: 4 does not divide a process's 6 images"),
        ({"batch": 3}, "train.loop.batch: 3 images cannot be shared equally by 2 processes"),
    ],
)
def test_batches_that_do_not_divide(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says.split(" images")[0]):
        module._check(options_of(**changes), 2 if changes["batch"] == 3 else 1)
    module._check(options_of(batch=6, micro_batch=3), 2)
    with pytest.raises(ModelError, match="cannot be shared equally by 8 processes"):
        module._check(options_of(batch=4), 8)


def test_micro_batches_train_alike(finished: Path, tmp_path: Path) -> None:
    train(options_of(micro_batch=2, steps=8, save_steps=99), tmp_path)
    ours, theirs = lines(tmp_path), lines(finished)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-3)
    assert [line["grad_norm"] for line in ours] == pytest.approx([line["grad_norm"] for line in theirs], rel=1e-2)


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"precision": "bf16"}])
def test_cheaper_arithmetic_trains_alike(finished: Path, tmp_path: Path, changes: Any) -> None:
    train(options_of(**changes, save_steps=99), tmp_path)
    rel = 1e-5 if "checkpointing" in changes else 0.05
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(
        [line["loss"] for line in lines(finished)], rel=rel
    )


class Poison:
    """The objective, but for the steps (of all that were tried) that are not finite."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.real = steps, module.cloc_loss

    def __call__(self, found: Features, batch: Batch, options: Objective, step: int) -> Any:
        loss, parts = self.real(found, batch, options, step)
        return (
            (loss * float("nan"), parts | {"image_text": parts["image_text"] * float("nan")})
            if (step in self.steps or not self.steps)
            else (loss, parts)
        )


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cloc_loss", Poison(3, 5))
    last = train(options_of(save_steps=1, keep=99), tmp_path)
    states = [checkpoint.load(path) for path in checkpoints(tmp_path)]
    for before, after, still in ((2, 3, True), (3, 4, False), (4, 5, True), (5, 6, False), (6, 7, False)):
        pairs = [(states[before - 1 + 1]["model"][k], v) for k, v in states[after]["model"].items()]
        assert all(torch.equal(a, b) for a, b in pairs) == still, after
    assert [state["skipped"] for state in states] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert last["skipped_steps"] == 2
    assert [line["image_text"] is None for line in lines(tmp_path)] == [i in (3, 5) for i in range(8)]
    moments = states[3]["optimizer"]["state"]
    assert all(torch.isfinite(v).all() for state in moments.values() for v in state.values())


def test_too_many_of_them_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.GIVE_UP == 100
    monkeypatch.setattr(module, "GIVE_UP", 3)
    monkeypatch.setattr(module, "cloc_loss", Poison(1, 2, 4, 5, 6, 7))
    with pytest.raises(ModelError, match=r"3 steps in a row were not finite; lower train.loop.lr") as caught:
        train(options_of(), tmp_path)
    assert "\n" not in str(caught.value)
    assert [line["step"] for line in lines(tmp_path)] == [*range(1, 7)]


def test_learning_rate_by_hand() -> None:
    loop = Loop(steps=12, warmup_steps=4, lr=8.0)
    found = [learning_rate(step, loop) for step in range(13)]
    assert found[:5] == pytest.approx([2, 4, 6, 8, 8])
    assert found[6] == pytest.approx(4 * (1 + 0.5**0.5))
    assert found[8] == pytest.approx(4)
    assert found[12] == pytest.approx(0)
    assert 0 < found[11] < 0.4
    assert learning_rate(0, Loop(steps=5, warmup_steps=0, lr=1.0)) == 1
    assert [learning_rate(i, Loop(steps=2, warmup_steps=5, lr=5.0)) for i in (0, 1)] == pytest.approx([1, 2])


def test_the_journal_takes_back_what_was_not_saved(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\nnonsense\n{"step": 3}\n{"x": 1}\n[]\n{"step": 4, "l')
    with Journal(tmp_path, 2, 9) as journal:
        journal.write(3, {"loss": float("nan"), "lr": 0.5, "large": float("inf"), "count": 3})
    found = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert found == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None, "lr": 0.5, "large": None, "count": 3}]


# --- two processes


def ranks(path: Path, patches: tuple[str, str] = ("", "")) -> list[Done]:
    """`torchrun --nproc-per-node 2`, as far as a process sees of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [nest().start("train", path, patch=p, RANK=i, LOCAL_RANK=i, **place) for i, p in enumerate(patches)]
    return [each.wait() for each in running]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happened to."""
    folder: Path = tmp_path_factory.mktemp("together")
    first, second = ranks(recipe(folder, evaluate={"pairs": {"kind": "pairs", "shards": f"{scenes()}/test"}}))
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert first.out == f"run: {folder}\nmodel: {folder}/model\n"
    assert second.out == ""
    return folder


def test_two_processes_resume_where_either_was_asked_to_stop(together: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, evaluate={"pairs": {"kind": "pairs", "shards": f"{scenes()}/test"}})
    stopped = ranks(path, ("", STOP))
    assert [done.code for done in stopped] == [1, 1], stopped[0].err + stopped[1].err
    assert [p.name for p in checkpoints(tmp_path)][-1] == "step-00000003.pt"
    assert [done.code for done in ranks(path)] == [0, 0]
    assert_same_run(tmp_path, together)
    alone = nest().run("train", path)
    assert alone.code == 1
    assert "was trained by 2 processes, not 1" in alone.assert_one_line()


@pytest.mark.parametrize("objective", [{"grounding": "none"}, {"region_weight": 0.0}])
def test_two_processes_stay_in_step(tmp_path: Path, objective: Any) -> None:
    """Whatever has no gradient: each step waits for the one before to be whole."""
    path = recipe(tmp_path, objective=objective, steps=3)
    for done in ranks(path):
        assert done.code == 0, done.err
        assert "Traceback" not in done.err
