"""`vesl train` and `vesl eval`: from a recipe alone to a model and its figures, and what a mistake says."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.models.cloc.test_model import TINY
from tests.models.cloc.test_train import LOOP, Done, nest
from tests.world import VESL
from vesl.models.cloc.encoder import Encoder
from vesl.pipeline.recipe import RecipeError, load_training

SETS = {
    "regions": {"kind": "regions", "templates": ["a {}"]},
    "grounding": {"kind": "grounding"},
    "aligned": {"kind": "retrieval", "by": "roialign"},
    "few": {"kind": "pairs", "limit": 4},
}


def write(folder: Path, **changes: Any) -> Path:
    """A recipe of scenes only, as a beginner would write it; `changes` are of the train block."""
    block: dict[str, Any] = {
        "scenes": {"train": 24, "test": 8, "image_px": 32},
        "model": {name: value for name, value in vars(TINY).items() if value is not None},
        "data": {"workers": 0, "shuffle": 8},
        "objective": {"conflict_from_step": 3},
        "loop": LOOP | {"steps": 4, "evaluate_steps": 2},
        "evaluate": SETS,
    }
    for name, value in changes.items():
        both = isinstance(value, dict) and name != "evaluate"
        block[name] = block.get(name, {}) | value if both else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"store": str(folder / "store"), "train": block}))
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A folder in which the recipe was trained, by the command as a user types it."""
    folder: Path = tmp_path_factory.mktemp("world")
    done = subprocess.run([*VESL, "train", write(folder)], capture_output=True, text=True, check=False)
    return folder, Done(done.returncode, done.stdout, done.stderr)


def model_of(world: tuple[Path, Done]) -> Path:
    return Path(world[1].out.splitlines()[-1].removeprefix("model: "))


def test_train_from_a_recipe_alone(world: tuple[Path, Done]) -> None:
    folder, done = world
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    first, last = done.out.splitlines()
    run = Path(first.removeprefix("run: "))
    assert last == f"model: {run}/model"
    assert run.parent == folder / "store" / "train"
    assert len(run.name) == 12
    assert len(list((folder / "store" / "scenes").glob("*/t*/shard-*.tar"))) == 2
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4]  # figures after steps 2 and 4
    assert 0 <= log[-1]["grounding/acc50"] <= 1
    assert set(log[2]) == set(log[-1])
    assert any(name.startswith("few/") for name in log[-1])
    assert Encoder.open(run / "model", "cpu").encode_text(["a red circle"]).shape == (1, 24)


def test_train_again_is_done_at_once(world: tuple[Path, Done]) -> None:
    folder, done = world
    again = nest().run("train", folder / "recipe.yaml")
    assert (again.code, again.out) == (0, done.out)
    other = nest().run("train", folder / "recipe.yaml", "--set", "train.loop.steps=3", "--set", "train.evaluate={}")
    assert other.code == 0, other.err
    assert other.out.splitlines()[0] != done.out.splitlines()[0]  # another result has another folder


def test_eval_prints_and_writes_the_figures(world: tuple[Path, Done]) -> None:
    folder, model = world[0], model_of(world)
    done = nest().run("eval", folder / "recipe.yaml", model)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"results: {model}/eval.json"
    results = json.loads((model / "eval.json").read_text())
    assert sorted(results) == sorted(SETS)
    for name in SETS:
        assert name in done.out
    values = [metric["value"] for result in results.values() for metric in result["metrics"].values()]
    assert len(values) >= 8
    assert all(0 <= value <= 1 for value in values)
    log = [json.loads(line) for line in (model.parent / "log.jsonl").read_text().splitlines()]
    assert log[-1]["grounding/acc50"] == results["grounding"]["metrics"]["acc50"]["value"]
    assert log[-1]["few/i2t_1"] == results["few"]["metrics"]["i2t_1"]["value"]


