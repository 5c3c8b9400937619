"""One result, whoever makes it: every engine with 1, 2 and 4 workers, and the demo's recipe on each. Run by hand."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.test_engine_beam import forget, tables
from tests.webserver import WebServer
from tests.world import ROOT, VESL, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REMADE = ("phrases", "select", "pack")
WORKERS = [(kind, workers) for kind in ("local", "ray", "beam") for workers in (1, 2, 4)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What engine `local` made of 40 images in 8 parts."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("made"), server)
        world.list_urls("a", world.images(40))
        done = world.run("run")
        assert done.returncode == 0, done.stderr
        yield world


@pytest.mark.parametrize(("kind", "workers"), WORKERS)
def test_phrases_select_and_pack_are_the_same_bytes(made: World, kind: str, workers: int) -> None:
    pytest.importorskip({"ray": "ray", "beam": "apache_beam"}.get(kind, "vesl"))
    want, grounded = tables(made, *REMADE), made.files("ground")
    forget(made, *REMADE)
    assert not tables(made, *REMADE)
    made.bare = kind != "ray"
    sets = [f"engine.kind={kind}", f"engine.workers={workers}"]
    if kind == "ray":  # where a pool would not grow for so little
        sets += [f"engine.{step}.min_workers={workers}" for step in REMADE]
    done = made.run("run", *(word for option in sets for word in ("--set", option)))
    assert done.returncode == 0, done.stderr
    assert tables(made, *REMADE) == want
    assert len(want) == 8 * 4  # a table for each part and step, and a shard for each part
    assert made.files("ground") == grounded  # made from the phrases as they were, so found done


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo's list, served."""
    folder = tmp_path_factory.mktemp("photos")
    serving = subprocess.Popen([sys.executable, "deploy/photos.py", folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert serving.stdout is not None
    assert serving.stdout.readline() == b"ready\n"
    yield folder / "urls.csv"
    serving.kill()
    serving.wait()
    serving.stdout.close()


def test_the_demo_from_urls_to_shards(photographs: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    pytest.importorskip("apache_beam")
    found = {}
    for kind in ("local", "ray", "beam"):
        store = tmp_path / kind
        options = (f"dataset.source={photographs}", f"store={store}", f"engine.kind={kind}")
        sets = [word for option in options for word in ("--set", option)]
        done = subprocess.run(
            [*VESL, "run", "deploy/recipes/demo.yaml", *sets], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (index,) = map(json.loads, map(Path.read_text, (store / "pack").glob("*/index.json")))
        assert index["complete"]
        found[kind] = index["samples"], index["regions"], {shard["name"]: shard["sha256"] for shard in index["shards"]}
    assert found["local"][0] == 11  # of 12 photographs, one has no caption
    assert found["local"][1] > 11
    assert found["ray"] == found["local"]
    assert found["beam"] == found["local"]
