"""What a report counts: one pass over the chain's tables, some parts at a time, added up in DuckDB.

A key lies in exactly one part, so steps are joined part by part: memory is bounded by a few thousand rows however long
the data set is, and what grows with it (distinct phrases, the regions of a comparison) is DuckDB's to spill.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...transforms.found import head_nouns, normalised, offsets
from ..ingest import connect
from ..plan import Plan

CELLS = 32  # of the heat map, across and down
SCORE_BINS = 50  # over 0..1
AREA_BINS = 20  # four for each power of ten, from 1e-5 to the whole image
REGIONS = (1, 2, 4, 8)  # M: regions sampled of each image
BATCHES = (1024, 8192, 32_768, 131_072)  # N: images in the global batch; the paper's is 32,768 with M = 4
_ROWS = 16_384  # of images joined at a time, in whole parts
_FOLD_ROWS = 1_000_000  # of phrases, counted for each chunk, before those of all chunks are added up
_SAMPLE = 1000  # regions from which the gallery draws
_EDGE = 24  # best, worst and rejected of each verdict among which it chooses
_TOP = 40


@dataclass(frozen=True)
class Place:
    """A detection: the `index`-th of the image `key` in `part`."""

    part: int
    key: str
    index: int
    score: float


@dataclass(frozen=True)
class Conflicts:
    """False negatives of one region in a batch of `images` with up to `regions` regions each.

    negatives: other regions in the batch; equal: expected number of those that say the same; some: share of regions
    with at least one of another image.
    """

    images: int
    regions: int
    negatives: float
    equal: float
    some: float


@dataclass(frozen=True)
class Statistics:
    """What `select` made of a store's detections, over the images that it kept and that no takedown names.

    verdicts: detections by verdict. scores [SCORE_BINS, 2]: kept, others. areas [AREA_BINS]: kept regions by share of
    the image. per_image: images by their number of regions. heat [CELLS, CELLS] (down, across): regions over each
    cell. Lengths are means, in words. phrases, heads: the most frequent; phrases are as `normalised` has them.
    """

    images: int
    captions: int
    caption_words: float
    phrase_words: float
    distinct: int
    verdicts: Mapping[str, int]
    scores: npt.NDArray[np.int64]
    areas: npt.NDArray[np.int64]
    per_image: Mapping[int, int]
    heat: npt.NDArray[np.int64]
    phrases: Sequence[tuple[str, int]]
    heads: Sequence[tuple[str, int]]
    conflicts: Sequence[Conflicts]
    sample: Sequence[Place]  # of kept regions, in the order of a hash
    best: Sequence[Place]  # each image's best, the best first
    worst: Sequence[Place]
    judged: Mapping[str, Sequence[Place]]  # a few detections for each verdict but kept

    @property
    def regions(self) -> int:
        """Detections that were kept."""
        return self.verdicts.get("kept", 0)


@contextmanager
def database(plan: Plan) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB of bounded memory that spills into a folder of its own."""
    with TemporaryDirectory(prefix="vesl-report-") as scratch, connect(plan.store, scratch) as db:
        db.create_function("head_noun", head_nouns, ["varchar"], "varchar", type="arrow")  # type: ignore[call-overload]
        yield db


def measure(plan: Plan, taken: pa.Array, db: duckdb.DuckDBPyConnection, regions: str | None = None) -> Statistics:
    """Count everything over the parts that `select` has done, without the keys in `taken`.

    With `regions`, leave a table of that name in `db`: h (hash of key, box and phrase), part, key, i, score.
    """
    for name in ("counts", "phrase", "region", "judged"):
        db.execute(f"DROP TABLE IF EXISTS {name}")
    db.execute(_TABLES)
    db.register("taken", pa.table({"key": taken.cast(pa.string())}))
    most = _FOLD_ROWS
    if regions:
        db.execute(f"CREATE TABLE {regions} (h UBIGINT, part INT, key VARCHAR, i INT, score FLOAT)")
    for chunk in _chunks(plan):
        for name, table in chunk.items():
            db.register(f"{name}_rows", table)
        for statement in _ADD:
            db.execute(statement)
        if regions:
            db.execute(f"INSERT INTO {regions} SELECT hash(key, x0, y0, x1, y1, text), part, key, i, score FROM kept")
        if _phrases(db) > most:  # as often as it pays: each time what is left is at most half of what comes after
            _fold(db)
            most = max(_FOLD_ROWS, 2 * _phrases(db))
    _fold(db)
    return _collect(db)


