from typing import Any

from vesl.pipeline.engines import Event
from vesl.pipeline.progress import Tally


def footer(rows: int, kept: int) -> dict[str, Any]:
    return {"rows": rows, "counts": {"kept": kept, "rejected": {"too_small": rows - kept}, "failed": {}}}


def test_rows_of_a_part_count_once() -> None:
    tally = Tally(["download", "caption"], rows=30)
    tally.take(Event("rows", "download", 0, rows=4))
    assert tally.done("download") == 4
    tally.take(Event("done", "download", 0, footer=footer(10, 5), seconds=2.0))
    assert tally.done("download") == 10
    tally.take(Event("rows", "download", 1, rows=9))
    tally.take(Event("retry", "download", 1))  # begins again, from what was saved
    assert tally.done("download") == 10
    tally.take(Event("saved", "download", 1, rows=6))
    tally.take(Event("saved", "download", 1, rows=8))
    assert tally.done("download") == 18


def test_what_a_later_step_will_see_follows_the_share_kept_so_far() -> None:
    tally = Tally(["download", "caption", "pack"], rows=30)
    assert tally.expected() == {"download": 30, "caption": 30, "pack": 30}
    tally.take(Event("done", "download", 0, footer=footer(10, 5)))
    assert tally.expected() == {"download": 30, "caption": 15, "pack": 15}
    tally.take(Event("done", "caption", 0, footer=footer(5, 1)))
    assert tally.expected() == {"download": 30, "caption": 15, "pack": 3}


def test_speed_is_of_this_runs_work_without_the_opening_of_models() -> None:
    tally = Tally(["caption"], rows=20)
    tally.take(Event("open", "caption", 0, seconds=7.0))
    tally.take(Event("done", "caption", 0, footer=footer(10, 10), seconds=2.0))
    tally.take(Event("done", "caption", 1, footer=footer(10, 10), seconds=5.0, fresh=False))  # was there
    snapshot = tally.snapshot()["caption"]
    assert (snapshot["rows"], snapshot["fresh"], snapshot["seconds"], snapshot["opened"]) == (20, 10, 2.0, 1)
