"""Loads and saves Step3-VL checkpoints: weight names, block-fp8, and experts that are stacked, separate or mapped."""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

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
from transformers.utils import is_kernels_available, logging

from .experts_step3 import BlockFP8Linear, LinearExperts, MappedExperts, divide_blocks


logger = logging.get_logger(__name__)

# Trainer and `transformers serve` look up class names in these mappings, which Auto class registration does not fill.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")["step3_vl"] = "Step3VLForConditionalGeneration"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["step3_text"] = "Step3TextForCausalLM"


# ---------------------------------------------------------------------------------------------------------------------
# Names on disk
# ---------------------------------------------------------------------------------------------------------------------


EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


class MergeExperts(MergeModulelist):
    """Stacks expert weights that were saved one by one. Saving keeps them stacked, as in the release."""

    def convert(self, input_dict, *args, full_layer_name: str, model: PreTrainedModel, **kwargs):
        """Leaves stacked weights as they are. Raises a `ValueError` if there are more or fewer experts than the model
        has."""
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


class ExpertsConverter(WeightConverter):
    """
    A converter of experts that were saved one by one. Raises a `ValueError` if one of their numbers is missing, because
    transformers would number the experts anew.
    """

    def convert(self, layer_name: str, *args, **kwargs):
        numbers = {int(match[1]) for match in map(EXPERT_NUMBER.search, self.layer_targets[layer_name]) if match}
        if numbers - set(range(len(numbers))):
            raise ValueError(f"{layer_name} takes experts from 0 on, the checkpoint has {sorted(numbers)}.")
        return super().convert(layer_name, *args, **kwargs)


