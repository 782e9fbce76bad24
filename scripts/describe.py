"""Answers a question about an image with a Step3-VL model and streams the answer to standard output.

python scripts/describe.py picture.jpg
python scripts/describe.py picture.jpg --model DIRECTORY --prompt "What colour is the car?"
python scripts/describe.py picture.jpg --server http://127.0.0.1:8000
"""

import argparse
import base64
import json
import os
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, TextStreamer, logging

from step3_vl import Step3VLImageProcessor, Step3VLProcessor


# A model that only knows drawn scenes of coloured shapes. It is in the checkout, not in the installed package.
TINY = Path(__file__).parents[1] / "checkpoints" / "step3-tiny"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `load`."""
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: as stored)")
    parser.add_argument("--experts-implementation", help='such as "mapped" (default: the model\'s)')


def load(
    model: str | Path, device: str | None = None, dtype: str = "auto", experts_implementation: str | None = None
) -> tuple[PreTrainedModel, Step3VLProcessor]:
    """
    A model, given as a directory or hub id, and its processor. Raises an `OSError` if they cannot be read, or a
    `ValueError` if a package that they need is missing.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":  # "auto" spreads the model over all GPUs, but not mapped experts
        device_map = {"": 0} if experts_implementation == "mapped" else "auto"
    else:
        device_map = {"": device}
    processor = AutoProcessor.from_pretrained(model)
    options = {"dtype": dtype, "device_map": device_map, "experts_implementation": experts_implementation}
    try:
        return AutoModelForImageTextToText.from_pretrained(model, **options), processor
    except ImportError as error:
        raise ValueError(str(error)) from None


def open_picture(path: Path) -> Image.Image:
    """The upright RGB image in a file. Raises an `OSError` or `ValueError` if there is none."""
    processor = Step3VLImageProcessor()
    try:
        return processor.process_image(processor.fetch_images(path), do_convert_rgb=True)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from None


class Server:
    """
    A model behind the OpenAI API at `url`, such as serve.py prints. The API key in the environment variable
    STEP3_API_KEY is sent if it is set. Methods raise an `OSError` if the server cannot be reached or refuses a request.
    """

    def __init__(self, url: str):
        self.url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        try:
            with self.open("models") as response:
                self.model = json.load(response)["data"][0]["id"]
        except (ValueError, LookupError, TypeError):
            raise OSError(f"{self.url} does not list its models as the OpenAI API does") from None

    def open(self, path: str, body: dict | None = None) -> HTTPResponse:
        data, headers = body and json.dumps(body).encode(), {"Content-Type": "application/json"}
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            if key := os.environ.get("STEP3_API_KEY"):
                request.add_unredirected_header("Authorization", f"Bearer {key}")  # not to other servers
            return urllib.request.urlopen(request)
        except HTTPError as error:
            raise OSError(f"{self.url}: {error.code} {error.reason}: {self.reason(error.read())}") from None
        except URLError as error:
            raise OSError(f"{self.url} cannot be reached: {error.reason}") from None
        except HTTPException as error:
            raise OSError(f"{self.url} cannot be reached: {error!r}") from None

    @staticmethod
    def reason(body: bytes) -> str:
        """What an error response says."""
        try:
            error = json.loads(body)["error"]
            return error["message"] if isinstance(error, dict) else str(error)
        except (ValueError, LookupError, TypeError):
            return body.decode(errors="replace")[:200]

    @staticmethod
    def picture_part(image: Image.Image) -> dict:
        """An image as a part of a message."""
        with BytesIO() as file:
            image.save(file, "PNG")  # a format that every server reads
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}

    def stream(self, messages: list[dict], max_new_tokens: int, temperature: float = 0) -> Iterator[str]:
        """The answer to a conversation in pieces. Raises an `OSError` also if it breaks off."""
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "stream": True}
        is_finished = False
        try:
            with self.open("chat/completions", {"model": self.model, "messages": messages, **options}) as response:
                for line in response:
                    if not line.startswith(b"data: {"):  # an empty line or the end
                        continue
                    data = line.removeprefix(b"data: ")
                    event = json.loads(data)
                    if event.get("error"):
                        raise OSError(f"{self.url}: {self.reason(data)}")
                    for choice in event["choices"]:
                        is_finished = is_finished or choice.get("finish_reason") is not None
                        yield choice["delta"].get("content") or ""
        except HTTPException as error:
            raise OSError(f"{self.url}: the answer broke off: {error!r}") from None
        if not is_finished:
            raise OSError(f"{self.url}: the answer broke off")


def describe(picture: Path, prompt: str, model: str | Path, max_new_tokens: int, **options) -> None:
    """
    Streams a model's answer to `prompt` about the image; `options` are those of `load`. Raises an `OSError` or
    `ValueError` if the image or the model cannot be read.
    """
    image = open_picture(picture)  # before the model is loaded, which can take minutes
    model, processor = load(model, **options)
    content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


def ask_server(picture: Path, prompt: str, url: str, max_new_tokens: int) -> None:
    """
    Streams a server's answer to `prompt` about the image. Raises an `OSError` or `ValueError` if the image cannot be
    read, or the server cannot be reached or refuses the request.
    """
    content = [Server.picture_part(open_picture(picture)), {"type": "text", "text": prompt}]
    for text in Server(url).stream([{"role": "user", "content": content}], max_new_tokens):
        print(text, end="", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="image file, in any format that Pillow reads")
    parser.add_argument("--prompt", default="Describe this picture.", help="the question (default: %(default)s)")
    source = parser.add_mutually_exclusive_group(required=not TINY.exists())
    source.add_argument("--model", default=TINY, help="directory or hub id (default: step3-tiny, in a checkout)")
    source.add_argument("--server", metavar="URL", help="ask a server with the OpenAI API, such as serve.py starts")
    add_model_options(parser)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum answer length (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if arguments.server:
            ask_server(arguments.picture, arguments.prompt, arguments.server, arguments.max_new_tokens)
        else:
            del arguments.server
            describe(**vars(arguments))
    except (OSError, ValueError) as error:  # an image or a model that cannot be read
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
