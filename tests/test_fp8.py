"""`scripts/convert_checkpoint.py --dtype fp8`, by its command line."""

import json
import re
import shutil
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from conftest import assert_same_files, assert_same_tensors, edit_json, load_whole, make_fp8_checkpoint, weights_in
from describe import TINY
from evaluate_tiny import answer_scenes, fresh_scenes
from make_random_model import make_random_model
from safetensors.torch import save_file
from test_convert import convert, converted
from transformers import AutoModelForImageTextToText, AutoProcessor


SIZES = ["hidden_size=200", "intermediate_size=264", "moe_intermediate_size=136", "initializer_range=0.05"]
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()].unique()  # all of e4m3
IN_BLOCKS = "model.layers.0.mlp.gate_proj.weight"  # (264, 200)


def special_blocks() -> torch.Tensor:
    """A weight of (264, 200), whose six blocks are each of another kind."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(264, 200, generator=generator)
    weight[:128, :128] = 0
    weight[:128, 128:] = 0
    weight[5, 130] = -3.25
    weight[128:256, :128] *= 1e-39  # denormal numbers
    weight[128:256, 128:] = 2.0 ** (torch.rand(128, 72, generator=generator) * 160 - 140)  # far apart
    # Half-way between two numbers of e4m3 under their scale, or next to it.
    between = (NUMBERS[128:-1] + NUMBERS[129:]) / 2
    row = (between[torch.arange(127) % len(between)] * torch.tensor(0.4, dtype=torch.bfloat16).double() / 448).float()
    weight[256:, 1:128] = row
    weight[257:, 1:128] = torch.nextafter(row, torch.tensor(1.0))
    weight[256:, 0] = 0.4
    weight[256:, 128:] *= 1e37
    return weight


@pytest.fixture(scope="module")
def float32(tmp_path_factory) -> Path:
    """A checkpoint in float32 few of whose widths are multiples of 128."""
    directory = tmp_path_factory.mktemp("float32") / "model"
    make_random_model(directory, [f"text_config.{size}" for size in SIZES])
    tensors = weights_in(directory)
    assert tensors[IN_BLOCKS].shape == (264, 200)
    save_file({**tensors, IN_BLOCKS: special_blocks()}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def fp8(float32, tmp_path_factory) -> Path:
    return converted(float32, tmp_path_factory.mktemp("fp8") / "model", "--dtype", "fp8")


def spread(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    rows, columns = (torch.arange(size) // 128 for size in shape[-2:])
    return scale[..., rows, :][..., columns]


@pytest.mark.parametrize("options", [["--max-shard-size", "200KB"], ["--text-only"], ["--layers", "0-1"]])
def test_what_the_release_has_in_fp8_and_nothing_else(float32, tmp_path, options):
    target = converted(float32, tmp_path / "target", "--dtype", "fp8", "--verify", *options)
    assert convert(target, "--check").returncode == 0
    plain = converted(float32, tmp_path / "plain", "--dtype", "bfloat16", *options)
    found, expected = weights_in(target), weights_in(plain)
    in_fp8 = r"layers\.\d+\.(self_attn\.(q|k|v|o)_proj|self_attn\.wq|(mlp|moe|share_expert)\.\w+_proj)\.weight"
    names = [name for name in expected if re.search(in_fp8, name)]
    assert len(names) > 10
    for name in names:
        *experts, rows, columns = expected.pop(name).shape
        scale = found.pop(f"{name}_scale_inv")
        assert scale.dtype == torch.float32 and list(scale.shape) == [*experts, -(-rows // 128), -(-columns // 128)]
        assert found.pop(name).dtype == torch.float8_e4m3fn
    assert_same_tensors(found, expected)
    config, before = (json.loads((path / "config.json").read_text()) for path in (target, plain))
    quantization = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    assert config == {**before, "quantization_config": {**quantization, "weight_block_size": [128, 128]}}


def test_every_weight_is_the_nearest_number(float32, fp8):
    source, found = weights_in(float32), weights_in(fp8)
    for name, weight in source.items():
        if f"{name}_scale_inv" not in found:
            continue
        scale = spread(found[f"{name}_scale_inv"], weight.shape).double()
        error = (weight.double() - found[name].double() * scale).abs()
        upper = torch.searchsorted(NUMBERS, weight.double() / scale).clamp(1, len(NUMBERS) - 1)
        nearest = torch.minimum(*((weight.double() - NUMBERS[i] * scale).abs() for i in (upper, upper - 1)))
        assert torch.equal(error, nearest), name
        assert (error <= torch.maximum(weight.double().abs() / 17, scale / 1024)).all() and (error <= 16 * scale).all()
    scales, blocks = found[f"{IN_BLOCKS}_scale_inv"], special_blocks()
    as_read = (found[IN_BLOCKS].float() * spread(scales, blocks.shape)).bfloat16()
    assert scales[0, 0] == scales[1, 0] == 2.0**-117 and not as_read[:128, :128].any()
    assert as_read[5, 130] == -3.25 and as_read[:128, 128:].count_nonzero() == 1 and scales[0, 1] == 3.25 / 448
    assert (as_read[128:256, :128] - blocks[128:256, :128]).abs().max() <= 2.0**-127
    largest = blocks[256:, 128:].abs().max().bfloat16().float()
    assert scales[2, 1] == largest / 448


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_there_and_back_again_are_the_same_bytes(fp8, tmp_path, monkeypatch, dtype):
    plain = converted(fp8, tmp_path / "plain", "--dtype", dtype)
    monkeypatch.setattr(convert_checkpoint, "CHUNK", 4096)  # a weight in several parts
    assert_same_files(converted(plain, tmp_path / "again", "--dtype", "fp8"), fp8)
    assert_same_files(converted(fp8, tmp_path / "copied", "--dtype", "fp8"), fp8)


def quantised_by(source: Path, directory: Path, change) -> Path:
    """A copy of a block-fp8 checkpoint, in one file, with each weight and its scales changed."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("model*"))
    tensors = weights_in(source)
    for name in [name for name in tensors if f"{name}_scale_inv" in tensors]:
        tensors[name], tensors[f"{name}_scale_inv"] = change(tensors[name], tensors[f"{name}_scale_inv"])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def as_it_is(weight, scale):
    return weight, scale


