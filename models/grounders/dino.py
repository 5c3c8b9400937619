"""Grounding DINO (Liu et al., 2023, arXiv 2303.05499) of transformers, and what `original.py` shares with it.

The model reads an image's phrases as one text, "a cat. a dog.", and scores each box against each token of it. Here the
text is put together from token ids, so it is known which token is of which phrase: nothing is decoded and searched for.

- Score of a phrase for a box: the greatest sigmoid over the phrase's own tokens. The library scores a box, not a
  phrase: the greatest over all tokens, [CLS], [SEP] and "." among them. For a text of one phrase the two are the same
  wherever a token of the phrase wins, which is what training makes of it.
- An image whose phrases are more than one text holds is asked several times, and each text has boxes of its own. The
  backbone runs once for an image; encoder and decoder run once for each text, as they fuse text and image from the
  encoder's first layer on (section 3.2 of the paper).
- Only images of the same size after resizing share a forward: Swin's windows mix what pads a smaller image into it
  (the pixel mask begins after the backbone), so that a result would depend on its neighbours in the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ...transforms.images import decode
from ..contract import Detections, Grounder, ModelError
from ..device import Pieces, moved, pinned, place
from ..options import Grounding

# (pixels float [n, 3, H, W], image of each row int64 [R], ids int64 [R, T], mask bool [R, T])
# -> logits [R, Q, at least T], boxes [R, Q, 4] as centre, width and height in 0..1
Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
class Group:
    """Images of one size with their texts, one row for each text, rows of an image next to each other.

    tensors: pixels, uint8 [n, 3, H, W]; of, int64 [R], the row's image among the n; ids, int64 [R, T]; mask, bool
    [R, T]; slots, int64 [R, T], in `phrases` of the row, or `width` for tokens of no phrase. images: [n], places in the
    batch. phrases: for each row, int16 indices in what its image was asked.
    """

    tensors: tuple[torch.Tensor, ...]
    width: int
    images: list[int]
    phrases: list[npt.NDArray[np.int16]]


@dataclass(frozen=True)
class Prepared:
    """A batch: how many images, those that have phrases in groups, and each image's phrases that occur again."""

    count: int
    groups: list[Group]
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
        self._whole = options.compile  # texts of one length, so that a compiled network sees fewer shapes
        self._pieces = Pieces()
        self.forwards = self.texts = 0

    def prepare(self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]]) -> Prepared:
        """Decode, resize, tokenise, and sort by size. An image without phrases is not even decoded.

        Raises OSError or SyntaxError for an image that is no JPEG.
        """
        asked = [self._asker(texts) if texts else ([], []) for texts in phrases]
        sizes: dict[tuple[int, ...], list[tuple[int, npt.NDArray[np.uint8]]]] = {}
        for index, (jpeg, (texts, _)) in enumerate(zip(jpegs, asked, strict=True)):
            if texts:
                pixels = self._look.resize(decode(jpeg))
                sizes.setdefault(pixels.shape, []).append((index, pixels))
        groups = [self._group(members, [asked[index][0] for index, _ in members]) for members in sizes.values()]
        return Prepared(len(jpegs), groups, [twins for _, twins in asked])

    def _group(self, members: list[tuple[int, npt.NDArray[np.uint8]]], asked: list[list[Text]]) -> Group:
        rows = [(at, text) for at, texts in enumerate(asked) for text in texts]
        width = max(len(text.phrases) for _, text in rows)
        shape = (len(rows), self._asker.room if self._whole else max(len(text.ids) for _, text in rows))
        ids, slots = np.full(shape, self._asker.padding), np.full(shape, width)
        mask = np.zeros(shape, bool)
        for row, (_, text) in enumerate(rows):
            ids[row, : len(text.ids)] = text.ids
            slots[row, : len(text.ids)] = text.slots
            mask[row, : len(text.ids)] = True
        slots[slots < 0] = width
        arrays = (np.stack([pixels for _, pixels in members]), np.array([at for at, _ in rows]), ids, mask, slots)
        tensors = pinned(tuple(torch.from_numpy(array) for array in arrays))
        phrases = [np.array(text.phrases, np.int16) for _, text in rows]
        return Group(tensors, width, [index for index, _ in members], phrases)

    @torch.inference_mode()
    def __call__(self, prepared: Prepared) -> list[Detections]:
        """Return every pair at or above the floor. Raises ValueError where the network computes what is no number."""
        found: list[list[Detections]] = [[] for _ in range(prepared.count)]
        for group in prepared.groups:
            rows = self._pieces(len(group.phrases), partial(self._run, group))
            for at, row in zip(group.tensors[1].tolist(), rows, strict=True):
                found[group.images[at]].append(row)
        return [_joined(rows, twins) for rows, twins in zip(found, prepared.twins, strict=True)]

    def _run(self, group: Group, start: int, end: int) -> list[Detections]:
        pixels, of, *text = group.tensors
        of, text = of[start:end], [each[start:end] for each in text]
        first, last = int(of[0]), int(of[-1])
        pixels, of, ids, mask, slots = moved([pixels[first : last + 1], of - first, *text], self._device)
        self.forwards += 1
        self.texts += end - start
        logits, boxes = self._network(self._look.normalise(pixels), of, ids, mask)
        found = pairs(logits, boxes, slots, group.width, self._floor)
        return [
            Detections(boxes, phrases[slots], scores)
            for phrases, (boxes, slots, scores) in zip(group.phrases[start:end], found, strict=True)
        ]


