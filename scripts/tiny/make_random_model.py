"""Makes a random Step3 of any size: a directory with weights in the released layout, a small tokenizer and the code.

Apart from the weights, everything is as in a real checkpoint. It is for demos, tests and benchmarks.

python scripts/tiny/make_random_model.py DIRECTORY
python scripts/tiny/make_random_model.py DIRECTORY --set text_config.num_hidden_layers=8 --dtype bfloat16
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration, Step3VLImageProcessor, Step3VLProcessor


sys.path.append(str(Path(__file__).parents[1]))
from files import new_directory, save_whole


BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
TURN_TOKENS = ["<|BOT|>", "<|EOT|>"]
PICTURE_TOKENS = ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]

# One dense layer and two MoE layers; pictures of 224 px take 16 tokens and patches of 112 px take 4.
TINY = {
    "vision_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "output_hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 224,
    },
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "share_q_dim": 32,
        "moe_num_experts": 8,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2",
        "max_position_embedding": 4096,
        "max_seq_len": 4096,
        # Large enough for different prompts to give different answers.
        "initializer_range": 0.2,
    },
}
# As in the released model, whose images are at most 3024 px long and whose patches have 504 px.
MAX_PATCHES_A_SIDE = 6


def make_tokenizer(texts: Iterable[str] = (), vocab_size: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with at most `vocab_size` tokens learned from `texts`, and the released special tokens."""
    special_tokens = [BOS, EOS, PAD, *TURN_TOKENS, *PICTURE_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=TINY["text_config"]["max_position_embedding"],
        clean_up_tokenization_spaces=False,
    )


def override(settings: dict, assignment: str) -> None:
    """Applies `a.b=VALUE` to nested `settings`. The value is JSON or plain text."""
    path, separator, text = assignment.partition("=")
    *parents, key = path.split(".")
    if not separator or not key:
        raise ValueError(f"--set must be KEY=VALUE, such as text_config.num_hidden_layers=4, got {assignment!r}.")
    for parent in parents:
        settings = settings.setdefault(parent, {})
    try:
        settings[key] = json.loads(text)
    except json.JSONDecodeError:
        settings[key] = text


def make_random_model(
    directory: Path, overrides: list[str] = (), patch_size: int | None = None, dtype: str = "float32", seed: int = 0
) -> None:
    """
    Saves a random model with its processor in `directory`. Raises a `ValueError` if an override is not `KEY=VALUE`, or
    a `StrictDataclassError` if the config is not valid.
    """
    tokenizer = make_tokenizer()
    settings = json.loads(json.dumps(TINY))
    settings["image_token_id"] = tokenizer.convert_tokens_to_ids("<im_patch>")
    settings["text_config"].update(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    for assignment in overrides:
        override(settings, assignment)
    config = Step3VLConfig(**settings, dtype=dtype)

    side = config.vision_config.image_size
    patch_size = patch_size or side // 2
    image_processor = Step3VLImageProcessor(
        size={"height": side, "width": side},
        patch_size=patch_size,
        max_image_size=MAX_PATCHES_A_SIDE * patch_size,
        vision_patch_size=config.vision_config.patch_size,
        projector_stride=config.understand_projector_stride,
    )
    processor = Step3VLProcessor(image_processor, tokenizer)

    set_seed(seed)
    model = Step3VLForConditionalGeneration._from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|EOT|>")],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=processor.image_token_ids,
    )
    save_whole(directory, model, processor)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="The keys of --set are those of config.json, for example text_config.hidden_size=256.",
    )
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a value in the config; may be repeated",
    )
    parser.add_argument("--patch-size", type=int, help="side of a patch in pixels (default: half the picture's)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    arguments = parser.parse_args()
    try:
        make_random_model(**vars(arguments))
    except (ValueError, StrictDataclassError) as error:
        parser.error(str(error))
    print(arguments.directory)


if __name__ == "__main__":
    main()
