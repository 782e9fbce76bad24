"""Reads conversations with images in the forms that people have, and checks all of them.

A file is JSONL, a JSON array or Parquet; a directory is one that `datasets` saved, or holds Parquet or JSONL files of
one split. The keys of a row tell its form:

messages        OpenAI, ms-swift, TRL: `{"messages": [{"role": "user", "content": ...}, ...], "images": [...]}`
conversations   ShareGPT, LLaVA: `{"conversations": [{"from": "human", "value": ...}, ...], "image": ...}`
instruction     Alpaca: `{"instruction": ..., "input": ..., "output": ..., "history": [[question, answer], ...]}`
query           ms-swift: `{"query": ..., "response": ..., "history": ...}`
prompt          TRL: `{"prompt": ..., "completion": ...}`, each a text or a list of messages
chosen          TRL: `{"chosen": [...], "rejected": [...]}`, two conversations that differ in their last message

Rows of any form may have `images`, `tools`, `label`, and a worse answer: `rejected`, beside `chosen` instead of an
answer, or `rejected_response`. Content is text, in which `<image>` stands for the next of `images`, or a list of parts.
"""

import base64
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from files import parse_json, picture_of, shown, write_json
from huggingface_hub.constants import HF_HOME
from PIL import Image

from step3_vl import Step3VLImageProcessor, Step3VLProcessor


# Placeholders for images in texts: the one of other formats and the model's own.
IMAGE_TOKEN = Step3VLProcessor.image_token
MARK = re.compile(f"<image>|{re.escape(IMAGE_TOKEN)}")
# Placeholders in other formats for media that Step3 does not support.
OTHER_MARK = re.compile("<(?:video|audio)>")
# The keys that are read: of each form, whose first tells it, and of all forms. `id` and what only repeats the order of
# calls is ignored. Other keys are errors, because their content would be lost.
FORMS = {
    "messages": ("system",),
    "conversations": ("system",),
    "instruction": ("input", "output", "system", "history"),
    "query": ("response", "system", "history"),
    "prompt": ("completion",),
    "chosen": (),
}
ROW_KEYS = ("images", "image", "tools", "label", "chosen", "rejected", "rejected_response", "id")
MESSAGE_KEYS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content", "reasoning", "tool_calls", "weight", "loss"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
CALL_KEYS = ("id", "type", "index", "function", "name", "arguments")
# What other forms call keys and roles.
KEY_NAMES = {"from": "role", "value": "content"}
ROLE_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
CALL_ROLES = ("function_call", "tool_call")  # an assistant's message that is a call in JSON
MAX_SHOWN = 20  # errors; the others are counted

# Where the sizes of images that were read once are remembered, by path and time of the last change.
SIZES = Path(HF_HOME) / "step3_vl" / "picture_sizes.json"


class BadData(Exception):
    """Everything that is wrong with the data, as pairs of a place and an error; its text has the first 20."""

    def __init__(self, faults: list[tuple[str, str]]):
        rest = len(faults) - MAX_SHOWN
        lines = [f"{place}: {text}" for place, text in faults[:MAX_SHOWN]] + [f"and {rest} more"] * (rest > 0)
        super().__init__("\n".join(["the data has errors, so nothing was started:", *lines]))


@dataclass(frozen=True)
class Conversation:
    """The conversation in one row."""

    place: str  # file, and number of the line or row
    messages: list[dict]  # for `apply_chat_template`
    images: list[str]  # path or data URI of the image for each part of type "image"
    learned: list[bool]  # for each message, whether it is trained on
    tools: list[dict] | None = None  # for `apply_chat_template`
    rejected: dict | None = None  # an answer that is worse than the last message
    label: bool | None = None  # whether the last message is a good answer
    id: object = None  # what the row has under this name


def check_keys(value: dict, known: tuple[str, ...]) -> None:
    """Raises a `ValueError` if keys other than `known` have content."""
    lost = [key for key, entry in value.items() if key not in known and entry not in (None, "", [], {})]
    if lost:
        raise ValueError(f"has {', '.join(map(shown, lost))}, and only {', '.join(known)} are supported")


