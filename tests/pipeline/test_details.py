"""Smaller things that a whole run must get right: order, redirects, long calls, the report and the picture."""

import time
from collections import Counter

from tests import webserver as web
from tests.pipeline.test_kill import kill, start
from tests.pipeline.test_run import shard_samples
from tests.world import World, jpeg
from vesl.pipeline.plan import make_plan
from vesl.pipeline.show import _COLOURS, find, kept_regions, picture
from vesl.transforms import urls


def test_a_part_goes_on_to_its_next_step_before_many_others_begin(world: World) -> None:
    world.list_urls("a", world.images(25))
    assert world.run("run", "--set", "engine.workers=1").returncode == 0
    done = [(event["part"], event["step"]) for event in world.events() if event["kind"] == "done"]
    under_way: set[int] = set()
    for part, step in done:
        under_way.add(part)
        assert len(under_way) <= 2  # at a part's last rows the worker begins with the step's next, and never with more
        if step == "pack":
            under_way.remove(part)
    assert not under_way


def test_a_model_that_cannot_be_opened_ends_the_run(world: World) -> None:
    world.list_urls("a", world.images(10))
    done = world.run("run", "--set", "steps.caption.model=no.such.module:model@1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("vesl: model: no.such.module:model@1: No module named")
    assert "part 0" not in done.stderr  # no matter of a part: nothing is tried again


def test_a_redirect_is_noted(world: World) -> None:
    url = world.server.add("/moved.jpg", web.redirect("/there.jpg"))
    world.server.add("/there.jpg", jpeg(1))
    world.list_urls("a", [(url, "a red ball")])
    assert world.run("run", "--until", "download").returncode == 0
    (history,) = find(make_plan(world.load()), [urls.key(url)])
    assert history["final_url"] == f"{world.server.url}/there.jpg"


def test_a_worker_in_a_long_call_ends_with_its_driver(world: World) -> None:
    world.list_urls("a", world.images(2))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    assert world.run("run", "--until", "download").returncode == 0
    process = start(world, {"STANDIN_WAIT_S": "60"})
    time.sleep(4)
    assert process.poll() is None
    kill(process)  # asserts that its workers are gone in ten seconds


def test_report_names_the_frequent_phrases(world: World) -> None:
    world.list_urls("a", world.images(8))
    assert world.run("run").returncode == 0
    regions = Counter(region["phrase"].lower() for s in shard_samples(world) for region in s["json"]["regions"])
    shown = " ".join(world.run("report").stdout.split())
    for phrase, count in regions.most_common(3):
        assert f"{phrase} ({count})" in shown


def test_a_picture_has_the_kept_boxes_where_they_belong(world: World) -> None:
    world.list_urls("a", world.images(1))  # 160 x 120
    assert world.run("run", "--until", "download").returncode == 0
    plan = make_plan(world.load())
    (history,) = find(plan, [urls.key(f"{world.server.url}/0.jpg")])
    history["phrases"] = [{"text": "a ball"}, {"text": "a box"}]
    boxes = ([0.25, 0.5, 0.5, 0.75], [0.75, 0.1, 0.9, 0.9], [0.5, 0.25, 0.75, 1.0])
    history["detections"] = [{"box": box, "phrase": i % 2, "score": 0.2 + i / 10} for i, box in enumerate(boxes)]
    history["verdicts"] = ["kept", "low_score", "kept"]
    assert kept_regions(history) == [(boxes[2], "a ball", 0.4), (boxes[0], "a ball", 0.2)]
    image = picture(plan, history)
    assert image is not None
    assert image.size == (480, 360)
    wanted = tuple(int(_COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    for x0, _, x1, y1 in (boxes[0], boxes[2]):
        assert image.getpixel((int(x0 * 480) + 1, int(y1 * 360) - 2)) == wanted
        assert image.getpixel((int(x1 * 480) - 2, int(y1 * 360) - 2)) == wanted
        assert image.getpixel((int((x0 + x1) * 240), int(y1 * 360) - 20)) != wanted
    assert image.getpixel((int(0.9 * 480) - 2, int(0.9 * 360) - 2)) != wanted
