"""The cache that is bounded and can be cut back."""

import pytest
import torch
from conftest import assert_close, pictures_of, row_alone, small_batch, small_config, small_model
from transformers import DynamicCache, StaticCache

from step3_vl import Step3BoundedCache


pytestmark = pytest.mark.releases

GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@torch.no_grad()
def logits_of_seen(model, ids, seen, **pictures) -> torch.Tensor:
    """The whole sequence at once, with a mask of the tokens that each token attends to."""
    mask = seen
    if model.config._attn_implementation == "eager":
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.arange(ids.shape[1])[None]
    return model(ids, attention_mask=mask, position_ids=positions, **pictures, use_cache=False).logits


def test_it_gives_the_answers_of_a_dynamic_cache(model, batch):
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


@pytest.mark.defect(13)
@pytest.mark.parametrize("limit", ["bounded", "static", "positions"])
@torch.no_grad()
def test_neither_a_cache_nor_the_positions_are_overrun(model, limit):
    ids = torch.tensor([[11, 12, 13, 14, 15, 16], [21, 22, 23, 24, 25, 26]])
    message = "6 cached and 1 new tokens"
    if limit == "bounded":
        cache = Step3BoundedCache(model.config, max_length=6)
    elif limit == "static":
        cache, message = StaticCache(model.config, max_cache_len=6), "all tokens of the cache are taken"
    else:
        model = small_model(small_config(text={"max_position_embedding": 6}))
        cache = DynamicCache(config=model.config)
    model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="5 cached and 2 new tokens are more than the 6"):
        model(ids[:, :2], cache=cache)
    assert_close(model(ids[:, 5:], cache=cache).logits, model(ids).logits[:, 5:])
    keys = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises((ValueError, RuntimeError), match=message):
        model(ids[:, :1], cache=cache)
    assert all(torch.equal(layer.keys, before) for layer, before in zip(cache.layers, keys))
    assert int(cache.get_seq_length()) == 6


@torch.no_grad()
def test_what_does_not_fit_is_refused(model):
    ids = torch.arange(20, 26)[None]
    full, cut, making_room = (Step3BoundedCache(model.config, 6, keep=keep) for keep in (None, None, 2))
    for cache in (full, cut, making_room):
        model(ids, cache=cache)
    full.reclaim(1000)
    cut.reclaim(2)
    Step3BoundedCache(model.config, 6).reclaim(3)  # of none
    for message, call in (
        ("At least 1 token must be kept, got 0", lambda: full.reclaim(0)),
        ("must be at least 1 .* got -3", lambda: Step3BoundedCache(model.config, -3)),
        ("`keep` below it, got 6 and 6", lambda: Step3BoundedCache(model.config, 6, keep=6)),
        ("3 tokens cannot be removed: 2 are held, the others were dropped", lambda: cut.crop(-3)),
        ("`attention_mask` must have", lambda: model(ids[:, :1], cache=making_room, attention_mask=torch.ones(1, 3))),
        ("7 new tokens do not fit in a cache of 6", lambda: model(torch.arange(20, 27)[None], cache=making_room)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert full.layers[0].num_held == making_room.layers[0].num_held == 6  # what is refused drops nothing


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kept", [1, 5, 9])
@torch.no_grad()
def test_a_reclaimed_cache_answers_as_a_full_one_with_the_older_tokens_masked(attention, kept):
    model = small_model(attn_implementation=attention)
    batch = small_batch(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    length = ids.shape[1]
    cache = Step3BoundedCache(model.config, max_length=length)
    model(**batch, cache=cache)
    full = sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers)
    cache.reclaim(kept)
    assert sum(layer.keys.untyped_storage().nbytes() for layer in cache.layers) * length == full * kept
    assert cache.get_seq_length() == length
    # From the first new token on, what is older than the kept ones is not attended to.
    for new in (torch.tensor([[41, 42], [43, 44], [45, 46]]), torch.tensor([[51], [52], [53]])):
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        total = ids.shape[1]
        rows, columns = torch.arange(total)[:, None], torch.arange(total)[None]
        seen = (columns <= rows) & ((rows < length) | (columns >= length - kept)) & mask.bool()[:, None, None]
        expected = logits_of_seen(model, ids, seen | (rows == columns), **pictures_of(batch))  # padding sees itself
        positions = torch.arange(total)[None, -new.shape[1] :]
        logits = model(new, attention_mask=mask, cache=cache, position_ids=positions).logits
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


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *((Step3BoundedCache, options) for options in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3})),
        *((StaticCache, options) for options in ({}, {"num_beams": 2})),
    ],
)
def test_an_answer_ends_where_the_cache_is_full(model, batch, make, options):
    inputs, cache = row_alone(batch, 2), make(model.config, 18)
    options = {"do_sample": False, "disable_compile": True, **options}
    output = model.generate(**inputs, **options, max_new_tokens=50, min_new_tokens=3, cache=cache)
    new = 3 if "prompt_lookup_num_tokens" in options else 5  # there is room for two more that are proposed
    assert output.shape[1] == 14 + new  # of which the last is not cached
    assert torch.equal(output, model.generate(**inputs, **options, max_new_tokens=new, min_new_tokens=3))
    with pytest.raises(ValueError, match="tokens, which leaves none of the cache's 18 tokens for an answer"):
        model.generate(torch.full((1, 19), 11), max_new_tokens=5, cache=cache)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_cache_that_makes_room_by_itself_lets_an_answer_go_on(attention):
    """Each token is the one that follows when only what is kept of the earlier ones is attended to."""
    model = small_model(attn_implementation=attention)
    inputs = row_alone(small_batch(model), 2)
    cache = Step3BoundedCache(model.config, 16, keep=9)
    output = model.generate(**inputs, max_new_tokens=60, min_new_tokens=60, do_sample=False, cache=cache)
    length, total = inputs["input_ids"].shape[1], output.shape[1]
    assert total == length + 60 and cache.layers[0].num_held <= 16

    seen, first = torch.zeros(1, 1, total, total, dtype=torch.bool), 0
    for position in range(total):
        if position >= length and position + 1 - first > 16:  # no room for this token
            first = position - 9
        seen[..., position, first : position + 1] = True
    logits = logits_of_seen(model, output, seen, **pictures_of(inputs))[0, length - 1 : -1]
    logits[:, [model.config.text_config.eos_token_id, model.config.image_token_id]] = -torch.inf
    assert torch.equal(logits.argmax(-1), output[0, length:])
