"""Rewrites of a loaded model: `fuse`, `unfuse`, `fusion_report`."""

import copy
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, assert_close, cache_of, small_batch, small_model
from safetensors.torch import load_file
from test_saving import assert_same_tensors
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from step3_vl import Step3TextForCausalLM, Step3VLModel


pytestmark = pytest.mark.releases


BOTH = ("step3_qkv", "step3_gate_up")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fusions") / "model"
    small_model().save_pretrained(directory)
    return directory


def load(directory, *fusions, model_class=AutoModelForImageTextToText, **kwargs):
    model = model_class.from_pretrained(directory, **kwargs).eval()
    if fusions:
        model.fuse(*fusions)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fusions", [("step3_qkv",), ("step3_gate_up",), BOTH])
def test_a_fused_model_answers_alike_and_is_saved_as_it_was(directory, tmp_path, fusions, attention):
    plain = load(directory, attn_implementation=attention)
    fused = load(directory, *fusions, attn_implementation=attention)
    report = {(row["fusion"], row["module"].split(".", 3)[3]): row for row in fused.fusion_report()}
    attentions, mlps = [f"{layer}.self_attn" for layer in range(3)], ["0.mlp", "1.share_expert", "2.share_expert"]
    assert list(report) == [("step3_qkv", name) for name in attentions] + [("step3_gate_up", name) for name in mlps]
    assert all(row["rewritten"] == (row["fusion"] in fusions) for row in report.values())
    assert not any(row["rewritten"] for row in plain.fusion_report())
    assert ("q_k_v_proj.weight" in str(dict(fused.named_parameters()).keys())) == ("step3_qkv" in fusions)
    assert fused.num_parameters() == plain.num_parameters()
    assert_same_tensors(fused.state_dict(), plain.state_dict())

    batch = small_batch(plain)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        outputs = [model(**batch, output_hidden_states=True) for model in (plain, fused)]
    for values in zip(*((output.logits[real], *(h[real] for h in output.hidden_states)) for output in outputs)):
        assert_close(*values)

    source = load_file(directory / "model.safetensors")
    fused.save_pretrained(tmp_path / "whole")
    assert_same_tensors(load_file(tmp_path / "whole" / "model.safetensors"), source)
    fused.model.language_model.save_pretrained(tmp_path / "part")
    plain.model.language_model.save_pretrained(tmp_path / "plain part")
    assert_same_tensors(*(load_file(tmp_path / name / "model.safetensors") for name in ("part", "plain part")))
    for state_dict in (source, plain.state_dict()):
        for parameter in fused.parameters():
            parameter.data.zero_()
        fused.load_state_dict(state_dict)
        with torch.no_grad():
            assert_close(fused(**batch).logits[real], outputs[1].logits[real])
    with pytest.raises(RuntimeError, match="k_proj.weight"):
        fused.load_state_dict({name: t for name, t in plain.state_dict().items() if "1.self_attn.k" not in name})

    fused.unfuse()
    assert [name for name, _ in fused.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert type(fused.model.language_model.layers[0].self_attn.k_proj) is torch.nn.Linear
    with torch.no_grad():
        assert torch.equal(fused(**batch).logits, plain(**batch).logits)


@pytest.mark.parametrize("model_class", [Step3TextForCausalLM, Step3VLModel, AutoModelForCausalLM])
def test_every_class_is_fused(directory, model_class):
    plain, fused = (load(directory, *fusions, model_class=model_class) for fusions in ((), BOTH))
    assert [row["rewritten"] for row in fused.fusion_report()] == [True] * 6
    with torch.no_grad():
        assert_close(*(model(torch.arange(20, 40)[None])[0] for model in (fused, plain)))


def test_a_fused_decoding_step_compiles_whole(directory):
    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        past = cache_of(fused(ids[:, :-1]))
        logits = torch.compile(fused, fullgraph=True)(ids[:, -1:], cache=past).logits
        assert_close(logits, plain(ids).logits[:, -1:])


def test_a_fused_model_is_trained_as_a_plain_one(directory):
    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    batch = small_batch(plain)
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    for expected, actual in zip(plain.state_dict().values(), fused.state_dict().values(), strict=True):
        assert_close(actual, expected)


def test_a_fused_model_in_data_parallel_has_the_plain_gradients(directory):
    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    batch = small_batch(plain)
    plain(**batch, labels=batch["input_ids"]).loss.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(fused)(**batch, labels=batch["input_ids"]).loss.backward()
    finally:
        dist.destroy_process_group()
    fused.unfuse()
    for (name, expected), (_, actual) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_an_adapter_on_a_fused_layer_sees_the_plain_one(directory):
    """As PEFT puts it in the layer's place, with the layer inside."""

    class Adapter(torch.nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            self.base_layer = base_layer

        def forward(self, hidden_states):
            return self.base_layer(hidden_states) + 1

    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    for model in (plain, fused):
        attention = model.model.language_model.layers[1].self_attn
        attention.k_proj = Adapter(attention.k_proj)
    assert type(fused.model.language_model.layers[1].self_attn.k_proj.base_layer) is torch.nn.Linear
    assert [row["rewritten"] for row in fused.fusion_report()] == [True, False, True, True, True, True]
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert_close(fused(ids).logits, plain(ids).logits)


def test_copies_and_pickles_stay_fused_and_are_their_own(directory, tmp_path):
    fused = load(directory, *BOTH)
    ids = torch.arange(20, 40)[None]
    torch.save(fused, tmp_path / "model.pt")
    with torch.no_grad():
        expected = fused(ids).logits
        copies = [copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))]
        copies += [torch.load(tmp_path / "model.pt", weights_only=False)]
        for parameter in fused.parameters():
            parameter.zero_()
        for each in copies:
            assert all(row["rewritten"] for row in each.fusion_report())
            assert torch.equal(each(ids).logits, expected)
            each.unfuse()
            assert_close(each(ids).logits, expected)


