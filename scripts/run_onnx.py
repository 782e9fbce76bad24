"""Answers a question about pictures with a model that export_onnx.py exported, without torch and transformers.

python scripts/run_onnx.py DIRECTORY "How many shapes are there?" picture.png
python scripts/run_onnx.py DIRECTORY "Which one has more shapes?" first.png second.png

It needs onnxruntime, tokenizers, numpy and pillow. Answers are greedy, as by `generate(do_sample=False)`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer


# The weights of PIL's resampling filters, by their numbers, at a distance: bilinear and bicubic.
KERNELS = {
    2: lambda x: np.maximum(1 - x, 0),
    3: lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, np.maximum(2 - x, 0) * (x - 1) * (0.5 * x - 1)),
}


def resize(pixels: np.ndarray, side: int, resample: int) -> np.ndarray:
    """Resizes float pixels (..., height, width) to `side`², as torch's `interpolate` does with `antialias`."""
    if pixels.shape[-2:] == (side, side):
        return pixels

    def weights(size: int) -> np.ndarray:
        """The share (side, size) of each old pixel in each new one. Coordinates are rounded to float32, as torch's."""
        scale = np.float32(size) / np.float32(side)
        centres = (np.arange(side, dtype=np.float32)[:, None] + np.float32(0.5)) * scale
        distances = np.abs(np.arange(size, dtype=np.float32) - centres + np.float32(0.5))
        shares = KERNELS[resample](distances * (1 / max(scale, np.float32(1))))
        return shares / shares.sum(1, keepdims=True)

    height, width = pixels.shape[-2:]
    return weights(height) @ (pixels @ weights(width).T)


