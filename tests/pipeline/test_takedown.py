"""Takedown: lists that every reader obeys at once, and a compaction after which nothing named is left in any file."""

import hashlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.webserver import WebServer
from tests.world import ROOT, World, jpeg
from vesl.pipeline import ingest as ingesting
from vesl.pipeline import journal
from vesl.pipeline import run as running
from vesl.pipeline.compact import compact, finish, spans
from vesl.pipeline.engines import Engine, Event, Listener, local
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.run import run
from vesl.pipeline.store import Store, StoreError
from vesl.pipeline.takedown import TakedownError, add, named, obeyed, who
from vesl.pipeline.work import Attempt, Job, run_part
from vesl.transforms.takedown import Takedown
from vesl.transforms.urls import key

JOURNAL = "takedown/compaction-00001.json"
OTHER_FILTER = ("steps.select.rule.score=0.6",)
BY_REFERENCE = ("steps.pack.images=reference",)


def listed(world: World, *entries: str) -> str:
    path = world.folder / "list.txt"
    path.write_text("\n".join(entries) + "\n", encoding="utf-8")
    return str(path)


def url(world: World, i: int) -> str:
    return f"{world.server.url}/{i}.jpg"


def caption(i: int) -> str:
    return f"A red ball and {i} green boxes on the old table"


