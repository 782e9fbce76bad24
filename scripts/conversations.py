"""Reads conversations with images from a JSONL file and checks all of them.

A line is `{"messages": [{"role": ..., "content": ...}, ...], "images": [path or data URI, ...]}`, the form that
ms-swift, LLaMA-Factory and OpenAI's fine-tuning share. Content is text, in which `<image>` stands for the next of
`images`, or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image"}` for the next of `images`, or
`{"type": "image", "image": ...}` or `{"type": "image_url", "image_url": {"url": ...}}` with an image of its own.
"""

import os
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote, urlsplit

from files import parse_json, picture_of, shown
from PIL import Image
from tqdm import tqdm

from step3_vl import Step3VLImageProcessor, Step3VLProcessor


# Placeholders for images in texts: the one of other formats and the model's own.
IMAGE_TOKEN = Step3VLProcessor.image_token
MARK = re.compile(f"<image>|{re.escape(IMAGE_TOKEN)}")
# Placeholders in other formats for media that Step3 does not support.
OTHER_MARK = re.compile("<(?:video|audio)>")
# The keys that are read, and `id`, which is ignored. Other keys are errors, because their content would be lost.
ROW_KEYS, MESSAGE_KEYS, ANSWER_KEYS = ("messages", "images", "id"), ("role", "content"), ("weight", "loss")
PICTURE_KEYS = ("image", "image_url", "url", "path", "base64")
MAX_SHOWN = 20  # errors; the others are counted


class BadData(Exception):
    """Everything that is wrong with the data, by file and line; its text has the first 20 errors."""

    def __init__(self, faults: list[str]):
        rest = len(faults) - MAX_SHOWN
        lines = faults[:MAX_SHOWN] + [f"and {rest} more"] * (rest > 0)
        super().__init__("\n".join(["the data has errors, so nothing was started:", *lines]))


@dataclass(frozen=True)
class Conversation:
    """The conversation in one line."""

    place: str  # file and line number
    messages: list[dict]  # for `apply_chat_template`
    pictures: list[str]  # path or data URI of the image for each part of type "image"
    is_learned: list[bool]  # for each message, whether it is trained on


def check_keys(value: dict, known: tuple[str, ...]) -> None:
    """Raises a `ValueError` if keys other than `known` have content."""
    lost = [key for key, entry in value.items() if key not in known and entry not in (None, "", [], {})]
    if lost:
        raise ValueError(f"has {', '.join(map(shown, lost))}, and only {', '.join(known)} are supported")


def find_picture(reference: object, folder: Path) -> str:
    """
    The path of an image, given as a path from `folder` or the working directory or as a `file:` URI. A `data:` URI is
    returned as it is. Raises a `ValueError` for anything else, or if there is no such file.
    """
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"an image must be a path or a data URI, got {shown(reference)}")
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
    if isinstance(reference, dict):
        check_keys(reference, ("url",))
        reference = reference.get("url", "")
    if keys == ["base64"] and isinstance(reference, str):
        reference = f"data:image/;base64,{reference}"
    return {"image": reference}


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
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("has half of a surrogate pair in its text") from None
        if mark := OTHER_MARK.search(text):
            raise ValueError(f"has {mark[0]} in its text, and only images are supported")
        first, *others = MARK.split(text)
        pieces += [first, *(piece for text in others for piece in ({"image": None}, text))]
    return [piece for piece in pieces if piece != ""]


def is_weighted(message: dict) -> bool:
    """
    Whether an answer is trained on, which `weight` (OpenAI) or `loss` (ms-swift) may turn off. Raises a `ValueError` if
    either is not 0 or 1.
    """
    weights = [message[key] for key in ("weight", "loss") if message.get(key) is not None]
    if any(weight not in (0, 1) for weight in weights):
        raise ValueError(f"`weight` and `loss` must be 0 or 1, got {shown(weights)}")
    return all(weights)


