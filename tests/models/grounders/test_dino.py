"""Grounding DINO of transformers, at random weights, against the library's own path, one image at a time."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertTokenizerFast,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoContrastiveEmbedding

from vesl.models import ModelError, hub, open_grounder
from vesl.models.contract import Detections
from vesl.models.grounders import dino, mixed
from vesl.models.grounders.dino import pairs
from vesl.models.options import Grounding

real_forward = mixed._Once.forward
ROOM = 64  # tokens of a text
WORDS = ["a", "the", "cat", "dog", "red", "big", "tree", "hat", "##s", ",", "'", "-", "u", "s", "[", "]", "cls", "sep"]


def make_tokenizer() -> BertTokenizerFast:
    """A BERT tokenizer of a few words, with the ids that the architecture takes for granted."""
    vocab = {f"[unused{index}]": index for index in range(1200)}
    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    fixed |= {1100 + index: word for index, word in enumerate(WORDS)} | {200 + n: f"w{n}" for n in range(100)}
    words = {index: word for word, index in vocab.items()} | fixed
    return BertTokenizerFast(vocab={word: index for index, word in words.items()})


def make_model(folder: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    text = BertConfig(vocab_size=1200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_indices=[2, 3, 4])
    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 30}
    sizes |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = GroundingDinoForObjectDetection(
        GroundingDinoConfig(backbone_config=swin, text_config=text, max_text_len=ROOM, **sizes | changes)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so that texts and images matter
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 106}).save_pretrained(folder)
    return f"{folder}@{hub.digest(folder)}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("dino"))


def opened(model: str, **options: Any) -> Any:
    return open_grounder(Grounding(model=model, device="cpu", **{"dtype": "float32", "score_floor": 0.0, **options}))


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def library(model: str, image: bytes, phrases: list[str]) -> tuple[torch.Tensor, Any, list[list[int]]]:
    """Logits, what the library's post-processing gives, and the token positions of each phrase."""
    folder = model.rpartition("@")[0]
    tokenizer = make_tokenizer()
    processor = GroundingDinoProcessor(GroundingDinoImageProcessorPil.from_pretrained(folder), tokenizer)
    inputs = processor(images=Image.open(io.BytesIO(image)), text=[phrases], return_tensors="pt")
    with torch.no_grad():
        out = GroundingDinoForObjectDetection.from_pretrained(folder).eval()(**inputs)
    found = processor.post_process_grounded_object_detection(out, threshold=0.0, text_threshold=0.0)[0]
    positions: list[list[int]] = [[]]
    for position, token in enumerate(inputs["input_ids"][0].tolist()[1:-1], 1):
        if token == 1012:
            positions.append([])
        else:
            positions[-1].append(position)
    return out.logits[0], found, positions[:-1]


def assert_like_library(found: Detections, model: str, image: bytes, phrases: list[str]) -> None:
    logits, theirs, positions = library(model, image, phrases)
    boxes = theirs["boxes"].clamp(0, 1)
    there = (boxes[:, 2:] > boxes[:, :2]).all(1)
    assert there.sum() > 10
    for index, tokens in enumerate(positions):
        mine = found.phrases == index
        scores = logits[:, tokens].max(1).values.sigmoid()[there].numpy()
        np.testing.assert_allclose(found.scores[mine], scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes[mine], boxes[there].numpy(), atol=1e-4)


def test_a_mixed_batch_equals_the_library_one_by_one(model: str) -> None:
    images = [jpeg(100, 80, 1), jpeg(70, 120, 2), jpeg(100, 80, 3), jpeg(300, 60, 4), jpeg(100, 80, 5)]
    phrases = [["a cat", "The red dog", "big tree"], ["hats"], ["a dog, a hat"], ["cat", "dog"], []]
    grounder = opened(model)
    found = grounder(grounder.prepare(images, phrases))
    for detections, image, asked in zip(found[:4], images, phrases, strict=False):
        assert_like_library(detections, model, image, asked)
    assert len(found[4].boxes) == 0
    assert grounder.forwards == 3  # wide, upright and very wide
    assert grounder.texts == 4


# after resizing, from 64x106 to 106x64
SHAPES = [(100, 80), (160, 96), (100, 90), (76, 70), (80, 100), (60, 120)]


