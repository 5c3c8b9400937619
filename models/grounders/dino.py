"""Grounding DINO (Liu et al., 2023, arXiv 2303.05499) of transformers, and what `original.py` shares with it.

The model reads an image's phrases as one text, "a cat. a dog.", and scores each box against each token of it. Here the
text is put together from token ids, so it is known which token is of which phrase: nothing is decoded and searched for.

- Score of a phrase for a box: the greatest sigmoid over the phrase's own tokens. The library scores a box, not a
  phrase: the greatest over all tokens, [CLS], [SEP] and "." among them. For a text of one phrase the two are the same
  wherever a token of the phrase wins, which is what training makes of it.
- An image whose phrases are more than one text holds is asked several times, and each text has boxes of its own. The
  backbone runs once for an image; encoder and decoder run once for each text, as they fuse text and image from the
  encoder's first layer on (section 3.2 of the paper).
- Images of several sizes share a forward, and each has the result that it has alone. In the library padding leaks (its
  pixel mask begins after the backbone), so here backbone and projections take images size by size, and the encoder
  and decoder, most of the work, take them together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ...transforms.images import decode
from ..contract import Detections, Grounder, ModelError
from ..device import Pieces, moved, pinned, place, quiet
from ..options import Grounding
from .mixed import MismatchError, Mixed

PADDED = 1.25  # pixels of a forward with its padding, to those without, at most: images of other shapes go into another

# (pixels by size, float [n, 3, H, W] each; image of each row among all of them int64 [R], not falling;
#  ids int64 [R, T]; mask bool [R, T]) -> logits [R, Q, at least T], boxes [R, Q, 4] as centre, width, height in 0..1
Network = Callable[[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Text:
    """Some of an image's phrases as one text: token ids, of which phrase each token is, and the phrases.

    ids: [T]. slots: [T], index in `phrases`, or -1 for a token between phrases. phrases: indices in what was asked.
    """

    ids: list[int]
    slots: list[int]
    phrases: list[int]


class Asker:
    """Puts phrases into texts of at most `room` tokens. Used by several threads at once."""

    def __init__(self, tokenizer: Any, room: int) -> None:
        """Take a fast BERT tokenizer; its backend is changed, so it must not be used for anything else."""
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "[SEP]" in a phrase is what a stranger wrote, not an end
        marks = [tokenizer.cls_token_id, tokenizer.sep_token_id, *tokenizer.convert_tokens_to_ids([".", "?"])]
        self.marks: tuple[int, ...] = tuple(marks)  # what ends a phrase, in the order that the architecture lists them
        self._start, self._end, self._stop, _ = marks
        self._unknown: int = tokenizer.unk_token_id
        self.padding: int = tokenizer.pad_token_id
        self.room = room

    def __call__(self, phrases: Sequence[str]) -> tuple[list[Text], list[tuple[int, int]]]:
        """Put an image's phrases into texts, in order; also the pairs (again, first) of phrases that are the same.

        A full stop or question mark inside a phrase would end it, and is left out; a phrase too long for a text of its
        own is cut; one in which nothing is left, or nothing that the vocabulary knows, is not asked for.
        """
        texts: list[Text] = []
        seen: dict[tuple[int, ...], int] = {}
        twins = []
        encoded = self._backend.encode_batch([phrase.lower() for phrase in phrases], add_special_tokens=False)
        for index, one in enumerate(encoded):
            tokens = tuple(i for i in one.ids if i not in self.marks)[: self.room - 3]
            if all(i == self._unknown for i in tokens):
                continue
            if (first := seen.setdefault(tokens, index)) != index:
                twins.append((index, first))
                continue
            if not texts or len(texts[-1].ids) + len(tokens) + 2 > self.room:
                texts.append(Text([self._start], [-1], []))
            text = texts[-1]
            text.ids.extend((*tokens, self._stop))
            text.slots.extend([len(text.phrases)] * len(tokens) + [-1])
            text.phrases.append(index)
        for text in texts:
            text.ids.append(self._end)
            text.slots.append(-1)
        return texts, twins


@dataclass(frozen=True)
class Prepared:
    """A batch of `count` images: of those with phrases, n in order of their shape, the pixels and R texts, a row each.

    images: [n], places in the batch. pixels: [n], uint8 [3, H, W] each. of: int64 [R], the row's image among the n, not
    falling. text: ids, int64 [R, T]; mask, bool [R, T]; slots, int64 [R, T], in `phrases` of the row, or `width` for
    tokens of no phrase. cost: int64 [R, 3], the height, the width and the tokens of a row. phrases: [R], int16 indices
    in what the image was asked. twins: [count], phrases that occur again.
    """

    count: int
    images: list[int]
    pixels: list[torch.Tensor]
    of: npt.NDArray[np.int64]
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    width: int
    cost: npt.NDArray[np.int64]
    phrases: list[npt.NDArray[np.int16]]
    twins: list[list[tuple[int, int]]]


@dataclass(frozen=True)
class Look:
    """How a model sees images: resize gives uint8 [3, H, W] (in threads), the rest is done on the device."""

    resize: Callable[[Image.Image], npt.NDArray[np.uint8]]
    scale: float
    mean: Sequence[float]
    std: Sequence[float]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Make float32 of uint8 [n, 3, H, W]."""
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() * self.scale - mean) / std