def inline(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
    """An engine without workers, which is quicker where there are a dozen images."""
    for part in parts:
        for index, step in enumerate(job.steps):
            footer, fresh = run_part(job, index, part, lambda stage: stage.open(), Attempt())
            listen(Event("done", step.name, part, footer=footer, fresh=fresh))


@pytest.fixture(scope="module", autouse=True)
def _inline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run", inline)
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """13 samples in 3 parts, packed three times: by two filters, and by reference."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("world"), server)
        world.list_urls("a", [*world.images(12), (f"{server.url}/gone.jpg", "Nothing to see")])
        for overrides in ((), OTHER_FILTER, BY_REFERENCE):
            assert run(world.load(*overrides))[1]
        yield world


@pytest.fixture
def filled(template: World, tmp_path: Path) -> World:
    """A copy of it."""
    shutil.copytree(template.folder, tmp_path / "world", copy_function=shutil.copy2)
    world = World(tmp_path / "world", template.server)
    world.document["dataset"]["source"] = template.document["dataset"]["source"]
    world.write()
    return world


def plans(world: World) -> list[Plan]:
    return [make_plan(world.load(*overrides)) for overrides in ((), OTHER_FILTER, BY_REFERENCE)]


def everything(store: Store) -> Iterator[tuple[str, bytes]]:
    """Every file of a store as its bytes, and what lies in it packed: columns of tables, members of tars."""
    for path in sorted(store.fs.find(store.root)):
        name = path.removeprefix(f"{store.root}/")
        data = store.read(name)
        yield name, data
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(data))
            yield f"{name} (rows)", repr(table.to_pylist()).encode()
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    yield f"{name}: {member.name}", file.read()


def traces(store: Store, needles: list[bytes]) -> list[str]:
    """The files that still hold one of the needles, but for the lists."""
    return [
        name
        for name, data in everything(store)
        if not name.startswith("takedown/") and any(needle in data or needle in name.encode() for needle in needles)
    ]


def needles(world: World, i: int, plan: Plan) -> list[bytes]:
    """By what sample i can be known in a file."""
    name = key(url(world, i))
    stored = next(data for member, data in everything(plan.store) if member.endswith(f": {name}.jpg"))
    found = [name, url(world, i), caption(i), hashlib.sha256(stored).hexdigest(), hashlib.sha256(jpeg(i)).hexdigest()]
    return [*(text.encode() for text in found), stored]


def bytes_of(world: World) -> dict[str, bytes]:
    """Every file whose bytes are a result's."""
    found = world.contents("input", "download", "caption", "phrases", "ground", "select", "pack")
    return {**found, "dataset.json": (Path(world.store) / "dataset.json").read_bytes()}


def assert_done(world: World) -> None:
    """Plan and run find nothing to do, and every file fits to the others."""
    before = world.files()
    for overrides in ((), OTHER_FILTER, BY_REFERENCE):
        plan, complete = run(world.load(*overrides))
        assert complete
        assert not any(plan.missing(step) for step in plan.steps)
    assert world.files() == before
    for plan in plans(world):
        index = plan.store.read_json(f"{plan.steps[-1].folder}/index.json")
        for shard in index["shards"]:
            data = plan.store.read(f"{plan.steps[-1].folder}/{shard['name']}")
            assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                documents = [json.loads(tar.extractfile(m).read()) for m in tar if m.name.endswith(".json")]  # type: ignore[union-attr]
            assert shard["samples"] == len(documents)
            assert shard["regions"] == sum(len(document["regions"]) for document in documents)
            for place in (document["image"] for document in documents if "image" in document):
                span = (place["offset"], place["offset"] + place["size"])
                (image,) = plan.store.read_ranges(place["tar"], [span])
                assert hashlib.sha256(image).hexdigest() in [document["sha256"] for document in documents]


def test_compaction_leaves_nothing_and_everything_linked(filled: World) -> None:
    plan = plans(filled)[0]
    wanted = needles(filled, 5, plan)
    assert len({name.split("/")[0] for name in traces(plan.store, wanted)}) == 7  # input and six steps
    (part,) = [p for p in plan.parts if key(url(filled, 5)) in _keys(plan, p)]
    before = filled.files()
    done = filled.run("takedown", listed(filled, "# by order", url(filled, 5)), "--compact")
    assert done.returncode == 0, done.stderr
    assert "removed 1 samples of 1 parts" in done.stdout
    assert traces(plan.store, wanted) == []
    after = filled.files()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    other = {name for name in changed if f"-{part:05d}" not in name}
    kinds = {name.rpartition("/")[2] for name in other}
    assert kinds <= {"00001.txt", "compaction-00001.json", "index.json", "dataset.json", "00000.json"}
    assert not [name for name in after if ".wip" in name]
    assert_done(filled)
    record = json.loads((Path(filled.store) / "dataset.json").read_text())["ingests"][0]
    assert (record["rows"], record["kept"], record["taken_down"]) == (13, 12, 1)


def _keys(plan: Plan, part: int) -> list[str]:
    return plan.store.read_table(plan.job().inputs[part], ["key"])["key"].to_pylist()  # type: ignore[no-any-return]


class Killed(BaseException):
    pass


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Die in place of the n-th change of the store."""
    left = {"writes": math.inf}
    monkeypatch.setattr(os, "fsync", lambda file: None)  # not the machine dies

    def dying(real: Any) -> Any:
        def change(*args: Any) -> Any:
            left["writes"] -= 1
            if left["writes"] < 0:
                raise Killed
            return real(*args)

        return change

    for name in ("create", "replace", "publish", "remove", "sweep"):
        monkeypatch.setattr(Store, name, dying(getattr(Store, name)))
    yield left
    left["writes"] = math.inf


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_a_write_and_run_again_gives_the_same_bytes(
    filled: World, kill_at: dict[str, float], step: int
) -> None:
    path, pristine = listed(filled, key(url(filled, 3)), url(filled, 7)), filled.folder / "pristine"
    store = Store(filled.store)
    add(store, path)
    shutil.copytree(filled.store, pristine)
    assert compact(store) == (2, len(who(Store(str(pristine))).keys))
    want, at = bytes_of(filled), 0
    assert not traces(store, [key(url(filled, i)).encode() for i in (3, 7)])
    while True:
        shutil.rmtree(filled.store)
        shutil.copytree(pristine, filled.store)
        kill_at["writes"] = at
        try:
            compact(store)
            break
        except Killed:
            kill_at["writes"] = math.inf
        if at % 2 or store.read_json(JOURNAL) is None:
            compact(store)
        else:
            finish(store)  # as `vesl run` does
        assert bytes_of(filled) == want, f"after a death at write {at}"
        assert journal.newest(store)[1]["state"] == "done"
        at += step
    assert at > 30
    assert_done(filled)


@pytest.mark.parametrize("at", [7, 15, 24, pytest.param(30, marks=pytest.mark.slow)])
def test_lists_that_come_after_a_death_cost_no_links(filled: World, kill_at: dict[str, float], at: int) -> None:
    """What is half rewritten is finished for the lists that it was begun for; then the new ones have their turn."""
    store, plan = Store(filled.store), plans(filled)[0]
    (part,) = [p for p in plan.parts if key(url(filled, 3)) in _keys(plan, p)]
    other = next(i for i in range(12) if i != 3 and key(url(filled, i)) in _keys(plan, part))
    add(store, listed(filled, key(url(filled, 3))))
    kill_at["writes"] = at
    with pytest.raises(Killed):
        compact(store)
    kill_at["writes"] = math.inf
    add(store, listed(filled, url(filled, other)))
    assert filled.run("plan").returncode == 0
    finish(store)
    assert not traces(store, [key(url(filled, i)).encode() for i in (3, other)])
    assert_done(filled)  # so no caption had to be made again
    (ingest,) = store.read_json("dataset.json")["ingests"]
    assert (ingest["kept"], ingest["taken_down"]) == (11, 2)


def test_two_compactions_and_a_run_never_go_together(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(filled.store)
    add(store, listed(filled, key(url(filled, 3))))
    elsewhere = {"state": "running", "host": "elsewhere", "pid": 1, "updated": time.time(), "lists": [], "parts": []}

    with monkeypatch.context() as patch:  # another takes the same place in the row just before
        create = Store.create
        patch.setattr(Store, "create", lambda self, name, data: create(self, name, data) and not name.endswith(".json"))
        with pytest.raises(StoreError, match="another compaction has just begun"):
            journal.begin(store)
    assert run(filled.load())[1]  # that one died: finished here
    assert not traces(store, [key(url(filled, 3)).encode()])

    def run_begins(there: Store, name: str, data: bytes) -> bool:
        there.write_json("runs/29990101-000000-elsewhere-1/run.json", elsewhere)
        return create(there, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", run_begins)
        with pytest.raises(StoreError, match="a run is at work"):
            compact(store)
    shutil.rmtree(Path(filled.store) / "runs" / "29990101-000000-elsewhere-1")
    assert journal.newest(store)[1]["state"] == "done"

    shutil.rmtree(Path(filled.store) / "pack")

    def compaction_begins(self: Any) -> Any:
        number = journal.newest(store)[0] + 1
        store.write_json(f"takedown/compaction-{number:05d}.json", elsewhere)
        return enter(self)

    with monkeypatch.context() as patch:
        enter = running.Record.__enter__
        patch.setattr(running.Record, "__enter__", compaction_begins)
        with pytest.raises(StoreError, match="a compaction is at work on elsewhere"):
            run(filled.load())
    assert not list((Path(filled.store) / "pack").glob("*/*.tar"))
    newest = sorted((Path(filled.store) / "runs").iterdir())[-1]
    assert json.loads((newest / "run.json").read_text())["state"] == "ended: StoreError"


def test_a_compaction_between_plan_and_index_is_seen(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(filled.store)
    add(store, listed(filled, key(url(filled, 3))))
    made = running.make_plan

    def slow(*arguments: Any, **named: Any) -> Plan:
        plan = made(*arguments, **named)
        compact(store)
        return plan

    monkeypatch.setattr(running, "make_plan", slow)
    with pytest.raises(StoreError, match="a compaction went on meanwhile; run again"):
        run(filled.load())
    monkeypatch.setattr(running, "make_plan", made)
    assert_done(filled)


def test_a_compaction_in_the_middle_of_an_ingest_keeps_the_counts(
    filled: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, (path, real) = Store(filled.store), (filled.folder / "more.jsonl", ingesting._ingest)
    path.write_text(json.dumps({"url": f"{filled.server.url}/new.jpg", "alt": "new"}) + "\n")
    filled.document["dataset"]["source"] = [filled.document["dataset"]["source"], str(path)]
    filled.write()

    def slow(*arguments: Any) -> dict[str, Any]:
        entry = real(*arguments)
        add(store, listed(filled, key(url(filled, 3))))
        compact(store)
        return entry

    monkeypatch.setattr(ingesting, "_ingest", slow)
    assert run(filled.load())[1]
    first, second = store.read_json("dataset.json")["ingests"]
    assert (first["kept"], first["taken_down"], second["kept"]) == (12, 1, 1)


@pytest.mark.slow  # half a minute
def test_signs_of_life_come_also_where_nothing_happens(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_BEAT_S", 0.02)
    monkeypatch.setattr(running, "_RECORD_EVERY_S", 1e9)
    seen: list[float] = []

    def silent(job: Job, parts: Sequence[int], engine: Engine, listen: Listener) -> None:
        (record,) = (path for path in (Path(filled.store) / "runs").glob("*/run.json") if path not in before)
        first = json.loads(record.read_text())["updated"]
        while not seen or seen[-1] == first:
            seen.append(json.loads(record.read_text())["updated"])
            time.sleep(0.01)

    before = list((Path(filled.store) / "runs").glob("*/run.json"))
    shutil.rmtree(Path(filled.store) / "pack")
    monkeypatch.setattr(running, "carry", lambda engine: silent)
    assert not run(filled.load())[1]
    assert len(set(seen)) == 2
    assert json.loads(sorted((Path(filled.store) / "runs").glob("*/run.json"))[-1].read_text())["state"] == "done"


def test_what_a_compaction_costs(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parts that are not touched, only the input table is read, once; no folder is listed twice."""
    store = Store(filled.store)
    (touched,) = [p for p in plans(filled)[0].parts if key(url(filled, 3)) in _keys(plans(filled)[0], p)]
    add(store, listed(filled, key(url(filled, 3))))
    asked: dict[str, list[str]] = {"read_table": [], "footer": [], "names": []}

    def noted(name: str) -> Any:
        real = getattr(Store, name)

        def call(self: Store, *arguments: Any) -> Any:
            asked[name].append(arguments[0])
            return real(self, *arguments)

        return call

    for name in asked:
        monkeypatch.setattr(Store, name, noted(name))
    compact(store)
    others = [name for name in asked["read_table"] + asked["footer"] if f"-{touched:05d}." not in name]
    assert sorted(Path(name).parts[0] for name in others) == ["input"] * 2
    listings = [name for name in asked["names"] if name.partition("/")[0] not in ("takedown", "runs")]
    twice = {name for name in listings if listings.count(name) > 1}
    assert {name.partition("/")[0] for name in twice} <= {"input"}


def test_notes_of_a_killed_run_go_too(filled: World) -> None:
    store = Store(filled.store)
    store.write_json("runs/.beam-0123/told/1.json", {"text": f"failed on {url(filled, 3)}"})
    add(store, listed(filled, url(filled, 3)))
    compact(store)
    assert not (Path(filled.store) / "runs" / ".beam-0123").exists()


def test_show_and_evaluation_obey_the_lists_at_once(filled: World) -> None:
    from vesl.models.cloc.options import Evaluation
    from vesl.models.cloc.sets import SetError, open_set

    plan = plans(filled)[0]
    rows = {row["key"]: row for p in plan.parts for row in plan.store.read_table(plan.steps[0].table(p)).to_pylist()}
    one, two, store = key(url(filled, 3)), key(url(filled, 7)), Store(filled.store)
    pairs = Evaluation(kind="pairs", shards=f"{filled.store}/{plan.steps[-1].folder}")
    assert len(open_set("s", pairs, {}).pictures) == 12
    add(store, listed(filled, one, rows[two]["source_sha256"]))
    source = open_set("s", pairs, {})
    taken = 2 if rows[two]["sha256"] == rows[two]["source_sha256"] else 1
    assert (len(source.pictures), source.skipped["taken_down"]) == (12 - taken, taken)
    for name in (one, two):
        shown = filled.run("show", name)
        assert shown.returncode == 0, shown.stderr
        assert "a takedown list names it" in shown.stdout
        assert not [text for text in (url(filled, 3), url(filled, 7), caption(3), caption(7)) if text in shown.stdout]
    few = filled.run("show").stdout
    assert one not in few
    assert two not in few
    store.create("takedown/by-hand.txt", b"what is this")
    with pytest.raises(SetError, match=r"takedown lists of .* cannot be read: .*by-hand.txt:1: "):
        open_set("s", pairs, {})


def test_vesl_run_finishes_what_a_killed_command_began(filled: World) -> None:
    path = listed(filled, key(url(filled, 3)))
    done = shutil.copytree(filled.store, filled.folder / "other")
    add(Store(str(done)), path)
    compact(Store(str(done)))
    with subprocess.Popen(filled.command("takedown", path, "--compact"), env=filled.env(), cwd=ROOT) as process:
        while not (Path(filled.store) / JOURNAL).exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert json.loads((Path(filled.store) / JOURNAL).read_text())["state"] == "running"
    assert run(filled.load())[1]
    assert filled.contents("pack", "select", "download", "input") == {
        name: (Path(done) / name).read_bytes() for name in filled.contents("pack", "select", "download", "input")
    }
    assert_done(filled)


def test_while_a_run_or_a_compaction_is_at_work_nothing_is_removed(filled: World) -> None:
    store = Store(filled.store)
    add(store, listed(filled, key(url(filled, 3))))
    record = {"state": "running", "host": "elsewhere", "pid": 1, "updated": time.time() - 5, "parts": []}
    store.write_json("runs/29990101-000000-elsewhere-1/run.json", record)
    before = filled.files("pack")
    with pytest.raises(StoreError, match=r"a run is at work on elsewhere \(process 1, last sign . s ago\)"):
        compact(store)
    refused = filled.run("takedown", str(filled.folder / "list.txt"), "--compact")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    store.write_json("runs/29990101-000000-elsewhere-1/run.json", record | {"updated": time.time() - 10_000})
    store.write_json(JOURNAL, record)
    with pytest.raises(StoreError, match="a compaction is at work on elsewhere"):
        compact(store)
    with pytest.raises(StoreError, match="a compaction is at work on elsewhere"):
        run(filled.load())
    assert filled.files("pack") == before
    store.write_json(JOURNAL, record | {"updated": 0, "lists": []})  # its process is gone
    assert run(filled.load())[1]
    assert filled.files("pack") != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"example.com\nnot a domain\n", ":2: 'not a domain' is more than one entry"),
        (b"# nothing\n", "names nothing"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_lists_that_cannot_be_used(filled: World, text: bytes | None, says: str) -> None:
    path = filled.folder / "bad.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(TakedownError) as caught:
        add(Store(filled.store), str(path))
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)
    assert not (Path(filled.store) / "takedown").exists()