@pytest.mark.parametrize("padding_wins", [False, True])
def test_images_of_several_sizes_share_a_forward(
    model: str, monkeypatch: pytest.MonkeyPatch, padding_wins: bool
) -> None:
    """Padding is kept out of the backbone, the projections, the attention, and the choice and places of the queries."""
    monkeypatch.setattr(dino, "PADDED", 10)
    if padding_wins:  # the encoder's logits are 0 there, and now nowhere greater
        compare = GroundingDinoContrastiveEmbedding.forward
        worst = lambda self, *args, **given: -compare(self, *args, **given).abs()  # noqa: E731
        monkeypatch.setattr(GroundingDinoContrastiveEmbedding, "forward", worst)
    images = [jpeg(*shape, seed) for seed, shape in enumerate(SHAPES)]
    phrases = [["a cat", "The red dog", "big tree"], ["hats"], ["a dog, a hat"], ["cat", "dog"], ["a"], ["the tree"]]
    grounder = opened(model)
    found = grounder(grounder.prepare(images, phrases))
    assert grounder.forwards == 1
    for detections, image, asked in zip(found, images, phrases, strict=True):
        assert_like_library(detections, model, image, asked)


def spied(grounder: Any) -> list[tuple[int, int, int, float]]:
    """Of each forward: its rows, its pixels and tokens with padding, and padded pixels over real ones."""
    network, calls = grounder._network, []

    def spy(pixels: list[torch.Tensor], of: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        shapes = [stack.shape[2:] for stack in pixels for _ in stack]
        padded = max(h for h, _ in shapes) * max(w for _, w in shapes) * len(of)
        calls.append((len(of), padded, ids.numel(), padded / sum(h * w for h, w in (shapes[k] for k in of.tolist()))))
        return network(pixels, of, ids, mask)

    grounder._network = spy
    return calls


def test_a_forward_keeps_to_its_budgets(model: str) -> None:
    images = [jpeg(*shape, seed) for seed, shape in enumerate(SHAPES * 4)]
    phrases = [[f"w{n} cat" for n in range(1 + 7 * (seed % 7))] for seed in range(len(images))]
    whole = opened(model)
    wanted = whole(whole.prepare(images, phrases))
    assert whole.forwards < 8
    for budget in ({"batch_pixels": 30_000}, {"batch_tokens": 150}, {"batch_pixels": 1, "batch_tokens": 1}):
        grounder = opened(model, **budget)
        calls = spied(grounder)
        found = grounder(grounder.prepare(images, phrases))
        assert sum(rows for rows, *_ in calls) == whole.texts
        assert (max(rows for rows, *_ in calls) > 1) == (budget.get("batch_pixels") != 1)
        for rows, pixels, tokens, waste in calls:
            assert rows == 1 or pixels <= grounder._most[0]
            assert rows == 1 or tokens <= grounder._most[1]
            assert waste <= dino.PADDED
        for mine, theirs in zip(found, wanted, strict=True):
            assert (mine.phrases == theirs.phrases).all()
            np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-4)
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)


def test_the_score_of_a_single_phrase_is_the_librarys_where_the_phrase_wins(model: str) -> None:
    grounder = opened(model)
    found = grounder(grounder.prepare([jpeg(100, 80)], [["a cat"]]))[0]
    logits, theirs, positions = library(model, jpeg(100, 80), ["a cat"])
    boxes = theirs["boxes"].clamp(0, 1)
    there = (boxes[:, 2:] > boxes[:, :2]).all(1)
    won = torch.isin(logits.argmax(1), torch.tensor(positions[0]))[there].numpy()
    assert won.any()
    np.testing.assert_allclose(found.scores[won], theirs["scores"][there].numpy()[won], atol=1e-4)
    assert (found.scores <= theirs["scores"][there].numpy() + 1e-4).all()


def test_phrases_of_the_same_words_do_not_merge() -> None:
    """Both phrases say "cat": by decoded text, a box that answers to the two tokens has the label "cat cat"."""
    ((text,), twins) = dino.Asker(make_tokenizer(), ROOM)(["red cat", "big cat"])
    assert (text.slots, twins) == ([-1, 0, 0, -1, 1, 1, -1, -1], [])
    logits = torch.full((1, 2, 256), -torch.inf)
    logits[0, :, :7] = torch.tensor([[-9.0, 3, 2, -9, -4, 1, -9], [-9.0, -5, -6, -9, 4, -5, -9]])
    slots = torch.tensor([[2, 0, 0, 2, 1, 1, 2]])  # [CLS] red cat . big cat [SEP]
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.5, 0.4, 0.2]]])
    ((found, labels, scores),) = pairs(logits, boxes, slots, 2, 0.25)
    assert labels.tolist() == [0, 1, 1]
    np.testing.assert_allclose(scores, 1 / (1 + np.exp([-3.0, -1.0, -4.0])), rtol=1e-5)
    np.testing.assert_allclose(found, [[0.4, 0.3, 0.6, 0.7]] * 2 + [[0.7, 0.4, 1.0, 0.6]], atol=1e-6)


