"""Says what it takes to run a model: GPUs, memory and disk for each way, and what one token reads.

python scripts/plan.py DIRECTORY
python scripts/plan.py DIRECTORY --memory 640 --gpu-memory 80 --gpus 1 --tokens 32768

Everything is counted from DIRECTORY/config.json; the weights need not be there, and nothing is loaded.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

from checkpoint_files import FP8_BLOCK, CheckpointError, Tensor, expected_shapes, read_config, scale_shape, weight_block


GB, GIB = 1e9, 2**30
# The share of a GPU's memory for weights and cache; bytes of the machine's memory for the system and the process.
GPU_SHARE, RESERVED = 0.9, 4 * GB
# Bytes of a weight in nf4 with double quantisation: 4 bits, 8 bits for 64 weights and 32 bits for 256 of those.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
NF4 = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)'
VISION_LINEAR = re.compile(r"vision_model\.transformer\..*(proj|fc\d)\.weight|vit_large_projector\.weight")
# GB a second: an NVMe drive, the memory of a server, and that of an H100.
RATES = {"disk": 3, "memory": 200, "gpu": 3000}
NOTE = """Sizes are in GB. With less memory ("from disk"), experts are read again. Tokens a second are an estimate and a
limit from the bytes that a token reads and assumed rates. On a CPU, fp8 is slower: it is dequantised at each use."""
HEADER = ("", "GPUs", "GB each", "memory", "disk", "fits", "reads: disk", "memory", "GPU", "tokens/s")


def is_expert(name: str) -> bool:
    return ".moe." in name and not name.endswith(".gate.weight")


def is_read(name: str) -> bool:
    """Whether every token reads a weight whole: not experts, the encoder, nor embeddings."""
    return not (is_expert(name) or name.startswith(("vision_model.", "vit_", "model.embed_tokens.")))


def count_bytes(config) -> dict[str, dict[str, float]]:
    """Bytes of each weight, by its released name: as stored and in other types, with scales."""
    width, sizes = {"float64": 8, "float32": 4}.get(str(config.dtype).removeprefix("torch."), 2), {}
    for name, shape in expected_shapes(config).items():
        if config.get_text_config().tie_word_embeddings and name == "model.embed_tokens.weight":
            continue  # it is the head
        size, in_layer = math.prod(shape), Tensor(name, name, Path(), "BF16", shape).is_fp8_in_release
        fp8 = size + 4 * math.prod(scale_shape(shape, FP8_BLOCK)) if in_layer else 2 * size
        sizes[name] = {"stored": fp8 if weight_block(config) else width * size, "bfloat16": 2 * size, "fp8": fp8}
        sizes[name]["nf4"] = NF4_BYTES * size if in_layer or VISION_LINEAR.fullmatch(name) else 2 * size
    return sizes


def place(sizes: dict[str, dict[str, float]], kind: str, cache: float, capacity: float) -> list[float]:
    """
    Bytes on each GPU when whole layers, with `cache` bytes for each, fill GPUs of `capacity` bytes one after another.
    `kind` is the type of the weights, as in `count_bytes`.
    """
    layers: dict[str, float] = {}
    for name in sorted(sizes, key=lambda name: name.startswith("model.")):  # the encoder comes first
        layer = re.match(r".*?layers\.\d+|.*", name)[0]
        layers[layer] = layers.get(layer, cache if layer.startswith("model.layers.") else 0.0) + sizes[name][kind]
    gpus = [0.0]
    for size in layers.values():
        if gpus[-1] and gpus[-1] + size > capacity:
            gpus.append(0.0)
        gpus[-1] += size
    return gpus


def make_plan(directory: Path, machine: argparse.Namespace) -> dict:
    """
    The bytes of the model in `directory`, and what each way to run it needs and reads for a token. `machine` has
    `memory` and `gpu_memory` (of each GPU) in bytes, the number of `gpus`, the `tokens` in the cache, and the `rates`
    of `disk`, `memory` and `gpu` in bytes a second.

    Raises:
        `CheckpointError`: if the config is not a valid one of Step3.
    """
    config = read_config(directory)
    sizes, text, is_fp8 = count_bytes(config), config.get_text_config(), weight_block(config) is not None
    cache = 2 * 2 * text.num_attention_groups * text.head_dim * text.num_hidden_layers * machine.tokens
    plan, capacity = {"bytes": {}, "cache_bytes": cache, "ways": []}, GPU_SHARE * machine.gpu_memory
    for kind in ("stored", "bfloat16", "fp8", "nf4"):
        experts = sum(size[kind] for name, size in sizes.items() if is_expert(name))
        plan["bytes"][kind] = {
            "weights": sum(size[kind] for size in sizes.values()),
            "experts": experts,
            "experts that a token reads": experts * text.moe_top_k / text.moe_num_experts,
            "all else that a token reads": sum(size[kind] for name, size in sizes.items() if is_read(name)),
        }

    def add(name: str, gpus: int, gpu_bytes: float, memory: float, disk: float, reads: dict, options: str) -> None:
        way = {"name": name, "gpus": gpus, "gpu_bytes": gpu_bytes, "memory": memory, "disk": disk, "reads": reads}
        way["fits"] = gpus <= machine.gpus and gpu_bytes <= capacity
        way["tokens_per_second"] = 1 / sum(size / machine.rates[source] for source, size in reads.items())
        plan["ways"].append({**way, "call": f"AutoModelForImageTextToText.from_pretrained({options}"})

    # Memory keeps what every token reads, if it fits, and as many experts as fit beside it.
    stored, experts, chosen, rest = plan["bytes"]["stored"].values()
    for gpus, name, placement in ((0, "mapped, CPU", ""), (1, "mapped, one GPU", ', device_map={"": 0}')):
        in_memory = 0 if gpus else rest + cache
        room = machine.memory - RESERVED - in_memory
        from_disk = chosen * (1 - min(max(room, 0) / max(experts, 1), 1)) + (rest if room < 0 and not gpus else 0)
        reads = {"disk": from_disk, "memory": chosen + in_memory - from_disk, "gpu": rest + cache - in_memory}
        options = f'"{directory}", dtype="auto", experts_implementation="mapped"{placement})'
        add(name, gpus, gpus * (stored - experts + cache), RESERVED + in_memory + experts, stored, reads, options)

    plain = 'dtype=torch.bfloat16, device_map="auto"'
    dequantized = ", quantization_config=FineGrainedFP8Config(dequantize=True)" * is_fp8
    ways = {"bfloat16": f'"{directory}", {plain}{dequantized})', "fp8": f'"{directory}", {plain})'}
    if not is_fp8:
        convert = f"step3 convert {directory} {directory}-fp8 --dtype fp8"
        ways["fp8"] = f'"{directory}-fp8", {plain})  # after {convert}'
        ways["nf4"] = f'"{directory}", {plain}, quantization_config={NF4})'
    for kind, options in ways.items():
        gpus = place(sizes, kind, cache / text.num_hidden_layers, capacity)
        weights, _, chosen, rest = plan["bytes"][kind].values()
        disk, reads = weights if kind == "fp8" else stored, {"gpu": chosen + rest + cache}
        add(f"GPUs, {kind}", len(gpus), max(gpus), RESERVED, disk, reads, options)

    # Each rank holds a part of every layer, with whole experts, and all that is not split.
    styles = {"lm_head": "colwise", **{f"model.{name}": style for name, style in text.base_model_tp_plan.items()}}
    patterns = [f"{name}.weight" for name, style in styles.items() if style in ("colwise", "rowwise")]
    split = [name for name in sizes if is_expert(name) or any(fnmatch(name, pattern) for pattern in patterns)]
    counts = [n for n in (2, 4, 8, 16, 32, 64) if text.num_attention_heads % n == text.moe_num_experts % n == 0]
    weights, _, chosen, rest = plan["bytes"]["bfloat16"].values()
    for ranks in counts:
        saved = 1 - 1 / ranks
        gpu_bytes = weights - saved * sum(sizes[name]["bfloat16"] for name in split) + cache
        if gpu_bytes <= capacity or ranks == counts[-1]:
            read = rest - saved * sum(sizes[name]["bfloat16"] for name in split if is_read(name)) + cache
            read += chosen / min(ranks, text.moe_top_k)  # at best, no two of them on one rank
            options = f'"{directory}", dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_size={ranks})'
            options += f"{dequantized})  # in a script that torchrun --nproc-per-node {ranks} runs"
            add("tensor parallel", ranks, gpu_bytes, RESERVED, stored, {"gpu": read}, options)
            break
    return plan


def find_gpus() -> list[float]:
    """The memory of each NVIDIA GPU, in GiB."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return [int(line) / 1024 for line in lines if line.isdecimal()]


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def describe_plan(plan: dict) -> str:
    """The plan in GB of 10^9 bytes."""
    kinds = plan["bytes"]
    parts = [(part, *(f"{kinds[kind][part] / GB:.3g}" for kind in kinds)) for part in kinds["stored"]]
    ways = [HEADER]
    for way in plan["ways"]:
        sizes = [way["gpu_bytes"], way["memory"], way["disk"], *(way["reads"].get(source, 0) for source in RATES)]
        each, memory, disk, *reads = (f"{size / GB:.3g}" for size in sizes)
        fits = "no" if not way["fits"] else "from disk" if way["reads"].get("disk") else "yes"
        ways.append(
            (way["name"], str(way["gpus"]), each, memory, disk, fits, *reads, f"{way['tokens_per_second']:.3g}")
        )
    calls = "\n".join(f"{way['name']}: {way['call']}" for way in plan["ways"])
    return f"{table([('GB', *kinds), *parts])}\n\n{table(ways)}\n\n{NOTE}\n\n{calls}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="with a config.json")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for option, kind, default, text in (
        ("--memory", float, total / GIB, "the machine's, in GiB (default: this one's, %(default).0f)"),
        ("--gpu-memory", float, None, "of each GPU, in GiB (default: this machine's, or else 80)"),
        ("--gpus", int, None, "how many there are (default: as here, or with --gpu-memory as many as needed)"),
        ("--tokens", int, 8192, "tokens in the cache (default: %(default)s)"),
        *((f"--{source}-rate", float, rate, "GB a second (default: %(default)s)") for source, rate in RATES.items()),
    ):
        parser.add_argument(option, type=kind, default=default, help=text)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, in bytes")
    machine, found = parser.parse_args(), find_gpus()
    rates = [getattr(machine, f"{source}_rate") for source in RATES]
    sizes = [machine.memory, *rates, *([] if machine.gpu_memory is None else [machine.gpu_memory])]
    if not all(0 < size < math.inf for size in sizes) or machine.tokens < 0 or (machine.gpus or 0) < 0:
        parser.error("memory and rates must be above 0, --gpus and --tokens at least 0")
    if machine.gpus is None:
        machine.gpus = math.inf if machine.gpu_memory else len(found)
    machine.gpu_memory = (machine.gpu_memory or min(found, default=80)) * GIB
    machine.memory *= GIB
    machine.rates = {source: rate * GB for source, rate in zip(RATES, rates, strict=True)}
    try:
        plan = make_plan(machine.directory, machine)
    except CheckpointError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(json.dumps(plan, indent=2) if machine.json else describe_plan(plan))


if __name__ == "__main__":
    main()
