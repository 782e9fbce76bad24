import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from conftest import ROOT, VLLM_HOME, assert_close, needs_vllm, python, run, weights_in
from describe import TINY
from PIL import Image


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.effect_noise((300, 100), 80).save(path)
    return path


def test_make_random_model_of_another_size(tmp_path):
    target = tmp_path / "folder" / "model"
    settings = ["text_config.num_hidden_layers=2", 'text_config.moe_layers_enum="1"', "vision_config.image_size=112"]
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    result = run("make_random_model.py", target, *arguments, "--dtype", "bfloat16")
    assert result.returncode == 0, result.stderr
    weights = weights_in(target)
    assert {tensor.dtype.itemsize for tensor in weights.values()} == {2}
    assert "model.layers.1.moe.gate.weight" in weights and "model.layers.2.moe.gate.weight" not in weights
    assert [path.name for path in target.parent.iterdir()] == ["model"]  # nothing unfinished beside it


def test_describe(random_model_dir, picture):
    arguments = (picture, "--model", random_model_dir, "--max-new-tokens", 20)
    result, question = run("describe.py", *arguments), run("describe.py", *arguments, "--prompt", "Why?")
    assert result.returncode == 0 and result.stdout.strip() and "Loading weights" in result.stderr, result.stderr
    assert question.returncode == 0 and question.stdout != result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("make_random_model.py", ("new", "--set", "nonsense"), "KEY=VALUE"),
        ("make_random_model.py", ("new", "--set", "text_config.moe_layers_enum=[9]"), "`moe_layers_enum` must list"),
        ("make_random_model.py", (".",), "exists already"),
        ("describe.py", ("none.png", "--model", TINY), "none.png"),
        ("describe.py", ("text.png", "--model", TINY), "text.png"),
        ("describe.py", ("picture.png", "--model", "no/such/folder"), "no/such/folder"),
        ("benchmark.py", ("decode", "--batch", 0), "must be at least 1, got 0"),
        ("benchmark.py", ("decode", "--device", "cuda"), "this machine has no CUDA device"),
        ("benchmark.py", ("prefill", "--plot", "plot.png"), "--plot is only for decode"),
        ("benchmark.py", ("decode", "--vllm", "."), "has no env.sh"),
        ("benchmark.py", ("decode", "--table", "page.md"), "must be a file that contains `benchmark.py --table`"),
        ("benchmark.py", ("decode", "--json", "none/results.json"), "none is not a directory"),
    ],
)
def test_what_is_wrong_is_named(picture, monkeypatch, capsys, script, arguments, message):
    (picture.parent / "text.png").write_text("no picture")
    before = sorted(picture.parent.iterdir())
    monkeypatch.chdir(picture.parent)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(next((ROOT / "scripts").rglob(script)), run_name="__main__")
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert sorted(picture.parent.iterdir()) == before


