"""Captioners, grounders and scorers, by reference. Each module imports its heavy libraries only when a model is opened.

A reference is `name@revision`:
- built in: `tiny@1` (every role; as a scorer it is a second grounder) and `alt_text@1` (captioner: the web caption
  as it stands);
- `org/name@commit` on the Hugging Face hub, or a folder `./path@digest`: the config says which architecture it is;
- with `backend: openai`, the name under which a server knows the model, and a revision that is yours to state;
- a user's own, `module:function@revision`: a function without arguments that returns a captioner or a scorer, or one
  that takes the score floor and returns a grounder; either as in `contract.py`, or plain, a function of decoded images.
  Taggers of the phrases step may be a user's own too (`tagger.py`).
"""

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..transforms.outcomes import Drop
from . import hub
from .contract import Captioner, Grounder, ModelError, Plain, Scorer, Written, plain_captioner
from .options import Captioning, Grounding, Scoring

Role = Literal["captioner", "grounder", "scorer"]
ALT_TEXT = "alt_text@1"
BUILT_IN: dict[Role, tuple[str, ...]] = {
    "captioner": ("tiny@1", ALT_TEXT),
    "grounder": ("tiny@1",),
    "scorer": ("tiny@1",),
}
_OWN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)@(.+)")


def check(options: Captioning | Grounding | Scoring) -> None:
    """Raise ModelError unless the options name a pinned model. Opens nothing."""
    role: Role = "scorer"
    if not isinstance(options, Scoring):
        role = "captioner" if isinstance(options, Captioning) else "grounder"
    reference, known = options.model, BUILT_IN[role]
    if reference in known or _OWN.fullmatch(reference):
        return
    check_pinned("model", reference, (difflib.get_close_matches(reference, known, n=1, cutoff=0.4) or known)[0])
    if isinstance(options, Captioning) and options.backend == "openai":
        return
    name, _ = hub.split(reference)
    if "/" not in name and not hub.is_folder(name):
        ways = "org/name@commit, ./folder@digest and module:function@revision"
        raise ModelError(f"model: {reference!r} is not a {role}; there are {', '.join(known)}, {ways}")
    hub.check(reference)


def check_pinned(option: str, reference: str, example: str) -> None:
    """Raise ModelError unless a reference is `name@revision`."""
    name, revision = hub.split(reference)
    if not name or not revision:
        raise ModelError(f"{option}: {reference!r} is not pinned; write name@revision, as in {example!r}")


def open_captioner(options: Captioning) -> Captioner:
    """Load a captioner. Raises ModelError, one line that says what is missing."""
    if options.model == ALT_TEXT:
        return _AltText()
    if own := find_own(options.model):
        made = own()
        return made if hasattr(made, "prepare") else plain_captioner(made)
    if options.model in BUILT_IN["captioner"]:
        from . import tiny

        return plain_captioner(tiny.open_captioner())
    from . import captioners

    return captioners.open_captioner(options)


def open_grounder(options: Grounding) -> Grounder:
    """Load a grounder that gives every pair at or above `score_floor`. Raises ModelError."""
    if own := find_own(options.model):
        made = own(options.score_floor)
        return made if hasattr(made, "prepare") else Plain(made)
    if options.model in BUILT_IN["grounder"]:
        from . import tiny

        return Plain(tiny.open_grounder(options.score_floor))
    from . import grounders

    return grounders.open_grounder(options)


def open_scorer(options: Scoring) -> Scorer:
    """Load a scorer. Raises ModelError."""
    if own := find_own(options.model):
        made = own()
        return made if hasattr(made, "prepare") else Plain(made)
    from . import scorers

    return scorers.open_scorer(options)


def find_own(reference: str, option: str = "model") -> Callable[..., Any] | None:
    """The function of a reference `module:function@revision`; None for others. Raises ModelError."""
    match = _OWN.fullmatch(reference)
    if match is None:
        return None
    module, function, _ = match.groups()
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{option}: {reference}: {error}") from None


class _AltText:
    """The web caption as it stands; images are not looked at, and need not be given."""

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Sequence[str]:
        return alt_texts

    def __call__(self, prepared: Sequence[str]) -> list[list[Written | Drop]]:
        return [[Written(text)] if text else [] for text in prepared]
