"""Compares the speed of this package with the original algorithm, vLLM and the machine's limits, in one run.

python scripts/develop/benchmark.py decode --dtype bfloat16 --batch 1 8 32 --compile --vllm DIRECTORY --plot decode.png
python scripts/develop/benchmark.py all --json results.json
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
)
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from step3_vl import Step3TextConfig, Step3VisionEncoderConfig, Step3VLConfig, Step3VLImageProcessor, Step3VLModel
from step3_vl.generation_step3 import CACHE_NAME


sys.path.append(str(Path(__file__).parents[1]))
from files import replacing, write_bytes, write_json


SCRIPTS = Path(__file__).parents[1]
FUSIONS = ("step3_qkv", "step3_gate_up")
TABLE_MARK = "`benchmark.py --table`"
STEPS = 17  # tokens to generate when decoding is timed
CHECKED = 48  # tokens of the prompts that check vLLM's answers
TEXT_SIZES = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "share_q_dim": 64,
        "moe_num_experts": 8,
        "moe_intermediate_size": 64,
        "share_expert_dim": 64,
        "vocab_size": 512,
    },
    "medium": {  # 2.1 G weights, of which a token reads 0.36 G; with vLLM, 10 GB in bfloat16
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "head_dim": 128,
        "share_q_dim": 1024,
        "moe_num_experts": 48,
        "moe_intermediate_size": 1024,
        "share_expert_dim": 1024,
        "vocab_size": 8192,
    },
    "real-layer": {},  # the released dimensions; in bfloat16, a layer's experts take 10.6 GB, the rest 5.4 GB
}
VISION_SIZES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "output_hidden_size": 32,
        "image_size": 112,
    },
    "medium": {"num_hidden_layers": 2},
    "real-layer": {"num_hidden_layers": 2},
}


# The original algorithm, written plainly, on the same weights ---------------------------------------------------------


def original_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Copies the key/value head for each query head."""
    copies = query.shape[1] // key.shape[1]
    key, value = (states.repeat_interleave(copies, dim=1) for states in (key, value))
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def original_experts(self, hidden_states, top_k_index, top_k_weights):
    """Runs every expert, chosen or not."""
    output = torch.zeros_like(hidden_states)
    chosen = nn.functional.one_hot(top_k_index, self.num_experts).permute(2, 1, 0)
    for expert in range(self.num_experts):
        slot, token = torch.where(chosen[expert])
        gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
        states = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        output.index_add_(0, token, states * top_k_weights[token, slot, None])
    return output


