"""Captions from a real HTTP server on loopback that answers well, late, badly, or not at all."""

import asyncio
import base64
import gc
import io
import json
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web
from PIL import Image

from tests.world import jpeg
from vesl import models
from vesl.models.captioners import openai, vllm
from vesl.models.contract import ModelError, Written
from vesl.models.options import Captioning, Endpoint
from vesl.pipeline.steps.caption import Caption
from vesl.transforms.images import decode, within
from vesl.transforms.outcomes import Drop

KEY = "sk-test-0123456789abcdef"
Answer = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def said(text: Any, finish: str = "stop", **message: Any) -> web.Response:
    return web.json_response({"choices": [{"message": {"content": text, **message}, "finish_reason": finish}]})


def prompt_of(body: dict[str, Any]) -> str:
    return "".join(part["text"] for part in body["messages"][0]["content"] if part["type"] == "text")


class Server:
    """An endpoint whose answers a test sets; it counts what is in flight and keeps what it was sent."""

    def __init__(self) -> None:
        self.answer: Answer = self.echo
        self.models: Callable[[web.Request], web.Response] = lambda request: web.json_response(
            {"data": [{"id": "org/model"}, {"id": "other"}]}
        )
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.in_flight = self.most = 0
        self.gate = threading.Event()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def echo(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        return said(f"About {prompt_of(body)}.")

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def chat(request: web.Request) -> web.StreamResponse:
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            try:
                body = await request.json()
                self.bodies.append(body)
                self.times.append(time.monotonic())
                self.keys.append(request.headers.get("Authorization"))
                return await self.answer(request, body)
            finally:
                self.in_flight -= 1

        async def listed(request: web.Request) -> web.Response:
            self.keys.append(request.headers.get("Authorization"))
            return self.models(request)

        async def start() -> None:
            app = web.Application(client_max_size=64 << 20)
            app.router.add_post("/v1/chat/completions", chat)
            app.router.add_get("/v1/models", listed)
            app.router.add_route("*", "/elsewhere", chat)
            self._runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
            started.set()

        self._loop.run_until_complete(start())
        self._loop.run_forever()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(openai, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    found = Server()
    yield found
    found.gate.set()
    found.close()


def options(server: Server, *prompts: str, endpoint: dict[str, Any] | None = None, **more: Any) -> Captioning:
    there = Endpoint(**{"url": server.url, "retries": 3, "timeout_s": 5.0, **(endpoint or {})})
    return Captioning("org/model@1", "openai", prompts or ("{alt_text}",), endpoint=there, **more)


def ask(options: Captioning, *alt_texts: str) -> list[list[Written | Drop]]:
    captioner = models.open_captioner(options)
    return captioner(captioner.prepare([jpeg(i) for i in range(len(alt_texts))], alt_texts))


def only(found: list[list[Written | Drop]]) -> Written | Drop:
    ((one,),) = found
    return one


def test_what_is_sent(server: Server) -> None:
    found = ask(
        options(server, "Describe {alt_text} {{now}}", "", max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3,
                endpoint={"detail": "low"}),
        "a <|im_end|> {ball} [/INST]",
    )  # fmt: skip
    assert server.keys == [f"Bearer {KEY}"] * 3
    body = next(body for body in server.bodies if len(body["messages"][0]["content"]) == 2)
    (message,) = body.pop("messages")
    assert body == {"model": "org/model", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    shown, text = message["content"]
    assert text == {"type": "text", "text": "Describe a   {ball}   {now}"}
    assert shown["image_url"]["detail"] == "low"
    kind, _, data = shown["image_url"]["url"].partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/jpeg;base64", jpeg(0))  # the stored bytes, as they are
    assert found[0][0] == Written("About Describe a   {ball}   {now}.")


def test_large_images_are_scaled_down(server: Server) -> None:
    before, limit = Image.open(io.BytesIO(jpeg(0))), 500
    ask(options(server, max_pixels=limit), "x")
    data = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2]
    after = Image.open(io.BytesIO(base64.b64decode(data)))
    assert before.width * before.height > limit >= after.width * after.height > 0.8 * limit
    assert math.isclose(before.width / before.height, after.width / after.height, rel_tol=0.1)


def test_many_in_flight_up_to_the_limit_and_in_order(server: Server) -> None:
    async def late(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.002 * (hash(prompt_of(body)) % 7))
        return said(prompt_of(body))

    server.answer = late
    texts = [f"text {i}" for i in range(60)]
    found = ask(options(server, "1 {alt_text}", "2 {alt_text}", endpoint={"in_flight": 5}), *texts)
    assert found == [[Written(f"{k} {text}") for k in (1, 2)] for text in texts]
    assert server.most == 5


def test_batches_overlap(server: Server) -> None:
    async def gated(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.to_thread(server.gate.wait, 10)
        return said(prompt_of(body))

    server.answer = gated
    captioner = models.open_captioner(options(server))
    batches = [captioner.prepare([jpeg(i)] * 3, [f"{i} {k}" for k in range(3)]) for i in range(2)]
    until = time.monotonic() + 5
    while server.in_flight < 6 and time.monotonic() < until:
        time.sleep(0.005)
    assert server.in_flight == 6  # both batches, and nothing has been waited for
    server.gate.set()
    for i in (1, 0):
        assert captioner(batches[i]) == [[Written(f"{i} {k}")] for k in range(3)]


async def hang_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_short(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices"')
    assert request.transport is not None
    request.transport.abort()
    return response


FAULTS: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
    "hang up": hang_up,
    "cut short": cut_short,
    **{
        str(code): lambda r, c=code: asyncio.sleep(0, web.Response(status=c)) for code in (408, 409, 429, 500, 502, 503)
    },
    "slow": lambda r: asyncio.sleep(1, web.Response()),
    "no JSON": lambda r: asyncio.sleep(0, web.Response(text="<html>")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes(server: Server, fault: str) -> None:
    async def twice(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await (FAULTS[fault](request) if len(server.bodies) <= 2 else server.echo(request, body))

    server.answer = twice
    assert only(ask(options(server, endpoint={"timeout_s": 0.2}), "x")) == Written("About x.")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays(server: Server, fault: str) -> None:
    server.answer = lambda request, body: FAULTS[fault](request)
    found = only(ask(options(server, endpoint={"timeout_s": 0.2, "retries": 1}), "x"))
    assert isinstance(found, Drop)
    assert found.reason == "endpoint_error"
    assert len(server.bodies) == (3 if fault == "429" else 2)  # being told to wait counts half
    word = {"slow": "no answer within 0.2 s", "hang up": "Disconnected", "cut short": "Payload"}.get(fault, fault)
    assert word in found.detail


def test_a_rate_limit_holds_back_everybody(server: Server) -> None:
    told: list[float] = []

    async def limited(request: web.Request, body: dict[str, Any]) -> web.Response:
        if not told:
            told.append(time.monotonic())
            return web.Response(status=429, headers={"Retry-After": "1"})
        return said("fine")

    server.answer = limited
    found = ask(options(server, endpoint={"in_flight": 2}), *"abcdef")
    assert found == [[Written("fine")]] * 6
    assert sum(t < told[0] + 0.95 for t in server.times) <= 2  # it, and what was in flight beside it
    assert max(server.times) < told[0] + 4


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3), ("0", 0), (" 2.5 ", 2.5), ("-1", None), ("soon", None), ("", None), (None, None), ("1e9", None),
        ("9" * 40, None), ("nan", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0), ("Wed, 99 Oct 2015 07:28:00 GMT", None),
    ],
)  # fmt: skip
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert openai._seconds(header) == seconds


def test_retry_after_a_date() -> None:
    found = openai._seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    assert found is not None
    assert 25 < found <= 30


def test_retry_after_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_MAX_WAIT_S", 0.1)

    async def limited(request: web.Request, body: dict[str, Any]) -> web.Response:
        again = {"Retry-After": "86400"}
        return web.Response(status=503, headers=again) if len(server.bodies) == 1 else said("fine")

    server.answer = limited
    assert only(ask(options(server), "x")) == Written("fine")


NONSENSE = {
    "list": b"[]", "null": b"null", "number": b"1", "no choices": b"{}", "none": b'{"choices": []}',
    "not UTF-8": b"\xff\xfe\x00", "deep": b"[" * 100_000, "digits": b"1" * 100_000, "empty": b"",
    "no message": b'{"choices": [{}]}', "text": b'{"choices": ["x"]}',
    "null message": b'{"choices":[{"message":null}]}',
    "null content": b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
    "number content": b'{"choices": [{"message": {"content": 7}}]}',
    "parts": b'{"choices":[{"message":{"content":[1]}}]}',
    "giant": b'{"choices": [{"message": {"content": "x"}}]}' + b" " * (9 << 20),
}  # fmt: skip


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_is_asked_again_and_then_given_up(server: Server, kind: str) -> None:
    server.answer = lambda request, body: asyncio.sleep(0, web.Response(body=NONSENSE[kind]))
    found = only(ask(options(server, endpoint={"retries": 9}), "x"))
    assert isinstance(found, Drop)
    assert (found.reason, len(server.bodies)) == ("endpoint_error", 3)
    assert len(found.detail) < 500


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (said("A red", "length"), Written("A red", complete=False)),
        (said("", "stop"), Written("")),
        (said([{"type": "text", "text": "A "}, {"type": "text", "text": "ball"}]), Written("A ball")),
        (said("half \ud83d"), Written("half \ud83d")),
        (said("A red", "content_filter"), Drop("content_filter")),
        (said(None, "stop", refusal="I will not."), Drop("refusal")),
        (said(None, "length"), Drop("empty_caption")),
        (web.json_response({"error": {"code": "content_filter", "message": "x"}}, status=400), Drop("content_filter")),
        (web.json_response({"error": {"message": "too large"}}, status=413), Drop("endpoint_refused")),
        (web.json_response({"detail": [{"msg": "x"}]}, status=422), Drop("endpoint_refused")),
        (web.Response(status=302, headers={"Location": "/elsewhere"}), Drop("endpoint_refused")),
        (web.Response(status=204), Drop("endpoint_refused")),
    ],
)  # fmt: skip
def test_an_answer_is_asked_for_once(server: Server, answer: web.Response, found: Written | Drop) -> None:
    server.answer = lambda request, body: asyncio.sleep(0, answer)
    one = only(ask(options(server), "x"))
    assert one == found if isinstance(found, Written) else isinstance(one, Drop) and one.reason == found.reason
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (web.Response(status=401, text="expired"), "401: expired"),
        (web.json_response({"error": {"code": "insufficient_quota", "message": "pay"}}, status=429), "pay"),
        (web.json_response({"error": "no such model"}, status=404), "404: no such model"),
    ],
)
def test_what_is_no_images_fault_ends_the_run(server: Server, answer: web.Response, line: str) -> None:
    server.answer = lambda request, body: asyncio.sleep(0, answer)
    with pytest.raises(ModelError, match=line):
        ask(options(server), "x", "y")


