"""The tiny captioner: a template over a scene. It says what the networks are sure of, and nothing else."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..contract import PlainCaptioner
from . import regions
from .regions import COLOURS, Box, Floats, Mask, area, iou, overlap
from .scene import Eyes, Scene, eyes
from .vocabulary import ANIMAL, ANIMALS, CLASSES, FACE, THINGS

# How a caption says a class, and the kinds too loose to be said.
SAID = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tv": "television",
    "dining table": "table",
}
LOOSE = (
    *("animal", "beach", "box", "castle", "church", "clothes", "drink", "food", "house", "pagoda", "roof", "screen"),
    *("stage", "table", "temple", "tool", "wall", "water"),
)
BEARERS = ("person", "table", "couch", "chair", "bus", "boat")  # what stands in their boxes is not a part of them
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {"person": "people", "sheep": "sheep", "fish": "fish", "deer": "deer", "mouse": "mice", "goose": "geese"}


@dataclass
class Thing:
    """What a caption names: a noun, its boxes, all their cells, and how sure it is (0..1)."""

    noun: str
    boxes: list[Box]
    mask: Mask
    sure: float
    solid: bool = True
    worn: bool = False

    def said(self, colour: str) -> str:
        """A noun phrase: number or article, colour, noun."""
        words = f"{colour} {self.noun}".strip()
        if len(self.boxes) == 1:
            return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"
        first, _, last = words.rpartition(" ")
        ending = re.sub(r"(?<![aeiou])y$", "ie", last) + ("es" if re.search(r"(s|x|z|ch|sh)$", last) else "s")
        many = PLURALS.get(last, ending)
        return f"{NUMBERS[len(self.boxes)] if len(self.boxes) < 10 else 'many'} {first} {many}".replace("  ", " ")


def name_of(sight: Eyes, mass: Floats) -> tuple[str, npt.NDArray[np.intp]]:
    """The most specific noun that the classifier is sure of: a class, else a kind, else "" (and the classes of it)."""
    top = int(mass[:1000].argmax())
    if mass[top] >= 0.4:
        return sight.names[top], np.array([top])
    for words, classes in sorted(sight.kinds.items(), key=lambda kind: len(kind[1])):
        if words.split("/")[0] not in LOOSE and mass[classes].sum() >= 0.5:
            return words.split("/")[0], classes
    return "", np.array([], np.intp)


def things_in(sight: Eyes, scene: Scene) -> list[Thing]:
    """What there is evidence enough to name, most prominent first, at most four."""
    found: list[Thing] = []
    taken, known = np.zeros(scene.pixels.shape[:2], bool), np.zeros(1000, bool)
    sure_of = [float(region.mass[1000 : 1000 + FACE].max()) for region in scene.regions]
    for sure, region in sorted(
        zip(sure_of, scene.regions, strict=True), key=lambda pair: -pair[0] * pair[1].mask.sum()
    ):
        if sure < 0.5 or not region.solid or area(region.box) < 0.01 or taken[region.mask].mean() > 0.4:
            continue
        taken |= region.mask
        k = int(region.mass[1000 : 1000 + FACE].argmax())
        noun = sight.names[1000 + k]
        known |= sight.same[k] > 0
        if k in (*ANIMALS, ANIMAL):
            known[:398] = True
            noun = name_of(sight, np.where(np.arange(CLASSES) < 398, region.mass, 0))[0] or noun
        if noun == "potted plant":
            flower = region.mass[sight.kinds["flower"]].sum() > 0.3
            noun = "flower" if flower else "potted plant" if region.mass[738] > 0.2 else "plant"
        noun = SAID.get(noun, noun)
        same = [thing for thing in found if thing.noun == noun]
        if same:
            same[0].boxes.append(region.box)
            same[0].mask = same[0].mask | region.mask
        else:
            found.append(Thing(noun, [region.box], region.mask, sure))
    # What DeepLab does not know: named by a candidate as a whole, or by some place of the image.
    masses = [region.mass for region in scene.regions]
    unknown = np.pad(~known, (0, len(THINGS)))
    nouns = dict(name for name in (name_of(sight, mass * unknown) for mass in masses) if name[0])
    peaks = scene.places.max((0, 1)) * unknown[:1000]
    places = {sight.names[k]: np.array([k]) for k in np.argsort(-peaks, kind="stable")[:4] if peaks[k] > 0.5}
    for noun, classes in sorted(nouns.items(), key=lambda item: -len(item[1]))[:6] + list(places.items()):
        if known[classes].any():
            continue
        wanted = np.zeros(CLASSES, np.float32)
        wanted[classes] = 1
        for region, score in sight.locate(scene, wanted)[0][:1]:
            repeated = any(
                iou(region.box, box) > 0.4 or (overlap(region.box, box) > 0.7 and thing.noun not in BEARERS)
                for thing in found
                for box in thing.boxes
            )
            if score >= 0.45 and area(region.box) > 0.015 and not repeated:
                worn = bool(np.isin(classes, sight.kinds["clothes"]).all())
                found.append(Thing(noun, [region.box], region.mask, score, region.solid, worn))
                known[classes] = True
    return sorted(found, key=lambda thing: -thing.mask.mean() * thing.sure * (0.1 if thing.noun == "table" else 1))[:4]


def colour_of(named: npt.NDArray[np.int8], mask: Mask, share: float) -> str:
    """The colour of at least a share of a mask's cells, or its one bright colour among dull ones, or ""."""
    if not mask.any():
        return ""
    counts = np.bincount(named[mask], minlength=len(COLOURS)) / mask.sum()
    bright = counts.copy()
    bright[[0, 1, 2, 5]] = 0
    top, vivid = int(counts.argmax()), int(bright.argmax())
    if counts[top] >= share:
        return COLOURS[top]
    return COLOURS[vivid] if bright[vivid] >= 0.18 and bright[vivid] > 2 * np.sort(bright)[-2] else ""


