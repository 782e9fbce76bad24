"""Fuzzes the API with malformed configs, pictures, texts, tensors and caches, and reports whatever is neither a right
answer nor a documented exception, with the seed that repeats it.

python scripts/develop/fuzz.py --minutes 10
python scripts/develop/fuzz.py --seed 1234 --count 1
"""

import argparse
import base64
import copy
import dataclasses
import io
import random
import sys
import time
import traceback
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedConfig, StaticCache, set_seed
from transformers.utils import logging

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration, Step3VLImageProcessor, Step3VLProcessor
from step3_vl.configuration_step3 import num_image_tokens
from step3_vl.generation_step3 import CACHE_NAME


sys.path.append(str(Path(__file__).parents[1] / "tiny"))
from make_random_model import TINY, make_tokenizer


# What the API says it raises, and what torch and Python do for wrong values, shapes and types; for a file that cannot
# be read, OSErrors, and PIL's bomb.
REFUSED = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
REFUSED += (AssertionError,)
DOCUMENTED = {
    "config": REFUSED,
    "processor": (*REFUSED, OSError, Image.DecompressionBombError),
    "metadata": (ValueError, OSError),
    "model": REFUSED,
    "decode": REFUSED,
}
SECONDS = 20
SIDE = 56


class WrongAnswer(Exception):
    """Neither a right answer nor a refusal."""


def odd_number(choose: random.Random):
    numbers = [0, -1, 1, 2, 3, 7, 8, 64, 10**4, 2**31, -(2**63), 10**30, 0.5, -0.1, 1e-30, 1e300]
    return choose.choice([*numbers, float("nan"), float("inf"), True, None, "", "1", "x", [], [1], {}, {"a": 1}, b"1"])


def odd_config(choose: random.Random):
    """A small config with some of its values changed; what is built from it is never large."""
    settings = copy.deepcopy(TINY)
    settings["image_token_id"] = 7
    settings["text_config"]["vocab_size"] = 99
    parts = {"": settings, "text_config": settings["text_config"], "vision_config": settings["vision_config"]}
    classes = {"": Step3VLConfig, **Step3VLConfig.sub_configs}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    for _ in range(choose.randint(1, 3)):
        which = choose.choice(list(parts))
        fields = [field.name for field in dataclasses.fields(classes[which]) if field.name not in inherited]
        name = choose.choice(fields)
        if name == "moe_layers_enum":
            values = ["", None, "1", "0,1,2", "1,,2", "a", "9", [1], (0, 2), [-1], [1.5], "-1", 3, [None]]
            parts[which][name] = choose.choice(values)
        elif name == "rope_parameters":
            kind = choose.choice(["default", "yarn", "linear", "dynamic", "llama3", "longrope", "nope", 3, None])
            parts[which][name] = {"rope_type": kind, "factor": odd_number(choose), "rope_theta": odd_number(choose)}
        else:
            parts[which][name] = odd_number(choose)
    config = Step3VLConfig(**settings)
    text = config.text_config
    small = max(text.hidden_size, text.intermediate_size, text.num_attention_heads * text.head_dim, text.vocab_size)
    small = max(small, text.share_q_dim, text.moe_num_experts * text.moe_intermediate_size, text.share_expert_dim)
    vision = config.vision_config
    small = max(small, vision.hidden_size, vision.intermediate_size, vision.output_hidden_size, vision.image_size)
    small = max(small, vision.patch_size, text.num_hidden_layers * 64, vision.num_hidden_layers * 64)
    if small <= 2048:
        again = Step3VLConfig.from_dict(config.to_dict())
        if again.to_dict() != config.to_dict():
            raise WrongAnswer("the config changes on a round trip")
        with torch.device("meta"):
            Step3VLForConditionalGeneration(config)


