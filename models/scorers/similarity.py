"""CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023) by transformers: the cosine of a region and its phrase.

A region is seen in a square window: centred on the box, as wide as the box's longer side and a margin around it, moved
into the image, and cut where the image is shorter than that. Each box is encoded once, whatever is claimed of it, and
a phrase once for as long as it is remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its name everywhere)
from transformers import AutoTokenizer, CLIPModel, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ...transforms.images import decode
from .. import hub
from ..contract import Detections, ModelError
from ..device import Memory, Pieces, moved, pinned, place, quiet
from ..options import Scoring

Floats = npt.NDArray[np.float32]
_FAULTS: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError)
_FAULTS += (SafetensorError, StrictDataclassError)
_LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}


def open_scorer(options: Scoring, folder: Path) -> "Similarity":
    """Load the CLIP or SigLIP model that lies in a folder. Raises ModelError where its files do not make one."""
    device, dtype = place(options)
    clip = hub.config(folder).get("model_type") == "clip"
    kind: Any = CLIPModel if clip else SiglipModel
    processors: Any = CLIPImageProcessorPil if clip else SiglipImageProcessorPil
    try:
        with quiet():
            model, told = kind.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **_LOCAL
            )
        processor = processors.from_pretrained(folder, **_LOCAL)
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    except _FAULTS as error:
        raise ModelError(f"model {options.model}: {' '.join(str(error).split())[:300]}") from None
    for what in ("missing_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in told[what] if not str(key).endswith("position_ids")):
            raise ModelError(f"model {options.model}: {what.replace('_', ' ')} in its weights: {', '.join(keys[:3])}")
    return Similarity(options, model.eval().requires_grad_(False).to(device), processor, tokenizer)


@dataclass(frozen=True)
class Prepared:
    """A batch: r different boxes of all its images, t different phrases, and for each image its n claims."""

    windows: Tensor  # uint8 [r, 3, side, side]
    keys: list[bytes]  # [t], the phrases as they are asked
    tokens: dict[str, Tensor]  # int64 [t, length] each: ids, and a mask where the tokenizer makes one
    boxes: list[npt.NDArray[np.int64]]  # [n], row of the window; -1: not scored
    texts: list[npt.NDArray[np.int64]]  # [n], row of the phrase


class Similarity:
    """The scorer. `prepare` is safe in threads: the tokenizer, which sets its padding at each call, has a lock."""

    def __init__(self, options: Scoring, model: Any, processor: Any, tokenizer: Any) -> None:
        self._options, self._model, self._tokenizer, self._lock = options, model, tokenizer, Lock()
        self._side, self._resample = int(model.config.vision_config.image_size), int(processor.resample)
        mean, std = (
            torch.tensor(v, dtype=torch.float32).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std)
        )
        self._gain = (processor.rescale_factor / std).to(model.device)
        self._bias = (-mean / std).to(model.device)
        self._length = int(model.config.text_config.max_position_embeddings)
        # SigLIP was trained on texts padded to the full length, and looks at the padding.
        self._padding = True if isinstance(model, CLIPModel) else "max_length"
        self._see = torch.compile(model.get_image_features) if options.compile else model.get_image_features
        self._images, self._texts, self._memory = Pieces(), Pieces(), Memory(options.text_cache)

    def prepare(
        self, jpegs: Sequence[bytes], phrases: Sequence[Sequence[str]], claims: Sequence[Detections]
    ) -> Prepared:
        """Cut out and scale the boxes that are scored, and tokenise their phrases."""
        number: dict[str, int] = {}
        windows: list[npt.NDArray[np.uint8]] = []
        boxes, texts = [], []
        for jpeg, own, claim in zip(jpegs, phrases, claims, strict=True):
            scored = np.flatnonzero(claim.scores >= self._options.above)
            boxes.append(np.full(len(claim.scores), -1, np.int64))
            texts.append(np.zeros(len(claim.scores), np.int64))
            if not len(scored):  # nor is the image decoded
                continue
            different, row = np.unique(claim.boxes[scored], axis=0, return_inverse=True)
            boxes[-1][scored] = row.reshape(-1) + len(windows)
            texts[-1][scored] = [number.setdefault(own[k], len(number)) for k in claim.phrases[scored].tolist()]
            image = decode(jpeg)
            for box in window(different, image.size, self._options.margin).tolist():
                small = image.resize((self._side, self._side), Image.Resampling(self._resample), box=tuple(box))
                windows.append(np.asarray(small).transpose(2, 0, 1))
        asked = [self._options.template.replace("{}", phrase).encode(errors="replace").decode() for phrase in number]
        pixels = np.stack(windows) if windows else np.zeros((0, 3, self._side, self._side), np.uint8)
        tensors = pinned((torch.from_numpy(pixels), self._tokens(asked)), self._gain.device)
        return Prepared(tensors[0], [text.encode() for text in asked], tensors[1], boxes, texts)

    def _tokens(self, texts: list[str]) -> dict[str, Tensor]:
        if not texts:
            return {}
        with self._lock:
            read = self._tokenizer(
                texts, padding=self._padding, truncation=True, max_length=self._length, return_tensors="pt"
            )
        return {name: read[name] for name in ("input_ids", "attention_mask") if name in read}

    @torch.inference_mode()
    def __call__(self, prepared: Prepared) -> list[Floats]:
        """Return each detection's cosine, float32 [n] in -1..1; NaN for those that are not scored."""
        if not prepared.keys:
            return [np.full(len(rows), np.nan, np.float32) for rows in prepared.boxes]

        def see(start: int, end: int) -> list[Tensor]:
            pixels = moved(prepared.windows[start:end], self._gain.device).float() * self._gain + self._bias
            features = self._see(pixel_values=pixels.to(self._model.dtype)).pooler_output
            return list(F.normalize(features.float(), dim=-1))

        seen = torch.stack(self._images(len(prepared.windows), see))
        texts = self._memory(prepared.keys, lambda new: self._embed(prepared.tokens, new))
        found = []
        for rows, words in zip(prepared.boxes, prepared.texts, strict=True):
            cosine = (seen[rows.clip(0)] * texts[words]).sum(dim=-1).cpu().numpy()
            found.append(np.where(rows < 0, np.float32(np.nan), cosine))
        return found

    def _embed(self, tokens: dict[str, Tensor], new: list[int]) -> Tensor:
        """Text embeddings of unit length, float32 [u, d], of the rows `new` of tokens."""
        chosen = {name: values[new] for name, values in tokens.items()}

        def run(start: int, end: int) -> list[Tensor]:
            some = moved({name: values[start:end] for name, values in chosen.items()}, self._gain.device)
            return list(F.normalize(self._model.get_text_features(**some).pooler_output.float(), dim=-1))

        return torch.stack(self._texts(len(new), run))


def window(boxes: Floats, size: tuple[int, int], margin: float) -> npt.NDArray[np.float64]:
    """The windows [n, 4] in pixels, x0, y0, x1, y1, through which boxes [n, 4] in 0..1 of an image are seen.

    A square around the box's centre, its side the box's longer one and `margin` of it on either end; moved to lie in
    the image, and cut to the image where that is shorter. No window is less than a pixel wide.
    """
    full = np.array(size, np.float64)
    low, high = boxes[:, :2] * full, boxes[:, 2:] * full
    side = np.minimum(np.maximum((high - low).max(axis=1, keepdims=True) * (1 + 2 * margin), 1.0), full)
    start = np.clip((low + high - side) / 2, 0, full - side)
    return np.hstack([start, start + side])
