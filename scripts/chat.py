"""Holds a conversation about images in the terminal, with a model in a directory or on a server.

python scripts/chat.py
python scripts/chat.py DIRECTORY --temperature 0.7
python scripts/chat.py http://127.0.0.1:8000/v1

Each line of standard input is a message or a command; /help lists the commands.
"""

import argparse
import signal
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

import torch
from describe import TINY, Server, add_model_options, load, open_picture
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    BatchFeature,
    DynamicCache,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    logging,
)

from step3_vl import Step3VLProcessor


HELP = """\
/image FILE  add an image to the next message; without FILE, remove those added so far
/reset       begin a new conversation
/help        show this
/quit        end, as Ctrl-D does
Every other line is a message. Ctrl-C stops an answer, whose beginning stays in the conversation."""


class Interrupt(StoppingCriteria):
    """Within its context, Ctrl-C makes `generate` stop after the current token; a second one interrupts it at once."""

    is_pressed = False

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, self.press)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)

    def press(self, *_):
        self.is_pressed = True
        signal.signal(signal.SIGINT, self.previous)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.is_pressed, device=input_ids.device)


class LocalModel:
    """Answers with a loaded model. The cache is kept: of a conversation that goes on, only the new turn is computed."""

    def __init__(self, model: PreTrainedModel, processor: Step3VLProcessor):
        self.model, self.processor = model, processor
        self.forget()

    def forget(self) -> None:
        """Empties the cache."""
        self.cache = DynamicCache(config=self.model.config)
        self.messages, self.ids = [], []  # the conversation and the tokens in the cache

    def picture_part(self, image: Image.Image) -> dict:
        return {"type": "image", "image": image}

    def answer(self, messages: list[dict], max_new_tokens: int, temperature: float) -> dict:
        """
        Prints the answer while it is generated, and returns it as a message. Raises a `ValueError`, `RuntimeError` or
        `TemplateError` if there is none.
        """
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = inputs["input_ids"][0].tolist()
        streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        with Interrupt() as interrupt:
            self.leave_out_cached(inputs, prompt, messages)
            output = self.model.generate(
                **inputs.to(self.model.device),
                cache=self.cache,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([interrupt]),
                **sampling,
            )
            self.messages, self.ids = messages, output[0, : self.cache.get_seq_length()].tolist()
        return {"content": "", **self.processor.parse_response(output[0, len(prompt) :], prefix=prompt)}

    def leave_out_cached(self, inputs: BatchFeature, prompt: list[int], messages: list[dict]) -> None:
        """
        Cuts the cache back to the tokens that it has in common with the prompt, which may be fewer because the chat
        template drops earlier reasoning. Removes the images of these tokens from `inputs`.
        """
        # Another conversation may have the same tokens for other images. The lengths differ if a forward pass ended in
        # an error.
        goes_on = all(old is new for old, new in zip(self.messages, messages, strict=False))
        if not goes_on or self.cache.get_seq_length() != len(self.ids):
            self.forget()
        pairs = zip(self.ids, prompt[:-1], strict=False)
        num_same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        self.cache.crop(num_same - len(self.ids))
        if "num_patches" in inputs:
            image_processor, num_patches = self.processor.image_processor, inputs["num_patches"]
            num_tokens = num_patches * image_processor.num_patch_tokens + image_processor.num_image_tokens
            num_cached = int((num_tokens.cumsum(0) <= prompt[:num_same].count(self.processor.image_token_id)).sum())
            inputs["pixel_values"] = inputs["pixel_values"][num_cached:]
            inputs["num_patches"] = num_patches[num_cached:]
            if "patch_pixel_values" in inputs:
                inputs["patch_pixel_values"] = inputs["patch_pixel_values"][num_patches[:num_cached].sum() :]


class RemoteModel(Server):
    """Answers with a model on a server."""

    def answer(self, messages: list[dict], max_new_tokens: int, temperature: float) -> dict:
        """Prints the answer while it comes, and returns it as a message. Raises an `OSError` if there is none."""
        text = ""
        try:
            for piece in self.stream(messages, max_new_tokens, temperature):
                print(piece, end="", flush=True)
                text += piece
        except KeyboardInterrupt:
            if not text:
                raise
        finally:
            print(end="\n" * bool(text), flush=True)
        return {"role": "assistant", "content": text}


def complain(text: object) -> None:
    print(*str(text).split(), file=sys.stderr)


def chat(model: LocalModel | RemoteModel, system: str | None, max_new_tokens: int, temperature: float) -> None:
    """Reads messages and commands until the end of standard input or /quit. Errors are printed and change nothing."""
    is_terminal = sys.stdin.isatty()
    beginning = [{"role": "system", "content": system}] if system else []
    messages, pictures = list(beginning), []
    print(end="Type a message, or /help.\n" * is_terminal)
    while True:
        try:
            line = input((len(pictures) * "[image] " + "> ") * is_terminal)
        except EOFError:
            print(end="\n" * is_terminal)
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n/quit or Ctrl-D ends.")
            continue
        command, _, name = line.strip().partition(" ")
        try:
            if not command:
                continue
            if command == "/quit":
                return
            if command == "/help":
                print(HELP)
            elif command == "/reset":
                messages, pictures = list(beginning), []
            elif command == "/image" and name:
                pictures.append(model.picture_part(open_picture(Path(name.strip(" '\"")).expanduser())))
            elif command == "/image":
                pictures = []
            elif command.startswith("/"):
                complain(f"There is no command {command}; /help lists them.")
            else:
                message = {"role": "user", "content": [*pictures, {"type": "text", "text": line}]}
                messages += [message, model.answer([*messages, message], max_new_tokens, temperature)]
                pictures = []
        except (OSError, ValueError, RuntimeError, TemplateError) as error:
            complain(error)
        except KeyboardInterrupt:
            complain("Stopped before there was an answer; the message is not in the conversation.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0], epilog=HELP)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model",
        nargs="?" if TINY.exists() else None,
        default=TINY,
        help="directory, hub id, or address of a server with the OpenAI API, to which STEP3_API_KEY is sent if set "
        "(default: step3-tiny, in a checkout)",
    )
    add_model_options(parser)
    parser.add_argument("--system", help="a message of the system at the beginning")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="maximum answer length (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of sampling (default: greedy)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    sys.stdin.reconfigure(errors="replace")
    with suppress(ImportError):
        import readline  # noqa: F401  (lets `input` edit lines; not on Windows)
    try:
        if str(arguments.model).startswith(("http://", "https://")):
            model = RemoteModel(arguments.model)
        else:
            model = LocalModel(
                *load(arguments.model, arguments.device, arguments.dtype, arguments.experts_implementation)
            )
        chat(model, arguments.system, arguments.max_new_tokens, arguments.temperature)
    except (OSError, ValueError) as error:  # a model that cannot be read or reached
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    main()
