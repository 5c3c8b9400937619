"""Ingest, once more: order over files and batches, files that change, attempts that were killed."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.test_ingest import rows, take, write_parquet
from vesl.pipeline import ingest as ingest_module
from vesl.pipeline import lists
from vesl.pipeline.lists import IngestError
from vesl.pipeline.store import Store


def test_the_first_file_in_order_wins_and_a_file_counts_once(tmp_path: Path) -> None:
    for name, alt in (("b", "second"), ("a", "first"), ("c", "third")):
        lines = [{"url": "http://x.example/", "alt": alt}, {"url": f"http://{name}.example/", "alt": alt}]
        filler = [] if name != "a" else [{"url": "http://only-a.example/"}]  # so that the rows' numbers differ
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, [*filler, *lines])))
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl"))
    (record,) = dataset["ingests"]
    assert (record["rows"], record["duplicate_url"]) == (7, 2)
    (shared,) = (row for row in rows(store, dataset) if row["url"] == "http://x.example/")
    assert (shared["alt_text"], shared["source"], shared["row"]) == ("first", str(tmp_path / "a.jsonl"), 1)


def test_rows_keep_their_numbers_over_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "_BATCH", 999)
    monkeypatch.setattr(ingest_module, "_BATCH", 999)
    count = 5000
    table = pa.table({"url": [f"http://h/{i}" for i in range(count)], "alt": [str(i) for i in range(count)]})
    pq.write_table(table, tmp_path / "a.parquet")
    store = Store(str(tmp_path / "store"))
    found = rows(store, take(store, str(tmp_path / "a.parquet"), rows_per_part=5000))
    assert len(found) == count
    assert all(row["row"] == int(row["alt_text"]) for row in found)


def test_a_list_that_is_written_anew_is_read_again(tmp_path: Path) -> None:
    path, store = tmp_path / "a.jsonl", Store(str(tmp_path / "store"))
    path.write_text('{"url":"http://a.example/1","alt":"x"}\n')
    take(store, str(path))
    path.write_text('{"url":"http://a.example/2","alt":"x"}\n')  # as long as before
    os.utime(path, (0, path.stat().st_mtime + 10))
    second = take(store, str(path))
    assert [row["url"] for row in rows(store, second)] == ["http://a.example/1", "http://a.example/2"]


def killed_before_the_end(tmp_path: Path, **options: Any) -> Store:
    """A store with the parts of an ingest, but without the claim and `dataset.json`, which are written last."""
    write_parquet(tmp_path / "a.parquet")
    store = Store(str(tmp_path / "store"))
    take(store, str(tmp_path / "a.parquet"), **options)
    for name in ("input/00000.json", "dataset.json"):
        store.remove(name)
    return store


@pytest.mark.parametrize("options", [{"rows_per_part": 4}, {"caption_column": None}, {}])
def test_what_a_killed_ingest_left_is_not_mistaken_for_another(tmp_path: Path, options: dict[str, Any]) -> None:
    store = killed_before_the_end(tmp_path, **options)
    fresh = Store(str(tmp_path / "fresh"))
    left, right = (take(s, str(tmp_path / "a.parquet")) for s in (store, fresh))
    assert rows(store, left) == rows(fresh, right)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfurl,alt\nhttp://a.example/,x\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"url":"http://b.example/","alt":"x"}\n')
    store = Store(str(tmp_path / "store"))
    assert len(rows(store, take(store, str(tmp_path / "*")))) == 2


def test_a_store_of_another_url_normalisation_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "a.parquet"))
    for field in ("format", "url_normalisation"):
        store.write_json("dataset.json", {**dataset, field: 0})
        with pytest.raises(IngestError, match="another version of vesl"):
            take(store, str(tmp_path / "a.parquet"))
