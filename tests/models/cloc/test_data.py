"""Shards to batches, on real tars: exact coverage, exact resuming, boxes on the square, and everything hostile."""

import dataclasses
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from vesl.models.cloc import shards as shards_module
from vesl.models.cloc.data import NOTES, REASONS, Batch, text_id
from vesl.models.cloc.loader import Loader
from vesl.models.cloc.options import Data
from vesl.models.cloc.shards import Cursor, DataError, Order, walk
from vesl.pipeline.store import Store
from vesl.transforms.records import Caption, Region, Sample
from vesl.transforms.shards import add_member, encode, end_tar

PX = 32


class Words:
    """A tokenizer of white space: a word is its checksum, 1 ends a text, 0 fills up."""

    def __call__(self, texts: list[str], context: int) -> np.ndarray:
        rows = [[*(zlib.crc32(w.encode()) for w in text.lower().split()[: context - 1]), 1] for text in texts]
        out = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, ids in zip(out, rows, strict=True):
            row[: len(ids)] = ids
        return out


def word(text: str) -> list[int]:
    return Words()([text], 77)[0].tolist()


def jpeg(size: tuple[int, int] = (24, 16), colour: str = "gray", quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def sample(key: str, count: int = 2, **other: Any) -> Sample:
    found = [Region((0.1 * i, 0.0, 0.1 * i + 0.1, 0.5), f"w{i}", 0.5, 0, (3 * i, 3 * i + 2)) for i in range(count)]
    text = " ".join(f"w{i}" for i in range(count)) or "nothing"
    base = Sample(key, f"http://a.example/{key}", "", 24, 16, "", (Caption(text, "m@1"),), tuple(found), "f" * 12)
    return dataclasses.replace(base, **other)


def document(**changed: Any) -> bytes:
    found: dict[str, Any] = {**json.loads(encode(sample("k"))), "key": "", **changed}
    return json.dumps({k: v for k, v in found.items() if v is not None}).encode()


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> int:
    with path.open("wb") as file:
        for name, data in members:
            add_member(file, name, data)
        end_tar(file)
        return file.tell()


def write_index(folder: Path, counts: dict[str, int], **other: Any) -> None:
    shards = [{"name": name, "samples": n, "bytes": (folder / name).stat().st_size} for name, n in counts.items()]
    found = {"complete": True, "samples": sum(counts.values()), "shards": shards, **other}
    (folder / "index.json").write_text(json.dumps(found))


def write(folder: Path, sizes: tuple[int, ...], regions: int = 2) -> list[str]:
    """Shards of so many samples each; return their keys."""
    folder.mkdir(exist_ok=True)
    keys, counts = [], {}
    for part, size in enumerate(sizes):
        members = []
        for i in range(size):
            keys.append(f"{part:02}x{i:03}")
            members += [(f"{keys[-1]}.jpg", jpeg()), (f"{keys[-1]}.json", encode(sample(keys[-1], regions)))]
        counts[f"shard-{part:05}-000.tar"] = size
        write_shard(folder / f"shard-{part:05}-000.tar", members)
    write_index(folder, counts)
    return keys


def one(folder: Path, members: list[tuple[str, bytes]], samples: int) -> str:
    """A folder of one shard."""
    folder.mkdir(exist_ok=True)
    write_shard(folder / "a.tar", members)
    write_index(folder, {"a.tar": samples})
    return str(folder)


def loader(
    folder: Path | str,
    batch: int = 2,
    workers: int = 0,
    shuffle: int = 5,
    seed: int = 3,
    alt: float = 0.0,
    **other: Any,
) -> Loader:
    options = Data(workers=workers, shuffle=shuffle, alt_text=alt)
    return Loader(str(folder), options, Words(), batch=batch, image_px=PX, context=8, seed=seed, **other)


def take(source: Loader, batches: int) -> list[Batch]:
    return list(itertools.islice(iter(source), batches))


def same(a: Batch, b: Batch) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(Batch))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def epoch_of(folder: Path | str, **other: Any) -> tuple[list[Batch], Counter[str]]:
    """All of one epoch that can be used, one image a batch; and the counts of exactly this epoch."""
    source, found = loader(folder, batch=1, **other), []
    behind = loader(folder, batch=1, state={**source.state(), "cursors": [[1, 0, 0]]}, **other)
    for batch in source:
        if source.state()["cursors"][0][0] == 1:
            break
        found.append(batch)
    take(behind, 1)  # the first batch of the next epoch, as above
    return found, source.counts - behind.counts


