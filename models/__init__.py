"""Captioners and grounders, by reference. Each module imports its heavy libraries only when a model is opened.

A reference is `name@revision`. Built in are `tiny@1` (both roles) and `alt_text@1` (captioner: the web caption as it
stands). A user's own model is `module:function@revision`: the function takes what the built-in opener takes.
"""

import difflib
import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from PIL import Image

from .contract import Captioner, Grounder, ModelError

Role = Literal["captioner", "grounder"]
ALT_TEXT = "alt_text@1"
_BUILT_IN: dict[Role, tuple[str, ...]] = {"captioner": ("tiny@1", ALT_TEXT), "grounder": ("tiny@1",)}
_OWN = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)@(.+)")


def check_reference(role: Role, reference: str) -> None:
    """Raise ModelError unless a reference is pinned and is a built-in one or names a function."""
    known = _BUILT_IN[role]
    if reference in known or _OWN.fullmatch(reference):
        return
    near: str = (difflib.get_close_matches(reference, known, n=1, cutoff=0.4) or known)[0]
    check_pinned("model", reference, near)
    raise ModelError(f"model: {reference!r} is not a {role}; there are {', '.join(known)} and module:function@revision")


def check_pinned(option: str, reference: str, example: str) -> None:
    """Raise ModelError unless a reference is `name@revision`."""
    name, _, revision = reference.partition("@")
    if not name or not revision:
        raise ModelError(f"{option}: {reference!r} is not pinned; write name@revision, as in {example!r}")


def open_captioner(reference: str) -> Captioner:
    """Load a captioner. Raises ModelError, one line that says what is missing."""
    if reference == ALT_TEXT:
        return _alt_text
    if own := _own(reference):
        own_captioner: Captioner = own()
        return own_captioner
    from . import tiny

    return tiny.open_captioner()


def open_grounder(reference: str, score_floor: float) -> Grounder:
    """Load a grounder that gives every pair at or above `score_floor`. Raises ModelError."""
    if own := _own(reference):
        own_grounder: Grounder = own(score_floor)
        return own_grounder
    from . import tiny

    return tiny.open_grounder(score_floor)


def _own(reference: str) -> Callable[..., Any] | None:
    match = _OWN.fullmatch(reference)
    if match is None:
        return None
    module, function, _ = match.groups()
    try:
        return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model: {reference}: {error}") from None


def _alt_text(images: Sequence[Image.Image], alt_texts: Sequence[str]) -> list[list[str]]:
    return [[text] if text else [] for text in alt_texts]
