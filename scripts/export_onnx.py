"""Exports a Step3 model to ONNX in parts, and compares each part with the model in onnxruntime.

python scripts/export_onnx.py DIRECTORY
python scripts/export_onnx.py DIRECTORY --model checkpoints/step3-tiny
"""

import argparse
import warnings
from pathlib import Path

import onnxruntime
import torch
from describe import TINY
from files import new_directory, replacing
from torch import nn
from torch.export import Dim
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, logging

import step3_vl


# Largest difference, relative to the largest value, that float32 rounding may cause.
TOLERANCE = 1e-5


class PictureEncoder(nn.Module):
    """
    The vision encoder and the projector: pixels (pictures, channels, side, side) to features (pictures, image tokens,
    hidden_size). Global views and patches only differ in `side`.
    """

    def __init__(self, model: "step3_vl.Step3VLForConditionalGeneration"):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.project(self.model.vision_model(pixel_values).last_hidden_state)


class TextModel(nn.Module):
    """
    The decoder and the head, without a cache: embeddings (batch, tokens, hidden_size), in which the picture features
    have replaced the image tokens, to logits (batch, tokens, vocab_size).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        return self.model(inputs_embeds=inputs_embeds, use_cache=False).logits


@torch.no_grad()
def save(part: nn.Module, path: Path, example: torch.Tensor, num_dynamic: int) -> float:
    """
    Writes a part as ONNX. Returns the largest difference between the outputs of the part and the file for arguments of
    several sizes, relative to the largest value.
    """
    shapes = (dict.fromkeys(range(num_dynamic), Dim.DYNAMIC),)  # the first dimensions may have any size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.onnx.export(torch.export.export(part, (example,), dynamic_shapes=shapes), verbose=False)
        program.save(path, external_data=True)  # an ONNX file alone is limited to 2 GB
    session = onnxruntime.InferenceSession(path)
    differences = []
    for count in (1, 2, 5):
        argument = example.repeat(*[count] * num_dynamic, *[1] * (example.ndim - num_dynamic))[count - 1 :]
        expected = part(argument)
        (actual,) = session.run(None, {session.get_inputs()[0].name: argument.numpy()})
        differences.append(float((torch.from_numpy(actual) - expected).abs().max() / expected.abs().max()))
    return max(differences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument(
        "--model",
        default=TINY,
        required=not TINY.exists(),
        help="directory or hub id (default: step3-tiny, in a checkout)",
    )
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    is_whole = isinstance(AutoConfig.from_pretrained(arguments.model), step3_vl.Step3VLConfig)
    auto_class = AutoModelForImageTextToText if is_whole else AutoModelForCausalLM
    # ONNX has no operators for the other implementations of experts.
    model = auto_class.from_pretrained(arguments.model, dtype=torch.float32, experts_implementation="batched_mm").eval()
    text_config = model.config.get_text_config()
    tokens = torch.arange(14).view(2, 7) % text_config.vocab_size
    parts = {
        "embeddings": (model.get_input_embeddings(), tokens, ("batch", "tokens")),
        "text_model": (TextModel(model), torch.randn(2, 7, text_config.hidden_size), ("batch", "tokens")),
    }
    if is_whole:
        image_processor = AutoProcessor.from_pretrained(arguments.model).image_processor
        channels = model.config.vision_config.num_channels
        for name, side in (("picture", image_processor.size["height"]), ("patch", image_processor.patch_size)):
            parts[f"{name}_encoder"] = (PictureEncoder(model), torch.randn(2, channels, side, side), ("pictures",))
    with replacing(arguments.directory) as target:
        target.mkdir()
        for name, (part, example, dynamic) in parts.items():
            difference = save(part, target / f"{name}.onnx", example, len(dynamic))
            print(f"{name}.onnx: within {difference:.0e} of the model, for any number of {' and '.join(dynamic)}")
            if not difference <= TOLERANCE:
                parser.exit(1, f"{parser.prog}: {name} differs by more than {TOLERANCE:.0e}; nothing was written.\n")


if __name__ == "__main__":
    main()
