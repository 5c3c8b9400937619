"""Samples in columns against the view of one row, and text from strangers in labels and in a data card.

What samples look like in each format is also tested by the formats' own readers (tests/pipeline/test_export.py).
"""

import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from vesl.transforms.card import escaped
from vesl.transforms.exports import (
    Samples,
    coco_captions,
    coco_images,
    coco_names,
    coco_regions,
    count,
    grit_table,
    hugging_face_table,
)
from vesl.transforms.found import normalise
from vesl.transforms.records import ADDS, Sample

TEXTS = ["a Red  ball", "the  OLD table", "犬", "Straße & co", " "]


def joined(rows: int, seed: int) -> pa.Table:
    """Rows as the steps' tables give them: some without captions or detections, scores that are often equal."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {"captions": [], "phrases": [], "detections": [], "verdicts": []}
    for _ in range(rows):
        captions = [{"text": f"caption {i} of  some words ", "model": f"m{i}@1"} for i in range(rng.integers(0, 4))]
        said = rng.integers(0, 5) if captions else 0
        phrases = [
            {"text": TEXTS[rng.integers(5)], "caption": int(rng.integers(len(captions))), "start": i, "end": i + 2}
            for i in range(said)
        ]
        found = [
            {"box": rng.random(4, np.float32), "phrase": int(rng.integers(said)), "score": rng.integers(1, 5) / 7}
            for _ in range(rng.integers(0, 9) if said else 0)
        ]
        verdicts = [["kept", "score"][rng.integers(2)] for _ in found]
        for name, value in zip(columns, (captions, phrases, found, verdicts), strict=True):
            columns[name].append(value)
    types = {field.name: field.type for schema in ADDS.values() for field in schema}
    keys = [f"{i:024x}" for i in range(rows)]
    about = {"key": keys, "url": [f"http://e.org/{key}" for key in keys], "sha256": [key[::-1] for key in keys]}
    sides = {name: pa.array(rng.integers(32, 999, rows), pa.int32()) for name in ("width", "height")}
    lists = {name: pa.array(values, types[name]) for name, values in columns.items()}
    alt = [None if i % 3 == 0 else f"alt {i}" for i in range(rows)]
    return pa.table({**about, **sides, "alt_text": pa.array(alt, pa.string()), **lists, "select": ["abc"] * rows})


@pytest.mark.parametrize("seed", range(8))
def test_columns_say_what_the_view_of_each_row_says(seed: int) -> None:
    whole = joined(60, seed)
    rows = whole.slice(7, 40)  # as batches are: pieces of a part
    samples, views = Samples.of(rows), [Sample.from_row(row) for row in rows.to_pylist()]
    grit, hub = grit_table(samples).to_pylist(), hugging_face_table(samples, [b"jpeg"] * 40).to_pylist()
    regions = [region for view in views for region in view.regions]
    captions = [caption for view in views for caption in view.captions]
    assert len(regions) > 20
    assert [
        (row["key"], row["url"], row["width"], row["height"], row["caption"], row["noun_chunks"]) for row in grit
    ] == [
        (view.key, view.url, view.width, view.height, caption.text, chunks)
        for view in views
        for i, caption in enumerate(view.captions)
        if (chunks := [[*r.span, *r.box, r.score] for r in view.regions if r.caption == i])
    ]
    assert all(row["ref_exps"] == row["noun_chunks"] and row["id"] is None for row in grit)
    for row, view in zip(hub, views, strict=True):
        assert row["image"] == {"bytes": b"jpeg", "path": f"{view.key}.jpg"}
        assert (row["key"], row["sha256"], row["alt_text"]) == (view.key, view.sha256, view.alt_text)
        assert [tuple(one.values()) for one in row["captions"]] == [(c.text, c.model) for c in view.captions]
        assert [tuple(tuple(v) if isinstance(v, list) else v for v in one.values()) for one in row["regions"]] == [
            (r.box, r.phrase, r.score, r.caption, r.span) for r in view.regions
        ]
    found, phrases = count(samples)
    assert phrases == Counter(normalise(region.phrase) for region in regions)
    assert found["pairs"] == len(grit)
    assert found["without_regions"] == sum(not view.regions for view in views)
    assert (found["images"], found["captions"], found["regions"]) == (40, len(captions), len(regions))
    assert found["caption_words"] == sum(len(caption.text.split()) for caption in captions)
    assert found["phrase_words"] == sum(len(region.phrase.split()) for region in regions)


def test_coco_numbers_images_regions_and_captions() -> None:
    rows = joined(30, 3)
    samples, views = Samples.of(rows), [Sample.from_row(row) for row in rows.to_pylist()]
    names = {name: i for i, name in enumerate(sorted(set(coco_names(samples.normal).to_pylist())))}
    images = list(coco_images(samples, 11))
    captions = list(coco_captions(samples, 11, 501))
    regions = list(coco_regions(samples, names, 11, 1001, 501))
    assert [(one["id"], one["key"]) for one in images] == [(i, view.key) for i, view in enumerate(views, 11)]
    assert [(one["id"], one["image_id"], one["caption"], one["model"]) for one in captions] == [
        (number, image, caption.text, caption.model)
        for number, (image, caption) in enumerate(((i, c) for i, v in enumerate(views, 11) for c in v.captions), 501)
    ]
    wanted = [(i, view, region) for i, view in enumerate(views, 11) for region in view.regions]
    assert [one["id"] for one in regions] == list(range(1001, 1001 + len(wanted)))
    said = {one["id"]: one for one in captions}
    for one, (image, view, region) in zip(regions, wanted, strict=True):
        x, y, width, height = one["bbox"]
        sides = np.array([view.width, view.height] * 2)
        np.testing.assert_allclose([x, y, x + width, y + height], np.array(region.box) * sides, atol=0.0011)
        assert (one["image_id"], one["phrase"], tuple(one["span"])) == (image, region.phrase, region.span)
        assert one["score"] == round(region.score, 6)
        assert one["area"] == pytest.approx(width * height, abs=1)
        caption = said[one["caption_id"]]
        assert (caption["image_id"], caption["caption"]) == (image, view.captions[region.caption].text)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("verdicts", [["kept"]]),
        ("detections", [[{"box": [0, 0, 1, 1], "phrase": 1, "score": 0.5}] * 2]),
        ("phrases", [[{"text": "a ball", "caption": 1, "start": 0, "end": 6}]]),
        ("phrases", [[{"text": "a ball", "caption": None, "start": 0, "end": 6}]]),
    ],
)
def test_columns_that_do_not_fit_each_other_are_an_error(column: str, value: list[Any]) -> None:
    types = {field.name: field.type for schema in ADDS.values() for field in schema}
    good: dict[str, list[Any]] = {
        "captions": [[{"text": "a ball", "model": "m@1"}]],
        "phrases": [[{"text": "a ball", "caption": 0, "start": 0, "end": 6}]],
        "detections": [[{"box": [0, 0, 1, 1], "phrase": 0, "score": 0.5}] * 2],
        "verdicts": [["kept", "kept"]],
    }
    one = {"key": ["k"], "url": ["u"], "sha256": ["s"], "alt_text": pa.array([None], pa.string()), "select": ["f"]}
    one |= {"width": pa.array([9], pa.int32()), "height": pa.array([9], pa.int32())}

    def samples(lists: dict[str, list[Any]]) -> Samples:
        return Samples.of(pa.table({**one, **{name: pa.array(v, types[name]) for name, v in lists.items()}}))

    assert len(samples(good).images) == 2
    with pytest.raises(ValueError, match=r"verdict|not there"):
        samples({**good, column: value})


def test_a_category_stands_in_a_label_of_any_tool() -> None:
    """Label Studio's importer writes categories into attributes as they are; CVAT's labels have 64 characters."""
    phrases = [
        "a red ball",
        'a "big" dog',
        "salt & pepper",
        "a <b>",
        "x" * 63 + " yz",
        "犬\x00\x1b",
        "o'neill",
        "a\ufffe",
    ]
    names = coco_names(pa.array(phrases)).to_pylist()
    assert names[:4] == ["a red ball", "a 'big' dog", "salt + pepper", "a (b)"]
    assert names[4] == "x" * 63
    assert names[5:] == ["犬\ufffd\ufffd", "o'neill", "a\ufffd"]
    for name in names:
        assert ElementTree.fromstring(f'<Label value="{name}"/>').get("value") == name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red ball", "a red ball"),
        ("straße, 犬", "straße, 犬"),
        ("<script>alert(1)</script>", r"&lt;script&gt;alert\(1\)&lt;\/script&gt;"),
        ("a | b\n# c", "a \\| b\ufffd\\# c"),
        ("[x](http://e.org) `y` **z**", r"\[x\]\(http\:\/\/e\.org\) \`y\` \*\*z\*\*"),
        ("\u202edog\u200b\x1b[1m&amp;", "\ufffddog\ufffd\ufffd\\[1m&amp;amp;"),
    ],
)
def test_text_from_strangers_stays_text(text: str, shown: str) -> None:
    assert escaped(text) == shown
