"""`vesl calibrate` on the store of a real run: against regions counted by hand, with labels of every kind, no model."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.webserver import WebServer
from tests.world import World
from vesl import models
from vesl.pipeline import calibrate
from vesl.pipeline.calibrate import gather, marks, without_scores
from vesl.pipeline.cli import main
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.show import find
from vesl.pipeline.work import incoming
from vesl.transforms.boxes import iou
from vesl.transforms.calibration import curve, parse_labels
from vesl.transforms.filters import SelectRule, judge
from vesl.transforms.found import normalise
from vesl.transforms.records import DETECTION

Found = list[dict[str, Any]]
RULE = {"score": 0.3, "phrase_nms_iou": 0.5, "max_area": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store of 40 grounded images in parts of five; every phrase has two boxes of random scores."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("world"), server)
        world.document["steps"]["select"] = {"rule": RULE}
        world.document["steps"]["ground"]["score_floor"] = 0.02
        world.write()
        world.list_urls("a", world.images(40))
        done = world.run("run", "--until", "ground")
        assert done.returncode == 0, done.stderr
        yield world


def histories(world: World) -> Found:
    return find(make_plan(world.load()), [""])


def labels_of(found: Found, right: float = 0.7, seed: int = 0) -> dict[str, Any]:
    """Labels by which about `right` of all boxes are right, but for the table, which is absent everywhere."""
    rng, annotations, images = np.random.default_rng(seed), [], []
    for i, history in enumerate(found):
        images.append({"id": i, "file_name": f"{history['key']}.jpg", "width": 320, "height": 240})  # twice as large
        for detection in history["detections"]:
            phrase = history["phrases"][detection["phrase"]]["text"]
            x0, y0, x1, y1 = np.array(detection["box"]) * (320, 240, 320, 240)
            if "table" not in phrase and rng.random() < right:
                box = [x0, y0, x1 - x0, y1 - y0]
                annotations.append({"image_id": i, "bbox": box, "phrase": phrase.upper()})
        images[-1]["negatives"] = ["the old table"]
    return {"images": images, "annotations": annotations}


def write(folder: Path, labels: Any) -> str:
    path = folder / "labels.json"
    path.write_text(labels if isinstance(labels, str) else json.dumps(labels), encoding="utf-8")
    return str(path)


def by_hand(plan: Plan, found: Found, labels: dict[str, Any], at: float) -> tuple[int, int]:
    """(regions, right ones) of what the recipe's whole rule with that threshold keeps, of the phrases labelled."""
    import pyarrow as pa

    rule = dataclasses.replace(SelectRule(**RULE), score=at)  # type: ignore[arg-type]
    regions = right = 0
    for image, history in enumerate(found):
        one = pa.array([history["detections"]], pa.list_(DETECTION))
        (verdicts,) = judge(one, pa.array([history["width"]]), pa.array([history["height"]]), rule).to_pylist()
        kept = [d for d, verdict in zip(history["detections"], verdicts, strict=True) if verdict == "kept"]
        free = [a for a in labels["annotations"] if a["image_id"] == image]
        spoken = {normalise(a["phrase"]) for a in free} | set(labels["images"][image]["negatives"])
        for detection in sorted(kept, key=lambda d: -d["score"]):
            phrase = normalise(history["phrases"][detection["phrase"]]["text"])
            if phrase not in spoken:
                continue
            regions += 1
            same = [a for a in free if normalise(a["phrase"]) == phrase]
            boxes = np.array([a["bbox"] for a in same]).reshape(-1, 4) / (320, 240, 320, 240)
            overlaps = iou(np.array([detection["box"]]), np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
            if len(same) and overlaps.max() >= 0.5:
                right += 1
                free.remove(same[int(overlaps.argmax())])
    return regions, right


def test_the_curve_is_what_select_would_keep_at_each_threshold(world: World) -> None:
    plan, found = make_plan(world.load()), histories(world)
    labels = labels_of(found)
    gathered = gather(plan, parse_labels(labels))
    assert (gathered.images, gathered.labelled, gathered.unsure, gathered.unasked) == (40, 40, 0, 0)
    at = np.array([0.0, 0.2, 0.3, 0.55, 0.9])
    result = curve(marks(gathered.detections), marks(gathered.truths), 40, at)
    for i, threshold in enumerate(at.tolist()):
        regions, right = by_hand(plan, found, labels, threshold)
        assert regions > 5
        assert result.detections[i] == regions
        assert result.precision.value[i] == pytest.approx(right / regions)
        assert result.recall.value[i] == pytest.approx(right / len(labels["annotations"]))


def test_the_command_prints_draws_and_opens_no_model(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_model(*arguments: Any) -> None:
        raise AssertionError("a model was opened")

    for name in ("open_captioner", "open_grounder"):
        monkeypatch.setattr(models, name, no_model)
    before, picture = world.files(), tmp_path / "curves.png"
    labels = labels_of(histories(world), right=0.97)
    path = write(tmp_path, labels)
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", str(world.recipe), path, "--precision", "0.5", "--out", str(picture)])
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert "40 of 40 labelled images are in the store" in out
    assert "fewer than 100 images" in out
    assert f"{len(labels['annotations'])} labelled boxes" in out
    pasted = yaml.safe_load(out[out.index("# tests.standins:grounder@1") :].replace(str(picture), ""))
    score = pasted["steps"]["select"]["rule"]["score"]
    made_from = pasted["steps"]["select"]["scores_of"]
    make_plan(world.load(f"steps.select.rule.score={score}", f"steps.select.scores_of={made_from}"))  # it is accepted
    assert "2 words" in out
    assert "1 to 10 %" in out
    with Image.open(picture) as image:
        assert min(image.size) > 800
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20
    assert world.files() == before
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", str(world.recipe), path, "--precision", "0.9999"])
    assert exit_.value.code == 0
    assert "no threshold is sure to give a precision of 0.9999" in capsys.readouterr().out


def test_images_are_known_by_key_hash_or_url(world: World) -> None:
    plan, found = make_plan(world.load()), histories(world)
    labels = labels_of(found)
    whole = gather(plan, parse_labels(labels))
    for name, source in (("key", "key"), ("sha256", "sha256"), ("url", "url"), ("flickr_url", "url")):
        for image, history in zip(labels["images"], found, strict=True):
            for other in ("key", "sha256", "url"):
                image.pop(other, None)
            image |= {"file_name": "some.jpg", name: history[source]}
        assert gather(plan, parse_labels(labels)) == whole
    for image, history in zip(labels["images"], found, strict=True):
        image.pop("flickr_url")
        image["file_name"] = f"{history['sha256']}.jpg"
    assert gather(plan, parse_labels(labels)) == whole


def test_what_the_labels_do_not_speak_about_is_left_out_and_counted(world: World) -> None:
    plan, found = make_plan(world.load()), histories(world)
    labels = labels_of(found)
    whole = gather(plan, parse_labels(labels))
    for image in labels["images"]:
        del image["negatives"]
    labels["annotations"][0]["iscrowd"] = 1
    labels["annotations"].append({"image_id": 1, "bbox": [0, 0, 9, 9], "phrase": "a zebra"})
    labels["images"].append({"id": 99, "key": "0" * 24, "width": 9, "height": 9})
    partly = gather(plan, parse_labels(labels))
    crowd = normalise(labels["annotations"][0]["phrase"])
    same = sum(a["image_id"] == labels["annotations"][0]["image_id"] and normalise(a["phrase"]) == crowd
               for a in labels["annotations"])  # fmt: skip
    assert partly.unspoken > 0
    assert partly.unsure > 0
    assert (partly.unasked, partly.images, partly.labelled) == (1, 40, 41)
    assert len(partly.detections) + partly.unspoken + partly.unsure == len(whole.detections) + whole.unspoken
    assert len(partly.truths) == len(whole.truths) - same


def test_taken_down_images_are_not_used(world: World, tmp_path: Path) -> None:
    import shutil

    store = tmp_path / "store"
    shutil.copytree(world.store, store)
    found = histories(world)
    (store / "takedown").mkdir()
    (store / "takedown/00001.txt").write_text(f"{found[0]['key']}\n{found[1]['url']}\n")
    plan = make_plan(world.load(f"store={store}"))
    assert gather(plan, parse_labels(labels_of(found))).images == 38


def test_a_rule_without_its_thresholds() -> None:
    rule = SelectRule(0.4, max_area=0.3, score_by_words=(0.1, 0.2), score_by_head={"dog": 0.3}, min_grounded=0.5)
    assert without_scores(rule) == SelectRule(0.0, max_area=0.3)


@pytest.mark.parametrize(
    ("labels", "arguments", "says"),
    [
        (None, [], "cannot be read: No such file"),
        ("{", [], "is not JSON"),
        ("\ud83d", [], "is not JSON"),
        ("[" * 100_000, [], ""),
        ({}, [], "images: there are none"),
        ({"images": [{"id": 1, "key": "0" * 24, "width": 9, "height": 9, "negatives": ["a"]}]}, [], "none of the 1"),
        ("box", [], r"is not within its image of 320 x 240 pixels"),
        ("mute", [], "no stored detection is of a phrase that the labels speak about"),
        ("good", ["--precision", "1.5"], "must be between 0 and 1"),
        ("good", ["--precision", "nan"], "must be between 0 and 1"),
        ("good", ["--precision", "much"], "invalid float value"),
        ("good", ["--out", "/nowhere/a.png"], "--out /nowhere/a.png"),
        ("good", ["--out", "a.txt.xyz"], "--out a.txt.xyz"),
    ],
)
def test_mistakes_are_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: Any, arguments: list[str], says: str
) -> None:
    given = labels_of(histories(world)[:3])
    if labels == "box":
        given["annotations"][1]["bbox"][0] = 319
    if labels == "mute":
        given = {"images": [{**image, "negatives": ["a zebra"]} for image in given["images"]]}
    path = tmp_path / "labels.json"
    if labels is not None:
        whole = given if labels in ("good", "box", "mute") else labels
        text = whole if isinstance(whole, str) else json.dumps(whole)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SystemExit) as exit_:
        main(["calibrate", str(world.recipe), str(path), *arguments])
    said = capsys.readouterr().err
    assert exit_.value.code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("vesl")]
    assert len(lines) == 1, said
    assert says in lines[0]


