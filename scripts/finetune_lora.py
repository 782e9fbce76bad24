"""Fine-tunes a Step3-VL model on conversations with images, using LoRA, or QLoRA with --4bit.

python scripts/finetune_lora.py MODEL DATA.jsonl OUTPUT
python scripts/finetune_lora.py MODEL DATA.jsonl OUTPUT --target attention,mlp,experts --eval TEST.jsonl --merge
accelerate launch --num_processes 2 scripts/finetune_lora.py MODEL DATA.jsonl OUTPUT

Writes the adapter to OUTPUT/adapter and, with --merge, the whole model to OUTPUT/merged. `conversations.py` describes
the data, which is checked before the model is loaded.
"""

import argparse
import gc
import hashlib
import json
import random
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import PartialState
from conversations import BadData, Conversation, check_pictures, check_tokens, read_conversations, segments
from datasets import Dataset
from files import replacing, save_whole, write_json
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerCallback,
)
from transformers.utils import is_bitsandbytes_available
from trl import SFTConfig, SFTTrainer

from step3_vl import Step3VLConfig, Step3VLProcessor


# The layers for each word of --target, as patterns of their names.
TARGETS = {
    "attention": r".*\.layers\.\d+\.self_attn\.(q_proj|wq|k_proj|v_proj|o_proj)",
    "mlp": r".*\.layers\.\d+\.(mlp|share_expert)\.(gate_proj|up_proj|down_proj)",
    "experts": r".*\.moe\.experts\..*_proj",
    "vision": r".*vision_model\..*\.(qkv_proj|out_proj|fc1|fc2)|.*\.vit_large_projector",
}
# The weights of stacked experts, and the layers to train in full for words that the model never generates.
STACKED_EXPERTS = ["moe.experts.gate_up_proj", "moe.experts.down_proj"]
VOCABULARY = ["embed_tokens", "lm_head"]
TARGET_NAMES = (*TARGETS, "vocabulary")
# The best learning rate falls with the model's width: Schulman et al., "LoRA Without Regret" (2025), fitted it for text
# models as 5e-4 * (2000 / width) ** 0.78 (the exponent is between 0.775 and 0.781).
RATE, WIDTH, EXPONENT = 5e-4, 2000, 0.78
# Without --eval, one conversation in HELD_OUT is used for evaluation, at most MAX_HELD_OUT in all.
HELD_OUT, MAX_HELD_OUT = 20, 200
MOST = 10**6  # limit of numbers in options
# Answers to print at each evaluation, and how many more tokens than the right answer they may have.
NUM_SHOWN, MORE_TOKENS = 3, 16
WARMUP = 0.03  # of all steps
GPU_WORKERS = 4  # processes that prepare pictures while a GPU computes
# The file with a training's options, and the options that may change when it is resumed.
SETTINGS = "settings.json"
NOT_COMPARED = ("output", "merge", "resume", "ask")
# Files in a checkpoint besides the adapter and the processor.
TRAINING_STATE = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json", "training_args.bin")


class Collator:
    """
    Makes a batch of conversations, given by number. Labels are the assistant's answers with their end-of-turn tokens.
    """

    def __init__(self, conversations: list[Conversation], processor: Step3VLProcessor):
        self.conversations, self.processor = conversations, processor

    def __call__(self, samples: list[dict], asks: bool = False) -> dict[str, torch.Tensor]:
        """The batch, padded on the right. With `asks`, padded on the left, without the last answers and labels."""
        rows = [segments(self.conversations[sample["number"]], self.processor) for sample in samples]
        rows = [row[:-1] for row in rows] if asks else rows
        batch = self.processor(
            text=[text for row in rows for text, _, _ in row],
            images=[pictures for row in rows for _, pictures, _ in row],
            add_special_tokens=False,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        inputs = {name: batch[name] for name in self.processor.image_processor.model_input_names if name in batch}
        tokens = iter([ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)])
        ids, labels = [], []
        for row in rows:
            pieces = [(next(tokens), is_learned) for _, _, is_learned in row]
            ids.append(torch.cat([piece for piece, _ in pieces]))
            labels.append(torch.cat([piece if learned else torch.full_like(piece, -100) for piece, learned in pieces]))
        side = "left" if asks else "right"
        pad = self.processor.tokenizer.pad_token_id
        inputs["input_ids"] = pad_sequence(ids, batch_first=True, padding_value=pad, padding_side=side)
        masks = [torch.ones_like(row) for row in ids]
        inputs["attention_mask"] = pad_sequence(masks, batch_first=True, padding_side=side)
        if not asks:
            inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
        return inputs