def test_eval_of_a_checkpoint(world: tuple[Path, Done]) -> None:
    folder, model = world[0], model_of(world)
    path = model.parent / "checkpoints" / "step-00000004.pt"
    done = nest().run("eval", folder / "recipe.yaml", path, "--set", "train.evaluate={g: {kind: grounding}}")
    assert done.code == 0, done.err
    found = json.loads(path.with_suffix(".eval.json").read_text())
    assert found["g"]["metrics"] == json.loads((model / "eval.json").read_text())["grounding"]["metrics"]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"scenes": None}, "train.data.shards: is missing (or `train.scenes`, or `dataset` and `steps` to make them)"),
        ({"data": {"shards": "/no/where"}}, "/no/where: has no index.json; `vesl run` makes the shards"),
        ({"data": {"shards": "nosuch://x"}}, "nosuch"),
        ({"loop": {"stesp": 3}}, "train.loop.stesp: unknown key; did you mean 'steps'?"),
        ({"modle": {}}, "train.modle: unknown key; did you mean 'model'?"),
        ({"model": {"pool": "mean"}}, "train.model.pool: 'mean' is not one of class, attention"),
        ({"loop": {"steps": "many"}}, "train.loop.steps: expected a whole number, found 'many'"),
        ({"loop": {"lr": float("nan")}}, "train.loop.lr: expected a finite number"),
        ({"scenes": {"objects": [0, 9]}}, "train.scenes.objects: (0, 9) is not a least and a most of 1 to 8"),
        ({"evaluate": {"a": {"kind": "region"}}}, "train.evaluate.a.kind: 'region' is not one of"),
        ({"evaluate": {"a": {}}}, "train.evaluate.a.kind: is missing"),
        ({"evaluate": {"a": {"kind": "pairs", "shards": "/no/where"}}}, "train.evaluate: a: there is no /no/where"),
        ({"evaluate": {"a": {"kind": "regions", "templates": ["a thing"]}}}, "train.evaluate: a: templates: "),
        ({"evaluate": {"a": {"kind": "pairs", "limit": 0}}}, "train.evaluate: a: limit: 0 is not a positive number"),
        ({"model": {"patch_px": 7}}, "train.model.patch_px: 7 does not divide image_px, 32"),
        ({"model": {"vision_heads": 3}}, "train.model.vision_width: 32 is no multiple of vision_heads, 3"),
    ],
)
def test_a_mistake_in_the_recipe(tmp_path: Path, train: Any, says: str) -> None:
    done = nest().run("train", write(tmp_path, **train))
    assert done.code == 2
    assert says in done.assert_one_line()
    assert len(done.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("block", "key", "values"),
    [
        ("model", "image_px", [0]), ("model", "patch_px", [0, 5, 64]), ("model", "vision_width", [0, 30]),
        ("model", "text_heads", [0, 5]), ("model", "embed_dim", [0]), ("model", "vision_layers", [0]),
        ("model", "context", [0, 1]), ("model", "tokenizer", ["bpe:x", "bpe:0", "bpe", "bpe:-1"]),
        ("loop", "steps", [0, -3]), ("loop", "batch", [0, -4]), ("loop", "micro_batch", [0, -2]),
        ("loop", "log_steps", [0]), ("loop", "save_steps", [0]), ("loop", "evaluate_steps", [0, -1]),
        ("loop", "lr", [-1.0]), ("loop", "betas", [[], [0.9], [0.9, 1.5]]), ("loop", "warmup_steps", [-5]),
        ("loop", "weight_decay", [-1.0]), ("loop", "clip_norm", [0.0]), ("loop", "keep", [-1]),
        ("loop", "seed", [-1, 2**70]), ("data", "regions", [0, -1]), ("data", "workers", [-2]),
        ("data", "shuffle", [0]), ("data", "alt_text", [2.0, -0.1]), ("objective", "region_weight", [-1.0]),
        ("objective", "tile", [0, -1]),
    ],
)  # fmt: skip
def test_a_number_that_cannot_be(tmp_path: Path, block: str, key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RecipeError, match=rf"recipe.yaml: train\.{block}\.(?=.*{key}).*: ") as caught:
            load_training(str(write(tmp_path, **{block: {key: value}})))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"loop": {"batch": 5, "micro_batch": 2}}, "train.loop.micro_batch: 2 does not divide a process's 5 images"),
        ({"model": {"init": "org/name"}}, "train.model.init: 'org/name' is neither a folder nor org/name@revision"),
        ({"model": {"tokenizer": "t5"}}, "train.model.tokenizer: 't5' is neither a folder nor org/name@revision"),
        ({"data": {"takedown": "/no/lists"}}, "takedown: there is no folder /no/lists"),
    ],
)
def test_a_start_that_fails(world: tuple[Path, Done], tmp_path: Path, train: Any, says: str) -> None:
    scenes = next((world[0] / "store" / "scenes").iterdir())
    data = {"shards": f"{scenes}/train"} | train.get("data", {})
    done = nest().run("train", write(tmp_path, **train | {"data": data, "evaluate": {}}))
    assert done.code == 1
    assert says in done.assert_one_line()


def test_takedown_lists_that_the_recipe_names(world: tuple[Path, Done], tmp_path: Path) -> None:
    scenes, lists = next((world[0] / "store" / "scenes").iterdir()), tmp_path / "lists"
    with tarfile.open(next((scenes / "train").glob("*.tar"))) as shard:
        keys = [name.removesuffix(".json") for name in shard.getnames() if name.endswith(".json")]
    for folder in (lists, tmp_path / "store" / "takedown"):  # the store's own, and then those named in their place
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("".join(f"{key}\n" for key in keys))
        data = {"shards": f"{scenes}/train"} | ({"takedown": str(lists)} if folder == lists else {})
        done = nest().run("train", write(tmp_path, data=data, evaluate={}))
        assert done.code == 1
        assert "no text to learn a tokenizer from" in done.assert_one_line()  # which obeys the lists as well
        words = {"tokenizer": str(next((world[0] / "store" / "train").glob("*/tokenizer")))}
        done = nest().run("train", write(tmp_path, data=data, evaluate={}, model=words))
        assert done.code == 1
        assert "taken_down" in done.assert_one_line()
        (folder / "a.txt").unlink()
        folder.rmdir()


