"""Configurations of Step3-VL's vision encoder, text decoder and whole model.

The defaults describe the released 321 B model (https://huggingface.co/stepfun-ai/step3). The fields are named as in its
`config.json`, which serving engines read; `attribute_map` adds the names that transformers uses.
"""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import copy
import importlib
import sys

from huggingface_hub.dataclasses import strict
from transformers import configuration_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.type_validators import activation_fn_key, interval, probability


# Since transformers 5.20, `sub_configs_defaults`, a mapping to these, replaces `sub_configs`; Step3VLConfig sets both.
SubConfigSpec = getattr(configuration_utils, "SubConfigSpec", lambda config_class: config_class)


# Layers with routed experts in the released model: all but the first four and the last.
RELEASED_MOE_LAYERS = tuple(range(4, 60))

# Larger than any model, but products of a few sizes still fit in 64 bits.
MAX_LAYERS, MAX_SIZE = 1000, 2**31 - 1
size = interval(min=1, max=MAX_SIZE)
nonnegative = interval(min=0, max=float("inf"), exclude_max=True)


def set_on_package(module_name: str):
    """
    Sets a module as an attribute of its package, as `import` does but transformers' remote-code loader does not. dill
    looks up classes there; without it, it pickles them whole, and `datasets.map` takes minutes to hash them.
    """
    package, _, name = module_name.rpartition(".")
    if package:
        setattr(importlib.import_module(package), name, sys.modules[module_name])