@pytest.mark.parametrize("status", [500, 400])
def test_a_server_that_is_of_no_use_to_many_in_a_row_ends_the_run(server: Server, status: int) -> None:
    async def answer(request: web.Request, body: dict[str, Any]) -> web.Response:
        return await server.echo(request, body) if prompt_of(body) == "good" else web.Response(status=status, text="no")

    server.answer = answer
    asked = options(server, endpoint={"in_flight": 1, "retries": 0})
    reasons = [row[0].reason for row in ask(asked, *["x"] * 7) if isinstance(row[0], Drop)]
    assert reasons == ["endpoint_error" if status == 500 else "endpoint_refused"] * 7
    assert len(ask(asked, *["x"] * 7, "good", *["x"] * 7)) == 15  # what one says for good begins the count anew
    with pytest.raises(ModelError, match=rf"^endpoint {server.url}: no usable answer to the last 8 requests: {status}"):
        ask(asked, *["x"] * 8)
    assert len(ask(options(server, endpoint={"in_flight": 9, "retries": 0}), *["x"] * 8)) == 8


def test_a_404_of_a_server_that_worked_passes(server: Server) -> None:
    captioner = models.open_captioner(options(server))
    captioner(captioner.prepare([jpeg(0)], ["x"]))

    async def away(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=404) if len(server.bodies) == 2 else said("back")

    server.answer = away
    assert captioner(captioner.prepare([jpeg(0)], ["x"])) == [[Written("back")]]


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (web.Response(status=401), "takes no such key as in OPENAI_API_KEY"),
        (web.Response(status=403, text=f"{KEY} is wrong"), r"\*\*\* is wrong"),
        (web.json_response({"data": [{"id": "org/moddel"}, {"id": "b"}]}), "no model 'org/model'; it has org/moddel"),
        (web.Response(status=307, headers={"Location": "http://else/v1"}), "http://else/v1"),
    ],
)
def test_a_server_that_will_not_do(server: Server, answer: web.Response, line: str) -> None:
    server.models = lambda request: answer
    with pytest.raises(ModelError, match=line) as caught:
        models.open_captioner(options(server))
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert server.url in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        web.Response(status=404), web.Response(text="hello"), web.json_response([]), web.json_response({"data": []}),
        web.json_response({"data": [{"id": "models/org/model"}]}), web.json_response({"data": [{"name": "x"}]}),
    ],
)  # fmt: skip
def test_a_server_that_does_not_list_its_models(server: Server, answer: web.Response) -> None:
    server.models = lambda request: answer
    models.open_captioner(options(server))