def _phrases(db: duckdb.DuckDBPyConnection) -> int:
    [(rows,)] = db.execute("SELECT count(*) FROM phrase").fetchall()
    return int(rows)


def _fold(db: duckdb.DuckDBPyConnection) -> None:
    """Add up what the chunks left, so that it grows with what is different and not with the chunks."""
    for name, query in _FOLD.items():
        db.execute(f"CREATE OR REPLACE TABLE {name} AS {query}")


_COLUMNS = {
    "select": ["key", "outcome", "verdicts"],
    "ground": ["key", "detections"],
    "phrases": ["key", "phrases"],
    "caption": ["key", "captions"],
}


def _chunks(plan: Plan) -> Iterator[dict[str, pa.Table]]:
    """Some parts at a time: the tables that the statistics need; those of `select` with a column `part`."""
    steps = {step.name: step for step in plan.steps}
    if not steps.keys() >= _COLUMNS.keys():
        return
    groups: list[list[int]] = []
    rows = _ROWS
    for part in sorted(plan.done["select"].keys() & set(plan.parts)):
        if rows >= _ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(part)
        rows += plan.done["select"][part]["rows"]

    def read(name: str, part: int) -> pa.Table:
        table = plan.store.read_table(steps[name].table(part), _COLUMNS[name])
        if name in ("phrases", "caption"):
            lists = table[_COLUMNS[name][1]].combine_chunks()
            texts = normalised(pc.struct_field(lists.flatten(), "text"))
            table = table.set_column(1, "texts", pa.ListArray.from_arrays(pa.array(offsets(lists), pa.int32()), texts))
        if name == "select":
            table = table.append_column("part", pa.repeat(pa.scalar(part, pa.int32()), len(table)))
        return table

    with ThreadPoolExecutor(8) as pool:  # for a bucket; it is read while DuckDB waits, as one chunk fits in memory
        for parts in groups:
            found = {name: list(pool.map(read, [name] * len(parts), parts)) for name in _COLUMNS}
            yield {name: pa.concat_tables(tables) for name, tables in found.items()}


_TABLES = """
CREATE TABLE counts (kind VARCHAR, name VARCHAR, a INT, b INT, n BIGINT);
CREATE TABLE phrase (text VARCHAR, n BIGINT, w1 DOUBLE, w2 DOUBLE, w4 DOUBLE, w8 DOUBLE);
CREATE TABLE region (kind VARCHAR, part INT, key VARCHAR, i INT, score FLOAT, h UBIGINT);
CREATE TABLE judged (verdict VARCHAR, part INT, key VARCHAR, i INT, score FLOAT, h UBIGINT);
CREATE OR REPLACE TEMP MACRO words(text) AS length(text) - length(replace(text, ' ', '')) + (text <> '')::INT;
"""
_FOLD = {
    "counts": "SELECT kind, name, a, b, sum(n)::BIGINT AS n FROM counts GROUP BY ALL",
    "phrase": f"""SELECT text, sum(n)::BIGINT AS n, {", ".join(f"sum(w{m}) AS w{m}" for m in REGIONS)}
        FROM phrase GROUP BY text""",
    "region": f"""FROM region WHERE kind = 'sample' QUALIFY row_number() OVER (ORDER BY h, key, i) <= {_SAMPLE}
        UNION ALL FROM region WHERE kind = 'best' QUALIFY row_number() OVER (ORDER BY score DESC, key) <= {_EDGE}
        UNION ALL FROM region WHERE kind = 'worst' QUALIFY row_number() OVER (ORDER BY score, key) <= {_EDGE}""",
    "judged": f"""FROM judged
        QUALIFY row_number() OVER (PARTITION BY verdict ORDER BY h, key, i) <= {_EDGE}""",
}


def _drawn(m: int, count: str) -> str:
    """How many of an image's n regions a batch is expected to draw of `count` of them, with m regions an image."""
    return f"least({m}, n) * {count} / n"


