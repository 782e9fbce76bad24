"""
Checks what clients ask of a serving engine: the fields of a request, its text and its images.

Raises an `HTTPException` with the reason for what the engine cannot answer or what clients may not ask. What passes is
built anew from the fields below, so that nothing else reaches an engine.
"""

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import anyio
from files import picture_of
from huggingface_hub.utils import httpx
from openai.types import chat
from openai.types.chat.completion_create_params import ResponseFormat
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field, Json, PlainSerializer, ValidationError, WrapValidator, model_validator
from starlette.exceptions import HTTPException


# The limits of one request: bytes of its body and of the images that it names, and pixels of all its images.
MAX_BODY, MAX_PIXELS = 64 * 2**20, 2**26
MAX_MESSAGES, MAX_PICTURES, MAX_PROMPTS, MAX_ANSWERS = 1000, 64, 128, 16
# The values of a request's JSON, which take up to a hundred times as much memory as its bytes.
MAX_VALUES = 2**18
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


class Strict(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """Has the fields below alone, with their types."""


Part = Annotated[
    chat.ChatCompletionContentPartTextParam | chat.ChatCompletionContentPartImageParam, Field(discriminator="type")
]
# Checked, but left as it is, because the order of its keys is the model's to read.
Tool = Annotated[
    chat.ChatCompletionToolParam, WrapValidator(lambda tool, check: check(tool) and tool), PlainSerializer(dict)
]
Count = Annotated[int, Field(ge=1, le=2**24)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Text = Annotated[str, Field(min_length=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Prompts = Annotated[list[Text] | list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]


class Function(BaseModel):
    name: str
    arguments: Json[dict[str, Any]]


class Call(BaseModel):
    id: str
    type: Literal["function"]
    function: Function


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    # The chat template has no place for these, which clients send back as they received them.
    name: str | None = Field(None, exclude=True)
    refusal: None = Field(None, exclude=True)
    audio: None = Field(None, exclude=True)
    function_call: None = Field(None, exclude=True)
    annotations: Any = Field(None, exclude=True)

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
    stream_options: chat.ChatCompletionStreamOptionsParam | None = None
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**24)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[int, Bias] | None = Field(None, max_length=1000)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    # A name for the service that the API was made for. It has no effect on an answer, nor have those of `Chat`.
    user: str | None = Field(None, exclude=True)


class Chat(Sampling):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = None
    tool_choice: chat.ChatCompletionToolChoiceOptionParam | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool] | None = None
    metadata: dict[str, str] | None = Field(None, exclude=True)
    prompt_cache_key: str | None = Field(None, exclude=True)
    safety_identifier: str | None = Field(None, exclude=True)
    service_tier: Literal["auto", "default"] | None = Field(None, exclude=True)
    store: Literal[False] | None = Field(None, exclude=True)


class Completion(Sampling):
    prompt: Text | TokenIds | Prompts
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

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
    `max_completion_tokens` is `max_tokens`. Raises an `HTTPException` for a wrong type, an unknown field or no JSON.
    """
    if data.count(b",") >= MAX_VALUES:
        raise HTTPException(413, f"A request must have at most {MAX_VALUES} values.")
    try:
        request = ROUTES[path].model_validate_json(data)
    except ValidationError as error:
        # What lies above the deepest are other branches of the same union.
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        depth = max(len(entry["loc"]) for entry in errors)
        errors = [entry for entry in errors if len(entry["loc"]) == depth]
        names = [str(name) for name in errors[0]["loc"] if str(name).replace("_", "").isalnum()]
        where = ".".join(name for name in names if name not in ("str", "int")) or "The request"
        raise HTTPException(400, f"`{where}`: {'; or: '.join(entry['msg'] for entry in errors):.500}.") from None
    body = request.model_dump(exclude_none=True)
    return body | ({"max_tokens": body.pop("max_completion_tokens")} if "max_completion_tokens" in body else {})


def texts_of(body: dict) -> list[str]:
    """
    The text of each prompt, or of a conversation, where texts that the chat template joins are joined. Raises a
    `ValueError` if a number is not finite.
    """
    if "prompt" in body:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    contents = [message.get("content", "") for message in body["messages"]]
    texts = [text if isinstance(text, str) else "".join(part.get("text", "") for part in text) for text in contents]
    others = [{name: value for name, value in message.items() if name != "content"} for message in body["messages"]]
    others += [body.get("tools"), body.get("response_format")]
    return ["\n".join([*texts, json.dumps(others, ensure_ascii=False, allow_nan=False)])]


def check_text(body: dict, engine) -> None:
    """
    Raises an `HTTPException` if a text is too long for the engine's model, or holds a token that only the chat template
    may write. Prompts, which have no chat template, may hold special tokens, but not the one for an image.
    """
    try:
        texts = texts_of(body)
    except ValueError as error:
        raise HTTPException(400, f"{error}.") from None
    if (longest := max(map(len, texts), default=0)) > engine.context * MAX_CHARACTERS_PER_TOKEN:
        raise HTTPException(400, f"{longest} characters are too long for the context of {engine.context} tokens.")
    prompts = body["prompt"] if isinstance(body.get("prompt"), list) else []
    ids = {entry for prompt in prompts for entry in (prompt if isinstance(prompt, list) else [prompt])}
    for mark, number in engine.special_tokens.items():
        is_forbidden = mark == engine.image_token or "messages" in body
        if is_forbidden and (number in ids or any(mark in text for text in texts)):
            raise HTTPException(400, f"Text must not contain the special token {mark}.")


@dataclass(frozen=True)
class Pictures:
    """Where images may come from: data: URLs, and files in `folder` and addresses on `hosts`, if they are allowed."""

    folder: Path | None = None
    hosts: tuple[str, ...] = ()

    async def inline(self, messages: list[dict], hold: Callable[[int], None]) -> int:
        """
        Replaces each image's URL with a data: URL. Returns the number of pixels. `hold` is told the bytes that are read
        from elsewhere. Raises an `HTTPException` if the images together are too many or too large, before one is
        decoded.
        """
        contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
        parts = [part["image_url"] for content in contents for part in content if part["type"] == "image_url"]
        if len(parts) > MAX_PICTURES:
            raise HTTPException(413, f"A request must have at most {MAX_PICTURES} images, got {len(parts)}.")
        pixels = 0
        for part in parts:
            picture, scheme = part["url"], part["url"].partition(":")[0].lower()
            if scheme in ("http", "https"):
                picture = await self._fetch(picture, hold)
            elif scheme != "data":
                path = await anyio.to_thread.run_sync(self._find, picture)
                hold(path.stat().st_size)
                picture = await anyio.to_thread.run_sync(path.read_bytes)
            url, size = await anyio.to_thread.run_sync(measure, picture)
            pixels += size
            if pixels > MAX_PIXELS:
                raise HTTPException(413, f"The images, padded to squares if narrow, have over {MAX_PIXELS} pixels.")
            part.clear()
            part["url"] = url
        return pixels

    async def _fetch(self, url: str, hold: Callable[[int], None]) -> bytes:
        picture = bytearray()
        try:
            address = httpx.URL(url)
            if address.host not in self.hosts:
                raise HTTPException(400, f"Images are not fetched from {address.host!r:.100}; send a data: URL.")
            with anyio.fail_after(FETCH_SECONDS):
                async with (
                    httpx.AsyncClient(headers={"Accept-Encoding": "identity"}) as client,
                    client.stream("GET", address) as response,
                ):
                    if response.status_code != 200:  # redirects are not followed
                        raise HTTPException(400, f"{url!r:.200} answered with status {response.status_code}.")
                    async for part in response.aiter_raw():
                        hold(len(part))
                        picture += part
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as error:
            raise HTTPException(400, f"{url!r:.200} cannot be fetched: {error or type(error).__name__}") from None
        return bytes(picture)

    def _find(self, url: str) -> Path:
        if self.folder is None:
            raise HTTPException(400, f"An image must be a data: URL (data:image/png;base64,...), got {url!r:.100}.")
        home = self.folder.resolve()
        try:
            name = unquote(urlsplit(url).path) if url[:5].lower() == "file:" else url
            path = (home / name).resolve(strict=True)
            if path.is_relative_to(home) and path.is_file():
                return path
        except (OSError, ValueError, RuntimeError):  # also a null character in the name, or links in a circle
            pass
        # The same message for missing files and files elsewhere, so as not to reveal which exist.
        raise HTTPException(400, f"There is no image {url!r:.100} in the directory that images are read from.")


def measure(picture: bytes | str) -> tuple[str, int]:
    """An image file or data: URL as a data: URL, and its number of pixels after padding, without decoding it."""
    try:
        data = picture_of(picture) if isinstance(picture, str) else picture
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            shorter, longer = sorted(image.size)
            is_padded = shorter < MIN_SIDE and longer > MAX_PADDED_RATIO * shorter
            url = f"data:{Image.MIME[image.format]};base64,{base64.b64encode(data).decode()}"
            return url, longer * (longer if is_padded else shorter)
    except UnidentifiedImageError:
        raise HTTPException(400, f"The image must be one of {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError as error:
        raise HTTPException(413, str(error)) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise HTTPException(400, f"The image cannot be read: {error}") from None
