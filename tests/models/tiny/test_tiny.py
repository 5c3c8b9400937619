"""The built-in captioner and grounder on real photographs that the development packages carry."""

import itertools
import re
from functools import cache

import numpy as np
import pytest
from PIL import Image

from tests import photos
from vesl.models import tiny
from vesl.models.contract import Detections, PlainCaptioner, PlainGrounder
from vesl.models.tiny import captioner, regions, scene, vocabulary

PHOTOS = {
    "astronaut": "skimage/data/astronaut.png",
    "camera": "skimage/data/camera.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
    "hopper": "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
}
# Drawn by hand, to about 2 % of the image.
BOXES = {
    ("astronaut", "a woman in an orange suit"): (0.15, 0.03, 0.72, 1.0),
    ("astronaut", "the helmet"): (0.56, 0.62, 1.0, 1.0),
    ("camera", "a man"): (0.0, 0.14, 0.57, 1.0),
    ("chelsea", "a cat"): (0.0, 0.0, 0.86, 1.0),
    ("coffee", "a cup of coffee"): (0.28, 0.03, 0.69, 0.62),
    ("motorcycle", "a red motorcycle"): (0.16, 0.15, 0.88, 0.92),
    ("china", "a temple"): (0.12, 0.08, 0.55, 0.83),
    ("flower", "a daisy"): (0.27, 0.2, 0.71, 0.84),
    ("hopper", "an old woman"): (0.05, 0.03, 1.0, 1.0),
    ("hopper", "a military uniform"): (0.0, 0.5, 1.0, 1.0),
}
ABSENT = ["a giraffe", "a train", "a pizza", "an umbrella", "a laptop", "an airplane", "a banana", "a bed"]


@cache
def photo(name: str) -> Image.Image:
    return photos.photo(PHOTOS[name])