class AskQuestions(TrainerCallback):
    """Generates the last answers of some conversations at each evaluation, and evaluates after the last step."""

    def __init__(self, collator: Collator, numbers: range, batch_size: int):
        self.collator, self.numbers, self.batch_size = collator, numbers, batch_size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    @torch.no_grad()
    def on_evaluate(self, args, state, control, model, **kwargs):
        # Every process generates the same answers, because the weights may be split over the processes.
        tokenizer = self.collator.processor.tokenizer
        last_turns = [self.collator.conversations[i].messages[-2:] for i in self.numbers]
        questions, truths = ([text_of(turn) for turn in turns] for turns in zip(*last_turns, strict=True))
        longest = max(len(tokenizer(truth)["input_ids"]) for truth in truths)
        answers = []
        for start in range(0, len(truths), self.batch_size):
            samples = [{"number": i} for i in self.numbers[start : start + self.batch_size]]
            inputs = {name: tensor.to(model.device) for name, tensor in self.collator(samples, asks=True).items()}
            output = model.generate(**inputs, max_new_tokens=longest + MORE_TOKENS, do_sample=False)
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if not state.is_world_process_zero:
            return
        right = sum(answer.strip() == truth.strip() for answer, truth in zip(answers, truths, strict=True))
        print(f"\nafter step {state.global_step}: {right} of {len(truths)} answers are the same, word for word")
        for question, answer, truth in list(zip(questions, answers, truths, strict=True))[:NUM_SHOWN]:
            print(f"  {question}\n    answer: {answer}\n    truth:  {truth}")


def text_of(message: dict) -> str:
    return "".join(part.get("text", "<image>") for part in message["content"])


