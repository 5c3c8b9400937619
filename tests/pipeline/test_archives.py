"""Archives as a source. `write` makes what img2dataset 1.47 writes; test_img2dataset compares it with the real one."""

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.pipeline.test_ingest import rows, take
from tests.world import World, jpeg
from vesl.pipeline.archived import Archives
from vesl.pipeline.fetch import FetchRule
from vesl.pipeline.ingest import input_tables
from vesl.pipeline.lists import IngestError
from vesl.pipeline.plan import make_plan
from vesl.pipeline.respect import RespectRule
from vesl.pipeline.retry import retry
from vesl.pipeline.run import _ingest
from vesl.pipeline.stage import Place
from vesl.pipeline.steps.download import Download
from vesl.pipeline.store import Store
from vesl.pipeline.work import incoming
from vesl.transforms import urls
from vesl.transforms.images import ImageRule, normalise
from vesl.transforms.outcomes import Drop
from vesl.transforms.records import ARCHIVED
from vesl.transforms.shards import add_member, end_tar

Rows = list[tuple[str, str | None, bytes | None]]
LAYOUTS = ("webdataset", "files", "parquet")
AUTO: dict[str, Any] = {"url_column": None, "caption_column": None}
NO_PLACE = "http://nowhere.example"  # no name server knows it: who asked would fail


