"""How far a run is: counts per step, fed by the engine's events, shown as bars on a terminal and as lines elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..transforms.captions import visible
from .engines import Event
from .plan import Plan

_LINE_EVERY_S = 15.0


@dataclass
class Count:
    """The rows of one step in published parts. `fresh` and `seconds` are of this run's work only."""

    parts: int = 0
    rows: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    fresh: int = 0
    seconds: float = 0.0

    def add(self, footer: Mapping[str, Any]) -> None:
        """Count one published part."""
        counts = footer["counts"]
        self.parts += 1
        self.rows += footer["rows"]
        self.kept += counts["kept"]
        self.rejected.update(counts["rejected"])
        self.failed.update(counts["failed"])

    @property
    def dropped(self) -> int:
        """Rows that went no further."""
        return self.rejected.total() + self.failed.total()

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed."""
        return self.failed.total() / self.rows if self.rows else 0.0


class Tally:
    """The counts of every step of a run."""

    def __init__(self, steps: Sequence[str], rows: int) -> None:
        self.rows = rows  # that go into the first step
        self.counts = {step: Count() for step in steps}
        self.partial: Counter[tuple[str, int]] = Counter()  # rows done of parts that are not published
        self.opened: Counter[str] = Counter()  # models, by step
        self._start = time.monotonic()

    @staticmethod
    def of(plan: Plan) -> "Tally":
        """Count the parts that are done."""
        tally = Tally([step.name for step in plan.steps], plan.rows)
        for step, footers in plan.done.items():
            total = footers.total(plan.parts)
            tally.counts[step].add(total)
            tally.counts[step].parts = total["parts"]
        return tally

    def take(self, event: Event) -> None:
        """Count an event."""
        place = (event.step, event.part)
        if event.kind == "rows":
            self.partial[place] += event.rows
        elif event.kind == "saved":
            self.partial[place] = event.rows
        elif event.kind == "open":
            self.opened[event.step] += 1
        elif event.kind == "spent":
            self.counts[event.step].seconds += event.seconds
        else:  # the part is done, or starts again
            del self.partial[place]
            if event.kind == "done":
                count = self.counts[event.step]
                count.add(event.footer)
                if event.fresh:
                    count.fresh += event.footer["rows"]
                    count.seconds += event.seconds

    def done(self, step: str) -> int:
        """Rows through a step, in parts that are not published too."""
        return self.counts[step].rows + sum(rows for (name, _), rows in self.partial.items() if name == step)

    def expected(self) -> dict[str, int]:
        """How many rows each step will see: what reached it, and of what is on its way the share kept so far."""
        found: dict[str, int] = {}
        total = float(self.rows)
        for step, count in self.counts.items():
            found[step] = max(round(total), self.done(step))
            ratio = count.kept / count.rows if count.rows else 1.0
            total = count.kept + (total - count.rows) * ratio
        return found

    def seconds_left(self) -> float:
        """By the step that needs longest at its speed of this run so far; 0 where nothing tells."""
        elapsed, longest = time.monotonic() - self._start, 0.0
        for step, total in self.expected().items():
            done, fresh = self.done(step), self.counts[step].fresh
            if 0 < done < total and fresh:
                longest = max(longest, (total - done) * elapsed / fresh)
        return longest

    def snapshot(self) -> dict[str, Any]:
        """The state as a document, for `vesl status` and the record of the run."""
        expected = self.expected()
        return {
            step: {
                "rows": self.done(step),
                "expected": expected[step],
                "kept": count.kept,
                "rejected": dict(count.rejected),
                "failed": dict(count.failed),
                "fresh": count.fresh,
                "seconds": round(count.seconds, 3),
                "opened": self.opened[step],
            }
            for step, count in self.counts.items()
        }


class Display:
    """Shows a tally while it grows: a bar per step on a terminal, one plain line now and then elsewhere."""

    def __init__(self, tally: Tally) -> None:
        self._tally, self._console = tally, Console(stderr=True)
        self._bars: Progress | None = None
        self._last = self._start = time.monotonic()
        if self._console.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description:9}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("kept {task.fields[kept]}, dropped {task.fields[dropped]}"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
            for step in self._tally.counts:
                self._tasks[step] = self._bars.add_task(step, total=None, kept=0, dropped=0, rate="")
            self.update(force=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.update(force=True)
        if self._bars:
            self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        line = visible(line)
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def update(self, force: bool = False) -> None:
        """Show the tally as it is now."""
        now = time.monotonic()
        expected = self._tally.expected()
        if self._bars:
            for step, task in self._tasks.items():
                count, done = self._tally.counts[step], self._tally.done(step)
                speed = self._bars.tasks[task].speed
                rate = f"{speed:.1f} rows/s" if speed else ""
                self._bars.update(
                    task, completed=done, total=expected[step], kept=count.kept, dropped=count.dropped, rate=rate
                )
        elif force or now - self._last > _LINE_EVERY_S:
            self._last = now
            pieces = [f"{step} {self._tally.done(step)}/{expected[step]}" for step in expected]
            left = self._tally.seconds_left()
            end = f"; about {left:.0f} s left" if left else ""
            self.say(f"[{now - self._start:4.0f} s] rows: " + ", ".join(pieces) + end)
