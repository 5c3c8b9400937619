"""A finished model for its users: `Encoder` answers with arrays, and `export` writes what it and transformers read.

    encoder = Encoder.open("store/train/1f0c.../model")
    encoder.encode_regions([image], [[[0.1, 0.2, 0.5, 0.9]]])[0] @ encoder.encode_text(["a red kite", "a dog"]).T

The exported folder is an ordinary CLIP (`CLIPModel.from_pretrained`, `CLIPVisionModel.from_pretrained`,
`AutoTokenizer.from_pretrained`), with the Prompter beside it in `cloc.safetensors`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F  # noqa: N812  (its name everywhere)
from transformers.utils import SAFE_WEIGHTS_NAME

from ..contract import ModelError
from . import checkpoint
from .data import fill_square
from .model import MEAN, STD, Cloc
from .options import Model, Objective
from .prompter import roi_align
from .text import Text, load_text

Array = npt.NDArray[np.float32]
_OWN = "cloc.safetensors"  # what a CLIP does not have
_WORDS = "cloc.json"


class Encoder:
    """Images, texts and regions to unit vectors of one space; texts to boxes."""

    def __init__(self, model: Cloc, text: Text, precision: str = "fp32", by: str = "prompter") -> None:
        """`precision` "bf16" halves the arithmetic's width on devices that gain by it; answers are float32 anyway.

        `by` says what makes a box a feature: the Prompter, or "roialign" or "crop", which a plain CLIP can do as well.
        """
        self.model, self.text, self.by = model, text, by
        self.bf16 = precision == "bf16"

    @classmethod
    def open(cls, folder: str | Path, device: str | None = None) -> "Encoder":
        """A model folder or a run's checkpoint, on a GPU where there is one. Raises ModelError where it is neither."""
        path = Path(folder)
        try:
            model, text = _open_checkpoint(path) if path.suffix == ".pt" else _open_folder(path)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{path}: is not a model: {(str(error) or repr(error)).splitlines()[0]}") from None
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        return cls(model, text)

    def encode_image(self, images: Sequence[Image.Image]) -> Array:
        """Upright images -> (n, D) float32, unit rows."""
        if not images:
            return self._none()
        return self._run(lambda: self.model.image(self._squares(images)[0])[1])

    def encode_text(self, texts: Sequence[str]) -> Array:
        """Texts -> (t, D) float32, unit rows."""
        return self._run(lambda: self.model.text(self._tokens(texts))) if len(texts) else self._none()

    def encode_regions(self, images: Sequence[Image.Image], boxes: Sequence[npt.ArrayLike]) -> list[Array]:
        """Boxes of each image, (r_i, 4) x0, y0, x1, y1 in 0..1 of that image -> (r_i, D) float32, unit rows.

        Raises ModelError for a model without a Prompter, unless `by` does without.
        """
        wanted = [np.asarray(b, np.float32).reshape(-1, 4) for b in boxes]
        if self.by == "crop":
            return [self.encode_image(_crops(image, box)) for image, box in zip(images, wanted, strict=True)]
        prompter = self._by_roialign if self.by == "roialign" else self._prompter()
        if not images:
            return []
        pixels, filled = self._squares(images)
        slots = np.zeros((len(images), max([1, *map(len, wanted)]), 4), np.float32)
        for row, box, part in zip(slots, wanted, filled, strict=True):
            row[: len(box)] = box * part

        def run() -> torch.Tensor:
            tokens, _ = self.model.image(pixels)
            return F.normalize(prompter(tokens, torch.from_numpy(slots).to(tokens.device), None)[0].float(), dim=-1)

        return [found[: len(box)] for found, box in zip(self._run(run), wanted, strict=True)]

    def ground(self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[Array]:
        """The box of each of an image's texts: (t_i, 4) float32 x0, y0, x1, y1 in 0..1 of that image.

        One box a text, whether or not the thing is there. Raises ModelError for a model without a grounding head.
        """
        prompter = self._prompter()
        if not self.model.grounds:
            raise ModelError("this model was trained without the grounding loss: it predicts no boxes")
        flat = [text for each in texts for text in each]
        if not flat:
            return [np.zeros((0, 4), np.float32) for _ in images]
        unique = list(dict.fromkeys(flat))
        slots = np.zeros((len(images), max(map(len, texts))), np.int64)
        place = {text: i for i, text in enumerate(unique)}
        for row, each in zip(slots, texts, strict=True):
            row[: len(each)] = [place[text] for text in each]

        pixels, filled = self._squares(images)

        def run() -> torch.Tensor:
            tokens, _ = self.model.image(pixels)
            words = self.model.text(self._tokens(unique))[torch.from_numpy(slots).to(tokens.device)]
            found: torch.Tensor = prompter(tokens, None, words)[1]
            return found

        boxes = [b[: len(each)] / part for b, each, part in zip(self._run(run), texts, filled, strict=True)]
        return [np.hstack([np.minimum(b[:, :2], b[:, 2:]), np.maximum(b[:, :2], b[:, 2:])]).clip(0, 1) for b in boxes]

    def _by_roialign(self, tokens: torch.Tensor, boxes: torch.Tensor, _: None) -> tuple[torch.Tensor]:
        clip = self.model.clip
        return (clip.visual_projection(clip.vision_model.post_layernorm(roi_align(tokens, boxes))),)

    def _prompter(self) -> Any:
        if self.model.prompter is None:
            raise ModelError("this model is a plain CLIP: it has no Prompter for regions")
        return self.model.prompter

    def _none(self) -> Array:
        return np.zeros((0, self.model.clip.visual_projection.out_features), np.float32)

    def _device(self) -> torch.device:
        device: torch.device = self.model.clip.logit_scale.device
        return device

    def _squares(self, images: Sequence[Image.Image]) -> tuple[torch.Tensor, Array]:
        """Padded squares (n, 3, S, S) uint8, and the part (x, y, x, y) of each that its image fills."""
        squares = np.zeros((len(images), 3, self.model.image_px, self.model.image_px), np.uint8)
        filled = [
            fill_square(row, image.convert("RGB"), image.size) * 2 for row, image in zip(squares, images, strict=True)
        ]
        return torch.from_numpy(squares).to(self._device()), np.array(filled, np.float32).reshape(-1, 4)

    def _tokens(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.from_numpy(self.text(list(texts), self.model.context)).to(self._device())

    def _run(self, compute: Any) -> Array:
        device = self._device()
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                found: Array = compute().float().cpu().numpy()
        finally:
            self.model.train(training)
        return found


def _crops(image: Image.Image, boxes: Array) -> list[Image.Image]:
    """What the boxes, in 0..1 of the image, cut out of it; at least one pixel each."""
    px = boxes * np.array([*image.size, *image.size], np.float32)
    found = []
    for x0, y0, x1, y1 in px.tolist():
        left, top = min(int(x0), image.width - 1), min(int(y0), image.height - 1)
        found.append(image.crop((left, top, max(left + 1, round(x1)), max(top + 1, round(y1)))))
    return found


def _open_folder(folder: Path) -> tuple[Cloc, Text]:
    words = json.loads((folder / _WORDS).read_text())
    options, objective = Model(**words["model"]), Objective(**words["objective"])
    text = load_text(str(folder))
    model = Cloc(options, objective, text, words["clip"])
    weights = load_file(folder / _OWN) if (folder / _OWN).exists() else {}
    if (folder / SAFE_WEIGHTS_NAME).exists():
        weights |= {f"clip.{name}": value for name, value in load_file(folder / SAFE_WEIGHTS_NAME).items()}
    model.load_state_dict(weights)
    return model, text


def _open_checkpoint(path: Path) -> tuple[Cloc, Text]:
    state = checkpoint.load(path)
    words = json.loads(state["options"])
    learned = path.parent.parent / "tokenizer"
    text = load_text(str(learned) if learned.is_dir() else Model(**words["model"]).text)
    model = Cloc(Model(**words["model"]), Objective(**words["objective"]), text, json.loads(state["clip"]))
    model.load_state_dict(state["model"])
    return model, text


def export(model: Cloc, text: Text, options: Model, objective: Objective, folder: Path) -> None:
    """Write a model folder. With attention pooling the class token is untrained, so no CLIP is written beside."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if options.pool == "class":
        model.clip.save_pretrained(folder, safe_serialization=True)
        own = {name: value for name, value in own.items() if not name.startswith("clip.")}
        processor = {
            "image_processor_type": "CLIPImageProcessor",
            "do_resize": True,
            "size": {"max_height": model.image_px, "max_width": model.image_px},
            "resample": int(Image.Resampling.BICUBIC),
            "do_center_crop": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
            "do_convert_rgb": True,
            "do_pad": True,  # with grey; we pad with black, so square images only come out as in training
            "pad_size": {"height": model.image_px, "width": model.image_px},
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    if own:
        save_file(own, folder / _OWN)
    text.tokenizer.model_max_length = model.context  # what transformers' users cut texts to
    text.save(folder)
    words = {
        "model": dataclasses.asdict(options),
        "objective": dataclasses.asdict(objective),
        "clip": model.clip.config.to_dict(),
    }
    (folder / _WORDS).write_text(json.dumps(words, indent=1))
