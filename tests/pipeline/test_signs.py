"""Signs of life: who shows them, and when their absence tells of a process that is frozen."""

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.world import ROOT
from vesl.pipeline.engines import signs
from vesl.pipeline.engines.signs import Silence, Unchanged, at_work, live

OURS, PARENT, DEAD = os.getpid(), os.getppid(), 2**22 + 1
LIFE = """
import sys, time
from vesl.pipeline.engines import signs
signs._BEAT_S = 0.05
signs.live(sys.argv[1])
time.sleep(60)
"""
QUIET: list[set[int] | None] = [None]


class Looks:
    """Looks at signs that are written by hand, as if the time had come."""

    def __init__(self, folder: Path, all_here: bool = True, limit_s: float = 80.0) -> None:
        self.silence, self._folder, self._beats = Silence(str(folder), limit_s, all_here), folder, 0

    def look(self, count: int = 1) -> list[set[int] | None]:
        answers = []
        for _ in range(count):
            for looks in (self.silence._processes, self.silence._work):
                looks._at = 0.0
            broken = self.silence.broken()
            answers.append(broken[0] if broken else None)
        return answers

    def write(self, pid: int, begun: int = 5, busy: int = 1) -> None:
        path = self._folder / f"alive-{pid}"
        path.write_text(f"{begun} {busy}")
        self._beats += 1
        os.utime(path, ns=(self._beats, self._beats))


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "no space left")


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_does_not_change_in_nine_looks_is_found() -> None:
    unchanged = Unchanged[str](80.0)
    assert unchanged.due()
    assert not unchanged.due()
    assert 9 < unchanged._at - time.monotonic() < 10
    for look in range(8):
        assert unchanged.look({"still": 1, "moves": look, "new": 1} | ({"late": 2} if look else {})) == []
    assert unchanged.look({"still": 1, "moves": 7, "new": 3, "late": 2}) == ["still"]
    assert unchanged.look({"still": 1, "moves": 7, "new": 3, "late": 2}) == ["late"]
    for _ in range(7):
        assert "still" not in unchanged.look({"still": 1})
    assert unchanged.look({"still": 1}) == ["still"]


def test_a_process_that_shows_no_more_signs_is_frozen(tmp_path: Path) -> None:
    looks = Looks(tmp_path)
    for _ in range(20):
        looks.write(OURS)
        assert looks.look() == QUIET
    looks.write(DEAD)  # it has died, which others see
    assert looks.look(8) == QUIET * 7 + [{OURS}]
    assert looks.silence.broken() is None  # it is not time to look
    looks.write(PARENT)
    for _ in range(8):
        looks.write(OURS)
        assert looks.look() == QUIET
    looks.write(OURS)
    assert looks.look() == [{PARENT}]


@pytest.mark.parametrize("all_here", [True, False])
def test_where_nobody_has_been_at_work_for_long_somebody_is_frozen(tmp_path: Path, all_here: bool) -> None:
    looks = Looks(tmp_path, all_here)

    def after(begun: int, busy: int) -> list[set[int] | None]:
        looks.write(OURS, 0, 0)  # the pipeline's own process
        looks.write(PARENT, begun, busy)
        return looks.look()

    assert [after(begun, 0) for begun in range(20)] == [QUIET] * 20  # each of them begun and ended between two looks
    assert [after(20, 1) for _ in range(20)] == [QUIET] * 20
    found = [set[int]()] if all_here else QUIET  # elsewhere others may be at work
    assert [after(20, 0) for _ in range(9)] == [QUIET] * 8 + [found]
    assert [after(20, 0) for _ in range(4)] == [QUIET] * 4


def test_a_worker_may_freeze_before_its_first_sign(tmp_path: Path) -> None:
    assert Looks(tmp_path).look(9) == QUIET * 8 + [set()]
    assert Looks(tmp_path, all_here=False).look(20) == QUIET * 20
    assert Looks(tmp_path, limit_s=5).silence._work.limit_s == 60  # a start takes a while
    assert Looks(tmp_path, limit_s=70).silence._work.limit_s == 70


def test_what_is_said_names_the_limit(tmp_path: Path) -> None:
    looks, texts = Looks(tmp_path, limit_s=5), list[str]()
    looks.write(OURS)
    for _ in range(9):
        looks.silence._processes._at = 0.0
        texts += [broken[1]] if (broken := looks.silence.broken()) else []
    looks.write(OURS, busy=0)
    for _ in range(9):
        looks.silence._processes._at, looks.silence._work._at = math.inf, 0.0
        texts += [broken[1]] if (broken := looks.silence.broken()) else []
    assert texts == [
        "a worker gave no sign of life in 5 s (engine.silence_limit_s)",
        "no worker was at work on anything in 60 s (engine.silence_limit_s, a minute at least)",
    ]


def test_signs_tell_how_much_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_BEAT_S", 0.01)
    folder, path = tmp_path / "signs", tmp_path / f"signs/alive-{OURS}"

    def shown() -> list[int]:
        return [int(word) for word in path.read_text().split()]

    def beats() -> None:
        before = path.stat().st_mtime_ns
        until(lambda: path.stat().st_mtime_ns > before)

    with at_work(str(folder)):  # of a driver on another machine
        pass
    folder.mkdir()
    live(str(folder))
    until(path.exists)
    assert shown() == [0, 0]
    with at_work(str(folder)), at_work(str(folder)):
        until(lambda: shown() == [2, 2])
        beats()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            beats()
            assert shown() == [2, 2]
    until(lambda: shown() == [2, 0])
    with pytest.raises(ZeroDivisionError), at_work(str(folder)):
        1 / 0  # noqa: B018
    until(lambda: shown() == [3, 0])
    shutil.rmtree(folder.rename(tmp_path / "gone"))
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_a_stopped_process_is_found_and_one_that_goes_on_is_not(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", LIFE, str(tmp_path)], cwd=ROOT) for _ in range(2)]
    until(lambda: len(list(tmp_path.glob("alive-*"))) == 2)
    silence, found = Silence(str(tmp_path), 4.0, False), set[int]()
    workers[1].send_signal(signal.SIGSTOP)
    begun = time.monotonic()

    def look() -> bool:
        found.update(*(silence.broken() or [()])[:1])
        return bool(found)

    until(look)
    assert found == {workers[1].pid}
    assert 3.5 < time.monotonic() - begun < 15
    for worker in workers:
        worker.kill()
        worker.wait()
