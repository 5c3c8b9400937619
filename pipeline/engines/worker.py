"""A worker process of the engine `local`: parts in, messages out, its models loaded once.

The driver sends (thread, task), and hears (thread, kind, value) of how the task goes: `rows`, `key`, `open`, `read`,
and, at the end, `done`, `fault`, `model` or `leased`.
"""

import faulthandler
import gc
import math
import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

import pyarrow as pa

from ...models.contract import ModelError
from ..leases import LeasedError
from ..stage import ByRow, Function, InTwo, Stage
from ..work import Attempt, Job, run_part
from . import Engine

HANGS = 2  # attempts that took too long; then the part is given up
DEATHS = 2  # of a part's worker, with other rows; then the part runs alone
_TICK_S = 0.5  # how often a busy worker tells how many rows it has done
_TELL_S = 30.0
_STUCK_S = 60.0  # beyond a limit, where a call lets no other thread of Python have its turn


@dataclass
class Task:
    """One step of one part, and what went wrong with it so far."""

    index: int
    part: int
    deaths: int = 0
    faults: int = 0
    culprits: frozenset[str] = frozenset()
    hangs: int = 0
    begun: float = 0.0  # the attempt; or when its worker was done with the task before
    hung: str = ""  # why its worker was ended
    read: bool = False  # all its rows are on their way to the model

    @property
    def alone(self) -> bool:
        """Whether its rows are tried one by one, to find the one that kills."""
        return self.deaths >= DEATHS


class Clock:
    """The seconds of a worker that a part took: of two parts at a time, the later one's begin as the other ends."""

    def __init__(self) -> None:
        self._end = 0.0

    def since(self, begun: float) -> float:
        """The seconds of a part that ends now."""
        now = time.monotonic()
        seconds, self._end = now - max(begun, self._end), now
        return seconds


class Turn:
    """Whose turn it is to use a model: the part's that began first, until all of its rows are through.

    A part takes it before the next may begin, even where none of its batches is ready yet.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.owner = 0  # a thread's number; none is 0
        self.shared = False  # the function serves several parts at a time

    def take(self) -> None:
        """Wait for this thread's turn, unless it has it."""
        if not self.shared and self.owner != threading.get_ident():
            self._lock.acquire()
            self.owner = threading.get_ident()

    def close(self) -> None:
        """End this thread's turn, if it has it."""
        if self.owner == threading.get_ident():
            self.owner = 0
            self._lock.release()


def in_turn(function: Function, turn: Turn) -> Function:
    """The same function; two parts that use it take turns now, as a model serves one caller at a time."""
    turn.shared = isinstance(function, ByRow)
    if isinstance(function, InTwo) and not turn.shared:
        finish = function.finish

        def finish_in_turn(batch: pa.Table, prepared: Any) -> pa.Table:
            turn.take()
            return finish(batch, prepared)

        function.finish = finish_in_turn
    return function


class Watch:
    """Ends this process where an attempt at a step takes too long, as nothing else ends a call that hangs.

    The others may wait for the oldest, so their time begins at its end. Where all are silent, the one whose turn it is
    with the model is to blame; the oldest may wait for that. A call that keeps Python's lock (a regular expression, a
    library's loop) stops the watching, too: for that there is a timer beyond Python, which is wound up again and again.
    """

    def __init__(self, engine: Engine, turn: Turn) -> None:
        self._engine, self._turn, self._heard, self._began = engine, turn, 0.0, 0.0
        self._attempts: dict[int, Callable[[str], None]] = {}  # by thread, in the order of their beginnings
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wound = False

    def hear(self) -> None:
        """Something was finished."""
        self._heard = time.monotonic()

    @contextmanager
    def over(self, at_end: Callable[[str], None]) -> Iterator[None]:
        """Watch over an attempt; before the process is ended for it, `at_end` hears why."""
        attempt = threading.get_ident()
        with self._lock:
            if not self._attempts:
                self._began = time.monotonic()
            self._attempts[attempt] = at_end
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="vesl-watch")
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                if next(iter(self._attempts)) == attempt:
                    self._began = time.monotonic()
                del self._attempts[attempt]

    def _watch(self) -> None:
        while True:
            time.sleep(_TICK_S)
            with self._lock:
                at_end = next(iter(self._attempts.values()), None)
                deadline, why = self._engine.deadline(self._began, self._heard)
                if time.monotonic() > max(self._began, self._heard) + self._engine.silence_limit_s:
                    at_end = self._attempts.get(self._turn.owner, at_end)
                self._wind(deadline if self._attempts else math.inf)
            if at_end is not None and time.monotonic() > deadline:
                telling = threading.Thread(target=at_end, args=(why,), daemon=True)
                telling.start()
                telling.join(_TELL_S)  # the store may be what hangs
                os._exit(1)

    def _wind(self, deadline: float) -> None:
        """Let the process end a while after a deadline, unless it is wound up again; no timer where there is none."""
        if deadline < math.inf:
            left = max(deadline - time.monotonic(), 0.0)
            faulthandler.dump_traceback_later(left + _STUCK_S, exit=True, file=2)
        elif self._wound:
            faulthandler.cancel_dump_traceback_later()
        self._wound = deadline < math.inf


