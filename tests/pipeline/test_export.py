"""Every export read back by the reader that it is for, against the shards that pack wrote of the same store."""

import contextlib
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image

from tests.webserver import WebServer
from tests.world import ROOT, World, jpeg
from vesl.pipeline import export as exporting
from vesl.pipeline.cli import main
from vesl.pipeline.export import export
from vesl.pipeline.plan import make_plan
from vesl.pipeline.store import Store

HOSTILE = [
    "A <script>alert(1)</script> box | `rm` [link](http://evil.example) and a dog",
    'The old man\u202e\u200b and a "quoted" red ball, {braces} # not a heading',
    "Ein großer Hund und die Straße; a cat on the mat",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store of 14 images in three parts; the shards of its recipe are there too."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("world"), server)
        world.document["steps"]["caption"]["also"] = [{"model": "tests.standins:captioner@1"}]
        world.document["steps"]["select"]["rule"]["score"] = 0.82
        world.document["steps"]["phrases"] = {"rule": {"dedup": False}}
        world.write()
        world.list_urls(
            "a", [*world.images(13, captions=dict(enumerate(HOSTILE))), *world.images(1, 13, {13: "Of the"})]
        )
        done = world.run("run")
        assert done.returncode == 0, done.stderr
        yield world


def shard_samples(world: World) -> dict[str, dict[str, Any]]:
    """The documents of the shards, by key, as the public library reads them."""
    paths = sorted(glob.glob(f"{world.store}/pack/*/shard-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    return {s["__key__"]: {**json.loads(s["json"]), "jpg": s["jpg"]} for s in samples}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def coco(path: Path) -> Any:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco_by_pycocotools(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(make_plan(world.load()), "coco", str(tmp_path / "out"))
    assert "14 images" in capsys.readouterr().out
    samples = shard_samples(world)
    read = coco(tmp_path / "out/annotations/instances_default.json")
    captions = coco(tmp_path / "out/annotations/captions_default.json")
    assert len(read.imgs) == len(samples) == 14
    assert len(read.anns) == sum(len(s["regions"]) for s in samples.values()) > 14
    for number, image in read.imgs.items():
        sample = samples[image["key"]]
        assert (tmp_path / "out/images" / image["file_name"]).read_bytes() == sample["jpg"]
        assert (image["width"], image["height"], image["url"]) == (sample["width"], sample["height"], sample["url"])
        texts = [captions.anns[i]["caption"] for i in captions.getAnnIds(imgIds=[number])]
        assert texts == [caption["text"] for caption in sample["captions"]]
        annotations = read.loadAnns(read.getAnnIds(imgIds=[number]))
        assert [a["phrase"] for a in annotations] == [r["phrase"] for r in sample["regions"]]
        for annotation, region in zip(annotations, sample["regions"], strict=True):
            x, y, w, h = annotation["bbox"]
            sides = np.array([image["width"], image["height"]] * 2)
            np.testing.assert_allclose([x, y, x + w, y + h], np.array(region["box"]) * sides, atol=0.0015)
            assert annotation["score"] == pytest.approx(region["score"], abs=1e-6)
            assert annotation["area"] == pytest.approx(w * h, abs=1)
            caption = captions.anns[annotation["caption_id"]]
            assert caption["image_id"] == number
            assert caption["caption"][slice(*annotation["span"])] == region["phrase"]
            (category,) = read.loadCats([annotation["category_id"]])
            assert category["name"] == " ".join(region["phrase"].lower().split())
    used = [sum(a["category_id"] == c for a in read.anns.values()) for c in sorted(read.cats)]
    assert used == sorted(used, reverse=True)
    assert min(used) > 0


def test_grit_by_pandas(world: World, tmp_path: Path) -> None:
    import pandas

    done = world.run("export", "grit-parquet", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    read = pandas.read_parquet(tmp_path / "out/data")
    assert list(read.columns) == [
        "key", "clip_similarity_vitb32", "clip_similarity_vitl14", "id", "url", "caption", "width", "height",
        "noun_chunks", "ref_exps",
    ]  # fmt: skip
    wanted = {
        (s["key"], caption["text"]): [
            [*r["span"], *r["box"], r["score"]] for r in s["regions"] if r["caption"] == i
        ]
        for s in shard_samples(world).values()
        for i, caption in enumerate(s["captions"])
    }  # fmt: skip
    wanted = {pair: chunks for pair, chunks in wanted.items() if chunks}
    assert len(read) == len(wanted) > 14
    assert f"{len(wanted)} pairs of an image and a caption" in done.stdout
    for row in read.itertuples():
        chunks = np.array([list(chunk) for chunk in row.noun_chunks])
        np.testing.assert_array_equal(chunks.astype(np.float32), np.array(wanted[row.key, row.caption], np.float32))
        np.testing.assert_array_equal(chunks, np.array([list(chunk) for chunk in row.ref_exps]))
    assert read[["clip_similarity_vitb32", "clip_similarity_vitl14", "id"]].isna().all().all()


def test_hugging_face_by_datasets(world: World, tmp_path: Path) -> None:
    done = world.run("export", "hf", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    script = """
import io, json, sys, datasets
data = datasets.load_dataset(sys.argv[1])
assert list(data) == ["train"], data
data = data["train"]
assert isinstance(data.features["image"], datasets.Image), data.features
sizes = {row["key"]: row["image"].size for row in data}
plain = data.cast_column("image", datasets.Image(decode=False))
rows = [{**row, "image": [row["image"]["path"], row["image"]["bytes"].hex(), *sizes[row["key"]]]} for row in plain]
print(json.dumps(rows))
"""
    env = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    read = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert read.returncode == 0, read.stderr
    rows, samples = json.loads(read.stdout), shard_samples(world)
    assert len(rows) == len(samples)
    for row in rows:
        sample = samples[row["key"]]
        name, data, *size = row.pop("image")
        assert (name, bytes.fromhex(data), size) == (f"{row['key']}.jpg", sample["jpg"], [row["width"], row["height"]])
        for name in ("url", "sha256", "alt_text", "captions", "select"):
            assert row[name] == sample[name]
        for mine, theirs in zip(row["regions"], sample["regions"], strict=True):
            assert {k: mine[k] for k in ("phrase", "caption", "span")} == {
                k: theirs[k] for k in ("phrase", "caption", "span")
            }
            np.testing.assert_array_equal(np.float32(mine["box"]), np.float32(theirs["box"]))
            assert np.float32(mine["score"]) == np.float32(theirs["score"])


def test_the_card_says_what_is_in_it_and_shows_hostile_text_as_text(world: World, tmp_path: Path) -> None:
    plan = make_plan(world.load('dataset.name="the <b>web</b>\\n# of `us`"'))
    totals = export(plan, "hf", str(tmp_path / "out"))
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["configs"][0]["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]
    assert yaml.safe_load(front)["size_categories"] == ["n<1K"]
    samples = shard_samples(world).values()
    regions = [r for s in samples for r in s["regions"]]
    assert f"| regions | {len(regions)} |" in body
    assert f"| regions per image | {len(regions) / 14:.2f} |" in body
    assert totals["without_regions"] == sum(not s["regions"] for s in samples) > 0
    assert f"| images without a region | {totals['without_regions']} |" in body
    assert "- tests\\.standins\\:captioner\\@1" in body
    recipe = body.split("```json\n")[1]
    for bad in ("<script", "<b>", "\u202e", "\u200b", "](http", "`rm`"):
        assert bad not in body
    assert "\n# of" not in body
    assert json.loads(recipe.split("\n```")[0])["chain"][0]["step"] == "download"


@pytest.mark.parametrize("kind", ["coco", "grit-parquet", "hf"])
def test_again_changes_nothing_and_every_way_gives_the_same_bytes(world: World, tmp_path: Path, kind: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export(make_plan(world.load()), kind, str(first))
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file() and "data" in path.parts}
    export(make_plan(world.load()), kind, str(first))
    assert before == {path: path.stat().st_mtime_ns for path in before}
    export(make_plan(world.load("dataset.only_parts=1")), kind, str(second))
    assert json.loads((second / ".vesl-export/index.json").read_bytes())["complete"] is False
    export(make_plan(world.load()), kind, str(second))
    assert tree(first) == tree(second)
    assert not list(first.rglob("*.wip"))


def test_killed_at_any_file_and_run_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for kind in exporting.FORMATS:
        export(make_plan(world.load()), kind, str(whole / kind))
        attempts = 0
        for limit in range(1, 60, 4):
            attempts += 1
            if _dies(world, kind, killed / kind, limit, monkeypatch):
                break
        assert attempts > 2
        assert tree(whole / kind) == tree(killed / kind)


def _dies(world: World, kind: str, dest: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Export until `limit` files are written, then fail; whether it came to the end before."""
    left, real_move, real_pipe = [limit], os.replace, None

    def count() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        from fsspec.implementations.local import LocalFileSystem

        real_pipe = LocalFileSystem.pipe_file
        patch.setattr(os, "replace", lambda a, b: (count(), real_move(a, b))[1])
        patch.setattr(LocalFileSystem, "pipe_file", lambda *a, **k: (count(), real_pipe(*a, **k))[1])
        try:
            export(make_plan(world.load()), kind, str(dest))
        except KeyboardInterrupt:
            return False
    return True


def test_images_of_a_killed_export_are_taken_down_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, dest = tmp_path / "store", tmp_path / "out"
    shutil.copytree(world.store, copy)
    assert not _dies(world, "coco", dest, 10, monkeypatch)
    written = [path.stem for path in (dest / "images").glob("*.jpg") if path.stat().st_size]
    assert written
    (copy / "takedown").mkdir()
    (copy / "takedown/00001.txt").write_text("\n".join(written))
    totals = export(make_plan(world.load(f"store={copy}")), "coco", str(dest))
    assert totals["taken_down"] == len(written)
    assert not {path.stem for path in (dest / "images").iterdir()} & set(written)


def test_a_real_kill(world: World, tmp_path: Path) -> None:
    export(make_plan(world.load()), "coco", str(tmp_path / "whole"))
    command = world.command("export", "coco", str(tmp_path / "killed"))
    process = subprocess.Popen(command, cwd=ROOT, env=world.env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("images/*")) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert world.run("export", "coco", str(tmp_path / "killed")).returncode == 0
    assert tree(tmp_path / "whole") == tree(tmp_path / "killed")


@pytest.mark.parametrize("kind", ["coco", "grit-parquet", "hf"])
def test_takedown_is_obeyed_at_once_and_removes_what_was_written(world: World, tmp_path: Path, kind: str) -> None:
    copy = tmp_path / "store"
    shutil.copytree(world.store, copy)
    recipe = f"store={copy}"
    dest = tmp_path / "out"
    export(make_plan(world.load(recipe)), kind, str(dest))
    samples = shard_samples(world)
    first, second, *_ = (key for key, sample in samples.items() if sample["regions"])
    (copy / "takedown").mkdir()
    (copy / "takedown/00001.txt").write_text(f"{first}\n{samples[second]['url']}\n")
    totals = export(make_plan(world.load(recipe)), kind, str(dest))
    assert (totals["images"], totals["taken_down"]) == (12, 2)
    for name, data in tree(dest).items():
        for key in (first, second):
            assert key not in name
            assert key.encode() not in data
            assert samples[key]["jpg"] not in data
    fresh = tmp_path / "fresh"  # of the same store
    export(make_plan(world.load(recipe)), kind, str(fresh))
    assert tree(fresh) == tree(dest)


def test_a_new_takedown_list_rewrites_the_parts_that_it_names_something_in(world: World, tmp_path: Path) -> None:
    copy, dest = tmp_path / "store", tmp_path / "out"
    shutil.copytree(world.store, copy)
    (copy / "takedown").mkdir()
    (copy / "takedown/00001.txt").write_text("nobody.example\n")
    export(make_plan(world.load(f"store={copy}")), "grit-parquet", str(dest))
    before = {path.name: path.stat().st_mtime_ns for path in (dest / "data").iterdir()}
    key = sorted(shard_samples(world))[0]  # keys are cut into parts in order: this one is of the first
    (copy / "takedown/00002.txt").write_text(f"{key}\n")
    totals = export(make_plan(world.load(f"store={copy}")), "grit-parquet", str(dest))
    assert totals["taken_down"] == 1
    after = {path.name: path.stat().st_mtime_ns for path in (dest / "data").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"grit-00000.parquet"}
    (copy / "takedown/00002.txt").unlink()
    assert export(make_plan(world.load(f"store={copy}")), "grit-parquet", str(dest))["images"] == 14


def test_into_and_out_of_a_bucket(world: World, tmp_path: Path, s3_options: dict[str, Any]) -> None:
    overrides = [f"storage_options.{name}={value}" for name, value in s3_options.items()]
    bucket = f"s3://bucket/{tmp_path.name}"
    remote = Store(f"{bucket}/store", s3_options)
    remote.fs.put(f"{world.store}/", f"{remote.root}/", recursive=True)
    plan = make_plan(world.load(f"store={bucket}/store", "dataset.only_parts=0", *overrides))
    for kind in ("coco", "hf"):
        export(make_plan(world.load("dataset.only_parts=0")), kind, str(tmp_path / kind))
        export(plan, kind, f"{bucket}/{kind}")
        out = Store(f"{bucket}/{kind}", s3_options)
        found = {path.removeprefix(out.root).strip("/"): out.fs.cat_file(path) for path in out.fs.find(out.root)}
        assert found == tree(tmp_path / kind)


def test_small_batches_and_small_files(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pandas

    monkeypatch.setattr(exporting, "_BATCH_BYTES", 2 * len(jpeg(0)))
    monkeypatch.setattr(exporting, "_FILE_BYTES", 1)
    export(make_plan(world.load()), "hf", str(tmp_path / "hf"))
    files = sorted((tmp_path / "hf/data").iterdir())
    assert len(files) > 6
    read = pandas.concat([pandas.read_parquet(path) for path in files])
    assert list(read["key"]) == sorted(shard_samples(world))
    export(make_plan(world.load()), "coco", str(tmp_path / "coco"))
    assert len(list((tmp_path / "coco/images").iterdir())) == 14
    assert Image.open(next((tmp_path / "coco/images").iterdir())).size == (160, 120)


def test_mistakes_are_one_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, file, done, damaged = (tmp_path / name for name in ("full", "file", "done", "damaged"))
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    file.write_text("")
    export(make_plan(world.load()), "grit-parquet", str(done))
    (tmp_path / "link").symlink_to(world.store)
    for name in ("index", "part-00001"):
        shutil.copytree(done, tmp_path / name)
        (tmp_path / name / f".vesl-export/{name}.json").write_text("[1")
    shutil.copytree(world.store, damaged)
    for tar in damaged.glob("download/*/*.tar"):
        tar.write_bytes(tar.read_bytes()[:600])
    for arguments, says in [
        (["coco", str(full)], "is not empty and no export of ours"),
        (["coco", str(file)], "File exists"),
        (["coco", str(Path(world.store) / "export")], "lies in the store"),
        (["coco", str(tmp_path / "link/export")], "lies in the store"),
        (["grit-parquet", str(tmp_path / "index")], "index.json is damaged"),
        (["grit-parquet", str(tmp_path / "part-00001")], "part-00001.json is damaged"),
        (["coco", str(done)], "holds another export: grit-parquet of select/"),
        (["grit-parquet", str(done), "--set", "steps.select.rule.score=0.9"], "select has not done any part yet"),
        (["grit-parquet", str(done), "--set", "dataset.only_parts=0"], "which this recipe does not have"),
        (["hf", "s3://"], "names no bucket"),
        (["hf", "nosuch://x"], "nosuch"),
        (["yolo", str(tmp_path / "new")], "invalid choice"),
        (["hf", str(tmp_path / "new"), "--set", f"store={damaged}"], "shorter than the table that cites it says"),
    ]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(["export", str(world.recipe), *arguments])
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if says in line]
        assert exit_.value.code == 2, (arguments, said)
        assert len(lines) == 1, (arguments, said)
        assert lines[0].startswith("vesl")
    assert tree(full) == {"thesis.tex": b"years of work"}
