"""Shards by reference: the JSON alone, and for the trainer's loader the same samples as with the images inside."""

import glob
import itertools
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from tests.models.cloc.test_data import Words
from tests.pipeline.test_takedown import inline
from tests.webserver import WebServer
from tests.world import World
from vesl.models.cloc.loader import Loader
from vesl.models.cloc.options import Data
from vesl.pipeline.engines import local
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.run import run
from vesl.pipeline.steps.pack import Pack
from vesl.pipeline.store import Store
from vesl.transforms.options import identity
from vesl.transforms.shards import decode

REFERENCE = "steps.pack.images=reference"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plan, Plan]]:
    """11 samples, packed with their images and by reference."""
    with WebServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "run", inline)
        world = World(tmp_path_factory.mktemp("world"), server)
        world.list_urls("a", world.images(11))
        yield tuple(run(world.load(*overrides))[0] for overrides in ((), (REFERENCE,)))  # type: ignore[misc]


def batches(
    plan: Plan, url: str | None = None, options: dict[str, Any] | None = None
) -> tuple[list[Any], Counter[str]]:
    """Two epochs of what the trainer reads."""
    store = url or plan.store.url
    loader = Loader(
        f"{store}/{plan.steps[-1].folder}", Data(workers=0, shuffle=4), Words(), batch=2, image_px=64, context=8,
        seed=3, images=store, storage_options=options,
    )  # fmt: skip
    found = list(itertools.islice(iter(loader), 11))
    return [(b.keys, b.images.tolist(), b.boxes.tolist(), b.phrases.tolist()) for b in found], loader.counts


def test_the_trainer_reads_the_same_samples(packed: tuple[Plan, Plan]) -> None:
    embedded, counts = batches(packed[0])
    assert batches(packed[1]) == (embedded, counts)
    assert counts == {"read": 22, "used": 22}


def test_also_from_a_bucket(packed: tuple[Plan, Plan], tmp_path: Path, s3_options: dict[str, Any]) -> None:
    bucket = Store(f"s3://bucket/{tmp_path.name}", s3_options)
    bucket.fs.put(f"{packed[1].store.root}/", f"{bucket.root}/", recursive=True)
    assert batches(packed[1], bucket.url, s3_options) == batches(packed[0])


def test_the_shards_hold_the_json_alone(packed: tuple[Plan, Plan]) -> None:
    embedded, reference = ([*_documents(plan)] for plan in packed)
    assert [d for d in reference if "image" not in d] == []
    download = packed[1].steps[0].folder
    for document, other in zip(reference, embedded, strict=True):
        place = document.pop("image")
        assert list(place) == ["tar", "offset", "size"]
        assert place["tar"].startswith(f"{download}/part-0000")
        assert document == other
        assert decode(json.dumps(document | {"image": place}).encode()).key == document["key"]
    for path in _shards(packed[1]):
        with tarfile.open(path) as tar:
            assert {name.rpartition(".")[2] for name in tar.getnames()} == {"json"}
    sizes = [sum(Path(path).stat().st_size for path in _shards(plan)) for plan in packed]
    assert sizes[1] < sizes[0]


def _shards(plan: Plan) -> list[str]:
    return sorted(glob.glob(f"{plan.store.root}/{plan.steps[-1].folder}/shard-*.tar"))


def _documents(plan: Plan) -> Iterator[dict[str, Any]]:
    for sample in webdataset.WebDataset(_shards(plan), shardshuffle=False, empty_check=False).decode():
        yield sample["json"]


def test_packing_by_reference_reads_no_image(packed: tuple[Plan, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = packed[1]
    for name in plan.store.names(plan.steps[-1].folder, "part-"):
        plan.store.remove(f"{plan.steps[-1].folder}/{name}")

    def refuse(*_: Any) -> None:
        raise AssertionError("an image was read")

    before = [Path(path).read_bytes() for path in _shards(plan)]
    monkeypatch.setattr(local, "run", inline)
    monkeypatch.setattr(Store, "read_ranges", refuse)
    assert run(plan.recipe)[1]
    assert [Path(path).read_bytes() for path in _shards(plan)] == before
    assert make_plan(plan.recipe).missing(plan.steps[-1]) == ()


def test_the_option_leaves_earlier_fingerprints_alone() -> None:
    assert identity(Pack()) == {"max_shard_bytes": 1 << 29}
    assert identity(Pack(images="reference")) == {"max_shard_bytes": 1 << 29, "images": "reference"}
