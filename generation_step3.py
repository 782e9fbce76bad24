"""Generation with Step3-VL: caches, prompts with images, and length limits."""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import inspect
import warnings
from copy import deepcopy

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerationMixin, LogitsProcessor, LogitsProcessorList
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_step3 import Step3TextConfig, Step3VLConfig


logger = logging.get_logger(__name__)

# The name of the cache in `generate`, masks and outputs: `cache` since transformers 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None, others: dict | None = None) -> Cache | None:
    """
    Returns the cache, given as `cache` or by its older name `past_key_values`. Raises a `ValueError` if both are given,
    and a `TypeError` if `others`, which the model would ignore, contain a cache under a third name.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("Give a cache as `cache` or by its older name `past_key_values`, not as both.")
    for name, value in (others or {}).items():
        if isinstance(value, Cache):
            raise TypeError(f"`{name}` is a cache under a name that this model does not know; pass it as `cache`.")
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated; pass the cache as `cache`.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


class BoundedLayer(DynamicLayer):
    """Cache layer that can drop its oldest tokens. Dropped tokens still count as positions."""

    num_dropped = 0

    @property
    def num_held(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.num_dropped + self.num_held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_held + query_length, self.num_dropped

    def crop(self, tokens_to_remove: int) -> None:
        """As in a dynamic layer. Raises a `ValueError` if this would have to remove dropped tokens."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else self.get_seq_length() - tokens_to_remove
        if count > self.num_held:
            raise ValueError(f"{count} tokens cannot be removed: {self.num_held} are held, the others were dropped.")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.num_dropped = 0


