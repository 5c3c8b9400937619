"""The evaluation against cases worked out by hand, with stand-in encoders whose answers are known by construction.

A picture is black with rectangles of named colours; the `Colours` encoder sees the colour that fills a box, and knows
the colour that a text names, so a label that names another colour than the painted one is a mistake of the model.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vesl.models.cloc import evaluate as module
from vesl.models.cloc.evaluate import Encoder, evaluate, table
from vesl.models.cloc.options import Evaluation
from vesl.models.cloc.sets import SKIPPED, Labels, SetError, open_image, open_set
from vesl.models.contract import ModelError
from vesl.transforms.outcomes import Drop
from vesl.transforms.records import Caption, Region, Sample
from vesl.transforms.shards import add_member, encode, end_tar

PALETTE = {
    "black": (0, 0, 0), "red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
    "cyan": (0, 255, 255), "pink": (255, 0, 255), "white": (255, 255, 255),
}  # fmt: skip
COLOURS = list(PALETTE)
Box = tuple[float, float, float, float]


class Colours:
    """Knows the colours of PALETTE, perfectly; remembers what it was asked."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.grounded: list[list[str]] = []
        self.batches: list[int] = []

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.stack([self._row(self._named(text)) for text in texts])

    def encode_image(self, images: Sequence[Image.Image]) -> np.ndarray:
        self.batches.append(len(images))
        return np.stack([self._row(self._most(self._pixels(image))) for image in images])

    def encode_regions(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.batches.append(len(images))
        answers = []
        for image, several in zip(images, boxes, strict=True):
            assert several.dtype == np.float32
            assert ((several >= 0) & (several <= 1)).all()
            corners = np.rint(several * ([image.width, image.height] * 2)).astype(int)
            pixels = self._pixels(image)
            answers.append(np.stack([self._row(self._most(pixels[b:d, a:c])) for a, b, c, d in corners]))
        return answers

    def ground(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
        self.grounded += [list(asked) for asked in texts]
        return [
            np.array([self._found(image, text) for text in asked], np.float32).reshape(-1, 4)
            for image, asked in zip(images, texts, strict=True)
        ]

    def _row(self, colour: int) -> np.ndarray:
        return np.eye(len(PALETTE) + 1, dtype=np.float32)[colour]

    @staticmethod
    def _named(text: str) -> int:
        return next((i for i, name in enumerate(COLOURS) if name in text.lower()), len(COLOURS))

    @staticmethod
    def _pixels(image: Image.Image) -> np.ndarray:
        assert image.mode == "RGB"
        distance = np.abs(np.asarray(image, int)[:, :, None] - np.array(list(PALETTE.values()))).sum(-1)
        return distance.argmin(-1)

    @staticmethod
    def _most(pixels: np.ndarray) -> int:
        counts = np.bincount(pixels.ravel(), minlength=len(PALETTE))
        counts[0] = 0
        return int(counts.argmax())

    def _found(self, image: Image.Image, text: str) -> list[float]:
        y, x = np.nonzero(self._pixels(image) == self._named(text))
        if not len(x):
            return [0.9, 0.9, 0.1, 0.1]
        return [
            x.min() / image.width,
            y.min() / image.height,
            (x.max() + 1) / image.width,
            (y.max() + 1) / image.height,
        ]


class Constant(Colours):
    """The same answer to everything."""

    def _row(self, colour: int) -> np.ndarray:
        return np.full(48, 48**-0.5, np.float32)

    def _found(self, image: Image.Image, text: str) -> list[float]:
        return [0, 0, 1, 1]


class Nan(Constant):
    def _row(self, colour: int) -> np.ndarray:
        return np.full(48, np.nan, np.float32)

    def _found(self, image: Image.Image, text: str) -> list[float]:
        return [float("nan")] * 4


class Random(Colours):
    """Another random direction, or box, at every question."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.default_rng(1)

    def _row(self, colour: int) -> np.ndarray:
        row = self.rng.normal(size=64).astype(np.float32)
        return row / np.linalg.norm(row)


class Vectors(Colours):
    """Texts have the vectors given; an image has that of its colour's name."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        super().__init__()
        self.vectors = vectors

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], np.float32)

    def _row(self, colour: int) -> np.ndarray:
        return np.array(self.vectors[COLOURS[colour]], np.float32)


def paint(width: int, height: int, *rectangles: tuple[str, Box]) -> Image.Image:
    """Rectangles in pixels; later ones lie on top."""
    image = Image.new("RGB", (width, height))
    for colour, (x0, y0, x1, y1) in rectangles:
        ImageDraw.Draw(image).rectangle((x0, y0, x1 - 1, y1 - 1), PALETTE[colour])
    return image


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class World:
    """A folder of images and an annotation file beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        self.document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}

    def image(self, image: Image.Image, **entry: Any) -> int:
        number = len(self.document["images"])
        name = f"{number:04d}.png"
        (self.folder / "images" / name).write_bytes(png(image))
        about = {"id": number, "file_name": name, "width": image.width, "height": image.height}
        self.document["images"].append(about | entry)
        return number

    def label(self, image: Any, box: Any = None, **entry: Any) -> None:
        """`box` is x0, y0, x1, y1 in pixels."""
        about: dict[str, Any] = {"id": len(self.document["annotations"]), "image_id": image}
        if box is not None:
            x0, y0, x1, y1 = box
            about["bbox"] = [x0, y0, x1 - x0, y1 - y0]
        self.document["annotations"].append(about | entry)

    def categories(self, *names: str) -> None:
        self.document["categories"] = [{"id": 10 * i, "name": name} for i, name in enumerate(names)]

    def set(self, kind: Any, **options: Any) -> Evaluation:
        path = self.folder / "annotations.json"
        path.write_text(json.dumps(self.document))
        return Evaluation(kind=kind, annotations=str(path), images=str(self.folder / "images"), **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def run(encoder: Encoder, spec: Evaluation, **options: Any) -> dict[str, Any]:
    """One set's result, after a way through JSON."""
    result: dict[str, Any] = json.loads(json.dumps(evaluate(encoder, {"s": spec}, **options), allow_nan=False))["s"]
    assert result["kind"] == spec.kind
    assert set(result["skipped"]) <= set(SKIPPED)
    for x in result["metrics"].values():
        assert 0 <= x["low"] <= x["high"] <= 1
    return result


