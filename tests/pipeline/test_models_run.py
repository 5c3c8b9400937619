"""Whole runs of the real command on the demo's photographs, with the real architectures, tiny and of random weights."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp import web

from tests.models.captioners.test_generate import llava
from tests.models.captioners.test_openai import Server, prompt_of, said
from tests.models.grounders import test_dino, test_owl
from tests.world import ROOT, World
from vesl.models import hub, open_captioner
from vesl.models.contract import Written
from vesl.models.options import Captioning
from vesl.pipeline.plan import make_plan
from vesl.pipeline.steps import caption as caption_step
from vesl.pipeline.steps.caption import Caption
from vesl.transforms.captions import CaptionRule, clean, examine
from vesl.transforms.outcomes import Drop

CHAIN = ("download", "caption", "phrases", "ground", "select", "pack")
PLAIN = {"model": "alt_text@1"}
KEY = "sk-of-this-test-only"


def tables(world: World, step: str) -> list[tuple[list[dict[str, Any]], dict[bytes, bytes]]]:
    """Rows and footer of each part of a step."""
    paths = sorted(Path(world.store, step).rglob("part-*.parquet"))
    return [(pq.read_table(path).to_pylist(), pq.read_metadata(path).metadata) for path in paths]


def rows(world: World, step: str) -> list[dict[str, Any]]:
    return [row for part, _ in tables(world, step) for row in part]


def images(world: World) -> dict[str, bytes]:
    """The stored JPEGs by key."""
    found = {}
    for path in sorted(Path(world.store, "download").rglob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {name.removesuffix(".jpg"): tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    return found


@pytest.fixture
def photographs(world: World) -> Iterator[World]:
    """A recipe for the dozen photographs of the demo and their bad neighbours, served as the demo does."""
    folder = world.folder / "lists"
    serving = subprocess.Popen([sys.executable, "deploy/photos.py", folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert serving.stdout is not None
    assert serving.stdout.readline() == b"ready\n"
    world.document["dataset"] |= {"source": str(folder / "urls.csv"), "rows_per_part": 8}
    del world.document["steps"]["phrases"]  # with the tagger that users have
    fetch = {"allow_networks": ["127.0.0.0/8"], "total_timeout_s": 2}
    world.document["steps"]["download"] = {"image": {"max_side_px": 640}, "fetch": fetch}
    world.document["limits"] = {"failed_fraction": 0.3}  # the bad neighbours
    world.document["engine"] = {"workers": 1, "caption": {"batch": 5, "threads": 2}, "ground": {"batch": 3}}
    yield world
    serving.kill()
    serving.wait()
    serving.stdout.close()


def accounted(world: World, captioned: int = 12) -> None:
    """Every row that a step kept has an outcome in the next one, in the same order, and the footers count the same."""
    plan = make_plan(world.load())
    assert plan.rows == 21  # of 23: the cat stands there twice, and one row has no URL
    kept = None
    for step in CHAIN:
        found = rows(world, step)
        assert kept is None or [row["key"] for row in found] == kept, step
        assert len(found) == sum(json.loads(footer[b"vesl"])["rows"] for _, footer in tables(world, step))
        kept = [row["key"] for row in found if row["outcome"] == "kept"]
        assert len(kept) == (12 if step == "download" else captioned), step
    assert len(images(world)) == 12


def boxes_within(world: World) -> None:
    """Every image with phrases has boxes, in falling order of score, and none has a corner outside of it."""
    found = zip(
        rows(world, "ground"), (row for row in rows(world, "phrases") if row["phrases"] is not None), strict=True
    )
    boxed = [(row, asked) for row, asked in found if asked["phrases"]]
    assert len(boxed) > 8
    for row, asked in boxed:
        assert row["key"] == asked["key"]
        assert row["detections"], row
        assert max(detection["phrase"] for detection in row["detections"]) < len(asked["phrases"])
        boxes = np.asarray([detection["box"] for detection in row["detections"]])
        assert boxes.min() >= 0
        assert boxes.max() <= 1
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        scores = [detection["score"] for detection in row["detections"]]
        assert scores == sorted(scores, reverse=True)


def owl(folder: Path) -> str:
    folder.mkdir()
    made = test_owl.make("owlv2", folder)
    return f"{made}@{hub.digest(made)}"


def test_transformers_and_owlv2(photographs: World, tmp_path: Path) -> None:
    world = photographs
    asked = {"model": llava(tmp_path / "captioner"), "prompts": ["Say {alt_text}", "Go on:"], "max_new_tokens": 8}
    world.document["steps"] |= {
        "caption": PLAIN | {"also": [asked], "rule": {"refusals": False}},
        "ground": {"model": owl(tmp_path / "grounder"), "score_floor": 0.001},
        "select": {"rule": {"score": 0.001}},
    }
    world.write()
    done = world.run("run", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    accounted(world)
    boxes_within(world)
    # The captions and notes are those of what the captioner says of the stored images, one by one.
    captioner, stored = open_captioner(Captioning(**asked | {"prompts": tuple(asked["prompts"])})), images(world)
    alts = {row["key"]: clean(row["alt_text"] or "") for row in rows(world, "input")}
    for row in rows(world, "caption"):
        alt, rule = alts[row["key"]], CaptionRule(refusals=False)
        expected = [(alt, "alt_text@1")] if alt else []
        for prompt, said_of in zip(
            asked["prompts"], captioner(captioner.prepare([stored[row["key"]]], [alt]))[0], strict=True
        ):
            assert isinstance(said_of, Written)
            prompted = prompt.format(alt_text=alt)
            if text := examine(said_of.text, rule, prompt=prompted, complete=said_of.complete).text:
                expected.append((text, asked["model"]))
        assert [(caption["text"], caption["model"]) for caption in row["captions"]] == expected
        assert len(row["captions"]) + sum(note["caption"] is None for note in row["caption_notes"]) == 3


def test_a_server_and_grounding_dino(photographs: World, tmp_path: Path) -> None:
    world, server = photographs, Server()

    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        asked = prompt_of(body)
        if "quokka" in asked:
            return web.Response(status=500)
        if "espresso" in asked:  # what a careless server says of a request that it does not like
            return web.Response(status=400, text=f"{KEY} asks for what I will not do")
        return said(f"A photograph with {asked.strip() or 'nothing'} in it.")

    server.answer = answer
    endpoint = {"url": server.url, "retries": 1, "timeout_s": 5.0}
    world.document["steps"] |= {
        "caption": {"model": "m@1", "backend": "openai", "prompts": ["{alt_text}", "a cat"], "endpoint": endpoint},
        "ground": {"model": test_dino.make_model(tmp_path / "grounder"), "score_floor": 0.001, "image_px": 96},
        "select": {"rule": {"score": 0.001}},
    }
    server.models = lambda request: web.json_response({"data": [{"id": "m"}]})
    world.write()
    done = world.run("run", env={"OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert set(server.keys) == {f"Bearer {KEY}"}
    alts = {row["key"]: clean(row["alt_text"] or "") for row in rows(world, "input")}
    for row in rows(world, "caption"):
        alt, texts = alts[row["key"]], [caption["text"] for caption in row["captions"] or []]
        if "quokka" in alt:  # its other caption is good; kept, nobody would ask for this one again
            assert (row["outcome"], row["reason"], texts) == ("failed", "endpoint_error", [])
        elif "espresso" in alt:
            assert (row["outcome"], texts) == ("kept", ["A photograph with a cat in it."])
            assert row["caption_notes"][0]["note"] == "endpoint_refused"
            assert "*** asks for what I will not do" in row["caption_notes"][0]["text"]
        else:
            assert texts == [f"A photograph with {alt or 'nothing'} in it.", "A photograph with a cat in it."]
            assert {caption["model"] for caption in row["captions"]} == {"m@1"}
    accounted(world, captioned=11)
    boxes_within(world)
    parsed = repr([tables(world, step) for step in ("input", *CHAIN)])
    assert "*** asks for" in parsed
    assert KEY not in parsed + done.stdout + done.stderr
    assert all(KEY.encode() not in data for data in world.contents("").values())
    shown = world.run("show", next(key for key, alt in alts.items() if "espresso" in alt), env={"OPENAI_API_KEY": KEY})
    assert "A photograph with a cat in it." in shown.stdout
    assert KEY not in shown.stdout
    server.close()


def test_a_fault_that_may_pass_fails_a_row_that_has_other_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answers:
        def prepare(self, jpegs: Any, alt_texts: Any) -> Any:
            return None

        def __call__(self, prepared: Any) -> list[list[Written | Drop]]:
            good = Written("A dog runs over the lawn.")
            found = [Drop("endpoint_error", "503"), Drop("out_of_memory"), Drop("endpoint_refused", "413"), good]
            return [[good, each] for each in found]

    monkeypatch.setattr(caption_step, "open_captioner", lambda options: Answers())
    batch = pa.table({"key": list("abcd"), "image": [b""] * 4, "alt_text": [""] * 4})
    rows = Caption("m:m@1", prompts=("one", "two")).open()(batch).to_pylist()
    assert [(row["outcome"], row["reason"]) for row in rows] == [
        ("failed", "endpoint_error"),
        ("failed", "out_of_memory"),
        ("kept", None),
        ("kept", None),
    ]
    assert rows[0]["detail"] == "503"
    assert [len(row["captions"] or []) for row in rows] == [0, 0, 1, 2]


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
