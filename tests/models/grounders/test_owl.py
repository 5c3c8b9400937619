"""OWLv2 and OWL-ViT against the library's own path, one image at a time, with small random models made here."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil  # noqa: E402
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil  # noqa: E402

from vesl.models import ModelError, hub, open_grounder  # noqa: E402
from vesl.models.contract import Detections  # noqa: E402
from vesl.models.grounders import owl  # noqa: E402
from vesl.models.options import Grounding  # noqa: E402
from vesl.transforms.images import decode  # noqa: E402

KINDS = ("owlv2", "owlvit")
SIDE, PATCH = 64, 16
SIZES = [(120, 80), (50, 90), (64, 64), (200, 30), (33, 47)]
LONG = " ".join(["a very long dog"] * 10)
PHRASES = [["a dog", "the cat", "a dog"], [], ["", LONG, "Red Bus", "a dog", "cafe"], ["dog"], ["two cats", "the sky"]]
WORDS = ("dog", "cat", "the", "bus", "red", "two", "cats", "sky", "long", "very")


def tokenizer() -> Any:
    """CLIP's tokenizer over bytes, with a few words merged; it pads with "!", id 0, as OWL's does."""
    letters = sorted(ByteLevel.alphabet())
    vocab = ["!", *(letter for letter in letters if letter != "!"), *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        left = word[0]
        for k, letter in enumerate(word[1:], 2):
            right = letter + ("</w>" if k == len(word) else "")
            if left + right not in vocab:
                vocab.append(left + right)
                merges.append((left, right))
            left += right
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: k for k, token in enumerate(vocab)}
    return transformers.CLIPTokenizer(vocab=numbers, merges=merges, pad_token="!", model_max_length=16)


def make(kind: str, folder: Path) -> Path:
    """Write a small random model of a kind, as on the hub."""
    words = tokenizer()
    second = kind == "owlv2"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 0}
    kinds = (transformers.Owlv2Config, transformers.Owlv2ForObjectDetection)
    config_kind, model_kind = kinds if second else (transformers.OwlViTConfig, transformers.OwlViTForObjectDetection)
    text = {**size, "hidden_size": 24, "vocab_size": len(words), "max_position_embeddings": 16, **ends}
    vision = {**size, "image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(7)
    model = model_kind(config_kind(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor = Owlv2ImageProcessorPil if second else OwlViTImageProcessorPil
    processor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def options(folder: Path, **changes: Any) -> Grounding:
    return Grounding(model=f"{folder}@{hub.digest(folder)}", device="cpu", **{"score_floor": 0.3, **changes})


def opened(folder: Path, **changes: Any) -> Any:
    return open_grounder(options(folder, **changes))


def jpeg(size: tuple[int, int], seed: int = 0) -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


JPEGS = [jpeg(size, seed) for seed, size in enumerate(SIZES)]


class Library:
    """The documented path: processor, model, post-processing; one image at a time."""

    def __init__(self, folder: Path, side: int = SIDE) -> None:
        second = hub.config(folder)["model_type"] == "owlv2"
        processor = transformers.Owlv2Processor if second else transformers.OwlViTProcessor
        image_processor = Owlv2ImageProcessorPil if second else OwlViTImageProcessorPil
        images = image_processor.from_pretrained(folder, size={"height": side, "width": side})
        self.processor = processor(image_processor=images, tokenizer=transformers.CLIPTokenizer.from_pretrained(folder))
        model = transformers.Owlv2ForObjectDetection if second else transformers.OwlViTForObjectDetection
        self.model = model.from_pretrained(folder).eval()
        self.second, self.other = second, side != SIDE

    def run(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> Any:
        kwargs = {"truncation": True, "max_length": 16, "padding": "max_length", "return_tensors": "pt"}
        inputs = self.processor(text=[list(own) for own in phrases], images=list(images), **kwargs)
        with torch.inference_mode():
            return self.model(**inputs, interpolate_pos_encoding=self.other)

    def labels(self, image: Image.Image, phrases: Sequence[str], floor: float) -> Any:
        """What post_process_grounded_object_detection says: each box's best phrase."""
        sizes = torch.tensor([(image.height, image.width)])
        post = self.processor.post_process_grounded_object_detection
        return post(self.run([image], [phrases]), threshold=floor, target_sizes=sizes, text_labels=[list(phrases)])[0]

    def pairs(self, image: Image.Image, phrases: Sequence[str], floor: float) -> Detections:
        """All pairs, by the sigmoid of the logits."""
        out = self.run([image], [phrases])
        scores = out.logits.sigmoid()[0].numpy()
        x, y, w, h = out.pred_boxes[0].numpy().T
        boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], axis=1)
        boxes = boxes * (max(image.size) / np.array(image.size * 2) if self.second else 1)
        boxes = boxes.clip(0, 1)
        kept = ((boxes[:, 2:] > boxes[:, :2]).all(axis=1)[:, None]) & (scores >= floor)
        box, phrase = np.nonzero(kept)
        return Detections(boxes[box].astype(np.float32), phrase.astype(np.int16), scores[box, phrase])


