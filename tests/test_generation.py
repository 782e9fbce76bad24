import copy
import inspect

import pytest
import torch
from conftest import IMAGE_TOKEN, PICTURES, pictures_of, row_alone, small_config, small_model
from PIL import Image
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    pipeline,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import step3_vl.modeling_step3
from step3_vl import Step3TextForCausalLM


pytestmark = pytest.mark.releases


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.fixture
def encoder_calls(model):
    """The pictures that go through the vision encoder, a shape for each call."""
    calls = []
    model.model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple([*args, *kwargs.values()][0].shape)), with_kwargs=True
    )
    return calls


def greedy_by_hand(model, inputs, steps):
    """The whole sequence through the model anew for each token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
        logits[:, model.config.text_config.eos_token_id] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, STATIC])
def test_greedy(model, batch, encoder_calls, options):
    expected = greedy_by_hand(model, batch, 8)
    encoder_calls.clear()
    assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)
    if options.get("use_cache", True):  # once, at prefill
        assert encoder_calls == [(3, 3, 112, 112), (3, 3, 56, 56)]
    model.config.text_config.output_router_logits = True
    assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)


@pytest.mark.defect(29)
@pytest.mark.parametrize("options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, **STATIC}])
def test_beams_keep_each_rows_own_pictures(model, batch, encoder_calls, options):
    together = model.generate(**batch, **GREEDY, **options)
    assert encoder_calls == [(3, 3, 112, 112), (3, 3, 56, 56)]  # not once for each beam
    for row, answers in enumerate(together.chunk(3)):
        alone = model.generate(**row_alone(batch, row), **GREEDY, **options)
        assert torch.equal(answers[:, -8:], alone[:, -8:])


def test_sampled_sequences_see_their_own_pictures(model, batch):
    """Sampling that leaves one choice is greedy."""
    sampled = model.generate(**batch, **{**GREEDY, "do_sample": True}, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled, model.generate(**batch, **GREEDY).repeat_interleave(2, 0))


@pytest.mark.parametrize("assistant", ["early exit", "model", "narrow model"])
def test_assisted_decoding_is_greedy(model, batch, assistant):
    inputs, options = row_alone(batch, 2), {"assistant_early_exit": 2}
    if assistant != "early exit":
        width = 40 if assistant == "narrow model" else 48
        text = {"num_hidden_layers": 2, "moe_layers_enum": "1", "hidden_size": width}
        options = {"assistant_model": small_model(small_config(text=text))}
    assert torch.equal(model.generate(**inputs, **GREEDY, **options), model.generate(**inputs, **GREEDY))


def test_an_assistant_sees_the_pictures_for_itself(model, batch):
    """One that is equal to the model proposes what the model answers, five tokens at once."""
    inputs, assistant, proposals = row_alone(batch, 2), small_model(), []
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.assistant_confidence_threshold = 0
    generate = assistant.generate

    def watched(*args, **kwargs):
        proposals.append(generate(*args, **kwargs))
        return proposals[-1]

    assistant.generate = watched
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 96}
    output = model.generate(**inputs, **options, assistant_model=assistant)
    assert torch.equal(output, model.generate(**inputs, **options))
    first = proposals[0].sequences
    assert first.shape[1] == inputs["input_ids"].shape[1] + 5 and torch.equal(first, output[:, :-1])


def test_the_pipeline_answers_as_generate_does(random_model_dir, processor):
    answer = pipeline("image-text-to-text", model=str(random_model_dir), device_map="auto")
    content = [{"type": "image", "image": Image.new("RGB", (300, 100), "teal")}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    text = answer(messages, generate_kwargs=GREEDY, return_full_text=False)[0]["generated_text"]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = answer.model.generate(**inputs, **GREEDY)
    assert text == processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, STATIC])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_a_prompt_with_pictures_in_chunks(model, batch, chunk, options):
    expected = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(model.generate(**batch, **GREEDY, **options, prefill_chunk_size=chunk), expected)


chunks_forget = pytest.mark.skipif(
    "past_length = 0\n" in inspect.getsource(GenerationMixin._prefill), reason="chunks forget what the cache holds here"
)


@pytest.mark.parametrize("chunk", [None, *(pytest.param(size, marks=chunks_forget) for size in (3, 8))])
@pytest.mark.parametrize("form", ["all pictures", "all features", "new pictures", "new tokens"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_second_turn_with_pictures(model, batch, form, beams, chunk):
    """Padding stands before the first turn, and before the second; the cache holds the first with its pictures."""
    pictures = {name: batch.pop(name) for name in PICTURES}
    both = {name: torch.cat([value, value.roll(1, 0)], 1) for name, value in batch.items()}
    patches = pictures["patch_pixel_values"].split(pictures["num_patches"].tolist())

    def select(images):
        chosen = {name: pictures[name][images] for name in ("pixel_values", "num_patches")}
        return {**chosen, "patch_pixel_values": torch.cat([patches[image] for image in images])}

    rows, options = [[], [0], [1, 2]], {**GREEDY, "num_beams": beams}
    given = every = select([image for row in range(3) for image in rows[row] + rows[row - 1]])
    expected = model.generate(**both, **every, **options)[:, -8:]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, **pictures, cache=cache, position_ids=(batch["attention_mask"].cumsum(-1) - 1).clamp(min=0))
    cache.batch_repeat_interleave(beams)
    if form == "all features":
        given = {"image_embeds": torch.cat(model.get_image_features(**every).pooler_output)}
    elif form != "all pictures":
        given = select([image for row in range(3) for image in rows[row - 1]])
    if form == "new tokens":
        both["input_ids"] = batch["input_ids"].roll(1, 0)
    output = model.generate(**both, **given, **options, cache=cache, prefill_chunk_size=chunk)
    assert torch.equal(output[:, -8:], expected)


@pytest.mark.parametrize("tokens", [2, 3, 5, 10])
def test_prompt_lookup_proposes_no_image_tokens(model, batch, tokens):
    for row in (1, 2):
        inputs = row_alone(batch, row)
        expected = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=tokens), expected)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 1}, {"num_beams": 2}])
def test_no_image_token_is_generated(model, batch, options):
    """Not even where it is the most probable one; a request's own tokens are suppressed beside it."""
    most_probable = torch.tensor([IMAGE_TOKEN, 8])
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, most_probable, 1e3))
    inputs = row_alone(batch, 2)
    output = model.generate(**inputs, max_new_tokens=5, suppress_tokens=[8], **options)[0, -5:]
    assert not set(output.tolist()) & {IMAGE_TOKEN, 8}
    other = model.generate(inputs["input_ids"], GenerationConfig(max_new_tokens=5), num_beams=1, do_sample=False)
    assert IMAGE_TOKEN not in other[0, -5:]


