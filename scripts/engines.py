"""
What the serving engines would do with a model: the facts behind `convert_checkpoint.py --engines`, the warnings of it
and of `push_to_hub.py`, and the options that `serve.py` gives.

vLLM 0.32.0 was run on small models of each kind. SGLang 0.5.23 was read; its loader alone was run.
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


ENGINES = ("vLLM 0.32.0", "SGLang 0.5.23")
AS_HERE = "as here"
# What both take for granted, in pixels and image tokens, by the names of vLLM's processor.
RELEASED_SIZES = {"image_size": 728, "patch_size": 504, "num_image_feature_size": 169, "num_patch_feature_size": 81}
# What neither reads of a processor's settings, and takes for granted.
RELEASED_PIXELS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
    "max_image_size": 3024,
    "resample": 2,
    "do_normalize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
}
# By type of the rotary embedding, for either engine; others were not run.
ROPE_TYPES = {
    "default": (AS_HERE, AS_HERE),
    "linear": (AS_HERE, "not run"),
    "dynamic": (AS_HERE, "not run"),
    "yarn": ("error: asks the config for another name", "not run"),
    "llama3": ("error: asks the config for another name", "not run"),
    "longrope": ("error: asks the config for another name", "not run"),
}


@dataclass(frozen=True)
class Fact:
    """What the engines make of one property of a model: `as here`, or else an error or a wrong answer, and why."""

    subject: str
    value: str
    vllm: str = AS_HERE
    sglang: str = AS_HERE


def processor_settings(checkpoint: Checkpoint) -> dict:
    """What a checkpoint says about its pictures; the released ones say nothing."""
    settings = {}
    for name in ("preprocessor_config.json", "processor_config.json"):  # the later one has the last word
        if (checkpoint.directory / name).exists():
            loaded = read_json(locate(checkpoint.directory, name))
            part = loaded.get("image_processor")
            settings |= part if isinstance(part, dict) else loaded
    return settings


def picture_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """
    The sizes of a model's pictures in pixels and image tokens, by the names of `RELEASED_SIZES`.

    Raises:
        `CheckpointError`: if the processor's are none.
    """
    settings, config = processor_settings(checkpoint), checkpoint.config
    size = settings.get("size") or {}
    sides = [
        size.get("height", RELEASED_SIZES["image_size"]) if isinstance(size, dict) else size,
        settings.get("patch_size", RELEASED_SIZES["patch_size"]),
    ]
    if not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError([f"processor_config.json: sizes of pictures must be positive numbers, got {sides}."])
    patch_size, stride = config.vision_config.patch_size, config.understand_projector_stride
    tokens = [configuration.num_image_tokens(side, patch_size, stride) for side in sides]
    return dict(zip(RELEASED_SIZES, sides + tokens, strict=True))


def is_released(name: str, value: object) -> bool:
    """Whether a setting of the processor is what the engines take for granted."""
    released = RELEASED_PIXELS[name]
    if isinstance(released, tuple):
        return isinstance(value, list | tuple) and len(value) == 3 and all(map(is_close, value, released))
    return is_close(value, released)


def is_close(value: object, other: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, other, rel_tol=1e-6)


def engine_facts(checkpoint: Checkpoint, config: Step3VLConfig | Step3TextConfig, has_head: bool) -> list[Fact]:
    """
    What the engines would do with the model of a checkpoint, or with a part of it: `config` is the part's, and
    `has_head` whether its `lm_head.weight` is on disk.
    """
    text = config.get_text_config()
    rope_type, part = text.rope_parameters["rope_type"], text.rope_parameters.get("partial_rotary_factor") or 1
    rope = ROPE_TYPES.get(rope_type, ("not run", "not run")) if part == 1 else ("wrong: turns others", "not run")
    head = AS_HERE if has_head else "wrong: random, for they never tie"
    activation = AS_HERE if text.hidden_act == "silu" else "wrong: computes with silu"
    groups = AS_HERE if text.num_attention_groups == 1 else "error: takes one"
    facts = [
        Fact("output head", "its own" if has_head else "tied", head, head),
        Fact("activation", text.hidden_act, activation, activation),
        Fact("key/value heads", str(text.num_attention_groups), groups, groups),
        Fact("rotary embedding", rope_type if part == 1 else f"{rope_type}, {part} of each head", *rope),
    ]
    if isinstance(config, Step3TextConfig):
        return [*facts, Fact("part", "the text model", sglang="error: has no class for it")]
    settings, sizes = processor_settings(checkpoint), picture_sizes(checkpoint)
    changed = [name for name in RELEASED_PIXELS if name in settings and not is_released(name, settings[name])]
    pixels = f"wrong: takes no {', '.join(changed)}" if changed else AS_HERE
    if sizes == RELEASED_SIZES:
        by_sizes = (AS_HERE, AS_HERE)
    else:  # the sizes at which they cut are fixed in both
        by_sizes = ("error, but by serve.py; cut as 728 and 504 px", "wrong: takes 728 and 504 px")
    in_words = "{image_size} and {patch_size} px, {num_image_feature_size} and {num_patch_feature_size} tokens"
    return [
        *facts,
        Fact("pictures", in_words.format(**sizes), *by_sizes),
        Fact("their pixels", f"other {', '.join(changed)}" if changed else "as released", pixels, pixels),
    ]


def table(facts: list[Fact]) -> str:
    """The facts as lines, a column for each engine."""
    rows = [("", "this model", *ENGINES), *((fact.subject, fact.value, fact.vllm, fact.sglang) for fact in facts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def warnings(facts: list[Fact]) -> list[str]:
    """What is not as here, a line for each."""
    return [
        f"Warning: {engine}, {fact.subject} ({fact.value}): {verdict}."
        for engine, name in zip(ENGINES, ("vllm", "sglang"), strict=True)
        for fact in facts
        for verdict in [getattr(fact, name)]
        if verdict != AS_HERE
    ]