def odd_picture(choose: random.Random):
    numbers = np.random.default_rng(choose.randrange(2**32))
    width, height = (choose.choice([0, 1, 2, 31, 32, 33, 56, 57, 150, 400, 3000]) for _ in range(2))
    kind = choose.randrange(9)
    if kind <= 2:
        mode = choose.choice(["RGB", "L", "RGBA", "P", "1", "CMYK", "I", "F", "I;16", "LA", "YCbCr"])
        return Image.new(mode, (width, height))
    if kind <= 4:
        shape = choose.choice(
            [(height % 99, width % 99, 3), (3, 9, 9), (9, 9), (9, 9, 1), (9, 9, 4), (9,), (2, 9, 9, 3)]
        )
        shape = choose.choice([shape, shape, (9, 9, 2), (0, 9, 3), (1, 1, 1, 1, 1), ()])
        pixels = numbers.uniform(choose.choice([0, -1]), choose.choice([1, 255, 256, 70000]), shape)
        kinds = ["uint8", "float32", "float64", "int64", "uint16", "bool", "complex64", "object", "int8", "float16"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = pixels.astype(choose.choice(kinds))
        if pixels.dtype.kind == "f" and pixels.size and choose.random() < 0.3:
            pixels.flat[0] = choose.choice([np.nan, np.inf, -np.inf])
        return torch.from_numpy(pixels) if pixels.dtype.kind in "biuf" and choose.random() < 0.4 else pixels
    if kind == 5:
        return choose.choice(
            [None, 5, b"abc", "nowhere.png", "data:image/png;base64,@@", "", {}, [], [[]], object(), True]
        )
    file = io.BytesIO()
    Image.new("RGB", (max(width, 1), max(height, 1) % 500 + 1)).save(file, choose.choice(["PNG", "JPEG", "BMP", "GIF"]))
    data = bytearray(file.getvalue())
    for _ in range(choose.randint(0, 5)):
        data[choose.randrange(len(data))] = choose.randrange(256)
    data = bytes(data[: choose.choice([len(data), choose.randrange(len(data))])])
    return Image.open(io.BytesIO(data))


def odd_call(choose: random.Random, processor: Step3VLProcessor):
    """Text and pictures that fit or do not; what comes out must fit."""
    images = [odd_picture(choose) for _ in range(choose.randint(0, 3))]
    if choose.random() < 0.2:
        images = [images, []]
    text = "".join(choose.choices(["<im_patch>", "word ", "<im_start>", "é", "\0", "<|EOT|>"], k=choose.randint(0, 5)))
    if choose.random() < 0.6:
        text = "<im_patch>" * len(images)
    text = choose.choice([text, text, text, [text], [text, "more"], None, 5, [None], []])
    options = {}
    for name in ("max_image_size", "padding", "truncation", "max_length"):
        if choose.random() < 0.04:
            options[name] = odd_number(choose)
    output = processor(text=text, images=choose.choice([images, images, images, None]), return_tensors="pt", **options)
    for name, values in output.items():
        if isinstance(values, torch.Tensor) and not values.float().isfinite().all():
            raise WrongAnswer(f"{name} is not finite")
    if "pixel_values" in output and "input_ids" in output:
        counts = output["num_patches"]
        views = processor.image_processor.num_tokens(output["pixel_values"].shape[-1]) * len(counts)
        if "patch_pixel_values" in output:
            if counts.sum() != len(output["patch_pixel_values"]):
                raise WrongAnswer("patches and their counts differ")
            side = output["patch_pixel_values"].shape[-1]
            views += int(counts.sum()) * processor.image_processor.num_tokens(side)
        found = int((output["input_ids"] == processor.image_token_id).sum())
        if found != views:
            raise WrongAnswer(f"{found} image tokens for {views} image features")


def odd_metadata(choose: random.Random, processor: Step3VLProcessor):
    """A file with metadata of random bytes; where PIL shows its pixels, so do we."""
    body = choose.randbytes(choose.choice([0, 1, 2, 4, 8, 12, 26, 60, 300]))
    body = (
        choose.choice([b"", b"Exif\0\0", b"II*\0", b"MM\0*", b"Exif\0\0II*\0\x08\0\0\0", b"key\0", b"key\0\0"]) + body
    )
    file, picture = io.BytesIO(), Image.new(choose.choice(["RGB", "L", "RGBA", "P", "LA"]), (31, 57), 7)
    kind = choose.choice(["PNG", "PNG", "JPEG", "WEBP", "GIF"])
    if kind == "PNG":
        picture.save(file, kind)
        chunk = choose.choice(
            [b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tRNS"]
        )
        data, chunk = file.getvalue(), chunk + body
        place = choose.choice([33, len(data) - 12])  # before the pixels, or after them
        chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        data = data[:place] + chunk + data[place:]
    else:
        name = choose.choice(["exif", "icc_profile", "comment"])
        # PIL itself looks for a header in the EXIF that it writes.
        picture.convert("RGB").save(file, kind, **{name: b"Exif\0\0II*\0" + body if name == "exif" else body})
        data = file.getvalue()
    try:
        Image.open(io.BytesIO(data)).load()
        is_shown = True
    except Exception:  # whatever PIL makes of it, ours is the documented one
        is_shown = False
    try:
        processor(text="<im_patch>", images=base64.b64encode(data).decode())
    except Exception as error:
        if is_shown:
            raise WrongAnswer(f"a picture that PIL shows is refused: {error!r}") from error
        raise


class Models:
    """A model, good inputs, and the answers that it must still give after any failed call."""

    @torch.no_grad()
    def __init__(self, image_token_id: int, vocab_size: int):
        settings = copy.deepcopy(TINY)
        settings["vision_config"]["image_size"] = SIDE
        settings["text_config"].update(vocab_size=vocab_size, max_position_embedding=64)
        set_seed(0)
        self.model = Step3VLForConditionalGeneration(Step3VLConfig(**settings, image_token_id=image_token_id)).eval()
        config = self.model.config
        tokens = num_image_tokens(SIDE, config.vision_config.patch_size, config.understand_projector_stride)
        ids = torch.randint(1, 50, (2, 9))
        ids[1, 2 : 2 + tokens] = image_token_id
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, 3, SIDE, SIDE),
        }
        self.answer = self.model(**self.inputs)
        self.step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 10).long()}
        self.next_answer = self.model(**self.step, cache=copy.deepcopy(self.answer[CACHE_NAME])).logits


