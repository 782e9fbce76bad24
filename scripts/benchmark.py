"""Measures this package beside what bounds it, in one run.

python scripts/benchmark.py load
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm


SCRIPTS = Path(__file__).parent
# A model of one layer has these weights; each further layer has as many experts more.
WIDTHS = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "head_dim": 128,
    "share_q_dim": 512,
    "moe_num_experts": 32,
    "moe_intermediate_size": 1024,
    "share_expert_dim": 1024,
}
LAYER_BYTES = 2 * 3 * WIDTHS["moe_num_experts"] * WIDTHS["hidden_size"] * WIDTHS["moe_intermediate_size"]
# What a fresh process does with a directory of weights that are on the disk, not in memory. Every page is touched, as
# weights may be mapped, not read. Memory is counted with and without pages of the files, which the system takes back.
READ = """
import json, os, sys, threading, time
import torch
from pathlib import Path
from safetensors.torch import load_file
import step3_vl
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
logging.disable_progress_bar()
def bytes_used():
    lines = (line.split() for line in open("/proc/self/status"))
    used = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("RssAnon:", "VmRSS:")}
    return used["RssAnon:"], used["VmRSS:"]
def watch():
    while not done:
        used.append(bytes_used())
        time.sleep(0.005)
for path in Path(sys.argv[2]).glob("*.safetensors"):
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
before, used, done = bytes_used(), [], False
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
if sys.argv[1] == "safetensors":
    tensors = [tensor for path in Path(sys.argv[2]).glob("*.safetensors") for tensor in load_file(path).values()]
else:
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[2])
    tensors = list(model.parameters())
for tensor in tensors:
    tensor.detach().view(-1)[::1024].sum()
seconds = time.perf_counter() - start
done = True
watcher.join()
size = sum(tensor.nbytes for tensor in tensors)
private, total = ((max(peak) - start) / size for peak, start in zip(zip(*used), before))
print(json.dumps({"seconds": seconds, "private": private, "total": total}))
"""


def run(*command) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stderr}")
    return result.stdout


def seconds_of(*command) -> float:
    start = time.perf_counter()
    run(*command)
    return time.perf_counter() - start


def benchmark_load(gigabytes: float, repeats: int, directory: Path) -> dict[str, list[float]]:
    """
    Seconds of `cp`, which leaves it to the system when its copy gets to the disk, of `cp` until it is there, a rewrite
    into other shards and an adoption; of reading the weights with safetensors alone and with `from_pretrained`; and
    memory as a multiple of the weights. Interleaved.
    """
    names = ("cp", "cp and sync", "rewrite", "adopt", "safetensors", "from_pretrained", "private memory", "memory")
    measured = {name: [] for name in names}
    convert = (sys.executable, SCRIPTS / "convert_checkpoint.py")
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        folder = Path(folder)
        layers = 1 + max(round(gigabytes * 1e9 / LAYER_BYTES), 1)
        settings = [
            f"--set=text_config.{name}={size}" for name, size in {**WIDTHS, "num_hidden_layers": layers}.items()
        ]
        settings += ["--set=text_config.moe_layers_enum=null", "--dtype=bfloat16"]
        run(sys.executable, SCRIPTS / "make_random_model.py", folder / "whole", *settings)
        source, target = folder / "source", folder / "target"
        run(*convert, folder / "whole", source, "--max-shard-size", "1GB")
        run("rm", "-r", folder / "whole")
        tasks = {
            "cp": ("cp", "-r", source, target),
            "cp and sync": ("sh", "-c", f"cp -r '{source}' '{target}' && sync '{target}'/*"),
            "rewrite": (*convert, source, target, "--max-shard-size", "700MB"),
            "adopt": (*convert, source, target),
        }
        for _ in tqdm(range(repeats), desc="Measuring"):
            for name, command in tasks.items():
                run("sync")
                measured[name].append(seconds_of(*command))
                run("rm", "-r", target)
            for name in ("safetensors", "from_pretrained"):
                result = json.loads(run(sys.executable, "-W", "ignore", "-c", READ, name, source))
                measured[name].append(result["seconds"])
            measured["private memory"].append(result["private"])
            measured["memory"].append(result["total"])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="converting and loading a checkpoint")
    load.add_argument("--gigabytes", type=float, default=4, help="size of the weights (default: 4)")
    load.add_argument("--directory", type=Path, help="where to put them (default: where temporary files go)")
    load.add_argument("--repeats", type=int, default=3, help="(default: 3)")
    arguments = parser.parse_args()
    measured = benchmark_load(arguments.gigabytes, arguments.repeats, arguments.directory)
    median = {name: statistics.median(values) for name, values in measured.items()}
    print(f"{'median of ' + str(arguments.repeats):20}{'from':>8}{'to':>8}{'seconds':>9}")
    for name, values in measured.items():
        if "memory" not in name:
            print(f"{name:20}{min(values):8.2f}{max(values):8.2f}{median[name]:9.2f}")
    print(f"rewriting, of cp's rate: {median['cp'] / median['rewrite']:.2f}")
    print(f"rewriting, of the rate of cp and sync: {median['cp and sync'] / median['rewrite']:.2f}")
    print(f"from_pretrained, of safetensors' rate: {median['safetensors'] / median['from_pretrained']:.2f}")
    print(f"memory of from_pretrained, of the weights: {median['private memory']:.2f}")
    print(f"and with the files' own pages: {median['memory']:.2f}")


if __name__ == "__main__":
    main()
