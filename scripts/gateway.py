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
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from copy import deepcopy
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import anyio
import uvicorn
from huggingface_hub.utils import httpx
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from request_guard import FAILED, MAX_BODY, ROUTES, Pictures, check_text, parse
from serving_engines import Engine, add_usage
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol


logger = logging.getLogger("uvicorn.error")
# Bytes that all requests hold together; pixels of images that make a request large; large ones at a time.
MAX_HELD, LARGE, MAX_LARGE = 256 * 2**20, 2**24, 16
# Seconds: until a client has sent its headers, and its body; until it has read what is sent to it; until a refused
# client stops sending; and until an engine answers that it is well.
HEADER_SECONDS, BODY_SECONDS, SEND_SECONDS, LINGER_SECONDS, HEALTH_SECONDS = 10, 60, 60, 2, 10
RETRY = {"Retry-After": "5"}
OPEN_PAGES = ("/health", "/ping")  # asked by what starts and watches servers, without a key

REQUESTS = Counter("step3_requests", "Requests, by status", ["path", "status"])
TOKENS = Counter("step3_tokens", "Tokens of prompts and answers", ["kind"])
BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, math.inf)
SECONDS = Histogram("step3_request_seconds", "Duration of requests", ["path"], buckets=BUCKETS)
RUNNING = Gauge("step3_requests_running", "Requests that the engine computes")
WAITING = Gauge("step3_requests_waiting", "Requests that wait for the engine")


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
        self.held = 0  # bytes
        limits = (self.max_requests, self.engine.slots, MAX_LARGE)
        self.places, self.slots, self.large = map(asyncio.Semaphore, limits)
        pages = {"/health": self.health, "/ping": self.health, "/metrics": self.metrics, "/v1/models": self.models}
        routes = [Route(path, self.ask, methods=["POST"]) for path in ROUTES]
        routes += [Route(path, page) for path, page in pages.items()]
        kinds = (HTTPException, ClientDisconnect, Exception)
        self.app = Starlette(routes=routes, exception_handlers=dict.fromkeys(kinds, refuse))
        self.paths = (*ROUTES, *pages)

    async def __call__(self, scope, receive, send) -> None:
        """Counts a request, limits the time that its client takes, and in the end releases what it holds."""
        if scope["type"] != "http":
            return
        is_unread, status, app = scope["method"] == "POST", 499, self.app

        async def receive_noting() -> dict:
            nonlocal is_unread
            message = await receive()
            is_unread = is_unread and bool(message.get("more_body"))
            return message

        async def send_in_time(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                with anyio.move_on_after(LINGER_SECONDS):  # who is still sending would not read the answer
                    while is_unread:
                        await receive_noting()
            with anyio.move_on_after(SEND_SECONDS) as sending:
                await send(message)
            if sending.cancelled_caught:  # the client does not read
                answering.cancel()

        path = scope["path"] if scope["path"] in self.paths else "other"
        try:
            self._check_sender(path, Headers(scope=scope))
        except HTTPException as error:
            app = response_of(error)
        with SECONDS.labels(path).time():
            async with AsyncExitStack() as scope["stack"]:
                scope["stack"].callback(lambda: REQUESTS.labels(path, status).inc())
                with anyio.CancelScope() as answering:
                    await app(scope, receive_noting, send_in_time)

    def _check_sender(self, path: str, headers: Headers) -> None:
        """Raises an `HTTPException` if a request comes without the key, or from a page with a name for this server."""
        given = headers.get("host", "")
        try:
            host = urlsplit(f"//{given}").hostname
            is_known = host in ("localhost", *self.hosts) or ipaddress.ip_address(host)
        except ValueError:
            is_known = False
        if not is_known:
            raise HTTPException(403, f"This server is not {given!r:.100}; see --allow-host.")
        if self.key is not None and path not in OPEN_PAGES:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
                raise HTTPException(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})

    async def ask(self, request: Request) -> Response:
        """Answers a request, or drops it if the client closes the connection."""
        # Without asking first, a page of another site can send text, forms, and bodies without a type.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, "The Content-Type must be application/json.")
        if not self.is_ready:
            await self.health(request)
        data, held, response, stack = bytearray(), 0, None, request.scope["stack"]

        def hold(count: int) -> None:
            nonlocal held
            held, self.held = held + count, self.held + count
            if held > MAX_BODY:
                raise HTTPException(413, f"A request must have at most {MAX_BODY} bytes, with its images.")
            if self.held > MAX_HELD:
                raise HTTPException(429, "All requests together are too large at the moment.", RETRY)

        def release() -> None:
            self.held -= held

        stack.callback(release)
        with anyio.move_on_after(BODY_SECONDS) as reading:
            async for part in request.stream():
                hold(len(part))
                data += part
        if reading.cancelled_caught:
            raise HTTPException(408, f"A request must arrive in {BODY_SECONDS} seconds.")
        if self.places.locked():
            raise HTTPException(429, f"{self.max_requests} requests are being answered or wait.", RETRY)
        await stack.enter_async_context(self.places)
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                response = await self._answer(request, data, hold)
            except HTTPException as error:
                response = response_of(error)
            group.cancel_scope.cancel()
        if response is None:
            raise ClientDisconnect
        return response

    async def _answer(self, request: Request, data: bytes, hold: Callable[[int], None]) -> Response:
        path, stack = request.scope["path"], request.scope["stack"]
        body = {**self.engine.defaults, **await anyio.to_thread.run_sync(parse, path, data)}
        if body.pop("model", self.name) != self.name:
            raise HTTPException(404, f"The model here is {self.name!r}.")
        self.engine.check(body)
        await anyio.to_thread.run_sync(check_text, body, self.engine)
        is_stream, options = body.pop("stream", False), body.pop("stream_options", {})
        pixels = await self.pictures.inline(body.get("messages", []), hold)
        if pixels and not self.engine.takes_pictures:
            raise HTTPException(400, "This model does not take images.")
        requests = self.engine.requests(body, is_stream)
        with WAITING.track_inprogress():
            if pixels > LARGE:
                await stack.enter_async_context(self.large)
            await stack.enter_async_context(self.slots)
        stack.enter_context(RUNNING.track_inprogress())
        events = await stack.enter_async_context(aclosing(self._events(path, requests)))
        if not is_stream:
            answer = self.engine.join(path, [event async for event in events])
            return JSONResponse({**answer, "model": self.name})
        parts = self._parts(events, options.get("include_usage"))
        first = await anext(parts) + await anext(parts)  # until then, an error has a status of its own

        async def stream():
            yield first
            async for part in parts:
                yield part

        return StreamingResponse(stream(), headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")

    async def _events(self, path: str, requests: list[dict]):
        """The engine's answer: the parts of a stream, or one object. Raises an `HTTPException` for an error."""
        for number, request in enumerate(requests):
            try:
                async with self.client.stream("POST", path, json=request) as response:
                    if response.status_code != 200:
                        raise refusal_of((await response.aread()).decode(), response.status_code)
                    if not request["stream"]:
                        yield count_tokens(json.loads(await response.aread()))
                        continue
                    async for line in response.aiter_lines():
                        text = line.removeprefix("data: ")
                        if text.startswith('{"error"'):
                            raise refusal_of(text, 400)
                        if text.startswith("{"):
                            event = count_tokens(json.loads(text))
                            for choice in event["choices"]:
                                choice["index"] += number
                            yield {**event, "model": self.name}
            except httpx.TransportError as error:
                reason = f"The engine does not answer: {error or type(error).__name__}"
                raise HTTPException(502, reason) from None

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
        except HTTPException as error:
            if count < 2:
                raise
            yield as_part(body_of(error))
        yield b"data: [DONE]\n\n"

    async def health(self, request: Request | None = None) -> Response:
        try:
            response = await self.client.get("/health", timeout=HEALTH_SECONDS)
        except httpx.TransportError as error:
            reason = f"The engine does not answer: {error or type(error).__name__}"
            raise HTTPException(503, reason if self.is_ready else "The model is being loaded.", RETRY) from None
        if response.status_code != 200:
            raise refusal_of(response.text, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "step3-vl"}
        return JSONResponse({"object": "list", "data": [{**model, "max_model_len": self.engine.context}]})


def count_tokens(event: dict) -> dict:
    for kind in ("prompt", "completion"):
        TOKENS.labels(kind).inc((event.get("usage") or {}).get(f"{kind}_tokens") or 0)
    return event


def as_part(event: dict) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def body_of(error: HTTPException) -> dict:
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": error.status_code}}


def response_of(error: HTTPException) -> JSONResponse:
    if error.status_code >= 500:
        logger.error(error.detail)
    return JSONResponse(body_of(error), error.status_code, error.headers)


async def refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        error = HTTPException(499, "The client closed the connection.")
    elif not isinstance(error, HTTPException):
        error = HTTPException(500, "The server failed; its log says why.")
    return response_of(error)


def refusal_of(text: str, status: int) -> HTTPException:
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
    return HTTPException(500 if reason.startswith(FAILED) else status, reason)
