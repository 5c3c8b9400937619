"""`vesl report`: a data set on one HTML page that opens offline: pictures, funnel, cost, statistics, a comparison.

Captions, URLs and details come from strangers. They reach the page through one template with escaping on, where every
text also passes `captions.visible`; the page's policy admits no network and no script but its own.
"""

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ...transforms.captions import visible
from ...transforms.filters import VERDICTS
from ..plan import Plan
from ..progress import Tally
from ..run import described, last_runs
from ..tables import INGEST, reasons_of
from ..takedown import named, obeyed
from .gallery import BYTES, Group, album, only
from .plots import plots
from .statistics import REGIONS, Place, Statistics, database, measure

_RUNS = 200  # records that are read for the rates

# Chen et al. 2024 (CLOC), table 1: images, regions an image, caption length, region text length (in tokens).
TABLE_1 = (
    ("GRIT, released", "17 M", "1.8", "17.2", "4.6"),
    ("Florence-2", "126 M", "5.4", "70.5", "2.6"),
    ("WiT, labelled as OWL-ST does", "300 M", "5.1", "17.1", "3.9"),
    ("VESL, WiT", "300 M", "11.6", "44.9", "2.1"),
    ("VESL, WiT+DFN", "2 B", "11.5", "35.9", "2.1"),
)


@dataclass(frozen=True)
class Stage:
    """One line of the funnel; a reason is (name, rows, meaning)."""

    name: str
    fingerprint: str
    parts: str
    rows: int
    kept: int
    rejected: int
    failed: int
    reasons: Sequence[tuple[str, int, str]]


@dataclass(frozen=True)
class Rate:
    """What the runs on record say of a step: `fresh` rows computed in `seconds` of workers, models opened."""

    name: str
    fresh: int
    seconds: float
    opened: int
    hours: float  # of workers, for the share of a million input rows that reaches the step


@dataclass(frozen=True)
class Side:
    """One recipe on the page."""

    name: str
    plan: Plan
    statistics: Statistics
    funnel: Sequence[Stage]
    without: int  # keys that takedown lists name


@dataclass(frozen=True)
class Difference:
    """Two recipes' regions, equal where key, box and phrase are. `options`: those that differ, with both values.

    Of one store, only the parts that both have done are compared: `parts` of them, and there are `of`. Of two stores,
    all is compared, and both are 0.
    """

    parts: int
    of: int
    both: int
    only: tuple[int, int]
    images: tuple[int, int]  # with such regions
    groups: Sequence[Group]
    options: Sequence[tuple[str, str, str]]


