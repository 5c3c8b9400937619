"""The objective (section 3 of the paper) as pure functions of features; `train` adds them up.

Letters of shapes: N images of this rank, M region slots each, R = N x M slots, D width; "all" tensors hold the rows of
every rank in rank order (`gather`), as many from each rank. A loss is this rank's share, so scaled that the mean over
the ranks is the loss of the global batch, and that gradients averaged over the ranks (as DDP does) are its gradients.
Products and sums are done in float32 (float64 inputs: in float64) under any autocast; the backward pass belongs outside
of it, as always. Every rank builds the same graph however many regions it has, since the backward pass of `gather`
waits for all ranks. What is not finite stays so.
"""
# ruff: noqa: N803 - shapes in names

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Mask = Callable[[slice], Tensor]  # rows k to (k, columns) bool: the pairs that leave the denominators
TINY_AREA = 1e-7  # what GIoU divides by at least: a hundredth of a square pixel where the side has 336


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(n, ...) of every rank, of one shape and dtype, to (world x n, ...) in rank order; x itself if there is one rank.

    The gradient of a rank's rows is the sum of the gradients that all ranks have for them; both passes are collective.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return x
    gathered: Tensor = _Gather.apply(x, group)  # type: ignore[no-untyped-call]
    return gathered


def image_text_loss(
    images_ND: Tensor,
    texts_ND: Tensor,
    scale: Tensor,
    *,
    all_images: Tensor | None = None,
    all_texts: Tensor | None = None,
    offset: int = 0,
    tile: int | None = None,
) -> Tensor:
    """L_CLIP, 0-dim: symmetric InfoNCE of image i with text i against all of the global batch, mean over local rows.

    Features have unit length; `scale` (0-dim) is one over the temperature. `all_*` (world x N, D), with `offset` the
    row there of the first local one; none of them: one rank. `tile`: rows of the logits in memory at once, backward
    included. ValueError where these do not fit each other.
    """
    _check((images_ND, texts_ND), (all_images, all_texts), offset, tile)
    a, b, all_a, all_b, scale = _exact(images_ND, texts_ND, all_images, all_texts, scale)
    with _no_autocast(a):
        loss, _ = _contrast(a, b, all_a, all_b, scale, None, tile)
        return loss / max(len(a), 1)


def region_text_loss(
    regions_RD: Tensor,
    texts_RD: Tensor,
    text_id_R: Tensor,
    valid_R: Tensor,
    scale: Tensor,
    *,
    conflict_cosine: float | None,
    all_regions: Tensor | None = None,
    all_texts: Tensor | None = None,
    all_text_id: Tensor | None = None,
    all_valid: Tensor | None = None,
    offset: int = 0,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """L_CLOC and the masked share of its negatives, both 0-dim, the share detached and of the local rows.

    Symmetric InfoNCE of region i with text i against all valid slots, mean over the valid slots of the global batch.
    A pair (i, j) with i != j leaves both denominators if the texts' ids (int64) are equal, or their cosine is above
    `conflict_cosine`. What an invalid slot (`valid_R` bool) holds is never looked at. 0 if no slot is valid anywhere.
    The rest as in `image_text_loss`.
    """
    everyone = (all_regions, all_texts, all_text_id, all_valid)
    _check((regions_RD, texts_RD, text_id_R, valid_R), everyone, offset, tile)
    a, b, all_a, all_b, scale = _exact(regions_RD, texts_RD, all_regions, all_texts, scale)
    ids, valid = (text_id_R, valid_R) if all_text_id is None or all_valid is None else (all_text_id, all_valid)
    world = len(valid) // max(len(valid_R), 1)
    here, there = valid_R.nonzero().squeeze(1), valid.nonzero().squeeze(1)
    own = (valid.cumsum(0) - 1)[offset + here]
    a, b, text_id, ids = a[here], b[here], text_id_R[here], ids[there]
    if all_a is not None and all_b is not None:
        all_a, all_b = all_a[there], all_b[there]
    with _no_autocast(a):
        mask = _conflicts(b, b if all_b is None else all_b, text_id, ids, own, conflict_cosine)
        total, masked = _contrast(a, b, all_a, all_b, scale, mask, tile)
        return total * (world / max(len(ids), 1)), masked / max(len(a) * (len(ids) - 1), 1)


def grounding_loss(
    predicted_NM4: Tensor,
    boxes_NM4: Tensor,
    valid_NM: Tensor,
    kind: Literal["mse", "l1_giou"],
    *,
    count: Tensor | None = None,
) -> Tensor:
    """L_ground, 0-dim: mean over valid slots; 0 if there is none.

    Boxes are x0, y0, x1, y1 in 0..1 of the padded square. "mse": the mean squared error of the four; "l1_giou": their
    mean absolute error + 1 - GIoU. `count` (0-dim): divide by it instead, the valid slots of all ranks over the number
    of ranks.
    """
    predicted, boxes = (x.to(torch.promote_types(x.dtype, torch.float32))[valid_NM] for x in (predicted_NM4, boxes_NM4))
    with _no_autocast(predicted):
        if kind == "mse":
            losses = (predicted - boxes).square().mean(1)
        else:
            losses = (predicted - boxes).abs().mean(1) + 1 - _giou(predicted, boxes)
        if count is None:
            return losses.sum() / max(len(losses), 1)
        return losses.sum() / torch.where(count > 0, count, 1)  # a fraction where ranks outnumber regions


def _giou(predicted: Tensor, boxes: Tensor) -> Tensor:
    """(n, 4), (n, 4) to (n,): generalised IoU (Rezatofighi et al. 2019), in -1..1.

    A prediction whose corners are the wrong way round is empty, and L1 turns it. (Taken for the box between its
    corners it would be held there: GIoU pulls harder than L1 and would be content.)
    """
    overlap = torch.minimum(predicted, boxes)[:, 2:] - torch.maximum(predicted, boxes)[:, :2]
    hull = (torch.maximum(predicted, boxes)[:, 2:] - torch.minimum(predicted, boxes)[:, :2]).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(1) for x in (predicted, boxes)]
    shared = overlap.clamp(min=0).prod(1)
    union = areas[0] + areas[1] - shared
    return shared / union.clamp(min=TINY_AREA) - (hull - union) / hull.clamp(min=TINY_AREA)