def num_image_tokens(side: int, patch_size: int, stride: int) -> int:
    """
    Number of image tokens for a square image of `side` pixels: 169 at 728 pixels, 81 at 504. The encoder's patch grid
    is downsampled by a 2×2 convolution with `stride` and a 3×3 convolution with stride 2 and padding 1.
    """
    grid = (side // patch_size - 2) // stride + 1
    return ((grid - 1) // 2 + 1) ** 2


class Step3SavedWithCode:
    """Mixin of the configurations. Saving points the Auto classes in `auto_map` to the code in the saved directory."""

    carried_auto_map = {}  # the classes that the Auto classes load from there

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        # Keep references to other modules than this package's, which may be in any repository.
        carried = {reference.split(".")[0] for reference in Step3VLConfig.carried_auto_map.values()}
        given = getattr(self, "auto_map", None) or {}
        others = {key: value for key, value in given.items() if str(value).split("--")[-1].split(".")[0] not in carried}
        self.auto_map = {**self.carried_auto_map, **others}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


@strict
class Step3VisionEncoderConfig(Step3SavedWithCode, PreTrainedConfig):
    r"""
    Configuration of [`Step3VisionModel`].

    Args:
        hidden_size (`int`, defaults to 1792): Width of the encoder.
        intermediate_size (`int`, defaults to 15360): Width inside each MLP.
        output_hidden_size (`int`, defaults to 4096): Channels after the first downsampling convolution.
        num_hidden_layers (`int`, defaults to 63): Number of layers.
        num_attention_heads (`int`, defaults to 16): Number of attention heads; must divide `hidden_size`.
        num_channels (`int`, defaults to 3): Number of image channels.
        image_size (`int`, defaults to 728): Image side in pixels that the position embeddings were trained on.
        patch_size (`int`, defaults to 14): Side of a patch in pixels; must divide `image_size`.
        hidden_act (`str`, defaults to `"quick_gelu"`): Activation of the MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the layer norms.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities during training.
        initializer_range (`float`, defaults to 0.02): Standard deviation for initialising weights.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: if a value has the wrong type or is out of range.
    """

    model_type = "step3_vision_encoder"
    base_config_key = "vision_config"
    carried_auto_map = {
        "AutoConfig": "configuration_step3.Step3VisionEncoderConfig",
        "AutoModel": "modeling_step3.Step3VisionModel",
    }

    hidden_size: int = size(default=1792)
    intermediate_size: int = size(default=15360)
    output_hidden_size: int = size(default=4096)
    num_hidden_layers: int = interval(min=1, max=MAX_LAYERS)(default=63)
    num_attention_heads: int = size(default=16)
    num_channels: int = size(default=3)
    image_size: int = size(default=728)
    patch_size: int = size(default=14)
    hidden_act: str = activation_fn_key(default="quick_gelu")
    layer_norm_eps: float = nonnegative(default=1e-5)
    attention_dropout: float | int = probability(default=0.0)
    initializer_range: float = nonnegative(default=0.02)

    def validate_architecture(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"`patch_size` must divide `image_size`, got patches of {self.patch_size} px in {self.image_size} px."
            )


@strict
class Step3TextConfig(Step3SavedWithCode, PreTrainedConfig):
    r"""
    Configuration of [`Step3TextModel`] and [`Step3TextForCausalLM`].

    Args:
        vocab_size (`int`, defaults to 128815): Number of tokens in the vocabulary.
        hidden_size (`int`, defaults to 7168): Width of the decoder.
        intermediate_size (`int`, defaults to 18432): Width inside the MLP of a dense layer.
        num_hidden_layers (`int`, defaults to 61): Number of layers.
        num_attention_heads (`int`, defaults to 64): Number of query heads.
        num_attention_groups (`int`, defaults to 1):
            Number of key/value heads; must divide `num_attention_heads`. In the released model, all query heads share
            one; serving engines support no other number.
        head_dim (`int`, defaults to 256): Width of a head; must be even for rotary embedding.
        share_q_dim (`int`, defaults to 2048): Rank of the query projection.
        max_position_embedding (`int`, defaults to 65536): Maximum sequence length in tokens.
        max_seq_len (`int`, defaults to 65536): The released config's second name for it; saved, but not used.
        rms_norm_eps (`float`, defaults to 1e-5): Epsilon of the RMS norms.
        hidden_act (`str`, defaults to `"silu"`): Activation of the gated MLPs and experts.
        attention_dropout (`float`, defaults to 0.0): Dropout of the attention probabilities during training.
        moe_layers_enum (`str`, `list[int]` or `tuple[int]`, *optional*):
            Indices of the MoE layers, as numbers or as text such as `"4,5,6"`; saved as text, which serving engines
            read. `None` and `""` mean every layer but the first. The default is `"4,5,…,59"` for the released 61
            layers, and every layer but the first for any other number.
        use_moe (`bool`, defaults to `True`):
            Whether the model has MoE layers. If not, `"-1"` is saved as `moe_layers_enum`: serving engines do not know
            this field, and read `"-1"` as no layer.
        moe_num_experts (`int`, defaults to 48): Number of routed experts in an MoE layer.
        moe_top_k (`int`, defaults to 3): Number of experts that each token is routed to.
        moe_intermediate_size (`int`, defaults to 5120): Width inside a routed expert.
        share_expert_dim (`int`, defaults to 5120): Width inside the shared expert.
        norm_expert_weight (`bool`, defaults to `False`): Whether to divide a token's expert weights by their sum.
        output_router_logits (`bool`, defaults to `False`): Whether to return router logits and the load-balancing loss.
        router_aux_loss_coef (`float`, defaults to 0.0): Coefficient of the load-balancing loss.
        rope_parameters (`dict`, *optional*):
            Rotary embedding: `rope_type`, `rope_theta` (defaults to 500000) and the parameters of that type. The
            released format, separate `rope_theta` and `rope_scaling`, also works.
        initializer_range (`float`, defaults to 0.02): Standard deviation for initialising weights.
        use_cache (`bool`, defaults to `True`): Whether to return the key/value cache.
        tie_word_embeddings (`bool`, defaults to `False`): Whether to tie input and output embeddings.
        pad_token_id, bos_token_id, eos_token_id (*optional*): Special tokens.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: if a value has the wrong type, is out of range or contradicts
        another.
    """

    model_type = "step3_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    default_theta = 500000.0
    carried_auto_map = {
        "AutoConfig": "configuration_step3.Step3TextConfig",
        "AutoModel": "modeling_step3.Step3TextModel",
        "AutoModelForCausalLM": "modeling_step3.Step3TextForCausalLM",
    }
    attribute_map = {
        "max_position_embeddings": "max_position_embedding",
        "num_key_value_heads": "num_attention_groups",
        "n_routed_experts": "moe_num_experts",
        "num_local_experts": "moe_num_experts",
        "num_experts": "moe_num_experts",
        "num_experts_per_tok": "moe_top_k",
        "norm_topk_prob": "norm_expert_weight",
        "shared_expert_intermediate_size": "share_expert_dim",
    }
    # Splits query heads and the output projection over the ranks, and replicates the single key/value head. Each rank
    # holds whole experts: styles that split each expert would cut the fused gate and up weights in the wrong place.
    # modeling_step3 defines the styles `replicated_key_value_head` and `split_experts`.
    base_model_tp_plan = {
        "layers.*.self_attn.wq": "colwise",
        "layers.*.self_attn.k_proj": "replicated_key_value_head",
        "layers.*.self_attn.v_proj": "replicated_key_value_head",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "layers.*.moe.experts.gate_up_proj": "grouped_gemm",
        "layers.*.moe.experts.down_proj": "grouped_gemm",
        "layers.*.moe.experts": "split_experts",
        "layers.*.share_expert.gate_proj": "colwise",
        "layers.*.share_expert.up_proj": "colwise",
        "layers.*.share_expert.down_proj": "rowwise",
    }
    base_model_ep_plan = {
        "layers.*.moe.experts.gate_up_proj": "grouped_gemm",
        "layers.*.moe.experts.down_proj": "grouped_gemm",
        "layers.*.moe.experts": "ep_dispatch_experts",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = size(default=128815)
    hidden_size: int = size(default=7168)
    intermediate_size: int = size(default=18432)
    num_hidden_layers: int = interval(min=1, max=MAX_LAYERS)(default=61)
    num_attention_heads: int = size(default=64)
    num_attention_groups: int = size(default=1)
    head_dim: int = size(default=256)
    share_q_dim: int = size(default=2048)
    max_position_embedding: int = size(default=65536)
    max_seq_len: int = size(default=65536)
    rms_norm_eps: float = nonnegative(default=1e-5)
    hidden_act: str = activation_fn_key(default="silu")
    attention_dropout: float | int = probability(default=0.0)
    moe_layers_enum: str | list[int] | tuple[int, ...] | None = RELEASED_MOE_LAYERS
    use_moe: bool = True
    moe_num_experts: int = size(default=48)
    moe_top_k: int = size(default=3)
    moe_intermediate_size: int = size(default=5120)
    share_expert_dim: int = size(default=5120)
    norm_expert_weight: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = nonnegative(default=0.0)
    rope_parameters: RopeParameters | dict | None = None
    initializer_range: float = nonnegative(default=0.02)
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.moe_layers_enum is RELEASED_MOE_LAYERS and self.num_hidden_layers != 61:
            self.moe_layers_enum = None
        self.use_moe = bool(self.moe_layers)
        self.moe_layers_enum = self._layers_as_text()
        # Copy the caller's dictionary, because transformers modifies it in place.
        self.rope_parameters = copy.copy(kwargs.pop("rope_scaling", None) or self.rope_parameters)
        if self.num_attention_groups > 1:  # split key/value heads like query heads
            split = {f"layers.*.self_attn.{name}": "colwise" for name in ("k_proj", "v_proj")}
            self.base_model_tp_plan = {**self.base_model_tp_plan, **split}
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """Also copies dtype, quantisation and tying from a whole model's config to its `text_config`."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if isinstance(text_config := config_dict.get(cls.base_config_key), dict):
            shared = ("quantization_config", "dtype", "torch_dtype")
            config_dict[cls.base_config_key] = {
                **{key: config_dict[key] for key in shared if config_dict.get(key) is not None},
                **text_config,
                "tie_word_embeddings": any(part.get("tie_word_embeddings") for part in (config_dict, text_config)),
            }
        return config_dict, kwargs

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the MoE layers, in ascending order."""
        if not self.use_moe:
            return []
        listed = self.moe_layers_enum or ()
        entries = listed.split(",") if isinstance(listed, str) else listed
        layers = sorted({int(entry) for entry in entries if str(entry).strip()})
        return layers or list(range(1, self.num_hidden_layers))

    def _layers_as_text(self) -> str:
        return ",".join(map(str, self.moe_layers)) or "-1"

    @property
    def longest_sequence(self) -> int | None:
        """Maximum sequence length with rotary scaling; `None` for dynamic scaling, which has no limit."""
        if self.rope_parameters["rope_type"] == "dynamic":
            return None
        original = self.rope_parameters.get("original_max_position_embeddings") or self.max_position_embedding
        return max(self.max_position_embedding, int(original * (self.rope_parameters.get("factor") or 1)))

    def validate_architecture(self):
        if self.num_attention_heads % self.num_attention_groups:
            raise ValueError(
                "`num_attention_groups` key/value heads must divide `num_attention_heads`, got "
                f"{self.num_attention_groups} for {self.num_attention_heads} query heads."
            )
        if set(self.moe_layers) - set(range(self.num_hidden_layers)):
            raise ValueError(
                f"`moe_layers_enum` must list layers between 0 and {self.num_hidden_layers - 1}, got "
                f"{self.moe_layers_enum!r}."
            )

    def to_dict(self) -> dict:
        """Adds `rope_theta` and `rope_scaling`, which engines read from the released config."""
        output = super().to_dict()
        rope_parameters = output["rope_parameters"]
        output["rope_theta"] = rope_parameters["rope_theta"]
        output["rope_scaling"] = None if rope_parameters["rope_type"] == "default" else dict(rope_parameters)
        output["moe_layers_enum"] = self._layers_as_text()
        return output


@strict
class Step3VLConfig(Step3SavedWithCode, PreTrainedConfig):
    r"""
    Configuration of [`Step3VLModel`] and [`Step3VLForConditionalGeneration`].

    Args:
        vision_config (`dict` or [`Step3VisionEncoderConfig`], *optional*): Vision encoder; the released one by default.
        text_config (`dict` or [`Step3TextConfig`], *optional*): Text decoder; the released one by default.
        understand_projector_stride (`int`, defaults to 2): Stride of the first downsampling convolution.
        projector_bias (`bool`, defaults to `False`): Whether the projection to the decoder's width has a bias.
        image_token_id (`int`, defaults to 128001): Id of `<im_patch>`, whose embeddings are replaced by image features.
        tie_word_embeddings (`bool`, defaults to `False`):
            Whether to tie input and output embeddings. This is the text decoder's setting; it can be given in either
            config and reads the same in both.

    Raises:
        `huggingface_hub.errors.StrictDataclassError`: if a value has the wrong type, is out of range or contradicts
        another.
    """

    model_type = "step3_vl"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "image_hidden_states", "image_outputs"]
    carried_auto_map = {
        "AutoConfig": "configuration_step3.Step3VLConfig",
        "AutoModel": "modeling_step3.Step3VLModel",
        "AutoModelForImageTextToText": "modeling_step3.Step3VLForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_step3.Step3VLForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_step3.Step3VLForConditionalGeneration",
        "AutoProcessor": "processing_step3.Step3VLProcessor",
        "AutoImageProcessor": "processing_step3.Step3VLImageProcessor",
    }
    sub_configs = {"vision_config": Step3VisionEncoderConfig, "text_config": Step3TextConfig}
    sub_configs_defaults = {name: SubConfigSpec(config_class=value) for name, value in sub_configs.items()}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    understand_projector_stride: int = size(default=2)
    projector_bias: bool = False
    image_token_id: int = 128001

    def __post_init__(self, **kwargs):
        of_text = {name: kwargs.pop(name) for name in ("vocab_size", "num_hidden_layers") if name in kwargs}
        is_tied = kwargs.pop("tie_word_embeddings", False)
        if not isinstance(self.text_config, PreTrainedConfig):  # a config object takes precedence
            self.text_config = Step3TextConfig(**{**of_text, **(self.text_config or {})})
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = Step3VisionEncoderConfig(**(self.vision_config or {}))
        if is_tied:
            self.text_config.tie_word_embeddings = True
        # vLLM needs them to build the text decoder.
        self.text_config.architectures = self.text_config.architectures or ["Step3TextForCausalLM"]
        super().__post_init__(**kwargs)

    # Trainers, PEFT and early-exit generation read these of the text decoder from the whole model's config.
    tie_word_embeddings, vocab_size, num_hidden_layers = (
        property(
            lambda self, name=name: getattr(self.text_config, name),
            lambda self, value, name=name: setattr(self.text_config, name, value),
        )
        for name in ("tie_word_embeddings", "vocab_size", "num_hidden_layers")
    )

    def to_dict(self) -> dict:
        """Adds `tie_word_embeddings`, as the text decoder has it."""
        return {**super().to_dict(), "tie_word_embeddings": self.tie_word_embeddings}

    def validate_architecture(self):
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"`image_token_id` must be a token of the vocabulary, between 0 and {self.text_config.vocab_size - 1}, "
                f"got {self.image_token_id}."
            )


for _config_class in (Step3VisionEncoderConfig, Step3TextConfig, Step3VLConfig):
    _config_class.register_for_auto_class()
set_on_package(__name__)