_ADD = (
    """CREATE OR REPLACE TEMP TABLE image AS
        SELECT * FROM select_rows s ANTI JOIN taken USING (key) WHERE s.outcome = 'kept'""",
    """CREATE OR REPLACE TEMP TABLE detection AS
        SELECT key, part, unnest(verdicts) AS verdict, unnest(detections) AS d,
            generate_subscripts(verdicts, 1) - 1 AS i
        FROM image JOIN ground_rows USING (key)""",
    """CREATE OR REPLACE TEMP TABLE kept AS
        SELECT k.key, part, i, d.score AS score, text,
            d.box[1] AS x0, d.box[2] AS y0, d.box[3] AS x1, d.box[4] AS y1
        FROM detection k JOIN (
            SELECT key, unnest(texts) AS text, generate_subscripts(texts, 1) - 1 AS j FROM phrases_rows
        ) p ON k.key = p.key AND k.d.phrase = p.j WHERE verdict = 'kept'""",
    """CREATE OR REPLACE TEMP TABLE said AS
        SELECT key, text, count(*) AS c, sum(count(*)) OVER (PARTITION BY key) AS n FROM kept GROUP BY 1, 2""",
    "INSERT INTO counts SELECT 'verdict', verdict, 0, 0, count(*) FROM detection GROUP BY verdict",
    f"""INSERT INTO counts SELECT 'score', NULL, least(floor(d.score * {SCORE_BINS}), {SCORE_BINS - 1}),
        (verdict <> 'kept')::INT AS other, count(*) FROM detection WHERE d.score BETWEEN 0 AND 1 GROUP BY ALL""",
    f"""INSERT INTO counts SELECT 'area', NULL,
        greatest(0, least(floor(log10(greatest((x1 - x0) * (y1 - y0), 1e-9)) * 4 + {AREA_BINS}), {AREA_BINS - 1})),
        0, count(*) FROM kept GROUP BY ALL""",
    """INSERT INTO counts SELECT 'per_image', NULL, n, 0, count(*) FROM
        (SELECT count(i) AS n FROM image LEFT JOIN kept USING (key) GROUP BY image.key) GROUP BY ALL""",
    f"""INSERT INTO counts SELECT 'heat', NULL, x, y, sum(n) FROM (
        SELECT floor(x0 * {CELLS})::INT AS x, floor(y0 * {CELLS})::INT AS y, 1 AS n FROM kept
        UNION ALL SELECT ceil(x1 * {CELLS})::INT, floor(y0 * {CELLS})::INT, -1 FROM kept
        UNION ALL SELECT floor(x0 * {CELLS})::INT, ceil(y1 * {CELLS})::INT, -1 FROM kept
        UNION ALL SELECT ceil(x1 * {CELLS})::INT, ceil(y1 * {CELLS})::INT, 1 FROM kept) GROUP BY ALL""",
    """CREATE OR REPLACE TEMP TABLE caption AS
        SELECT unnest(texts) AS text FROM caption_rows SEMI JOIN image USING (key)""",
    """INSERT INTO counts SELECT unnest(['captions', 'caption_words']), NULL, 0, 0,
        unnest([count(*), coalesce(sum(words(text)), 0)]) FROM caption""",
    "INSERT INTO counts SELECT 'words', NULL, 0, 0, coalesce(sum(words(text)), 0) FROM kept",
    f"""INSERT INTO phrase SELECT text, sum(c), {", ".join(f"sum({_drawn(m, 'c')})" for m in REGIONS)}
        FROM said GROUP BY text""",
    *(
        f"""INSERT INTO counts SELECT 'within', NULL, {m}, 0, round(1e6 * coalesce(sum(
        {_drawn(m, "c")} * (least({m}, n) - 1) * (c - 1) / greatest(n - 1, 1)), 0)) FROM said"""
        for m in REGIONS
    ),
    f"""INSERT INTO region SELECT 'sample', part, key, i, score, hash(key, i) AS h FROM kept
        ORDER BY h, key, i LIMIT {_SAMPLE}""",
    f"""INSERT INTO region SELECT 'best', any_value(part), key, arg_max(i, {{s: score, i: -i}}), max(score) AS s, 0
        FROM kept GROUP BY key ORDER BY s DESC, key LIMIT {_EDGE}""",
    f"""INSERT INTO region SELECT 'worst', any_value(part), key, arg_min(i, {{s: score, i: i}}), min(score) AS s, 0
        FROM kept GROUP BY key ORDER BY s, key LIMIT {_EDGE}""",
    f"""INSERT INTO judged SELECT verdict, unnest(arg_min({{p: part, k: key, i: i, s: d.score, h: hash(key, i)}},
        hash(key, i), {_EDGE}), recursive := true) FROM detection WHERE verdict <> 'kept' GROUP BY verdict""",
)


