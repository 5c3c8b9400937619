"""Fetch what strangers' URLs name, without trusting the URL, the resolver or the server. The download step calls it.

Every way to fail is a reason of the download step. Which addresses may be connected to is decided where the socket is
made, so no spelling of a host, no answer of a resolver and no redirect gets around it.
"""

import asyncio
import errno
import os
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any, TypeVar

from ..transforms.options import operational
from ..transforms.outcomes import Drop

if TYPE_CHECKING:  # aiohttp takes a sixth of a second to import: only a worker that fetches pays for it
    import aiohttp

T = TypeVar("T")
Network = IPv4Network | IPv6Network

_BLOCKED = "blocked address"  # starts the message of the error that the socket factory raises
_DETAIL_CHARS = 300
_GLOBAL_UNICAST = ip_network("2000::/3")  # all that is allocated of IPv6
_NAT64 = ip_network("64:ff9b::/96")  # the last 32 bits are the IPv4 address that a gateway connects to
_REFUSED: tuple[Network, ...] = (
    ip_network("192.0.0.0/24"),  # protocol assignments, among them Oracle's metadata server; global to some Pythons
    ip_network("192.88.99.0/24"),  # relays of 6to4
    ip_network("168.63.129.16/32"),  # Azure's metadata server, of all places on a public address
    ip_network("2001::/32"),  # Teredo and 6to4 carry IPv4 addresses of anybody's choice, and serve no web today
    ip_network("2002::/16"),
    ip_network("3fff::/20"),  # documentation; global to some Pythons
)


@dataclass(frozen=True)
class FetchRule:
    """Limits of a fetch. `allow_networks` (CIDR) are reachable though not public, for tests and mirrors inside.

    Raises ValueError for what is no network, and for limits that are not positive.
    """

    max_bytes: int = 20_000_000  # of the body, after decompression
    connect_timeout_s: float = operational(
        10.0
    )  # for the name's lookup, and again for the connection with its TLS handshake
    read_timeout_s: float = operational(10.0)  # between two reads
    total_timeout_s: float = operational(30.0)  # over all redirects
    max_redirects: int = 5
    user_agent: str = operational(f"vesl/{version('vesl')} (image data set builder)")
    allow_networks: tuple[str, ...] = ()
    concurrency: int = operational(64)

    def __post_init__(self) -> None:
        for network in self.allow_networks:
            try:
                ip_network(network)
            except ValueError:
                raise ValueError(f"allow_networks: {network!r} is not a network like 10.0.0.0/8") from None
        for name in ("max_bytes", "connect_timeout_s", "read_timeout_s", "total_timeout_s", "concurrency"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not positive")


@dataclass(frozen=True)
class Fetched:
    """A body of at least one byte. `final_url` is after redirects; `content_type` is what the server claims."""

    body: bytes
    final_url: str
    content_type: str


def fetch_all(urls: Sequence[str], rule: FetchRule, use: Callable[[Fetched], T]) -> list[T | Exception]:
    """Fetch each URL once and hand it to `use` in a thread; return, in order, what `use` returned or the exception.

    A Drop names a reason of the download step; other exceptions are those of `use`, or of no known kind. At most
    `rule.concurrency` bodies are in memory at a time: a fetch keeps its place until `use` is through with it.
    """
    return asyncio.run(_fetch_all(urls, rule, use))


def is_blocked(address: str, allowed: Sequence[Network] = ()) -> bool:
    """Tell whether an IP address is private, local, reserved or otherwise not a public host's, and not allowed."""
    ip = ip_address(address.partition("%")[0])
    if ip.version == 6 and ip.ipv4_mapped:
        ip = ip.ipv4_mapped  # the kernel will use IPv4
    if any(ip in network for network in allowed):
        return False
    if ip in _NAT64:
        ip = IPv4Address(int(ip) & 0xFFFFFFFF)
    if ip.version == 6 and ip not in _GLOBAL_UNICAST:
        return True
    return not ip.is_global or ip.is_multicast or any(ip in network for network in _REFUSED)


async def _fetch_all(urls: Sequence[str], rule: FetchRule, use: Callable[[Fetched], T]) -> list[T | Exception]:
    results: dict[int, T | Exception] = {}
    todo = iter(enumerate(urls))
    loop = asyncio.get_running_loop()

    def used(fetched: Fetched) -> T | Exception:
        try:
            return use(fetched)
        except Exception as error:  # noqa: BLE001  (it is this URL's result; the guard of the step looks at it)
            return error

    async def work() -> None:
        for position, url in todo:
            try:
                result = await loop.run_in_executor(pool, used, await _fetch(session, url, rule))
            except Exception as error:  # noqa: BLE001  (likewise)
                result = error
            if isinstance(result, Exception):  # its frames would keep the body in memory
                result.__traceback__ = result.__context__ = result.__cause__ = None
            results[position] = result

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "use") as pool:
        async with _open_session(rule) as session:
            await asyncio.gather(*(work() for _ in range(min(rule.concurrency, len(urls)))))
    return [results[position] for position in range(len(urls))]


