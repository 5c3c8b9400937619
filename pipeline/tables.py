"""`vesl report`, `vesl plan` and `vesl status` as tables: the funnel with its reasons, and what came out of it."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..transforms.captions import visible
from ..transforms.filters import VERDICTS
from ..transforms.outcomes import reason_of
from .plan import Plan
from .progress import Count, Tally
from .run import last_runs

if TYPE_CHECKING:
    from .report.statistics import Statistics

_SILENT_S = 120.0  # after which a run that says "running" is not believed


def print_plan(plan: Plan, console: Console) -> None:
    """The chain: what each step is, and what it has to do."""
    table = Table("step", "fingerprint", "parts done", "missing", "opens a model", "model", "measured", box=None)
    seen = _measured(plan)
    for step in plan.steps:
        missing = len(plan.missing(step))
        model = getattr(step.stage, "model", getattr(step.stage, "tagger", ""))
        opens = "yes" if step.stage.opens_model and missing else "no"
        record = seen.get(step.name, {})
        rate = f"{record['fresh'] / record['seconds']:.1f} rows/s per worker" if record.get("seconds") else ""
        name = f"{step.fingerprint} (adopted)" if step.adopted else step.fingerprint
        table.add_row(step.name, name, str(len(plan.parts) - missing), str(missing), opens, Text(visible(model)), rate)
    console.print(f"store {plan.store.url}, data set {plan.recipe.dataset.name}", markup=False, highlight=False)
    if plan.dataset is None:
        console.print("nothing is ingested yet: `vesl run` does it first", highlight=False)
    console.print(table)
    cost = _left(plan, seen)
    if cost:
        console.print(cost, highlight=False)


def _measured(plan: Plan) -> dict[str, Any]:
    """The newest measurement of each step, by the runs so far."""
    seen: dict[str, Any] = {}
    for record in reversed(last_runs(plan.store)):
        seen |= {step: counts for step, counts in record["progress"].items() if counts["fresh"]}
    return seen


def _left(plan: Plan, seen: dict[str, Any]) -> str:
    """The work that is missing, in worker-seconds at the speeds of the runs so far."""
    share = plan.rows / len(plan.parts) if plan.parts else 0.0
    seconds, unknown = 0.0, []
    for step in plan.steps:
        missing, record = len(plan.missing(step)), seen.get(step.name, {})
        if missing and record.get("fresh"):
            seconds += missing * share * record["seconds"] / record["fresh"]
        elif missing:
            unknown.append(step.name)
        if record.get("rows"):
            share *= record["kept"] / record["rows"]
    if not seconds:
        return ""
    note = f" (without {', '.join(unknown)}, not measured yet)" if unknown else ""
    return f"missing work: about {seconds:.0f} worker-seconds at the speeds of earlier runs{note}"


def print_status(plan: Plan, console: Console) -> None:
    """How far the store is, and what the newest run says of itself."""
    print_funnel(plan, console, reasons=False)
    records = last_runs(plan.store, 1)
    if not records:
        console.print("no run yet", highlight=False)
        return
    record = records[0]
    line = f"last run: {record['state']} on {record['host']} (process {record['pid']})"
    silence = time.time() - record["updated"]
    if record["state"] == "running" and silence > _SILENT_S:
        console.print(f"{line}, no sign of life for {silence:.0f} s: it was killed, or hangs", highlight=False)
        return
    left = [
        f"{step} {p['rows']}/{p['expected']}"
        for step, p in record["progress"].items()
        if record["state"] == "running" and p["rows"] < p["expected"]
    ]
    if left:
        line += f", rows {', '.join(left)}"
        line += f"; about {record['seconds_left']} s left" if record["seconds_left"] else ""
    console.print(line, markup=False, highlight=False)


def print_funnel(plan: Plan, console: Console, reasons: bool = True) -> None:
    """Rows in, kept and dropped per step, with every reason that occurred."""
    tally = Tally.of(plan)
    table = Table("step", "parts", "rows", "kept", "rejected", "failed", box=None)
    if reasons:
        table.add_column("reason")
        table.add_column("rows", justify="right")
        table.add_column("meaning", style="dim")
    for ingest in plan.dataset["ingests"] if plan.dataset else []:
        counts = {name: ingest[name] for name in INGEST if ingest.get(name)}
        dropped = str(sum(counts.values()))
        name = "retry" if ingest.get("retry") else "ingest"
        row = [name, str(ingest["parts"]), str(ingest["rows"]), str(ingest["kept"]), dropped, "0"]
        _rows(table, row, [(name, n, INGEST[name]) for name, n in counts.items()] if reasons else [])
    for step, count in tally.counts.items():
        row = [step, f"{count.parts}/{len(plan.parts)}", str(count.rows), str(count.kept)]
        row += [str(count.rejected.total()), str(count.failed.total())]
        _rows(table, row, reasons_of(step, count) if reasons else [])
    console.print(table)


INGEST = {
    "duplicate_url": "an earlier row has the same normalised URL",
    "no_url": "no URL in the row, or a line that is no record",
    "taken_down": "a takedown list names the URL, its domain or its key",
    "malformed": "a line that cannot be read as a row",
}


def reasons_of(step: str, count: Count) -> list[tuple[str, int, str]]:
    """Why a step dropped rows: (reason, rows, meaning), the most frequent first."""
    both = (count.rejected + count.failed).most_common()
    return [(name, n, reason_of(step, name).meaning) for name, n in both]


def _rows(table: Table, row: list[str], reasons: Iterable[tuple[str, int, str]]) -> None:
    first = True
    for name, n, meaning in reasons:
        table.add_row(*(row if first else [""] * len(row)), name, str(n), meaning)
        first = False
    if first:
        table.add_row(*row)


def print_statistics(statistics: "Statistics", console: Console) -> None:
    """What `select` made of the detections: verdicts, regions per image, the most frequent phrases."""
    table = Table("detection", "pairs", "meaning", box=None)
    for verdict, n in sorted(statistics.verdicts.items(), key=lambda item: (-item[1], item[0])):
        table.add_row(verdict, str(n), Text(VERDICTS.get(verdict, ""), style="dim"))
    console.print(table)
    images, regions = statistics.images, statistics.regions
    per = regions / images if images else 0
    length = f", {statistics.caption_words:.1f} words a caption" if statistics.captions else ""
    console.print(f"{images} images, {regions} regions, {per:.1f} regions an image{length}", highlight=False)
    if statistics.phrases:
        top = ", ".join(f"{visible(phrase)} ({n})" for phrase, n in statistics.phrases[:12])
        console.print("most frequent:", top, markup=False, highlight=False)
