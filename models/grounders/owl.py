"""OWLv2 (Minderer et al. 2023) and OWL-ViT (Minderer et al. 2022) by transformers, many images and phrases at once.

The image tower runs once an image, whatever is asked of it, and a phrase is embedded once for as long as it is
remembered: web phrases repeat. Scores and boxes are those of the library's own path (processor, model,
`post_process_grounded_object_detection`), for every pair of a box and a phrase and not only each box's best phrase.

How images are seen: OWLv2 pads to a square at the right and the bottom (value 0 before normalisation) and scales that
as scikit-image does, OWL-ViT squeezes to the square. With `image_px`, positions are interpolated (bicubic), as in
transformers; the first authors' code cuts the position grid instead, so scores at 448 px differ from theirs.
How phrases are read: put into the template, lower-cased by CLIP's tokenizer, cut to the text length (16 tokens).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTokenizer, Owlv2ForObjectDetection, OwlViTForObjectDetection
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from ...transforms.images import decode
from .. import hub
from ..contract import Detections, ModelError
from ..device import Memory, Pieces, moved, pinned, place, quiet
from ..options import Grounding

MOST = 1000  # pairs of an image that leave the device, the best; more than the ground step stores
_BUFFERS = ("position_ids", "box_bias")  # old checkpoints carry what the code computes
_FAULTS = (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError, StrictDataclassError)
Floats = npt.NDArray[np.float32]


def open_grounder(options: Grounding, folder: Path) -> "Owl":
    """Load the OWLv2 or OWL-ViT model that lies in a folder.

    Raises ModelError: files that cannot be read, weights that are missing, left over or of another shape, a size that
    the model cannot see, an image processor that prepares otherwise than the library's default does.
    """
    device, dtype = place(options)
    second = hub.config(folder).get("model_type") == "owlv2"
    kind: Any = Owlv2ForObjectDetection if second else OwlViTForObjectDetection
    processors: Any = Owlv2ImageProcessorPil if second else OwlViTImageProcessorPil
    local: Any = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet():
            model, told = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **local
            )
            sight = Sight.of(processors.from_pretrained(folder, **local), second, square_side(options, model.config))
            tokenizer = CLIPTokenizer.from_pretrained(folder, **local)
    except _FAULTS as error:
        raise ModelError(f"model {options.model}: {' '.join(str(error).split())[:300]}") from None
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in told[what] if not str(key).endswith(_BUFFERS)):
            raise ModelError(f"model {options.model}: {what.replace('_', ' ')} in its weights: {', '.join(keys[:3])}")
    see_at(model, sight.side)
    model.class_head.float()  # boxes and scores to 8 bits would be coarser than the pixels that they are drawn on
    model.box_head.float()
    return Owl(options, model.eval().requires_grad_(False).to(device), sight, tokenizer)


@dataclass(frozen=True)
class Sight:
    """How an image becomes the square that a model sees."""

    side: int
    padded: bool  # else squeezed
    resample: int  # Pillow's; of what is squeezed
    gain: Floats  # [3, 1, 1], of 0..255
    bias: Floats

    @classmethod
    def of(cls, processor: Any, padded: bool, side: int) -> "Sight":
        """Read an image processor's configuration. Raises ValueError for one that does other things."""
        wanted = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False}
        if getattr(processor, "crop_size", None) == processor.size:  # as early OWL-ViTs have it: nothing is cut off
            del wanted["do_center_crop"]
        for name, value in {**wanted, "do_pad": padded}.items():
            if bool(getattr(processor, name, None)) != value:
                raise ValueError(f"its image processor has {name}: {not value}, which is not supported")
        mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
        gain = (np.float32(processor.rescale_factor) / std).astype(np.float32)
        return cls(side, padded, int(processor.resample), gain, -mean / std)

    def __call__(self, image: Image.Image) -> Floats:
        """RGB image to float32 [3, side, side], normalised."""
        if not self.padded:
            small = image.resize((self.side, self.side), Image.Resampling(self.resample))
            return np.asarray(small).transpose(2, 0, 1) * self.gain + self.bias
        pixels = np.asarray(image)
        height, width, _ = pixels.shape
        full = max(height, width)
        across = _weigh(pixels.reshape(height, width * 3), *_taps(full, self.side, height))
        rows = len(across)
        turned = np.ascontiguousarray(across.reshape(rows, width, 3).transpose(1, 2, 0)).reshape(width, 3 * rows)
        down = _weigh(turned, *_taps(full, self.side, width))
        square = np.zeros((3, self.side, self.side), np.float32)
        square[:, :rows, : len(down)] = down.reshape(len(down), 3, rows).transpose(1, 2, 0)
        square *= self.gain
        square += self.bias
        return square


