"""`scripts/gpu_check.py`, on a CPU and in small."""

import json
import re

import benchmark
import gpu_check
import pytest
import torch


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs the script, at the dimensions of a tiny model. Returns the status and the rows, which it also prints."""
    for sizes in (benchmark.TEXT_SIZES, benchmark.VISION_SIZES):
        monkeypatch.setitem(sizes, "real-layer", sizes["tiny"])

    def run(*arguments) -> tuple[int, list[dict]]:
        options = ["--device", "cpu", "--scenes", "1", "--dtype", "float32", "--repeats", "1", "--layers", "2"]
        options += ["--batch", "1", "2", "--context", "16", "32", "--json", str(tmp_path / "results.json")]
        with torch.compiler.set_stance("force_eager"):
            status = gpu_check.main([*options, *arguments])
        rows = json.loads((tmp_path / "results.json").read_text())["rows"]
        line = r"^\| (\w+) \| (.*) \| (?:\*\*wrong\*\*: )?(.*) \| [\d.]+ \|$"
        printed = re.findall(line, capsys.readouterr().out, flags=re.MULTILINE)
        assert printed == [(row["check"], row["case"], row["result"]) for row in rows]
        return status, rows

    return run


def test_every_check(check):
    status, rows = check()
    wrong = {row["case"]: row["result"] for row in rows if row["is_right"] is False}
    if not torch.cuda.is_available():  # these caches copy from a GPU
        assert "Torch not compiled with CUDA" in wrong.pop("offloaded") and wrong.pop("offloaded_static")
        assert status == 1
    assert not wrong
    measured = [row for row in rows if row["is_right"] is None and row["check"] != "limits"]
    assert all(re.fullmatch(r"[\d.]+ ms, [\d.]+ of the limit", row["result"]) for row in measured), measured
    assert [row["check"] for row in measured] == [
        *["decode"] * 6, *["prefill"] * 2, "vision", "train", *["offload"] * 7,
    ]  # fmt: skip


def test_wrong_answers_are_the_exit_status(check, monkeypatch):
    load = gpu_check.Quiz.load

    def load_broken(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.weight.data.zero_()
        return model

    assert check("--only", "dtype", "--case", "float32")[0] == 0
    monkeypatch.setattr(gpu_check.Quiz, "load", load_broken)
    status, rows = check("--only", "dtype", "--case", "float32")
    assert status == 1 and [row["result"] for row in rows] == ["0 of 5 right"]
    status, rows = check("--only", "dtype", "--seconds", "0")
    assert status == 0 and {row["result"] for row in rows} == {"not run: 0 seconds are over"}
