"""
Checks requests before a serving engine gets them: an ASGI middleware for `transformers serve` and vLLM.

Requests that would make the engine fail, or that untrusted clients must not make, get a 4xx response with the reason.
`serve.py` installs it. Run as a program, it is transformers' command line with the guard in front of the server:

python scripts/request_guard.py serve DIRECTORY
"""

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from files import parse_json, picture_of
from PIL import Image, UnidentifiedImageError
from starlette.responses import JSONResponse


# The environment variable in which `serve.py` passes the rules.
RULES = "STEP3_REQUEST_RULES"
ASKED = ("/v1/chat/completions", "/v1/completions")
READ = ("/health", "/metrics", "/ping", "/v1/models", "/version")
ROLES = ("system", "developer", "user", "assistant", "tool")
# The formats that Pillow reads without other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
Image.init()  # registers all formats
MAX_BODY, MAX_PIXELS = 64 * 2**20, 2**26
# Images with a smaller side and a larger aspect ratio are padded to a square.
MIN_SIDE, MAX_PADDED_RATIO = 32, 4
NUMBER = (int, float)
# The types of fields that engines do not check.
FIELDS = {
    "chat_template_kwargs": dict,
    "frequency_penalty": NUMBER,
    "logit_bias": dict,
    "max_completion_tokens": int,
    "max_tokens": int,
    "model": str,
    "n": int,
    "presence_penalty": NUMBER,
    "seed": int,
    "stop": (str, list),
    "stream": bool,
    "temperature": NUMBER,
    "tools": list,
    "top_p": NUMBER,
}
# Fields that only the server may set: image sizes, templates and configurations.
OWN_FIELDS = ("chat_template", "generation_config", "mm_processor_kwargs", "media_io_kwargs")
ERROR_EVENT = b'data: {"error": "'


class Refusal(Exception):
    """The reason why a request is refused, with the HTTP status."""

    def __init__(self, reason: str, status: int = 400):
        super().__init__(reason)
        self.status = status


def refusal_response(error: Exception) -> JSONResponse:
    status = getattr(error, "status", 400)
    detail = {"message": str(error), "type": "invalid_request_error", "param": None, "code": status}
    return JSONResponse({"error": detail}, status)