def write(folder: Path, layout: str, samples: Rows, shard: int = 0, ending: str = "jpg") -> None:
    """A shard of img2dataset, with its statistics. Samples without bytes are those that it could not fetch."""
    folder.mkdir(parents=True, exist_ok=True)
    stem, records, members = folder / f"{shard:05d}", [], list[tuple[str, bytes]]()
    for i, (url, caption, data) in enumerate(samples):
        with Image.open(io.BytesIO(data or jpeg(0))) as image:
            width, height = image.size if data else (None, None)
        record: dict[str, Any] = {"caption": caption, "url": url, "key": f"{shard:05d}{i:04d}"}
        record |= {"status": "success" if data else "failed_to_download"}
        record |= {"error_message": None if data else "HTTP Error 404: Not Found", "width": width, "height": height}
        record |= {"original_width": width, "original_height": height, "exif": "{}" if data else None}
        # of what was downloaded, which is not what is stored
        record |= {"sha256": hashlib.sha256(b"before" + data).hexdigest() if data else None}
        if data:
            said = {"txt": (caption or "").encode(), "json": json.dumps(record, indent=4).encode()}
            for name, content in sorted({ending: data, **said}.items()):
                members.append((f"{record['key']}.{name}", content))
        records.append({**record, ending: data} if layout == "parquet" else record)
    kinds = {name: pa.int32() for name in ("width", "height", "original_width", "original_height")}
    names = ["caption", "url", "key", "status", "error_message", *kinds, "exif", "sha256"]
    schema = pa.schema([(name, kinds.get(name, pa.string())) for name in names])
    if layout == "parquet":
        schema = schema.append(pa.field(ending, pa.binary()))
    pq.write_table(pa.Table.from_pylist(records, schema), f"{stem}.parquet", row_group_size=100)
    Path(f"{stem}_stats.json").write_text(json.dumps({"count": len(samples)}))
    if layout == "files":
        stem.mkdir()
        for name, content in members:
            (stem / name).write_bytes(content)
    elif layout == "webdataset":
        with tarfile.open(f"{stem}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.mode, info.uname = len(content), 1.5, 0o444, "bigdata"  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(content))


def samples(count: int, first: int = 0) -> Rows:
    return [(f"{NO_PLACE}/{i}.jpg", f"photo {i} é", jpeg(i)) for i in range(first, first + count)]


def download(store: Store, dataset: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """The rows of the download step, one batch a part."""
    function = Download(**options).at(Place(store, 1)).open()
    return [row for name in input_tables(dataset) for row in function(store.read_table(name)).to_pylist()]


def record(dataset: dict[str, Any], ingest: int = -1) -> dict[str, int]:
    names = ("rows", "kept", "duplicate_url", "no_url", "no_image", "malformed", "parts")
    return {name: dataset["ingests"][ingest][name] for name in names if dataset["ingests"][ingest].get(name)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_what_img2dataset_downloaded_needs_no_network(
    tmp_path: Path, layout: str, place: str, request: pytest.FixtureRequest
) -> None:
    given, ending = samples(5), "jpg" if layout != "files" else "webp"
    given[2] = (given[2][0], given[2][1], None)
    write(tmp_path / "set", layout, given, 0, ending)
    write(tmp_path / "set", layout, samples(4, 4), 1, ending)  # the first is a URL of the other shard
    source, options = str(tmp_path / "set"), {}
    if place == "s3":
        import s3fs

        options = request.getfixturevalue("s3_options")
        source = f"s3://bucket/{tmp_path.name}/{layout}"
        s3fs.S3FileSystem(**options).put(str(tmp_path / "set"), source, recursive=True)
    store = Store(str(tmp_path / "store"), options)
    dataset = take(store, f"{source}/*", **AUTO, options=options)
    assert record(dataset) == {"rows": 9, "kept": 7, "duplicate_url": 1, "no_image": 1, "parts": 2}
    tables = [store.read_table(name).to_pylist() for name in input_tables(dataset)]
    assert [[row["url"].rpartition("/")[2] for row in table] for table in tables] == [
        ["0.jpg", "1.jpg", "3.jpg", "4.jpg"], ["5.jpg", "6.jpg", "7.jpg"]
    ]  # fmt: skip
    assert all(row["key"] == urls.key(row["url"]) for table in tables for row in table)
    assert tables[0][1]["alt_text"] == "photo 1 é"
    found = download(store, dataset)
    assert [row["outcome"] for row in found] == ["kept"] * 7
    for row, i in zip(found, (0, 1, 3, 4, 5, 6, 7), strict=True):
        stored = normalise(jpeg(i), ImageRule())
        assert (row["image"], row["sha256"], row["phash"]) == (stored.jpeg, stored.sha256, stored.phash)
        assert (row["final_url"], row["content_type"], row["http"]) == (None, None, None)
    assert take(store, f"{source}/*", **AUTO, options=options) == dataset


def test_lists_and_archives_meet(tmp_path: Path) -> None:
    """The key of an archived image is that of its URL, so a list, an archive and a later archive know each other."""
    write(tmp_path / "set", "webdataset", samples(3))
    (tmp_path / "set" / "a.csv").write_text(f"url,caption\n{NO_PLACE}/1.jpg,x\n{NO_PLACE}/9.jpg,y\n")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "set" / "*"), **AUTO)
    assert [record(dataset, i) for i in (0, 1)] == [
        {"rows": 2, "kept": 2, "parts": 1}, {"rows": 3, "kept": 2, "duplicate_url": 1, "parts": 1}
    ]  # fmt: skip
    assert ["archived" in store.read_table(name).column_names for name in input_tables(dataset)] == [False, True]
    before = {name: store.read(name) for name in input_tables(dataset)}
    write(tmp_path / "set", "parquet", samples(3, 2), 7)
    dataset = take(store, str(tmp_path / "set" / "*"), **AUTO)
    assert record(dataset) == {"rows": 3, "kept": 2, "duplicate_url": 1, "parts": 1}
    assert {name: store.read(name) for name in before} == before


def test_a_sidecar_is_a_list_where_the_url_column_is_named(tmp_path: Path) -> None:
    given = samples(2)
    write(tmp_path, "webdataset", [given[0], (given[1][0], None, None)])
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.parquet"), url_column="url", caption_column="caption")
    assert record(dataset) == {"rows": 2, "kept": 2, "parts": 1}
    assert "archived" not in store.read_table(input_tables(dataset)[0]).column_names


def test_the_metadata_pass_leaves_images_alone(tmp_path: Path) -> None:
    """A tar beside its sidecar is not read: here there is nothing in it."""
    write(tmp_path, "webdataset", samples(2))
    (tmp_path / "00000.tar").write_bytes(b"")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.tar"), **AUTO)
    assert record(dataset) == {"rows": 2, "kept": 2, "parts": 1}
    assert [row["reason"] for row in download(store, dataset)] == ["archive_damaged"] * 2


def tar_of(path: Path, *members: tuple[str, bytes]) -> None:
    with path.open("wb") as file:
        for name, content in members:
            add_member(file, name, content)
        end_tar(file)


def test_images_without_a_url_are_known_by_their_content(tmp_path: Path) -> None:
    text = ("a/1.txt", "Ein Hünd".encode())
    tar_of(tmp_path / "x.tar", ("a/1.JPG", jpeg(1)), text, ("b.png", jpeg(1)), ("c.jpg", jpeg(2)), ("c.json", b"[1]"))
    tar_of(
        tmp_path / "y.tar", ("d.jpg", jpeg(2)), ("e.txt", b"no image"), ("f.jpg", jpeg(3)), ("f.json", b'{"url": 5}')
    )
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*.tar"), **AUTO)
    assert record(dataset) == {"rows": 6, "kept": 3, "duplicate_url": 2, "no_image": 1, "parts": 2}
    assert [row["key"] for row in rows(store, dataset)] == [hashlib.sha256(jpeg(i)).hexdigest()[:24] for i in (1, 2, 3)]
    assert rows(store, dataset)[0]["alt_text"] == "Ein Hünd"
    found = download(store, dataset)
    assert [row["source_sha256"] for row in found] == [hashlib.sha256(jpeg(i)).hexdigest() for i in (1, 2, 3)]


def test_of_two_samples_of_one_name_the_first_is_read(tmp_path: Path) -> None:
    """Each caption keeps its own image: download looks a sample up by its name."""
    said = {i: json.dumps({"url": f"{NO_PLACE}/{i}.jpg"}).encode() for i in (1, 2, 3)}
    first, between = (("a.png", jpeg(1)), ("a.json", said[1])), (("b.jpg", jpeg(2)), ("b.json", said[2]))
    tar_of(tmp_path / "x.TAR", ("b.txt", b"alone"), *first, *between, ("a.jpg", jpeg(3)), ("a.json", said[3]))
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "x.TAR"), **AUTO)
    assert record(dataset) == {"rows": 4, "kept": 2, "no_image": 2, "parts": 1}
    assert [row["url"].rpartition("/")[2] for row in rows(store, dataset)] == ["1.jpg", "2.jpg"]
    found = [row["source_sha256"] for row in download(store, dataset)]
    assert found == [hashlib.sha256(jpeg(i)).hexdigest() for i in (1, 2)]


