import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vesl.pipeline.ingest import ingest, input_tables, read_dataset
from vesl.pipeline.lists import IngestError
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


def of_two_urls() -> bytes:
    pq.write_table(pa.Table.from_arrays([pa.array(["http://a"])] * 3, ["url", "url", "alt"]), file := io.BytesIO())
    return file.getvalue()


def write_delimited(path: Path) -> None:
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if ".tsv" in path.name else ",")
        rows = [(i, u, a.replace("\n", " ") if a and ".tsv" in path.name else a) for i, (u, a) in enumerate(ROWS)]
        writer.writerows([("id", "url", "alt"), *rows])  # a line end within a field is for CSV only


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
    assert captions["http://a.example/2.jpg"].replace("\n", " ") == 'two, "quoted" and a line'
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


def counted(tmp_path: Path, name: str, content: bytes) -> tuple[dict[str, int], dict[str, str]]:
    """Ingest one file; return its counts and the captions by URL."""
    (tmp_path / name).write_bytes(content)
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / name), rows_per_part=100_000)
    (record,) = dataset["ingests"]
    assert record["rows"] == record["kept"] + record["duplicate_url"] + record["no_url"] + record["malformed"]
    counts = {k: record[k] for k in ("kept", "duplicate_url", "no_url", "malformed") if record[k]}
    return counts, {row["url"]: row["alt_text"] for row in rows(store, dataset)}


def test_hostile_csv(tmp_path: Path) -> None:
    counts, captions = counted(
        tmp_path,
        "a.csv",
        b'\xef\xbb\xbfurl,alt\r\nhttp://a/1.jpg,"fine, x"\nhttp://a/2.jpg,a,b,c,d\nhttp://a/3.jpg,caf\xff\nhttp://a/4.jpg\n\n'
        b'http://a/5.jpg,nul\x00byte\nhttp://a/6.jpg,"never closed\nhttp://a/7.jpg,"two\nlines"\n'
        b'http://a/8.jpg,"so" she said\n'
        b'http://a/9.jpg,"ends with the file\n',
    )
    assert counts == {"kept": 6, "malformed": 3}
    assert captions == {
        "http://a/1.jpg": "fine, x",
        "http://a/3.jpg": "caf\ufffd",
        "http://a/4.jpg": None,
        "http://a/5.jpg": "nulbyte",
        "http://a/7.jpg": "two\nlines",
        "http://a/8.jpg": "so she said",
    }


def test_a_quote_that_is_never_closed_costs_one_line_of_many(tmp_path: Path) -> None:
    lines = [f"http://a/{i}.jpg,caption {i}" for i in range(20_000)]
    lines[50] = 'http://a/50.jpg,"unterminated'
    counts, _ = counted(tmp_path, "a.csv", "\n".join(["url,alt", *lines]).encode())
    assert counts == {"kept": 19_999, "malformed": 1}


def test_hostile_tsv(tmp_path: Path) -> None:
    alts = ['"Hello" she said', '"open', '5" pipe', '"whole"', '"a ""b"" c"', "tab\tin it", ""]
    lines = [f"http://a/{i}.jpg\t{alt}" for i, alt in enumerate(alts)]
    counts, captions = counted(tmp_path, "a.tsv", "\n".join(["url\talt", *lines]).encode())
    assert counts == {"kept": 6, "malformed": 1}
    assert [captions[f"http://a/{i}.jpg"] for i in (0, 1, 2, 3, 4, 6)] == [
        '"Hello" she said', '"open', '5" pipe', "whole", 'a "b" c', "",
    ]  # fmt: skip


def test_hostile_jsonl(tmp_path: Path) -> None:
    counts, captions = counted(
        tmp_path,
        "b.jsonl",
        b'{"url":"http://b/1.jpg","alt":"x"}\n{broken\n\n{"url":5,"alt":{"a":1}}\n{"alt":"no url"}\n[1,2]\nnull\n'
        b'{"url":"http://b/2.jpg","alt":"caf\xff"}\n{"url":"http://b/3.jpg","alt":"cut \\ud83d"}\n'
        + b"[" * 100_000
        + b'\n{"url":"http://b/4.jpg","alt":"'
        + b"x" * (1 << 25)
        + b'"}\n{"url":"http://b/5.jpg"}\n',
    )
    assert counts == {"kept": 5, "no_url": 1, "malformed": 5}
    assert captions["http://b/2.jpg"] == "caf\ufffd"
    assert captions["http://b/3.jpg"] == "cut ?"
    assert captions["5"] == '{"a": 1}'
    assert captions["http://b/5.jpg"] is None