def odd_tensor(choose: random.Random, like: torch.Tensor):
    """The tensor, or one that has another shape, type or values, or `None`."""
    kind = choose.randrange(9)
    if kind == 0:
        return None
    if kind == 1:
        return like.to(choose.choice([torch.float32, torch.float64, torch.bool, torch.int32, torch.uint8]))
    if kind == 2 and like.ndim:
        return like[choose.choice([0, slice(0, 0), slice(0, 1), None])]
    if kind == 3 and like.ndim:
        return like[..., choose.choice([slice(0, 0), slice(1, None), 0, None])]
    if kind == 4:
        return torch.cat([like] * 2, choose.randrange(like.ndim)) if like.ndim else like
    if kind == 5:
        return like.clone().fill_(choose.choice([0, 1, 7, -1, 98, 99, 300, 2**31 - 1])) if like.numel() else like
    if kind == 6:
        return like.transpose(0, -1) if like.ndim > 1 else like
    changed = like.clone()
    if changed.numel():
        changed.view(-1)[choose.randrange(changed.numel())] = choose.choice([-1, 0, 7, 99, 10**6])
    return changed


def odd_forward(choose: random.Random, models: Models):
    names = ["input_ids", "attention_mask", "pixel_values"]
    inputs = dict(models.inputs)
    extra = {
        "position_ids": torch.arange(9).expand(2, 9),
        "labels": inputs["input_ids"],
        "num_patches": torch.tensor([0]),
        "patch_pixel_values": torch.zeros(1, 3, 28, 28),
        "image_embeds": torch.zeros(4, 64),
        "inputs_embeds": torch.zeros(2, 9, 64),
        "logits_to_keep": torch.tensor(1),
    }
    for name in choose.sample(sorted(extra), choose.choice([0, 0, 1, 2])):
        inputs[name] = extra[name]
        names.append(name)
    for name in choose.sample(names, choose.choice([1, 1, 2])):
        if isinstance(inputs[name], torch.Tensor):
            inputs[name] = odd_tensor(choose, inputs[name])
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    try:
        models.model(**inputs)
    finally:
        for name, value in before.items():
            if not torch.equal(value.nan_to_num(), inputs[name].nan_to_num()):
                raise WrongAnswer(f"{name} was changed")
        if choose.random() < 0.2 and not torch.equal(models.model(**models.inputs).logits, models.answer.logits):
            raise WrongAnswer("the next good call gives another answer")


