"""Rewrites of a loaded model: `fuse`, `unfuse`, `fusion_report`, `register_rewrite`."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from conftest import assert_close, assert_same_tensors, cache_of, small_batch, small_model, weights_in
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from step3_vl import Step3TextForCausalLM, Step3VLModel
from step3_vl.modeling_step3 import REWRITES, Rewrite, register_rewrite


pytestmark = pytest.mark.releases


BOTH = ("step3_qkv", "step3_gate_up")
IDS = torch.arange(20, 40)[None]


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


def logits(model, **inputs):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS}))[0]


def rewritten(model) -> list[bool]:
    return [row["rewritten"] for row in model.fusion_report()]


def count_products(model) -> int:
    """Linear layers that are called, or whose weights are multiplied, for a text."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        model(IDS)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linear")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("fusions", [("step3_qkv",), ("step3_gate_up",), BOTH])
def test_a_fused_model_answers_alike_and_is_saved_as_it_was(directory, tmp_path, fusions, attention):
    plain, fused = (load(directory, *names, attn_implementation=attention) for names in ((), fusions))
    report = {(row["fusion"], row["module"].split(".", 3)[3]): row["rewritten"] for row in fused.fusion_report()}
    modules = {"step3_qkv": [f"{layer}.self_attn" for layer in range(3)]}
    modules["step3_gate_up"] = ["0.mlp", "1.share_expert", "2.share_expert"]
    assert report == {(fusion, name): fusion in fusions for fusion in BOTH for name in modules[fusion]}
    saved = 6 * ("step3_qkv" in fusions) + 3 * ("step3_gate_up" in fusions)
    assert count_products(plain) - count_products(fused) == saved

    batch = small_batch(plain)
    assert_close(logits(fused, **batch), logits(plain, **batch))
    fused.save_pretrained(tmp_path)
    assert_same_tensors(weights_in(tmp_path), weights_in(directory))
    for state_dict in (weights_in(directory), plain.state_dict()):
        for parameter in fused.parameters():
            parameter.data.zero_()
        fused.load_state_dict(state_dict)
        assert_close(logits(fused), logits(plain))
    fused.double().float()
    assert count_products(plain) - count_products(fused) == saved

    fused.unfuse()
    assert not any(rewritten(fused))
    assert torch.equal(logits(fused), logits(plain))
    parameters = list(fused.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)


@pytest.mark.parametrize("model_class", [Step3TextForCausalLM, Step3VLModel, AutoModelForCausalLM])
def test_every_class_is_fused(directory, model_class):
    plain, fused = (load(directory, *fusions, model_class=model_class) for fusions in ((), BOTH))
    assert rewritten(fused) == [True] * 6
    assert_close(logits(fused), logits(plain))


def test_a_fused_decoding_step_compiles_whole(directory):
    plain, fused = (load(directory, *fusions, model_class=Step3TextForCausalLM) for fusions in ((), BOTH))
    with torch.no_grad():
        past = cache_of(fused(IDS[:, :-1]))
        step = torch.compile(fused, fullgraph=True, backend="eager")
        assert_close(step(IDS[:, -1:], cache=past).logits, logits(plain)[:, -1:])


def test_a_fused_model_is_trained_as_a_plain_one(directory):
    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    batch = small_batch(plain)
    for model in (plain, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    assert_same_tensors(fused.state_dict(), plain.state_dict())
    assert_close(logits(fused), logits(plain))  # which the steps have changed


def set_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def set_data_of_last_layers(model):
    for name, parameter in model.named_parameters():
        if name.endswith(("v_proj.weight", "up_proj.weight")):
            parameter.data = parameter.data.clone()


def replace_layers(model):
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj = torch.nn.Sequential(layer.self_attn.k_proj)


def register_hooks(model):
    for layer in model.model.language_model.layers:
        layer.self_attn.k_proj.register_forward_hook(lambda module, args, output: output)


@pytest.mark.parametrize(
    "change",
    [
        set_data,
        set_data_of_last_layers,
        replace_layers,
        register_hooks,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.load_state_dict(small_model().state_dict(), assign=True),
    ],
)
def test_whatever_becomes_of_the_layers_their_own_weights_are_used(directory, change):
    """After the weights are replaced or copied, a change of a layer's weight is a change of the answer."""
    plain, fused = (load(directory, *fusions) for fusions in ((), BOTH))
    changed = change(fused)
    changed = changed if isinstance(changed, torch.nn.Module) else fused
    for each in (plain, changed):
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "_proj" in name:
                    parameter.mul_(1.5)
    assert_close(logits(changed), logits(plain))


def test_what_cannot_be_fused_is_refused_and_nothing_is_changed(directory):
    model = load(directory)
    layers = model.model.language_model.layers

    def fails(message, *names):
        with pytest.raises(ValueError, match=message):
            model.fuse(*names)
        assert not any(rewritten(model))

    with pytest.raises(KeyError, match="'qkv'"):
        model.fuse("qkv")
    hook = layers[2].share_expert.up_proj.register_forward_hook(lambda *_: None)
    fails("cannot be applied to model.language_model.layers.2.share_expert: `up_proj` has hooks")
    hook.remove()
    layers[1].self_attn.q_proj = torch.nn.Sequential(layers[1].self_attn.q_proj)
    fails("`q_proj` is a Sequential: it is quantised, or has been replaced", *BOTH)


def test_a_rewrite_of_ones_own(directory, monkeypatch):
    """One that removes layers that do nothing, from the inside out, before the others."""
    monkeypatch.setattr("step3_vl.modeling_step3.REWRITES", dict(REWRITES))
    order = []

    def unwrap(module):
        order.append("unwrap")
        module.down_proj = module.down_proj[1]

    register_rewrite(
        Rewrite(
            "unwrap",
            match=lambda module: isinstance(getattr(module, "down_proj", None), torch.nn.Sequential),
            obstacle=lambda module: None,
            apply=unwrap,
            undo=lambda module: None,
            is_applied=lambda module: not isinstance(module.down_proj, torch.nn.Sequential),
            benefit=2.0,
        )
    )
    model = load(directory)
    expected = logits(model)
    mlp = model.model.language_model.layers[0].mlp
    for _ in range(2):
        mlp.down_proj = torch.nn.Sequential(torch.nn.Identity(), mlp.down_proj)
    model.fuse("step3_gate_up", "unwrap")
    assert type(mlp.down_proj) is torch.nn.Linear and order == ["unwrap"] * 2
    assert_close(logits(model), expected)
