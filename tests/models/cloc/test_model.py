"""The model: what its features are, which parameters learn, and what it can start from. Tiny ones for the others."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vesl.models.cloc.data import Batch, text_id
from vesl.models.cloc.model import AttentionPool, Cloc
from vesl.models.cloc.objective import cloc_loss
from vesl.models.cloc.options import Model, Objective
from vesl.models.cloc.text import Text, learn_text
from vesl.models.contract import ModelError

TEXTS = ["a red kite over the sea", "two dogs and a ball", "the blue door of a house", "a red kite", "a dog", "a ball"]
TINY = Model(
    image_px=32, patch_px=8, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, embed_dim=24, context=16, tokenizer="bpe:300",
)  # fmt: skip


@cache
def words() -> Text:
    """A tokenizer of 300 tokens."""
    return learn_text(TEXTS, 300)


def tiny(objective: Objective | None = None, seed: int = 0, **changes: Any) -> Cloc:
    """A model of TINY's size, the same for the same arguments."""
    torch.manual_seed(seed)
    return Cloc(dataclasses.replace(TINY, **changes), objective or Objective(), words())


def batch_of(counts: tuple[int, ...] = (2, 0, 3, 1), slots: int = 3, seed: int = 0) -> Batch:
    """An image for each of `counts`, with so many regions; phrases repeat."""
    chance = np.random.default_rng(seed)
    n = len(counts)
    valid = np.arange(slots) < np.array(counts)[:, None]
    phrase = chance.integers(0, 3, (n, slots)) * valid
    corners = np.sort(chance.random((n, slots, 2, 2), np.float32), 2) * [[0.5, 0.5]] + [[0, 0], [0.4, 0.4]]
    names = np.array([text_id(text) for text in TEXTS[3:]])
    return Batch(
        images=torch.from_numpy(chance.integers(0, 256, (n, 3, 32, 32), np.uint8)),
        captions=torch.from_numpy(words()([f"{TEXTS[i % 3]} {i}" for i in range(n)], 16)),
        boxes=torch.from_numpy((corners.reshape(n, slots, 4) * valid[..., None]).astype(np.float32)),
        valid=torch.from_numpy(valid),
        phrases=torch.from_numpy(words()(TEXTS[3:], 16)),
        phrase=torch.from_numpy(phrase),
        text_id=torch.from_numpy(np.where(valid, names[phrase], 0)),
        keys=tuple(map(str, range(n))),
    )


def without_gradient(model: Cloc, batch: Batch, objective: Objective) -> list[str]:
    model.zero_grad()
    cloc_loss(model(batch), batch, objective, 0)[0].backward()  # type: ignore[no-untyped-call]
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_features_of_a_batch() -> None:
    model, batch = tiny(), batch_of()
    found = model(batch)
    assert found.region is not None
    assert found.phrase is not None
    assert found.box is not None
    assert found.image.shape == found.caption.shape == (4, 24)
    assert found.region.shape == found.phrase.shape == (4, 3, 24)
    assert found.box.shape == (4, 3, 4)
    for unit in (found.image, found.caption, found.region, found.phrase):
        torch.testing.assert_close(unit.norm(dim=-1), torch.ones(unit.shape[:-1]))
    assert found.scale.item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert found.region_scale is found.scale


def test_one_phrase_has_one_embedding_wherever_it_stands() -> None:
    model, batch = tiny(), batch_of((3, 3, 3, 3))
    batch.phrase = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0], [2, 1, 1]])
    seen: list[int] = []
    model.clip.text_model.register_forward_pre_hook(
        lambda *call: seen.append(len(call[2]["input_ids"])), with_kwargs=True
    )
    phrase = model(batch).phrase
    assert sorted(seen) == [3, 4]  # three phrases and four captions: no text twice
    embedded = model.text(batch.phrases)
    torch.testing.assert_close(phrase, embedded[batch.phrase])
    assert torch.equal(phrase[0, 2], phrase[1, 1])
    assert (embedded[0] - embedded[1]).abs().max() > 1e-3


def test_pixels_are_normalised_as_clip_does() -> None:
    model, grey = tiny(), torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    seen: list[torch.Tensor] = []
    model.clip.vision_model.register_forward_pre_hook(
        lambda *call: seen.append(call[2]["pixel_values"]), with_kwargs=True
    )
    model.image(grey)
    expected = [(128 / 255 - 0.48145466) / 0.26862954, (128 / 255 - 0.4578275) / 0.26130258]
    assert seen[0][0, :2, 5, 7].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_weight_of_zero_is_a_plain_clip() -> None:
    objective = Objective(region_weight=0)
    model, batch = tiny(objective), batch_of()
    assert all(name.startswith("clip.") for name, _ in model.named_parameters())
    found = model(batch)
    assert (found.region, found.phrase, found.box, found.region_scale) == (None, None, None, None)
    assert without_gradient(model, batch, objective) == []


