"""The Prompter (section 3.3): a prompt and the image tokens in, a region's embedding out.

A one-layer, single-head transformer encoder over [prompt tokens, image tokens]. With one layer, what the prompt tokens
become depends on the image tokens only through their keys and values; those are computed once per image and serve all
of its prompts, boxes and texts alike. So the prompts cost next to nothing, whatever their number.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its name everywhere)

from .options import Model

_CYCLES = (0.25, 16.0)  # over the image: the slowest and the fastest wave of the encoding; ours


def encode_points(points: Tensor, width: int) -> Tensor:
    """Sinusoidal encoding of (..., 2) x, y in 0..1 as (..., width): sines and cosines of x, then of y."""
    count = width // 4
    steps = torch.arange(count, device=points.device) / max(count - 1, 1)
    cycles = _CYCLES[0] * (_CYCLES[1] / _CYCLES[0]) ** steps
    angles = 2 * math.pi * points[..., None].float() * cycles  # (..., 2, count)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def grid_points(side: int, device: torch.device) -> Tensor:
    """Centres of side x side patches in row order: (side * side, 2) x, y in 0..1."""
    centres = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def roi_align(tokens: Tensor, boxes: Tensor, bins: int = 7) -> Tensor:
    """Average of bilinear samples in each box (He et al. 2017), 2 x 2 a bin: (N, P, W), (N, M, 4) -> (N, M, W)."""
    n, p, w = tokens.shape
    side = math.isqrt(p)
    grid = tokens.transpose(1, 2).reshape(n, w, side, side).float()
    at = grid_points(2 * bins, boxes.device)  # (S, 2) in 0..1 of the box
    points = boxes[:, :, None, :2] + (boxes[:, :, None, 2:] - boxes[:, :, None, :2]) * at  # (N, M, S, 2)
    sampled = F.grid_sample(grid, points.float() * 2 - 1, align_corners=False, padding_mode="border")  # (N, W, M, S)
    return sampled.mean(-1).transpose(1, 2).to(tokens.dtype)


class Prompter(nn.Module):
    """Boxes and texts to embeddings of width `embed_dim`, and texts to boxes."""

    def __init__(self, options: Model, width: int, embed_dim: int) -> None:
        """`width` is the image tower's, a multiple of 4; the paper ties the transformer to it."""
        super().__init__()
        self.options = options
        self.corners = nn.Parameter(torch.randn(2, width) * 0.02)  # ours: tells top-left from bottom-right
        self.from_text = nn.Linear(embed_dim, width)
        self.norm_in, self.norm_mlp, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.project = nn.Linear(width, embed_dim, bias=False)
        self.box = nn.Sequential(nn.Linear(embed_dim, width), nn.GELU(), nn.Linear(width, 4))
        for layer in (self.query, self.key_value):  # so that attention differs between tokens from the first step
            nn.init.orthogonal_(layer.weight, gain=1.0)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, boxes: Tensor | None, texts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Regions (N, M, D), not of unit length, and predicted boxes (N, T, 4) in 0..1 of the padded square.

        tokens (N, P, W) of the image tower, before pooling; boxes (N, M, 4); texts (N, T, D) of unit length.
        """
        n, p, width = tokens.shape
        boxes = tokens.new_zeros(n, 0, 4) if boxes is None else boxes
        texts = tokens.new_zeros(n, 0, self.from_text.in_features) if texts is None else texts
        m, t = boxes.shape[1], texts.shape[1]
        placed = tokens
        if self.options.positions:
            placed = tokens + encode_points(grid_points(math.isqrt(p), tokens.device), width)
        corners = encode_points(boxes.reshape(n, m, 2, 2), width) + self.corners  # (N, M, 2, W)
        words = self.from_text(texts * math.sqrt(texts.shape[-1]))  # numbers of about 1, as the corners' are
        prompts = torch.cat([corners.flatten(1, 2), words], 1)  # (N, 2M + T, W)
        owner = torch.cat([torch.arange(m).repeat_interleave(2), torch.arange(m, m + t)])
        own = (torch.arange(m + t)[:, None] == owner).to(tokens.device)  # (M + T, 2M + T): which tokens a prompt has
        attend = self.encode if self.options.prompt_pool == "prompt" else self.encode_literally
        z = self.project(self.norm_out(attend(prompts, own, placed)))  # (N, M + T, D)
        regions = z[:, :m]
        if self.options.region == "roialign":
            regions = self.project(self.norm_out(roi_align(tokens, boxes)))
        return regions, self.box(z[:, m:])

    def encode(self, prompts: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
        """What each prompt's own tokens become, averaged: (N, Q, W), (G, Q) bool, (N, P, W) -> (N, G, W)."""
        keys, values = self.key_value(self.norm_in(torch.cat([tokens, prompts], 1))).chunk(2, -1)
        together = own.float().T @ own.float() > 0  # a prompt sees the image and itself, no other prompt
        seen = torch.cat([together.new_ones(len(together), tokens.shape[1]), together], 1)
        queries = self.query(self.norm_in(prompts))
        mixed = F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], attn_mask=seen)[:, 0]
        x = prompts + self.out(mixed)
        x = x + self.mlp(self.norm_mlp(x))
        share = own / own.sum(1, keepdim=True)
        averaged: Tensor = share.to(x.dtype) @ x
        return averaged

    def encode_literally(self, prompts: Tensor, own: Tensor, tokens: Tensor) -> Tensor:
        """What the image tokens become in each prompt's own sequence, averaged, as the paper's words have it."""
        found = []
        for mine in own:
            x = torch.cat([prompts[:, mine], tokens], 1)
            keys, values = self.key_value(self.norm_in(x)).chunk(2, -1)
            queries = self.query(self.norm_in(x))
            x = x + self.out(F.scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None])[:, 0])
            x = x + self.mlp(self.norm_mlp(x))
            found.append(x[:, -tokens.shape[1] :].mean(1))
        return torch.stack(found, 1)
