"""
The web server in front of a serving engine. It checks who asks, limits what requests take, sends what passes the guard
to the engine, which listens on a socket in the file system, and brings all errors into one shape.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import aclosing, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio
import uvicorn
from huggingface_hub.utils import httpx
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from request_guard import FAILED, MAX_BODY, ROUTES, Pictures, Refusal, check_text, parse
from serving_engines import Engine, add_usage
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol


logger = logging.getLogger("uvicorn.error")
# Bytes of bodies that all requests hold together; pixels of images that make a request large; large ones at a time.
MAX_HELD, LARGE, MAX_LARGE = 256 * 2**20, 2**24, 16
# Seconds: until a client has sent its headers, and its body; until it has read what is sent to it; until a refused
# client stops sending; and until an engine answers that it is well.
HEADER_SECONDS, BODY_SECONDS, SEND_SECONDS, LINGER_SECONDS, HEALTH_SECONDS = 10, 60, 60, 2, 10
LOADING = "The model is being loaded."
RETRY = {"Retry-After": "5"}
TOO_LARGE = Refusal(f"A request must have at most {MAX_BODY} bytes.", 413)
OPEN_PAGES = ("/health", "/ping")  # asked by what starts and watches servers, without a key


class Protocol(H11Protocol):
    """Closes connections that send no complete headers in time."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, lambda: self.cycle or transport.close())


def web_server(app) -> uvicorn.Server:
    # A connection serves one request, so that the limits of a connection are those of a request.
    options = {"headers": [("Connection", "close")], "timeout_graceful_shutdown": 5, "server_header": False}
    log = deepcopy(uvicorn.config.LOGGING_CONFIG)
    log["handlers"]["access"]["stream"] = "ext://sys.stderr"
    return uvicorn.Server(uvicorn.Config(app, http=Protocol, lifespan="off", log_config=log, **options))


