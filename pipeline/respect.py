"""What owners ask of those who collect: headers of their answers, files on their hosts, and lists of their domains.

The files are asked for once per host: each worker remembers them, and the store keeps them for the other workers and
later runs, for a while, as `respect/<2 digits>/<24 digits of sha256(its URL)>.json`.
"""

import asyncio
import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from ..transforms.options import operational
from ..transforms.outcomes import Drop
from .store import Store

_OPEN = ("http_4xx", "http_other", "empty", "redirect_loop")  # no such file: nothing is asked (RFC 9309, 2.3.1)
_KNOWN = 5000  # files in memory
_AGAIN_S = 60.0  # before a host is asked again whose file could not be had
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")  # no names of robots
ROBOTS, TDM = "/robots.txt", "/.well-known/tdmrep.json"


@dataclass(frozen=True)
class RespectRule:
    """Whose wishes are obeyed, and which. A domain that is blocked blocks all names under it.

    Raises ValueError for what is no domain, and for a file of domains (one a line, # begins a comment) that cannot be
    read. The file is read here, once; its content is part of the step's identity, not its name.
    """

    robots_tags: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")  # of X-Robots-Tag: opted_out
    tdm_header: bool = True  # `tdm-reservation: 1` is opted_out
    tdm_file: bool = False  # ask each host for /.well-known/tdmrep.json: opted_out where it reserves the URL
    robots_txt: bool = False  # ask each host for /robots.txt: robots_disallowed where it disallows the URL
    keep_h: float = operational(24.0)  # how long the store's copies of such files hold
    blocked_domains: tuple[str, ...] = ()
    blocked_domains_file: str | None = operational(None)
    blocked_domains_sha256: str = ""  # of that file; where it is given, the file must have it
    blocked: ClassVar[frozenset[str]] = frozenset()  # all of them; no option, so no field

    def __post_init__(self) -> None:
        listed: list[str] = []
        if self.blocked_domains_file:
            try:
                text = Path(self.blocked_domains_file).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(
                    f"blocked_domains_file: {self.blocked_domains_file}: cannot be read: {error}"
                ) from None
            listed = [name for line in text.splitlines() if (name := line.partition("#")[0].strip())]
            digest = hashlib.sha256(text.encode()).hexdigest()
            if self.blocked_domains_sha256 not in ("", digest):
                raise ValueError(f"blocked_domains_sha256: {self.blocked_domains_file} has {digest}")
            object.__setattr__(self, "blocked_domains_sha256", digest)
        for key, names in (("blocked_domains", self.blocked_domains), ("blocked_domains_file", listed)):
            if (wrong := next((name for name in names if _domain(name) is None), None)) is not None:
                raise ValueError(f"{key}: {wrong!r} is not a domain like example.org")
        blocked = frozenset(filter(None, map(_domain, (*self.blocked_domains, *listed))))
        object.__setattr__(self, "blocked", blocked)
        if self.keep_h <= 0:
            raise ValueError(f"keep_h: {self.keep_h} is not positive")


def _domain(name: str) -> str | None:
    import ada_url

    try:
        host = str(ada_url.URL(f"http://{name.strip().strip('.')}/").hostname)
    except ValueError:
        return None
    return host if "/" not in name and ":" not in name and "@" not in name else None


def check_domain(host: str, rule: RespectRule) -> None:
    """Raise Drop blocked_domain where the host (lower case, in punycode) or a domain above it is on a list."""
    labels = host.rstrip(".").split(".")
    for i in range(len(labels) if rule.blocked else 0):
        if (name := ".".join(labels[i:])) in rule.blocked:
            raise Drop("blocked_domain", name)


def check_headers(tags: Iterable[str], tdm: Iterable[str], token: str, rule: RespectRule) -> None:
    """Raise Drop opted_out where the X-Robots-Tag or tdm-reservation headers of an answer say so.

    A tag counts that is for all, or for the robot `token` (in any case); `none` is noindex and nofollow.
    """
    for line in tags:
        meant = True
        for piece in line.split(","):
            name, colon, rest = (part.strip().lower() for part in piece.partition(":"))
            if colon and name not in _WITH_VALUE:  # from here to the line's end, for that robot
                meant, name = name in (token.lower(), "*"), rest
            if meant and ("noindex" if name == "none" else name) in rule.robots_tags:
                raise Drop("opted_out", f"X-Robots-Tag: {line[:200]}")
    if rule.tdm_header and any(value.strip() == "1" for line in tdm for value in line.split(",")):
        raise Drop("opted_out", "tdm-reservation: 1")