@dataclass(frozen=True)
class Rules:
    """What clients of a server may do."""

    folder: str | None = None  # from which images may be read by path
    domains: tuple[str, ...] = ()  # hosts from which images may be fetched
    sizes: dict[str, int] | None = None  # to add to every request for vLLM, if they are not the released ones
    takes_pictures: bool = True
    takes_stop: bool = True  # transformers 5.24 fails on `stop` with image models
    starts_streams_early: bool = False  # whether the engine sends status 200 before it knows that it can answer

    def to_environment(self) -> dict[str, str]:
        return {RULES: json.dumps(asdict(self))}

    def check(self, path: str, data: bytes) -> bytes:
        """The body of a request, as the engine gets it. Raises a `Refusal` if it is not allowed or not valid."""
        try:
            body = parse_json(data)
        except ValueError as error:
            raise Refusal(f"The body {error}.") from None
        self._check_fields(body)
        if path == "/v1/completions":
            if not isinstance(body.get("prompt"), str) or not body["prompt"]:
                raise Refusal("`prompt` must be a non-empty string.")
            self._check_text(body["prompt"])
        else:
            self._check_messages(body.get("messages"))
            if self.sizes:
                body["mm_processor_kwargs"] = self.sizes
        return json.dumps(body).encode()

    def _check_fields(self, body: dict) -> None:
        for name in OWN_FIELDS:
            if body.get(name) is not None:
                raise Refusal(f"`{name}` can only be set by the server.")
        for name, kind in FIELDS.items():
            value = body.get(name)
            if value is None:
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                raise Refusal(f"`{name}` must be {' or '.join(k.__name__ for k in kinds)}, got {value!r:.100}.")
        for name in ("max_tokens", "max_completion_tokens"):
            if body.get(name) is not None and body[name] < 1:
                raise Refusal(f"`{name}` must be at least 1, got {body[name]}.")
        if not (body.get("temperature") or 0) >= 0:
            raise Refusal(f"`temperature` must not be negative, got {body['temperature']}.")
        if body.get("top_p") is not None and not 0 < body["top_p"] <= 1:
            raise Refusal(f"`top_p` must be above 0 and at most 1, got {body['top_p']}.")
        stops = body.get("stop") or []
        if not all(isinstance(text, str) and text for text in ([stops] if isinstance(stops, str) else stops)):
            raise Refusal("`stop` must be a non-empty string or a list of them.")
        if stops and not self.takes_stop:
            raise Refusal("This engine does not support `stop` for a model that takes images.")
        if unknown := sorted((body.get("chat_template_kwargs") or {}).keys() - {"enable_thinking"}):
            raise Refusal(f"`chat_template_kwargs` may only have `enable_thinking`, got {unknown!r:.100}.")
        for tool in body.get("tools") or []:
            if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
                raise Refusal("`tools` must be a list of objects with a `function`.")

    def _check_messages(self, messages: object) -> None:
        if not isinstance(messages, list) or not messages:
            raise Refusal("`messages` must be a list with at least one message.")
        for i, message in enumerate(messages):
            if not isinstance(message, dict) or message.get("role") not in ROLES:
                role = message.get("role") if isinstance(message, dict) else message
                raise Refusal(f"`messages[{i}]` must have a role of {', '.join(ROLES)}, got {role!r:.100}.")
            content = message.get("content")
            if content is None and not (message["role"] == "assistant" and message.get("tool_calls")):
                raise Refusal(f"`messages[{i}]` must have a `content`.")
            calls = message.get("tool_calls") or []
            if not isinstance(calls, list) or not all(
                isinstance(call, dict) and isinstance(call.get("function"), dict) and "arguments" in call["function"]
                for call in calls
            ):
                raise Refusal(f"`messages[{i}].tool_calls` must be a list of functions with arguments.")
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
                self._check_part(f"messages[{i}]", part)

    def _check_part(self, where: str, part: object) -> None:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind == "text" and isinstance(part.get("text"), str):
            self._check_text(part["text"])
            return
        image = part.get("image_url") if kind == "image_url" else None
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise Refusal(f"`{where}.content` must list parts with a `text` or an `image_url`, got {part!r:.100}.")
        if not self.takes_pictures:
            raise Refusal("This model does not take images.")
        part.clear()
        part.update(type="image_url", image_url={"url": self._check_picture(url)})

    @staticmethod
    def _check_text(text: str) -> None:
        if "<im_patch>" in text:
            raise Refusal("Text must not contain <im_patch>; send images as `image_url`.")

    def _check_picture(self, url: str) -> str:
        """The URL that the engine gets: a `data:` URL or one on an allowed host."""
        scheme = urlsplit(url[:2000]).scheme
        if scheme in ("http", "https"):
            if urlsplit(url).hostname not in self.domains:
                raise Refusal(f"Images are not fetched from {urlsplit(url).hostname!r:.100}; send a data: URL.")
            return url
        if scheme == "data":
            try:
                head, picture = url.partition(",")[0], picture_of(url)
            except ValueError as error:
                raise Refusal(f"An image cannot be read: {error}.") from None
        elif self.folder is not None and scheme in ("", "file"):
            path = Path(unquote(urlsplit(url).path) if scheme else url)
            head, picture = "data:image/png;base64", self._read(path)
        else:
            raise Refusal(f"An image must be a data: URL (data:image/png;base64,...), got {url!r:.100}.")
        check_size(picture)
        return f"{head},{base64.b64encode(picture).decode()}"

    def _read(self, path: Path) -> bytes:
        home = Path(self.folder).resolve()
        # The same message for missing files and files elsewhere, so as not to reveal which exist.
        refused = Refusal(f"There is no image {str(path)!r:.100} in the directory that images are read from.")
        try:
            path = (home / path).resolve(strict=True)
            if not path.is_relative_to(home) or not path.is_file() or path.stat().st_size > MAX_BODY:
                raise refused
            return path.read_bytes()
        except (OSError, ValueError):  # ValueError: a null character in the name
            raise refused from None