def find_picture(reference: object, folder: Path) -> str:
    """
    The path of an image, given as a path from `folder` or the working directory, as a `file:` URI, or as an object with
    its path or bytes. A `data:` URI is returned as it is. Raises a `ValueError` for anything else, or if there is no
    such file.
    """
    if isinstance(reference, dict):
        check_keys(reference, ("bytes", "path", "url"))
        key = next((key for key in ("bytes", "path", "url") if reference.get(key)), None)
        is_base64 = key == "bytes" and isinstance(reference[key], str)
        reference = f"data:image/;base64,{reference[key]}" if is_base64 else reference.get(key)
    if isinstance(reference, bytes):
        return f"data:image/;base64,{base64.b64encode(reference).decode()}"
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"an image must be a path, a data URI, or an object with either, got {shown(reference)}")
    if reference.startswith("data:"):
        picture_of(reference)
        return reference
    if reference.startswith(("http://", "https://")):
        raise ValueError(f"images must be on this machine, got {shown(reference)}: download it first")
    path = unquote(urlsplit(reference).path) if reference.startswith("file://") else reference
    try:
        for base in (folder, Path()):
            if (base / path).is_file():  # not a pipe or device, which might block
                return str(base / path)
    except (OSError, ValueError) as error:  # an impossible file name
        raise ValueError(f"there is no image at {shown(reference)}: {error}") from None
    raise ValueError(f"there is no image at {shown(reference)}")


def read_part(part: object) -> str | dict:
    """
    A part of a message: text, or `{"image": reference}` with `None` for the next of `images`. Raises a `ValueError` if
    it is something else or has other content.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        check_keys(part, ("type", "text"))
        return part["text"]
    if kind not in ("image", "image_url"):
        raise ValueError(f'a part must be of the type "text", "image" or "image_url" and complete, got {shown(part)}')
    check_keys(part, ("type", *PICTURE_KEYS))
    keys = [key for key in PICTURE_KEYS if part.get(key) is not None]
    if len(keys) > 1 or (kind == "image_url" and not keys):
        raise ValueError(f"a part must have one image, got {' and '.join(keys) or 'none'}")
    reference = part[keys[0]] if keys else None
    return {"image": {"bytes": reference} if keys in (["base64"], ["bytes"]) else reference}


def read_content(content: object) -> list[str | dict]:
    """
    A message's texts and images, as `read_part` returns them. Placeholders in texts become images. Raises a
    `ValueError` if the content is not valid.
    """
    if not isinstance(content, (str, list)):
        raise ValueError(f"`content` must be text or a list of parts, got {shown(content)}")
    pieces = []
    # Join adjacent texts, as the chat template does: a placeholder or a token may span two of them.
    for kind, parts in groupby([content] if isinstance(content, str) else map(read_part, content), type):
        if kind is dict:
            pieces += parts
            continue
        text = "".join(parts)
        check_text(text)
        if mark := OTHER_MARK.search(text):
            raise ValueError(f"has {mark[0]} in its text, and only images are supported")
        first, *others = MARK.split(text)
        pieces += [first, *(piece for text in others for piece in ({"image": None}, text))]
    return [piece for piece in pieces if piece != ""]


def check_text(text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"must be a text, got {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair in its text") from None


def from_json(value: object, what: str) -> object:
    """A value that may be given as JSON text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError(f"{what} must be JSON, got {shown(value)}") from None


def read_calls(value: object) -> list[dict]:
    """Calls of tools, as the chat template takes them. Raises a `ValueError` if they are not valid."""
    value, read = from_json(value, "a tool call"), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call must have a `name` and `arguments`, got {shown(call)}")
        for part in (call, function):
            check_keys(part, CALL_KEYS)
        arguments = from_json(function.get("arguments") or {}, "`arguments`")
        if not isinstance(arguments, dict):
            raise ValueError(f"`arguments` must be an object, got {shown(arguments)}")
        read.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return read


def read_tools(value: object) -> list[dict] | None:
    """The tools of a conversation, given as a list or as JSON. Raises a `ValueError` if they are not valid."""
    tools = from_json(value or None, "`tools`")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"`tools` must be a list of objects, got {shown(tools)}")
    return tools


