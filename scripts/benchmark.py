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
# What a fresh process does with a directory of weights. Every page is touched, as weights are mapped, not read. Memory
# is counted without the pages of the files themselves, which the system takes back as it likes.
READ = """
import json, resource, sys, threading, time
import torch
from pathlib import Path
from safetensors.torch import load_file
import step3_vl
from transformers import AutoModelForImageTextToText
from transformers.utils import logging
logging.disable_progress_bar()
def private_bytes():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def watch():
    while not done:
        peak.append(private_bytes())
        time.sleep(0.005)
before, peak, done = private_bytes(), [], False
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
print(json.dumps({"seconds": seconds, "memory": (max(peak) - before) / size}))
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
    Seconds of `cp`, a rewrite into other shards and an adoption; of reading the weights with safetensors alone and with
    `from_pretrained`; and its memory as a multiple of the weights. Interleaved.
    """
    measured = {name: [] for name in ("cp", "rewrite", "adopt", "safetensors", "from_pretrained", "memory")}
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
            "rewrite": (*convert, source, target, "--max-shard-size", "700MB"),
            "adopt": (*convert, source, target),
        }
        for _ in tqdm(range(repeats), desc="Measuring"):
            for name, command in tasks.items():
                measured[name].append(seconds_of(*command))
                run("rm", "-r", target)
            for name in ("safetensors", "from_pretrained"):
                result = json.loads(run(sys.executable, "-W", "ignore", "-c", READ, name, source))
                measured[name].append(result["seconds"])
            measured["memory"].append(result["memory"])
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
        if name != "memory":
            print(f"{name:20}{min(values):8.2f}{max(values):8.2f}{median[name]:9.2f}")
    print(f"rewriting, of cp's rate: {median['cp'] / median['rewrite']:.2f}")
    print(f"from_pretrained, of safetensors' rate: {median['safetensors'] / median['from_pretrained']:.2f}")
    print(f"memory of from_pretrained, of the weights: {median['memory']:.2f}")


if __name__ == "__main__":
    main()
