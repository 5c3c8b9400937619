"""`vesl run --retry failed`: rows whose last attempt failed by a fault that may pass become one more ingest.

Published parts never change, so another try is another part. Only rows of which no shard has anything are tried again;
what their first attempts had already (an image, a caption) is made anew.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms.outcomes import reason_of
from ..transforms.records import input_schema
from .ingest import claim, connect, input_tables, publish, read_dataset, scratch_folder
from .plan import Plan
from .recipe import RecipeError
from .stage import fingerprint
from .store import to_json
from .takedown import match, obeyed

_LATER = pa.schema([("key", pa.string()), ("part", pa.int64())])


def retry(plan: Plan) -> dict[str, Any] | None:
    """Ingest the rows that are worth another try; return the ingest's entry of `dataset.json`, None if there is none.

    Killed at any moment and run again, the result is the same, and rows whose new attempt is not over are left alone.
    Raises RecipeError for a recipe to whose parts none can be added.
    """
    if plan.recipe.dataset.only_parts is not None:
        raise RecipeError("--retry failed: makes new parts, which dataset.only_parts leaves out")
    if adopted := [step.name for step in plan.steps if step.adopted]:
        raise RecipeError(f"--retry failed: makes new parts, which the adopted {adopted[-1]} does not have")
    store = plan.store
    while (dataset := read_dataset(store)) is not None:
        tables = dict(_failed(plan))
        earlier = [ingest["id"] for ingest in dataset["ingests"]]
        about = {key: value for key, value in dataset.items() if key != "ingests"}
        contents = {
            name: [plan.done[step][part]["content"] for step in reasons] for (part, name), reasons in tables.items()
        }
        size = plan.recipe.dataset.rows_per_part
        identity = fingerprint({"retry": contents, "earlier": earlier, "rows_per_part": size})
        first = sum(ingest["parts"] for ingest in dataset["ingests"])
        with scratch_folder() as scratch:
            _stage(plan, tables, dataset, scratch)
            kept, parts = publish(store, identity, first, size, scratch)
        if not parts:
            return None
        counts = dict.fromkeys(("duplicate_url", "no_url", "malformed", "taken_down"), 0)
        entry = {"id": identity, "retry": True, "files": [], "first": first, "parts": parts, "rows": kept, "kept": kept}
        entry |= counts | {"dataset": about} | ({"more": more} if (more := _more(dataset)) else {})
        place = claim(len(dataset["ingests"]))
        if store.create(place, to_json(entry)) or store.read_json(place) == entry:
            store.write_json("dataset.json", {**dataset, "ingests": [*dataset["ingests"], entry]})
            return entry
    return None


def _more(dataset: Mapping[str, Any]) -> list[str]:
    """What input tables have beside INPUT, in one ingest at least."""
    return sorted({name for ingest in dataset["ingests"] for name in ingest.get("more", ())})


def _failed(plan: Plan) -> Iterator[tuple[tuple[int, str], dict[str, list[str]]]]:
    """(part, its input table) -> the steps in which rows of it failed by faults that may pass, with the reasons."""
    inputs = input_tables(plan.dataset) if plan.dataset else []
    for part in plan.parts:
        found: dict[str, list[str]] = {}
        for step in plan.steps:
            counts = plan.done[step.name].get(part, {}).get("counts", {})
            if mine := [name for name in counts.get("failed", {}) if reason_of(step.name, name).transient]:
                found[step.name] = mine
        if found:
            yield (part, inputs[part]), found


def _stage(
    plan: Plan, tables: dict[tuple[int, str], dict[str, list[str]]], dataset: dict[str, Any], scratch: str
) -> None:
    """Write the rows to be tried again to `rows.parquet`, as an ingest does."""
    takedown = obeyed(plan.store)
    schema = input_schema(_more(dataset)).append(pa.field("part", pa.int64()))
    steps = {step.name: step for step in plan.steps}
    with pq.ParquetWriter(f"{scratch}/failed.parquet", schema) as writer:
        for (part, name), reasons in tables.items():
            rows = plan.store.read_table(name)
            wanted = pa.repeat(False, len(rows))
            for step, mine in reasons.items():
                table = plan.store.read_table(steps[step].table(part), ["key", "reason"])
                failed = table["key"].filter(pc.is_in(table["reason"], pa.array(mine)))
                wanted = pc.or_(wanted, pc.is_in(rows["key"].combine_chunks(), failed.combine_chunks()))
            rows = rows.filter(wanted)
            rows = rows.filter(pc.invert(match(rows, takedown))) if takedown else rows
            rows = rows.append_column("part", pa.repeat(part, len(rows)))
            for field in schema:
                if field.name not in rows.column_names:
                    rows = rows.append_column(field, pa.nulls(len(rows), field.type))
            writer.write_table(rows.select(schema.names).cast(schema))
    with pq.ParquetWriter(f"{scratch}/later.parquet", _LATER) as writer:
        for ingest in dataset["ingests"]:  # other ingests have no key of an earlier one
            for part, name in enumerate(input_tables({"ingests": [ingest]}), ingest["first"]):
                if ingest.get("retry"):
                    rows = plan.store.read_table(name, ["key"])
                    writer.write_table(rows.append_column("part", pa.repeat(part, len(rows))).cast(_LATER))
    with connect(plan.store, scratch) as db:
        db.execute("SET VARIABLE folder = ?", [scratch])
        db.execute(_LAST_ATTEMPTS)


_LAST_ATTEMPTS = """COPY (
    SELECT failed.* EXCLUDE (part), row_number() OVER (ORDER BY key) AS place
    FROM read_parquet(getvariable('folder') || '/failed.parquet') AS failed
    WHERE NOT EXISTS (
        SELECT 1 FROM read_parquet(getvariable('folder') || '/later.parquet') AS later
        WHERE later.key = failed.key AND later.part > failed.part)
) TO (getvariable('folder') || '/rows.parquet') (FORMAT parquet)"""
