"""Pictures for a report: which samples are shown, and what of each. Few parts are read, and every byte is bounded."""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from PIL import Image

from ...transforms.filters import VERDICTS
from ...transforms.images import decode
from ...transforms.outcomes import Drop, reason_of
from ..ingest import input_tables
from ..plan import Plan
from .statistics import Place, Statistics

BYTES = 9_000_000  # of all thumbnails together; base64 makes a third more of them
_SIDE_PX, _QUALITY = 384, 76
_DECILE, _EDGE, _JUDGED, _DROPPED, _ONLY = 6, 8, 5, 6, 18  # cards for each decile, best and worst, verdict, ...
_BOXES = 40  # on one picture
_CHARACTERS, _CAPTIONS = 1000, 20  # of a text, and captions of an image: what is longer is not on the page
_READERS = 8  # parts read at a time, and pictures
COLOURS = 8  # of the page's palette, for phrases


@dataclass(frozen=True)
class Drawn:
    """A box (x0, y0, x1, y1 in 0..1 of the image) as a card shows it; `colour` is the phrase's place in the palette."""

    box: tuple[float, float, float, float]
    phrase: str
    score: float
    verdict: str
    colour: int
    chosen: bool  # the card is about this one

    @property
    def kept(self) -> bool:
        """Whether it became a region."""
        return self.verdict == "kept"


@dataclass(frozen=True)
class Card:
    """One picture with what is known of it; `jpeg` is the thumbnail, in base64."""

    group: str  # a name of the page's selector
    title: str
    note: str
    key: str
    url: str
    alt_text: str
    captions: tuple[str, ...]
    width: int
    height: int
    jpeg: Markup
    boxes: tuple[Drawn, ...]
    hidden: int  # boxes over the limit, not drawn

    @property
    def score(self) -> float | None:
        """Of the chosen box."""
        return next((box.score for box in self.boxes if box.chosen), None)


@dataclass(frozen=True)
class Group:
    """Cards that belong together, under a heading of the selector."""

    name: str
    heading: str
    cards: Sequence[Card]

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.cards)


@dataclass(frozen=True)
class _Wish:
    """A card to be made: an image, and the detections (by index) that it is about; `all_boxes` draws every verdict."""

    group: str
    heading: str
    part: int
    key: str
    title: str = ""
    note: str = ""
    chosen: frozenset[int] = frozenset()
    context: bool = True  # draw the kept regions too
    all_boxes: bool = False


@dataclass
class Album:
    """Makes cards of one plan's samples. `left` bytes of thumbnails may still be made; what is over is left out."""

    plan: Plan
    left: int
    omitted: int = 0
    unreadable: int = 0

    def groups(self, wishes: Iterable[_Wish]) -> list[Group]:
        """The cards, in the order of the wishes; a part is read once."""
        wanted = list(wishes)
        rows: dict[str, dict[str, Any]] = {}
        keys: dict[int, set[str]] = {}
        for wish in wanted:
            keys.setdefault(wish.part, set()).add(wish.key)
        inputs = input_tables(self.plan.dataset) if self.plan.dataset else []
        with ThreadPoolExecutor(_READERS) as pool:
            for found in pool.map(lambda part: _rows(self.plan, inputs[part], part, keys[part]), sorted(keys)):
                rows |= found
            thumbnails = dict(zip(rows, pool.map(self._thumbnail, rows.values()), strict=True))
        self.unreadable += sum(thumbnails[key] is None and row.get("size") is not None for key, row in rows.items())
        cards: dict[tuple[str, str], list[Card]] = {}
        for wish in wanted:
            row, jpeg = rows.get(wish.key), thumbnails.get(wish.key)
            if row is None or jpeg is None:
                continue
            if len(jpeg) > self.left:
                self.omitted += 1
                continue
            self.left -= len(jpeg)
            cards.setdefault((wish.heading, wish.group), []).append(_card(wish, row, jpeg))
        return [Group(name, heading, members) for (heading, name), members in cards.items()]

    def _thumbnail(self, row: Mapping[str, Any]) -> Markup | None:
        if row.get("size") is None:
            return None
        place = (row["offset"], row["offset"] + row["size"])
        try:
            (data,) = self.plan.store.read_ranges(row["tar"], [place])
            image = decode(data)
        except (OSError, ValueError, Drop):  # the tar is gone or damaged: a report without a picture is still one
            return None
        image.thumbnail((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS, reducing_gap=2.0)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY, optimize=True)
        return Markup(base64.b64encode(file.getbuffer()).decode())  # noqa: S704  (letters and digits)


