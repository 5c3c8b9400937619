"""A world to train CLOC on without any download: scenes of coloured shapes, as shards of the region-text format.

What an object is called has 128 classes, texture x colour x shape; the training part has the noise of a real pipeline
(regions missing, doubled, shifted or with another's phrase, captions that leave out or misname), the test part none.
Every scene depends on the options and its number alone, so any number of processes write the same bytes.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from ...transforms.records import Caption, Region, Sample

Split = Literal["train", "test"]
Box = tuple[float, float, float, float]
Span = tuple[int, int]

VERSION = 1  # of the world: another one means other bytes for the same options
_FINE = 4  # masks are drawn this much larger, for smooth edges and boxes of quarter pixels
_LEAST_VISIBLE = 0.6  # of an object's area
_SIDE = (0.25, 0.55)  # of an object, as a share of the image's side
_SMALL, _LARGE = 0.35, 0.45  # below and above which an object may be called so
NOISE = ("missing", "duplicated", "shifted", "wrong_phrase", "caption_noise")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 28, 34),
    "orange": (250, 134, 8),
    "yellow": (250, 226, 24),
    "green": (28, 152, 52),
    "cyan": (44, 212, 226),
    "blue": (38, 76, 228),
    "purple": (134, 44, 180),
    "pink": (252, 122, 196),
}
_STRIPE = (24, 24, 28)


def _outline(radius: float | Sequence[float], corners: int, x: float = 0, y: float = 0) -> np.ndarray:
    """Points around (x, y), the first one above it, whose distances are the radii in turn: (corners, 2)."""
    angle = 2 * np.pi * (np.arange(corners) / corners - 0.25)
    radii = np.resize(np.asarray(radius, dtype=float), corners)
    return np.stack([np.cos(angle) * radii + x, np.sin(angle) * radii + y], 1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2.5], 1) / 16


_A, _B, _C = 0.34, 1.0, 0.88  # half the width and the length of the cross's arms, half the square's side
_CROSS = [(-_A, -_B), (_A, -_B), (_A, -_A), (_B, -_A), (_B, _A), (_A, _A)]
# What is filled and then what is cut out, in a square of -1..1, y down.
SHAPES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "circle": (_outline(1, 48), None),
    "square": (np.array([(-_C, -_C), (_C, -_C), (_C, _C), (-_C, _C)]), None),
    "triangle": (_outline(1.15, 3, y=0.25), None),
    "star": (_outline((1.08, 0.42), 10), None),
    "cross": (np.array(_CROSS + [(-x, -y) for x, y in _CROSS]), None),
    "ring": (_outline(1, 48), _outline(0.52, 48)),
    "heart": (_heart(), None),
    "moon": (_outline(1.05, 48), _outline(0.85, 48, x=0.52)),
}


def phrase_classes() -> tuple[str, ...]:
    """All class names, plain before striped, in a fixed order: "red circle", ..., "striped pink moon"."""
    return tuple(f"{t}{colour} {shape}" for t in ("", "striped ") for colour in COLOURS for shape in SHAPES)


_CLASSES = phrase_classes()


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """The size of the world, and the noise of its training part as probabilities.

    Raises ValueError for a value that no world can have.
    """

    train: int = 50_000
    test: int = 1_000
    image_px: int = 64
    objects: tuple[int, int] = (2, 4)  # the fewest and the most of a scene
    seed: int = 0
    samples_per_shard: int = 2_000
    missing: float = 0.1  # a region is left out
    duplicated: float = 0.05  # a region comes twice, the second one slightly moved
    shifted: float = 0.1  # a region's box is off by up to a quarter of its sides
    wrong_phrase: float = 0.05  # a region has another object's phrase
    caption_noise: float = 0.1  # a caption leaves an object out, or names one wrongly (and so does its region)

    def __post_init__(self) -> None:
        for name, least in (("train", 0), ("test", 0), ("image_px", 32), ("seed", 0), ("samples_per_shard", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is less than {least}")
        if len(self.objects) != 2 or not 1 <= self.objects[0] <= self.objects[1] <= 8:
            raise ValueError(f"objects: {self.objects} is not a least and a most of 1 to 8")
        for name in NOISE:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a probability")


@dataclass(frozen=True)
class Thing:
    """One object. The box is tight around all of it that is inside the image, hidden or not, in 0..1."""

    name: str
    box: Box
    size: str  # "small", "large" or ""
    mask: np.ndarray  # (S, S) float32: coverage in 0..1, as if nothing lay on top
    visible: float  # share of the whole area that is inside the image and under nothing


@dataclass(frozen=True)
class Scene:
    """An image, (S, S, 3) uint8, and its objects from back to front."""

    image: np.ndarray
    things: tuple[Thing, ...]


def draw(rng: np.random.Generator, options: Scenes, distinct: bool = False) -> Scene:
    """Draw a scene; with `distinct`, no two objects of one class."""
    low, high = options.objects
    count = low + _below(rng, high - low + 1)
    shrink = 1.0
    while True:  # smaller objects always fit in the end
        if scene := _attempt(rng, options.image_px, count, shrink, distinct):
            return scene
        shrink *= 0.9


def _below(rng: np.random.Generator, end: int) -> int:
    return int(rng.random() * end)


def _pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[_below(rng, len(items))]


def _attempt(rng: np.random.Generator, px: int, count: int, shrink: float, distinct: bool) -> Scene | None:
    canvas = _background(rng, px)
    classes: list[str] = []
    while len(classes) < count:
        name = _pick(rng, _CLASSES)
        if not (distinct and name in classes):
            classes.append(name)
    things: list[Thing] = []
    seen: list[np.ndarray] = []  # of each its mask, less what lies on top
    areas: list[float] = []  # of each, with what is outside the image
    for name in classes:
        for _ in range(12):
            side = shrink * (_SIDE[0] + (_SIDE[1] - _SIDE[0]) * rng.random())
            mask, area, box = _shape(rng, name.split()[-1], side * px, px)
            left = [old * (1 - mask) for old in seen]
            if mask.sum() >= _LEAST_VISIBLE * area and all(
                part.sum() >= _LEAST_VISIBLE * whole for part, whole in zip(left, areas, strict=True)
            ):
                break
        else:
            return None
        colour = _paint(rng, name, side * px, px)
        canvas += mask[..., None] * (colour - canvas)
        seen = [*left, mask]
        areas.append(area)
        size = "small" if side < _SMALL else "large" if side > _LARGE else ""
        things.append(Thing(name, box, size, mask, visible=1))
    shares = [float(part.sum() / area) for part, area in zip(seen, areas, strict=True)]
    shown = tuple(replace(thing, visible=share) for thing, share in zip(things, shares, strict=True))
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), shown)


def _background(rng: np.random.Generator, px: int) -> np.ndarray:
    """(S, S, 3) float32 in 0..255: a greyish tone, perhaps two that blend, perhaps grain."""

    def tone() -> np.ndarray:
        return (110 + 120 * rng.random() + 26 * (rng.random(3) - 0.5)).astype(np.float32)

    if _below(rng, 3) == 0:
        canvas = np.broadcast_to(tone(), (px, px, 3)).copy()
    else:
        x, y = _along(rng, px)
        ramp = x + y
        ramp = (ramp - ramp.min()) / (np.ptp(ramp) or 1)
        first, second = tone(), tone()
        canvas = first + ramp[..., None] * (second - first)
    if rng.random() < 0.5:
        canvas += (rng.random((px, px, 1), np.float32) - 0.5) * np.float32(30 * rng.random())
    return canvas


def _along(rng: np.random.Generator, px: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres projected on a random direction: columns (1, S) and rows (S, 1), to be added."""
    angle = 2 * np.pi * rng.random()
    steps = np.arange(px, dtype=np.float32) + 0.5
    return (steps * np.float32(np.cos(angle)))[None], (steps * np.float32(np.sin(angle)))[:, None]


