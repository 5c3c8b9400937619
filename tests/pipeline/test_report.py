"""The report against what the store's tables say, counted here in plain Python, and its HTML against hostile text."""

import base64
import hashlib
import io
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.webserver import WebServer
from tests.world import VESL, World
from vesl.pipeline.cli import main
from vesl.pipeline.plan import Plan, make_plan
from vesl.pipeline.report import build, gallery, statistics
from vesl.pipeline.report.statistics import AREA_BINS, CELLS, Place, Statistics, database, measure
from vesl.pipeline.run import run
from vesl.pipeline.show import find

RLO, ZERO_WIDTH = "\u202e", "\u200b"
HOSTILE = f"A dog says &lt;script&gt;alert(1)&lt;/script&gt; \"to' {RLO}a cat{ZERO_WIDTH} & <b>two</b> birds"
CAPTIONS = {
    0: HOSTILE,
    1: "",
    2: "A red ball and a red ball on a red ball",
    3: "the dog and the cat and the bird and the horse and the cow",
    4: "</textarea></script><script>document.title='hacked'</script><img src=x onerror=alert(2)>a dog",
    5: "A red ball",
}
NONE = pa.array([], pa.string())


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A store of a dozen images, some with hostile captions, and one dead link."""
    with WebServer() as server:
        world = World(tmp_path_factory.mktemp("report"), server)
        world.list_urls("a", [*world.images(12, captions=CAPTIONS), (f"{server.url}/gone.jpg", HOSTILE)])
        assert world.run("run").returncode == 0
        yield world


@pytest.fixture(scope="module")
def page(filled: World) -> str:
    done = filled.run("report")
    assert done.returncode == 0, done.stderr
    assert f"page: {filled.folder}/report.html" in done.stdout
    return (filled.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def plan(filled: World) -> Plan:
    return make_plan(filled.load())


def histories(plan: Plan) -> list[dict[str, Any]]:
    """All images that select kept."""
    return [h for h in find(plan, [""]) if h["steps"].get("select", [""])[0] == "kept"]


def regions(history: dict[str, Any]) -> list[tuple[tuple[float, ...], str, float]]:
    found = zip(history["detections"], history["verdicts"], strict=True)
    return [
        (tuple(d["box"]), history["phrases"][d["phrase"]]["text"].lower(), d["score"]) for d, v in found if v == "kept"
    ]


def measured(plan: Plan, taken: pa.Array = NONE) -> Statistics:
    with database(plan) as db:
        return measure(plan, taken, db)


@pytest.mark.parametrize(("rows", "fold"), [(1, 9), (1, 1_000_000), (16_384, 1_000_000)])
def test_statistics_are_what_the_tables_say(plan: Plan, rows: int, fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, added up now and then or at the end, and all at once."""
    monkeypatch.setattr(statistics, "_ROWS", rows)
    monkeypatch.setattr(statistics, "_FOLD_ROWS", fold)
    found, images = measured(plan), histories(plan)
    per_image = [regions(history) for history in images]
    all_regions = [region for image in per_image for region in image]
    assert len(images) > 8
    assert len(all_regions) > 20
    assert found.images == len(images)
    assert found.regions == len(all_regions)
    assert found.verdicts == Counter(v for h in images for v in h["verdicts"])
    assert found.per_image == Counter(map(len, per_image))
    phrases = Counter(text for _, text, _ in all_regions)
    assert dict(found.phrases) == dict(sorted(phrases.items(), key=lambda p: (-p[1], p[0]))[:40])
    assert found.distinct == len(phrases)
    assert sum(n for _, n in found.heads) == len(all_regions)
    assert dict(found.heads)["ball"] == sum(n for text, n in phrases.items() if text.split()[-1] == "ball")
    captions = [c["text"].split() for h in images for c in h["captions"]]
    assert found.caption_words == pytest.approx(sum(map(len, captions)) / len(captions))
    assert found.phrase_words == pytest.approx(sum(len(t.split()) for _, t, _ in all_regions) / len(all_regions))
    detections = [(d["score"], v) for h in images for d, v in zip(h["detections"], h["verdicts"], strict=True)]
    assert found.scores.sum() == len(detections)
    assert found.scores[:25, 0].sum() == sum(v == "kept" and s < 0.5 for s, v in detections)
    areas = np.asarray([(b[2] - b[0]) * (b[3] - b[1]) for b, _, _ in all_regions])
    assert found.areas[-4:].sum() == (areas >= 0.1).sum()  # of 20 bins, the last four are the last power of ten
    assert len(found.areas) == AREA_BINS
    assert found.areas.sum() == len(areas)
    best = sorted((max(s for *_, s in image), h["key"]) for h, image in zip(images, per_image, strict=True) if image)
    assert sorted((place.score, place.key) for place in found.best) == best
    assert len(found.sample) == len(all_regions)
    assert {v: len(p) for v, p in found.judged.items()} == {
        v: min(n, 24) for v, n in found.verdicts.items() if v != "kept"
    }


