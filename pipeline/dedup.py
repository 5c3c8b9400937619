"""The pass that finds copies: over the hashes of the whole data set, in the driver, between download and caption.

An image is dropped where an earlier one (by part, then row) equals it or is near it, dropped itself or not; so parts
that come later never change a verdict. Evaluation images count as earlier than all, and an image that is tried again
keeps the verdict that it had. What was found lies in one file,
`copies-<fingerprint>.parquet`, named by the parts that were looked at; from it each part gets its table. DuckDB does
the work and spills, so memory stays bounded.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms.hashes import bands, masks
from ..transforms.records import step_schema
from .engines import EngineError
from .ingest import MEMORY, connect, scratch_folder
from .recipe import RecipeError
from .stage import Step, fingerprint
from .steps.dedup import EVALUATION, Dedup, evaluation_table
from .store import Store, encode_table
from .work import Job, StaleError, incoming, step_footer

Footer = Mapping[str, Any]
Say = Callable[[str], None]

CROWD = 256  # hashes that agree under a mask: more are looked at under finer masks, so that no crowd is quadratic
_READ = 200  # parts at a time
_READERS = 16
_PIECE = 100_000  # rows of a row group of the file of copies, or the end of the part that passes it
COPIES = pa.schema([("part", pa.int32()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


def of(steps: Sequence[Step]) -> int | None:
    """The place of dedup in a chain, if it is there and has to be worked out (an adopted result is used as it is)."""
    return next((i for i, step in enumerate(steps) if isinstance(step.stage, Dedup) and not step.adopted), None)


def spans(parts: Iterable[int]) -> Iterator[str]:
    """For each of some parts in rising order, the parts up to it as text, such as `0-41,50`."""
    closed, start, last = "", -1, -1
    for part in parts:
        if start < 0 or part != last + 1:
            closed += f"{_run(start, last)}," if start >= 0 else ""
            start = part
        last = part
        yield closed + _run(start, last)


def _run(start: int, last: int) -> str:
    return f"{start}-{last}" if last > start else str(start)


def fitting(tables: Mapping[int, Footer], wanted: Sequence[int]) -> dict[int, Footer]:
    """Those of the tables that know of all `wanted` parts (in rising order) up to their own.

    A run on a few parts judges them by themselves; this makes the whole run judge them anew, but never the reverse.
    """
    asked = _runs(next(reversed([*spans(wanted)]), ""))
    return {part: footer for part, footer in tables.items() if _covers(footer["consumed"], asked, part)}


def _covers(consumed: str, asked: list[tuple[int, int]], part: int) -> bool:
    there = _runs(consumed)
    return all(any(a <= x and min(y, part) <= b for a, b in there) for x, y in asked if x <= part)


def _runs(text: str) -> list[tuple[int, int]]:
    pairs = [piece.partition("-") for piece in text.split(",") if piece]
    return [(int(first), int(last or first)) for first, _, last in pairs]


def run_pass(
    job: Job, downloads: Mapping[int, Footer], retried: int | None, memory: str | None, say: Say, progress: Say
) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Judge the parts whose download tables have these footers; yield part, footer, and whether it had to be written.

    Keys of parts from `retried` on may stand in earlier parts too.

    Killed at any moment and run again, the result is the same; so it is for two runs at once. Raises EngineError where
    DuckDB runs out of memory or disk, RecipeError for evaluation lists that cannot be used.
    """
    index = of(job.steps)
    assert index is not None
    store, step, parts = job.store, job.steps[index], sorted(downloads)
    consumed = {str(part): downloads[part]["content"] for part in parts}
    artefact = f"copies-{fingerprint({'step': step.fingerprint, 'parts': consumed})}.parquet"
    name = f"{step.folder}/{artefact}"
    if not store.exists(name):
        try:
            evaluation = _evaluation(store, step, say)
            _find_copies(store, job.steps[index - 1], step, parts, retried, evaluation, name, memory, progress)
        except duckdb.Error as error:
            line = str(error).split("\n")[0]
            raise EngineError(
                f"dedup: {line}; engine.dedup.memory (now {memory or MEMORY}) may be too little"
            ) from None
    store.sweep(name)
    with store.fs.open(store.path(name), "rb") as file:
        for (part, copies), known in zip(_by_part(pq.ParquetFile(file), parts), spans(parts), strict=True):
            yield part, *_publish(store, job, index, part, copies, {"artefact": artefact, "consumed": known})


