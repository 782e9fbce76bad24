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

# Names of transformers that its documentation does not promise. Each is looked up where it is needed, so that a release
# without it costs that feature, which says so, and nothing else.
#
# | name                                                       | what for                                    | since  |
# |------------------------------------------------------------|---------------------------------------------|--------|
# | PreTrainedModel._load_pretrained_model                     | fp8 and experts one by one, while reading   | ≤ 4.57 |
# | integrations.finegrained_fp8.FP8Linear, FP8Experts         | fp8 that stays fp8: what is not quantised   | 5.0    |
# | integrations.finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS     | fp8 that stays fp8: the experts' kernel     | 5.4    |
# | conversion_mapping.get_model_conversion_mapping            | `load_state_dict` with names on disk        | 5.0    |
# | core_model_loading.rename_source_key                       | `load_state_dict` with names on disk        | 5.0    |
# | integrations.moe.ALL_EXPERTS_FUNCTIONS                     | the experts implementation "step3"          | 5.0    |
# | integrations.moe.grouped_mm_experts_forward                | the experts implementation "step3"          | 5.0    |
# | distributed.tensor_parallel.ALL_PARALLEL_STYLES            | tensor parallelism                          | 5.16   |
# | distributed.tensor_parallel.TensorParallelLayer            | tensor parallelism                          | 5.16   |
# | models.mixtral.modeling_mixtral.load_balancing_loss_func   | the load-balancing loss                     | ≤ 4.57 |
# | models.auto.modeling_auto.MODEL_FOR_*_MAPPING_NAMES        | label smoothing, `transformers serve`       | 5.0    |
# | ProcessorMixin._get_arguments_from_pretrained              | a directory without an image processor      | ≤ 4.57 |

import functools
import importlib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any
from zipfile import is_zipfile

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers.cache_utils import Cache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_step3 import cache_name


logger = logging.get_logger(__name__)

CACHE_NAME = cache_name()


def find(module: str, name: str) -> Any | None:
    """`transformers.MODULE.NAME`, one of the names above, or `None` where there is no such thing."""
    try:
        return getattr(importlib.import_module(f"transformers.{module}"), name, None)
    except ModuleNotFoundError:
        return None


def need(module: str, name: str, feature: str) -> Any:
    """
    `transformers.MODULE.NAME`, one of the names above.

    Raises:
        `ImportError`: if there is no such thing, with what goes without it.
    """
    found = find(module, name)
    if found is None:
        raise lacking(f"{module}.{name}", feature)
    return found


def lacking(name: str, feature: str) -> ImportError:
    """What is raised where one of the names above is not there."""
    return ImportError(
        f"{feature} needs `transformers.{name}`, which transformers {transformers.__version__} lacks: use a release "
        "that this model was tested with, or do without it."
    )


def one_cache(cache: Cache | None, past_key_values: Cache | None, others: Mapping | None = None) -> Cache | None:
    """
    The cache that came under its name or its older one, `past_key_values`.

    Raises:
        `ValueError`: if it came under both.
        `TypeError`: if `others`, the arguments that a model ignores, hold a cache: under a third name.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Give a cache as `cache` or by its older name `past_key_values`, not as both.")
    for name, value in (others or {}).items():
        if isinstance(value, Cache):
            raise TypeError(f"`{name}` is a cache under a name that this model does not know; it is called `cache`.")
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated; it is called `cache`.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


@functools.cache
def parameters_of(function: Callable) -> set[str]:
    """The names of a function's parameters."""
    return set(inspect.signature(function).parameters)


class Step3GenerationInputs:
    """Mixin of the models that generate: what `generate` passes on comes by the names that the models know, or not at
    all."""

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """
        As for any model; the cache may be given as `cache` or `past_key_values`, whatever the release calls it. No more
        tokens are generated than there are positions for.

        Raises:
            `ValueError`: if the prompt leaves no position for a single one.
        """
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        generation_config, kwargs = self.within_positions(inputs, generation_config, kwargs)
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def within_positions(self, inputs, generation_config, kwargs: dict) -> tuple:
        """`generation_config` and `kwargs` for a request that ends, at the latest, with the model's last position."""
        settings = generation_config or self.generation_config
        if getattr(settings, "is_assistant", False):  # whose proposals its main model has bounded
            return generation_config, kwargs
        models = [model for model in (self, kwargs.get("assistant_model")) if model is not None]
        limits = [getattr(model.config.get_text_config(), "longest_sequence", None) for model in models]
        limit = min((limit for limit in limits if limit is not None), default=None)
        names = ("attention_mask", "inputs_embeds", "input_ids")
        given = [kwargs[name] for name in names if isinstance(kwargs.get(name), torch.Tensor)]
        given = given or ([inputs] if isinstance(inputs, torch.Tensor) else [])
        if limit is None or not given or given[0].ndim < 2:
            return generation_config, kwargs
        length = given[0].shape[1]
        wanted = kwargs.get("max_new_tokens", settings.max_new_tokens)
        if wanted is None:
            # 20 is what transformers generates if nothing is said.
            wanted = (kwargs.get("max_length", settings.max_length) or length + 20) - length
        if length >= limit:
            raise ValueError(f"The prompt has {length} tokens, which leaves none of the model's {limit} positions.")
        if wanted <= limit - length:
            return generation_config, kwargs
        logger.warning_once(f"At most {limit - length} tokens are generated: there are no positions for {wanted}.")
        if generation_config is None:
            return None, {**kwargs, "max_new_tokens": limit - length}
        generation_config = deepcopy(generation_config)
        generation_config.max_new_tokens = limit - length
        return generation_config, {name: value for name, value in kwargs.items() if name != "max_new_tokens"}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> dict:
        """
        As for any model.

        Raises:
            `TypeError`: if this release of transformers calls what it passes on by names that this model does not know.
        """
        arguments = {
            "next_sequence_length": next_sequence_length,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "is_first_iteration": is_first_iteration,
            CACHE_NAME: one_cache(cache, past_key_values, kwargs),
        }
        if unknown := arguments.keys() - parameters_of(GenerationMixin.prepare_inputs_for_generation):
            raise TypeError(
                f"transformers {transformers.__version__} has other names for what `generate` passes on as "
                f"{', '.join(sorted(unknown))}: use a release that this model was tested with."
            )
        model_inputs = super().prepare_inputs_for_generation(input_ids, **arguments, **kwargs)
        strangers = {name for name, value in model_inputs.items() if isinstance(value, torch.Tensor | Cache)}
        strangers -= parameters_of(type(self).forward)
        missing = {"attention_mask", "position_ids"} - model_inputs.keys()
        if strangers and missing:
            raise TypeError(
                f"transformers {transformers.__version__} passes {', '.join(sorted(strangers))} to a model that has no "
                f"such argument, and not {', '.join(sorted(missing))}: use a release that it was tested with."
            )
        return model_inputs