def with_powers_of_two(weight, scale):
    power = torch.exp2(torch.ceil(torch.log2(scale)))
    return (weight.float() * spread(scale / power, weight.shape)).to(torch.float8_e4m3fn), power


def with_other_scales(weight, scale):
    return weight, scale * torch.linspace(0.9, 1.1, scale.numel()).view(scale.shape)


@pytest.mark.parametrize("change", [as_it_is, with_powers_of_two, with_other_scales])
def test_what_others_quantised_comes_back(tmp_path, change):
    source = quantised_by(make_fp8_checkpoint(tmp_path / "usual"), tmp_path / "source", change)
    plain = converted(source, tmp_path / "bfloat16", "--dtype", "bfloat16")
    found = weights_in(converted(plain, tmp_path / "again", "--dtype", "fp8"))
    before = weights_in(source)
    for weight in (key.removesuffix("_scale_inv") for key in before if key.endswith("_scale_inv")):
        scales = before[f"{weight}_scale_inv"], found[f"{weight}_scale_inv"]
        if change is with_powers_of_two:  # 224 and the next power, or 448 and this one: the same number
            values = [w[weight].float() * spread(s, w[weight].shape) for w, s in zip((before, found), scales)]
            assert torch.equal(*values) and ((scales[0] / scales[1] == 1) | (scales[0] / scales[1] == 2)).all()
        else:
            assert torch.equal(found[weight].view(torch.uint8), before[weight].view(torch.uint8)), weight
            assert ((scales[1] / scales[0] - 1).abs() < (2**-8 if change is with_other_scales else 1e-9)).all()


def test_fp8_of_another_layout_becomes_the_released_one(tmp_path):
    source = make_fp8_checkpoint(tmp_path / "source")
    before, found = weights_in(source), weights_in(converted(source, tmp_path / "released", "--dtype", "fp8"))
    assert "model.layers.0.self_attn.wq.weight_scale_inv" in found  # the source has that in bfloat16
    for name, tensor in before.items():
        if tensor.dtype == torch.float8_e4m3fn or name.endswith("_scale_inv"):
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    # Scales in bfloat16, then blocks of 256 by 256.
    other = quantised_by(source, tmp_path / "bfloat16", lambda weight, scale: (weight, scale.bfloat16()))
    scales = {name: scale.float() for name, scale in weights_in(other).items() if name.endswith("_scale_inv")}
    found = weights_in(converted(other, tmp_path / "float32", "--dtype", "fp8"))
    assert_same_tensors({name: found[name] for name in scales}, scales)
    other = quantised_by(source, tmp_path / "256", lambda weight, scale: (weight, scale[..., ::2, ::2].contiguous()))
    edit_json(other / "config.json", lambda c: c["quantization_config"].update(weight_block_size=[256, 256]))
    again = converted(other, tmp_path / "again", "--dtype", "fp8")
    wide = converted(other, tmp_path / "wide", "--dtype", "float32")
    assert_same_tensors(weights_in(again), weights_in(converted(wide, tmp_path / "twice", "--dtype", "fp8")))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_before_anything_is_written(float32, tmp_path, value):
    source = Path(shutil.copytree(float32, tmp_path / "source"))
    tensors = weights_in(source)
    for name in ("model.layers.1.moe.up_proj.weight", "lm_head.weight"):
        tensors[name].view(-1)[7] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for arguments in ([source, "--check"], [source, tmp_path / "target"]):
        result = convert(*arguments, "--dtype", "fp8")
        assert result.returncode == 1 and not list(tmp_path.glob("target*"))
        lines = [line for line in result.stderr.splitlines() if line.startswith("model.safetensors: ")]
        assert len(lines) == 2 and all("1 values are NaN or infinite" in line for line in lines)


def test_step3_tiny_in_fp8_answers_as_before(tmp_path):
    result = convert(TINY, tmp_path / "tiny", "--dtype", "fp8")
    assert result.returncode == 0 and "`moe_intermediate_size` 64. transformers" in result.stderr
    model = load_whole(AutoModelForImageTextToText, tmp_path / "tiny")
    answers = answer_scenes(model, AutoProcessor.from_pretrained(tmp_path / "tiny"), fresh_scenes(77, 12))
    assert all(answer.is_right for answer in answers)