def make_lora(model: PreTrainedModel, targets: list[str], rank: int) -> LoraConfig:
    """LoRA of `rank` on the layers or stacked expert weights for the words in `targets`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    patterns = [TARGETS[target] for target in targets if target in TARGETS]
    has_stacked = not any(re.fullmatch(TARGETS["experts"], name) for name in layers)
    if has_stacked and "experts" in targets:
        patterns.remove(TARGETS["experts"])
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="|".join(patterns) or [],
        target_parameters=STACKED_EXPERTS if has_stacked and "experts" in targets else None,
        modules_to_save=VOCABULARY if "vocabulary" in targets else None,
    )


def placement() -> dict:
    """Arguments of `from_pretrained` to use all GPUs in a single process, or one GPU in each of several."""
    state = PartialState()
    if state.device.type != "cuda":
        return {}
    return {"device_map": "auto" if state.num_processes == 1 else {"": state.local_process_index}}


def prepare_data(
    arguments: argparse.Namespace,
) -> tuple[list[Conversation], list[Conversation], Step3VLConfig, Step3VLProcessor]:
    """
    The conversations for training and evaluation, the config and the processor. Only the first process checks images
    and lengths. Raises `BadData` if a conversation has an error, or an `OSError` if a file or the model cannot be read.
    """
    is_first = PartialState().is_main_process
    faults = []
    data = read_conversations(arguments.data, faults)
    evaluation = read_conversations(arguments.eval, faults) if arguments.eval else []
    sizes = check_pictures(data + evaluation, faults, quiet=not is_first) if is_first else {}
    if faults:
        raise BadData(faults)
    config, processor = AutoConfig.from_pretrained(arguments.model), AutoProcessor.from_pretrained(arguments.model)
    if is_first:
        max_length = arguments.max_length or config.get_text_config().longest_sequence or sys.maxsize
        total = check_tokens(data + evaluation, sizes, processor, max_length, faults)
        if faults:
            raise BadData(faults)
        print(f"{len(data)} conversations, {len(evaluation)} more for evaluation: {len(sizes)} images, {total} tokens")
    PartialState().wait_for_everyone()
    if not arguments.eval:
        random.Random(arguments.seed).shuffle(data)
        kept = min(len(data) // HELD_OUT, MAX_HELD_OUT)
        data, evaluation = data[kept:], data[:kept]
    return data, evaluation, config, processor


def train(
    arguments: argparse.Namespace,
    settings: dict,
    data: list[Conversation],
    evaluation: list[Conversation],
    processor: Step3VLProcessor,
) -> None:
    """Trains from the start or the last complete checkpoint, and saves OUTPUT/adapter."""
    quantization_config = None
    if arguments.four_bit:
        quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForImageTextToText.from_pretrained(
        arguments.model,
        dtype=torch.bfloat16 if arguments.bf16 else "auto",
        quantization_config=quantization_config,
        **placement(),
    )
    text_config = model.config.get_text_config()
    collator = Collator(data + evaluation, processor)
    numbers = range(len(data)), range(len(data), len(data) + len(evaluation))
    # transformers renamed this option.
    checkpointing = {field.name for field in fields(SFTConfig)} & {"activation_checkpointing", "gradient_checkpointing"}
    options = SFTConfig(
        arguments.output,
        num_train_epochs=arguments.epochs,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        learning_rate=arguments.learning_rate or RATE * (WIDTH / text_config.hidden_size) ** EXPONENT,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP,
        use_cpu=PartialState().device.type == "cpu",
        bf16=model.dtype == torch.bfloat16,
        eval_strategy="steps" if evaluation else "no",
        eval_on_start=bool(evaluation),
        eval_steps=arguments.save_steps,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to=[],
        seed=arguments.seed,
        max_length=None,  # no truncation
        router_aux_loss_coef=text_config.router_aux_loss_coef if text_config.output_router_logits else 0.0,
        dataset_kwargs={"skip_prepare_dataset": True},  # done by the collator
        remove_unused_columns=False,
        dataloader_num_workers=GPU_WORKERS if model.device.type == "cuda" else 0,
        **{sorted(checkpointing)[0]: arguments.gradient_checkpointing},
    )
    trainer = SFTTrainer(
        model,
        options,
        data_collator=collator,
        train_dataset=Dataset.from_dict({"number": numbers[0]}),
        eval_dataset=Dataset.from_dict({"number": numbers[1]}) if evaluation else None,
        processing_class=processor,
        peft_config=make_lora(model, arguments.target, arguments.rank),
        callbacks=[AskQuestions(collator, numbers[1][: arguments.ask], arguments.batch_size)] if evaluation else None,
    )
    if trainer.is_world_process_zero():
        write_json(arguments.output / SETTINGS, settings)
        trainer.model.print_trainable_parameters()
    # The state is the last file of a checkpoint to be written.
    saved = [path.parent for path in arguments.output.glob("checkpoint-*/trainer_state.json")]
    last = max(saved, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        checkpoint = arguments.output / f"checkpoint-{trainer.state.global_step}"
        with replacing(arguments.output / "adapter") as unfinished:
            shutil.copytree(checkpoint, unfinished, ignore=shutil.ignore_patterns(*TRAINING_STATE))
        (arguments.output / "README.md").unlink(missing_ok=True)  # TRL's, which is wrong for this model


def merge(arguments: argparse.Namespace, processor: Step3VLProcessor) -> None:
    """Merges OUTPUT/adapter into the stored weights and saves the whole model in OUTPUT/merged."""
    experts = {"experts_implementation": "linear"} if arguments.four_bit else {}  # as in training
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype="auto", **experts, **placement())
    merged = PeftModel.from_pretrained(model, arguments.output / "adapter").merge_and_unload()
    save_whole(arguments.output / "merged", merged, processor)


def check_output(arguments: argparse.Namespace) -> dict:
    """
    The options and hashes of the data, which must be the same when a training is resumed. Raises a `FileExistsError` if
    OUTPUT exists without `--resume` or the training is finished, a `FileNotFoundError` if there is nothing to resume,
    or a `ValueError` if the options or the data have changed.
    """
    output, settings = arguments.output, {}
    for name, value in vars(arguments).items():
        if name not in NOT_COMPARED:
            settings[name] = hashlib.sha256(value.read_bytes()).hexdigest() if isinstance(value, Path) else value
    if not arguments.resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise FileExistsError(f"{output} exists already: use --resume, choose another directory or remove it")
        return settings
    if not (output / SETTINGS).exists():
        raise FileNotFoundError(f"there is no training to resume in {output}")
    before = json.loads((output / SETTINGS).read_text())
    if other := [name for name in settings if settings[name] != before.get(name)]:
        raise ValueError(f"the training in {output} began with another {' and '.join(other)}: use the same to resume")
    if (output / "adapter").exists() and (not arguments.merge or (output / "merged").exists()):
        raise FileExistsError(f"the training in {output} is finished")
    return settings


def finetune(arguments: argparse.Namespace) -> None:
    """Trains, merges, or both. Raises `BadData`, `OSError` or `ValueError` if the options, data or model are wrong."""
    settings = check_output(arguments)
    data, evaluation, config, processor = prepare_data(arguments)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{arguments.model} is quantised: convert it with `step3 convert --dtype bfloat16`")
    if arguments.rank > config.get_text_config().hidden_size:
        raise ValueError(f"--rank must be at most the model's width, {config.get_text_config().hidden_size}")
    if PartialState().is_main_process:  # left by a run that was killed
        for unfinished in arguments.output.glob(".*-*"):
            shutil.rmtree(unfinished)
    if not (arguments.output / "adapter").exists():
        train(arguments, settings, data, evaluation, processor)
        gc.collect()  # frees the model and its trainer, which refer to each other
    if arguments.merge and PartialState().is_main_process:
        merge(arguments, processor)


def target_list(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in TARGET_NAMES]:
        raise argparse.ArgumentTypeError(f"must be a list of {','.join(TARGET_NAMES)}, got {wrong[0]!r}")
    return [name for name in TARGET_NAMES if name in names]


def number(kind: type, most: float = MOST, above: float = 0) -> Callable[[str], float]:
    """A parser of options of type `kind` that are larger than `above` and at most `most`."""

    def read(text: str) -> float:
        value = kind(text)
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"must be above {above} and at most {most}, got {text}")
        return value

    read.__name__ = kind.__name__  # shown by argparse
    return read


def save_steps(text: str) -> float:
    value = number(float)(text)
    if value > 1 and value % 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, or a fraction of all steps, got {text}")
    return value


def model_name(text: str) -> str:
    """A hub id, or the full path of a directory, since the adapter records it."""
    return str(Path(text).resolve()) if Path(text).is_dir() else text


def main() -> None:
    count = number(int)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=model_name, help="directory or hub id")
    parser.add_argument("data", type=Path, help="file of training conversations, one per line")
    parser.add_argument("output", type=Path, help="directory to create; must not exist yet")
    parser.add_argument(
        "--target",
        type=target_list,
        default="attention,mlp",
        help=f"what to train, a list of {','.join(TARGET_NAMES)} (default: %(default)s)",
    )
    parser.add_argument("--eval", type=Path, help="file of evaluation conversations (default: part of the data)")
    parser.add_argument("--merge", action="store_true", help="also save the merged model")
    parser.add_argument("--resume", action="store_true", help="resume an interrupted training, or merge it")
    parser.add_argument("--4bit", dest="four_bit", action="store_true", help="QLoRA: load the weights as 4-bit nf4")
    parser.add_argument("--bf16", action="store_true", help="load the weights as bfloat16 (default: as stored)")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="use less memory but more time")
    parser.add_argument("--rank", type=count, default=16, help="rank of the adapters (default: %(default)s)")
    parser.add_argument("--epochs", type=number(float), default=1.0, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=count, default=8, help="per process (default: %(default)s)")
    parser.add_argument("--gradient-accumulation", type=count, default=1, help="batches per step (default: 1)")
    parser.add_argument("--learning-rate", type=number(float, most=1), help="(default: depends on the model's width)")
    parser.add_argument("--max-length", type=count, help="tokens of a conversation (default: the model's positions)")
    parser.add_argument(
        "--ask", type=count, default=32, help="answers to generate for evaluation (default: %(default)s)"
    )
    parser.add_argument(
        "--save-steps",
        type=save_steps,
        default=0.25,
        help="save and evaluate after this many, or this fraction, of the steps (default: %(default)s)",
    )
    parser.add_argument("--seed", type=number(int, 2**32 - 1, above=-1), default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.four_bit and not is_bitsandbytes_available():
        parser.error("--4bit needs bitsandbytes: pip install bitsandbytes")
    try:
        finetune(arguments)
    except (BadData, FileExistsError, FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (KeyboardInterrupt, OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(
            error
        ):  # torch's error when it cannot write a file
            raise
        is_interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if is_interrupted else f"a file could not be read or written: {error}"
        hint = ": resume with --resume" if (arguments.output / SETTINGS).exists() else ""
        parser.exit(130 if is_interrupted else 2, f"\n{parser.prog}: {reason}{hint}\n")


if __name__ == "__main__":
    main()
