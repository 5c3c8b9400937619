"""What the tiny models see, whatever is asked: class maps, candidate boxes, and the evidence for a phrase."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from . import regions
from .regions import Box, Floats, Mask, area, box_of, components, iou, overlap, resample, window
from .vocabulary import ANIMAL, ANIMALS, CLASSES, FACE, KINDS, PERSON, RENAMED, THINGS, UNSURE, plain
from .weights import Classifier, Segmenter, open_text

SCALES = (224, 320, 480)  # square roots of the areas in pixels at which the classifier sees the whole image


@dataclass(frozen=True)
class Region:
    """A candidate: its box, its cells on the scene's grid, and how likely each class (1000 and THINGS) is there."""

    box: Box
    mask: Mask
    mass: Floats
    solid: bool  # whether it is an outline and not only a rough place


@dataclass(frozen=True)
class Scene:
    """What the networks see, whatever is asked: maps on a grid of 96 cells along the longer side, and candidates."""

    image: Image.Image
    pixels: npt.NDArray[np.uint8]  # [h, w, 3]
    things: Floats  # [h, w, len(THINGS)]
    places: Floats  # [h', w', 1000], coarser
    regions: list[Region]


class Eyes:
    """The networks of one process, shared by captioner and grounder, and the texts of their classes."""

    def __init__(self) -> None:
        self._classifier, self._segmenter, self._embed = Classifier(), Segmenter(), open_text()
        renamed = {int(entry.split()[0]): entry.strip().partition(" ")[2] for entry in RENAMED.split(";")}
        self.names = [renamed.get(k, name) for k, name in enumerate(self._classifier.names)] + list(THINGS)
        self.kinds: dict[str, npt.NDArray[np.intp]] = {}
        for entry in KINDS.split(";"):
            words, numbers = entry.split(":")
            spans = [[int(end) for end in span.split("-")] for span in numbers.split()]
            self.kinds[" ".join(words.split())] = np.array([k for span in spans for k in range(span[0], span[-1] + 1)])
        prompts: dict[str, Floats] = {}

        def prompt(text: str, classes: Sequence[int] | npt.NDArray[np.intp], weight: float) -> None:
            row = prompts.setdefault(text, np.zeros(CLASSES, np.float32))
            row[classes] = np.maximum(row[classes], weight)

        for k, name in enumerate(self.names):
            prompt(name, [k], 1.0)
        for words, classes in self.kinds.items():
            for text in words.split("/"):
                prompt(text, classes, 0.9)
        # For each thing, ImageNet's classes of the same thing: there the one network can confirm the other.
        self.same = np.zeros((len(THINGS), 1000), np.float32)
        for k, (name, others) in enumerate(THINGS.items()):
            for text in filter(None, others.split("/")):
                prompt(text, [1000 + k], 1.0)
            for words, classes in self.kinds.items():
                if ({name, *others.split("/")} - {"vehicle"}) & set(words.split("/")):
                    self.same[k, classes] = 1
        self._classes, vectors = np.stack(list(prompts.values())), self._embed(list(prompts))
        self._centre = vectors[:CLASSES].mean(0)
        self._prompts = self._centred(vectors)
        self._vector = functools.lru_cache(8192)(lambda text: self._centred(self._embed([text])[0]))
        self._compare = functools.lru_cache(4096)(self._similar)

    def _centred(self, vectors: Floats) -> Floats:
        moved = vectors - self._centre
        return np.asarray(moved / (np.linalg.norm(moved, axis=-1, keepdims=True) + 1e-6), np.float32)

    def _similar(self, text: str, head: str) -> Floats:
        similar = self._prompts @ (np.float32(0.4) * self._vector(text) + np.float32(0.6) * self._vector(head))
        # A word far below the best one is another kind of the same thing: "dog" is not the "animal" that a cat is.
        near = np.clip((similar - similar.max() + 0.25) / 0.15, 0, 1) * np.clip((similar - 0.42) / 0.33, 0, 1)
        return np.asarray((self._classes * near[:, None]).max(0), np.float32)

    def relevance(self, phrase: str) -> Floats:
        """How much each class is what a phrase speaks of, float32 [CLASSES] in 0..1; the head noun weighs most."""
        text, head = plain(phrase)
        return self._compare(text, head) if text else np.zeros(CLASSES, np.float32)

    def look(self, image: Image.Image) -> Scene:
        """See an image of any size."""
        image = image.convert("RGB")
        image.thumbnail((672, 672))
        height, width = (max(8, round(side * 96 / max(image.size))) for side in (image.height, image.width))
        pixels = np.asarray(image.resize((width, height), Image.Resampling.BOX))
        seen = self._segment(image, height, width)
        things = np.concatenate((seen[..., 1:], np.zeros((height, width, len(THINGS) - 20), np.float32)), -1)
        scene = Scene(image, pixels, things, self._classify_places(image), [])
        least, best = max(6, height * width // 250), seen.argmax(-1)
        for mask in [*(best == k for k in range(1, 21)), seen[..., 0] < 0.5]:
            for part in (one for whole in components(mask, least) for one in regions.instances(whole, least)):
                sure = things[part].mean(0)
                region = self._add(scene, part, sure)
                if region:
                    things[part] *= np.minimum(region.mass[1000:] / (sure + 1e-6), 1)
                    things[part, ANIMAL] = region.mass[1000 + ANIMAL]
        for person in [region for region in scene.regions if region.mass[1000 + PERSON] > 0.6]:
            for k, part in enumerate(regions.head_and_body(person.mask)):
                things[part, FACE + k] = 0.7 * person.mass[1000 + PERSON]
                self._add(scene, part, np.where(np.arange(len(THINGS)) == FACE + k, things[part].max(0), 0))
        for part in regions.patches(pixels, 2 * least):
            self._add(scene, part)
        self._add(scene, np.ones((height, width), bool), solid=False)
        return scene

    def _add(self, scene: Scene, mask: Mask, things: Floats | None = None, solid: bool = True) -> Region | None:
        box = box_of(mask)
        if any(iou(box, region.box) > 0.85 for region in scene.regions):
            return None
        region = self._region(scene, box, mask, solid)
        if things is not None:
            own = region.mass[1000:]
            own[:] = things
            own[ANIMAL] = things[ANIMALS].sum()
            doubt = self.same.any(1) & (self.same @ region.mass[:1000] < 0.15)
            doubt[UNSURE], doubt[20:] = False, False
            doubt[ANIMAL] = region.mass[:398].sum() < 0.3
            own[doubt] *= 0.3
        scene.regions.append(region)
        return region

    def _region(self, scene: Scene, box: Box, mask: Mask, solid: bool) -> Region:
        """Classify a box, with a margin, and with more of its surroundings where it is long and thin."""
        wide, high = (box[2] - box[0]) * scene.image.width, (box[3] - box[1]) * scene.image.height
        dx, dy = max(wide / 16, high / 4 - wide / 2), max(high / 16, wide / 4 - high / 2)
        dx, dy = dx / scene.image.width, dy / scene.image.height
        grown = (max(box[0] - dx, 0.0), max(box[1] - dy, 0.0), min(box[2] + dx, 1.0), min(box[3] + dy, 1.0))
        features = self._classifier.features(_cut(scene.image, grown), 224, 224).mean((0, 1))
        crop = self._classifier.probabilities(features)
        return Region(box, mask, np.concatenate((crop, np.zeros(len(THINGS), np.float32))), solid)

    def _segment(self, image: Image.Image, height: int, width: int) -> Floats:
        """DeepLab's probabilities [height, width, 21]; a long image is also seen in squarer pieces along its length."""
        whole = resample(self._segmenter.probabilities(image), height, width)
        ratio = max(image.size) / min(image.size)
        count = min(4, int(np.ceil(ratio / 1.25)))
        if count < 2:
            return whole
        piece = max(1.3 / count, 1 / ratio)
        total, seen = np.zeros_like(whole), np.zeros((height, width, 1), np.float32)
        for start in np.linspace(0, 1 - piece, count).tolist():
            box = (start, 0.0, start + piece, 1.0) if image.width > image.height else (0.0, start, 1.0, start + piece)
            rows, columns = window(box, height, width)
            part = self._segmenter.probabilities(_cut(image, box))
            total[rows, columns] += resample(part, rows.stop - rows.start, columns.stop - columns.start)
            seen[rows, columns] += 1
        return np.asarray(0.4 * whole + 0.6 * total / np.maximum(seen, 1), np.float32)

    def _classify_places(self, image: Image.Image) -> Floats:
        maps: list[Floats] = []
        for scale in SCALES:
            zoom = scale / (image.width * image.height) ** 0.5
            height, width = (min(max(round(side * zoom / 32) * 32, 64), 1024) for side in (image.height, image.width))
            maps.append(self._classifier.probabilities(self._classifier.features(image, height, width)))
        height, width = maps[-1].shape[:2]
        return np.asarray(sum(resample(one, height, width) for one in maps) / len(maps), np.float32)

    def locate(self, scene: Scene, relevance: Floats) -> tuple[list[tuple[Region, float]], Mask]:
        """Score all candidates for one phrase's relevance, best first, with the boxes of most evidence added.

        Returns them, and the cells of the grid that hold evidence.
        """
        height, width = scene.pixels.shape[:2]
        if relevance.max() <= 0:
            return [], np.zeros((height, width), bool)
        places = resample(scene.places @ relevance[:1000], height, width)
        evidence = np.maximum(places, scene.things @ relevance[1000:])
        level = 0.4 * max(float(evidence.max()), 0.25)
        lit, rest, candidates = evidence > level, evidence - level, list(scene.regions)
        for _ in range(2):
            box, total = regions.heaviest(rest)
            if total <= 0:
                break
            frame = np.zeros((height, width), bool)
            frame[window(box, height, width)] = True
            rest = np.where(frame, -1, rest).astype(np.float32)
            candidates.append(self._region(scene, box, frame, solid=False))
            part = regions.outline(scene.pixels, box)
            if part is not None and area(box_of(part)) > 0.15 * area(box):
                candidates.append(self._region(scene, box_of(part), part, solid=True))
            # A part of one colour that lies mostly in the box, without what of it lies outside.
            inner = [(float((one.mask & frame).sum()), one.mask) for one in scene.regions if one.solid]
            low, high = 0.08 * float(frame.sum()), 0.7 * float(frame.sum())
            inner = [pair for pair in inner if low < pair[0] < high and pair[0] > 0.6 * pair[1].sum()]
            if inner:
                part = max(inner, key=lambda pair: pair[0])[1] & frame
                candidates.append(self._region(scene, box_of(part), part, solid=True))
        rivals = np.zeros((height, width), np.float32)
        animal = relevance[:398].max() > 0.5
        if animal and relevance[1000 + ANIMAL] < 0.1:  # where one kind of animal is, no other is
            rivals = scene.things[..., [k for k in ANIMALS if relevance[1000 + k] < 0.1]].sum(-1)
        parts, found = components(lit, 1), []
        for region in candidates:
            alone = 1 - float(rivals[window(region.box, height, width)].mean())
            crop = float(region.mass[:1000] @ relevance[:1000]) * alone * agreement(region, lit, parts)
            if animal and region.mass[1000 + ANIMAL] > 0.5:  # the kind of an animal may show in a part of it
                crop = max(crop, alone * float(np.quantile(places[region.mask], 0.9)))
            thing = float(region.mass[1000:] @ relevance[1000:])
            found.append((region, 1 - (1 - min(crop, 1.0)) * (1 - min(thing, 1.0))))
        if animal:  # a part that shows the kind of an animal speaks for the whole animal
            whole = [k for k, (region, _) in enumerate(found) if region.mass[1000 + ANIMAL] > 0.5]
            for j, (region, score) in enumerate(found):
                around = [k for k in whole if j not in whole and overlap(region.box, found[k][0].box) > 0.8]
                for k in around:
                    found[k] = (found[k][0], max(found[k][1], score))
                    found[j] = (region, 0.5 * score)
        return sorted(found, key=lambda pair: -pair[1]), lit


def agreement(region: Region, lit: Mask, parts: list[Mask]) -> float:
    """How well a region's box covers the lit parts that it touches, and little else, in 0..1."""
    frame = np.zeros_like(lit)
    rows, columns = window(region.box, *lit.shape)
    frame[rows, columns] = True
    touched = sum(float(part.sum()) for part in parts if (part & frame).sum() > 0.2 * part.sum())
    if not touched:
        return 0.2 if region.solid else 0.0
    precision = min(1.0, float((lit & frame).sum()) / float(frame.sum()) / 0.8)
    if region.solid:  # light spills over an outline by about a cell of the coarse map
        frame[max(rows.start - 3, 0) : rows.stop + 3, max(columns.start - 3, 0) : columns.stop + 3] = True
    fit = (precision * min(1.0, float((lit & frame).sum()) / touched / 0.9)) ** 0.5
    return float(0.2 + 0.8 * fit if region.solid else 0.95 * fit * min(1.0, area(region.box) / 0.06) ** 0.5)


def _cut(image: Image.Image, box: Box) -> Image.Image:
    width, height = image.size
    x0, y0 = min(int(box[0] * width), width - 1), min(int(box[1] * height), height - 1)
    return image.crop((x0, y0, max(x0 + 1, round(box[2] * width)), max(y0 + 1, round(box[3] * height))))


@functools.cache
def eyes() -> Eyes:
    """The networks of this process, opened once. Raises ModelError if weights are missing or not the pinned ones."""
    return Eyes()
