"""The data card of a data set exported for a hub: what is in it, from where, under which terms, and its limits."""

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from .captions import visible


def escaped(text: str) -> str:
    """Text from strangers within Markdown: no markup, no HTML, no link, no line break, nothing that turns it around."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~>@:/])", r"\\\1", html.escape(visible(text), quote=False))


def card(name: str, totals: Mapping[str, Any], recipe: Any, chain: Sequence[Mapping[str, Any]]) -> str:
    """The data card of a data set, in Markdown: front matter for the hub, statistics, licences, limits, recipe.

    totals: what `count` counted, and `top`: the most frequent phrases with their counts. recipe: JSON; chain: the steps
    as `index.json` has them.
    """
    images, regions, captions = (max(1, totals.get(name, 0)) for name in ("images", "regions", "captions"))
    front = {
        "pretty_name": name,
        "license": "other",
        "task_categories": ["zero-shot-object-detection", "image-to-text"],
        "size_categories": [_size(totals["images"])],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    numbers = {
        "images": f"{totals['images']:,}",
        "images without a region": f"{totals.get('without_regions', 0):,}",
        "captions": f"{totals.get('captions', 0):,}",
        "words per caption": f"{totals.get('caption_words', 0) / captions:.1f}",
        "regions": f"{totals['regions']:,}",
        "regions per image": f"{totals['regions'] / images:.2f}",
        "words per region": f"{totals.get('phrase_words', 0) / regions:.1f}",
    }
    models = sorted({str(v) for stage in chain for v in _models(stage["options"])})
    text = json.dumps({"recipe": recipe, "chain": chain}, indent=2, ensure_ascii=True)
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False, allow_unicode=False),
        name=escaped(name),
        numbers="\n".join(f"| {name} | {number} |" for name, number in numbers.items()),
        phrases="\n".join(f"| {escaped(phrase)} | {count:,} |" for phrase, count in totals["top"]),
        models="\n".join(f"- {escaped(model)}" for model in models),
        recipe=text.replace("`", "\\u0060").replace("<", "\\u003c"),
    )


def _models(options: Any) -> Iterator[str]:
    """Every `model` (or tagger) that is named anywhere in a step's options."""
    for key, value in options.items() if isinstance(options, dict) else ():
        if key in ("model", "tagger") and isinstance(value, str):
            yield value
        for inner in value if isinstance(value, list | tuple) else [value]:
            yield from _models(inner)


def _size(images: int) -> str:
    limits = {1_000: "1K", 10_000: "10K", 100_000: "100K", 1_000_000: "1M", 10_000_000: "10M", 100_000_000: "100M"}
    names = ["n<1K", *(f"{a}<n<{b}" for a, b in zip(limits.values(), [*list(limits.values())[1:], "1B"], strict=True))]
    return [*names, "n>1B"][sum(images >= limit for limit in (*limits, 1_000_000_000))]


_CARD = """---
{front}---

# {name}

Images from the web, each with captions, noun phrases cut from them, and a box for each phrase, made by VESL: an open
implementation of the labelling pipeline of Chen et al., Contrastive Localized Language-Image Pre-Training
(arXiv 2410.02746). No person has checked these labels.

    from datasets import load_dataset
    data = load_dataset("this folder", split="train")

## Statistics

| what | number |
|---|---|
{numbers}

The most frequent phrases (in lower case; counted over the 1,000 most frequent of each part):

| phrase | regions |
|---|---|
{phrases}

## Columns

- `image`: an upright RGB JPEG without EXIF, as it was normalised after the download; `width`, `height`: its pixels;
  `sha256`: of its bytes.
- `key`: of the normalised `url`; `alt_text`: the caption of the web page, empty where there was none.
- `captions`: `text`, and the `model` that wrote it.
- `regions`, in falling score: `box` is x0, y0, x1, y1 in 0..1 of the image, x right, y down; `phrase` stands in
  `captions[caption].text[span[0]:span[1]]`; `score` is the detector's and no probability.
- `select`: the fingerprint of the filter that decided.

## Licences

The images and the texts found with them belong to whoever published them at their URLs; nothing here grants a licence
to them. Captions and boxes were made by the models below, each under terms of its own that may bind their output too:

{models}

## Limits

- Links, images and texts are as the web had them: expect offensive, private, mistaken and mislabelled content.
- A box is a guess of a model above a threshold. An object without a box is not absent, and counts are no counts.
- Captions of models describe things that are not there; a phrase is only as good as its caption.
- The languages, places and people of the web are not those of the world.
- Requests for removal reach whoever publishes this folder; exported again after `vesl takedown`, it is without them.

## Recipe

```json
{recipe}
```
"""