def odd_decode(choose: random.Random, models: Models):
    """A step from a cache that fits or not; a failed one leaves the cache as it was."""
    kind = choose.randrange(4)
    if kind <= 1:
        cache = copy.deepcopy(models.answer[CACHE_NAME])
    elif kind == 2:
        cache = StaticCache(config=models.model.config, max_cache_len=choose.choice([9, 10, 20]))
        models.model(**models.inputs, cache=cache)
    else:
        cache = DynamicCache()
        shape = [2, 1, choose.choice([0, 9]), choose.choice([16, 8])]
        for layer in range(models.model.config.num_hidden_layers):
            cache.update(torch.zeros(shape), torch.zeros(shape), layer)
    length = int(cache.get_seq_length())
    step = dict(models.step)
    if choose.random() < 0.7:
        name = choose.choice(sorted(step))
        step[name] = odd_tensor(choose, step[name])
    if choose.random() < 0.3:
        step["position_ids"] = odd_tensor(choose, torch.full((2, 1), 9))
    is_good = all(step.get(name) is models.step.get(name) for name in (*models.step, "position_ids")) and kind <= 1
    try:
        logits = models.model(**step, cache=cache).logits
    except Exception:
        if int(cache.get_seq_length()) != length:
            raise WrongAnswer("a failed step wrote to the cache") from None
        raise
    if is_good and not torch.equal(logits, models.next_answer):
        raise WrongAnswer("a good step gives another answer")


def fuzz(seed: int, processor: Step3VLProcessor, models: Models) -> str | None:
    """One attempt; what is wrong with its outcome, if anything."""
    choose = random.Random(seed)
    part = choose.choice(list(DOCUMENTED))
    start = time.monotonic()
    try:
        with torch.no_grad():
            if part == "config":
                odd_config(choose)
            elif part == "processor":
                odd_call(choose, processor)
            elif part == "metadata":
                odd_metadata(choose, processor)
            elif part == "model":
                odd_forward(choose, models)
            else:
                odd_decode(choose, models)
    except WrongAnswer as error:
        return f"{part}: {error}"
    except DOCUMENTED[part]:
        pass
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{part}: {type(error).__name__}: {str(error)[:200]!r} at {place.filename}:{place.lineno}"
    if (seconds := time.monotonic() - start) > SECONDS:
        return f"{part}: took {seconds:.0f} seconds"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0].replace("\n", " "))
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: 1)")
    parser.add_argument("--count", type=int, help="stop after so many attempts")
    parser.add_argument("--seed", type=int, default=None, help="of the first attempt (default: a fresh one)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    first = random.randrange(10**9) if arguments.seed is None else arguments.seed
    tokenizer = make_tokenizer()
    image_processor = Step3VLImageProcessor(size={"height": 56, "width": 56}, patch_size=28, max_image_size=168)
    processor = Step3VLProcessor(image_processor, tokenizer)
    models = Models(processor.image_token_id, len(tokenizer))
    end = time.monotonic() + 60 * arguments.minutes
    found, seed = 0, first
    with tqdm(total=arguments.count, unit=" attempts") as progress:
        while time.monotonic() < end and (arguments.count is None or seed < first + arguments.count):
            if (problem := fuzz(seed, processor, models)) is not None:
                found += 1
                tqdm.write(f"--seed {seed} --count 1: {problem}")
            seed += 1
            progress.update()
    print(f"{seed - first} attempts, {found} not as documented")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
