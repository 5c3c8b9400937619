"""`vesl report`, `vesl plan` and `vesl status` as tables: the funnel with its reasons, and what came out of it."""

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..transforms.captions import visible
from ..transforms.filters import VERDICTS
from ..transforms.outcomes import reason_of
from .cost import Cost, Interval, Measured, costs, long_parts, seconds_per_image
from .plan import Plan
from .progress import Count, Tally
from .run import last_runs

if TYPE_CHECKING:
    from .report.statistics import Statistics

_SILENT_S = 120.0  # after which a run that says "running" is not believed


def print_plan(plan: Plan, measured: Mapping[str, Measured], console: Console) -> None:
    """The chain: what each step is, what it has to do, how fast it is, and what all of it will cost."""
    table = Table("step", "fingerprint", "parts done", "missing", "opens a model", "model", box=None)
    for step in plan.steps:
        missing = len(plan.missing(step))
        model = getattr(step.stage, "model", getattr(step.stage, "tagger", ""))
        opens = "yes" if step.stage.opens_model and missing else "no"
        name = f"{step.fingerprint} (adopted)" if step.adopted else step.fingerprint
        table.add_row(step.name, name, str(len(plan.parts) - missing), str(missing), opens, Text(visible(model)))
    console.print(f"store {plan.store.url}, data set {plan.recipe.dataset.name}", markup=False, highlight=False)
    if plan.dataset is None:
        console.print("nothing is ingested yet: `vesl run` does it first", highlight=False)
    console.print(table)
    if any(one.units for one in measured.values()):
        _print_cost(plan, measured, console)
    for name, seconds, rows in long_parts(plan, measured):
        console.print(
            f"warning: a part of {name} takes one worker about {seconds / 60:,.0f} minutes; parts of lists that are "
            f"added with dataset.rows_per_part: {rows} would take about 5",
            highlight=False,
        )


def _print_cost(plan: Plan, measured: Mapping[str, Measured], console: Console) -> None:
    speeds = Table("measured", "images/s per worker", "95 %", "over", "opens in", "kept", "bytes/image", box=None)
    for step in plan.steps:
        one = measured[step.name]
        pace = seconds_per_image(one.units)
        rate = [_figure(1 / pace.mean), f"{_figure(1 / pace.high)} to {_figure(1 / pace.low)}"] if pace else ["", ""]
        rate[1] = "" if pace and pace.low == pace.high else rate[1]
        opening = f"{sum(one.opening) / len(one.opening):.1f} s" if one.opening else ""
        over = f"{len(one.units)} {one.of}" if one.units else ""
        kept = f"{one.share:.1%}" if one.rows else ""
        speeds.add_row(step.name, *rate, over, opening, kept, f"{one.bytes_per_row:,.0f}" if one.rows else "")
    console.print(speeds)
    unit = f" {plan.recipe.prices.unit}" if plan.recipe.prices.unit else ""
    table = Table("cost of", "images", "worker-hours", "GPU-hours", "stored", f"money{unit}", box=None)
    scopes: dict[str, float | None] = {"what is missing": None, "the whole data set": float(plan.rows)}
    if plan.recipe.prices.images is not None:
        scopes[f"{plan.recipe.prices.images:,} images"] = float(plan.recipe.prices.images)
    for name, images in scopes.items():
        each = costs(plan, measured, images)
        total = sum(each.values(), Cost())
        if len(each) > 1 and (total.images or any(cost.images for cost in each.values())):
            for step_name, cost in each.items():
                _cost_row(table, f"  {step_name}", cost)
        _cost_row(table, name, total)
    console.print(table)
    notes = (
        "intervals are of the speeds alone, 95 %, and none of what was timed once; money holds storage for one month; "
    )
    notes += "a * leaves out steps that nobody measured: `vesl plan RECIPE --sample 200` does"
    console.print(notes, highlight=False, style="dim")


def _cost_row(table: Table, name: str, cost: Cost) -> None:
    images = f"{cost.images:,.0f}" if cost.images else ""
    star = "*" if cost.unknown else ""
    hours, gpus, money = (_spread(one) for one in (cost.hours, cost.gpu_hours, cost.money))
    table.add_row(name, images, hours + star, gpus, f"{_figure(cost.bytes / 1e9)} GB", money + star if money else "")


def _spread(one: Interval) -> str:
    """A figure with its interval; nothing for nothing."""
    if not one.mean:
        return ""
    if one.mean < 0.005:
        return "<0.01"
    return _figure(one.mean) + (f" ({_figure(one.low)} to {_figure(one.high)})" if one.low < one.high else "")


def _figure(x: float) -> str:
    """Two or three digits that matter."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.2g}" if abs(x) < 10 else f"{x:.1f}"


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
    "no_image": "img2dataset has not got this image, or the sample in the tar has none",
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
