import io
import json
import tarfile
from typing import Any

import pytest
import webdataset

from vesl.transforms import shards
from vesl.transforms.records import Caption, Region, Sample

SAMPLE = Sample(
    key="0123456789abcdef01234567",
    url="http://a.example/1.jpg",
    sha256="ab" * 32,
    width=640,
    height=480,
    alt_text='an "alt" <text> 漢字 😀',
    captions=(Caption("A red ball", "alt_text@1"), Caption("Zwei grüne Kisten", "tiny@1")),
    regions=(
        Region((0.1, 0.2, 0.30000001192092896, 1.0), "red ball", 0.8999999761581421, 0, (2, 10)),
        Region((0.0, 0.0, 1.0, 1.0), "grüne Kisten", 0.25, 1, (5, 17)),
    ),
    select="0123456789ab",
)


def test_a_sample_comes_back_as_it_went() -> None:
    data = shards.encode(SAMPLE)
    again = shards.decode(data)
    assert shards.encode(again) == data
    assert again.captions == SAMPLE.captions
    assert b'"box":[0.1,0.2,0.3,1.0]' in data  # the shortest decimals that are the same float32
    assert b'"score":0.9,' in data
    assert again.regions[1] == SAMPLE.regions[1]


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(shards.encode(SAMPLE)), **fields}).encode()


def region(**fields: Any) -> bytes:
    return changed(regions=[{**json.loads(shards.encode(SAMPLE))["regions"][0], **fields}])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "Expecting value"),
        (b"[]", "not a region-text sample"),
        (b'{"key": "x"}', "not a region-text sample"),
        (b"\xff\xfe", "not a region-text sample"),
        (b"[" * 100_000, "not a region-text sample"),
        (changed(key=5), "not a string"),
        (changed(width=0), "not a pair of positive integers"),
        (changed(height=True), "not a pair of positive integers"),
        (changed(captions=[{"text": None, "model": "x"}]), "not a string"),
        (region(box=[0.5, 0, 0.5, 1]), "is not x0 < x1"),
        (region(box=[0, 0, float("nan"), 1]), "is not x0 < x1"),
        (region(box=[0, 0, 1.5, 1]), "is not x0 < x1"),
        (region(box=[0, 0, 1]), "values to unpack"),
        (region(score=float("inf")), "the score is inf"),
        (region(caption=2), "there is no caption 2"),
        (region(caption=-1), "there is no caption -1"),
        (region(span=[0, 8]), "does not cut"),
        (region(span=[-8, 10]), "there is no caption"),
        (region(phrase=""), "does not cut"),
    ],
)
def test_what_is_outside_the_contract_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shards.decode(data)


def test_tar_bytes_depend_on_content_only_and_everybody_reads_them(tmp_path: Any) -> None:
    files = []
    for _ in range(2):
        tar = io.BytesIO()
        places = [
            shards.add_member(tar, f"{SAMPLE.key}.{kind}", b"x" * n) for kind, n in (("jpg", 1000), ("json", 512))
        ]
        shards.end_tar(tar)
        files.append(tar.getvalue())
    assert files[0] == files[1]
    assert len(files[0]) % tarfile.RECORDSIZE == 0
    assert shards.read_range(io.BytesIO(files[0]), places[1], 512) == b"x" * 512
    with pytest.raises(ValueError, match="the tar ends"):
        shards.read_range(io.BytesIO(files[0]), places[1], 1_000_000)
    with tarfile.open(fileobj=io.BytesIO(files[0])) as tar_file:
        members = tar_file.getmembers()
    assert [(m.name, m.size, m.mtime, m.uid, m.mode) for m in members] == [
        (f"{SAMPLE.key}.jpg", 1000, 0, 0, 0o644),
        (f"{SAMPLE.key}.json", 512, 0, 0, 0o644),
    ]
    (tmp_path / "a.tar").write_bytes(files[0])
    (sample,) = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert sample["__key__"] == SAMPLE.key
    assert (len(sample["jpg"]), len(sample["json"])) == (1000, 512)


def test_members_of_anybody_s_tar() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, extended in (
            ("ä" * 60 + "/", tarfile.DIRTYPE, {}),  # its long name is not the next member's
            ("a.jpg", tarfile.REGTYPE, {}),
            ("b.jpg", tarfile.SYMTYPE, {}),
            ("c.jpg", tarfile.REGTYPE, {"comment": "x" * 70_000}),
            ("d" * 300, tarfile.REGTYPE, {"comment": "1" * 60_000}),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.pax_headers = kind, extended
            info.size = 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"abc"))
    found = list(shards.members(file, len(file.getvalue())))
    assert [name for name, _, _ in found] == ["a.jpg", "", None, "d" * 300]
    assert [file.getvalue()[at : at + size] for _, at, size in found] == [b"abc", b"", b"abc", b"abc"]
    cut = found[-1][1] + 2
    with pytest.raises(tarfile.HeaderError, match="a size that cannot be"):
        list(shards.members(file, cut))
