"""Fine-tunes a Step3-VL model on conversations with images, by TRL's trainers.

python scripts/finetune.py --model_name_or_path MODEL --dataset_name DATA --output_dir OUTPUT --merge
python scripts/finetune.py --config recipe.yaml --method dpo
accelerate launch --config_file scripts/fsdp2.yaml scripts/finetune.py --config recipe.yaml

Takes the options of TRL's `SFTConfig`, `DPOConfig` or `KTOConfig` and of its `ModelConfig`, and those below. Writes the
adapter to OUTPUT/adapter, or with `--use_peft false` the model to OUTPUT/model, and with --merge the whole model to
OUTPUT/merged. `conversations.py` describes the data, which is checked before the model is loaded.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from conversations import BadData
from datasets import Dataset
from files import replacing, save_whole, write_json
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from training_data import CHUNK, METHODS, Sample, load_processor, read_samples
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CompressedTensorsConfig,
    EarlyStoppingCallback,
    FineGrainedFP8Config,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from step3_vl import Step3VLConfig, Step3VLImageProcessor, Step3VLProcessor


SUMMARY = __doc__.split("\n", 1)[0]
TRAINERS = dict(zip(METHODS, ((SFTTrainer, SFTConfig), (DPOTrainer, DPOConfig), (KTOTrainer, KTOConfig)), strict=True))
# The layers for each word of --target, as patterns of their names.
TARGETS = {
    "attention": r".*\.layers\.\d+\.self_attn\.(q_proj|wq|k_proj|v_proj|o_proj)",
    "mlp": r".*\.layers\.\d+\.(mlp|share_expert)\.(gate_proj|up_proj|down_proj)",
    "experts": r".*\.moe\.experts\.\d+\.(gate_proj|up_proj|down_proj)",
    "vision": r".*vision_model\..*\.(qkv_proj|out_proj|fc1|fc2)|.*\.vit_large_projector",
}
# How weights that are stored in these forms are loaded.
DEQUANTIZED = {"fp8": FineGrainedFP8Config, "compressed-tensors": CompressedTensorsConfig}
# The layers to train in full for words that the model never generates.
VOCABULARY = ["embed_tokens", "lm_head"]
# The best learning rate falls with the model's width: Schulman et al., "LoRA Without Regret" (2025), fitted it for text
# models as 5e-4 * (2000 / width) ** 0.78 (the exponent is between 0.775 and 0.781).
RATE, WIDTH, EXPONENT = 5e-4, 2000, 0.78
# Defaults that differ from TRL's: nothing is truncated, weights keep their type, and the last step is saved.
DEFAULTS = {
    "use_peft": True,
    "dtype": "auto",
    "lora_dropout": 0.0,
    "max_length": None,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "save_steps": 0.25,
    "eval_steps": 0.25,
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_total_limit": 2,
    "dataloader_num_workers": 4 if torch.cuda.is_available() else 0,
}
# The least and the greatest value of options that mean nothing outside.
RANGES = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (1, 10**6)),
    **dict.fromkeys(("gradient_accumulation_steps", "max_length", "max_pixels", "lora_r", "lora_alpha"), (1, 10**9)),
    **dict.fromkeys(("num_train_epochs", "save_steps", "eval_steps"), (1e-9, 10**6)),
    "learning_rate": (1e-12, 1),
    "lora_dropout": (0, 0.99),
    "seed": (0, 2**32 - 1),
    "max_patches": (0, 10**6),
    "ask": (0, 10**9),
    "early_stopping_patience": (1, 10**6),
}
# What is written in the output besides the trainer's checkpoints.
PARTS = ("data", "adapter", "model", "merged")
# Without --eval_dataset, one conversation in HELD_OUT is used for evaluation, at most MAX_HELD_OUT in all.
HELD_OUT, MAX_HELD_OUT = 20, 200
# Answers to print at each evaluation, and how many more tokens than the right answer they may have.
NUM_SHOWN, MORE_TOKENS = 3, 16
# The start of options' names that may change when a training is resumed.
NOT_COMPARED = ("output_dir", "resume", "merge", "ask", "log", "report_to", "run_name", "dataloader", "disable_tqdm")
# The type of each column of the data that a trainer or an evaluation reads.
TEXT, IDS = pa.large_string(), pa.large_list(pa.int32())
COLUMNS = {"images": pa.list_(TEXT), "input_ids": IDS, "num_prompt": pa.int32()}
METHOD_COLUMNS = {
    "sft": {"labels": IDS},
    "dpo": dict.fromkeys(("prompt", "chosen", "rejected"), TEXT),
    "kto": {"prompt": TEXT, "completion": TEXT, "label": pa.bool_()},
}


@dataclass
class Options:
    """The options that are not TRL's."""

    dataset_name: str = field(metadata={"help": "file or directory of training conversations"})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "those for evaluation (default: part of the data)"}
    )
    method: str = field(
        default="sft", metadata={"choices": METHODS, "help": "what to learn from: answers or preferences"}
    )
    target: str = field(
        default="attention,mlp", metadata={"help": f"what adapters train, of {','.join((*TARGETS, 'vocabulary'))}"}
    )
    lora_kwargs: str | dict | None = field(default=None, metadata={"help": "other options of LoraConfig, as JSON"})
    merge: bool = field(default=False, metadata={"help": "also save the merged model"})
    resume: bool = field(default=False, metadata={"help": "resume an interrupted training, or merge it"})
    on_fault: str = field(
        default="stop", metadata={"choices": ["stop", "skip"], "help": "skip leaves faulty rows out and lists them"}
    )
    max_pixels: int | None = field(default=None, metadata={"help": "pixels of an image; larger ones are scaled down"})
    max_patches: int | None = field(default=None, metadata={"help": "patches of an image"})
    ask: int = field(default=32, metadata={"help": "answers to generate at each evaluation"})
    early_stopping_patience: int | None = field(default=None, metadata={"help": "worse evaluations before it stops"})

    def __post_init__(self):
        self.targets = self.target.split(",")
        if wrong := set(self.targets) - {*TARGETS, "vocabulary"}:
            raise ValueError(f"--target must be a list of {','.join((*TARGETS, 'vocabulary'))}, got {min(wrong)!r}")
        if isinstance(self.lora_kwargs, str):
            self.lora_kwargs = json.loads(self.lora_kwargs)


