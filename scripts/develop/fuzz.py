"""Fuzzes the API with malformed configs, images, texts, tensors and caches.

Reports every outcome that is neither a right answer nor a documented exception, with the seed that reproduces it.

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


# What the API says it raises, and what torch and Python raise for wrong values, shapes and types.
REFUSED = (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError)
REFUSED += (AssertionError,)
SECONDS = 20  # longest time for one attempt
SIDE = 56
NUMBERS = [0, -1, 1, 2, 3, 7, 8, 64, 10**4, 2**31, -(2**63), 10**30, 0.5, -0.1, 1e-30, 1e300, np.nan, np.inf]
ODD_VALUES = [*NUMBERS, True, None, "", "1", "x", [], [1], {}, {"a": 1}, b"1"]
MOE_LAYERS = ["", None, "1", "0,1,2", "1,,2", "a", "9", [1], (0, 2), [-1], [1.5], "-1", 3, [None]]
ROPE_TYPES = ["default", "yarn", "linear", "dynamic", "llama3", "longrope", "nope", 3, None]
OPTIONS = ("max_image_size", "padding", "truncation", "max_length")
MODES = ["RGB", "L", "RGBA", "P", "1", "CMYK", "I", "F", "I;16", "LA", "YCbCr"]
ARRAY_TYPES = ["uint8", "float32", "float64", "int64", "uint16", "bool", "complex64", "object", "int8", "float16"]
SHAPES = [(3, 9, 9), (9, 9), (9, 9, 1), (9, 9, 4), (9,), (2, 9, 9, 3), (9, 9, 2), (0, 9, 3), (1, 1, 1, 1, 1), ()]
NOT_IMAGES = [None, 5, b"abc", "nowhere.png", "data:image/png;base64,@@", "", {}, [], [[]], object(), True]
PNG_CHUNKS = [b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tRNS"]
HEADERS = [b"", b"Exif\0\0", b"II*\0", b"MM\0*", b"Exif\0\0II*\0\x08\0\0\0", b"key\0", b"key\0\0"]


class WrongAnswer(Exception):
    """Neither a right answer nor a refusal."""


class Fuzzer:
    """
    Attempts by kind, each with the random numbers of `choose`. An attempt raises a `WrongAnswer` if something wrong
    was accepted, something right was refused, or a failed call had an effect.
    """

    @torch.no_grad()
    def __init__(self):
        tokenizer = make_tokenizer()
        image_processor = Step3VLImageProcessor(size={"height": SIDE, "width": SIDE}, patch_size=28, max_image_size=168)
        self.processor = Step3VLProcessor(image_processor, tokenizer)
        image_token_id = self.processor.image_token_id
        settings = copy.deepcopy(TINY)
        settings["vision_config"]["image_size"] = SIDE
        settings["text_config"].update(vocab_size=len(tokenizer), max_position_embedding=64)
        set_seed(0)
        self.model = Step3VLForConditionalGeneration(Step3VLConfig(**settings, image_token_id=image_token_id)).eval()
        config = self.model.config
        tokens = num_image_tokens(SIDE, config.vision_config.patch_size, config.understand_projector_stride)
        ids = torch.randint(1, 50, (2, 9))
        ids[1, 2 : 2 + tokens] = image_token_id
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.inputs["pixel_values"] = torch.randn(1, 3, SIDE, SIDE)
        self.answer = self.model(**self.inputs)
        self.step = {"input_ids": torch.tensor([[5], [6]]), "attention_mask": torch.ones(2, 10).long()}
        self.next_answer = self.model(**self.step, cache=copy.deepcopy(self.answer[CACHE_NAME])).logits

    def config(self, choose: random.Random) -> None:
        """A small config with some values changed. It must survive a round trip, and a model of it can be built."""
        settings = copy.deepcopy(TINY)
        settings["image_token_id"] = 7
        settings["text_config"]["vocab_size"] = 99
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        for _ in range(choose.randint(1, 3)):
            part = choose.choice([None, *Step3VLConfig.sub_configs])
            fields = dataclasses.fields(Step3VLConfig.sub_configs[part] if part else Step3VLConfig)
            name = choose.choice([field.name for field in fields if field.name not in inherited])
            value = choose.choice(ODD_VALUES)
            if name == "moe_layers_enum":
                value = choose.choice(MOE_LAYERS)
            elif name == "rope_parameters":
                value = {"factor": value, "rope_type": choose.choice(ROPE_TYPES), "rope_theta": choose.choice(NUMBERS)}
            target = settings[part] if part else settings
            if isinstance(target, dict):  # not replaced before
                target[name] = value
        config = Step3VLConfig(**settings)
        if Step3VLConfig.from_dict(config.to_dict()).to_dict() != config.to_dict():
            raise WrongAnswer("the config changes in a round trip")
        parts = (config, config.text_config, config.vision_config)
        largest = max(value for part in parts for value in vars(part).values() if type(value) is int)
        if largest <= 10**4 and max(part.num_hidden_layers for part in parts[1:]) <= 32:  # built in seconds
            with torch.device("meta"):
                Step3VLForConditionalGeneration(config)

    @staticmethod
    def odd_image(choose: random.Random):
        """An image, array, tensor or file that may be broken, or something else."""
        width, height = choose.choices([0, 1, 2, 31, 32, 33, 56, 57, 150, 400, 3000], k=2)
        kind = choose.choices(["image", "array", "other", "file"], weights=(3, 2, 1, 3))[0]
        if kind == "image":
            return Image.new(choose.choice(MODES), (width, height))
        if kind == "array":
            shape = choose.choice([(height % 99, width % 99, 3), choose.choice(SHAPES)])
            numbers = np.random.default_rng(choose.randrange(2**32))
            pixels = numbers.uniform(choose.choice([0, -1]), choose.choice([1, 255, 256, 70000]), shape)
            pixels = np.asarray(pixels).astype(choose.choice(ARRAY_TYPES))
            if pixels.dtype.kind == "f" and pixels.size and choose.random() < 0.3:
                pixels.flat[0] = choose.choice([np.nan, np.inf, -np.inf])
            return torch.from_numpy(pixels) if pixels.dtype.kind in "biuf" and choose.random() < 0.4 else pixels
        if kind == "other":
            return choose.choice(NOT_IMAGES)
        file = io.BytesIO()
        image = Image.new("RGB", (max(width, 1), height % 500 + 1))
        image.save(file, choose.choice(["PNG", "JPEG", "BMP", "GIF"]))
        data = bytearray(file.getvalue())
        for _ in range(choose.randint(0, 5)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        return Image.open(io.BytesIO(data[: choose.choice([len(data), choose.randrange(len(data))])]))

    def call(self, choose: random.Random) -> None:
        """The processor with text and images that may not match. The outputs must match each other."""
        images = [self.odd_image(choose) for _ in range(choose.randint(0, 3))]
        if choose.random() < 0.2:
            images = [images, []]
        pieces = ["<im_patch>", "word ", "<im_start>", "é", "\0", "<|EOT|>"]
        text = "".join(choose.choices(pieces, k=choose.randint(0, 5)))
        if choose.random() < 0.6:
            text = "<im_patch>" * len(images)
        text = choose.choice([text, text, text, [text], [text, "more"], None, 5, [None], []])
        options = {name: choose.choice(ODD_VALUES) for name in OPTIONS if choose.random() < 0.04}
        images = choose.choice([images, images, images, None])
        output = self.processor(text=text, images=images, return_tensors="pt", **options)
        for name, values in output.items():
            if isinstance(values, torch.Tensor) and not values.float().isfinite().all():
                raise WrongAnswer(f"{name} is not finite")
        if "pixel_values" in output and "input_ids" in output:
            counts, num_tokens = output["num_patches"], self.processor.image_processor.num_tokens
            expected = num_tokens(output["pixel_values"].shape[-1]) * len(counts)
            if "patch_pixel_values" in output:
                patches = output["patch_pixel_values"]
                expected += int(counts.sum()) * num_tokens(patches.shape[-1])
                if counts.sum() != len(patches):
                    raise WrongAnswer(f"{len(patches)} patches, but their counts are {counts.tolist()}")
            found = int((output["input_ids"] == self.processor.image_token_id).sum())
            if found != expected:
                raise WrongAnswer(f"{found} image tokens for {expected} image features")

    def metadata(self, choose: random.Random) -> None:
        """An image file with random metadata. The processor must accept it if Pillow can read the pixels."""
        body = choose.choice(HEADERS) + choose.randbytes(choose.choice([0, 1, 2, 4, 8, 12, 26, 60, 300]))
        file, image = io.BytesIO(), Image.new(choose.choice(["RGB", "L", "RGBA", "P", "LA"]), (31, 57), 7)
        kind = choose.choice(["PNG", "PNG", "JPEG", "WEBP", "GIF"])
        if kind == "PNG":
            image.save(file, kind)
            data, chunk = file.getvalue(), choose.choice(PNG_CHUNKS) + body
            place = choose.choice([33, len(data) - 12])  # before or after the pixels
            chunk = len(body).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
            data = data[:place] + chunk + data[place:]
        else:
            name = choose.choice(["exif", "icc_profile", "comment"])
            # Pillow only writes EXIF with a header.
            image.convert("RGB").save(file, kind, **{name: b"Exif\0\0II*\0" + body if name == "exif" else body})
            data = file.getvalue()
        try:
            Image.open(io.BytesIO(data)).load()
            is_readable = True
        except Exception:  # any that Pillow raises
            is_readable = False
        try:
            self.processor(text="<im_patch>", images=base64.b64encode(data).decode())
        except Exception as error:
            if is_readable:
                raise WrongAnswer(f"an image that Pillow reads is refused: {error!r}") from error
            raise

    @staticmethod
    def odd_tensor(choose: random.Random, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor with another shape, type or values, or `None`."""
        kind = choose.choice(["none", "type", "rows", "columns", "twice", "value", "transposed", "element", "element"])
        if kind == "none":
            return None
        if kind == "type":
            return tensor.to(choose.choice([torch.float32, torch.float64, torch.bool, torch.int32, torch.uint8]))
        if not tensor.ndim or not tensor.numel():
            return tensor
        if kind == "rows":
            return tensor[choose.choice([0, slice(0, 0), slice(0, 1), None])]
        if kind == "columns":
            return tensor[..., choose.choice([slice(0, 0), slice(1, None), 0, None])]
        if kind == "twice":
            return torch.cat([tensor] * 2, choose.randrange(tensor.ndim))
        if kind == "value":
            return tensor.clone().fill_(choose.choice([0, 1, 7, -1, 98, 99, 300, 2**31 - 1]))
        if kind == "transposed":
            return tensor.transpose(0, -1)
        changed = tensor.clone()
        changed.view(-1)[choose.randrange(changed.numel())] = choose.choice([-1, 0, 7, 99, 10**6])
        return changed

    def forward(self, choose: random.Random) -> None:
        """The model with odd inputs. It must not change them, and the next good call must give the same answer."""
        inputs, extra = (
            dict(self.inputs),
            {
                "position_ids": torch.arange(9).expand(2, 9),
                "labels": self.inputs["input_ids"],
                "num_patches": torch.tensor([0]),
                "patch_pixel_values": torch.zeros(1, 3, 28, 28),
                "image_embeds": torch.zeros(4, 64),
                "inputs_embeds": torch.zeros(2, 9, 64),
                "logits_to_keep": torch.tensor(1),
            },
        )
        inputs |= {name: extra[name] for name in choose.sample(sorted(extra), choose.choice([0, 0, 1, 2]))}
        for name in choose.sample(list(inputs), choose.choice([1, 1, 2])):
            inputs[name] = self.odd_tensor(choose, inputs[name])
        before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        try:
            self.model(**inputs)
        finally:
            for name, value in before.items():
                if not torch.equal(value.nan_to_num(), inputs[name].nan_to_num()):
                    raise WrongAnswer(f"{name} was changed")
            if choose.random() < 0.2 and not torch.equal(self.model(**self.inputs).logits, self.answer.logits):
                raise WrongAnswer("the next good call gives another answer")

    def decode(self, choose: random.Random) -> None:
        """A step with an odd cache or odd inputs. If it fails, the cache must not change."""
        kind = choose.choice(["good", "good", "static", "dynamic"])
        if kind == "good":
            cache = copy.deepcopy(self.answer[CACHE_NAME])
        elif kind == "static":
            cache = StaticCache(config=self.model.config, max_cache_len=choose.choice([9, 10, 20]))
            self.model(**self.inputs, cache=cache)
        else:
            cache = DynamicCache()
            shape = [2, 1, choose.choice([0, 9]), choose.choice([16, 8])]
            for layer in range(self.model.config.num_hidden_layers):
                cache.update(torch.zeros(shape), torch.zeros(shape), layer)
        length, step = int(cache.get_seq_length()), dict(self.step)
        if choose.random() < 0.7:
            name = choose.choice(sorted(step))
            step[name] = self.odd_tensor(choose, step[name])
        if choose.random() < 0.3:
            step["position_ids"] = self.odd_tensor(choose, torch.full((2, 1), 9))
        is_good = kind == "good" and all(step.get(name) is self.step.get(name) for name in [*step, *self.step])
        try:
            logits = self.model(**step, cache=cache).logits
        except Exception:
            if int(cache.get_seq_length()) != length:
                raise WrongAnswer("a failed step wrote to the cache") from None
            raise
        if is_good and not torch.equal(logits, self.next_answer):
            raise WrongAnswer("a good step gives another answer")


