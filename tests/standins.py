"""Stand-in models that a recipe names as `tests.standins:<function>@1`, to make faults and slowness on purpose.

They are real models of the project's contract: a user's own model is named in the same way.
"""

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from vesl.models.contract import Detections, PlainCaptioner, PlainGrounder
from vesl.transforms.trees import Token

_TAGS = {
    "DT": "a an the this that",
    "IN": "on of in under with from by at near over",
    "CC": "and or",
    "JJ": "red green blue old new small wide big white black tall long",
    "VBZ": "is has stands says",
}
_TAG = {word: tag for tag, words in _TAGS.items() for word in words.split()}


def tagger(parse: bool) -> Callable[[str], list[Token]]:
    """Nouns, but for numbers and a few words that it knows; spaCy takes seconds to open."""

    def tag(caption: str) -> list[Token]:
        found = []
        for match in re.finditer(r"\w+|[^\w\s]", caption):
            plain = "CD" if match[0].isdigit() else "NN" if match[0].isalpha() else "."
            found.append(Token(match[0], *match.span(), _TAG.get(match[0].lower(), plain)))
        return found

    return tag


def grounder(score_floor: float) -> PlainGrounder:
    """Two boxes a phrase, which depend on the phrase and the image only."""

    def ground(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        return [_detections(image, asked, score_floor) for image, asked in zip(images, phrases, strict=True)]

    return ground


def _detections(image: Image.Image, phrases: Sequence[str], score_floor: float) -> Detections:
    boxes, labels, scores = [], [], []
    for label, phrase in enumerate(phrases):
        for i in range(2):
            digest = hashlib.sha256(f"{phrase} {i} {image.size} {image.getpixel((0, 0))}".encode()).digest()
            x, y, w, h, score = (byte / 255 for byte in digest[:5])
            boxes.append([x * 0.6, y * 0.6, x * 0.6 + 0.1 + w * 0.3, y * 0.6 + 0.1 + h * 0.3])
            labels.append(label)
            scores.append(max(score, score_floor))
    return Detections(
        np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(labels, np.int16), np.asarray(scores, np.float32)
    )


def captioner() -> PlainCaptioner:
    """Says the alt text, unless that asks for trouble: `raise`, `kill`, `freeze`, `hang`, `exhaust`, `silence`.

    The environment makes it slow, talkative, and note what it was asked: STANDIN_WAIT_S, STANDIN_SAYS, STANDIN_LOG.
    It waits at an alt text, for half a minute at most, until a file is there: STANDIN_HOLD="<text> until <path>".
    """
    wait_s = float(os.environ.get("STANDIN_WAIT_S", "0"))
    log = os.environ.get("STANDIN_LOG")
    says = os.environ.get("STANDIN_SAYS", "")
    held, _, until = os.environ.get("STANDIN_HOLD", "").partition(" until ")

    def caption(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
        if any("kill" in text for text in alt_texts):
            os.write(2, b"some library: assertion failed\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if any("freeze" in text for text in alt_texts):
            os.kill(os.getpid(), signal.SIGSTOP)
        if any("hang" in text for text in alt_texts):
            time.sleep(600)
        deadline = time.monotonic() + 30
        while until and held in alt_texts and not os.path.exists(until):
            time.sleep(0.05)
            if time.monotonic() > deadline:
                raise TimeoutError(until)
        if any("raise" in text for text in alt_texts):
            raise RuntimeError("a model that does\nnot like this")
        if len(alt_texts) > 2 and any("exhaust" in text for text in alt_texts):
            raise MemoryError
        written = []
        for image, text in zip(images, alt_texts, strict=True):
            time.sleep(wait_s)
            if log:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{text}\n")
            written.append([] if "silence" in text else [f"{text}, {image.width} pixels wide{says}"])
        return written

    return caption


def broken_grounder(score_floor: float) -> PlainGrounder:
    """Answers with a phrase that nobody asked for."""

    def ground(images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[Detections]:
        box = np.asarray([[0, 0, 1, 1]], np.float32)
        return [Detections(box, np.asarray([99], np.int16), np.asarray([0.9], np.float32)) for _ in images]

    return ground
