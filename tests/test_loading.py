"""Released checkpoints read as they are, by `from_pretrained`."""

from pathlib import Path

import convert_checkpoint
import pytest
import torch
import transformers
from conftest import assert_same_tensors, dequantised, make_fp8_checkpoint
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import FP8Linear
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from step3_vl import Step3TextForCausalLM, Step3VLConfig, Step3VLForConditionalGeneration


pytestmark = pytest.mark.releases


IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    return make_fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "model")


@pytest.fixture(scope="module")
def bfloat16(fp8, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("bfloat16") / "model"
    AutoModelForImageTextToText.from_pretrained(fp8).save_pretrained(directory, max_shard_size="100KB")
    return directory


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.mark.parametrize(("dtype", "block"), [(torch.bfloat16, (128, 128)), (torch.float32, (64, 128))])
def test_fp8_is_dequantised_where_no_gpu_has_it(tmp_path, dtype, block):
    fp8 = make_fp8_checkpoint(tmp_path / "model", block=block)
    model = AutoModelForImageTextToText.from_pretrained(fp8, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), dequantised(fp8, dtype))
    assert not hasattr(Step3VLConfig.from_pretrained(tmp_path / "saved"), "quantization_config")
    assert convert_checkpoint.main([str(tmp_path / "saved"), "--check"]) == 0
    assert torch.equal(logits(model), logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")))


def test_fp8_is_kept_where_a_gpu_has_it(fp8, tmp_path, monkeypatch):
    """All but the kernels, which only such a GPU runs."""
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    directory = make_fp8_checkpoint(tmp_path / "model", "hidden_size=256", "moe_intermediate_size=128")
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    types = {name: parameter.dtype for name, parameter in model.named_parameters() if "scale_inv" not in name}
    for name, dtype in types.items():
        in_fp8 = name.startswith("model.language_model.layers") and not any(part in name for part in ("norm", "gate."))
        in_fp8 &= ".wq." not in name
        assert dtype == (torch.float8_e4m3fn if in_fp8 else torch.bfloat16), name
    source = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    single = AutoModelForImageTextToText.from_pretrained(one_by_one(directory, tmp_path / "single"))
    for each in (model, single):
        each.save_pretrained(tmp_path / "saved")
        assert_same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), source)
    with pytest.raises(ValueError, match="`moe_intermediate_size` is a multiple of the blocks' 128 rows, got 136"):
        AutoModelForImageTextToText.from_pretrained(fp8)


