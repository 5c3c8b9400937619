"""A store on a bad day: what passes is borne, what does not is one clear line, and nothing half is taken as done."""

import io
import random
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.faulty import Choose, Fault, FaultyProxy
from tests.world import World, without_time
from vesl.pipeline.gc import clear, results
from vesl.pipeline.plan import make_plan
from vesl.pipeline.store import Store, StoreFault, encode_table

ONCE = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}  # so that it is our own tries that are seen
KINDS = ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("ray", "beam"))]


@pytest.fixture
def proxy(s3_options: dict[str, Any]) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_options["endpoint_url"]) as running:
        yield running


@pytest.fixture
def bucket(tmp_path: Path, proxy: FaultyProxy, s3_options: dict[str, Any]) -> Store:
    """A store behind the proxy; its driver sends each request once."""
    return Store(f"s3://bucket/{tmp_path.name}", {**s3_options, "endpoint_url": proxy.url, **ONCE})


def first(fault: Fault, method: str = "", times: int = 1) -> Choose:
    """The fault, for the first few requests of that method to each path."""
    return lambda how, path, before: fault if method in ("", how) and before < times else None


@pytest.mark.parametrize("fault", ["503", "409", "drop", "cut", "slow"])
def test_every_operation_bears_a_fault_that_passes(bucket: Store, proxy: FaultyProxy, fault: Fault) -> None:
    data = encode_table(pa.table({"key": ["a", "b"]}), {"part": 0})
    proxy.choose = first(fault)
    assert bucket.create("t/part-00000.parquet", data)
    bucket.replace("x.json", b"12")
    assert bucket.read("t/part-00000.parquet") == data
    assert bucket.read_ranges("x.json", [(0, 1), (1, 2)]) == [b"1", b"2"]
    assert bucket.names("t") == bucket.names("t", "part-") == ["part-00000.parquet"]
    assert bucket.stamps("t", ["part-"]).select(["part", "size"]).to_pylist() == [{"part": 0, "size": len(data)}]
    assert (bucket.footer("t/part-00000.parquet") or {})["part"] == 0
    assert bucket.read_table("t/part-00000.parquet")["key"].to_pylist() == ["a", "b"]
    with bucket.spool("shard.tar") as file:
        file.write(b"tar" * 1000)
        bucket.publish(file, "shard.tar")
    assert bucket.read("shard.tar") == b"tar" * 1000
    bucket.remove("x.json")
    assert not bucket.exists("x.json")
    assert proxy.made[fault] > 5


def test_a_creation_whose_answer_was_lost_is_known_as_ours(bucket: Store, proxy: FaultyProxy) -> None:
    proxy.choose = first("lose", "PUT")
    assert bucket.create("a.json", b"ours")
    assert proxy.asked["PUT", f"/{bucket.root}/a.json"] == 2
    assert not bucket.create("a.json", b"another's")
    assert bucket.read("a.json") == b"ours"


def test_a_large_upload_whose_last_answer_was_lost_is_known_as_ours(bucket: Store, proxy: FaultyProxy) -> None:
    data = random.Random(0).randbytes(1 << 20) * 105  # in pieces, of 50 MiB
    proxy.choose = lambda how, path, before: "lose" if how == "POST" and "uploadId" in path and not before else None
    assert bucket.create("large.bin", data)
    assert proxy.made["lose"] == 1
    assert zlib.crc32(bucket.read("large.bin")) == zlib.crc32(data)