# The order


@pytest.mark.parametrize("sizes", [(7, 1, 12, 4), (1,) * 9, (23,), (0, 5, 0, 6)])
@pytest.mark.parametrize(("world", "workers", "shuffle"), [(1, 1, 1), (3, 2, 4), (2, 3, 100), (5, 1, 3)])
def test_the_order_covers_every_epoch_once(sizes: tuple[int, ...], world: int, workers: int, shuffle: int) -> None:
    wanted = [(shard, i) for shard, size in enumerate(sizes) for i in range(size)]
    seen = []
    for epoch in (0, 1, 7):
        found = []
        for rank, worker in itertools.product(range(world), range(workers)):
            order = Order(np.array(sizes, np.int64), 3, shuffle, rank, world, workers)
            at = Cursor(epoch)
            while at.epoch == epoch and order.windows(worker):
                which, index = order.window(worker, at)
                assert 0 < len(which) <= shuffle
                found += list(zip(which.tolist(), index.tolist(), strict=True))
                at = order.after(worker, at)
        assert sorted(found) == wanted
        seen.append(found)
    assert seen[0] != seen[1] or len(wanted) < 3


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2), (3, 0)])
def test_every_rank_and_worker_together_read_each_sample_once_an_epoch(
    tmp_path: Path, world: int, workers: int
) -> None:
    keys = write(tmp_path, (5, 1, 7, 4))
    seen: dict[int, list[str]] = {}
    for rank in range(world):
        source = loader(tmp_path, batch=1, workers=workers, rank=rank, world=world)
        for batch in source:
            state = source.state()
            worker = (state["turn"] - 1) % len(state["cursors"])
            seen.setdefault(state["cursors"][worker][0], []).extend(batch.keys)
            if all(cursor[0] == 2 for cursor in state["cursors"]):
                break
    assert sorted(seen[0]) == sorted(keys)
    assert sorted(seen[1]) == sorted(keys)
    assert seen[0] != seen[1]


def test_the_seed_and_the_epoch_make_the_order(tmp_path: Path) -> None:
    write(tmp_path, (8, 8))
    first = [batch.keys for batch in take(loader(tmp_path), 8)]
    assert first == [batch.keys for batch in take(loader(tmp_path), 8)]
    assert first != [batch.keys for batch in take(loader(tmp_path, seed=4), 8)]


# Going on


@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_continues_bitwise_across_epochs(tmp_path: Path, workers: int) -> None:
    keys = write(tmp_path, (5, 3, 3), regions=5)
    bad = tmp_path / "shard-00001-000.tar"
    write_shard(bad, [("01x000.json", b"{"), ("01x000.jpg", jpeg()), ("01x002.json", document()), ("01x002.jpg", b"")])
    source = loader(tmp_path, batch=3, workers=workers)
    batches, states = [], [json.dumps(source.state())]
    for batch in itertools.islice(iter(source), 16):
        batches.append(batch)
        states.append(json.dumps(source.state()))
    assert {key for batch in batches for key in batch.keys} < set(keys)
    for cut in (0, 1, 4, 7, 12):
        again = loader(tmp_path, batch=3, workers=workers, state=json.loads(states[cut]))
        for wanted, found in zip(batches[cut : cut + 4], take(again, 4), strict=True):
            assert same(wanted, found)
        assert json.dumps(again.state()) == states[cut + 4]  # the counts too


def test_iterating_again_goes_on(tmp_path: Path) -> None:
    write(tmp_path, (6, 5))
    wanted = take(loader(tmp_path, workers=2), 6)
    source = loader(tmp_path, workers=2)
    assert all(same(a, b) for a, b in zip(wanted, [*take(source, 3), *take(source, 3)], strict=True))


@pytest.mark.parametrize(
    "changed", [{"workers": 2}, {"world": 2}, {"rank": 1, "world": 2}, {"seed": 4}, {"shuffle": 6}, {"other": True}]
)
def test_another_topology_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    write(tmp_path, (6, 5))
    state = loader(tmp_path).state()
    if changed.pop("other", None):
        write(tmp_path, (6, 6))
        changed = {}
    with pytest.raises(DataError, match=r"cannot go on .* was .*, now it is"):
        loader(tmp_path, state=state, **changed)


# Rows