def live(job: Job, pipe: Connection, output: Connection, environment: Mapping[str, str]) -> None:
    """A worker's life: parts in, messages out, until the pipe closes. `environment` is the driver's as it is now.

    One thread listens, this one works, and another works on what comes while this one is at work.
    """
    gc.freeze()  # what was imported stays: it need not be looked through for garbage again and again
    os.environ.clear()  # it has that of the process that it was forked from
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what Ctrl-C means
    threading.Thread(target=_follow_parent, daemon=True).start()
    functions: dict[str, Function] = {}
    turns: dict[str, Turn] = {}
    clock = Clock()
    given: tuple[SimpleQueue[Task | None], SimpleQueue[Task | None]] = (SimpleQueue(), SimpleQueue())
    sending = threading.Lock()

    def listen() -> None:
        with suppress(EOFError, OSError):
            while True:
                thread, task = pipe.recv()
                given[thread].put(task)
        for tasks in given:
            tasks.put(None)

    def work(thread: int) -> None:
        def tell(kind: str, value: Any = None) -> None:
            with sending:
                pipe.send((thread, kind, value))

        try:
            while task := given[thread].get():
                _try(job, task, functions, turns, clock, tell)
        except BaseException:  # noqa: BLE001  (a library's sys.exit(): in whichever thread, it ends the worker)
            traceback.print_exc()
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    threading.Thread(target=work, args=(1,), daemon=True).start()
    work(0)


def _try(
    job: Job,
    task: Task,
    functions: dict[str, Function],
    turns: dict[str, Turn],
    clock: Clock,
    tell: Callable[..., None],
) -> None:
    """Do a step of a part, and tell how it goes and how it ended."""
    pending, last, start, opening = 0, time.monotonic(), time.monotonic(), 0.0
    counts: list[int] = []
    folder = job.steps[task.index].folder
    turn = turns.setdefault(folder, Turn())

    def opener(stage: Stage) -> Function:
        nonlocal opening
        if folder not in functions:
            begun = time.monotonic()
            functions[folder] = in_turn(stage.open(), turn)
            if stage.opens_model:
                opening = time.monotonic() - begun
                tell("open", opening)
        return functions[folder]

    def on_rows(rows: int) -> None:
        nonlocal pending, last
        counts.append(rows)
        pending += rows
        if pending and time.monotonic() - last > _TICK_S:
            tell("rows", pending)
            pending, last = 0, time.monotonic()

    def on_key(key: str | None) -> None:
        tell("key", key)
        if key is None:  # no row is with the model any more
            turn.close()

    def on_read() -> None:
        turn.take()
        tell("read")

    attempt = Attempt(task.culprits, task.alone, on_rows, on_key, on_read)
    try:
        result = run_part(job, task.index, task.part, opener, attempt)
        tell("done", (clock.since(start) - opening, sum(counts[1:]), result))
    except LeasedError:
        tell("leased")
    except ModelError as error:
        tell("model", str(error))
    except Exception as error:  # noqa: BLE001  (a fault of a part, not of the run: the driver decides)
        where = traceback.extract_tb(error.__traceback__)[-1]
        tell("fault", f"{type(error).__name__}: {error} ({os.path.basename(where.filename)}:{where.lineno})")
    finally:
        turn.close()


def _follow_parent() -> None:
    """End with the driver, even if that was killed: nobody would take this worker's results."""
    parent = mp.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