@lru_cache(maxsize=1024)
def _taps(full: int, side: int, size: int) -> tuple[npt.NDArray[np.intp], Floats]:
    """Which of `size` lines make each line of the scaled square, and by which weights: both [lines, taps].

    Lines from `size` up to `full` are padding, zeros; lines of the square that see nothing else are left out at the
    end. A Gaussian of sigma (scale - 1) / 2 cut at 4 sigma, then linear interpolation between pixel centres, both
    mirrored at the borders: scikit-image's `resize`, as in OWLv2's own code and in transformers by SciPy, which takes
    five times as long.
    """
    scale = full / side
    sigma = max(0.0, (scale - 1) / 2)
    radius = int(4 * sigma + 0.5)
    reach = np.arange(-radius, radius + 1)
    bell = np.exp(-0.5 * (reach / sigma) ** 2) if radius else np.ones(1)
    bell /= bell.sum()
    centre = (np.arange(side) + 0.5) * scale - 0.5
    base = np.floor(centre).astype(np.intp)
    part = (centre - base)[:, None]
    weights = (1 - part) * np.append(bell, 0) + part * np.insert(bell, 0, 0)
    period = max(1, 2 * (full - 1))
    lines = (base[:, None] + np.arange(-radius, radius + 2)) % period
    lines = np.minimum(lines, period - lines) if full > 1 else np.zeros_like(lines)
    weights[lines >= size] = 0
    lines[lines >= size] = 0
    seen = int(np.flatnonzero(weights.any(axis=1))[-1]) + 1
    return lines[:seen], weights[:seen].astype(np.float32)


def _weigh(lines: npt.NDArray[Any], index: npt.NDArray[np.intp], weights: Floats) -> Floats:
    """Weighted sums of lines [n, length]: float32 [m, length], for index and weights [m, taps]."""
    total = np.zeros((len(index), lines.shape[1]), np.float32)
    product = np.empty_like(total)
    for tap in range(index.shape[1]):
        if (column := weights[:, tap, None]).any():
            np.multiply(lines[index[:, tap]], column, out=product)
            total += product
    return total


@dataclass(frozen=True)
class Prepared:
    """A batch: n images that have phrases, of `total`, with u different texts among all phrases, at most q an image."""

    total: int
    rows: list[int]  # of the batch: where the n images belong
    counts: list[int]  # [n], phrases of each, not falling
    keys: list[bytes]  # [u], the text's tokens
    tokens: Tensor  # int64 [2, u, text length]: ids and attention mask
    pixels: Tensor  # [n, 3, side, side] of the tower's dtype
    asked: Tensor  # int64 [n, q], row of the text; -1 where an image has fewer phrases
    stretch: Tensor  # float32 [n, 4], what brings the square's 0..1 to the image's, for x, y, x, y


