"""`step3 plan` counts from a config what running its model takes."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import run, weights_in
from describe import TINY
from plan import GB, GIB, RATES, make_plan

from step3_vl import Step3VLConfig


@pytest.fixture
def released(tmp_path):
    """A directory with nothing but the released config."""
    Step3VLConfig(dtype="bfloat16").save_pretrained(tmp_path / "released")
    return tmp_path / "released"


def plan(directory, memory=64, gpu_memory=80, gpus=math.inf) -> tuple[dict, dict[str, dict]]:
    """The plan and its ways by name, for a machine with so many GiB and GPUs."""
    rates = {source: rate * GB for source, rate in RATES.items()}
    machine = {"memory": memory * GIB, "gpu_memory": gpu_memory * GIB, "gpus": gpus, "tokens": 8192, "rates": rates}
    output = make_plan(directory, SimpleNamespace(**machine))
    return output, {way["name"]: way for way in output["ways"]}


def test_the_released_model(released):
    output, ways = plan(released, memory=700)
    stored = output["bytes"]["stored"]
    experts = 2 * 56 * 48 * 3 * 5120 * 7168
    assert stored["experts"] == experts and 641.9e9 < stored["weights"] < 642e9
    assert stored["experts that a token reads"] == experts * 3 / 48
    # 38 B parameters are active, which the release says of the text model.
    active = (stored["experts that a token reads"] + stored["all else that a token reads"]) / 2
    assert round(active / 1e9) == 38
    assert output["cache_bytes"] == 2 * 2 * 256 * 61 * 8192
    assert round(output["bytes"]["fp8"]["weights"] / 1e8) == 3276  # as convert_checkpoint.py writes
    assert 50e9 < ways["mapped, one GPU"]["gpu_bytes"] < 51e9
    assert all(way["fits"] for way in ways.values())
    # As accelerate places them, in docs/quantising.md.
    for memory, counts in {80: (10, 5, 3), 141: (5, 3, 2), 180: (4, 2, 1)}.items():
        _, ways = plan(released, gpu_memory=memory)
        assert tuple(ways[f"GPUs, {kind}"]["gpus"] for kind in ("bfloat16", "fp8", "nf4")) == counts


def test_what_memory_does_not_hold_is_read_from_the_disk(released):
    rest = 38.84e9
    for memory, from_disk in {700: 0, 64: 35.35e9, 24: 37e9 + rest}.items():
        way = plan(released, memory)[1]["mapped, CPU"]
        assert way["reads"]["disk"] == pytest.approx(from_disk, rel=2e-3)
        total = way["reads"]["disk"] / 3e9 + way["reads"]["memory"] / 200e9
        assert way["fits"] and way["tokens_per_second"] == pytest.approx(1 / total)


def test_what_does_not_fit(released):
    output, ways = plan(released, gpu_memory=48, gpus=4)
    assert {name for name, way in ways.items() if way["fits"]} == {"mapped, CPU", "GPUs, nf4"}
    options = ("--memory", 64, "--gpu-memory", 48, "--gpus", 4)
    assert json.loads(run("plan.py", released, *options, "--json").stdout) == output
    result = run("plan.py", released, *options)
    rows = {line[:15].strip(): line.split() for line in result.stdout.splitlines()}
    assert "no" in rows["GPUs, bfloat16"] and "yes" in rows["GPUs, nf4"]


def test_step3_tiny():
    output, _ = plan(TINY)
    sizes = {name: tensor.nbytes for name, tensor in weights_in(TINY).items()}
    experts = sum(size for name, size in sizes.items() if ".moe." in name and ".gate." not in name)
    assert output["bytes"]["stored"]["weights"] == sum(sizes.values())
    assert output["bytes"]["stored"]["experts"] == experts


def test_options():
    rows = run("plan.py", TINY, "--gpus", 0, "--gpu-memory", 80).stdout.splitlines()
    assert "no" in next(row for row in rows if "mapped, one GPU" in row).split()
    for option in ("--memory=-1", "--disk-rate=0", "--gpu-memory=nan", "--tokens=-1"):
        result = run("plan.py", TINY, option)
        assert result.returncode == 2 and "must be above 0" in result.stderr


def test_no_config(tmp_path):
    result = run("plan.py", tmp_path)
    assert result.returncode == 2 and "'config.json' is missing from" in result.stderr
