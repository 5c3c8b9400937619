import dataclasses
import json
from pathlib import Path

import pytest

from vesl.pipeline.recipe import Recipe, RecipeError, load, only_parts
from vesl.pipeline.stage import Step

GOOD = """
dataset: {name: web, source: urls.csv}
store: out/store
steps:
  caption: {model: alt_text@1}
  ground: {model: tiny@1}
"""
SERVED = GOOD.replace("alt_text@1", f"org/model@{'0' * 40}, backend: openai")


def read(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(str(path), overrides)


def test_defaults_and_types(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD, "engine.workers=3", "steps.select.rule.score=1", "engine.ground.batch=7")
    assert recipe.dataset.source == ("urls.csv",)
    assert recipe.engine.workers == 3
    assert recipe.steps.select.rule.score == 1.0
    assert isinstance(recipe.steps.select.rule.score, float)
    assert (recipe.engine.ground.batch, recipe.engine.caption.batch) == (7, 32)


def test_a_block_given_in_part_keeps_the_other_defaults_of_its_place(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "engine.select.workers=1").engine.select.batch == 4096


def test_base_is_inherited_and_overridden(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(GOOD, encoding="utf-8")
    recipe = read(tmp_path, "base: base.yaml\nstore: other\nsteps: {ground: {score_floor: 0.5}}\n")
    assert (recipe.store, recipe.dataset.name) == ("other", "web")
    assert (recipe.steps.ground.model, recipe.steps.ground.score_floor) == ("tiny@1", 0.5)


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        (GOOD, ["steps.select.rule.scroe=0.2"], "steps.select.rule.scroe: unknown key; did you mean 'score'?"),
        (GOOD, ["steps.selct.rule.score=0.2"], "steps.selct: unknown key; did you mean 'select'?"),
        (GOOD + "store: again\n", [], "the key 'store' stands twice"),
        (GOOD, ["steps.ground.score_floor=high"], "steps.ground.score_floor: expected a finite number, found 'high'"),
        (GOOD, ["steps.ground.score_floor=.nan"], "steps.ground.score_floor: expected a finite number"),
        (GOOD, ["engine.workers=true"], "engine.workers: expected a whole number, found True"),
        (GOOD, ["engine.workers=0"], "engine.workers: 0 is not a positive number"),
        (GOOD, ["steps.ground=3"], "steps.ground: expected a block of keys, found 3"),
        (GOOD, ["steps.select.empty=maybe"], "steps.select.empty: 'maybe' is not one of keep, reject"),
        (GOOD, ["steps.select.rule.max_regions=-1"], "steps.select.rule"),
        (GOOD, ["steps.ground.model=tiny"], "steps.ground.model: 'tiny' is not pinned; write name@revision"),
        (GOOD, ["steps.caption.model=alt_txt@1"], "steps.caption.model: 'alt_txt@1' is not a captioner"),
        (GOOD, ["steps.phrases.tagger=en_core_web_sm"], "steps.phrases.tagger: 'en_core_web_sm' is not pinned"),
        (GOOD, ["engine.kind=spark"], "engine.kind: 'spark' is not one of local, ray, beam"),
        (SERVED, ["steps.caption.endpoint.url=a b"], "steps.caption.endpoint.url: is not like http://host:8000/v1"),
        (SERVED, ["steps.caption.dtype=float16"], "caption.device, dtype and compile: are the server's to choose"),
        (SERVED, ["steps.caption.batch_tokens=0"], "steps.caption.batch_tokens: 0 is not a positive number"),
        (GOOD, ["dataset.only_parts=a-b"], "dataset.only_parts: 'a-b' is not like 0-3"),
        (GOOD, ["dataset.only_parts=5-2"], "dataset.only_parts: '5-2' is not like 0-3"),
        (GOOD, ["dataset.name=2024-13-45"], "the value is not valid YAML"),
        ("dataset: foo\nstore: x\n", [], "dataset: expected a block of keys, found 'foo'"),
        (GOOD, ["limits.failed_fraction=-1"], "limits.failed_fraction: -1.0 is not a share between 0 and 1"),
        (GOOD, ["steps.ground.max_detections=-1"], "steps.ground.max_detections: -1 is not a positive number"),
        (GOOD, ["steps.download.image.quality=99"], "steps.download.image.quality: 99 is more than 95"),
        (GOOD, ["dataset.source=[]"], "dataset.source: names no file"),
        (GOOD, ["steps.download.fetch.allow_networks=[localhost]"], "steps.download.fetch"),
        (GOOD, ["store"], "--set store: expected a.b=value"),
        (GOOD, ["store.x=1"], "--set store.x=1: store is not a block"),
        ("store: x\n", [], "dataset: is missing"),
        (GOOD.replace("  ground: {model: tiny@1}\n", ""), [], "steps.ground: is missing"),
        ("- a\n- b\n", [], "is not a mapping"),
        ("a: [1\n", [], "expected ',' or ']'"),
        ("a: !!python/object:os.system {}\n", [], "could not determine a constructor"),
        ("base: recipe.yaml\n", [], "inherits from itself"),
        ("base: nowhere.yaml\n", [], "nowhere.yaml: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_every_mistake_is_one_line_that_says_where(tmp_path: Path, text: str, overrides: list[str], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load(str(tmp_path / "r.yaml"))


def test_only_parts(tmp_path: Path) -> None:
    assert only_parts(read(tmp_path, GOOD), 9) is None
    assert only_parts(read(tmp_path, GOOD, "dataset.only_parts=7,0-2"), 9) == [0, 1, 2, 7]
    assert only_parts(read(tmp_path, GOOD, "dataset.only_parts=3"), 9) == [3]
    assert only_parts(read(tmp_path, GOOD, "dataset.only_parts=2-99999999999"), 4) == [2, 3]


def fingerprints(recipe: Recipe) -> dict[str, str]:
    parent, found = "input", {}
    for field in dataclasses.fields(recipe.steps):
        if stage := getattr(recipe.steps, field.name):
            parent = found[field.name] = Step(stage, parent).fingerprint
    return found


@pytest.mark.parametrize(
    ("override", "first_changed"),
    [
        ("steps.select.rule.score=0.3", "select"),
        ("steps.pack.max_shard_bytes=1000", "pack"),
        ("steps.caption.model=tiny@1", "caption"),
        ("steps.ground.score_floor=0.1", "ground"),
        ("steps.phrases.rule.max_phrases=5", "phrases"),
        ("steps.download.image.max_side_px=300", "download"),
        ("steps.download.fetch.max_bytes=300", "download"),
        ("steps.download.fetch.total_timeout_s=300", None),
        ("steps.download.fetch.connect_timeout_s=300", None),
        ("steps.download.fetch.concurrency=3", None),
        ("engine.ground.batch=3", None),
        ("store=elsewhere", None),
    ],
)
def test_what_changes_a_fingerprint(tmp_path: Path, override: str, first_changed: str | None) -> None:
    before, after = fingerprints(read(tmp_path, GOOD)), fingerprints(read(tmp_path, GOOD, override))
    changed = [name for name in before if before[name] != after[name]]
    names = list(before)
    assert changed == ([] if first_changed is None else names[names.index(first_changed) :])


def test_writing_a_default_out_changes_no_fingerprint(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    want = fingerprints(recipe)
    for step in dataclasses.fields(recipe.steps):
        stage = getattr(recipe.steps, step.name)
        for name, value in dataclasses.asdict(stage).items() if stage else ():
            # As a person writes it: 1 and not 1.0.
            text = json.dumps(value).replace(".0,", ",").replace(".0}", "}")
            assert fingerprints(read(tmp_path, GOOD, f"steps.{step.name}.{name}={text}")) == want, text