def read_conversation(line: bytes, folder: Path, place: str, fault: Callable[[str], None]) -> Conversation | None:
    """
    The conversation in one line, without opening its images. If anything is wrong, calls `fault` for each error and
    returns `None`.
    """
    is_faulty = False

    def report(text: str) -> None:
        nonlocal is_faulty
        is_faulty = True
        fault(text)

    try:
        row = parse_json(line)
    except ValueError as error:
        return fault(str(error))
    try:
        check_keys(row, ROW_KEYS)
    except ValueError as error:
        report(str(error))
    given, rows = row.get("images"), row.get("messages")
    given = [] if given is None else given
    if not isinstance(given, list):
        report(f"`images` must be a list, got {shown(given)}")
        given = []
    if not isinstance(rows, list) or not rows:
        return report(f"`messages` must be a list with at least one message, got {shown(rows)}")

    messages, references, learned, num_marks = [], [], [], 0
    is_users_turn = True
    for number, message in enumerate(rows, 1):
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            got = shown(message.get("role")) if isinstance(message, dict) else shown(message)
            report(f"message {number}: the role must be system, user or assistant, got {got}")
            return None  # without it, the order of the other turns is unknown
        role = message["role"]
        here = f"message {number} ({role})"
        if role == "system" and number > 1:
            report(f"{here}: only the first message can be the system's")
        elif role != "system":
            if (role == "user") != is_users_turn:
                report(f"{here}: it is the {'user' if is_users_turn else 'assistant'}'s turn")
            is_users_turn = role == "assistant"
        try:
            check_keys(message, MESSAGE_KEYS + ANSWER_KEYS * (role == "assistant"))
            pieces = read_content(message.get("content"))
            learned.append(role == "assistant" and is_weighted(message))
        except ValueError as error:
            report(f"{here}: {error}")
            continue
        pictures = [piece["image"] for piece in pieces if isinstance(piece, dict)]
        if pictures and role != "user":
            report(f"{here}: only the user's messages can have images or <image>")
        if not pictures and role != "system" and not "".join(pieces).strip():
            report(f"{here}: is empty")
        for picture in pictures:
            num_marks += picture is None
            if picture is None and num_marks <= len(given):
                picture = given[num_marks - 1]
            references.append(picture)
        parts = [{"type": "text", "text": x} if isinstance(x, str) else {"type": "image"} for x in pieces]
        messages.append({"role": role, "content": parts})

    if num_marks != len(given):
        if not is_faulty:
            report(f"has {len(given)} in `images`, and {num_marks} placeholders such as <image>")
        references = [reference for reference in references if reference is not None]
    if "assistant" not in [message["role"] for message in rows]:
        report("has no assistant's message to train on")
    elif not is_users_turn:
        report("ends with the user's message, which has no answer")
    elif not is_faulty and not any(learned):
        report("has no assistant's message with a weight other than 0")
    found = []
    for reference in references:
        try:
            found.append(find_picture(reference, folder))
        except ValueError as error:
            report(str(error))
    return None if is_faulty else Conversation(place, messages, found, learned)


def read_conversations(path: Path, faults: list[str]) -> list[Conversation]:
    """The valid conversations of a file, without opening their images. Errors are added to `faults`."""
    conversations, num_lines = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            num_lines += 1
            if num_lines == 1 and line.lstrip().startswith(b"["):
                faults.append(f"{path}:{number}: starts a JSON array: write one object per line, without commas")
                return []
            place = f"{path}:{number}"
            conversation = read_conversation(
                line, path.parent, place, lambda text, place=place: faults.append(f"{place}: {text}")
            )
            if conversation is not None:
                conversations.append(conversation)
    if num_lines == 0:
        faults.append(f"{path}: is empty")
    return conversations


def check_pictures(conversations: list[Conversation], faults: list[str], quiet: bool) -> dict[str, tuple]:
    """The size (width, height) of every image. Errors are added to `faults`."""
    uses = [(picture, conversation.place) for conversation in conversations for picture in conversation.pictures]
    processor = Step3VLImageProcessor()

    def measure(picture: str) -> tuple[int, int] | str:
        try:
            return processor.process_image(processor.fetch_images(picture), do_convert_rgb=True).size
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return f"{type(error).__name__}: {error}"

    pictures = list(dict.fromkeys(picture for picture, _ in uses))
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow refuses twice that size
        results = pool.map(measure, pictures)
        sizes = dict(zip(pictures, tqdm(results, "Pictures", len(pictures), disable=quiet), strict=True))
    for picture, place in uses:
        if isinstance(sizes[picture], str):
            name = "of the data URI" if picture.startswith("data:") else picture
            faults.append(f"{place}: the image {name} cannot be read: {sizes[picture]}")
    return sizes


def segments(conversation: Conversation, processor: Step3VLProcessor) -> list[tuple[str, list, bool]]:
    """
    A conversation as alternating prompts and answers. Each is its text with an `<im_patch>` for each image, its images,
    and whether it is trained on. Each is tokenised on its own, as in generation; answers include their end token.
    Raises a `ValueError` if the chat template renders earlier messages differently when messages are added.
    """
    pieces, done, pictures = [], "", iter(conversation.pictures)
    for number, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(conversation.messages[:number], add_generation_prompt=True)
        whole = processor.apply_chat_template(conversation.messages[: number + 1])
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ValueError("The chat template must not change earlier messages when messages are added.")
        text = prompt[len(done) :]
        pieces.append((text, [next(pictures) for _ in range(text.count(IMAGE_TOKEN))], False))
        pieces.append((whole[len(prompt) :], [], conversation.is_learned[number]))
        done = whole
    return pieces


def check_tokens(
    conversations: list[Conversation],
    sizes: dict[str, tuple[int, int]],
    processor: Step3VLProcessor,
    max_length: int,
    faults: list[str],
) -> int:
    """
    The number of tokens of all conversations. Conversations of more than `max_length` tokens, and those with special
    tokens in their text, are added to `faults`.
    """
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    total = 0
    for conversation in conversations:
        texts = [part["text"] for message in conversation.messages for part in message["content"] if "text" in part]
        if held := [token for token in special if any(token in text for text in texts)]:
            faults.append(f"{conversation.place}: has the special token {held[0]} in its text")
            continue
        length = sum(
            len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text, _, _ in segments(conversation, processor)
        )
        try:
            plans = [(sizes[picture][1], sizes[picture][0]) for picture in conversation.pictures]
            length += sum(processor._get_num_multimodal_tokens(plans)["num_image_tokens"]) - len(plans)
        except ValueError as error:  # an image that is too narrow
            faults.append(f"{conversation.place}: {error}")
            continue
        total += length
        if length > max_length:
            faults.append(f"{conversation.place}: has {length} tokens, more than {max_length}")
    return total