class Collator(DataCollatorForLanguageModeling):
    """TRL's collator of tokens and labels, which also prepares the images of the samples."""

    def __init__(self, processor: Step3VLProcessor, **options):
        super().__init__(processor.tokenizer.pad_token_id, **options)
        self.image_processor = processor.image_processor

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        return super().torch_call(examples) | pixels_of(examples, self.image_processor)


def pixels_of(samples: list[dict], image_processor: Step3VLImageProcessor) -> dict[str, torch.Tensor]:
    """The model's inputs for the images of samples."""
    images = [image for sample in samples for image in sample["images"]]
    inputs = image_processor(image_processor.fetch_images(images), return_tensors="pt") if images else {}
    return {name: inputs[name] for name in image_processor.model_input_names if name in inputs}


def collate_with_all_inputs(examples: list[dict], collator, image_processor: Step3VLImageProcessor) -> dict:
    """
    A batch in which missing images and patches are empty tensors. If weights are split over processes, all of these
    must run the vision encoder equally often.
    """
    sides = {"pixel_values": image_processor.size["height"], "patch_pixel_values": image_processor.patch_size}
    empty = {name: torch.zeros(0, 3, side, side) for name, side in sides.items()}
    return {**empty, "num_patches": torch.zeros(0, dtype=torch.long), **collator(examples)}