def test_boxes_and_pixels_on_the_padded_square(tmp_path: Path) -> None:
    """Scaled down, up, wide, tall and to an odd side: the coloured rectangle is where its box says."""
    box = (0.25, 0.5, 0.75, 1.0)
    for number, (size, part) in enumerate(
        {(256, 128): (1, 0.5), (16, 8): (1, 0.5), (40, 100): (13 / 32, 1), (90, 60): (1, 21 / 32)}.items()
    ):
        image = Image.new("RGB", size, "blue")
        image.paste((255, 0, 0), tuple(round(v * s) for v, s in zip(box, size * 2, strict=True)))  # type: ignore[arg-type]
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95, subsampling=0)
        region = Region(box, "w0", 0.5, 0, (0, 2))
        data = encode(sample("k", 1, regions=(region,)))
        (batch,) = take(loader(one(tmp_path / str(number), [("k.jpg", buffer.getvalue()), ("k.json", data)], 1), 1), 1)
        x, y = part
        assert batch.boxes.dtype == torch.float32
        assert batch.boxes[0, 0].tolist() == pytest.approx([0.25 * x, 0.5 * y, 0.75 * x, 1.0 * y], abs=1e-7)
        assert batch.images.shape == (1, 3, PX, PX)
        assert batch.images.dtype == torch.uint8
        x0, y0, x1, y1 = (batch.boxes[0, 0] * PX).round().int().tolist()
        red, _, blue = batch.images[0].int()
        assert red[y0 + 2 : y1 - 1, x0 + 2 : x1 - 2].min() > 200
        assert red[: y0 - 2].max() < 60
        assert blue[: y0 - 2, : round(x * PX)].min() > 200
        assert batch.images[0, :, round(y * PX) :].sum() == 0
        assert batch.images[0, :, :, round(x * PX) :].sum() == 0


def test_a_batch_has_each_phrase_once(tmp_path: Path) -> None:
    folder = one(
        tmp_path,
        [
            ("a.json", document(regions=[{"box": [0, 0, 1, 1], "phrase": p} for p in ("A  Cat", "dog", "a cat")])),
            ("a.jpg", jpeg()),
            ("b.json", document(regions=[{"box": [0, 0, 1, 0.5], "phrase": "DOG"}])),
            ("b.jpg", jpeg()),
            ("c.json", document(regions=[])),
            ("c.jpg", jpeg()),
        ],
        3,
    )
    (batch,) = take(loader(folder, batch=3), 1)
    row = {key: i for i, key in enumerate(batch.keys)}
    texts = [[i for i in ids if i > 1] for ids in batch.phrases.tolist()]
    assert sorted(texts) == sorted([word("a cat")[:-1], word("dog")[:-1]])
    assert batch.valid.sum(1)[[row["a"], row["b"], row["c"]]].tolist() == [3, 1, 0]
    for n, m in itertools.product(range(3), range(4)):
        if batch.valid[n, m]:
            told = {text_id("a cat"): word("a cat")[:-1], text_id("dog"): word("dog")[:-1]}
            assert texts[batch.phrase[n, m]] == told[int(batch.text_id[n, m])]
        else:
            assert batch.text_id[n, m] == batch.phrase[n, m] == batch.boxes[n, m].sum() == 0
    (batch,) = take(loader(one(tmp_path / "none", [("k.json", document(regions=[])), ("k.jpg", jpeg())], 1), 1), 1)
    assert batch.phrases.tolist() == [[1]]
    assert not batch.valid.any()


def test_text_ids_are_stable() -> None:
    assert text_id("A  red\tCAR ") == text_id("a red car") == 2**63 % 1 + text_id("A Red Car")
    assert 0 < text_id("") < 2**63
    assert text_id("a red car") != text_id("a red cat")
    assert text_id("\ud800") > 0


