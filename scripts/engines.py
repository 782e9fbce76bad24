"""
What the serving engines do with a model: for `convert_checkpoint.py --engines`, its warnings and those of
`push_to_hub.py`. `serving_engines.py` starts them.

vLLM 0.32.0 was run on small models of each kind. For SGLang 0.5.23, the code was read and only the loader was run.
"""

import math
from dataclasses import dataclass

from checkpoint_files import (
    Checkpoint,
    CheckpointError,
    Step3TextConfig,
    Step3VLConfig,
    configuration,
    locate,
    read_json,
)


ENGINES = {"vllm": "vLLM 0.32.0", "sglang": "SGLang 0.5.23"}
AS_HERE = "as here"
# The image sizes that both engines assume, in pixels and image tokens, by the names of vLLM's processor.
RELEASED_SIZES = {"image_size": 728, "patch_size": 504, "num_image_feature_size": 169, "num_patch_feature_size": 81}
# The processor settings that both assume without reading them.
RELEASED_PIXELS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "max_image_size": 3024,
    "resample": 2,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}
# vLLM's CPU build fails on a processor with AMX if more query heads share a key/value head.
MAX_AMX_HEADS = 16
# What vLLM does with types of rotary embedding other than the default, with which SGLang was not run.
ROPE_TYPES = {"linear": AS_HERE, "dynamic": AS_HERE}
ROPE_TYPES |= dict.fromkeys(("yarn", "llama3", "longrope"), "error: needs another name in the config")


@dataclass(frozen=True)
class Fact:
    """What each engine does with one property of a model: `as here`, or an error or a wrong answer and why."""

    subject: str
    value: str
    vllm: str = AS_HERE
    sglang: str = AS_HERE


def processor_settings(checkpoint: Checkpoint) -> dict:
    """The image processor's settings in a checkpoint; the released checkpoints have none."""
    settings = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # the second takes precedence
        if (checkpoint.directory / name).exists():
            loaded = read_json(locate(checkpoint.directory, name))
            part = loaded.get("image_processor")
            settings |= part if isinstance(part, dict) else loaded
    return settings


def picture_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """
    A model's image and patch size in pixels and image tokens, by the names of `RELEASED_SIZES`. Raises a
    `CheckpointError` if the processor's sizes are not positive integers.
    """
    settings, config = processor_settings(checkpoint), checkpoint.config
    size = settings.get("size") or {}
    sides = [
        size.get("height", RELEASED_SIZES["image_size"]) if isinstance(size, dict) else size,
        settings.get("patch_size", RELEASED_SIZES["patch_size"]),
    ]
    if not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError([f"processor_config.json: image sizes must be positive integers, got {sides!r:.200}."])
    patch_size, stride = config.vision_config.patch_size, config.understand_projector_stride
    tokens = [configuration.num_image_tokens(side, patch_size, stride) for side in sides]
    return dict(zip(RELEASED_SIZES, sides + tokens, strict=True))


def query_heads_per_group(config: Step3VLConfig | Step3TextConfig) -> int:
    text = config.get_text_config()
    return text.num_attention_heads // text.num_attention_groups


def packed_form(config: Step3VLConfig | Step3TextConfig) -> str | None:
    """How a quantiser other than the release's block-fp8 has packed the weights, if one has."""
    settings = getattr(config, "quantization_config", None) or {}
    method = settings.get("quant_method", "fp8")
    return None if method == "fp8" else ", ".join(filter(None, (method, settings.get("format"))))


def is_released(name: str, value: object) -> bool:
    """Whether a setting of the image processor is the one that the engines assume."""
    given, released = (x if isinstance(x, list | tuple) else [x] for x in (value, RELEASED_PIXELS[name]))
    return len(given) == len(released) and all(
        isinstance(number, int | float) and math.isclose(number, wanted, rel_tol=1e-6)
        for number, wanted in zip(given, released, strict=True)
    )


def engine_facts(checkpoint: Checkpoint, config: Step3VLConfig | Step3TextConfig, has_head: bool) -> list[Fact]:
    """
    What the engines do with the model of a checkpoint or a part of it. `config` describes the part, and `has_head` says
    whether its `lm_head.weight` is on disk.
    """
    text = config.get_text_config()
    rope_type, share = text.rope_parameters["rope_type"], text.rope_parameters.get("partial_rotary_factor") or 1
    rope = (AS_HERE, AS_HERE) if rope_type == "default" else (ROPE_TYPES.get(rope_type, "not run"), "not run")
    if share != 1:
        rope_type, rope = f"{rope_type}, {share} of each head", ("wrong: rotates other dimensions", "not run")
    head = AS_HERE if has_head else "wrong: random, because it is never tied"
    activation = AS_HERE if text.hidden_act == "silu" else "wrong: computes with silu"
    groups = AS_HERE if text.num_attention_groups == 1 else "error: supports one"
    heads = query_heads_per_group(config)
    by_heads = AS_HERE if heads <= MAX_AMX_HEADS else f"{AS_HERE}; error on a CPU with AMX"
    facts = [
        Fact("output head", "its own" if has_head else "tied", head, head),
        Fact("activation", text.hidden_act, activation, activation),
        Fact("key/value heads", str(text.num_attention_groups), groups, groups),
        Fact("query heads for each", str(heads), by_heads),
        Fact("rotary embedding", rope_type, *rope),
    ]
    if form := packed_form(config):  # whose experts are saved one by one
        missing = "error: expects stacked experts, has no parameter moe.experts.0.gate_up_proj"
        facts.append(Fact("quantised", form, missing, "wrong: skips experts that are not stacked"))
    if isinstance(config, Step3TextConfig):
        return [*facts, Fact("part", "the text model", sglang="error: has no class for it")]
    settings, sizes = processor_settings(checkpoint), picture_sizes(checkpoint)
    changed = [name for name in RELEASED_PIXELS if name in settings and not is_released(name, settings[name])]
    pixels = f"wrong: ignores {', '.join(changed)}" if changed else AS_HERE
    by_sizes = ("error, except through serve.py; cut as for 728 and 504 px", "wrong: uses 728 and 504 px")
    if sizes == RELEASED_SIZES:
        by_sizes = (AS_HERE, AS_HERE)
    in_words = "{image_size} and {patch_size} px, {num_image_feature_size} and {num_patch_feature_size} tokens"
    return [
        *facts,
        Fact("pictures", in_words.format(**sizes), *by_sizes),
        Fact("their pixels", f"other {', '.join(changed)}" if changed else "as released", pixels, pixels),
    ]


def table(facts: list[Fact]) -> str:
    """The facts as text, with a column for each engine."""
    rows = [("", "this model", *ENGINES.values())]
    rows += [(fact.subject, fact.value, fact.vllm, fact.sglang) for fact in facts]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def engine_warnings(facts: list[Fact]) -> list[str]:
    """A line for each difference between an engine and this package."""
    return [
        f"Warning: {engine}, {fact.subject} ({fact.value}): {verdict}."
        for name, engine in ENGINES.items()
        for fact in facts
        if not (verdict := getattr(fact, name)).startswith(AS_HERE)
    ]