class WholeLogitsTrainer(SFTTrainer):
    """
    Computes the loss from the model's logits. TRL multiplies by the head's weight itself; if that is split over
    processes, its gradient then lacks what the others learn.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


class AskQuestions(TrainerCallback):
    """Generates the last answers of some samples at each evaluation, and evaluates after the last step."""

    def __init__(self, samples: Dataset, processor: Step3VLProcessor, batch_size: int):
        self.samples, self.processor, self.batch_size = samples, processor, batch_size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    @torch.no_grad()
    def on_evaluate(self, args, state, control, model, **kwargs):
        # Every process generates the same answers, because the weights may be split over the processes.
        tokenizer, answers, truths = self.processor.tokenizer, [], []
        for start in range(0, len(self.samples), self.batch_size):
            samples = self.samples.select(range(start, min(start + self.batch_size, len(self.samples)))).to_list()
            prompts = [sample["input_ids"][: sample["num_prompt"]] for sample in samples]
            right = [sample["input_ids"][sample["num_prompt"] :] for sample in samples]
            inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
            inputs.update(pixels_of(samples, self.processor.image_processor))
            inputs = inputs.to(args.device)
            output = model.generate(**inputs, max_new_tokens=max(map(len, right)) + MORE_TOKENS, do_sample=False)
            answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            truths += tokenizer.batch_decode(right, skip_special_tokens=True)
        if not state.is_world_process_zero:
            return
        right = sum(answer.strip() == truth.strip() for answer, truth in zip(answers, truths, strict=True))
        print(f"\nafter step {state.global_step}: {right} of {len(truths)} answers are the same, word for word")
        for answer, truth in list(zip(answers, truths, strict=True))[:NUM_SHOWN]:
            print(f"  answer: {answer}\n  truth:  {truth}")


def rows_of(sample: Sample, method: str) -> list[dict]:
    """A sample as rows of the data; a pair of answers is two for KTO."""
    row = {"images": sample.images, "input_ids": sample.input_ids, "num_prompt": sample.num_prompt}
    if method == "sft":
        labels = [token if learned else -100 for token, learned in zip(sample.input_ids, sample.learned, strict=True)]
        return [{**row, "labels": labels}]
    row["prompt"] = sample.prompt
    if method == "dpo":
        return [{**row, "chosen": sample.answer, "rejected": sample.rejected}]
    rows = [{**row, "completion": sample.answer, "label": sample.label is not False}]
    return rows + [{**row, "completion": sample.rejected, "label": False}] * (sample.rejected is not None)


def write_samples(path: Path, data: str, options: Options, max_length: int | None, processor, faults: list) -> int:
    """
    Checks conversations and writes them as an Arrow file, from which `datasets` reads without loading all of it.
    Returns the number of its rows.
    """
    schema = pa.schema({**COLUMNS, **METHOD_COLUMNS[options.method]})
    samples = read_samples(Path(data), processor, faults, options.method, max_length)
    num_rows, num_images, num_tokens = 0, 0, 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while rows := [row for sample in islice(samples, CHUNK) for row in rows_of(sample, options.method)]:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            num_rows += len(rows)
            num_images += sum(len(row["images"]) for row in rows)
            num_tokens += sum(len(row["input_ids"]) for row in rows)
    print(f"{data}: {num_rows} conversations, {num_images} images, {num_tokens} tokens")
    return num_rows


def prepare_data(
    options: Options, output: Path, settings: dict, max_length: int | None, processor: Step3VLProcessor
) -> tuple[Dataset, Dataset | None]:
    """
    The data for training and evaluation. The first process checks it, and writes it to OUTPUT/data with the `settings`,
    unless it is there. Raises `BadData` if a conversation has an error, or an `OSError` if a file cannot be read.
    """
    if PartialState().is_main_process and not (output / "data").exists():
        faults = []
        try:
            with replacing(output / "data") as unfinished:
                unfinished.mkdir()
                files = {"train": options.dataset_name, "eval": options.eval_dataset}
                counts = [
                    write_samples(unfinished / f"{name}.arrow", data, options, max_length, processor, faults)
                    for name, data in files.items()
                    if data
                ]
                if faults and (options.on_fault == "stop" or 0 in counts):
                    raise BadData(faults)
                write_json(unfinished / "settings.json", settings)
                if faults:
                    left_out = "".join(f"{place}: {fault}\n" for place, fault in faults)
                    (unfinished / "left_out.txt").write_text(left_out)
        finally:
            with contextlib.suppress(OSError):
                output.rmdir()  # if nothing was written
    PartialState().wait_for_everyone()
    data = Dataset.from_file(str(output / "data" / "train.arrow"))
    if options.eval_dataset:
        return data, Dataset.from_file(str(output / "data" / "eval.arrow"))
    count = min(len(data) // HELD_OUT, MAX_HELD_OUT)
    if count == 0:
        return data, None
    parts = data.train_test_split(count, seed=settings["seed"])
    return parts["train"], parts["test"]


def load_model(options: Options, model_options: ModelConfig, config: Step3VLConfig, **kwargs) -> PreTrainedModel:
    """
    The model, on all GPUs in a single process; for several, the trainer places it. Experts with adapters are linear
    layers, as PEFT would otherwise make all of their changed weights anew in each step. Weights that are stored in fp8
    or by compressed-tensors are dequantised, since they cannot be trained on or merged into as they are.
    """
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method in DEQUANTIZED:
        if kwargs.get("quantization_config"):
            raise ValueError(f"the weights are stored by {method}, which --load_in_4bit or 8bit cannot quantise again")
        kwargs["quantization_config"] = DEQUANTIZED[method](dequantize=True)
    if PartialState().device.type == "cuda" and PartialState().num_processes == 1:
        kwargs.setdefault("device_map", "auto")
    if model_options.use_peft and "experts" in options.targets:
        kwargs["experts_implementation"] = "linear"
    return AutoModelForImageTextToText.from_pretrained(
        model_options.model_name_or_path, revision=model_options.model_revision, dtype=model_options.dtype, **kwargs
    )


def make_lora(options: Options, model_options: ModelConfig) -> LoraConfig | None:
    if not model_options.use_peft:
        return None
    if not model_options.lora_target_modules and not model_options.lora_target_parameters:
        model_options.lora_target_modules = "|".join(TARGETS[name] for name in options.targets if name in TARGETS) or []
        if "vocabulary" in options.targets:
            model_options.lora_modules_to_save = [*(model_options.lora_modules_to_save or []), *VOCABULARY]
    return replace(get_peft_config(model_options), **(options.lora_kwargs or {}))


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its state is the last file, but for other processes'."""
    for path in sorted(output.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((path / "trainer_state.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        if len(list(path.glob("rng_state*"))) == PartialState().num_processes:
            return path
    return None


def train(options: Options, training, model_options: ModelConfig, data: tuple, config, processor) -> None:
    """Trains from the start or the last complete checkpoint, and saves OUTPUT/adapter or OUTPUT/model."""
    (train_data, eval_data), output = data, Path(training.output_dir)
    trainer_class, is_split = TRAINERS[options.method][0], os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if training.use_cpu and is_split:
        PartialState().distributed_type = DistributedType.MULTI_GPU  # else accelerate splits nothing on a CPU
    if is_split and (not model_options.use_peft or "vocabulary" in options.targets):
        if options.method != "sft":
            raise ValueError(f"TRL's {options.method} does not train a head that is split over processes: use adapters")
        trainer_class = WholeLogitsTrainer
    model = load_model(
        options,
        model_options,
        config,
        attn_implementation=model_options.attn_implementation,
        quantization_config=get_quantization_config(model_options),
        **(training.model_init_kwargs or {}),
    )
    if is_split:
        model.model.max_encoder_bytes = {"cuda": 2**62}  # all images at a time, whatever their number
    text_config, callbacks = model.config.get_text_config(), []
    if training.router_aux_loss_coef is None and not text_config.output_router_logits:
        training.router_aux_loss_coef = 0.0  # TRL would add the load-balancing loss
    training.model_init_kwargs = None
    training.remove_unused_columns = False  # they are the collator's
    training.eval_strategy = training.eval_strategy if eval_data else "no"
    training.eval_on_start = training.eval_on_start and eval_data is not None
    if eval_data and options.ask:
        samples = eval_data.select(range(min(options.ask, len(eval_data))))
        callbacks.append(AskQuestions(samples, processor, training.per_device_eval_batch_size))
    if options.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
    collator = None
    if options.method == "sft":
        training.assistant_only_loss = False  # the labels are the answers already
        training.max_length = training.max_length if training.packing else None
        if any(any(data["images"]) for data in (train_data, eval_data) if data):
            training.dataset_kwargs = {"skip_prepare_dataset": True}
            collator = Collator(processor, pad_to_multiple_of=training.pad_to_multiple_of)
        else:  # without images, TRL packs
            keep = ["input_ids", "labels"]
            train_data, eval_data = (data and data.select_columns(keep) for data in (train_data, eval_data))
    trainer = trainer_class(
        model,
        args=training,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=processor,
        peft_config=make_lora(options, model_options),
        callbacks=callbacks,
    )
    if is_split:
        inputs = {"collator": trainer.data_collator, "image_processor": processor.image_processor}
        trainer.data_collator = partial(collate_with_all_inputs, **inputs)
    is_first = trainer.is_world_process_zero()
    if is_first and model_options.use_peft:
        trainer.model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint or last_checkpoint(output))
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trainer.model.parameters())
    print(f"process {PartialState().process_index} holds {held / 2**20:.2f} MiB of weights")
    # Every process gives its parts of the weights, and the first writes.
    state_dict = trainer.accelerator.get_state_dict(trainer.model)
    if is_first:
        model = trainer.model
        if not model_options.use_peft:
            # Not the trained model, whose class FSDP replaces and whose config the trainer changes.
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
            model.generation_config = trainer.model.generation_config
        with replacing(output / ("adapter" if model_options.use_peft else "model")) as unfinished:
            model.save_pretrained(unfinished, state_dict=state_dict)
            processor.save_pretrained(unfinished)
        (output / "README.md").unlink(missing_ok=True)  # TRL's, which is wrong for this model


def merge(options: Options, model_options: ModelConfig, output: Path, config, processor: Step3VLProcessor) -> None:
    """Merges OUTPUT/adapter into the stored weights and saves the whole model in OUTPUT/merged."""
    experts = {"experts_implementation": "linear"} if model_options.load_in_4bit or model_options.load_in_8bit else {}
    model_options.dtype = "auto"
    model = load_model(options, model_options, config, **experts)
    save_whole(output / "merged", PeftModel.from_pretrained(model, output / "adapter").merge_and_unload(), processor)


def digest(path: str | None) -> str | None:
    """A hash of a file, or of all files in a directory."""
    if path is None:
        return None
    total = hashlib.sha256()
    for file in sorted(Path(path).rglob("*")) if Path(path).is_dir() else [Path(path)]:
        if file.is_file():
            with file.open("rb") as opened:
                for block in iter(lambda: opened.read(2**20), b""):
                    total.update(block)
    return total.hexdigest()


def check_output(options: Options, training, model_options: ModelConfig) -> dict:
    """
    The options and hashes of the data, which must be the same when a training is resumed. Raises a `FileExistsError` if
    OUTPUT exists without `--resume` or the training is finished, or a `ValueError` if options or data have changed.
    """
    output = Path(training.output_dir)
    values = training.to_dict() | asdict(model_options) | asdict(options)
    values |= {name: digest(getattr(options, name)) for name in ("dataset_name", "eval_dataset")}
    values["num_processes"] = PartialState().num_processes
    settings = {name: value for name, value in values.items() if not name.startswith(NOT_COMPARED)}
    settings = json.loads(json.dumps(settings, default=str))
    if not options.resume and output.exists() and (not output.is_dir() or list(output.glob("[!.]*"))):
        raise FileExistsError(f"{output} exists already: use --resume, choose another directory or remove it")
    if (output / "data").exists():
        before = json.loads((output / "data" / "settings.json").read_text())
        if other := [name for name in settings if settings[name] != before.get(name)]:
            raise ValueError(
                f"the training in {output} began with another {' and '.join(other)}: use the same to resume"
            )
    elif options.resume:
        print(f"there is no training to resume in {output}: it begins")
    done = [name for name in ("adapter", "model") if (output / name).exists()]
    if done and (not options.merge or (output / "merged").exists()):
        raise FileExistsError(f"the training in {output} is finished")
    return settings


def finetune(options: Options, training, model_options: ModelConfig, config: Step3VLConfig) -> None:
    """Trains, merges, or both. Raises `BadData`, `OSError` or `ValueError` if the options, data or model are wrong."""
    output, settings = Path(training.output_dir), check_output(options, training, model_options)
    processor = load_processor(
        model_options.model_name_or_path,
        revision=model_options.model_revision,
        max_pixels=options.max_pixels,
        max_patches=options.max_patches,
    )
    if getattr(training, "chat_template_path", None):
        processor.chat_template, training.chat_template_path = Path(training.chat_template_path).read_text(), None
    PartialState().wait_for_everyone()  # before the first writes to the output
    if PartialState().is_main_process:  # left by a run that was killed
        for unfinished in (path for name in PARTS for path in output.glob(f".{name}-*")):
            shutil.rmtree(unfinished)
    max_length = training.max_length or config.get_text_config().longest_sequence
    data = prepare_data(options, output, settings, max_length, processor)
    if not (output / "adapter").exists() and not (output / "model").exists():
        train(options, training, model_options, data, config, processor)
        gc.collect()  # frees the model and its trainer, which refer to each other
    if options.merge and PartialState().is_main_process:
        merge(options, model_options, output, config, processor)


def check_numbers(*groups: object) -> None:
    """Raises a `ValueError` for numbers that mean nothing."""
    for name, (least, most) in RANGES.items():
        for group in groups:
            value = getattr(group, name, None)
            if value is not None and not least <= value <= most:
                raise ValueError(f"--{name} must be at least {least} and at most {most}, got {value}")


def parse_options() -> tuple[Options, SFTConfig | DPOConfig | KTOConfig, ModelConfig, Step3VLConfig]:
    """The options, with defaults that depend on the model. Raises a `ValueError` or `OSError` if they are not valid."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("config", "method", "model_name_or_path", "model_revision", "dtype"):
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    first.add_argument("--use_peft", "--use-peft", nargs="?", const=True)
    given = {name: value for name, value in vars(first.parse_known_args()[0]).items() if value is not None}
    if "config" in given:
        file = yaml.safe_load(Path(given["config"]).read_text())
        given = (file if isinstance(file, dict) else {}) | given
    method, defaults = given.get("method", "sft"), dict(DEFAULTS, use_cpu=PartialState().device.type == "cpu")
    if name := given.get("model_name_or_path"):
        name = str(Path(name).resolve()) if Path(name).is_dir() else name  # the adapter records it
        config = AutoConfig.from_pretrained(name, revision=given.get("model_revision", "main"))
        dtype = given.get("dtype", config.dtype)
        defaults["bf16"] = str(dtype).removeprefix("torch.") == "bfloat16"
        if method == "sft" and str(given.get("use_peft", True)).lower() in ("true", "yes", "1"):
            defaults["learning_rate"] = RATE * (WIDTH / config.get_text_config().hidden_size) ** EXPONENT
    parser = TrlParser((Options, TRAINERS.get(method, TRAINERS["sft"])[1], ModelConfig), description=SUMMARY)
    parser.set_defaults_with_config(**defaults)
    options, training, model_options = parser.parse_args_and_config()
    if model_options.model_name_or_path is None:
        raise ValueError("--model_name_or_path is required")
    if options.merge and not model_options.use_peft:
        raise ValueError("--merge is for adapters: with --use_peft false, the model is whole")
    model_options.model_name_or_path = name
    if model_options.load_in_4bit and model_options.dtype == "auto":
        model_options.dtype = "bfloat16"  # in which bitsandbytes computes
    check_numbers(options, training, model_options)
    return options, training, model_options, config


def main() -> None:
    program, output = Path(sys.argv[0]).name, None
    try:
        options, training, model_options, config = parse_options()
        output = Path(training.output_dir)
        finetune(options, training, model_options, config)
    except (BadData, FileExistsError, FileNotFoundError, ValueError, yaml.YAMLError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, OSError, SafetensorError, RuntimeError) as error:
        # torch's error when it cannot write a file
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        is_interrupted = isinstance(error, KeyboardInterrupt)
        reason = "interrupted" if is_interrupted else f"a file could not be read or written: {error}"
        hint = ": resume with --resume" if output and (output / "data").exists() else ""
        print(f"\n{program}: {reason}{hint}", file=sys.stderr)
        sys.exit(130 if is_interrupted else 2)


if __name__ == "__main__":
    main()
