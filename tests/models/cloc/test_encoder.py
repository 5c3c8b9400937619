"""A finished model: its export is a CLIP that transformers opens, and `Encoder` answers as the model in memory."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.models.cloc.test_model import TEXTS, TINY, tiny, words
from vesl.models.cloc import checkpoint
from vesl.models.cloc.encoder import Encoder, export
from vesl.models.cloc.model import Cloc
from vesl.models.cloc.options import Model, Objective
from vesl.models.contract import ModelError

BOXES = [[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.4, 0.7, 0.6]]


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


PICTURES = [picture(), picture(32, 16, 1), picture(16, 32, 2), picture(50, 37, 3), picture(3, 300, 4)]


def encoder(objective: Objective | None = None, by: str = "prompter", **changes: Any) -> Encoder:
    return Encoder(tiny(objective, **changes), words(), by=by)


def exported(folder: Path, objective: Objective | None = None, **changes: Any) -> Encoder:
    """A model folder, and its model in memory."""
    objective, options = objective or Objective(), dataclasses.replace(TINY, **changes)
    found = encoder(objective, **changes)
    export(found.model, found.text, options, objective, folder)
    return found


def answers(found: Encoder) -> list[np.ndarray]:
    counts = range(len(PICTURES))
    answer = [found.encode_image(PICTURES), found.encode_text(TEXTS)]
    if found.model.prompter is not None:
        answer += found.encode_regions(PICTURES, [BOXES[: i % 4] for i in counts])
    if found.model.grounds:
        answer += found.ground(PICTURES, [TEXTS[: i % 4] for i in counts])
    return answer


def assert_alike(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for x, y in zip(one, other, strict=True):
        assert x.dtype == y.dtype == np.float32
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("export") / "new" / "model"
    exported(path)
    return path


def test_transformers_reads_the_export(folder: Path) -> None:
    ours, clip = encoder(), CLIPModel.from_pretrained(folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    pixels = processor([PICTURES[0], picture(32, 32, 9)], return_tensors="pt").pixel_values
    with torch.no_grad():
        found = clip(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
        seen = CLIPVisionModel.from_pretrained(folder)(pixel_values=pixels)
    assert_alike([found.image_embeds.numpy()], [ours.encode_image([PICTURES[0], picture(32, 32, 9)])])
    assert_alike([found.text_embeds.numpy()], [ours.encode_text(TEXTS)])
    torch.testing.assert_close(seen.last_hidden_state, found.vision_model_output.last_hidden_state)
    assert clip.logit_scale.item() == ours.model.clip.logit_scale.item()


def test_the_image_processor_scales_as_we_do(folder: Path) -> None:
    """Square images come out equal; of others what they fill does (the processor pads with grey, we with black)."""
    processor, model = CLIPImageProcessorPil.from_pretrained(folder), encoder()
    for image in (picture(80, 80), picture(20, 20), picture(64, 32), picture(32, 64)):
        pixels = processor(image, return_tensors="pt").pixel_values
        squares, filled = model._squares([image])
        ours = (squares.float() - model.model.mean) / model.model.std
        assert pixels.shape == ours.shape == (1, 3, 32, 32)
        x, y = (filled[0, :2] * 32).astype(int)
        torch.testing.assert_close(pixels[..., :y, :x], ours[..., :y, :x], rtol=1e-4, atol=1e-4)
        assert not pixels[..., y:, :].any()
        assert not pixels[..., :, x:].any()


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (Objective(), {}),
        (Objective(temperatures="own"), {"pool": "attention"}),
        (Objective(region_weight=0), {}),
        (Objective(grounding="none"), {"region": "roialign", "positions": False}),
    ],
)
def test_a_folder_and_a_checkpoint_answer_as_the_model(objective: Objective, changes: Any, tmp_path: Path) -> None:
    found = exported(tmp_path / "model", objective, **changes)
    with torch.no_grad():
        for p in found.model.parameters():
            p += 0.01  # a checkpoint has other weights, so that none is taken for the other
    options = {"model": dataclasses.asdict(dataclasses.replace(TINY, **changes)), "objective": vars(objective)}
    config = found.model.clip.config.to_json_string(use_diff=False)
    state = {"model": found.model.state_dict(), "options": json.dumps(options), "clip": config}
    path = checkpoint.save(tmp_path / "checkpoints", 3, state, 1)
    words().save(tmp_path / "tokenizer")
    assert_alike(answers(Encoder.open(path, "cpu")), answers(found))
    assert_alike(answers(Encoder.open(tmp_path / "model", "cpu")), answers(encoder(objective, **changes)))
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert ("config.json" in files) == ("preprocessor_config.json" in files) == (changes.get("pool") != "attention")
    assert ("cloc.safetensors" in files) == (objective.region_weight > 0)
    if "config.json" in files and "cloc.safetensors" in files:
        assert not any(name.startswith("clip.") for name in load_file(tmp_path / "model" / "cloc.safetensors"))


def test_answers_do_not_depend_on_the_company() -> None:
    found = encoder()
    together = answers(found)
    np.testing.assert_allclose(together[0][3:4], found.encode_image(PICTURES[3:4]), atol=1e-6)
    np.testing.assert_allclose(together[1][2:3], found.encode_text([TEXTS[2].upper()]), atol=1e-6)
    np.testing.assert_allclose(together[4], found.encode_regions(PICTURES[2:3], [BOXES[:2]])[0], atol=1e-6)
    for rows in (together[0], together[1], together[4]):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("by", ["prompter", "roialign"])
def test_boxes_are_those_of_the_image_not_of_the_square(by: str) -> None:
    found = encoder(by=by)
    for image, part in ((picture(32, 16), (1, 0.5)), (picture(16, 32), (0.5, 1))):
        square = Image.new("RGB", (32, 32))
        square.paste(image)
        boxes = np.array(BOXES, np.float32)
        (ours,), (theirs,) = (
            found.encode_regions([image], [BOXES]),
            found.encode_regions([square], [boxes * (part * 2)]),
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert np.abs(ours - found.encode_regions([square], [boxes])[0]).max() > 1e-3
        (ours,), (theirs,) = found.ground([image], [TEXTS]), found.ground([square], [TEXTS])
        np.testing.assert_allclose(ours, (theirs / (part * 2)).clip(0, 1), atol=1e-6)


def test_predicted_boxes_have_their_corners_in_order() -> None:
    found = encoder()
    assert found.model.prompter is not None
    head: Any = found.model.prompter.box[2]
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.75, 0.3, 0.25, -2.0])
    (boxes,) = found.ground([picture(32, 16)], [TEXTS[:1]])
    np.testing.assert_allclose(boxes, [[0.25, 0, 0.75, 0.6]], atol=1e-6)
    head.bias.data = torch.tensor([0.0, 0.0, 3.0, 3.0])
    np.testing.assert_allclose(found.ground([picture(16, 32)], [TEXTS[:1]])[0], [[0, 0, 1, 1]], atol=1e-6)


@pytest.mark.parametrize("by", ["prompter", "roialign", "crop"])
def test_any_number_of_anything(by: str) -> None:
    found = encoder(by=by)
    assert found.encode_image([]).shape == (0, 24)
    assert found.encode_text([]).shape == (0, 24)
    assert found.encode_regions([], []) == []
    assert found.ground([], []) == []
    none = np.zeros((0, 4), np.float32)
    regions = found.encode_regions(PICTURES[:3], [none, BOXES[:2], []])
    assert [r.shape for r in regions] == [(0, 24), (2, 24), (0, 24)]
    assert [r.shape for r in found.encode_regions(PICTURES[:2], [none, none])] == [(0, 24)] * 2
    assert [b.shape for b in found.ground(PICTURES[:3], [[], TEXTS[:3], []])] == [(0, 4), (3, 4), (0, 4)]
    assert [b.shape for b in found.ground(PICTURES[:2], [[], []])] == [(0, 4)] * 2
    np.testing.assert_allclose(regions[1], found.encode_regions(PICTURES[1:2], [BOXES[:2]])[0], atol=1e-6)
    with pytest.raises(ValueError):
        found.encode_regions(PICTURES[:2], [BOXES])


def test_a_plain_clip_has_regions_by_other_means() -> None:
    plain = Objective(region_weight=0)
    for ask in (encoder(plain).encode_regions, encoder(plain).ground):
        with pytest.raises(ModelError, match="has no Prompter for regions"):
            ask(PICTURES[:1], [[]])
    with pytest.raises(ModelError, match="trained without the grounding loss"):
        encoder(Objective(grounding="none")).ground(PICTURES[:1], [["x"]])
    crops, image = encoder(plain, by="crop"), picture(40, 20)
    (found,) = crops.encode_regions([image], [[[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.001, 0.001], [1.0, 1.0, 1.0, 1.0]]])
    pieces = [image.crop(box) for box in ((10, 10, 30, 20), (0, 0, 1, 1), (39, 19, 40, 20))]
    np.testing.assert_allclose(found, crops.encode_image(pieces), atol=1e-6)
    (found,) = encoder(plain, by="roialign").encode_regions([picture(40, 40)], [BOXES])
    assert found.shape == (3, 24)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_the_model_is_left_as_it_was() -> None:
    found = encoder()
    found.model.train()
    found.model.text(torch.zeros(1, 2, dtype=torch.long))
    found.encode_image(PICTURES[:1])
    assert found.model.training
    assert all(p.grad is None and p.requires_grad for p in found.model.parameters())
    low = Encoder(found.model, found.text, precision="bf16").encode_image(PICTURES)
    assert low.dtype == np.float32
    difference = np.abs(low - found.encode_image(PICTURES)).max()
    assert 0 < difference < 0.05


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    **{f"no {name}": remove(name) for name in ("cloc.json", "cloc.safetensors", "model.safetensors", "tokenizer.json")},
    **{f"cut {name}": cut(name, 300) for name in ("cloc.json", "cloc.safetensors", "model.safetensors")},
    "cut tensors": cut("model.safetensors", 20_000),
    "cut tokenizer": cut("tokenizer.json", 200),
    "cut config": cut("config.json", 100),
    "a list": rewrite("cloc.json", "[]"),
    "no options": rewrite("cloc.json", "{}"),
    "unknown option": rewrite("cloc.json", '{"model": {"colour": 1}, "objective": {}}'),
    "other option": rewrite("cloc.json", '{"model": {}, "objective": {"region_weight": 0}}'),
    "no text": rewrite("cloc.json", ""),
    "binary": lambda folder: (folder / "cloc.json").write_bytes(b"\xff\xfe\x00") and None,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert_alike(answers(Encoder.open(tmp_path))[:1], [encoder().encode_image(PICTURES)])
    DAMAGE[damage](tmp_path)
    with pytest.raises(ModelError) as caught:
        Encoder.open(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_model_at_all(tmp_path: Path) -> None:
    for name in ("none", "none.pt", ""):
        with pytest.raises(ModelError) as caught:
            Encoder.open(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
    path = tmp_path / "step-1.pt"
    config = tiny().clip.config.to_json_string(use_diff=False)
    options = json.dumps({"model": vars(TINY), "objective": vars(Objective())})
    state = {"model": {}, "options": options, "clip": config}
    for content in ({}, {"options": "{"}, {"options": "{}"}, state):
        torch.save(content, path)
        with pytest.raises(ModelError) as caught:
            Encoder.open(path)
        assert "\n" not in str(caught.value)


def test_an_export_of_a_model_that_began_as_another(folder: Path, tmp_path: Path) -> None:
    """Sizes are those of the weights that it began with, not those of the options, which nobody looked at."""
    options = Model(init=str(folder), tokenizer=str(folder))
    began = Encoder(tiny(init=str(folder)), words())
    export(began.model, began.text, options, Objective(), tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {
        "max_height": 32,
        "max_width": 32,
    }
    assert_alike(answers(Encoder.open(tmp_path)), answers(began))


@pytest.mark.parametrize("pool", ["class", "attention"])
def test_what_began_as_another_needs_it_no_more(tmp_path: Path, pool: str) -> None:
    """Sizes and activations are the other's; the options, at their defaults, know nothing of them."""
    theirs = tiny(seed=3)
    theirs.clip.config.vision_config.hidden_act = theirs.clip.config.text_config.hidden_act = "quick_gelu"
    theirs.clip.save_pretrained(tmp_path / "theirs")
    options = Model(init=str(tmp_path / "theirs"), pool=pool)  # type: ignore[arg-type]
    began = Encoder(Cloc(options, Objective(), words()), words())
    found = answers(began)
    export(began.model, began.text, options, Objective(), tmp_path / "model")
    state = {
        "model": began.model.state_dict(),
        "options": json.dumps({"model": vars(options), "objective": vars(Objective())}),
        "clip": began.model.clip.config.to_json_string(use_diff=False),
    }
    path = checkpoint.save(tmp_path / "checkpoints", 1, state, 1)
    words().save(tmp_path / "tokenizer")
    shutil.rmtree(tmp_path / "theirs")
    assert_alike(answers(Encoder.open(path, "cpu")), found)
    assert_alike(answers(Encoder.open(tmp_path / "model", "cpu")), found)
