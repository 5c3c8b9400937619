"""How an option says whether it can change a result: the fingerprints of steps hash those that can."""

import dataclasses
from typing import Any


def operational(default: Any) -> Any:
    """Declare an option that cannot change a result (a timeout, a batch size): it stays out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"operational": True})


def added(frozen: Any) -> Any:
    """Declare an option that came when results were already stored; at its default it stays out of the fingerprint.

    `frozen` is that default and means what the code did before, so earlier results keep their name. It must never be
    another value; a dict is copied for each use.
    """
    metadata = {"added": frozen}
    if isinstance(frozen, dict):
        return dataclasses.field(default_factory=frozen.copy, metadata=metadata)
    return dataclasses.field(default=frozen, metadata=metadata)


def identity(options: Any) -> dict[str, Any]:
    """The options of a dataclass that can change a result, nested dataclasses included, also those in tuples."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        as_before = "added" in field.metadata and value == field.metadata["added"]
        if not field.metadata.get("operational") and not as_before:
            found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value