def tdm_reserves(text: str, path: str) -> bool:
    """Whether a tdmrep.json reserves the rights in a path (with its query): the longest location that matches tells.

    What is not such a file reserves nothing.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        return False
    best = (-1, False)
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict) and isinstance(where := entry.get("location"), str) and _matches(where, path):
            best = max(best, (len(where), str(entry.get("tdm-reservation")) == "1"))
    return best[1]


def _matches(pattern: str, path: str) -> bool:
    """As in robots.txt: from the path's start, `*` is anything, `$` at the end is the end."""
    exact = pattern.endswith("$")
    pieces = re.sub(r"\*+", "*", pattern.removesuffix("$")).split("*")
    if not path.startswith(pieces[0]):
        return False
    at = len(pieces[0])
    for piece in pieces[1:]:  # the first place that fits is the best: no backtracking, which a stranger could abuse
        last = exact and piece is pieces[-1]
        found = path.rfind(piece) if last else path.find(piece, at)
        if found < at:
            return False
        at = found + len(piece)
    return not exact or at == len(path)


Ask = Callable[[str], Awaitable[str]]  # the text at a URL, following redirects; raises Drop


class Wishes:
    """The files of hosts, as one worker knows them. Lives on one event loop; `ask` fetches a file."""

    def __init__(self, rule: RespectRule, token: str, ask: Ask, store: Store | None) -> None:
        self._rule, self._token, self._ask, self._store = rule, token, ask, store
        self._known: OrderedDict[str, tuple[float, asyncio.Task[Any]]] = OrderedDict()
        self._threads = ThreadPoolExecutor(8, "respect") if store and (rule.robots_txt or rule.tdm_file) else None

    async def check(self, url: str) -> str | None:
        """Look at a URL before it is asked for; returns what robots.txt said: allowed, or None where it was not asked.

        Raises Drop: blocked_domain, robots_disallowed, opted_out, or why a file could not be had, which must not be
        taken for a yes (RFC 9309, 2.3.1.4).
        """
        parts = urlsplit(url)
        check_domain(parts.hostname or "", self._rule)
        origin = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        if self._rule.robots_txt and not (await self._file(origin + ROBOTS)).can_fetch(url, self._token):
            raise Drop("robots_disallowed", f"{origin}{ROBOTS}")
        if self._rule.tdm_file and tdm_reserves(await self._file(origin + TDM), path):
            raise Drop("opted_out", f"{origin}{TDM}")
        return "allowed" if self._rule.robots_txt else None

    async def _file(self, url: str) -> Any:
        until, task = self._known.get(url, (0.0, None))
        if task is None or until < time.monotonic() or (task.done() and task.cancelled()):
            task = asyncio.create_task(self._load(url))
            self._known[url] = (time.monotonic() + self._rule.keep_h * 3600, task)
            if len(self._known) > _KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(url)
        try:
            return await asyncio.shield(task)  # it is for other rows too
        except Drop as drop:
            until, latest = self._known.get(url, (0.0, None))
            if latest is task:
                self._known[url] = (min(until, time.monotonic() + _AGAIN_S), task)
            raise Drop(drop.reason, drop.detail) from None  # one for each row: an exception is not to be shared

    async def _load(self, url: str) -> Any:
        text = await self._cached(url)
        if text is None:
            try:
                text = await self._ask(url)
            except Drop as drop:
                if drop.reason not in _OPEN:
                    raise Drop(drop.reason, f"{urlsplit(url).path}: {drop.detail}") from None
                text = ""
            await self._keep(url, text)
        if not url.endswith(ROBOTS):
            return text
        from protego import Protego

        return Protego.parse(text)

    async def _cached(self, url: str) -> str | None:
        if not self._threads or not self._store:
            return None
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._store.read_json, _place(url))
        fresh = isinstance(found, Mapping) and time.time() - found["at"] < self._rule.keep_h * 3600
        return str(found["text"]) if fresh else None

    async def _keep(self, url: str, text: str) -> None:
        if self._threads and self._store:
            document = {"url": url, "at": time.time(), "text": text}
            await asyncio.get_running_loop().run_in_executor(
                self._threads, self._store.write_json, _place(url), document
            )


def _place(url: str) -> str:
    digits = hashlib.sha256(url.encode()).hexdigest()[:24]
    return f"respect/{digits[:2]}/{digits}.json"