def relation(one: Thing, other: Thing) -> str:
    """How the second thing stands to the first, as far as the boxes tell."""
    first, second = one.boxes[0], other.boxes[0]
    if other.noun == "table":
        return "on"
    apart = max(first[0], second[0]) - min(first[2], second[2])
    return "next to" if apart > -0.25 * min(first[2] - first[0], second[2] - second[0]) else "with"


def write(sight: Eyes, scene: Scene) -> str:
    """One caption, or "" where the networks are sure of nothing."""
    things = things_in(sight, scene)
    if not things:
        return ""
    named = regions.colours(scene.pixels)
    around = ~np.logical_or.reduce([thing.mask for thing in things])
    behind = colour_of(named, around, 0.6) if around.mean() > 0.2 else ""
    dressed = [region for region in scene.regions if region.mass[1000 + FACE + 1] > 0.4]
    wearing = ""
    if things[0].noun == "person" and len(things[0].boxes) == len(dressed) == 1:
        colour = colour_of(named, dressed[0].mask, 0.4)
        worn = [thing for thing in things if thing.worn and iou(thing.boxes[0], dressed[0].box) > 0.2]
        wearing = f" in {worn[0].said(colour)}" if worn else f" in {colour} clothes" if colour else ""
    if things[0].noun == "person":
        things = [thing for thing in things if not thing.worn]
    phrases = []
    for thing in things:
        colour = colour_of(named, thing.mask, 0.5) if thing.solid and thing.noun != "person" else ""
        phrases.append(thing.said("" if colour == behind else colour))
    text = phrases[0] + wearing
    if len(things) > 1:
        text += f" {relation(things[0], things[1])} {phrases[1]}"
    if len(things) > 2:
        text += ", with " + " and ".join(phrases[2:]) + " nearby"
    if behind:
        text += f" against {'an' if behind[0] in 'aeiou' else 'a'} {behind} background"
    return f"{text[0].upper()}{text[1:]}."


def open_captioner() -> PlainCaptioner:
    """Open the captioner: one caption an image, or none. It does not read the alt text. Raises ModelError as `eyes`."""
    sight = eyes()

    def caption(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        texts = [write(sight, sight.look(image)) for image, _ in zip(images, alt_texts, strict=True)]
        return [[text] if text else [] for text in texts]

    return caption
