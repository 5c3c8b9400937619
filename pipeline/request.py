"""One request to a stranger's server, and its answer read within limits. Every way to fail is a download reason."""

import errno
import socket
import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..transforms.outcomes import Drop
from .connect import BLOCKED, opened_for

if TYPE_CHECKING:
    import aiohttp
    from multidict import CIMultiDictProxy
    from yarl import URL

_CLOSE = {"Connection": "close"}
_DETAIL_CHARS = 300
_PIECE_BYTES = 1 << 16  # of an inflated body
_STORED = {  # header -> column of the `http` struct
    "ETag": "etag",
    "Last-Modified": "last_modified",
    "Date": "date",
    "X-Robots-Tag": "x_robots_tag",
    "tdm-reservation": "tdm_reservation",
}


@dataclass(frozen=True)
class Fetched:
    """A body of at least one byte, and what is known of its way here.

    `final_url` is after redirects; `content_type` is what the server claims; `at` is when the answer's headers were
    there, by this machine's clock.
    """

    body: bytes
    final_url: str | None = None
    content_type: str | None = None
    http: dict[str, str | None] | None = field(default=None, compare=False)  # what else was asked and answered
    at: datetime | None = field(default=None, compare=False)


class RefusedError(Drop):
    """HTTP 429 or 503: not now. `after` is the Retry-After header, empty where there is none."""

    def __init__(self, reason: str, detail: str, after: str) -> None:
        super().__init__(reason, detail)
        self.after = after


async def ask(
    session: "aiohttp.ClientSession",
    url: str,
    max_bytes: int,
    may_read: Callable[["CIMultiDictProxy[str]"], None] | None,
    take: Callable[[int], Awaitable[None]],
    keep_open: bool = False,
) -> Fetched | str:
    """GET a parsed URL; return the body, or where it redirects to.

    With `keep_open`, the connection stays for the host's next request once the body is read whole. `may_read` looks at
    the headers of a good answer first, and may raise Drop; `take` is called with the size in bytes of each piece of the
    body before it is kept, and may wait. Raises Drop; RefusedError for 429 and 503.
    """
    from yarl import URL

    response = await _get(session, URL(url, encoded=True), {} if keep_open else _CLOSE)
    at = datetime.now(UTC)
    try:
        location = response.headers.get("Location")
        if response.status in (301, 302, 303, 307, 308) and location:
            return parse(location, url)
        _check_status(response)
        if may_read:
            may_read(response.headers)
        body = await _read(response, max_bytes, take)
        http = {
            name: ", ".join(map(printable, response.headers.getall(header, ()))) or None
            for header, name in _STORED.items()
        }
        return Fetched(body, url, printable(response.headers.get("Content-Type", "")), http, at)
    finally:
        response.close()


async def _get(session: "aiohttp.ClientSession", url: "URL", headers: dict[str, str]) -> "aiohttp.ClientResponse":
    """Ask on an idle connection to the host, or on a new one where there is none or the server closed it meanwhile."""
    import aiohttp

    while True:
        opened: list[int] = []
        opened_for.set(opened)
        try:
            return await session.get(url, headers=headers, allow_redirects=False)
        except aiohttp.ClientConnectorError:
            raise
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
            if opened:  # it was a new one
                raise


def parse(url: str, base: str | None = None) -> str:
    """Read a URL as browsers do (WHATWG; nothing already escaped is escaped again); keep it to http and https."""
    import ada_url

    try:
        parsed = ada_url.URL(url, base=base)
    except ValueError as error:
        raise Drop("bad_url", printable(url)) from error
    if parsed.protocol not in ("http:", "https:"):
        raise Drop("bad_scheme", printable(parsed.href))
    return str(parsed.href)


def _check_status(response: "aiohttp.ClientResponse") -> None:
    status = response.status
    if status != 200:
        kind = "http_429" if status == 429 else {4: "http_4xx", 5: "http_5xx"}.get(status // 100, "http_other")
        if status in (429, 503):
            raise RefusedError(kind, f"HTTP {status}", response.headers.get("Retry-After", ""))
        raise Drop(kind, f"HTTP {status}")


async def _read(response: "aiohttp.ClientResponse", max_bytes: int, take: Callable[[int], Awaitable[None]]) -> bytes:
    """Read a body and undo gzip or deflate, which some servers send unasked. Never holds more than `max_bytes`."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Drop("bad_response", printable(f"Content-Encoding {encoding}"))
    if (response.content_length or 0) > max_bytes:
        raise Drop("too_large", f"Content-Length {response.content_length}")
    pieces, size, inflate = list[bytes](), 0, None
    async for chunk in response.content.iter_any():
        if inflate is None and encoding not in ("", "identity"):  # some servers send deflate without its header
            bare = encoding == "deflate" and chunk[0] & 15 != zlib.DEFLATED
            inflate = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        for piece in _inflated(inflate, chunk) if inflate else (chunk,):
            await take(len(piece))
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise Drop("too_large", f"more than {max_bytes} bytes")
        if inflate and inflate.eof:
            break
    if inflate and not inflate.eof:
        raise Drop("bad_response", "the compressed body ends early")
    if not size:
        raise Drop("empty")
    return b"".join(pieces)


def _inflated(inflate: "zlib._Decompress", data: bytes) -> Iterator[bytes]:
    """What compressed bytes become, in pieces: it may be a thousand times as much, and nobody has leave to hold it."""
    piece = b""
    while not inflate.eof and (data or len(piece) == _PIECE_BYTES):  # of which more may be on its way
        piece = inflate.decompress(data, _PIECE_BYTES)
        data = inflate.unconsumed_tail
        yield piece


def reason_for(error: Exception) -> str | None:
    """Name the download reason of an exception of aiohttp, asyncio, ssl, socket or zlib; None for any other."""
    import aiohttp

    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS):
        return None  # this machine's fault, not the host's
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns_timeout" if error.os_error.errno == socket.EAI_AGAIN else "dns_not_found"
    if BLOCKED in str(error) and isinstance(error, aiohttp.ClientConnectorError):
        return "blocked_address"
    if isinstance(error, ssl.SSLError) or isinstance(error.__cause__, ssl.SSLError):
        return "tls_error"
    if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
        return "connect_timeout"
    kinds: tuple[tuple[type[Exception], str], ...] = (  # the first that fits; some are kinds of others below them
        (aiohttp.ConnectionTimeoutError, "connect_timeout"),
        (aiohttp.ServerTimeoutError, "read_timeout"),
        (TimeoutError, "too_slow"),
        (aiohttp.ClientSSLError, "tls_error"),
        (aiohttp.InvalidURL, "bad_url"),
        (UnicodeError, "bad_url"),  # a host name that cannot be written for the resolver
        (OSError, "connect_refused"),
        (aiohttp.ClientError, "bad_response"),
        (zlib.error, "bad_response"),
    )
    return next((reason for kind, reason in kinds if isinstance(error, kind)), None)


def printable(text: str) -> str:
    """Cut text of a stranger to a length, and to what UTF-8 (and so Parquet) can hold."""
    return text[:_DETAIL_CHARS].encode(errors="replace").decode()
