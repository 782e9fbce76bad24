"""Answers the requests in a JSONL file in batches, and writes their conversations with the answers to another.

python scripts/answer.py REQUESTS.jsonl ANSWERS.jsonl
python scripts/answer.py REQUESTS.jsonl ANSWERS.jsonl --model DIRECTORY --batch-size 32

Requests are conversations as for fine-tuning, which `conversations.py` describes, but end with the user's message. All
are checked before the model is loaded. If it is interrupted, the same command resumes.
"""

import argparse
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from conversations import BadData, Conversation, iterate_conversations
from describe import TINY, add_model_options, load
from files import locked, naming, replacing
from tqdm import tqdm
from training_data import Sample, make_samples
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, logging, set_seed

from step3_vl import Step3VLProcessor


# Makes a request a conversation for fine-tuning, whose checks it then passes.
STAND_IN = {"role": "assistant", "content": [{"type": "text", "text": "?"}]}


def read_requests(path: Path, processor: Step3VLProcessor, max_length: int | None) -> list[tuple[dict, Sample]]:
    """
    The requests of a file: what is written of each besides its answer, and as a sample with `STAND_IN` for the answer.
    Raises `BadData` if one has an error.
    """
    faults, conversations = [], []
    for conversation in iterate_conversations(path, faults, needs_answer=False):
        if conversation.messages[-1]["role"] == "assistant" or conversation.rejected:
            faults.append((conversation.place, "has an answer already"))
        else:
            with_stand_in = {"messages": [*conversation.messages, STAND_IN], "learned": [*conversation.learned, True]}
            conversations.append(replace(conversation, label=None, **with_stand_in))
    samples = make_samples(conversations, processor, faults, max_length=max_length)
    requests = [(as_row(conversation), sample) for conversation, sample in samples]
    if faults:
        raise BadData(faults)
    return requests


def as_row(conversation: Conversation) -> dict:
    """A request in the form `messages`."""
    messages = []
    for message, is_learned in zip(conversation.messages[:-1], conversation.learned[:-1], strict=True):
        content = "".join(part.get("text", "<image>") for part in message["content"])
        loss = {"loss": False} if message["role"] == "assistant" and not is_learned else {}
        messages.append({**message, "content": content, **loss})
    row = {} if conversation.id is None else {"id": conversation.id}
    tools = {"tools": conversation.tools} if conversation.tools else {}
    return {**row, "messages": messages, **tools, "images": conversation.images}


def with_answer(row: dict, answer: dict, folder: Path) -> dict:
    """A request with its answer, for a file in `folder`, to which the paths of images become relative."""
    images = [image if image.startswith("data:") else os.path.relpath(image, folder) for image in row["images"]]
    return {**row, "messages": [*row["messages"], answer], "images": images}


def read_partial(partial: Path, settings: dict) -> dict[int, dict]:
    """
    The results that an interrupted run has left in `partial`, by number. Removes an incomplete line at its end. Raises
    a `ValueError` if that run's settings were others.
    """
    data = partial.read_bytes()
    size = data.rfind(b"\n") + 1
    first, *results = map(json.loads, data[:size].splitlines() or [json.dumps(settings)])
    if other := [name for name in settings if settings[name] != first.get(name)]:
        raise ValueError(f"{partial} was begun with another {' and '.join(other)}: use the same or remove it")
    with partial.open("ab") as file:
        file.truncate(size)
        if size == 0:
            file.write(json.dumps(settings).encode() + b"\n")
    return {result["number"]: result for result in results}


