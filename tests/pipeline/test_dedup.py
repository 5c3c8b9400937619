"""Copies over the whole data set: real photographs through real runs, and the search against the slow way."""

import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.photos import photo
from tests.pipeline.test_takedown import inline
from tests.transforms.test_hashes import PHOTOS, cropped, jpeg
from tests.webserver import WebServer
from tests.world import ROOT, World
from vesl.pipeline import dedup
from vesl.pipeline import run as running
from vesl.pipeline.engines import Engine, EngineError, Listener, local
from vesl.pipeline.ingest import connect, input_tables
from vesl.pipeline.plan import make_plan
from vesl.pipeline.progress import Tally
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.run import run
from vesl.pipeline.steps.dedup import Dedup
from vesl.pipeline.store import Store
from vesl.pipeline.work import Job
from vesl.transforms import urls

CAPTION = "A red ball on the old table"


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


def serve(world: World, images: dict[str, bytes]) -> list[tuple[str, str]]:
    """Serve images under their names; return the rows of a list."""
    return [(world.server.add(f"/{name}.jpg", data), f"{CAPTION} {i}") for i, (name, data) in enumerate(images.items())]


@functools.cache
def album() -> dict[str, bytes]:
    """Eight photographs and copies of three of them, 13 images: `a-exact` is a copy of `a`, and so on."""
    images = {chr(ord("a") + i): jpeg(photo(place)) for i, place in enumerate(PHOTOS)}
    images["a-exact"] = images["a"]
    images["a-small"] = jpeg(half(photo(PHOTOS[0])), 80)
    images["b-bad"] = jpeg(photo(PHOTOS[1]), 35)
    images["c-cut"] = jpeg(cropped(photo(PHOTOS[2]), 0.005))
    images["blank"], images["blank-other"] = (jpeg(Image.new("RGB", (90, 70), c)) for c in ("white", "#fdfdfd"))
    return images


@pytest.fixture(scope="module", autouse=True)
def _inline() -> Iterator[None]:
    """Within this process there are no workers, which is quicker; `vesl run` has its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run", inline)
        yield


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


@pytest.fixture
def photos(tmp_path: Path, web: WebServer) -> World:
    """A world with `dedup` in its recipe, and nothing in its lists yet."""
    world = World(tmp_path, web)
    world.document["steps"]["dedup"] = {}
    world.write()
    return world


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory: pytest.TempPathFactory, web: WebServer) -> World:
    """The album, downloaded."""
    world = World(tmp_path_factory.mktemp("album"), web)
    world.list_urls("a", serve(world, album()))
    run(world.load(), "download")
    return world


@pytest.fixture
def filled(photos: World, downloaded: World) -> World:
    """A copy of it."""
    shutil.copytree(downloaded.store, photos.store)
    photos.document["dataset"]["source"] = downloaded.document["dataset"]["source"]
    photos.write()
    return photos


def verdicts(world: World, *overrides: str) -> dict[str, tuple[str | None, str | None, int]]:
    """What dedup said of each image by its name: reason, detail with a name for the key, part."""
    plan = make_plan(world.load(*overrides))
    step = next(step for step in plan.steps if step.name == "dedup")
    rows = []
    tables = input_tables(plan.dataset or {})
    names = {}
    for part, table in enumerate(tables):
        for row in plan.store.read_table(table, ["key", "url"]).to_pylist():
            names[row["key"]] = row["url"].rpartition("/")[2].removesuffix(".jpg")
        if part in plan.done["dedup"]:
            rows += [(row, part) for row in plan.store.read_table(step.table(part)).to_pylist()]
    found = {}
    for row, part in rows:
        assert row["outcome"] == ("rejected" if row["reason"] else "kept")
        key, _, rest = (row["detail"] or "").partition(" ")
        found[names[row["key"]]] = (row["reason"], f"{names.get(key, key)} {rest}".strip() or None, part)
    return found


def expected(world: World, images: Sequence[str]) -> dict[str, str | None]:
    """The reason of each image: of those that begin with the same letter, the first by its key's order stays."""
    keys = {name: urls.keys([f"{world.server.url}/{name}.jpg"])[1][0] for name in images}
    first: dict[str, str] = {}
    want: dict[str, str | None] = {}
    for name in sorted(images, key=keys.__getitem__):
        family = name if name.startswith("blank") else name[0]
        exact = {"a", "a-exact"} >= {name} and any(
            want.get(n, "") != "" and n in want for n in {"a", "a-exact"} - {name}
        )
        want[name] = ("duplicate_exact" if exact else "duplicate_near") if family in first else None
        first.setdefault(family, name)
    return want