def header(name: str, size: int | bytes, kind: bytes = b"0", link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = size if isinstance(size, int) else 0
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    if isinstance(size, bytes):
        block[124:136] = size.ljust(12, b"\0")
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


GOOD = header("good.jpg", len(jpeg(1))) + padded(jpeg(1))
LATER = header("later.jpg", len(jpeg(2))) + padded(jpeg(2))
HOSTILE = {  # what stands between two samples -> the samples that are found, and malformed rows
    "nothing": (b"", 2, 0),
    "links": (header("x.jpg", 0, b"2", "/etc/passwd") + header("y.jpg", 1 << 30, b"1", "good.jpg"), 2, 0),
    "devices": (header("x.jpg", 0, b"3") + header("p.jpg", 0, b"6") + header("d.jpg", 0, b"5"), 2, 0),
    "a size that goes beyond the end": (header("x.jpg", 1 << 33), 1, 1),
    "a negative size": (header("x.jpg", b"\xff" * 11 + b"\x00"), 1, 1),
    "a size that is no number": (header("x.jpg", b"lots"), 1, 1),
    "sparse": (header("x.jpg", 512, b"S") + bytes(512), 1, 1),
    "no header": (b"\x01" * 512, 1, 1),
    "half a header": (b"x" * 100, 1, 1),
    "a long pax header": (header("pax", 1 << 26, b"x") + bytes(1 << 26), 1, 0),  # the name behind it is not known
    "a pax header of digits": ((header("pax", 60_000, b"x") + padded(b"1" * 60_000)) * 3, 2, 0),
    "a folder with a long name": (header("pax", 13, b"x") + padded(b"13 path=long/") + header("d", 0, b"5"), 2, 0),
    "a name longer than any good one": (header("x", 1011, b"L") + padded(b"x" * 1011) + header("x", 0), 2, 0),
    "a pax size that lies": (header("pax", 20, b"x") + padded(b"20 size=99999999999\n"), 1, 1),
    "a pax size that is no number": (header("pax", 11, b"x") + padded(b"11 size=xx\n"), 1, 1),
    "a pax path": (header("pax", 30, b"x") + padded(b"30 path=../../etc/passwd.jpg\n\0"), 2, 0),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tars(tmp_path: Path, what: str) -> None:
    between, found, malformed = HOSTILE[what]
    (tmp_path / "x.tar").write_bytes(GOOD + between + LATER + bytes(1024))
    store = Store(str(tmp_path / "store"))
    tracemalloc.start()
    start = time.monotonic()
    dataset = take(store, str(tmp_path / "x.tar"), **AUTO)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    assert time.monotonic() - start < 5
    assert (record(dataset)["kept"], record(dataset).get("malformed", 0)) == (found, malformed)
    assert [row["outcome"] for row in download(store, dataset)] == ["kept"] * found


def test_what_goes_wrong_between_ingest_and_download(tmp_path: Path) -> None:
    for i, name in enumerate(("gone", "cut", "other")):
        write(tmp_path / name, "webdataset", samples(4, i * 4), i)
    bad = zip(samples(4, 100), (jpeg(0), jpeg(1)[:-300], jpeg(1, (16, 16)), jpeg(2)), strict=True)
    write(tmp_path / "bad", "parquet", [(url, caption, data) for (url, caption, _), data in bad])
    table = pq.read_table(tmp_path / "bad" / "00000.parquet")
    images = table["jpg"].to_pylist()
    images[0], images[3] = b"<html>", None
    pq.write_table(table.set_column(table.num_columns - 1, "jpg", pa.array(images)), tmp_path / "bad" / "00000.parquet")
    data = (tmp_path / "cut" / "00001.tar").read_bytes()
    (tmp_path / "cut" / "00001.tar").write_bytes(data[: len(data) // 2])  # before: later it would be another archive
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*" / "*"), **AUTO)
    shutil.rmtree(tmp_path / "gone")
    write(tmp_path / "new", "webdataset", samples(1), 2)
    shutil.copy(tmp_path / "new" / "00002.tar", tmp_path / "other" / "00002.tar")
    by_set: dict[str, list[str | None]] = {}
    for row, found in zip(rows(store, dataset), download(store, dataset), strict=True):
        by_set.setdefault(Path(row["source"]).parent.name, []).append(found["reason"])
    assert by_set["bad"] == ["not_an_image", "decode_error", "too_small", "archive_missing"]
    assert by_set["gone"] == ["archive_missing"] * 4
    assert by_set["cut"] == [None, None, "archive_damaged", "archive_damaged"]
    assert by_set["other"] == ["archive_changed"] * 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_archive_that_was_exchanged_gives_no_row_another_s_image(tmp_path: Path, layout: str) -> None:
    """Its samples have the names, or the rows, of those that ingest read. A copy is the same archive."""
    write(tmp_path / "set", layout, samples(3))
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "set" / "*"), **AUTO)
    want = [row["sha256"] for row in download(store, dataset)]
    table = store.read_table(input_tables(dataset)[0])
    os.rename(tmp_path / "set", tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "set", copy_function=shutil.copyfile)
    assert [row["sha256"] for row in download(store, dataset)] == want
    shutil.rmtree(tmp_path / "set")
    write(tmp_path / "set", layout, samples(3, 50))
    found = download(store, dataset)
    assert [row["reason"] for row in found] == ["archive_changed"] * 3
    assert "its stamp was" in found[0]["detail"]
    places = [{**place, "stamp": None} for place in table["archived"].to_pylist()]  # as older stores have it
    old = pa.array(places, pa.struct(list(ARCHIVED)[:3]))
    old_rows = table.set_column(table.schema.get_field_index("archived"), "archived", old)
    assert Download().at(Place(store, 1)).open()(old_rows)["outcome"].to_pylist() == ["kept"] * 3


def test_limits_and_lists_of_domains_hold_for_archives_too(tmp_path: Path) -> None:
    large = jpeg(1, (1500, 1500))
    write(tmp_path, "files", [("http://a.example/1.jpg", "", jpeg(1)), ("http://b.example/", "", large)])
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "*"), **AUTO)
    found = download(store, dataset, fetch=FetchRule(max_bytes=len(large) - 1))
    assert [row["reason"] for row in found] == [None, "too_large"]
    found = download(store, dataset, respect=RespectRule(blocked_domains=("a.example",)))
    assert [row["reason"] for row in found] == ["blocked_domain", None]


