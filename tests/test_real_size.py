"""Mapped experts at the released dimensions, in sparse files of zeros, each in a process whose memory is its own."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run
from make_sparse_model import make_sparse_model

from step3_vl import Step3VLConfig


MEMORY = 4e9  # no more may be private to the process: an expert layer takes 10.6 GB in bfloat16, 5.3 in fp8
PROGRAM = """
import json, sys, time, torch
import step3_vl
from transformers import AutoModelForImageTextToText

directory, kind = sys.argv[1:]
start = time.perf_counter()
options = {"dtype": torch.bfloat16, "experts_implementation": "mapped"}
model = AutoModelForImageTextToText.from_pretrained(directory, **options).eval()
result = {"opening": time.perf_counter() - start}
inputs = {"input_ids": torch.tensor([[5]])}
if kind == "picture":
    pixels = torch.zeros(1, 3, 728, 728, dtype=torch.bfloat16)
    inputs = {"input_ids": torch.tensor([[5, *[model.config.image_token_id] * 169, 5]]), "pixel_values": pixels}
if kind != "open":
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=1).logits
    assert logits.shape == (1, 1, 128815) and not logits.any()
    result["computing"] = time.perf_counter() - start
lines = [line.split() for line in open("/proc/self/smaps_rollup")]
result["private"] = next(1024 * int(line[1]) for line in lines if line[0] == "Anonymous:")
print(json.dumps(result))
"""
needs_linux = pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's memory maps")


@needs_linux
@pytest.mark.parametrize(
    "kind, layers, fp8",
    [
        ("open", None, False),
        ("picture", 2, False),
        ("picture", 2, True),
        pytest.param("token", None, False, marks=pytest.mark.real_size),
    ],
)
def test_experts_take_no_memory(kind, layers, fp8, tmp_path):
    config = Step3VLConfig()
    if layers:  # of either tower
        config = Step3VLConfig(text_config={"num_hidden_layers": layers}, vision_config={"num_hidden_layers": 1})
    start = time.perf_counter()
    make_sparse_model(tmp_path / "model", config, fp8)
    seconds = {"making": time.perf_counter() - start}
    command = [sys.executable, "-c", PROGRAM, tmp_path / "model", kind]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seconds |= json.loads(result.stdout)
    private = seconds.pop("private")
    print(f"{private / 1e9:.2f} GB,", ", ".join(f"{what} {took:.1f} s" for what, took in seconds.items()))
    assert private < MEMORY


def test_a_file_system_that_cannot_is_named(tmp_path):
    script = ROOT / "scripts" / "develop" / "make_sparse_model.py"
    command = f"ulimit -f 1000; exec {sys.executable} {script} {tmp_path / 'model'} --layers 2 --vision-layers 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 2 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    again = run("make_sparse_model.py", tmp_path / "model")
    assert again.returncode == 2 and "exists already" in again.stderr
