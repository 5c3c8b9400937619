"""A world to train CLOC on without any download: scenes of coloured shapes, as shards of the region-text format.

What an object is called has 128 classes, texture x colour x shape; the training part has the noise of a real pipeline
(regions missing, doubled, shifted or with another's phrase, captions that leave out or misname), the test part none.
Every scene depends on the options and its number alone, so any number of processes write the same bytes.
"""

import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

from ...transforms.records import Caption, Region, Sample
from ...transforms.shards import add_member, encode, end_tar

Split = Literal["train", "test"]
Box = tuple[float, float, float, float]

_VERSION = 1  # of the world: another one means other bytes for the same options
_FINE = 4  # masks are drawn this much larger, for smooth edges and boxes of quarter pixels
_LEAST_VISIBLE = 0.6  # of an object's area
_SIDE = (0.25, 0.55)  # of an object, as a share of the image's side
_SMALL, _LARGE = 0.35, 0.45  # below and above which an object may be called so
_NOISE = ("missing", "duplicated", "shifted", "wrong_phrase", "caption_noise")

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
    samples_per_shard: int = 5_000
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
        for name in _NOISE:
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
    masks: list[np.ndarray] = []  # of whole objects
    seen: list[np.ndarray] = []  # of what is visible of them
    areas: list[float] = []
    placed: list[tuple[Box, str]] = []
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
        masks.append(mask)
        areas.append(area)
        placed.append((box, "small" if side < _SMALL else "large" if side > _LARGE else ""))
    things = tuple(
        Thing(name, box, size, mask, float(part.sum() / area))
        for name, (box, size), mask, part, area in zip(classes, placed, masks, seen, areas, strict=True)
    )
    return Scene(np.clip(canvas + 0.5, 0, 255).astype(np.uint8), things)


def _background(rng: np.random.Generator, px: int) -> np.ndarray:
    """(S, S, 3) float32 in 0..255: a greyish tone, perhaps two that blend, perhaps grain."""

    def tone() -> np.ndarray:
        return (110 + 120 * rng.random() + 26 * (rng.random(3) - 0.5)).astype(np.float32)

    kind = _below(rng, 3)
    if kind == 0:
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


_CLASSES = phrase_classes()
_OPENINGS = ("", "", "there is ", "a picture of ", "an image with ", "we see ", "here you find ", "a drawing with ")
_NEAR = ("next to", "near", "beside", "close to")
_JUNK = ("", "image", "untitled", "click to enlarge", "photo 3 of 12", "shapes", "free download")


@dataclass(frozen=True)
class _Told:
    """What a caption says: its text, and for each object the span of its phrase (None where it is left out)."""

    text: str
    spans: tuple[tuple[int, int] | None, ...]


