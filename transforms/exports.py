"""Samples in the formats of other tools: COCO's JSON, GRIT's columns, a hub's data set (its card is in card.py).

Columns in, columns out, and an object for each row only where JSON wants one. Boxes are x0, y0, x1, y1 in 0..1 of the
stored image, as in `Sample`, unless a format wants them otherwise.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .found import Float32, Int64, blocks, normalised, numbers, offsets
from .records import BOX, CAPTION

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


@dataclass(frozen=True)
class Samples:
    """Some samples in columns, and what select kept of them: by image, in falling score.

    rows: key, url, sha256, width, height, alt_text, captions, select. texts: string, all their captions; row i owns
    firsts[i] .. firsts[i + 1] of them, int64 [rows + 1]. Of each region: images, int64 [n], its row; boxes, float32
    [n, 4]; scores, float32 [n]; phrases, string [n], as they stand in the caption; normal, string [n], as `normalised`
    has them; captions, int64 [n], index in its row's captions; spans, int64 [n, 2], the phrase's characters there.
    """

    rows: pa.Table
    texts: pa.StringArray
    firsts: Int64
    images: Int64
    boxes: Float32
    scores: Float32
    phrases: pa.StringArray
    normal: pa.StringArray
    captions: Int64
    spans: Int64

    @staticmethod
    def of(rows: pa.Table) -> "Samples":
        """Choose the regions of one row or more of the joined columns, and `select`, the fingerprint.

        Raises ValueError where the columns do not fit each other.
        """
        detections, verdicts, phrases, captions, width, height = (
            rows[name].combine_chunks() for name in ("detections", "verdicts", "phrases", "captions", "width", "height")
        )
        if not np.array_equal(offsets(detections), offsets(verdicts)):
            raise ValueError("not every detection has its verdict")
        [(_, _, found)] = blocks(detections, width, height, phrases, None, len(rows))
        kept = np.flatnonzero(np.asarray(pc.equal(verdicts.flatten(), "kept")))
        regions = found.take(kept[np.lexsort((-found.scores[kept], found.images[kept]))])
        places, firsts, spans = regions.rows, offsets(captions), phrases.flatten()
        cited = regions.of_phrase(regions.captions, -1)
        if np.any((places < 0) | (cited < 0) | (cited >= np.diff(firsts)[regions.images])):
            raise ValueError("a region cites a phrase or a caption that is not there")
        return Samples(
            rows=rows.set_column(rows.column_names.index("alt_text"), "alt_text", pc.fill_null(rows["alt_text"], "")),
            texts=pc.struct_field(captions.flatten(), "text"),
            firsts=firsts,
            images=regions.images,
            boxes=regions.boxes,
            scores=regions.scores,
            phrases=regions.texts.take(pa.array(places)),
            normal=regions.normal.take(pa.array(places)),
            captions=cited,
            spans=np.stack([numbers(pc.struct_field(spans, end), np.int64, -1)[places] for end in ("start", "end")], 1),
        )

    def __len__(self) -> int:
        return len(self.rows)


def count(samples: Samples) -> tuple[Counter[str], Counter[str]]:
    """What is counted of samples, and how often each normalised phrase is there."""
    regions = np.bincount(samples.images, minlength=len(samples))
    counts = {
        "images": len(samples),
        "captions": len(samples.texts),
        "regions": len(samples.images),
        "without_regions": int((regions == 0).sum()),
        "pairs": len(np.unique(samples.firsts[samples.images] + samples.captions)),
        "caption_words": _words(normalised(samples.texts)),
        "phrase_words": _words(samples.normal),
    }
    return Counter(counts), tally(samples.normal)


def tally(texts: pa.StringArray) -> Counter[str]:
    """How often each text is there."""
    return Counter({one["values"]: one["counts"] for one in pc.value_counts(texts).to_pylist()})


def _words(normal: pa.StringArray) -> int:
    return int(
        (numbers(pc.count_substring(normal, " "), np.int64, 0) + numbers(pc.not_equal(normal, ""), bool, 0)).sum()
    )


def coco_names(normal: pa.StringArray) -> pa.StringArray:
    """Categories of normalised phrases: what they are, for tools that make labels of their own of them.

    Label Studio's importer writes them into XML as they are, so there are no marks of XML (nor control characters) in
    them; CVAT's labels are at most 64 characters long.
    """
    plain = normal
    for mark, other in {'"': "'", "&": "+", "<": "(", ">": ")"}.items():
        plain = pc.replace_substring(plain, mark, other)
    plain = pc.replace_substring_regex(plain, r"[\x00-\x1f\x7f\x{fffe}\x{ffff}]", "\ufffd")
    return pc.utf8_trim_whitespace(pc.utf8_slice_codeunits(plain, 0, 64))


def coco_images(samples: Samples, first: int) -> Iterator[dict[str, Any]]:
    """Images of a COCO document, numbered from `first`."""
    for number, row in enumerate(samples.rows.select(["width", "height", "key", "url", "sha256"]).to_pylist(), first):
        yield {"id": number, "file_name": f"{row['key']}.jpg", **row}


def coco_regions(
    samples: Samples, categories: Mapping[str, int], image: int, first: int, caption: int
) -> Iterator[dict[str, Any]]:
    """Regions as annotations, numbered from `first`; images are numbered from `image`, captions from `caption`.

    `bbox` is x, y, width, height in pixels of the stored image, rounded to 0.001; `score` to 0.000001. `phrase` is as
    it stands in the caption, `category_id` that of its name by `coco_names`.
    """
    sides = np.stack([numbers(samples.rows[name].combine_chunks(), np.float64, 0) for name in ("width", "height")], 1)
    corner, other = np.hsplit(samples.boxes * np.tile(sides, 2)[samples.images], 2)
    size = other - corner
    columns = (
        samples.images + image,
        [categories[name] for name in coco_names(samples.normal).to_pylist()],
        np.concatenate([corner, size], axis=1).round(3),
        size.prod(axis=1).round(3),
        samples.phrases,
        samples.scores.astype(np.float64).round(6),
        samples.firsts[samples.images] + samples.captions + caption,
        samples.spans,
    )
    names = ("image_id", "category_id", "bbox", "area", "phrase", "score", "caption_id", "span")
    values = zip(*(column if isinstance(column, list) else column.tolist() for column in columns), strict=True)
    for number, row in enumerate(values, first):
        yield {"id": number, **dict(zip(names, row, strict=True)), "segmentation": [], "iscrowd": 0}


def coco_captions(samples: Samples, image: int, first: int) -> Iterator[dict[str, Any]]:
    """Captions as annotations, numbered from `first`; images are numbered from `image`."""
    owners = np.repeat(np.arange(image, image + len(samples)), np.diff(samples.firsts)).tolist()
    said = samples.rows["captions"].combine_chunks().flatten().to_pylist()
    for number, (owner, caption) in enumerate(zip(owners, said, strict=True), first):
        yield {"id": number, "image_id": owner, "caption": caption["text"], "model": caption["model"]}


def grit_table(samples: Samples) -> pa.Table:
    """A row for each caption that has regions; an item is [start, end, x0, y0, x1, y1, score] (GRIT)."""
    pairs = samples.firsts[samples.images] + samples.captions
    order = np.argsort(pairs, kind="stable")
    values = np.concatenate([samples.spans, samples.boxes, samples.scores[:, None]], axis=1, dtype=np.float64)[order]
    said, begins = np.unique(pairs[order], return_index=True)
    items = pa.ListArray.from_arrays(_int32(np.arange(len(values) + 1) * 7), pa.array(values.reshape(-1)))
    chunks = pa.ListArray.from_arrays(_int32([*begins, len(values)]), items)
    about = samples.rows.take(pa.array(samples.images[order][begins]))
    given = {**{name: about[name] for name in ("key", "url", "width", "height")}, "noun_chunks": chunks}
    given |= {"ref_exps": chunks, "caption": samples.texts.take(pa.array(said))}
    return pa.table([given.get(f.name, pa.nulls(len(said), f.type)).cast(f.type) for f in GRIT], schema=GRIT)


def hugging_face_table(samples: Samples, images: Sequence[bytes]) -> pa.Table:
    """Samples with their JPEGs (HUGGING_FACE)."""
    item = HUGGING_FACE.field("regions").type.value_type
    boxes, spans = (
        pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), type=kind)
        for values, kind in ((samples.boxes, item.field("box").type), (samples.spans, item.field("span").type))
    )
    captions = pa.array(samples.captions, pa.int32())
    regions = pa.StructArray.from_arrays(
        [boxes, samples.phrases, pa.array(samples.scores), captions, spans], fields=item
    )
    ends = np.searchsorted(samples.images, np.arange(len(samples) + 1))
    names = pc.binary_join_element_wise(samples.rows["key"].combine_chunks(), ".jpg", "")
    image = HUGGING_FACE.field("image").type
    given = {
        "image": pa.StructArray.from_arrays([pa.array(images, pa.binary()), names], fields=list(image)),
        "regions": pa.ListArray.from_arrays(_int32(ends), regions),
    }
    return pa.table([given.get(f.name) or samples.rows[f.name] for f in HUGGING_FACE], schema=HUGGING_FACE)


def _int32(values: Any) -> pa.Array:
    return pa.array(np.asarray(values, np.int32))