def beside(*names: str) -> Image.Image:
    """Real photographs side by side, at one height."""
    parts = [photo(name).resize((300 * photo(name).width // photo(name).height, 300)) for name in names]
    canvas = Image.new("RGB", (sum(part.width for part in parts), 300))
    for part, left in zip(parts, itertools.accumulate((part.width for part in parts), initial=0), strict=False):
        canvas.paste(part, (left, 0))
    return canvas


@pytest.fixture(scope="module")
def ground() -> PlainGrounder:
    return tiny.open_grounder(tiny.FLOOR)


@pytest.fixture(scope="module")
def caption() -> PlainCaptioner:
    return tiny.open_captioner()


def best(found: Detections, phrase: int) -> tuple[tuple[float, ...], float]:
    """Return the best box of a phrase and its score, or no box and 0."""
    own = np.flatnonzero(found.phrases == phrase)
    if not len(own):
        return (), 0.0
    k = own[found.scores[own].argmax()]
    return tuple(map(float, found.boxes[k])), float(found.scores[k])


def same(one: Detections, other: Detections) -> bool:
    return (
        np.array_equal(one.boxes, other.boxes)
        and np.array_equal(one.phrases, other.phrases)
        and np.array_equal(one.scores, other.scores)
    )


@pytest.mark.parametrize(("name", "phrase"), BOXES)
def test_a_present_thing_gets_its_box(ground: PlainGrounder, name: str, phrase: str) -> None:
    box, score = best(ground([photo(name)], [[phrase]])[0], 0)
    assert score >= tiny.SELECT
    assert regions.iou(box, BOXES[name, phrase]) >= 0.6  # type: ignore[arg-type]


def test_absent_things_stay_below_the_threshold(ground: PlainGrounder) -> None:
    found = ground([photo(name) for name in PHOTOS], [ABSENT] * len(PHOTOS))
    loud = [(name, ABSENT[k]) for name, one in zip(PHOTOS, found, strict=True) for k in one.phrases[one.scores >= 0.2]]
    assert not loud


def test_a_plural_keeps_a_box_for_each(ground: PlainGrounder) -> None:
    people, cats = ground([beside("astronaut", "hopper"), beside("chelsea", "chelsea")], [["two people"], ["cats"]])
    for found, middle in ((people, 300 / (300 + 300 * 512 / 600)), (cats, 0.5)):
        strong = found.boxes[found.scores >= 0.5]
        centres = sorted(((strong[:, 0] + strong[:, 2]) / 2).tolist())
        assert len(centres) == 2
        assert centres[0] < middle < centres[1]


def test_two_phrases_share_one_box(ground: PlainGrounder) -> None:
    found = ground([photo("chelsea")], [["a cat", "an animal"]])[0]
    assert best(found, 0)[0] == best(found, 1)[0] != ()


def test_detections_keep_the_contract(ground: PlainGrounder) -> None:
    for name in PHOTOS:
        found = ground([photo(name)], [["a person", "a red thing", "a cup", "a wheel"]])[0]
        assert (found.boxes.dtype, found.phrases.dtype, found.scores.dtype) == (np.float32, np.int16, np.float32)
        assert len(found.boxes) == len(found.phrases) == len(found.scores)
        assert (found.scores >= tiny.FLOOR).all()
        assert (found.scores <= 1).all()
        assert ((found.boxes >= 0) & (found.boxes <= 1)).all()
        assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()


def test_floor_only_cuts(ground: PlainGrounder) -> None:
    images, asked = (
        [photo(name) for name in PHOTOS],
        [["an animal", "a cup", "a person", "a building", "flowers"]] * len(PHOTOS),
    )
    strict = tiny.open_grounder(0.15)
    for low, high in zip(ground(images, asked), strict(images, asked), strict=True):
        over = low.scores >= np.float32(0.15)
        assert same(high, Detections(low.boxes[over], low.phrases[over], low.scores[over]))
    assert len(ground(images, asked)[-1].scores) > 0


def test_a_kind_is_not_its_neighbour() -> None:
    sight = scene.eyes()
    cat, beagle, lion = (sight.names.index(name) for name in ("Egyptian cat", "beagle", "lion"))
    dog, animal, kitten = (sight.relevance(phrase) for phrase in ("a dog", "some animals", "the kitten"))
    assert dog[beagle] > 0.8
    assert dog[cat] < 0.05
    assert animal[[cat, beagle, lion]].min() > 0.5
    assert kitten[cat] > 0.8
    assert kitten[beagle] < 0.3


def test_an_image_does_not_depend_on_its_batch(ground: PlainGrounder, caption: PlainCaptioner) -> None:
    names, asked = ["chelsea", "coffee", "astronaut"], [["a cat", "a dog"], [], ["the helmet", "a cat"]]
    images = [photo(name) for name in names]
    together = ground(images, asked)
    backwards = ground(images[::-1], asked[::-1])[::-1]
    alone = [ground([image], [phrases])[0] for image, phrases in zip(images, asked, strict=True)]
    assert all(same(a, b) and same(a, c) for a, b, c in zip(together, backwards, alone, strict=True))
    assert len(together[1].boxes) == 0
    assert caption(images, [""] * 3) == [caption([image], ["x"])[0] for image in images]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("chelsea", r"^A.* cat\b"),
        ("coffee", r"^An? .*espresso on an? .*table"),
        ("motorcycle", r"^A red motorcycle"),
        ("astronaut", r"^A person in orange clothes"),
        ("camera", r"^A person .*tripod"),
        ("flower", r"^An orange flower"),
    ],
)
def test_captions_say_what_is_there(caption: PlainCaptioner, name: str, words: str) -> None:
    ((text,),) = caption([photo(name)], [""])
    assert re.search(words, text), text
    assert text[0].isupper()
    assert text.endswith(".")
    assert not re.search(r"\ba [aeiou]|\ban [^aeiouAEIOU]|  ", text)


def test_no_caption_without_evidence(caption: PlainCaptioner) -> None:
    """Photographs of nothing that the networks know: grass, coins, stars, a blurred dial, one colour."""
    names = ("grass.png", "coins.png", "hubble_deep_field.jpg", "clock_motion.png")
    images = [Image.new("RGB", (300, 200), "teal"), *(photos.photo(f"skimage/data/{name}") for name in names)]
    assert caption(images, [""] * 5) == [[]] * 5


def test_captions_count(caption: PlainCaptioner) -> None:
    people, cats = caption([beside("astronaut", "hopper"), beside("chelsea", "chelsea")], ["", ""])
    assert people[0].startswith("Two people")
    assert re.match(r"Two .*cats", cats[0])


def test_what_is_captioned_is_found(ground: PlainGrounder, caption: PlainCaptioner) -> None:
    phrases = {"chelsea": "cat", "coffee": "cup of espresso", "motorcycle": "motorcycle", "camera": "tripod"}
    for name, phrase in phrases.items():
        assert phrase in caption([photo(name)], [""])[0][0]
        assert best(ground([photo(name)], [[phrase]])[0], 0)[1] >= 0.5


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (2, 2), (37, 900), (4000, 30)])
def test_any_shape_of_image(ground: PlainGrounder, caption: PlainCaptioner, size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    for image in (noise, Image.new("RGB", size), photo("chelsea").resize(size)):
        found = ground([image], [["a cat", "a red bus"]])[0]
        assert (found.boxes[:, :2] < found.boxes[:, 2:]).all()
        assert len(caption([image], [""])[0]) <= 1


def test_any_phrase(ground: PlainGrounder) -> None:
    phrases = [
        "",
        " ",
        "的猫",
        "🐱🐱",
        "кошка",
        "A CAT",
        "a " * 5000,
        "cat " * 2500,
        "\x00\ud800",
        "'--'",
        "of the",
        "%s {0}",
    ]
    found = ground([photo("chelsea")], [phrases])[0]
    assert best(found, phrases.index("A CAT"))[1] > 0.9
    assert not np.isin([0, 1, 2, 3, 4, 6], found.phrases).any()
    assert ground([photo("chelsea")], [[]])[0].boxes.shape == (0, 4)
    assert ground([], []) == []


def test_models_share_networks() -> None:
    assert scene.eyes() is scene.eyes()


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("A woman in an orange suit", ("woman in orange suit", "woman")),
        ("two CATS", ("cats", "cats")),
        ("a cup of coffee", ("cup of coffee", "cup")),
        ("another cat", ("another cat", "cat")),
        ("", ("", "")),
        ("猫", ("", "")),
    ],
)
def test_head_noun(phrase: str, expected: tuple[str, str]) -> None:
    assert vocabulary.plain(phrase) == expected


