"""Samples in the formats of other tools, as plain rows: COCO's JSON, GRIT's columns, a hub's data set with its card.

Boxes are x0, y0, x1, y1 in 0..1 of the stored image, as in `Sample`, unless a format wants them otherwise.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import yaml

from .captions import visible
from .found import normalise
from .records import BOX, CAPTION, Region, Sample

# The columns of the released GRIT (Peng et al. 2023, KOSMOS-2, section 2; zzliang/GRIT); COYO's own stay null.
GRIT = pa.schema(
    [
        ("key", pa.string()),
        ("clip_similarity_vitb32", pa.float64()),
        ("clip_similarity_vitl14", pa.float64()),
        ("id", pa.int64()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("noun_chunks", pa.list_(pa.list_(pa.float64()))),
        ("ref_exps", pa.list_(pa.list_(pa.float64()))),
    ]
)

_TEXT = {"dtype": "string", "_type": "Value"}
_INT, _FLOAT = {"dtype": "int32", "_type": "Value"}, {"dtype": "float32", "_type": "Value"}
_FEATURES: dict[str, Any] = {  # as `datasets` writes them; the list form of structs is read by its old versions too
    "image": {"_type": "Image"},
    **dict.fromkeys(("key", "url", "sha256"), _TEXT),
    **dict.fromkeys(("width", "height"), _INT),
    "alt_text": _TEXT,
    "captions": [{"text": _TEXT, "model": _TEXT}],
    "regions": [
        {
            "box": {"feature": _FLOAT, "length": 4, "_type": "Sequence"},
            "phrase": _TEXT,
            "score": _FLOAT,
            "caption": _INT,
            "span": {"feature": _INT, "length": 2, "_type": "Sequence"},
        }
    ],
    "select": _TEXT,
}
HUGGING_FACE = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        *((name, pa.string()) for name in ("key", "url", "sha256")),
        *((name, pa.int32()) for name in ("width", "height")),
        ("alt_text", pa.string()),
        ("captions", pa.list_(CAPTION)),
        (
            "regions",
            pa.list_(
                pa.struct(
                    [
                        ("box", BOX),
                        ("phrase", pa.string()),
                        ("score", pa.float32()),
                        ("caption", pa.int32()),
                        ("span", pa.list_(pa.int32(), 2)),
                    ]
                )
            ),
        ),
        ("select", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


def count(sample: Sample, counts: Counter[str], phrases: Counter[str]) -> None:
    """Add a sample to the counts of a part, and its normalised phrases to theirs."""
    counts["images"] += 1
    counts["captions"] += len(sample.captions)
    counts["regions"] += len(sample.regions)
    counts["without_regions"] += not sample.regions
    counts["pairs"] += len({region.caption for region in sample.regions})
    counts["caption_words"] += sum(len(caption.text.split()) for caption in sample.captions)
    counts["phrase_words"] += sum(len(region.phrase.split()) for region in sample.regions)
    phrases.update(normalise(region.phrase) for region in sample.regions)


def coco_image(number: int, sample: Sample) -> dict[str, Any]:
    """An image of a COCO document."""
    about = {name: getattr(sample, name) for name in ("width", "height", "key", "url", "sha256")}
    return {"id": number, "file_name": f"{sample.key}.jpg", **about}


def coco_regions(
    image: int, sample: Sample, categories: Mapping[str, int], first: int, caption: int
) -> list[dict[str, Any]]:
    """An image's annotations, numbered from `first`; its captions are numbered from `caption`.

    `bbox` is x, y, width, height in pixels of the stored image, rounded to 0.001; `score` to 0.000001. `phrase` is as
    it stands in the caption, `category_id` that of the phrase as `normalise` has it.
    """
    return [
        {
            "id": number,
            "image_id": image,
            "category_id": categories[normalise(region.phrase)],
            **_bbox(region, sample),
            "phrase": region.phrase,
            "score": round(region.score, 6),
            "caption_id": caption + region.caption,
            "span": list(region.span),
        }
        for number, region in enumerate(sample.regions, first)
    ]


def coco_captions(image: int, sample: Sample, first: int) -> list[dict[str, Any]]:
    """An image's captions as annotations, numbered from `first`."""
    return [
        {"id": number, "image_id": image, "caption": caption.text, "model": caption.model}
        for number, caption in enumerate(sample.captions, first)
    ]


def _bbox(region: Region, sample: Sample) -> dict[str, Any]:
    x0, y0, x1, y1 = (v * side for v, side in zip(region.box, (sample.width, sample.height) * 2, strict=True))
    box = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
    return {"bbox": box, "area": round((x1 - x0) * (y1 - y0), 3), "segmentation": [], "iscrowd": 0}


def grit_rows(sample: Sample) -> Iterator[dict[str, Any]]:
    """A row for each caption that has regions; an item is [start, end, x0, y0, x1, y1, score] (GRIT)."""
    about = {"key": sample.key, "url": sample.url, "width": sample.width, "height": sample.height}
    for i, caption in enumerate(sample.captions):
        chunks = [[*r.span, *r.box, r.score] for r in sample.regions if r.caption == i]
        if chunks:
            yield {**about, "caption": caption.text, "noun_chunks": chunks, "ref_exps": chunks}


def hugging_face_row(sample: Sample, image: bytes) -> dict[str, Any]:
    """A sample with its JPEG (HUGGING_FACE)."""
    return {"image": {"bytes": image, "path": f"{sample.key}.jpg"}, **asdict(sample)}


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