class DinoGrounder:
    """Any Grounding DINO as a grounder. `forwards` counts calls of the network, `texts` the rows in them."""

    def __init__(self, network: Network, asker: Asker, look: Look, options: Grounding, device: torch.device) -> None:
        self._network, self._asker, self._look, self._device = network, asker, look, device
        self._floor = options.score_floor
        self._most = options.batch_pixels, options.batch_tokens
        self._pieces = Pieces()
        self.forwards = self.texts = 0

    def prepare(self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]]) -> Prepared:
        """Decode, resize, tokenise, and sort by shape. An image without phrases is not even decoded.

        Raises OSError or SyntaxError for an image that is no JPEG.
        """
        asked = [self._asker(texts) if texts else ([], []) for texts in phrases]
        seen = {index: self._look.resize(decode(jpegs[index])) for index, (texts, _) in enumerate(asked) if texts}
        images = sorted(seen, key=lambda index: (seen[index].shape[1] / seen[index].shape[2], seen[index].shape, index))
        rows = [(at, text) for at, index in enumerate(images) for text in asked[index][0]]
        width = max((len(text.phrases) for _, text in rows), default=0)
        shape = (len(rows), max((len(text.ids) for _, text in rows), default=0))
        ids, slots = np.full(shape, self._asker.padding), np.full(shape, -1)
        mask = np.zeros(shape, bool)
        for row, (_, text) in enumerate(rows):
            ids[row, : len(text.ids)] = text.ids
            slots[row, : len(text.ids)] = text.slots
            mask[row, : len(text.ids)] = True
        slots[slots < 0] = width
        cost = [(*seen[images[at]].shape[1:], len(text.ids)) for at, text in rows]
        return Prepared(
            count=len(jpegs),
            images=images,
            pixels=pinned([torch.from_numpy(seen[index]) for index in images], self._device),
            of=np.array([at for at, _ in rows], np.int64),
            text=pinned(tuple(torch.from_numpy(array) for array in (ids, mask, slots)), self._device),
            width=width,
            cost=np.array(cost, np.int64).reshape(-1, 3),
            phrases=[np.array(text.phrases, np.int16) for _, text in rows],
            twins=[twins for _, twins in asked],
        )

    @torch.inference_mode()
    def __call__(self, prepared: Prepared) -> list[Detections]:
        """Return every pair at or above the floor. Raises ValueError where the network computes what is no number."""
        found: list[list[Detections]] = [[] for _ in range(prepared.count)]
        rows = self._pieces(len(prepared.of), partial(self._run, prepared), partial(self._fits, prepared.cost))
        for at, row in zip(prepared.of.tolist(), rows, strict=True):
            found[prepared.images[at]].append(row)
        return [_joined(rows, twins) for rows, twins in zip(found, prepared.twins, strict=True)]

    def _fits(self, cost: npt.NDArray[np.int64], start: int, end: int) -> bool:
        """Whether rows may share a forward: within both budgets, and not too much of it padding."""
        height, width, tokens = cost[start:end].max(0)
        pixels, (most_pixels, most_tokens) = height * width * (end - start), self._most
        own = (cost[start:end, 0] * cost[start:end, 1]).sum()
        return bool(pixels <= min(most_pixels, own * PADDED) and tokens * (end - start) <= most_tokens)

    def _run(self, prepared: Prepared, start: int, end: int) -> list[Detections]:
        first, last = int(prepared.of[start]), int(prepared.of[end - 1])
        of, tokens = torch.from_numpy(prepared.of[start:end] - first), int(prepared.cost[start:end, 2].max())
        text = [each[start:end, :tokens] for each in prepared.text]
        pixels, of, (ids, mask, slots) = moved((prepared.pixels[first : last + 1], of, text), self._device)
        stacks = [torch.stack(list(same)) for _, same in groupby(pixels, key=lambda image: image.shape)]
        self.forwards += 1
        self.texts += end - start
        logits, boxes = self._network([self._look.normalise(stack) for stack in stacks], of, ids, mask)
        found = pairs(logits, boxes, slots, prepared.width, self._floor)
        return [
            Detections(boxes, phrases[slots], scores)
            for phrases, (boxes, slots, scores) in zip(prepared.phrases[start:end], found, strict=True)
        ]