def generate_answers(
    model: PreTrainedModel, processor: Step3VLProcessor, samples: list[Sample], options: dict
) -> list[dict]:
    """The answer to each of a batch of requests, as `message`, and whether it `is_cut` at the maximum length."""
    inputs = processor(
        text=[sample.prompt for sample in samples],
        images=[sample.images for sample in samples],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    length, ends = inputs["input_ids"].shape[1], model.generation_config.eos_token_id
    results = []
    for ids in model.generate(**inputs, **options).tolist():
        is_end = [token in (ends if isinstance(ends, list) else [ends]) for token in ids[length:]]
        answer = ids[length:][: is_end.index(True) + 1 if any(is_end) else None]  # without padding
        message = {"role": "assistant", "content": "", **processor.parse_response(answer, prefix=ids[:length])}
        results.append({"message": message, "is_cut": not any(is_end)})
    return results


def answer_requests(arguments: argparse.Namespace) -> str:
    """
    Writes the answers, and returns a summary. Raises `BadData` if a request has an error, or an `OSError` or
    `ValueError` if a file or the model cannot be used.
    """
    output, partial = arguments.answers, arguments.answers.with_name(f"{arguments.answers.name}.partial")
    if output.exists():
        raise FileExistsError(f"{output} exists already: choose another file or remove it")
    processor = AutoProcessor.from_pretrained(arguments.model)
    max_length = AutoConfig.from_pretrained(arguments.model).get_text_config().longest_sequence
    requests = read_requests(arguments.requests, processor, max_length)
    lengths = [sample.num_prompt for _, sample in requests]
    output.parent.mkdir(parents=True, exist_ok=True)
    names = ("model", "max_new_tokens", "temperature", "top_p", "seed")
    settings = {name: str(getattr(arguments, name)) for name in names}
    settings["requests"] = hashlib.sha256(json.dumps([row for row, _ in requests]).encode()).hexdigest()
    with locked(partial, output):
        results = read_partial(partial, settings)
        # Batches of similar lengths have little padding. The longest come first, so that a lack of memory shows soon.
        missing = sorted(set(range(len(requests))) - results.keys(), key=lambda number: (-lengths[number], number))
        if missing:
            model, _ = load(arguments.model, arguments.device, arguments.dtype, arguments.experts_implementation)
        options = {"max_new_tokens": arguments.max_new_tokens, "do_sample": arguments.temperature > 0}
        if arguments.temperature > 0:
            options |= {"temperature": arguments.temperature, "top_p": arguments.top_p}
        set_seed(arguments.seed + len(results))  # after an interruption, not the random numbers from the beginning
        with tqdm(total=len(requests), initial=len(results), desc="Answers", unit=" requests") as progress:
            for start in range(0, len(missing), arguments.batch_size):
                batch = missing[start : start + arguments.batch_size]
                answers = generate_answers(model, processor, [requests[number][1] for number in batch], options)
                with naming(partial), partial.open("a") as file:
                    for number, result in zip(batch, answers, strict=True):
                        results[number] = {"number": number, **result}
                        file.write(json.dumps(results[number]) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                progress.update(len(batch))

        with replacing(output) as unfinished, unfinished.open("w", encoding="utf-8") as file:
            for number, (row, _) in enumerate(requests):
                row = with_answer(row, results[number]["message"], output.parent)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.unlink()
    num_cut = sum(result["is_cut"] for result in results.values())
    return f"{len(requests)} requests answered" + f", {num_cut} up to the maximum length" * (num_cut > 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("requests", type=Path, help="file of conversations that end with the user's message")
    parser.add_argument("answers", type=Path, help="file to create; must not exist yet")
    parser.add_argument(
        "--model",
        default=TINY,
        required=not TINY.exists(),
        help="directory or hub id (default: step3-tiny, in a checkout)",
    )
    add_model_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="maximum answer length (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: greedy)")
    parser.add_argument("--top-p", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.batch_size, arguments.max_new_tokens) < 1:
        parser.error("--batch-size and --max-new-tokens must be at least 1")
    if arguments.temperature < 0 or not 0 < arguments.top_p <= 1:
        parser.error("--temperature must not be negative, and --top-p must be above 0 and at most 1")
    logging.set_verbosity_error()
    try:
        print(answer_requests(arguments))
    except (BadData, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except torch.OutOfMemoryError as error:
        parser.exit(2, f"{parser.prog}: {error}\nResume with a smaller --batch-size.\n")
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; the same command resumes\n")


if __name__ == "__main__":
    main()