def in_order(found: Detections) -> tuple[Any, Any, Any]:
    order = np.lexsort((found.boxes[:, 0], -found.scores.round(5), found.phrases))
    return found.phrases[order], found.scores[order], found.boxes[order]


def assert_same(found: Detections, expected: Detections, tolerance: float = 1e-4) -> None:
    assert (found.boxes.dtype, found.phrases.dtype, found.scores.dtype) == (np.float32, np.int16, np.float32)
    assert len(found.scores) == len(expected.scores)
    for got, wanted in zip(in_order(found), in_order(expected), strict=True):
        np.testing.assert_allclose(got, wanted, atol=tolerance)


def count(module: Any) -> list[int]:
    """Each forward of a module appends its number of rows."""
    calls: list[int] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        calls.append(len(next(iter([*args, *kwargs.values()]))))

    module.register_forward_hook(hook, with_kwargs=True)
    return calls


@pytest.mark.parametrize("side", [SIDE, 96, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_the_library_one_by_one(folders: dict[str, Path], kind: str, side: int) -> None:
    grounder = opened(folders[kind], image_px=None if side == SIDE else side)
    library = Library(folders[kind], side)
    found = grounder(grounder.prepare(JPEGS, PHRASES))
    assert len(found[1].scores) == 0
    seen = 0
    for data, phrases, got in zip(JPEGS, PHRASES, found, strict=True):
        if not phrases:
            continue
        image = decode(data)
        assert_same(got, library.pairs(image, phrases, 0.3))
        assert (np.diff(got.scores) <= 0).all()
        best = library.labels(image, phrases, 0.3)
        pixels = np.array(image.size * 2)
        mine = {(phrases[p], *box.round(2)) for p, box in zip(got.phrases, got.boxes, strict=True)}
        scores = got.scores
        for label, score, box in zip(best["text_labels"], best["scores"], best["boxes"], strict=True):
            clipped = (box.numpy() / pixels).clip(0, 1)
            if (clipped[2:] <= clipped[:2]).any():
                continue
            seen += 1
            assert np.abs(scores - score.item()).min() < 1e-4
            near = [m for m in mine if m[0] == label and np.abs(np.array(m[1:]) - clipped).max() < 0.011]
            assert near, (label, clipped)
    assert seen >= (4 if side == 32 else 20)


def test_padding_queries_never_win(folders: dict[str, Path]) -> None:
    """The library fills ragged lists with " ", lets that win, and then looks up a label that is not there."""
    library = Library(folders["owlv2"])
    # A score so low for everything said, and not for what " " is read as, that padding is each box's best.
    images, phrases = [decode(JPEGS[0]), decode(JPEGS[2])], [["a dog"], ["the cat", "sky", "bus", "", "two"]]
    padded = library.run(images, phrases).logits[0]
    assert (padded.argmax(dim=-1) > 0).any()
    grounder = opened(folders["owlv2"], score_floor=0.0)
    found = grounder(grounder.prepare([JPEGS[0], JPEGS[2]], phrases))
    assert set(found[0].phrases.tolist()) == {0}
    assert set(found[1].phrases.tolist()) == {0, 1, 2, 3, 4}
    assert_same(found[0], library.pairs(images[0], phrases[0], 0.0))


def test_long_phrases_are_cut_to_the_text_length(folders: dict[str, Path]) -> None:
    grounder = opened(folders["owlv2"])
    prepared = grounder.prepare(JPEGS[:1], [[LONG, LONG + " and more", "a dog"]])
    assert prepared.tokens.shape == (2, 2, 16)  # the two long ones are the same to the model
    words = tokenizer()
    assert prepared.tokens[0, 0].tolist()[-1] == words.eos_token_id
    assert prepared.asked.tolist() == [[0, 0, 1]]
    found = grounder(prepared)[0]
    assert sorted(found.scores[found.phrases == 0]) == sorted(found.scores[found.phrases == 1])


@pytest.fixture
def flat(folders: dict[str, Path]) -> Any:
    """Makes models whose boxes are the grid itself: the box head adds nothing to each cell's own place."""

    def open_flat(kind: str, **changes: Any) -> Any:
        grounder = opened(folders[kind], **changes)
        for parameter in grounder._model.box_head.dense2.parameters():
            parameter.zero_()
        return grounder

    return open_flat


def test_boxes_of_a_padded_square_become_those_of_the_image(flat: Any) -> None:
    """Golden: 4x4 cells on a 128x64 image. A cell's box is centred on its lower right corner, one cell in size."""
    grounder = flat("owlv2", score_floor=0.0)
    found = grounder(grounder.prepare([jpeg((128, 64)), jpeg((64, 128))], [["a dog"]] * 2))
    x = [(0.125, 0.375), (0.375, 0.625), (0.625, 0.875), (0.875, 1.0)]
    y = [(0.25, 0.75), (0.75, 1.0)]  # of the square 0.125 to 0.375 and 0.375 to 0.5; the other two rows are padding
    wide = sorted([x0, y0, x1, y1] for x0, x1 in x for y0, y1 in y)
    tall = sorted([y0, x0, y1, x1] for x0, x1 in x for y0, y1 in y)
    for got, wanted in zip(found, (wide, tall), strict=True):
        np.testing.assert_allclose(sorted(got.boxes.round(3).tolist()), wanted, atol=2e-3)
    squeezed = flat("owlvit", score_floor=0.0)
    found = squeezed(squeezed.prepare([jpeg((128, 64))], [["a dog"]]))
    assert len(found[0].boxes) == 16
    ends = [0.375] * 4 + [0.625] * 4 + [0.875] * 4 + [1.0] * 4
    np.testing.assert_allclose(sorted(found[0].boxes[:, 3].tolist()), ends, atol=2e-3)


def test_another_size_interpolates_positions(folders: dict[str, Path]) -> None:
    """Against the library's interpolation, and not the first cells of the grid as in the first authors' code."""
    grounder = opened(folders["owlv2"], image_px=48)
    table = grounder._model.base_model.vision_model.embeddings.position_embedding.weight
    old = Library(folders["owlv2"]).model.base_model.vision_model.embeddings
    wanted = old.interpolate_pos_encoding(torch.zeros(1, 10, 32), 48, 48)[0]
    torch.testing.assert_close(table, wanted)
    cut = old.position_embedding.weight[1:].reshape(4, 4, -1)[:3, :3].reshape(9, -1)
    assert (table[1:] - cut).abs().max() > 0.1
    with pytest.raises(ModelError, match="100 is not a multiple of the model's patch of 16 px; 96 is"):
        opened(folders["owlv2"], image_px=100)


def test_one_look_an_image_and_none_without_phrases(folders: dict[str, Path]) -> None:
    grounder = opened(folders["owlv2"])
    looks = count(grounder._model.base_model.vision_model)
    grounder(grounder.prepare(JPEGS, [["a", "b", "c", "d", "e", "f", "g"], [], ["h"], [], []]))
    assert looks == [2]
    found = grounder(grounder.prepare([b"no image at all"] * 2, [[], []]))
    assert [len(d.scores) for d in found] == [0, 0]
    assert grounder(grounder.prepare([], [])) == []
    assert looks == [2]
    with pytest.raises((OSError, SyntaxError)):
        grounder.prepare([b"no image at all"], [["a dog"]])


def test_a_phrase_is_embedded_once(folders: dict[str, Path]) -> None:
    grounder = opened(folders["owlv2"])
    texts = count(grounder._model.base_model.text_model)
    first = grounder(grounder.prepare(JPEGS, PHRASES))
    distinct = len({phrase for own in PHRASES for phrase in own})
    assert texts == [distinct]
    again = grounder(grounder.prepare(JPEGS, PHRASES))
    assert texts == [distinct]
    for one, two in zip(first, again, strict=True):
        assert_same(one, two, 0)
    grounder(grounder.prepare(JPEGS[:1], [["A DOG", "a  dog", "a dog", "new"]]))  # CLIP reads the first three alike
    assert texts == [distinct, 1]


@pytest.mark.parametrize("most", [0, 1, 3, 4])
def test_memory_is_bounded_and_right(folders: dict[str, Path], most: int) -> None:
    grounder, whole = opened(folders["owlv2"], text_cache=most), opened(folders["owlv2"])
    texts = count(grounder._model.base_model.text_model)
    rng = np.random.default_rng(3)
    for _ in range(12):
        asked = [[WORDS[k] for k in rng.integers(0, len(WORDS), rng.integers(1, 4))] for _ in range(2)]
        pair = [g(g.prepare(JPEGS[:2], asked)) for g in (grounder, whole)]
        for got, wanted in zip(*pair, strict=True):
            assert_same(got, wanted, 1e-5)
        table = grounder._memory._table
        assert len(grounder._memory._slots) <= most
        assert (table is None) == (most == 0)
        assert table is None or len(table) <= most
    assert sum(texts) > len(WORDS)  # so something was forgotten


def test_memory_forgets_what_was_not_used_longest() -> None:
    asked: list[list[str]] = []

    def ask(*names: str) -> list[float]:
        def embed(new: list[int]) -> Any:
            asked.append([names[k] for k in new])
            return torch.tensor([[float(ord(names[k]))] for k in new])

        return [chr(int(v)) for v in memory([n.encode() for n in names], embed)[:, 0].tolist()]

    memory = owl.Memory(3)
    for names in ("abc", "a", "d", "b", "da", "xyzwv", "v", "w"):
        assert ask(*names) == list(names)
    assert asked == [["a", "b", "c"], ["d"], ["b"], ["x", "y", "z", "w", "v"]]


HOSTILE = [
    "\ud800 dog",
    "🐕‍🦺🔥",
    "x" * 10_000,
    "dog " * 3_000,
    "\x00\x01",
    "{}{0}",
    "   \t\n",
    "<|endoftext|> dog",
    "日本語",
]


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_phrases(folders: dict[str, Path], kind: str) -> None:
    grounder, library = opened(folders[kind], score_floor=0.0), Library(folders[kind])
    found = grounder(grounder.prepare(JPEGS[:2], [HOSTILE, HOSTILE[::-1]]))
    assert set(found[0].phrases.tolist()) == set(range(len(HOSTILE)))
    speakable = [phrase.replace("\ud800", "?") for phrase in HOSTILE]
    assert_same(found[0], library.pairs(decode(JPEGS[0]), speakable, 0.0))


def test_template(folders: dict[str, Path]) -> None:
    grounder, library = opened(folders["owlv2"], template="a photo of {}"), Library(folders["owlv2"])
    found = grounder(grounder.prepare(JPEGS[:1], [["a {} dog"]]))
    assert_same(found[0], library.pairs(decode(JPEGS[0]), ["a photo of a {} dog"], 0.3))


@pytest.mark.parametrize("size", [(1024, 683), (90, 333), (40, 40), (7, 300), (64, 64), (65, 63), (1, 1), (1000, 1)])
@pytest.mark.parametrize("side", [64, 448])
def test_images_are_scaled_as_the_library_does(folders: dict[str, Path], size: tuple[int, int], side: int) -> None:
    image = decode(jpeg(size, 9))
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8))
    for kind, processor in zip(KINDS, (Owlv2ImageProcessorPil, OwlViTImageProcessorPil), strict=True):
        theirs = processor(size={"height": side, "width": side})
        mine = owl.Sight.of(theirs, kind == "owlv2", side)
        for seen in (image, noise):
            wanted = theirs(seen, return_tensors="np")["pixel_values"][0]
            got = mine(seen)
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_threads_prepare_at_once(folders: dict[str, Path]) -> None:
    grounder = opened(folders["owlv2"])
    alone = grounder.prepare(JPEGS, PHRASES)
    with ThreadPoolExecutor(8) as pool:
        for prepared in pool.map(lambda _: grounder.prepare(JPEGS, PHRASES), range(40)):
            assert torch.equal(prepared.pixels, alone.pixels)
            assert torch.equal(prepared.tokens, alone.tokens)
            assert torch.equal(prepared.asked, alone.asked)