@dataclass
class Gateway:
    """The ASGI app. `socket` is the path of the engine's socket, and `name` the model's for clients."""

    engine: Engine
    socket: str
    name: str
    pictures: Pictures = field(default_factory=Pictures)
    key: str | None = None
    hosts: Sequence[str] = ()
    max_requests: int = 64
    is_ready = False

    def __post_init__(self):
        transport = httpx.AsyncHTTPTransport(uds=self.socket, limits=httpx.Limits(max_connections=None))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None, trust_env=False)
        self.open = self.held = self.computing = 0
        self.slots, self.large = asyncio.Semaphore(self.engine.slots), asyncio.Semaphore(MAX_LARGE)
        pages = {"/health": self.health, "/ping": self.health, "/metrics": self.metrics, "/v1/models": self.models}
        self.pages, self.registry = pages, CollectorRegistry()
        options = {"registry": self.registry}
        self.requests = Counter("step3_requests", "Requests, by status", ["path", "status"], **options)
        self.tokens = Counter("step3_tokens", "Tokens of prompts and answers", ["kind"], **options)
        buckets = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, math.inf)
        self.seconds = Histogram("step3_request_seconds", "Duration of requests", ["path"], buckets=buckets, **options)
        running = Gauge("step3_requests_running", "Requests that the engine computes", **options)
        running.set_function(lambda: self.computing)
        waiting = Gauge("step3_requests_waiting", "Requests that are read, or wait for the engine", **options)
        waiting.set_function(lambda: self.open - self.computing)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        is_asked, is_unread, status, start = path in ROUTES, method == "POST", None, time.monotonic()

        async def receive_noting() -> dict:
            nonlocal is_unread
            message = await receive()
            is_unread = is_unread and bool(message.get("more_body"))
            return message

        async def send_in_time(message: dict) -> None:
            nonlocal status
            status = message.get("status", status)
            with anyio.fail_after(SEND_SECONDS):
                await send(message)

        failure = None
        try:
            self._check_sender(path, headers)
            if not is_asked and path not in self.pages:
                raise Refusal(f"There is no {path:.100}, but {', '.join([*ROUTES, *self.pages])}.", 404)
            if method not in (allowed := ("POST",) if is_asked else ("GET", "HEAD")):
                raise Refusal(f"{path} does not take {method:.20}.", 405, Allow=", ".join(allowed))
            if is_asked:
                await self._ask(path, headers, receive_noting, send_in_time)
            else:
                await (await self.pages[path]())(scope, receive, send_in_time)
        except Refusal as error:
            failure = error
        except TimeoutError:  # the client does not read
            return
        except Exception:
            logger.exception("A request failed.")
            failure = Refusal("The server failed; its log says why.", 500)
        if failure and status is None:
            if failure.status >= 500 and is_asked:
                logger.error("%s: %s", path, failure)
            if is_unread and "expect" not in headers:  # clients that are still sending would not read the answer
                with anyio.move_on_after(LINGER_SECONDS):
                    while is_unread:
                        await receive_noting()
            await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send_in_time)
        if is_asked:
            self.requests.labels(path, status or 499).inc()
            self.seconds.labels(path).observe(time.monotonic() - start)

    def _check_sender(self, path: str, headers: Headers) -> None:
        """Raises a `Refusal` if a request comes without the key, or may come from a page of another site."""
        try:
            host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        except ValueError:
            host = ""
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if host not in ("localhost", *self.hosts):
                raise Refusal(f"This server is not {host!r:.100}; see --allow-host.", 403) from None
        if self.key is not None and path not in OPEN_PAGES:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise Refusal("The API key is missing or wrong.", 401, **{"WWW-Authenticate": "Bearer"})
        if path in ROUTES and headers.get("content-type", "application/json").split(";")[0] != "application/json":
            raise Refusal("The Content-Type must be application/json.", 415)

    async def _ask(self, path: str, headers: Headers, receive, send) -> None:
        """Answers a request, and drops it if the client closes the connection."""
        if not self.is_ready:
            raise Refusal(LOADING, 503, **RETRY)
        if int(headers.get("content-length", 0)) > MAX_BODY:
            raise TOO_LARGE
        data, failure, is_open = bytearray(), None, False
        try:
            await self._read(receive, data)
            if self.open >= self.max_requests:
                raise Refusal(f"{self.open} requests are being answered or wait.", 429, **RETRY)
            self.open, is_open = self.open + 1, True
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(watch)
                try:
                    await self._answer(path, data, send)
                except (Refusal, TimeoutError) as error:
                    failure = error
                group.cancel_scope.cancel()
        finally:
            self.open, self.held = self.open - is_open, self.held - len(data)
        if failure:
            raise failure

    async def _read(self, receive, data: bytearray) -> None:
        """Appends a request's body to `data`."""
        with anyio.move_on_after(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal("The client closed the connection.", 499)
                data += message["body"]
                self.held += len(message["body"])
                if len(data) > MAX_BODY:
                    raise TOO_LARGE
                if self.held > MAX_HELD:
                    raise Refusal("All requests together are too large at the moment.", 429, **RETRY)
                if not message["more_body"]:
                    return
        raise Refusal(f"A request must arrive in {BODY_SECONDS} seconds.", 408)

    async def _answer(self, path: str, data: bytes, send) -> None:
        body = {**self.engine.defaults, **await anyio.to_thread.run_sync(parse, path, data)}
        if body.pop("model", self.name) != self.name:
            raise Refusal(f"The model here is {self.name!r}.", 404)
        self.engine.check(body)
        await anyio.to_thread.run_sync(check_text, body, self.engine)
        is_stream, options = body.pop("stream", False), body.pop("stream_options", {})
        pixels = await self.pictures.inline(body.get("messages", []))
        if pixels and not self.engine.takes_pictures:
            raise Refusal("This model does not take images.")
        requests = self.engine.requests(path, body, is_stream)
        async with self.large if pixels > LARGE else nullcontext(), self.slots:
            self.computing += 1
            try:
                async with aclosing(self._events(path, requests)) as events:
                    if is_stream:
                        await self._stream(events, send, options.get("include_usage"))
                    else:
                        answer = self.engine.join(path, [event async for event in events])
                        await JSONResponse({**answer, "model": self.name})({"type": "http"}, None, send)
            finally:
                self.computing -= 1

    async def _events(self, path: str, requests: list[dict]):
        """The engine's answer: the parts of a stream, or one object. Raises a `Refusal` instead of an error."""
        for number, request in enumerate(requests):
            try:
                async with self.client.stream("POST", path, json=request) as response:
                    if response.status_code != 200:
                        raise refusal_of((await response.aread()).decode(), response.status_code)
                    if not request["stream"]:
                        yield self._count(json.loads(await response.aread()))
                        continue
                    async for line in response.aiter_lines():
                        text = line.removeprefix("data: ")
                        if text.startswith('{"error"'):
                            raise refusal_of(text, 400)
                        if text.startswith("{"):
                            event = self._count(json.loads(text))
                            for choice in event["choices"]:
                                choice["index"] += number
                            yield {**event, "model": self.name}
            except httpx.TransportError as error:
                raise Refusal(f"The engine does not answer: {error or type(error).__name__}", 502) from None

    def _count(self, event: dict) -> dict:
        for kind in ("prompt", "completion"):
            self.tokens.labels(kind).inc((event.get("usage") or {}).get(f"{kind}_tokens") or 0)
        return event

    async def _stream(self, events, send, include_usage: bool | None) -> None:
        """Sends a stream as it comes, from the second part on: until then, an error has a status of its own."""
        parts = self._parts(events, include_usage)
        first = await anext(parts) + await anext(parts)
        headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        async for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _parts(self, events, include_usage: bool | None):
        usage, event, count = {}, {}, 0
        try:
            async for event in events:
                usage = add_usage(usage, event.pop("usage", None))
                if event["choices"]:
                    count += 1
                    yield as_part(event)
            if include_usage:
                yield as_part({**event, "choices": [], "usage": usage})
        except Refusal as error:
            if count < 2:
                raise
            yield as_part(error.body)
        yield b"data: [DONE]\n\n"

    async def health(self) -> Response:
        try:
            response = await self.client.get("/health", timeout=HEALTH_SECONDS)
        except httpx.TransportError as error:
            reason = f"The engine does not answer: {error or type(error).__name__}"
            raise Refusal(reason if self.is_ready else LOADING, 503, **RETRY) from None
        if response.status_code != 200:
            raise refusal_of(response.text, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "step3-vl"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self.engine.context}]})


def as_part(event: dict) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def refusal_of(text: str, status: int) -> Refusal:
    """An engine's error, of whichever shape."""
    try:
        value = json.loads(text)
    except ValueError:  # transformers does not escape quotation marks
        value = text.strip().removeprefix('{"error": "').removesuffix('"}')
    for key in ("error", "message", "detail", "reason"):
        if isinstance(value, dict):
            status = value["code"] if isinstance(value.get("code"), int) else status
            value = value.get(key, value)
    reason = str(value) or "The engine gave no reason."
    return Refusal(reason, 500 if reason.startswith(FAILED) else status)