def values(encoder: Encoder, spec: Evaluation) -> dict[str, float]:
    return {name: x["value"] for name, x in run(encoder, spec)["metrics"].items()}


FOUR = ("top1", "macc", "top1_templates", "macc_templates")


# ---- regions ----


def test_regions_by_hand(world: World) -> None:
    """Red: 3 regions, one of them painted blue, 2/3 right. Green: 1 region, painted white, 0/1 right. Blue: 1/1.

    White and pink never occur. top1 = 3/5; macc = (2/3 + 0 + 1) / 3 = 5/9.
    """
    world.categories("red", "green", "blue", "white", "pink")
    wide = world.image(paint(80, 20, ("red", (0, 0, 20, 20)), ("blue", (20, 0, 40, 20)), ("red", (60, 5, 80, 15))))
    tall = world.image(paint(10, 90, ("white", (0, 0, 10, 30)), ("blue", (2, 50, 8, 90))))
    world.label(wide, (0, 0, 20, 20), category_id=0)
    world.label(wide, (20, 0, 40, 20), category_id=0)
    world.label(wide, (60, 5, 80, 15), category_id=0)
    world.label(tall, (0, 0, 10, 30), category_id=10)
    world.label(tall, (2, 50, 8, 90), category_id=20)
    result = run(Colours(), world.set("regions"))
    expected = {"top1": 3 / 5, "macc": 5 / 9, "top1_templates": 3 / 5, "macc_templates": 5 / 9}
    assert {k: x["value"] for k, x in result["metrics"].items()} == pytest.approx(expected)
    assert result["counts"] == {"images": 2, "regions": 5, "classes": 5, "classes_seen": 3}
    assert result["skipped"] == {}
    # Resamples of the two images: wide twice 2/3, tall twice 1/2, both 3/5 in half of the cases.
    assert result["metrics"]["top1"]["low"] == pytest.approx(1 / 2)
    assert result["metrics"]["top1"]["high"] == pytest.approx(2 / 3)


def test_an_absent_class_can_still_win(world: World) -> None:
    """The region is red, says the file; it is painted pink, and pink is a class without a region of its own."""
    world.categories("red", "pink")
    world.label(world.image(paint(8, 8, ("pink", (0, 0, 8, 8)))), (0, 0, 8, 8), category_id=0)
    assert values(Colours(), world.set("regions"))["top1"] == 0
    world.categories("red")  # with red as the only class there is nothing else to say
    assert values(Colours(), world.set("regions"))["top1"] == 1


@pytest.mark.parametrize(
    ("red", "blue", "right"),
    [
        (((0, 1), (1, 0)), (0.6, 0.8), 1),  # 0.71 (0.5 if it were not made unit) against 0.6
        (((1, 0), (0, 1)), (0.6, 0.8), 1),
        (((1, 0), (0, 1)), (0.8, 0.6), 0),  # 0.71 against 0.8
        (((0, 1), (5, 0)), (0.8, 0.6), 0),  # the same; 0.98 if the mean were of vectors as they come
    ],
)
def test_the_template_ensemble_is_the_mean_of_unit_vectors(world: World, red: Any, blue: Any, right: int) -> None:
    """The region is (1, 0). Bare, red scores 0.9 and blue 0.8. Over the templates, red is in the direction (1, 1)."""
    world.categories("red", "blue")
    world.label(world.image(paint(8, 8, ("red", (0, 0, 8, 8)))), (0, 0, 8, 8), category_id=0)

    class One(Vectors):
        def _row(self, colour: int) -> np.ndarray:
            return np.array([1, 0], np.float32)

    vectors: dict[str, Sequence[float]] = {"red": (0.9, 0.19**0.5), "blue": (0.8, 0.6)}
    vectors |= {"a red.": red[0], "red red": red[1], "a blue.": blue, "blue blue": blue}
    found = values(One(vectors), world.set("regions", templates=("a {}.", "{} {}")))
    assert found == {"top1": 1, "macc": 1, "top1_templates": right, "macc_templates": right}
    assert set(values(One(vectors), world.set("regions", templates=()))) == {"top1", "macc"}


def test_names_with_underscores_and_names_that_two_categories_have(world: World) -> None:
    world.categories("dark_red", "Green", "green", "blue")
    encoder = Colours()
    image = world.image(paint(20, 10, ("green", (0, 0, 10, 10)), ("red", (10, 0, 20, 10))))
    world.label(image, (0, 0, 10, 10), category_id=20)
    world.label(image, (10, 0, 20, 10), category_id=0)
    result = run(encoder, world.set("regions", templates=()))
    assert sorted(encoder.texts) == ["Green", "blue", "dark red"]
    assert result["metrics"]["top1"]["value"] == 1
    assert result["counts"]["classes"] == 3


@pytest.mark.parametrize("layout", ["flat", "split"])
def test_images_as_lvis_names_them(world: World, layout: str) -> None:
    world.categories("red")
    url = "http://images.cocodataset.org/val2017/0000.png"
    image = world.image(paint(8, 8, ("red", (0, 0, 8, 8))), coco_url=url)
    del world.document["images"][0]["file_name"]
    if layout == "split":
        (world.folder / "images/val2017").mkdir()
        (world.folder / "images/0000.png").rename(world.folder / "images/val2017/0000.png")
    world.label(image, (0, 0, 8, 8), category_id=0)
    assert values(Colours(), world.set("regions"))["top1"] == 1