def _tell(rng: np.random.Generator, things: Sequence[Thing], noise: float, bare: bool) -> _Told:
    """Name the objects in random order, in one or two sentences whose relations are true.

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
    spans: list[tuple[int, int] | None] = [None] * len(things)

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
    return _Told(text, tuple(spans))


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


def _regions(rng: np.random.Generator, things: Sequence[Thing], told: _Told, o: Scenes | None) -> tuple[Region, ...]:
    """The objects that the caption names, as a pipeline would find them; exact where there are no options `o`."""
    found: list[Region] = []
    named = [(thing, span) for thing, span in zip(things, told.spans, strict=True) if span]
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
        phrase = told.text[slice(*span)]
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
    told = _tell(rng, scene.things, 0 if clean else options.caption_noise, clean)
    regions = _regions(rng, scene.things, told, None if clean else options)
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
        captions=(Caption(told.text, f"scenes@{_VERSION}"),),
        regions=regions,
        select="",
    )


def described(options: Scenes, split: Split) -> dict[str, Any]:
    """What decides the bytes of a part, as its index says it."""
    other = {"train": {"test"}, "test": {"train", *_NOISE}}[split]
    kept = {name: value for name, value in asdict(options).items() if name not in other}
    return {"scenes": {"version": _VERSION, "split": split, **kept, "objects": list(options.objects)}}


def generate(
    folder: str | Path, options: Scenes, progress: Callable[[int], None] | None = None, workers: int = 2
) -> Path:
    """Write what is missing of `folder`/train and `folder`/test: shards and `index.json`, as the pack step does.

    The folder is a local one. Shards that a stopped generation finished are kept; what other options made is replaced.
    `progress` is told how many scenes were drawn anew since it was last told. Raises ValueError where the folder is no
    local one or holds shards of something else, RuntimeError where a process that drew a shard failed.
    """
    name = str(folder).removeprefix("file://")
    if ":/" in name:  # as a Path, s3://bucket is s3:/bucket
        raise ValueError(f"{folder}: scenes are written to a local folder")
    root = Path(name)
    for split in get_args(Split):
        (root / split).mkdir(parents=True, exist_ok=True)
        lock = os.open(root / split, os.O_RDONLY)  # the folder itself is the lock, so a kill leaves none behind
        try:
            with suppress(OSError):  # some network file systems lock no folders
                fcntl.flock(lock, fcntl.LOCK_EX)
            _Part(root / split, options, split, progress).fill(workers)
        finally:
            os.close(lock)
    return root


class _Part:
    """One folder of shards; its index lists what is finished, and nothing else counts."""

    def __init__(self, folder: Path, options: Scenes, split: Split, progress: Callable[[int], None] | None) -> None:
        self._folder, self._options, self._split = folder, options, split
        self._progress, self._lock = progress or (lambda count: None), threading.Lock()
        self._total: int = getattr(options, split)
        self._done: dict[str, dict[str, Any]] = {}

    def fill(self, workers: int) -> None:
        """Do what is missing, with a process per shard and `workers` of them at a time."""
        if self._read_index():
            return
        self._write_index()
        for path in self._folder.glob("shard-*"):
            if path.name not in self._done:
                path.unlink()
        shards = range(-(-self._total // self._options.samples_per_shard))
        todo = [number for number in shards if shard_name(number) not in self._done]
        workers = max(1, min(workers, len(todo)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(self._make_here if workers == 1 else self._make, todo))
        self._write_index(complete=True)

    def _read_index(self) -> bool:
        """Take over what the index says is finished and is there; True if that is everything."""
        path = self._folder / "index.json"
        try:
            index = json.loads(path.read_bytes())
            shards, _ = index["shards"], index["recipe"]["scenes"]
            if index["recipe"] != described(self._options, self._split):
                return False
            self._done = {shard["name"]: shard for shard in shards if self._is_there(shard)}
            return bool(index["complete"]) and len(self._done) == len(shards)
        except FileNotFoundError:
            if any(self._folder.glob("shard-*")):
                raise ValueError(f"{self._folder} holds shards without an index: not ours to replace") from None
            return False
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not of generated scenes: not ours to replace") from None

    def _is_there(self, shard: dict[str, Any]) -> bool:
        path = self._folder / shard["name"]
        return path.exists() and bool(path.stat().st_size == shard["bytes"])

    def _write_index(self, complete: bool = False) -> None:
        shards = [shard for _, shard in sorted(self._done.items())]
        document = {
            "complete": complete,
            "samples": sum(shard["samples"] for shard in shards),
            "regions": sum(shard["regions"] for shard in shards),
            "shards": shards,
            "recipe": described(self._options, self._split),
            "chain": [],
        }
        data = (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()
        fresh = self._folder / "index.json.tmp"
        fresh.write_bytes(data)
        fresh.replace(self._folder / "index.json")

    def _tell(self, count: int) -> None:
        with self._lock:
            self._progress(count)

    def _take(self, shard: dict[str, Any]) -> None:
        with self._lock:
            self._done[shard["name"]] = shard
            self._write_index()

    def _make_here(self, number: int) -> None:
        self._take(write_shard(self._folder, self._options, self._split, number, self._tell))

    def _make(self, number: int) -> None:
        """Let a process of its own write a shard: started anew, it has nothing of this one's threads and locks."""
        task = json.dumps([str(self._folder), asdict(self._options), self._split, number])
        command = [sys.executable, "-c", f"from {__name__} import serve; serve()", task]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603  (our own command)
            assert process.stdout is not None
            for line in process.stdout:
                said = json.loads(line)
                if isinstance(said, int):
                    self._tell(said)
                else:
                    self._take(said)
        if process.returncode:
            raise RuntimeError(f"the process that drew {shard_name(number)} ended with {process.returncode}")


def shard_name(number: int) -> str:
    """As the pack step names them."""
    return f"shard-{number:05d}-000.tar"


def serve() -> None:
    """Write the shard that the first argument names; say on stdout how it goes. It ends when nobody listens."""
    folder, fields, split, number = json.loads(sys.argv[1])
    options = Scenes(**{**fields, "objects": tuple(fields["objects"])})
    try:
        shard = write_shard(Path(folder), options, split, number, lambda count: print(count, flush=True))
        print(json.dumps(shard), flush=True)
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(1)  # at once and without a word: the one who would read it is gone, or was stopped too


def write_shard(
    folder: Path, options: Scenes, split: Split, number: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Write one shard, and return what an index says of it."""
    first = number * options.samples_per_shard
    last = min(first + options.samples_per_shard, getattr(options, split))
    name, regions = shard_name(number), 0
    unfinished = folder / f"{name}.{os.getpid()}.tmp"  # nobody else's, not even of an orphan of a killed generation
    with unfinished.open("w+b") as tar:
        for i in range(first, last):
            jpeg, facts = sample(options, split, i)
            add_member(tar, f"{facts.key}.jpg", jpeg)
            add_member(tar, f"{facts.key}.json", encode(facts))
            regions += len(facts.regions)
            if (i - first + 1) % 200 == 0 or i == last - 1:
                progress((i - first) % 200 + 1)
        end_tar(tar)
        size = tar.tell()
        tar.seek(0)
        digest = hashlib.file_digest(tar, "sha256").hexdigest()
    unfinished.replace(folder / name)
    return {"name": name, "samples": last - first, "regions": regions, "bytes": size, "sha256": digest}