@pytest.mark.parametrize("damage", ["cut", "header", "images"])
def test_damage_is_told_and_what_to_do_about_it(filled: World, damage: str) -> None:
    """Silence would be worst: a broken header is the end to many readers of tars, and the samples after it are lost."""
    plan = plans(filled)[0]
    first = min(range(12), key=lambda i: key(url(filled, i)))  # so that what is damaged is another's, that stays
    name, wanted = key(url(filled, first)), needles(filled, first, plan)
    (part,) = [p for p in plan.parts if name in _keys(plan, p)]
    step = plan.steps[0 if damage == "images" else -1]
    footer = plan.store.footer(step.table(part))
    assert footer is not None
    tar = Path(filled.store, step.folder, footer["tar"]["name"] if "tar" in footer else footer["shards"][0]["name"])
    whole = tar.read_bytes()
    at = whole.rindex(b"ustar") if damage == "header" else 0
    tar.write_bytes(whole[: len(whole) // 3] if damage != "header" else whole[: at - 50] + b"x" * 40 + whole[at - 10 :])
    removed = filled.run("takedown", listed(filled, name), "--compact")
    assert removed.returncode == 2, removed.stderr
    assert "Traceback" not in removed.stderr
    said = f"{step.folder}/{tar.name} is damaged ("
    assert said in removed.stderr
    above = step.table(part) if damage == "images" else step.folder
    assert f"Remove {above} from the store and run this again" in removed.stderr
    place = Path(filled.store, above)
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    again = filled.run("takedown", listed(filled, name), "--compact")
    assert again.returncode == 0, again.stderr
    done = filled.run("run")
    assert done.returncode == 0, done.stderr
    assert traces(plan.store, wanted) == []


def test_versions_and_what_is_told(filled: World) -> None:
    store = Store(filled.store)
    first = filled.run("takedown", listed(filled, key(url(filled, 3))))
    assert first.returncode == 0, first.stderr
    assert "takedown/00001.txt: stored" in first.stdout
    assert "name 1 samples that are in the store, in part" in first.stdout
    assert add(store, str(filled.folder / "list.txt")) == ("takedown/00001.txt", False)
    assert add(store, listed(filled, "example.com")) == ("takedown/00002.txt", True)
    assert (obeyed(store).domains, len(obeyed(store).keys)) == ({"example.com"}, 1)
    store.create("takedown/by-hand.txt", b"what is this")
    with pytest.raises(StoreError, match=r"takedown/by-hand.txt:1: .* mend or remove this list"):
        obeyed(store)
    broken = filled.run("run")
    assert (broken.returncode, broken.stderr.count("\n")) == (2, 1)


def test_who_is_named(filled: World) -> None:
    plan = plans(filled)[0]
    rows = {row["key"]: row for p in plan.parts for row in plan.store.read_table(plan.steps[0].table(p)).to_pylist()}
    everyone = {key(url(filled, i)) for i in range(12)} | {key(f"{filled.server.url}/gone.jpg")}
    one = rows[key(url(filled, 4))]
    for takedown, want in (
        (Takedown(), set()),
        (Takedown(keys=frozenset([one["key"]])), {one["key"]}),
        (Takedown(urls=frozenset([url(filled, 4)])), {one["key"]}),
        (Takedown(sha256=frozenset([one["sha256"]])), {one["key"]}),
        (Takedown(sha256=frozenset([one["source_sha256"]])), {one["key"]}),
        (Takedown(domains=frozenset(["127.0.0.1"])), everyone),
        (Takedown(domains=frozenset(["example.com"])), set()),
    ):
        assert set(named(plan, takedown).to_pylist()) == want
        assert named(plan, takedown).type == pa.string()


def test_unfinished_parts_do_not_pack_what_is_named(template: World, tmp_path: Path) -> None:
    world = World(tmp_path / "new", template.server)
    world.document["dataset"]["source"] = template.document["dataset"]["source"]
    world.write()
    assert run(world.load(), "caption")[1]
    plan = make_plan(world.load())
    stored = [row for p in plan.parts for row in plan.store.read_table(plan.steps[0].table(p)).to_pylist()]
    by_hash = next(row for row in stored if row["sha256"])
    before = next(row for row in stored if row["key"] != by_hash["key"] and row["sha256"])
    store = Store(world.store)
    add(store, listed(world, by_hash["source_sha256"], before["key"]))
    plan, complete = run(world.load())
    assert complete
    rejected = [plan.done["phrases"][p]["counts"]["rejected"] for p in plan.parts]
    assert sum(counts.get("taken_down", 0) for counts in rejected) == 2
    packed = plan.store.read_json(f"{plan.steps[-1].folder}/index.json")
    assert packed["samples"] == 10
    compact(store)
    assert not traces(store, [by_hash["key"].encode(), before["key"].encode()])
    assert run(world.load())[0].store.read_json(f"{plan.steps[-1].folder}/index.json")["samples"] == 10


def test_later_ingests_leave_out_what_is_named(filled: World) -> None:
    store = Store(filled.store)
    plan = plans(filled)[0]
    stored = {row["key"]: row for p in plan.parts for row in store.read_table(plan.steps[0].table(p)).to_pylist()}
    known_by_hash = stored[key(url(filled, 6))]["sha256"]
    add(store, listed(filled, url(filled, 3), known_by_hash, "bad.example"))
    compact(store)
    more = [(url(filled, 3), "again"), (url(filled, 6), "again"), ("http://cdn.bad.example/a.jpg", "x")]
    filled.document["dataset"]["source"] = [filled.document["dataset"]["source"], str(filled.folder / "more.jsonl")]
    rows = [*more, (url(filled, 1), "twice"), (f"{filled.server.url}/new.jpg", "new")]
    lines = [json.dumps({"url": u, "alt": a}) for u, a in rows]
    (filled.folder / "more.jsonl").write_text("\n".join(lines) + "\n")
    filled.write()
    assert run(filled.load())[1]
    first, second = store.read_json("dataset.json")["ingests"]
    assert (first["kept"], first["taken_down"]) == (11, 2)
    assert {name: second[name] for name in ("rows", "kept", "duplicate_url", "taken_down")} == {
        "rows": 5, "kept": 1, "duplicate_url": 1, "taken_down": 3,
    }  # fmt: skip
    for ingest in (first, second):
        dropped = sum(ingest[name] for name in ("duplicate_url", "no_url", "malformed", "taken_down"))
        assert ingest["rows"] == ingest["kept"] + dropped
    assert not traces(store, [key(url(filled, 3)).encode(), key(url(filled, 6)).encode()])


def test_copies_of_what_goes_do_not_name_it(tmp_path: Path, server: WebServer) -> None:
    world = World(tmp_path, server)
    world.document["steps"]["dedup"] = {}
    world.write()
    rows = [*world.images(8), *((server.add(f"/copy{i}.jpg", jpeg(2)), f"Copy number {i} of it") for i in range(3))]
    world.list_urls("a", rows)
    plan, complete = run(world.load())
    assert complete
    same = [u for u, _ in rows if u.endswith("/2.jpg") or "copy" in u]
    place = {name: (p, i) for p in plan.parts for i, name in enumerate(_keys(plan, p))}
    first, *others = sorted(map(key, same), key=place.__getitem__)
    assert [name for name in traces(plan.store, [first.encode()]) if "copies-" in name]
    add(plan.store, listed(world, first))
    compact(plan.store)
    assert traces(plan.store, [first.encode()]) == []
    dedup = plan.steps[1]
    tables = [row for p in plan.parts for row in plan.store.read_table(dedup.table(p)).to_pylist()]
    assert [(row["outcome"], row["detail"]) for row in tables if row["key"] in others] == [
        ("rejected", "taken_down")
    ] * 3
    before = world.files()
    assert run(world.load())[1]
    assert world.files() == before


def test_a_store_in_a_bucket(filled: World, tmp_path: Path, s3_options: dict[str, Any]) -> None:
    bucket = Store(f"s3://bucket/{tmp_path.name}", s3_options)
    bucket.fs.put(f"{filled.store}/", f"{bucket.root}/", recursive=True)
    path = listed(filled, key(url(filled, 3)), url(filled, 7))
    for store in (Store(filled.store), bucket):
        add(store, path)
        assert compact(store)[0] == 2
    assert traces(bucket, [key(url(filled, 3)).encode()]) == []
    there = {p.removeprefix(f"{bucket.root}/") for p in bucket.fs.find(bucket.root)}
    want = {name for name in filled.files() if not name.startswith("runs/")}
    assert {name for name in there if not name.startswith("runs/")} == want
    for name in want:
        assert bucket.read(name) == Store(filled.store).read(name), name


def test_parts_are_told_in_runs() -> None:
    assert spans([3]) == "parts 3"
    assert spans({5, 0, 1, 2, 9}) == "parts 0-2, 5, 9"
    assert spans(range(0, 100, 2)).endswith("36, 38, ...")


def test_a_compacted_part_is_what_the_rest_alone_would_have_given(filled: World, tmp_path: Path) -> None:
    assert filled.run("takedown", listed(filled, key(url(filled, 3))), "--compact").returncode == 0
    compacted = filled.contents("caption", "phrases", "ground", "select", "pack")
    for step in ("caption", "phrases", "ground", "select", "pack"):
        shutil.rmtree(Path(filled.store) / step)
    for overrides in ((), OTHER_FILTER, BY_REFERENCE):
        assert run(filled.load(*overrides))[1]
    assert filled.contents("caption", "phrases", "ground", "select", "pack") == compacted