def test_memory_of_the_device_runs_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    grounder = opened(folders["owlv2"])
    wanted = grounder(grounder.prepare(JPEGS, PHRASES))
    grounder._memory = owl.Memory(100)
    rows = []

    def tight(real: Any, most: int, *args: Any, **kwargs: Any) -> Any:
        rows.append(len((args or tuple(kwargs.values()))[0]))
        if rows[-1] > most:
            raise torch.OutOfMemoryError("no more")
        return real(*args, **kwargs)

    see, read = grounder._see, grounder._model.base_model.get_text_features
    monkeypatch.setattr(grounder, "_see", lambda *a: tight(see, 2, *a))
    monkeypatch.setattr(grounder._model.base_model, "get_text_features", lambda **k: tight(read, 3, **k))
    found = grounder(grounder.prepare(JPEGS, PHRASES))
    assert max(rows) > 3
    for got, expected in zip(found, wanted, strict=True):
        assert_same(got, expected, 1e-5)
    monkeypatch.setattr(grounder, "_see", lambda *a: tight(see, 0, *a))
    with pytest.raises(torch.OutOfMemoryError):
        grounder(grounder.prepare(JPEGS, PHRASES))


def test_the_best_pairs_leave_the_device() -> None:
    rng = np.random.default_rng(0)
    corners = rng.random((2, 500, 2, 2)).astype(np.float32)
    corners.sort(axis=2)
    boxes = torch.from_numpy(corners.reshape(2, 500, 4))
    boxes[0, :100] = torch.tensor([1.1, 0.2, 1.4, 0.5])  # beside the image, with the best scores of all
    scores = torch.from_numpy(rng.random((2, 500, 5)).astype(np.float32))
    scores[0, :100] = 1.0
    wanted = torch.tensor([[True] * 5, [True, True, False, False, False]])
    pairs = owl.best_pairs(boxes, scores, wanted, 1000)
    first, second = owl.apart(*(t.numpy() for t in pairs), 0.1)
    assert len(first.scores) == 1000  # of 1,800 above the floor
    assert first.scores.max() < 1
    np.testing.assert_array_equal(first.scores, np.sort(scores[0, 100:].numpy().ravel())[::-1][:1000])
    assert set(second.phrases.tolist()) == {0, 1}
    own = scores[1, :, :2].numpy()
    assert len(second.scores) == (own >= np.float32(0.1)).sum()
    for box, phrase, score in zip(second.boxes, second.phrases, second.scores, strict=True):
        assert own[np.flatnonzero((boxes[1].numpy() == box).all(axis=1))[0], phrase] == score