def _shape(rng: np.random.Generator, shape: str, side: float, px: int) -> tuple[np.ndarray, float, Box]:
    """Put a shape somewhere: its coverage in the image (S, S), its whole area in pixels, its box in 0..1."""
    turn = (rng.random() - 0.5) * 0.5  # radians; more would make a square a diamond
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    outline, hole = SHAPES[shape]
    x, y = (side * 0.42 + (px - side * 0.84) * rng.random(2)).tolist()  # at most a little of it is outside
    left, top = int(np.floor(x - side)), int(np.floor(y - side))
    tile = int(2 * side) + 3
    centre = np.array([x - left, y - top]) * _FINE
    fine = Image.new("L", (tile * _FINE, tile * _FINE))
    pen = ImageDraw.Draw(fine)
    pen.polygon((outline @ rotation * (side / 2 * _FINE) + centre).ravel().tolist(), fill=255)
    if hole is not None:
        pen.polygon((hole @ rotation * (side / 2 * _FINE) + centre).ravel().tolist(), fill=0)
    area = fine.histogram()[255] / _FINE**2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + tile, px), min(top + tile, px)
    inside = fine.crop(((x0 - left) * _FINE, (y0 - top) * _FINE, (x1 - left) * _FINE, (y1 - top) * _FINE))
    extent = inside.getbbox()
    assert extent is not None  # the middle is never outside
    mask = np.zeros((px, px), np.float32)
    mask[y0:y1, x0:x1] = np.asarray(inside.reduce(_FINE), dtype=np.float32) / 255
    u0, v0, u1, v1 = ((np.array(extent) / _FINE + (x0, y0, x0, y0)) / px).tolist()
    return mask, area, (u0, v0, u1, v1)


