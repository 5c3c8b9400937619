"""The Prompter against a literal transformer layer over [prompt, image], written out here."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (its name everywhere)

from tests.models.cloc.test_model import TINY
from vesl.models.cloc.options import Model
from vesl.models.cloc.prompter import Prompter, encode_points, grid_points, roi_align

WIDTH, DIM, SIDE = 16, 12, 3


def prompter(**changes: object) -> Prompter:
    """In double precision, with no parameter at a value that hides it."""
    torch.manual_seed(1)
    options: Model = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    found = Prompter(options, WIDTH, DIM).double()
    with torch.no_grad():
        for p in found.parameters():
            p += 0.1 * torch.randn_like(p)
    return found


def inputs(boxes: int = 2, texts: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, boxes and texts of two images."""
    torch.manual_seed(2)
    tokens = torch.randn(2, SIDE * SIDE, WIDTH, dtype=torch.float64)
    corners = torch.rand(2, boxes, 2, 2, dtype=torch.float64).sort(2)[0].flatten(2)
    words = F.normalize(torch.randn(2, texts, DIM, dtype=torch.float64), dim=-1)
    return tokens.requires_grad_(), corners.requires_grad_(), words.requires_grad_()


def layer(p: Prompter, x: Tensor) -> Tensor:
    """One transformer encoder layer over one sequence (L, W), every token with every token."""
    keys, values = p.key_value(p.norm_in(x)).chunk(2, -1)
    queries = p.query(p.norm_in(x))
    mixed = torch.stack([torch.softmax((keys @ q) / math.sqrt(WIDTH), 0) @ values for q in queries])
    x = x + p.out(mixed)
    return x + p.mlp[2](F.gelu(p.mlp[0](p.norm_mlp(x))))


def literally(p: Prompter, tokens: Tensor, boxes: Tensor, texts: Tensor, image: bool) -> tuple[Tensor, Tensor]:
    """One image and one prompt at a time; the output averaged over the prompt's tokens, or over the image's."""
    regions, found = [], []
    for n in range(len(tokens)):
        placed = tokens[n] + encode_points(grid_points(SIDE, tokens.device), WIDTH) * p.options.positions
        z = []
        for box in boxes[n]:
            prompt = encode_points(box.view(2, 2), WIDTH) + p.corners
            out = layer(p, torch.cat([prompt, placed]))
            z.append(out[2:].mean(0) if image else (out[0] + out[1]) / 2)
        regions.append(torch.stack([p.project(p.norm_out(each)) for each in z]))
        z = []
        for text in texts[n]:
            out = layer(p, torch.cat([p.from_text(text * math.sqrt(DIM))[None], placed]))
            z.append(out[1:].mean(0) if image else out[0])
        found.append(torch.stack([p.box(p.project(p.norm_out(each))) for each in z]))
    return torch.stack(regions), torch.stack(found)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize("pool", ["prompt", "image"])
