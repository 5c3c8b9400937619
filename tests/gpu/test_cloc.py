"""CLOC on an accelerator: `pytest -m gpu tests/gpu -s` prints the figures; the assertions are loose sanity bounds."""

import statistics

import pytest
import torch

from tests.bench.cloc_step import SIZES, Contestant, made
from vesl.models.cloc.gradients import split
from vesl.models.cloc.journal import PEAK_FLOPS
from vesl.models.cloc.losses import region_text_loss
from vesl.models.cloc.options import Objective

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")]


@pytest.mark.parametrize(("size", "images"), [("b16", 256), ("l14", 64)])
def test_a_step_in_bf16(size: str, images: int) -> None:
    device = torch.device("cuda")
    batch = [made(SIZES[size], images, device)]
    seconds, flops = {}, {}
    for name, objective in (("cloc", Objective()), ("clip", Objective(region_weight=0.0))):
        torch.cuda.reset_peak_memory_stats()
        contestant = Contestant(SIZES[size], objective, device)
        flops[name] = contestant.flops(batch)
        for _ in range(3):
            contestant.step(batch)
        seconds[name] = statistics.median(contestant.step(batch) for _ in range(10))
        peak = next((p for key, p in PEAK_FLOPS.items() if key in torch.cuda.get_device_name()), float("nan"))
        print(
            f"{size} {name}: {images / seconds[name]:.0f} samples/s, MFU {flops[name] / seconds[name] / peak:.2f}, "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        )
        del contestant
    ratio, counted = seconds["cloc"] / seconds["clip"], flops["cloc"] / flops["clip"]
    print(f"{size}: time ratio {ratio:.3f}, operations ratio {counted:.3f}, one over the other {ratio / counted:.3f}")
    assert ratio < 2


def test_a_batch_of_8192_images_by_gradient_caching_and_tiles() -> None:
    device, images = torch.device("cuda"), 8192
    contestant = Contestant(SIZES["b16"], Objective(tile=2048), device)
    batches = split(made(SIZES["b16"], images, device), 512)
    contestant.step(batches)
    torch.cuda.reset_peak_memory_stats()
    seconds = contestant.step(batches)
    gib = torch.cuda.max_memory_allocated() / 2**30
    print(f"b16, {images} images: {images / seconds:.0f} samples/s, {gib:.1f} GiB")
    assert all(bool(torch.isfinite(p).all()) for p in contestant.model.parameters())


def test_tiled_and_whole_losses_agree() -> None:
    torch.manual_seed(0)
    regions, texts = (torch.nn.functional.normalize(torch.randn(8192, 512, device="cuda"), dim=-1) for _ in range(2))
    ids = torch.randint(1, 4000, (8192,), device="cuda")
    found = []
    for tile in (None, 1024):
        a, b = regions.clone().requires_grad_(), texts.clone().requires_grad_()
        scale = torch.tensor(50.0, device="cuda", requires_grad=True)
        loss, _ = region_text_loss(a, b, ids, ids > 400, scale, conflict_cosine=0.9, tile=tile)
        loss.backward()
        assert a.grad is not None
        assert scale.grad is not None
        found.append((loss.detach(), a.grad, scale.grad))
    for whole, tiled in zip(*found, strict=True):
        torch.testing.assert_close(whole, tiled, rtol=1e-4, atol=1e-6)
