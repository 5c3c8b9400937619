"""The losses on one process: against numbers by hand, against loops, and one form against the other."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vesl.models.cloc.losses import gather, grounding_loss, image_text_loss, region_text_loss

TILES = [None, 1, 4, 5, 13, 100]


def features(rows: int, width: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two sets of unit rows, the texts near to each other, so that a cosine of 0.5 parts them."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    b[:, 0] += 2
    return normalize(a, dim=1).to(dtype).requires_grad_(), normalize(b, dim=1).to(dtype).requires_grad_()


def slots(rows: int, valid: float = 0.7, ids: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ids, (rows,), generator=generator), torch.rand(rows, generator=generator) < valid


def scale_of(value: float = 14.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def by_loops(a: Tensor, b: Tensor, ids: Tensor, valid: Tensor, scale: Tensor, cosine: float | None) -> Any:
    """The definition, pair by pair: the loss as a graph, and the masked share."""
    rows = [i for i in range(len(a)) if valid[i]]
    cosines, total, masked = (b @ b.T).tolist(), torch.zeros((), dtype=a.dtype), 0
    for i in rows:
        stay = []
        for j in rows:
            out = i != j and (ids[i] == ids[j] or (cosine is not None and cosines[i][j] > cosine))
            masked += out
            if not out:
                stay.append(j)
        logits, reverse = torch.stack([a[i] @ b[j] for j in stay]), torch.stack([b[i] @ a[j] for j in stay])
        own = stay.index(i)
        total = total - torch.log_softmax(scale * logits, 0)[own] / 2 - torch.log_softmax(scale * reverse, 0)[own] / 2
    return total / max(len(rows), 1), masked / max(len(rows) * (len(rows) - 1), 1)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_equal(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# --- image-text


def test_image_text_by_hand() -> None:
    e = torch.eye(2)
    log = math.log
    assert image_text_loss(e, e, torch.tensor(3.0)).item() == pytest.approx(log(1 + math.exp(-3)))
    # Both texts alike: rows of logits (1, 1) and (0, 0), columns (1, 0) and (1, 0) with the positives 1 and 0.
    loss = image_text_loss(e, e[[0, 0]], torch.tensor(1.0))
    assert loss.item() == pytest.approx((log(2) + (log(1 + 1 / math.e) + log(1 + math.e)) / 2) / 2)


@pytest.mark.parametrize("tile", TILES)
def test_image_text_is_the_definition(tile: int | None) -> None:
    (a, b), scale = features(13), scale_of()
    loss = image_text_loss(a, b, scale, tile=tile)
    expected, _ = by_loops(a, b, torch.arange(13), torch.ones(13, dtype=torch.bool), scale, None)
    assert_equal([loss, *gradients(loss, a, b, scale)], [expected, *gradients(expected, a, b, scale)])


# --- region-text


def test_region_text_by_hand() -> None:
    """Regions x, y, y with the texts x, x (one phrase), y: the two slots of the phrase are no negatives."""
    x, y = torch.eye(2)
    regions, texts = torch.stack([x, y, y]), torch.stack([x, x, y])
    loss, share = region_text_loss(
        regions,
        texts,
        torch.tensor([7, 7, 8]),
        torch.ones(3, dtype=torch.bool),
        torch.tensor(1.0),
        conflict_cosine=None,
    )
    e = math.e
    rows = [math.log(1 + 1 / e), math.log(1 + e), math.log(e + 2) - 1]  # logits (1, -, 0), (-, 0, 1), (0, 0, 1)
    columns = [math.log(e + 1) - 1, math.log(1 + 1), math.log(2 * e + 1) - 1]  # (1, -, 0), (-, 0, 0), (0, 1, 1)
    assert share.item() == pytest.approx(2 / 6)
    assert loss.item() == pytest.approx((sum(rows) + sum(columns)) / 6)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("cosine", [None, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_region_text_is_the_definition(tile: int | None, cosine: float | None, seed: int) -> None:
    (a, b), (ids, valid), scale = features(13, seed=seed), slots(13, seed=seed), scale_of()
    loss, share = region_text_loss(a, b, ids, valid, scale, conflict_cosine=cosine, tile=tile)
    expected, expected_share = by_loops(a, b, ids, valid, scale, cosine)
    assert 0 < expected_share < 1
    assert share.item() == pytest.approx(expected_share)
    assert not share.requires_grad
    assert_equal([loss, *gradients(loss, a, b, scale)], [expected, *gradients(expected, a, b, scale)])


@pytest.mark.parametrize("tile", [None, 2])
def test_duplicates_are_no_negatives(tile: int | None) -> None:
    """One phrase in all slots, whatever its features: nothing to tell apart, so no loss and no gradient."""
    (a, b), scale = features(5), scale_of()
    ids, valid = torch.full((5,), -(2**63)), torch.ones(5, dtype=torch.bool)
    loss, share = region_text_loss(a, b, ids, valid, scale, conflict_cosine=None, tile=tile)
    assert (loss.item(), share.item()) == (pytest.approx(0, abs=1e-12), 1)
    assert all(g.abs().max() < 1e-12 for g in gradients(loss, a, b, scale))


def test_ids_are_compared_as_integers() -> None:
    (a, b), scale = features(2), scale_of()
    ids = torch.tensor([2**62, 2**62 + 1])  # one number as floats
    _, share = region_text_loss(a, b, ids, torch.ones(2, dtype=torch.bool), scale, conflict_cosine=None)
    assert share.item() == 0


@pytest.mark.parametrize("tile", [None, 1])
def test_conflicts_are_above_the_cosine(tile: int | None) -> None:
    texts = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # cosines 0.8, 0.6, 0
    ids, valid = torch.arange(3), torch.ones(3, dtype=torch.bool)
    for cosine, masked in [(0.81, 0), (0.79, 2), (0.59, 4), (-0.1, 6), (-2, 6)]:
        loss, share = region_text_loss(texts, texts, ids, valid, torch.tensor(5.0), conflict_cosine=cosine, tile=tile)
        assert share.item() == pytest.approx(masked / 6)
        assert torch.isfinite(loss)  # the positive stays, though its cosine is 1
        assert (loss.abs().item() < 1e-5) == (masked == 6)


@pytest.mark.parametrize("tile", [None, 3])
def test_no_gradient_through_the_mask(tile: int | None) -> None:
    """What it hides gets none from the hidden pair: a text in conflict with all others is as if alone."""
    (a, b), scale = features(6), scale_of()
    shifted = b.detach().clone()
    shifted[0] = normalize(shifted[1:].sum(0), dim=0)
    shifted.requires_grad_()
    cosine = (shifted[0] @ shifted[1:].T).min().item() - 1e-6
    ids, valid = torch.arange(6), torch.ones(6, dtype=torch.bool)
    loss, _ = region_text_loss(a, shifted, ids, valid, scale, conflict_cosine=cosine, tile=tile)
    assert gradients(loss, shifted)[0][0].abs().max() < 1e-12


@pytest.mark.parametrize("tile", [None, 4])
def test_order_does_not_matter(tile: int | None) -> None:
    (a, b), (ids, valid), scale = features(13), slots(13), scale_of()
    loss, share = region_text_loss(a, b, ids, valid, scale, conflict_cosine=0.5, tile=tile)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))
    shuffled, shuffled_share = region_text_loss(
        a[order], b[order], ids[order], valid[order], scale, conflict_cosine=0.5, tile=tile
    )
    assert shuffled_share == share
    assert_equal([shuffled, *gradients(shuffled, a, b, scale)], [loss, *gradients(loss, a, b, scale)])


@pytest.mark.parametrize("tile", [None, 4])
def test_invalid_slots_are_not_looked_at(tile: int | None) -> None:
    """Anything may be in them: the loss is that of the others, and they get no gradient."""
    (a, b), (ids, valid), scale = features(13), slots(13), scale_of()
    expected, expected_share = region_text_loss(
        a[valid], b[valid], ids[valid], valid[valid], scale, conflict_cosine=0.5, tile=tile
    )
    wanted = [expected, *gradients(expected, a, b, scale)]
    for rubbish in (0.0, math.nan, math.inf, 1e30):
        x, y = (v.detach().clone() for v in (a, b))
        x[~valid], y[~valid] = rubbish, rubbish
        x.requires_grad_(), y.requires_grad_()
        loss, share = region_text_loss(x, y, ids, valid, scale, conflict_cosine=0.5, tile=tile)
        g = gradients(loss, x, y, scale)
        assert share == expected_share
        assert all(not v[~valid].any() for v in g[:2])
        assert_equal([loss, *g], wanted)


@pytest.mark.parametrize("tile", [None, 1, 4, 50])
@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_tell_apart(tile: int | None, count: int) -> None:
    (a, b), (ids, _), scale = features(5), slots(5), scale_of()
    loss, share = region_text_loss(a, b, ids, torch.arange(5) < count, scale, conflict_cosine=0.5, tile=tile)
    assert (loss.item(), share.item()) == (pytest.approx(0, abs=1e-12), 0)
    assert all(torch.equal(g.abs().round(decimals=12), torch.zeros_like(g)) for g in gradients(loss, a, b, scale))


@pytest.mark.parametrize("tile", [None, 4])
def test_what_is_not_finite_shows(tile: int | None) -> None:
    a, b = (x.detach() for x in features(6))
    a[2, 3] = math.nan
    ids, valid = torch.arange(6), torch.ones(6, dtype=torch.bool)
    assert image_text_loss(a, b, scale_of(), tile=tile).isnan()
    assert region_text_loss(a, b, ids, valid, scale_of(), conflict_cosine=0.5, tile=tile)[0].isnan()


# --- both forms, precision, memory


@pytest.mark.parametrize(("rows", "tile"), [(1, 1), (7, 3), (64, 16), (65, 16), (65, 64), (10, 1000)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_tiles_change_nothing_in_float32(rows: int, tile: int, scale: float) -> None:
    (a, b), (ids, valid) = features(rows, 32, dtype=torch.float32), slots(rows, ids=rows)
    s = scale_of(scale, torch.float32)

    def both(tile: int | None) -> list[Tensor]:
        first = image_text_loss(a, b, s, tile=tile)
        second, share = region_text_loss(a, b, ids, valid, s, conflict_cosine=0.6, tile=tile)
        return [first, second, share, *gradients(first, a, b, s), *gradients(second, a, b, s)]

    assert_equal(both(tile), both(None), 1e-5)


@pytest.mark.parametrize("tile", [None, 2])
def test_gradcheck(tile: int | None) -> None:
    (a, b), (ids, valid), scale = features(5, 3), slots(5, 0.8, 3), scale_of(3.0)
    assert torch.autograd.gradcheck(lambda a, b, s: image_text_loss(a, b, s, tile=tile), (a, b, scale))
    assert torch.autograd.gradcheck(
        lambda a, b, s: region_text_loss(a, b, ids, valid, s, conflict_cosine=0.95, tile=tile)[0], (a, b, scale)
    )
    # The second of two ranks, whose columns have gradients of their own.
    (all_a, all_b), (all_ids, all_valid) = features(10, 3), slots(10, 0.8, 3)
    x, y = (v.detach()[5:].clone().requires_grad_() for v in (all_a, all_b))

    def local(x: Tensor, y: Tensor, all_a: Tensor, all_b: Tensor, scale: Tensor) -> Tensor:
        everyone = {"all_text_id": all_ids, "all_valid": all_valid, "offset": 5, "tile": tile}
        return region_text_loss(
            x,
            y,
            all_ids[5:],
            all_valid[5:],
            scale,
            conflict_cosine=0.95,
            all_regions=all_a,
            all_texts=all_b,
            **everyone,
        )[0] + image_text_loss(x, y, scale, all_images=all_a, all_texts=all_b, offset=5, tile=tile)

    assert torch.autograd.gradcheck(local, (x, y, all_a, all_b, scale))


@pytest.mark.parametrize("tile", [None, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("pattern", ["some", "one rank has none", "none"])
def test_ranks_average_to_the_global_loss(tile: int | None, world: int, pattern: str) -> None:
    """The ranks of a world one after the other; their columns are one leaf, as if gathered."""
    rows = 12
    (a, b), (ids, valid), scale = features(rows), slots(rows), scale_of()
    if pattern != "some":
        valid &= (torch.arange(rows) >= rows // world) if pattern == "one rank has none" else False
    expected, _ = region_text_loss(a, b, ids, valid, scale, conflict_cosine=0.5)
    expected = expected + image_text_loss(a, b, scale)
    losses = []
    for rank in range(world):
        here = slice(rank * rows // world, (rank + 1) * rows // world)
        everyone = {"all_text_id": ids, "all_valid": valid, "all_regions": a, "all_texts": b}
        at: Any = {"offset": here.start, "tile": tile}
        loss, _ = region_text_loss(
            a[here], b[here], ids[here], valid[here], scale, conflict_cosine=0.5, **everyone, **at
        )
        losses.append(loss + image_text_loss(a[here], b[here], scale, all_images=a, all_texts=b, **at))
    mean = torch.stack(losses).mean()
    assert_equal([mean, *gradients(mean, a, b, scale)], [expected, *gradients(expected, a, b, scale)])


@pytest.mark.parametrize("tile", [None, 4])
def test_share_is_of_the_local_rows(tile: int | None) -> None:
    """Slots 0 and 1 with one phrase lie on the first of two ranks: all of its pairs with them, none of the other's."""
    (a, b), scale = features(4), scale_of()
    ids, valid = torch.tensor([9, 9, 1, 2]), torch.ones(4, dtype=torch.bool)
    everyone: Any = {"all_regions": a, "all_texts": b, "all_text_id": ids, "all_valid": valid, "tile": tile}
    shares = [
        region_text_loss(
            a[k : k + 2],
            b[k : k + 2],
            ids[k : k + 2],
            valid[k : k + 2],
            scale,
            conflict_cosine=None,
            offset=k,
            **everyone,
        )[1].item()
        for k in (0, 2)
    ]
    assert shares == [pytest.approx(2 / 6), 0]