def test_copies_are_in_no_shard(photos: World) -> None:
    images = album()
    photos.list_urls("a", serve(photos, images))
    done = photos.run("run")
    assert done.returncode == 0, done.stderr
    found = verdicts(photos)
    want = expected(photos, list(images))
    assert {name: reason for name, (reason, _, _) in found.items()} == want
    assert sum(reason is not None for reason in want.values()) == 4
    for name, (reason, detail, _) in found.items():
        assert (detail is None) == (reason is None)
        if detail:
            assert detail[0] == name[0]
            assert ("bits differ" in detail) == (reason == "duplicate_near")

    members, digests = set(), set()
    for shard in Path(photos.store).glob("pack/*/shard-*.tar"):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                members.add(member.name.split(".")[0])
                digests.add(hashlib.sha256(file.read()).hexdigest())
    plan = make_plan(photos.load())
    kept, gone = set(), set()
    for part in plan.parts:
        rows = plan.store.read_table(plan.steps[1].table(part), ["key", "outcome"]).to_pylist()
        kept |= {row["key"] for row in rows if row["outcome"] == "kept"}
        gone |= {row["key"] for row in rows if row["outcome"] != "kept"}
    assert members == kept
    assert len(gone) == 4
    near = {hashlib.sha256(images[name]).hexdigest() for name, reason in want.items() if reason == "duplicate_near"}
    assert not near & digests
    for step in ("caption", "phrases", "ground", "select", "pack"):
        for data in photos.contents(step).values():
            assert not [key for key in gone if key.encode() in data]

    before = photos.files()
    assert run(photos.load())[1]
    assert photos.files() == before
    (copy,) = [name for name, (reason, _, _) in found.items() if reason == "duplicate_exact"] or ["a-small"]
    key = urls.keys([f"{photos.server.url}/{copy}.jpg"])[1][0]
    shown = photos.run("show", key).stdout
    assert f"rejected {found[copy][0]}: " in shown