def test_what_fails_at_the_end_leaves_the_model_and_the_other_measures(
    world: tuple[Path, Done], tmp_path: Path
) -> None:
    """Images that are gone are only found out when they are wanted."""
    scenes = next((world[0] / "store" / "scenes").iterdir())
    labels, pictures = tmp_path / "labels.json", tmp_path / "pictures"
    pictures.mkdir()
    labels.write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a dog"}]})
    )
    sets = {
        "gone": {"kind": "pairs", "annotations": str(labels), "images": str(pictures)},
        "there": {"kind": "pairs", "shards": f"{scenes}/test"},
    }
    recipe = write(tmp_path, data={"shards": f"{scenes}/train"}, evaluate=sets, loop={"evaluate_steps": 1})
    done = nest().run("train", recipe)
    assert done.code == 1
    assert "is finished, but evaluation gone: " in done.err
    assert "Traceback" not in done.err
    assert "there/i2t_1" in done.err
    assert len(list(tmp_path.glob("store/train/*/model/config.json"))) == 1
    Image.new("RGB", (20, 10), "red").save(pictures / "a.jpg")
    done = nest().run("train", recipe)  # what is missing is measured now
    assert done.code == 0, done.err
    assert set(json.loads(next(tmp_path.glob("store/train/*/eval.json")).read_text())) == {"gone", "there"}


@pytest.mark.parametrize(
    ("objective", "asked", "says"),
    [
        ({"region_weight": 0.0}, {"kind": "regions"}, "a plain CLIP has no Prompter"),
        ({"region_weight": 0.0}, {"kind": "retrieval"}, "a plain CLIP has no Prompter"),
        ({"grounding": "none"}, {"kind": "grounding"}, "trains no grounding"),
    ],
)
def test_sets_that_the_model_could_not_answer(
    world: tuple[Path, Done], tmp_path: Path, objective: Any, asked: Any, says: str
) -> None:
    scenes = next((world[0] / "store" / "scenes").iterdir())
    asked = asked | {"shards": f"{scenes}/test"}
    recipe = write(tmp_path, data={"shards": f"{scenes}/train"}, objective=objective, evaluate={"x": asked})
    done = nest().run("train", recipe)
    assert done.code == 2
    assert says in done.assert_one_line()


def test_a_plain_clip_is_measured_by_crops(world: tuple[Path, Done], tmp_path: Path) -> None:
    scenes = next((world[0] / "store" / "scenes").iterdir())
    sets = {"x": {"kind": "regions", "shards": f"{scenes}/test", "by": "crop"}}
    plain = {"region_weight": 0.0}
    recipe = write(tmp_path, data={"shards": f"{scenes}/train"}, objective=plain, evaluate=sets, loop={"steps": 3})
    done = nest().run("train", recipe)
    assert done.code == 0, done.err


def test_eval_mistakes(world: tuple[Path, Done], tmp_path: Path) -> None:
    recipe, model = world[0] / "recipe.yaml", model_of(world)
    for checkpoint, more, code, says in (
        (model, ["--set", "train.evaluate={}"], 2, "train.evaluate: names no evaluation set"),
        (model, ["--set", "train.evaluate={x: {kind: pairs, shards: /no/where}}"], 2, "train.evaluate: x: "),
        (model, ["--set", "train.evaluate={x: {kind: zeroshot}}"], 2, "train.evaluate: x: "),
        (tmp_path, [], 1, f"{tmp_path}: is not a model"),
        (tmp_path / "none", [], 1, f"{tmp_path}/none: is not a model"),
        (tmp_path / "none.pt", [], 1, "there is no such checkpoint"),
        (recipe, [], 1, "is not a model"),
    ):
        done = nest().run("eval", recipe, checkpoint, *more)
        assert done.code == code, done.err
        assert says in done.assert_one_line()
    assert nest().run("eval", recipe).code == 2


@pytest.mark.parametrize("command", ["train", "eval"])
def test_without_torch(tmp_path: Path, command: str) -> None:
    code = "import sys; sys.modules['torch'] = None; from vesl.pipeline.cli import main; main(sys.argv[1:])"
    arguments = [command, str(write(tmp_path)), "x"][: 3 if command == "eval" else 2]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "vesl: the trainer needs torch: pip install 'vesl[train]'\n"
    assert not (tmp_path / "store").exists()