def test_a_draw_depends_on_seed_epoch_and_key_alone(tmp_path: Path) -> None:
    captions = [{"text": text, "model": "m"} for text in ("one", "two", "three")]
    regions = [{"box": [0, 0, 1, (i + 1) / 10], "phrase": f"p{i}"} for i in range(10)]
    data = document(captions=captions, regions=regions, alt_text="alt")
    members = [(f"{i:02}.{end}", d) for i in range(60) for end, d in (("json", data), ("jpg", jpeg()))]
    folder = one(tmp_path, members, 60)

    def drawn(**other: Any) -> dict[str, tuple[Any, ...]]:
        return {b.keys[0]: (b.captions.tolist(), b.boxes.tolist()) for b in epoch_of(folder, **other)[0]}

    first = drawn(alt=0.4)
    assert first == drawn(alt=0.4, shuffle=60)
    assert first != drawn(alt=0.4, seed=9)
    again = loader(folder, batch=60, alt=0.4)
    ((key, captions_of, boxes_of),) = ((b.keys, b.captions, b.boxes) for b in take(again, 2)[1:])  # the next epoch
    assert (
        sum(first[k] != ([c[:2].tolist()], [b.tolist()]) for k, c, b in zip(key, captions_of, boxes_of, strict=True))
        > 30
    )
    texts = Counter(caption[0][0] for caption, _ in first.values())
    share = texts[word("alt")[0]] / 60
    assert 0.2 < share < 0.6
    assert len(texts) == 4
    for _, boxes in first.values():
        assert len({box[3] for box in boxes[0]}) == 4  # M different regions
    assert len({json.dumps(boxes) for _, boxes in first.values()}) > 30
    assert {c[0][0] for c, _ in drawn().values()} == {word(t)[0] for t in ("one", "two", "three")}
    assert {c[0][0] for c, _ in drawn(alt=1.0).values()} == {word("alt")[0]}


def test_the_trainings_own_random_numbers_stay_where_they_are(tmp_path: Path) -> None:
    write(tmp_path, (6,))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    take(loader(tmp_path, workers=1), 2)
    take(loader(tmp_path), 2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])  # type: ignore[index]
    assert "TOKENIZERS_PARALLELISM" not in os.environ


# Hostile samples and tars


