"""`vesl run --retry failed`: another try for what failed by a fault that may pass, and for nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import webserver as web
from tests.photos import photo
from tests.pipeline.test_dedup import PHOTOS
from tests.pipeline.test_dedup import jpeg as photograph
from tests.pipeline.test_run import shard_samples
from tests.world import World, jpeg
from vesl.models.contract import PlainCaptioner
from vesl.pipeline.plan import make_plan
from vesl.pipeline.retry import retry
from vesl.pipeline.run import run
from vesl.pipeline.store import Store
from vesl.transforms import urls


def failing(world: World, count: int = 8) -> list[str]:
    """A list in which three fail for now and one for good; the URLs."""
    rows = world.images(count)
    for i in (1, 3, 6):
        world.server.add(f"/{i}.jpg", web.status(503))
    world.server.add("/5.jpg", web.status(404))
    world.list_urls("a", rows)
    return [url for url, _ in rows]


def mend(world: World, *numbers: int) -> None:
    for i in numbers:
        world.server.add(f"/{i}.jpg", jpeg(i))


def outcomes(world: World) -> list[tuple[str, str]]:
    tables = sorted((Path(world.store) / "download").glob("*/part-*.parquet"))
    return [(row["key"], row["reason"] or "") for path in tables for row in pq.read_table(path).to_pylist()]


def test_what_may_pass_is_tried_again_and_reaches_the_shards(world: World) -> None:
    all_urls = failing(world)
    assert world.run("run").returncode == 0
    before = world.files()
    mend(world, 1, 6, 5)
    done = world.run("run", "--retry", "failed")
    assert done.returncode == 0, done.stderr
    assert "retry: 3 rows" in done.stderr
    assert {path: world.files()[path] for path in before if path.startswith(("input", "download", "caption"))} == {
        path: mark for path, mark in before.items() if path.startswith(("input", "download", "caption"))
    }
    keys = {urls.key(url) for k, url in enumerate(all_urls) if k not in (3, 5)}
    assert sorted(sample["json"]["key"] for sample in shard_samples(world)) == sorted(keys)
    assert world.server.hits["/5.jpg"] == 1  # gone for good: not asked again
    assert world.server.hits["/3.jpg"] == 2
    assert world.server.hits["/1.jpg"] == 2

    again = world.run("run", "--retry", "failed")
    assert "retry: 1 rows" in again.stderr
    mend(world, 3)
    assert "retry: 1 rows" in world.run("run", "--retry", "failed").stderr
    assert len(shard_samples(world)) == 7
    idle = world.run("run", "--retry", "failed")
    assert idle.returncode == 0
    assert "retry: 0 rows" in idle.stderr
    assert world.server.hits["/3.jpg"] == 4
    report = world.run("report")
    assert report.stdout.count("\n retry ") == 3
    # A list that is added later does not bring them back.
    world.list_urls("b", [(url, "again") for url in all_urls])
    assert world.run("run").returncode == 0
    assert len(shard_samples(world)) == 7
    assert world.server.hits["/5.jpg"] == 1


def test_a_retry_that_is_not_over_is_not_made_twice(world: World) -> None:
    failing(world)
    run(world.load())
    first = retry(make_plan(world.load()))
    assert first
    assert first["kept"] == 3
    assert retry(make_plan(world.load())) is None
    mend(world, 1, 3, 6)
    plan, complete = run(world.load(), retry_failed=True)
    assert complete
    assert len([i for i in plan.dataset["ingests"] if i.get("retry")]) == 1  # type: ignore[index]
    assert len(shard_samples(world)) == 7


@pytest.mark.parametrize("dies_at", ["input/00001.json", "dataset.json", "part-00002.parquet"])
def test_killed_while_making_it(world: World, monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
    failing(world)
    run(world.load())
    for method in ("create", "replace"):
        theirs = getattr(Store, method)

        def dying(self: Store, name: str, data: bytes, theirs: Any = theirs) -> Any:
            if name.endswith(dies_at):
                raise KeyboardInterrupt
            return theirs(self, name, data)

        monkeypatch.setattr(Store, method, dying)
    with pytest.raises(KeyboardInterrupt):
        retry(make_plan(world.load()))
    monkeypatch.undo()
    mend(world, 1, 3, 6)
    plan, complete = run(world.load(), retry_failed=True)
    assert complete
    assert json.loads((Path(world.store) / "dataset.json").read_text()) == plan.dataset
    assert [i["kept"] for i in plan.dataset["ingests"]] == [8, 3]  # type: ignore[index]
    assert len(shard_samples(world)) == 7


def moody() -> PlainCaptioner:
    """Runs out of memory over web captions with `huge` in them, unless MOODY_FINE is set."""

    def caption(images: Any, alt_texts: Any) -> list[list[str]]:
        if any("huge" in text for text in alt_texts) and not os.environ.get("MOODY_FINE"):
            raise MemoryError
        return [[f"{text} on a table"] for text in alt_texts]

    return caption


def test_a_fault_of_a_later_step_and_the_copies_of_what_failed(world: World) -> None:
    """An image that is tried again is no copy of itself, nor of a copy that was dropped for its sake."""
    world.document["steps"] |= {"dedup": {}, "caption": {"model": "tests.pipeline.test_retry:moody@1"}}
    world.document["limits"] = {"failed_fraction": 1.0}
    world.write()
    picture, other = (photograph(photo(place)) for place in PHOTOS[:2])
    same = [(world.server.add(f"/same{i}.jpg", picture), "a huge ball") for i in range(3)]
    world.list_urls("a", [*same, (world.server.add("/other.jpg", other), "a cat")])
    assert world.run("run").returncode == 0
    assert len(shard_samples(world)) == 1
    done = world.run("run", "--retry", "failed", env={"MOODY_FINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "retry: 1 rows" in done.stderr
    found = sorted(sample["json"]["captions"][0]["text"] for sample in shard_samples(world))
    assert found == ["a cat on a table", "a huge ball on a table"]


@pytest.mark.parametrize(
    ("override", "says"),
    [("dataset.only_parts=0", "dataset.only_parts leaves out"), ("steps.caption.use=FP", "the adopted caption")],
)
def test_where_parts_cannot_be_added(world: World, override: str, says: str) -> None:
    failing(world)
    assert world.run("run").returncode == 0
    (folder,) = (Path(world.store) / "caption").iterdir()
    done = world.run("run", "--retry", "failed", "--set", override.replace("FP", folder.name))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_what_a_takedown_list_names_is_not_tried_again(world: World, tmp_path: Path) -> None:
    all_urls = failing(world)
    assert world.run("run").returncode == 0
    (tmp_path / "list.txt").write_text(f"{all_urls[3]}\n")
    assert world.run("takedown", str(tmp_path / "list.txt")).returncode == 0
    mend(world, 1, 3, 6)
    assert "retry: 2 rows" in world.run("run", "--retry", "failed").stderr
    assert world.server.hits["/3.jpg"] == 1
