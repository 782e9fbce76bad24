"""What the model takes, what it refuses before anything is changed, and what the checks cost."""

import copy
import sys

import pytest
import torch
from conftest import PICTURES, assert_close, assert_same_tensors, cache_of, small_batch, small_config, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import step3_vl.modeling_step3
from step3_vl import Step3TextForCausalLM, Step3TextModel, Step3VLModel


IDS = torch.tensor([[11, 12, 13], [21, 22, 23]])


def run(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


@pytest.mark.defect(3)
def test_masks_of_every_kind(model, batch):
    expected = run(model, **batch).logits
    real = batch["attention_mask"].bool()
    visible = torch.ones(real.shape[1], real.shape[1]).tril().bool() & real[:, None, None]
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    for mask in (visible, additive, {"full_attention": additive}):
        assert_close(run(model, **{**batch, "attention_mask": mask}).logits[real], expected[real])
    assert_close(run(model, IDS).logits, run(model, IDS, attention_mask=torch.ones_like(IDS)).logits)


@pytest.mark.releases
@pytest.mark.defect(11, 12, 23)
def test_pictures_and_text_in_every_form(model, batch):
    pictures = {name: batch.pop(name) for name in PICTURES}
    beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
    expected, answer = run(model, **batch, **pictures).logits, model.generate(**batch, **pictures, **beams)
    features = torch.cat(run(model.get_image_features, **pictures).pooler_output)
    shapes = ((15, 48), (1, 15, 48), (3, 5, 48), (1, 5, 3, 48))
    for form in (*map(features.view, shapes), features.split([6, 4, 5]), list(features.split([6, 9]))):
        assert_close(run(model, **batch, image_embeds=form).logits, expected)
        assert torch.equal(model.generate(**batch, image_embeds=form, **beams), answer)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    before = embeds.clone()
    for form in (pictures, {"image_embeds": features}):
        assert_close(run(model, inputs_embeds=embeds, **batch, **form).logits, expected)
        assert torch.equal(model.generate(inputs_embeds=embeds, **batch, **form, **beams), answer[:, -3:])
    assert torch.equal(embeds, before)


def test_image_tokens_without_pictures_are_tokens_like_others(model, batch, monkeypatch):
    warned = []
    monkeypatch.setattr(step3_vl.modeling_step3.logger, "warning_once", warned.append)
    logits = run(model, batch["input_ids"]).logits
    assert warned == ["The text has image tokens, but no pictures are given: their own embeddings are used."]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    assert torch.equal(logits, run(model, inputs_embeds=embeds).logits)


@pytest.mark.defect(22)
@pytest.mark.parametrize("model_class", [Step3TextModel, Step3TextForCausalLM, Step3VLModel, None])
def test_a_resized_vocabulary_is_the_one_that_is_checked(model_class, tmp_path):
    model = small_model()
    if model_class is not None:
        config = model.config if model_class is Step3VLModel else model.config.text_config
        model = model_class._from_config(config).eval()
    if hasattr(model.config, "image_token_id"):
        with pytest.raises(ValueError, match="vocabulary of 7 would not have `image_token_id` 7 any more"):
            model.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="vocabulary of 2 would not have `.*_token_id` [27] any more"):
        model.resize_token_embeddings(1, pad_to_multiple_of=2)
    assert model.get_input_embeddings().weight.shape[0] == 97
    before = run(model, IDS)[0]
    model.resize_token_embeddings(100)
    assert_close(run(model, IDS)[0][..., :97], before)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path)):
        run(each, torch.tensor([[11, 99]]))
        with pytest.raises(IndexError, match="out of range"):
            run(each, torch.tensor([[11, 100]]))
    model.resize_token_embeddings(50)
    with pytest.raises(IndexError, match="out of range"):
        run(model, torch.tensor([[11, 50]]))