def plan(width: int, height: int, settings: dict) -> tuple[tuple, tuple, tuple, int]:
    """
    How an image is cut, as by `plan_picture` in processing_step3.py: its padded size, the size of its global view, the
    size from which patches are cut, and their side, 0 without patches. Sizes are (width, height).
    """
    view_side, patch_side = settings["size"]["height"], settings["patch_size"]
    max_pixels, max_patches = settings.get("max_pixels"), settings.get("max_patches") if settings["do_patch"] else 0
    if min(width, height) < 32 and max(width, height) / min(width, height) > 4:
        width = height = max(width, height)
    padded = (width, height)
    scale = math.sqrt(max_pixels / (width * height)) if max_pixels else 1
    if (scale := min(settings["max_image_size"] / max(padded), scale)) < 1:
        width, height = max(int(width * scale), 1), max(int(height * scale), 1)
    view = (width, height)
    while True:
        shorter, longer = sorted((width, height))
        if longer <= view_side:
            window = shorter if longer / shorter > 1.5 else 0
        else:
            window = min(shorter, patch_side) if longer / shorter > 4 else patch_side
        if window == 0:
            return padded, view, view, 0
        cut = tuple(
            side if side < window else window * (side // window + (side / window - side // window > 0.2))
            for side in (width, height)
        )
        if max_patches is None or math.ceil(cut[0] / window) * math.ceil(cut[1] / window) <= max_patches:
            return padded, view, cut, window
        if window < patch_side or max_patches == 0:
            return padded, view, view, 0
        width, height = max(int(width * 0.95), 1), max(int(height * 0.95), 1)


def process(image: Image.Image, settings: dict) -> tuple[np.ndarray, np.ndarray, str]:
    """
    The global view (channels, side, side) and the patches (patches, channels, patch side, patch side) of an image, as
    the image processor with these settings makes them, and its tokens in the prompt. Raises a `ValueError` if the image
    has more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"a picture must have 8 bits a channel, got the mode {image.mode}")
    image = ImageOps.exif_transpose(image).convert("RGB")
    padded, view, cut, window = plan(*image.size, settings)
    view_side, patch_side, resample = settings["size"]["height"], settings["patch_size"], settings["resample"]

    def to_pixels(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32) * np.float32(settings["rescale_factor"])
        mean, std = (np.float32(settings[name]).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        return (pixels - mean) / std

    image = image.crop((0, 0, *padded)).resize(view, resample)  # a copy where the size stays
    pixels = resize(to_pixels(image), view_side, resample)
    columns, rows = (math.ceil(side / window) for side in cut) if window else (0, 0)
    patches = np.zeros((0, 3, patch_side, patch_side), np.float32)
    if window:
        whole = to_pixels(image.resize(cut, resample).crop((0, 0, columns * window, rows * window)))
        squares = whole.reshape(3, rows, window, columns, window).transpose(1, 3, 0, 2, 4)
        patches = resize(squares.reshape(-1, 3, window, window), patch_side, resample)
    patch = f"<patch_start>{'<im_patch>' * settings['num_patch_tokens']}<patch_end>"
    text = "<patch_newline>".join([patch * columns] * rows)
    return pixels, patches, f"{text}<im_start>{'<im_patch>' * settings['num_image_tokens']}<im_end>"


class OnnxModel:
    """
    An exported model in onnxruntime.

    Args:
        directory (`Path`): What export_onnx.py made.
        options: Arguments of `onnxruntime.InferenceSession`, such as `providers`.
    """

    def __init__(self, directory: Path, **options):
        self.settings = json.loads((directory / "settings.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.embeddings, self.pictures, self.decoder = (
            onnxruntime.InferenceSession(directory / f"{name}.onnx", **options)
            for name in ("embeddings", "pictures", "decoder")
        )

    def embed(self, question: str, images: Sequence[Image.Image]) -> np.ndarray:
        """The embeddings (1, tokens, hidden size) of a prompt with the images before the question."""
        if "<im_patch>" in question:
            raise ValueError("the question must not contain <im_patch>, which stands for a picture")
        before, after = self.settings["prompt"]
        processed = [process(image, self.settings["image_processor"]) for image in images]
        views, patches, texts = zip(*processed, strict=True) if images else ((), (), ())
        ids = self.tokenizer.encode(f"{before}{''.join(texts)}{question}{after}", add_special_tokens=False).ids
        (embeddings,) = self.embeddings.run(None, {"input_ids": np.array([ids])})
        if images:
            num_patches = np.array([len(each) for each in patches])
            inputs = {"pixel_values": np.stack(views), "patch_pixel_values": np.concatenate(patches)}
            (features,) = self.pictures.run(None, {**inputs, "num_patches": num_patches})
            embeddings[np.array([ids]) == self.settings["image_token_id"]] = features
        return embeddings

    def generate(self, question: str, images: Sequence[Image.Image], max_new_tokens: int = 256) -> list[int]:
        """The answer's tokens. Raises a `ValueError` if an image or the prompt cannot be used."""
        settings = self.settings
        embeddings = self.embed(question, images)
        room, num_prompt = max_new_tokens, embeddings.shape[1]
        if (limit := settings["longest_sequence"]) is not None:
            if num_prompt >= limit:
                raise ValueError(f"the prompt has {num_prompt} tokens, which leaves none of {limit} for an answer")
            room = min(room, limit - num_prompt)
        _, *names = (each.name for each in self.decoder.get_inputs())
        past = [np.zeros((1, *settings["cache_shape"]), np.float32)] * len(names)
        tokens = []
        while True:
            inputs = {"inputs_embeds": embeddings, **dict(zip(names, past, strict=True))}
            logits, *past = self.decoder.run(None, inputs)
            logits[:, settings["suppress_tokens"]] = -np.inf
            tokens.append(int(logits[0].argmax()))
            if tokens[-1] in settings["eos_token_id"] or len(tokens) >= room:
                return tokens
            (embeddings,) = self.embeddings.run(None, {"input_ids": np.array([tokens[-1:]])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="what export_onnx.py made")
    parser.add_argument("question")
    parser.add_argument("pictures", type=Path, nargs="*", help="image files, which precede the question in the prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="maximum answer length (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        images = [Image.open(path) for path in arguments.pictures]
        model = OnnxModel(arguments.directory)
        print(model.tokenizer.decode(model.generate(arguments.question, images, arguments.max_new_tokens)))
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