def test_images_that_were_scaled_or_say_no_size(world: World) -> None:
    """Boxes are in pixels of the size that the file states; an image of another shape is not what was annotated."""
    world.categories("red", "green")
    half = paint(40, 27, ("red", (20, 0, 40, 27)))  # of 80 x 53
    for entry in ({"width": 80, "height": 53}, {"width": 53, "height": 80}):
        world.label(world.image(half, **entry), (40, 0, 80, 53), category_id=0)
    unsized = world.image(paint(8, 8, ("green", (4, 0, 8, 8))), width=None, height=None)
    world.label(unsized, (4, 0, 8, 8), category_id=10)
    result = run(Colours(), world.set("regions"))
    assert result["metrics"]["top1"]["value"] == 1
    assert result["counts"]["images"] == 2
    assert result["skipped"] == {"size_differs": 1}


# ---- retrieval ----


def test_retrieval_by_hand(world: World) -> None:
    """Six regions; the different texts are red (of two regions), green, blue, cyan. What is painted:

    1 red: red. 2 "RED ": painted green. 3 green: green. 4 blue: painted white. 5 and 6 cyan: cyan.
    A feature scores 1 with its own colour and 0 with everything else, and all zeros are tied.
    r2t: 1, 3, 5, 6 have rank 1. 2: green scores 1, red, its own, ties with blue and cyan at 0: rank 4. 4: all four
    texts tie at 0: rank 4. So R@1 = 4/6, and R@5 = R@10 = 1 as there are but four texts.
    t2r, a query a region: red finds region 1 at rank 1, for regions 1 and 2. green: regions 2 and 3 score 1, 3 is
    right and 2 is tied with it: rank 2. blue: all six score 0: rank 6. cyan: rank 1, twice. R@1 = 4/6, R@5 = 5/6,
    R@10 = 1.
    """
    names = ["red", "green", "green", "white", "cyan", "cyan"]
    said = ["red", "RED ", "green", "blue", "cyan", "cyan"]
    boxes: list[Box] = [(10 * i, 0, 10 * i + 10, 10) for i in range(6)]
    image = world.image(paint(60, 10, *zip(names, boxes, strict=True)))
    for text, box in zip(said, boxes, strict=True):
        world.label(image, box, phrase=text)
    encoder = Colours()
    result = run(encoder, world.set("retrieval"))
    expected = {"r2t_1": 4 / 6, "r2t_5": 1, "r2t_10": 1, "t2r_1": 4 / 6, "t2r_5": 5 / 6, "t2r_10": 1}
    assert {k: x["value"] for k, x in result["metrics"].items()} == pytest.approx(expected)
    assert result["counts"] == {"images": 1, "regions": 6, "texts": 4, "pairs": 6}
    assert sorted(encoder.texts) == ["blue", "cyan", "green", "red"]  # each once


def test_a_region_with_several_texts(world: World) -> None:
    """Region 1 is red, said to be `blue` and `red`: r2t takes the better, t2r asks both (blue finds it at rank 2)."""
    image = world.image(paint(20, 10, ("red", (0, 0, 10, 10)), ("green", (10, 0, 20, 10))))
    world.label(image, (0, 0, 10, 10), sentences=[{"sent": "blue"}, {"raw": "red"}, "Red"])
    world.label(image, (10, 0, 20, 10), caption="green")
    result = run(Colours(), world.set("retrieval"))
    assert result["metrics"]["r2t_1"]["value"] == 1
    assert result["metrics"]["t2r_1"]["value"] == pytest.approx(2 / 3)
    assert result["counts"]["pairs"] == 3


# ---- grounding ----


def test_grounding_by_hand(world: World) -> None:
    """A wide image, 80 x 20. What the encoder answers is the bounding box of a colour.

    green: exact, IoU 1. blue: painted 10 x 20, annotated twice as wide, and elsewhere (30..31): 1/2 with the first.
    white: painted 10 x 20 and annotated as 21 x 20: 10/21, wrong. pink is not there: the answer is no box, 0.
    acc50 = 2/4; miou = (1 + 1/2 + 10/21 + 0) / 4.
    """
    image = world.image(paint(80, 20, ("green", (0, 0, 10, 10)), ("blue", (10, 0, 20, 20)), ("white", (50, 0, 60, 20))))
    world.label(image, (0, 0, 10, 10), phrase="the green one")
    world.label(image, (10, 0, 30, 20), phrase="a Blue one")
    world.label(image, (30, 0, 31, 20), phrase="A blue  one")
    world.label(image, (50, 0, 71, 20), sentences=["white"])
    world.label(image, (0, 10, 10, 20), caption="pink")
    encoder = Colours()
    result = run(encoder, world.set("grounding"))
    assert result["metrics"]["acc50"]["value"] == 2 / 4
    assert result["metrics"]["miou"]["value"] == pytest.approx((1 + 1 / 2 + 10 / 21) / 4)
    assert result["counts"] == {"images": 1, "phrases": 4, "boxes": 5}
    assert encoder.grounded == [["a Blue one", "pink", "the green one", "white"]]


# ---- zeroshot ----


def zeroshot(folder: Path, pictures: dict[str, Sequence[str]], **options: Any) -> Evaluation:
    """Pictures of one colour each, in class folders."""
    for name, painted in pictures.items():
        (folder / name).mkdir(parents=True)
        for i, colour in enumerate(painted):
            (folder / name / f"{i}.png").write_bytes(png(paint(9, 5, (colour, (0, 0, 9, 5)))))
    return Evaluation(kind="zeroshot", images=str(folder), **options)