def pixels(*shape: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.zeros(shape)}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("exactly one of `input_ids` and `inputs_embeds`", {"input_ids": None}),
        ("exactly one of `input_ids` and `inputs_embeds`", {"inputs_embeds": torch.ones(3, 14, 48)}),
        ("has 0 image tokens.* 15 image features", {"input_ids": torch.full((3, 14), 11)}),
        (
            "has 15 image tokens.*14 image features",
            {"num_patches": torch.tensor([2, 0, 0]), "patch_pixel_values": torch.zeros(2, 3, 56, 56)},
        ),
        (r"the 0 patches of `patch_pixel_values`, got \[2, 0, 1\]", {"patch_pixel_values": None}),
        (r"the 3 patches of `patch_pixel_values`, got \[0, 0, 0\]", {"num_patches": None}),
        (r"the 3 patches of `patch_pixel_values`, got \[2, 0, 2\]", {"num_patches": torch.tensor([2, 0, 2])}),
        (r"the 2 pictures of `pixel_values`", pixels(2, 3, 112, 112)),
        *(
            (rf"Pictures must .*got \({', '.join(map(str, shape))}\)", pixels(*shape))
            for shape in ((3, 112, 112), (3, 4, 112, 112), (3, 3, 100, 100), (3, 3, 112, 98))
        ),
        (r"must hold `full_attention`, got \['sliding_attention'\]", {"attention_mask": {"sliding_attention": None}}),
        *(
            (r"`attention_mask` must have the shape.*got \(", {"attention_mask": torch.ones(shape)})
            for shape in ((3, 13), (1, 14), (3, 14, 14), (3, 1, 13, 14))
        ),
        (r"`position_ids` must have the tokens' shape, \(3, 14\), got \(2, 14\)", {"position_ids": torch.ones(2, 14)}),
        (r"`labels` must have the shape \(3, 14\) .* got \(14, 3\)", {"labels": torch.ones(14, 3).long()}),
    ],
)
@pytest.mark.defect(4, 5, 9, 10, 14)
def test_what_does_not_fit_is_refused(model, batch, message, changes):
    assert batch["input_ids"].shape == (3, 14)
    before = copy.deepcopy(batch)
    with pytest.raises(ValueError, match=message):
        run(model, **{**batch, **changes})
    assert_same_tensors(batch, before)


def test_image_features_of_another_form_are_refused(model, batch):
    features = run(model, **batch).image_hidden_states
    patches = batch.pop("patch_pixel_values")
    pictures = {name: batch.pop(name) for name in ("pixel_values", "num_patches")}
    for message, given in (
        (r"shape \(..., rows, 48\), got \(48, 15\)", {"image_embeds": features.T}),
        (r"shape \(..., rows, 48\), got \(720,\)", {"image_embeds": (features.flatten(),)}),
        ("only one of them", {**pictures, "image_embeds": features}),
        ("belong to `pixel_values`", {"patch_pixel_values": patches}),
        (r"must hold `image`, got \['video'\]", {"mm_encoder_outputs": {"video": features}}),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, **batch, **given)


@pytest.mark.defect(5)
def test_rows_of_the_encoder_that_make_no_square_are_refused(model):
    with pytest.raises(RuntimeError, match=r"sizes \[3, 3\] don't multiply up to the size of dim 2 \(15\)"):
        model.model.project(torch.zeros(1, 15, 32))


