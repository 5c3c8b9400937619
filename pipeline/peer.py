"""`backend: img2dataset`: its own function fetches each URL; keys, reasons, the check of hashes and the image are ours.

For comparisons, and for who trusts its way with servers more than ours. What it does not do is not done: it has no
limit per host, on bytes while they come, or on the whole of a fetch, obeys no robots.txt and no TDM reservation, and
follows redirects to wherever they lead. Ours are a look at the URL and at the addresses of its host before it is asked
(not at those that it then connects to, which a hostile resolver may change), X-Robots-Tag by its options, and the limit
on bytes once they are there. It answers with a text where it fails: reasons are made of that, for img2dataset 1.47.
"""

import os
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from ipaddress import ip_network
from typing import Generic, TypeVar
from urllib.parse import urlsplit

from ..models.contract import ModelError
from ..transforms.outcomes import Drop
from .connect import is_blocked
from .fetch import FetchRule, Made, cores
from .request import Fetched, parse, printable
from .respect import RespectRule, check_domain

T = TypeVar("T")

_THREADS = 256  # img2dataset's own default; a thread waits for one server
_KNOWN = (  # the first that is found in what it says
    (r"disallowed by X-Robots-Tag", "opted_out"),
    (r"HTTP Error 30\d: .*infinite loop", "redirect_loop"),
    (r"HTTP Error 429\b", "http_429"),
    (r"HTTP Error 4\d\d\b", "http_4xx"),
    (r"HTTP Error 5\d\d\b", "http_5xx"),
    (r"HTTP Error \d+", "http_other"),
    (r"SSL:|certificate|_ssl\.c", "tls_error"),
    (r"\[Errno -3\]", "dns_timeout"),
    (r"\[Errno -\d+\]", "dns_not_found"),
    (r"urlopen error .*timed out|\[Errno 110\]", "connect_timeout"),
    (r"timed out", "read_timeout"),
    (r"\[Errno \d+\]", "connect_refused"),
    (r"unknown url type|redirection to url", "bad_scheme"),
    (r"no host given|control characters|nonnumeric port|codec can't encode|label (?:too long|empty)", "bad_url"),
)


class Peer(Generic[T]):
    """Fetches as `Fetcher` does, from threads; what was fetched is used in as many at a time as there are cores.

    Raises ModelError where img2dataset is not installed.
    """

    def __init__(self, rule: FetchRule, respect: RespectRule) -> None:
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # a library of its would call home
        try:
            from img2dataset.downloader import download_image_with_retry
        except ImportError as error:
            raise ModelError(
                f"steps.download.backend: img2dataset cannot be imported ({error}); pip install 'vesl[img2dataset]'"
            ) from None
        self._fetch = download_image_with_retry
        self._rule, self._respect = rule, respect
        self._token = re.split(r"[/\s]", rule.user_agent, maxsplit=1)[0].lower()
        self._networks = tuple(ip_network(network) for network in rule.allow_networks)
        self._threads = ThreadPoolExecutor(min(rule.concurrency, _THREADS), "img2dataset")
        self._cores = threading.Semaphore(min(8, cores()))

    def submit(self, url: str, use: Callable[[Fetched], T]) -> Future[Made[T]]:
        """Begin to fetch; returns at once. `use` turns what was fetched into the result."""
        return self._threads.submit(self._row, url, use)

    def close(self) -> None:
        """Give up what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _row(self, url: str, use: Callable[[Fetched], T]) -> Made[T]:
        made: T | Exception
        try:
            made = self._used(url, use)
        except Exception as error:  # noqa: BLE001  (it is this URL's result; the guard of the step looks at it)
            error.__traceback__ = error.__context__ = error.__cause__ = None  # its frames would keep the body in memory
            made = error
        return Made(made, lambda: None)

    def _used(self, url: str, use: Callable[[Fetched], T]) -> T:
        target = parse(url)
        self._look(target)
        tags = set(self._respect.robots_tags)
        _, stream, said = self._fetch((0, target), self._rule.read_timeout_s, self._rule.retries, self._token, tags)
        at = datetime.now(UTC)
        if stream is None:
            raise reason_of_text(said or "")
        body = stream.getvalue()
        if not body:
            raise Drop("empty")
        if len(body) > self._rule.max_bytes:
            raise Drop("too_large", f"{len(body)} bytes")
        with self._cores:
            return use(Fetched(body, at=at))

    def _look(self, url: str) -> None:
        parts = urlsplit(url)
        host = parts.hostname or ""
        check_domain(host, self._respect)
        try:
            found = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            raise Drop("dns_timeout" if error.errno == socket.EAI_AGAIN else "dns_not_found", str(error)) from None
        except (UnicodeError, ValueError) as error:
            raise Drop("bad_url", str(error)) from None
        for *_, address in found:
            if is_blocked(str(address[0]), self._networks):
                raise Drop("blocked_address", str(address[0]))


def reason_of_text(said: str) -> Drop:
    """What img2dataset says of a URL that it could not fetch, as a reason of ours; `bad_response` where it is new."""
    reason = next((reason for pattern, reason in _KNOWN if re.search(pattern, said, re.DOTALL)), "bad_response")
    return Drop(reason, printable(said))
