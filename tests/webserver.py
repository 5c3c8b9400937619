"""A real web server on loopback that answers as the web does: well, badly, slowly, endlessly or not at all.

    with WebServer() as server:
        server.add("/ok.jpg", jpeg)
        server.add("/gone.jpg", status(404))
        ... server.url + "/ok.jpg" ... server.hits["/ok.jpg"] ...

A handler gets a `Peer` and writes raw bytes; the connection is closed after it. One thread per connection.
"""

import socket
import ssl
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Self

Handler = Callable[["Peer"], None]


class Peer:
    """The other end of one connection. Writing raises OSError once it has hung up."""

    def __init__(self, connection: socket.socket, stopping: threading.Event) -> None:
        self.connection = connection
        self.stopping = stopping
        self.request = b""  # request line and headers, as they came

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def head(self, code: int = 200, **headers: object) -> None:
        """Send a status line and headers; underscores in names stand for hyphens."""
        lines = [f"HTTP/1.1 {code} -", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        self.send("\r\n".join([*lines, "Connection: close", "", ""]).encode("utf-8", "surrogateescape"))

    def wait(self, seconds: float = 60) -> None:
        """Say nothing for a while, or until the server stops."""
        if self.stopping.wait(seconds):
            raise ConnectionAbortedError("the server stops")

    def reset(self) -> None:
        """End the connection with RST instead of FIN."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class WebServer:
    """Serves until the `with` block ends; counts connections, also at a time, and requests per path and query."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.host, self.tls = host, tls
        self.hits: Counter[str] = Counter()
        self.requests: list[bytes] = []
        self.connections = 0
        self.most = 0  # connections at the busiest moment
        self._paths: dict[str, Handler] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._connections = dict[int, socket.socket]()  # by thread

    def __enter__(self) -> Self:
        self._listener = socket.create_server((self.host, 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with suppress(OSError):  # wakes up the accept
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def add(self, path: str, answer: bytes | Handler, content_type: str = "image/jpeg") -> str:
        """Serve bytes (with status 200), or let a handler answer. Returns the URL."""
        self._paths[path] = body(answer, content_type) if isinstance(answer, bytes) else answer
        return self.url + path

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._connections[threading.get_ident()] = connection
        with self._lock:
            self.most = max(self.most, self.open)
        try:
            self._answer(connection)
        finally:
            del self._connections[threading.get_ident()]

    @property
    def open(self) -> int:
        """Connections at this moment, as the kernel knows: a busy thread learns later that the other end hung up."""
        return sum(map(_is_established, list(self._connections.values())))

    def _answer(self, connection: socket.socket) -> None:
        with suppress(OSError, ValueError):  # the other end hung up, which is its right
            if self.tls:
                connection = self.tls.wrap_socket(connection, server_side=True)
                self._connections[threading.get_ident()] = connection
            with connection:
                peer = Peer(connection, self._stopping)
                while b"\r\n\r\n" not in peer.request:
                    data = connection.recv(65536)
                    if not data:
                        return
                    peer.request += data
                    if not peer.request[:1].isalpha():  # TLS, to the wrong port
                        peer.send(b"HTTP/1.1 400 -\r\n\r\n")
                        return
                path = peer.request.split(b" ", 2)[1].decode("latin-1")
                with self._lock:
                    self.hits[path] += 1
                    self.requests.append(peer.request)
                self._paths.get(path, status(404))(peer)


def _is_established(connection: socket.socket) -> bool:
    with suppress(OSError):  # closed
        return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == b"\x01"
    return False


def body(data: bytes, content_type: str = "image/jpeg", code: int = 200, **headers: object) -> Handler:
    def answer(peer: Peer) -> None:
        peer.head(code, **{"Content_Type": content_type, "Content_Length": len(data), **headers})
        peer.send(data)

    return answer


def status(code: int) -> Handler:
    return body(b"no image here", "text/plain", code)


def redirect(location: str, code: int = 302) -> Handler:
    return lambda peer: peer.head(code, Location=location, Content_Length=0)


def raw(data: bytes) -> Handler:
    """Send these bytes in place of an HTTP answer."""
    return lambda peer: peer.send(data)


def slow(data: bytes, seconds_per_byte: float = 1.0) -> Handler:
    """Send a byte at a time."""

    def answer(peer: Peer) -> None:
        peer.head(Content_Length=len(data))
        for at in range(len(data)):
            peer.send(data[at : at + 1])
            peer.wait(seconds_per_byte)

    return answer


def late(data: bytes, seconds: float) -> Handler:
    """A good answer, after a while."""

    def answer(peer: Peer) -> None:
        peer.wait(seconds)
        body(data)(peer)

    return answer


def silent(peer: Peer) -> None:
    """Take the request and never answer."""
    peer.wait()


def silent_after_headers(length: int) -> Handler:
    """Promise so many bytes and send none."""

    def answer(peer: Peer) -> None:
        peer.head(Content_Length=length)
        peer.wait()

    return answer


def endless(peer: Peer) -> None:
    """Chunks without an end."""
    peer.head(Transfer_Encoding="chunked", Content_Type="image/jpeg")
    while True:
        peer.send(b"10000\r\n" + bytes(0x10000) + b"\r\n")


def endless_headers(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        peer.send(b"X-More: of the same\r\n" * 1000)


def reset_in_body(peer: Peer) -> None:
    peer.head(Content_Length=1000)
    peer.send(b"some bytes")
    peer.wait(0.1)  # else the reset overtakes them
    peer.reset()


def reset(peer: Peer) -> None:
    peer.reset()


def hang_up(peer: Peer) -> None:
    """Close without a word."""


def gzip_bomb(size: int) -> Handler:
    """A gzip body that is a thousandth of the `size` in bytes of the zeros in it."""
    packer = zlib.compressobj(9, wbits=31)
    data = b"".join(packer.compress(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20)) + packer.flush()
    return body(data, Content_Encoding="gzip")