@pytest.mark.parametrize("part", ["whole", "text"])
def test_continuous_batching_is_greedy(model, part):
    if part == "whole" and "paged|sdpa" in ALL_ATTENTION_FUNCTIONS:
        pytest.skip("there it takes no model whose text config is a part of its config")
    if part == "text":
        model = Step3TextForCausalLM._from_config(model.config.text_config, attn_implementation="sdpa").eval()
    prompts = [[11, 12, 13, 14], [21, 22, 23, 24, 25, 26, 27], [31, 32]]
    expected = [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    room = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64, use_cuda_graph=False)
    config = GenerationConfig(**GREEDY, eos_token_id=1, pad_token_id=2)
    for count in (3, 1):  # a row alone decodes a single token at a time
        outputs = model.generate_batch(prompts[:count], generation_config=config, continuous_batching_config=room)
        assert [outputs[name].generated_tokens for name in sorted(outputs)] == expected[:count]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"rows, 48\), got \(15, 96\)", lambda x: {"image_embeds": x.repeat(1, 2)}),
        ("15 image tokens.*14 image features", lambda x: {"image_embeds": x[1:]}),
        ("only one of them", lambda x: {"image_embeds": x, "pixel_values": torch.zeros(3, 3, 112, 112)}),
    ],
)
def test_pictures_that_do_not_fit_are_named_before_anything_is_generated(model, batch, message, change):
    features = torch.cat(model.get_image_features(**pictures_of(batch)).pooler_output)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    for call in (model, model.generate):
        with torch.no_grad(), pytest.raises((ValueError, TypeError), match=message):
            call(**text, **change(features))


def test_pictures_need_a_prompt_and_an_assistant_that_sees_them(model, batch):
    with pytest.raises(ValueError, match="Pictures need `input_ids` or `inputs_embeds`"):
        model.generate(**pictures_of(batch))
    with pytest.raises(ValueError, match="choose an `assistant_model` that takes pictures"):
        assistant = Step3TextForCausalLM._from_config(model.config.text_config)
        model.generate(**row_alone(batch, 1), assistant_model=assistant)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize(
    "name",
    [
        "model.language_model.layers.1.self_attn.q_proj",
        "model.language_model.layers.2.self_attn.k_proj",
        "model.language_model.layers.1.moe.gate",
        "model.vision_model.transformer.layers.0.self_attn.qkv_proj",
        "lm_head",
    ],
)
def test_a_weight_that_is_not_finite_is_an_error_that_names_it(model, batch, name, options):
    inputs = {**row_alone(batch, 2), **GREEDY, **options}
    model.generate(**inputs)
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=f"not finite: there are NaN or infinite values in {name}.weight"):
        model.generate(**inputs)


def test_what_else_is_not_finite(model, batch):
    inputs = row_alone(batch, 2)
    pixels = torch.full_like(inputs["pixel_values"], torch.nan)
    with pytest.raises(RuntimeError, match="values overflow torch.float32, or the inputs or"):
        model.generate(**{**inputs, "pixel_values": pixels})
    biased = model.generate(**inputs, **GREEDY, sequence_bias={(5,): torch.inf})  # as the request says
    assert biased[0, -8:].tolist() == [5] * 8
    assistant = small_model()
    with torch.no_grad():
        assistant.lm_head.weight[0, 0] = torch.nan  # whose proposals are bad, and no more
    answer = model.generate(**inputs, **GREEDY, assistant_model=assistant)
    assert torch.equal(answer, model.generate(**inputs, **GREEDY))


