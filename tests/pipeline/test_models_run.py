"""Whole runs of the real command with the real architectures, of tiny size and random weights."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.models.captioners.test_generate import llava
from tests.models.captioners.test_openai import Server
from tests.models.grounders import test_dino, test_owl
from tests.world import World
from vesl.models import hub

PLAIN = {"model": "alt_text@1"}


def table(world: World, step: str) -> list[dict[str, Any]]:
    """All rows of a step."""
    paths = sorted(Path(world.store, step).rglob("part-*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def owl(folder: Path) -> str:
    folder.mkdir()
    made = test_owl.make("owlv2", folder)
    return f"{made}@{hub.digest(made)}"


def dino(folder: Path) -> str:
    return test_dino.make_model(folder)


@pytest.mark.parametrize("grounder", [owl, dino])
def test_a_run_with_transformers(world: World, tmp_path: Path, grounder: Any) -> None:
    world.list_urls("a", world.images(6))
    captioner = llava(tmp_path / "captioner")
    world.document["steps"] |= {
        "caption": PLAIN | {"also": [{"model": captioner, "prompts": ["Say {alt_text}", ""], "max_new_tokens": 8}]},
        "ground": {"model": grounder(tmp_path / "grounder"), "score_floor": 0.001},
        "select": {"rule": {"score": 0.001}},
    }
    world.document["engine"] = {"workers": 1}
    world.write()
    done = world.run("run", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    captions = table(world, "caption")
    assert {row["outcome"] for row in captions} == {"kept"}
    assert captions[0]["captions"][0]["model"] == "alt_text@1"
    named = {entry["model"] for row in captions for entry in [*row["captions"], *row["caption_notes"]]}
    assert named == {"alt_text@1", captioner}
    found = table(world, "ground")
    assert len(found) == 6
    assert {row["outcome"] for row in found} == {"kept"}
    assert all(row["detections"] for row in found)
    for row in found:
        scores = [detection["score"] for detection in row["detections"]]
        assert scores == sorted(scores, reverse=True)


def test_a_run_with_a_server(world: World) -> None:
    world.list_urls("a", world.images(6))
    server = Server()
    key = "sk-of-this-test-only"
    endpoint = {"url": server.url, "retries": 1, "timeout_s": 5.0}
    caption = {"model": "org/model@1", "backend": "openai", "prompts": ["{alt_text}", "a cat"], "endpoint": endpoint}
    world.document["steps"]["caption"] = caption
    world.write()
    try:
        done = world.run("run", env={"OPENAI_API_KEY": key})
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert len(server.bodies) == 12
    assert set(server.keys) == {f"Bearer {key}"}
    rows = table(world, "caption")
    assert [entry["text"] for entry in rows[0]["captions"]] == [
        f"About {rows[0]['captions'][0]['text'][6:]}",
        "About a cat.",
    ]
    assert all(key.encode() not in data for data in world.contents("").values())
    world.list_urls("b", world.images(1, first=50))
    done = world.run("run")  # and now it is gone
    assert done.returncode == 1
    assert server.url in done.stderr
    assert "Traceback" not in done.stderr
    shown = world.run("show", rows[0]["key"])
    assert "About a cat." in shown.stdout


def test_weights_that_changed_end_the_run_in_one_line(world: World, tmp_path: Path) -> None:
    world.list_urls("a", world.images(1))
    world.document["steps"]["ground"] = {"model": owl(tmp_path / "grounder")}
    world.write()
    (config,) = (tmp_path / "grounder").rglob("config.json")
    config.write_text(config.read_text() + " ")
    done = world.run("run")
    assert done.returncode == 1
    assert "the folder has other content; as it is now, it is " in done.stderr
    assert "Traceback" not in done.stderr