def test_a_bad_sample_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesl.models.cloc.data._MAX_PIXELS", 30 * 30)
    whole = jpeg()
    zoo: dict[str, tuple[bytes | None, bytes | None, str]] = {
        "good": (document(), whole, "used"),
        "grey": (document(), _as("L"), "used"),
        "cmyk": (document(), _as("CMYK"), "used"),
        "thin": (document(), jpeg((400, 1)), "used"),
        "nothing": (b"", whole, "bad_json"),
        "list": (b"[]", whole, "bad_json"),
        "binary": (b"\xff\xfe", whole, "bad_json"),
        "deep": (b"[" * 100_000, whole, "bad_json"),
        "digits": (b'{"a":' + b"1" * 10_000 + b"}", whole, "bad_json"),
        "huge": (b" " * (1 << 22) + document(), whole, "bad_json"),
        "otherkey": (document(key="good"), whole, "bad_json"),
        "uncaptioned": (document(captions=[]), whole, "no_caption"),
        "blank": (document(captions=[{"text": " \n"}, {"text": None}, "x", 3, {}]), whole, "no_caption"),
        "nocaptions": (document(captions="text"), whole, "no_caption"),
        "empty": (document(), b"", "decode_error"),
        "cut": (document(), whole[: len(whole) // 2], "decode_error"),
        "noise": (document(), b"\xff\xd8\xff" + bytes(range(256)), "decode_error"),
        "png": (document(), _as("RGB", "PNG"), "decode_error"),
        "bomb": (document(), jpeg((40, 40)), "image_too_large"),
        "imageless": (document(), None, "no_image"),
        "documentless": (None, whole, "no_json"),
        "strange": (document(url=3, sha256=[], alt_text={}, regions=[], image="x", width=None), whole, "used"),
        "surrogate": (document(captions=[{"text": "a \ud800 \x00 b"}]), whole, "used"),
    }
    members = [(f"{k}.{end}", d) for k, v in zoo.items() for end, d in (("json", v[0]), ("jpg", v[1])) if d is not None]
    batches, counts = epoch_of(one(tmp_path, members, len(zoo)))
    assert {batch.keys[0] for batch in batches} == {key for key, (_, _, end) in zoo.items() if end == "used"}
    assert counts == Counter(end for _, _, end in zoo.values()) + Counter(read=len(zoo))
    assert set(counts) <= {*REASONS, *NOTES, "read", "used"}


def _as(mode: str, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (20, 20)).save(buffer, form)
    return buffer.getvalue()


def test_a_bad_region_costs_that_region_alone(tmp_path: Path) -> None:
    good = {"box": [0.5, 0.5, 1, 1.0], "phrase": "good"}
    bad: list[Any] = [
        *({"box": box, "phrase": "p"} for box in (
            [0.5, 0, 0.4, 1], [0, 0.5, 1, 0.5], [-0.1, 0, 1, 1], [0, 0, 1.1, 1], [0, 0, 1], [0, 0, 1, 1, 1], "0011",
            ["0", "0", "1", "1"], [None] * 4, [[0]] * 4, {}, [0, 0, 10**400, 1], [False, False, True, True],
        )),
        {"box": [0, 0, 1, 1], "phrase": " "}, {"box": [0, 0, 1, 1], "phrase": 7}, {"box": [0, 0, 1, 1]},
        {"phrase": "p"}, None, [], "region", 4,
    ]  # fmt: skip
    text = json.dumps({"captions": [{"text": "c"}], "regions": [*bad, good]})
    text = text.replace(
        '"region"', '{"box": [NaN, 0, 1, Infinity], "phrase": "p"}, {"box": [0, 0, 1, NaN], "phrase": "p"}'
    )
    (batch,), counts = epoch_of(one(tmp_path, [("k.json", text.encode()), ("k.jpg", jpeg((20, 20)))], 1))
    assert batch.valid.sum() == 1
    assert batch.boxes[0, 0].tolist() == [0.5, 0.5, 1, 1]
    assert counts["bad_region"] == len(bad) + 1
    assert torch.isfinite(batch.boxes).all()


def test_ten_thousand_regions_take_little_memory(tmp_path: Path) -> None:
    regions = [{"box": [0, 0, 1, (i + 1) / 10_000], "phrase": f"thing {i}"} for i in range(10_000)]
    data = document(regions=regions)
    members = [(f"{i}.{end}", d) for i in range(4) for end, d in (("json", data), ("jpg", jpeg()))]
    folder = one(tmp_path, members, 4)
    tracemalloc.start()
    batches = take(loader(folder, batch=2), 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(batch.valid.all() for batch in batches)
    assert peak < 32 << 20


def hostile_tar(path: Path) -> None:
    """Whatever tar knows, and one good sample on either side of it."""
    secret = path.parent / "secret.json"
    secret.write_bytes(document())
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname, info.pax_headers = len(data), kind, link, pax
            tar.addfile(info, io.BytesIO(data))

        add("first.jpg", jpeg())
        add("first.json", document())
        add("first.json", document(captions=[]))  # the first counts
        add("folder/", kind=tarfile.DIRTYPE)
        for name in (
            "/etc/cron.json",
            "../up.json",
            "a/../../b.jpg",
            "folder/in.json",
            "two words.json",
            "x" * 300 + ".json",
        ):
            add(name, document())
        for i, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
        ):
            add(f"link{i}.json", kind=kind, link=str(secret))
            add(f"link{i}.jpg", jpeg())
        add("notes.txt", b"other members are nobody's fault")
        add("./last.json", document())
        add("./last.jpg", jpeg())
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("pax.json")
        info.size, info.pax_headers = len(document()), {"comment": "x" * (1 << 20)}  # its name cannot be known
        tar.addfile(info, io.BytesIO(document()))
        for end, data in (("json", document()), ("jpg", jpeg())):
            info = tarfile.TarInfo("short." + end)
            info.size, info.mtime = len(data), 1.5  # an extended header that changes nothing here
            tar.addfile(info, io.BytesIO(data))
            info = tarfile.TarInfo("wrong")
            info.size, info.pax_headers = len(data), {"path": "named." + end}
            tar.addfile(info, io.BytesIO(data))


def test_a_hostile_tar_is_safe(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    hostile_tar(tmp_path / "d" / "a.tar")
    write_index(tmp_path / "d", {"a.tar": 9})
    before = sorted(path.name for path in tmp_path.rglob("*"))
    batches, counts = epoch_of(tmp_path / "d")
    assert {batch.keys[0] for batch in batches} == {"first", "last", "short", "named"}
    assert counts == {"read": 9, "used": 4, "no_json": 5, "duplicate_member": 1, "bad_member": 12}
    with (tmp_path / "d" / "a.tar").open("rb") as file:
        entries, notes = walk(file)
    assert [entry.key for entry in entries][:4] == ["first", "last", "short", "named"]
    assert notes == {"duplicate_member": 1, "bad_member": 12}
    assert sorted(path.name for path in tmp_path.rglob("*")) == before  # nothing was extracted


@pytest.mark.parametrize("cut", ["header", "member", "mark", "garbage", "negative", "empty"])
def test_a_tar_that_ends_early_has_the_samples_before(tmp_path: Path, cut: str) -> None:
    write(tmp_path, (4,))
    path = tmp_path / "shard-00000-000.tar"
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        entries, notes = walk(file)
    assert not notes
    assert entries[3].jpg
    at = entries[3].jpg[0]
    if cut == "negative":
        info = tarfile.TarInfo("z.json")
        info.size = -(1 << 40)
        data[at - 512 : at] = info.tobuf(tarfile.GNU_FORMAT)
    new = {
        "header": data[: at - 300], "member": data[: at + 10], "mark": data[: at - 512],
        "garbage": data[: at - 512] + b"\x07" * 4096, "negative": data, "empty": b"",
    }[cut]  # fmt: skip
    path.write_bytes(new)
    with path.open("rb") as file:
        entries, notes = walk(file)
    assert len(entries) == (0 if cut == "empty" else 3)
    assert notes == {"bad_tar": 1}
    if entries:
        batches, counts = epoch_of(tmp_path)
        assert len(batches) == 3
        assert counts == {"read": 4, "used": 3, "missing_sample": 1, "bad_tar": 1}


def test_nothing_usable_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesl.models.cloc.loader._GIVE_UP", (20, 30))
    folder = one(tmp_path, [("a.json", b"{"), ("a.jpg", jpeg())], 1)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"none of 20 samples in a row can be used .*bad_json 20"):
            take(loader(folder, workers=workers), 1)


# Referenced images


def referenced(tmp_path: Path) -> tuple[list[tuple[str, bytes]], bytes]:
    """Samples that cite their images; and the tar with those."""
    images = [jpeg((20, 20), colour) for colour in ("red", "green", "blue")]
    (tmp_path / "download").mkdir(exist_ok=True)
    with (tmp_path / "download" / "part.tar").open("wb") as file:
        offsets = [add_member(file, f"{i}.jpg", data) for i, data in enumerate(images)]
        end_tar(file)
    tar = "download/part.tar"
    places = [{"tar": tar, "offset": o, "size": len(d)} for o, d in zip(offsets, images, strict=True)]
    hashes = [hashlib.sha256(data).hexdigest() for data in images]
    members = [(f"{i}.json", document(image=p, sha256=h)) for i, (p, h) in enumerate(zip(places, hashes, strict=True))]
    first = places[0]
    odd: dict[str, tuple[dict[str, Any], str]] = {
        "changed": (first, hashes[1]),
        "beyond": ({**first, "offset": 1 << 30}, ""),
        "negative": ({**first, "offset": -1}, ""),
        "large": ({**first, "size": 1 << 40}, ""),
        "gone": ({**first, "tar": "download/none.tar"}, ""),
        "up": ({**first, "tar": "../part.tar"}, ""),
        "inner": ({**first, "tar": "download/../part.tar"}, ""),
        "absolute": ({**first, "tar": str(tmp_path / "download" / "part.tar")}, ""),
        "remote": ({**first, "tar": "http://a/b.tar"}, ""),
        "number": ({**first, "tar": 3}, ""),
    }
    return members + [(f"{k}.json", document(image=i, sha256=h)) for k, (i, h) in odd.items()], images[0]


def test_referenced_images(tmp_path: Path) -> None:
    members, _ = referenced(tmp_path)
    folder = one(tmp_path / "pack", members, len(members))
    batches, counts = epoch_of(folder, images=str(tmp_path))
    assert {batch.keys[0]: batch.images[0, :, 5, 5].argmax().item() for batch in batches} == {"0": 0, "1": 1, "2": 2}
    assert counts == {"read": 13, "used": 3, "image_changed": 1, "image_unreadable": 2, "no_image": 7}
    with pytest.raises(DataError, match="no_image"):
        take(loader(folder), 1)


def test_a_bucket_behaves_like_a_folder(
    tmp_path: Path, store: Store, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(shards_module, "_BLOCK", 4096)  # several requests a shard
    members, _ = referenced(tmp_path)
    keys = write(tmp_path / "pack", (5, 6, 4))
    write_shard(tmp_path / "pack" / "shard-00001-000.tar", members)
    counts = {"shard-00000-000.tar": 5, "shard-00001-000.tar": len(members), "shard-00002-000.tar": 4}
    write_index(tmp_path / "pack", counts)
    for path in (*(tmp_path / "pack").iterdir(), tmp_path / "download" / "part.tar"):
        store.replace(f"{path.parent.name}/{path.name}", path.read_bytes())
    store.replace("takedown/a.txt", b"http://a.example/00x000\n")
    options = {"storage_options": request.getfixturevalue("s3_options")} if not store.local else {}
    wanted = loader(tmp_path / "pack", images=str(tmp_path), workers=2)
    expected = take(wanted, 20)
    assert {key for batch in expected for key in batch.keys} >= {"0", "1", "2", keys[0]}
    found = loader(f"{store.url}/pack", images=store.url, workers=2, **options)
    assert all(same(a, b) for a, b in zip(expected, take(found, 20), strict=True))
    assert found.counts == wanted.counts
    obeyed = loader(f"{store.url}/pack", images=store.url, takedown=f"{store.url}/takedown", **options)
    assert "00x000" not in {key for batch in take(obeyed, 20) for key in batch.keys}
    assert obeyed.counts["taken_down"] >= 2
    loader(f"{store.url}/pack", takedown=f"{store.url}/none", **options)


# Takedown


def test_takedown_lists_are_obeyed(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"x").hexdigest()
    key = "0123456789abcdef01234567"
    told = {
        key: document(),
        "hash": document(sha256=digest),
        "url": document(url="http://A.example:80/x#top"),
        "domain": document(url="https://img.cdn.bad.example/y"),
        "stays": document(url="https://notbad.example/y"),
    }
    members = [(f"{k}.{end}", d) for k, v in told.items() for end, d in (("json", v), ("jpg", jpeg()))]
    folder = one(tmp_path / "pack", members, 5)
    lists = tmp_path / "takedown"
    lists.mkdir()
    (lists / "1.txt").write_text(f"# why\n{key.upper()}\n{digest}\n")
    (lists / "2.txt").write_text("http://a.example/x\nbad.example  # all of it\n")
    (lists / "3.md").write_text("not a list")
    batches, counts = epoch_of(folder, takedown=str(lists))
    assert {batch.keys for batch in batches} == {("stays",)}
    assert counts == {"read": 5, "used": 1, "taken_down": 4}
    (lists / "2.txt").write_text("bad.example\nwhat is this\n")
    with pytest.raises(DataError, match=r"takedown: .*2\.txt:2: "):
        loader(folder, takedown=str(lists))
    (lists / "2.txt").unlink()
    more = tmp_path / "more"  # beside the store's own
    asked = {"batch": 1, "image_px": PX, "context": 8, "seed": 0, "takedown": str(lists)}
    with pytest.raises(DataError, match=r"there is no folder .*more"):
        Loader(folder, Data(takedown=str(more)), Words(), **asked)
    more.mkdir()
    (more / "x.txt").write_text("bad.example\n")
    found = Loader(folder, Data(takedown=str(more), workers=0), Words(), **asked)
    next(batch for batch in found if batch.keys == ("stays",))
    assert found.counts["taken_down"] >= 1
    assert len({batch.keys for batch, _ in zip(found, range(6), strict=False)}) == 2  # one is in no list any more


# What is missing


def test_a_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    write(tmp_path, (2, 2, 2))
    (tmp_path / "shard-00001-000.tar").unlink()
    with pytest.raises(DataError, match=r"1 of the 3 shards .* are not there: shard-00001-000\.tar$"):
        loader(tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(shards_module, "_PAUSES_S", ())
    write(tmp_path, (6, 6, 6))
    source = loader(tmp_path, batch=6, shuffle=2, workers=workers)
    (tmp_path / "shard-00001-000.tar").unlink()
    with caplog.at_level(logging.WARNING):
        batches = take(source, 6)
    assert {key[:2] for batch in batches for key in batch.keys} == {"00", "02"}
    assert 6 <= source.counts["shard_unreadable"] <= 24
    assert source.counts["read"] == source.counts["shard_unreadable"] + 36
    assert len([r for r in caplog.messages if "shard-00001-000.tar cannot be read" in r]) == 1


def test_a_fault_that_passes_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_PAUSES_S", (0.0, 0.0))
    faults: Iterator[Exception | None] = iter([TimeoutError("busy"), ConnectionResetError("busy"), None])

    def call() -> int:
        if fault := next(faults):
            raise fault
        return 7

    assert shards_module.patiently(call) == 7
    faults = iter([FileNotFoundError("lasting"), None])
    with pytest.raises(FileNotFoundError):
        shards_module.patiently(call)


def test_a_full_machine_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, (2,))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards_module, "walk", full)
    with pytest.raises(DataError, match=r"No space left on device while 1 shards are open in .*; make room"):
        take(loader(tmp_path), 1)


INDEXES = (
    None,
    "",
    "[]",
    '{"shards": 3}',
    '{"shards": []}',
    '{"shards": [{"name": "a.tar"}]}',
    '{"shards": [{"name": "../a.tar", "samples": 1}]}',
    '{"shards": [{"name": "a.tar", "samples": -1}]}',
    '{"shards": [{"name": "a.tar", "samples": NaN}]}',
    '{"shards": [{"name": "a.tar", "samples": 1}, {"name": "a.tar", "samples": 1}]}',
)


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_that_is_none(tmp_path: Path, index: str | None) -> None:
    one(tmp_path, [("a.json", document()), ("a.jpg", jpeg())], 1)
    (tmp_path / "index.json").unlink()
    if index is not None:
        (tmp_path / "index.json").write_text(index)
    with pytest.raises(DataError, match=r"index\.json"):
        loader(tmp_path)
    with pytest.raises(DataError, match="are too few for 2 ranks"):
        loader(one(tmp_path, [("a.json", document()), ("a.jpg", jpeg())], 1), world=2)


def test_an_incomplete_index_and_a_changed_shard_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, (3,))
    found = json.loads((tmp_path / "index.json").read_text())
    found["shards"][0] |= {"bytes": 5, "samples": 2}
    (tmp_path / "index.json").write_text(json.dumps({**found, "complete": False}))
    source = loader(tmp_path)
    take(source, 3)
    assert source.samples == 2
    assert source.index_sha256 == hashlib.sha256((tmp_path / "index.json").read_bytes()).hexdigest()
    for told in ("is not complete", "have not the size", "it has 3 samples, index.json says 2"):
        assert sum(told in message for message in caplog.messages) == 1


# Processes


def consume(folder: Path, pipe: Any) -> None:
    batches = iter(loader(folder, workers=2))
    while pipe.recv():
        pipe.send(next(batches).keys)
    raise SystemExit("an end that leaves the batches as they are")


@pytest.fixture
def consumer(tmp_path: Path) -> Iterator[tuple[Any, Any, list[psutil.Process]]]:
    """A process that takes batches when asked to, the pipe to it, and its loading processes at once."""
    write(tmp_path, (6, 5))
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    process = context.Process(target=consume, args=(tmp_path, other))
    process.start()
    other.close()
    pipe.send(True)
    while len(children := psutil.Process(process.pid).children()) < 2:
        assert process.is_alive()
        time.sleep(0.001)
    yield process, pipe, children
    process.kill()
    process.join()
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_processes_outlive_signals_to_the_group_but_not_their_consumer(
    tmp_path: Path, consumer: tuple[Any, Any, list[psutil.Process]]
) -> None:
    process, pipe, children = consumer
    for _ in range(20):  # from their very first moment on
        for child, number in itertools.product(children, (signal.SIGTERM, signal.SIGINT)):
            child.send_signal(number)
        time.sleep(0.01)
    found = [pipe.recv()]
    wanted = [batch.keys for batch in take(loader(tmp_path, workers=2), 40)]
    for _ in wanted[1:]:
        pipe.send(True)
        found.append(pipe.recv())
    assert found == wanted
    assert all(child.is_running() for child in children)
    process.kill()
    process.join()
    assert psutil.wait_procs(children, timeout=5)[1] == []


def test_a_process_of_multiprocessing_can_leave_in_the_middle(
    consumer: tuple[Any, Any, list[psutil.Process]],
) -> None:
    process, pipe, children = consumer
    pipe.recv()
    pipe.send(False)
    process.join(timeout=4)
    assert process.exitcode == 1
    assert psutil.wait_procs(children, timeout=1)[1] == []


LEAVING = """
import sys
from tests.models.cloc.test_data import loader, psutil
batches = iter(loader(sys.argv[1], workers=2))
next(batches)
print(*(child.pid for child in psutil.Process().children()))
"""


def test_leaving_in_the_middle_is_quick_and_quiet(tmp_path: Path) -> None:
    write(tmp_path, (6, 5))
    command = [sys.executable, "-c", LEAVING + "import time; print(time.time())", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ended = time.time()
    children, left = done.stdout.splitlines()
    assert done.stderr == ""
    assert ended - float(left) < 4
    assert not any(psutil.pid_exists(int(pid)) for pid in children.split())