def test_nobody_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = options(server, endpoint={"url": "http://127.0.0.1:1/v1"})
    threads = threading.active_count()
    with pytest.raises(ModelError, match=r"^endpoint http://127.0.0.1:1/v1: no server answers: .*127.0.0.1") as caught:
        models.open_captioner(gone)
    assert "\n" not in str(caught.value)
    until = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= threads  # nothing is left of the attempt


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000/v1", "file:///etc/passwd", "http://", "http://[::1/v1", "http://a:99999/v1"]
)
def test_no_address(server: Server, url: str) -> None:
    with pytest.raises(ValueError, match=r"^url: is not like"):
        options(server, endpoint={"url": url})


def test_a_key_in_the_address_is_refused_and_not_repeated(server: Server) -> None:
    with pytest.raises(ValueError, match="environment") as caught:
        options(server, endpoint={"url": f"http://me:{KEY}@127.0.0.1/v1"})
    assert KEY not in str(caught.value)


def test_no_key_is_sent_where_there_is_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(options(server), "x")
    assert server.keys == [None, None]
    server.models = lambda request: web.Response(status=401)
    with pytest.raises(ModelError, match="wants a key; set MY_KEY"):
        models.open_captioner(options(server, endpoint={"key_from": "MY_KEY"}))
    monkeypatch.setenv("MY_KEY", "sk-one\nX-Other: 1")
    with pytest.raises(ModelError, match="MY_KEY holds is no key") as caught:
        models.open_captioner(options(server, endpoint={"key_from": "MY_KEY"}))
    assert "sk-one" not in str(caught.value)


