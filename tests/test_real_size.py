"""Mapped experts at the released dimensions, in sparse files of zeros, each in a process whose memory is its own."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, python, run
from make_sparse_model import make_sparse_model

from step3_vl import Step3VLConfig


MEMORY = 4e9  # no more may be private to the process; the experts of a layer take 10.6 GB, or 5.3 in fp8
# With part of the layers, there is time for a small picture.
PROGRAM = """
import json, sys, time, torch
import step3_vl
from transformers import AutoModelForImageTextToText

directory, part = sys.argv[1:]
times = [time.perf_counter()]
options = {"dtype": torch.bfloat16, "experts_implementation": "mapped"}
model = AutoModelForImageTextToText.from_pretrained(directory, **options)
times.append(time.perf_counter())
inputs = {"input_ids": torch.tensor([[5]])}
if part == "part":
    decoder, encoder = model.model.language_model, model.model.vision_model.transformer
    decoder.layers, encoder.layers = decoder.layers[3:5], encoder.layers[:1]
    inputs["input_ids"] = torch.tensor([[5, *[model.config.image_token_id] * 16, 5]])
    inputs["pixel_values"] = torch.zeros(1, 3, 224, 224, dtype=torch.bfloat16)
with torch.no_grad():
    logits = model(**inputs, logits_to_keep=1, use_cache=False).logits
times.append(time.perf_counter())
assert logits.shape == (1, 1, 128815) and not logits.any()
lines = [line.split() for line in open("/proc/self/smaps_rollup")]
private = next(1024 * int(line[1]) for line in lines if line[0] == "Anonymous:")
print(json.dumps({"private": private, "opening": times[1] - times[0], "computing": times[2] - times[1]}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads Linux's memory maps")
@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("part", ["part", pytest.param("whole", marks=pytest.mark.real_size)])
def test_experts_take_no_memory(part, fp8, tmp_path):
    start = time.perf_counter()
    make_sparse_model(tmp_path / "model", Step3VLConfig(), fp8)
    making = time.perf_counter() - start
    result = python("-c", PROGRAM, tmp_path / "model", part)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    seconds = {"making": making, "opening": seen["opening"], "computing": seen["computing"]}
    print(f"{seen['private'] / 1e9:.2f} GB,", ", ".join(f"{what} {took:.1f} s" for what, took in seconds.items()))
    assert seen["private"] < MEMORY


def test_a_file_system_that_cannot_is_named(tmp_path):
    script = ROOT / "scripts" / "develop" / "make_sparse_model.py"
    command = f"ulimit -f 1000; exec {sys.executable} {script} {tmp_path / 'model'} --layers 2 --vision-layers 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 2 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    again = run("make_sparse_model.py", tmp_path / "model")
    assert again.returncode == 2 and "exists already" in again.stderr
