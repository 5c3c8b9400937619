"""The model: transformers' two CLIP towers, and the Prompter over the image tower's tokens."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its name everywhere)
from transformers import CLIPConfig, CLIPModel

from ..contract import ModelError
from .data import Batch
from .options import Model, Objective
from .prompter import Prompter
from .text import Text, split_reference

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's published models
MAX_SCALE = 100.0  # of the logits (Radford et al. 2021)


@dataclass
class Features:
    """What the objective sees of N images; embeddings have unit length. The last four are None for a plain CLIP."""

    image: Tensor  # (N, D)
    caption: Tensor  # (N, D)
    scale: Tensor  # 0-dim: one over the temperature of images and captions
    region: Tensor | None = None  # (N, M, D)
    phrase: Tensor | None = None  # (N, M, D)
    box: Tensor | None = None  # (N, M, 4): predicted from `phrase`; (N, 0, 4) where nothing is grounded
    region_scale: Tensor | None = None  # 0-dim: one over the temperature of regions and phrases


class AttentionPool(nn.Module):
    """One learned query over the image tokens, as the paper's towers pool."""

    def __init__(self, width: int, heads: int) -> None:
        """Width and heads as the image tower's."""
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, P, W), normalised -> (N, W)."""
        query = self.query.expand(len(tokens), -1, -1)
        pooled: Tensor = self.attention(query, tokens, tokens, need_weights=False)[0]
        return pooled[:, 0]


class Cloc(nn.Module):
    """`clip` is an ordinary CLIPModel: what is exported of it is a drop-in CLIP (see encoder.py)."""

    mean: Tensor
    std: Tensor

    def __init__(self, options: Model, objective: Objective, text: Text, config: dict[str, Any] | None = None) -> None:
        """Random weights, or those of `options.init`; a Prompter only where the objective has regions.

        `config`, that of a CLIP, takes the place of sizes and `init`: weights that fit it will be loaded.

        Raises ModelError where the weights are not at hand or do not fit the tokenizer.
        """
        super().__init__()
        self.clip = CLIPModel(CLIPConfig.from_dict(config)) if config else _open_clip(options, text)
        vision: Any = self.clip.config.vision_config
        text_tower: Any = self.clip.config.text_config
        self.image_px: int = vision.image_size
        self.context: int = text_tower.max_position_embeddings  # text tokens at most
        self.pool: AttentionPool | None = None
        if options.pool == "attention":
            self.pool = AttentionPool(vision.hidden_size, vision.num_attention_heads)
        self.grounds = objective.region_weight > 0 and objective.grounding != "none"
        self.prompter: Prompter | None = None
        self.region_scale: nn.Parameter | None = None
        if objective.region_weight:
            self.prompter = Prompter(options, vision.hidden_size, self.clip.visual_projection.out_features)
            if objective.temperatures == "own":
                self.region_scale = nn.Parameter(self.clip.logit_scale.detach().clone())
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1) * 255, persistent=False)

    def forward(self, batch: Batch) -> Features:
        """All embeddings of a batch; each image and each different text goes through its tower once."""
        tokens, image = self.image(batch.images)
        caption = self.text(batch.captions)
        scale = self.clip.logit_scale.exp()
        if self.prompter is None:
            return Features(image, caption, scale)
        phrase = self.text(batch.phrases)[batch.phrase]
        region, box = self.prompter(tokens, batch.boxes, phrase if self.grounds else None)
        region_scale = scale if self.region_scale is None else self.region_scale.exp()
        return Features(image, caption, scale, F.normalize(region.float(), dim=-1), phrase, box.float(), region_scale)

    def image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, S, S) uint8 -> the tower's tokens (N, P, W) before pooling, and unit embeddings (N, D) float32."""
        tower = self.clip.vision_model
        out = tower(pixel_values=(pixels.float() - self.mean) / self.std)
        tokens = out.last_hidden_state[:, 1:]
        pooled = out.pooler_output if self.pool is None else self.pool(tower.post_layernorm(tokens))
        return tokens, F.normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def text(self, ids: Tensor) -> Tensor:
        """(T, L) int64 -> unit embeddings (T, D) float32."""
        pooled = self.clip.text_model(input_ids=ids).pooler_output
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the logits' scales at or below 100, as CLIP does; called after each step."""
        for scale in (self.clip.logit_scale, self.region_scale):
            if scale is not None:
                scale.clamp_(max=math.log(MAX_SCALE))


def _open_clip(options: Model, text: Text) -> Any:
    if text.end_id == 2:
        raise ModelError(
            "train.model.tokenizer: ends texts in token 2, which CLIP takes for `the highest id`: take another"
        )
    if options.init:
        name, revision = split_reference(options.init, "train.model.init")
        safe: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
        try:
            clip: Any = CLIPModel.from_pretrained(name, revision=revision, **safe)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"train.model.init: {options.init}: {str(error).splitlines()[0]}") from None
        if clip.config.text_config.vocab_size < text.size:
            raise ModelError(
                f"train.model.init: {options.init} knows fewer tokens than the tokenizer has; take its own"
            )
        clip.text_model.eos_token_id = clip.config.text_config.eos_token_id = (
            text.end_id
        )  # old ones say 2: "the highest"
        return clip
    config = CLIPConfig(
        text_config={
            "vocab_size": text.size,
            "hidden_act": "gelu",  # CLIP's own quick_gelu is three kernels, this one is one
            "hidden_size": options.text_width,
            "intermediate_size": 4 * options.text_width,
            "num_hidden_layers": options.text_layers,
            "num_attention_heads": options.text_heads,
            "max_position_embeddings": options.context,
            "eos_token_id": text.end_id,
            "bos_token_id": text.end_id,
            "pad_token_id": text.pad_id,
            "projection_dim": options.embed_dim,
        },
        vision_config={
            "image_size": options.image_px,
            "patch_size": options.patch_px,
            "hidden_act": "gelu",
            "hidden_size": options.vision_width,
            "intermediate_size": 4 * options.vision_width,
            "num_hidden_layers": options.vision_layers,
            "num_attention_heads": options.vision_heads,
            "projection_dim": options.embed_dim,
        },
        projection_dim=options.embed_dim,
    )
    return CLIPModel(config)