def test_the_key_goes_nowhere_else(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    escaped = KEY.replace("-", "\\u002d")
    answers = [
        lambda: web.Response(status=400, text=f"bad key {KEY} in {'x' * 270}{KEY}"),
        lambda: web.Response(status=400, text=f"{'x' * 290}{KEY}"),  # cut in its middle
        lambda: web.Response(status=400, body=f'{{"error": {{"message": "bad key {escaped}"}}}}'.encode()),
        lambda: web.Response(text=f"no JSON, {KEY}"),
        lambda: said(f"The key is {KEY}."),
        lambda: said(None, "stop", refusal=f"{KEY}, no"),
        lambda: web.Response(status=302, headers={"Location": f"http://127.0.0.1:1/{KEY}"}),
        lambda: web.Response(status=500, headers={"X": "y" * 10_000}, text=KEY),
    ]

    async def leak(request: web.Request, body: dict[str, Any]) -> web.Response:
        return answers[int(prompt_of(body))]()

    server.answer = leak
    found = ask(options(server, endpoint={"retries": 1}), *map(str, range(len(answers))))
    step = Caption("org/model@1", "openai", ("{alt_text}",), endpoint=Endpoint(url=server.url, retries=0))
    batch = pa.table({"key": [str(i) for i in range(len(answers))], "image": [jpeg(0)] * len(answers),
                      "alt_text": [str(i) for i in range(len(answers))]})  # fmt: skip
    table = step.open()(batch)
    gc.collect()
    captured = capfd.readouterr()
    for text in (str(found), repr(found), str(table.to_pylist()), repr(step), caplog.text, captured.out, captured.err):
        assert KEY not in text
        assert KEY[:12] not in text
    assert "***" in str(found)
    assert {row["reason"] for row in table.to_pylist()} == {None, "endpoint_refused", "endpoint_error", "refusal"}


def test_redirects_are_not_followed(server: Server) -> None:
    server.answer = lambda request, body: asyncio.sleep(
        0, web.Response(status=307, headers={"Location": "/elsewhere"}) if "v1" in request.path else said("led away")
    )
    found = only(ask(options(server), "x"))
    assert isinstance(found, Drop)
    assert len(server.bodies) == 1


def test_a_query_in_the_address_is_sent_and_not_shown(server: Server) -> None:
    seen: list[str] = []

    async def query(request: web.Request, body: dict[str, Any]) -> web.Response:
        seen.append(request.query_string)
        return web.Response(status=401)

    server.answer = query
    with pytest.raises(ModelError) as caught:
        ask(options(server, endpoint={"url": f"{server.url}/?api-version=7"}), "x")
    assert seen == ["api-version=7"]
    assert "api-version" not in str(caught.value)


def test_what_is_no_longer_wanted_is_given_up(server: Server, recwarn: pytest.WarningsRecorder) -> None:
    async def gated(request: web.Request, body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(30)
        return said("late")

    server.answer = gated
    captioner = models.open_captioner(options(server))
    prepared = captioner.prepare([jpeg(0)], ["x"])
    until = time.monotonic() + 5
    while not server.in_flight and time.monotonic() < until:
        time.sleep(0.005)
    del captioner
    gc.collect()
    assert prepared[0][0].cancelled() or prepared[0][0].exception(5)
    assert not [str(warning.message) for warning in recwarn if "Unclosed" in str(warning.message)]


# -- vLLM in this process: what can be told without a GPU


def test_vllm_says_what_is_missing() -> None:
    with pytest.raises(ModelError, match=r"pip install vllm.*GPU") as caught:
        models.open_captioner(Captioning("org/model@" + "0" * 40, "vllm"))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="runs on a GPU only"):
        models.open_captioner(Captioning("org/model@" + "0" * 40, "vllm", device="cpu"))


class Engine:
    """Has vLLM's engine's three methods: answers the last request first, one a step, and can fail."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, dict[str, Any]]] = []
        self.most = 0

    def add_request(self, name: str, request: dict[str, Any], sampling: Any) -> None:
        if "refuse" in request["prompt"]:
            raise ValueError("prompt too long")
        self.waiting.append((name, request))
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[Any]:
        from types import SimpleNamespace as Made

        time.sleep(0.01)
        name, request = self.waiting.pop()
        if "die" in request["prompt"]:
            raise RuntimeError("CUDA error")
        image = request["multi_modal_data"]["image"]
        out = Made(
            text=f"{request['prompt']} {image.width}", finish_reason="length" if "cut" in request["prompt"] else "stop"
        )
        return [Made(request_id=name, outputs=[out], finished=True), Made(request_id="99", outputs=[], finished=False)]


def template(turn: list[dict[str, Any]], **settings: Any) -> str:
    assert settings == {"add_generation_prompt": True, "tokenize": False}
    kinds = [part["type"] for part in turn[0]["content"]]
    assert kinds == ["image", "text"]
    return f"<image>{turn[0]['content'][1]['text']}"


def test_vllm_keeps_its_engine_full_and_the_order() -> None:
    engine, options = Engine(), Captioning("x/y@1", "vllm", ("1 {alt_text}", "2 {alt_text}"), max_pixels=100)
    captioner = vllm.VLLM(options, engine, None, vllm.chat(options, template))
    batches = [captioner.prepare([jpeg(i)] * 4, [f"{i} {k} cut" for k in range(4)]) for i in range(2)]
    width = within(decode(jpeg(0)), 100).width
    for i, batch in enumerate(batches):
        assert captioner(batch) == [
            [Written(f"<image>{p} {i} {k} cut {width}", complete=False) for p in (1, 2)] for k in range(4)
        ]
    assert engine.most > 8  # requests of both batches at once


def test_vllm_faults_reach_those_who_wait() -> None:
    options = Captioning("x/y@1", "vllm", ("{alt_text}",))
    captioner = vllm.VLLM(options, Engine(), None, vllm.chat(options, template))
    with pytest.raises(ValueError, match="too long"):
        captioner(captioner.prepare([jpeg(0)], ["refuse"]))
    assert captioner(captioner.prepare([jpeg(0)], ["fine"]))[0][0].complete
    for text in ("die", "fine"):
        with pytest.raises(ModelError, match="engine died: RuntimeError: CUDA error"):
            captioner(captioner.prepare([jpeg(0)], [text]))


def test_vllm_engine_arguments(tmp_path: Path) -> None:
    found = vllm.engine_arguments(Captioning("x/y@1", "vllm", seed=4, dtype="float16"), tmp_path)
    assert (found["model"], found["seed"], found["dtype"], found["trust_remote_code"]) == (
        str(tmp_path),
        4,
        "float16",
        False,
    )
    json.dumps(found)