def test_an_adapter_is_read_together_with_an_fp8_model(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    directory = make_fp8_checkpoint(tmp_path / "model", "hidden_size=256", "moe_intermediate_size=128")
    model = Step3VLForConditionalGeneration.from_pretrained(directory)
    expected = [name for name, module in model.named_modules() if type(module) is FP8Linear]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    again = Step3VLForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    found = [name.replace(".base_layer", "") for name, module in again.named_modules() if type(module) is FP8Linear]
    assert found == expected


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


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_the_text_part_is_taken_out_of_a_whole_checkpoint(fp8, bfloat16, kind):
    if kind == "fp8" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("transformers 5.16 cannot load the fp8 weights of any model with a tensor-parallel plan")
    source = fp8 if kind == "fp8" else bfloat16
    text, report = Step3TextForCausalLM.from_pretrained(source, output_loading_info=True)
    assert not any(report.values()), report
    assert text.dtype == torch.bfloat16
    assert torch.equal(logits(text), logits(Step3VLForConditionalGeneration.from_pretrained(source)))


def one_by_one(source: Path, directory: Path, change=lambda weights: None) -> Path:
    """The same checkpoint in one file, with every expert's weights under a name of their own, and `change`d."""
    weights = {}
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            layer, is_expert, rest = name.partition(".moe.")
            if is_expert and rest.endswith(("_proj.weight", "_proj.weight_scale_inv")):
                weights |= {f"{layer}.moe.experts.{i}.{rest}": part.clone() for i, part in enumerate(tensor)}
            else:
                weights[name] = tensor
    change(weights)
    directory.mkdir()
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_experts_that_were_saved_one_by_one_are_read(fp8, bfloat16, tmp_path, kind):
    """From every kind of file, and saved as the release has them."""
    source = fp8 if kind == "fp8" else bfloat16
    whole = AutoModelForImageTextToText.from_pretrained(source)
    whole.save_pretrained(tmp_path / "whole")
    directory = one_by_one(source, tmp_path / "single")
    weights = load_file(directory / "model.safetensors")
    config = Step3VLConfig.from_pretrained(directory)
    models = [
        AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True),
        Step3VLForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, output_loading_info=True
        ),
    ]
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    models.append(AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True))
    for model, report in models:
        assert not any(report.values()), report
        assert_same_tensors(model.state_dict(), whole.state_dict())
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("saved", "whole")))
    if kind == "bfloat16":
        torch.nn.init.zeros_(model.model.language_model.layers[1].moe.experts.gate_up_proj)
        model.load_state_dict(dict(sorted(weights.items(), reverse=True)))  # in any order
        assert_same_tensors(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("number", [7, 9], ids=["one missing", "one too many"])
def test_as_many_experts_as_the_config_says(fp8, bfloat16, tmp_path, kind, number, transformers_log):
    def change(weights):
        for name in [name for name in weights if "layers.1.moe.experts.2.up_proj" in name]:
            more = weights.pop(name) if number == 7 else weights[name].clone()
            if number == 9:
                weights[name.replace("experts.2.", "experts.8.")] = more

    directory = one_by_one(fp8 if kind == "fp8" else bfloat16, tmp_path / "model", change)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForImageTextToText.from_pretrained(directory)
    assert f"layers.1.moe.experts.gate_up_proj takes 8 experts, the checkpoint has {number}." in transformers_log.text


def test_experts_are_numbered_without_a_gap(bfloat16, tmp_path):
    def change(weights):
        for name in [name for name in weights if "layers.1.moe.experts.1." in name]:
            weights[name.replace("experts.1.", "experts.8.")] = weights.pop(name)

    directory = one_by_one(bfloat16, tmp_path / "model", change)
    with pytest.raises(ValueError, match=r"layers.1.moe.experts.\w+ takes experts from 0 on, .* has \[0, 2, .*, 8\]"):
        AutoModelForImageTextToText.from_pretrained(directory)


@pytest.mark.parametrize("implementation", ["grouped_mm", "linear"])
def test_experts_in_a_quantised_form_that_is_not_known_are_refused(bfloat16, tmp_path, implementation):
    def change(weights):
        for name in [name for name in weights if ".experts." in name]:
            weights[name.replace(".weight", ".qweight")] = weights.pop(name)

    directory = one_by_one(bfloat16, tmp_path / "single", change)
    with pytest.raises(ValueError, match=r"weights of experts, such as .*qweight, are in a form that is not"):
        AutoModelForImageTextToText.from_pretrained(directory, experts_implementation=implementation)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "moe.experts.3.down_proj"])
def test_fp8_without_scales_is_refused(fp8, tmp_path, name):
    name = f"model.layers.1.{name}.weight"
    directory = one_by_one(fp8, tmp_path / "model", lambda weights: weights.pop(f"{name}_scale_inv"))
    with pytest.raises(ValueError, match=f"{name} is fp8, but the checkpoint has no {name}_scale_inv"):
        AutoModelForImageTextToText.from_pretrained(directory)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_offloading_to_cpu_and_disk(fp8, bfloat16, tmp_path, kind):
    directory = fp8 if kind == "fp8" else bfloat16
    whole = AutoModelForImageTextToText.from_pretrained(directory)
    model = AutoModelForImageTextToText.from_pretrained(
        directory, device_map="auto", max_memory={"cpu": "1500KB"}, offload_folder=tmp_path / "offload"
    )
    assert {"cpu", "disk"} == set(map(str, model.hf_device_map.values()))
    assert torch.equal(logits(model), logits(whole))
    assert torch.equal(model.generate(IDS, max_new_tokens=5), whole.generate(IDS, max_new_tokens=5))
