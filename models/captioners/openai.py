"""Captions from an OpenAI-compatible server: vLLM serve, SGLang, TGI, a hosted one.

Requests run on one event loop in a thread of its own. `prepare` sends them and `call` waits for them, so the server
stays busy with the batches that are prepared ahead; `endpoint.in_flight` is the limit over all of them.
"""

import asyncio
import base64
import difflib
import io
import json
import os
import random
import re
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from ...transforms.images import decode, within
from ...transforms.outcomes import Drop
from .. import hub
from ..contract import ModelError, Written
from ..options import ALT_CHARS, Captioning, Endpoint

if TYPE_CHECKING:  # aiohttp takes a sixth of a second to import
    import aiohttp

T = TypeVar("T")

_MAX_BYTES = 8 << 20  # of an answer; a caption has some hundred
_FIRST_WAIT_S = 1.0  # before the second try; doubled each time
_MAX_WAIT_S = 60.0  # also of what a Retry-After asks for
_AGAIN = (408, 409, 425, 429)  # and 5xx
_NONSENSE_TRIES = 3  # of an answer that makes no sense: some models make none of some image, however often it is asked
_IN_VAIN = 8  # requests in a row (or in_flight, if that is more) without any use: then it is the server, no image
_FILTERED = re.compile(r"content.?(?:filter|policy|management)|moderation|safety", re.IGNORECASE)
# What strangers must not write into a prompt: the end of a turn, an image's place. A server takes text for tokens.
_CONTROL = re.compile(
    r"<\|[^<>|]{1,40}\|>|</?(?:s|image|img|video|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]"
)

Answers = list[list["Future[Written | Drop]"]]  # images by prompts


def open_captioner(options: Captioning) -> "OpenAI":
    """Reach the server. Raises ModelError where it is down, takes no such key, or serves other models only."""
    client = _Client(options.endpoint)
    try:
        client.run(client.check(hub.split(options.model)[0])).result()
    except BaseException:
        client.close()
        raise
    return OpenAI(options, client)


class OpenAI:
    """Captions by a server. `prepare` sends and returns at once; calling waits for the answers, in order."""

    def __init__(self, options: Captioning, client: "_Client") -> None:
        self._options, self._client = options, client
        weakref.finalize(self, client.close)

    def prepare(self, jpegs: Sequence[bytes], alt_texts: Sequence[str]) -> Answers:
        """Send one request for each image and prompt."""
        options, asked = self._options, []
        for jpeg, alt_text in zip(jpegs, alt_texts, strict=True):
            image = data_url(jpeg, options.max_pixels)
            bodies = [body(options, image, asking) for asking in prompts(options, alt_text)]
            asked.append([self._client.run(self._client.ask(json.dumps(body).encode())) for body in bodies])
        return asked

    def __call__(self, prepared: Answers) -> list[list[Written | Drop]]:
        """Wait. Raises ModelError where the server has come to refuse the key or no longer knows the model."""
        return [[answer.result() for answer in answers] for answers in prepared]


# -- What is asked, and what an answer says


def prompts(options: Captioning, alt_text: str) -> list[str]:
    """The prompts as they are sent: with the web caption filled in, less what would pass for control tokens."""
    said = _CONTROL.sub(" ", alt_text[:ALT_CHARS])
    return [prompt.format(alt_text=said) for prompt in options.prompts]


def body(options: Captioning, image: str, prompt: str) -> dict[str, Any]:
    """The request for one caption of an image, given as a data URL."""
    shown = {"type": "image_url", "image_url": {"url": image, "detail": options.endpoint.detail}}
    return {
        "model": hub.split(options.model)[0],
        "messages": [{"role": "user", "content": [shown, {"type": "text", "text": prompt}] if prompt else [shown]}],
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
    }


def data_url(jpeg: bytes, max_pixels: int | None) -> str:
    """The stored bytes; where the image has more pixels than the limit, a smaller JPEG of it."""
    if max_pixels is not None:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as header:
            size = header.size
        if size[0] * size[1] > max_pixels:
            buffer = io.BytesIO()
            within(decode(jpeg), max_pixels).save(buffer, "JPEG", quality=95)
            jpeg = buffer.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


class NonsenseError(Exception):
    """An answer that does not follow the protocol."""