def test_until_and_mistakes(photos: World, tmp_path: Path) -> None:
    photos.list_urls("a", serve(photos, {"a": album()["a"]}))
    run(photos.load(), "dedup")
    plan = make_plan(photos.load())
    assert {name for name, parts in plan.done.items() if parts} == {"download", "dedup"}
    with pytest.raises(RecipeError, match="the recipe has no such step"):
        run(photos.load("steps.dedup=null"), "dedup")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_text("0123\n")
    (tmp_path / "bad.csv").write_text("name,hash\nx,1\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "list.doc").touch()
    for options, says in {
        "distance=9": "steps.dedup.distance: 9 is not between 0 and 8, or null",
        "evaluation=[/no/such]": "steps.dedup.evaluation: /no/such: there is no such file or folder",
        f"evaluation=[{tmp_path}/empty]": "a folder without images",
        f"evaluation=[{tmp_path}/list.doc]": "is neither an image nor a list",
        "evaluation_sha256=x": "unknown key",
    }.items():
        with pytest.raises(RecipeError) as caught:
            photos.load(f"steps.dedup.{options}")
        assert says in str(caught.value)
    for name, says in {"bad.txt": "is no sha256", "bad.csv": "has neither phash", "bad.parquet": "bad.parquet"}.items():
        with pytest.raises(RecipeError) as caught:
            run(photos.load(f"steps.dedup.evaluation=[{tmp_path}/{name}]"))
        assert f"steps.dedup.evaluation: {tmp_path}/bad" in str(caught.value)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_evaluation_images_are_removed(filled: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = album()
    folder = tmp_path / "val"
    (folder / "deep").mkdir(parents=True)
    photo(PHOTOS[0]).save(folder / "deep" / "one.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "readme.md").write_text("not looked at")
    option = f"steps.dedup.evaluation=[{folder}]"
    run(filled.load(option), "dedup")
    found = verdicts(filled, option)
    mine = {name: (reason, detail) for name, (reason, detail, _) in found.items() if name[0] == "a"}
    assert {reason for reason, _ in mine.values()} == {"contaminated"}
    assert all((detail or "").startswith("val/deep/one.png (") for _, detail in mine.values())
    assert {reason for name, (reason, _, _) in found.items() if name[0] != "a"} == {None, "duplicate_near"}
    assert "broken.jpg is found by its bytes only (not_an_image" in capfd.readouterr().err
    want = {name for name, (reason, _, _) in found.items() if reason == "contaminated"}

    # The same images as lists: the hashes that the run above stored, and what people may have.
    (stored,) = Path(filled.store).glob("dedup/*/evaluation.parquet")
    shutil.copy(stored, tmp_path / "list.parquet")
    hashes = pq.read_table(stored).to_pylist()
    one = next(row for row in hashes if row["phash"] is not None)
    digits = one["phash"].to_bytes(8, "big", signed=True).hex()
    (tmp_path / "list.txt").write_text(f"{digits}\n{'0' * 64}\n")
    (tmp_path / "list.csv").write_text(f"name,phash,sha256\none,{digits.upper()},\ntwo,,{'1' * 64}\n")
    (tmp_path / "sha.txt").write_text(hashlib.sha256(images["a"]).hexdigest())
    for name, removed in {
        "list.parquet": want,
        "list.txt": want,
        "list.csv": want,
        "sha.txt": {"a", "a-exact"},
    }.items():
        option = f"steps.dedup.evaluation=[{tmp_path / name}]"
        run(filled.load(option), "dedup")
        again = verdicts(filled, option)
        assert {image for image, (reason, _, _) in again.items() if reason == "contaminated"} == removed
    assert any(name in (again["a"][1] or "") for name in ("sha.txt:1",))


def test_the_identity_follows_the_evaluation_images_content(photos: World, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return make_plan(photos.load(f"steps.dedup.evaluation=[{path}]")).steps[1].fingerprint

    one, two = tmp_path / "here" / "val", tmp_path / "there" / "val"
    for folder in (one, two):
        folder.mkdir(parents=True)
        (folder / "x.jpg").write_bytes(jpeg(photo(PHOTOS[0])))
    assert fingerprint(one) == fingerprint(two)
    (two / "x.jpg").write_bytes(jpeg(photo(PHOTOS[1])))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(one) != make_plan(photos.load()).steps[1].fingerprint
    plan = make_plan(photos.load())
    assert plan.steps[2].parent == plan.steps[1].fingerprint


def test_exact_copies_only(filled: World) -> None:
    run(filled.load("steps.dedup.distance=null"), "dedup")
    found = verdicts(filled, "steps.dedup.distance=null")
    reasons = [reason for reason, _, _ in found.values() if reason]
    assert reasons == ["duplicate_exact"]


def test_a_run_on_few_parts_freezes_nothing(photos: World) -> None:
    images = album()
    early = [name for name in images if len(name) == 1]  # copies come in a later ingest: so in parts of their own
    photos.list_urls("a", serve(photos, {name: images[name] for name in early}))
    run(photos.load(), "download")
    photos.list_urls("b", serve(photos, {name: images[name] for name in images if name not in early}))
    run(photos.load(), "dedup")
    want, whole = photos.contents("dedup"), verdicts(photos)
    assert {part for reason, _, part in whole.values() if reason} <= {2, 3}
    shutil.rmtree(Path(photos.store) / "dedup")
    few = "dataset.only_parts=2-3"
    assert run(photos.load(few), "caption")[1]
    alone = verdicts(photos, few)
    assert {part for _, _, part in alone.values()} == {2, 3}
    assert {name for name in alone if alone[name][0] is None and whole[name][0]} >= {"b-bad", "c-cut"}
    assert make_plan(photos.load()).done["dedup"].keys() == set()
    plan, complete = run(photos.load(), "caption")
    assert complete
    assert plan.done["caption"].keys() == set(plan.parts)
    assert verdicts(photos) == whole
    assert {n: d for n, d in photos.contents("dedup").items() if n in want} == want
    before = photos.files("dedup") | photos.files("caption")
    assert make_plan(photos.load(few), "caption").todo() == ()  # the whole run's verdicts are good for them too
    assert run(photos.load(few), "caption")[1]
    assert photos.files("dedup") | photos.files("caption") == before


def test_parts_that_come_later_change_no_verdict(photos: World) -> None:
    images = album()
    early, late = list(images)[:7], list(images)[7:]
    photos.list_urls("a", serve(photos, {name: images[name] for name in early}))
    assert run(photos.load(), "caption")[1]
    before, tables = verdicts(photos), photos.files()
    photos.list_urls("b", serve(photos, {name: images[name] for name in late}))
    assert run(photos.load(), "caption")[1]
    found = verdicts(photos)
    assert {name: found[name] for name in before} == before
    assert {name for name in before if found[name][0]} == set()
    assert {name for name, (reason, _, _) in found.items() if reason} == {"a-exact", "a-small", "b-bad", "c-cut"}
    after = photos.files()
    changed = {name for name in tables if after[name] != tables[name]}
    assert {Path(name).name for name in changed} == {"dataset.json"}


def test_an_adopted_caption_brings_the_copies_it_was_made_without(filled: World) -> None:
    assert run(filled.load(), "caption")[1]
    plan = make_plan(filled.load())
    use = f"steps.caption.use={plan.steps[2].fingerprint}"
    other = ("steps.dedup.distance=0", use)
    assert make_plan(filled.load(*other)).steps[1].fingerprint == plan.steps[1].fingerprint
    before = filled.files()
    assert run(filled.load(*other), "caption")[1]
    assert {n for n in filled.files() if n not in before} <= {n for n in filled.files() if n.startswith("runs/")}


def test_without_all_downloads_there_is_no_verdict(
    photos: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    photos.list_urls("a", serve(photos, album()))

    def lossy(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
        local.run(job, [part for part in parts if part != 1], engine, listen)

    with monkeypatch.context() as patch:
        patch.setattr(running, "carry", lambda engine: lossy)
        plan, complete = run(photos.load(), "caption")
    assert not complete
    assert plan.done["download"].keys() == {0, 2}
    assert not plan.done["dedup"]
    assert not plan.done["caption"]
    assert "dedup: 1 of 3 parts are not downloaded (1), so nothing after it can start" in capfd.readouterr().err
    assert run(photos.load(), "caption")[1]


_DYING = """
import os, signal, sys
import vesl.pipeline.cli as cli
from vesl.pipeline import dedup
from vesl.pipeline.store import Store
place, left = sys.argv[1], int(sys.argv[2])
owner = Store if place in ("publish", "sweep") else dedup
inner = getattr(owner, place)
def dying(*arguments, **more):
    global left
    mine = owner is dedup or "copies-" in str(arguments[-1])
    left -= mine
    if mine and left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments, **more)
setattr(owner, place, dying)
cli.main(["run", sys.argv[3], "--until", "dedup"])
"""


def test_killed_in_the_pass_and_run_again(filled: World) -> None:
    run(filled.load(), "dedup")
    want = filled.contents("dedup")
    assert len(want) == 3 + 2  # tables, the copies, step.json
    for place, after in (("publish", 0), ("sweep", 0), ("_publish", 2)):
        shutil.rmtree(Path(filled.store) / "dedup")
        command = [sys.executable, "-c", _DYING, place, str(after), str(filled.recipe)]
        died = subprocess.run(command, cwd=ROOT, env=filled.env(), capture_output=True, timeout=100)
        assert died.returncode == -signal.SIGKILL, (place, died.stderr)
        assert filled.contents("dedup") != want
        assert run(filled.load(), "dedup")[1]
        assert filled.contents("dedup") == want
        assert not list(Path(filled.store).rglob("*.wip"))


def test_two_runs_at_once(filled: World) -> None:
    commands = [filled.command("run", "--until", "dedup") for _ in range(2)]
    processes = [
        subprocess.Popen(c, cwd=ROOT, env=filled.env(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for c in commands
    ]
    for process in processes:
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 0, said
    got = filled.contents("dedup")
    shutil.rmtree(Path(filled.store) / "dedup")
    run(filled.load(), "dedup")
    assert filled.contents("dedup") == got


def test_too_little_memory_is_one_line(filled: World) -> None:
    for memory in ("1KiB", "much"):
        with pytest.raises(EngineError) as caught:
            run(filled.load(f"engine.dedup.memory={memory}"))
        assert f"engine.dedup.memory (now {memory}) may be too little" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_store_in_a_bucket(filled: World, tmp_path: Path, s3_options: dict[str, Any]) -> None:
    run(filled.load(), "dedup")
    want = {n: d for n, d in filled.contents("dedup").items() if n.endswith(".parquet")}
    bucket = Store(f"s3://bucket/{tmp_path.name}", s3_options)
    for step in ("input", "download"):
        bucket.fs.put(f"{filled.store}/{step}/", f"{bucket.root}/{step}/", recursive=True)
    bucket.create("dataset.json", Store(filled.store).read("dataset.json"))
    filled.document |= {"store": f"s3://bucket/{tmp_path.name}", "storage_options": s3_options}
    filled.write()
    assert run(filled.load(), "dedup")[1]
    assert {name: bucket.read(name) for name in want} == want


def slowly(rows: list[tuple[int, str | None, str | None, int | None]], most: int | None) -> dict[int, tuple[str, int]]:
    """place -> (reason, place of the earlier one), by looking at all pairs."""
    found = {}
    for i, (place, *mine, phash) in enumerate(rows):
        exact, near = [], []
        for other, *theirs, hashed in rows[:i]:
            if {*mine} & {*theirs} - {None}:
                exact.append(other)
            known = most is not None and phash is not None and hashed is not None
            if known and ((phash ^ hashed) & (1 << 64) - 1).bit_count() <= most:
                near.append(other)
        if any(other < 0 for other in exact + near):
            found[place] = ("contaminated", min(exact + near))
        elif exact or near:
            found[place] = ("duplicate_exact", min(exact)) if exact else ("duplicate_near", min(near))
    return {place: verdict for place, verdict in found.items() if place >= 0}


@pytest.mark.parametrize("most", [None, 0, 1, 4, 6])
@pytest.mark.parametrize("masked", [True, False])
def test_the_search_finds_what_looking_at_all_pairs_finds(
    most: int | None, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:  # so few hashes would be compared all with all
        steps = {0: (most or 0) + 1, (most or 0) + 1: (most or 0) + 3}
        monkeypatch.setattr(dedup, "bands", lambda count, distance, above: steps.get(above, distance))
        monkeypatch.setattr(dedup, "CROWD", 4)
    chance = np.random.default_rng(most or 99)
    rows: list[tuple[int, str | None, str | None, int | None]] = []
    bases = [int(b) for b in chance.integers(-(1 << 63), 1 << 63, 12, dtype=np.int64)]
    for place in [*range(-20, 0), *((i // 30 << 32) + i % 30 for i in range(400))]:
        bits = int(chance.integers(0, 1 << 63)) & int(chance.integers(0, 1 << 63)) & int(chance.integers(0, 1 << 63))
        bits &= int(chance.integers(0, 1 << 63)) if chance.random() < 0.7 else -1
        phash = None if chance.random() < 0.1 else bases[chance.integers(12)] ^ bits
        sha, source = (f"{chance.integers(0, 300):032x}" * 2 for _ in range(2))
        rows.append((place, sha, None if chance.random() < 0.2 else source, phash))
    with connect(Store(str(tmp_path))) as db:
        db.execute("CREATE TABLE images (place BIGINT, key VARCHAR, sha256 UUID, source UUID, phash BIGINT)")
        columns = zip(*rows, strict=True)
        names = ("place", "sha256", "source_sha256", "phash")
        table = pa.table(dict(zip(names, map(pa.array, columns), strict=True)))
        dedup._add(db, table.append_column("key", table["place"].cast(pa.string())))
        dedup.compare(db, most, lambda line: None)
        found = db.sql(dedup._COPIES).fetchall()
    got = {int(key): (reason, int(detail.split(" ")[0])) for _, key, reason, detail in found}
    want = slowly(rows, most)
    assert got == want
    assert list(got) == sorted(got)
    assert len({reason for reason, _ in want.values()}) >= 2


def test_pieces_end_with_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_PIECE", 10)
    parts = [part for part in range(30) for _ in range(part % 7)] + [30] * 50 + [31]
    columns = [parts, [f"{i:024x}" for i in range(len(parts))], ["x"] * len(parts), ["y"] * len(parts)]
    table = pa.table(columns, schema=dedup.COPIES)
    sizes = set()
    for size in (1, 7, 1000):
        batches = pa.RecordBatchReader.from_batches(table.schema, table.to_batches(max_chunksize=size))
        pieces = list(dedup._pieces(batches))
        assert pa.concat_tables(pieces).equals(table)
        assert all(a["part"][-1].as_py() < b["part"][0].as_py() for a, b in itertools.pairwise(pieces))
        sizes.add(tuple(map(len, pieces)))
    assert len(sizes) == 1
    file = io.BytesIO()
    with pq.ParquetWriter(file, dedup.COPIES) as writer:
        for piece in pieces:
            writer.write_table(piece, row_group_size=len(piece))
    got = dict(dedup._by_part(pq.ParquetFile(file), range(0, 40, 2)))
    assert {part: len(rows) for part, rows in got.items()} == {part: parts.count(part) for part in range(0, 40, 2)}


def test_which_parts_a_table_knows_of() -> None:
    assert list(dedup.spans([0, 1, 2, 5, 7, 8])) == ["0", "0-1", "0-2", "0-2,5", "0-2,5,7", "0-2,5,7-8"]
    assert list(dedup.spans([])) == []
    tables = {part: {"consumed": text} for part, text in zip([3, 5, 6], dedup.spans([3, 5, 6]), strict=True)}
    assert dedup.fitting(tables, [3, 5, 6]).keys() == {3, 5, 6}
    assert dedup.fitting(tables, [5, 6]).keys() == {3, 5, 6}
    assert dedup.fitting(tables, [3, 4, 5, 6]).keys() == {3}
    assert dedup.fitting(tables, [3, 5, 6, 7, 9]).keys() == {3, 5, 6}
    assert dedup.fitting(tables, range(7)).keys() == set()
    assert dedup.fitting({99: {"consumed": "0-99"}}, range(100)).keys() == {99}


def test_the_funnel_tells_the_reasons(photos: World) -> None:
    photos.list_urls("a", serve(photos, album()))
    plan, _ = run(photos.load(), "dedup")
    count = Tally.of(plan).counts["dedup"]
    assert (count.rows, count.kept, count.rejected.total()) == (14, 10, 4)
    newest = sorted((Path(photos.store) / "runs").iterdir())[-1]
    record = json.loads((newest / "run.json").read_text())
    assert record["progress"]["dedup"]["rows"] == 14
    assert record["progress"]["download"]["rows"] == 14  # told once, although looked at twice
    assert Dedup().opens_model is False
    assert os.path.exists(newest)