@pytest.fixture
def step3(tmp_path):
    """Runs the command `step3` of the package as pip installs it, where torch and datasets must not be imported."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "checkpoints", "tests")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    pip = ("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site")
    result = python(*pip, tmp_path / "source")
    assert result.returncode == 0, result.stderr
    shutil.rmtree(tmp_path / "source")
    (tmp_path / "blocked").mkdir()
    for name in ("torch", "datasets"):
        (tmp_path / "blocked" / f"{name}.py").write_text("raise ModuleNotFoundError(name=__name__)")

    def run(*arguments, with_torch: bool = False) -> subprocess.CompletedProcess:
        folders = [tmp_path / "site", *[tmp_path / "blocked"] * (not with_torch)]
        path = os.pathsep.join(map(str, reversed(folders)))
        return python(tmp_path / "site" / "bin" / "step3", *arguments, cwd=tmp_path, PYTHONPATH=path)

    return run


def test_the_installed_command(step3, picture):
    help = step3("--help")
    assert help.returncode == 0, help.stderr
    listed = re.findall(r"^  (\w+) +[A-Z].+\.$", help.stdout, flags=re.MULTILINE)
    names = "convert plan describe chat answer data finetune serve app push experts quantise export onnx"
    assert listed == names.split()
    assert step3("convert", "--help").stdout.startswith("usage: step3 convert [-h] [--check]")
    checked = step3("convert", TINY, "--check")
    assert checked.returncode == 0 and "nothing wrong" in checked.stdout, checked.stderr
    adopted = step3("convert", TINY, "adopted")
    assert adopted.returncode == 0, adopted.stderr
    assert step3("push", "adopted", "someone/tiny", "--dry-run").returncode == 0
    described = step3("describe", picture, "--model", "adopted", with_torch=True)
    assert described.returncode == 0 and described.stdout.strip(), described.stderr
    unnamed = step3("describe", picture, with_torch=True)
    assert unnamed.returncode == 2 and "--model" in unnamed.stderr
    missing = step3("finetune", "--help")
    assert missing.returncode == 2
    assert re.fullmatch(r'step3 finetune needs \w+: pip install "step3-vl\[finetune\]"\n', missing.stderr)


def test_fuzz_finds_nothing():
    result = run("fuzz.py", "--seed", 1, "--count", 100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "100 attempts, 0 not as documented" in result.stdout


@pytest.mark.defect(20)
def test_no_dead_code_and_one_style():
    for command in (["check", "."], ["format", "--check", "."]):
        result = python("-m", "ruff", *command)
        assert result.returncode == 0, result.stdout + result.stderr


def test_benchmark(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\nMade by `benchmark.py --table`:\n\n| old |\n| --- |\n| 1 |\n\nAfter.\n")
    options = ("--sizes", "tiny", "--dtype", "float32", "--context", 16, "--repeats", 1, "--gigabytes", 0.05, "--fuse")
    options += ("--json", tmp_path / "results.json", "--table", page)
    result = run("benchmark.py", "all", *options, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert list(results) == ["decode", "prefill", "vision", "preprocess", "load", "train"]
    for name, rows in results.items():
        assert name in result.stdout and all(row["low"] <= row["seconds"] <= row["high"] for row in rows)
        if name != "load":
            assert {"original", "package"} <= {row["what"] for row in rows}
            assert all(row["of_limit"] > 0 and row["against_original"] > 0 for row in rows)
    lines = page.read_text().splitlines()
    assert lines[:4] == ["Before.", "", "Made by `benchmark.py --table`:", ""] and lines[-2:] == ["", "After."]
    package = next(row for row in results["decode"] if row["what"] == "package")
    assert f"| package | {package['tokens_per_second']:.1f} |" in lines and "| old |" not in lines


@needs_vllm
@pytest.mark.engines
def test_benchmark_beside_vllm(tmp_path):
    options = ("--sizes", "tiny", "--dtype", "float32", "--context", 16, "--repeats", 1, "--vllm", VLLM_HOME)
    result = run("benchmark.py", "decode", *options, "--json", tmp_path / "results.json")
    assert result.returncode == 0, result.stderr
    assert "vLLM's tokens: 100% are the package's" in result.stdout
    rows = json.loads((tmp_path / "results.json").read_text())["results"]["decode"]
    assert [row["what"] for row in rows] == ["original", "package", "vLLM"]


def test_the_benchmarks_original_gives_the_same_answers():
    """Otherwise it would be the time of something else."""
    machine = benchmark.Machine(torch.device("cpu"))
    model = benchmark.make_text_model("tiny", torch.float32, machine, SimpleNamespace(experts=None))
    original = benchmark.as_original(model)
    ids = torch.arange(10, 40).view(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        outputs = [each(ids, attention_mask=mask).logits[mask.bool()] for each in (model, original)]
    assert_close(*outputs)
    assert original.config._experts_implementation == "original" != model.config._experts_implementation
    assert next(original.parameters()) is next(model.parameters())
