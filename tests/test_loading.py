"""Released checkpoints read as they are, by `from_pretrained`."""

import shutil
from pathlib import Path

import convert_checkpoint
import pytest
import torch
from conftest import (
    assert_same_tensors,
    dequantised,
    edit_json,
    load_whole,
    make_fp8_checkpoint,
    one_by_one,
    weights_in,
)
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from step3_vl import Step3TextForCausalLM, Step3VLConfig, Step3VLForConditionalGeneration, checkpoint_step3


pytestmark = pytest.mark.releases


IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The same in fp8 and in bfloat16."""
    folder = tmp_path_factory.mktemp("checkpoints")
    fp8 = make_fp8_checkpoint(folder / "fp8")
    AutoModelForImageTextToText.from_pretrained(fp8).save_pretrained(folder / "bfloat16", max_shard_size="100KB")
    return {"fp8": fp8, "bfloat16": folder / "bfloat16"}


each_kind = pytest.mark.parametrize("kind", ["fp8", "bfloat16"])


def single_experts(source: Path, directory: Path, change=lambda weights: None) -> Path:
    """The same checkpoint in one file, with every expert's weights under names of their own, and `change`d."""
    weights = one_by_one(weights_in(source))
    change(weights)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.fixture
def fp8_on_this_machine(tmp_path, monkeypatch) -> Path:
    """A checkpoint that stays in fp8, as where a GPU has it: all but the kernels, which only such a GPU runs."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    return make_fp8_checkpoint(tmp_path / "model", "hidden_size=256", "moe_intermediate_size=128")


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, (128, 128)), (torch.float32, (64, 128))])
def test_fp8_is_dequantised_where_no_gpu_has_it(tmp_path, dtype, block):
    fp8 = make_fp8_checkpoint(tmp_path / "model", block=block)
    model = AutoModelForImageTextToText.from_pretrained(fp8, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(weights_in(tmp_path / "saved"), dequantised(fp8, dtype))
    assert not hasattr(Step3VLConfig.from_pretrained(tmp_path / "saved"), "quantization_config")
    assert convert_checkpoint.main([str(tmp_path / "saved"), "--check"]) == 0
    assert torch.equal(logits(model), logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")))


def test_fp8_is_kept_where_a_gpu_has_it(checkpoints, fp8_on_this_machine, tmp_path):
    model = load_whole(AutoModelForImageTextToText, fp8_on_this_machine)
    for name, parameter in model.named_parameters():
        in_fp8 = name.startswith("model.language_model.layers") and not any(
            x in name for x in ("norm", "gate.", ".wq.")
        )
        expected = torch.float8_e4m3fn if in_fp8 else torch.bfloat16
        assert name.endswith("scale_inv") or parameter.dtype == expected, name
    single = load_whole(AutoModelForImageTextToText, single_experts(fp8_on_this_machine, tmp_path / "single"))
    for each in (model, single):
        each.save_pretrained(tmp_path / "saved")
        assert_same_tensors(weights_in(tmp_path / "saved"), weights_in(fp8_on_this_machine))
    with pytest.raises(ValueError, match="`moe_intermediate_size` is a multiple of the blocks' 128 rows, got 136"):
        AutoModelForImageTextToText.from_pretrained(checkpoints["fp8"])


def test_fp8_on_a_gpu_without_kernels_is_refused_before_it_is_read(fp8_on_this_machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(checkpoint_step3, "is_kernels_available", lambda: False)
    monkeypatch.setattr(checkpoint_step3, "load_state_dict", None)  # reads the weights
    with pytest.raises(ImportError, match="package `kernels`"):
        AutoModelForImageTextToText.from_pretrained(fp8_on_this_machine, device_map="cpu")


def test_an_adapter_is_read_together_with_an_fp8_model(fp8_on_this_machine, tmp_path):
    peft = pytest.importorskip("peft")

    def fp8_layers(model) -> list[str]:
        names = [name for name, module in model.named_modules() if type(module) is FP8Linear]
        return [name.replace(".base_layer", "") for name in names]

    model = Step3VLForConditionalGeneration.from_pretrained(fp8_on_this_machine)
    expected = fp8_layers(model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert fp8_layers(Step3VLForConditionalGeneration.from_pretrained(tmp_path / "adapter")) == expected


@pytest.mark.parametrize("place", ["disk", "cpu"])
def test_generation_with_the_vision_encoder_offloaded(model, batch, tmp_path, place):
    """The first weight of the model is then on the device `meta`."""
    model.save_pretrained(tmp_path)
    vision = ("vision_model", "vit_downsampler", "vit_downsampler2", "vit_large_projector")
    places = {f"model.{name}": place for name in vision} | {"model.language_model": "disk", "lm_head": "cpu"}
    placed = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    options = {"do_sample": False, "max_new_tokens": 4}
    for beams in (1, 2):
        expected = model.generate(**batch, **options, num_beams=beams)
        assert torch.equal(placed.generate(**batch, **options, num_beams=beams), expected)


@each_kind
def test_offloading_to_cpu_and_disk(checkpoints, tmp_path, kind):
    whole = AutoModelForImageTextToText.from_pretrained(checkpoints[kind])
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoints[kind], device_map="auto", max_memory={"cpu": "1500KB"}, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} == set(map(str, model.hf_device_map.values()))
    assert torch.equal(logits(model), logits(whole))
    assert torch.equal(model.generate(IDS, max_new_tokens=5), whole.generate(IDS, max_new_tokens=5))


@each_kind
def test_the_text_part_is_taken_out_of_a_whole_checkpoint(checkpoints, kind):
    text = load_whole(Step3TextForCausalLM, checkpoints[kind])
    assert text.dtype == torch.bfloat16
    assert torch.equal(logits(text), logits(Step3VLForConditionalGeneration.from_pretrained(checkpoints[kind])))


@each_kind
def test_experts_that_were_saved_one_by_one_are_read(checkpoints, tmp_path, kind):
    """From every kind of file, and saved as the release has them."""
    whole = AutoModelForImageTextToText.from_pretrained(checkpoints[kind])
    whole.save_pretrained(tmp_path / "whole")
    directory = single_experts(checkpoints[kind], tmp_path / "single")
    weights, config = weights_in(directory), Step3VLConfig.from_pretrained(directory)
    models = [
        load_whole(AutoModelForImageTextToText, directory),
        load_whole(Step3VLForConditionalGeneration, None, config=config, state_dict=weights),
    ]
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    models.append(load_whole(AutoModelForImageTextToText, directory))
    for model in models:
        assert_same_tensors(model.state_dict(), whole.state_dict())
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(weights_in(tmp_path / "saved"), weights_in(tmp_path / "whole"))
    if kind == "bfloat16":
        torch.nn.init.zeros_(model.model.language_model.layers[1].moe.experts.gate_up_proj)
        model.load_state_dict(dict(sorted(weights.items(), reverse=True)))  # in any order
        assert_same_tensors(model.state_dict(), whole.state_dict())


@each_kind
@pytest.mark.parametrize("number", [7, 9], ids=["one missing", "one too many"])
def test_as_many_experts_as_the_config_says(checkpoints, tmp_path, kind, number, transformers_log):
    def change(weights):
        for name in [name for name in weights if "layers.1.moe.experts.2.up_proj" in name]:
            more = weights.pop(name) if number == 7 else weights[name].clone()
            if number == 9:
                weights[name.replace("experts.2.", "experts.8.")] = more

    directory = single_experts(checkpoints[kind], tmp_path / "model", change)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForImageTextToText.from_pretrained(directory)
    assert f"layers.1.moe.experts.gate_up_proj takes 8 experts, the checkpoint has {number}." in transformers_log.text


@pytest.mark.parametrize(
    ("kind", "experts", "old", "new", "message"),
    [
        ("bfloat16", "eager", "1.moe.experts.1.", "1.moe.experts.8.", r"experts from 0 on, .* \[0, 2, .*, 8\]"),
        ("bfloat16", "eager", "_proj.weight", "_proj.qweight", "weights or scales, .*qweight, are in a form that"),
        ("bfloat16", "linear", "_proj.weight", "_proj.qweight", "weights or scales, .*qweight, are in a form that"),
        (
            "fp8",
            "eager",
            "1.self_attn.q_proj.weight_scale_inv",
            None,
            "q_proj.weight is fp8, but the checkpoint",
        ),
        ("fp8", "eager", "experts.3.down_proj.weight_scale_inv", None, "down_proj.weight is fp8, but the checkpoint"),
    ],
)
def test_what_is_not_whole_is_refused(checkpoints, tmp_path, kind, experts, old, new, message):
    def change(weights):
        for name in [name for name in weights if old in name and (".experts." in name or new is None)]:
            tensor = weights.pop(name)
            if new:
                weights[name.replace(old, new)] = tensor

    directory = single_experts(checkpoints[kind], tmp_path / "model", change)
    with pytest.raises(ValueError, match=message):
        AutoModelForImageTextToText.from_pretrained(directory, experts_implementation=experts)


@pytest.mark.parametrize("experts", ["eager", "linear", "mapped"])
def test_fp8_without_its_config_is_refused(checkpoints, tmp_path, experts):
    directory = shutil.copytree(checkpoints["fp8"], tmp_path / "model")
    edit_json(directory / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(ValueError, match="`quantization_config` in config.json must"):
        AutoModelForImageTextToText.from_pretrained(directory, experts_implementation=experts)
