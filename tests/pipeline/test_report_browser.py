"""The report in a real browser: nothing goes wrong, nothing leaves the machine, the filters filter, text stays text."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.test_report import filled, hostile
from tests.world import World
from vesl.pipeline.plan import make_plan

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
__all__ = ["filled"]  # the fixture
# As root, on a machine without a network or a screen.
FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*(f"--{flag}" for flag in FLAGS.split()), "--disable-sync"]
        )
        yield running
        running.close()


class Opened:
    """A report in a tab; `trouble` is what the browser had to say, and every request but the first."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.tab = browser.new_page(viewport={"width": 1366, "height": 850})
        self.trouble: list[str] = []
        self.tab.on("console", lambda message: self.trouble.append(message.text))
        self.tab.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.trouble.append(dialog.message))
        self.tab.on("request", lambda request: self.trouble.extend(self._strange(request.url, path)))
        self.tab.goto(path.as_uri())

    @staticmethod
    def _strange(url: str, path: Path) -> list[str]:
        return [] if url == path.as_uri() or url.startswith("data:image/") else [url]

    def shown(self) -> list[dict[str, str]]:
        """The data of the cards that are to be seen."""
        query = "cards => cards.filter(c => c.offsetParent !== null).map(c => ({...c.dataset}))"
        return list(self.tab.eval_on_selector_all(".card", query))

    def all_shown(self) -> list[dict[str, str]]:
        while self.tab.is_visible(".further"):
            self.tab.click(".further")
        return self.shown()


@pytest.fixture
def opened(filled: World, browser: Any) -> Iterator[Opened]:
    out = filled.folder / "browser.html"
    if not out.exists():
        assert filled.run("report", "--out", str(out)).returncode == 0
    page = Opened(browser, out)
    yield page
    page.tab.close()


def test_the_report_opens_without_trouble_and_all_pictures_load(opened: Opened) -> None:
    opened.all_shown()
    sizes = opened.tab.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth)")
    assert len(sizes) > 20
    assert all(sizes)
    boxes = opened.tab.eval_on_selector_all(
        ".card", "all => all.map(c => [c.querySelector('img'), c.querySelector('svg')].map(e => e && e.clientWidth))"
    )
    assert all(svg in (None, picture) and picture > 150 for picture, svg in boxes)
    wide = opened.tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert wide
    assert opened.trouble == []


def test_the_filters_filter(opened: Opened) -> None:
    tab, everything = opened.tab, opened.all_shown()
    groups = tab.eval_on_selector_all("select option", "all => all.map(o => o.value)")
    assert {card[kind] for card in everything for kind in ("group", "heading")} == {*groups} - {""}
    tab.select_option("select", "Kept regions")
    assert opened.all_shown() == [card for card in everything if card["heading"] == "Kept regions"]
    tab.select_option("select", "low_score")
    assert [card["group"] for card in opened.all_shown()] == ["low_score"] * 5
    tab.select_option("select", "")

    tab.fill("input[name=text]", "RED ball")
    wanted = [card for card in everything if "red ball" in card["text"].lower()]
    assert opened.all_shown() == wanted
    assert 0 < len(wanted) < len(everything)
    assert tab.inner_text("output") == f"{len(wanted)} pictures"
    tab.fill("input[name=text]", "")

    tab.fill("input[name=from]", "0.5")
    tab.fill("input[name=to]", "0.7")
    within = [card for card in everything if card["score"] and 0.5 <= float(card["score"]) <= 0.7]
    assert opened.all_shown() == within
    assert 0 < len(within) < len(everything)
    tab.fill("input[name=text]", "no such words")
    assert opened.all_shown() == []
    tab.fill("input[name=text]", "")

    assert tab.is_visible(".card:not([hidden]) svg")
    tab.uncheck("input[name=drawn]")
    assert not tab.is_visible(".card:not([hidden]) svg")
    tab.check("input[name=drawn]")
    assert opened.trouble == []


def test_a_line_lights_its_box(opened: Opened) -> None:
    opened.tab.hover(".card .boxes li.chosen")
    lit = opened.tab.eval_on_selector_all("rect.lit", "all => all.map(r => r.classList.contains('chosen'))")
    assert lit == [True]


def test_hostile_text_is_only_text(
    filled: World, browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "hostile.html"
    out.write_text(hostile(make_plan(filled.load()), monkeypatch), encoding="utf-8")
    page = Opened(browser, out)
    assert page.tab.evaluate("window.hacked") is None
    assert page.tab.locator("iframe, base").count() == 0
    assert page.tab.locator("script").count() == 1
    assert "<script>window.hacked=1</script>" in page.tab.locator(".card summary").first.inner_text()
    assert page.trouble == []
    # And were one to slip through, the page's policy stops it.
    page.tab.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked=1'}))"
    )
    assert page.tab.evaluate("window.hacked") is None
    assert any("Content Security Policy" in text for text in page.trouble)
    page.tab.close()