def read(answer: bytes) -> Written | Drop:
    """What a 200 says: a caption, or why there is none. Raises NonsenseError where it is no chat completion."""
    try:
        choice = _json(answer)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
        if isinstance(content, list):  # in parts, as some servers have it
            content = "".join(part["text"] for part in content if part.get("type") == "text")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NonsenseError(f"no chat completion: {_start(answer)}") from None
    if finish == "content_filter":
        return Drop("content_filter", "finish_reason: content_filter")
    if isinstance(refusal, str) and refusal:
        return Drop("refusal", refusal)
    if content is None and finish == "length":
        return Drop("empty_caption", "the token limit was reached before any text")
    if not isinstance(content, str):
        raise NonsenseError(f"a completion without text: {_start(answer)}")
    return Written(content, complete=finish != "length")


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise NonsenseError(f"no JSON: {_start(data)}") from None


def _start(data: bytes) -> str:
    return " ".join(data[:300].decode(errors="replace").split())


def _complaint(data: bytes) -> str:
    """The code and the message of an answer that is no 200, as far as there are any."""
    try:
        error = _json(data)
        error = error.get("error", error)
        if isinstance(error, str):
            return error
        return " ".join(str(error[key]) for key in ("code", "type", "message") if error.get(key)) or _start(data)
    except (NonsenseError, AttributeError, TypeError):
        return _start(data)


# -- The line to the server