def _paint(rng: np.random.Generator, name: str, side: float, px: int) -> np.ndarray:
    """The object's colour, (3,), or its colours with stripes, (S, S, 3); float32."""
    words = name.split()
    colour = (np.array(COLOURS[words[-2]]) + 16 * (rng.random(3) - 0.5)).astype(np.float32)
    if words[0] != "striped":
        return colour
    period = max(4.5, side / 4)
    x, y = _along(rng, px)
    distance = np.abs((x + y + period * rng.random()) % period - period / 2)  # from the middle of a stripe
    stripe = np.clip(period * 0.22 + 0.5 - distance, 0, 1)[..., None]
    striped: np.ndarray = colour + stripe.astype(np.float32) * (np.array(_STRIPE, np.float32) - colour)
    return striped


_OPENINGS = ("", "", "there is ", "a picture of ", "an image with ", "we see ", "here you find ", "a drawing with ")
_NEAR = ("next to", "near", "beside", "close to")
_JUNK = ("", "image", "untitled", "click to enlarge", "photo 3 of 12", "shapes", "free download")


def _tell(rng: np.random.Generator, things: Sequence[Thing], noise: float, bare: bool) -> tuple[str, list[Span | None]]:
    """Name the objects in random order, in one or two sentences whose relations are true: the caption, and the span of
    each object's phrase (None where it is left out).

    `noise` is the probability that one object is left out or misnamed; with `bare`, phrases are class names only.
    """
    order = rng.permutation(len(things)).tolist()
    names = [thing.name for thing in things]
    if rng.random() < noise:
        if len(order) > 1 and rng.random() < 0.5:
            order.pop()
        else:
            wrong = _below(rng, len(names))
            names[wrong] = _misname(rng, names[wrong], names)
    text = _pick(rng, _OPENINGS)
    spans: list[Span | None] = [None] * len(things)

    def mention(i: int) -> None:
        nonlocal text
        size = things[i].size + " " if things[i].size and rng.random() < 0.4 else ""
        article = "the " if rng.random() < 0.1 else "an " if (size + names[i])[0] in "aeiou" else "a "
        whole = article + size + names[i]
        take = len(names[i]) if bare or (u := rng.random()) < 0.4 else len(size + names[i]) if u < 0.8 else len(whole)
        text += whole
        spans[i] = (len(text) - take, len(text))

    mention(order[0])
    rest = order[1:]
    if rest and rng.random() < 0.7:
        text += f" {_relation(rng, things[order[0]].box, things[rest[0]].box)} "
        mention(rest.pop(0))
        if rest:
            text += _pick(rng, (", and ", " with ", ". there is also ", "; besides "))
            mention(rest.pop(0))
    for n, i in enumerate(rest):
        text += " and " if n == len(rest) - 1 else ", "
        mention(i)
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:].replace(". t", ". T") + "."
    return text, spans