def test_what_is_generated_ends_with_the_last_position(batch):
    model = small_model(small_config(text={"max_position_embedding": 20}))
    inputs = row_alone(batch, 2)
    new = 20 - inputs["input_ids"].shape[1]
    greedy = {"do_sample": False, "min_new_tokens": new}
    expected = model.generate(**inputs, **greedy, max_new_tokens=new)
    config = GenerationConfig(**greedy, max_new_tokens=50)
    text = {"num_hidden_layers": 2, "moe_layers_enum": "1", "max_position_embedding": 20}
    assistant = small_model(small_config(text=text))
    for each, options in (
        (model, {"max_new_tokens": 50}),
        (model, {"max_length": 60}),
        (model, {"max_new_tokens": 50, "prompt_lookup_num_tokens": 3}),
        (model, {"generation_config": config, "min_new_tokens": None}),
        (small_model(), {"max_new_tokens": 50, "assistant_model": assistant}),  # which bounds it
    ):
        assert torch.equal(each.generate(**inputs, **{**greedy, **options}), expected)
    assert config.max_new_tokens == 50
    with pytest.raises(ValueError, match="prompt has 20 tokens, which leaves none of the model's 20 positions"):
        model.generate(expected)
    padding = {"input_ids": torch.full((1, 10), 2), "attention_mask": torch.zeros(1, 10).long()}
    padded = {name: torch.cat([value, inputs[name]], 1) for name, value in padding.items()}
    output = model.generate(**padded, **pictures_of(inputs), **greedy, max_new_tokens=50)
    assert torch.equal(output[:, 10:], expected)  # padding takes no positions


@pytest.mark.parametrize("tokens", [2, 3, 5, 10])
def test_prompt_lookup_at_the_last_position(tokens):
    model = Step3TextForCausalLM._from_config(small_config(text={"max_position_embedding": 24}).text_config).eval()
    ids = torch.tensor([[11, 12] * 3])
    options = {"do_sample": False, "eos_token_id": 96}
    expected = model.generate(ids, **options, max_length=24)
    for end in ({"max_length": 24}, {"max_new_tokens": 100}):
        assert torch.equal(model.generate(ids, **options, **end, prompt_lookup_num_tokens=tokens), expected)


def test_what_is_counted_to_the_last_position():
    """Of new tokens alone, those that the mask knows of; of a padded prompt without a mask, the real ones."""
    config = small_config(text={"max_position_embedding": 24, "eos_token_id": 96})
    model = Step3TextForCausalLM._from_config(config.text_config).eval()
    ids = torch.arange(10, 23)[None]
    expected = model.generate(ids, do_sample=False, max_new_tokens=11)
    cache = DynamicCache()  # without layers, until it is used
    model.generate(ids[:, :10], max_new_tokens=1, past_key_values=cache)
    turn = {"attention_mask": torch.ones(1, 13).long(), "cache": cache, "do_sample": False}
    assert torch.equal(model.generate(ids[:, 10:], **turn, max_length=20)[:, 3:], expected[:, 13:])
    padded = torch.cat([torch.full((1, 10), 2), ids], 1)
    output = model.generate(padded, do_sample=False, max_new_tokens=30, pad_token_id=2)
    assert torch.equal(output[:, 10:], expected)


def test_pictures_that_were_forgotten_in_a_later_turn_are_warned_of(model, batch, monkeypatch):
    warned = []
    monkeypatch.setattr(step3_vl.modeling_step3.logger, "warning_once", warned.append)
    cache = DynamicCache(config=model.config)
    answer = model.generate(**row_alone(batch, 0), **GREEDY, cache=cache)
    assert not warned
    ids = torch.cat([answer, row_alone(batch, 1)["input_ids"]], 1)
    for given in (ids, ids[:, cache.get_seq_length() :]):  # all tokens, or those alone that the cache does not hold
        warned.clear()
        model.generate(given, attention_mask=torch.ones_like(ids), **GREEDY, cache=copy.deepcopy(cache))
        assert any("no pictures are given" in text for text in warned)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_compiled_step_serves_all_lengths(attention):
    torch._dynamo.reset()
    text = {"num_hidden_layers": 2, "moe_layers_enum": "1"}
    model = small_model(small_config(text=text), attn_implementation=attention)
    compile_config = CompileConfig(backend="eager", mode=None, fullgraph=True)  # what is traced, not what is made of it
    compile_config._compile_all_devices = True

    def check(length):
        ids = 20 + torch.arange(2 * length).view(2, length) % 7
        inputs = {"input_ids": ids, "attention_mask": (ids != 20).long().cummax(1).values}  # the first row is padded
        answer = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=compile_config)
        assert answer.tolist() == model.generate(**inputs, **GREEDY).tolist()

    check(9)
    check(20)  # the second length is the last one that is compiled for
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (12, 30, 45):
            check(length)
