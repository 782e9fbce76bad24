"""What stands between Step3-VL's files and its modules: names on disk, block-fp8, and experts one by one, in files and
as modules.
"""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import math
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto


# Trainer and `transformers serve` ask for classes by their names in these, which registering with the Auto classes does
# not fill.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")["step3_vl"] = "Step3VLForConditionalGeneration"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["step3_text"] = "Step3TextForCausalLM"


# ---------------------------------------------------------------------------------------------------------------------
# Names on disk
# ---------------------------------------------------------------------------------------------------------------------

# How the names on disk become the modules' names; `save_pretrained` runs it backwards. A mapping is found by class
# name, else by model type, and each part of a model brings its own: what the whole model renames, its parts rename
# further. The second form in each pattern, `model.language_model.` and so on, is what the original remote code saved.
register_checkpoint_conversion_mapping(
    "step3_text",
    [
        WeightConverter(
            [r"moe\.gate_proj\.weight", r"moe\.up_proj\.weight"], "moe.experts.gate_up_proj", [Concatenate(dim=1)]
        ),
        WeightRenaming(r"moe\.down_proj\.weight", "moe.experts.down_proj"),
    ],
    overwrite=True,
)
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

# The scales of stacked fp8 experts, whose names nothing else has.
FP8_RENAMING = WeightRenaming(r"moe\.down_proj\.weight_scale_inv", "moe.experts.down_proj_scale_inv")

# A routed expert's weight as llm-compressor and others save it, and what belongs to it.
SINGLE_EXPERT = re.compile(r"(?P<moe>.*\.moe\.)experts\.(?P<number>\d+)\.(?P<rest>(?:gate|up|down)_proj\..+)")
# The weights of all experts, or their scales, as the release has them.
STACKED_EXPERTS = re.compile(r"(?P<moe>.*\.moe\.)(?P<rest>(?:gate|up|down)_proj\.weight(?:_scale_inv)?)")


class DequantizedWeight:
    """
    A slice of a safetensors file times the scales of its blocks of `block_size` (rows, columns), in `dtype`; read when
    it is indexed.
    """

    def __init__(self, weight, scale, block_size: tuple[int, int], dtype: torch.dtype):
        self.weight, self.scale, self.block_size, self.dtype = weight, scale, block_size, dtype

    def get_shape(self) -> list[int]:
        return self.weight.get_shape()

    def __getitem__(self, index) -> torch.Tensor:
        weight, scale = self.weight[...], self.scale[...].float()
        rows, columns = weight.shape[-2:]
        height, width = self.block_size
        output = torch.empty(weight.shape, dtype=self.dtype)
        matrices = (tensor.view(-1, *tensor.shape[-2:]) for tensor in (output, weight, scale))
        for out, quantized, factors in zip(*matrices, strict=True):  # expert by expert: float32 copies take room
            factors = factors.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
            out.copy_(quantized.float().mul_(factors))
        return output[index]


def shape_of(weight) -> list[int]:
    """The shape of a tensor, or of a slice of a file."""
    return list(weight.shape) if isinstance(weight, torch.Tensor) else weight.get_shape()