def _misname(rng: np.random.Generator, name: str, taken: Sequence[str]) -> str:
    """Another class with the colour or the shape of `name`, that no object of the scene has."""
    *_, colour, shape = name.split()
    return _pick(rng, [x for x in _CLASSES if x not in taken and (x.endswith(shape) or f"{colour} " in x)])


def _relation(rng: np.random.Generator, a: Box, b: Box) -> str:
    dx, dy = (a[0] + a[2]) - (b[0] + b[2]), (a[1] + a[3]) - (b[1] + b[3])
    if rng.random() < 0.4:
        return _pick(rng, _NEAR)
    if abs(dx) > abs(dy):
        return "to the left of" if dx < 0 else "to the right of"
    return "above" if dy < 0 else "below"


def _moved(rng: np.random.Generator, box: Box, by: float) -> Box:
    """The box with each edge moved by up to `by` of its width or height, inside the image."""
    x0, y0, x1, y1 = box
    sides = np.array([x1 - x0, y1 - y0, x1 - x0, y1 - y0])
    moved = np.clip(np.array(box) + (2 * rng.random(4) - 1) * by * sides, 0, 1)
    a, b, c, d = moved.astype(np.float32).tolist()
    return (a, b, c, d)


def _regions(
    rng: np.random.Generator, named: Sequence[tuple[Thing, Span]], text: str, o: Scenes | None
) -> tuple[Region, ...]:
    """The objects that the caption names, as a pipeline would find them; exact where there are no options `o`."""
    found: list[Region] = []
    for i, (thing, span) in enumerate(named):
        box, score = thing.box, 0.35 + 0.5 * thing.visible + 0.1 * rng.random()
        twice = False
        if o:
            missing, twice, shifted, wrong = (
                rng.random(4) < (o.missing, o.duplicated, o.shifted, o.wrong_phrase)
            ).tolist()
            if missing:
                continue
            if shifted:
                box, score = _moved(rng, box, 0.25), score - 0.15
            if wrong and len(named) > 1:
                span, score = named[(i + 1 + _below(rng, len(named) - 1)) % len(named)][1], score - 0.2
        phrase = text[slice(*span)]
        found.append(Region(box, phrase, round(score, 4), 0, span))
        if twice:
            found.append(Region(_moved(rng, box, 0.06), phrase, round(score - 0.05, 4), 0, span))
    return tuple(sorted(found, key=lambda region: -region.score))


def _alt_text(rng: np.random.Generator, things: Sequence[Thing]) -> str:
    if rng.random() < 0.3:
        return f"IMG_{_below(rng, 10_000):04d}.jpg" if rng.random() < 0.5 else _pick(rng, _JUNK)
    some = rng.permutation(len(things)).tolist()[: 1 + _below(rng, 2)]
    return " ".join(things[i].name for i in some)


def sample(options: Scenes, split: Split, number: int) -> tuple[bytes, Sample]:
    """Scene `number` of a part: its JPEG (quality 92, 4:4:4) and everything that is said of it."""
    rng = np.random.default_rng((options.seed, ("train", "test").index(split), number))
    clean = split == "test"
    scene = draw(rng, options, distinct=clean)
    text, spans = _tell(rng, scene.things, 0 if clean else options.caption_noise, clean)
    named = [(thing, span) for thing, span in zip(scene.things, spans, strict=True) if span]
    regions = _regions(rng, named, text, None if clean else options)
    buffer = io.BytesIO()
    Image.fromarray(scene.image).save(buffer, "JPEG", quality=92, subsampling=0)
    jpeg = buffer.getvalue()
    name = f"{options.seed}/{split}/{number}"
    return jpeg, Sample(
        key=hashlib.sha256(name.encode()).hexdigest()[:24],
        url=f"scene://{name}",
        sha256=hashlib.sha256(jpeg).hexdigest(),
        width=options.image_px,
        height=options.image_px,
        alt_text=_alt_text(rng, scene.things),
        captions=(Caption(text, f"scenes@{VERSION}"),),
        regions=regions,
        select="",
    )