def test_the_heat_map_counts_the_regions_over_each_cell(plan: Plan) -> None:
    counted = np.zeros((CELLS, CELLS), int)
    for history in histories(plan):
        for box, _, _ in regions(history):
            x0, y0, x1, y1 = (x * CELLS for x in box)
            counted[int(np.floor(y0)) : int(np.ceil(y1)), int(np.floor(x0)) : int(np.ceil(x1))] += 1
    assert (measured(plan).heat == counted).all()
    assert counted.max() > 3


def test_false_negatives_are_those_of_all_batches_together(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of M regions of every image, and every pair of images, with replacement: a batch of N = 2."""
    monkeypatch.setattr(statistics, "BATCHES", (2,))
    found = {c.regions: c for c in measured(plan).conflicts}
    texts = [[text for _, text, _ in regions(history)] for history in histories(plan)]
    assert any(len(set(image)) < len(image) for image in texts)
    for m in (1, 2, 4):
        shown, own, drawn = [], [], 0.0
        for image in texts:
            draws = list(itertools.combinations(image, min(m, len(image))))
            shown.append({t: sum(d.count(t) for d in draws) / len(draws) for t in set(image)})
            own.append(sum(n * (n - 1) for d in draws for n in Counter(d).values()) / len(draws))
            drawn += sum(shown[-1].values()) / len(texts)
        others = (
            sum(n * b.get(t, 0.0) for a, b in itertools.product(shown, repeat=2) for t, n in a.items())
            / len(texts) ** 2
        )
        assert found[m].equal == pytest.approx((2 * others + 2 * sum(own) / len(texts)) / (2 * drawn), rel=1e-5)
        assert found[m].negatives == pytest.approx(2 * drawn - 1)


def test_what_takedown_lists_name_is_neither_counted_nor_shown(filled: World, plan: Plan) -> None:
    before = measured(plan)
    gone = next(h for h in histories(plan) if len(regions(h)) > 2)
    folder = Path(filled.store, "takedown")
    folder.mkdir()
    (folder / "00001.txt").write_text(gone["key"] + "\n")
    try:
        html, after = build(make_plan(filled.load()), None, "recipe")
    finally:
        (folder / "00001.txt").unlink()
        folder.rmdir()
    assert after.images == before.images - 1
    assert after.regions == before.regions - len(regions(gone))
    assert gone["key"] not in html
    assert gone["key"] in build(plan, None, "recipe")[0]
    assert "1 samples that takedown lists name" in html


@dataclass
class Card:
    group: str
    score: str
    text: str
    jpeg: bytes = b""
    size: tuple[int, int] = (0, 0)
    boxes: list[dict[str, str]] = field(default_factory=list)


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.cards: list[Card] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.script = self.text = self.policy = ""
        self._in = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        self._in = tag
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[name] for name in ("href", "src", "xlink:href", "action", "data") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        if tag == "meta" and given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "article":
            self.cards.append(Card(given["data-group"], given["data-score"], given["data-text"]))
        if tag == "img":
            self.cards[-1].jpeg = base64.b64decode(given["src"].removeprefix("data:image/jpeg;base64,"), validate=True)
            self.cards[-1].size = (int(given["width"]), int(given["height"]))
        if tag == "rect" and "data-box" in given:
            self.cards[-1].boxes.append(given)

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.script += data
        elif self._in != "style":
            self.text += data


def test_the_page_stands_alone(page: str) -> None:
    found = Page(page)
    assert found.tags["script"] == 1
    assert found.handlers == []
    assert all(link.startswith(("data:image/", "#")) for link in found.links)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in found.policy
    digest = base64.b64encode(hashlib.sha256(found.script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in found.policy
    assert len(found.ids) == len(set(found.ids))
    for reference in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', page):
        assert "".join(reference) in found.ids


def test_hostile_text_stays_text_and_is_seen(page: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Page(page)
    assert "says alert(1) \"to' \ufffda cat\ufffd & two birds" in found.text  # the caption step has cleaned this one
    assert f"{HOSTILE}".replace(RLO, "\ufffd").replace(ZERO_WIDTH, "\ufffd") in found.text  # the web's own alt text
    assert CAPTIONS[4] in found.text
    found = Page(hostile(plan, monkeypatch))
    assert found.text.count(NASTY) > 20
    assert found.tags["script"] == 1
    assert not {"iframe", "base", "textarea"} & found.tags.keys()
    assert found.handlers == []
    assert not {c for c in page if not c.isprintable()} - {"\n"}


def test_texts_without_end_do_not_make_a_page_without_end(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    short = len(hostile(plan, monkeypatch))
    monkeypatch.setattr("tests.pipeline.test_report.NASTY", NASTY * 1000)
    assert len(hostile(plan, monkeypatch)) < 10 * short


def test_what_a_recipe_names_is_no_markup_of_the_terminal(filled: World, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", str(filled.recipe), "--set", 'steps.caption.model="tests.standins:captioner@[/b]"'])
    assert exit_.value.code == 0
    assert "[/b]" in capsys.readouterr().out


NASTY = "\"'><script>window.hacked=1</script><iframe src=//evil><base href=//evil></style></textarea>{{ 7*7 }}\\"


def hostile(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> str:
    """The page where every text of every picture is as nasty as no step would let it through."""
    rows = gallery._rows

    def worse(*arguments: Any) -> dict[str, dict[str, Any]]:
        found = rows(*arguments)
        for row in found.values():
            row |= {"url": NASTY, "alt_text": NASTY, "captions": [{"text": NASTY, "model": NASTY}] * 2}
            row["phrases"] = [{"text": NASTY} for _ in row.get("phrases") or ()]
        return found

    monkeypatch.setattr(gallery, "_rows", worse)
    return build(plan, None, NASTY)[0]


def test_every_reason_and_verdict_with_a_picture_has_one(page: str, plan: Plan) -> None:
    found = Page(page)
    groups = Counter(card.group for card in found.cards)
    assert groups["caption: empty_caption"] == 1
    judged = measured(plan).verdicts.keys() - {"kept"}
    assert judged
    assert judged <= groups.keys()
    assert sum(group.startswith("decile ") for group in groups) == 10
    assert groups["the best"] == groups["the worst that were kept"] == 8
    best = [float(card.score) for card in found.cards if card.group == "the best"]
    every = sorted((max(s for *_, s in regions(h)) for h in histories(plan) if regions(h)), reverse=True)
    assert best == pytest.approx(every[:8])
    for card in found.cards:
        image = Image.open(io.BytesIO(card.jpeg))
        image.load()
        assert max(image.size) <= 384
        assert not image.getexif()


def test_boxes_are_drawn_where_they_are(page: str, plan: Plan) -> None:
    known = {
        tuple(f"{x * side:.1f}" for x, side in zip((b[0], b[1], b[2] - b[0], b[3] - b[1]), (160, 120) * 2, strict=True))
        for h in histories(plan)
        for b in (d["box"] for d in h["detections"])
    }
    cards = Page(page).cards
    for card in cards:
        assert card.size == (160, 120)
        for box in card.boxes:
            assert (box["x"], box["y"], box["width"], box["height"]) in known
        if card.group != "caption: empty_caption":
            assert sum("chosen" in box["class"] for box in card.boxes) == 1
        if card.group == "low_score":
            assert ["dropped" in box["class"] for box in card.boxes if "chosen" in box["class"]] == [True]


def test_two_recipes_are_compared_region_by_region(filled: World) -> None:
    other = filled.folder / "other.yaml"
    other.write_text("base: recipe.yaml\nsteps: {select: {rule: {score: 0.6, max_area: 0.2}}}\n")
    strict = ("steps.select.rule.score=0.6", "steps.select.rule.max_area=0.2")
    run(filled.load(*strict))
    done = filled.run("report", "--set", "steps.select.rule.score=0.3", str(other))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("download") == 2
    found = Page((filled.folder / "report.html").read_text(encoding="utf-8"))
    assert "Compared are only" not in found.text
    sets = [
        {(h["key"], box, text) for h in histories(make_plan(filled.load(*options))) for box, text, _ in regions(h)}
        for options in ((), strict)
    ]
    assert sets[1] < sets[0]
    text = " ".join(found.text.split())
    assert f"regions that both keep{len(sets[1])} only the first{len(sets[0] - sets[1])}" in text
    assert "only the second0" in text
    assert re.search(r"select\.rule\.max_area\s*1\.0\s*0\.2", text)
    cards = [card for card in found.cards if card.group.startswith("only ")]
    keys = {key for key, _, _ in sets[0] - sets[1]}
    assert len(cards) == len(keys)
    drawn = sum("chosen" in box["class"] for card in cards for box in card.boxes)
    assert drawn == len(sets[0] - sets[1])


@pytest.mark.parametrize("swap", [False, True])
def test_what_only_one_recipe_has_done_is_not_compared(filled: World, plan: Plan, swap: bool) -> None:
    """Regions of parts that the other has not come to yet are no difference."""
    few = make_plan(filled.load("dataset.only_parts=1"))
    html, _ = build(few, plan, "few", "all") if swap else build(plan, few, "all", "few")
    text = " ".join(Page(html).text.split())
    assert f"Compared are only the 1 of {len(plan.parts)} parts that both have done." in text
    assert f"regions that both keep{measured(few).regions} only the first0on 0 images only the second0" in text
    assert 0 < measured(few).regions < measured(plan).regions


def test_a_lost_tar_costs_the_pictures_only(filled: World, tmp_path: Path) -> None:
    shutil.copytree(filled.store, tmp_path / "store")
    for tar in (tmp_path / "store/download").rglob("*.tar"):
        tar.unlink()
    html, found = build(make_plan(filled.load(f"store={tmp_path / 'store'}")), None, "recipe")
    assert Page(html).cards == []
    assert re.search(r"12 stored images could not be read|No picture yet", html)
    assert found.images > 8


def test_cards_are_of_different_images() -> None:
    places = [Place(0, key, i, 0.5) for i, key in enumerate("aabac")]
    assert [(p.key, p.index) for p in gallery._distinct(places, 2)] == [("a", 0), ("b", 2)]


def test_an_empty_store_makes_a_page_too(world: World) -> None:
    html, _ = build(make_plan(world.load()), None, "recipe")
    assert "No region yet." in Page(html).text
    assert not any(Path(world.store).rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "/nowhere/report.html"], "--out /nowhere/report.html: is not a file in a folder that exists"),
        (["--out", "/"], "--out /: is not a file in a folder that exists"),
        (["no.yaml"], "no.yaml: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    world: World, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(world.command("report", *arguments)[len(VESL) :])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert says in said
