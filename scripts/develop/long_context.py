"""Trains step3-tiny for long contexts, asks it for needles in them, and measures what they cost.

python scripts/develop/long_context.py train DIRECTORY
python scripts/develop/long_context.py needle DIRECTORY --lengths 1024 16384 65280
python scripts/develop/long_context.py growth --size real-layer --lengths 4096 16384 65536 --mapped

A haystack is text with one to four pictures in it; the question is about one of them.
"""

import argparse
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments
from transformers.utils import logging

from step3_vl import Step3BoundedCache, Step3VLProcessor


sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tiny")]
import benchmark
from describe import TINY
from draw_dialogue import MAX_PICTURES, Turn, messages_of
from draw_scene import Scene, draw_scene
from evaluate_tiny import generate_answers
from files import new_directory, save_whole
from train_tiny import MAX_QUESTIONS, Collator, LessonTrainer, MuonAndAdamW, draw_hints, sample_of


LONGEST = 65_536
TRAINED = 512, 4096  # tokens of the haystacks in training; their positions reach up to LONGEST
STEPS, BATCH_SIZE = 3000, 8
WORDS = {
    "adjective": ("old", "quiet", "wooden", "early", "broken", "gentle", "narrow", "distant"),
    "noun": ("river", "garden", "letter", "window", "market", "engine", "winter", "story", "bridge", "teacher"),
    "verb": ("follows", "forgets", "carries", "answers", "repairs", "borrows", "watches", "leaves"),
}
DEPTHS = 0.0, 0.25, 0.5, 0.75, 1.0


class Haystack:
    """Draws haystacks by seed, of about as many tokens of `processor` as asked for."""

    def __init__(self, processor: Step3VLProcessor):
        self.processor = processor
        self.lengths: dict[str, int] = {}  # of sentences, in tokens

    def draw(self, seed: int, length: int, depth: float | None = None, questions: int = 1) -> list[Turn]:
        """
        A conversation about a picture at a depth from 0, the start of the text, to 1, its end, drawn if `None`; further
        `questions` are about any of the pictures.
        """
        choose = random.Random(f"haystack {seed} {length} {depth}")
        scenes = [draw_scene(choose.getrandbits(40)) for _ in range(choose.randint(1, MAX_PICTURES))]
        depths = [choose.random() if depth is None else depth, *(choose.random() for _ in scenes[1:])]
        needle, depths = sorted(depths).index(depths[0]), sorted(depths)
        texts, left = [], length - 50 - 25 * len(scenes)
        while left > 0:
            adjective, verb, *nouns = (choose.choice(WORDS[name]) for name in ("adjective", "verb", "noun", "noun"))
            texts.append(f"The {adjective} {nouns[0]} {verb} the {nouns[1]}.")
            if texts[-1] not in self.lengths:
                ids = self.processor.tokenizer(f" {texts[-1]}", add_special_tokens=False)["input_ids"]
                self.lengths[texts[-1]] = len(ids)
            left -= self.lengths[texts[-1]]
        content, start = [], 0
        for scene, place in zip(scenes, depths, strict=True):
            end = round(place * len(texts))
            content += [" ".join(texts[start:end])] * (end > start) + [scene]
            start = end
        content += [" ".join(texts[start:])] * (start < len(texts))
        turns = []
        for number in [needle, *choose.choices(range(len(scenes)), k=questions - 1)]:
            text, answer = choose.choice(list(scenes[number].questions.values()))
            question = f"In picture {number + 1}: {text}"
            turns.append(Turn((*content, question), "picture N", question, answer, len(scenes), number))
            content = []
        return turns