def test_more_pairs_leave_where_more_are_stored(folders: dict[str, Path]) -> None:
    asked = [["a dog"] * 100]  # 16 boxes each
    usual, more = opened(folders["owlvit"]), opened(folders["owlvit"], max_detections=5000)
    counts = [len(g(g.prepare(JPEGS[:1], asked))[0].scores) for g in (usual, more)]
    assert counts == [1000, 1600]


def test_what_is_not_a_number_is_not_hidden(folders: dict[str, Path]) -> None:
    grounder = opened(folders["owlv2"])
    grounder._model.class_head.logit_shift.bias.fill_(float("nan"))
    assert np.isnan(grounder(grounder.prepare(JPEGS[:1], [["a dog"]]))[0].scores).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folders: dict[str, Path], dtype: Any) -> None:
    exact, half = (opened(folders["owlv2"], score_floor=0.0, dtype=name) for name in ("float32", dtype))
    prepared = half.prepare(JPEGS[:1], [["a dog", "bus"]])
    assert prepared.pixels.dtype == getattr(torch, dtype)
    wanted, got = exact(exact.prepare(JPEGS[:1], [["a dog", "bus"]]))[0], half(prepared)[0]
    assert np.abs(np.sort(wanted.scores) - np.sort(got.scores)).max() < 0.05


