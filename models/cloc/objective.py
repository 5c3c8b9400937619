"""CLOC's objective over the global batch: what one step's features cost. The loop minimises it and knows no more."""

import torch
import torch.distributed as dist
from torch import Tensor

from .data import Batch
from .losses import gather, grounding_loss, image_text_loss, region_text_loss
from .model import Features
from .options import Objective


def cloc_loss(found: Features, batch: Batch, options: Objective, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss to minimise (0-dim) and its parts, detached, by name; both are this rank's share (see losses.py).

    Collective: every rank calls it with as many images and region slots as the others. With `region_weight` 0 it is a
    plain CLIP's loss. Paper, section 3: L_CLIP + lambda (L_CLOC + L_ground), lambda = weight x share of images that
    have regions, here of the global batch.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    everyone = {} if world == 1 else {"all_images": gather(found.image), "all_texts": gather(found.caption)}
    image_text = image_text_loss(
        found.image, found.caption, found.scale, offset=rank * len(found.image), tile=options.tile, **everyone
    )
    if found.region is None:
        return image_text, {"image_text": image_text.detach(), "scale": found.scale.detach()}
    assert found.phrase is not None
    assert found.region_scale is not None
    regions, texts = found.region.flatten(0, 1), found.phrase.flatten(0, 1)
    ids, valid = batch.text_id.flatten(), batch.valid.flatten()
    everyone = {}
    if world > 1:
        names = ("all_regions", "all_texts", "all_text_id", "all_valid")
        everyone = dict(zip(names, map(gather, (regions, texts, ids, valid)), strict=True))
    region_text, masked = region_text_loss(
        regions,
        texts,
        ids,
        valid,
        found.region_scale,
        conflict_cosine=options.conflict_cosine if step >= options.conflict_from_step else None,
        offset=rank * len(regions),
        tile=options.tile,
        **everyone,
    )
    counts = torch.stack([valid.sum(), batch.valid.any(1).sum()]).float()
    if world > 1:
        dist.all_reduce(counts)
    weight = options.region_weight * counts[1] / (len(found.image) * world)
    logs = {"image_text": image_text, "region_text": region_text, "masked_share": masked}
    total = image_text + weight * region_text
    assert found.box is not None
    if options.grounding == "none":
        total = total + found.box.sum()  # of no box; a gradient of 0 for what makes them, which other ranks wait for
    else:
        grounding = grounding_loss(found.box, batch.boxes, batch.valid, options.grounding, count=counts[0] / world)
        total = total + weight * grounding
        logs["grounding"] = grounding
    logs |= {"lambda": weight, "scale": found.scale, "region_scale": found.region_scale}
    return total, {name: value.detach() for name, value in logs.items()}
