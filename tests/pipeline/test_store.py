import multiprocessing
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from vesl.pipeline.store import Store, StoreError, StoreFault, encode_table, wip
from vesl.transforms.records import DETECTION

TABLE = pa.table(
    {
        "key": ["a", "b", "c"],
        "text": ["x", None, "y"],
        "detections": pa.array([[{"box": [0, 0, 1, 1], "phrase": 1, "score": 0.5}], None, []], pa.list_(DETECTION)),
    }
)


def test_create_is_once(store: Store) -> None:
    assert store.create("a/b/part-00001.parquet", b"first")
    assert not store.create("a/b/part-00001.parquet", b"second")
    assert store.read("a/b/part-00001.parquet") == b"first"
    assert store.names("a/b") == ["part-00001.parquet"]  # no scratch file is left
    store.replace("a/b/part-00001.parquet", b"third")
    assert store.read("a/b/part-00001.parquet") == b"third"


def test_of_many_creators_one_wins(store: Store) -> None:
    wins: list[int] = []

    def attempt(i: int) -> None:
        if Store(store.url, store.fs.storage_options if not store.local else {}).create("race/x.json", b"%d" % i):
            wins.append(i)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert store.read("race/x.json") == b"%d" % wins[0]
    assert store.names("race") == ["x.json"]


def test_a_finished_file_sweeps_its_unfinished_attempts(store: Store) -> None:
    store.create("d/part-00001.wip/00000000-00000010.parquet", b"half")
    store.create("d/part-00002.wip/00000000-00000010.parquet", b"half of another")
    store.create("d/part-00001.parquet", b"whole")
    assert store.names("d") == ["part-00001.parquet", "part-00002.wip"]


def test_names_by_prefix(store: Store) -> None:
    for name in ("part-00001.parquet", "part-00001.abc.tar", "part-00010.parquet"):
        store.create(f"d/{name}", b"x")
    assert store.names("d", "part-00001.") == ["part-00001.abc.tar", "part-00001.parquet"]
    assert store.names("nowhere") == []


def test_table_and_footer_come_back(store: Store) -> None:
    store.create("t/part-00000.parquet", encode_table(TABLE, {"part": 0, "note": "ü"}))
    assert store.read_table("t/part-00000.parquet").equals(TABLE)
    assert store.read_table("t/part-00000.parquet", ["text", "key"]).column_names == ["text", "key"]
    footer = store.footer("t/part-00000.parquet")
    assert footer is not None
    assert (footer["part"], footer["note"], len(footer["content"])) == (0, "ü", 64)
    assert store.footer("t/part-00001.parquet") is None


def test_table_bytes_do_not_depend_on_how_it_was_put_together() -> None:
    pieces = pa.concat_tables([TABLE.slice(0, 1), TABLE.slice(1, 1), TABLE.slice(2)])
    noted = pieces.replace_schema_metadata({"made": "elsewhere"})
    assert encode_table(noted, {"x": 1}) == encode_table(TABLE, {"x": 1})
    assert encode_table(noted.slice(1), {"x": 1}) == encode_table(TABLE.slice(1), {"x": 1})


def test_a_footer_is_found_however_long_it_is_and_damage_is_told(store: Store) -> None:
    data = encode_table(pa.table({"key": ["a"]}), {"note": "n" * 100_000})
    store.create("t/part-00000.parquet", data)
    assert (store.footer("t/part-00000.parquet") or {})["note"] == "n" * 100_000
    for damaged in (b"", data[:-1], data[-20_000:]):
        store.replace("t/part-00001.parquet", damaged)
        with pytest.raises(StoreFault, match="no whole Parquet file"):
            store.footer("t/part-00001.parquet")


def test_the_content_hash_tells_rows_apart_and_ignores_the_footer(store: Store) -> None:
    for name, table, note in (("a", TABLE, 1), ("b", TABLE, 2), ("c", TABLE.slice(1), 1)):
        store.create(f"{name}.parquet", encode_table(table, {"note": note}))
    a, b, c = ((store.footer(f"{name}.parquet") or {})["content"] for name in "abc")
    assert a == b != c


def test_ranges(store: Store) -> None:
    store.create("x.bin", bytes(range(100)))
    assert store.read_ranges("x.bin", [(0, 2), (50, 53)]) == [b"\x00\x01", bytes([50, 51, 52])]
    assert store.read_ranges("x.bin", []) == []
    assert store.read_ranges("x.bin", [(50, 53), (0, 2), (51, 52), (7, 7)]) == [b"234", b"\x00\x01", b"3", b""]
    with pytest.raises(ValueError, match="shorter"):
        store.read_ranges("x.bin", [(90, 110)])


def test_spooled_files_are_published_or_vanish(store: Store) -> None:
    with store.spool("d/shard.tar") as file:
        file.write(b"tar")
        store.publish(file, "d/shard.tar")
    with suppress(KeyError), store.spool("d/other.tar") as file:
        file.write(b"half")
        raise KeyError
    assert not os.path.exists(file.name)
    assert store.read("d/shard.tar") == b"tar"
    assert not store.exists("d/other.tar")


def _create_until_killed(url: str) -> None:
    store = Store(url)
    for i in range(100_000):
        store.create(f"k/part-{i:05d}.parquet", b"x" * 100_000)


def test_a_scratch_file_whose_folder_another_process_sweeps_away_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, swept = Store(str(tmp_path)), list[Path]()

    def just_before(path: str, mode: str) -> Any:
        folder = Path(path).parent
        if not swept and folder.exists():
            swept.append(folder)
            shutil.rmtree(folder)
        return open(path, mode)

    monkeypatch.setattr("vesl.pipeline.store.open", just_before, raising=False)
    with store.spool("a/shard.tar") as file:
        file.write(b"tar")
        store.publish(file, "a/shard.tar")
    assert store.read("a/shard.tar") == b"tar"
    assert swept == [tmp_path / "a" / "shard.wip"]


def test_killed_while_writing_leaves_whole_files_only(tmp_path: Path) -> None:
    url = str(tmp_path / "s")
    for _ in range(5):
        process = multiprocessing.get_context("spawn").Process(target=_create_until_killed, args=(url,))
        process.start()
        while not os.path.isdir(f"{url}/k"):
            pass
        process.join(0.05)
        process.kill()
        process.join()
        store = Store(url)
        for name in store.names("k"):
            if name.endswith(".parquet"):
                assert len(store.read(f"k/{name}")) == 100_000
                store.create(f"k/{name}", b"again")  # a later attempt sweeps what the killed one left
        for name in store.names("k"):
            assert name.endswith(".parquet") or not os.path.exists(f"{url}/k/{name[:-4]}.parquet")


def test_stores_that_cannot_be_used(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("not a folder")
    for url, options, says in (
        ("nosuch://x/y", {}, "nosuch"),
        (str(tmp_path / "file" / "store"), {}, "NotADirectoryError"),
        ("s3://no-such-bucket/x", s3_options, "there is no bucket no-such-bucket"),
    ):
        with pytest.raises(StoreError) as caught:
            Store(url, options).check(write=True)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_wip_folder() -> None:
    assert wip("a/part-00042.abcd.tar") == "a/part-00042.wip"
    assert wip("index.json") == "index.wip"