@pytest.mark.parametrize("tile", [None, 4])
def test_autocast_changes_nothing(tile: int | None) -> None:
    (a, b), (ids, valid) = features(13, 64, dtype=torch.float32), slots(13)
    scale = scale_of(100.0, torch.float32)

    def both(autocast: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = image_text_loss(a, b, scale, tile=tile)
            second, share = region_text_loss(a, b, ids, valid, scale, conflict_cosine=0.5, tile=tile)
        return [first, second, share, *gradients(first, a, b, scale), *gradients(second, a, b, scale)]

    assert_equal(both(True), both(False), 0)
    # bf16 features: their own values, not sums in bf16
    x, y = a.bfloat16(), b.bfloat16()
    low = image_text_loss(x, y, scale.bfloat16(), tile=tile)
    assert low.dtype == torch.float32
    assert_equal([low], [image_text_loss(x.float(), y.float(), scale, tile=tile)], 1e-6)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that anything makes meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tile", [None, 2, 7])
def test_tiles_bound_the_memory(tile: int | None, ranks: int) -> None:
    rows, width = 60, 4
    (a, b), ids = features(rows, width), torch.arange(rows)
    valid, here = torch.ones(rows, dtype=torch.bool), slice(0, rows // ranks)
    everyone: Any = {"all_regions": a, "all_texts": b, "all_text_id": ids, "all_valid": valid} if ranks > 1 else {}
    with Largest() as largest:
        loss, _ = region_text_loss(
            a[here], b[here], ids[here], valid[here], scale_of(), conflict_cosine=0.5, tile=tile, **everyone
        )
        loss.backward()  # type: ignore[no-untyped-call]
    assert largest.elements == (max(tile * rows, rows * width) if tile else rows * rows // ranks)


def test_what_does_not_fit_is_refused() -> None:
    (a, b), (ids, valid), scale = features(4), slots(4), scale_of()
    wrong: list[Callable[[], object]] = [
        lambda: image_text_loss(a, b[:3], scale),
        lambda: image_text_loss(a, b, scale, all_images=a),
        lambda: image_text_loss(a, b, scale, all_images=a, all_texts=b, offset=1),
        lambda: image_text_loss(a[:3], b[:3], scale, all_images=a, all_texts=b),
        lambda: image_text_loss(a[:2], b[:2], scale, all_images=a, all_texts=b, offset=-1),
        lambda: image_text_loss(a, b, scale, tile=-1),
        lambda: region_text_loss(a, b, ids[:3], valid, scale, conflict_cosine=None),
        lambda: region_text_loss(a, b, ids, valid, scale, conflict_cosine=None, all_valid=valid),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match=r"rows|tile -1"):
            call()


def test_one_rank_gathers_itself() -> None:
    x = torch.ones(3)
    assert gather(x) is x


# --- grounding


def boxes(*rows: tuple[float, float, float, float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64)


def ground(predicted: Tensor, target: Tensor, kind: Any = "l1_giou", **options: Any) -> float:
    return grounding_loss(predicted, target, torch.ones(target.shape[:2], dtype=torch.bool), kind, **options).item()


def test_grounding_by_hand() -> None:
    target, other = boxes((0.2, 0.2, 0.6, 0.6)), boxes((0.4, 0.4, 0.8, 0.8))
    assert ground(target, target) == ground(target, target, "mse") == 0
    assert ground(other, target, "mse") == pytest.approx(0.04)
    # overlap 0.04, union 0.28, hull 0.36
    assert ground(other, target) == pytest.approx(0.2 + 1 - (1 / 7 - 8 / 36))
    # apart: hull 1, union 0.02
    assert ground(boxes((0, 0, 0.1, 0.1)), boxes((0.9, 0.9, 1, 1))) == pytest.approx(0.9 + 1 + 0.98)
    # two valid of three: a mean over regions and coordinates
    three, valid = boxes((0, 0, 1, 1), (0, 0, 1, 0.5), (9, 9, 9, 9)), torch.tensor([[True, True, False]])
    wanted = boxes((0, 0, 1, 1), (0, 0, 1, 1), (0, 0, 1, 1))
    assert grounding_loss(three, wanted, valid, "mse").item() == pytest.approx(0.25 / 4 / 2)
    assert grounding_loss(three, wanted, valid, "l1_giou").item() == pytest.approx((0.5 / 4 + 0.5) / 2)


def test_a_prediction_the_wrong_way_round_is_empty() -> None:
    target = boxes((0.2, 0.2, 0.6, 0.6))
    assert ground(target[..., [2, 1, 0, 3]], target) == pytest.approx(0.2 + 1)
    assert ground(target[..., [2, 3, 0, 1]], target) == pytest.approx(0.4 + 1)  # two negative sides are no area


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_grounding_is_finite_with_finite_gradients(kind: Any) -> None:
    odd = [0.0, 0.3, 0.3000001, 0.5, 1.0, -2.0, 1e4]
    predicted = torch.tensor([list(itertools.product(odd, repeat=4))], requires_grad=True)  # float32
    for target in [(0.3, 0.3, 0.5, 0.5), (0.3, 0.3, 0.3, 0.3), (0.3, 0.3, 0.3, 1.0), (0.0, 0.0, 1.0, 1.0)]:
        wanted = torch.tensor(target).expand_as(predicted)
        loss = grounding_loss(predicted, wanted, torch.ones(predicted.shape[:2], dtype=torch.bool), kind)
        (gradient,) = gradients(loss, predicted)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        away = (predicted.detach() - wanted).abs() > 1e-3
        assert (gradient.abs().sum(-1) > 0)[away.any(-1)].all()  # every box that is off is moved


def test_giou_is_in_range_and_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.rand(1, 200, 4, generator=generator, dtype=torch.float64)
    corners = torch.rand(2, 1, 200, 2, generator=generator, dtype=torch.float64)
    target, valid = torch.cat([corners.amin(0), corners.amax(0)], -1), torch.ones(1, 200, dtype=torch.bool)
    one = [grounding_loss(predicted[:, [i]], target[:, [i]], valid[:, [i]], "l1_giou") for i in range(200)]
    l1 = (predicted - target).abs().mean(-1)[0]
    assert ((torch.stack(one) - l1) >= -1e-12).all()
    assert ((torch.stack(one) - l1) <= 2 + 1e-12).all()
    few = predicted[:, :9].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: grounding_loss(p, target[:, :9], valid[:, :9], "l1_giou"), (few,))


@pytest.mark.parametrize("start", [(0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 0.7, 0.7), (0.05, 0.05, 0.05, 0.9), (0, 0, 1, 1)])
def test_descent_finds_the_box(start: tuple[float, float, float, float]) -> None:
    target, predicted = boxes((0.2, 0.3, 0.6, 0.5)), boxes(start).requires_grad_()
    optimiser = torch.optim.Adam([predicted], lr=0.02)
    for step in range(300):
        optimiser.param_groups[0]["lr"] = 0.02 * (1 - step / 300)
        optimiser.zero_grad()
        loss = grounding_loss(predicted, target, torch.ones(1, 1, dtype=torch.bool), "l1_giou")
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert (predicted - target).abs().max() < 0.01


@pytest.mark.parametrize("kind", ["mse", "l1_giou"])
def test_invalid_boxes_are_not_looked_at(kind: Any) -> None:
    predicted = torch.tensor([[[0.1, 0.1, 0.5, 0.5], [math.nan] * 4]], requires_grad=True)
    target, valid = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0] * 4]]), torch.tensor([[True, False]])
    loss = grounding_loss(predicted, target, valid, kind)
    (gradient,) = gradients(loss, predicted)
    assert loss.item() == pytest.approx(grounding_loss(predicted[:, :1], target[:, :1], valid[:, :1], kind).item())
    assert gradient[0, 0].abs().sum() > 0
    assert not gradient[0, 1].any()
    for count in (None, torch.tensor(0.0)):
        nothing = grounding_loss(predicted, target, valid & False, kind, count=count)
        assert nothing.item() == 0
        assert not gradients(nothing, predicted)[0].any()


def test_count_is_the_share_of_all_ranks() -> None:
    target, other = boxes((0.2, 0.2, 0.6, 0.6)), boxes((0.4, 0.4, 0.8, 0.8))
    for count in (3.0, 0.25):  # a quarter: one region on four ranks
        assert ground(other, target, "mse", count=torch.tensor(count)) == pytest.approx(0.04 / count)
