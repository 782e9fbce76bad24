"""The cache that is bounded and can be cut back."""

import pytest
import torch
from conftest import assert_close, row_alone, small_batch, small_config, small_model

from step3_vl import Step3BoundedCache


pytestmark = pytest.mark.releases

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def test_it_is_used_as_a_dynamic_one(model, batch):
    assistant = small_model(small_config(text={"num_hidden_layers": 2, "moe_layers_enum": "1"}))
    alone = row_alone(batch, 2)
    for inputs, options in (
        (batch, {}),
        (batch, {"num_beams": 3}),
        (alone, {"prompt_lookup_num_tokens": 3}),
        (alone, {"assistant_model": assistant}),
    ):
        expected = model.generate(**inputs, **GREEDY, **options)
        cache = Step3BoundedCache(model.config, max_length=expected.shape[1] + 5)
        assert torch.equal(model.generate(**inputs, **GREEDY, **options, cache=cache), expected)


@torch.no_grad()
def test_more_than_fits_is_refused_before_any_layer_is_touched(model):
    cache = Step3BoundedCache(model.config, max_length=6)
    ids = torch.arange(20, 26)[None]
    model(ids[:, :4], cache=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="4 held and 3 new tokens are more than the cache's 6"):
        model(torch.arange(3)[None] + 11, cache=cache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before))
    assert_close(model(ids[:, 4:], cache=cache).logits, model(ids).logits[:, 4:])
    with pytest.raises(ValueError, match="Between 1 and 6 tokens can be kept, got 7"):
        cache.reclaim(7)
    with pytest.raises(ValueError, match="`max_length` must be at least 1"):
        Step3BoundedCache(model.config, 0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kept", [1, 5, 9])
@torch.no_grad()
def test_a_reclaimed_cache_answers_as_a_full_one_with_the_older_tokens_masked(attention, kept):
    model = small_model(attn_implementation=attention)
    batch = small_batch(model)
    length = batch["input_ids"].shape[1]
    cache = Step3BoundedCache(model.config, max_length=length)
    model(**batch, cache=cache)
    full = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    cache.reclaim(kept)
    assert sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers) * length == full * kept
    assert cache.get_seq_length() == length
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    # The whole sequence anew; from the first new token on, what is older than the kept ones is not attended to.
    for new in (torch.tensor([[41, 42], [43, 44], [45, 46]]), torch.tensor([[51], [52], [53]])):
        ids = torch.cat([ids, new], 1)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        total = ids.shape[1]
        rows, columns = torch.arange(total)[:, None], torch.arange(total)[None]
        seen = (columns <= rows) & ((rows < length) | (columns >= length - kept))
        seen = seen[None, None] & mask.bool()[:, None, None]
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        if attention == "sdpa":
            additive = seen | torch.eye(total, dtype=torch.bool)  # padding attends to itself
        positions = torch.arange(total)[None]
        pictures = {name: batch[name] for name in ("pixel_values", "patch_pixel_values", "num_patches")}
        expected = model(ids, attention_mask=additive, position_ids=positions, **pictures, use_cache=False).logits
        logits = model(new, attention_mask=mask, cache=cache, position_ids=positions[:, -new.shape[1] :]).logits
        assert_close(logits, expected[:, -new.shape[1] :])
    cache.crop(-1)
    assert cache.get_seq_length() == total - 1 and cache.layers[0].keys.shape[2] == kept + 2


@torch.no_grad()
def test_a_conversation_goes_on(model):
    """Turn after turn in a cache that holds less than all of them, with positions that go on."""
    cache = Step3BoundedCache(model.config, max_length=20)
    ids = torch.arange(20, 32)[None]
    for _ in range(4):
        output = model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, **GREEDY)
        assert cache.get_seq_length() == output.shape[1] - 1
        cache.reclaim(8)
        ids = torch.cat([output, torch.tensor([[41, 42]])], 1)
    assert output.shape[1] > 20