def pairs(
    logits: torch.Tensor, boxes: torch.Tensor, slots: torch.Tensor, width: int, floor: float
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Each row's pairs at or above the floor: boxes float32 [n, 4] as x0, y0, x1, y1 in 0..1, slots [n], scores [n].

    logits: [R, Q, at least T], boxes: [R, Q, 4] as centre, width, height; slots: int64 [R, T], below `width` for a
    token of a phrase. Boxes are clipped to the image; one of which nothing is left is no pair. Raises ValueError: NaN.
    """
    logits, boxes = logits[..., : slots.shape[1]].float(), boxes.float()
    best = logits.new_full((*logits.shape[:2], width + 1), -torch.inf)
    best.scatter_reduce_(2, slots[:, None].expand_as(logits), logits, "amax")
    if bool(best.isnan().any() | boxes.isnan().any()):
        raise ValueError("the model computed what is no number; dtype: float32 or bfloat16 has more room")
    best = best[..., :width]
    scores = best.sigmoid()
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    corners = torch.cat((centre - half, centre + half), -1).clamp(0, 1)
    there = (corners[..., 2:] > corners[..., :2]).all(-1, keepdim=True)
    row, query, slot = ((scores >= floor) & (best > -torch.inf) & there).nonzero(as_tuple=True)  # in order of rows
    columns = corners[row, query], slot, scores[row, query, slot]
    ends = torch.bincount(row, minlength=len(logits)).cumsum(0)[:-1].cpu().numpy()
    return zip(*(np.split(column.cpu().numpy(), ends) for column in columns), strict=True)


def _joined(rows: list[Detections], twins: list[tuple[int, int]]) -> Detections:
    """One image's detections from its texts, those of a phrase also for the same phrase later in the list."""
    boxes = np.concatenate([np.empty((0, 4), np.float32), *(row.boxes for row in rows)])
    phrases = np.concatenate([np.empty(0, np.int16), *(row.phrases for row in rows)])
    scores = np.concatenate([np.empty(0, np.float32), *(row.scores for row in rows)])
    if twins:
        again = [np.flatnonzero(phrases == first) for _, first in twins]
        of = np.concatenate([np.arange(len(phrases)), *again])
        labels = [np.full(len(rows), index, np.int16) for rows, (index, _) in zip(again, twins, strict=True)]
        boxes, phrases, scores = boxes[of], np.concatenate([phrases, *labels]), scores[of]
    return Detections(boxes, phrases, scores)


def open_grounder(options: Grounding, folder: Path) -> Grounder:
    """Load a GroundingDinoForObjectDetection and its tokenizer from a folder. Raises ModelError."""
    refuse_what_is_owls(options)
    device, dtype = place(options)
    model, tokenizer, processor = _load(options, folder)
    asker = Asker(tokenizer, min(model.config.max_text_len, model.config.text_config.max_position_embeddings))
    if asker.marks != (marks := tuple(model.model.special_tokens.tolist())):
        raise ModelError(
            f"model {options.model}: its tokenizer has the ids {asker.marks} for [CLS] [SEP] . ?, where the "
            f"architecture has {marks}: phrases would run into one another"
        )
    look = _look(options, processor, _Fit(model.config))
    try:
        network = Mixed(model.eval(), device, dtype)
    except MismatchError as error:
        raise ModelError(
            f"model {options.model}: the Grounding DINO of transformers {version('transformers')} is not the one that "
            f"is known here ({error}); install another version"
        ) from None
    return DinoGrounder(network, asker, look, options, device)


def refuse_what_is_owls(options: Grounding) -> None:
    """Raise ModelError for `compile` (hardly two forwards have the same shapes) and for a template."""
    if options.compile:
        raise ModelError(f"model {options.model}: compile: is for OWLv2 and OWL-ViT, whose images have one size")
    if options.template != "{}":
        raise ModelError(f"model {options.model}: template: is for OWLv2 and OWL-ViT; this model asks for bare phrases")


def _load(options: Grounding, folder: Path) -> tuple[Any, Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    library: Any = GroundingDinoForObjectDetection
    try:
        with quiet():  # in float32 whatever the dtype: see Mixed
            model, info = library.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            processor = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"model {options.model}: {' '.join(str(error).split())[:300]}") from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"model {options.model}: {len(missing)} weights are missing, {missing[0]} among them")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"model {options.model}: {type(tokenizer).__name__} is no fast tokenizer")
    return model, tokenizer, processor