# The documented exceptions of each kind of attempt; also of files that cannot be read, and Pillow's for bombs.
KINDS = {
    Fuzzer.config: REFUSED,
    Fuzzer.call: (*REFUSED, OSError, Image.DecompressionBombError),
    Fuzzer.metadata: (ValueError, OSError),
    Fuzzer.forward: REFUSED,
    Fuzzer.decode: REFUSED,
}


@torch.no_grad()
def fuzz(seed: int, fuzzer: Fuzzer) -> str | None:
    """Makes one attempt, and says what is wrong with its outcome, if anything."""
    choose = random.Random(seed)
    attempt, documented = choose.choice(list(KINDS.items()))
    start = time.monotonic()
    try:
        attempt(fuzzer, choose)
    except WrongAnswer as error:
        return f"{attempt.__name__}: {error}"
    except documented:
        pass
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {str(error)[:200]!r} at {place.filename}:{place.lineno}"
        return f"{attempt.__name__}: {message}"
    if (seconds := time.monotonic() - start) > SECONDS:
        return f"{attempt.__name__}: took {seconds:.0f} seconds"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to run (default: %(default)s)")
    parser.add_argument("--count", type=int, help="largest number of attempts")
    parser.add_argument("--seed", type=int, help="seed of the first attempt (default: random)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity(logging.CRITICAL)
    seed = first = random.randrange(10**9) if arguments.seed is None else arguments.seed
    fuzzer, found, end = Fuzzer(), 0, time.monotonic() + 60 * arguments.minutes
    with tqdm(total=arguments.count, unit=" attempts") as progress:
        while time.monotonic() < end and (arguments.count is None or seed < first + arguments.count):
            if (problem := fuzz(seed, fuzzer)) is not None:
                found += 1
                tqdm.write(f"--seed {seed} --count 1: {problem}")
            seed += 1
            progress.update()
    print(f"{seed - first} attempts, {found} not as documented")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
