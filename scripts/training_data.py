"""Checks conversations for fine-tuning, and shows their lengths and what is learned of them.

python scripts/training_data.py FILE --model MODEL
python scripts/training_data.py FILE --model MODEL --max-length 4096 --json learned.jsonl

`conversations.py` describes the data.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from conversations import IMAGE_TOKEN, BadData, Conversation, check_pictures, iterate_conversations, remembered_sizes
from files import replacing
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoProcessor

from step3_vl import Step3VLProcessor


METHODS = ("sft", "dpo", "kto")
CHUNK = 1000  # conversations that are checked at a time
BARS, WIDTH = 12, 50  # rows of the histogram, and characters of its longest bar
QUANTILES = {"least": 0.0, "median": 0.5, "95 %": 0.95, "most": 1.0}


@dataclass(frozen=True)
class Sample:
    """A conversation as it is trained on."""

    images: list[str]
    prompt: str  # all before the last answer, with a placeholder for each image
    answer: str  # the last answer, with the token that ends it
    input_ids: list[int]  # of the whole conversation, with all tokens of images
    learned: list[bool]  # for each token, whether it is trained on
    num_prompt: int  # tokens before the last answer
    num_patches: int
    rejected: str | None  # a worse answer, and its tokens
    rejected_ids: list[int]
    label: bool | None

    @property
    def length(self) -> int:
        return max(len(self.input_ids), self.num_prompt + len(self.rejected_ids))


def render(messages: list[dict], tools: list[dict] | None, processor: Step3VLProcessor) -> list[str]:
    """
    A conversation as alternating prompts and answers, with an `<im_patch>` for each image. Raises a `ValueError` if the
    chat template refuses it, or renders earlier messages differently when messages are added.
    """
    pieces, done, options = [], "", {"tools": tools} if tools else {}
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt = processor.apply_chat_template(messages[:number], add_generation_prompt=True, **options)
            whole = processor.apply_chat_template(messages[: number + 1], **options)
        except TemplateError as error:
            raise ValueError(f"is refused by the chat template: {error}") from None
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise ValueError("is changed by the chat template when messages are added")
        pieces += [prompt[len(done) :], whole[len(prompt) :]]
        done = whole
    return pieces


def make_sample(conversation: Conversation, sizes: dict[str, tuple[int, int]], processor: Step3VLProcessor) -> Sample:
    """
    Tokenises a conversation. Prompts and answers are tokenised on their own, as in generation. Raises a `ValueError` if
    its texts have a special token, or if the chat template or the image processor refuses it.
    """
    messages, tools, rejected = conversation.messages, conversation.tools, conversation.rejected
    said = json.dumps([messages, tools, rejected], ensure_ascii=False)
    for token in processor.tokenizer.added_tokens_decoder.values():
        if token.special and token.content in said:
            raise ValueError(f"has the special token {token.content} in its text")
    plans = [processor.image_processor.plan(*sizes[picture]) for picture in conversation.images]
    images = iter([processor.text_of_image(plan.newline_mask) for plan in plans])
    pieces = render(messages, tools, processor)
    worse = render([*messages[:-1], rejected], tools, processor)[-1] if rejected else None
    expanded = [re.sub(IMAGE_TOKEN, lambda _: next(images), piece) for piece in pieces]
    *ids, rejected_ids = processor.tokenizer([*expanded, worse or ""], add_special_tokens=False)["input_ids"]
    turns = [x for message, x in zip(messages, conversation.learned, strict=True) if message["role"] == "assistant"]
    if rejected or conversation.label is not None:  # the last answers are compared
        turns = [False] * (len(turns) - 1) + [True]
    return Sample(
        images=conversation.images,
        prompt="".join(pieces[:-1]),
        answer=pieces[-1],
        input_ids=[token for piece in ids for token in piece],
        learned=[number % 2 == 1 and turns[number // 2] for number, piece in enumerate(ids) for _ in piece],
        num_prompt=sum(map(len, ids[:-1])),
        num_patches=sum(plan.num_patches for plan in plans),
        rejected=worse,
        rejected_ids=rejected_ids,
        label=conversation.label,
    )


def check_sample(sample: Sample, method: str | None, max_length: int | None) -> None:
    """Raises a `ValueError` if a sample is too long, lacks what `method` needs or has what it would not learn."""
    if max_length and sample.length > max_length:
        raise ValueError(f"has {sample.length} tokens, more than {max_length}")
    if method == "sft" and (sample.rejected or sample.label is not None):
        raise ValueError("has a worse answer or a label, which --method sft does not learn from, but dpo or kto does")
    if method == "dpo" and (not sample.rejected or sample.label is not None):
        raise ValueError(
            "must have a worse answer, as `rejected` or `rejected_response`, and no label for --method dpo"
        )
    if method == "kto" and (sample.label is None) == (sample.rejected is None):
        raise ValueError("must have either a `label` or a worse answer for --method kto")


def make_samples(
    conversations: list[Conversation],
    processor: Step3VLProcessor,
    faults: list[tuple[str, str]],
    method: str | None = None,
    max_length: int | None = None,
    known: dict[str, list] | None = None,
) -> Iterator[tuple[Conversation, Sample]]:
    """The right conversations, one after another, with their samples. `check_pictures` describes the last argument."""
    num_faults = len(faults)
    sizes = check_pictures(conversations, faults, known)
    wrong = {place for place, _ in faults[num_faults:]}
    for conversation in conversations:
        if conversation.place in wrong:
            continue
        try:
            sample = make_sample(conversation, sizes, processor)
            check_sample(sample, method, max_length)
        except ValueError as error:
            faults.append((conversation.place, str(error)))
        else:
            yield conversation, sample


def read_samples(
    path: Path,
    processor: Step3VLProcessor,
    faults: list[tuple[str, str]],
    method: str | None = None,
    max_length: int | None = None,
) -> Iterator[Sample]:
    """The right conversations of a file, one after another. Errors are added to `faults`."""
    conversations = iter(tqdm(iterate_conversations(path, faults), "Conversations", disable=None))
    with remembered_sizes() as known:
        while chunk := list(islice(conversations, CHUNK)):
            for _, sample in make_samples(chunk, processor, faults, method, max_length, known):
                yield sample


def read_all(path: Path, processor: Step3VLProcessor, max_length: int | None) -> list[Sample]:
    """All conversations of a file. Raises `BadData` if one has an error."""
    samples = list(read_samples(path, processor, faults := [], max_length=max_length))
    if faults:
        raise BadData(faults)
    return samples


def load_processor(model: str, **options) -> Step3VLProcessor:
    """The processor of a model, with those of the `options` that are not `None`."""
    return AutoProcessor.from_pretrained(model, **{key: value for key, value in options.items() if value is not None})


def describe_lengths(rows: list[tuple[int, int, int, int]], limit: int | None) -> str:
    """
    A table of the numbers of tokens, learned tokens, images and patches, a histogram of tokens, and what a limit of
    tokens would drop, or several limits.
    """
    lines = ["".join(f"{cell:>12}" for cell in ("", "sum", *QUANTILES))]
    for name, column in zip(("tokens", "learned", "images", "patches"), zip(*rows, strict=True), strict=True):
        values = sorted(column)
        chosen = [values[round(share * (len(values) - 1))] for share in QUANTILES.values()]
        lines.append("".join(f"{cell:>12}" for cell in (name, sum(values), *chosen)))
    lengths = sorted(row[0] for row in rows)
    step = (lengths[-1] - lengths[0]) // BARS + 1
    counts = Counter((length - lengths[0]) // step for length in lengths)
    lines += ["", f"{'tokens':>13} conversations"]
    for bar in range(max(counts) + 1):
        start, size = lengths[0] + bar * step, round(WIDTH * counts[bar] / max(counts.values()))
        lines.append(f"{start:>6}-{start + step - 1:<6} {counts[bar]:>7} {'#' * size}")
    limits = [limit] if limit else [2**power for power in range(8, 20) if lengths[0] <= 2**power < 2 * lengths[-1]]
    drops = [(most, sum(length > most for length in lengths)) for most in limits]
    return "\n".join([*lines, "", *(f"--max-length {most} drops {count} of {len(rows)}" for most, count in drops)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="file or directory of conversations")
    parser.add_argument("--model", required=True, help="directory or hub id, whose processor is used")
    parser.add_argument("--json", type=Path, help="write the tokens of each conversation, and which are learned, here")
    parser.add_argument("--method", choices=METHODS, help="also check what this method needs")
    parser.add_argument("--on-fault", choices=("stop", "skip"), default="stop", help="skip leaves faulty rows out")
    parser.add_argument("--max-length", type=int, help="count longer conversations (default: for several lengths)")
    parser.add_argument("--max-pixels", type=int, help="pixels of an image; larger ones are scaled down")
    parser.add_argument("--max-patches", type=int, help="patches of an image")
    arguments = parser.parse_args()
    faults, rows = [], []
    try:
        processor = load_processor(arguments.model, max_pixels=arguments.max_pixels, max_patches=arguments.max_patches)
        with ExitStack() as stack:
            file = arguments.json and stack.enter_context(stack.enter_context(replacing(arguments.json)).open("w"))
            for sample in read_samples(arguments.data, processor, faults, arguments.method):
                rows.append((sample.length, sum(sample.learned), len(sample.images), sample.num_patches))
                if file:
                    row = {"input_ids": sample.input_ids, "learned": sample.learned}
                    row |= {"rejected_ids": sample.rejected_ids} if sample.rejected else {}
                    file.write(f"{json.dumps(row)}\n")
            if faults and (arguments.on_fault == "stop" or not rows):
                raise BadData(faults)
    except (BadData, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for place, fault in faults:
        print(f"{place}: {fault}", file=sys.stderr)
    print(f"{len(rows)} conversations, {len({place for place, _ in faults})} left out\n")
    print(describe_lengths(rows, arguments.max_length))


if __name__ == "__main__":
    main()