def _conflicts(
    texts: Tensor, all_texts: Tensor, ids: Tensor, all_ids: Tensor, own: Tensor, cosine: float | None
) -> Mask:
    """The rule for pairs that are no negatives; symmetric, so that it serves both directions."""
    texts, all_texts = texts.detach(), all_texts.detach()

    def mask(rows: slice) -> Tensor:
        hidden = ids[rows, None] == all_ids
        if cosine is not None:
            hidden |= texts[rows] @ all_texts.T > cosine
        return hidden.scatter_(1, own[rows, None], False)

    return mask


def _contrast(
    a: Tensor,
    b: Tensor,
    all_a: Tensor | None,
    all_b: Tensor | None,
    scale: Tensor,
    mask: Mask | None,
    tile: int | None,
) -> tuple[Tensor, Tensor]:
    """Sum over local rows of (-log p(b_i | a_i) - log p(a_i | b_i)) / 2, and how many pairs the mask took out."""
    if tile is None:
        over_b, over_a, masked = _denominators(a, b, all_a, all_b, scale, mask, max(len(a), 1))
    else:
        denominators = _Tiled.apply(a, b, all_a, all_b, scale, mask, tile)  # type: ignore[no-untyped-call]
        over_b, over_a, masked = denominators
    return ((over_b + over_a) / 2 - scale * (a * b).sum(1)).sum(), masked


