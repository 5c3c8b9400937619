"""The authors' Grounding DINO, at random weights; torchvision, timm and pycocotools are stood in for."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from vesl.models import ModelError, hub, open_grounder
from vesl.models.options import Grounding

from .test_dino import jpeg, make_tokenizer

TEXT = {"vocab_size": 1200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32}
CONFIG: dict[str, Any] = {
    "model_type": "groundingdino", "backbone": "swin_T_224_1k", "position_embedding": "sine", "pe_temperatureH": 20,
    "pe_temperatureW": 20, "return_interm_indices": [1, 2, 3], "backbone_freeze_keywords": None,
    "enc_layers": 1, "dec_layers": 1, "pre_norm": False,
    "dim_feedforward": 32, "hidden_dim": 256, "dropout": 0.0, "nheads": 4, "num_queries": 20, "query_dim": 4,
    "num_patterns": 0, "num_feature_levels": 4, "enc_n_points": 4, "dec_n_points": 4, "two_stage_type": "standard",
    "two_stage_bbox_embed_share": False, "two_stage_class_embed_share": False, "transformer_activation": "relu",
    "dec_pred_bbox_embed_share": True, "dn_box_noise_scale": 1.0, "dn_label_noise_ratio": 0.5,
    "embed_init_tgt": True, "dn_labelbook_size": 20, "max_text_len": 256, "text_encoder_type": "bert-base-uncased",
    "use_text_enhancer": True, "use_fusion_layer": True, "use_checkpoint": True, "use_transformer_ckpt": True,
    "use_text_cross_attention": True, "text_dropout": 0.0, "fusion_dropout": 0.0, "fusion_droppath": 0.1,
    "sub_sentence_present": True, "text_config": TEXT,
}  # fmt: skip


def stand_ins() -> dict[str, ModuleType]:
    """Just what the package's imports touch."""

    class DropPath(torch.nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    things: dict[str, dict[str, Any]] = {
        "torchvision": {"__version__": "0.20.0", "_is_tracing": lambda: False},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"nms": None, "box_area": None},
        "torchvision.models": {},
        "torchvision.models._utils": {"IntermediateLayerGetter": object},
        "timm": {},
        "timm.models": {},
        "timm.models.layers": {
            "DropPath": DropPath,
            "to_2tuple": lambda x: x if isinstance(x, tuple) else (x, x),
            "trunc_normal_": torch.nn.init.trunc_normal_,
        },
        "groundingdino.util.visualizer": {"COCOVisualizer": None},
    }
    made = {}
    for name, content in things.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
        parent, _, last = name.rpartition(".")
        if parent in made:
            setattr(made[parent], last, made[name])
    return made


@pytest.fixture(scope="module")
def package() -> Iterator[Any]:
    pytest.importorskip("groundingdino")
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins().items():
            patch.setitem(sys.modules, name, module)
        from groundingdino.models.GroundingDINO import groundingdino

        yield groundingdino
    for name in [name for name in sys.modules if name.split(".")[0] == "groundingdino"]:
        del sys.modules[name]  # what was imported beside the stand-ins


@pytest.fixture(scope="module")
def model(package: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    from types import SimpleNamespace

    from safetensors.torch import save_file

    from vesl.models.grounders import original

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("original")
    make_tokenizer().save_pretrained(folder)
    with original._built_of(package, make_tokenizer(), BertModel(BertConfig(**TEXT))):
        made = package.build_groundingdino(SimpleNamespace(**CONFIG))
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and not name.startswith("backbone"):
            torch.nn.init.normal_(parameter, std=0.05)
    save_file(
        {name: value.clone().contiguous() for name, value in made.state_dict().items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return f"{folder}@{hub.digest(folder)}"


def opened(model: str, **options: Any) -> Any:
    options = {"dtype": "float32", "score_floor": 0.0, "image_px": 64, **options}
    return open_grounder(Grounding(model=model, backend="groundingdino", device="cpu", **options))


def test_a_mixed_batch_equals_the_package_with_captions_one_by_one(package: Any, model: str) -> None:
    images = [jpeg(100, 80, 1), jpeg(70, 120, 2), jpeg(100, 80, 3)]
    phrases = [["a cat", "red dog"], ["big tree"], []]
    grounder = opened(model)
    found = grounder(grounder.prepare(images, phrases))
    assert len(found[2].boxes) == 0
    theirs = opened(model)._network._model
    theirs.tokenizer = make_tokenizer()
    for detections, image, asked in zip(found[:2], images, phrases, strict=False):
        picture = Image.open(io.BytesIO(image))
        size = (80, 64) if picture.width > picture.height else (64, 109)
        if size[1] > 64 * 1333 / 800:
            size = (62, 106)
        pixels = torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        pixels = (pixels - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            out = theirs(pixels[None], captions=[". ".join(asked) + "."])
        tokens = [[1, 2], [4, 5]][: len(asked)]  # two words a phrase, then its full stop
        boxes = out["pred_boxes"][0]
        corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1).clamp(0, 1)
        there = (corners[:, 2:] > corners[:, :2]).all(1)
        assert there.sum() > 5
        for index, places in enumerate(tokens):
            mine = detections.phrases == index
            scores = out["pred_logits"][0][:, places].max(1).values.sigmoid()
            np.testing.assert_allclose(detections.scores[mine], scores[there].numpy(), atol=1e-4)
            np.testing.assert_allclose(detections.boxes[mine], corners[there].numpy(), atol=1e-4)


def test_the_text_encoder_equals_bert(package: Any) -> None:
    from vesl.models.grounders.original import TextEncoder

    bert = BertModel(BertConfig(**TEXT)).eval()
    ids, seen = torch.randint(0, 1200, (2, 7)), torch.rand(2, 7, 7) > 0.4
    seen |= torch.eye(7, dtype=torch.bool)
    places = torch.arange(7).expand(2, 7)
    mine = TextEncoder(bert)(ids, seen, torch.zeros_like(ids), places)["last_hidden_state"]
    theirs = bert(ids, attention_mask=seen[:, None], position_ids=places).last_hidden_state
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_chunks_and_the_package_left_as_it_was(package: Any, model: str) -> None:
    warper = package.BertModelWarper
    grounder = opened(model)
    assert package.BertModelWarper is warper
    found = grounder(grounder.prepare([jpeg(100, 80)], [[f"w{n} cat" for n in range(100)]]))[0]
    assert sorted(set(found.phrases.tolist())) == list(range(100))
    assert (grounder.forwards, grounder.texts) == (1, 2)


def test_what_cannot_be_opened_says_so_in_one_line(package: Any, model: str, tmp_path: Path) -> None:
    for name, config, said in (
        ("backbone", CONFIG | {"backbone": "resnet50"}, "resnet50"),
        ("key", {key: value for key, value in CONFIG.items() if key != "nheads"}, "nheads"),
        ("layers", CONFIG | {"enc_layers": 2}, "weights are missing"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for path in Path(model.rpartition("@")[0]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            opened(f"{folder}@{hub.digest(folder)}")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "groundingdino.models.GroundingDINO.groundingdino", None)
    with pytest.raises(ModelError, match=r"vesl\[groundingdino\]"):
        open_grounder(Grounding(model="/nowhere@0123456789ab", backend="groundingdino"))