ALL_ATTENTION_FUNCTIONS.register("original", original_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("original", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
ALL_EXPERTS_FUNCTIONS.register("original", original_experts)


def on_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def as_original(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the original algorithm, sharing its weights."""
    original = on_same_weights(model)
    original.set_attn_implementation("original")
    original.set_experts_implementation("original")
    return original


# Measuring ------------------------------------------------------------------------------------------------------------


class Machine:
    """The device's speed at reading memory and multiplying matrices, and a clock that waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        self.buffer = torch.randn(1 << (30 if device.type == "cuda" else 27), device=device)
        side = 8192 if device.type == "cuda" else 2048
        self.square = torch.randn(side, side, device=device)

    def seconds(self, call: Callable) -> float:
        self.wait()
        start = time.perf_counter()
        measured = call()
        self.wait()
        return measured if isinstance(measured, float) else time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds_per_byte(self) -> float:
        """Measured by summing 512 MB on a CPU; on a GPU by the fastest of several ways to read 4 GB."""
        return self.seconds(self.buffer.sum) / self.buffer.nbytes if self.device.type == "cpu" else self.best_reading()

    def best_reading(self) -> float:
        """Seconds per byte of the fastest of several ways to go through the memory; copying reads and writes."""
        first, second = self.buffer.chunk(2)
        ways = (self.buffer.sum, self.buffer.view(torch.int64).sum, partial(first.copy_, second))
        return min(self.seconds(way) for way in ways for _ in range(3)) / self.buffer.nbytes

    def seconds_per_flop(self, dtype: torch.dtype) -> float:
        """Measured by one product of large square matrices; on a GPU by the fastest of three."""
        square = self.square.to(dtype)
        repeats = 1 if self.device.type == "cpu" else 3
        return min(self.seconds(lambda: square @ square) for _ in range(repeats)) / (2 * len(square) ** 3)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


@dataclass
class Case:
    """Something to measure, compared with the case whose name has `original` as `what` and is otherwise the same."""

    name: dict[str, str | int]  # values of the table's columns
    call: Callable[[], float | object]  # runs it once; a float is its time in seconds
    work: float  # least number of bytes to read, or of operations


def measure(machine: Machine, cases: list[Case], seconds_of_work: Callable[[], float], repeats: int) -> list[dict]:
    """
    Times the cases alternately, with `seconds_of_work`, the machine's least time for a unit of work, before each call.
    The rows have medians, lows and highs, and the medians of each repeat's ratios.
    """
    for case in cases:
        for _ in range(1 if machine.device.type == "cpu" else 3):  # a GPU loads its kernels at their first calls
            case.call()
    seconds_of_work()
    seconds, limits = [[] for _ in cases], [[] for _ in cases]
    for _ in range(repeats):
        for case, own, limit in zip(cases, seconds, limits, strict=True):
            limit.append(seconds_of_work() * case.work)
            own.append(machine.seconds(case.call))
    rows = []
    for case, own, limit in zip(cases, seconds, limits, strict=True):
        row = {**case.name, "seconds": statistics.median(own), "low": min(own), "high": max(own)}
        row["limit_seconds"] = statistics.median(limit)
        beside = {"of_limit": limit}
        for other, its_own in zip(cases, seconds, strict=True):
            if other.name == {**case.name, "what": "original"}:
                beside["against_original"] = its_own
        for ratio, others in beside.items():
            row[ratio] = statistics.median(other / mine for other, mine in zip(others, own, strict=True))
        rows.append(row)
    return rows


def make_text_model(size: str, dtype: torch.dtype, machine: Machine, options: argparse.Namespace) -> PreTrainedModel:
    """A random model on the device, always the same. On a CPU at the released dimensions, only the weights that select
    experts are random. The others are zero, which is faster to create and takes as long to read."""
    sizes = dict(TEXT_SIZES[size])
    if size == "real-layer":
        sizes["num_hidden_layers"] = 1 + options.layers
    if options.experts:
        sizes["moe_num_experts"] = options.experts
    config = Step3TextConfig(**sizes)  # all layers but the first have experts
    torch.manual_seed(0)
    if size != "real-layer":
        with machine.device:
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with machine.device, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("embed_tokens.weight", "moe.gate.weight")):
            parameter.normal_()
        elif machine.device.type == "cuda":  # which multiplies zeros faster
            parameter.normal_(float(parameter.ndim == 1), 0.02)
        else:
            parameter.fill_(parameter.ndim == 1)
    return model


def variants(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, PreTrainedModel]:
    """The models to measure, by name, with equal weights."""
    models = {"original": as_original(model)} if options.original else {}
    models["package"] = model
    if options.fuse:
        models["package, fused"] = on_same_weights(model)
        models["package, fused"].fuse(*FUSIONS)
    if options.offload:
        with tempfile.TemporaryDirectory(dir=options.directory) as folder:
            model.save_pretrained(folder)
            for what in options.offload:
                models[f"package, {what}"] = type(model).from_pretrained(
                    folder, dtype=model.dtype, **placements(model)[what]
                )
    return models


def placements(model: PreTrainedModel) -> dict[str, dict]:
    """Arguments of `from_pretrained` that leave the experts of a text model elsewhere than on its device."""
    device = 0 if model.device.type == "cuda" else "cpu"
    device_map = {"lm_head": device}
    device_map |= {f"model.{name}": device for name, _ in model.model.named_children() if name != "layers"}
    for number, layer in enumerate(model.model.layers):
        for name, _ in layer.named_children():
            device_map[f"model.layers.{number}.{name}"] = "cpu" if name == "moe" else device
    return {
        "mapped": {"experts_implementation": "mapped", "device_map": {"": device}},
        "accelerate": {"device_map": device_map},  # copies all experts for each token
    }


def active_weights(model: PreTrainedModel, tokens: int) -> tuple[float, float]:
    """The number of weights that a pass of `tokens` tokens reads, and the number multiplied for each token."""
    config = model.config.get_text_config()
    share = config.moe_top_k / config.moe_num_experts
    read = multiplied = 0
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name
        if "embed_tokens" not in name:
            read += parameter.numel() * (1 - (1 - share) ** tokens if is_expert else 1)
            multiplied += parameter.numel() * (share if is_expert else 1)
    return read, multiplied


def fill(cache, model: PreTrainedModel, batch: int, context: int):
    """Fills each layer of the cache with `context` random keys and values."""
    config = model.config
    shape = (batch, config.num_attention_groups, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, device=model.device, dtype=model.dtype)
        cache.update(keys, keys.clone(), layer)
    return cache


class Clock(StoppingCriteria):
    """Records the time of each token."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.times = []

    def __call__(self, input_ids, scores, **kwargs):
        self.machine.wait()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class VLLM:
    """vLLM with a model, in its own environment and process."""

    def __init__(self, home: Path, model: PreTrainedModel, length: int, directory: Path | None):
        self.folder = tempfile.TemporaryDirectory(dir=directory)
        model.save_pretrained(self.folder.name)
        self.log = tempfile.TemporaryFile("w+")
        dtype = str(model.dtype).removeprefix("torch.")
        command = [home / "venv" / "bin" / "python", Path(__file__).with_name("vllm_worker.py")]
        command += [self.folder.name, dtype, length]
        self.process = subprocess.Popen(
            ["bash", "-c", 'source "$1"; shift; exec "$@"', "-", home / "env.sh", *map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        self.read()

    def read(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            sys.exit(f"vLLM stopped:\n{self.log.read()[-3000:]}")
        return line

    def answer(self, ids: torch.Tensor) -> dict:
        """Answers prompts (rows, tokens): `answers`, and the `seconds` of a decoding step."""
        print(json.dumps({"prompts": ids.tolist(), "tokens": STEPS}), file=self.process.stdin, flush=True)
        return json.loads(self.read())

    def check_answers(self, model: PreTrainedModel) -> None:
        """Compares its answers with the package's. They may differ by rounding; otherwise its times mean nothing."""
        ids = torch.randint(10, model.config.vocab_size, (4, CHECKED), device=model.device)
        answers = torch.tensor(self.answer(ids)["answers"], device=model.device)
        logits = model(torch.cat([ids, answers], 1)[:, :-1], logits_to_keep=STEPS).logits.float()
        chosen = logits.gather(-1, answers[..., None])[..., 0]
        below = ((logits.amax(-1) - chosen) / logits.std(-1).clamp(min=1e-6)).max().item()
        equal = (logits.argmax(-1) == answers).float().mean().item()
        print(f"vLLM's tokens: {equal:.0%} are the package's, others up to {below:.3f} standard deviations below")
        if below > 0.5:
            sys.exit("vLLM's answers differ from the package's.")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def benchmark_decode(machine: Machine, options: argparse.Namespace, size: str, dtype: torch.dtype) -> list[dict]:
    """Decoding a token in `generate`, for each number of rows with the first context, and for each context with the
    first number of rows."""
    plain = make_text_model(size, dtype, machine, options)
    config = plain.config
    models = variants(plain, options)
    compile_config = CompileConfig(mode="default" if machine.device.type == "cpu" else "reduce-overhead")
    compile_config._compile_all_devices = True
    counts = [(options.context[0], batch) for batch in options.batch]
    counts += [(context, options.batch[0]) for context in options.context[1:]]
    vllm = None
    if options.vllm:
        vllm = VLLM(options.vllm, plain, max(*options.context, CHECKED) + STEPS + 1, options.directory)
        vllm.check_answers(plain)

    def step(model, ids, make_cache, **kwargs):
        clock = Clock(machine)
        cache = fill(make_cache(), model, len(ids), ids.shape[1] - 1)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.steps,
            min_new_tokens=options.steps,
            do_sample=False,
            stopping_criteria=[clock],
            **{CACHE_NAME: cache},
            **kwargs,
        )
        return statistics.median(after - before for before, after in pairwise(clock.times))

    cases = []
    for context, batch in counts:
        ids = torch.randint(10, config.vocab_size, (batch, context + 1), device=machine.device)
        cached = 2 * batch * context * config.num_hidden_layers * config.head_dim * dtype.itemsize
        work = active_weights(plain, batch)[0] * dtype.itemsize + cached
        name = {"context": context, "batch": batch}
        for what, model in models.items():
            make_cache = partial(DynamicCache, config=config)
            call = partial(step, model, ids, make_cache, disable_compile=True)
            cases.append(Case({**name, "what": what}, call, work))
            if options.compile and what != "original":
                make_cache = partial(StaticCache, config=config, max_cache_len=context + options.steps + 1)
                call = partial(step, model, ids, make_cache, compile_config=compile_config)
                cases.append(Case({**name, "what": f"{what}, compiled"}, call, work))
        if vllm:
            cases.append(Case({**name, "what": "vLLM"}, lambda ids=ids: vllm.answer(ids)["seconds"], work))
    rows = measure(machine, cases, machine.seconds_per_byte, options.repeats)
    if vllm:
        vllm.close()
    return [{**row, "tokens_per_second": row["batch"] / row["seconds"]} for row in rows]


def attention_flops(config: Step3TextConfig, context: int) -> float:
    """Operations per token of a prompt; a token attends to half of it on average."""
    return 2 * context * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def benchmark_prefill(machine: Machine, options: argparse.Namespace, size: str, dtype: torch.dtype) -> list[dict]:
    """A prompt of `context` tokens with the last token's logits. Of several rows, all but the first are padded."""
    plain = make_text_model(size, dtype, machine, options)
    models = variants(plain, options)
    head = plain.lm_head.weight.numel()
    multiplied = active_weights(plain, 1)[1] - head
    cases = []
    for context in options.context:
        for batch in options.batch:
            ids = torch.randint(10, plain.config.vocab_size, (batch, context), device=machine.device)
            mask = torch.ones_like(ids)
            mask[1:, : context // 4] = 0
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "logits_to_keep": 1}
            work = batch * (context * (2 * multiplied + attention_flops(plain.config, context)) + 2 * head)
            for what, model in models.items():
                name = {"context": context, "batch": batch, "what": what}
                cases.append(Case(name, partial(model, **inputs), work))
    rows = measure(machine, cases, partial(machine.seconds_per_flop, dtype), options.repeats)
    return [{**row, "tokens_per_second": row["batch"] * row["context"] / row["seconds"]} for row in rows]


def benchmark_vision(machine: Machine, options: argparse.Namespace, size: str, dtype: torch.dtype) -> list[dict]:
    """Images with six patches each, encoded together and one square at a time."""
    vision_config = Step3VisionEncoderConfig(**VISION_SIZES[size])
    config = Step3VLConfig(
        text_config={**TEXT_SIZES["tiny"], "vocab_size": 1024, "num_hidden_layers": 1, "moe_layers_enum": "0"},
        vision_config=vision_config,
        image_token_id=7,
    )
    torch.manual_seed(0)
    with machine.device:
        model = Step3VLModel.from_pretrained(
            None, config=config, state_dict={}, dtype=dtype, device_map=machine.device
        ).eval()
    count = options.pictures
    view_side = vision_config.image_size
    patch_side = view_side * 9 // 13 // 28 * 28  # 504 for 728
    views = torch.randn(count, 3, view_side, view_side, device=machine.device, dtype=dtype)
    patches = torch.randn(6 * count, 3, patch_side, patch_side, device=machine.device, dtype=dtype)
    counts = torch.tensor([6] * count, device=machine.device)

    def one_at_a_time():
        for squares in (views, patches):
            for square in squares:
                model.project(model.vision_model(square[None]).last_hidden_state)

    squares = {view_side: count, patch_side: 6 * count}
    flops = 0
    for side, number in squares.items():
        rows = (side // vision_config.patch_size) ** 2 + 4
        weights = vision_config.hidden_size * (4 * vision_config.hidden_size + 2 * vision_config.intermediate_size)
        flops += number * vision_config.num_hidden_layers * rows * (2 * weights + 4 * rows * vision_config.hidden_size)
    cases = [Case({"what": "original"}, one_at_a_time, flops)] if options.original else []
    cases.append(Case({"what": "package"}, partial(model.get_image_features, views, patches, counts), flops))
    rows = measure(machine, cases, partial(machine.seconds_per_flop, dtype), options.repeats)
    return [{**row, "pictures_per_second": count / row["seconds"]} for row in rows]


def plain_pixels(processor: Step3VLImageProcessor, picture: Image.Image) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The global view of an RGB image and its patches, computed one square at a time."""
    plan = processor.plan(*picture.size)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (processor.image_mean, processor.image_std))

    def finish(square: Image.Image, side: int) -> torch.Tensor:
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() * processor.rescale_factor
        pixels = ((pixels - mean) / std)[None]
        return nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True, align_corners=False)

    if plan.padded_size != picture.size:
        padded = Image.new("RGB", plan.padded_size)
        padded.paste(picture)
        picture = padded
    if plan.view_size != picture.size:
        picture = picture.resize(plan.view_size, Image.Resampling.BILINEAR)
    view = finish(picture, processor.size["height"])
    cut = picture.resize(plan.cut_size, Image.Resampling.BILINEAR)
    corners = [(column * plan.window, row * plan.window) for row in range(plan.rows) for column in range(plan.columns)]
    squares = (cut.crop((left, top, left + plan.window, top + plan.window)) for left, top in corners)
    return view, [finish(square, processor.patch_size) for square in squares]


def benchmark_preprocess(machine: Machine, options: argparse.Namespace, *_) -> list[dict]:
    """Preprocessing on the CPU: one image of 3024 x 3024 pixels, with 36 patches, and eight of 1000 x 700."""
    processor = Step3VLImageProcessor()

    def one_at_a_time(pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
        views, patches = zip(*(plain_pixels(processor, picture) for picture in pictures), strict=True)
        return torch.cat(views), torch.cat([patch for own in patches for patch in own])

    noise = np.random.default_rng(0)
    cases = []
    for name, size, count in (("3024 x 3024", (3024, 3024), 1), ("8 of 1000 x 700", (700, 1000), 8)):
        pictures = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]
        outputs = processor(pictures, return_tensors="pt")
        views, patches = one_at_a_time(pictures)
        if not (torch.equal(outputs["pixel_values"], views) and torch.equal(outputs["patch_pixel_values"], patches)):
            sys.exit("The package's pixels differ from the plain computation's.")
        work = 3 * count * size[0] * size[1] + views.nbytes + patches.nbytes
        cases.append(Case({"pictures": name, "what": "original"}, partial(one_at_a_time, pictures), work))
        call = partial(processor, pictures, return_tensors="pt")
        cases.append(Case({"pictures": name, "what": "package"}, call, work))
    return measure(machine, cases, machine.seconds_per_byte, options.repeats)


def benchmark_train(machine: Machine, options: argparse.Namespace, size: str, dtype: torch.dtype) -> list[dict]:
    """A forward and backward pass over `context` tokens."""
    plain = make_text_model(size, dtype, machine, options).train()
    models = [("original", as_original(plain))] * options.original + [("package", plain)]
    multiplied = active_weights(plain, 1)[1]

    @torch.enable_grad()
    def step(model, ids):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    cases = []
    for context in options.context:
        for batch in options.batch:
            ids = torch.randint(10, plain.config.vocab_size, (batch, context), device=machine.device)
            work = 3 * batch * context * (2 * multiplied + attention_flops(plain.config, context))
            for what, model in models:
                name = {"context": context, "batch": batch, "what": what}
                cases.append(Case(name, partial(step, model, ids), work))
    rows = measure(machine, cases, partial(machine.seconds_per_flop, dtype), options.repeats)
    return [{**row, "tokens_per_second": row["batch"] * row["context"] / row["seconds"]} for row in rows]


# Converting and loading -----------------------------------------------------------------------------------------------


# The sizes of the checkpoint to load.
LOADED = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "head_dim": 128,
    "share_q_dim": 512,
    "moe_num_experts": 32,
    "moe_intermediate_size": 1024,
    "share_expert_dim": 1024,
}
LOADED_LAYER_BYTES = 2 * 3 * LOADED["moe_num_experts"] * LOADED["hidden_size"] * LOADED["moe_intermediate_size"]
# A fresh process reads weights from the disk. It touches every page, because weights may be memory-mapped.
READ = """
import os, sys, time
from pathlib import Path
from safetensors.torch import load_file
import step3_vl
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
logging.disable_progress_bar()
paths = list(Path(sys.argv[2]).glob("*.safetensors"))
for path in paths:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
start = time.perf_counter()
if sys.argv[1] == "safetensors":
    tensors = [tensor for path in paths for tensor in load_file(path).values()]
else:
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
    tensors = list(model.parameters())
for tensor in tensors:
    tensor.detach().view(-1)[::1024].sum()
print(time.perf_counter() - start)
"""


def run(*command) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout


def benchmark_load(machine: Machine, options: argparse.Namespace, *_) -> list[dict]:
    """Rewriting a checkpoint in other shards, compared with `cp`, and loading it, compared with safetensors alone."""
    seconds = {name: [] for name in ("cp and sync", "rewrite", "safetensors", "from_pretrained")}
    convert = (sys.executable, SCRIPTS / "convert_checkpoint.py")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        folder = Path(folder)
        layers = 1 + max(round(options.gigabytes * 1e9 / LOADED_LAYER_BYTES), 1)
        sizes = {**LOADED, "num_hidden_layers": layers, "moe_layers_enum": "null"}
        settings = [f"--set=text_config.{name}={value}" for name, value in sizes.items()]
        run(sys.executable, SCRIPTS / "tiny" / "make_random_model.py", folder / "whole", *settings, "--dtype=bfloat16")
        source, target = folder / "source", folder / "target"
        run(*convert, folder / "whole", source, "--max-shard-size", "1GB")
        run("rm", "-r", folder / "whole")
        tasks = {
            "cp and sync": ("sh", "-c", f"cp -r '{source}' '{target}' && sync '{target}'/*"),
            "rewrite": (*convert, source, target, "--max-shard-size", "700MB"),
        }
        for _ in tqdm(range(options.repeats), desc="Measuring"):
            for name, command in tasks.items():
                run("sync")
                seconds[name].append(machine.seconds(lambda command=command: run(*command)))
                run("rm", "-r", target)
            for name in ("safetensors", "from_pretrained"):
                seconds[name].append(float(run(sys.executable, "-W", "ignore", "-c", READ, name, source)))
    limits = {"rewrite": "cp and sync", "from_pretrained": "safetensors"}
    rows = []
    for name, own in seconds.items():
        rows.append({"what": name, "seconds": statistics.median(own), "low": min(own), "high": max(own)})
        if name in limits:
            rows[-1]["of_limit"] = statistics.median(seconds[limits[name]]) / rows[-1]["seconds"]
    return rows


# The command line -----------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "decode": benchmark_decode,
    "prefill": benchmark_prefill,
    "vision": benchmark_vision,
    "preprocess": benchmark_preprocess,
    "load": benchmark_load,
    "train": benchmark_train,
}
LIMITS = dict.fromkeys(("prefill", "vision", "train"), "products") | dict.fromkeys(("decode", "preprocess"), "reading")


def print_table(name: str, rows: list[dict]) -> None:
    names = ("size", "dtype", "pictures", "context", "batch", "what")
    columns, table = (*names, "ms", "spread", "of limit", "x original"), []
    for row in rows:
        cells = {column: str(row.get(column, "")) for column in names}
        cells["ms"] = f"{row['seconds'] * 1e3:.1f}"
        cells["spread"] = f"{row['low'] * 1e3:.1f} to {row['high'] * 1e3:.1f}"
        cells["of limit"] = f"{row['of_limit']:.2f}" if "of_limit" in row else ""
        cells["x original"] = f"{row['against_original']:.2f}" if "against_original" in row else ""
        table.append(cells)
    columns = [column for column in columns if any(cells[column] for cells in table)]
    widths = {column: max(len(column), *(len(cells[column]) for cells in table)) for column in columns}
    print(f"\n{name}" + (f" (limit: {LIMITS[name]})" if name in LIMITS else ""))
    for cells in [{column: column for column in columns}, *table]:
        print("  ".join(cells[column].rjust(widths[column]) for column in columns))


def decode_table(rows: list[dict], machine: Machine) -> str:
    """Tokens per second over all rows, as a Markdown table."""
    first = rows[0]
    rows = [row for row in rows if all(row[name] == first[name] for name in ("size", "dtype", "context"))]
    counts = list(dict.fromkeys(row["batch"] for row in rows))
    cells = {(row["what"], row["batch"]): f"{row['tokens_per_second']:.1f}" for row in rows}
    limits = {row["batch"]: row["batch"] / row["limit_seconds"] for row in rows}
    cells |= {("reading memory alone", batch): f"{limit:.1f}" for batch, limit in limits.items()}
    title = f"{machine.name}, {first['dtype']}, {first['size']}, {first['context']} tokens before"
    lines = [[title, *(f"{count} row{'s' * (count > 1)}" for count in counts)], ["---"] * (1 + len(counts))]
    lines += [[what, *(cells[what, count] for count in counts)] for what in dict.fromkeys(what for what, _ in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def update_table(path: Path, rows: list[dict], machine: Machine) -> None:
    """Replaces the table below the line with `TABLE_MARK` in a Markdown file."""
    lines = path.read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if TABLE_MARK in line) + 1
    rest = lines[start:]
    while rest and (not rest[0] or rest[0].startswith("|")):
        rest.pop(0)
    text = "\n".join([*lines[:start], "", decode_table(rows, machine), "", *rest])
    write_bytes(path, f"{text.rstrip()}\n".encode())


def plot(path: Path, rows: list[dict], machine: Machine) -> None:
    """Plots the tokens per second of decoding against the number of rows and the context."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        sys.exit("`--plot` needs matplotlib: pip install matplotlib")
    first = rows[0]
    rows = [row for row in rows if row["size"] == first["size"] and row["dtype"] == first["dtype"]]
    names = list(dict.fromkeys(row["what"] for row in rows))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, (across, fixed) in zip(panels, (("batch", "context"), ("context", "batch")), strict=True):
        shown = [row for row in rows if row[fixed] == first[fixed]]
        ticks = list(dict.fromkeys(row[across] for row in shown))
        for what in names:
            points = [(row[across], row["tokens_per_second"]) for row in shown if row["what"] == what]
            axes.plot(*zip(*points, strict=True), marker=".", label=what)
        limits = {row[across]: row["batch"] / row["limit_seconds"] for row in shown}
        axes.plot(limits.keys(), limits.values(), color="gray", linestyle="--", label="reading memory alone")
        label = {"batch": "rows", "context": "tokens before"}
        axes.set(xlabel=f"{label[across]} ({label[fixed]}: {first[fixed]})", xscale="log")
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="tokens per second")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Decoding: {machine.name}, {first['dtype']}, {first['size']}", fontsize=10)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "all"])
    parser.add_argument("--sizes", nargs="+", choices=TEXT_SIZES, default=["medium"], help="(default: medium)")
    parser.add_argument("--layers", type=positive, default=1, help="MoE layers of real-layer (default: 1)")
    parser.add_argument("--experts", type=positive, help="experts per MoE layer (default: the size's)")
    parser.add_argument("--pictures", type=positive, default=8, help="images to encode (default: 8)")
    parser.add_argument("--no-original", dest="original", action="store_false", help="leave out the original algorithm")
    parser.add_argument("--fuse", action="store_true", help="also measure the fused model")
    parser.add_argument(
        "--offload", nargs="+", choices=("mapped", "accelerate"), default=[], help="also measure experts on the CPU"
    )
    parser.add_argument(
        "--vllm", type=Path, metavar="DIRECTORY", help="also measure vLLM; made by scripts/develop/engines.sh"
    )
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--context", nargs="+", type=positive, default=[512], help="tokens before (default: 512)")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1], help="rows (default: 1)")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled decoding step")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if available)")
    parser.add_argument("--steps", type=positive, default=STEPS, help=f"tokens to decode (default: {STEPS})")
    parser.add_argument("--repeats", type=positive, default=11, help="(default: 11)")
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the weights to load (default: 4)")
    parser.add_argument("--directory", type=Path, help="for temporary files (default: the system's)")
    parser.add_argument("--json", type=Path, help="file for all results")
    parser.add_argument("--plot", type=Path, help="PNG file for a plot of decoding; needs matplotlib")
    parser.add_argument("--table", type=Path, help="Markdown file whose table of decoding to replace")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    names = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no CUDA device")
    for option in ("plot", "table", "vllm"):
        if getattr(options, option) and "decode" not in names:
            parser.error(f"--{option} is only for decode")
    if options.vllm and not (options.vllm / "env.sh").is_file():
        parser.error(f"{options.vllm} has no env.sh; create it with scripts/develop/engines.sh")
    if options.table and TABLE_MARK not in (options.table.read_text() if options.table.is_file() else ""):
        parser.error(f"{options.table} must be a file that contains {TABLE_MARK}")
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path.absolute().parent} is not a directory")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    machine = Machine(torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")))
    print(f"{machine.name}; torch {torch.__version__}, transformers {transformers.__version__}")
    results = {}
    for name in names:
        sized = name not in ("preprocess", "load")
        cases = [(size, dtype) for size in options.sizes for dtype in options.dtype] if sized else [(None, None)]
        results[name] = []
        for size, dtype in tqdm(cases, desc=name):
            rows = BENCHMARKS[name](machine, options, size, getattr(torch, dtype) if dtype else None)
            results[name] += [row | ({"size": size, "dtype": dtype} if sized else {}) for row in rows]
            torch._dynamo.reset()
        print_table(name, results[name])
    if options.json:
        measured = {"machine": machine.name, "torch": torch.__version__, "transformers": transformers.__version__}
        write_json(options.json, {**measured, "command": sys.argv[1:], "results": results})
    if options.table:
        update_table(options.table, results["decode"], machine)
    if options.plot:
        plot(options.plot, results["decode"], machine)


if __name__ == "__main__":
    main()
