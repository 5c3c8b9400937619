import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vesl.pipeline.ingest import IngestError, ingest, input_tables
from vesl.pipeline.store import Store
from vesl.transforms import urls

ROWS = [
    ("http://a.example/1.jpg", "one"),
    ("HTTP://A.example:80/./2.jpg#top", 'two, "quoted"\nand a line'),
    ("http://a.example/3.jpg", None),
    ("http://a.example/1.jpg", "one again"),
    ("", "no URL"),
    ("not a url", "bad but kept for download to explain"),
    ("http://ü.example/ö.jpg", "emoji 😀 and 漢字"),
]
KEPT = 5


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"url": [u for u, _ in ROWS], "alt": [a for _, a in ROWS], "extra": [1] * len(ROWS)}), path)


def write_delimited(path: Path) -> None:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        writer.writerows([("id", "url", "alt"), *((i, u, a) for i, (u, a) in enumerate(ROWS))])


def write_jsonl(path: Path) -> None:
    with gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps({"url": u, "alt": a, "n": {"x": [1]}}) + "\n" for u, a in ROWS)


FORMATS: list[tuple[str, Callable[[Path], None]]] = [
    ("a.parquet", write_parquet),
    ("a.csv", write_delimited),
    ("a.csv.gz", write_delimited),
    ("a.tsv", write_delimited),
    ("a.jsonl", write_jsonl),
    ("a.ndjson", write_jsonl),
    ("a.jsonl.gz", write_jsonl),
]


def take(store: Store, *patterns: str, **options: Any) -> dict[str, Any]:
    settings = {"url_column": "url", "caption_column": "alt", "rows_per_part": 2, **options}
    return ingest(store, "test", patterns, **settings)


def rows(store: Store, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for name in input_tables(dataset) for row in store.read_table(name).to_pylist()]


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / name))
    (record,) = dataset["ingests"]
    counts = {k: record[k] for k in ("rows", "kept", "duplicate_url", "no_url", "malformed")}
    assert counts == {"rows": 7, "kept": KEPT, "duplicate_url": 1, "no_url": 1, "malformed": 0}
    found = rows(store, dataset)
    assert [row["key"] for row in found] == sorted(urls.key(u) for u, _ in {u: a for u, a in ROWS if u}.items())
    captions = {row["url"]: row["alt_text"] for row in found}
    assert captions["http://a.example/1.jpg"] == "one"  # the first wins
    assert captions["http://a.example/2.jpg"] == 'two, "quoted"\nand a line'
    assert captions["http://xn--tda.example/%C3%B6.jpg"] == "emoji 😀 and 漢字"
    assert not captions["http://a.example/3.jpg"]
    assert "not a url" in captions
    places = {row["url"]: (row["source"], row["row"]) for row in found}
    assert places["http://a.example/3.jpg"] == (str(tmp_path / name), 2)


def test_parts_are_even_and_sorted_over_all(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [f"http://h/{i}" for i in range(1001)]}), tmp_path / "a.parquet")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.parquet"), caption_column=None, rows_per_part=100)
    tables = [store.read_table(name) for name in input_tables(dataset)]
    assert len(tables) == 11
    assert {len(table) for table in tables} == {91}
    keys = pa.concat_tables(tables)["key"].to_pylist()
    assert keys == sorted(keys)
    assert len(set(keys)) == 1001


