"""
Checks what clients ask of a serving engine: the fields of a request, its text and its images.

Raises a `Refusal` with the reason and an HTTP status for what the engine cannot answer or what clients may not ask.
What passes is built anew from the fields below, so that nothing else reaches an engine.
"""

import base64
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import anyio
from files import picture_of
from huggingface_hub.utils import httpx
from openai.types.chat import (
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionMessageToolCallParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionToolChoiceOptionParam,
    ChatCompletionToolParam,
)
from openai.types.chat.completion_create_params import ResponseFormat
from PIL import Image, UnidentifiedImageError
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import from_json


# The limits of one request: bytes of its body and of its images, and pixels of all its images.
MAX_BODY, MAX_PIXELS = 64 * 2**20, 2**26
MAX_MESSAGES, MAX_PICTURES, MAX_PROMPTS, MAX_ANSWERS = 1000, 64, 128, 16
# Characters per token of the context. Longer texts are refused before they are tokenised.
MAX_CHARACTERS_PER_TOKEN = 8
# Seconds in which an image must be fetched.
FETCH_SECONDS = 20
# The formats that Pillow reads without other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# How errors start that are not the client's fault, in a stream, where there is no HTTP status.
FAILED = "The model failed"
Image.init()  # registers all formats
# Images with a smaller side and a larger aspect ratio are padded to a square.
MIN_SIDE, MAX_PADDED_RATIO = 32, 4