def test_nothing_in_a_folder_leads_out_of_it(tmp_path: Path) -> None:
    write(tmp_path / "set", "files", samples(4))
    (tmp_path / "secret.jpg").write_bytes(jpeg(9))
    folder = tmp_path / "set" / "00000"
    for i in range(3):
        (folder / f"00000000{i}.jpg").unlink()
    (folder / "000000000.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(folder / "000000001.jpg")
    (folder / "000000002.jpg").mkdir()
    table = pq.read_table(tmp_path / "set" / "00000.parquet")
    keys = table["key"].to_pylist()
    keys[3] = "../../secret"
    place = table.schema.get_field_index("key")
    pq.write_table(table.set_column(place, "key", pa.array(keys)), tmp_path / "set" / "00000.parquet")
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(tmp_path / "set" / "*.parquet"), **AUTO)
    assert record(dataset) == {"rows": 4, "kept": 3, "no_image": 1, "parts": 1}
    found = download(store, dataset)
    assert [row["outcome"] for row in found] == ["failed"] * 3
    assert [row["reason"] for row in found][1:2] == ["archive_damaged"]
    archives = Archives({}, 1 << 20, RespectRule())
    with pytest.raises(Drop, match="archive_missing"):
        archives.read(str(tmp_path / "set" / "00000"), "nothing", None)


