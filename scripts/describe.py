"""Answers a question about an image with a Step3-VL model and streams the answer to standard output.

python scripts/describe.py picture.jpg
python scripts/describe.py picture.jpg --model DIRECTORY --prompt "What colour is the car?"
python scripts/describe.py picture.jpg --server http://127.0.0.1:8000
"""

import argparse
import base64
import json
import urllib.request
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer, logging

import step3_vl  # noqa: F401  (registers Step3-VL with the Auto classes)


# A model that only knows drawn scenes of coloured shapes. It is in the checkout, not in the installed package.
TINY = Path(__file__).parents[1] / "checkpoints" / "step3-tiny"


def describe(
    picture: Path,
    prompt: str,
    model: str | Path,
    device: str | None = None,
    dtype: str = "auto",
    max_new_tokens: int = 256,
) -> None:
    """
    Streams the answer of a model, given as a directory or hub id, to `prompt` about the image. Raises an `OSError` if
    the image or the model cannot be read.
    """
    with Image.open(picture) as image:  # before the model is loaded, which can take minutes
        image.load()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(model)
    # "auto" spreads the model over all GPUs.
    device_map = "auto" if device == "cuda" else {"": device}
    model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, device_map=device_map)

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


def ask_server(picture: Path, prompt: str, server: str, max_new_tokens: int = 256) -> None:
    """
    Streams the answer of the model at `server`, an address as serve.py prints it, to `prompt` about the image. Raises
    an `OSError` if the image cannot be read, or the server cannot be reached or refuses the request.
    """
    with Image.open(picture) as image, BytesIO() as file:
        image.save(file, "PNG", exif=image.getexif())  # a format that every server reads
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    server = server.rstrip("/").removesuffix("/v1")
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:  # "data: " and a part of the answer or [DONE]
                if line.startswith(b"data: {"):
                    for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                        print(choice["delta"].get("content") or "", end="", flush=True)
    except HTTPError as error:
        raise OSError(f"{server}: {error.read().decode()}") from None
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="image file, in any format that Pillow reads")
    parser.add_argument("--prompt", default="Describe this picture.", help="the question (default: %(default)s)")
    source = parser.add_mutually_exclusive_group(required=not TINY.exists())
    source.add_argument("--model", default=TINY, help="directory or hub id (default: step3-tiny, in a checkout)")
    source.add_argument("--server", metavar="URL", help="ask a server with the OpenAI API, such as serve.py starts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: as stored)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum answer length (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if arguments.server:
            ask_server(arguments.picture, arguments.prompt, arguments.server, arguments.max_new_tokens)
        else:
            del arguments.server
            describe(**vars(arguments))
    except OSError as error:  # an image or a model that cannot be read
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