@pytest.mark.defect(14)
def test_a_step_that_is_refused_leaves_the_cache_as_it_was(model, batch):
    cache = cache_of(run(model, **batch))
    ids, mask = torch.full((3, 2), 15), torch.cat([batch["attention_mask"], torch.ones(3, 2).long()], 1)
    expected = run(model, ids, attention_mask=mask, cache=copy.deepcopy(cache)).logits
    wider = cache_of(run(small_model(small_config(text={"head_dim": 32})), **batch))
    deeper = cache_of(run(small_model(small_config(text={"num_hidden_layers": 4})), **batch))
    other_rows = StaticCache(config=model.config, max_cache_len=20)
    run(model, torch.full((2, 14), 15), cache=other_rows)
    for message, changes in (
        (r"for 14 cached and \(3, 2\) new tokens, got \(3, 15\)", {"attention_mask": mask[:, :-1]}),
        (r"for 14 cached and \(3, 2\) new tokens, got \(2, 16\)", {"attention_mask": mask[:2]}),
        (
            r"\(batch, head_dim\) \(2, 16\), got 3 with \[\(3, 16\)\]",
            {"input_ids": ids[:2], "attention_mask": mask[:2]},
        ),
        ("index out of range", {"input_ids": ids + 97}),
        ("between 0 and 511, got -1 to -1", {"position_ids": torch.full_like(ids, -1)}),
        (r"`cache` must have .* got 3 with \[\(3, 32\)\]", {"cache": wider}),
        (r"`cache` must have 3 layers .* got 4", {"cache": deeper}),
        (r"`cache` must have .* got 3 with \[\(2, 16\)\]", {"cache": other_rows}),
    ):
        with pytest.raises((ValueError, RuntimeError, IndexError), match=message):
            run(model, **{"input_ids": ids, "attention_mask": mask, "cache": cache, **changes})
    assert {int(each.get_seq_length()) for each in (cache, wider, deeper, other_rows)} == {14}
    assert torch.equal(run(model, ids, attention_mask=mask, cache=cache).logits, expected)


@pytest.mark.defect(19)
def test_positions_lie_within_the_models(model):
    positions = torch.arange(3).expand(2, 3)
    assert_close(run(model, IDS, position_ids=positions).logits, run(model, IDS).logits)
    for shift in (-1, 510):
        with pytest.raises(ValueError, match=f"between 0 and 511, got {shift} to {shift + 2}"):
            run(model, IDS, position_ids=positions + shift)
    with pytest.raises(RuntimeError, match="`position_ids` must lie between 0 and 511"):  # a step does not wait
        run(model, IDS[:, :1], position_ids=torch.tensor([[512]]))
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    scaled = small_model(small_config(text={"rope_parameters": scaling}))
    run(scaled, IDS, position_ids=positions + 510)
    with pytest.raises(ValueError, match="between 0 and 2047"):
        run(scaled, IDS, position_ids=positions + 2046)


class NoHostReads(TorchDispatchMode):
    """Refuses every operation that has to wait for a tensor's values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.WAITING), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_a_decoding_step_never_waits_and_checks_little(cache, experts):
    model = small_model(experts_implementation=experts)
    batch = small_batch(model)
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=23)
    calls = {"all": 0, "checks": 0}

    def count(frame, event, _):
        if event == "call":
            calls["all"] += 1
            while frame is not None and not frame.f_code.co_name.startswith(("_check_", "check_")):
                frame = frame.f_back
            calls["checks"] += frame is not None

    with torch.no_grad():
        model(**batch, cache=past)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 1).long()], 1)
        step = {"input_ids": torch.full((3, 1), 11), "attention_mask": mask, "cache": past}
        step["position_ids"] = mask.sum(1, keepdim=True) - 1
        with NoHostReads():
            model(**step)
        sys.setprofile(count)
        model(**{**step, "attention_mask": torch.cat([mask, mask[:, -1:]], 1)})
        sys.setprofile(None)
    assert 0 < calls["checks"] < 0.1 * calls["all"], calls


def test_a_compiled_step_serves_all_lengths_of_a_dynamic_cache():
    model = small_model(small_config(text={"num_hidden_layers": 1, "moe_layers_enum": "0"})).model.language_model
    step = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        past = cache_of(model(IDS))
        for length in range(4, 16):  # compiled for the first, and once more for the second
            with torch.compiler.set_stance("fail_on_recompile" if length > 5 else "default"):
                output = step(IDS[:, :1], attention_mask=torch.ones(2, length).long(), cache=past)
        expected = model(torch.cat([IDS, *[IDS[:, :1]] * 12], 1)).last_hidden_state[:, -1:]
    assert_close(output.last_hidden_state, expected)