def test_parts_are_read_until_every_labelled_image_is_found(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, found = make_plan(world.load()), histories(world)
    read: list[int] = []
    looked: list[int] = []
    real = calibrate._either
    monkeypatch.setattr(calibrate, "_AHEAD", 2)
    monkeypatch.setattr(calibrate, "incoming", lambda *a: (read.append(a[3]), incoming(*a))[1])
    monkeypatch.setattr(calibrate, "_either", lambda *a: (looked.append(1), real(*a))[1])
    for some in (found[:3], found[5:6] + found[-1:]):
        read.clear()
        looked.clear()
        assert gather(plan, parse_labels(labels_of(some))).images == len(some)
        parts = {history["part"] for history in some}
        assert len(read) == len(parts)
        # Up to the last that was needed, and none beyond those that are looked into together; which of these were begun
        # when the search ended is the threads' affair.
        assert max(parts) < len(looked) - len(read) <= (max(parts) // 2 + 1) * 2


def test_before_anything_is_grounded_it_says_so(world: World) -> None:
    with pytest.raises(RecipeError, match="ground has not done any part yet"):
        gather(make_plan(world.load("steps.ground.score_floor=0.9")), parse_labels(labels_of(histories(world)[:1])))


def test_labels_that_only_name_other_stores_images(world: World) -> None:
    with pytest.raises(RecipeError, match="none of the 1 labelled images is in the store"):
        gather(make_plan(world.load()), parse_labels({
            "images": [{"id": 1, "url": "http://example.org/x.jpg", "width": 9, "height": 9, "negatives": ["a cat"]}]
        }))  # fmt: skip
