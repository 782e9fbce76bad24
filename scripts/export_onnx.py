"""Exports a Step3 model to ONNX, with a cache, and compares each part with the model in onnxruntime.

python scripts/export_onnx.py DIRECTORY
python scripts/export_onnx.py DIRECTORY --model checkpoints/step3-tiny --aoti

run_onnx.py answers questions with what it makes.
"""

import argparse
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from describe import TINY
from files import new_directory, replacing, write_json
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    PreTrainedModel,
    logging,
)

import step3_vl


# Largest difference, relative to the largest value, that float32 rounding may cause.
TOLERANCE = 1e-5


class Part(nn.Module):
    """A part of a model. Each of `examples` is a tuple of arguments; the first is traced."""

    input_names: list[str]
    output_names: list[str]
    dynamic_shapes: tuple  # of the arguments
    examples: list[tuple]

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model


class Embeddings(Part):
    """Token ids (batch, tokens) to embeddings (batch, tokens, hidden_size)."""

    input_names, output_names = ["input_ids"], ["inputs_embeds"]
    dynamic_shapes = (dict.fromkeys((0, 1), Dim.DYNAMIC),)

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        vocab_size = model.config.get_text_config().vocab_size
        self.examples = [(torch.randint(vocab_size, size),) for size in ((2, 7), (1, 1))]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(input_ids)


class Pictures(Part):
    """
    Pictures, as the image processor makes them, to their features (rows, hidden_size): for each picture those of its
    patches, then those of its global view.
    """

    input_names, output_names = ["pixel_values", "patch_pixel_values", "num_patches"], ["features"]
    dynamic_shapes = ({0: Dim.DYNAMIC},) * 3

    def __init__(self, model: PreTrainedModel, image_processor: "step3_vl.Step3VLImageProcessor"):
        super().__init__(model.model)
        channels = model.config.vision_config.num_channels
        sides = (image_processor.size["height"], image_processor.patch_size)
        self.examples = []
        for num_patches in ([1, 2], [0], [3, 0, 1]):
            pictures, patches = (
                torch.randn(count, channels, side, side)
                for count, side in zip((len(num_patches), sum(num_patches)), sides, strict=True)
            )
            self.examples.append((pictures, patches, torch.tensor(num_patches)))

    def forward(
        self, pixel_values: torch.Tensor, patch_pixel_values: torch.Tensor, num_patches: torch.Tensor
    ) -> torch.Tensor:
        return torch.cat(self.model.get_image_features(pixel_values, patch_pixel_values, num_patches).pooler_output)


class Decoder(Part):
    """
    The decoder and the head: embeddings (batch, tokens, hidden_size), in which the picture features have replaced the
    image tokens, and each layer's keys and values of earlier tokens (batch, key/value heads, earlier tokens, head_dim),
    none for a prompt, to the last token's logits (batch, vocab_size), and keys and values of all tokens.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        config = model.config.get_text_config()
        layers = range(config.num_hidden_layers)
        self.input_names = ["inputs_embeds", *(f"past_key_values.{i}.{x}" for x in ("key", "value") for i in layers)]
        self.output_names = ["logits", *(f"present.{i}.{x}" for x in ("key", "value") for i in layers)]
        past = [dict.fromkeys((0, 2), Dim.DYNAMIC) for _ in layers]
        self.dynamic_shapes = (dict.fromkeys((0, 1), Dim.DYNAMIC), past, past)
        self.examples = []
        for batch_size, num_new, num_past in ((2, 7, 5), (3, 6, 0), (1, 1, 9), (1, 1, 0)):
            embeddings = torch.randn(batch_size, num_new, config.hidden_size)
            shape = (batch_size, config.num_attention_groups, num_past, config.head_dim)
            self.examples.append((embeddings, *([torch.randn(shape) for _ in layers] for _ in range(2))))

    def forward(
        self, inputs_embeds: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        cache = DynamicCache(zip(keys, values, strict=True))
        positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + keys[0].shape[2]
        output = self.model(
            inputs_embeds=inputs_embeds, position_ids=positions[None], cache=cache, use_cache=True, logits_to_keep=1
        )
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        return output.logits[:, -1], keys, values


def trace(part: Part) -> ExportedProgram:
    return torch.export.export(part, part.examples[0], dynamic_shapes=part.dynamic_shapes)


@torch.no_grad()
def difference(part: Part, run: Callable[..., list[torch.Tensor]]) -> float:
    """
    The largest difference between the outputs of a part and of `run` for the examples, relative to the largest value of
    each: NaN if one is, `inf` if a shape differs.
    """
    differences = []
    for example in part.examples:
        for actual, expected in zip(run(*example), pytree.tree_leaves(part(*example)), strict=True):
            if actual.shape != expected.shape:
                return float("inf")
            differences.append((actual - expected).abs().max() / expected.abs().max())
    return float(torch.stack(differences).max())


def save_onnx(part: Part, path: Path) -> float:
    """Writes a part as ONNX. Returns the difference of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.onnx.export(
            trace(part), input_names=part.input_names, output_names=part.output_names, verbose=False
        )
        program.save(path, external_data=True)  # an ONNX file alone is limited to 2 GB
    session = onnxruntime.InferenceSession(path)

    def run(*example) -> list[torch.Tensor]:
        arrays = (tensor.numpy() for tensor in pytree.tree_leaves(example))
        outputs = session.run(part.output_names, dict(zip(part.input_names, arrays, strict=True)))
        return [torch.from_numpy(output) for output in outputs]

    return difference(part, run)