def read_all(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same weights, as tensors."""
    return {name: weight if isinstance(weight, torch.Tensor) else weight[...] for name, weight in weights.items()}


class StackedWeight:
    """Weights of single experts as the one that holds them all, (experts, rows, columns); read when it is indexed."""

    def __init__(self, parts: list):
        self.parts = parts

    def get_shape(self) -> list[int]:
        return [len(self.parts), *shape_of(self.parts[0])]

    def __getitem__(self, index) -> torch.Tensor:
        return torch.stack([part[...] for part in self.parts])[index]


class ExpertWeight:
    """A single expert's part of a weight that holds all of them; read when it is indexed."""

    def __init__(self, stacked, number: int):
        self.stacked, self.number = stacked, number

    def get_shape(self) -> list[int]:
        return shape_of(self.stacked)[1:]

    def get_dtype(self) -> str | torch.dtype:
        return self.stacked.dtype if isinstance(self.stacked, torch.Tensor) else self.stacked.get_dtype()

    def __getitem__(self, index) -> torch.Tensor:
        return self.stacked[self.number][index]


def refuse_quantized_experts(names: Iterable[str]) -> None:
    """Raises a `ValueError` if single experts are in a quantised form other than block-fp8."""
    for name in names:
        match = SINGLE_EXPERT.fullmatch(name)
        if match is not None and not match["rest"].endswith((".weight", ".weight_scale_inv")):
            raise ValueError(
                f"{name} belongs to experts in a quantised form, of which `quantization_config` in config.json says "
                "nothing: such experts cannot be read."
            )


def stack_experts(weights: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """
    The same weights, with those of single experts under the names and in the shapes of the released layout.

    Raises:
        `ValueError`: if an expert is missing or there are more than `num_experts`.
    """
    stacked, experts = {}, {}
    for name, weight in weights.items():
        if (match := SINGLE_EXPERT.fullmatch(name)) is None:
            stacked[name] = weight
            continue
        experts.setdefault(match["moe"] + match["rest"], {})[int(match["number"])] = weight
    for name, parts in experts.items():
        if parts.keys() != set(range(num_experts)):
            raise ValueError(f"{name} must be there for experts 0 to {num_experts - 1}, got {sorted(parts)}.")
        if len(shapes := {tuple(shape_of(part)) for part in parts.values()}) > 1:
            raise ValueError(f"{name} must have one shape for all experts, got {sorted(shapes)}.")
        stacked[name] = StackedWeight([parts[number] for number in range(num_experts)])
    return stacked


def unstack_experts(weights: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """
    The same weights, with those of all experts under the names and in the shapes of single ones.

    Raises:
        `ValueError`: if a weight is not of `num_experts`.
    """
    single = {}
    for name, weight in weights.items():
        if (match := STACKED_EXPERTS.fullmatch(name)) is None:
            single[name] = weight
            continue
        if (shape := shape_of(weight))[0] != num_experts:
            raise ValueError(f"{name} must hold {num_experts} experts, got the shape {shape}.")
        for number in range(num_experts):
            single[f"{match['moe']}experts.{number}.{match['rest']}"] = ExpertWeight(weight, number)
    return single


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


def refuse_other_adapters(model: nn.Module, keys) -> None:
    """
    Looks at the `unexpected_keys` of what was loaded into a model.

    Raises:
        `ValueError`: if they are of adapters for experts that are built in another way than the model's.
    """
    if getattr(model, "peft_config", None) and any(".moe." in name for name in keys.unexpected_keys):
        implementation = "eager" if has_linear_experts(model) else "linear"
        raise ValueError(
            "The adapter was made for experts that are built in another way: load the model by "
            f"`from_pretrained(..., experts_implementation={implementation!r})` first."
        )


def wants_linear_experts(config) -> bool:
    """Whether the config asks for a quantisation of `nn.Linear` alone: any but block-fp8, which has stacked experts."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return getattr(method, "value", method) != "fp8"


def dequantize(weights: Mapping[str, Any], block_size: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """
    The same weights, with block-fp8 ones multiplied by their scales, which are left out.

    Raises:
        `ValueError`: if an fp8 weight has no scales.
    """
    output = {}
    for name, weight in weights.items():
        if name.endswith("_scale_inv"):
            continue
        scale = weights.get(f"{name}_scale_inv")
        if scale is None and getattr(weight, "get_dtype", lambda: None)() == "F8_E4M3":
            raise ValueError(f"{name} is fp8, but the checkpoint has no {name}_scale_inv.")
        output[name] = weight if scale is None else DequantizedWeight(weight, scale, block_size, dtype)
    return output


def take_back_unquantized(model: PreTrainedModel, names: Iterable[str], load_config) -> None:
    """
    Takes back the fp8 modules of `model` that have no scales among `names`, a checkpoint's: they are not fp8 there.

    Raises:
        `ValueError`: if the blocks of stacked fp8 experts do not divide them.
    """
    renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightConverter)]
    own_names = model.state_dict()
    scaled = {rename_source_key(name, renamings, converters, model.base_model_prefix, own_names)[0] for name in names}
    text_config = model.config.get_text_config()
    block_rows = load_config.hf_quantizer.quantization_config.weight_block_size[0]
    plain = None
    for name, module in list(model.named_modules()):
        if isinstance(module, FP8Experts) and f"{name}.down_proj_scale_inv" in scaled:
            if text_config.moe_intermediate_size % block_rows:
                raise ValueError(
                    "Experts are kept in fp8 only if `moe_intermediate_size` is a multiple of the blocks' "
                    f"{block_rows} rows, got {text_config.moe_intermediate_size}; load the model with "
                    "`quantization_config=FineGrainedFP8Config(dequantize=True)`."
                )
        elif isinstance(module, (FP8Linear, FP8Experts)) and f"{name}.weight_scale_inv" not in scaled:
            if plain is None:
                with torch.device("meta"):
                    plain = type(model)(model.config)
            model.set_submodule(name, plain.get_submodule(name).to(load_config.dtype))


class Step3Checkpoint:
    """Mixin of the models: what loading and saving a checkpoint of Step3 takes beyond any other model's."""

    # Patterns of the names that a directory of the whole model holds beside those of a part that is loaded by itself.
    # Not the attribute that transformers asks for, which is handed on to models that this one is a part of.
    keys_of_other_parts: tuple[str, ...] = ()

    def __init__(self, config, *args, **kwargs):
        config.validate()  # fields may have been set since it was made
        if config._experts_implementation is None and wants_linear_experts(config):
            config._experts_implementation = "linear"
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_post_hook(refuse_other_adapters)  # which PEFT loads adapters by

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

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """
        What `from_pretrained` reads weights with. Block-fp8 weights are kept or dequantised, as transformers' quantiser
        decides by the device; what a checkpoint holds in another type is not made fp8. Experts that were saved one by
        one are stacked, and stacked ones are read one by one for a model that has them as linear layers. Everything
        else is read as it is by transformers.

        Raises:
            `ValueError`: if fp8 weights have no scales, or blocks that stacked experts cannot keep, or if experts are
            missing, or quantised without a word of it in the config, or are linear layers and to be split over ranks.
        """

        def load(state_dict, checkpoint_files, load_config):
            return PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *args, **kwargs
            )

        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | set(model.keys_of_other_parts)
        quantizer = load_config.hf_quantizer
        settings = getattr(quantizer, "quantization_config", None)
        is_fp8 = quantizer is not None and quantizer.pre_quantized and settings.quant_method == "fp8"
        num_experts = getattr(model.config.get_text_config(), "moe_num_experts", None)
        is_linear = has_linear_experts(model)
        if is_linear and load_config.device_mesh is not None:
            raise ValueError('`experts_implementation="linear"` cannot be split over ranks; use `device_map`.')
        for module in model.modules():
            # bitsandbytes would pack 4-bit weights for a CPU in the first forward that needs no gradients; gradients
            # through packed weights are wrong, and so is what is merged with them or read after saving them.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        with ExitStack() as stack:
            weights = dict(state_dict or {})
            for path in checkpoint_files or ():
                if str(path).endswith(".safetensors"):
                    file = stack.enter_context(safe_open(path, framework="pt"))
                    weights |= {name: file.get_slice(name) for name in file.keys()}
                elif str(path).endswith(".bin"):
                    options = {
                        "map_location": "cpu",
                        "mmap": is_zipfile(path),
                        "weights_only": load_config.weights_only,
                    }
                    weights |= torch.load(path, **options)
            if is_fp8 or quantizer is None or not quantizer.pre_quantized:
                refuse_quantized_experts(weights)
            is_changed = num_experts is not None and any(
                (STACKED_EXPERTS if is_linear else SINGLE_EXPERT).fullmatch(name) for name in weights
            )
            is_dequantized = is_fp8 and settings.dequantize
            if is_changed and is_linear:
                weights = unstack_experts(weights, num_experts)
            if is_fp8 and not is_dequantized:
                load_config = replace(load_config, weight_mapping=[deepcopy(FP8_RENAMING), *load_config.weight_mapping])
                take_back_unquantized(model, weights, load_config)
            if is_dequantized:
                renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
                mapping = get_model_conversion_mapping(model)
                converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
                load_config = replace(load_config, hf_quantizer=None, weight_mapping=renamings + converters)
                weights = dequantize(weights, settings.weight_block_size, load_config.dtype)
            if is_changed and not is_linear:
                weights = stack_experts(weights, num_experts)
            if is_dequantized or is_changed:
                return load(weights, None, load_config)
        del weights  # which may be whole .bin files, about to be read again
        return load(state_dict, checkpoint_files, load_config)

    def save_pretrained(self, save_directory, *args, state_dict: Mapping[str, torch.Tensor] | None = None, **kwargs):
        """
        As for any model. Experts that are linear layers are saved as the release has them if they are not quantised and
        have no adapters, and one by one otherwise.
        """
        if has_linear_experts(self) and getattr(self, "hf_quantizer", None) is None:
            weights = self.state_dict() if state_dict is None else state_dict
            experts = [match for match in map(SINGLE_EXPERT.fullmatch, weights) if match is not None]
            if experts and all(match["rest"].endswith("_proj.weight") for match in experts):
                state_dict = read_all(stack_experts(weights, self.config.get_text_config().moe_num_experts))
        return super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def load_adapter(self, *args, **kwargs):
        """
        As for any model.

        Raises:
            `ValueError`: if the adapter is for experts that are built in another way.
        """
        info = super().load_adapter(*args, **kwargs)
        refuse_other_adapters(self, info)
        return info

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
        if assign:  # which puts other weights in the place of those that are fused
            self.unfuse()
        if has_linear_experts(self):
            state_dict = read_all(unstack_experts(state_dict, self.config.get_text_config().moe_num_experts))
        own_names = self.state_dict().keys()
        if state_dict.keys() <= own_names:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        transforms = get_model_conversion_mapping(self, add_legacy=False)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = {
            pattern: transform
            for transform in transforms
            if isinstance(transform, WeightConverter)
            for pattern in transform.source_patterns
        }
        renamed, to_convert = {}, {}
        for name, tensor in state_dict.items():
            if name in own_names:
                renamed[name] = tensor
                continue
            new_name, pattern = rename_source_key(name, renamings, list(converters.values()))
            if pattern is None:
                renamed[new_name] = tensor
            else:
                converter = to_convert.setdefault(new_name, deepcopy(converters[pattern]))
                converter.add_tensor(new_name, name, pattern, tensor)
        for name, converter in to_convert.items():
            renamed.update(converter.convert(name, model=self, config=self.config))
        return super().load_state_dict(renamed, strict=strict, assign=assign)
