"""BLIP and Florence-2, tiny and random, against the library's own path, one image at a time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.captioners.test_generate import (
    ALT,
    JPEGS,
    LETTERS,
    SIGHT,
    captions,
    changed,
    options,
    refused,
    save,
    tokenizer,
)
from vesl.models import hub, open_captioner
from vesl.models.captioners import tasks
from vesl.models.contract import Written
from vesl.transforms.images import decode

BLIP = ("", "a photograph of", "{alt_text} in")
FLORENCE = ("<CAPTION>", "<MORE_DETAILED_CAPTION>")
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


def tiny_blip(folder: Path) -> str:
    """BLIP with its BERT of a decoder."""
    marks = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = [chr(k) for k in range(33, 127) if not chr(k).isupper()]
    vocabulary = {token: k for k, token in enumerate((*marks, *pieces, *(f"##{piece}" for piece in pieces)))}
    words = transformers.BertTokenizerFast(vocab=vocabulary)
    sep, dec = vocabulary["[SEP]"], len(vocabulary)  # the beginning has a number, but no name
    text = {"hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48, "projection_dim": 16}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    text |= {"vocab_size": dec + 1, "bos_token_id": dec, "eos_token_id": 2, "sep_token_id": sep, "pad_token_id": 0}
    config = transformers.BlipConfig(
        text_config=text, vision_config=SIGHT, projection_dim=16, image_text_hidden_size=16
    )
    images = transformers.BlipImageProcessorPil(size={"height": 28, "width": 28})
    model = transformers.BlipForConditionalGeneration(config)
    return save(folder, model, transformers.BlipProcessor(images, words))


def tiny_florence(folder: Path) -> str:
    """Florence-2: DaViT and BART."""
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}
    words = tokenizer("<s>", "<pad>", "</s>", "<image>", extra_special_tokens={"image_token": "<image>"}, **roles)
    start, pad, end = LETTERS, LETTERS + 1, LETTERS + 2
    config = transformers.Florence2Config(
        vision_config={
            "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
            "patch_prenorm": (False, True), "embed_dim": (16, 32), "num_heads": (2, 2), "num_groups": (2, 2),
            "window_size": 4, "projection_dim": 32,
        },
        text_config={
            "model_type": "bart", "vocab_size": LETTERS + 4, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
            "max_position_embeddings": 256, "bos_token_id": start, "pad_token_id": pad, "eos_token_id": end,
            "decoder_start_token_id": end, "forced_eos_token_id": end, "is_encoder_decoder": True,
        },
        image_token_id=LETTERS + 3,
    )  # fmt: skip
    images = transformers.CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 8 * 8 + 1
    model = transformers.Florence2ForConditionalGeneration(config)
    ids = {"decoder_start_token_id": end, "eos_token_id": end, "pad_token_id": pad, "bos_token_id": start}
    ids |= {"forced_bos_token_id": start, "forced_eos_token_id": end}
    processor = transformers.Florence2Processor(images, words, post_processor_config={"pure_text": {}})
    return save(folder, model, processor, **ids)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def florence(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_florence(tmp_path_factory.mktemp("florence"))


def test_blip_in_a_batch_says_what_the_library_says_of_each_image_alone(blip: str) -> None:
    folder = hub.split(blip)[0]
    model = transformers.BlipForConditionalGeneration.from_pretrained(folder).eval()
    model.text_decoder.generation_config = transformers.GenerationConfig()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    expected: list[list[Written]] = []
    for data, alt in zip(JPEGS, ALT, strict=True):
        expected.append([])
        for prompt in BLIP:
            text = [prompt.format(alt_text=alt)] if prompt else None  # alone, the library's example without a prompt
            inputs = processor(images=[decode(data)], text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=12, **GREEDY)[0]
            said = processor.decode(ids, skip_special_tokens=True).strip()
            expected[-1].append(Written(said, model.config.text_config.sep_token_id in ids.tolist()))
    assert len({each.text for row in expected for each in row}) > 8
    assert captions(options(blip, prompts=BLIP)) == expected
    assert expected[0][1].text.startswith("a photograph of")
    assert expected[2][2].text.startswith(ALT[2])


def test_florence_in_a_batch_says_what_the_library_says_of_each_image_alone(florence: str) -> None:
    folder = hub.split(florence)[0]
    model = transformers.Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    model.generation_config.forced_eos_token_id = None  # what is cut off would end as if it were whole
    processor = transformers.AutoProcessor.from_pretrained(folder)
    expected: list[list[Written]] = []
    for data in JPEGS:
        expected.append([])
        for task in FLORENCE:
            inputs = processor(images=decode(data), text=task, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=12, **GREEDY)
            raw = processor.batch_decode(ids, skip_special_tokens=False)[0]
            said = processor.post_process_generation(raw, task=task, image_size=decode(data).size)[task]
            ended = model.generation_config.eos_token_id in ids[0, 1:].tolist()
            expected[-1].append(Written(said.replace("<pad>", "").strip(), ended))
    assert len({each.text for row in expected for each in row}) > 3
    assert captions(options(florence, prompts=FLORENCE)) == expected


@pytest.mark.parametrize(("kind", "prompts"), [("blip", BLIP), ("florence", FLORENCE)])
def test_prompts_of_several_lengths_in_one_batch_change_nothing(
    kind: str, prompts: Any, request: pytest.FixtureRequest
) -> None:
    captioner: Any = open_captioner(options(request.getfixturevalue(kind), prompts=prompts))
    prepared = captioner.prepare(JPEGS, ALT)
    mixed = [row for rows in prepared for row in rows]
    assert len({row.inputs["input_ids"].shape[1] for row in mixed}) > 1
    alone = [captioner([[row]])[0] for row in mixed]
    assert len({each.text for [each] in alone}) > 3
    assert captioner([mixed]) == alone


@pytest.mark.parametrize(("kind", "prompts"), [("blip", BLIP), ("florence", FLORENCE)])
def test_draws_do_not_depend_on_the_batch(kind: str, prompts: Any, request: pytest.FixtureRequest) -> None:
    asked = options(request.getfixturevalue(kind), prompts=prompts, temperature=1.5)
    together = captions(asked)
    assert [captions(asked, JPEGS[k : k + 1], ALT[k : k + 1])[0] for k in range(4)] == together
    assert captions(options(asked.model, prompts=prompts, temperature=1.5, seed=5)) != together


@pytest.mark.parametrize(("kind", "prompts"), [("blip", BLIP), ("florence", FLORENCE)])
def test_too_little_memory_changes_nothing(
    kind: str, prompts: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner: Any = open_captioner(options(request.getfixturevalue(kind), prompts=prompts, temperature=1.0))
    whole, real = captioner(captioner.prepare(JPEGS, ALT)), captioner.model.generate

    def small(**inputs: Any) -> Any:
        if len(inputs["pixel_values"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(**inputs)

    monkeypatch.setattr(captioner.model, "generate", small)
    assert captioner(captioner.prepare(JPEGS, ALT)) == whole


def test_blip_cuts_a_web_caption_that_has_no_place(blip: str) -> None:
    [[said]] = captions(options(blip, prompts=("{alt_text}",)), JPEGS[:1], ["very " * 400 + "[SEP] [PAD] end"])
    assert said.text.startswith("very very")


def test_prompts_that_a_model_was_not_taught_are_refused(blip: str, florence: str, tmp_path: Path) -> None:
    default = options("a/b@c", prompts=tasks.Captioning(model="").prompts).prompts
    folders = [Path(hub.split(reference)[0]) for reference in (blip, florence)]
    assert "prompts: ['']" in refused(folders[0], prompts=default)
    assert "<CAPTION>" in refused(folders[1], prompts=default)
    assert "max_new_tokens" in refused(folders[0], prompts=("",), max_new_tokens=63)
    assert "max_new_tokens" in refused(folders[1], prompts=FLORENCE, max_new_tokens=300)
    lacking = changed(folders[0], tmp_path / "lacking")
    (lacking / "tokenizer.json").unlink()
    assert "no tokenizer" in refused(lacking, prompts=BLIP)