def test_a_table_that_says_one_image_a_million_times(tmp_path: Path) -> None:
    count = 300_000
    write(tmp_path, "parquet", samples(2))
    one = pq.read_table(tmp_path / "00000.parquet").slice(0, 1)
    image = one["jpg"][0].as_py() + bytes(100_000)  # 30 GB, were it written out
    table = pa.table({name: one[name].take(pa.array([0] * count)) for name in one.column_names if name != "jpg"})
    table = table.set_column(1, "url", pa.array([f"{NO_PLACE}/{i}" for i in range(count)]))
    images = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([image], pa.binary()))
    table = table.append_column("jpg", images)
    pq.write_table(table, tmp_path / "00000.parquet", row_group_size=count, store_schema=False)
    assert (tmp_path / "00000.parquet").stat().st_size < 20_000_000
    archives = Archives({}, 1 << 24, RespectRule())
    before = pa.default_memory_pool().max_memory()
    assert archives.read(str(tmp_path / "00000.parquet"), None, count - 1) == image
    assert pa.default_memory_pool().max_memory() - before < 500_000_000


def test_a_table_with_a_bad_page(tmp_path: Path) -> None:
    write(tmp_path, "parquet", samples(3))
    path = tmp_path / "00000.parquet"
    data = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(0).column(pq.read_schema(path).names.index("jpg"))
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    store = Store(str(tmp_path / "store"))
    dataset = take(store, str(path), **AUTO)
    assert [row["reason"] for row in download(store, dataset)] == ["archive_damaged"] * 3


def test_archives_that_are_not_whole_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", "webdataset", samples(1))
    (tmp_path / "a" / "00000.tar").unlink()
    with pytest.raises(IngestError, match=r"00000.tar nor the folder .* name dataset.url_column"):
        take(Store(str(tmp_path / "s1")), str(tmp_path / "a" / "*.parquet"), **AUTO)
    write(tmp_path / "b", "webdataset", samples(1))
    (tmp_path / "b" / "00000.parquet").write_bytes(b"PAR1")  # img2dataset was killed
    with pytest.raises(IngestError, match=r"b/00000.parquet: Arrow") as caught:
        take(Store(str(tmp_path / "s2")), str(tmp_path / "b" / "*.tar"), **AUTO)
    assert "\n" not in str(caught.value)
    write(tmp_path / "c", "webdataset", samples(1))
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "c" / "00000.parquet")
    with pytest.raises(IngestError, match=r"c/00000.parquet is not img2dataset's: it has no column 'error_message'"):
        take(Store(str(tmp_path / "s3")), str(tmp_path / "c" / "*.tar"), **AUTO)


