"""Rounds the weights of a decoder layer, packs them, and chooses how by the layer's inputs (GPTQ, AWQ)."""

import argparse
from collections.abc import Callable, Iterable

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from checkpoint_files import CheckpointError
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig, fake_quantize, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from step3_vl.modeling_step3 import Step3TextDecoderLayer, Step3TextMLP


PRESETS = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}  # as compressed-tensors names them
# Linear layers that stay as they are; the routers are linear layers in the serving engines.
KEPT = ["lm_head", r"re:.*\.gate$"]
VISION = [r"re:.*vision_model.*", r"re:.*vit_.*"]
BLOCK = 128  # columns that GPTQ rounds before it corrects the rest
DAMP = 0.01  # share of the mean of a Hessian's diagonal that is added to it


def make_settings(arguments: argparse.Namespace) -> dict:
    """The config's `quantization_config`."""
    kept = KEPT + ([] if arguments.vision else VISION)
    if arguments.format == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
            llm_int8_skip_modules=[name.removeprefix("re:") for name in kept],
        ).to_dict()
    scheme = preset_name_to_scheme(PRESETS[arguments.format], ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size, scheme.weights.symmetric = arguments.group_size, not arguments.zero_points
    form, status = infer_module_format(nn.Linear, scheme).value, "compressed"
    config = QuantizationConfig(config_groups={"all": scheme}, format=form, quantization_status=status, ignore=kept)
    return config.model_dump(mode="json", exclude_none=True)


class NF4:
    """Weights in bitsandbytes' NF4, with scales that are quantised as well."""

    group_size = None

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors to save for a weight, by the last parts of their names."""
        packed, state = quantize_4bit(weight.bfloat16(), quant_type="nf4", blocksize=64, compress_statistics=True)
        return {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}

    def unpack(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weight in bfloat16."""
        parts = {name.removeprefix("weight."): part for name, part in tensors.items() if name != "weight"}
        packed = tensors["weight"]
        return dequantize_4bit(packed, QuantState.from_dict(parts, packed.device)).bfloat16()


class CompressedTensors:
    """Weights in a format of compressed-tensors, in one group of layers."""

    def __init__(self, settings: dict):
        config = QuantizationConfig.model_validate(settings)
        (self.scheme,) = config.config_groups.values()
        self.weights, self.group_size = self.scheme.weights, self.scheme.weights.group_size
        self.compressor = BaseCompressor.get_value_from_registry(config.format)

    def choose_scales(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales (bfloat16) and zero points (rows, groups) of a weight (rows, columns)."""
        groups = weight.unflatten(1, (-1, self.group_size or weight.shape[1]))
        scale, zero_point = calculate_qparams(*groups.aminmax(dim=-1), self.weights)
        return scale.bfloat16(), zero_point

    def round(self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
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


def read_form(settings: dict | None) -> NF4 | CompressedTensors:
    """How a config's `quantization_config` packs weights. Raises a `CheckpointError` if it is another than written."""
    match settings:
        case {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}:
            return NF4()
        case {"quant_method": "compressed-tensors", "config_groups": {**groups}} if len(groups) == 1:
            return CompressedTensors(settings)
    message = "must be bitsandbytes' nf4, or compressed-tensors with one group of layers"
    raise CheckpointError([f"config.json: `quantization_config` {message}, got {settings!r:.200}."])


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
    group_size = form.group_size or weight.shape[1]
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
        layers = list(layers)
        if self.method == "gptq" and hessian is not None:  # each row is rounded on its own
            rounded = apply_gptq(self.form, torch.cat([linear.weight.float() for linear in layers]), hessian)
            rows = [linear.out_features for linear in layers]
            parts = zip(*(tensor.split(rows) for tensor in rounded), strict=True)
        else:
            parts = ([linear.weight.float()] for linear in layers)
        for linear, part in zip(layers, parts, strict=True):
            packed = self.form.pack(*part)
            self.packed |= {f"{self.names[linear]}.{name}": tensor.cpu() for name, tensor in packed.items()}
            replace_weight(linear, self.form.unpack(packed))

    def smooth(self, before: nn.Module, magnitude: torch.Tensor, groups: Iterable, others: list[nn.Module]) -> None:
        """
        Scales weights that read inputs of large `magnitude` up, so that rounding disturbs them less, and the weights of
        `before`, which makes the inputs, down (AWQ, https://arxiv.org/abs/2306.00978). `groups` are linear layers and
        the second moment of their inputs, for which the best power of the magnitude is chosen; `others` have the same
        inputs.
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