@pytest.mark.parametrize("counts", [(2, 0, 3, 1), (0, 0, 0, 0)])
@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (Objective(), {}),
        (Objective(temperatures="own", grounding="l1_giou"), {}),
        (Objective(), {"pool": "attention"}),
        (Objective(), {"prompt_pool": "image"}),
        (Objective(), {"positions": False}),
        (Objective(grounding="none"), {}),
        (Objective(grounding="none"), {"region": "roialign"}),
    ],
)
def test_every_parameter_learns(objective: Objective, changes: Any, counts: tuple[int, ...]) -> None:
    """Also where a batch has no region: processes wait for each other's gradient of every parameter."""
    model, batch = tiny(objective, **changes), batch_of(counts)
    missing = without_gradient(model, batch, objective)
    assert missing == []
    if sum(counts) and objective.grounding != "none":
        still = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
        assert [name for name in still if "k_proj.bias" not in name] == []  # a bias of keys cancels in a softmax


def test_attention_pooling_is_one_learned_query() -> None:
    torch.manual_seed(0)
    pool, tokens = AttentionPool(8, 2), torch.randn(3, 5, 8)
    torch.testing.assert_close(pool(tokens), pool(tokens[:, torch.tensor([3, 1, 4, 0, 2])]))
    torch.testing.assert_close(pool(tokens)[1:], pool(tokens[1:]))
    torch.testing.assert_close(pool(tokens[:, :1].expand(-1, 5, -1)), pool(tokens[:, :1]))
    model, batch = tiny(pool="attention"), batch_of()
    assert (model(batch).image - tiny()(batch).image).abs().max() > 1e-3


def test_scales_are_held_at_a_hundred() -> None:
    model = tiny(Objective(temperatures="own"))
    assert model.region_scale is not None
    assert model.region_scale is not model.clip.logit_scale
    torch.nn.init.constant_(model.clip.logit_scale, 7.0)
    torch.nn.init.constant_(model.region_scale, 3.0)
    model.clamp()
    assert model.clip.logit_scale.exp().item() == pytest.approx(100)
    assert model.region_scale.item() == 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP as others save it, with its tokenizer."""
    path: Path = tmp_path_factory.mktemp("clip")
    tiny(seed=7).clip.save_pretrained(path)
    words().save(path)
    return path


def test_it_starts_from_a_clip(folder: Path) -> None:
    model, theirs = tiny(init=str(folder), vision_width=64), tiny(seed=7)  # sizes are those of the weights
    assert model.image_px == 32
    ours = model.clip.state_dict()
    for name, value in theirs.clip.state_dict().items():
        assert torch.equal(ours[name], value), name
    assert not torch.equal(ours["visual_projection.weight"], tiny().clip.visual_projection.weight)


def test_a_start_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    large = learn_text([f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopq"], 400)
    assert large.size > words().size
    with pytest.raises(ModelError, match=r"train.model.init: .* knows fewer tokens than the tokenizer has"):
        Cloc(dataclasses.replace(TINY, init=str(folder)), Objective(), large)
    for reference in ("org/name", "org/name@", "name@1", "/no/such/folder", "/no/such@folder", ""):
        if reference:
            with pytest.raises(ModelError, match="is neither a folder nor org/name@revision"):
                tiny(init=reference)
    with pytest.raises(ModelError, match=r"^train.model.init: "):
        tiny(init=str(tmp_path))
    with pytest.raises(ModelError, match=r"^train.model.init: nobody/nothing@main: "):
        tiny(init="nobody/nothing@main")


def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(tiny(seed=7).clip.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        tiny(init=str(tmp_path))


def test_a_damaged_start_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(ModelError) as caught:
        tiny(init=str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError):
        tiny(init=str(tmp_path))


def test_a_text_is_pooled_at_its_end_token(folder: Path, tmp_path: Path) -> None:
    """Also where the weights' own configuration names another one: their tokenizer may have been replaced."""
    config = (folder / "config.json").read_text()
    assert '"eos_token_id": 1' in config
    for name in ("model.safetensors",):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for other in ("2", "49407"):  # 2: transformers would look for the highest id
        (tmp_path / "config.json").write_text(config.replace('"eos_token_id": 1', f'"eos_token_id": {other}'))
        ids = torch.from_numpy(words()(TEXTS, 16))
        torch.testing.assert_close(tiny(init=str(tmp_path)).text(ids), tiny(init=str(folder)).text(ids))


def test_an_end_token_that_transformers_takes_for_another_is_refused() -> None:
    text = Text(words().tokenizer)
    text.end_id = 2
    with pytest.raises(ModelError, match=r"train.model.tokenizer: ends texts in token 2"):
        Cloc(TINY, Objective(), text)
