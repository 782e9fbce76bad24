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
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from checkpoint_files import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    Step3VLConfig,
    read_checkpoint,
    read_config,
    read_header,
    read_index,
)
from conversations import BadData, Conversation, check_pictures, read_conversations
from convert_checkpoint import copy_files, fingerprint, make_plan, resolve, select, write_whole
from experts import describe
from files import replacing, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoProcessor, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

import step3_vl
from step3_vl.checkpoint_step3 import unstack_experts
from step3_vl.modeling_step3 import Step3TextDecoderLayer, Step3TextMLP


PRESETS = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}  # as compressed-tensors names them
METHODS = ("rtn", "gptq", "awq")
# Linear layers that stay as they are; the routers are linear layers in the serving engines.
KEPT = ["lm_head", r"re:.*\.gate$"]
VISION = [r"re:.*vision_model.*", r"re:.*vit_.*"]
VISION_LAYERS = re.compile(r"vision_model\..*\.(?:qkv_proj|out_proj|fc1|fc2)|vit_large_projector")
SINGLE_EXPERT = re.compile(r"(.*\.moe\.)experts\.(\d+)\.(\w+_proj\.weight)")
MODULE_AND_PART = re.compile(r"(.*?\.)(weight\..*|[^.]+)")  # of a tensor's name
BLOCK = 128  # columns that GPTQ rounds before it corrects the rest
DAMP = 0.01  # share of the mean of a Hessian's diagonal that is added to it
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class CompressedTensors:
    """Weights in a format of compressed-tensors."""

    def __init__(self, scheme, name: str):
        from compressed_tensors.compressors import BaseCompressor

        self.scheme, self.name, self.weights = scheme, name, scheme.weights
        self.compressor = BaseCompressor.get_value_from_registry(name)

    @classmethod
    def choose(cls, name: str, group_size: int, has_zero_points: bool) -> "CompressedTensors":
        """One of `PRESETS`; in 4 bits, with scales of groups of weights."""
        from compressed_tensors.compressors.format import infer_module_format
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(PRESETS[name], ["Linear"])
        if scheme.weights.group_size:
            scheme.weights.group_size, scheme.weights.symmetric = group_size, not has_zero_points
        return cls(scheme, infer_module_format(nn.Linear, scheme).value)

    @classmethod
    def described_by(cls, settings: dict) -> "CompressedTensors":
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(settings)
        if len(config.config_groups) > 1:
            raise CheckpointError(["config.json: only one group of quantised layers is supported."])
        return cls(next(iter(config.config_groups.values())), config.format)

    def settings(self, kept: list[str]) -> dict:
        """The config's `quantization_config`."""
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig(
            config_groups={"group_0": self.scheme}, format=self.name, quantization_status="compressed", ignore=kept
        )
        return config.model_dump(mode="json", exclude_none=True)

    def choose_scales(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (bfloat16) and zero points (rows, groups) of a weight (rows, columns)."""
        from compressed_tensors.quantization.utils import calculate_qparams

        groups = weight.unflatten(1, (-1, self.weights.group_size or weight.shape[1]))
        scale, zero_point = calculate_qparams(*groups.aminmax(dim=-1), self.weights)
        return scale.bfloat16(), zero_point

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        from compressed_tensors.quantization import fake_quantize

        rows = weight.reshape(scale.numel(), -1)  # each with a scale of its own
        as_rows = self.weights.model_copy(update={"strategy": "channel", "group_size": None})
        scale, zero_point = scale.float().reshape(-1, 1), zero_point.reshape(-1, 1)
        return fake_quantize(rows, scale, zero_point, as_rows).view_as(weight)

    def pack(self, weight: torch.Tensor, scale=None, zero_point=None) -> dict[str, torch.Tensor]:
        """The tensors to save for a weight (rows, columns), by the last parts of their names."""
        if scale is None:
            scale, zero_point = self.choose_scales(weight)
        tensors = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        return self.compressor.compress(tensors, self.scheme)

    def unpack(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weight in bfloat16."""
        return self.compressor.decompress(tensors, self.scheme)["weight"].bfloat16()


class NF4:
    """Weights in bitsandbytes' NF4, with scales that are quantised as well."""

    def settings(self, kept: list[str]) -> dict:
        skipped = [name.removeprefix("re:.*").removesuffix(".*").strip(r"\.$") for name in kept]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=skipped,
        )
        return config.to_dict()

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", blocksize=64, compress_statistics=True)
        return {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}

    def unpack(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        packed = tensors["weight"]
        parts = {name.removeprefix("weight."): part for name, part in tensors.items() if name != "weight"}
        return dequantize_4bit(packed, QuantState.from_dict(parts, packed.device)).bfloat16()


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian (columns, columns)."""
    damped, diagonal = hessian.clone(), hessian.diagonal()
    # An input that was always zero says nothing about its column.
    damped.diagonal().copy_(diagonal.where(diagonal > 0, 1) + DAMP * diagonal.mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def apply_gptq(
    form: CompressedTensors, weight: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Rounds a `weight` (rows, columns) column by column, in the order of the Hessian's diagonal, and corrects those that
    follow for the error (https://arxiv.org/abs/2210.17323). Returns the rounded weight, its scales and zero points.
    """
    scale, zero_point = form.choose_scales(weight)
    group_size = form.weights.group_size or weight.shape[1]
    order = hessian.diagonal().argsort(descending=True)
    factor, left, rounded = inverse_factor(hessian[order][:, order]), weight[:, order], torch.empty_like(weight)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = torch.empty_like(left[:, start:end])
        for i, column in enumerate(order[start:end].tolist(), start):
            group = [column // group_size]
            rounded[:, column] = form.round(left[:, i, None], scale[:, group], zero_point[:, group])[:, 0]
            errors[:, i - start] = (left[:, i] - rounded[:, column]) / factor[i, i]
            left[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return rounded, scale, zero_point


def second_moment(rows: torch.Tensor, compute: Callable = lambda rows: rows) -> torch.Tensor:
    """The sum of the outer products of what `compute` makes of `rows` (..., columns), in float32."""
    parts = (compute(part).float() for part in rows.flatten(0, -2).split(4096))
    return sum(part.T @ part for part in parts)


def replace_weight(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)


class LayerQuantiser:
    """Quantises a decoder layer stage by stage: each stage is calibrated on what the quantised ones before it give."""

    def __init__(self, form, method: str, min_tokens: int, layer: Step3TextDecoderLayer):
        self.form, self.method, self.min_tokens, self.layer = form, method, min_tokens, layer
        self.names = {module: name for name, module in layer.named_modules()}
        self.packed: dict[str, torch.Tensor] = {}
        self.counts: torch.Tensor | None = None  # tokens that chose each expert

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the layer to save."""
        linear = {f"{name}.weight" for module, name in self.names.items() if isinstance(module, nn.Linear)}
        kept = {name: tensor for name, tensor in self.layer.state_dict().items() if name not in linear}
        return {name: tensor.cpu().contiguous() for name, tensor in (kept | self.packed).items()}

    def pack(self, layers: Iterable[nn.Linear], hessian: torch.Tensor | None = None) -> None:
        """Packs layers with the same inputs, and gives them the weights that the packed ones stand for."""
        for linear in layers:
            weight = linear.weight.float()
            is_calibrated = self.method == "gptq" and hessian is not None
            packed = self.form.pack(*(apply_gptq(self.form, weight, hessian) if is_calibrated else [weight]))
            self.packed |= {f"{self.names[linear]}.{part}": tensor.cpu() for part, tensor in packed.items()}
            replace_weight(linear, self.form.unpack(packed))

    def smooth(self, before: nn.Module, magnitude: torch.Tensor, groups: Iterable, others: list[nn.Module]) -> None:
        """
        Scales inputs up, and the weights of `before`, which makes them, down, so that rounding disturbs those of large
        `magnitude` less (AWQ, https://arxiv.org/abs/2306.00978). `groups` are linear layers and the second moment of
        their inputs, for which the best power of the magnitude is chosen; `others` have the same inputs.
        """
        powers = [(magnitude.clamp(min=1e-4) ** (i / 20)) for i in range(20)]
        scales = [power / (power.max() * power.min()).sqrt() for power in powers]
        losses, scaled = torch.zeros(len(scales)), list(others)
        for layers, hessian in groups:
            weight = torch.cat([linear.weight.float() for linear in layers])
            for i, scale in enumerate(scales):
                wanted = weight * scale
                error = self.form.round(wanted, *self.form.choose_scales(wanted)) / scale - weight
                losses[i] += ((error @ hessian) * error).sum().cpu()
            scaled += layers
        scale = scales[losses.argmin()]
        for module in scaled:
            replace_weight(module, module.weight * scale)
        replace_weight(before, (before.weight.T / scale).T)

    def observe(self, linear: nn.Linear, run: Callable[[], None]) -> torch.Tensor:
        """The second moment of the inputs of a linear layer during `run`."""
        moments = []

        def add(module, inputs: tuple[torch.Tensor]) -> None:
            moments[:] = [sum([*moments, second_moment(inputs[0])])]

        hook = linear.register_forward_pre_hook(add)
        run()
        hook.remove()
        return moments[0]

    def quantise_attention(self, run: Callable[[], None]) -> None:
        attention = self.layer.self_attn
        stages = {
            (attention.q_proj, attention.k_proj, attention.v_proj): self.layer.input_layernorm,
            (attention.wq,): attention.inter_norm,
            (attention.o_proj,): None,
        }
        for layers, norm in stages.items():
            hessian = self.observe(layers[0], run)
            if self.method == "awq" and norm is not None:
                self.smooth(norm, hessian.diagonal().sqrt(), [(layers, hessian)], [])
            self.pack(layers, hessian)

    def quantise_mlp(self, mlp: Step3TextMLP, rows: torch.Tensor) -> None:
        def gate(rows: torch.Tensor) -> torch.Tensor:
            return mlp.act_fn(mlp.gate_proj(rows)) * mlp.up_proj(rows)

        if self.method == "awq":
            hessian = second_moment(rows, gate)
            self.smooth(mlp.up_proj, hessian.diagonal().sqrt(), [([mlp.down_proj], hessian)], [])
            self.pack([mlp.gate_proj, mlp.up_proj, mlp.down_proj])
        else:
            self.pack([mlp.gate_proj, mlp.up_proj], second_moment(rows))
            self.pack([mlp.down_proj], second_moment(rows, gate))

    def quantise_mlps(self, tokens: torch.Tensor) -> None:
        """Quantises the MLP or the experts, whose inputs are `tokens` (tokens, hidden_size)."""
        layer, routers = self.layer, []
        chosen = {layer.share_expert if layer.is_moe else layer.mlp: slice(None)}
        if layer.is_moe:
            logits, _, index = layer.moe.gate(tokens)
            self.counts, routers = index.flatten().bincount(minlength=logits.shape[1]).cpu(), [layer.moe.gate]
            for number, expert in enumerate(layer.moe.experts):
                # Experts that few tokens choose are also calibrated on those that come closest to choosing them.
                nearness = logits[:, number].float().masked_fill((index == number).any(1), torch.inf)
                count = max(int(self.counts[number]), min(self.min_tokens, len(tokens)))
                chosen[expert] = nearness.topk(count).indices
        if self.method == "awq":
            moments = ((mlp, second_moment(tokens[rows])) for mlp, rows in chosen.items())
            groups = (([mlp.gate_proj, mlp.up_proj], moment) for mlp, moment in moments)
            norm = layer.post_attention_layernorm
            before = norm.weight
            self.smooth(norm, second_moment(tokens).diagonal().sqrt(), groups, routers)
            tokens = tokens * (norm.weight / before)
        for mlp, rows in tqdm(chosen.items(), "MLPs", leave=False):
            self.quantise_mlp(mlp, tokens[rows])


class Quantiser:
    """Writes a quantised checkpoint, a file for each layer."""

    def __init__(self, checkpoint: Checkpoint, form, arguments: argparse.Namespace, conversations: list[Conversation]):
        self.checkpoint, self.form, self.arguments, self.conversations = checkpoint, form, arguments, conversations
        plan = make_plan(checkpoint, "bfloat16")
        self.config, self.text = plan.config, copy.deepcopy(plan.config.text_config)
        self.text._experts_implementation, self.text._attn_implementation = "linear", "sdpa"
        self.items = {item.name: item for items in plan.shards.values() for item in items}
        self.counts: dict[str, torch.Tensor] = {}

    def read(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `prefix`, in bfloat16, by the rest of their names; experts one by one."""
        tensors = {name: item.read() for name, item in self.items.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in unstack_experts(tensors).items()}

    def embed(self) -> list[torch.Tensor]:
        """What the first layer gets for each conversation: (1, tokens, hidden_size). Only that layer is loaded."""
        if not self.conversations:
            return []
        config, _ = select(self.checkpoint, range(1), text_only=False)
        directory, kind = self.checkpoint.directory, getattr(step3_vl, config.architectures[0])
        model = kind.from_pretrained(directory, config=config, dtype=torch.bfloat16, device_map=DEVICE)
        processor, states = AutoProcessor.from_pretrained(directory), []
        for conversation in tqdm(self.conversations, "Embedding"):
            text = processor.apply_chat_template(conversation.messages, tools=conversation.tools)
            images = conversation.images or None
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
        size = self.form.weights.group_size if isinstance(self.form, CompressedTensors) else None
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
        self.config.quantization_config = self.form.settings(KEPT + ([] if self.arguments.vision else VISION))
        self.config.save_pretrained(package)
        copy_files(self.checkpoint.directory, package, has_vision=True)
        first, *files = shard_files(package, self.text.num_hidden_layers + 1)
        states_files = [package.parent / f"states-{number}.safetensors" for number in range(len(files) + 1)]
        if not first.exists():
            save_tensors(first, self.others())
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
                save_tensors(states_files[number + 1], numbered | self.counts)
            save_tensors(file, {f"model.layers.{number}.{name}": x for name, x in quantiser.tensors().items()})
            states_files[number].unlink(missing_ok=True)
        if states is None and states_files[-1].exists():  # the run before was stopped after the last layer
            self.load_states(states_files[-1])
        write_index(package, [first, *files])

    def report(self) -> None:
        """Prints how often the experts were chosen, and which were calibrated on tokens that did not choose them."""
        if not self.counts:
            return
        counts = torch.stack([self.counts[f"layer {number}"] for number in self.text.moe_layers])
        print(describe(counts, self.text.moe_layers))
        for number, row in zip(self.text.moe_layers, counts, strict=True):
            if rare := (row < self.arguments.min_tokens).nonzero().flatten().tolist():
                print(f"layer {number}: calibrated on the nearest {self.arguments.min_tokens} tokens: experts {rare}")


def shard_files(package: Path, count: int) -> list[Path]:
    return [package / f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with replacing(path) as unfinished:
        save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished, metadata={"format": "pt"})


def write_index(package: Path, files: list[Path]) -> None:
    weight_map = {}
    for path in files:
        with safe_open(path, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    metadata = {"total_size": sum(path.stat().st_size for path in files)}
    write_json(package / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


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
    settings = getattr(config, "quantization_config", None) or {}
    if settings.get("quant_method") not in ("compressed-tensors", "bitsandbytes"):
        message = "`quantization_config` must be of compressed-tensors or bitsandbytes"
        raise CheckpointError([f"config.json: {message}, got {settings!r:.200}."])
    is_nf4 = settings["quant_method"] == "bitsandbytes"
    form = NF4() if is_nf4 else CompressedTensors.described_by(settings)
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
        save_tensors(path, weights)
    write_index(package, files)
    read_checkpoint(package)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="To resume an interrupted run, repeat the command."
    )
    parser.add_argument("model", help="directory or hub id of the checkpoint")
    parser.add_argument("output", type=Path, help="directory to create; must not exist yet")
    parser.add_argument("--format", choices=[*PRESETS, "nf4", "bfloat16"], required=True, help="bfloat16: dequantise")
    parser.add_argument("--method", choices=METHODS, default="rtn", help="how to round (default: to the nearest)")
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
        form = NF4()
        if arguments.format in PRESETS:
            form = CompressedTensors.choose(arguments.format, arguments.group_size, arguments.zero_points)
        conversations = []
        if arguments.calibrate is not None:
            status = arguments.calibrate.stat()
            options["calibrate"] = [str(arguments.calibrate.resolve()), status.st_size, status.st_mtime_ns]
            conversations = read_conversations(arguments.calibrate, faults := [])
            check_pictures(conversations, faults)
            if faults:
                raise BadData(faults)
            conversations = random.Random(0).sample(conversations, min(arguments.samples, len(conversations)))
        quantiser = Quantiser(checkpoint, form, arguments, conversations)
        quantiser.check_groups()
        with torch.no_grad():
            write_whole(arguments.output, fingerprint(checkpoint, options), quantiser.write)
    except (BadData, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or arguments.output}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Repeat the command to resume.", file=sys.stderr)
        return 130
    quantiser.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
