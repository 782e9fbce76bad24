"""Released checkpoints read as they are, by `from_pretrained`."""

import json
import shutil
from pathlib import Path

import convert_checkpoint
import pytest
import torch
import transformers
from conftest import dequantised, make_fp8_checkpoint
from packaging.version import Version
from safetensors.torch import load_file
from test_saving import assert_same_tensors
from transformers import AutoModelForImageTextToText
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from step3_vl import Step3TextForCausalLM, Step3VLConfig, Step3VLForConditionalGeneration


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_is_dequantised_where_no_gpu_has_it(fp8, tmp_path, dtype):
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
    model.save_pretrained(tmp_path / "saved")
    source = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert_same_tensors(load_file(tmp_path / "saved" / "model.safetensors"), source)
    with pytest.raises(ValueError, match="`moe_intermediate_size` is a multiple of the blocks' 128 rows, got 136"):
        AutoModelForImageTextToText.from_pretrained(fp8)


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_the_text_part_never_reads_the_vision_encoder(fp8, bfloat16, tmp_path, kind):
    if kind == "fp8" and Version(transformers.__version__) < Version("5.17"):
        pytest.skip("transformers 5.16 cannot load the fp8 weights of any model with a tensor-parallel plan")
    source = fp8 if kind == "fp8" else bfloat16
    directory = Path(shutil.copytree(source, tmp_path / "model"))
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    vision = {file for name, file in index.items() if name.startswith("vi")}
    for file in vision - {file for name, file in index.items() if not name.startswith("vi")}:
        (directory / file).unlink()
    assert not all((directory / file).exists() for file in vision)
    text = Step3TextForCausalLM.from_pretrained(directory)
    assert text.dtype == torch.bfloat16
    assert torch.equal(logits(text), logits(Step3VLForConditionalGeneration.from_pretrained(source)))


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
