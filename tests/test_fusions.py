"""Fusions by name, through `from_pretrained`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.fusion_mapping
from conftest import ROOT, cache_of, make_fp8_checkpoint, small_batch, small_model
from safetensors.torch import load_file
from test_saving import assert_same_tensors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from step3_vl import Step3TextForCausalLM, Step3VLModel


BOTH = {"step3_qkv": True, "step3_gate_up": True}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fusions") / "model"
    small_model().save_pretrained(directory)
    return directory


def load(directory, fusions=None, model_class=AutoModelForImageTextToText, **kwargs):
    return model_class.from_pretrained(directory, fusion_config=fusions, **kwargs).eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fusions", [{"step3_qkv": True}, {"step3_gate_up": True, "step3_qkv": False}, BOTH])
def test_a_fused_model_answers_alike_and_is_saved_as_it_was(directory, tmp_path, fusions, attention):
    plain = load(directory, attn_implementation=attention)
    fused = load(directory, fusions, attn_implementation=attention)
    enabled = {name for name, options in fusions.items() if options}
    report = {(row["fusion"], row["module"].split(".", 3)[3]): row for row in fused.fusion_report()}
    attentions, mlps = [f"{layer}.self_attn" for layer in range(3)], ["0.mlp", "1.share_expert", "2.share_expert"]
    matched = [("step3_qkv", name) for name in attentions] + [("step3_gate_up", name) for name in mlps]
    assert list(report) == matched
    assert all(row["rewritten"] == (row["fusion"] in enabled) for row in report.values())
    assert not any(row["rewritten"] for row in plain.fusion_report())
    assert ("q_proj" in "".join(fused.state_dict())) == ("step3_qkv" not in enabled)
    assert ("share_expert.up_proj" in "".join(fused.state_dict())) == ("step3_gate_up" not in enabled)

    batch = small_batch(plain)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True) for model in (plain, fused)]
    for values in zip(*((output.logits[real], *(h[real] for h in output.hidden_states)) for output in outputs)):
        torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    generated = (model.generate(**batch, max_new_tokens=5, do_sample=False) for model in (plain, fused))
    assert torch.equal(*generated)

    source = load_file(directory / "model.safetensors")
    fused.save_pretrained(tmp_path / "whole")
    assert_same_tensors(load_file(tmp_path / "whole" / "model.safetensors"), source)
    assert "fusion_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    fused.model.language_model.save_pretrained(tmp_path / "part")
    plain.model.language_model.save_pretrained(tmp_path / "plain part")
    parts = [load_file(tmp_path / name / "model.safetensors") for name in ("part", "plain part")]
    assert_same_tensors(*parts)
    for parameter in fused.parameters():
        parameter.data.zero_()
    fused.load_state_dict(source)
    with torch.no_grad():
        torch.testing.assert_close(fused(**batch).logits[real], outputs[1].logits[real])


@pytest.mark.parametrize("model_class", [Step3TextForCausalLM, Step3VLModel, AutoModelForCausalLM])
def test_every_class_is_fused(directory, model_class):
    plain, fused = (load(directory, fusions, model_class) for fusions in (None, BOTH))
    assert [row["rewritten"] for row in fused.fusion_report()] == [True] * 6
    with torch.no_grad():
        torch.testing.assert_close(*(model(torch.arange(20, 40)[None])[0] for model in (plain, fused)))


def test_a_fused_decoding_step_compiles_whole(directory):
    plain, fused = (load(directory, fusions) for fusions in (None, BOTH))
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        past = cache_of(fused(ids[:, :-1]))
        logits = torch.compile(fused, fullgraph=True)(ids[:, -1:], cache=past).logits
        torch.testing.assert_close(logits, plain(ids).logits[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_few_rows_in_bfloat16(directory, rows):
    """Which have products of their own."""
    fused = load(directory, BOTH, dtype=torch.bfloat16).model.language_model.layers[0].mlp
    states = torch.randn(rows, 48, generator=torch.Generator().manual_seed(0)).bfloat16()[None]
    with torch.no_grad():
        expected = torch.nn.functional.linear(states.double(), fused.gate_up_proj.weight.double())
        torch.testing.assert_close(fused.gate_up_proj(states).double(), expected, atol=0.02, rtol=0.02)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["step3_vl"] = None  # as on a machine that does not have it
import torch
from transformers import AutoModelForImageTextToText
fusions = {"step3_qkv": True, "step3_gate_up": True}
fused, plain = (
    AutoModelForImageTextToText.from_pretrained(
        sys.argv[1], trust_remote_code=True, dtype=torch.float32, fusion_config=fusion_config
    )
    for fusion_config in (fusions, None)
)
for model, rewritten in ((fused, True), (plain, False)):
    assert {row["rewritten"] for row in model.fusion_report()} == {rewritten}
    assert type(model).__module__.startswith("transformers_modules.")
ids = torch.arange(20)[None]
torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
"""


def test_remote_code_is_fused_too(tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(ROOT / "checkpoints" / "step3-tiny")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_fp8_weights_are_fused_once_they_are_dequantised(tmp_path, monkeypatch):
    directory = make_fp8_checkpoint(tmp_path / "model", "hidden_size=256", "moe_intermediate_size=128")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        torch.testing.assert_close(*(load(directory, f, dtype=torch.float32)(ids).logits for f in (None, BOTH)))
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="fusion_config.*step3_qkv.* does not go with a model that is quantised"):
        load(directory, BOTH)
    assert not any(row["rewritten"] for row in load(directory).fusion_report())


def test_what_does_not_go_is_refused(directory, monkeypatch):
    with pytest.raises(ValueError, match="`fusion_config` must name some of step3_qkv, step3_gate_up, got qkv"):
        load(directory, {"qkv": True})
    with pytest.raises(TypeError, match="`fusion_config` must be a dictionary of fusions, got list"):
        load(directory, ["step3_qkv"])
    another = type(transformers.fusion_mapping._FUSION_REGISTRY["step3_qkv"])(
        "another", "Step3TextAttention", ("self_attn",), ("k_proj", "v_proj"), "k_v_proj", lambda config, _: [16, 16]
    )
    monkeypatch.setitem(transformers.fusion_mapping._FUSION_REGISTRY, "another", another)
    with pytest.raises(ValueError, match="`step3_qkv` and `another`, which both replace Step3TextAttention"):
        load(directory, {**BOTH, "another": True})
    plain = load(directory)  # nothing of it is left
    assert type(plain.model.language_model.layers[0].self_attn).__name__ == "Step3TextAttention"
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in plain.state_dict()
