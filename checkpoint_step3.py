# Copyright 2026 The Step3-VL for Hugging Face authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What stands between Step3-VL's files and its modules: names on disk, block-fp8, experts one by one, in files and as
modules, rewrites of a loaded model, and products of few rows.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.models.auto import modeling_auto


# Trainer and `transformers serve` ask for classes by their names in these, which registering with the Auto classes does
# not fill.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")["step3_vl"] = "Step3VLForConditionalGeneration"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["step3_text"] = "Step3TextForCausalLM"


# ---------------------------------------------------------------------------------------------------------------------
# Names on disk
# ---------------------------------------------------------------------------------------------------------------------


class MergeExperts(MergeModulelist):
    """Stacks the weights of experts that were saved one by one. They are saved as the release has them: stacked."""

    def convert(self, input_dict, *args, full_layer_name: str, model: PreTrainedModel, **kwargs):
        """
        As for any list of modules; what is stacked already, as in saving, stays as it is.

        Raises:
            `ValueError`: if there are more or fewer experts than the model has.
        """
        for pattern, tensors in input_dict.items():
            if isinstance(tensors, list) and tensors[0].ndim == 3:
                input_dict[pattern] = tensors[0]
            elif isinstance(tensors, list):
                parameter = model.get_parameter(full_layer_name)
                if len(tensors) != len(parameter.to_local() if hasattr(parameter, "to_local") else parameter):
                    message = f"{full_layer_name} takes {len(parameter)} experts, the checkpoint has {len(tensors)}."
                    raise ValueError(message)
        return super().convert(input_dict, *args, **kwargs)

    @property
    def reverse_op(self):
        return self


# How the names on disk become the modules' names; `save_pretrained` runs it backwards, without the groups that start
# with `(?`. A mapping is found by class name, else by model type, and each part of a model brings its own: what the
# whole model renames, its parts rename further. Stacked down projections are renamed, not converted, so that offloading
# to disk reads them where they are. llm-compressor and others save experts one by one, as
# `moe.experts.0.gate_proj.weight`; that a weight must follow keeps PEFT from stacking adapters of linear experts.
GATE, UP, DOWN = (rf"moe\.{name}_proj\.weight" for name in ("gate", "up", "down"))
SINGLE_GATE, SINGLE_UP, SINGLE_DOWN = (
    rf"moe\.(?:experts\.\d+\.)(?=\w+\.weight){name}_proj\.weight" for name in ("gate", "up", "down")
)
register_checkpoint_conversion_mapping(
    "step3_text",
    [
        WeightConverter([GATE, UP], "moe.experts.gate_up_proj", [Concatenate(dim=1)]),
        WeightConverter([SINGLE_GATE, SINGLE_UP], "moe.experts.gate_up_proj", [MergeExperts(), Concatenate(dim=1)]),
        WeightConverter(SINGLE_DOWN, "moe.experts.down_proj", [MergeExperts()]),
        WeightRenaming(DOWN, "moe.experts.down_proj"),
        WeightRenaming(rf"{DOWN}_scale_inv", "moe.experts.down_proj_scale_inv"),
        # Linear experts are stacked when they are saved. `(?!)` matches nothing: stacked ones are not taken apart here.
        WeightConverter(rf"(?!){GATE}", "moe.experts.*.gate_proj.weight", [SplitModulelist()]),
        WeightConverter(rf"(?!){UP}", "moe.experts.*.up_proj.weight", [SplitModulelist()]),
        WeightConverter(rf"(?!){DOWN}", "moe.experts.*.down_proj.weight", [SplitModulelist()]),
    ],
    overwrite=True,
)
# Here `model.language_model.` and so on is what the original remote code saved.
register_checkpoint_conversion_mapping(
    "step3_vl",  # which Step3VLModel is found by
    [WeightRenaming(r"^model\.(?:language_model\.|(?!vision_model\.|vit_))", "^language_model.")],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "Step3VLForConditionalGeneration",
    [
        WeightRenaming(r"^model\.(?:language_model\.|(?!vision_model\.|vit_))", "^model.model."),
        WeightRenaming(r"^(?:model\.|)vision_model\.", "^model.vision_model."),
        WeightRenaming(r"^(?:model\.|)vit_", "^model.vit_"),
    ],
    overwrite=True,
)

