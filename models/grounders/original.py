"""Grounding DINO by its authors' package, groundingdino-py 0.4.0, behind the same preparation as `dino.py`.

A model is a folder (or a repository of the hub) with three things, and no code in any of them:
- config.json: the assignments of the package's config file (GroundingDINO_SwinT_OGC.py, or SwinB) as one JSON object,
  and, where the text encoder is not bert-base-uncased's shape, its BertConfig as "text_config";
- model.safetensors, made once of the published checkpoint, where it may be read:
  `w = torch.load(pth, weights_only=True)["model"]; save_file({k.removeprefix("module."): w[k].clone() for k in w}, f)`;
- the tokenizer's files of bert-base-uncased.

The package's own way to build a model would fetch the text encoder by name and run the config file; neither happens
here. Its BertModelWarper asks for methods that transformers 5 no longer has, so another module stands in its place.
"""

import importlib
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .. import hub
from ..contract import Grounder, ModelError
from ..device import place, quiet
from ..options import Grounding
from .dino import Asker, DinoGrounder, Look, refuse_what_is_owls

_SIDE_PX, _LONGEST = 800, 1333 / 800  # of the package's transforms: the short side, and the long one's limit to it
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_ROOM = 256  # tokens; the package has the number in its code and does not read it from the config
_BUILDING = threading.Lock()


def open_grounder(options: Grounding) -> Grounder:
    """Load a model of the package. Raises ModelError."""
    warnings.filterwarnings("ignore", module=r"groundingdino\.")  # the package is older than its libraries, and the
    warnings.filterwarnings("ignore", "torch.meshgrid")  # user cannot change that
    try:
        package = importlib.import_module("groundingdino.models.GroundingDINO.groundingdino")
    except ImportError as error:
        raise ModelError(
            f"model {options.model}: needs `pip install 'vesl[groundingdino]'` ({error.name or error} is missing)"
        ) from None
    refuse_what_is_owls(options)
    device, dtype = place(options)
    folder = hub.find(options.model)
    model, tokenizer = _load(package, folder, options)
    look = Look(_resizer(options.image_px or _SIDE_PX, model.num_queries), 1 / 255, _MEAN, _STD)
    network = _Network(model.to(device).eval(), package.NestedTensor, device, dtype)
    return DinoGrounder(network, Asker(tokenizer, _ROOM), look, options, device)


def _load(package: Any, folder: Path, options: Grounding) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertModel

    config = hub.config(folder)
    if not str(config.get("backbone")).startswith("swin_"):  # the others would fetch weights
        raise ModelError(f"model {options.model}: config.json: backbone: {config.get('backbone')!r} is no swin_...")
    config |= {"use_checkpoint": False, "use_transformer_ckpt": False}  # they save memory in training only
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        bert = BertModel(BertConfig(**config.pop("text_config", {})))
        with _built_of(package, tokenizer, bert):
            model = package.build_groundingdino(SimpleNamespace(**config))
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        missing = sorted(model.load_state_dict(weights, strict=False).missing_keys)
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, AssertionError),
        SafetensorError,
    ) as error:
        raise ModelError(f"model {options.model}: {' '.join(str(error).split())[:300]}") from None
    if missing:
        raise ModelError(f"model {options.model}: {len(missing)} weights are missing, {missing[0]} among them")
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(f"model {options.model}: {type(tokenizer).__name__} is no fast tokenizer")
    if None in (marks := model.specical_tokens) or len({*marks, tokenizer.unk_token_id}) < 5:
        raise ModelError(f"model {options.model}: its tokenizer does not know all of [CLS] [SEP] . ?")
    return model, tokenizer


@contextmanager
def _built_of(package: Any, tokenizer: Any, bert: Any) -> Iterator[None]:
    """Let the package build a model of these, instead of fetching them by name; as it was before, afterwards."""
    found = SimpleNamespace(get_tokenlizer=lambda _: tokenizer, get_pretrained_language_model=lambda _: bert)
    with _BUILDING:
        before = package.get_tokenlizer, package.BertModelWarper
        package.get_tokenlizer, package.BertModelWarper = found, TextEncoder
        try:
            yield
        finally:
            package.get_tokenlizer, package.BertModelWarper = before


class TextEncoder(torch.nn.Module):
    """What the package's BertModelWarper is, with its attribute names, so that the published weights fit."""

    def __init__(self, bert_model: Any) -> None:
        super().__init__()
        self.config = bert_model.config
        self.embeddings = bert_model.embeddings
        self.encoder = bert_model.encoder
        self.pooler = bert_model.pooler

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Take ids [B, L] and a mask, [B, L] or for each pair of tokens [B, L, L], where true is seen."""
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        seen = attention_mask.bool()
        seen = seen[:, None] if seen.ndim == 3 else seen[:, None, None]
        added = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, torch.finfo(hidden.dtype).min)
        return {"last_hidden_state": self.encoder(hidden, attention_mask=added)[0]}


class _Network:
    """The package's model, given token ids instead of captions. Precision as in `dino.py`."""

    def __init__(self, model: Any, nested: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._nested = nested
        self._model, self._device, self._dtype = model, device, dtype

    def __call__(
        self, pixels: list[torch.Tensor], of: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, boxes = zip(*self._by_size(pixels, of, ids, mask), strict=True)
        return torch.cat(logits), torch.cat(boxes)

    def _by_size(
        self, pixels: list[torch.Tensor], of: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One size at a time: in the package as it is, what pads an image changes its result."""
        from transformers import BatchEncoding

        start = 0
        for same in pixels:
            own = (of >= start) & (of < start + len(same))
            text = {"input_ids": ids[own], "token_type_ids": ids[own] * 0, "attention_mask": mask[own].long()}
            self._model.tokenizer = lambda captions, text=text, **how: BatchEncoding(dict(text))
            images = same[of[own] - start]
            nothing = torch.zeros_like(images[:, 0], dtype=torch.bool)  # is padding
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
                out = self._model(self._nested(images, nothing), captions=[""] * len(images))
            yield out["pred_logits"], out["pred_boxes"]
            start += len(same)


def _resizer(side_px: int, queries: int) -> Any:
    """The package's resizing: the short side to `side_px`, but the long one not beyond its limit; bilinear."""

    def resize(image: Image.Image) -> npt.NDArray[np.uint8]:
        short, long = sorted(image.size)
        side = min(side_px, round(_LONGEST * side_px * short / long))
        width, height = image.size
        size = (side, int(side * height / width)) if width < height else (int(side * width / height), side)
        if sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in (8, 16, 32, 64)) < queries:
            raise ValueError(f"an image of {size[0]}x{size[1]} is too small for the model's {queries} queries")
        pixels = np.asarray(image if size == image.size else image.resize(size, Image.Resampling.BILINEAR))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    return resize