@pytest.mark.parametrize(
    ("noun", "count", "colour", "expected"),
    [
        ("person", 3, "", "three people"),
        ("bus", 2, "red", "two red buses"),
        ("orange", 1, "", "an orange"),
        ("tabby cat", 2, "", "two tabby cats"),
        ("butterfly", 12, "", "many butterflies"),
        ("sheep", 2, "white", "two white sheep"),
        ("tray", 2, "", "two trays"),
    ],
)
def test_noun_phrases(noun: str, count: int, colour: str, expected: str) -> None:
    assert captioner.Thing(noun, [(0.0, 0.0, 1.0, 1.0)] * count, np.ones((1, 1), bool), 1.0).said(colour) == expected


def test_components_and_touching_instances() -> None:
    mask = np.zeros((40, 60), bool)
    mask[20:, 5:55] = True  # shoulders that touch, two heads above
    mask[5:20, 12:22] = mask[5:20, 38:48] = True
    mask[0, 59] = True
    (people,) = regions.components(mask, 5)
    left, right = regions.instances(people, 5)
    assert regions.box_of(left)[2] <= regions.box_of(right)[0]
    assert (left | right == people).all()
    assert regions.instances(mask[:, :30], 5)[0].sum() == mask[:, :30].sum()  # one head, one thing


def test_heaviest_box_equals_brute_force() -> None:
    rng = np.random.default_rng(3)
    for shape in ((5, 7), (7, 4), (1, 6), (6, 1)):
        evidence = rng.normal(size=shape).astype(np.float32)
        box, total = regions.heaviest(evidence)
        sums = [
            evidence[a:b, c:d].sum()
            for a, b in itertools.combinations(range(shape[0] + 1), 2)
            for c, d in itertools.combinations(range(shape[1] + 1), 2)
        ]
        assert total == pytest.approx(max(sums), abs=1e-5)
        assert evidence[regions.window(box, *shape)].sum() == pytest.approx(total, abs=1e-5)


def test_colours() -> None:
    swatches = {
        "red": (210, 20, 30),
        "orange": (240, 130, 20),
        "green": (30, 160, 40),
        "blue": (20, 60, 200),
        "black": (9, 9, 9),
    }
    swatches |= {"white": (250, 250, 250), "gray": (128, 128, 130), "brown": (110, 70, 30), "yellow": (250, 230, 30)}
    named = regions.colours(np.array([list(swatches.values())], np.uint8))
    assert [regions.COLOURS[k] for k in named[0]] == list(swatches)