class Step3BoundedCache(Cache):
    """
    Dynamic cache of at most `max_length` tokens. It can drop its oldest tokens while positions keep counting, so that a
    long conversation can continue.

    Args:
        config ([`Step3VLConfig`] or [`Step3TextConfig`]): Config of the model.
        max_length (`int`): Maximum number of tokens in the cache.
        keep (`int`, *optional*):
            How many of the newest tokens to keep when there is no room for new ones; older tokens are dropped. Without
            it, `generate` stops when the cache is full.

    Raises:
        `ValueError`: if `max_length` or `keep` is out of range, or tokens do not fit, before any layer changes.
    """

    def __init__(self, config: Step3VLConfig | Step3TextConfig, max_length: int, keep: int | None = None):
        if max_length < 1 or (keep is not None and not 0 < keep < max_length):
            raise ValueError(f"`max_length` must be at least 1 and `keep` below it, got {max_length} and {keep}.")
        super().__init__(layers=[BoundedLayer() for _ in range(config.get_text_config().num_hidden_layers)])
        self.max_length, self.keep = max_length, keep

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Sequence length, including dropped tokens, at which the cache is full; -1 if it drops tokens itself."""
        return -1 if self.keep is not None else self.layers[layer_idx or 0].num_dropped + self.max_length

    def reclaim(self, num_tokens: int) -> None:
        """Drops all but the newest `num_tokens` tokens, at least 1, and frees their memory."""
        if num_tokens < 1:
            raise ValueError(f"At least 1 token must be kept, got {num_tokens}.")
        for layer in self.layers:
            if (num_dropped := layer.num_held - num_tokens) > 0:
                layer.keys = layer.keys[..., num_dropped:, :].clone()
                layer.values = layer.values[..., num_dropped:, :].clone()
                layer.num_dropped += num_dropped

    def make_room(self, num_tokens: int) -> None:
        """Drops the oldest tokens if `keep` is set and `num_tokens` new ones do not fit."""
        room = self.max_length - num_tokens
        if self.keep is not None and room < self.layers[0].num_held:
            if room < 1:
                raise ValueError(f"{num_tokens} new tokens do not fit in a cache of {self.max_length}: give fewer.")
            self.reclaim(min(self.keep, room))


def max_length_of(cache: Cache | None) -> int:
    """Maximum length of a cache, or -1 if it is unlimited."""
    return cache.get_max_length() if isinstance(cache, Cache) and cache.layers else -1


class CheckFinite(LogitsProcessor):
    """
    Records whether any logit is NaN or +inf, without waiting for the device; on a CPU, checks at once. With `has_bias`,
    for a `sequence_bias`, which may add infinities, looks for NaN only.
    """

    def __init__(self, model: PreTrainedModel, has_bias: bool):
        self.model, self.has_bias, self.is_finite = model, has_bias, True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        is_finite = ~scores.isnan() if self.has_bias else scores < torch.inf  # NaN compares false
        self.is_finite = is_finite.all() & self.is_finite
        if scores.device.type == "cpu":
            self.check()
        return scores

    def check(self) -> None:
        """Raises a `RuntimeError` if any logit was not finite, and names the weights that are not."""
        if self.is_finite:
            return
        weights = ((name, weight) for name, weight in self.model.named_parameters() if weight.device.type != "meta")
        names = [name for name, weight in weights if not weight.to(torch.float32).isfinite().all()]
        cause = f"there are NaN or infinite values in {', '.join(names[:5])}{', ...' * (len(names) > 5)}."
        if not names:
            cause = (
                f"values overflow {self.model.dtype}, or the inputs or offloaded weights are not finite; "
                "`transformers.debug_utils.DebugUnderflowOverflow(model)` shows in which layer."
            )
        raise RuntimeError(f"The logits are not finite: {cause}")


class Step3GenerationMixin(GenerationMixin):
    """
    Generation for the models with a language-model head. The images of a prompt are encoded once and inserted into its
    embeddings, which `generate` then repeats and slices like token ids.
    """

    @torch.no_grad()
    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """
        As for any model. The cache may be given as `cache` or `past_key_values` in any release. Models that take images
        generate no image tokens. An answer ends, with a warning, where positions or cache run out.

        Raises:
            `ValueError`: if images do not match the prompt, or the prompt leaves no room for a new token.
            `RuntimeError`: if the logits are not finite.
        """
        cache = one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None))
        generation_config = deepcopy(generation_config or self.generation_config)
        generation_config.update(**self.generation_config.to_dict(), defaults_only=True)
        kwargs = generation_config.update(**kwargs)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        check_finite = CheckFinite(self, bool(generation_config.sequence_bias))
        # An assistant also gets its main model's processors.
        processors = [processor for processor in logits_processor or [] if not isinstance(processor, CheckFinite)]
        if "image" in self.input_modalities:
            names = ("pixel_values", "patch_pixel_values", "num_patches", "image_embeds", "mm_encoder_outputs")
            pictures = {name: kwargs.pop(name, None) for name in names}
            kwargs |= self.embed_pictures(pictures, input_ids, cache, kwargs)
            suppressed = generation_config.suppress_tokens or []
            generation_config.suppress_tokens = [*suppressed, self.config.image_token_id]
        if not getattr(generation_config, "is_assistant", False):  # the main model limits and checks its proposals
            if isinstance(prompt, torch.Tensor) and prompt.ndim > 1:
                self.bound_length(prompt, generation_config, cache, kwargs)
            processors.insert(0, check_finite)  # before the caller's processors
        if cache is not None:
            kwargs[CACHE_NAME] = cache
        if getattr(cache, "offloading", False) or generation_config.cache_implementation == "offloaded_static":
            generation_config.disable_compile = True  # a compiled step that copies keys to the CPU crashes
        output = super().generate(inputs, generation_config, LogitsProcessorList(processors), *args, **kwargs)
        check_finite.check()
        return output

    def embed_pictures(
        self, pictures: dict, input_ids: torch.LongTensor | None, cache: Cache | None, arguments: dict
    ) -> dict[str, torch.Tensor]:
        """
        Encodes images and returns the arguments of `generate` that replace them; none without images. These are
        `prompt_embeds` (batch, tokens so far, hidden_size), the prompt's embeddings with image features inserted, and,
        if there is an assistant, `assistant_prompt_embeds`, for which it encodes the images itself. If the prompt was
        given as `inputs_embeds`, only that is returned. The features may be those of all image tokens, or of those that
        are not cached.
        """
        if "prompt_embeds" in arguments:  # an assistant, or a model that assists itself
            return {"prompt_embeds": arguments.get("assistant_prompt_embeds", arguments["prompt_embeds"])}
        inputs_embeds, attention_mask = arguments.get("inputs_embeds"), arguments.get("attention_mask")
        names = ("pixel_values", "image_embeds")
        has_pictures = any(pictures[name] is not None for name in names) or bool(pictures["mm_encoder_outputs"])
        given = input_ids if inputs_embeds is None else inputs_embeds
        if not isinstance(given, torch.Tensor):
            if has_pictures:
                raise ValueError("Pictures need `input_ids` or `inputs_embeds` that hold their image tokens.")
            return {}
        # The given tokens may be only the new ones. Count the tokens before them, and how many of them are cached.
        before = attention_mask.shape[1] - given.shape[1] if getattr(attention_mask, "ndim", 0) == 2 else 0
        cached = 0 if cache is None else max(int(cache.get_seq_length()) - before, 0)
        if not has_pictures:
            if given is input_ids and given.ndim == 2:
                self.model.warn_of_image_tokens(input_ids[:, cached:])
            return {}
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        mask = self.model.get_image_token_mask(input_ids if inputs_embeds is None else None, inputs_embeds)
        is_new = torch.arange(mask.shape[1], device=mask.device) >= cached
        if cached == 0 or (mask & is_new).any():
            features, _ = self.model.collect_features(**pictures)
            if features is None:  # an empty list
                return {}
            if features.shape[0] == (mask & is_new).sum():
                mask = mask & is_new
            embeds = self.model.insert_features(embeds, mask, features)
        if inputs_embeds is not None:
            return {"inputs_embeds": embeds}
        prompt = {"prompt_embeds": nn.functional.pad(embeds, (0, 0, before, 0))}
        if (assistant := arguments.get("assistant_model")) is not None:
            if "image" not in getattr(assistant, "input_modalities", ()):
                raise ValueError("The prompt has pictures: choose an `assistant_model` that takes pictures, too.")
            own = assistant.embed_pictures(pictures, input_ids, cache, {"attention_mask": attention_mask})
            prompt["assistant_prompt_embeds"] = own["prompt_embeds"]
        return prompt

    def bound_length(self, prompt: torch.Tensor, generation_config, cache: Cache | None, kwargs: dict) -> None:
        """Limits new tokens to the positions and cache that are left; raises a `ValueError` if none are."""
        mask, pad = kwargs.get("attention_mask"), generation_config.pad_token_id
        if mask is None and prompt.ndim == 2 and isinstance(pad, int) and pad != generation_config.eos_token_id:
            mask = prompt != pad  # as transformers does
        length = num_positions = prompt.shape[1]
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:  # may include earlier tokens and padding
            length, num_positions = mask.shape[1], int(mask.sum(-1).max())
        models = [model for model in (self, kwargs.get("assistant_model")) if model is not None]
        limits = [getattr(model.config.get_text_config(), "longest_sequence", None) for model in models]
        rooms = [(limit - num_positions, f"the model's {limit} positions") for limit in limits if limit is not None]
        if (limit := max_length_of(cache)) > 0:
            # The last token is not cached, but all tokens that prompt lookup proposes are.
            proposed = generation_config.prompt_lookup_num_tokens or 1
            rooms.append((limit - length + 2 - proposed, f"the cache's {limit} tokens"))
        wanted, max_length = generation_config.max_new_tokens, generation_config.max_length
        if wanted is None:  # transformers generates 20 tokens by default
            wanted = 20 if max_length is None else max_length - prompt.shape[1]
        room, owner = min(rooms, default=(wanted, None))
        if room < min(wanted, 1):
            raise ValueError(f"The prompt has {num_positions} tokens, which leaves none of {owner} for an answer.")
        if room < wanted:
            logger.warning_once(f"No more than {room} tokens are generated, not {wanted}, as {owner} end there.")
            generation_config.max_new_tokens, generation_config.max_length = room, None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_embeds: torch.Tensor | None = None,
        assistant_prompt_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> dict:
        """
        As for any model, but takes the prompt's tokens from `prompt_embeds` if given. Base class arguments are passed
        by position, because the cache's name differs between releases.
        """
        cache = one_cache(cache, past_key_values, kwargs)
        arguments = (next_sequence_length, cache, attention_mask, inputs_embeds, is_first_iteration)
        model_inputs = super().prepare_inputs_for_generation(input_ids, *arguments, **kwargs)
        limit, positions = self.config.get_text_config().longest_sequence, model_inputs.get("position_ids")
        if limit is not None and positions is not None and positions.shape[1] > 1:
            # Prompt lookup may propose tokens beyond the last position; they are cut off the answer.
            model_inputs["position_ids"] = positions.clamp(max=limit - 1)
        if prompt_embeds is not None and (input_ids := model_inputs["input_ids"]) is not None:
            num_new = input_ids.shape[1]
            if getattr(attention_mask, "ndim", 0) == 2:
                before = attention_mask.shape[1] - num_new
            else:
                before = 0 if cache is None else int(cache.get_seq_length())
            if before < prompt_embeds.shape[1]:
                prompt = prompt_embeds[:, before : before + num_new]
                others = self.get_input_embeddings()(input_ids[:, prompt.shape[1] :])
                model_inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, others], 1)}
        return model_inputs
