"""The defect report on the original remote code, one test a defect: what went wrong there, and what must hold here."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_close, cache_of, row_alone, small_batch, small_config, small_model
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from test_modeling_step3 import LargestAllocation
from test_saving import assert_same_tensors
from transformers import AutoModelForImageTextToText, StaticCache, set_seed

from step3_vl import Step3TextConfig, Step3VLForConditionalGeneration


IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def assert_rows_equal_rows_alone(model, batch, logits):
    for row in range(3):
        alone = run(model, **row_alone(batch, row)).logits[0]
        assert_close(logits[row][batch["attention_mask"][row].bool()], alone)


def test_defect_01_attention_dropout_is_a_setting_and_for_training_only():
    model = small_model(small_config(text={"attention_dropout": 0.5}))
    assert torch.equal(run(model, IDS).logits, run(model, IDS).logits)
    assert_close(run(model, IDS).logits, run(small_model(), IDS).logits)
    model.train()
    assert not torch.allclose(model(IDS).logits, model(IDS).logits)
    model(IDS, labels=IDS).loss.backward()
    for wrong in (-0.1, 1.5):
        with pytest.raises(StrictDataclassError, match=rf"'attention_dropout'.*\n.*got {wrong}"):
            model.config.text_config.attention_dropout = wrong
    vision = small_model(small_config(vision={"attention_dropout": 0.5})).model.vision_model
    pixels = torch.randn(1, 3, 112, 112)
    assert_close(run(vision, pixels)[0], run(small_model().model.vision_model, pixels)[0])


def test_defect_02_a_batch_is_its_rows(model, batch):
    logits = run(model, **batch).logits
    assert logits.shape[:2] == batch["input_ids"].shape
    assert_rows_equal_rows_alone(model, batch, logits)


def test_defect_03_masks_of_every_kind(model, batch):
    logits = run(model, **batch).logits
    real = batch["attention_mask"].bool()
    length = real.shape[1]
    visible = torch.ones(length, length).tril().bool() & real[:, None, None, :]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    text_only = {"input_ids": IDS}
    for mask in (visible, additive, {"full_attention": additive}):
        assert_close(run(model, **{**batch, "attention_mask": mask}).logits[real], logits[real])
    assert_close(run(model, **text_only).logits, run(model, **text_only, attention_mask=torch.ones_like(IDS)).logits)
    # Padding on the right: the same rows.
    order = (~real).int().argsort(dim=1, stable=True)
    right = {**batch, "input_ids": batch["input_ids"].gather(1, order), "attention_mask": real.gather(1, order).long()}
    assert_close(run(model, **right).logits[right["attention_mask"].bool()], logits[real])


def test_defect_04_patches_that_are_counted_must_be_there(model, batch):
    with pytest.raises(ValueError, match=r"add up to the 0 patches of `patch_pixel_values`, got \[2, 0, 1\]"):
        run(model, **{**batch, "patch_pixel_values": None})
    with pytest.raises(ValueError, match=r"add up to the 3 patches of `patch_pixel_values`, got \[0, 0, 0\]"):
        run(model, **{**batch, "num_patches": None})


def test_defect_05_pictures_are_square(model):
    with pytest.raises(ValueError, match=r"square of at least 2 x 2, got the shape \(1, 15, 32\)"):
        model.model.project(torch.zeros(1, 15, 32))
    with pytest.raises(ValueError, match=r"square with a side that is a multiple of 14 pixels, got \(1, 3, 112, 98\)"):
        model.get_image_features(torch.zeros(1, 3, 112, 98))


def test_defect_06_labels_give_the_loss(model):
    labels = IDS.clone()
    labels[0, :3] = -100
    output = run(model, IDS, labels=labels)
    log_probs = output.logits[:, :-1].log_softmax(-1)
    counted = labels[:, 1:] != -100
    expected = -log_probs.gather(2, IDS[:, 1:, None])[..., 0][counted].mean()
    assert_close(output.loss, expected)
    with pytest.raises(
        ValueError, match=r"`labels` must be int64 of the shape \(2, 5\) .* got torch.int64 of shape \(2, 4\)"
    ):
        run(model, IDS, labels=labels[:, :4])
    for wrong in (-1, 97):
        with pytest.raises(RuntimeError, match="`labels` must be -100 or lie between 0 and 96"):
            run(model, IDS, labels=labels.masked_fill(labels == 25, wrong))


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_defect_07_experts_are_within_range(experts):
    model = small_model(experts_implementation=experts)
    moe = model.model.language_model.layers[1].moe
    _, weights, chosen = moe.gate(torch.randn(50, 48))
    assert chosen.min() >= 0 and chosen.max() < 6 and weights.shape == (50, 2)
    for wrong in (-1, 6):
        with pytest.raises(RuntimeError, match="Indices of experts must lie between 0 and 5"):
            moe.experts(torch.randn(3, 48), torch.tensor([[0, 1], [2, wrong], [3, 4]]), torch.ones(3, 2))


def test_defect_08_moe_layers_in_every_form():
    for given in ("1,2", " 1, 2 ", [1, 2], (2, 1)):
        assert Step3TextConfig(num_hidden_layers=3, moe_layers_enum=given).moe_layers == [1, 2], given
    for given in ("", None):
        assert Step3TextConfig(num_hidden_layers=4, moe_layers_enum=given).moe_layers == [1, 2, 3]
    run(small_model(small_config(text={"moe_layers_enum": ""})), IDS)
    run(small_model(small_config(text={"moe_layers_enum": (1,)})), IDS)
    for wrong in ("1,x", "1,,2", [3], [-1], "-1", 5):
        with pytest.raises(StrictDataclassError, match="moe_layers_enum"):
            Step3TextConfig(num_hidden_layers=3, moe_layers_enum=wrong)


def test_defect_09_a_dictionary_of_masks_must_hold_the_layers_own(model):
    with pytest.raises(ValueError, match=r"must hold `full_attention`, got \['sliding_attention'\]"):
        run(model, IDS, attention_mask={"sliding_attention": torch.ones(2, 1, 5, 5).bool()})


@pytest.mark.parametrize("shape", [(112, 112), (3, 112, 112), (1, 1, 3, 112, 112), (1, 4, 112, 112), (1, 3, 100, 100)])
def test_defect_10_pictures_have_four_dimensions(model, shape):
    with pytest.raises(ValueError, match=r"Pictures must .*got \(" + ", ".join(map(str, shape))):
        model.get_image_features(torch.zeros(shape))


def test_defect_11_the_callers_embeddings_are_left_alone(model, batch):
    embeds = model.get_input_embeddings()(batch["input_ids"]).detach()
    before = embeds.clone()
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    assert_close(run(model, inputs_embeds=embeds, **rest).logits, run(model, **batch).logits)
    assert torch.equal(embeds, before)


def test_defect_12_features_are_flat(model, batch):
    output = model.get_image_features(*(batch[k] for k in ("pixel_values", "patch_pixel_values", "num_patches")))
    assert [tuple(feature.shape) for feature in output.pooler_output] == [(6, 48), (4, 48), (5, 48)]
    nested = [[[[feature]]] for feature in output.pooler_output]
    with pytest.raises(TypeError, match="`image_embeds` must be a tensor or a flat tuple of them, got list"):
        run(model, batch["input_ids"], image_embeds=nested)


def test_defect_13_a_cache_is_never_overrun(model):
    past = StaticCache(config=model.config, max_cache_len=6)
    expected = run(model, torch.cat([IDS, IDS[:, :1]], 1)).logits
    run(model, IDS, cache=past)
    with pytest.raises(ValueError, match="2 new tokens are more than the cache's 6"):
        run(model, IDS[:, :2], cache=past)
    assert_close(run(model, IDS[:, :1], cache=past).logits, expected[:, -1:])
    kept = past.layers[0].keys.clone()
    with pytest.raises(RuntimeError, match="no room for another token: the cache is full"):
        run(model, IDS[:, :1], cache=past)
    assert torch.equal(past.layers[0].keys, kept) and int(past.get_seq_length()) == 6

    short = small_model(small_config(text={"max_position_embedding": 6}))
    past = cache_of(run(short, IDS))
    with pytest.raises(ValueError, match="5 cached and 2 new tokens are more than `max_position_embedding`.* 6"):
        run(short, IDS[:, :2], cache=past)
    assert past.get_seq_length() == 5
    run(short, IDS[:, :1], cache=past)
    with pytest.raises(ValueError, match="6 cached and 1 new tokens"):
        run(short, IDS[:, :1], cache=past)


def test_defect_14_a_failed_call_loses_nothing(model, batch):
    expected = run(model, **batch)
    cached = cache_of(run(model, **batch))
    next_ids = torch.full((3, 2), 15)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 2).long()], 1)
    wanted = run(model, next_ids, attention_mask=mask, cache=copy.deepcopy(cached)).logits
    given = {name: value.clone() for name, value in batch.items()}
    for changes in (
        {"input_ids": batch["input_ids"] + 97},
        {"attention_mask": batch["attention_mask"][:, 1:]},
        {"position_ids": torch.full_like(batch["input_ids"], -1)},
        {"num_patches": torch.tensor([1, 1, 2])},
        {"pixel_values": batch["pixel_values"][:2]},
        {"labels": batch["input_ids"][:2]},
    ):
        with pytest.raises(ValueError):
            run(model, **{**batch, **changes})
    two_rows = {"input_ids": next_ids[:2], "attention_mask": mask[:2]}
    for changes in ({"attention_mask": mask[:, :-1]}, {"attention_mask": mask[:2]}, two_rows):
        with pytest.raises(ValueError):
            run(model, **{"input_ids": next_ids, "attention_mask": mask, "cache": cached, **changes})
    assert_same_tensors(batch, given)
    assert cached.get_seq_length() == batch["input_ids"].shape[1]
    assert torch.equal(run(model, next_ids, attention_mask=mask, cache=cached).logits, wanted)
    assert torch.equal(run(model, **batch).logits, expected.logits)


def test_defect_15_modules_hold_weights_and_no_state(model, batch):
    def contents():
        return {
            name: {key: value for key, value in vars(module).items() if not key.startswith("_")}
            for name, module in model.named_modules()
        }

    run(model, **batch)  # once, for what transformers itself notes down
    before = {name: dict(attributes) for name, attributes in contents().items()}
    model.generate(**batch, max_new_tokens=3)
    after = contents()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            assert value is after[name][key] or value == after[name][key], (name, key)
            assert not isinstance(value, torch.Tensor), (name, key)


def test_defect_16_a_layer_only_composes(model):
    hidden = torch.randn(2, 5, 48)
    decoder = model.model.language_model
    positions = decoder.rotary_emb(hidden, torch.arange(5)[None])
    mask = torch.zeros(5, 5).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)[None, None]
    for layer in decoder.layers:
        attended = hidden + layer.self_attn(layer.input_layernorm(hidden), positions, mask)[0]
        normed = layer.post_attention_layernorm(attended)
        branch = layer.moe(normed) + layer.share_expert(normed) if layer.is_moe else layer.mlp(normed)
        assert_close(layer(hidden, attention_mask=mask, position_embeddings=positions), attended + branch)


def test_defect_17_every_weight_is_initialised():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is then full of NaN
    try:
        assert torch.empty(3).isnan().all()
        set_seed(0)
        model = Step3VLForConditionalGeneration(small_config())
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if parameter.ndim > 1:
            assert 0.5 * 0.15 < parameter.std() < 2 * 0.15, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_defect_18_queries_must_go_with_keys(attention):
    layer = small_model(attn_implementation=attention).model.language_model.layers[0].self_attn
    layer.k_proj = torch.nn.Linear(48, 24, bias=False)  # keys of another width than head_dim
    layer.v_proj = torch.nn.Linear(48, 16, bias=False)
    positions = torch.zeros(1, 5, 16), torch.zeros(1, 5, 16)
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.randn(1, 5, 48), positions, None)
    from step3_vl.modeling_step3 import eager_attention_forward, share_key_value_heads

    interface = eager_attention_forward if attention == "eager" else share_key_value_heads(eager_attention_forward)
    query, key = torch.randn(1, 6, 5, 16), torch.randn(1, 1, 5, 24)
    with pytest.raises(ValueError, match=r"do not go with keys.*\(1, 6, 5, 16\), \(1, 1, 5, 24\)"):
        interface(layer, query, key, key, None, scaling=1.0)


def test_defect_19_positions_are_within_range(model):
    positions = torch.arange(5).expand(2, 5)
    assert_close(run(model, IDS, position_ids=positions).logits, run(model, IDS).logits)
    for shift in (-1, 508):
        with pytest.raises(ValueError, match=f"between 0 and 511, got {shift} to {shift + 4}"):
            run(model, IDS, position_ids=positions + shift)
    with pytest.raises(RuntimeError, match="`position_ids` must lie between 0 and 511"):
        run(model, IDS[:, :1], position_ids=torch.tensor([[512]]))
    with pytest.raises(ValueError, match=r"`position_ids` must have the tokens' shape, \(2, 5\), got \(2, 4\)"):
        run(model, IDS, position_ids=positions[:, :4])
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    scaled = small_model(small_config(text={"rope_parameters": scaling}))
    run(scaled, IDS, position_ids=positions + 508)
    with pytest.raises(ValueError, match="between 0 and 2047"):
        run(scaled, IDS, position_ids=positions + 2044)


def test_defect_20_no_dead_code():
    modules = [str(path) for path in ROOT.glob("*.py")]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F,ERA,PIE790", *modules]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_defect_21_everything_computed_is_returned(model, batch):
    model.set_attn_implementation("eager")
    output = run(model, **batch, labels=batch["input_ids"], output_hidden_states=True, output_attentions=True)
    length = batch["input_ids"].shape[1]
    assert output.loss.isfinite() and cache_of(output).get_seq_length() == length
    assert [state.shape for state in output.hidden_states] == [(3, length, 48)] * 4
    assert [weights.shape for weights in output.attentions] == [(3, 6, length, length)] * 3
    assert output.image_hidden_states.shape == (15, 48)
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_defect_22_embeddings_can_be_reached_and_replaced(model):
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    assert inputs.weight.shape == outputs.weight.shape == (97, 48)
    assert_close(run(model, inputs_embeds=inputs(IDS)).logits, run(model, IDS).logits)
    expected = run(model, IDS).logits
    model.resize_token_embeddings(100)
    assert_close(run(model, IDS).logits[..., :97], expected)


def test_defect_23_features_stand_in_for_pictures(model, batch):
    pictures = [batch.pop(k) for k in ("pixel_values", "patch_pixel_values", "num_patches")]
    features = torch.cat(model.get_image_features(*pictures).pooler_output).detach()
    expected = run(model, **batch, **dict(zip(("pixel_values", "patch_pixel_values", "num_patches"), pictures))).logits
    assert_close(run(model, **batch, image_embeds=features).logits, expected)


def test_defect_24_pictures_are_in_the_signature():
    parameters = inspect.signature(Step3VLForConditionalGeneration.forward).parameters
    assert {"pixel_values", "patch_pixel_values", "num_patches", "image_embeds"} <= parameters.keys()


def test_defect_25_no_setting_is_ignored(batch):
    hidden = torch.randn(7, 48)
    sums = {}
    for norm in (False, True):
        gate = small_model(small_config(text={"norm_expert_weight": norm})).model.language_model.layers[1].moe.gate
        sums[norm] = gate(hidden)[1].sum(-1)
    assert_close(sums[True], torch.ones(7))
    assert (sums[False] < 0.999).all()
    layer = small_model(small_config(vision={"layer_norm_eps": 0.3})).model.vision_model.transformer.layers[0]
    states = torch.randn(2, 5, 32)
    variance, mean = torch.var_mean(states, dim=-1, correction=0, keepdim=True)
    normed = (states - mean) / (variance + 0.3).sqrt() * layer.layer_norm1.weight + layer.layer_norm1.bias
    assert_close(layer.layer_norm1(states), normed)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_defect_26_only_chosen_experts_run_and_the_key_value_head_is_not_copied(experts):
    config = small_config(text={"num_attention_heads": 16, "head_dim": 32})
    model = small_model(config, experts_implementation=experts).model.language_model
    with torch.no_grad():
        for layer in model.layers[1:]:
            layer.moe.gate.weight.zero_()  # all are alike: the first two are chosen
    expected = run(model, IDS).last_hidden_state
    with torch.no_grad():
        for layer in model.layers[1:]:
            chosen = layer.moe.gate(torch.randn(1, 48))[2][0].tolist()
            others = [expert for expert in range(6) if expert not in chosen]
            layer.moe.experts.gate_up_proj[others] = torch.nan
            layer.moe.experts.down_proj[others] = torch.nan
    assert_close(run(model, IDS).last_hidden_state, expected)
    past = cache_of(run(model, torch.full((2, 300), 5)))
    with LargestAllocation() as allocation:
        run(model, torch.full((2, 1), 5), cache=past)
    assert allocation.largest < 2 * 2 * 301 * 32


def test_defect_27_vision_attention_can_be_switched(model, batch):
    expected = run(model, **batch).logits
    model.set_attn_implementation({"vision_config": "eager"})
    attentions = model.get_image_features(batch["pixel_values"], output_attentions=True).attentions
    assert len(attentions) == 2 and attentions[0].shape == (3, 4, 68, 68)
    assert_close(run(model, **batch).logits, expected)


def test_defect_28_released_names_load_by_themselves():
    directory = ROOT / "tests" / "goldens" / "mixed"
    model, report = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report
    stored = load_file(directory / "model.safetensors")
    assert torch.equal(model.model.vit_downsampler.weight, stored["vit_downsampler.weight"])
    assert torch.equal(model.model.language_model.norm.weight, stored["model.norm.weight"])


def test_defect_29_beams_and_samples_keep_their_pictures(model):
    batch = small_batch(model)
    beams = model.generate(**batch, num_beams=3, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5)
    for row in range(3):
        inputs = row_alone(batch, row)
        alone = model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5)
        assert torch.equal(beams[2 * row : 2 * row + 2, -5:], alone[:, -5:])


def test_defect_30_logits_are_made_only_where_wanted(model, batch):
    expected = run(model, **batch).logits
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert_close(run(model, **batch, logits_to_keep=2).logits, expected[:, -2:])
    assert_close(run(model, **batch, logits_to_keep=torch.tensor([1, 4])).logits, expected[:, [1, 4]])
    assert seen == [2, 2]
    seen.clear()
    model.generate(**batch, max_new_tokens=2)
    assert seen[0] == 1
