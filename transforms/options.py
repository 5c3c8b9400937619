"""How an option says whether it can change a result: the fingerprints of steps hash those that can."""

import dataclasses
from typing import Any


def operational(default: Any) -> Any:
    """Declare an option that cannot change a result (a timeout, a batch size): it stays out of the fingerprint."""
    return dataclasses.field(default=default, metadata={"operational": True})


def identity(options: Any) -> dict[str, Any]:
    """The options of a dataclass that can change a result, nested dataclasses included, also those in tuples."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        if not field.metadata.get("operational"):
            found[field.name] = _plain(getattr(options, field.name))
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return identity(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value