def test_many_threads_share_a_few_open_archives(tmp_path: Path) -> None:
    for i, layout in enumerate((*LAYOUTS, *LAYOUTS)):
        write(tmp_path / layout, layout, samples(20, 20 * i), i)
    for path in (tmp_path / "parquet").glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=3)
    store = Store(str(tmp_path / "store"))
    dataset = take(store, *(str(tmp_path / layout / "*") for layout in LAYOUTS), **AUTO)
    assert record(dataset) == {"rows": 120, "kept": 120, "parts": 6}
    mixed = pa.concat_tables(store.read_table(name) for name in input_tables(dataset))
    mixed = mixed.take(pa.array(sorted(range(120), key=lambda i: i % 20)))
    found = Download().at(Place(store, 1)).open()(mixed)
    numbers = [int(url.rpartition("/")[2][:-4]) for url in mixed["url"].to_pylist()]
    assert found["sha256"].to_pylist() == [normalise(jpeg(i), ImageRule()).sha256 for i in numbers]
    in_order = {row["key"]: row["sha256"] for row in download(store, dataset)}
    assert in_order == dict(zip(mixed["key"].to_pylist(), found["sha256"].to_pylist(), strict=True))


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / "set", "webdataset", samples(3, 2 * i), i)
    datasets = []
    for name in ("one", "two"):
        store = Store(str(tmp_path / name))
        datasets.append(take(store, str(tmp_path / "set" / "*"), **AUTO))
        if name == "two":
            for left in ("input/00000.json", "dataset.json", input_tables(datasets[-1])[1]):
                store.remove(left)
            datasets.append(take(store, str(tmp_path / "set" / "*"), **AUTO))
    assert datasets[0] == datasets[1] == datasets[2]
    for name in input_tables(datasets[0]):
        assert Store(str(tmp_path / "one")).read(name) == Store(str(tmp_path / "two")).read(name)


def test_a_whole_run_a_retry_and_back_from_the_shards(tmp_path: Path, world: World) -> None:
    write(tmp_path / "set", "webdataset", samples(6))
    write(tmp_path / "set", "webdataset", samples(2, 10), 1)
    (tmp_path / "set" / "more.csv").write_text("url,caption\nhttp://127.0.0.1:9/refused.jpg,a refused dog\n")
    world.document["dataset"] = {"name": "world", "source": str(tmp_path / "set" / "*"), "rows_per_part": 5}
    world.write()
    _ingest(world.load(), None)
    (tmp_path / "set" / "00001.tar").unlink()
    (tmp_path / "set" / "00001.tar").mkdir()  # as good a fault as any
    world.document["dataset"]["source"] = str(tmp_path / "set" / "00000.tar")  # all is known by now
    world.write()
    ran = world.run("run")
    assert ran.returncode == 0, ran.stderr
    reported = world.run("report")
    assert "archive_unreadable" in reported.stdout, reported.stdout + reported.stderr
    store = Store(world.store)
    wanted = ("url", "archived", "expected_md5")  # columns that not every input table has
    given = [incoming(store, make_plan(world.load()).job(), 0, part, wanted).rows for part in (0, 1)]
    assert [set(rows_.column_names) for rows_ in given] == [{"key", *wanted}] * 2
    assert [rows_["archived"].null_count for rows_ in given] == [1, 0]
    entry = retry(make_plan(world.load()))
    assert entry is not None
    assert (entry["kept"], entry["more"]) == (3, ["archived"])
    again = store.read_table(f"input/{entry['id']}/part-{entry['first']:05d}.parquet").to_pylist()
    places = {row["url"].rpartition("/")[2]: row["archived"] and row["archived"]["member"] for row in again}
    assert places == {"refused.jpg": None, "10.jpg": "000010000", "11.jpg": "000010001"}

    other = Store(str(tmp_path / "other"))
    dataset = take(other, str(tmp_path / "store" / "pack" / "*" / "*.tar"), **AUTO)
    assert record(dataset) == {"rows": 6, "kept": 6, "parts": 1}
    found = {row["key"]: row for row in download(other, dataset)}
    for row in rows(other, dataset):
        i = int(row["url"].rpartition("/")[2][:-4])
        assert (row["key"], row["alt_text"]) == (urls.key(f"{NO_PLACE}/{i}.jpg"), f"photo {i} é")
        assert found[row["key"]]["sha256"] == normalise(jpeg(i), ImageRule()).sha256