def rename(messages: object, name: str) -> list[dict]:
    """Messages with the names of keys and roles that the chat template takes. A call in JSON becomes a `tool_calls`."""
    if not isinstance(messages, list):
        raise ValueError(f"`{name}` must be a list with at least one message, got {shown(messages)}")
    renamed = []
    for number, message in enumerate(messages, 1):
        if isinstance(message, dict) and "role" not in message:
            message = {KEY_NAMES.get(key, key): value for key, value in message.items()}
        role = message.get("role") if isinstance(message, dict) else None
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else None
        if role not in (*MESSAGE_KEYS, *CALL_ROLES):
            got = shown(message.get("role") if isinstance(message, dict) else message)
            raise ValueError(f"message {number}: the role must be {', '.join(MESSAGE_KEYS)}, got {got}")
        if role in CALL_ROLES:
            check_keys(message, ("role", "content"))
            calls = read_calls(message.get("content"))
            last = renamed.pop() if renamed and renamed[-1]["role"] == "assistant" else {"role": "assistant"}
            message = {**last, "tool_calls": [*(last.get("tool_calls") or []), *calls]}
        else:
            message = {**message, "role": role}
        renamed.append(message)
    return renamed


def turns(pairs: object) -> list[dict]:
    """The messages of questions and answers in pairs. Raises a `ValueError` if they are not pairs."""
    messages, pairs = [], [] if pairs is None else pairs
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"`history` must be a list of pairs of texts, got {shown(pairs)}")
    for pair in pairs:
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def answers(value: object, name: str) -> list[dict]:
    """An answer, given as text, as a message or as messages."""
    value = {"role": "assistant", "content": value} if isinstance(value, str) else value
    return rename([value] if isinstance(value, dict) else value, name)