def test_zeroshot_by_hand(tmp_path: Path) -> None:
    """Red: 2 of 3 right. Blue: 0 of 1. Empty: no image. top1 = 2/4, macc = (2/3 + 0)/2 = 1/3.

    Of the eight classes the wrong images' own ties at 0 with six others, behind the right one: rank 8, not in 5.
    """
    classes = {"red": ["red", "white", "red"], "dark_blue": ["green"], "green": [], "white": []}
    classes |= {"yellow": [], "cyan": [], "pink": [], "something": []}
    encoder = Colours()
    result = run(encoder, zeroshot(tmp_path / "a", classes))
    expected = {"top1": 2 / 4, "top5": 2 / 4, "macc": 1 / 3}
    expected |= {f"{k}_templates": v for k, v in expected.items()}
    assert {k: x["value"] for k, x in result["metrics"].items()} == pytest.approx(expected)
    assert result["counts"] == {"images": 4, "classes": 8, "classes_seen": 2}
    assert {"dark blue", "a photo of a dark blue."} <= set(encoder.texts)
    few = {"red": ["red", "white"], "blue": [], "green": [], "white": [], "pink": []}
    assert values(Colours(), zeroshot(tmp_path / "b", few))["top5"] == 1  # five classes, and any rank is within 5


@pytest.mark.parametrize(
    ("file", "text"),
    [("classes.json", '{"n01": "red", "n02": "bright_green", "n09": "pink"}'),
     ("class_names.txt", "n01 red\n\nn02\tbright green \nn09  pink\n")],
)  # fmt: skip
def test_class_names_from_a_file(tmp_path: Path, file: str, text: str) -> None:
    spec = zeroshot(tmp_path / "z", {"n01": ["red"], "n02": ["green", "green"], "n03": ["blue"]})
    (tmp_path / "z" / file).write_text(text)
    encoder = Colours()
    result = run(encoder, spec)
    assert result["metrics"]["top1"]["value"] == 1
    assert result["counts"] == {"images": 3, "classes": 3, "classes_seen": 2}
    assert result["skipped"] == {"no_category": 1}
    assert {"bright green", "pink", "red"} <= set(encoder.texts)


def test_links_and_hidden_files_in_class_folders(tmp_path: Path) -> None:
    zeroshot(tmp_path / "real", {"red": ["red"], "blue": ["blue"]})
    spec = zeroshot(tmp_path / "z", {"green": ["green"], ".cache": ["white"]})
    (tmp_path / "z/red").symlink_to(tmp_path / "real/red")
    (tmp_path / "z/blue/deeper").mkdir(parents=True)
    (tmp_path / "z/blue/deeper/x").symlink_to(tmp_path / "real/blue/0.png")
    (tmp_path / "z/blue/.DS_Store").write_bytes(b"x")
    (tmp_path / "z/notes.md").write_text("x")
    result = run(Colours(), spec)
    assert result["counts"] == {"images": 3, "classes": 3, "classes_seen": 3}
    assert result["metrics"]["top1"]["value"] == 1
    assert result["skipped"] == {}


# ---- pairs ----


def test_pairs_by_hand(world: World) -> None:
    """Three images. A, red: captions `red` and `pink`. B, green: `blue` twice and `Red `. C, blue: `white`.

    Different captions: red (of A and B), pink, blue, white.
    i2t: A: red, rank 1. B is green, no caption is: all four tie, two are wrong: rank 3. C is blue; blue is B's:
    `white` ties at 0 with red and pink, behind blue: rank 4. R@1 = 1/3, R@5 = 1.
    t2i: red: A scores 1 and is right: rank 1, for A and for B. pink: all at 0, rank 3. blue: C, wrong, is ahead of
    B and A, rank 3. white: all images at 0 but none is white: rank 3. R@1 = 2/5 pairs, R@5 = 1.
    """
    a, b, c = (world.image(paint(9, 6, (name, (0, 0, 9, 6)))) for name in ("red", "green", "blue"))
    for image, text in ((a, "red"), (a, "pink"), (b, "blue"), (b, "Blue"), (b, "Red "), (c, "white")):
        world.label(image, caption=text)
    result = run(Colours(), world.set("pairs"))
    expected = {"i2t_1": 1 / 3, "i2t_5": 1, "i2t_10": 1, "t2i_1": 2 / 5, "t2i_5": 1, "t2i_10": 1}
    assert {k: x["value"] for k, x in result["metrics"].items()} == pytest.approx(expected)
    assert result["counts"] == {"images": 3, "texts": 4, "pairs": 5}


# ---- shards ----


def sample(key: str, regions: Sequence[tuple[str, Box]], **changes: Any) -> bytes:
    """A sample's JSON; boxes in 0..1."""
    text = "; ".join(phrase for phrase, _ in regions) or "nothing"
    found, at = [], 0
    for phrase, box in regions:
        found.append(Region(box, phrase, 0.5, 0, (at, at + len(phrase))))
        at += len(phrase) + 2
    captions = (Caption(text, "m@1"), Caption("the second", "m@1"))
    made = encode(Sample(key, "http://a/b", "0" * 64, 80, 20, "alt", captions, tuple(found), "fp"))
    return json.dumps(json.loads(made) | changes).encode()