def _denominators(
    a: Tensor,
    b: Tensor,
    all_a: Tensor | None,
    all_b: Tensor | None,
    scale: Tensor,
    mask: Mask | None,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(n,), (n,), 0-dim: log of the summed exp of a_i with all_b, of b_i with all_a; and the count of masked pairs.

    On one rank (no `all_*`) the second are the column sums of the same logits.
    """
    rows: list[Tensor] = []
    columns: list[Tensor] = []
    masked = torch.zeros((), dtype=torch.int64, device=a.device)
    for k in _tiles(len(a), tile):
        hidden = None if mask is None else mask(k)
        masked = masked if hidden is None else masked + hidden.sum()
        logits = _logits(a[k], b if all_b is None else all_b, scale, hidden)
        rows.append(logits.logsumexp(1))
        if all_a is not None:
            del logits  # two at once are one too many
            columns.append(_logits(b[k], all_a, scale, hidden).logsumexp(1))
        else:
            columns = [torch.logaddexp(columns[0], logits.logsumexp(0)) if columns else logits.logsumexp(0)]
    return torch.cat(rows), torch.cat(columns), masked


class _Tiled(torch.autograd.Function):
    """`_denominators` that keeps only its results, and makes each tile of logits again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        all_a: Tensor | None,
        all_b: Tensor | None,
        scale: Tensor,
        mask: Mask | None,
        tile: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        over_b, over_a, masked = _denominators(a, b, all_a, all_b, scale, mask, tile)
        ctx.save_for_backward(a, b, all_a, all_b, scale, over_b, over_a)
        ctx.mask, ctx.tile = mask, tile
        ctx.mark_non_differentiable(masked)
        return over_b, over_a, masked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_over_b: Tensor, g_over_a: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        a, b, all_a, all_b, scale, over_b, over_a = ctx.saved_tensors
        alone = all_a is None
        to_a, to_b = (b, a) if alone else (all_b, all_a)  # what the rows of a, of b meet
        g_a, g_to_a, g_scale = torch.zeros_like(a), torch.zeros_like(to_a), torch.zeros_like(scale)
        g_b, g_to_b = (None, None) if alone else (torch.zeros_like(b), torch.zeros_like(to_b))
        with _no_autocast(a):
            for k in _tiles(len(a), ctx.tile):
                hidden = None if ctx.mask is None else ctx.mask(k)
                logits = _logits(a[k], to_a, scale, hidden)
                weights = (logits - over_b[k, None]).exp_().mul_(g_over_b[k, None])
                if alone:
                    weights += logits.sub_(over_a).exp_().mul_(g_over_a)
                del logits
                met = weights @ to_a
                g_a[k] = met * scale
                g_to_a.addmm_(weights.T, a[k] * scale)
                g_scale += (met * a[k]).sum()
                if g_b is not None and g_to_b is not None:
                    weights = _logits(b[k], to_b, scale, hidden).sub_(over_a[k, None]).exp_().mul_(g_over_a[k, None])
                    met = weights @ to_b
                    g_b[k] = met * scale
                    g_to_b.addmm_(weights.T, b[k] * scale)
                    g_scale += (met * b[k]).sum()
        if alone:
            return g_a, g_to_a, None, None, g_scale, None, None
        return g_a, g_b, g_to_b, g_to_a, g_scale, None, None


class _Gather(torch.autograd.Function):
    # The names on the right are deprecated in torch 2.13, those on the left are not in 2.6.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rows, ctx.group = len(x), group
        gathered = x.new_empty((dist.get_world_size(group) * len(x), *x.shape[1:]))
        _Gather.all_gather(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty((ctx.rows, *gradient.shape[1:]))
        _Gather.reduce_scatter(own, gradient.contiguous(), group=ctx.group)
        return own, None


def _logits(rows: Tensor, columns: Tensor, scale: Tensor, hidden: Tensor | None) -> Tensor:
    logits = (rows * scale) @ columns.T
    return logits if hidden is None else logits.masked_fill_(hidden, -torch.inf)


def _tiles(rows: int, tile: int) -> Iterator[slice]:
    """At least one, an empty one if need be, so that the graph does not depend on the number of rows."""
    for start in range(0, max(rows, 1), tile):
        yield slice(start, min(start + tile, rows))


def _exact(a: Tensor, b: Tensor, all_a: Tensor | None, all_b: Tensor | None, scale: Tensor) -> Any:
    """The same in float32 at least; no `all_*` where they are the local rows."""
    if all_a is a and all_b is b:
        all_a = all_b = None
    return [
        None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b, all_a, all_b, scale)
    ]


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, enabled=False)


def _check(local: tuple[Tensor, ...], everyone: tuple[Tensor | None, ...], offset: int, tile: int | None) -> None:
    rows, given = len(local[0]), [x for x in everyone if x is not None]
    if any(len(x) != rows for x in local):
        raise ValueError(f"local rows differ: {[len(x) for x in local]}")
    if given and (len(given) < len(everyone) or any(len(x) != len(given[0]) for x in given)):
        raise ValueError("the rows of all ranks are given for every input, and equally many, or for none")
    columns = len(given[0]) if given else rows
    if columns % max(rows, 1) or not 0 <= offset <= columns - rows:
        raise ValueError(f"{rows} local rows at {offset} are no rank's share of {columns}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile {tile}: at least one row")
