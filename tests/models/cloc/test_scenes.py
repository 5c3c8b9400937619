"""Scenes: the same bytes however they are made, true boxes, the noise that was asked for, and survival of kills."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import webdataset
from PIL import Image

from vesl.models.cloc import scenes
from vesl.models.cloc.scene_shards import described, generate
from vesl.models.cloc.scenes import COLOURS, Scenes, draw, phrase_classes, sample
from vesl.transforms.records import Sample
from vesl.transforms.shards import decode, encode

SMALL = Scenes(train=70, test=20, samples_per_shard=30)
QUIET = Scenes(missing=0, duplicated=0, shifted=0, wrong_phrase=0, caption_noise=0)
CLASSES = phrase_classes()


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def samples(folder: Path) -> Iterator[tuple[str, bytes, Sample]]:
    """Key, JPEG and facts of every sample below, in order."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
        for (jpg, image), (name, facts) in zip(members[::2], members[1::2], strict=True):
            assert jpg.removesuffix(".jpg") == name.removesuffix(".json")
            yield name.removesuffix(".json"), image, decode(facts)


def said_of(phrase: str) -> str:
    """The class that a phrase of the training part speaks of."""
    words = phrase.lower().split()
    return " ".join(w for w in words if w not in ("a", "an", "the", "small", "large"))


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate(tmp_path_factory.mktemp("scenes") / "world", SMALL, workers=1)


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    return [sample(Scenes(), "train", i)[1] for i in range(900)]


def test_classes_are_texture_colour_and_shape() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 128
    assert CLASSES[0] == "red circle"
    assert CLASSES[-1] == "striped pink moon"


@pytest.mark.parametrize(
    ("options", "split", "golden"),
    [
        (Scenes(), "train", "1366fbb5ed9016476fb8a9e3"),
        (Scenes(), "test", "9c46c590726ee31dd969db71"),
        (Scenes(seed=3, image_px=96, objects=(1, 6)), "train", "97a7d8fea7127b1ff7dc9b39"),
    ],
)
def test_the_bytes_stay_as_they_are(options: Scenes, split: scenes.Split, golden: str) -> None:
    """Where this fails, the world is another one: a mistake, or `VERSION` goes up."""
    digest = hashlib.sha256()
    for number in range(40):
        image, facts = sample(options, split, number)
        digest.update(image + encode(facts))
    assert (scenes.VERSION, digest.hexdigest()[:24]) == (1, golden)


def test_any_number_of_processes_writes_the_same_bytes(world: Path, tmp_path: Path) -> None:
    told: list[int] = []
    assert generate(tmp_path / "again", SMALL, told.append, workers=3) == tmp_path / "again"
    assert contents(tmp_path / "again") == contents(world)
    assert told == [30, 30, 10, 20]


def test_two_generations_may_fill_one_folder(world: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: generate(tmp_path, SMALL, workers=1), range(2))) == [tmp_path] * 2
    assert contents(tmp_path) == contents(world)