@pytest.mark.slow
def test_an_upload_that_breaks_is_no_object(bucket: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.choose = first("half", "PUT", 99)
    monkeypatch.setattr(bucket, "patience_s", 5.0)
    with pytest.raises(StoreFault, match=r"a\.parquet cannot be written: .*tried [2-9] times.*run the same command"):
        bucket.create("a.parquet", b"x" * 100_000)
    proxy.choose = lambda how, path, before: "drop" if "partNumber=2" in path else None
    with pytest.raises(StoreFault), io.BytesIO(b"y" * (110 << 20)) as file:  # read while it is uploaded in pieces
        bucket.publish(file, "large.tar")
    proxy.choose = lambda how, path, before: None
    assert bucket.names("") == []


def test_a_fault_that_stays_ends_within_patience_and_what_cannot_pass_at_once(
    bucket: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "patience_s", 4.0)
    proxy.choose = first("503", times=999)
    begun = time.monotonic()
    with pytest.raises(StoreFault, match=r"x\.json cannot be read: .*Service Unavailable \(tried [2-9] times in \d+ s"):
        bucket.read("x.json")
    assert time.monotonic() - begun < 20  # the client's own tries take their time
    proxy.choose = lambda how, path, before: None
    with pytest.raises(FileNotFoundError):
        bucket.read("x.json")
    monkeypatch.setattr(bucket.fs, "_call_s3", None)  # a fault of the program, not of the store
    with pytest.raises(StoreFault, match="tried once"):
        bucket.read("x.json")


def test_a_damaged_table_is_named_and_not_taken_as_done(store: Store) -> None:
    data = encode_table(pa.table({"key": ["a"] * 100}), {"part": 0})
    store.create("t/part-00000.parquet", data[: len(data) // 2])
    store.create("t/part-00001.parquet", b"")
    for part in (0, 1):
        for ask in (store.footer, store.read_table):
            with pytest.raises(StoreFault, match=rf"t/part-0000{part}\.parquet is no whole Parquet .* remove it, then"):
                ask(f"t/part-0000{part}.parquet")


def test_a_table_with_a_damaged_middle_is_named(store: Store) -> None:
    data = bytearray(encode_table(pa.table({"key": [f"{i * i:024x}" for i in range(5000)]}), {"part": 0}))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    store.create("t/part-00000.parquet", bytes(data))
    with pytest.raises(StoreFault, match=r"t/part-00000\.parquet is no whole Parquet .* remove it, then"):
        store.read_table("t/part-00000.parquet")


def test_a_store_that_is_away_is_waited_for_and_is_no_mistake_of_the_recipe(
    bucket: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.choose = first("503")
    bucket.check(write=True)
    assert proxy.made["503"] == 1
    monkeypatch.setattr(bucket, "patience_s", 1.5)
    proxy.choose = first("503", times=999)
    with pytest.raises(StoreFault, match=r"cannot be listed: .*run the same command again"):
        bucket.check(write=True)


def test_gc_bears_a_fault_that_passes(bucket: Store, proxy: FaultyProxy) -> None:
    for name in ("part-00000.parquet", "step.json"):
        bucket.create(f"caption/0123456789ab/{name}", b"{}")
    proxy.choose = first("503")
    (found,) = results(bucket, {})
    assert sorted(found.files) == ["caption/0123456789ab/part-00000.parquet", "caption/0123456789ab/step.json"]
    clear(bucket, found)
    assert proxy.made["503"] > 3
    assert bucket.names("caption/0123456789ab") == []


def storm(seed: int) -> Choose:
    """Each request goes wrong with one chance in ten, but none for ever."""
    chance, lock = random.Random(seed), threading.Lock()
    kinds: tuple[Fault, ...] = ("503", "drop", "lose", "cut", "half", "slow")

    def choose(method: str, path: str, before: int) -> Fault | None:
        with lock:
            fault = chance.choice(kinds) if chance.random() < 1 / 10 and before < 40 else None
        return None if fault == "half" and method != "PUT" else fault

    return choose


def in_bucket(world: World, name: str, options: dict[str, Any], endpoint: str) -> None:
    world.document |= {"store": f"s3://bucket/{name}", "storage_options": {**options, "endpoint_url": endpoint}}
    world.write()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_through_a_storm_ends_with_the_same_bytes(
    world: World, proxy: FaultyProxy, tmp_path: Path, s3_options: dict[str, Any], kind: str
) -> None:
    world.list_urls("a", world.images(6))
    assert world.run("run").returncode == 0
    want = world.contents("download", "caption", "phrases", "ground", "select", "pack")
    proxy.choose = storm(3)
    in_bucket(world, tmp_path.name, s3_options, proxy.url)
    world.bare = kind != "ray"
    done = world.run("run", "--set", f"engine.kind={kind}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert sum(n for fault, n in proxy.made.items() if fault) > 20
    store = Store(f"s3://bucket/{tmp_path.name}", s3_options)
    there = {p.removeprefix(f"{store.root}/") for p in store.fs.find(store.root)}
    assert {name for name in there if name in want} == want.keys()
    assert without_time({name: store.read(name) for name in want}) == without_time(want)
    assert not [name for name in there if ".wip" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["503", "drop"])
def test_a_store_that_goes_away_ends_the_run_clearly(
    world: World, proxy: FaultyProxy, tmp_path: Path, s3_options: dict[str, Any], fault: Fault, kind: str
) -> None:
    world.list_urls("a", world.images(10))
    in_bucket(world, tmp_path.name, {**s3_options, **ONCE}, proxy.url)
    away = threading.Event()

    def choose(method: str, path: str, before: int) -> Fault | None:
        """Away from when a worker begins with a part of the step."""
        if "/ground/" in path and "/part-" in path and method == "PUT":
            away.set()
        return fault if away.is_set() else None

    proxy.choose = choose
    world.bare = kind != "ray"
    done = world.run("run", "--set", f"engine.kind={kind}", env={"VESL_STORE_PATIENCE_S": "2"})
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vesl: s3://bucket/"), done.stderr
    assert "run the same command again" in last
    proxy.choose = lambda method, path, before: None
    plan = make_plan(world.load())
    assert set(plan.done["ground"]) <= {0, 1}
    if fault == "drop":
        again = world.run("run")
        assert again.returncode == 0, again.stderr
        assert make_plan(world.load()).todo() == ()


@pytest.mark.slow
def test_a_half_written_table_stops_the_run_with_its_name(
    world: World, proxy: FaultyProxy, tmp_path: Path, s3_options: dict[str, Any]
) -> None:
    world.list_urls("a", world.images(5))
    in_bucket(world, tmp_path.name, s3_options, proxy.url)
    assert world.run("run").returncode == 0
    plan = make_plan(world.load())
    name = plan.steps[3].table(0)
    data = plan.store.read(name)
    plan.store.replace(name, data[:-20])  # as a store without atomic writes leaves it
    for command in ("run", "plan"):
        done = world.run(command)
        assert done.returncode == 1
        assert f"vesl: {plan.store.url}/{name} is no whole Parquet file" in done.stderr
        assert "remove it, then run again" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    plan.store.remove(name)
    assert make_plan(world.load()).missing(plan.steps[3]) == (0,)
