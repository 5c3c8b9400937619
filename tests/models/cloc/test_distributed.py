"""The losses on 1, 2 and 4 processes (gloo): the same loss and the same gradients of one global batch."""

import multiprocessing
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from vesl.models.cloc.losses import gather, grounding_loss, image_text_loss, region_text_loss

IMAGES, SLOTS, WIDTH = 8, 3, 6
VALID = {  # of the slots of each image
    "uneven": (3, 3, 2, 0, 0, 1, 0, 3),
    "first half has none": (0, 0, 0, 0, 3, 1, 2, 3),
    "one": (0, 0, 0, 0, 0, 1, 0, 0),
    "none": (0,) * IMAGES,
}
CASES = {f"{name}, tile {tile}": (name, tile) for name in VALID for tile in (None, 4)}


class Model(nn.Module):
    """The least that has an image side, a text side, a region side, a box head and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.region = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.box = nn.Linear(WIDTH, 4)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, captions: Tensor, regions: Tensor, phrases: Tensor) -> tuple[Tensor, ...]:
        sides = [(self.image, images), (self.text, captions), (self.region, regions), (self.text, phrases)]
        features = [normalize(side(x), dim=-1) for side, x in sides]
        return (*features, self.box(features[2]), self.log_scale.exp())


def loss_of(
    features: tuple[Tensor, ...], boxes: Tensor, text_id: Tensor, valid: Tensor, tile: int | None, group: Any
) -> Tensor:
    """The whole objective of this rank, as the loop would put it together; without a process group as well."""
    images, captions, regions, phrases, predicted, scale = features
    regions, phrases, text_id_r, valid_r = (x.flatten(0, 1) for x in (regions, phrases, text_id, valid))
    rank, world = place(group)
    everyone: Any = {"all_images": gather(images, group), "all_texts": gather(captions, group)}
    clip = image_text_loss(images, captions, scale, **everyone, offset=rank * len(images), tile=tile)
    local = {"regions": regions, "texts": phrases, "text_id": text_id_r, "valid": valid_r}
    everyone = {f"all_{key}": gather(value, group) for key, value in local.items()}
    cloc, _ = region_text_loss(
        *local.values(), scale, conflict_cosine=0.5, **everyone, offset=rank * len(regions), tile=tile
    )
    count = everyone["all_valid"].sum() / world
    kinds: tuple[Literal["mse", "l1_giou"], ...] = ("mse", "l1_giou")
    ground = [grounding_loss(predicted, boxes, valid, kind, count=count) for kind in kinds]
    return clip + cloc + torch.stack(ground).sum()


def place(group: Any) -> tuple[int, int]:
    """Rank and world."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def batch(name: str) -> list[Tensor]:
    """The global batch: inputs of the model, boxes, text_id, valid; rows are images."""
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(IMAGES, WIDTH, generator=generator) for _ in range(2)]
    inputs += [torch.randn(IMAGES, SLOTS, WIDTH, generator=generator) for _ in range(2)]
    boxes = torch.rand(IMAGES, SLOTS, 2, 2, generator=generator).sort(2)[0].flatten(2)
    text_id = torch.randint(-(2**62), 2**62, (5,), generator=generator)[
        torch.randint(0, 5, (IMAGES, SLOTS), generator=generator)
    ]
    valid = torch.arange(SLOTS)[None, :] < torch.tensor(VALID[name])[:, None]
    return [*inputs, boxes, text_id, valid]


def measure(name: str, tile: int | None, group: Any = None) -> dict[str, Tensor]:
    """Loss averaged over ranks, DDP's gradients of the parameters, and those of features that are leaves."""
    rank, world = place(group)
    share = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    *inputs, boxes, text_id, valid = (x[share] for x in batch(name))
    torch.manual_seed(1)
    model = Model()
    parallel = DistributedDataParallel(model, process_group=group) if world > 1 else model
    loss = loss_of(parallel(*inputs), boxes, text_id, valid, tile, group)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {f"d {key}": value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert len(found) == len(list(model.parameters()))

    features = [normalize(x, dim=-1).requires_grad_() for x in inputs]
    predicted, scale = inputs[2][..., :4].sigmoid().requires_grad_(), torch.tensor(9.0, requires_grad=True)
    direct = loss_of((*features, predicted, scale), boxes, text_id, valid, tile, group)
    for i, gradient in enumerate(torch.autograd.grad(direct, [*features, predicted])):
        found[f"feature {i}"] = gather(gradient / world, group)
    found |= {"loss": gather(loss.detach()[None], group).mean()}
    return found | {"direct loss": gather(direct.detach()[None], group).mean()}


def check_gather(group: Any) -> None:
    """Every rank has its own use for every row, so that no part of the sum can be left out or counted twice."""
    rank, world = place(group)
    weights = torch.arange(world * world * 2.0).view(world, world * 2, 1) + 1  # of rank r for row i
    x = (torch.arange(6.0).view(3, 2) + 10 * rank).T.requires_grad_()  # not contiguous
    everything = gather(x, group)
    assert everything[:, 0].tolist() == [10.0 * r + i for r in range(world) for i in range(2)]
    assert (everything is x) == (world == 1)
    used = (everything * weights[rank]).sum()
    torch.testing.assert_close(torch.autograd.grad(used, x)[0], weights.sum(0)[rank * 2 : rank * 2 + 2].expand(2, 3))
    assert gather(torch.tensor([rank == 1]), group).tolist() == [r == 1 for r in range(world)]
    assert gather(torch.tensor([2**62 + rank]), group).tolist() == [2**62 + r for r in range(world)]
    assert gather(torch.tensor([rank]).bfloat16(), group).tolist() == list(range(world))


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4, timeout=timedelta(seconds=60)
    )
    singles = [dist.new_group([i]) for i in range(4)]
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]  # both make the same global batch
    found = {}
    for world, group in ((1, singles[rank]), (2, pairs[rank // 2]), (4, None)):
        check_gather(group)
        found |= {(world, case): measure(*options, group) for case, options in CASES.items()}
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each rank has found in each case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload([__name__])  # torch is loaded once
    start_processes(process, (str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_ranks_agree_with_one_process(ranks: list[Any], world: int, case: str) -> None:
    alone = measure(*CASES[case])
    assert sum(value.abs().sum() > 0 for value in alone.values()) > len(alone) / 2
    for found in ranks:
        assert found[world, case].keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(
                found[world, case][key], value, rtol=1e-5, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