# The weights of all experts, or their scales, as the release has them.
STACKED_EXPERTS = re.compile(r"(.*\.moe\.)((?:gate|up|down)_proj\.weight(?:_scale_inv)?)")


def unstack_experts(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, with those of all experts as views of single ones, under their names."""
    single = {}
    for name, weight in weights.items():
        if match := STACKED_EXPERTS.fullmatch(name):
            single |= {f"{match[1]}experts.{number}.{match[2]}": part for number, part in enumerate(weight)}
        else:
            single[name] = weight
    return single


def converts_experts(transform) -> bool:
    return isinstance(transform, WeightConverter) and transform.target_patterns[0].startswith("moe.experts.")


def divide_blocks(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """
    The same scales for smaller blocks, all of one size, as transformers takes them: the last blocks of `weight`
    (..., rows, columns) may hold fewer rows and columns than `block_size`.
    """
    for dim, size in ((-2, block_size[0]), (-1, block_size[1])):
        smaller = math.gcd(size, weight.shape[dim])
        scale = scale.repeat_interleave(size // smaller, dim).narrow(dim, 0, weight.shape[dim] // smaller)
    return scale


def take_back_unquantized(model: PreTrainedModel, names: Iterable[str], load_config) -> None:
    """
    Takes back the fp8 modules of `model` that have no scales among `names`, a checkpoint's: they are not fp8 there.
    transformers goes by a list in the config, and what is known of the release's config has none.

    Raises:
        `ValueError`: if the blocks of stacked fp8 experts do not divide them.
    """
    renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightConverter)]
    own_names = model.state_dict()
    found = {rename_source_key(name, renamings, converters, model.base_model_prefix, own_names)[0] for name in names}
    with torch.device("meta"):
        plain = type(model)(model.config)
    for name in own_names:
        if name.endswith("_scale_inv") and name not in found and own_names[name].is_meta:  # not if adapters are read
            module_name = name.rpartition(".")[0]
            model.set_submodule(module_name, plain.get_submodule(module_name).to(load_config.dtype))
    width = model.config.get_text_config().moe_intermediate_size
    rows = load_config.hf_quantizer.quantization_config.weight_block_size[0]
    if width % rows and any(isinstance(module, FP8Experts) for module in model.modules()):
        raise ValueError(
            f"Experts are kept in fp8 only if `moe_intermediate_size` is a multiple of the blocks' {rows} rows, got "
            f"{width}; load the model with `quantization_config=FineGrainedFP8Config(dequantize=True)`."
        )


class LinearExperts(nn.ModuleList):
    """
    The routed experts as gated MLPs of linear layers, the experts implementation `"linear"`: what quantisers and
    adapters that know `nn.Linear` alone can reach. Which of them have tokens is asked of the device in each layer.
    """

    def __init__(self, config, expert: Callable[[Any, int], nn.Module]):
        super().__init__(expert(config, config.moe_intermediate_size) for _ in range(config.moe_num_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """From `hidden_states` (tokens, hidden_size), the chosen experts and their weights, both (tokens, top_k)."""
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == number)
            states = self[number](hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, states.to(output.dtype))
        return output


def has_linear_experts(model: nn.Module) -> bool:
    return any(isinstance(module, LinearExperts) for module in model.modules())


def wants_linear_experts(config) -> bool:
    """Whether the config asks for a quantisation of `nn.Linear` alone: any but block-fp8, which has stacked experts."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return getattr(method, "value", method) != "fp8"


class Step3Checkpoint:
    """Mixin of the models: what loading and saving a checkpoint of Step3 takes beyond any other model's."""

    # Patterns of the names that a directory of the whole model holds beside those of a part that is loaded by itself.
    # Not the attribute that transformers asks for, which is handed on to models that this one is a part of.
    keys_of_other_parts: tuple[str, ...] = ()

    def __init__(self, config, *args, **kwargs):
        if config._experts_implementation is None and wants_linear_experts(config):
            config._experts_implementation = "linear"
        super().__init__(config, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """
        As for any model; experts are linear layers, or not, from the beginning.

        Raises:
            `ValueError`: if an existing model's are to become so, or to be so no longer.
        """
        is_linear = requested_experts == "linear"
        is_built = any(hasattr(module, "experts") for module in self.modules())
        if is_built and is_linear != has_linear_experts(self):
            raise ValueError(
                "Experts are made linear layers, or stacked, when a model is loaded: "
                f"`from_pretrained(..., experts_implementation={requested_experts!r})`."
            )
        return requested_experts if is_linear else super().get_correct_experts_implementation(requested_experts)

    def post_init(self):
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = set(self.keys_of_other_parts)  # and not what its own parts ignore

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """
        As for any model.

        Raises:
            `ValueError`: if `fusion_config` names rewrites that `fuse` makes of a loaded model, or if weights of
            experts are missing, or in a quantised form of which the config says nothing.
        """
        ours = set(kwargs.get("fusion_config") or ()) & {rewrite.name for rewrite in REWRITES}
        if ours:
            names = ", ".join(repr(name) for name in sorted(ours))
            raise ValueError(f"`fusion_config` is transformers' own; call `fuse({names})` on the loaded model instead.")
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing", "unexpected"):
            experts = [name for name in info[f"{kind}_keys"] if re.search(r"\.moe\.(experts|\w+_proj)\.", name)]
            if experts:
                raise ValueError(
                    f"{len(experts)} weights of experts are {kind}, such as {min(experts)}: they must be all there, "
                    "and in no other form than `quantization_config` in config.json says."
                )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """
        What `from_pretrained` reads weights with. Converters read all but two kinds of models. Those of linear experts
        take a stacked weight apart: a mapping is found by class, which does not tell, and transformers would read the
        weight whole before it quantises an expert. Block-fp8 that is dequantised must have its scales, and in blocks of
        one size, neither of which transformers checks; and experts one by one take less memory there, too.

        Raises:
            `ValueError`: if fp8 weights have no scales, or blocks that stacked experts cannot keep, or if linear
            experts are to be split over ranks.
        """
        quantizer, is_linear = load_config.hf_quantizer, has_linear_experts(model)
        settings = getattr(quantizer, "quantization_config", None)
        is_fp8 = quantizer is not None and quantizer.pre_quantized and settings.quant_method == "fp8"
        if is_linear and load_config.device_mesh is not None:
            raise ValueError('`experts_implementation="linear"` cannot be split over ranks; use `device_map`.')
        if is_linear or is_fp8:
            if state_dict is None:
                state_dict = {}
                for path in checkpoint_files:  # mapped into memory, and read when a weight's turn comes
                    state_dict |= load_state_dict(path, weights_only=load_config.weights_only)
            if is_linear or settings.dequantize:
                state_dict = unstack_experts(state_dict)
        if is_linear:
            mapping = [transform for transform in load_config.weight_mapping if not converts_experts(transform)]
            load_config = replace(load_config, weight_mapping=mapping)
        if is_fp8:
            for name, weight in list(state_dict.items()):
                if weight.dtype == torch.float8_e4m3fn:
                    if (scale := state_dict.get(f"{name}_scale_inv")) is None:
                        raise ValueError(f"{name} is fp8, but the checkpoint has no {name}_scale_inv.")
                    if settings.dequantize:
                        state_dict[f"{name}_scale_inv"] = divide_blocks(weight, scale, settings.weight_block_size)
                elif settings.dequantize and not name.endswith("_scale_inv"):  # transformers 5.19 does not
                    state_dict[name] = weight.to(load_config.dtype)
            if not settings.dequantize:
                take_back_unquantized(model, state_dict, load_config)
        load = PreTrainedModel._load_pretrained_model
        loaded = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        if settings.dequantize if is_fp8 else is_linear and quantizer is None:
            del model._weight_conversions  # those that were used: to be saved as any model, stacked and not in fp8
        return loaded

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Embedding:
        """
        As for any model.

        Raises:
            `ValueError`: if a token that the config names would no longer be in the vocabulary.
        """
        if new_num_tokens is not None:
            vocab_size = math.ceil(new_num_tokens / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            for name, config in (("image_token_id", self.config), ("pad_token_id", self.config.get_text_config())):
                if (token := getattr(config, name, None)) is not None and token >= vocab_size:
                    raise ValueError(f"A vocabulary of {vocab_size} would not have `{name}` {token} any more.")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As for any module, and from a state dict with the names on disk, which `Trainer` resumes from."""
        if assign and any(row["rewritten"] for row in self.fusion_report()):  # whole weights are to be put in place
            applied = [(rewrite, m) for m in self.modules() for rewrite in REWRITES if rewrite.is_applied_to(m)]
            self.unfuse()
            result = self.load_state_dict(state_dict, strict=strict, assign=True)
            for rewrite, module in applied:
                rewrite.apply(module)
            return result
        transforms = get_model_conversion_mapping(self, add_legacy=False)
        if has_linear_experts(self):
            state_dict = unstack_experts(state_dict)
            transforms = [transform for transform in transforms if not converts_experts(transform)]
        own_names = self.state_dict().keys()
        if state_dict.keys() <= own_names:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        renamed, to_convert = {}, {}
        for name in sorted(state_dict, key=dot_natural_key):  # experts by their numbers
            new_name, pattern = (name, None) if name in own_names else rename_source_key(name, renamings, converters)
            if pattern is None:
                renamed[new_name] = state_dict[name]
            else:
                converter = to_convert.setdefault(new_name, deepcopy(converter_of[pattern]))
                converter.add_tensor(new_name, name, pattern, state_dict[name])
        for name, converter in to_convert.items():
            renamed.update(converter.convert(name, model=self, config=self.config))
        return super().load_state_dict(renamed, strict=strict, assign=assign)


# ---------------------------------------------------------------------------------------------------------------------
# Products of few rows
# ---------------------------------------------------------------------------------------------------------------------


def obstacle_of(layer: nn.Module) -> str | None:
    """What keeps a linear layer's weight from being used without calling the layer, or `None`."""
    if not (type(layer) is nn.Linear or isinstance(layer, FusedLinear)) or getattr(layer, "bias", None) is not None:
        return f"is a {type(layer).__name__}: it is quantised, or has been replaced"
    if type(layer.weight) is not nn.Parameter or layer.weight.device.type == "meta":
        return "has a weight that is split over ranks, quantised or offloaded"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "has hooks, which would no longer be called"
    return None


def sum_products(weight: torch.Tensor, states: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
    """
    Products of `states` (rows, inputs) with a `weight` (outputs, inputs), or of each row with that of its expert, one
    of `experts` (rows,), in a `weight` (experts, outputs, inputs). They are written as sums, of which the compiler
    makes kernels that read weights where they are. Returns (rows, outputs), in float32 at least.

    On a CPU memory is read fastest in several streams, so four parts of the outputs go together. Within them, rows take
    turns after 128 outputs each, whose weights the processor's cache still has for the next row of the same expert, if
    the rows are sorted by it. Sums are taken in pieces, as the compiler halves the speed of those of more than 4,096.
    """
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    if experts is None:
        weight, experts = weight[None], slice(None)
    if weight.device.type != "cpu":
        return (weight[experts] * states.unsqueeze(1)).sum(-1)
    num_outputs, num_inputs = weight.shape[1:]
    pieces = next((n for n in range(1, 65) if num_inputs % n == 0 and num_inputs <= 4096 * n), 1)
    states = states.unflatten(-1, (pieces, -1)).unsqueeze(1)
    blocks = weight.unflatten(-1, (pieces, -1)).unflatten(1, (-1, math.gcd(num_outputs, 128))).transpose(0, 1)
    parts = blocks.split(max(len(blocks) // 4, 1))
    sums = torch.cat([(part[:, experts] * states).sum(-1).sum(-1) for part in parts])
    return sums.transpose(0, 1).flatten(1)


def apply_linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What a linear layer makes of `states` (..., inputs). A single row that is compiled for a CPU takes sums, which
    read the weight at twice the speed of the product that the layer would call."""
    is_single = states.device.type == "cpu" and states.numel() == states.shape[-1]
    is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not (is_single and is_compiled) or obstacle_of(layer) is not None or layer.weight.dtype != states.dtype:
        return layer(states)
    return sum_products(layer.weight, states.flatten(0, -2)).to(states.dtype).view(*states.shape[:-1], -1)


# ---------------------------------------------------------------------------------------------------------------------
# Rewrites of a loaded model
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewrite:
    """
    Makes one linear layer of several that have the same input.

    Args:
        name (`str`): What [`~Step3Rewritable.fuse`] calls it.
        class_name (`str`): The class of the modules that it matches.
        sources (`tuple[str, ...]`): Their linear layers that are put on top of each other, in this order.
        target (`str`): The layer that is made of them.
    """

    name: str
    class_name: str
    sources: tuple[str, ...]
    target: str

    def matches(self, module: nn.Module) -> bool:
        return type(module).__name__ == self.class_name

    def is_applied_to(self, module: nn.Module) -> bool:
        return self.matches(module) and self.target in module._modules

    def obstacle(self, module: nn.Module) -> str | None:
        """Why a module that is matched cannot be rewritten, or `None` if it can."""
        for source in self.sources:
            if (obstacle := obstacle_of(getattr(module, source))) is not None:
                return f"`{source}` {obstacle}"
        weights = [getattr(module, source).weight for source in self.sources]
        if len({(weight.dtype, weight.device, weight.requires_grad) for weight in weights}) > 1:
            return "the weights have several types or devices, or some are frozen and some are not"
        return None

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        layers = [getattr(module, source) for source in self.sources]
        weight = torch.cat([layer.weight for layer in layers])
        fused = FusedLinear(nn.Parameter(weight, requires_grad=layers[0].weight.requires_grad)).train(module.training)
        start = 0
        for layer in layers:
            del layer.weight
            layer.__class__ = RowsOfLinear
            layer.__dict__.update(fused=fused, start=start)
            start += layer.out_features
        module.add_module(self.target, fused)

    @torch.no_grad()
    def undo(self, module: nn.Module, layers: Iterable[nn.Module]) -> None:
        fused = module._modules.pop(self.target)
        for layer in layers:
            weight = nn.Parameter(layer.weight.clone(), requires_grad=fused.weight.requires_grad)
            if fused.weight.grad is not None:
                weight.grad = fused.weight.grad[layer.rows].clone()
            del layer.__dict__["fused"], layer.__dict__["start"]
            layer.__class__ = nn.Linear
            layer.weight = weight


class FusedLinear(nn.Module):
    """What a [`Rewrite`] makes. State dicts know its rows by the names of the layers that they came from. It is none of
    torch's own linear layers, which adapters and quantisers look for: those find the layers that it is made of."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        pass

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        pass


class RowsOfLinear(nn.Linear):
    """A layer whose weight is some rows, from `start`, of a [`FusedLinear`]."""

    @property
    def rows(self) -> slice:
        return slice(self.start, self.start + self.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.fused.weight[self.rows]

    def _no_hooks(self, *args, **kwargs):
        raise RuntimeError("This layer is part of a fused one, and not called by itself: `unfuse` the model first.")

    register_forward_hook = register_forward_pre_hook = register_full_backward_hook = _no_hooks

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing_keys.append(prefix + "weight")
        elif weight.shape != self.weight.shape:
            error_msgs.append(
                f"size mismatch for {prefix}weight: copying a param with shape {weight.shape} from checkpoint, the "
                f"shape in current model is {self.weight.shape}."
            )
        else:
            self.weight.copy_(weight)


# Applied in this order.
REWRITES = (
    Rewrite("step3_qkv", "Step3TextAttention", ("q_proj", "k_proj", "v_proj"), "q_k_v_proj"),
    Rewrite("step3_gate_up", "Step3TextMLP", ("gate_proj", "up_proj"), "gate_up_proj"),
)


class Rewritable(nn.Module):
    """A module that a [`Rewrite`] matches. If one of its layers is replaced, say by an adapter, it is undone."""

    def project(self, hidden_states: torch.Tensor, rewrite: Rewrite) -> tuple[torch.Tensor, ...]:
        """What each of the rewrite's layers makes of `hidden_states`."""
        layers = [getattr(self, source) for source in rewrite.sources]
        fused = self._modules.get(rewrite.target)
        if fused is None:
            return tuple(apply_linear(layer, hidden_states) for layer in layers)
        return apply_linear(fused, hidden_states).split([layer.out_features for layer in layers], dim=-1)

    def __setattr__(self, name: str, value):
        for rewrite in REWRITES:
            if name in rewrite.sources and rewrite.is_applied_to(self):
                rewrite.undo(self, [self._modules[source] for source in rewrite.sources])
        super().__setattr__(name, value)


class Step3Rewritable:
    """Mixin of the models: rewrites of a loaded one."""

    def fuse(self, *names: str) -> None:
        """
        Rewrites the loaded model in place, module by module: `"step3_qkv"` makes one layer of the projections to
        low-rank queries, keys and values, `"step3_gate_up"` of the gate and up projections of each MLP. Answers are
        equal but for rounding. State dicts, and so what is saved, keep the names and shapes that they had.

        Raises:
            `ValueError`: if a name is unknown, given twice or already applied, two match the same layers, or a module
            is quantised, offloaded, split over ranks or has hooks. The model is then as it was.
        """
        known = {rewrite.name: rewrite for rewrite in REWRITES}
        if not names or set(names) - known.keys() or len(set(names)) < len(names):
            raise ValueError(f"`fuse` takes some of {', '.join(known)}, each once, got {names}.")
        planned, claimed = [], {}
        for name, module in self.named_modules():
            for rewrite in (rewrite for rewrite in REWRITES if rewrite.name in names and rewrite.matches(module)):
                if rewrite.is_applied_to(module):
                    raise ValueError(f"`{rewrite.name}` is applied to {name} already.")
                for source in rewrite.sources:
                    if (other := claimed.setdefault((name, source), rewrite.name)) != rewrite.name:
                        raise ValueError(f"`{other}` and `{rewrite.name}` both rewrite {name}.{source}.")
                if (obstacle := rewrite.obstacle(module)) is not None:
                    raise ValueError(f"`{rewrite.name}` cannot be applied to {name}: {obstacle}.")
                planned.append((rewrite, module))
        if missing := [name for name in names if name not in {rewrite.name for rewrite, _ in planned}]:
            raise ValueError(f"{', '.join(missing)}: nothing in this {type(self).__name__} is rewritten by that.")
        for rewrite, module in planned:
            rewrite.apply(module)

    def unfuse(self) -> None:
        """Undoes every rewrite."""
        for module in self.modules():
            for rewrite in REWRITES:
                if rewrite.is_applied_to(module):
                    rewrite.undo(module, [module._modules[source] for source in rewrite.sources])

    def fusion_report(self) -> list[dict[str, str | bool]]:
        """
        What each rewrite matches in this model, a row for each module: `fusion`, the `module`'s name, its `class`,
        whether it is `rewritten`, and the `layers` that it makes into one.
        """
        return [
            {
                "fusion": rewrite.name,
                "module": name,
                "class": type(module).__name__,
                "rewritten": rewrite.is_applied_to(module),
                "layers": f"{', '.join(rewrite.sources)} -> {rewrite.target}",
            }
            for rewrite in REWRITES
            for name, module in self.named_modules()
            if rewrite.matches(module)
        ]
