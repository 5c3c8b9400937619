"""What is known of an image, as Arrow columns: which step adds which, and the frozen view of one row.

A row is spread over the steps' Parquet files, joined by key and position. `Sample` is only a view of it, for people
and for the shard's JSON; hot code works on the columns.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

KEY = pa.field("key", pa.string(), nullable=False)  # 24 hex digits of sha256(normalised URL)

INPUT = pa.schema([KEY, ("url", pa.string()), ("alt_text", pa.string()), ("source", pa.string()), ("row", pa.int64())])
# Where an image lies that needs no download: `path` (a local path or an fsspec URL) is a tar or a folder that holds
# `member` with the ending of an image format, or a Parquet file that has it in its row `row`. The other one is null.
# `stamp` tells what lies there from anything else that may take its place; null in older tables.
ARCHIVED = pa.struct([("path", pa.string()), ("member", pa.string()), ("row", pa.int64()), ("stamp", pa.string())])
# What an input table has beside INPUT, in this order, where the recipe names such a column or the source is an archive.
# What is expected is of the bytes as downloaded; hex digits are in lower case; null where the list says nothing usable.
INPUT_MORE = pa.schema(
    [
        ("expected_sha256", pa.string()),
        ("expected_md5", pa.string()),
        ("expected_phash", pa.int64()),  # the 64 bits, as a signed number
        ("archived", ARCHIVED),
    ]
)

# Every step's table starts with these; `reason` and `detail` are null where the row is kept.
OUTCOME = [
    KEY,
    pa.field("outcome", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("detail", pa.string()),
]

BOX = pa.list_(pa.field("item", pa.float32(), nullable=False), 4)  # x0, y0, x1, y1 in 0..1 of the stored image
CAPTION = pa.struct([("text", pa.string()), ("model", pa.string())])
# What was done to what `model` wrote to its prompt of that index: `caption` is the index in the row's captions, null
# where nothing is left; `text` is the original (or what a server said), at most 500 characters, null where it is empty.
CAPTION_NOTE = pa.struct(
    [
        ("model", pa.string()),
        ("prompt", pa.int16()),
        ("caption", pa.int16()),
        ("note", pa.string()),
        ("text", pa.string()),
    ]
)
# `caption` is the index in the row's captions; [start, end) are character positions in its text.
PHRASE = pa.struct([("text", pa.string()), ("caption", pa.int16()), ("start", pa.int32()), ("end", pa.int32())])
# What else was asked and answered: the User-Agent header sent, headers of the answer as they came (null where there was
# none), and "allowed" where robots.txt was asked.
HTTP = pa.struct(
    [
        ("user_agent", pa.string()),
        ("date", pa.string()),
        ("etag", pa.string()),
        ("last_modified", pa.string()),
        ("x_robots_tag", pa.string()),
        ("tdm_reservation", pa.string()),
        ("robots_txt", pa.string()),
    ]
)
# One pair of a box and a phrase; `phrase` is the index in the row's phrases.
DETECTION = pa.struct([("box", BOX), ("phrase", pa.int16()), ("score", pa.float32())])

ADDS: dict[str, pa.Schema] = {
    "download": pa.schema(
        [
            ("sha256", pa.string()),  # of the JPEG as stored
            ("source_sha256", pa.string()),  # of the bytes as downloaded
            ("source_format", pa.string()),
            ("source_width", pa.int32()),
            ("source_height", pa.int32()),
            ("width", pa.int32()),  # of the JPEG as stored, upright
            ("height", pa.int32()),
            ("final_url", pa.string()),  # after redirects
            ("content_type", pa.string()),
            ("http", HTTP),
            ("offset", pa.int64()),  # of the JPEG's first byte in the tar that the footer names
            ("size", pa.int32()),  # in bytes
            ("phash", pa.int64()),  # perceptual hash of the JPEG as stored; null where it has hardly any structure
            ("drift_bits", pa.int16()),  # of a row kept with other bytes than expected: how far phash is from expected
            # When the answer came, by our clock (its own is `http.date`); null where the image is of an archive.
            ("fetched_at", pa.timestamp("ms", "UTC")),
        ]
    ),
    "dedup": pa.schema([]),
    "caption": pa.schema([("captions", pa.list_(CAPTION)), ("caption_notes", pa.list_(CAPTION_NOTE))]),
    "phrases": pa.schema([("phrases", pa.list_(PHRASE))]),
    "ground": pa.schema([("detections", pa.list_(DETECTION)), ("truncated", pa.bool_())]),
    # For each detection what a second model says of it; null where it was not asked. Its meaning is the model's.
    "score": pa.schema([("agreement", pa.list_(pa.float32()))]),
    # For each detection: "kept", or the rule that rejected it.
    "select": pa.schema([("verdicts", pa.list_(pa.string()))]),
    "pack": pa.schema([("shard", pa.string()), ("position", pa.int32())]),
}


def input_schema(names: Collection[str]) -> pa.Schema:
    """The columns of an input table, of which some of INPUT_MORE are among `names`."""
    return pa.schema([*INPUT, *(field for field in INPUT_MORE if field.name in names)])


def step_schema(step: str) -> pa.Schema:
    """The columns of a step's Parquet file: key, outcome, reason, detail, then what the step adds."""
    return pa.schema([*OUTCOME, *ADDS[step]])


@dataclass(frozen=True)
class Caption:
    """A caption and the reference (`name@revision`) of the model that wrote it."""

    text: str
    model: str


@dataclass(frozen=True)
class Region:
    """A box that `select` kept, with its phrase cut from a caption: `captions[caption].text[span[0]:span[1]]`."""

    box: tuple[float, float, float, float]
    phrase: str
    score: float
    caption: int
    span: tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One image as a trainer sees it; boxes are x0, y0, x1, y1 in 0..1 of the stored image, regions in falling score"""

    key: str
    url: str
    sha256: str
    width: int
    height: int
    alt_text: str
    captions: tuple[Caption, ...]
    regions: tuple[Region, ...]
    select: str  # fingerprint of the select step that decided

    @staticmethod
    def from_row(row: dict[str, Any]) -> "Sample":
        """Build the view from one row (plain Python values) of the joined columns, and `select`, the fingerprint."""
        captions = tuple(Caption(**caption) for caption in row["captions"])
        chosen = [d for d, verdict in zip(row["detections"], row["verdicts"], strict=True) if verdict == "kept"]
        chosen.sort(key=lambda detection: -detection["score"])  # stable: equal scores stay in stored order
        regions = []
        for detection in chosen:
            phrase = row["phrases"][detection["phrase"]]
            regions.append(
                Region(
                    box=tuple(detection["box"]),
                    phrase=phrase["text"],
                    score=detection["score"],
                    caption=phrase["caption"],
                    span=(phrase["start"], phrase["end"]),
                )
            )
        return Sample(
            key=row["key"],
            url=row["url"],
            sha256=row["sha256"],
            width=row["width"],
            height=row["height"],
            alt_text=row["alt_text"] or "",
            captions=captions,
            regions=tuple(regions),
            select=row["select"],
        )