class Haystacks(Dataset):
    """Conversations by seed for training, those of a batch of about the same length, with hints of what is shown."""

    def __init__(self, processor: Step3VLProcessor, length: int):
        self.haystack, self.length = Haystack(processor), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        shortest, longest = TRAINED
        share = random.Random(index // BATCH_SIZE).random() ** 2
        turns = self.haystack.draw(index, round(shortest * (longest / shortest) ** share), questions=MAX_QUESTIONS)
        scenes = [part for part in turns[0].content if isinstance(part, Scene)]
        return {**sample_of(turns), "hints": draw_hints(random.Random(index), scenes)}


class GapCollator(Collator):
    """
    Adds `position_ids` (batch, tokens) that leave positions out after some sentences, so that short haystacks reach up
    to LONGEST.
    """

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(samples)
        positions = batch["attention_mask"].cumsum(-1) - 1
        stops = batch["input_ids"] == self.processor.tokenizer.convert_tokens_to_ids(".")
        weights = torch.rand(stops.shape) * stops.roll(1, -1) * (batch["labels"] == -100)
        room = (LONGEST - 64 - positions[:, -1:]) * torch.rand(len(stops), 1)
        gaps = room * weights.cumsum(-1) / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        return {**batch, "position_ids": positions.clamp(min=0) + gaps.long()}


def train(options: argparse.Namespace) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    text = model.config.text_config
    text.output_router_logits, text.max_position_embedding, text.max_seq_len = True, LONGEST, LONGEST
    processor.tokenizer.model_max_length = LONGEST
    with tempfile.TemporaryDirectory() as unfinished:
        arguments = TrainingArguments(
            unfinished,
            max_steps=options.steps,
            per_device_train_batch_size=BATCH_SIZE,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": options.steps * 4 // 10},
            warmup_steps=min(100, options.steps // 10),
            bf16=torch.cuda.is_available(),
            save_strategy="no",
            logging_steps=50,
            report_to=[],
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_num_workers=options.workers,
        )
        trainer = LessonTrainer(
            model,
            arguments,
            train_dataset=Haystacks(processor, options.steps * BATCH_SIZE),
            data_collator=GapCollator(processor),
            processing_class=processor,
            optimizers=(MuonAndAdamW(model), None),
        )
        trainer.train()
    text.output_router_logits = False
    vars(model.config).pop("use_cache", None)  # set by `Trainer`
    save_whole(options.directory, model, processor)


@torch.no_grad()
def needle(options: argparse.Namespace) -> None:
    """Prints the share of right answers by the length and the needle's depth."""
    device = 0 if torch.cuda.is_available() else "cpu"
    loading = {"dtype": options.dtype, "device_map": device}
    model = AutoModelForImageTextToText.from_pretrained(options.directory, **loading).eval()
    processor = AutoProcessor.from_pretrained(options.directory)
    haystack, right = Haystack(processor), {}
    for length, depth in tqdm([(length, depth) for length in options.lengths for depth in DEPTHS]):
        right[length, depth] = 0
        for seed in range(options.questions):
            turns = haystack.draw(10**9 + seed, length, depth)
            conversation = messages_of(turns)[:-1]
            answers = generate_answers(model, processor, [conversation], prefill_chunk_size=options.chunk)
            right[length, depth] += 100 * (answers[0] == turns[0].answer) / options.questions
    print("| tokens | " + " | ".join(f"{depth:.0%}" for depth in DEPTHS) + " |")
    print("| --- |" + " --- |" * len(DEPTHS))
    for length in options.lengths:
        print(f"| {length:,} | {' | '.join(f'{right[length, depth]:.0f}' for depth in DEPTHS)} |")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Appends the most gigabytes that were allocated beyond those at the start; on a CPU, sampled."""
    peak = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append((torch.cuda.max_memory_allocated(device) - before) / 1e9)
        return
    process, stop = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def sample():
        nonlocal most
        while not stop.wait(0.005):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
    peak.append((most - before) / 1e9)


@torch.no_grad()
def growth(options: argparse.Namespace) -> None:
    """Prints seconds and peak memory of a prompt and its first token, by length and by how it is read."""
    machine = benchmark.Machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    del machine.buffer, machine.square
    settings = argparse.Namespace(layers=options.layers, experts=None)
    model = benchmark.make_text_model(options.size, getattr(torch, options.dtype), machine, settings)
    model.config.max_position_embedding = LONGEST + 1
    chunk = options.chunk or 2048
    make_bounded = partial(Step3BoundedCache, model.config, 4 * chunk, keep=4)
    ways = {
        "whole": (model, {}, None),
        f"in chunks of {chunk:,}": (model, {"prefill_chunk_size": chunk}, None),
        f"in chunks, the last {4 * chunk:,} tokens kept": (model, {"prefill_chunk_size": chunk}, make_bounded),
    }
    print(f"{machine.name}; {options.size}, {model.config.num_hidden_layers} layers, {options.dtype}")
    print(f"{1e-9 * sum(p.nbytes for p in model.parameters()):.1f} GB of weights\n")
    print("| prompt | " + " | ".join(f"{length:,}" for length in options.lengths) + " |")
    print("| --- |" + " --- |" * len(options.lengths))

    def measure(name, model, arguments, make_cache):
        cells = []
        for length in options.lengths:
            ids = torch.randint(10, model.config.vocab_size, (1, length), device=machine.device)
            run = partial(model.generate, ids, max_new_tokens=1, do_sample=False, **arguments)
            seconds = []
            for _ in range(1 + options.repeats):
                if make_cache:
                    run.keywords["past_key_values"] = make_cache()
                try:
                    with peak_memory(machine.device) as peak:
                        seconds.append(machine.seconds(run))
                except torch.OutOfMemoryError:
                    break
            cells.append(f"{min(seconds[1:]):.2f} s, {peak[0]:.2f} GB" if len(seconds) > 1 else "out of memory")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)

    for name, way in ways.items():
        measure(name, *way)
    if options.mapped:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            kind, dtype, placement = type(model), model.dtype, benchmark.placements(model)["mapped"]
            del model, ways, way, make_bounded
            torch.cuda.empty_cache()
            mapped = kind.from_pretrained(folder, dtype=dtype, **placement).eval()
            for name, arguments in ("whole", {}), (f"in chunks of {chunk:,}", {"prefill_chunk_size": chunk}):
                measure(f"{name}, experts mapped", mapped, arguments, None)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    each = commands.add_parser("train", help="train step3-tiny for long contexts")
    each.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    each.add_argument("--steps", type=int, default=STEPS, help="(default: %(default)s)")
    each.add_argument("--workers", type=int, default=1, help="processes that draw haystacks (default: %(default)s)")
    each = commands.add_parser("needle", help="ask for needles, and print a table")
    each.add_argument("directory", type=Path, help="a model that `train` made")
    each.add_argument("--questions", type=int, default=10, help="for each length and depth (default: 10)")
    each.add_argument("--dtype", default="float32", help="(default: float32)")
    each.add_argument("--chunk", type=int, help="tokens of the prompt to read at a time (default: all)")
    each.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65280], help="in tokens")
    each = commands.add_parser("growth", help="measure seconds and memory of prompts")
    each.add_argument("--size", choices=benchmark.TEXT_SIZES, default="medium", help="(default: medium)")
    each.add_argument("--layers", type=int, default=1, help="MoE layers of real-layer (default: 1)")
    each.add_argument("--dtype", default="bfloat16", help="(default: bfloat16)")
    each.add_argument("--chunk", type=int, help="tokens of the prompt to read at a time (default: 2048)")
    each.add_argument("--mapped", action="store_true", help="also measure experts that are mapped to the CPU")
    each.add_argument("--repeats", type=int, default=1, help="after a first run (default: 1)")
    each.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 65536], help="in tokens")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    {"train": train, "needle": needle, "growth": growth}[options.command](options)


if __name__ == "__main__":
    main()