class _Client:
    """A session with one server on an event loop of its own, in a thread of its own."""

    def __init__(self, endpoint: Endpoint) -> None:
        from yarl import URL

        self._endpoint = endpoint
        url = URL(endpoint.url)
        self._url, self._where = url, str(url.with_query(None).with_fragment(None))
        self._key = os.environ.get(endpoint.key_from, "").strip()
        if not (self._key.isascii() and self._key.replace(" ", "").isprintable()):
            raise ModelError(f"endpoint.key_from: what {endpoint.key_from} holds is no key: not printable ASCII")
        self._slots, self._not_before, self._worked = asyncio.Semaphore(endpoint.in_flight), 0.0, False
        self._in_vain = 0  # requests given up since the last answer that was of use
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()
        self._session = self.run(self._open()).result()

    async def _open(self) -> "aiohttp.ClientSession":
        import aiohttp

        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}  # nothing to blow up
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the slots are the limit
            timeout=aiohttp.ClientTimeout(total=self._endpoint.timeout_s),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    def run(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Start it on the loop, from any thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Give up what is still asked for. The loop's thread ends by itself."""

        async def finish() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await self._session.close()
            self._loop.call_soon(self._loop.stop)

        if self._loop.is_running():
            self.run(finish()).result(5)

    def hidden(self, text: str) -> str:
        """A text without the key, should a server or a library have put it there."""
        return text.replace(self._key, "***") if len(self._key) >= 8 else text  # shorter ones are words, like EMPTY

    async def check(self, name: str) -> None:
        """Raise ModelError unless the server is there, takes the key and, as far as it tells, has the model."""
        import aiohttp

        for wait_s in (_FIRST_WAIT_S, 2 * _FIRST_WAIT_S, None):
            try:
                status, headers, data = await self._once("GET", "models")
                break
            except (aiohttp.ClientError, OSError, NonsenseError) as error:
                if wait_s is None:
                    raise ModelError(self._line(f"no server answers: {type(error).__name__}: {error}")) from None
                await asyncio.sleep(wait_s)
        if status in (401, 403):
            how = "takes no such key as in" if self._key else "wants a key; set"
            raise ModelError(self._line(f"the server {how} {self._endpoint.key_from} ({status}: {_complaint(data)})"))
        if 300 <= status < 400:
            raise ModelError(
                self._line(f"the server sends us on to {headers.get('Location')!r}; name the right address")
            )
        try:
            names = [model["id"] for model in _json(data)["data"]] if status == 200 else []
        except (NonsenseError, KeyError, TypeError):
            names = []  # a server without this list; the first request will tell
        if names and not any(f"/{known}".endswith(f"/{name}") or "*" in known for known in map(str, names)):
            near = difflib.get_close_matches(name, map(str, names), n=3, cutoff=0) or names
            raise ModelError(self._line(f"the server has no model {name!r}; it has {', '.join(near)}"))

    async def ask(self, request: bytes) -> Written | Drop:
        """Ask for one caption until there is an answer or no try is left.

        Raises ModelError for what is no image's fault: the key or the model is not known (any more), no credit is left.
        """
        async with self._slots:
            found = await self._ask(request)
        if isinstance(found, Drop):
            return Drop(found.reason, self.hidden(found.detail))
        return Written(self.hidden(found.text), found.complete)

    async def _ask(self, request: bytes) -> Written | Drop:
        import aiohttp

        trouble, tries, nonsense, waits = "", 0.0, 0, 0
        while tries <= self._endpoint.retries and nonsense < _NONSENSE_TRIES:
            after = None
            await self._pause()
            try:
                status, headers, data = await self._once("POST", "chat/completions", request)
                if status == 200:
                    found = read(data)
                    self._worked, self._in_vain = True, 0
                    return found
                trouble = f"{status}: {_complaint(data)}"
                if drop := self._verdict(status, trouble):
                    return self._given_up(drop)
                after = _seconds(headers.get("Retry-After")) if status in (429, 503) else None
                tries += 0.5 if status == 429 else 1  # a rate limit is no fault, but not to be asked for ever either
            except NonsenseError as error:
                trouble, nonsense, tries = str(error), nonsense + 1, tries + 1
            except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError) as error:
                limit = f"no answer within {self._endpoint.timeout_s:g} s" if isinstance(error, TimeoutError) else ""
                trouble, tries = limit or f"{type(error).__name__}: {error}", tries + 1
            waits += 1
            wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** min(waits - 1, 10))
            if after is not None:  # all of us wait, not only the one that was told
                wait_s = min(_MAX_WAIT_S, max(after, wait_s))
                self._not_before = max(self._not_before, self._loop.time() + min(after, _MAX_WAIT_S))
            if tries <= self._endpoint.retries and nonsense < _NONSENSE_TRIES:
                await asyncio.sleep(wait_s * random.uniform(1, 1.5) if after else wait_s * random.uniform(0.5, 1))  # noqa: S311
        return self._given_up(Drop("endpoint_error", f"{trouble} (asked {waits} times)"))

    def _given_up(self, drop: Drop) -> Drop:
        """The same. Raises ModelError where so many in a row end like this that no image can be to blame."""
        self._in_vain = 0 if drop.reason == "content_filter" else self._in_vain + 1
        if self._in_vain >= max(_IN_VAIN, self._endpoint.in_flight):
            raise ModelError(self._line(f"no usable answer to the last {self._in_vain} requests: {drop.detail}"))
        return drop

    def _verdict(self, status: int, trouble: str) -> Drop | None:
        """What a status other than 200 means for good; None where another try may help."""
        if status == 401 or "insufficient_quota" in trouble or (status == 404 and not self._worked):
            raise ModelError(self._line(f"the server answers {trouble}"))
        if status in _AGAIN or status >= 500 or status == 404:  # a 404 of a server that worked: it is being replaced
            return None
        return Drop("content_filter" if _FILTERED.search(trouble) else "endpoint_refused", trouble)

    async def _pause(self) -> None:
        left = self._not_before - self._loop.time()
        if left > 0:
            await asyncio.sleep(left + random.uniform(0, min(left, 1)))  # noqa: S311

    async def _once(self, method: str, path: str, data: bytes | None = None) -> tuple[int, Any, bytes]:
        """Status, headers and body of one try. Redirects are not followed: the key is for this server alone."""
        url = self._url.joinpath(*path.split("/")).with_query(self._url.query)
        async with self._session.request(method, url, data=data, allow_redirects=False) as response:
            found = b""
            async for chunk in response.content.iter_chunked(1 << 16):
                found += chunk
                if len(found) > _MAX_BYTES:
                    response.close()
                    raise NonsenseError(f"an answer of more than {_MAX_BYTES >> 20} MiB")
        # Here, before anything is cut out of it: a piece of the key would not be found.
        return response.status, response.headers, self.hidden(found.decode("latin-1")).encode("latin-1")

    def _line(self, text: str) -> str:
        return " ".join(f"endpoint {self._where}: {self.hidden(text)}"[:600].split())


def _seconds(header: str | None) -> float | None:
    """What a Retry-After asks for, in seconds from now or as a date; None where it is neither."""
    if header is None:
        return None
    if re.fullmatch(r"\d{1,9}(?:\.\d+)?", header.strip()):
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
