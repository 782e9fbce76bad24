"""Quantises a checkpoint, experts included, a layer at a time, with or without calibration on conversations.

python scripts/quantise.py MODEL OUTPUT --format w4a16 --method gptq --calibrate data.jsonl
python scripts/quantise.py MODEL OUTPUT --format nf4
python scripts/quantise.py QUANTISED OUTPUT --format bfloat16

The last makes a plain checkpoint of a quantised one. `conversations.py` says what a line of the data looks like.
"""

import argparse
import copy
import random
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from checkpoint_files import (
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    Step3VLConfig,
    failure,
    read_checkpoint,
    read_config,
    read_header,
    read_index,
    weight_block,
)
from conversations import BadData
from convert_checkpoint import (
    copy_files,
    fingerprint,
    make_plan,
    resolve,
    select,
    write_index,
    write_shard,
    write_whole,
)
from experts import describe_counts
from rounding import PRESETS, LayerQuantiser, make_settings, read_form
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from training_data import Sample, load_processor, read_all
from transformers import FineGrainedFP8Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

import step3_vl
from step3_vl.checkpoint_step3 import unstack_experts
from step3_vl.modeling_step3 import Step3TextDecoderLayer


# Linear layers of the vision encoder, and names of single experts and of a module's tensors.
VISION_LAYERS = re.compile(r"vision_model\..*\.(?:qkv_proj|out_proj|fc1|fc2)|vit_large_projector")
SINGLE_EXPERT = re.compile(r"(.*\.moe\.)experts\.(\d+)\.(\w+_proj\.weight)")
MODULE_AND_PART = re.compile(r"(.*?\.)(weight\..*|[^.]+)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Quantiser:
    """Writes a quantised checkpoint, a file for each layer."""

    def __init__(self, checkpoint: Checkpoint, arguments: argparse.Namespace, samples: list[Sample]):
        self.checkpoint, self.arguments, self.samples = checkpoint, arguments, samples
        plan = make_plan(checkpoint, "bfloat16")
        self.config, self.text = plan.config, copy.deepcopy(plan.config.text_config)
        self.text._experts_implementation, self.text._attn_implementation = "linear", "sdpa"
        self.config.quantization_config = make_settings(arguments)
        self.form = read_form(self.config.quantization_config)
        self.items = {item.name: item for items in plan.shards.values() for item in items}
        self.counts: dict[str, torch.Tensor] = {}

    def read(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `prefix`, in bfloat16, by the rest of their names; experts one by one."""
        tensors = {name: item.read() for name, item in self.items.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in unstack_experts(tensors).items()}

    def embed(self) -> list[torch.Tensor]:
        """What the first layer gets for each conversation: (1, tokens, hidden_size). Only that layer is loaded."""
        if not self.samples:
            return []
        config, _ = select(self.checkpoint, range(1), text_only=False)
        directory, kind = self.checkpoint.directory, getattr(step3_vl, config.architectures[0])
        options = {"dtype": torch.bfloat16, "device_map": DEVICE}
        if weight_block(config):  # which GPUs would multiply as they are
            options["quantization_config"] = FineGrainedFP8Config(dequantize=True)
        model = kind.from_pretrained(directory, config=config, **options)
        processor, states = load_processor(directory), []
        for sample in tqdm(self.samples, "Embedding"):
            text, images = sample.prompt + sample.answer, sample.images or None
            inputs = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt").to(DEVICE)
            output = model(**inputs, use_cache=False, logits_to_keep=1, output_hidden_states=True)
            states.append(output.hidden_states[0].cpu())
        return states

    def layer(self, number: int) -> Step3TextDecoderLayer:
        with torch.device("meta"):
            layer = Step3TextDecoderLayer(self.text, number)
        layer.load_state_dict(self.read(f"model.layers.{number}."), assign=True)
        return layer.requires_grad_(False).eval().to(DEVICE)

    def quantise_layer(self, number: int, states: list[torch.Tensor]) -> tuple[LayerQuantiser, list[torch.Tensor]]:
        """Quantises a layer, and returns also its outputs for `states`, if there are any."""
        layer = self.layer(number)
        quantiser = LayerQuantiser(self.form, self.arguments.method, self.arguments.min_tokens, layer)
        if not states:
            quantiser.pack(module for module in layer.modules() if isinstance(module, nn.Linear))
            return quantiser, states
        rotary = LlamaRotaryEmbedding(self.text).to(DEVICE)

        def positions(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rotary(hidden, torch.arange(hidden.shape[1], device=DEVICE)[None])

        def attend() -> list[torch.Tensor]:
            """The inputs of the MLPs, before their norm."""
            return [
                hidden + layer.self_attn(layer.input_layernorm(hidden), positions(hidden), None)[0]
                for hidden in (state.to(DEVICE) for state in states)
            ]

        quantiser.quantise_attention(attend)
        quantiser.quantise_mlps(torch.cat([layer.post_attention_layernorm(hidden)[0] for hidden in attend()]))
        outputs = [
            layer(hidden, position_embeddings=positions(hidden)).cpu()
            for hidden in (state.to(DEVICE) for state in states)
        ]
        if not all(hidden.isfinite().all() for hidden in outputs):
            raise CheckpointError([f"layer {number}: its outputs for the conversations are NaN or infinite."])
        return quantiser, outputs

    def check_groups(self) -> None:
        """Raises a `CheckpointError` if the groups of weights do not divide the rows of all layers."""
        size = self.form.group_size
        odd = {
            f"{re.sub('[0-9]+', '*', name)} has rows of {item.shape[-1]}, no multiple of the group size {size}."
            for name, item in self.items.items()
            if size and self.is_quantised(name) and item.shape[-1] % size
        }
        if odd:
            raise CheckpointError(sorted(odd))

    def is_quantised(self, name: str) -> bool:
        is_vision_layer = VISION_LAYERS.fullmatch(name.removesuffix(".weight"))
        return self.items[name].tensor.is_fp8_in_release or bool(self.arguments.vision and is_vision_layer)

    def others(self) -> dict[str, torch.Tensor]:
        """The tensors outside the decoder layers to save."""
        tensors = {}
        for name, item in self.items.items():
            if name.startswith("model.layers."):
                continue
            if self.is_quantised(name):
                packed = self.form.pack(item.read().float())
                tensors |= {name.removesuffix("weight") + part: tensor for part, tensor in packed.items()}
            else:
                tensors[name] = item.read()
        return tensors

    def load_states(self, path: Path) -> list[torch.Tensor]:
        """What a layer gets for each conversation, from a file that `write` keeps; and the counts of chosen experts."""
        tensors = load_file(path)
        self.counts = {name: tensor for name, tensor in tensors.items() if not name.isdecimal()}
        return [tensors[name] for name in sorted(tensors.keys() - self.counts.keys())]

    def write(self, package: Path) -> None:
        """Writes the files that are not in `package` yet. Beside it, a file keeps what the next layer gets."""
        self.config.save_pretrained(package)
        copy_files(self.checkpoint.directory, package, has_vision=True)
        first, *files = shard_files(package, self.text.num_hidden_layers + 1)
        states_files = [package.parent / f"states-{number}.safetensors" for number in range(len(files) + 1)]
        if not first.exists():
            write_shard(first, self.others())
        states = None
        for number, file in enumerate(tqdm(files, "Layers")):
            if file.exists():
                continue
            if states is None:
                states = self.load_states(states_files[number]) if states_files[number].exists() else self.embed()
            quantiser, states = self.quantise_layer(number, states)
            if quantiser.counts is not None:
                self.counts[f"layer {number}"] = quantiser.counts
            if states:
                numbered = {f"{number:08}": state for number, state in enumerate(states)}
                write_shard(states_files[number + 1], numbered | self.counts)
            write_shard(file, {f"model.layers.{number}.{name}": x for name, x in quantiser.tensors().items()})
            states_files[number].unlink(missing_ok=True)
        if states is None and states_files[-1].exists():  # the run before was stopped after the last layer
            self.load_states(states_files[-1])
        index_files(package, [first, *files])

    def report(self) -> None:
        """Prints how often the experts were chosen, and which were calibrated on tokens that did not choose them."""
        if not self.counts:
            return
        counts = torch.stack([self.counts[f"layer {number}"] for number in self.text.moe_layers])
        print(describe_counts(counts, self.text.moe_layers))
        needed = self.arguments.min_tokens
        for number, row in zip(self.text.moe_layers, counts, strict=True):
            if rare := (row < needed).nonzero().flatten().tolist():
                nearest = min(needed, int(row.sum()) // self.text.moe_top_k)
                print(f"layer {number}: calibrated on the nearest {nearest} tokens: experts {rare}")


def shard_files(package: Path, count: int) -> list[Path]:
    return [package / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def index_files(package: Path, files: list[Path]) -> None:
    weight_map, total_size = {}, 0
    for path in files:
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
        with path.open("rb") as file:
            # Before the tensors are the length of the header, in 8 bytes, and the header.
            total_size += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    write_index(package, weight_map, total_size)


def read_quantised(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`, whose tensors may be of any kind."""
    index = read_index(directory)
    files = [WEIGHTS] if index is None else sorted(set(map(str, index.values())))
    tensors = {tensor.name: tensor for file in files for tensor in read_header(directory, file)}
    return Checkpoint(directory, read_config(directory), tensors)


def dequantise(checkpoint: Checkpoint, package: Path) -> None:
    """
    Writes a quantised checkpoint in bfloat16 under the released names, a file for each layer, except files that are in
    `package` already. Raises a `CheckpointError` if it is not quantised as `quantise.py` does it, or not complete.
    """
    config = checkpoint.config
    form = read_form(getattr(config, "quantization_config", None))
    del config.quantization_config
    config.save_pretrained(package)
    copy_files(checkpoint.directory, package, isinstance(config, Step3VLConfig))
    layers = defaultdict(lambda: defaultdict(dict))  # the tensors of each layer's modules
    for name, tensor in checkpoint.tensors.items():
        module, part = MODULE_AND_PART.fullmatch(name).groups()
        layer = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else ""
        layers[layer][module][part] = tensor
    files = shard_files(package, len(layers))
    for path, modules in zip(tqdm(files, "Files"), layers.values(), strict=True):
        if path.exists():
            continue
        weights, experts = {}, defaultdict(dict)
        for module, tensors in modules.items():
            parts = {part: tensor.read() for part, tensor in tensors.items()}
            if any(part.startswith(("weight.", "weight_")) for part in parts):
                bias = {"bias": parts.pop("bias")} if "bias" in parts else {}
                parts = {"weight": form.unpack(parts), **bias}
            for part, weight in parts.items():
                if match := SINGLE_EXPERT.fullmatch(f"{module}{part}"):
                    experts[match[1] + match[3]][int(match[2])] = weight
                else:
                    weights[f"{module}{part}"] = weight.bfloat16()
        weights |= {name: torch.stack([x for _, x in sorted(stack.items())]) for name, stack in experts.items()}
        write_shard(path, weights)
    index_files(package, files)
    read_checkpoint(package)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="To resume an interrupted run, repeat the command."
    )
    parser.add_argument("model", help="directory or hub id of the checkpoint")
    parser.add_argument("output", type=Path, help="directory to create; must not exist yet")
    parser.add_argument("--format", choices=[*PRESETS, "nf4", "bfloat16"], required=True, help="bfloat16: dequantise")
    parser.add_argument("--method", choices=("rtn", "gptq", "awq"), default="rtn", help="(default: nearest)")
    parser.add_argument("--group-size", type=int, default=128, help="4-bit weights with one scale (default: 128)")
    parser.add_argument("--zero-points", action="store_true", help="also give 4-bit weights zero points")
    parser.add_argument("--vision", action="store_true", help="also round the vision encoder, to the nearest")
    parser.add_argument("--calibrate", type=Path, metavar="DATA", help="conversations for gptq and awq")
    parser.add_argument("--samples", type=int, default=256, help="conversations to take of them (default: 256)")
    parser.add_argument("--min-tokens", type=int, default=256, help="tokens to calibrate an expert on (default: 256)")
    arguments = parser.parse_args(arguments)
    if (arguments.method == "rtn") != (arguments.calibrate is None):
        parser.error("gptq and awq need --calibrate, and rtn does not read it")
    if arguments.format not in PRESETS and arguments.method != "rtn":
        parser.error(f"--format {arguments.format} knows no other --method than rtn")
    if min(arguments.group_size, arguments.samples, arguments.min_tokens) < 1:
        parser.error("--group-size, --samples and --min-tokens must be at least 1")
    logging.set_verbosity_error()  # of transformers, about the layers that are left out
    options = {name: value for name, value in vars(arguments).items() if name not in ("model", "output")}
    try:
        directory = resolve(arguments.model)
        if arguments.format == "bfloat16":
            checkpoint = read_quantised(directory)
            write_whole(arguments.output, fingerprint(checkpoint, options), partial(dequantise, checkpoint))
            return 0
        checkpoint = read_checkpoint(directory)
        if not isinstance(checkpoint.config, Step3VLConfig):
            raise CheckpointError([f"{directory} has only a language model, which is not supported here."])
        samples = []
        if arguments.calibrate is not None:
            status = arguments.calibrate.stat()
            options["calibrate"] = [str(arguments.calibrate.resolve()), status.st_size, status.st_mtime_ns]
            max_length, processor = checkpoint.config.text_config.longest_sequence, load_processor(directory)
            samples = read_all(arguments.calibrate, processor, max_length)
            samples = random.Random(0).sample(samples, min(arguments.samples, len(samples)))
        quantiser = Quantiser(checkpoint, arguments, samples)
        quantiser.check_groups()
        with torch.no_grad():
            write_whole(arguments.output, fingerprint(checkpoint, options), quantiser.write)
    except (BadData, CheckpointError, OSError, KeyboardInterrupt) as error:
        return failure(error, arguments.output)
    quantiser.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
