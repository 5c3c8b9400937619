"""Second opinions: CLIP and SigLIP against the library's own path, region by region, and a second grounder by IoU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402

from tests.models.grounders.test_owl import jpeg, tokenizer  # noqa: E402
from vesl.models import ModelError, hub, open_scorer  # noqa: E402
from vesl.models.contract import Detections  # noqa: E402
from vesl.models.options import Scoring  # noqa: E402
from vesl.models.scorers import SecondGrounder, overlaps  # noqa: E402
from vesl.models.scorers.similarity import window  # noqa: E402
from vesl.transforms.images import decode  # noqa: E402

SIDE = 32
KINDS = ("clip", "siglip")
JPEGS = [jpeg(size, seed) for seed, size in enumerate([(120, 80), (50, 90), (64, 64), (200, 30)])]
PHRASES = [["a dog", "the cat"], ["a dog"], [], ["red bus", "a dog", "two cats"]]


def detections(*rows: tuple[list[float], int, float]) -> Detections:
    boxes, phrases, scores = ([row[k] for row in rows] for k in range(3))
    return Detections(
        np.asarray(boxes, np.float32).reshape(-1, 4), np.asarray(phrases, np.int16), np.asarray(scores, np.float32)
    )


CLAIMS = [
    detections(([0.1, 0.2, 0.6, 0.9], 0, 0.5), ([0.1, 0.2, 0.6, 0.9], 1, 0.4), ([0, 0, 1, 1], 1, 0.05)),
    detections(([0.8, 0.8, 1, 1], 0, 0.1)),
    detections(),
    detections(([0, 0, 0.001, 0.01], 2, 0.9), ([0.2, 0.1, 0.9, 0.8], 0, 0.3)),
]


def make(kind: str, folder: Path) -> Path:
    words = tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 0}
    text = {**size, "vocab_size": len(words), "max_position_embeddings": 16, **ends}
    vision = {**size, "image_size": SIDE, "patch_size": 8}
    torch.manual_seed(3)
    if kind == "clip":
        config: Any = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        model: Any = transformers.CLIPModel(config)
    else:
        config = transformers.SiglipConfig(text_config={**text, "projection_size": 32}, vision_config=vision)
        model = transformers.SiglipModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if kind == "clip":
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def options(folder: Path, **changes: Any) -> Scoring:
    return Scoring(f"{folder}@{hub.digest(folder)}", **{"device": "cpu", **changes})


def test_windows_are_squares_around_the_boxes_within_the_image() -> None:
    boxes = np.array([[0.4, 0.4, 0.6, 0.5], [0, 0, 0.1, 0.1], [0.0, 0.3, 1.0, 0.6], [0.5, 0.5, 0.5, 0.5]], np.float32)
    found = window(boxes, (200, 100), 0.25)
    np.testing.assert_allclose(found[0], [70, 15, 130, 75], atol=1e-4)  # 40 px and 10 on either end
    np.testing.assert_allclose(found[1], [0, 0, 30, 30], atol=1e-4)  # moved inside
    np.testing.assert_allclose(found[2], [0, 0, 200, 100], atol=1e-4)  # no more than there is
    np.testing.assert_allclose(found[3], [99.5, 49.5, 100.5, 50.5], atol=1e-4)
    square = window(boxes[:1], (200, 100), 0.0)[0]
    assert square[2] - square[0] == pytest.approx(40, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_library_region_by_region(folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    scorer: Any = open_scorer(options(folder, template="a long {}"))
    processors: Any = CLIPImageProcessorPil if kind == "clip" else SiglipImageProcessorPil
    models: Any = transformers.CLIPModel if kind == "clip" else transformers.SiglipModel
    processor, model = processors.from_pretrained(folder), models.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    found = scorer(scorer.prepare(JPEGS, PHRASES, CLAIMS))
    assert [len(scores) for scores in found] == [3, 1, 0, 2]
    for data, phrases, claim, scores in zip(JPEGS, PHRASES, CLAIMS, found, strict=True):
        image = decode(data)
        for box, phrase, score, cosine in zip(claim.boxes, claim.phrases, claim.scores, scores, strict=True):
            if score < np.float32(0.1):
                assert np.isnan(cosine)
                continue
            (seen,) = window(box[None], image.size, 0.1)
            crop = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=tuple(seen))
            text = words(
                [f"a long {phrases[phrase]}"],
                padding="max_length" if kind == "siglip" else True,
                truncation=True,
                max_length=16,
                return_tensors="pt",
            )
            with torch.inference_mode():
                out = model(**processor(images=crop, return_tensors="pt"), **text)
            want = float((out.image_embeds[0] * out.text_embeds[0]).sum())
            assert cosine == pytest.approx(want, abs=1e-5)
    spread = np.concatenate(found)
    assert np.nanmax(spread) - np.nanmin(spread) > 1e-3  # the model does tell them apart


def test_each_box_and_each_phrase_is_computed_once(folders: dict[str, Path]) -> None:
    scorer: Any = open_scorer(options(folders["clip"]))
    prepared = scorer.prepare(JPEGS, PHRASES, CLAIMS)
    assert len(prepared.windows) == 4  # the first image's box answers to two phrases
    assert len(prepared.keys) == 4  # "a dog" stands in three images
    again = scorer(scorer.prepare(JPEGS[3:], PHRASES[3:], CLAIMS[3:]))
    np.testing.assert_allclose(again[0], scorer(prepared)[3], atol=1e-6)
    assert [scores.tolist() for scores in scorer(scorer.prepare(JPEGS[2:3], [[]], [detections()]))] == [[]]


def test_a_second_grounder_agrees_by_overlap_within_the_phrase() -> None:
    claim = detections(
        ([0, 0, 0.5, 0.5], 0, 0.9), ([0, 0, 0.5, 0.5], 2, 0.9), ([0.5, 0.5, 1, 1], 2, 0.3), ([0, 0, 1, 1], 2, 0.05)
    )
    other = detections(([0, 0, 0.5, 1], 1, 0.4), ([0, 0, 0.5, 0.5], 1, 0.2), ([0.6, 0.5, 1, 1], 0, 0.2))
    found = overlaps(claim, other, np.array([0, 2], np.int16), above=0.1)  # its phrases 0 and 1 are our 0 and 2
    np.testing.assert_allclose(found, [0, 1, 0, np.nan], atol=1e-6)
    assert overlaps(claim, detections(), np.array([0, 2], np.int16), 0.1)[:3].tolist() == [0, 0, 0]
    assert overlaps(detections(), other, np.array([0, 2], np.int16), 0.1).tolist() == []


def test_a_grounder_as_scorer_is_asked_for_the_scored_phrases_only() -> None:
    asked = []

    class Nearby:
        def prepare(self, jpegs: Any, phrases: Any) -> Any:
            asked.append(phrases)
            return phrases

        def __call__(self, prepared: Any) -> list[Detections]:
            return [
                detections(*(([0.1, 0.2, 0.6, 0.9], k, 0.9) for k, text in enumerate(own) if text == "the cat"))
                for own in prepared
            ]

    scorer = SecondGrounder(Nearby(), 0.2)
    found = scorer(scorer.prepare(JPEGS, PHRASES, CLAIMS))
    assert asked == [[["a dog", "the cat"], [], [], ["red bus", "two cats"]]]
    np.testing.assert_allclose(np.concatenate(found), [0, 1, np.nan, np.nan, 0, 0], atol=1e-6)


def test_a_scorer_of_ones_own() -> None:
    scorer: Any = open_scorer(Scoring("tests.models.scorers.test_scorers:second@1"))
    assert [scores.tolist() for scores in scorer(scorer.prepare(JPEGS[:1], PHRASES[:1], CLAIMS[:1]))] == [[7, 7, 7]]


def second() -> Any:
    """A user's own scorer, as a recipe names it."""
    return lambda images, phrases, claims: [np.full(len(claim.scores), 7, np.float32) for claim in claims]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense" * 99), "model"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert' cannot score regions"),
        (lambda f: (f / "preprocessor_config.json").unlink(), "image processor"),
    ],
)
def test_what_is_no_scorer_is_one_line(tmp_path: Path, spoil: Any, says: str) -> None:
    folder = make("clip", tmp_path / "model")
    spoil(folder)
    with pytest.raises(ModelError, match=says) as caught:
        open_scorer(options(folder))
    assert "\n" not in str(caught.value)


def test_a_gpu_in_vain_is_one_line(folders: dict[str, Path]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ModelError, match="sees no GPU"):
        open_scorer(options(folders["clip"], device="cuda"))
