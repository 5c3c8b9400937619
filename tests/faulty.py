"""A real HTTP proxy in front of a bucket's server that makes faults on purpose: what a store does on a bad day."""

import http.client
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

# 503: the server has no time. drop: closed before the request is passed on. lose: passed on, and its answer lost.
# cut: half of the answer's body. half: half of the request's body reaches the server. slow: half a second.
Fault = Literal["503", "409", "drop", "lose", "cut", "half", "slow"]
Choose = Callable[[str, str, int], Fault | None]  # of a method, a path, and how often this was asked before


class _Handler(BaseHTTPRequestHandler):
    proxy: "FaultyProxy"  # set in a subclass of each proxy
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.next(self.command, self.path)
        if fault == "slow":
            time.sleep(0.5)
        if fault in ("503", "409"):
            code = "ServiceUnavailable" if fault == "503" else "ConditionalRequestConflict"
            self._answer(int(fault), [], f"<Error><Code>{code}</Code><Message>later</Message></Error>".encode())
        elif fault == "drop":
            self._hang_up()
        elif fault == "half":
            self._half(body)
        else:
            self._pass(body, fault)

    def _pass(self, body: bytes, fault: Fault | None) -> None:
        connection = http.client.HTTPConnection(self.proxy.target, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if fault == "lose":
            self._hang_up()
        else:
            self._answer(answer.status, answer.getheaders(), data, cut=fault == "cut" and len(data) > 1)

    def _half(self, body: bytes) -> None:
        host, _, port = self.proxy.target.partition(":")
        with socket.create_connection((host, int(port)), timeout=5) as upstream, suppress(OSError):
            head = [f"{self.command} {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in self.headers.items())]
            upstream.sendall("\r\n".join([*head, "", ""]).encode() + body[: len(body) // 2])
            upstream.shutdown(socket.SHUT_WR)
            upstream.settimeout(2)
            upstream.recv(1 << 16)
        self._hang_up()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        length = next((v for k, v in headers if k.lower() == "content-length"), str(len(data)))
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815  (the names that the server calls)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


class FaultyProxy:
    """`url` is the endpoint to use; `choose` says what goes wrong, `made` counts what did."""

    def __init__(self, endpoint: str, choose: Choose = lambda method, path, before: None) -> None:
        self.choose, self.made = choose, Counter[str]()
        self.asked: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.target = urlsplit(endpoint).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up too
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next(self, method: str, path: str) -> Fault | None:
        """What goes wrong with this request."""
        with self._lock:
            fault = self.choose(method, path, self.asked[method, path])
            self.asked[method, path] += 1
            self.made[fault or ""] += 1
        return fault

    def __enter__(self) -> "FaultyProxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