def test_compile_by_option(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    opened(folders["owlv2"])
    assert not compiled
    opened(folders["owlv2"], compile=True)
    assert len(compiled) == 1


@pytest.mark.slow
def test_compiled_it_finds_the_same(folders: dict[str, Path]) -> None:
    grounder, compiled = (
        opened(folders["owlv2"], score_floor=0.0),
        opened(folders["owlv2"], compile=True, score_floor=0.0),
    )
    for batch in (slice(0, 1), slice(2, 4)):
        found = [each(each.prepare(JPEGS[batch], PHRASES[batch])) for each in (grounder, compiled)]
        for mine, theirs in zip(*found, strict=True):
            assert_same(mine, theirs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def weights(folder: Path, there: Path, change: Any) -> Path:
    """A copy of a model with its weights changed."""
    for path in folder.iterdir():
        (there / path.name).write_bytes(path.read_bytes())
    tensors = load_file(there / "model.safetensors")
    change(tensors)
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    return there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("class_head.dense0.weight"), "missing keys in its weights: class_head.dense0.weight"),
        (lambda w: w.update(stray=torch.ones(1)), "unexpected keys in its weights: stray"),
        (lambda w: w.update({"class_head.dense0.bias": torch.ones(3)}), "class_head.dense0.bias"),
    ],
)
def test_weights_that_do_not_fit(folders: dict[str, Path], tmp_path: Path, change: Any, said: str) -> None:
    folder = weights(folders["owlv2"], tmp_path, change)
    with pytest.raises(ModelError) as told:
        opened(folder)
    assert said in str(told.value) or "mismatch" in str(told.value).lower()
    assert "\n" not in str(told.value)