def save_compiled(part: Part, path: Path) -> float:
    """Compiles a part ahead of time. Returns the difference of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._inductor.aoti_compile_and_package(trace(part), package_path=str(path))
    compiled = torch._inductor.aoti_load_package(str(path))
    return difference(part, lambda *example: pytree.tree_leaves(compiled(*example)))


def settings_of(model: PreTrainedModel, processor: "step3_vl.Step3VLProcessor") -> dict:
    """What run_onnx.py needs to know. Raises a `ValueError` for an image processor whose steps it does not take."""
    image_processor, text_config = processor.image_processor.to_dict(), model.config.get_text_config()
    steps = ("do_convert_rgb", "do_rescale", "do_normalize")
    if skipped := [step for step in steps if not image_processor[step]]:
        raise ValueError(f"run_onnx.py takes every step of the image processor, but {skipped[0]} is off")
    mark = f"{processor.image_token}\n\n"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\n\n"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, found, after = prompt.partition(mark)
    if not found:
        raise ValueError("run_onnx.py needs a chat template that keeps pictures and questions as they are")
    generation, ends = model.generation_config, model.generation_config.eos_token_id
    return {
        "image_processor": image_processor,
        "image_token_id": model.config.image_token_id,
        "prompt": [before, after],
        "eos_token_id": ends if isinstance(ends, list) else [ends],
        "suppress_tokens": sorted({*(generation.suppress_tokens or []), model.config.image_token_id}),
        "cache_shape": [text_config.num_attention_groups, 0, text_config.head_dim],
        "longest_sequence": text_config.longest_sequence,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument(
        "--model",
        default=TINY,
        required=not TINY.exists(),
        help="directory or hub id (default: step3-tiny, in a checkout)",
    )
    parser.add_argument("--aoti", action="store_true", help="also compile the decoder ahead of time, by AOTInductor")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # ONNX has no checks of values
    is_whole = isinstance(AutoConfig.from_pretrained(arguments.model), step3_vl.Step3VLConfig)
    auto_class = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
    # ONNX has no operators for the other implementations of experts.
    model = auto_class.from_pretrained(arguments.model, dtype=torch.float32, experts_implementation="batched_mm").eval()
    parts = {"embeddings": Embeddings(model), "decoder": Decoder(model)}
    if is_whole:
        processor = AutoProcessor.from_pretrained(arguments.model)
        try:
            settings = settings_of(model, processor)
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: {error}\n")
        parts["pictures"] = Pictures(model, processor.image_processor)
    with replacing(arguments.directory) as target:
        target.mkdir()
        saves = [(f"{name}.onnx", save_onnx, part) for name, part in parts.items()]
        saves += [("decoder.pt2", save_compiled, parts["decoder"])] * arguments.aoti
        for file, save, part in saves:
            result = save(part, target / file)
            print(f"{file}: within {result:.0e} of the model")
            if not result <= TOLERANCE:
                parser.exit(1, f"{parser.prog}: {file} differs by more than {TOLERANCE:.0e}; nothing was written.\n")
        if is_whole:
            write_json(target / "settings.json", settings)
            processor.tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))


if __name__ == "__main__":
    main()