def read_form(row: dict) -> tuple[list[dict], list[dict] | None, bool]:
    """
    The messages of a row of any form, the worse answer if there is one, and whether images may be without placeholders.
    Raises a `ValueError` if the row is of no form or has keys of another.
    """
    form = next((form for form in FORMS if row.get(form) is not None), None)
    if form is None:
        raise ValueError(f"has none of {', '.join(FORMS)}")
    check_keys(row, (form, *FORMS[form], *ROW_KEYS))
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if form in ("messages", "conversations"):
        messages = rename(row[form], form)
    elif form in ("instruction", "query"):
        question = row[form]
        if row.get("input"):
            for text in (question, row["input"]):
                check_text(text)
            question = f"{question}\n{row['input']}"
        messages = [*turns(row.get("history")), {"role": "user", "content": question}]
    elif form == "prompt":
        prompt = row["prompt"]
        messages = rename([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, "prompt")
    else:
        messages = []
    messages = system + messages
    given = [name for name in ("output", "response", "completion", "chosen") if row.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"has {' and '.join(given)}, which are two answers")
    rejected = next((name for name in ("rejected", "rejected_response") if row.get(name) is not None), None)
    if rejected is None:
        if given == ["chosen"]:
            raise ValueError("has `chosen` without `rejected`")
        return messages + [message for name in given for message in answers(row[name], name)], None, form == "prompt"

    worse = answers(row[rejected], rejected)
    better = answers(row[given[0]], given[0]) if given else messages[-1:]
    messages = messages if given else messages[:-1]
    if form == "chosen":
        messages = [pair[0] for pair in takewhile(lambda pair: pair[0] == pair[1], zip(better, worse, strict=False))]
    better, worse = (x[len(messages) :] if x[: len(messages)] == messages else x for x in (better, worse))
    if [message["role"] for message in (*better, *worse)] != ["assistant", "assistant"]:
        raise ValueError("the better and the worse answer must each be one message of the assistant, after one prompt")
    return messages + better, worse, form in ("prompt", "chosen")


def is_weighted(message: dict) -> bool:
    """
    Whether an answer is trained on, which `weight` (OpenAI) or `loss` (ms-swift) may turn off. Raises a `ValueError` if
    either is not 0 or 1.
    """
    weights = [message[key] for key in ("weight", "loss") if message.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise ValueError(f"`weight` and `loss` must be 0 or 1, got {shown(weights)}")
    return all(weights)


def read_message(message: dict) -> tuple[dict, list]:
    """
    A message for `apply_chat_template`, and what its images refer to, `None` for the next of `images`. Raises a
    `ValueError` if it is not valid.
    """
    role = message["role"]
    check_keys(message, MESSAGE_KEYS[role])
    parts = {}
    if role == "assistant":
        parts = {name: message[name] for name in ("reasoning_content", "reasoning") if message.get(name)}
        if len(parts) > 1:
            raise ValueError("has `reasoning_content` and `reasoning`")
        for text in parts.values():
            check_text(text)
        if message.get("tool_calls"):
            parts["tool_calls"] = read_calls(message["tool_calls"])
    content = message.get("content")
    pieces = read_content("" if content is None and parts else content)
    references = [piece["image"] for piece in pieces if isinstance(piece, dict)]
    if references and role not in ("user", "tool"):
        raise ValueError("only messages of the user and of tools can have images or <image>")
    if role in ("user", "assistant") and not references and not parts and not "".join(pieces).strip():
        raise ValueError("is empty")
    content = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image"} for x in pieces]
    return {"role": role, "content": content, **parts}, references


def read_conversation(row: dict, folder: Path, place: str, needs_answer: bool) -> Conversation | list[str]:
    """The conversation in one row, without opening its images, or everything that is wrong with it."""
    faults = []
    try:
        rows, worse, is_loose = read_form(row)
        given = row.get("images") if row.get("images") is not None else row.get("image") or []
        if row.get("images") and row.get("image"):
            raise ValueError("has `images` and `image`")
        given = [given] if isinstance(given, (str, dict, bytes)) else given
        if not isinstance(given, list):
            raise ValueError(f"`images` must be a list, got {shown(given)}")
        tools, label = read_tools(row.get("tools")), row.get("label")
        if label is not None and not isinstance(label, bool):
            raise ValueError(f"`label` must be true or false, got {shown(label)}")
        if not rows:
            raise ValueError("`messages` must be a list with at least one message, got []")
    except ValueError as error:
        return [str(error)]

    messages, references, learned, expected = [], [], [], ("user",)
    for number, message in enumerate(rows + (worse or []), 1):
        role = message["role"]
        here = f"message {number} ({role})" if number <= len(rows) else "the worse answer"
        if number > len(rows):
            pass  # it has the place of the last message
        elif role == "system" and number > 1:
            faults.append(f"{here}: only the first message can be the system's")
        elif role != "system":
            if role not in expected:
                faults.append(f"{here}: it is the {' or '.join(expected)}'s turn")
            following = {"user": ("assistant",), "tool": ("tool", "assistant"), "assistant": ("user",)}
            expected = ("tool",) if message.get("tool_calls") else following[role]
        try:
            read, pictures = read_message(message)
            learned.append(role == "assistant" and is_weighted(message))
        except ValueError as error:
            faults.append(f"{here}: {error}")
            continue
        messages.append(read)
        references += pictures

    first = next((message for message in messages if message["role"] == "user"), None)
    if is_loose and first and given and not references and not faults:  # TRL puts them before the first question
        first["content"] = [{"type": "image"}] * len(given) + first["content"]
        references = [None] * len(given)
    if (num_marks := references.count(None)) != len(given):
        if not faults:
            faults.append(f"has {len(given)} in `images`, and {num_marks} placeholders such as <image>")
        references = [reference for reference in references if reference is not None]
    if needs_answer and "assistant" not in [message["role"] for message in rows]:
        faults.append("has no assistant's message to train on")
    elif needs_answer and rows[-1]["role"] != "assistant":
        faults.append(f"ends with the {rows[-1]['role']}'s message, which has no answer")
    elif needs_answer and not faults and not any(learned):
        faults.append("has no assistant's message with a weight other than 0")
    given, found = iter(given), []
    for reference in references:
        try:
            found.append(find_picture(next(given) if reference is None else reference, folder))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        return faults
    count = len(rows)
    return Conversation(
        place, messages[:count], found, learned[:count], tools, *messages[count:] or [None], label, row.get("id")
    )


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The JSON objects of a JSONL file or a JSON array, with the numbers of their lines."""
    with path.open("rb") as file:
        is_array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        file.seek(0)
        if not is_array:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, line
            return
        data = file.read()
    text = data.decode("utf-8-sig", "surrogateescape")  # `parse_json` reports bytes that are not UTF-8
    number, done, at = 1, 0, re.compile(r"\s*\[\s*").match(text).end()
    separator, decoder = re.compile(r"\s*(?:,\s*|(\])\s*\Z)"), json.JSONDecoder()
    if re.compile(r"\]\s*\Z").match(text, at):
        return
    while True:
        number, done = number + text.count("\n", done, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = len(text)
        yield number, text[at:end].encode("utf-8", "surrogateescape")
        following = separator.match(text, end)
        if following is None and end < len(text):
            yield number + text.count("\n", at, end), b"]"  # reported as not JSON
        if following is None or following[1]:
            return
        at = following.end()


def without_none(value: object) -> object:
    """A value without the entries that Arrow adds to objects that lack them."""
    if isinstance(value, dict):
        return {key: without_none(entry) for key, entry in value.items() if entry is not None}
    return [without_none(entry) for entry in value] if isinstance(value, list) else value


def read_rows(path: Path) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Each row's place, and a function that returns the row or raises a `ValueError`. Raises an `OSError` or
    `ValueError` if there is nothing that can be read."""
    if path.is_dir():
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            from datasets import Dataset, load_from_disk

            dataset = load_from_disk(str(path))
            if not isinstance(dataset, Dataset):
                raise ValueError(f"has the splits {', '.join(dataset)}: give the directory of one")
            batches = dataset.with_format("arrow").iter(1000)  # without decoding images
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}:{number}", partial(without_none, row)) for number, row in enumerate(rows, 1))
            return
        files = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl"))
        # Hidden ones are copies of editors and notebooks.
        files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if len({file.stem.split("-")[0] for file in files}) != 1:
            raise ValueError(f"must have Parquet or JSONL files of one split, got {shown([x.name for x in files])}")
        for file in files:
            yield from read_rows(file)
    elif path.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1000) for row in batch.to_pylist())
            yield from ((f"{path}:{number}", partial(without_none, row)) for number, row in enumerate(rows, 1))
    else:
        yield from ((f"{path}:{number}", partial(parse_json, line)) for number, line in read_lines(path))


