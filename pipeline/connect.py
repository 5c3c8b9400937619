"""Connections to strangers' hosts: which addresses may be connected to, how names are looked up, one session for all.

An address is judged where its socket is made, so no spelling of a host, no answer of a resolver and no redirect gets
around it.
"""

import asyncio
import errno
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # aiohttp takes a sixth of a second to import: only a worker that fetches pays for it
    import aiohttp

Network = IPv4Network | IPv6Network

BLOCKED = "blocked address"  # starts the message of the error that the socket factory raises
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
_SOCKET_BYTES, _BUFFER_BYTES = 1 << 16, 1 << 14  # of what came and was not read yet, of each of a thousand
_IDLE_S = 2.0  # that a connection waits for the next request of its host
IDLE_MOST_S = 3 * _IDLE_S  # until it is closed for sure: it is looked for that seldom
_LOOK_UPS = 256  # at a time: each has a thread, and the resolver must keep up

opened_for: ContextVar[list[int]] = ContextVar("opened_for")  # a request's own list: the sockets made for it


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


def open_session(
    allowed: Sequence[Network], user_agent: str, connect_timeout_s: float, read_timeout_s: float
) -> "aiohttp.ClientSession":
    """Open a session on the running loop that connects to public addresses and those `allowed`, and to no others.

    Connecting to another raises aiohttp.ClientConnectorError with BLOCKED in its text. No cookies, no proxies, no
    decompression and no second try. A connection stays open for another request to its host (a requester that wants it
    closed says so in its headers); its address was judged, so those that it serves later need no look-up.
    """
    from asyncio import selector_events, sslproto

    import aiohttp
    from aiohttp.abc import AbstractResolver, ResolveResult

    places = asyncio.Semaphore(_LOOK_UPS)
    # Else 256 KiB for each connection, of what is read at once.
    sslproto.SSLProtocol.max_size = selector_events._SelectorSocketTransport.max_size = _SOCKET_BYTES  # type: ignore[attr-defined]

    def open_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if is_blocked(address[0], allowed):
            raise PermissionError(errno.EACCES, f"{BLOCKED} {address[0]}")
        opened = socket.socket(family, kind, protocol)
        if (made := opened_for.get(None)) is not None:
            made.append(opened.fileno())
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BYTES)  # else it grows to megabytes
        return opened

    class Resolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[ResolveResult]:
            try:
                async with places:
                    found = await asyncio.wait_for(_look_up(host, port, family), connect_timeout_s)
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
            limit=0,  # who may connect when is decided before
            resolver=Resolver(),
            socket_factory=open_socket,
            ttl_dns_cache=300,  # the address is checked at every connection, so a changed answer gains nothing
            keepalive_timeout=_IDLE_S,
        ),
        timeout=aiohttp.ClientTimeout(sock_connect=connect_timeout_s, sock_read=read_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": user_agent, "Accept": "image/*,*/*;q=0.8", "Accept-Encoding": "identity"},
        read_bufsize=_BUFFER_BYTES,
        auto_decompress=False,  # who reads the body does it, with a limit
        trust_env=False,
    )
    session._retry_connection = False  # aiohttp would ask a second time where a server hangs up
    return session


def close_idle(session: "aiohttp.ClientSession", host: str) -> None:
    """Close the connections to a host that no request uses. For the session's own loop."""
    pool = session.connector._conns  # type: ignore[union-attr]  # aiohttp has no public way
    for key in [key for key in pool if key.host == host]:
        for protocol, _ in pool.pop(key):
            protocol.close()


async def _look_up(host: str, port: int, family: int) -> list[Any]:
    """Call getaddrinfo in a daemon thread of its own: one that hangs holds up neither others nor the end."""
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
        with suppress(RuntimeError):  # the work may be over by now, and the loop closed
            loop.call_soon_threadsafe(settle, found, failure)

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    return await answer