def test_old_checkpoints_carry_computed_buffers(folders: dict[str, Path], tmp_path: Path) -> None:
    name = "owlvit.vision_model.embeddings.position_ids"
    opened(weights(folders["owlvit"], tmp_path, lambda w: w.update({name: torch.arange(17)[None]})))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "preprocessor_config.json", "config.json"])
def test_broken_files(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = weights(folders["owlv2"], tmp_path, lambda w: None)
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    with pytest.raises(ModelError):
        opened(folder)


def test_other_image_processors_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = weights(folders["owlvit"], tmp_path, lambda w: None)
    sizes = {"size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE // 2, "width": SIDE}}
    OwlViTImageProcessorPil(do_center_crop=True, **sizes).save_pretrained(folder)
    with pytest.raises(ModelError, match="do_center_crop: True"):
        opened(folder)


@pytest.mark.parametrize("size", [SIDE, [SIDE, SIDE], {"height": SIDE, "width": SIDE}])
def test_image_processors_as_early_checkpoints_have_them(folders: dict[str, Path], tmp_path: Path, size: Any) -> None:
    """They name a class that is gone, have a size as a number or a pair, and a crop of what has that size anyway."""
    folder = weights(folders["owlvit"], tmp_path, lambda w: None)
    old = {"do_center_crop": True, "crop_size": SIDE, "size": size, "rescale": True, "resample": 3}
    old["feature_extractor_type"] = "OwlViTFeatureExtractor"
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    usual, early = opened(folders["owlvit"]), opened(folder)
    for mine, theirs in zip(*(g(g.prepare(JPEGS, PHRASES)) for g in (early, usual)), strict=True):
        assert_same(mine, theirs, 0)


def test_the_floor_only_cuts(folders: dict[str, Path]) -> None:
    def ask(floor: float) -> Detections:
        grounder = opened(folders["owlv2"], score_floor=floor)
        return grounder(grounder.prepare(JPEGS[:1], [["a dog", "bus"]]))[0]  # type: ignore[no-any-return]

    every = ask(0.0)
    middle = len(every.scores) // 2
    some = ask(float(every.scores[middle]))
    assert len(some.scores) == middle + 1
    np.testing.assert_array_equal(every.scores[: middle + 1], some.scores)


def test_a_forward_keeps_to_its_budgets(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    phrases = [[f"{word} {n}" for word in WORDS[: 1 + 3 * n]] for n in (3, 0, 1, 2, 0)]
    whole = opened(folders["owlv2"])
    seen: list[tuple[int, int]] = []
    score = owl.Owl._score

    def spy(self: Any, pixels: Any, texts: Any, asked: Any) -> Any:
        seen.append((len(pixels), asked.shape[1]))
        return score(self, pixels, texts, asked)

    monkeypatch.setattr(owl.Owl, "_score", spy)
    wanted = whole(whole.prepare(JPEGS, phrases))
    for budget, pieces, texts in (
        ({}, [(5, 10)], [22]),
        ({"batch_pixels": 2 * SIDE**2}, [(2, 1), (2, 7), (1, 10)], [22]),
        ({"batch_tokens": 11 * 16}, [(2, 1), (1, 4), (1, 7), (1, 10)], [11, 11]),  # padding counts
        ({"batch_pixels": 1, "batch_tokens": 1}, [(1, 1), (1, 1), (1, 4), (1, 7), (1, 10)], [1] * 22),
    ):
        grounder = opened(folders["owlv2"], **budget)
        read = count(grounder._model.base_model.text_model)
        seen.clear()
        found = grounder(grounder.prepare(JPEGS, phrases))
        assert (seen, read) == (pieces, texts)
        for got, expected in zip(found, wanted, strict=True):
            assert_same(got, expected, 1e-5)


OPENING = """
import sys
from vesl.models import ModelError, open_grounder
from vesl.models.options import Grounding
for model in sys.argv[1:]:
    try:
        open_grounder(Grounding(model=model, device="cpu"))
    except ModelError:
        print("refused")
"""


def test_nothing_is_printed_on_opening(folders: dict[str, Path], tmp_path: Path) -> None:
    """The library draws a progress bar, and a table where weights do not fit; here they end in the ModelError.

    In a process of its own: pytest has put something else into the place of the stream that the library's logger took.
    """
    lost = weights(folders["owlv2"], tmp_path, lambda w: w.pop("class_head.dense0.weight"))
    given = [f"{folder}@{hub.digest(folder)}" for folder in (folders["owlv2"], lost)]
    done = subprocess.run([sys.executable, "-c", OPENING, *given], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("refused\n", "")
    opened(folders["owlv2"])
    assert transformers.utils.logging.is_progress_bar_enabled()
    assert transformers.utils.logging.get_verbosity() == logging.WARNING