def iterate_conversations(
    path: Path, faults: list[tuple[str, str]], needs_answer: bool = True
) -> Iterator[Conversation]:
    """
    The valid conversations of a file or directory, one after another. With `needs_answer=False`, they may end with a
    question. Errors are added to `faults`.
    """
    place = None
    try:
        for place, read in read_rows(path):
            try:
                row = read()
            except ValueError as error:
                faults.append((place, str(error)))
                continue
            found = read_conversation(row, Path(place).parent, place, needs_answer)
            if isinstance(found, Conversation):
                yield found
            else:
                faults += [(place, text) for text in found]
    except ValueError as error:
        faults.append((str(path), str(error)))
    except OSError as error:
        if error.errno is not None:
            raise
        faults.append((str(path), str(error)))  # pyarrow's, about a damaged file
    if place is None and not faults:
        faults.append((str(path), "is empty"))


def check_pictures(
    conversations: list[Conversation], faults: list[tuple[str, str]], known: dict[str, list] | None = None
) -> dict[str, tuple[int, int]]:
    """
    The size (width, height) of every image that can be read. Errors are added to `faults`. Files in `known`, as
    `[time of the last change in ns, width, height]`, are not read again; it gets those that are read.
    """
    known = {} if known is None else known
    processor = Step3VLImageProcessor()

    def measure(picture: str) -> tuple[int, int] | str:
        path = None if picture.startswith("data:") else os.path.abspath(picture)
        try:
            changed = path and os.stat(path).st_mtime_ns
            if path in known and known[path][0] == changed:
                return tuple(known[path][1:])
            size = processor.process_image(processor.fetch_images(picture), do_convert_rgb=True).size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"{type(error).__name__}: {error}"
        if path:
            known[path] = [changed, *size]
        return size

    pictures = list(dict.fromkeys(picture for conversation in conversations for picture in conversation.images))
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses twice that size
        sizes = dict(zip(pictures, pool.map(measure, pictures), strict=True))
    for conversation in conversations:
        for picture in conversation.images:
            if isinstance(sizes[picture], str):
                name = "of the data URI" if picture.startswith("data:") else picture
                faults.append((conversation.place, f"the image {name} cannot be read: {sizes[picture]}"))
    return sizes


@contextmanager
def remembered_sizes() -> Iterator[dict[str, list]]:
    """
    The sizes that earlier checks of images found, for `check_pictures`. What is added is remembered, if the cache can
    be written.
    """
    try:
        known = parse_json(SIZES.read_bytes())
    except (OSError, ValueError):
        known = {}
    before = dict(known)
    try:
        yield known
    finally:
        if known != before:
            with suppress(OSError):
                write_json(SIZES, known)