class Owl:
    """The grounder. Its `prepare` is safe in threads: tokenizer, sight and options do not change."""

    def __init__(self, options: Grounding, model: Any, sight: Sight, tokenizer: Any) -> None:
        self._model, self._sight, self._template = model, sight, options.template
        self._floor = max(0.0, options.score_floor)
        # The ground step's own options are these and how many pairs it stores: one more tells that there were more.
        self._most = max(MOST, options.max_detections + 1)
        self._batch_pixels, self._batch_tokens = options.batch_pixels, options.batch_tokens
        self._device, self._dtype = model.device, model.base_model.vision_model.embeddings.patch_embedding.weight.dtype
        # The tokenizer behind the library's: theirs sets length and padding at each call, which threads cannot share.
        self._tokenizer = tokenizer.backend_tokenizer
        self._length = length = model.config.text_config.max_position_embeddings
        self._tokenizer.enable_truncation(length)
        pad = {"pad_id": tokenizer.pad_token_id or 0, "pad_token": tokenizer.pad_token or "!"}
        self._tokenizer.enable_padding(length=length, **pad)
        self._memory = Memory(options.text_cache)
        self._images, self._texts = Pieces(), Pieces()
        self._see = torch.compile(model.image_embedder) if options.compile else model.image_embedder

    def prepare(self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]]) -> Prepared:
        """Decode, scale and tokenise, those with few phrases first; an image without phrases is not even decoded."""
        rows = sorted((k for k, own in enumerate(phrases) if own), key=lambda k: len(phrases[k]))
        keys, tokens, number = self._read(list(dict.fromkeys(phrase for own in phrases for phrase in own)))
        asked = np.full((len(rows), len(phrases[rows[-1]]) if rows else 0), -1, np.int64)
        pixels = torch.empty((len(rows), 3, self._sight.side, self._sight.side), dtype=self._dtype)
        stretch = np.ones((len(rows), 4), np.float32)
        for n, k in enumerate(rows):
            asked[n, : len(phrases[k])] = [number[phrase] for phrase in phrases[k]]
            image = decode(jpegs[k])
            pixels[n] = torch.from_numpy(self._sight(image))
            if self._sight.padded:
                stretch[n] = max(image.size) / np.array(image.size * 2, np.float32)
        tensors = pinned(
            (torch.from_numpy(tokens), pixels, torch.from_numpy(asked), torch.from_numpy(stretch)), self._device
        )
        return Prepared(len(phrases), rows, [len(phrases[k]) for k in rows], keys, *tensors)

    def _read(self, phrases: list[str]) -> tuple[list[bytes], npt.NDArray[np.int64], dict[str, int]]:
        """The different token rows of phrases: their keys, ids and masks [2, u, length], and the row of each phrase."""
        # A lone surrogate is no character: it becomes "?", as no tokenizer takes it.
        texts = [self._template.replace("{}", phrase).encode(errors="replace").decode() for phrase in phrases]
        read = self._tokenizer.encode_batch(texts)
        tokens = np.array([[r.ids for r in read], [r.attention_mask for r in read]], np.int64)
        keys: dict[bytes, int] = {}
        first: list[int] = []
        number: dict[str, int] = {}
        for k, phrase in enumerate(phrases):
            number[phrase] = keys.setdefault(tokens[0, k].tobytes(), len(keys))
            if number[phrase] == len(first):
                first.append(k)
        return list(keys), tokens[:, first], number

    @torch.inference_mode()
    def __call__(self, prepared: Prepared) -> list[Detections]:
        """Find every pair at or above the score floor, at most the best MOST of an image, in falling order of score.

        A score that is not a number is passed on, for the caller to refuse.
        """
        none = Detections(np.empty((0, 4), np.float32), np.empty(0, np.int16), np.empty(0, np.float32))
        found = [none] * prepared.total
        if not prepared.rows:
            return found
        texts = self._memory(prepared.keys, lambda new: self._embed(prepared.tokens[:, new]))

        def run(start: int, end: int) -> list[Detections]:
            asked = prepared.asked[start:end, : prepared.counts[end - 1]]
            part = (prepared.pixels[start:end], asked, prepared.stretch[start:end])
            pixels, asked, stretch = moved(part, self._device)
            boxes, scores = self._score(pixels, texts, asked)
            boxes, phrases, scores = best_pairs(boxes * stretch[:, None], scores, asked >= 0, self._most)
            return apart(boxes.cpu().numpy(), phrases.cpu().numpy(), scores.cpu().numpy(), self._floor)

        def fits(start: int, end: int) -> bool:
            queries = (end - start) * prepared.counts[end - 1]
            pixels = (end - start) * self._sight.side**2
            return bool(pixels <= self._batch_pixels and queries * self._length <= self._batch_tokens)

        for row, detections in zip(prepared.rows, self._images(len(prepared.rows), run, fits), strict=True):
            found[row] = detections
        return found

    def _score(self, pixels: Tensor, texts: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes x0, y0, x1, y1 of the square [n, p, 4] and scores [n, p, q], those of padding meaningless."""
        grid = self._see(pixels)[0].float()
        features = grid.flatten(1, 2)
        centre, size = self._model.box_predictor(features, grid).split(2, dim=-1)
        logits, _ = self._model.class_predictor(features, texts[asked.clamp(min=0)])
        return torch.cat((centre - size / 2, centre + size / 2), dim=-1), logits.sigmoid()

    def _embed(self, tokens: Tensor) -> Tensor:
        """Text embeddings of unit length, float32 [u, d], of tokens [2, u, length]."""

        def run(start: int, end: int) -> list[Tensor]:
            ids, mask = moved(tokens[:, start:end].contiguous(), self._device)
            embedded = self._model.base_model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
            embedded = embedded.float()
            return list(embedded / embedded.norm(dim=-1, keepdim=True))

        def fits(start: int, end: int) -> bool:
            return bool((end - start) * self._length <= self._batch_tokens)

        return torch.stack(self._texts(tokens.shape[1], run, fits))


def best_pairs(boxes: Tensor, scores: Tensor, wanted: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of each image, at most `most`, in falling order of score; nothing here waits for the device.

    boxes: [n, p, 4], x0, y0, x1, y1; scores: [n, p, q]; wanted: bool [n, q], false for padding.
    Gives boxes [n, k, 4] clipped to 0..1, phrases int16 [n, k], scores [n, k]; a score of -1 is no pair: padding, or a
    box of which nothing lies in the image.
    """
    boxes = boxes.clamp(0, 1)
    empty = (boxes[..., 2:] <= boxes[..., :2]).any(dim=-1)
    scores = scores.masked_fill(~wanted[:, None] | empty[..., None], -1).flatten(1)
    best, index = scores.topk(min(most, scores.shape[1]))
    owners = (index // wanted.shape[1])[..., None].expand(-1, -1, 4)
    return boxes.gather(1, owners), (index % wanted.shape[1]).to(torch.int16), best


def apart(
    boxes: npt.NDArray[np.float32], phrases: npt.NDArray[np.int16], scores: npt.NDArray[np.float32], floor: float
) -> list[Detections]:
    """Each image's pairs [n, k, ...] down to the floor, from falling scores; what is not a number stays."""
    counts = (~(scores < np.float32(floor))).sum(axis=1).tolist()
    each = zip(boxes, phrases, scores, counts, strict=True)
    return [Detections(box[:k].copy(), phrase[:k].copy(), score[:k].copy()) for box, phrase, score, k in each]


def square_side(options: Grounding, config: Any) -> int:
    """The side of the square that the model sees, in pixels. Raises ValueError for one that patches do not fill."""
    vision = config.vision_config
    side = options.image_px or vision.image_size
    if side % vision.patch_size:
        least = vision.patch_size
        near = max(1, round(side / least)) * least
        raise ValueError(f"image_px: {side} is not a multiple of the model's patch of {least} px; {near} is")
    return int(side)


def see_at(model: Any, side: int) -> None:
    """Fit a model's position grid to images of another size, once and in float32, as the library would at each call."""
    embeddings = model.base_model.vision_model.embeddings
    cells = side // embeddings.patch_size
    if cells**2 + 1 == embeddings.num_positions:
        return
    old = embeddings.position_embedding.weight
    grid = math.isqrt(len(old) - 1)
    square = old[1:].detach().float().T.reshape(1, -1, grid, grid)
    wider = nn.functional.interpolate(square, (cells, cells), mode="bicubic", align_corners=False)
    weights = torch.cat((old[:1].detach().float(), wider.flatten(2)[0].T)).to(old.dtype)
    embeddings.num_patches, embeddings.num_positions = cells**2, cells**2 + 1
    embeddings.position_embedding = nn.Embedding.from_pretrained(weights)
    embeddings.position_ids = torch.arange(cells**2 + 1)[None]
    model.num_patches_height = model.num_patches_width = cells
    model.box_bias = model.compute_box_bias(cells, cells)