def _open_session(rule: FetchRule) -> "aiohttp.ClientSession":
    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

    allowed = tuple(ip_network(network) for network in rule.allow_networks)

    def open_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if is_blocked(address[0], allowed):
            raise PermissionError(errno.EACCES, f"{_BLOCKED} {address[0]}")
        return socket.socket(family, kind, protocol)

    class Resolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            try:
                found = await asyncio.wait_for(_look_up(host, port, family), rule.connect_timeout_s)
            except TimeoutError:
                raise socket.gaierror(socket.EAI_AGAIN, f"no answer for {host} within the limit") from None
            flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            return [
                ResolveResult(hostname=host, host=str(address[0]), port=port, family=kin, proto=protocol, flags=flags)
                for kin, _, protocol, _, address in found
            ]

        async def close(self) -> None:
            pass

    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=rule.concurrency,
            resolver=Resolver(),
            socket_factory=open_socket,
            ttl_dns_cache=300,  # the address is checked at every connection, so a changed answer gains nothing
            force_close=True,  # URLs come in the order of a hash: hosts seldom repeat, and idle sockets would pile up
        ),
        timeout=aiohttp.ClientTimeout(sock_connect=rule.connect_timeout_s, sock_read=rule.read_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": rule.user_agent, "Accept": "image/*,*/*;q=0.8", "Accept-Encoding": "identity"},
        auto_decompress=False,  # `_read` does it, with a limit
        trust_env=False,
    )
    session._retry_connection = False  # aiohttp would ask a second time where a server hangs up
    return session


async def _look_up(host: str, port: int, family: int) -> list[Any]:
    """Call getaddrinfo in a daemon thread of its own: one that hangs holds up neither others nor the batch's end."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[list[Any]] = loop.create_future()

    def settle(found: list[Any], error: Exception | None) -> None:
        if answer.done():
            return
        if error:
            answer.set_exception(error)
        else:
            answer.set_result(found)

    def ask() -> None:
        found, failure = [], None
        try:
            found = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
        except (OSError, UnicodeError) as error:
            failure = error
        with suppress(RuntimeError):  # the batch may be over by now, and its loop closed
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    return await answer


async def _fetch(session: "aiohttp.ClientSession", url: str, rule: FetchRule) -> Fetched:
    from yarl import URL

    try:
        async with asyncio.timeout(rule.total_timeout_s):
            target = _parse(url)
            for _ in range(rule.max_redirects + 1):
                response = await session.get(URL(target, encoded=True), allow_redirects=False)
                try:
                    location = response.headers.get("Location")
                    if response.status in (301, 302, 303, 307, 308) and location:
                        target = _parse(location, target)
                        continue
                    _check_status(response.status)
                    body = await _read(response, rule.max_bytes)
                    return Fetched(body, target, _printable(response.headers.get("Content-Type", "")))
                finally:
                    response.close()
            raise Drop("redirect_loop", f"more than {rule.max_redirects} redirects")
    except Drop:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise Drop(reason, _printable(f"{type(error).__name__}: {error}")) from error


def _parse(url: str, base: str | None = None) -> str:
    """Read a URL as browsers do (WHATWG; nothing already escaped is escaped again); keep it to http and https."""
    import ada_url

    try:
        parsed = ada_url.URL(url, base=base)
    except ValueError as error:
        raise Drop("bad_url", _printable(url)) from error
    if parsed.protocol not in ("http:", "https:"):
        raise Drop("bad_scheme", _printable(parsed.href))
    return str(parsed.href)


def _check_status(status: int) -> None:
    if status != 200:
        kind = "http_429" if status == 429 else {4: "http_4xx", 5: "http_5xx"}.get(status // 100, "http_other")
        raise Drop(kind, f"HTTP {status}")


async def _read(response: "aiohttp.ClientResponse", max_bytes: int) -> bytes:
    """Read a body and undo gzip or deflate, which some servers send unasked. Never holds more than `max_bytes`."""
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise Drop("bad_response", _printable(f"Content-Encoding {encoding}"))
    if (response.content_length or 0) > max_bytes:
        raise Drop("too_large", f"Content-Length {response.content_length}")
    body, inflate = bytearray(), None
    async for chunk in response.content.iter_any():
        if encoding in ("", "identity"):
            body += chunk
        else:
            if inflate is None:  # some servers send deflate without its header
                bare = encoding == "deflate" and chunk[0] & 15 != zlib.DEFLATED
                inflate = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
            body += inflate.decompress(chunk, max_bytes + 1 - len(body))
        if len(body) > max_bytes:
            raise Drop("too_large", f"more than {max_bytes} bytes")
        if inflate and inflate.eof:
            break
    if inflate and not inflate.eof:
        raise Drop("bad_response", "the compressed body ends early")
    if not body:
        raise Drop("empty")
    return bytes(body)


def _reason(error: Exception) -> str | None:
    """Name the download reason of an exception of aiohttp, asyncio, ssl, socket or zlib; None for any other."""
    import aiohttp

    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns_timeout" if error.os_error.errno == socket.EAI_AGAIN else "dns_not_found"
    if _BLOCKED in str(error) and isinstance(error, aiohttp.ClientConnectorError):
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


def _printable(text: str) -> str:
    """Cut text of a stranger to a length, and to what UTF-8 (and so Parquet) can hold."""
    return text[:_DETAIL_CHARS].encode(errors="replace").decode()
