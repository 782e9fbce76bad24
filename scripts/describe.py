"""Answers a question about a picture with a Step3-VL model, streaming the answer to standard output.

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


# Trained on drawn scenes of coloured shapes, and on nothing else; a part of the checkout, not of what pip installs.
TINY = Path(__file__).parents[1] / "checkpoints" / "step3-tiny"


def pick_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def describe(
    picture: Path,
    prompt: str,
    model: str | Path,
    device: str | None = None,
    dtype: str = "auto",
    max_new_tokens: int = 256,
) -> None:
    """
    Streams the answer of the model at `model`, a directory or a hub id, to `prompt` about the picture.

    Raises:
        `OSError`: if the picture or the model cannot be read.
    """
    with Image.open(picture) as image:  # before the model is loaded, which can take minutes
        image.load()
    device = device or pick_device()
    processor = AutoProcessor.from_pretrained(model)
    # A model may need all the GPUs there are; weights keep the type they are stored in unless asked otherwise.
    placement = {"device_map": "auto"} if device == "cuda" else {}
    model = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, **placement)
    if not placement:
        model = model.to(device)

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
    Streams the answer of the model that is served at `server`, an address such as serve.py prints, to `prompt` about
    the picture.

    Raises:
        `OSError`: if the picture cannot be read, or the server cannot be reached or refuses it.
    """
    with Image.open(picture) as image, BytesIO() as file:
        image.save(file, "PNG", exif=image.getexif())  # which every server reads
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    server = server.rstrip("/").removesuffix("/v1")
    with urllib.request.urlopen(f"{server}/v1/models") as response:
        model = json.load(response)["data"][0]["id"]
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    question = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_new_tokens,
        "temperature": 0,
        "stream": True,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/v1/chat/completions", json.dumps(question).encode(), headers)
    try:
        with urllib.request.urlopen(request) as response:
            for line in response:  # "data: " and a part of the answer, or [DONE]
                if line.startswith(b"data: {"):
                    for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                        print(choice["delta"].get("content") or "", end="", flush=True)
    except HTTPError as error:
        raise OSError(f"{server}: {error.read().decode()}") from None
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="the picture, in any format that Pillow reads")
    parser.add_argument("--prompt", default="Describe this picture.", help="the question (default: %(default)s)")
    whom = parser.add_mutually_exclusive_group(required=not TINY.exists())
    whom.add_argument("--model", default=TINY, help="directory or hub id (default: step3-tiny, in a checkout)")
    whom.add_argument("--server", metavar="URL", help="ask a server of the OpenAI API instead, such as serve.py starts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of these that is there)")
    parser.add_argument("--dtype", default="auto", help="type of the weights (default: as stored)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    try:
        if arguments.server:
            ask_server(arguments.picture, arguments.prompt, arguments.server, arguments.max_new_tokens)
        else:
            del arguments.server
            describe(**vars(arguments))
    except OSError as error:  # a picture or a model that is not there or cannot be read
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
