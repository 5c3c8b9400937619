"""One global batch in one pass, in several (gradient caching), and shared by several processes: the same gradients."""

import dataclasses
import multiprocessing
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.models.cloc.test_model import batch_of, tiny
from vesl.models.cloc.data import Batch
from vesl.models.cloc.gradients import backward, split
from vesl.models.cloc.model import Features
from vesl.models.cloc.objective import cloc_loss
from vesl.models.cloc.options import Objective

COUNTS = {"uneven": (2, 0, 3, 1, 0, 0, 1, 3), "none": (0,) * 8}
OBJECTIVES = {
    "shared": Objective(conflict_from_step=0, conflict_cosine=0.999),
    "own, l1_giou": Objective(temperatures="own", grounding="l1_giou", region_weight=0.5),
    "no grounding": Objective(grounding="none"),
    "plain": Objective(region_weight=0),
    "tiled": Objective(tile=3),
}


def measure(name: str, counts: str, size: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """Gradients of the global batch of COUNTS, of which this rank has its share, and the parts of its loss."""
    objective, whole = OBJECTIVES[name], batch_of(COUNTS[counts])
    share = rows(whole, slice(rank * 8 // world, (rank + 1) * 8 // world))
    model = tiny(objective)
    network = DistributedDataParallel(model) if world > 1 else model

    def loss_of(found: Features, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return cloc_loss(found, batch, objective, step)

    parts = backward(network, split(share, size), loss_of, 5, nullcontext)
    averaged = {}
    for key, part in parts.items():
        averaged[f"part {key}"] = part.clone()
        if world > 1 and key != "masked_share":  # of the local rows
            dist.all_reduce(averaged[f"part {key}"])
            averaged[f"part {key}"] /= world
    if world > 1:
        averaged.pop("part masked_share", None)
    return averaged | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def rows(batch: Batch, share: slice) -> Batch:
    """Some images of a batch, with phrases of their own, as another process would have them."""
    fields = ("images", "captions", "boxes", "valid", "phrase", "text_id", "keys")
    return dataclasses.replace(batch, **{name: getattr(batch, name)[share] for name in fields})


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for key, value in expected.items():
        if key not in found:
            assert not value.any(), key  # no gradient is one of zero
        else:
            # 1e-5 of the parameter's largest gradient; what cancels (a bias of keys does) leaves its rounding behind
            atol = max(1e-5 * float(value.abs().max()), 2e-7)
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=atol, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_have_the_gradients_of_one_pass(name: str, counts: str) -> None:
    whole = measure(name, counts, 8)
    assert len(whole) > 40
    assert whole["clip.logit_scale"].abs() > 1e-4
    if name.startswith("own") and counts == "uneven":
        assert whole["region_scale"].abs() > 1e-4
    for size in (4, 2):
        found = measure(name, counts, size)
        assert found.keys() <= whole.keys()
        assert_same(found, whole)


def test_the_contrast_runs_over_all_micro_batches() -> None:
    """What gradient accumulation would give differs: it knows the negatives of its own few images only."""
    whole, alone = measure("plain", "uneven", 8), batch_of(COUNTS["uneven"])
    model = tiny(OBJECTIVES["plain"])
    for piece in split(alone, 4):
        (cloc_loss(model(piece), piece, OBJECTIVES["plain"], 5)[0] / 2).backward()  # type: ignore[no-untyped-call]
    grad = model.clip.visual_projection.weight.grad
    assert (grad - whole["clip.visual_projection.weight"]).abs().max() > 1e-4


def test_gradients_are_added() -> None:
    model, batch = tiny(), batch_of()

    def loss_of(found: Features, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return cloc_loss(found, batch, Objective(), step)

    grads = []
    for _ in range(2):
        backward(model, split(batch, 2), loss_of, 0, nullcontext)
        grads.append(model.clip.visual_projection.weight.grad.clone())
    torch.testing.assert_close(grads[1], 2 * grads[0])


def test_low_precision_is_close_in_several_passes() -> None:
    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    found = []
    for size in (8, 4):
        model, batch = tiny(), batch_of(COUNTS["uneven"])
        backward(model, split(batch, size), lambda f, b, s: cloc_loss(f, b, Objective(), s), 0, autocast)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found[0], found[1], 0) > 0.999
    assert found[1].norm() == pytest.approx(found[0].norm().item(), rel=0.02)


def test_split_keeps_every_phrase() -> None:
    batch = batch_of((3, 0, 2, 1, 3))
    pieces = split(batch, 2)
    assert [len(piece.images) for piece in pieces] == [2, 2, 1]
    assert tuple(key for piece in pieces for key in piece.keys) == batch.keys
    for name in ("images", "captions", "boxes", "valid", "text_id"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name))
    said = torch.cat([piece.phrases[piece.phrase] for piece in pieces])
    assert torch.equal(said, batch.phrases[batch.phrase])
    for piece in pieces:
        assert len(piece.phrases) == len(piece.phrase.unique())
    assert split(batch, 5) == [batch]
    assert split(batch, 99)[0] is batch


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for world in (4, 2):
        place, number = rank % world, rank // world  # two worlds of two do the same
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet-{world}-{number}", rank=place, world_size=world,
            timeout=timedelta(seconds=60),
        )  # fmt: skip
        for name in OBJECTIVES:
            for size in (2, 1) if world == 4 else (4, 2):
                found[world, name, size] = measure(name, "uneven", size, place, world)
        found[world, "shared, none", 1] = measure("shared", "none", 8 // world, place, world)
        dist.destroy_process_group()
    torch.save(found, f"{folder}/rank-{rank}.pt")


def test_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(process, (str(tmp_path),), nprocs=4, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(4)]
    alone = {name: measure(name, "uneven", 8) for name in OBJECTIVES} | {"shared, none": measure("shared", "none", 8)}
    for found in ranks:
        assert len(found) == 22
        for (world, name, _), gradients in found.items():
            assert "part image_text" in gradients
            expected = {k: v for k, v in alone[name].items() if k != "part masked_share"}
            try:
                assert_same(gradients, expected)
            except AssertionError as error:
                raise AssertionError(f"{world} processes, {name}: {error}") from None