def test_appended_files_make_new_parts_and_touch_none(tmp_path: Path, store: Store) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    first = take(store, str(tmp_path / "*.jsonl"))
    before = {name: store.read(name) for name in input_tables(first)}
    assert take(store, str(tmp_path / "*.jsonl")) == first
    more = [{"url": "http://a.example/1.jpg"}, {"url": "http://new.example/1.jpg"}, {"url": "http://new.example/2.jpg"}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({**row, "alt": "later"}) for row in more))
    second = take(store, str(tmp_path / "*.jsonl"))
    assert [i["parts"] for i in second["ingests"]] == [3, 1]
    assert second["ingests"][1]["duplicate_url"] == 1
    assert {name: store.read(name) for name in input_tables(second)[:3]} == before
    assert [row["url"] for row in rows(store, second)[KEPT:]] == sorted(
        ["http://new.example/1.jpg", "http://new.example/2.jpg"], key=urls.key
    )


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    stores = [Store(str(tmp_path / name)) for name in ("s1", "s2")]
    datasets = [take(store, str(tmp_path / "a.parquet")) for store in stores]
    assert datasets[0] == datasets[1]
    for name in input_tables(datasets[0]):
        assert stores[0].read(name) == stores[1].read(name)


def test_sources_in_a_bucket(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3_options)
    for name, write in (("a.parquet", write_parquet), ("a.csv", write_delimited), ("a.jsonl", write_jsonl)):
        write(tmp_path / name)
        fs.put_file(str(tmp_path / name), f"bucket/{tmp_path.name}/lists/{name}")
    store = Store(f"s3://bucket/{tmp_path.name}/store", s3_options)
    dataset = take(store, f"s3://bucket/{tmp_path.name}/lists/*", options=s3_options)
    assert dataset["ingests"][0]["rows"] == 21
    assert dataset["ingests"][0]["kept"] == KEPT
    assert "secret" not in store.read("dataset.json").decode()


def test_hostile_lines_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(
        b'url,alt\nhttp://a/1.jpg,"fine, x"\nhttp://a/2.jpg,a,b,c,d\nhttp://a/3.jpg,caf\xff\nhttp://a/4.jpg\n'
        b'http://a/5.jpg,nul\x00byte\n"http://a/6.jpg,never closed\n'
    )
    (tmp_path / "b.jsonl").write_bytes(
        b'{"url":"http://b/1.jpg","alt":"x"}\n{broken\n{"url":5,"alt":{"a":1}}\n{"alt":"no url"}\n'
        b'{"url":"http://b/2.jpg","alt":"caf\xff"}\n[1,2]\n{"url":"http://b/\\ud800.jpg","alt":1}\n'
    )
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl"))
    (record,) = dataset["ingests"]
    assert record["rows"] == record["kept"] + record["duplicate_url"] + record["no_url"] + record["malformed"]
    assert record["malformed"] >= 2
    found = {row["url"] for row in rows(store, dataset)}
    assert {"http://a/1.jpg", "http://a/4.jpg", "http://a/5.jpg", "http://b/1.jpg"} <= found


def test_an_empty_list_and_a_list_of_blank_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,alt\n")
    (tmp_path / "b.csv").write_text("url,alt\n,\n ,x\n")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.csv"))
    assert input_tables(dataset) == []
    assert dataset["ingests"][0]["no_url"] == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"link,alt\nhttp://a,b\n", "has no column 'url'"),
        ("a.csv", b"url,altt\nhttp://a,b\n", "no column 'alt'; did you mean 'altt'?"),
        ("a.csv", b"", "has no column 'url'"),
        ("a.jsonl", b'{"link":"http://a","alt":"x"}\n', "has no column 'url'"),
        ("a.parquet", b"not a parquet file", "a.parquet"),
        ("a.csv.gz", b"not gzip", "a.csv.gz"),
        ("a.xlsx", b"", "expected a name that ends in"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IngestError) as caught:
        take(Store(str(tmp_path / "store")), str(tmp_path / name))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_store_belongs_to_one_data_set(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")
    store = Store(str(tmp_path / "store"))
    take(store, str(tmp_path / "a.parquet"))
    with pytest.raises(IngestError, match="holds the data set 'test', not 'other'"):
        ingest(store, "other", (str(tmp_path / "a.parquet"),), "url", "alt", 2)
    with pytest.raises(IngestError, match="use another store"):
        take(store, str(tmp_path / "a.parquet"), caption_column=None)
    with pytest.raises(IngestError, match="no file matches"):
        take(store, str(tmp_path / "nothing-*.parquet"))