def build(plan: Plan, other: Plan | None, name: str, other_name: str = "") -> tuple[str, Statistics]:
    """Make the page for a recipe, and for what differs from another; the names are theirs on it.

    Returns the HTML and the first recipe's statistics. Nothing is written to a store.
    """
    with database(plan) as db:
        side, taken = _side(plan, name, db, "first" if other else None)
        second, difference, budget = None, None, BYTES
        if other is not None:
            second, _ = _side(other, other_name, db, "second")
            difference = _difference(db, side, second, budget := BYTES // 4)
            budget *= 2
    groups, made = album(plan, side.statistics, taken, budget)
    page = _environment().get_template("page.html.j2")
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = page.render(
        side=side,
        other=second,
        difference=difference,
        groups=[*(difference.groups if difference else ()), *groups],
        omitted=made.omitted,
        unreadable=made.unreadable,
        rates=_rates(plan),
        plots=plots(side.statistics),
        table_1=TABLE_1,
        verdicts=VERDICTS,
        regions=REGIONS,
        made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=Markup(style),  # noqa: S704  (our own file)
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return html.lstrip(), side.statistics


def _side(plan: Plan, name: str, db: duckdb.DuckDBPyConnection, regions: str | None) -> tuple[Side, pa.Array]:
    taken = _taken(plan)
    return Side(name, plan, measure(plan, taken, db, regions), _funnel(plan), len(taken)), taken


def _taken(plan: Plan) -> pa.Array:
    """The keys that must not be shown or counted."""
    return named(plan, obeyed(plan.store))


def _funnel(plan: Plan) -> list[Stage]:
    found = []
    for ingest in plan.dataset["ingests"] if plan.dataset else []:
        reasons = [(name, ingest[name], meaning) for name, meaning in INGEST.items() if ingest.get(name)]
        dropped = sum(n for _, n, _ in reasons)
        name, parts = "retry" if ingest.get("retry") else "ingest", str(ingest["parts"])
        found.append(Stage(name, ingest["id"], parts, ingest["rows"], ingest["kept"], dropped, 0, reasons))
    fingerprints = {step.name: step.fingerprint for step in plan.steps}
    for name, count in Tally.of(plan).counts.items():
        parts = f"{count.parts:,} of {len(plan.parts):,}" if count.parts < len(plan.parts) else f"{count.parts:,}"
        dropped = (count.rejected.total(), count.failed.total())
        found.append(Stage(name, fingerprints[name], parts, count.rows, count.kept, *dropped, reasons_of(name, count)))
    return found


def _rates(plan: Plan) -> list[Rate]:
    """By the newest runs that computed these very results."""
    records, tally, rates = last_runs(plan.store, _RUNS), Tally.of(plan).counts, []
    for step in plan.steps:
        mine = [r["progress"][step.name] for r in records if r["steps"].get(step.name) == step.fingerprint]
        fresh, seconds, opened = (sum(p[name] for p in mine) for name in ("fresh", "seconds", "opened"))
        share = tally[step.name].rows / plan.rows if plan.rows else 0.0
        hours = seconds / fresh * share * 1e6 / 3600 if fresh else 0.0
        rates.append(Rate(step.name, fresh, seconds, opened, hours))
    return rates


def _difference(db: duckdb.DuckDBPyConnection, first: Side, second: Side, budget: int) -> Difference:
    parts, of = _only_common(db, first.plan, second.plan)
    [(both,)] = db.execute("SELECT count(*) FROM first SEMI JOIN second USING (h)").fetchall()
    counts, images, groups = [], [], []
    for mine, theirs, side in (("first", "second", first), ("second", "first", second)):
        db.execute(f"CREATE OR REPLACE TEMP TABLE alone AS SELECT * FROM {mine} ANTI JOIN {theirs} USING (h)")
        [(n, keys)] = db.execute("SELECT count(*), count(DISTINCT key) FROM alone").fetchall()
        places = db.execute("SELECT part, key, i, score FROM alone ORDER BY hash(key), key, i LIMIT 1000").fetchall()
        counts.append(n)
        images.append(keys)
        groups += only(side.plan, [Place(*place) for place in places], f"only {side.name}", budget)[0]
    a, b = (_flat(described(side.plan.recipe)["steps"]) for side in (first, second))
    options = [(k, str(a.get(k, "")), str(b.get(k, ""))) for k in sorted(a | b) if a.get(k) != b.get(k)]
    return Difference(parts, of, both, (counts[0], counts[1]), (images[0], images[1]), groups, options)


def _only_common(db: duckdb.DuckDBPyConnection, first: Plan, second: Plan) -> tuple[int, int]:
    """Leave the regions of the parts that both have done; see `Difference`."""
    if first.store.path("") != second.store.path(""):
        return 0, 0
    mine, theirs = (plan.done["select"].keys() & set(plan.parts) for plan in (first, second))
    db.register("common", pa.table({"part": pa.array(sorted(mine & theirs), pa.int32())}))
    for name in ("first", "second"):
        db.execute(f"DELETE FROM {name} WHERE part NOT IN (SELECT part FROM common)")
    return len(mine & theirs), len(mine | theirs)


def _flat(options: Any, name: str = "") -> dict[str, Any]:
    """Nested options by dotted name."""
    if not isinstance(options, Mapping):
        return {name: options}
    return {k: v for key, value in options.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


def _environment() -> Environment:
    def shown(value: Any) -> Any:
        """Every output of the template; what is no markup of ours shows each of its characters."""
        return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["n"] = lambda value: f"{value:,}"
    found.filters["share"] = lambda value: f"{value:.1%}"
    return found