def test_fusing_in_one_thread_leaves_loading_in_another_alone(directory):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load(directory)(ids).logits
    loaded, right = load(directory), []

    def is_right(model) -> bool:
        with torch.no_grad():
            return torch.allclose(model(ids).logits, expected, atol=1e-3)

    def fuse():
        for _ in range(20):
            loaded.fuse(*BOTH)
            right.append(is_right(loaded))
            loaded.unfuse()

    def load_plainly():
        for _ in range(20):
            model = load(directory)
            right.append(is_right(model) and not any(row["rewritten"] for row in model.fusion_report()))

    threads = [threading.Thread(target=work) for work in (fuse, load_plainly)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 40


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["step3_vl"] = None  # as on a machine that does not have it
import torch
from transformers import AutoModelForImageTextToText
fused, plain = (
    AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
    for _ in range(2)
)
fused.fuse("step3_qkv", "step3_gate_up")
assert type(fused).__module__.startswith("transformers_modules.")
ids = torch.arange(20)[None]
torch.testing.assert_close(fused(ids).logits, plain(ids).logits)
"""


def test_remote_code_is_fused_too(tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(ROOT / "checkpoints" / "step3-tiny")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


def test_what_does_not_go_is_refused_before_anything_is_changed(directory):
    model = load(directory)
    layers = model.model.language_model.layers

    def fails(message, *names):
        with pytest.raises(ValueError, match=message):
            model.fuse(*names)
        assert not any(row["rewritten"] for row in model.fusion_report())

    fails("takes some of step3_qkv, step3_gate_up, each once, got .'qkv'", "qkv")
    fails(r"each once, got \(\)")
    fails("each once, got .'step3_qkv', 'step3_qkv'", "step3_qkv", "step3_qkv")
    weight = layers[2].self_attn.v_proj.weight
    weight.requires_grad_(False)
    fails("cannot be applied to model.language_model.layers.2.self_attn: .* some are frozen", *BOTH)
    weight.requires_grad_(True)
    hook = layers[2].share_expert.up_proj.register_forward_hook(lambda *_: None)
    fails("layers.2.share_expert: `up_proj` has hooks", *BOTH)
    hook.remove()
    layers[1].self_attn.q_proj = torch.nn.Sequential(layers[1].self_attn.q_proj)
    fails("`q_proj` is a Sequential: it is quantised, or has been replaced", *BOTH)
    with pytest.raises(ValueError, match=r"call `fuse.'step3_qkv'.` on the loaded model"):
        load(directory, fusion_config={"step3_qkv": True})
    model.fuse("step3_gate_up")
    with pytest.raises(ValueError, match="`step3_gate_up` is applied to .*mlp already"):
        model.fuse("step3_gate_up")
    with pytest.raises(RuntimeError, match="part of a fused one.* `unfuse` the model first"):
        model.model.language_model.layers[0].mlp.up_proj.register_forward_hook(print)
    with pytest.raises(ValueError, match="step3_qkv: nothing in this Step3VisionModel is rewritten by that"):
        model.model.vision_model.fuse("step3_qkv")


@torch.no_grad()
def test_a_state_dict_that_is_assigned_stays_fused(directory):
    fused = load(directory, *BOTH)
    other = small_model(seed=3).bfloat16()
    ids = torch.arange(20, 40)[None]
    expected = other(ids).logits
    for start in ("float32", "meta"):
        if start == "meta":
            fused.to("meta")
        fused.load_state_dict(other.state_dict(), assign=True)
        assert all(row["rewritten"] for row in fused.fusion_report())
        assert {parameter.dtype for parameter in fused.parameters()} == {torch.bfloat16}
        if start == "float32":
            torch.testing.assert_close(fused(ids).logits, expected, atol=0.1, rtol=0)
    assert not any(parameter.is_meta for parameter in fused.parameters())