def check_size(picture: bytes) -> None:
    """Raises a `Refusal` if an image file is not readable or has too many pixels."""
    try:
        with Image.open(BytesIO(picture), formats=FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise Refusal(f"The image must be one of {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise Refusal(str(error), 413) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Refusal(f"The image cannot be read: {error}") from None
    shorter, longer = sorted((width, height))
    is_padded = shorter < MIN_SIDE and longer > MAX_PADDED_RATIO * shorter
    if max(width * height, is_padded * longer**2) > MAX_PIXELS:
        padded = ", padded to a square," if is_padded else ""
        raise Refusal(f"An image{padded} must have at most {MAX_PIXELS} pixels, got {width} x {height}.", 413)


class RequestGuard:
    """The middleware. It reads its rules from the environment."""

    def __init__(self, app):
        self.app = app
        self.rules = Rules(**json.loads(os.environ.get(RULES, "{}")))

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        try:
            if scope["type"] != "http" or path not in (ASKED if scope["method"] == "POST" else READ):
                raise Refusal(f"This server answers POST to {', '.join(ASKED)} and GET to {', '.join(READ)}.", 404)
            if scope["method"] == "POST":
                body = await asyncio.to_thread(self.rules.check, path, await read_body(receive))
                headers = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-type")]
                headers += [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
                scope, receive = {**scope, "headers": headers}, replay(body, receive)
        except Refusal as error:
            await refusal_response(error)(scope, receive, send)
            return
        if self.rules.starts_streams_early:
            send = hold_start(scope, receive, send)
        await self.app(scope, receive, send)


async def read_body(receive) -> bytes:
    body = bytearray()
    async for part in parts_of(receive):
        body += part
        if len(body) > MAX_BODY:
            raise Refusal(f"A request must have at most {MAX_BODY} bytes.", 413)
    return bytes(body)


async def parts_of(receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


def replay(body: bytes, receive):
    """A `receive` that returns the body first, and then the original messages, such as a disconnect."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> dict:
        return waiting.pop() if waiting else await receive()

    return receive_again


def hold_start(scope, receive, send):
    """A `send` that holds back a stream until its second part, and sends a 400 instead if that is an error."""
    held, is_refused = [], False

    async def send_held(message: dict) -> None:
        nonlocal is_refused
        if is_refused:
            return
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] == 200 and kind.startswith(b"text/event-stream"):
                held.append(message)
                return
        elif len(held) == 1 and message.get("more_body"):
            held.append(message)
            return
        elif held:
            text = message.get("body", b"")
            if text.startswith(ERROR_EVENT):
                is_refused = True
                reason = text[len(ERROR_EVENT) :].decode().rstrip().removesuffix('"}')
                await refusal_response(Refusal(reason))(scope, receive, send)
                return
            for waiting in held:
                await send(waiting)
            held.clear()
        await send(message)

    return send_held


def serve_with_transformers() -> None:
    """Runs transformers' command line with Step3 registered and the guard in front of its server."""
    import transformers
    import uvicorn
    from jinja2 import TemplateError
    from transformers.cli.transformers import main

    import step3_vl  # registers Step3-VL with the Auto classes
    from step3_vl.processing_step3 import RESPONSE_TEMPLATE

    async def answer(request, error: Exception) -> JSONResponse:
        return refusal_response(error)

    class GuardedConfig(uvicorn.Config):
        def __init__(self, app, **options):
            # Raised by the processor and `generate` for invalid arguments.
            for kind in (ValueError, OSError, TemplateError, Image.DecompressionBombError):
                app.add_exception_handler(kind, answer)
            app.add_middleware(RequestGuard)
            super().__init__(app, **options)

    uvicorn.Config = GuardedConfig
    # With this template the server extracts tool calls and reasoning; without it they stay in the text.
    templates = getattr(import_module("transformers.cli.serving.utils"), "_RESPONSE_TEMPLATE_FALLBACKS", {})
    templates["step3_vl", "step3_text"] = RESPONSE_TEMPLATE
    transformers.Step3TextForCausalLM = step3_vl.Step3TextForCausalLM  # the server looks up a text model's class here
    main()


if __name__ == "__main__":
    serve_with_transformers()