def _rows(plan: Plan, given: str, part: int, keys: set[str]) -> dict[str, dict[str, Any]]:
    """What the tables of one part say of some keys; `given` is its input table."""
    wanted = pa.array(sorted(keys), pa.string())

    def read(name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        table = plan.store.read_table(name, ["key", *columns])
        return table.filter(pc.is_in(table["key"], wanted)).to_pylist()  # type: ignore[no-any-return]

    rows = {row["key"]: row for row in read(given, ("url", "alt_text"))}
    columns = {
        "download": ("offset", "size", "width", "height"),
        "caption": ("captions",),
        "phrases": ("phrases",),
        "ground": ("detections",),
        "select": ("verdicts",),
    }
    for step in plan.steps:
        if step.name not in columns or part not in plan.done[step.name]:
            continue
        for row in read(step.table(part), columns[step.name]):
            rows[row["key"]] |= row
        if step.name == "download":
            tar = f"{step.folder}/{plan.done['download'][part]['tar']['name']}"
            rows = {key: row | {"tar": tar} for key, row in rows.items()}
    return rows


def _card(wish: _Wish, row: Mapping[str, Any], jpeg: Markup) -> Card:
    detections, phrases = row.get("detections") or [], row.get("phrases") or []
    verdicts = row.get("verdicts") or ["rejected"] * len(detections)
    boxes = []
    for i, (detection, verdict) in enumerate(zip(detections, verdicts, strict=True)):
        if i in wish.chosen or wish.all_boxes or (wish.context and verdict == "kept"):
            score, box = detection["score"], detection["box"]
            if box is None or not np.isfinite(box).all() or score is None or not np.isfinite(score):
                continue
            at = detection["phrase"]
            phrase = _cut(phrases[at]["text"]) if at is not None and 0 <= at < len(phrases) else ""
            boxes.append(Drawn(tuple(min(max(x, 0.0), 1.0) for x in box), phrase, score, verdict, 0, i in wish.chosen))
    boxes.sort(key=lambda box: (not box.chosen, -box.score))
    colours = {phrase: i % COLOURS for i, phrase in enumerate(dict.fromkeys(box.phrase for box in boxes))}
    return Card(
        group=wish.group,
        title=wish.title,
        note=wish.note,
        key=row["key"],
        url=_cut(row["url"]),
        alt_text=_cut(row["alt_text"]),
        captions=tuple(_cut(caption["text"]) for caption in (row.get("captions") or [])[:_CAPTIONS]),
        width=row["width"],
        height=row["height"],
        jpeg=jpeg,
        boxes=tuple(replace(box, colour=colours[box.phrase]) for box in boxes[:_BOXES]),
        hidden=max(0, len(boxes) - _BOXES),
    )


def _cut(text: str | None) -> str:
    return text if text and len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}…" if text else ""


def album(plan: Plan, statistics: Statistics, taken: pa.Array, budget: int) -> tuple[list[Group], Album]:
    """The gallery of a report: kept regions over all scores, best and worst, and every reason that has a picture."""
    made = Album(plan, budget)
    return made.groups([*_kept(statistics), *_judged(statistics), *_dropped(plan, taken)]), made


def _kept(statistics: Statistics) -> Iterator[_Wish]:
    heading = "Kept regions"
    by_score = sorted(statistics.sample, key=lambda place: -place.score)
    order = {place: i for i, place in enumerate(statistics.sample)}
    used: Counter[str] = Counter()
    for decile in range(10):
        places = by_score[len(by_score) * decile // 10 : len(by_score) * (decile + 1) // 10]
        if not places:
            continue
        name = f"decile {10 - decile}: {places[-1].score:.2f} to {places[0].score:.2f}"
        for place in _distinct(sorted(places, key=lambda p: (used[p.key], order[p])), _DECILE):
            used[place.key] += 1
            yield _wish(name, heading, place)
    for name, extreme in (("the best", statistics.best), ("the worst that were kept", statistics.worst)):
        for place in extreme[:_EDGE]:
            yield _wish(name, heading, place)


def _judged(statistics: Statistics) -> Iterator[_Wish]:
    for verdict in dict.fromkeys([*VERDICTS, *statistics.judged]):
        for place in _distinct(statistics.judged.get(verdict, ()), _JUDGED):
            yield _wish(verdict, "Detections that select rejected", place, note=VERDICTS.get(verdict, ""))


def only(plan: Plan, places: Sequence[Place], name: str, budget: int) -> tuple[list[Group], Album]:
    """Regions that only this plan keeps, one image a card."""
    together: dict[str, list[Place]] = {}
    for place in places:
        together.setdefault(place.key, []).append(place)
    made = Album(plan, budget)
    return made.groups(
        _wish(name, "Regions that only one keeps", *of_image) for of_image in list(together.values())[:_ONLY]
    ), made


def _wish(name: str, heading: str, *places: Place, note: str = "") -> _Wish:
    first = places[0]
    chosen = frozenset(place.index for place in places)
    return _Wish(name, heading, first.part, first.key, f"{first.score:.3f}", note, chosen)


def _distinct(places: Iterable[Place], count: int) -> list[Place]:
    """The first few of different images."""
    first: dict[str, Place] = {}
    for place in places:
        first.setdefault(place.key, place)
    return list(first.values())[:count]


def _dropped(plan: Plan, taken: pa.Array) -> Iterator[_Wish]:
    """For each reason of a step after the download, the first rows that have it: keys are hashes, so any are."""
    for step in plan.steps[1:]:
        missing: dict[str, int] = {}
        for part in plan.parts:
            counts = plan.done[step.name].get(part, {}).get("counts", {"rejected": {}, "failed": {}})
            here = {name for name in (*counts["rejected"], *counts["failed"]) if missing.get(name, _DROPPED) > 0}
            if not here:
                continue
            rows = plan.store.read_table(step.table(part), ["key", "reason", "detail"])
            rows = rows.filter(pc.and_(pc.is_in(rows["reason"], pa.array(sorted(here))), _without(rows["key"], taken)))
            for row in rows.to_pylist():
                left = missing.setdefault(row["reason"], _DROPPED)
                if left > 0:
                    missing[row["reason"]] = left - 1
                    meaning = reason_of(step.name, row["reason"]).meaning
                    note = f"{meaning}: {row['detail']}" if row["detail"] else meaning
                    name = f"{step.name}: {row['reason']}"
                    yield _Wish(name, "Images that were dropped", part, row["key"], row["reason"], note, all_boxes=True)


def _without(keys: pa.ChunkedArray, taken: pa.Array) -> pa.ChunkedArray:
    return pc.invert(pc.is_in(keys, taken.cast(pa.string())))