def _collect(db: duckdb.DuckDBPyConnection) -> Statistics:
    def counts(kind: str) -> list[tuple[Any, ...]]:
        return db.execute("SELECT name, a, b, n FROM counts WHERE kind = ? ORDER BY ALL", [kind]).fetchall()

    def places(query: str) -> list[Place]:
        return [Place(*row) for row in db.execute(f"SELECT part, key, i, score FROM {query}").fetchall()]

    verdicts = {name: n for name, _, _, n in counts("verdict")}
    scores, areas = np.zeros((SCORE_BINS, 2), np.int64), np.zeros(AREA_BINS, np.int64)
    corners = np.zeros((CELLS + 1, CELLS + 1), np.int64)
    for _, a, b, n in counts("score"):
        scores[a, b] = n
    for _, a, _, n in counts("area"):
        areas[a] = n
    for _, x, y, n in counts("heat"):
        corners[y, x] = n
    per_image = {a: n for _, a, _, n in counts("per_image")}
    captions, words = (sum(n for *_, n in counts(kind)) for kind in ("captions", "caption_words"))
    [(distinct,)] = db.execute("SELECT count(*) FROM phrase").fetchall()
    regions, spoken = verdicts.get("kept", 0), sum(n for *_, n in counts("words"))
    judged: dict[str, list[Place]] = {}
    for verdict, *place in db.execute("SELECT verdict, part, key, i, score FROM judged ORDER BY h, key, i").fetchall():
        judged.setdefault(verdict, []).append(Place(*place))
    top = f"GROUP BY 1 ORDER BY 2 DESC, 1 LIMIT {_TOP}"
    images = sum(per_image.values())
    return Statistics(
        images=images,
        captions=captions,
        caption_words=words / captions if captions else 0.0,
        phrase_words=spoken / regions if regions else 0.0,
        distinct=distinct,
        verdicts=verdicts,
        scores=scores,
        areas=areas,
        per_image=per_image,
        heat=corners.cumsum(0).cumsum(1)[:CELLS, :CELLS],
        phrases=db.execute(f"SELECT text, n FROM phrase ORDER BY n DESC, text LIMIT {_TOP}").fetchall(),
        heads=db.execute(
            f"SELECT head_noun(text) AS head, sum(n)::BIGINT FROM phrase WHERE head <> '' {top}"
        ).fetchall(),
        conflicts=_conflicts(db, images, {m: n / 1e6 for _, m, _, n in counts("within")}),
        sample=places("region WHERE kind = 'sample' ORDER BY h, key, i"),
        best=places("region WHERE kind = 'best' ORDER BY score DESC, key"),
        worst=places("region WHERE kind = 'worst' ORDER BY score, key"),
        judged=judged,
    )


def _conflicts(db: duckdb.DuckDBPyConnection, images: int, within: Mapping[int, float]) -> list[Conflicts]:
    """Expected false negatives of the region-text contrast (Chen et al. 2024, CLOC, section 3) for each N and M.

    Of image i with n_i regions, c_it of them saying t, a batch draws m_i = min(M, n_i) without replacement. Let
    q_t = mean over images of m_i c_it / n_i, and Q = sum q_t. A region of the batch says t with probability q_t / Q,
    and meets (N - 1) q_t regions of other images that say the same, and (m_i - 1)(c_it - 1) / (n_i - 1) of its own.
    Where every image has M regions or more and none repeats a phrase, this is (N - 1) M sum p_t^2 of the shares p_t.
    """
    found = []
    for n in BATCHES if images else ():
        for m in REGIONS:
            [(total, squares, some)] = db.execute(
                f"SELECT sum(q), sum(q * q), sum(q * (1 - exp(-{n - 1} * q))) FROM (SELECT w{m} / ? AS q FROM phrase)",
                [images],
            ).fetchall()
            if total:
                own = within[m] / images / total
                found.append(Conflicts(n, m, n * total - 1, (n - 1) * squares / total + own, some / total))
    return found
