"""Captioners without a chat: BLIP, whose prompt is how the caption begins, and Florence-2, whose prompt is a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList

from ..contract import Captioner, ModelError
from ..options import Captioning
from .generate import Generate, Row

TASKS = (
    "<CAPTION>",
    "<DETAILED_CAPTION>",
    "<MORE_DETAILED_CAPTION>",
    "<OCR>",
)  # of Florence-2, those that answer in text


def open_captioner(options: Captioning, folder: Path, kind: str) -> Captioner:
    """Load BLIP or Florence-2. Raises ModelError, also for prompts that the model was never taught."""
    if kind == "florence2":
        for prompt in options.prompts:
            if prompt not in TASKS:
                raise ModelError(f"model {options.model}: prompts: Florence-2 takes {', '.join(TASKS)}, not {prompt!r}")
        return Florence(options, folder)
    if options.prompts == Captioning(model="").prompts:
        raise ModelError(
            f"model {options.model}: prompts: BLIP goes on from its prompt and follows no instruction; "
            f"set prompts: [''] or the beginning of a caption, such as ['a photograph of']"
        )
    return Blip(options, folder)


def places_left(captioner: Generate, least: int) -> int:
    """How many tokens the decoder can count before the new ones. Raises ValueError where there are fewer than least."""
    places, tokens = captioner.model.config.text_config.max_position_embeddings, captioner.options.max_new_tokens
    if places - tokens < least:
        raise ValueError(f"max_new_tokens: {tokens} is more than its {places} places allow")
    return int(places - tokens)


class Blip(Generate):
    """BLIP. The prompt is part of the caption, as in the library's own example."""

    @property
    def writer(self) -> Any:
        """The part that writes."""
        return self.model.text_decoder

    @property
    def stops(self) -> set[int]:
        """BLIP ends a caption with the separator."""
        return {self.model.config.text_config.sep_token_id}

    def row(self, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        """Make pixel_values [1, 3, H, W], and input_ids and attention_mask [1, tokens] of [CLS] prompt [SEP]."""
        room = places_left(self, 2)
        words = self.tokenizer(prompt)["input_ids"]
        words = torch.tensor([words[: room - 1] + words[-1:] if len(words) > room else words])
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "input_ids": words, "attention_mask": torch.ones_like(words)}

    def generate(self, rows: Sequence[Row], luck: LogitsProcessorList) -> list[list[int]]:
        """Run rows whose prompts are equally long together: BLIP counts places from the first token, padding or not."""
        lengths = [row.inputs["input_ids"].shape[1] for row in rows]
        found: list[list[int]] = [[] for _ in rows]
        for length in sorted(set(lengths)):
            own = [k for k, each in enumerate(lengths) if each == length]
            inputs = self.inputs([rows[k] for k in own])
            some = LogitsProcessorList([draw.of(own) for draw in luck])
            for k, tokens in zip(own, self.model.generate(**inputs, logits_processor=some).tolist(), strict=True):
                found[k] = tokens[1:]  # without the mark of the beginning
        return found


class Florence(Generate):
    """Florence-2: an encoder of image and task, and a decoder that begins anew."""

    side = "right"  # the encoder counts places from the first token

    def row(self, image: Image.Image, prompt: str) -> dict[str, torch.Tensor]:
        """Make pixel_values [1, 3, H, W], and input_ids and attention_mask [1, image and task tokens]."""
        places_left(self, 2)
        inputs = self.processor(images=[image], text=[prompt], return_tensors="pt")
        return {name: inputs[name] for name in ("pixel_values", "input_ids", "attention_mask")}

    def generate(self, rows: Sequence[Row], luck: LogitsProcessorList) -> list[list[int]]:
        """Run the model; the first token is left out: it starts the decoder and is the same that ends a text."""
        return self.model.generate(**self.inputs(rows), logits_processor=luck)[:, 1:].tolist()  # type: ignore[no-any-return]