class Refusal(Exception):
    """The reason why a request is refused, with the HTTP status and headers."""

    def __init__(self, reason: str, status: int = 400, **headers: str):
        super().__init__(reason)
        self.status, self.headers = status, headers

    @property
    def body(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


Part = Annotated[ChatCompletionContentPartTextParam | ChatCompletionContentPartImageParam, Field(discriminator="type")]
# Checked, but left as it is, because the order of its keys is the model's to read.
Tool = Annotated[
    ChatCompletionToolParam, WrapValidator(lambda tool, check: check(tool) and tool), PlainSerializer(dict)
]
Count = Annotated[int, Field(ge=1, le=2**24)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Call(ChatCompletionMessageToolCallParam, total=False):
    index: int  # of the parts of a stream, which clients send back


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # The chat template has no place for these, which clients send back as they received them.
    name: Annotated[str | None, Field(exclude=True)] = None
    refusal: Annotated[None, Field(exclude=True)] = None
    audio: Annotated[None, Field(exclude=True)] = None
    function_call: Annotated[None, Field(exclude=True)] = None
    annotations: Annotated[Any, Field(exclude=True)] = None

    @field_validator("tool_calls")
    @classmethod
    def parse_arguments(cls, calls: list[dict] | None) -> list[dict] | None:
        for call in calls or []:
            arguments = from_json(call["function"]["arguments"], allow_inf_nan=False)
            if not isinstance(arguments, dict):
                raise ValueError("the arguments of a tool call must be a JSON object")
            call["function"]["arguments"] = arguments
            call.pop("index", None)
        return calls

    @model_validator(mode="after")
    def check_content(self):
        others = self.tool_calls or self.reasoning_content or self.reasoning
        if self.content is None and not (self.role == "assistant" and others):
            raise ValueError("a message must have a `content`")
        return self


class Sampling(Strict):
    """The fields that both routes share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: ChatCompletionStreamOptionsParam | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**24)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1000)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    # Names for the service that the API was made for. They have no effect on an answer.
    user: Annotated[str | None, Field(exclude=True)] = None


class Chat(Sampling):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    tools: list[Tool] | None = None
    tool_choice: ChatCompletionToolChoiceOptionParam | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool] | None = None
    metadata: Annotated[dict[str, str] | None, Field(exclude=True)] = None
    prompt_cache_key: Annotated[str | None, Field(exclude=True)] = None
    safety_identifier: Annotated[str | None, Field(exclude=True)] = None
    service_tier: Annotated[Literal["auto", "default"] | None, Field(exclude=True)] = None
    store: Annotated[Literal[False] | None, Field(exclude=True)] = None


class Completion(Sampling):
    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def check_number(self):
        is_list = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        if is_list and len(self.prompt) * (self.n or 1) > MAX_PROMPTS:
            raise ValueError(f"`prompt` times `n` must be at most {MAX_PROMPTS}")
        return self


ROUTES = {"/v1/chat/completions": Chat, "/v1/completions": Completion}


def parse(path: str, data: bytes) -> dict:
    """
    The fields of a request that are not null, by their names. The arguments of tool calls are objects, and
    `max_completion_tokens` is `max_tokens`. Raises a `Refusal` for a wrong type, an unknown field or no JSON.
    """
    try:
        request = ROUTES[path].model_validate_json(data)
    except ValidationError as error:
        raise Refusal(describe(error)) from None
    fields = request.model_dump(exclude_unset=True, warnings=False)  # a call's arguments are no longer text
    body = {name: value for name, value in fields.items() if value is not None}
    return body | ({"max_tokens": body.pop("max_completion_tokens")} if "max_completion_tokens" in body else {})


def describe(error: ValidationError) -> str:
    """The errors that lie deepest in a request, because what lies above are other branches of the same union."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    depth = max(len(entry["loc"]) for entry in errors)
    deepest = [entry for entry in errors if len(entry["loc"]) == depth]
    names = [str(name) for name in deepest[0]["loc"] if str(name).replace("_", "").isalnum()]
    where = ".".join(name for i, name in enumerate(names) if name not in ("str", "int", *names[i - 1 : i]))
    reasons = "; or: ".join(dict.fromkeys(entry["msg"] for entry in deepest))
    return f"`{where}`: {reasons:.500}." if where else f"{reasons:.500}."


def text_of(body: dict) -> str:
    """All text of a request, where texts that the chat template joins are joined."""
    if "prompt" in body:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return "\n".join(prompt for prompt in prompts if isinstance(prompt, str))
    pieces = [json.dumps(body.get("tools"), ensure_ascii=False)]
    for message in body["messages"]:
        content = message.get("content") or ""
        pieces.append(content if isinstance(content, str) else "".join(part.get("text", "") for part in content))
        others = {name: value for name, value in message.items() if name != "content"}
        pieces.append(json.dumps(others, ensure_ascii=False))
    return "\n".join(pieces)


def check_text(body: dict, engine) -> None:
    """
    Raises a `Refusal` if a text is too long for the engine's model, or holds a token that only the chat template may
    write. Prompts, which have no chat template, may hold special tokens, but not the one for an image.
    """
    text, prompts = text_of(body), body["prompt"] if isinstance(body.get("prompt"), list) else []
    if len(text) > engine.context * MAX_CHARACTERS_PER_TOKEN * max(len(prompts), 1):
        raise Refusal(f"{len(text)} characters are too long for the context of {engine.context} tokens.")
    marks = [engine.image_token or ""] if "prompt" in body else engine.special_tokens
    found = next((mark for mark in marks if mark and mark in text), None)
    image_id = engine.special_tokens.get(engine.image_token)
    if any(image_id == entry or (isinstance(entry, list) and image_id in entry) for entry in prompts):
        found = engine.image_token
    if found:
        raise Refusal(f"Text must not contain the special token {found}.")


@dataclass(frozen=True)
class Pictures:
    """Where images may come from: data: URLs, and files in `folder` and addresses on `hosts`, if they are allowed."""

    folder: Path | None = None
    hosts: tuple[str, ...] = ()

    async def inline(self, messages: list[dict]) -> int:
        """
        Replaces each image's URL with a data: URL. Returns the number of pixels. Raises a `Refusal` if the images
        together are too many or too large, before one is decoded.
        """
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        parts = [part["image_url"] for content in contents for part in content if part["type"] == "image_url"]
        if len(parts) > MAX_PICTURES:
            raise Refusal(f"A request must have at most {MAX_PICTURES} images, got {len(parts)}.", 413)
        pixels, room = 0, MAX_BODY
        for part in parts:
            if part["url"][:8].lower().startswith(("http://", "https://")):
                picture = await self._fetch(part["url"], room)
            else:
                picture = await anyio.to_thread.run_sync(self._read, part["url"], room)
            kind, size = await anyio.to_thread.run_sync(measure, picture)
            pixels, room = pixels + size, room - len(picture)
            if pixels > MAX_PIXELS:
                raise Refusal(f"The images, padded to squares if narrow, have over {MAX_PIXELS} pixels.", 413)
            part.clear()
            part["url"] = f"data:{kind};base64,{base64.b64encode(picture).decode()}"
        return pixels

    async def _fetch(self, url: str, room: int) -> bytes:
        picture = bytearray()
        try:
            address = httpx.URL(url)
            if address.host not in self.hosts:
                raise Refusal(f"Images are not fetched from {address.host!r:.100}; send a data: URL.")
            with anyio.fail_after(FETCH_SECONDS):
                async with (
                    httpx.AsyncClient(headers={"Accept-Encoding": "identity"}) as client,
                    client.stream("GET", address) as response,
                ):
                    if response.status_code != 200:  # redirects are not followed
                        raise Refusal(f"{url!r:.200} answered with status {response.status_code}.")
                    async for part in response.aiter_raw():
                        picture += part
                        if len(picture) > room:
                            raise Refusal(f"The images have more than {MAX_BODY} bytes.", 413)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as error:
            raise Refusal(f"{url!r:.200} cannot be fetched: {error or type(error).__name__}") from None
        return bytes(picture)

    def _read(self, url: str, room: int) -> bytes:
        scheme = url[:5].lower()
        if scheme == "data:":
            try:
                return picture_of(url)
            except ValueError as error:
                raise Refusal(f"An image cannot be read: {error}.") from None
        if self.folder is None:
            raise Refusal(f"An image must be a data: URL (data:image/png;base64,...), got {url!r:.100}.")
        home = self.folder.resolve()
        # The same message for missing files and files elsewhere, so as not to reveal which exist.
        refused = Refusal(f"There is no image {url!r:.100} in the directory that images are read from.")
        try:
            path = (home / (unquote(urlsplit(url).path) if scheme == "file:" else url)).resolve(strict=True)
            if not path.is_relative_to(home) or not path.is_file():
                raise refused
            if path.stat().st_size > room:
                raise Refusal(f"The images have more than {MAX_BODY} bytes.", 413)
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError):  # also a null character in the name, or links in a circle
            raise refused from None


def measure(picture: bytes) -> tuple[str, int]:
    """The media type of an image file and its number of pixels after padding, without decoding it."""
    try:
        with Image.open(BytesIO(picture), formats=FORMATS) as image:
            shorter, longer = sorted(image.size)
            is_padded = shorter < MIN_SIDE and longer > MAX_PADDED_RATIO * shorter
            return Image.MIME[image.format], longer * (longer if is_padded else shorter)
    except UnidentifiedImageError:
        raise Refusal(f"The image must be one of {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise Refusal(str(error), 413) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise Refusal(f"The image cannot be read: {error}") from None