def test_neighbours_in_the_batch_change_nothing(model: str) -> None:
    grounder = opened(model)
    images = [jpeg(100, 80, 1), jpeg(100, 80, 2), jpeg(120, 80, 3)]
    phrases = [["a cat"], [f"w{n} big" for n in range(40)], ["dog"]]
    together = grounder(grounder.prepare(images, phrases))
    for image, asked, found in zip(images, phrases, together, strict=True):
        (alone,) = grounder(grounder.prepare([image], [asked]))
        assert (alone.phrases == found.phrases).all()
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-4)
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-4)


def test_a_hundred_phrases_in_chunks_keep_their_labels_and_one_look_at_the_image(model: str) -> None:
    grounder = opened(model)
    phrases = [f"w{n} cat" for n in range(100)]
    looks = []
    backbone = grounder._network._once.backbone
    backbone.register_forward_pre_hook(lambda module, args: looks.append(len(args[0])))
    found = grounder(grounder.prepare([jpeg(100, 80)], [phrases]))[0]
    assert (looks, grounder.forwards, grounder.texts) == ([1], 1, 5)  # 20 phrases of 3 tokens, [CLS], [SEP]
    assert sorted(set(found.phrases.tolist())) == list(range(100))
    for start in range(0, 100, 20):
        mine = (found.phrases >= start) & (found.phrases < start + 20)
        part = Detections(found.boxes[mine], found.phrases[mine] - np.int16(start), found.scores[mine])
        assert_like_library(part, model, jpeg(100, 80), phrases[start : start + 20])


def test_hostile_phrases(model: str) -> None:
    grounder = opened(model)
    phrases = [
        "",
        "...",
        " \t",
        "?!"[:1],
        "\U0001f984 \u732b",
        "a cat",
        "cat. dog? [SEP] hat",
        "red " * 2500,
        "A CAT",
        "[CLS]",
    ]
    found = grounder(grounder.prepare([jpeg(100, 80)], [phrases]))[0]
    counts = np.bincount(found.phrases, minlength=len(phrases))
    assert [index for index, count in enumerate(counts) if count] == [5, 6, 7, 8, 9]  # nothing to ask for in 0 to 4
    assert counts[8] == counts[5]
    for column in ("boxes", "scores"):
        values = getattr(found, column)
        assert (values[found.phrases == 8] == values[found.phrases == 5]).all()
    texts, twins = grounder._asker(phrases)
    assert twins == [(8, 5)]
    assert max(len(text.ids) for text in texts) == ROOM
    for text in texts:
        of = np.array(text.slots)
        marks = [i for i, token in enumerate(text.ids) if token in grounder._asker.marks]
        assert marks == np.flatnonzero(of < 0).tolist()  # no mark within a phrase


def test_images_without_phrases_cost_nothing(model: str) -> None:
    grounder = opened(model)
    found = grounder(grounder.prepare([b"no image", b"", jpeg(100, 80)], [[], ["", "."], []]))
    assert [len(each.boxes) for each in found] == [0, 0, 0]
    assert (found[0].boxes.shape, found[0].phrases.dtype, grounder.forwards) == ((0, 4), np.int16, 0)


def test_the_floor(model: str) -> None:
    image, phrases = [jpeg(100, 80)], [["a cat", "dog"]]
    every = opened(model)
    found = every(every.prepare(image, phrases))[0]
    floor = float(np.median(found.scores))
    some = opened(model, score_floor=floor)
    above = some(some.prepare(image, phrases))[0]
    assert len(above.scores) == (found.scores >= np.float32(floor)).sum() > 0


def test_out_of_memory_halves_the_rows(model: str) -> None:
    grounder = opened(model)
    network, sizes = grounder._network, []

    def small(pixels: list[torch.Tensor], of: torch.Tensor, *text: torch.Tensor) -> Any:
        sizes.append((len(of), sum(map(len, pixels))))
        if len(of) > 2:
            raise torch.OutOfMemoryError("too much")
        return network(pixels, of, *text)

    images, phrases = [jpeg(100, 80, 1), jpeg(100, 80, 2)], [[f"w{n} cat" for n in range(50)], ["a cat", "dog"]]
    whole = grounder(grounder.prepare(images, phrases))
    grounder._network = small
    found = grounder(grounder.prepare(images, phrases))
    assert sizes == [(4, 2), (2, 1), (2, 2)]
    for mine, theirs in zip(found, whole, strict=True):
        assert (mine.phrases == theirs.phrases).all()
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-4)


def test_threads_prepare_at_once(model: str) -> None:
    grounder = opened(model)
    batch = [jpeg(100, 80)], [[f"w{n} cat" for n in range(50)]]
    with ThreadPoolExecutor(8) as threads:
        for prepared in threads.map(lambda _: grounder.prepare(*batch), range(40)):
            assert (prepared.text[0] == grounder.prepare(*batch).text[0]).all()


