"""Step3-VL: a vision encoder and a mixture-of-experts decoder with multi-matrix factorization attention.

Contents: linear layers and rewrites, text decoder, vision encoder, vision and text together, language-model heads,
input checks, parallelism.
"""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.activations import QuickGELUActivation
from transformers.cache_utils import Cache, DynamicCache
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    MoeExpertsParallel,
    TensorParallelLayer,
)
from transformers.integrations import use_experts_implementation, use_kernel_forward_from_hub
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeMLP
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging, torch_compilable_check
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_torch_distributed_available
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checkpoint_step3 import Step3Checkpoint
from .configuration_step3 import Step3TextConfig, Step3VisionEncoderConfig, Step3VLConfig, set_on_package
from .experts_step3 import LinearExperts, MappedExperts
from .generation_step3 import CACHE_NAME, Step3BoundedCache, Step3GenerationMixin, max_length_of, one_cache


if is_torch_distributed_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate

if TYPE_CHECKING:  # makes `custom_object_save` copy processing_step3.py
    from .processing_step3 import Step3VLProcessor  # noqa: F401


logger = logging.get_logger(__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers: for one row on a CPU, for a head on a GPU, and fused; and rewrites of a loaded model
# ---------------------------------------------------------------------------------------------------------------------


def is_on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def obstacle_of(layer: nn.Module, has_bias: bool = False) -> str | None:
    """
    Why a linear layer must be called rather than its weight used directly, or `None` if it need not be. `has_bias` says
    whether the caller expects a bias.
    """
    if type(layer) is not nn.Linear or (layer.bias is not None) != has_bias:
        return f"is a {type(layer).__name__}: it is quantised, or has been replaced"
    if type(layer.weight) is not nn.Parameter or layer.weight.device.type == "meta":
        return "has a weight that is split over ranks, quantised or offloaded"
    if layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_hf_hook"):
        return "has hooks, which would no longer be called"
    return None


def sum_products(weight: torch.Tensor, states: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
    """
    Multiplies `states` (rows, inputs) by a `weight` (outputs, inputs). With `experts` (rows,), multiplies each row by
    its expert's weight, from a `weight` (experts, outputs, inputs). Products are written as sums, which the compiler
    turns into kernels that read weights without copying them. Returns (rows, outputs), in float32 at least.

    On a CPU, four parts of the outputs are computed together, because it reads memory fastest in several streams. Each
    part processes up to 128 output rows at a time, so that an expert's weights stay in cache for all its rows of
    `states`. Sums of more than 4,096 numbers are split, because the compiler makes such sums half as fast.
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


def multiply(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """`nn.functional.linear`, except that a single row compiled for a CPU uses `sum_products`, which reads the weight
    twice as fast."""
    is_single = states.device.type == "cpu" and states.numel() == states.shape[-1]
    is_compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if not (is_single and is_compiled) or weight.dtype != states.dtype:
        return nn.functional.linear(states, weight)
    return sum_products(weight, states.flatten(0, -2)).to(states.dtype).view(*states.shape[:-1], -1)


def apply_linear(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """A linear layer's output for `states` (..., inputs). While compiling, uses `multiply` where possible."""
    if not torch.compiler.is_compiling() or obstacle_of(layer) is not None:
        return layer(states)
    return multiply(layer.weight, states)


def multiply_in_two(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """
    `nn.functional.linear` with a `weight` (outputs, inputs), in two products: a multiple of 64 outputs, and the rest.
    Rows of an odd number of outputs, as in the released vocabulary of 128815, are not aligned in memory, which makes
    cuBLAS up to six times as slow, also for gradients. The output is therefore a view of rows that are padded to a
    multiple of 64.
    """
    num_outputs, count = len(weight), len(weight) // 64 * 64
    first, rest = (nn.functional.linear(states, part) for part in weight.split([count, num_outputs - count]))
    return torch.cat([first, nn.functional.pad(rest, (0, -num_outputs % 64))], -1)[..., :num_outputs]


def apply_head(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Logits of a language-model head for `states` (..., inputs)."""
    if is_on_gpu(states) and obstacle_of(layer) is None and layer.out_features % 64:
        return multiply_in_two(layer.weight, states)
    return apply_linear(layer, states)


class Fusible(nn.Module):
    """
    Module with linear layers of the same input, named in `fusible`, which [`~Rewritable.fuse`] computes as one. Their
    weights, `parts`, are concatenated to `fused` (all outputs, inputs) and become views of it, so they can be read,
    saved, loaded and trained as before. Copies of a model are not fused.
    """

    fusible: tuple[str, ...] = ()
    fused: torch.Tensor | None = None
    parts: list[nn.Parameter] | None = None

    def project(self, states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        Outputs of the layers for `states` (..., inputs). Each is computed by itself if gradients are enabled, or if a
        layer was given other weights or must be called.
        """
        layers = [getattr(self, name) for name in self.fusible]
        if self.fused is not None and not torch.is_grad_enabled():
            sizes = [part.shape[0] for part in self.parts]
            is_fused = all(not obstacle_of(x) and x.weight is part for x, part in zip(layers, self.parts, strict=True))
            if is_fused and not torch.compiler.is_compiling():  # where tensors have no address
                views = self.fused.split(sizes)
                is_fused = all(part.data_ptr() == view.data_ptr() for part, view in zip(self.parts, views, strict=True))
            if is_fused:
                return multiply(self.fused, states).split(sizes, dim=-1)
        return tuple(apply_linear(layer, states) for layer in layers)

    def obstacle(self) -> str | None:
        """Why the layers cannot be fused, starting with the name of one, or `None` if they can."""
        layers = ((name, getattr(self, name)) for name in self.fusible)
        return next((f"`{name}` {why}" for name, layer in layers if (why := obstacle_of(layer))), None)

    @torch.no_grad()
    def fuse_layers(self) -> None:
        self.parts = [getattr(self, name).weight for name in self.fusible]
        self.fused = torch.cat(self.parts)
        for part, rows in zip(self.parts, self.fused.split([len(part) for part in self.parts]), strict=True):
            part.data = rows

    def unfuse_layers(self) -> None:
        for part in self.parts:
            part.data = part.data.clone()
        self.fused = self.parts = None

    def __getstate__(self) -> dict:  # for copies
        return {**self.__dict__, "fused": None, "parts": None}

    def _apply(self, fn, recurse=True):  # called by `to`, `half` and others
        super()._apply(fn, recurse)
        if self.fused is not None:
            self.fuse_layers()
        return self


@dataclass(frozen=True)
class Rewrite:
    """A faster way to compute modules of a loaded model. `register_rewrite` adds it to [`~Rewritable.fuse`]."""

    name: str
    match: Callable[[nn.Module], bool]  # whether it is meant for a module
    obstacle: Callable[[nn.Module], str | None]  # why a matching module cannot be rewritten, or `None`
    apply: Callable[[nn.Module], None]  # rewrites a module in place
    undo: Callable[[nn.Module], None]
    is_applied: Callable[[nn.Module], bool]
    benefit: float = 1.0  # rewrites with a higher one are applied first


REWRITES: dict[str, Rewrite] = {}


def register_rewrite(rewrite: Rewrite) -> None:
    """Adds a rewrite to those of every model, in place of an earlier one of that name."""
    REWRITES[rewrite.name] = rewrite


class Rewritable:
    """Mixin of the models: rewrites the modules of a loaded model."""

    def find_rewrites(self, names: Iterable[str] | None = None) -> list[tuple[Rewrite, str, nn.Module]]:
        """Each rewrite, or those named, with the name of each module it matches and the module; most benefit first."""
        rewrites = sorted((REWRITES[name] for name in names or REWRITES), key=lambda rewrite: -rewrite.benefit)
        return [(rewrite, name, x) for rewrite in rewrites for name, x in self.named_modules() if rewrite.match(x)]

    def fuse(self, *names: str) -> None:
        """
        Rewrites the loaded model in place, by the named rewrites or all, until nothing is left to rewrite. Outputs are
        equal up to rounding; parameters and saved checkpoints stay the same.

        Raises:
            `ValueError`: with the model unchanged, if a module is quantised, offloaded, split over ranks or has hooks.
            `KeyError`: if there is no rewrite of a name.
        """
        done = []
        while rest := [(r, name, x) for r, name, x in self.find_rewrites(names) if not r.is_applied(x)]:
            for rewrite, name, module in rest:
                if (obstacle := rewrite.obstacle(module)) is not None:
                    for earlier, rewritten in reversed(done):
                        earlier.undo(rewritten)
                    raise ValueError(f"`{rewrite.name}` cannot be applied to {name}: {obstacle}.")
                rewrite.apply(module)
                done.append((rewrite, module))

    def unfuse(self) -> None:
        """Undoes every rewrite, lowest benefit first."""
        for rewrite, _, module in reversed(self.find_rewrites()):
            if rewrite.is_applied(module):
                rewrite.undo(module)

    def fusion_report(self) -> list[dict[str, str | bool]]:
        """One row for each rewrite and module that it matches: `fusion`, `module`, `class` and `rewritten`."""
        return [
            {"fusion": r.name, "module": name, "class": type(x).__name__, "rewritten": r.is_applied(x)}
            for r, name, x in self.find_rewrites()
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Text decoder
# ---------------------------------------------------------------------------------------------------------------------


@use_kernel_forward_from_hub("RMSNorm")
class Step3TextRMSNorm(nn.Module):
    """RMS norm, computed in float32 at least and cast back before scaling."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * nn.functional.rms_norm(hidden_states, self.weight.shape, eps=self.variance_epsilon)


def _check_attention_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if (
        query.shape[0] != key.shape[0]
        or query.shape[1] % key.shape[1]
        or query.shape[3] != key.shape[3]
        or key.shape[:3] != value.shape[:3]
    ):
        raise ValueError(
            "Queries (batch, heads, queries, head_dim) do not go with keys and values (batch, key/value heads, keys, "
            f"head_dim): got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Computes attention of `query` (batch, heads, queries, head_dim) to `key` and `value` (batch, key/value heads, keys,
    head_dim), with an additive mask. Query heads that share a key/value head become rows of one matrix product, without
    copies of keys and values. The softmax is taken in float32 at least. Returns the output (batch, queries, heads,
    head_dim) and the probabilities (batch, heads, queries, keys). Raises a `ValueError` if shapes do not match.
    """
    _check_attention_shapes(query, key, value)
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_key_value_heads = key.shape[1]

    query = (query * scaling).reshape(batch_size, num_key_value_heads, -1, head_dim)
    attn_weights = torch.matmul(query, key.transpose(2, 3)).view(batch_size, num_heads, num_queries, -1)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask

    # torch computes in float32 at least, whatever the `dtype`; the backward pass also needs a float32 result.
    softmax_dtype = torch.promote_types(query.dtype, torch.float32) if torch.is_grad_enabled() else attn_weights.dtype
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=softmax_dtype).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights.view(batch_size, num_key_value_heads, -1, key.shape[2]), value)
    attn_output = attn_output.view(batch_size, num_heads, num_queries, head_dim).transpose(1, 2).contiguous()
    return attn_output, attn_weights


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    transformers' `apply_rotary_pos_emb` for `states` (batch, heads, tokens, head_dim) and `cos` and `sin` (batch,
    tokens, head_dim). It adds to the halves in place, which takes half the time but has no gradients.
    """
    (first, second), (sin, _) = (each.chunk(2, -1) for each in (states, sin[:, None]))
    output = states * cos[:, None]
    output_first, output_second = output.chunk(2, -1)
    output_first.addcmul_(second, sin, value=-1)
    output_second.addcmul_(first, sin)
    return output


def not_finite(*states: torch.Tensor) -> torch.Tensor:
    """
    A tensor (batch, 1, 1, 1) to add to the output of attention: 0, or NaN for a row of the batch in which any of the
    `states` (batch, heads, tokens, head_dim) is not finite. torch's CPU SDPA attends to nothing where scores are NaN,
    which would hide a broken weight.
    """
    dtype = torch.promote_types(states[0].dtype, torch.float32)
    total = sum(state.sum((1, 2, 3), keepdim=True, dtype=dtype) for state in states)
    return (total * 0).to(states[0].dtype)


def to_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of `dtype` for one that is true where tokens are attended to."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


# SDPA's kernels but cuDNN's. With a mask and an odd multiple of 64 keys, its gradients are NaN where a token sees no
# key, as padding (torch 2.11 on an H100), or has very small scores (https://github.com/pytorch/pytorch/issues/196678).
DIFFERENTIABLE_WITH_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def share_key_value_heads(attention_interface: Callable) -> Callable:
    """
    Wraps transformers' SDPA attention to share key/value heads. For a single query token, the query heads of a
    key/value head become its rows. For more tokens, keys and values are expanded, as a view if there is one head.
    On a GPU, a single query token uses eager attention instead, because cuDNN, SDPA's first choice, takes 70 ms to plan
    for each new number of keys, and SDPA's other kernels read long keys with few of the GPU's processors.
    """

    def shared_attention(module, query, key, value, attention_mask, **kwargs):
        _check_attention_shapes(query, key, value)
        batch_size, num_heads, num_queries, head_dim = query.shape
        num_key_value_heads = key.shape[1]
        if num_queries == 1 and is_on_gpu(query):
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                attention_mask = to_additive(attention_mask, query.dtype)
            attn_output, _ = eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
            return attn_output, None
        if num_queries == 1:
            if attention_mask is not None and attention_mask.shape[1] > 1:
                attention_mask = attention_mask.view(batch_size, num_key_value_heads, -1, key.shape[2])
            query = query.reshape(batch_size, num_key_value_heads, -1, head_dim)
            kwargs["is_causal"] = False  # continuous batching passes its own
            attn_output, _ = attention_interface(module, query, key, value, attention_mask, **kwargs)
            return attn_output.transpose(1, 2).reshape(batch_size, 1, num_heads, head_dim), None
        key, value = (repeat_kv(states, num_heads // num_key_value_heads) for states in (key, value))
        is_trained = query.requires_grad and attention_mask is not None and is_on_gpu(query)
        if is_trained and torch.backends.cuda.cudnn_sdp_enabled():
            with sdpa_kernel(DIFFERENTIABLE_WITH_MASK):
                return attention_interface(module, query, key, value, attention_mask, **kwargs)
        return attention_interface(module, query, key, value, attention_mask, **kwargs)

    return shared_attention


class Step3TextAttention(Fusible):
    """
    Multi-matrix factorization attention (https://arxiv.org/abs/2412.19255): `wq` expands low-rank queries to many wide
    heads, which share a single key/value head in the released model.
    """

    fusible = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: Step3TextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.share_q_dim, bias=False)
        self.inter_norm = Step3TextRMSNorm(config.share_q_dim, eps=config.rms_norm_eps)
        self.wq = nn.Linear(config.share_q_dim, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_attention_groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_attention_groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        low_rank_states, key_states, value_states = self.project(hidden_states)
        query_states = apply_linear(self.wq, self.inter_norm(low_rank_states)).view(hidden_shape).transpose(1, 2)
        key_states = key_states.view(hidden_shape).transpose(1, 2)
        value_states = value_states.view(hidden_shape).transpose(1, 2)
        cos, sin = position_embeddings
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        else:
            query_states, key_states = (rotate(states, cos, sin) for states in (query_states, key_states))

        is_sdpa_on_cpu = self.config._attn_implementation == "sdpa" and hidden_states.device.type == "cpu"
        broken = not_finite(query_states, key_states) if is_sdpa_on_cpu else None
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.config._attn_implementation == "sdpa":
            attention_interface = share_key_value_heads(attention_interface)
        elif self.config._attn_implementation == "flex_attention" and input_shape[1] > 1 and is_on_gpu(hidden_states):
            # Below 128 tokens, torch would take a kernel that has no room for the tokens of so many query heads.
            kwargs.setdefault("kernel_options", {"FORCE_USE_FLEX_ATTENTION": True})
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        attn_output = attn_output if broken is None else attn_output + broken
        return apply_linear(self.o_proj, attn_output.reshape(*input_shape, -1)), attn_weights


class Step3TextMLP(Fusible, Qwen3MoeMLP):
    """Gated MLP of a dense layer, or shared expert of an MoE layer, from the config and the width inside it."""

    fusible = ("gate_proj", "up_proj")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, up = self.project(hidden_states)
        return apply_linear(self.down_proj, self.act_fn(gate) * up)


for _name, _class in (("step3_qkv", Step3TextAttention), ("step3_gate_up", Step3TextMLP)):
    register_rewrite(
        Rewrite(
            _name,
            match=lambda module, fusible=_class: isinstance(module, fusible),
            obstacle=Fusible.obstacle,
            apply=Fusible.fuse_layers,
            undo=Fusible.unfuse_layers,
            is_applied=lambda module: module.fused is not None,
        )
    )


class Step3TextTopKRouter(nn.Module):
    """Routes each token to its `moe_top_k` most probable experts. The softmax over all is taken in float32 at least."""

    def __init__(self, config: Step3TextConfig):
        super().__init__()
        self.top_k = config.moe_top_k
        self.num_experts = config.moe_num_experts
        self.norm_expert_weight = config.norm_expert_weight
        self.weight = nn.Parameter(torch.empty(config.moe_num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps (tokens, hidden_size) to logits (tokens, experts), and weights and indices (tokens, top_k)."""
        router_logits = nn.functional.linear(hidden_states, self.weight)
        softmax_dtype = torch.promote_types(router_logits.dtype, torch.float32)
        router_probs = nn.functional.softmax(router_logits, dim=-1, dtype=softmax_dtype)
        top_k_weights, top_k_index = torch.topk(router_probs, self.top_k, dim=-1)
        if self.norm_expert_weight:
            top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


def _experts_fit_grouped_mm(config: Step3TextConfig, dtype: torch.dtype) -> bool:
    """Whether `torch.nn.functional.grouped_mm` takes the experts in `dtype`: no float64, and strides of 16 bytes."""
    sizes = (config.hidden_size, config.moe_intermediate_size)
    return dtype != torch.float64 and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def step3_experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The default experts implementation, `"step3"`. Uses `grouped_mm`, except in compiled steps with few tokens, to
    avoid gathering expert weights: one token or, on a CPU, up to two routed tokens per expert on average."""
    num_tokens, top_k = top_k_index.shape
    is_few = hidden_states.device.type == "cpu" and num_tokens * top_k <= 2 * self.num_experts
    if not torch.compiler.is_compiling() or (num_tokens > 1 and not is_few):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    # Under expert parallelism, an index beyond the experts stands for other ranks' experts, with a weight of 0.
    experts, order = top_k_index.clamp(max=self.num_experts - 1).flatten().sort()
    gate_up = sum_products(self.gate_up_proj, hidden_states[order // top_k], experts).type_as(hidden_states)
    states = self._apply_gate(gate_up)
    if is_on_gpu(states):
        # The compiler computes what `as_strided` takes beforehand; it would compute activations again for each output.
        states = states.as_strided(states.shape, states.stride())
    output = sum_products(self.down_proj, states, experts)[order.argsort()]
    return (output.view(num_tokens, top_k, -1) * top_k_weights.unsqueeze(-1)).sum(1).type_as(hidden_states)


ALL_EXPERTS_FUNCTIONS.register("step3", step3_experts_forward)
ALL_FP8_EXPERTS_FUNCTIONS.register("step3", ALL_FP8_EXPERTS_FUNCTIONS["grouped_mm"])


@use_experts_implementation  # again, as transformers searches the source of this module for it
class Step3TextExperts(Qwen3MoeExperts):
    """Routed experts: gated MLPs with stacked weights, and with gate and up projections in one weight."""

    def __init__(self, config: Step3TextConfig):
        super().__init__(config)
        # Registered before the hooks of expert parallelism, which renumber the experts.
        self.register_forward_pre_hook(partial(Step3TextExperts.check_indices, num_experts=self.num_experts))

    def check_indices(self, inputs: tuple[torch.Tensor, ...], num_experts: int) -> None:
        """Checks that expert indices are in range. A single token's are not checked; they come from the router."""
        if len(inputs) > 1 and inputs[1].shape[0] > 1:
            message = f"Indices of experts must lie between 0 and {num_experts - 1}"
            check_values((inputs[1] >= 0) & (inputs[1] < num_experts), message)


class Step3TextMoE(nn.Module):
    """Router and routed experts of an MoE layer."""

    def __init__(self, config: Step3TextConfig):
        super().__init__()
        self.config = config
        self.gate = Step3TextTopKRouter(config)
        if config._experts_implementation == "linear":
            self.experts = LinearExperts(config, Step3TextMLP)
        elif config._experts_implementation == "mapped":
            self.experts = MappedExperts(config)
        else:
            self.experts = Step3TextExperts(config)

    def forward(self, hidden_states: torch.Tensor, compute_shared: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Adds the routed experts' output for `hidden_states` (..., hidden_size) and that of the shared expert."""
        config, implementation, dtype = self.config, self.config._experts_implementation, hidden_states.dtype
        if implementation in ("step3", "grouped_mm") and not _experts_fit_grouped_mm(config, dtype):
            raise ValueError(
                f"`{implementation}` needs rows of a multiple of 16 bytes and no float64, got {dtype} with "
                f"`hidden_size` {config.hidden_size} and `moe_intermediate_size` {config.moe_intermediate_size}: "
                'choose another one with `model.set_experts_implementation("eager")`.'
            )
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(tokens)
        has_hooks = self.experts._forward_hooks or self.experts._forward_pre_hooks
        if isinstance(self.experts, MappedExperts) and not has_hooks:
            compute_routed = self.experts.begin(tokens, top_k_index, top_k_weights)
            shared = compute_shared()  # a GPU does this while the CPU computes the routed experts
            return compute_routed().view(hidden_states.shape) + shared
        routed = self.experts(tokens, top_k_index, top_k_weights).view(hidden_states.shape)
        return routed + compute_shared()


class Step3TextDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer: attention, then a dense MLP or, in an MoE layer, routed experts plus a shared expert."""

    def __init__(self, config: Step3TextConfig, layer_idx: int):
        super().__init__()
        self.is_moe = layer_idx in config.moe_layers
        self.input_layernorm = Step3TextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Step3TextAttention(config, layer_idx)
        self.post_attention_layernorm = Step3TextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.is_moe:
            self.moe = Step3TextMoE(config)
            self.share_expert = Step3TextMLP(config, config.share_expert_dim)
        else:
            self.mlp = Step3TextMLP(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        cache = one_cache(cache, past_key_values)
        residual = hidden_states
        hidden_states, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            cache=cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        if self.is_moe:
            hidden_states = self.moe(hidden_states, partial(self.share_expert, hidden_states))
        else:
            hidden_states = self.mlp(hidden_states)
        return residual + hidden_states


class Step3VLPreTrainedModel(Rewritable, Step3Checkpoint, PreTrainedModel):
    """Base class of the Step3 models: weight initialisation and supported features."""

    config: Step3VLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Step3VisionEmbeddings", "Step3VisionEncoderLayer", "Step3TextDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = getattr(self.config, "initializer_range", None) or self.config.get_text_config().initializer_range
        if isinstance(module, (Step3TextExperts, Step3TextTopKRouter, Step3VisionEmbeddings)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        implementation = super().get_correct_experts_implementation(requested_experts)
        text_config = self.config.get_text_config()
        if requested_experts is not None or text_config.model_type != Step3TextConfig.model_type:
            return implementation
        # The dtype the model is created in, and the narrower one it may be cast to.
        dtypes = (torch.get_default_dtype(), torch.bfloat16)
        fits = all(_experts_fit_grouped_mm(text_config, dtype) for dtype in dtypes)
        return "step3" if fits and implementation == "grouped_mm" else "eager"


class Step3TextModel(Step3VLPreTrainedModel):
    """The text decoder without a language-model head."""

    config: Step3TextConfig
    input_modalities = ("text",)
    # A whole model's directory contains these besides the decoder's weights.
    keys_of_other_parts = (r"^(model\.)?vision_model\.", r"^(model\.)?vit_", r"^lm_head\.")
    _can_record_outputs = {
        "hidden_states": Step3TextDecoderLayer,
        "attentions": Step3TextAttention,
        "router_logits": OutputRecorder(Step3TextTopKRouter, index=0),
    }

    def __init__(self, config: Step3TextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Step3TextDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = Step3TextRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def mask_one_token(self, attention_mask: torch.Tensor, dtype: torch.dtype, cache: Cache | None) -> torch.Tensor:
        """Makes the mask of a decoding step, (batch, 1, 1, keys), from an `attention_mask` (batch, tokens).
        transformers' own masks wait for the device to learn whether there is padding; this does not."""
        mask = attention_mask.bool()
        if isinstance(cache, Step3BoundedCache):
            mask = mask[:, cache.layers[0].num_dropped :]
        elif (room := max_length_of(cache)) > 0:  # a static cache, whose keys extend beyond these tokens
            mask = nn.functional.pad(mask, (0, room - mask.shape[1]))
            mask = mask & (torch.arange(room, device=mask.device) <= cache.get_seq_length())
        mask = mask[:, None, None]
        is_additive = self.config._attn_implementation == "eager" or is_on_gpu(mask)
        return to_additive(mask, dtype) if is_additive else mask

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, tokens)`): Token ids; alternatively, give `inputs_embeds`.
            attention_mask (`torch.Tensor`, *optional*):
                `(batch, cached + new tokens)` with 0 at padding, a 4-D mask, or a dictionary with `"full_attention"`.
            position_ids (`torch.LongTensor` of shape `(batch, tokens)`, *optional*): Positions of the tokens.
            cache (`Cache`, *optional*): Keys and values of earlier tokens; updated in place.
            inputs_embeds (`torch.Tensor` of shape `(batch, tokens, hidden_size)`): Embeddings instead of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return a cache.

        Raises a `ValueError` if the arguments do not match each other or the config.
        """
        cache = one_cache(cache, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        check_inputs(self.config, inputs_embeds, attention_mask, position_ids, cache)
        if isinstance(cache, Step3BoundedCache):
            cache.make_room(inputs_embeds.shape[1])

        if position_ids is None:
            past_seen_tokens = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_seen_tokens
            position_ids = position_ids.unsqueeze(0)

        if isinstance(attention_mask, dict):
            causal_mask = attention_mask["full_attention"]
        elif (
            inputs_embeds.shape[1] == 1
            and isinstance(attention_mask, torch.Tensor)
            and attention_mask.ndim == 2
            and self.config._attn_implementation in ("eager", "sdpa")
        ):
            causal_mask = self.mask_one_token(attention_mask, inputs_embeds.dtype, cache)
        else:
            # It detects packed rows from their positions only if it gets no cache.
            is_empty = isinstance(cache, Cache) and not cache.is_compileable and cache.get_seq_length() == 0
            causal_mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: None if is_empty else cache},
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})


# ---------------------------------------------------------------------------------------------------------------------
# Vision encoder
# ---------------------------------------------------------------------------------------------------------------------


class Step3VisionEmbeddings(nn.Module):
    """Class rows followed by patch embeddings, both with learned position embeddings."""

    # The original training run repeated the class row so that tensor parallelism divides the sequence.
    num_class_rows = 4

    def __init__(self, config: Step3VisionEncoderConfig):
        super().__init__()
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.grid_size**2 + 1, config.hidden_size)

    def resize_positions(self, positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Resizes position embeddings (rows, hidden_size) of the trained grid to a grid of `height` × `width`."""
        if (height, width) == (self.grid_size, self.grid_size):
            return positions
        dtype = torch.promote_types(positions.dtype, torch.float32)
        grid = positions.to(dtype).view(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(
            grid, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )
        return grid.flatten(2).transpose(1, 2)[0].to(positions.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        # Call the module, because its weight may be offloaded until then.
        positions = self.position_embedding(torch.arange(self.grid_size**2 + 1, device=patches.device))
        patches = patches.flatten(2).transpose(1, 2) + self.resize_positions(positions[1:], height, width)
        class_row = self.class_embedding + positions[:1]
        class_rows = class_row.expand(patches.shape[0], self.num_class_rows, -1)
        return torch.cat([class_rows, patches], dim=1)


class Step3VisionAttention(nn.Module):
    """Bidirectional multi-head attention with one projection for queries, keys and values."""

    def __init__(self, config: Step3VisionEncoderConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        qkv_states = self.qkv_proj(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        query_states, key_states, value_states = (states.transpose(1, 2) for states in qkv_states.unbind(2))

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            **kwargs,
        )
        if self.config._attn_implementation == "sdpa" and hidden_states.device.type == "cpu":
            attn_output = attn_output + not_finite(query_states, key_states)
        return self.out_proj(attn_output.reshape(*input_shape, -1)), attn_weights


class Step3VisionMLP(CLIPMLP):
    """
    MLP of an encoder layer. QuickGELU, x * sigmoid(1.702 x), equals silu(1.702 x) / 1.702. The two matrix products
    multiply by these factors, which leaves one pass over the wide states instead of three.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = self.fc1, self.fc2
        is_quick = isinstance(self.activation_fn, QuickGELUActivation)
        if not is_quick or obstacle_of(fc1, has_bias=True) or obstacle_of(fc2, has_bias=True):
            return super().forward(hidden_states)
        states = torch.addmm(1.702 * fc1.bias, hidden_states.flatten(0, -2), fc1.weight.T, alpha=1.702)
        states = torch.addmm(fc2.bias, nn.functional.silu(states), fc2.weight.T, alpha=1 / 1.702)
        return states.view(hidden_states.shape)


class Step3VisionEncoderLayer(GradientCheckpointingLayer):
    """Encoder layer that normalises the output of each branch instead of its input."""

    def __init__(self, config: Step3VisionEncoderConfig):
        super().__init__()
        self.self_attn = Step3VisionAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Step3VisionMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states, **kwargs)
        hidden_states = hidden_states + self.layer_norm1(attn_output)
        return hidden_states + self.layer_norm2(self.mlp(hidden_states))


class Step3VisionTransformer(nn.Module):
    def __init__(self, config: Step3VisionEncoderConfig):
        super().__init__()
        self.layers = nn.ModuleList([Step3VisionEncoderLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class Step3VisionModel(Step3VLPreTrainedModel):
    """Vision encoder. Returns one row per patch, without a final norm."""

    config: Step3VisionEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {"hidden_states": Step3VisionEncoderLayer, "attentions": Step3VisionAttention}

    def __init__(self, config: Step3VisionEncoderConfig):
        super().__init__(config)
        self.embeddings = Step3VisionEmbeddings(config)
        self.transformer = Step3VisionTransformer(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, num_channels, side, side)`):
                Normalised square images whose side is a multiple of `patch_size`.

        Returns:
            `last_hidden_state` of shape `(images, (side / patch_size)², hidden_size)`, with patches row by row.
            Recorded hidden states and attentions also include the four class rows at the front.
        """
        check_pictures(self.config, pixel_values)
        hidden_states = self.transformer(self.embeddings(pixel_values), **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states[:, self.embeddings.num_class_rows :])


# ---------------------------------------------------------------------------------------------------------------------
# Vision and text together
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class WithPictures(ModelOutput):
    """
    Base of the outputs with images. `to_tuple` also converts the encoder's output to a tuple.

    Args:
        image_hidden_states (`torch.Tensor` of shape `(rows, hidden_size)`, *optional*):
            Features of all images, concatenated, which replaced the embeddings of the image tokens.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            Output of [`~Step3VLModel.get_image_features`] for the images; `None` while compiling.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in super().to_tuple())


@dataclass
class Step3VLModelOutputWithPast(WithPictures, MoeModelOutputWithPast):
    pass


@dataclass
class Step3VLCausalLMOutputWithPast(WithPictures, MoeCausalLMOutputWithPast):
    pass


class Step3VLModel(Step3VLPreTrainedModel):
    """Vision encoder, projector to image features, and text decoder, without a language-model head."""

    keys_of_other_parts = (r"^lm_head\.",)
    # Maximum output of an encoder MLP, in bytes: on a CPU, so that it stays in cache; on a GPU, to limit memory (50
    # patches of the released size in bfloat16).
    max_encoder_bytes = {"cpu": 2**24, "cuda": 2**31}

    def __init__(self, config: Step3VLConfig):
        super().__init__(config)
        vision_config, text_config = config.vision_config, config.text_config
        self.vision_model = Step3VisionModel(vision_config)
        channels = vision_config.output_hidden_size
        self.vit_downsampler = nn.Conv2d(
            vision_config.hidden_size, channels, kernel_size=2, stride=config.understand_projector_stride
        )
        self.vit_downsampler2 = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1)
        self.vit_large_projector = nn.Linear(2 * channels, text_config.hidden_size, bias=config.projector_bias)
        self.language_model = Step3TextModel(text_config)
        self.post_init()

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Downsamples encoder rows (images, grid², channels) to image features (images, image tokens, hidden_size)."""
        grid_size = math.isqrt(hidden_states.shape[1])
        feature_map = hidden_states.transpose(1, 2).unflatten(2, (grid_size, grid_size))
        feature_map = self.vit_downsampler2(self.vit_downsampler(feature_map))
        return self.vit_large_projector(feature_map.flatten(2).transpose(1, 2))

    def encode(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """The encoder's output for images of one size, encoded as many at a time as `max_encoder_bytes` allows, or all
        in an exported program. Their features are its `pooler_output` (images, image tokens, hidden_size). Without
        images, the encoder runs all the same, as processes that split its weights need."""
        vision_config, num_images = self.config.vision_config, pixel_values.shape[0]
        check_pictures(vision_config, pixel_values)
        if num_images == 0:
            pixel_values = pixel_values.new_zeros(1, *pixel_values.shape[1:])
        num_rows = (pixel_values.shape[-1] // vision_config.patch_size) ** 2
        num_bytes = num_rows * vision_config.intermediate_size * self.vision_model.dtype.itemsize
        max_bytes = self.max_encoder_bytes.get(pixel_values.device.type, self.max_encoder_bytes["cuda"])
        is_exported = torch.compiler.is_exporting()  # as a program that does not know the number of images
        parts = (pixel_values,) if is_exported else pixel_values.split(max(max_bytes // num_bytes, 1))
        outputs = [self.vision_model(part, **{**kwargs, "return_dict": True}) for part in parts]

        def merge(values: list):
            if len(values) == 1:
                return values[0]
            is_tensor = isinstance(values[0], torch.Tensor)
            return torch.cat(values) if is_tensor else tuple(map(torch.cat, zip(*values, strict=True)))

        output = BaseModelOutputWithPooling(**{name: merge([x[name] for x in outputs]) for name in outputs[0]})
        output.pooler_output = self.project(output.last_hidden_state)[:num_images]
        return output

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.LongTensor | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Computes the features that replace the embeddings of image tokens.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, side, side)`): Global views of the images.
            patch_pixel_values (`torch.Tensor` of shape `(patches, channels, patch side, patch side)`, *optional*):
                Patches of all images, concatenated in image order.
            num_patches (`torch.LongTensor` of shape `(images,)`, *optional*): Number of patches of each image.

        Returns:
            `pooler_output`, a tuple with each image's features `(rows, hidden_size)`, patches first, or, while
            compiling, with those of all images as one. The rest is the encoder's output for the global views.

        Raises:
            `ValueError`: if an image's shape does not fit, or `num_patches` does not match the images and patches.
        """
        output = self.encode(pixel_values, **kwargs)
        num_images, num_tokens, _ = output.pooler_output.shape
        patches_given = 0 if patch_pixel_values is None else patch_pixel_values.shape[0]
        num_patches = [0] * num_images if num_patches is None else num_patches
        num_patches = torch.as_tensor(num_patches, device=output.pooler_output.device)
        torch_compilable_check(
            (num_patches.sum() == patches_given) & (num_patches >= 0).all() & (num_patches.shape == (num_images,)),
            lambda: (
                f"`num_patches` must have an entry for each of the {num_images} pictures of `pixel_values`, and they "
                f"must add up to the {patches_given} patches of `patch_pixel_values`, got {num_patches.tolist()}."
            ),
        )
        features, rows = output.pooler_output.flatten(0, 1), num_tokens
        if patch_pixel_values is not None:
            patch_features = self.encode(patch_pixel_values).pooler_output
            # Each picture's patches precede its global view. Every feature's row is computed on the device, for any
            # counts, and with operations that ONNX has.
            num_patch_tokens = patch_features.shape[1]
            patches, images = (torch.arange(n, device=num_patches.device) for n in (patches_given, num_images))
            patches_until = num_patches.cumsum(0)
            image_of_patch = (patches[:, None] >= patches_until).sum(1)
            first_rows = (
                (patches * num_patch_tokens + image_of_patch * num_tokens, num_patch_tokens),
                (patches_until * num_patch_tokens + images * num_tokens, num_tokens),
            )
            places = [(first[:, None] + torch.arange(n, device=first.device)).flatten() for first, n in first_rows]
            features = torch.cat([patch_features.flatten(0, 1), features])[torch.cat(places).argsort()]
            rows = num_patches * num_patch_tokens + num_tokens
        if torch.compiler.is_compiling() or num_images == 0:  # the number of rows per picture is unknown
            output.pooler_output = (features,)
        else:
            output.pooler_output = features.split(rows if isinstance(rows, int) else rows.tolist())
        return output

    def collect_features(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.LongTensor | list[int] | None = None,
        image_embeds: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, BaseModelOutputWithPooling | None]:
        """Features (rows, hidden_size) of all images, and `get_image_features`' output for them; `None` without images.
        Raises a `ValueError` if images come in several forms or do not fit."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(source is not None for source in (pixel_values, image_embeds, encoded)) > 1:
            raise ValueError(
                "Give pictures as `pixel_values`, `image_embeds` or `mm_encoder_outputs`, only one of them."
            )
        if pixel_values is None and patch_pixel_values is not None:
            raise ValueError("`patch_pixel_values` belong to `pixel_values`: pass these, too.")
        if mm_encoder_outputs and encoded is None:
            raise ValueError(f"`mm_encoder_outputs` must hold `image`, got {sorted(mm_encoder_outputs)}.")
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, patch_pixel_values, num_patches, return_dict=True, **kwargs)
        features = image_embeds if encoded is None else encoded.pooler_output
        if features is None or len(features) == 0:
            return None, None
        parts = [features] if isinstance(features, torch.Tensor) else features
        width = self.config.text_config.hidden_size
        if shapes := [tuple(part.shape) for part in parts if part.ndim < 2 or part.shape[-1] != width]:
            raise ValueError(f"`image_embeds` must have the shape (..., rows, {width}), got {shapes[0]}.")
        return torch.cat([part.flatten(0, -2) for part in parts]), encoded

    def get_image_token_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.BoolTensor:
        """Mask of image tokens, `(batch, tokens)`. Without `input_ids`, compares embeddings with the token's."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.full((), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    def warn_of_image_tokens(self, input_ids: torch.LongTensor, cache: Cache | None = None) -> None:
        """Warns once if a text without images has image tokens, which then keep their own embeddings."""
        if torch.compiler.is_compiling() or type(input_ids) is not torch.Tensor or input_ids.device.type == "meta":
            return
        # After cached tokens, an image token may be one that the model generated.
        is_first = cache is None or (isinstance(cache, Cache) and int(cache.get_seq_length()) == 0)
        if is_first and (input_ids == self.config.image_token_id).any():
            logger.warning_once("The text has image tokens, but no pictures are given: their own embeddings are used.")

    def insert_features(
        self, inputs_embeds: torch.Tensor, image_token_mask: torch.BoolTensor, features: torch.Tensor
    ) -> torch.Tensor:
        """Replaces embeddings (batch, tokens, hidden_size) by `features` (rows, hidden_size) where `image_token_mask`
        (batch, tokens) is true. Raises a `ValueError` if the number of rows differs."""
        count, rows, token = image_token_mask.sum(), features.shape[0], self.config.image_token_id
        message = f"image tokens (`image_token_id` {token}), but the pictures give {rows} image features."
        torch_compilable_check(count == rows, lambda: f"The text has {int(count)} {message}")
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(image_token_mask.unsqueeze(-1).to(inputs_embeds.device), features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.LongTensor | None = None,
        image_embeds: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Step3VLModelOutputWithPast:
        """
        Args:
            pixel_values, patch_pixel_values, num_patches: Images, as in [`~Step3VLModel.get_image_features`].
            image_embeds (`torch.Tensor` of shape `(..., rows, hidden_size)` or a tuple of such, *optional*):
                Features of all images, in order, instead of `pixel_values`.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                Output of [`~Step3VLModel.get_image_features`], under `"image"`, instead of `pixel_values`.

        The rest is as in [`Step3TextModel`]. Raises a `ValueError` if images come in several forms or do not fit.
        """
        cache = one_cache(cache, past_key_values, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        recorded = {name: kwargs[name] for name in ("output_attentions", "output_hidden_states") if name in kwargs}
        image_features, encoded = self.collect_features(
            pixel_values, patch_pixel_values, num_patches, image_embeds, mm_encoder_outputs, **recorded
        )
        if image_features is not None:
            image_token_mask = self.get_image_token_mask(input_ids, inputs_embeds)
            inputs_embeds = self.insert_features(inputs_embeds, image_token_mask, image_features)
        elif input_ids is not None and input_ids.shape[1] > 1:
            self.warn_of_image_tokens(input_ids, cache)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        encoded = None if torch.compiler.is_compiling() else encoded
        return Step3VLModelOutputWithPast(**outputs, image_hidden_states=image_features, image_outputs=encoded)


# ---------------------------------------------------------------------------------------------------------------------
# Language-model heads
# ---------------------------------------------------------------------------------------------------------------------


class Step3LanguageModelHead:
    """Mixin of [`Step3TextForCausalLM`] and [`Step3VLForConditionalGeneration`]: computes logits and losses."""

    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def post_init(self):
        super().post_init()
        # transformers before 5.21 gathers logits only if the ranks divide the vocabulary, of 128815 in the release. An
        # untied head is then replicated; a tied one is split with the embedding.
        if "validate_param" in vars(ColwiseParallel) and not self.config.tie_word_embeddings:
            self._tp_plan.pop("lm_head", None)

    def head_outputs(
        self,
        outputs: MoeModelOutputWithPast,
        labels: torch.LongTensor | None,
        logits_to_keep: int | torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> dict:
        """Computes the logits at `logits_to_keep` and the losses, and adds the fields of the decoder's `outputs`."""
        text_config = self.config.get_text_config()
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            if logits_to_keep.ndim < 2:
                logits_to_keep = slice(None), logits_to_keep
            elif logits_to_keep.dtype != torch.bool:
                rows = torch.arange(len(logits_to_keep), device=logits_to_keep.device)
                logits_to_keep = rows[:, None], logits_to_keep
            hidden_states = hidden_states[logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = apply_head(self.lm_head, hidden_states)

        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:-1]:
                shapes = tuple(logits.shape[:-1]), tuple(labels.shape)
                raise ValueError("`labels` must have the shape {} of the logits, got {}.".format(*shapes))
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)

        aux_loss = None
        if outputs.router_logits:
            token_mask = None
            if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
                token_mask = attention_mask[:, -outputs.last_hidden_state.shape[1] :]  # without the cached tokens
            aux_loss = load_balancing_loss_func(
                outputs.router_logits, text_config.moe_num_experts, text_config.moe_top_k, token_mask
            )
            has_gradient = any(logits.requires_grad for logits in outputs.router_logits)
            if text_config.router_aux_loss_coef and outputs.last_hidden_state.requires_grad and not has_gradient:
                raise ValueError(
                    "The load-balancing loss has no gradient: turn checkpointing on with "
                    '`{"use_reentrant": False}`, or set `router_aux_loss_coef` to 0 if no router is trained.'
                )
            if loss is not None:
                loss = loss + text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return {
            "loss": loss,
            "aux_loss": aux_loss,
            "logits": logits,
            CACHE_NAME: getattr(outputs, CACHE_NAME),
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
            "router_logits": outputs.router_logits,
        }


class Step3TextForCausalLM(Step3LanguageModelHead, Step3VLPreTrainedModel, Step3GenerationMixin):
    """Text decoder with a language-model head, for text-only checkpoints or the text part of a whole one."""

    config: Step3TextConfig
    input_modalities = ("text",)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    keys_of_other_parts = (r"^(model\.)?vision_model\.", r"^(model\.)?vit_")

    def __init__(self, config: Step3TextConfig):
        super().__init__(config)
        self.model = Step3TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeCausalLMOutputWithPast:
        """
        Args:
            labels (`torch.LongTensor` of shape `(batch, tokens)`, *optional*):
                Target token ids, which are shifted inside the model; -100 is ignored in the loss.
            output_router_logits (`bool`, *optional*):
                Whether to return router logits and the load-balancing loss, and add the latter to the loss.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0):
                Number of last positions to compute logits for (0 for all), or a tensor that selects positions: indices
                of shape `(tokens kept,)`, the same for all rows, or `(batch, tokens kept)`, or a mask.

        The other arguments are those of [`Step3TextModel`].
        """
        cache = one_cache(cache, past_key_values, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            return_dict=True,
            **kwargs,
        )
        return MoeCausalLMOutputWithPast(**self.head_outputs(outputs, labels, logits_to_keep, attention_mask, **kwargs))


class Step3VLForConditionalGeneration(Step3LanguageModelHead, Step3VLPreTrainedModel, Step3GenerationMixin):
    """The whole model: generates text from text and images. [`Step3VLProcessor`] makes its inputs."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: Step3VLConfig):
        super().__init__(config)
        self.model = Step3VLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """See [`~Step3VLModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_pixel_values: torch.Tensor | None = None,
        num_patches: torch.LongTensor | None = None,
        image_embeds: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Step3VLCausalLMOutputWithPast:
        """Takes the arguments of [`Step3VLModel`] and [`Step3TextForCausalLM`]."""
        cache = one_cache(cache, past_key_values, kwargs)
        if output_router_logits is None:
            output_router_logits = self.config.text_config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            patch_pixel_values=patch_pixel_values,
            num_patches=num_patches,
            image_embeds=image_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        return Step3VLCausalLMOutputWithPast(
            **self.head_outputs(outputs, labels, logits_to_keep, attention_mask, **kwargs),
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Checks of inputs that would give wrong outputs, or fail in torch only after the cache was modified
# ---------------------------------------------------------------------------------------------------------------------


def check_values(condition: torch.Tensor, message: str, got: Callable[[], str] | None = None) -> None:
    """
    Checks that all of `condition` holds. With `got`, which describes the values, waits for the device and raises a
    `ValueError`. Without it, does not wait: failure is a `RuntimeError` on a CPU, a device-side assertion on a GPU.
    """
    if condition.device.type == "meta":
        return
    if got is None:
        torch._assert_async(condition.all(), f"{message}.")
    elif type(condition) is torch.Tensor:  # a fake tensor has no values
        torch_compilable_check(condition.all(), lambda: f"{message}, got {got()}.")


def check_inputs(
    config: Step3TextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | BlockMask | None,
    position_ids: torch.LongTensor | None,
    cache: Cache | None,
) -> None:
    """
    Raises a `ValueError`, before the cache changes, if the arguments' shapes do not match each other or the model, or
    tokens exceed the cache or the positions. For a single token, values are checked without waiting.
    """
    batch_size, num_new, _ = inputs_embeds.shape
    cached, limits, is_static = 0, [], False
    if isinstance(cache, Cache):  # not continuous batching's, which has no rows or length
        cached, is_static = cache.get_seq_length(), cache.is_compileable
        limits.append((max_length_of(cache), "tokens of the cache"))
        if not torch.compiler.is_compiling():  # comparing lengths would recompile for each one
            check_cache(config, cache, batch_size)
    if position_ids is None and config.longest_sequence is not None:
        limits.append((config.longest_sequence, "positions of the model"))
    total = cached + num_new
    for limit, owner in limits:
        if limit < 0:  # unlimited
            continue
        if isinstance(total, torch.Tensor) and (num_new == 1 or torch.compiler.is_compiling()):
            # The limit in the message would cause a recompilation for each length.
            check_values(total <= limit, f"There is no room for another token: all {owner} are taken")
        elif total > limit:
            raise ValueError(f"{int(cached)} cached and {num_new} new tokens are more than the {limit} {owner}.")

    if position_ids is not None:  # positions are limited, not tokens, because rows may be packed
        shape = tuple(position_ids.shape)
        if shape not in ((1, num_new), (batch_size, num_new)):
            raise ValueError(f"`position_ids` must have the tokens' shape, ({batch_size}, {num_new}), got {shape}.")
        limit = config.longest_sequence or torch.iinfo(torch.int32).max
        got = None if num_new == 1 else lambda: f"{int(position_ids.min())} to {int(position_ids.max())}"
        is_within = (position_ids >= 0) & (position_ids < limit)
        check_values(is_within, f"`position_ids` must lie between 0 and {limit - 1}", got)

    mask = attention_mask
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise ValueError(f"A dictionary of attention masks must hold `full_attention`, got {sorted(mask)}.")
        mask = mask["full_attention"]
    if not isinstance(mask, torch.Tensor):
        return
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        fits = shape[0] == batch_size and (shape[1] >= num_new if is_static else shape[1] == total)
    else:
        fits = mask.ndim == 4 and shape[0] in (1, batch_size) and shape[2] == num_new
    if not fits:
        raise ValueError(
            "`attention_mask` must have the shape (batch, cached and new tokens) or (batch, heads, new tokens, keys) "
            f"for {cached} cached and ({batch_size}, {num_new}) new tokens, got {shape}."
        )


def check_cache(config: Step3TextConfig, cache: Cache, batch_size: int) -> None:
    """Raises a `ValueError` if the cache holds keys of another model or batch size, before some layers are written."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    shapes = {(each.shape[0], each.shape[3]) for each in keys if isinstance(each, torch.Tensor) and each.ndim == 4}
    num_filled = sum(isinstance(each, torch.Tensor) and each.ndim == 4 for each in keys)
    expected = (batch_size, config.head_dim)
    if shapes - {expected} or num_filled not in (0, config.num_hidden_layers):
        raise ValueError(
            f"`cache` must have {config.num_hidden_layers} layers of keys with (batch, head_dim) {expected}, got "
            f"{num_filled} with {sorted(shapes)}."
        )


def check_pictures(config: Step3VisionEncoderConfig, pixel_values: torch.Tensor) -> None:
    """Raises a `ValueError` unless the images (images, num_channels, side, side) split into whole patches."""
    shape = tuple(pixel_values.shape)
    is_square = len(shape) == 4 and shape[1] == config.num_channels and shape[2] == shape[3]
    if not is_square or shape[3] % config.patch_size or shape[3] == 0:
        raise ValueError(
            f"Pictures must have the shape (images, {config.num_channels}, side, side), with a side that is a multiple "
            f"of {config.patch_size} pixels, got {shape}."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Parallelism
# ---------------------------------------------------------------------------------------------------------------------


class ReplicatedKeyValueHeadParallel(TensorParallelLayer):
    """Tensor-parallel style of the projection to the single key/value head. Each rank holds it whole and attends to it
    with its own query heads only, so gradients are summed over the ranks."""

    def transform_output_post_forward(self, module, output, mesh):
        if not output.requires_grad:
            return output
        return DTensor.from_local(output, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


class SplitExpertsParallel(MoeExpertsParallel):
    """Tensor-parallel style of the experts. Each rank holds some whole experts and runs them on all tokens, and the
    outputs are summed. Use with `grouped_gemm` for the weights."""

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh, **options):
        inputs, kwargs = super().transform_inputs_pre_forward(module, args, kwargs, mesh, **options)
        hidden_states, top_k_index, top_k_weights = inputs
        top_k_index = top_k_index - mesh.get_local_rank() * module.num_experts
        elsewhere = (top_k_index < 0) | (top_k_index >= module.num_experts)
        top_k_index = top_k_index.masked_fill(elsewhere, module.num_experts)
        return (hidden_states, top_k_index, top_k_weights.masked_fill(elsewhere, 0.0)), kwargs


ALL_PARALLEL_STYLES.register("replicated_key_value_head", ReplicatedKeyValueHeadParallel())
ALL_PARALLEL_STYLES.register("split_experts", SplitExpertsParallel())


for _model_class in (Step3VisionModel, Step3TextModel, Step3VLModel):
    _model_class.register_for_auto_class("AutoModel")
Step3TextForCausalLM.register_for_auto_class("AutoModelForCausalLM")
Step3VLForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
set_on_package(__name__)