def jpeg(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def pack(path: Path, *members: tuple[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        for name, data in members:
            add_member(out, name, data)
        end_tar(out)


WIDE = jpeg(paint(80, 20, ("red", (0, 0, 40, 20)), ("blue", (40, 0, 80, 20))))
HALVES: list[tuple[str, Box]] = [("a red half", (0, 0, 0.5, 1)), ("Blue half", (0.5, 0, 1, 1))]


@pytest.mark.parametrize("kind", ["regions", "retrieval", "grounding"])
def test_an_oracle_has_all_of_packed_shards(tmp_path: Path, kind: Any) -> None:
    for n in range(3):
        members = [(f"{n}{i}.{end}", data) for i in range(2) for end, data in
                   (("jpg", WIDE), ("json", sample(f"{n}{i}", HALVES)))]  # fmt: skip
        pack(tmp_path / "shards" / f"shard-{n:05d}-000.tar", *members)
    (tmp_path / "shards/index.json").write_text("{}")
    seen: list[tuple[str, int, int]] = []
    spec = Evaluation(kind=kind, shards=str(tmp_path / "shards"))
    result = run(Colours(), spec, progress=lambda *args: seen.append(args))
    assert {x["value"] for k, x in result["metrics"].items() if k != "miou"} == {1.0}
    assert result["counts"]["images"] == 6
    assert result["skipped"] == {}
    assert seen == [("s", 6, 6)]
    if kind == "regions":
        assert result["counts"] == {"images": 6, "regions": 12, "classes": 2, "classes_seen": 2}
        one = Evaluation(kind=kind, shards=str(tmp_path / "shards/shard-00001-000.tar"))
        assert run(Colours(), one)["counts"]["images"] == 2
        assert run(Colours(), Evaluation(kind=kind, shards=str(tmp_path / "shards"), limit=4))["counts"]["images"] == 4


def test_pairs_from_shards_take_the_first_caption(tmp_path: Path) -> None:
    names = ["red", "green", "blue"]
    members = []
    for i, name in enumerate(names):
        members.append((f"{i}.jpg", jpeg(paint(80, 20, (name, (0, 0, 80, 20))))))
        captions = [{"text": f"All {name}", "model": "m@1"}, {"text": names[i - 1], "model": "m@1"}]
        members.append((f"{i}.json", sample(str(i), [], captions=captions)))
    members += [("3.jpg", WIDE), ("3.json", sample("3", [], captions=[]))]
    pack(tmp_path / "s" / "a.tar", *members)
    encoder = Colours()
    result = run(encoder, Evaluation(kind="pairs", shards=str(tmp_path / "s")))
    assert result["metrics"]["i2t_1"]["value"] == result["metrics"]["t2i_1"]["value"] == 1
    assert sorted(encoder.texts) == ["All blue", "All green", "All red"]
    assert result["skipped"] == {"unlabelled": 1}


def test_shards_of_references_find_their_images_in_the_store(tmp_path: Path) -> None:
    tars = tmp_path / "store" / "download" / "0123456789ab"
    tars.mkdir(parents=True)
    with (tars / "part-00000.0123456789abcdef.tar").open("wb") as out:
        places = [add_member(out, f"{i}.jpg", WIDE) for i in range(2)]
        end_tar(out)
    tar = "download/0123456789ab/part-00000.0123456789abcdef.tar"

    def cited(key: str, **place: Any) -> tuple[str, bytes]:
        document = json.loads(sample(key, HALVES)) | {"sha256": hashlib.sha256(WIDE).hexdigest()}
        image = {"tar": tar, "offset": places[0], "size": len(WIDE)} | place
        return f"{key}.json", json.dumps(document | {"image": image}).encode()

    pack(
        tmp_path / "store" / "pack" / "ba9876543210" / "shard-00000-000.tar",
        cited("0"), cited("1", offset=places[1]),
        cited("moved", offset=1), cited("gone", tar=tar.replace("part-00000", "part-00001")),
        cited("short", offset=10**9), cited("out", tar="../../../etc/passwd"), cited("huge", size=1 << 40),
    )  # fmt: skip
    shards = tmp_path / "store" / "pack"
    skipped = {"image_changed": 1, "missing_image": 1, "unreadable_image": 1, "bad_sample": 2}
    result = run(Colours(), Evaluation(kind="regions", shards=str(shards / "ba9876543210")))
    assert result["counts"]["images"] == 2
    assert result["metrics"]["top1"]["value"] == 1
    assert result["skipped"] == skipped
    shutil.copytree(shards / "ba9876543210", tmp_path / "elsewhere")
    alone = Evaluation(kind="regions", shards=str(tmp_path / "elsewhere"), images=str(tmp_path / "store"))
    assert run(Colours(), alone) == result


def test_hostile_shards(tmp_path: Path) -> None:
    good = sample("x", HALVES)
    flat: list[tuple[str, Box]] = [("red", (0.5, 0, 0.5 + 1e-12, 1)), ("blue", (0.5, 0, 1, 1))]
    thin = good.replace(b'"a red half", "score"', b'"a red half", "score"')
    pack(
        tmp_path / "s" / "a.tar",
        ("good.jpg", WIDE), ("good.json", good), ("good.json", good),  # duplicate
        ("/etc/passwd.jpg", WIDE), ("/etc/passwd.json", thin),  # a name, and nothing more
        ("alone.json", good), ("alone2.jpg", WIDE),  # bad_sample, both
        ("broken.jpg", WIDE), ("broken.json", b"{"),  # bad_sample
        ("huge.jpg", WIDE), ("huge.json", good.replace(b"0.5, 0.0, 1.0", b"0.5, 0.0, 1" + b"0" * 400)),  # bad_sample
        ("nan.jpg", WIDE), ("nan.json", good.replace(b"0.5, 0.0, 1.0", b"0.5, NaN, 1.0")),  # bad_sample
        ("none.jpg", WIDE), ("none.json", sample("none", [])),  # unlabelled
        ("noise.jpg", b"noise"), ("noise.json", good),  # not_an_image
        ("cut.jpg", WIDE[: len(WIDE) // 2]), ("cut.json", good),  # decode_error
        ("blank.jpg", WIDE), ("blank.json", sample("blank", [("  ", (0, 0, 1, 1)), HALVES[0]])),  # no_text, and a use
        ("thin.jpg", WIDE), ("thin.json", json.dumps(json.loads(sample("thin", HALVES)) | {
            "regions": [r | {"box": box} for r, (_, box) in zip(json.loads(good)["regions"], flat, strict=True)],
        }).encode()),  # bad_box, and a use
    )  # fmt: skip
    with tarfile.open(tmp_path / "s" / "b.tar", "w") as tar:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in (("linked.json", good), ("good.jpg", WIDE), ("good.json", good)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = (tmp_path / "s" / "a.tar").read_bytes()
    (tmp_path / "s" / "c.tar").write_bytes(whole[: len(WIDE) + 700])  # ends within the JSON
    (tmp_path / "s" / "d.tar").write_bytes(b"no tar")
    pack(tmp_path / "s" / "f.tar", ("good.jpg", WIDE), ("later.jpg", WIDE))
    torn = bytearray((tmp_path / "s" / "f.tar").read_bytes())
    torn[torn.index(b"later.jpg") + 150] ^= 1  # its header's checksum
    (tmp_path / "s" / "f.tar").write_bytes(torn)
    (tmp_path / "s" / "e.tar").mkdir()
    result = run(Colours(), Evaluation(kind="regions", shards=str(tmp_path / "s")))
    assert result["metrics"]["top1"]["value"] == 1
    assert result["counts"]["images"] == 4  # good, passwd, blank, thin
    assert result["counts"]["regions"] == 6
    assert result["skipped"] == {
        "duplicate": 2, "bad_sample": 6, "unlabelled": 1, "not_an_image": 1, "decode_error": 1, "no_text": 1,
        "bad_box": 1, "broken_shard": 4,
    }  # fmt: skip


def test_any_damage_to_a_shard_is_counted(tmp_path: Path) -> None:
    whole = bytearray()
    out = io.BytesIO()
    for name, data in (("a.jpg", WIDE), ("a.json", sample("a", HALVES)), ("b.jpg", WIDE), ("b.json", sample("b", []))):
        add_member(out, name, data)
    end_tar(out)
    whole[:] = out.getvalue()
    rng, path = np.random.default_rng(0), tmp_path / "a.tar"
    pack(tmp_path / "good.tar", ("ok.jpg", WIDE), ("ok.json", sample("ok", HALVES)))
    header_of_json = len(WIDE) + -len(WIDE) % 512 + 512
    lost = 0
    for round_ in range(300):
        damaged = bytearray(whole)
        start = (0, header_of_json, 0)[round_ % 3]
        spread = (512, 1024, len(whole))[round_ % 3]
        for at in start + rng.integers(0, spread, 4):
            damaged[at] = rng.integers(0, 256)
        if round_ % 3 < 2:  # with a checksum that fits
            head = damaged[start : start + 512]
            head[148:156] = b" " * 8
            damaged[start + 148 : start + 156] = b"%06o\0 " % sum(head)
        path.write_bytes(damaged)
        source = open_set("s", Evaluation(kind="regions", shards=str(tmp_path)), {})
        assert 1 <= len(source.pictures) <= 2
        loaded = [module._try(picture) for picture in source.pictures]
        assert loaded[-1][1].texts  # type: ignore[index]  # of the undamaged shard
        lost += len(source.pictures) == 1 or isinstance(loaded[0], Drop)
        assert source.skipped.total(), "b is unlabelled, if nothing worse"
    assert lost > 50


# ---- encoders that know nothing ----


def scattered(folder: Path, images: int = 60) -> World:
    """Images of three regions, each of one of seven colours at random, which is also its category and phrase."""
    world, rng = World(folder), np.random.default_rng(0)
    world.categories(*COLOURS[1:])
    for _ in range(images):
        chosen = rng.integers(1, 8, 3)
        boxes: list[Box] = [(10 * i, 0, 10 * i + 10, 12) for i in range(3)]
        image = world.image(paint(30, 12, *[(COLOURS[c], box) for c, box in zip(chosen, boxes, strict=True)]))
        for c, box in zip(chosen, boxes, strict=True):
            world.label(image, box, category_id=int(10 * c - 10), phrase=f"{COLOURS[c]} {image}")
    return world


def test_an_oracle_has_everything(tmp_path: Path) -> None:
    world = scattered(tmp_path)
    assert values(Colours(), world.set("regions")) == dict.fromkeys(FOUR, 1.0)
    assert values(Colours(), world.set("grounding"))["miou"] > 0.8  # a colour may occur twice in an image


def test_chance_lies_in_the_interval_of_random_features(tmp_path: Path) -> None:
    world = scattered(tmp_path)
    for x in run(Random(), world.set("regions"))["metrics"].values():
        assert x["low"] <= 1 / 7 <= x["high"]
        assert 0.02 < x["high"] - x["low"] < 0.3
    result = run(Random(), world.set("retrieval"))
    texts = result["counts"]["texts"]
    assert texts > 100
    for name, x in result["metrics"].items():
        k = int(name.split("_")[1])
        assert x["low"] <= k / texts * 1.3
        assert x["value"] <= 3 * k / texts + 0.01


@pytest.mark.parametrize("encoder", [Constant, Nan])
def test_the_same_answer_to_everything_is_worth_nothing(tmp_path: Path, encoder: type[Colours]) -> None:
    world = scattered(tmp_path)
    assert values(encoder(), world.set("regions")) == dict.fromkeys(FOUR, 0.0)
    assert set(values(encoder(), world.set("retrieval")).values()) == {0.0}
    for i in range(len(world.document["images"])):
        world.label(i, caption=f"image {i}")
    for entry in world.document["annotations"]:
        entry.pop("phrase", None)
    assert set(values(encoder(), world.set("pairs")).values()) == {0.0}
    found = values(encoder(), zeroshot(tmp_path / "z", {name: [name] for name in COLOURS}))
    assert set(found.values()) == {0.0}
    if encoder is Nan:
        world.label(0, (0, 0, 30, 12), phrase="all of it")
        assert set(values(encoder(), world.set("grounding")).values()) == {0.0}


@pytest.mark.parametrize(
    ("method", "answer"),
    [("encode_regions", lambda images, boxes: [np.ones((1, 4))]), ("encode_text", lambda texts: np.ones((1, 9))),
     ("encode_text", lambda texts: np.ones((len(texts), 5))), ("encode_text", lambda texts: np.ones(len(texts)))],
)  # fmt: skip
def test_answers_of_a_wrong_shape(tmp_path: Path, method: str, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Colours()
    monkeypatch.setattr(encoder, method, answer)
    with pytest.raises(ModelError, match=method):
        evaluate(encoder, {"s": scattered(tmp_path, 3).set("regions")})


# ---- sets as they come ----


def test_everything_bad_is_counted_and_nothing_ends_the_run(world: World) -> None:
    world.categories("red", "green")
    world.document["categories"] += [{"id": 70, "name": " "}, {"id": [1], "name": "x"}, 5]  # bad_annotation: 3
    full: Box = (0, 0, 10, 10)
    red = paint(10, 10, ("red", full))
    good = world.image(red)
    world.label(good, full, category_id=0)
    for box in ((-5, -5, 5, 5), (4, 4, 30, 30)):  # clipped, and red
        world.label(good, box, category_id=0)
    world.label(good, full, category_id=0, iscrowd=1)
    world.label(good, full, category_id=60)
    world.label(good, full)
    world.label(good, full, category_id={})  # no_category: 3
    world.label(99, full, category_id=0)
    world.label(None, full, category_id=0)
    world.document["annotations"] += ["x", None]
    for box in ([0, 0, 0, 5], [0, 0, -1, 5], [float("nan"), 0, 1, 1], [0, 0, 10**400, 1], [0, 0, 1], "box", None,
                [True, 0, 1, 1], ["0", 0, 1, 1], [20, 20, 5, 5], [5, 5, 1e-8, 1e-8]):  # fmt: skip
        world.label(good, category_id=0, bbox=box)
    world.document["images"] += [{"id": good}, 7, {"id": None}]
    world.image(red)  # unlabelled
    for name in ("../images/0000.png", "/etc/passwd", "a/../../x.png", "..", "", "a\\..\\b", "C:/x.png", "a\0b", None):
        world.label(world.image(red, file_name=name), full, category_id=0)
    missing = world.image(red)
    (world.folder / "images" / f"{missing:04d}.png").unlink()
    world.label(missing, full, category_id=0)
    world.label(world.image(red, file_name="folder"), full, category_id=0)
    (world.folder / "images/folder").mkdir()
    world.label(world.image(red, file_name="\ud800.png"), full, category_id=0)
    for data in (b"", b"text", png(red)[:40], b"GIF89a"):
        image = world.image(red)
        (world.folder / "images" / f"{image:04d}.png").write_bytes(data)
        world.label(image, full, category_id=0)
    result = run(Colours(), world.set("regions"))
    assert result["counts"] == {"images": 1, "regions": 3, "classes": 2, "classes_seen": 1, "clipped_boxes": 2}
    assert result["metrics"]["top1"]["value"] == 1
    bad = {k: result["skipped"].pop(k) for k in ("not_an_image", "decode_error") if k in result["skipped"]}
    assert sum(bad.values()) == 4
    assert result["skipped"] == {
        "bad_annotation": 3 + 1 + 2 + 2, "crowd": 1, "no_category": 3, "unknown_image": 1, "bad_box": 11,
        "duplicate": 1, "unlabelled": 1, "bad_path": 9, "missing_image": 1, "unreadable_image": 2,
    }  # fmt: skip


def test_texts_go_to_the_model_clean(world: World) -> None:
    image = world.image(paint(20, 10, ("red", (0, 0, 10, 10)), ("green", (10, 0, 20, 10))))
    world.label(image, (0, 0, 10, 10), phrase="  red\n\ud800thing ")
    world.label(image, (10, 0, 20, 10), phrase="green" + " x" * 10_000)
    for bad in ("", "  ", 5, None, ["red"]):
        world.label(image, (10, 0, 20, 10), phrase=bad)
    encoder = Colours()
    result = run(encoder, world.set("retrieval"))
    assert result["skipped"] == {"no_text": 5}
    green, red = encoder.texts
    assert red == "red ?thing"
    assert len(green) <= 10_000


def test_a_limit_takes_images_evenly_and_batches_are_of_32(tmp_path: Path) -> None:
    world = scattered(tmp_path, 70)
    world.document["annotations"] = [a for a in world.document["annotations"] if a["image_id"] % 2]  # half unlabelled
    seen: list[tuple[str, int, int]] = []
    encoder = Colours()
    result = run(encoder, world.set("retrieval"), progress=lambda *args: seen.append(args))
    assert seen == [("s", 32, 35), ("s", 35, 35)]
    assert encoder.batches == [32, 3]
    assert result["skipped"] == {"unlabelled": 35}
    encoder = Colours()
    result = run(encoder, world.set("retrieval", limit=5))  # of the 35: 0, 7, 14, 21, 28, which are 1, 15, 29, 43, 57
    assert result["counts"]["images"] == 5
    assert {text.split()[1] for text in encoder.texts} == {"1", "15", "29", "43", "57"}


def test_sets_from_a_bucket(world: World, s3_options: dict[str, Any]) -> None:
    import s3fs

    world.categories("red", "green")
    world.label(world.image(paint(8, 8, ("red", (0, 0, 8, 8)))), (0, 0, 8, 8), category_id=0)
    world.set("regions")
    zeroshot(world.folder / "z", {"red": ["red"], "green": ["green"]})
    pack(world.folder / "shards" / "a.tar", ("a.jpg", WIDE), ("a.json", sample("a", HALVES)))
    root = f"bucket/{world.folder.name}"
    s3fs.S3FileSystem(**s3_options).put(str(world.folder), root, recursive=True)
    world.label(world.image(paint(8, 8)), (0, 0, 8, 8), category_id=0)  # and an image that is not there
    where = Evaluation(kind="regions", annotations=str(world.folder / "annotations.json"), images=f"s3://{root}/images")
    sets = {
        "coco": Evaluation(kind="regions", annotations=f"s3://{root}/annotations.json", images=f"s3://{root}/images"),
        "shards": Evaluation(kind="grounding", shards=f"s3://{root}/shards"),
        "classes": Evaluation(kind="zeroshot", images=f"s3://{root}/z"),
    }
    results = evaluate(Colours(), sets, storage_options=s3_options)
    assert [r["counts"]["images"] for r in results.values()] == [1, 1, 2]
    assert [x["value"] for r in results.values() for k, x in r["metrics"].items() if k in ("top1", "acc50")] == [
        1,
        1,
        1,
    ]
    world.set("regions")
    assert evaluate(Colours(), {"s": where}, storage_options=s3_options)["s"]["skipped"] == {"missing_image": 1}


def test_sets_that_cannot_be_used(world: World, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk.json").write_text('{"images": [')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "no").mkdir()
    (tmp_path / "names/red").mkdir(parents=True)
    (tmp_path / "names/classes.json").write_text('{"red": 5}')
    (tmp_path / "lines/red").mkdir(parents=True)
    (tmp_path / "lines/class_names.txt").write_text("red\n")
    images, empty = str(tmp_path / "images"), str(tmp_path / "empty")
    world.label(world.image(paint(4, 4)), (0, 0, 4, 4), phrase="x")

    def coco(name: str, kind: Any = "regions") -> Evaluation:
        return Evaluation(kind=kind, annotations=str(tmp_path / name), images=images)

    cases = {
        "nowhere.json": coco("nowhere.json"),
        "junk.json cannot be read as JSON": coco("junk.json"),
        "deep.json cannot be read as JSON": coco("deep.json"),
        "list.json has no list `images`": coco("list.json"),
        "no list `categories`": coco("half.json"),
        "no image to evaluate .it is empty.": coco("half.json", "pairs"),
        "no image to evaluate .no_text: 1, unlabelled: 1.": coco("annotations.json", "pairs"),
        "there is no .*gone": Evaluation(kind="zeroshot", images=str(tmp_path / "gone")),
        "no image to evaluate": Evaluation(kind="zeroshot", images=empty),
        "classes.json is not": Evaluation(kind="zeroshot", images=str(tmp_path / "names")),
        "class_names.txt: every line": Evaluation(kind="zeroshot", images=str(tmp_path / "lines")),
        "there are no shards": Evaluation(kind="pairs", shards=empty),
        "needs images, and nothing": Evaluation(kind="zeroshot", shards=empty),
        "needs annotations and images, or shards": Evaluation(kind="pairs", images=empty),
        "nothing else of these": Evaluation(kind="pairs", images=empty, annotations=empty, shards=empty),
        "limit: 0": Evaluation(kind="pairs", shards=empty, limit=0),
        "templates: every one": Evaluation(kind="zeroshot", images=empty, templates=("a {name}",)),
        "nope://": Evaluation(kind="pairs", shards="nope://x"),
    }
    world.document["annotations"][0]["phrase"] = None
    world.set("retrieval")
    encoder = Colours()
    for message, spec in cases.items():
        with pytest.raises(SetError, match=message) as caught:
            evaluate(encoder, {"bad set": spec})
        assert str(caught.value).startswith("bad set: ")
        assert "\n" not in str(caught.value)
    assert encoder.batches == []


def test_a_broken_set_is_found_before_the_first_image(world: World, tmp_path: Path) -> None:
    world.label(world.image(paint(4, 4)), (0, 0, 4, 4), phrase="x")
    encoder = Colours()
    with pytest.raises(SetError, match="bad"):
        evaluate(
            encoder, {"good": world.set("retrieval"), "bad": Evaluation(kind="pairs", shards=str(tmp_path / "no"))}
        )
    assert encoder.batches == []
    (tmp_path / "images/0000.png").unlink()
    with pytest.raises(SetError, match=r"good: nothing is left to evaluate \(missing_image: 1\)"):
        evaluate(encoder, {"good": world.set("retrieval")})


def test_images_as_they_lie_in_the_file() -> None:
    turned = Image.new("RGB", (8, 4))
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    turned.save(out, "JPEG", exif=exif)
    assert open_image(out.getvalue()).size == (8, 4)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert open_image(png(clear)).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.full((2, 2), 0x8000, np.uint16))
    assert open_image(png(grey)).getpixel((0, 0)) == (128, 128, 128)
    out = io.BytesIO()
    Image.new("CMYK", (2, 2)).save(out, "JPEG")
    assert open_image(out.getvalue()).mode == "RGB"
    with pytest.raises(Drop, match="not_an_image"):
        open_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")


@pytest.mark.parametrize("side", [9_000, 30_000])  # below and above Pillow's own limit
def test_a_bomb_is_not_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(png(Image.new("L", (1, 1))))
    import struct
    import zlib

    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(Drop, match="too_many_pixels"):
        open_image(bytes(data))


def test_the_table_and_repeatability(world: World) -> None:
    from rich.console import Console

    world.categories("red", "blue")
    for name in ("red", "blue", "white"):
        world.label(world.image(paint(8, 8, (name, (0, 0, 8, 8)))), (0, 0, 8, 8), category_id=0)
    spec = world.set("regions")
    results = evaluate(Colours(), {"coco [val]": spec, "again": spec})
    assert results["again"] == results["coco [val]"]
    assert evaluate(Colours(), {"again": spec}, seed=1)["again"]["metrics"].keys() == results["again"]["metrics"].keys()
    console = Console(file=io.StringIO(), width=100)
    console.print(table(results))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "coco [val]" in shown
    assert "33.3" in shown  # 1 of 3
    assert "0.0 to 100.0" in shown


def test_nothing_is_left_running(tmp_path: Path) -> None:
    """An encoder that raises ends the run, with the threads that decode."""
    import threading

    class Broken(Colours):
        def encode_regions(self, images: Sequence[Image.Image], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
            raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(Broken(), {"s": scattered(tmp_path, 40).set("regions")})
    assert threading.active_count() == before


def test_one_batch_is_decoded_ahead() -> None:
    import threading
    import time

    started, labels = [], Labels(np.zeros((1, 4)), ((0, "x"),), Counter())

    def picture() -> tuple[Image.Image, Labels]:
        started.append(threading.current_thread().name)
        return Image.new("RGB", (1, 1)), labels

    batches = module._batches([picture] * 130)
    sizes = [len(next(batches))]
    deadline = time.monotonic() + 5
    while len(started) < 64 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(started) == 64
    assert threading.current_thread().name not in started
    sizes += [len(batch) for batch in batches]
    assert sizes == [32, 32, 32, 32, 2]