def test_half_the_precision_keeps_the_boxes(model: str) -> None:
    exact, half = opened(model), opened(model, dtype="bfloat16")
    batch = [jpeg(100, 80)], [["a cat"]]
    boxes = half(half.prepare(*batch))[0].boxes
    inner = boxes[(boxes > 0) & (boxes < 1)]
    assert (torch.from_numpy(inner).bfloat16().float().numpy() != inner).mean() > 0.5  # finer than bfloat16's steps
    assert len(exact(exact.prepare(*batch))[0].boxes)


def test_half_the_precision_keeps_the_places_of_an_image_in_its_padding(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino, "PADDED", 10)
    grounder = opened(model, dtype="bfloat16")
    grounder(grounder.prepare([jpeg(100, 80), jpeg(60, 120)], [["a cat"], ["dog"]]))
    ratios = grounder._network._once._ratios
    assert ratios.dtype == torch.float32
    assert (ratios < 1).any()


def test_image_px_is_the_short_side(model: str) -> None:
    grounder = opened(model, image_px=96)
    shapes = [grounder.prepare([jpeg(*size)], [["cat"]]).pixels[0].shape for size in ((100, 80), (400, 100))]
    assert shapes == [(3, 96, 120), (3, 40, 159)]  # the long side stays below 96 * 106 / 64


def test_what_cannot_be_opened_says_so_in_one_line(model: str, tmp_path: Path) -> None:
    def fails(change: Any, said: str, **options: Any) -> None:
        folder = tmp_path / said.replace(" ", "_").replace(":", "")[:20]
        folder.mkdir()
        for path in Path(model.rpartition("@")[0]).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        change(folder)
        with pytest.raises(ModelError, match=said) as caught:
            opened(f"{folder}@{hub.digest(folder)}", **options)
        assert "\n" not in str(caught.value)

    def lose_weights(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        del weights["model.level_embed"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def other_tokenizer(folder: Path) -> None:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "cat"]
        BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)

    fails(lose_weights, "1 weights are missing, model.level_embed")
    fails(other_tokenizer, "run into one another")
    fails(lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config")
    fails(lambda folder: [path.unlink() for path in folder.glob("token*")], "token")
    fails(lambda folder: None, "image_px: 32 is too small", image_px=32)
    fails(lambda folder: (folder / "model.safetensors").write_bytes(b"nothing"), "model ")
    fails(lambda folder: None, "compile: is for OWLv2", compile=True)
    fails(lambda folder: None, "template: is for OWLv2", template="a photo of a {}")
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="sees no GPU"):
            open_grounder(Grounding(model=model, device="cuda"))


def renamed(*_: Any) -> Any:
    raise KeyError("reference_points")


@pytest.mark.parametrize(
    ("hook", "change", "said"),
    [
        ("scaled", renamed, "KeyError: 'reference_points'"),
        ("scaled", lambda self, _, args, given: (args, given), "an image beside another is off by 0.[01]"),
        ("only_images", lambda self, _, args, logits: logits, "padding is kept out"),
        ("forward", lambda self, *_: real_forward(self)[0], "Error"),
    ],
)
def test_another_make_of_the_library_is_refused(
    model: str, monkeypatch: pytest.MonkeyPatch, hook: str, change: Any, said: str
) -> None:
    monkeypatch.setattr(mixed._Once, hook, change)
    with pytest.raises(ModelError, match=f"the Grounding DINO of transformers 5.* is not the one .*{said}") as caught:
        opened(model)
    assert "\n" not in str(caught.value)


def test_more_queries_than_usual_are_tried_on_larger_images(tmp_path: Path) -> None:
    many = make_model(tmp_path, num_queries=1200)
    grounder = opened(many, image_px=256)
    assert len(grounder(grounder.prepare([jpeg(100, 80)], [["a cat"]]))[0].boxes) > 100


def test_numbers_that_are_none_fail_the_image(model: str) -> None:
    grounder = opened(model)
    network = grounder._network
    grounder._network = lambda *inputs: (network(*inputs)[0] * torch.nan, network(*inputs)[1])
    with pytest.raises(ValueError, match="no number"):
        grounder(grounder.prepare([jpeg(100, 80)], [["cat"]]))


def test_too_small_an_image_is_one_failed_sample(model: str) -> None:
    with pytest.raises(ValueError, match="too small"):
        opened(model).prepare([jpeg(400, 8)], [["cat"]])


def test_nothing_is_printed_on_opening(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    opened(model)
    assert capfd.readouterr() == ("", "")
