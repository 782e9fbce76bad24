"""What releases of transformers call the cache: both names are taken."""

import functools
import inspect

import pytest
import torch
from conftest import cache_of, pictures_of, row_alone, small_config
from transformers import DynamicCache, StaticCache

from step3_vl import Step3TextForCausalLM, Step3TextModel, Step3VLForConditionalGeneration, Step3VLModel
from step3_vl.generation_step3 import CACHE_NAME


# Those who give a cache by its older name are told so by releases that call it otherwise.
pytestmark = [pytest.mark.releases, pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")]


IDS = torch.arange(20, 30)[None]
NAMES = ("cache", "past_key_values")
OTHER_NAME = next(name for name in NAMES if name != CACHE_NAME)
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(params=[Step3TextModel, Step3TextForCausalLM, Step3VLModel, Step3VLForConditionalGeneration])
def any_model(request):
    config = small_config()
    if request.param in (Step3TextModel, Step3TextForCausalLM):
        config = config.text_config
    return request.param._from_config(config).eval()


@torch.no_grad()
def test_a_forward_takes_a_cache_by_either_name_and_no_other(any_model):
    expected = any_model(IDS)[0][:, -1]
    for name in NAMES:
        cache = DynamicCache(config=any_model.config)
        any_model(IDS[:, :-1], **{name: cache})
        assert cache.get_seq_length() == 9
        torch.testing.assert_close(any_model(IDS[:, -1:], **{name: cache})[0][:, -1], expected)
    both = dict.fromkeys(NAMES, cache)
    with pytest.raises(ValueError, match="`cache` or by its older name `past_key_values`, not as both"):
        any_model(IDS[:, -1:], **both)
    with pytest.raises(TypeError, match="`kv_cache` is a cache under a name that this model does not know"):
        any_model(IDS[:, -1:], kv_cache=cache)
    assert cache.get_seq_length() == 10
    # By position, too, it comes where transformers' own models have it.
    parameters = list(inspect.signature(type(any_model).forward).parameters)
    assert parameters.index("cache") == parameters.index("inputs_embeds") - 1
    assert cache_of(any_model(IDS)).get_seq_length() == 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [DynamicCache, functools.partial(StaticCache, max_cache_len=64)])
def test_generate_takes_a_cache_by_either_name(model, batch, name, make):
    cache = make(config=model.config)
    output = model.generate(**batch, **GREEDY, disable_compile=True, **{name: cache})
    assert torch.equal(output, model.generate(**batch, **GREEDY))
    assert int(cache.get_seq_length()) == output.shape[1] - 1
    with pytest.raises(ValueError, match="not as both"):
        model.generate(**batch, **GREEDY, **dict.fromkeys(NAMES, cache))


@pytest.mark.parametrize("left_over", [(), ("num_patches",), ("mm_encoder_outputs",)])
def test_what_is_left_of_the_pictures_of_a_cache_does_not_disturb(model, batch, left_over):
    first = {**row_alone(batch, 2), "mm_encoder_outputs": {}}
    cache = DynamicCache(config=model.config)
    answer = model.generate(**first, **GREEDY, **{CACHE_NAME: cache})
    ids = torch.cat([answer, torch.tensor([[41, 42, 43]])], 1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    output = model.generate(**second, **{name: first[name] for name in left_over}, **{CACHE_NAME: cache})
    assert torch.equal(output, model.generate(**second, **pictures_of(first)))


def test_preparing_inputs_takes_either_name(model):
    for each in (model, Step3TextForCausalLM._from_config(model.config.text_config)):
        for name in NAMES:
            cache = DynamicCache(config=each.config)
            inputs = each.prepare_inputs_for_generation(IDS, **{name: cache})
            assert inputs[CACHE_NAME] is cache and OTHER_NAME not in inputs
        with pytest.raises(ValueError, match="not as both"):
            each.prepare_inputs_for_generation(IDS, **dict.fromkeys(NAMES, cache))