# Converts names on disk to module names; `save_pretrained` reverses it, without the groups that start with `(?`.
# transformers finds a mapping by class name, otherwise by model type, and applies those of a model's parts after its
# own. Stacked down projections are renamed, not converted, so that disk offloading reads them in place. llm-compressor
# and others save experts one by one, as `moe.experts.0.gate_proj.weight`; requiring `weight` keeps PEFT from stacking
# adapters of linear experts. `scripts/checkpoint_files.py` lists the names for scripts, which do not import torch.
GATE, UP, DOWN = (rf"moe\.{name}_proj\.weight" for name in ("gate", "up", "down"))
SINGLE_GATE, SINGLE_UP, SINGLE_DOWN = (
    rf"moe\.(?:experts\.\d+\.)(?=\w+\.weight){name}_proj\.weight" for name in ("gate", "up", "down")
)
register_checkpoint_conversion_mapping(
    "step3_text",
    [
        WeightConverter([GATE, UP], "moe.experts.gate_up_proj", [Concatenate(dim=1)]),
        ExpertsConverter([SINGLE_GATE, SINGLE_UP], "moe.experts.gate_up_proj", [MergeExperts(), Concatenate(dim=1)]),
        ExpertsConverter(SINGLE_DOWN, "moe.experts.down_proj", [MergeExperts()]),
        WeightRenaming(DOWN, "moe.experts.down_proj"),
        WeightRenaming(rf"{DOWN}_scale_inv", "moe.experts.down_proj_scale_inv"),
        # Stacks linear experts when saving. `(?!)` matches nothing, so loading does not split stacked experts.
        WeightConverter(rf"(?!){GATE}", "moe.experts.*.gate_proj.weight", [SplitModulelist()]),
        WeightConverter(rf"(?!){UP}", "moe.experts.*.up_proj.weight", [SplitModulelist()]),
        WeightConverter(rf"(?!){DOWN}", "moe.experts.*.down_proj.weight", [SplitModulelist()]),
    ],
    overwrite=True,
)
# These also match names saved by the original remote code, such as `model.language_model.`.
register_checkpoint_conversion_mapping(
    "step3_vl",  # the key for Step3VLModel
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

# Stacked expert weights or scales, as in the release.
STACKED_EXPERTS = re.compile(r"(.*\.moe\.)((?:gate|up|down)_proj\.weight(?:_scale_inv)?)")

# Also matches experts saved one by one. The groups leave out `experts.`, as the names of mapped experts do.
ANY_EXPERTS = re.compile(r"(.*\.moe\.)(?:experts\.)?((?:\d+\.)?(?:gate|up|down)_proj\.weight(?:_scale_inv)?)")


def unstack_experts(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits stacked expert weights and scales into views, one per expert, under the experts' own names."""
    single = {}
    for name, weight in weights.items():
        if match := STACKED_EXPERTS.fullmatch(name):
            single |= {f"{match[1]}experts.{number}.{match[2]}": part for number, part in enumerate(weight)}
        else:
            single[name] = weight
    return single


def converts_experts(transform: WeightConverter | WeightRenaming) -> bool:
    """Whether it is a conversion to stacked experts, which linear experts do not need."""
    return isinstance(transform, WeightConverter) and transform.target_patterns[0].startswith("moe.experts.")


def experts_form(model: nn.Module) -> str | None:
    """The implementation that the model's experts were built for, if they are not stacked parameters."""
    forms = {LinearExperts: "linear", MappedExperts: "mapped"}
    return next((forms[type(module)] for module in model.modules() if type(module) in forms), None)


def transforms_of(model: PreTrainedModel) -> list[WeightConverter | WeightRenaming]:
    """The registered conversions from names on disk that apply to the form of the model's experts."""
    transforms, form = get_model_conversion_mapping(model, add_legacy=False), experts_form(model)
    if form is not None:
        transforms = [entry for entry in transforms if not entry.target_patterns[0].startswith("moe.experts.")]
    if form == "mapped":
        names = MappedExperts.names + MappedExperts.scale_names
        transforms += [WeightRenaming(rf"moe\.{name}", f"moe.experts.{name}") for name in names]
    return transforms


def open_files(paths: list[str], **options) -> dict[str, torch.Tensor]:
    """The tensors of files, memory-mapped unless `options` say otherwise, so that each is read when it is needed."""
    tensors = {}
    for path in paths:
        try:
            tensors |= load_state_dict(path, **options)
        except RuntimeError as error:
            if "unable to mmap" not in str(error):
                raise
            raise RuntimeError(
                f"{error}. Mapped files need address space, not memory: `ulimit -v` must be unlimited, and `sysctl "
                "vm.overcommit_memory` 1, or 0 if each file is smaller than the memory."
            ) from error
    return tensors


def warn_of_slow_reading(model: PreTrainedModel, paths: list[str] | None) -> None:
    """On Linux, warns if mapped experts lie on a network file system or exceed the memory, and says what is read."""
    experts = [module for module in model.modules() if isinstance(module, MappedExperts)]
    if not (paths and experts and Path("/proc/mounts").exists()):
        return
    size = sum(tensor.nbytes * module.num_experts for module in experts for tensor in module.stored(0)) / 1e9
    config = model.config.get_text_config()
    token = f"A token reads {size * config.moe_top_k / config.moe_num_experts:.3g} GB of {size:.3g} GB of experts"
    mounts = dict(line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
    folders = map(str, Path(paths[0]).resolve().parents)
    file_system = next((mounts[folder] for folder in folders if folder in mounts), "")  # none in a chroot
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if re.match("nfs|cifs|smb|fuse|ceph|lustre|9p", file_system):
        logger.warning(f"{token} from a network file system ({file_system}): a copy on a local disk is faster.")
    elif size > memory:
        logger.warning(f"{token}, from the disk unless cached: this machine has {memory:.3g} GB of memory.")


def check_fp8(weights: Mapping[str, torch.Tensor], settings) -> None:
    """Raises a `ValueError` if fp8 `weights` have no scales, or the `settings` of their quantisation no blocks."""
    for name, weight in weights.items():
        if weight.dtype == torch.float8_e4m3fn:
            if getattr(settings, "weight_block_size", None) is None:
                raise ValueError(f"{name} is fp8: `quantization_config` in config.json must have `weight_block_size`.")
            if f"{name}_scale_inv" not in weights:
                raise ValueError(f"{name} is fp8, but the checkpoint has no {name}_scale_inv.")


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config on the meta device, with none of its modules quantised."""
    with torch.device("meta"):
        return type(model)(model.config)


def load_mapped(model: PreTrainedModel, state_dict: Mapping[str, torch.Tensor], checkpoint_files, load_config):
    """
    Gives mapped experts views of their weights, and loads all others as usual, except that block-fp8 stays as it is and
    is dequantised when it is used. Raises a `ValueError` if experts have no weights, or weights or scales do not match
    the config.
    """
    renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
    settings = getattr(load_config.hf_quantizer, "quantization_config", None)
    is_fp8 = getattr(settings, "quant_method", None) == "fp8"
    if is_fp8:
        plain = without_weights(model)
        for name, module in list(model.named_modules()):
            if type(module).__module__ == FP8Experts.__module__:  # put there by transformers
                model.set_submodule(name, plain.get_submodule(name))
        load_config = replace(load_config, hf_quantizer=None, weight_mapping=transforms_of(model))
    own_names = model.state_dict()

    def module_of(name: str) -> str | None:
        name, _ = rename_source_key(name, renamings, [], model.base_model_prefix, own_names)
        return name.rpartition(".")[0] if name in own_names else None

    layers, others, experts = defaultdict(dict), {}, {}
    for name, weight in state_dict.items():
        if match := ANY_EXPERTS.fullmatch(name):
            layers[match[1]][match[1] + match[2]] = weight
            continue
        others[name] = weight
        module = module_of(name) if weight.dtype == torch.float8_e4m3fn or name.endswith(".moe.gate.weight") else None
        if module is not None and weight.dtype == torch.float8_e4m3fn:
            layer = BlockFP8Linear(model.get_submodule(module), settings.weight_block_size)
            model.set_submodule(module, layer)
        elif module is not None and module.endswith(".gate"):  # an adapter's router has another name
            experts[name.removesuffix("gate.weight")] = model.get_submodule(module.removesuffix("gate") + "experts")
    for prefix in layers.keys() - experts.keys():  # layers that the model does not have
        others |= layers.pop(prefix)
    loaded = PreTrainedModel._load_pretrained_model(model, others, checkpoint_files, load_config)
    for module in model.modules():
        if isinstance(module, BlockFP8Linear):
            module.requires_grad_(False)
    for prefix, module in experts.items():
        if is_fp8:
            module.block_size = tuple(settings.weight_block_size)
        module.map_weights(layers[prefix], prefix)
    for module_name, module in model.named_modules():
        if isinstance(module, MappedExperts) and not module.weights:
            raise ValueError(f"{module_name} has no weights: the checkpoint must have this layer's router and experts.")
        for number in range(module.num_experts if isinstance(module, MappedExperts) else 0):
            if (device := (load_config.device_map or {}).get(f"{module_name}.{number}")) is not None:
                module.hold(number, device)
    warn_of_slow_reading(model, checkpoint_files)
    return loaded


def replace_unquantized(model: PreTrainedModel, names: Iterable[str], load_config) -> None:
    """
    Replaces fp8 modules of `model` by plain ones if the checkpoint has no scales for them among its `names`.
    transformers decides by a list in the config, which the released config is not known to have. Raises a `ValueError`
    if the blocks of stacked fp8 experts do not divide them.
    """
    renamings = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in load_config.weight_mapping if isinstance(entry, WeightConverter)]
    own_names = model.state_dict()
    found = {rename_source_key(name, renamings, converters, model.base_model_prefix, own_names)[0] for name in names}
    plain = without_weights(model)
    for name in own_names:
        if name.endswith("_scale_inv") and name not in found and own_names[name].is_meta:  # not when loading adapters
            module_name = name.rpartition(".")[0]
            model.set_submodule(module_name, plain.get_submodule(module_name).to(load_config.dtype))
    width = model.config.get_text_config().moe_intermediate_size
    rows = load_config.hf_quantizer.quantization_config.weight_block_size[0]
    if width % rows and any(isinstance(module, FP8Experts) for module in model.modules()):
        raise ValueError(
            f"Experts are kept in fp8 only if `moe_intermediate_size` is a multiple of the blocks' {rows} rows, got "
            f"{width}; load the model with `quantization_config=FineGrainedFP8Config(dequantize=True)`."
        )


def refuse_other_adapters(model: nn.Module, keys) -> None:
    """Raises a `ValueError` if the `unexpected_keys` of an adapter that was loaded belong to adapters for experts that
    are built differently from the model's."""
    if getattr(model, "peft_config", None) and any(".moe." in name for name in keys.unexpected_keys):
        implementation = "eager" if experts_form(model) == "linear" else "linear"
        raise ValueError(
            "The adapter was made for experts that are built in another way: load the model by "
            f"`from_pretrained(..., experts_implementation={implementation!r})` first."
        )


def wants_linear_experts(config) -> bool:
    """Whether the config's quantisation supports only `nn.Linear`: any method but fp8, which has stacked experts."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return False
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    return getattr(method, "value", method) != "fp8"


class Step3Checkpoint:
    """Mixin of the models: loads and saves what is special to Step3 checkpoints."""

    # Patterns of weights to ignore when loading a part of the model from a whole model's directory. transformers'
    # own attribute would also apply to models that contain this one.
    keys_of_other_parts: tuple[str, ...] = ()

    def __init__(self, config, *args, **kwargs):
        config.validate()  # fields may have changed since it was created
        if config._experts_implementation is None and wants_linear_experts(config):
            config._experts_implementation = "linear"
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_post_hook(refuse_other_adapters)  # PEFT's way of loading adapters

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As for any model. `"linear"` and `"mapped"` can only be chosen when a model is loaded. Raises a `ValueError`
        if an existing model would have to change to or from one of these."""
        form = requested_experts if requested_experts in ("linear", "mapped") else None
        is_built = any(hasattr(module, "experts") for module in self.modules())
        if is_built and form != experts_form(self):
            raise ValueError(
                "Experts are stacked, made linear layers or mapped when a model is loaded: "
                f"`from_pretrained(..., experts_implementation={requested_experts!r})`."
            )
        return super().get_correct_experts_implementation(requested_experts) if form is None else form

    def post_init(self):
        super().post_init()
        self._keys_to_ignore_on_load_unexpected = set(self.keys_of_other_parts)  # without those of its parts

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As for any model. Raises a `ValueError` if weights are quantised in a format that the config does not
        describe."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        # One by one, or, as older releases report them, by the stacked weight's name.
        quantised = re.compile(r"\.moe\.experts\.(\d+\.\w+_proj\.(?!weight(_scale_inv)?$)|\w+_proj_(?!scale_inv$))")
        unexpected = set(info["unexpected_keys"])
        unused = [name for name in unexpected if quantised.search(name)]
        scales = (name for name in unexpected if name.endswith("_scale_inv"))
        unused += [name for name in scales if name.removesuffix("_scale_inv") not in unexpected]
        if unused:
            raise ValueError(
                f"{len(unused)} weights or scales, such as {min(unused)}, are in a form that is not known: "
                "`quantization_config` in config.json must say how they are quantised."
            )
        if experts_form(model) == "mapped":
            if fp8 := [module for module in model.modules() if getattr(module, "is_fp8", False)]:
                if hasattr(model, "hf_quantizer"):  # nothing is left to transformers' quantiser
                    model.hf_quantizer.remove_quantization_config(model)
                model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": fp8[0].block_size}
            for part in model.modules():  # which may be saved by itself
                if isinstance(part, Step3Checkpoint):
                    part._weight_conversions = transforms_of(part)
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """
        Loads the weights for `from_pretrained`. The registered conversions are enough except in three cases:

        Linear experts need stacked weights split. Conversions are registered by class, which is the same for both kinds
        of experts, and transformers would read a stacked weight whole before quantising one expert.

        Mapped experts are no parameters, and keep the type that they have on disk.

        Block fp8 needs its scales and, to be dequantised, blocks of one size; transformers checks neither. Dequantising
        also splits stacked experts, which takes less memory.

        Raises:
            `ValueError`: if fp8 weights have no scales, if their blocks do not divide stacked experts, or if linear
            experts would be split over ranks.
            `ImportError`: if fp8 weights are to stay fp8 on a GPU without the package that multiplies them.
        """
        quantizer, text_config = load_config.hf_quantizer, model.config.get_text_config()
        form = getattr(text_config, "_experts_implementation", None)
        is_linear, is_mapped = form == "linear", form == "mapped"
        settings = getattr(quantizer, "quantization_config", None)
        is_fp8 = quantizer is not None and quantizer.pre_quantized and settings.quant_method == "fp8"
        if (is_linear or is_mapped) and load_config.device_mesh is not None:
            raise ValueError(f"`experts_implementation={form!r}` cannot be split over ranks; use `device_map`.")
        keeps_fp8 = is_fp8 and not settings.dequantize and not is_mapped
        if keeps_fp8 and torch.cuda.is_available() and not is_kernels_available():
            raise ImportError(
                "Weights stay in fp8 on a GPU only with the package `kernels`, in the version that transformers takes: "
                '`pip install "transformers[kernels]"`, or load the model with '
                "`quantization_config=FineGrainedFP8Config(dequantize=True)`."
            )
        for module in model.modules():
            # On a CPU, bitsandbytes would pack 4-bit weights in the first forward without gradients. Packed weights
            # give wrong gradients, and are merged and saved incorrectly.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if is_linear or is_mapped or is_fp8:
            if state_dict is None:
                disable_mmap = False if is_mapped else load_config.disable_mmap
                options = {"weights_only": load_config.weights_only, "disable_mmap": disable_mmap}
                state_dict = open_files(checkpoint_files, **options)
            if is_mapped or is_fp8:
                check_fp8(state_dict, settings)
            if is_mapped:
                return load_mapped(model, state_dict, checkpoint_files, load_config)
            if is_linear or settings.dequantize:
                state_dict = unstack_experts(state_dict)
        if is_linear:
            mapping = [entry for entry in load_config.weight_mapping if not converts_experts(entry)]
            load_config = replace(load_config, weight_mapping=mapping)
        if is_fp8:
            for name, weight in list(state_dict.items()):
                if weight.dtype == torch.float8_e4m3fn:
                    if settings.dequantize:
                        scale = state_dict[f"{name}_scale_inv"]
                        state_dict[f"{name}_scale_inv"] = divide_blocks(weight, scale, settings.weight_block_size)
                elif settings.dequantize and not name.endswith("_scale_inv"):  # transformers 5.19 does not cast
                    state_dict[name] = weight.to(load_config.dtype)
            if not settings.dequantize:
                replace_unquantized(model, state_dict, load_config)
        load = PreTrainedModel._load_pretrained_model
        loaded = load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        is_dense = quantizer is None or getattr(settings, "dequantize", False)
        if (is_fp8 or is_linear) and is_dense:
            del model._weight_conversions  # so that it is saved stacked and not quantised
        elif is_linear and quantizer.pre_quantized:
            model._weight_conversions = transforms_of(model)  # without bitsandbytes' own, which cannot be reversed
        return loaded

    def load_adapter(self, *args, **kwargs):
        """As for any model. Raises a `ValueError` if the adapter is for experts that are built differently."""
        info = super().load_adapter(*args, **kwargs)
        refuse_other_adapters(self, info)
        return info

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args, **kwargs
    ) -> nn.Embedding:
        """As for any model. Raises a `ValueError` if the new vocabulary would not contain `image_token_id` or
        `pad_token_id`."""
        if new_num_tokens is not None:
            vocab_size = math.ceil(new_num_tokens / (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
            for name, config in (("image_token_id", self.config), ("pad_token_id", self.config.get_text_config())):
                if (token := getattr(config, name, None)) is not None and token >= vocab_size:
                    raise ValueError(f"A vocabulary of {vocab_size} would not have `{name}` {token} any more.")
        return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False):
        """As for any module. Also accepts the names on disk, which `Trainer` uses to resume."""
        if assign:  # replaces fused weights
            self.unfuse()
        transforms = transforms_of(self)
        if experts_form(self) == "linear":
            state_dict = unstack_experts(state_dict)
        own_names = self.state_dict().keys()
        if state_dict.keys() <= own_names:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        renamed, to_convert = {}, {}
        for name in sorted(state_dict, key=dot_natural_key):  # experts in numeric order
            new_name, pattern = (name, None) if name in own_names else rename_source_key(name, renamings, converters)
            if pattern is None:
                renamed[new_name] = state_dict[name]
            else:
                converter = to_convert.setdefault(new_name, deepcopy(converter_of[pattern]))
                converter.add_tensor(new_name, name, pattern, state_dict[name])
        for name, converter in to_convert.items():
            renamed.update(converter.convert(name, model=self, config=self.config))
        return super().load_state_dict(renamed, strict=strict, assign=assign)