# Trainer and `transformers serve` ask for classes by their names in these, which registering with the Auto classes does
# not fill.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    _names = find("models.auto.modeling_auto", f"MODEL_FOR_{_task}_MAPPING_NAMES")
    if _names is not None:
        _names["step3_vl"] = "Step3VLForConditionalGeneration"
        if _task == "CAUSAL_LM":
            _names["step3_text"] = "Step3TextForCausalLM"


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
    feature = "fp8 that is kept"
    fp8_linear = need("integrations.finegrained_fp8", "FP8Linear", feature)
    fp8_experts = need("integrations.finegrained_fp8", "FP8Experts", feature)
    rename = need("core_model_loading", "rename_source_key", feature)
    renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightConverter)]
    own_names = model.state_dict()
    scaled = {rename(name, renamings, converters, model.base_model_prefix, own_names)[0] for name in names}
    text_config = model.config.get_text_config()
    block_rows = load_config.hf_quantizer.quantization_config.weight_block_size[0]
    plain = None
    for name, module in list(model.named_modules()):
        if isinstance(module, fp8_experts) and f"{name}.down_proj_scale_inv" in scaled:
            if text_config.moe_intermediate_size % block_rows:
                raise ValueError(
                    "Experts are kept in fp8 only if `moe_intermediate_size` is a multiple of the blocks' "
                    f"{block_rows} rows, got {text_config.moe_intermediate_size}; load the model with "
                    "`quantization_config=FineGrainedFP8Config(dequantize=True)`."
                )
        elif isinstance(module, (fp8_linear, fp8_experts)) and f"{name}.weight_scale_inv" not in scaled:
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
        if hasattr(config, "quantization_config") and not hasattr(PreTrainedModel, "_load_pretrained_model"):
            raise lacking("PreTrainedModel._load_pretrained_model", "Reading quantised weights")
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

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """
        As for any model.

        Raises:
            `ValueError`: if `fusion_config` names rewrites that `fuse` makes of a loaded model.
            `ImportError`: if it is to be split over ranks, and this release of transformers lacks what that takes.
        """
        ours = set(kwargs.get("fusion_config") or ()) & {rewrite.name for rewrite in REWRITES}
        if ours:
            names = ", ".join(repr(name) for name in sorted(ours))
            raise ValueError(f"`fusion_config` is transformers' own; call `fuse({names})` on the loaded model instead.")
        if kwargs.get("distributed_config") is not None or kwargs.get("tp_plan") is not None:
            for name in ("ALL_PARALLEL_STYLES", "TensorParallelLayer"):
                need("distributed.tensor_parallel", name, "Tensor parallelism")
        return super().from_pretrained(*args, **kwargs)

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
                mapping = need("conversion_mapping", "get_model_conversion_mapping", "Dequantising fp8")
                renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
                converters = [entry for entry in mapping(model) if isinstance(entry, WeightConverter)]
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
        if assign and any(row["rewritten"] for row in self.fusion_report()):  # whole weights are to be put in place
            applied = [(rewrite, m) for m in self.modules() for rewrite in REWRITES if rewrite.is_applied_to(m)]
            self.unfuse()
            result = self.load_state_dict(state_dict, strict=strict, assign=True)
            for rewrite, module in applied:
                rewrite.apply(module)
            return result
        if has_linear_experts(self):
            state_dict = read_all(unstack_experts(state_dict, self.config.get_text_config().moe_num_experts))
        own_names = self.state_dict().keys()
        if state_dict.keys() <= own_names:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        feature = "`load_state_dict` with names on disk"
        mapping = need("conversion_mapping", "get_model_conversion_mapping", feature)
        rename = need("core_model_loading", "rename_source_key", feature)
        transforms = mapping(self, add_legacy=False)
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
            new_name, pattern = rename(name, renamings, list(converters.values()))
            if pattern is None:
                renamed[new_name] = tensor
            else:
                converter = to_convert.setdefault(new_name, deepcopy(converters[pattern]))
                converter.add_tensor(new_name, name, pattern, tensor)
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