def test_parquet_of_other_types(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"))
    table = pa.table(
        {
            "url": pa.array(["http://é/1".encode(), b"http://b/\xff", None], pa.binary()),
            "alt": pa.array(["café 😀", "x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = take(store, str(tmp_path / "a.parquet"))
    assert {row["url"]: row["alt_text"] for row in rows(store, dataset)} == {
        "http://xn--9ca/1": "café 😀",
        "http://b/%EF%BF%BD": "x",
    }
    pq.write_table(pa.table({"url": [["a"], ["b"]], "alt": ["x", "y"]}), tmp_path / "b.parquet")
    with pytest.raises(IngestError, match="is of type list"):
        take(Store(str(tmp_path / "other")), str(tmp_path / "b.parquet"))


def test_names_that_look_like_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "it's [1] *"
    folder.mkdir()
    for name, first in (("a1.csv", 0), ("a[1].csv", 10)):
        (folder / name).write_text("url,alt\n" + "".join(f"http://a/{first + i},x\n" for i in range(3)))
    store = Store(str(folder / "store"))
    assert take(store, str(folder / "a[1].csv"))["ingests"][0]["kept"] == 3
    (tmp_path / "c.csv").write_text("url,alt\nhttp://a/10,x\nhttp://a/99,x\n")
    assert take(store, str(folder / "a[1].csv"), str(tmp_path / "c.csv"))["ingests"][1]["duplicate_url"] == 1


def test_two_ingests_at_once_follow_each_other(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 100)):
        (tmp_path / f"{name}.csv").write_text("url,alt\n" + "".join(f"http://{name}/{first + i},x\n" for i in range(3)))
    store, other = Store(str(tmp_path / "store")), Store(str(tmp_path / "store"))
    answers = []

    def meanwhile(_: int) -> None:
        if not answers:
            answers.append(True)
            take(other, str(tmp_path / "b.csv"))

    dataset = take(store, str(tmp_path / "a.csv"), report=meanwhile)
    assert [i["first"] for i in dataset["ingests"]] == [0, 2]
    assert sorted(row["url"] for row in rows(store, dataset)) == sorted(
        [f"http://a/{i}" for i in range(3)] + [f"http://b/{i}" for i in range(100, 103)]
    )
    store.remove("dataset.json")  # as if killed right after the claim
    assert read_dataset(store) == dataset


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
        ("a.csv", b"alt\n" + b"x" * 200_000 + b",", "has no column 'url'"),
        ("a.jsonl", b'{"link":"http://a","alt":"x"}\n', "has no column 'url'"),
        ("a.parquet", b"not a parquet file", "a.parquet"),
        ("a.csv.gz", b"not gzip", "a.csv.gz"),
        ("a.xlsx", b"", "expected a name that ends in"),
        ("a.tar.gz", b"", "expected a name that ends in"),
        ("a.parquet", of_two_urls(), "exists 2 times"),
        ("a.parquet", of_two_urls().replace(b"url", b"\xff\xff\xff"), "can't decode"),
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


def only(tmp_path: Path, name: str, text: str, **options: Any) -> list[dict[str, Any]]:
    (tmp_path / name).write_text(text)
    store = Store(str(tmp_path / f"store-{name}"))
    dataset = take(store, str(tmp_path / name), rows_per_part=100, **options)
    return rows(store, dataset)


KNOWN = {  # the columns of the data sets, as their publishers write them
    "LAION": "SAMPLE_ID,URL,TEXT,HEIGHT,WIDTH,LICENSE,NSFW,similarity",
    "COYO": "id,url,text,width,height,image_phash,text_length",
    "DataComp": "uid,url,text,original_width,original_height,sha256",
    "Recap-DataComp": "url,re_caption,org_caption,sha256,key,re_clip_score",
    "img2dataset": "key,url,caption,status,error_message",
}


@pytest.mark.parametrize("name", KNOWN)
def test_columns_of_known_data_sets_are_found(tmp_path: Path, name: str) -> None:
    names = KNOWN[name].split(",")
    cells = {"url": "http://a.example/1", "text": "a dog", "caption": "a dog", "re_caption": "a dog"}
    line = ",".join(cells.get(column.lower(), "0") for column in names)
    (row,) = only(tmp_path, "a.csv", f"{KNOWN[name]}\n{line}\n", url_column=None, caption_column=None)
    assert (row["url"], row["alt_text"]) == ("http://a.example/1", "a dog")
    assert set(row) == {"key", "url", "alt_text", "source", "row"}


def test_lists_of_several_spellings_meet_in_one_store(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("URL,TEXT\nhttp://a/1,one\n")
    (tmp_path / "b.jsonl").write_text('{"url":"http://a/2","caption":"two"}\n{"url":"http://a/1","caption":"again"}\n')
    store = Store(str(tmp_path / "store"))
    auto = {"url_column": None, "caption_column": None}
    dataset = take(store, str(tmp_path / "*"), **auto)
    assert {row["url"]: row["alt_text"] for row in rows(store, dataset)} == {"http://a/1": "one", "http://a/2": "two"}
    assert take(store, str(tmp_path / "*"), **auto) == dataset


@pytest.mark.parametrize(
    ("header", "options", "says"),
    [
        ("link,alt", {}, "dataset.url_column: name a column; {} has none that is known to be it: link, alt"),
        ("URL,image_url,alt", {}, "dataset.url_column: name a column; {} has several that may be it: URL, image_url"),
        ("url,alt,text", {}, "dataset.caption_column: name a column; {} has several that may be it: alt, text"),
        ("url,alt", {"hash_columns": ("sha", None, None)}, "dataset.sha256_column: {} has no column 'sha'"),
    ],
)
def test_columns_that_are_not_clear(tmp_path: Path, header: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(IngestError) as caught:
        only(tmp_path, "a.csv", f"{header}\n", url_column=None, caption_column=None, **options)
    assert says.format(tmp_path / "a.csv") in str(caught.value)


def test_a_store_filled_before_spellings_were_known_gets_no_captions_now(tmp_path: Path) -> None:
    """It has the columns that a recipe without any meant then: `url`, and no captions."""
    (tmp_path / "a.csv").write_text("url,text\nhttp://a/1,one\n")
    store = Store(str(tmp_path / "store"))
    old = take(store, str(tmp_path / "*.csv"), url_column="url", caption_column=None)
    assert old["columns"] == ["url", None]
    (tmp_path / "b.csv").write_text("url,text\nhttp://a/2,two\n")
    new = take(store, str(tmp_path / "*.csv"), url_column=None, caption_column=None)
    assert [row["alt_text"] for row in rows(store, new)] == [None, None]
    named = take(Store(str(tmp_path / "named")), str(tmp_path / "*.csv"), url_column="url", caption_column="text")
    assert take(Store(str(tmp_path / "half")), str(tmp_path / "*.csv"), url_column=None, caption_column="text") == named


HASHES = [
    ("A" * 64, "b" * 32, "ffffffffffffffff"),
    (" " + "c" * 64, "nonsense", "0000000000000010"),
    ("", "", ""),
]


def test_expected_hashes(tmp_path: Path) -> None:
    columns = ("sha", "md5", "p")
    lines = [f"http://a/{i},{','.join(cells)}" for i, cells in enumerate(HASHES)]
    found = only(tmp_path, "a.csv", "\n".join(["url,sha,md5,p", *lines]), caption_column=None, hash_columns=columns)
    by_url = {row["url"][-1]: [row[f"expected_{k}"] for k in ("sha256", "md5", "phash")] for row in found}
    assert by_url == {"0": ["a" * 64, "b" * 32, -1], "1": ["c" * 64, None, 16], "2": [None, None, None]}
    store = Store(str(tmp_path / "store-a.csv"))
    assert store.read_json("dataset.json")["ingests"][0]["bad_hash"] == 1
    assert store.read_json("dataset.json")["columns"] == ["url", None, *columns]
    (row,) = only(
        tmp_path, "b.csv", "url,md5\nhttp://a/0," + "b" * 32, caption_column=None, hash_columns=(None, "md5", None)
    )
    assert {name for name in row if name.startswith("expected")} == {"expected_md5"}


def test_perceptual_hashes_as_numbers(tmp_path: Path) -> None:
    options = {"caption_column": None, "hash_columns": (None, None, "p")}
    (tmp_path / "a").mkdir()
    for i, kind in enumerate((pa.int64(), pa.uint64())):
        values = [-1, 16] if kind == pa.int64() else [2**64 - 1, 16]
        table = pa.table({"url": ["http://a/0", "http://a/1"], "p": pa.array(values, kind)})
        pq.write_table(table, tmp_path / "a" / f"{i}.parquet")
        store = Store(str(tmp_path / f"store{i}"))
        found = rows(store, take(store, str(tmp_path / "a" / f"{i}.parquet"), **options))
        assert {row["url"][-1]: row["expected_phash"] for row in found} == {"0": -1, "1": 16}
    found = only(
        tmp_path, "a.jsonl", '{"url":"http://a/0","p":-1}\n{"url":"http://a/1","p":"0000000000000010"}', **options
    )
    assert {row["url"][-1]: row["expected_phash"] for row in found} == {"0": -1, "1": 16}


def test_a_column_without_any_hash_is_no_column_of_hashes(tmp_path: Path) -> None:
    with pytest.raises(IngestError, match=r"a.csv has no hash of its kind in the columns of md5_column"):
        only(tmp_path, "a.csv", "url,md5\nhttp://a/1,dog\n", caption_column=None, hash_columns=(None, "md5", None))