def test_it_is_a_transformer_layer_per_prompt(pool: str, positions: bool) -> None:
    p, (tokens, boxes, texts) = prompter(prompt_pool=pool, positions=positions), inputs(3, 2)
    ours = p(tokens, boxes, texts)
    theirs = literally(p, tokens, boxes, texts, pool == "image")
    leaves = [tokens, texts, *p.parameters()]
    weights = [torch.randn_like(x) for x in ours]
    gradients = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, found, strict=True)), leaves, retain_graph=True)
        for found in (ours, theirs)
    ]
    for x, y in zip((*ours, *gradients[0]), (*theirs, *gradients[1]), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert all(x.abs().max() > 1e-4 for x in gradients[0])


@pytest.mark.parametrize("pool", ["prompt", "image"])
def test_prompts_do_not_see_each_other(pool: str) -> None:
    p, (tokens, boxes, texts) = prompter(prompt_pool=pool), inputs()
    regions, found = p(tokens, boxes, texts)
    more = torch.cat([boxes, torch.tensor([0.0, 0.1, 1.0, 0.9]).expand(2, 1, 4)], 1)
    torch.testing.assert_close(p(tokens, more, texts.flip(1))[0][:, :2], regions)
    torch.testing.assert_close(p(tokens, boxes[:, :1], None)[0], regions[:, :1])
    torch.testing.assert_close(p(tokens, more, texts.flip(1))[1].flip(1), found)
    torch.testing.assert_close(p(tokens, None, texts)[1], found)
    torch.testing.assert_close(p(tokens[1:], boxes[1:], texts[1:])[0], regions[1:])  # nor do images


def test_nothing_asked() -> None:
    p, (tokens, boxes, texts) = prompter(), inputs()
    regions, found = p(tokens, None, None)
    assert (regions.shape, found.shape) == ((2, 0, DIM), (2, 0, 4))
    assert p(tokens, boxes, None)[1].shape == (2, 0, 4)
    assert p(tokens, None, texts)[0].shape == (2, 0, DIM)


def test_places_matter() -> None:
    p, (tokens, boxes, _) = prompter(), inputs(1)
    regions, _ = p(tokens, boxes, None)
    for i in range(4):
        moved = boxes.detach().clone()
        moved[..., i] += 0.05
        assert (p(tokens, moved, None)[0] - regions).abs().max() > 1e-3
    assert (p(tokens, boxes[..., [2, 3, 0, 1]], None)[0] - regions).abs().max() > 1e-3  # which corner is which
    order = torch.randperm(SIDE * SIDE)
    assert (p(tokens[:, order], boxes, None)[0] - regions).abs().max() > 1e-3
    blind = prompter(positions=False)
    torch.testing.assert_close(blind(tokens[:, order], boxes, None)[0], blind(tokens, boxes, None)[0])


def test_the_encoding_of_points() -> None:
    # Width 8: a quarter of a wave and sixteen waves over the image; sines and cosines of x, then of y.
    half = math.sqrt(0.5)
    found = encode_points(torch.tensor([[0.5, 1.0], [0.0, 1 / 64]]), 8)
    assert found[0].tolist() == pytest.approx([half, 0, half, 1, 1, 0, 0, 1], abs=1e-4)
    tiny = math.pi / 128
    assert found[1].tolist() == pytest.approx([0, 0, 1, 1, math.sin(tiny), 1, math.cos(tiny), 0], abs=1e-4)
    assert encode_points(torch.zeros(5, 3, 2), 4).shape == (5, 3, 4)
    assert grid_points(2, torch.device("cpu")).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_roi_align() -> None:
    boxes = torch.tensor([[[0.2, 0.3, 0.7, 0.5], [0.25, 0.15, 0.85, 0.75], [0.5, 0.5, 0.5, 0.5]]]).double()
    constant = roi_align(torch.full((1, 25, 2), 3.5).double(), boxes)
    torch.testing.assert_close(constant, torch.full((1, 3, 2), 3.5).double())
    ramp = grid_points(5, torch.device("cpu"))[None].double()  # each token holds its own x and y
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    torch.testing.assert_close(roi_align(ramp, boxes), centres, rtol=1e-5, atol=1e-5)
    two = roi_align(torch.cat([ramp, 2 * ramp]), boxes.expand(2, 3, 4))
    torch.testing.assert_close(two[1], 2 * centres[0], rtol=1e-5, atol=1e-5)


def test_roi_align_beyond_the_outermost_centres() -> None:
    # Left of the first centre (x = 0.25 of 2 x 2) the field is flat: of the samples at (i + 1/2) / 14 in 0..0.5,
    # seven are there, and the other seven lie on the ramp from 0 to 1.
    tokens = torch.tensor([[0.0, 1.0, 0.0, 1.0]]).view(1, 4, 1)
    xs = [(i + 0.5) / 28 for i in range(14)]
    expected = sum(max(0.0, (x - 0.25) * 2) for x in xs) / 14
    found = roi_align(tokens, torch.tensor([[[0.0, 0.0, 0.5, 1.0]]]))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert expected > 0.1


def test_regions_by_roi_align() -> None:
    p, (tokens, boxes, texts) = prompter(region="roialign"), inputs()
    regions, found = p(tokens, boxes, texts)
    torch.testing.assert_close(regions, p.project(p.norm_out(roi_align(tokens, boxes))))
    torch.testing.assert_close(found, prompter()(tokens, boxes, texts)[1])  # texts are grounded as ever
    moved, _ = p(tokens, boxes.detach() * 0.5, texts)
    assert (moved - regions).abs().max() > 1e-3