class _Fit:
    """Whether an image gives the encoder as many positions as the decoder takes of them: it fails below."""

    def __init__(self, config: Any) -> None:
        self.least: int = config.num_queries if config.two_stage else 0
        self._levels: int = config.num_feature_levels

    def positions(self, height: int, width: int) -> int:
        """Count them: strides are 8, 16, 32 and so on, rounded up."""
        strides = [8 << level for level in range(self._levels)]
        return sum(-(-height // stride) * -(-width // stride) for stride in strides)


def _look(options: Grounding, processor: Any, fit: _Fit) -> Look:
    """The library's own resizing; its long side's limit is kept in proportion where image_px is another short side."""
    from transformers.image_utils import SizeDict

    size = processor.size
    if options.image_px is not None:
        if not size.shortest_edge or not size.longest_edge:
            raise ModelError(f"model {options.model}: image_px: this model's images have a size of their own, {size}")
        longest = round(size.longest_edge * options.image_px / size.shortest_edge)
        size = SizeDict(shortest_edge=options.image_px, longest_edge=longest)
    side = size.shortest_edge or size.height or 0
    if side and fit.positions(side, side) < fit.least:
        raise ModelError(f"model {options.model}: image_px: {side} is too small for the model's {fit.least} queries")

    def resize(image: Image.Image) -> npt.NDArray[np.uint8]:
        pixels = np.asarray(image).transpose(2, 0, 1)
        if processor.do_resize:
            pixels = processor.resize(pixels, size=size, resample=processor.resample)
        _, height, width = pixels.shape
        if fit.positions(height, width) < fit.least:
            raise ValueError(f"an image of {width}x{height} is too small for the model's {fit.least} queries")
        return np.ascontiguousarray(pixels)

    normal = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,) * 3, (1.0,) * 3)
    return Look(resize, processor.rescale_factor if processor.do_rescale else 1.0, *normal)