def pairs(
    logits: torch.Tensor, boxes: torch.Tensor, slots: torch.Tensor, width: int, floor: float
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Each row's pairs at or above the floor: boxes float32 [n, 4] as x0, y0, x1, y1 in 0..1, slots [n], scores [n].

    logits: [R, Q, at least T], boxes: [R, Q, 4] as centre, width, height; slots: int64 [R, T], below `width` for a
    token of a phrase. Boxes are clipped to the image; one of which nothing is left is no pair. Raises ValueError: NaN.
    """
    logits, boxes = logits[..., : slots.shape[1]].float(), boxes.float()
    if bool(logits.isnan().any() | boxes.isnan().any()):
        raise ValueError("the model computed what is no number; dtype: float32 or bfloat16 has more room")
    best = logits.new_full((*logits.shape[:2], width + 1), -torch.inf)
    best.scatter_reduce_(2, slots[:, None].expand_as(logits), logits, "amax")
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
    device, dtype = place(options)
    model, tokenizer, processor = _load(options, folder)
    asker = Asker(tokenizer, min(model.config.max_text_len, model.config.text_config.max_position_embeddings))
    if asker.marks != (marks := tuple(model.model.special_tokens.tolist())):
        raise ModelError(
            f"model {options.model}: its tokenizer has the ids {asker.marks} for [CLS] [SEP] . ?, where the "
            f"architecture has {marks}: phrases would run into one another"
        )
    look = _look(options, processor, _Fit(model.config))
    return DinoGrounder(_Network(model.to(device).eval(), device, dtype, options.compile), asker, look, options, device)


def _load(options: Grounding, folder: Path) -> tuple[Any, Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, GroundingDinoForObjectDetection
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    library: Any = GroundingDinoForObjectDetection
    try:
        # In float32 whatever the dtype: see _Network.
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


class _Network:
    """The library's model with one backbone pass for all texts of an image.

    Weights stay float32 and a lower precision is autocast's: in bfloat16 throughout, a box's corner would be one of
    256 steps, and so would the places that deformable attention looks at.
    """

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype, fast: bool) -> None:
        self._once = model.model.backbone = _Once(model.model.backbone)
        self._model = torch.compile(model) if fast else model
        self._device, self._dtype = device, dtype

    def __call__(
        self, pixels: torch.Tensor, of: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._once.of = of
        whole = torch.ones((len(of), *pixels.shape[2:]), dtype=torch.long, device=pixels.device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            out = self._model(
                pixel_values=pixels, pixel_mask=whole, input_ids=ids, attention_mask=mask, token_type_ids=ids * 0
            )
        return out.logits, out.pred_boxes


class _Once(torch.nn.Module):
    """A backbone that sees each image once and gives its features to each of the image's rows."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.position_embedding = inner.position_embedding
        self.of = torch.empty(0, dtype=torch.long)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor) -> tuple[list[Any], list[torch.Tensor]]:
        """Take pixels [n, 3, H, W] and a mask [R, H, W] of ones."""
        features, positions = self.inner(pixels, mask[: len(pixels)])
        of = self.of
        return [(each[of], where[of]) for each, where in features], [each[of] for each in positions]
