"""Engines carry part references through the chain of steps; `local` uses the cores of this machine.

An engine is a function: it takes a job and the numbers of the parts to do, calls `work.run_part` for every step of
every part, and tells what happens as events. It never sees an image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """Something happened to one step of one part.

    `rows`: so many more rows are done (of unfinished work). `done`: published, or found done where not `fresh`;
    `footer` has the counts. `open`: a model was loaded, in `seconds`. `retry`: the attempt failed or its worker died;
    there will be another. `lost`: there will not.
    """

    kind: Literal["rows", "done", "open", "retry", "lost"]
    step: str
    part: int
    rows: int = 0
    seconds: float = 0.0
    text: str = ""
    fresh: bool = True
    footer: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
