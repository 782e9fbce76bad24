import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import load_file


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
    weights = load_file(target / "model.safetensors")
    assert {tensor.dtype.itemsize for tensor in weights.values()} == {2}
    assert "model.layers.1.moe.gate.weight" in weights and "model.layers.2.moe.gate.weight" not in weights
    assert [path.name for path in target.parent.iterdir()] == ["model"]  # nothing unfinished beside it
    before = (target / "config.json").stat().st_mtime_ns
    again = run("make_random_model.py", target)
    assert again.returncode == 2 and "exists already" in again.stderr and "Traceback" not in again.stderr
    assert (target / "config.json").stat().st_mtime_ns == before


def test_make_random_model_names_what_is_wrong(tmp_path):
    for setting, message in {
        "nonsense": "KEY=VALUE",
        "text_config.moe_top_k=9": "`moe_top_k` must not exceed",
    }.items():
        result = run("make_random_model.py", tmp_path / "model", "--set", setting)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "model").exists()


def test_describe(random_model_dir, picture):
    result = run("describe.py", picture, "--model", random_model_dir, "--max-new-tokens", 20)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert "Loading weights" in result.stderr
    question = run("describe.py", picture, "--model", random_model_dir, "--max-new-tokens", 20, "--prompt", "Why?")
    assert question.returncode == 0 and question.stdout != result.stdout


def test_describe_names_what_is_missing(random_model_dir, picture, tmp_path):
    not_a_picture = tmp_path / "text.png"
    not_a_picture.write_text("no picture")
    for arguments, message in [
        ((tmp_path / "none.png", "--model", random_model_dir), "none.png"),
        ((not_a_picture, "--model", random_model_dir), "text.png"),
        ((picture, "--model", tmp_path / "nothing"), "nothing"),
    ]:
        result = run("describe.py", *arguments)
        assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_no_dead_code_and_one_style():
    for command in (["check", "."], ["format", "--check", "."]):
        result = subprocess.run([sys.executable, "-m", "ruff", *command], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout + result.stderr


def test_the_readme_names_the_two_commands():
    commands = re.findall(r"^bash scripts/\w+\.sh", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert commands == ["bash scripts/demo.sh", "bash scripts/test.sh"]