def test_a_finished_world_is_left_alone(tmp_path: Path) -> None:
    options = replace(SMALL, train=30, test=10, samples_per_shard=10)
    generate(tmp_path, options, workers=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    told: list[int] = []
    generate(tmp_path, options, told.append)
    assert not told
    for other in (replace(options, train=20), replace(options, test=20), replace(options, shifted=0.9)):
        with pytest.raises(ValueError, match="name another folder"):
            generate(tmp_path, other, told.append)
    assert not told
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_the_index_says_what_the_pack_step_would_say(world: Path) -> None:
    for split, total in (("train", 70), ("test", 20)):
        index = json.loads((world / split / "index.json").read_bytes())
        assert set(index) == {"complete", "samples", "regions", "shards", "recipe", "chain"}
        assert index["complete"] is True
        assert index["recipe"] == described(SMALL, split)  # type: ignore[arg-type]
        found = list(samples(world / split))
        assert index["samples"] == len(found) == total == len({key for key, _, _ in found})
        assert index["regions"] == sum(len(facts.regions) for _, _, facts in found)
        assert [shard["name"] for shard in index["shards"]] == [p.name for p in sorted((world / split).glob("*.tar"))]
        for shard in index["shards"]:
            data = (world / split / shard["name"]).read_bytes()
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            assert len(data) % tarfile.RECORDSIZE == 0
            assert data.endswith(bytes(2 * tarfile.BLOCKSIZE))
        assert sum(shard["samples"] for shard in index["shards"]) == total


def test_every_sample_decodes_and_fits_its_image(world: Path) -> None:
    keys = set()
    for split in ("train", "test"):
        for number, (key, image, facts) in enumerate(samples(world / split)):
            keys.add(key)
            assert key == facts.key == hashlib.sha256(f"0/{split}/{number}".encode()).hexdigest()[:24]
            assert facts.sha256 == hashlib.sha256(image).hexdigest()
            with Image.open(io.BytesIO(image)) as opened:
                assert (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (facts.width, facts.height))
            scores = [region.score for region in facts.regions]
            assert scores == sorted(scores, reverse=True)
            assert all(0 < score < 1 for score in scores)
    assert len(keys) == 90


def test_the_public_library_reads_the_shards(world: Path) -> None:
    urls = [str(path) for path in sorted((world / "train").glob("*.tar"))]
    dataset: Any = webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    rows = list(dataset)
    assert len(rows) == 70
    assert all(row["jpg"].size == (64, 64) and row["json"]["key"] == row["__key__"] for row in rows)


@pytest.mark.parametrize("px", [64, 96, 128])
def test_boxes_are_tight_around_what_is_drawn(px: int) -> None:
    rng = np.random.default_rng(px)
    cut = 0
    for _ in range(60):
        scene = draw(rng, Scenes(image_px=px))
        assert scene.image.shape == (px, px, 3)
        for thing in scene.things:
            ys, xs = np.nonzero(thing.mask)
            fine = np.array(thing.box) * px * 4
            assert fine == pytest.approx(np.round(fine), abs=1e-9)
            x0, y0, x1, y1 = np.round(fine) / 4
            # The box is of quarter pixels and the mask of whole ones, so they agree after rounding outwards.
            assert (xs.min(), ys.min()) == (int(x0), int(y0))
            assert (xs.max() + 1, ys.max() + 1) == (int(np.ceil(x1)), int(np.ceil(y1)))
            cut += x0 == 0 or y0 == 0 or x1 == px or y1 == px
            assert 0.6 <= thing.visible <= 1.001
    assert cut  # some objects are partly outside


def test_what_is_seen_of_an_object_is_in_the_image() -> None:
    """The visible share counts what lies on top, and those pixels have the colour that the name says."""
    rng = np.random.default_rng(3)
    right = total = 0
    for _ in range(40):
        scene = draw(rng, Scenes(objects=(2, 4)))
        for i, thing in enumerate(scene.things):
            left = thing.mask.copy()
            for other in scene.things[i + 1 :]:
                left = left * (1 - other.mask)
            inside = 0 not in thing.box and 1 not in thing.box
            if inside:
                assert left.sum() / thing.mask.sum() == pytest.approx(thing.visible, abs=2e-3)
            if thing.name.startswith("striped"):
                continue
            shown = scene.image[left == 1].astype(int)
            nearest = np.argmin(((shown[:, None] - np.array(list(COLOURS.values()))) ** 2).sum(-1), axis=1)
            right += int((nearest == list(COLOURS).index(thing.name.split()[0])).sum())
            total += len(shown)
    assert total > 5000
    assert right == total


def test_shapes_and_stripes_differ_at_the_smallest_size() -> None:
    """Masks of one size and place, turned at random: the nearest shape by overlap is the shape itself."""
    rng = np.random.default_rng(0)
    px, side = 64, 16.0

    def centred(shape: str) -> np.ndarray:
        mask, _, (x0, y0, x1, y1) = scenes._shape(rng, shape, side, px)
        part = Image.fromarray((mask * 255).astype(np.uint8)).crop(
            (int(x0 * px), int(y0 * px), int(x1 * px), int(y1 * px))
        )
        return np.asarray(part.resize((24, 24)), dtype=float) / 255

    known = [(shape, centred(shape)) for shape in scenes.SHAPES for _ in range(25)]
    hits = 0
    for shape in scenes.SHAPES:
        for _ in range(10):
            new = centred(shape)
            hits += min(known, key=lambda pair: float(np.abs(pair[1] - new).sum()))[0] == shape
    assert hits >= 76  # of 80


def test_the_test_part_is_clean(world: Path) -> None:
    for number in range(100):
        _, facts = sample(Scenes(), "test", number)
        rng = np.random.default_rng((0, 1, number))
        things = draw(rng, Scenes(), distinct=True).things
        assert Counter((r.phrase, r.box) for r in facts.regions) == Counter((t.name, t.box) for t in things)
        assert len({t.name for t in things}) == len(things)
        assert {r.phrase for r in facts.regions} <= set(CLASSES)
    noisy = replace(SMALL, missing=0.5, wrong_phrase=0.5, caption_noise=0.9, train=1, seed=0)
    assert sample(noisy, "test", 5) == sample(SMALL, "test", 5)


def test_relations_are_true() -> None:
    seen: Counter[str] = Counter()
    for number in range(200):
        _, facts = sample(Scenes(objects=(2, 2)), "test", number)
        text = facts.captions[0].text
        boxes = [r.box for r in sorted(facts.regions, key=lambda r: r.span)]
        (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in boxes)
        truths = {" left of ": ax < bx, " right of ": ax > bx, " above ": ay < by, " below ": ay > by}
        for words, true in truths.items():
            if words in text:
                seen[words] += 1
                assert true, text
    assert min(seen.values()) > 5
    assert len(seen) == 4


def test_every_class_occurs_and_none_much_more_than_others(many: list[Sample]) -> None:
    counts = Counter(said_of(region.phrase) for facts in many for region in facts.regions)
    assert set(counts) == set(CLASSES)
    assert max(counts.values()) < 2.2 * sum(counts.values()) / 128
    tests = Counter(r.phrase for i in range(400) for r in sample(Scenes(), "test", i)[1].regions)
    assert set(tests) == set(CLASSES)


def test_texts_vary(many: list[Sample]) -> None:
    texts = [facts.captions[0].text for facts in many]
    assert len(set(texts)) > 0.99 * len(texts)
    assert not any("  " in text or "a orange" in text.lower() or "an red" in text.lower() for text in texts)
    phrases = Counter(r.phrase.lower().split()[0] for facts in many for r in facts.regions)
    assert min(phrases[word] for word in ("a", "an", "the", "small", "large", "red")) > 10
    assert any(facts.alt_text.startswith("IMG_") for facts in many)
    assert sum(facts.alt_text.split(" ")[-1] in scenes.SHAPES for facts in many) > 0.5 * len(many)


def test_an_untouched_training_part_has_every_object_once() -> None:
    for number in range(100):
        _, facts = sample(QUIET, "train", number)
        things = draw(np.random.default_rng((0, 0, number)), QUIET).things
        assert Counter((said_of(r.phrase), r.box) for r in facts.regions) == Counter((t.name, t.box) for t in things)


@pytest.mark.parametrize("kind", ["missing", "duplicated", "shifted", "wrong_phrase", "caption_noise"])
def test_noise_has_the_rate_that_was_asked_for(kind: str) -> None:
    rate, hits, cases = 0.3, 0, 0
    noise: dict[str, Any] = {kind: rate}
    options = replace(QUIET, **noise, objects=(3, 4))
    for number in range(200):
        _, facts = sample(options, "train", number)
        things = draw(np.random.default_rng((0, 0, number)), options, False).things
        if len({t.name for t in things}) < len(things):
            continue
        name_of = {t.box: t.name for t in things}
        exact = [r for r in facts.regions if r.box in name_of]
        wrong = sum(name_of[r.box] != said_of(r.phrase) for r in exact)
        cases += 1 if kind == "caption_noise" else len(things)
        if kind == "missing":
            hits += len(things) - len(facts.regions)
        elif kind == "duplicated":
            assert len(exact) == len(things)
            hits += len(facts.regions) - len(things)
        elif kind == "shifted":
            assert len(facts.regions) == len(things)
            hits += len(things) - len(exact)
        elif kind == "wrong_phrase":
            assert len(exact) == len(things)
            hits += wrong
        else:
            assert wrong + len(things) - len(facts.regions) <= 1
            hits += wrong or len(things) - len(facts.regions)
        if kind not in ("missing", "caption_noise"):
            assert {said_of(r.phrase) for r in facts.regions} <= set(name_of.values())
    assert hits / cases == pytest.approx(rate, abs=0.06)


def test_scenes_of_other_sizes_and_crowds() -> None:
    for options in (Scenes(image_px=32, objects=(8, 8)), Scenes(objects=(1, 1), caption_noise=1), Scenes(image_px=200)):
        for number in range(5):
            image, facts = sample(options, "train", number)
            assert Image.open(io.BytesIO(image)).size == (options.image_px,) * 2
            assert len(facts.captions) == 1


@pytest.mark.parametrize(
    "wrong", [{"missing": 1.5}, {"objects": (3, 2)}, {"objects": (0, 2)}, {"image_px": 8}, {"samples_per_shard": 0}]
)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Scenes(**wrong)


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    shard, index = tmp_path / "test/shard-00000-000.tar", tmp_path / "test/index.json"
    shard.parent.mkdir()
    shard.write_bytes(b"precious")
    for text in ("", '{"complete": true, "shards": [], "recipe": {"dataset": {}}}', "[]", "{", '{"recipe": null}'):
        if text:
            index.write_text(text)
        with pytest.raises(ValueError, match=r"^.*/test holds something else .* name another folder$"):
            generate(tmp_path, SMALL, lambda count: pytest.fail("drew scenes for nothing"))
        assert not text or index.read_text() == text
    assert shard.read_bytes() == b"precious"


def test_a_killed_generation_leaves_nothing_behind(tmp_path: Path) -> None:
    """Kill -9 in the middle: the processes that draw end too, and the next try gives a whole folder."""
    options = replace(SMALL, train=450, test=10, samples_per_shard=150)
    killed, code = tmp_path / "killed", "import sys; from vesl.models.cloc.scene_shards import *; "
    code += f"from vesl.models.cloc.scenes import Scenes; generate({str(killed)!r}, {options!r}, print)"
    with subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"150\n"
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 2
    deadline = time.monotonic() + 60
    while any(map(lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, children))
    (killed / "train/scenes-0.wip").write_bytes(b"half")
    assert json.loads((killed / "train/index.json").read_bytes())["complete"] is False
    for folder in (killed, tmp_path / "whole"):
        generate(folder, options, workers=1)
    assert contents(killed) == contents(tmp_path / "whole")


@pytest.mark.parametrize("after", ["start", "first shard"])
def test_ctrl_c_is_no_wall_of_text(tmp_path: Path, after: str) -> None:
    """A terminal interrupts all processes at once; only the first of them speaks."""
    code = f"""
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
from vesl.models.cloc import scene_shards as s
begun = s.ProcessPoolExecutor.submit
def submit(*args):
    print("start", flush=True)
    return begun(*args)
s.ProcessPoolExecutor.submit = submit
try:
    s.generate({str(tmp_path)!r}, s.{replace(SMALL, train=6000)!r}, lambda n: print("first shard", flush=True))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while process.stdout.readline().strip() != after:
            pass
        time.sleep(0.15 if after == "start" else 0)  # while the processes start
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out.endswith("stopped\n")
    assert err == ""
