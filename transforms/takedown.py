"""Takedown lists: which samples must not be used any more. Obeyed by the trainer's loader; reading files is its part.

A list is plain text, one entry a line, its kind told by its form: a sample's key (24 hex digits), the sha256 of a
stored image (64), an http(s) URL, or a domain, which stands for its subdomains too. `#` at the start of a line or after
white space begins a comment.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from .urls import KEY_DIGITS, keys, normalise

_HEX = re.compile(r"[0-9a-f]+")
_COMMENT = re.compile(r"(^|\s)#.*")
_HOST = r"^[a-z][a-z0-9+.-]*://(?:[^/?#]*@)?(?P<host>[^/?#:\[\]]+)"  # of a normalised URL
_DOMAIN = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)+")  # a lone word is rather a mutilated key


@dataclass(frozen=True)
class Takedown:
    """What the lists name. URLs and domains are as `urls.normalise` spells them, hex digits in lower case."""

    keys: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    @staticmethod
    def parse(lists: Iterable[tuple[str, str]]) -> "Takedown":
        """Join lists given as (name, text). Raises ValueError, `name:line: what is wrong`, for a malformed line."""
        found: dict[str, set[str]] = {"keys": set(), "sha256": set(), "urls": set(), "domains": set()}
        for name, text in lists:
            for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
                entry = _COMMENT.sub("", line).strip()
                if not entry:
                    continue
                try:
                    kind, value = _entry(entry)
                except ValueError as error:
                    raise ValueError(f"{name}:{number}: {error}") from None
                found[kind].add(value)
        found["keys"].update(keys(list(found["urls"]))[1])  # also where a sample has lost its URL
        return Takedown(**{kind: frozenset(values) for kind, values in found.items()})

    def __or__(self, other: "Takedown") -> "Takedown":
        """What either names."""
        return Takedown(*(getattr(self, f.name) | getattr(other, f.name) for f in fields(self)))

    def covers(self, key: str, url: str, sha256: str) -> bool:
        """Whether a sample is named by its key, its image's hash, its URL or the domain that its URL lies in."""
        if key.lower() in self.keys or sha256.lower() in self.sha256:
            return True
        spelled = (normalise(url) if url and (self.urls or self.domains) else None) or ""
        return spelled in self.urls or bool(self.domains and spelled and self._inside(_host(spelled)))

    def match(self, keys: pa.Array, urls: Sequence[pa.Array] = (), hashes: Sequence[pa.Array] = ()) -> pa.Array:
        """The same for columns, bool [rows]: `keys` and any number of columns of normalised URLs and of sha256."""
        hit = _among(keys, self.keys)
        for column in hashes:
            hit = pc.or_(hit, _among(column, self.sha256))
        for column in urls:
            hit = pc.or_(hit, _among(column, self.urls))
            if self.domains:
                hosts = pc.struct_field(pc.extract_regex(column, _HOST), "host").dictionary_encode()
                inside = [host is not None and self._inside(host.lower()) for host in hosts.dictionary.to_pylist()]
                hit = pc.or_(hit, pc.fill_null(pc.take(pa.array(inside, pa.bool_()), hosts.indices), False))
        return hit

    def _inside(self, host: str) -> bool:
        return not self.domains.isdisjoint(_parents(host))

    def __bool__(self) -> bool:
        return bool(self.keys or self.sha256 or self.urls or self.domains)


def _entry(entry: str) -> tuple[str, str]:
    low = entry.lower()
    if _HEX.fullmatch(low):
        if len(low) in (KEY_DIGITS, 64):
            return ("keys" if len(low) == KEY_DIGITS else "sha256"), low
        raise ValueError(f"{entry[:80]!r} has {len(low)} hex digits; a key has {KEY_DIGITS}, a sha256 has 64")
    if re.search(r"\s", entry):
        raise ValueError(f"{entry[:80]!r} is more than one entry; write one a line")
    if low.startswith(("http://", "https://")):
        if url := normalise(entry):
            return "urls", url
        raise ValueError(f"{entry[:80]!r} is not a valid URL")
    host = ((normalise(f"http://{low}/") or "").removeprefix("http://")).removesuffix("/").removesuffix(".")
    if not _DOMAIN.fullmatch(host) or (low.isascii() and low.removesuffix(".") != host):
        raise ValueError(f"{entry[:80]!r} is not a key, a sha256, an http(s) URL or a domain")
    return "domains", host


def _among(column: pa.Array, values: frozenset[str]) -> pa.Array:
    return pc.is_in(column, _array(values))


@lru_cache(8)
def _array(values: frozenset[str]) -> pa.Array:
    return pa.array(sorted(values), pa.string())


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # no URL of ours; such a one has no domain that could be listed
        return ""


def _parents(host: str) -> list[str]:
    """A host and every domain that it lies in."""
    labels = host.removesuffix(".").split(".")
    return [".".join(labels[i:]) for i in range(len(labels))]