def _by_part(file: pq.ParquetFile, parts: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
    """Each part with its copies; the file has them in that order, and no part in two row groups."""
    group, rows = -1, COPIES.empty_table()
    for part in parts:
        while len(rows) == 0 or rows["part"][-1].as_py() < part:
            if group + 1 == file.num_row_groups:
                break
            group += 1
            rows = file.read_row_group(group)
        yield part, rows.filter(pc.equal(rows["part"], part))


def _publish(
    store: Store, job: Job, index: int, part: int, copies: pa.Table, files: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """Create the part's table, or replace one that knows of fewer parts or has another parent."""
    step = job.steps[index]
    name = step.table(part)
    given = incoming(store, job, index, part, ())

    def good() -> dict[str, Any] | None:
        there = store.footer(name)
        fits = there and there["parent"] == given.parent and _covers(there["consumed"], _runs(files["consumed"]), part)
        return there if fits else None

    if there := good():
        store.sweep(name)
        return there, False
    keys = given.rows["key"].combine_chunks()
    at = pc.index_in(keys, copies["key"].combine_chunks())
    if len(copies) != len(keys) - at.null_count:
        raise StaleError(f"{name}: the images are no longer those that were compared")
    reason, detail = (copies[column].combine_chunks().take(at) for column in ("reason", "detail"))
    outcome = pc.if_else(pc.is_null(at), "kept", "rejected")
    table = pa.Table.from_arrays([keys, outcome, reason, detail], schema=step_schema(step.name))
    footer = step_footer(step, part, given, table, files)
    data = encode_table(table, footer)
    if not store.create(name, data) and not good():
        store.replace(name, data)
    return store.footer(name) or footer, True


def _find_copies(
    store: Store,
    download: Step,
    step: Step,
    parts: Sequence[int],
    retried: int | None,
    evaluation: pa.Table,
    name: str,
    memory: str | None,
    progress: Say,
) -> None:
    """Write the file of copies. Its bytes depend on the hashes only."""
    distance = step.stage.distance  # type: ignore[attr-defined]  # it is a Dedup
    with scratch_folder() as scratch, connect(store, scratch) as db:
        if memory:
            db.execute("SET memory_limit = ?", [memory])
        db.execute(f"ATTACH '{scratch.replace(chr(39), chr(39) * 2)}/hashes.duckdb' AS hashes; USE hashes")
        db.execute("CREATE TABLE images (place BIGINT, key VARCHAR, sha256 UUID, source UUID, phash BIGINT)")
        _add(db, evaluation)
        for first in range(0, len(parts), _READ):
            progress(f"dedup: reading hashes, {first} of {len(parts)} parts")
            _add(db, _hashes(store, download, parts[first : first + _READ], distance is not None))
        compare(db, distance, progress, retried)
        with store.spool(name) as spooled:
            with pq.ParquetWriter(spooled, COPIES, compression="zstd") as writer:
                for piece in _pieces(db.sql(_COPIES).to_arrow_reader(_PIECE)):
                    writer.write_table(piece, row_group_size=len(piece))
            try:
                store.publish(spooled, name)
            except FileNotFoundError:  # swept by another run, once that had published the same bytes
                if not store.exists(name):
                    raise


def _pieces(batches: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The rows in pieces that end with a part, whatever batches they come in."""
    pending = COPIES.empty_table()
    for batch in batches:
        pending = pa.concat_tables([pending, pa.Table.from_batches([batch]).cast(COPIES)])
        while len(pending) > _PIECE and pending["part"][_PIECE - 1] != pending["part"][-1]:
            last = pending["part"][_PIECE - 1]
            end = pc.sum(pc.less_equal(pending["part"], last)).as_py()
            yield pending.slice(0, end).combine_chunks()
            pending = pending.slice(end)
    if len(pending):
        yield pending.combine_chunks()


def _hashes(store: Store, download: Step, parts: Sequence[int], near: bool) -> pa.Table:
    """Place, key and hashes of the images of some parts; a place is the part's number times 2^32, plus the row's."""
    columns = ["key", "sha256", "source_sha256", "phash"]

    def read(part: int) -> pa.Table:
        table = store.read_table(download.table(part), [*columns, "outcome"])
        if "phash" not in table.column_names:
            if near:
                raise RecipeError(
                    f"steps.dedup: the adopted {download.folder} was made before there were perceptual hashes; "
                    "leave out its `use`, or find exact copies only (steps.dedup.distance: null)"
                )
            table = table.append_column("phash", pa.nulls(len(table), pa.int64()))
        places = pa.array(range(part << 32, (part << 32) + len(table)), pa.int64())
        kept = pc.equal(table["outcome"], "kept")
        return table.select(columns).add_column(0, "place", places).filter(kept)

    with ThreadPoolExecutor(_READERS) as pool:
        return pa.concat_tables(pool.map(read, parts))


def _evaluation(store: Store, step: Step, say: Say) -> pa.Table:
    """The evaluation images, at places below 0. Their hashes are stored, and may serve as a list to other recipes."""
    stage = step.stage
    assert isinstance(stage, Dedup)
    name = f"{step.folder}/evaluation.parquet"
    if not stage.evaluation:
        table = EVALUATION.empty_table()
    elif store.exists(name):
        table = store.read_table(name)
    else:
        try:
            if dataclasses.replace(stage).evaluation_sha256 != stage.evaluation_sha256:
                raise ValueError("evaluation: has changed since this run began; run again")
            table, said = evaluation_table(stage.evaluation)
        except (ValueError, OSError) as error:
            raise RecipeError(f"steps.dedup.{error}") from None
        for line in said:
            say(line)
        store.create(name, encode_table(table, {"evaluation_sha256": stage.evaluation_sha256}))
    places = pa.array(range(-len(table), 0), pa.int64())
    return table.rename_columns(["key", *EVALUATION.names[1:]]).add_column(0, "place", places)


def _add(db: duckdb.DuckDBPyConnection, rows: pa.Table) -> None:
    """128 bits of a sha256 tell as many images apart as there will ever be."""
    db.register("rows", rows)
    db.execute(
        "INSERT INTO images SELECT place, key, left(sha256, 32)::UUID, left(source_sha256, 32)::UUID, phash FROM rows"
    )
    db.unregister("rows")


def compare(db: duckdb.DuckDBPyConnection, distance: int | None, progress: Say, retried: int | None = None) -> None:
    """From the table `images`, make `exact` (place, earlier) and `nearest` (phash, earlier: place of the first near).

    Images from the part `retried` on that stand in an earlier part too go into `again` (place, key, first) instead.

    Equal hashes are taken together first. Two that are near agree under some mask, so the candidates are those that
    agree under one; where more than CROWD do, they are compared among themselves with finer masks, whose bits leave
    few that can agree.
    """
    db.execute("CREATE TABLE again (place BIGINT, key VARCHAR, first BIGINT)")
    if retried is not None:
        db.execute(_AGAIN, {"from": retried << 32})
        db.execute("DELETE FROM images WHERE place IN (SELECT place FROM again)")
    db.execute(_EXACT)
    db.execute("CREATE TABLE nearest (phash BIGINT, earlier BIGINT)")
    if distance is None:
        return
    db.execute(_FIRSTS)
    [(count,)] = db.sql("SELECT count(*) FROM firsts").fetchall()
    db.execute("INSERT INTO nearest SELECT phash, first FROM firsts")
    number = 0
    while count and distance:
        number = bands(count, distance, number)
        chosen = masks(number, distance)
        crowd = CROWD if number != distance else count
        db.execute("CREATE OR REPLACE TABLE crowded (phash BIGINT, first BIGINT)")
        for i, mask in enumerate(chosen):
            progress(f"dedup: comparing {count:,} hashes, {i} of {len(chosen)} masks")
            db.execute(f"CREATE OR REPLACE TABLE crowds AS {_CROWDS}", {"mask": mask, "crowd": crowd})
            db.execute(_NEAR, {"mask": mask, "distance": distance})
            db.execute(_CROWDED, {"mask": mask})
        db.execute("CREATE OR REPLACE TABLE firsts AS SELECT DISTINCT phash, first FROM crowded")
        [(count,)] = db.sql("SELECT count(*) FROM firsts").fetchall()
    db.execute("CREATE OR REPLACE TABLE nearest AS SELECT phash, min(earlier) AS earlier FROM nearest GROUP BY phash")


_EXACT = """
    CREATE VIEW digests AS
        SELECT sha256 AS digest, place FROM images WHERE sha256 IS NOT NULL
        UNION ALL
        SELECT source, place FROM images WHERE source IS NOT NULL AND source IS DISTINCT FROM sha256;
    CREATE TABLE exact AS SELECT place, min(first) AS earlier
        FROM digests JOIN (SELECT digest, min(place) AS first FROM digests GROUP BY digest HAVING count(*) > 1)
            USING (digest)
        WHERE first < place GROUP BY place"""
_FIRSTS = """CREATE OR REPLACE TABLE firsts AS
    SELECT phash, min(place) AS first FROM images WHERE phash IS NOT NULL GROUP BY phash"""
_CROWDS = "SELECT phash & $mask AS bits FROM firsts GROUP BY bits HAVING count(*) > $crowd"
_CROWDED = """INSERT INTO crowded SELECT phash, first FROM firsts WHERE phash & $mask IN (SELECT bits FROM crowds)"""
_NEAR = """INSERT INTO nearest
    WITH sparse AS (SELECT phash, first, phash & $mask AS bits FROM firsts ANTI JOIN crowds ON phash & $mask = bits)
    SELECT later.phash, min(early.first) FROM sparse AS early JOIN sparse AS later USING (bits)
    WHERE early.first < later.first AND bit_count(xor(early.phash, later.phash)) <= $distance
    GROUP BY later.phash"""
_AGAIN = """INSERT INTO again
    SELECT later.place, key, min(early.place) FROM images AS later JOIN images AS early USING (key)
    WHERE later.place >= $from AND early.place >= 0 AND early.place < later.place GROUP BY later.place, key"""
_COPIES = """
    WITH verdicts AS (
        SELECT place, key, phash, CASE
            WHEN least(exact.earlier, nearest.earlier) < 0 THEN 'contaminated'
            WHEN exact.earlier IS NOT NULL THEN 'duplicate_exact'
            WHEN nearest.earlier < place THEN 'duplicate_near' END AS reason,
            CASE reason WHEN 'contaminated' THEN least(exact.earlier, nearest.earlier)
            WHEN 'duplicate_exact' THEN exact.earlier ELSE nearest.earlier END AS earlier
        FROM images LEFT JOIN exact USING (place) LEFT JOIN nearest USING (phash)
        WHERE place >= 0 AND (exact.earlier IS NOT NULL OR nearest.earlier < place)),
    copies AS (
        SELECT verdicts.place, verdicts.key, reason,
            left(images.key, 400) || CASE WHEN reason = 'duplicate_exact' THEN ''
                ELSE coalesce(' (' || bit_count(xor(verdicts.phash, images.phash)) || ' bits differ)', '') END AS detail
        FROM verdicts JOIN images ON images.place = earlier),
    each AS (
        SELECT * FROM copies
        UNION ALL
        SELECT again.place, again.key, reason, detail FROM again JOIN copies ON copies.place = again.first)
    SELECT (place >> 32)::INTEGER AS part, key, reason, detail FROM each ORDER BY place"""
