import copy
import itertools
import json
import math
import random
import re
from functools import partial

import pytest
import torch
from conftest import (
    CACHE_NAME,
    GOLDENS,
    IMAGE_TOKEN,
    assert_close,
    cache_of,
    pictures_of,
    row_alone,
    small_batch,
    small_config,
    small_model,
    weights_in,
)
from reference import step3_logits
from safetensors.torch import load_file
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapping
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

from step3_vl import Step3BoundedCache, Step3VLConfig, Step3VLForConditionalGeneration, Step3VLModel, modeling_step3
from step3_vl.modeling_step3 import eager_attention_forward, share_key_value_heads, sum_products


@pytest.fixture
def not_compiled():
    """Flex attention as it is written: compiling takes half a minute, and `test_goldens` does it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.defect(24, 28)
@pytest.mark.parametrize(
    ("name", "attention", "experts"),
    [
        *itertools.product(("text_only", "mixed", "renorm"), ("eager", "sdpa"), ("eager", "step3")),
        *itertools.product(("mixed", "renorm"), ("sdpa",), ("batched_mm", "grouped_mm", "mapped")),
        # On a CPU flex attention takes heads 16, 32, 64, … wide: the text model's, except `renorm`'s.
        ("mixed", "flex_attention", "step3"),
    ],
)
def test_goldens(name, attention, experts):
    inputs = load_file(GOLDENS / name / "inputs.safetensors")
    expected = load_file(GOLDENS / name / "expected.safetensors")
    vision_attention = "sdpa" if attention == "flex_attention" else attention
    implementation = {"": attention, "text_config": attention, "vision_config": vision_attention}
    model = Step3VLForConditionalGeneration.from_pretrained(
        GOLDENS / name, attn_implementation=implementation, experts_implementation=experts
    )
    with torch.no_grad():
        output = model(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[real], expected["logits"][real], atol=1e-4, rtol=0)
    if "image_features" in expected:
        torch.testing.assert_close(output.image_hidden_states, expected["image_features"], atol=1e-4, rtol=0)


@pytest.mark.defect(25)
@pytest.mark.parametrize("seed", range(6))
def test_random_configs_match_the_reference(seed, tmp_path):
    draw = random.Random(seed)
    layers, experts, vision_heads = draw.randint(1, 4), draw.randint(2, 7), draw.choice([1, 2, 4])
    text = {
        "num_hidden_layers": layers,
        "num_attention_heads": draw.randint(1, 7),
        "head_dim": 2 * draw.randint(2, 12),
        "share_q_dim": draw.randint(5, 50),
        "hidden_size": 8 * draw.randint(2, 8),
        "intermediate_size": draw.randint(10, 90),
        "moe_num_experts": experts,
        "moe_top_k": draw.randint(1, experts),
        "moe_intermediate_size": 8 * draw.randint(1, 5),
        "share_expert_dim": draw.randint(10, 60),
        "norm_expert_weight": draw.random() < 0.5,
        "moe_layers_enum": ",".join(str(i) for i in range(layers) if draw.random() < 0.6) or None,
        "rope_theta": draw.choice([500000, 1000.0]),
    }
    vision = {
        "hidden_size": 8 * vision_heads * draw.randint(1, 3),
        "num_attention_heads": vision_heads,
        "num_hidden_layers": draw.randint(1, 3),
        "output_hidden_size": draw.randint(4, 20),
        "layer_norm_eps": draw.choice([1e-5, 1e-2]),
    }
    stride, bias = draw.choice([1, 2]), draw.random() < 0.5
    model = small_model(small_config(text, vision, understand_projector_stride=stride, projector_bias=bias), seed=seed)
    inputs = small_batch(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = step3_logits(json.loads((tmp_path / "config.json").read_text()), weights_in(tmp_path), **inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real].double(), expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope_type", [None, "linear", "yarn"])
def test_far_positions_match_the_reference(rope_type, tmp_path):
    """In one pass and with a cache. A float32 angle of 65,535 is only known to 0.004."""
    scaling = rope_type and {"rope_type": rope_type, "factor": 16.0}
    text = {"rope_theta": 500000, "rope_scaling": scaling, "max_position_embedding": 4096 if scaling else 65536}
    model = small_model(small_config(text))
    model.save_pretrained(tmp_path)
    ids, positions = torch.randint(10, 90, (1, 9)), torch.tensor([[0, 1, 2, 30000, 30001, 65532, 65533, 65534, 65535]])
    config = json.loads((tmp_path / "config.json").read_text())
    expected = step3_logits(config, weights_in(tmp_path), ids, position_ids=positions)
    with torch.no_grad():
        at_once = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions).logits
        cache, steps = DynamicCache(config=model.config), []
        for part, place in zip(ids.split(1, -1), positions.split(1, -1), strict=True):
            steps.append(model(part, position_ids=place, **{CACHE_NAME: cache}).logits)
    for logits in (at_once, torch.cat(steps, 1)):
        torch.testing.assert_close(logits.double(), expected, atol=3e-3, rtol=0)


def test_gradients_match_the_reference(tmp_path):
    """In float64, which `grouped_mm` does not take."""
    model = small_model(dtype=torch.float64)
    inputs = small_batch(model)
    inputs.update({k: v.double() for k, v in inputs.items() if v.is_floating_point()})
    real = inputs["attention_mask"].bool()
    model.save_pretrained(tmp_path)
    weights = {name: tensor.requires_grad_() for name, tensor in weights_in(tmp_path).items()}
    config = json.loads((tmp_path / "config.json").read_text())
    projection = torch.randn(97, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (step3_logits(config, weights, **inputs)[real] @ projection).tanh().sum().backward()
    expected = {name: tensor.grad for name, tensor in weights.items()}

    for attention, experts in [("eager", "eager"), ("sdpa", "batched_mm")]:
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        model.zero_grad()
        (model(**inputs).logits[real] @ projection).tanh().sum().backward()
        # Saved under the names on disk, a model whose weights are its gradients shows them.
        gradients = Step3VLForConditionalGeneration._from_config(model.config, dtype=torch.float64)
        for target, source in zip(gradients.parameters(), model.parameters(), strict=True):
            target.data = source.grad
        gradients.save_pretrained(tmp_path / "gradients")
        for name, gradient in weights_in(tmp_path / "gradients").items():
            # The position table is resized in float32, as the model does it.
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.defect(2, 3)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_batch_equals_rows_alone(attention):
    model = small_model(attn_implementation=attention)
    batch = small_batch(model)
    right = dict(batch)
    for name in ("input_ids", "attention_mask"):
        right[name] = torch.stack([x.roll(int(mask.sum())) for x, mask in zip(batch[name], batch["attention_mask"])])
    with torch.no_grad():
        left_padded, right_padded = model(**batch).logits, model(**right).logits
        for row in range(3):
            alone = model(**row_alone(batch, row)).logits[0]
            assert_close(left_padded[row, -len(alone) :], alone)
            assert_close(right_padded[row, : len(alone)], alone)


@pytest.mark.parametrize(
    ("cache", "attention"),
    # With flex attention transformers' static cache gives wrong answers past the first pass, Llama's too.
    [("dynamic", "eager"), ("dynamic", "sdpa"), ("dynamic", "flex_attention"), ("static", "eager"), ("static", "sdpa")],
)
def test_token_by_token_equals_one_pass(cache, attention, not_compiled):
    model = small_model(attn_implementation={"": attention, "text_config": attention, "vision_config": "sdpa"})
    inputs = row_alone(small_batch(model), 2)
    past = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        output = model(**inputs)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == IMAGE_TOKEN] = output.image_hidden_states
        steps = [embeds[:, :3], embeds[:, 3:5], *embeds[:, 5:].split(1, dim=1)]
        masks = [torch.ones(1, n).long() if n % 2 else None for n in itertools.accumulate(x.shape[1] for x in steps)]
        logits = [model(inputs_embeds=x, attention_mask=mask, cache=past).logits for x, mask in zip(steps, masks)]
    assert_close(torch.cat(logits, 1), output.logits)


class LargestAllocation(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation allocates."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in storages:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return output


@pytest.mark.defect(26)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_key_value_head_is_never_copied_per_query_head(attention, padded):
    config = small_config(text={"num_attention_heads": 16, "head_dim": 32})
    model = small_model(config, attn_implementation=attention).model.language_model
    length, batch_size = 300, 2
    mask = torch.ones(batch_size, length + 1, dtype=torch.long)
    mask[0, :7] = int(not padded)
    with torch.no_grad():
        past = cache_of(model(torch.full((batch_size, length), 5), attention_mask=mask[:, :-1]))
        with LargestAllocation() as allocation:
            model(torch.full((batch_size, 1), 5), attention_mask=mask, cache=past)
    one_head = batch_size * (length + 1) * 32
    assert one_head <= allocation.largest < 2 * one_head  # the cache itself, and nothing like 16 of it


def buffer_sizes(codes: list[str]) -> list[int]:
    """How many elements each buffer has that compiled code allocates."""
    shapes = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", "".join(codes))
    return [math.prod(map(int, filter(None, shape.replace(" ", "").split(",")))) for shape in shapes]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_compiled_decoding_step_does_not_copy_the_key_value_head_either(attention):
    text = {"num_attention_heads": 16, "head_dim": 32, "num_hidden_layers": 1, "moe_layers_enum": None}
    model = small_model(small_config(text=text), attn_implementation=attention).model.language_model
    past = StaticCache(config=model.config, max_cache_len=300)
    step = {"inputs_embeds": torch.randn(2, 1, 48), "cache": past}
    with torch.no_grad():
        model(inputs_embeds=torch.randn(2, 9, 48), cache=past)
        mask = torch.zeros(2, 1, 1, 300)
        _, codes = run_and_get_code(torch.compile(model, fullgraph=True), **step, attention_mask=mask)
    sizes = buffer_sizes(codes)
    assert sizes and max(sizes) <= 2 * 300 * 32, sizes  # one head of the cache, at most


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (3, torch.float32)])
def test_a_few_compiled_tokens_read_their_experts_where_they_are(rows, dtype):
    text = {"moe_intermediate_size": 512, "hidden_size": 64, "moe_num_experts": 24}
    config = small_config(text={**text, "num_hidden_layers": 1, "moe_layers_enum": "0"})
    model = small_model(config, dtype=dtype).model.language_model
    assert model.config._experts_implementation == "step3"
    past = StaticCache(config=model.config, max_cache_len=40)
    ids = torch.randint(10, 40, (rows, 10))
    step = {"input_ids": ids[:, -1:], "cache": past, "attention_mask": torch.ones(rows, 10).long()}
    with torch.no_grad():
        model(ids[:, :-1], cache=past)
        output, codes = run_and_get_code(torch.compile(model, fullgraph=True), **step)
        expected = model(ids).last_hidden_state[:, -1:]
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0)
    sizes = buffer_sizes(codes)
    assert sizes and max(sizes) < 512 * 64, sizes  # less than the smaller weight of one expert
    assert "grouped_mm" not in "".join(codes)
    products = "".join(codes).count("extern_kernels.mm(")
    assert products == 1 if rows == 1 else products == 9  # the router's, and all but the experts'


@pytest.mark.parametrize("inputs", [64, 3 * 2048, 2 * 4099])
@pytest.mark.parametrize("outputs", [3, 130, 1024])
def test_sums_of_products_are_products(outputs, inputs):
    weight, states = torch.randn(5, outputs, inputs), torch.randn(4, inputs)
    experts = torch.tensor([0, 2, 2, 4])
    expected = torch.stack([weight[expert] @ row for expert, row in zip(experts, states, strict=True)])
    torch.testing.assert_close(sum_products(weight, states, experts), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(sum_products(weight[1], states[:1]), states[:1] @ weight[1].T, atol=1e-3, rtol=0)


def test_a_compiled_token_passes_a_layer_that_was_replaced_or_has_hooks():
    model, ids = small_model().model.language_model, torch.tensor([[11]])
    plain = model(ids)[0]
    model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: 2 * output)
    model.layers[0].self_attn.o_proj = nn.Sequential(model.layers[0].self_attn.o_proj, nn.Tanh())
    with torch.no_grad():
        expected, compiled = model(ids)[0], torch.compile(model, backend="eager")(ids)[0]
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert_close(compiled, expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_gpu_computes_the_same_in_another_way(attention, monkeypatch):
    """The head in two parts, attention of a single token and its experts, as on a GPU but run on a CPU."""
    model = small_model(attn_implementation=attention)
    batch = small_batch(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    ids = batch["input_ids"][:, -9:].clamp(min=10)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    allowed = mask.bool()[:, None, None]

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        outputs = [parameter.grad for parameter in model.parameters()]
        with torch.no_grad():
            past = cache_of(model(ids[:, :-1], attention_mask=mask[:, :-1]))
            for attended in (mask, allowed, torch.where(allowed, 0.0, -1e9), None):
                step = {"attention_mask": attended, "cache": copy.deepcopy(past)}
                outputs.append(model(ids[:, -1:], **step).logits)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            single = cache_of(model(ids[:1, :-1]))
            outputs.append(compiled(ids[:1, -1:], attention_mask=mask[1:2], cache=single).logits)
        return outputs

    expected = outcome()
    torch._dynamo.reset()
    monkeypatch.setattr(modeling_step3, "is_on_gpu", lambda tensor: True)
    found = outcome()
    assert_close(found, expected)
    assert found[-1].stride(-2) == 128  # numbers in memory for 97 logits, so that each row of them is aligned


def test_gradients_through_a_mask_are_not_left_to_cudnn(monkeypatch):
    """Its gradients of padded rows are NaN on an H100."""
    monkeypatch.setattr(modeling_step3, "is_on_gpu", lambda tensor: True)
    attention = share_key_value_heads(lambda *args, **kwargs: (torch.backends.cuda.cudnn_sdp_enabled(), None))
    query, key, mask = torch.ones(1, 4, 3, 8), torch.ones(1, 1, 3, 8), torch.ones(1, 1, 3, 3, dtype=torch.bool)
    trained = query.clone().requires_grad_()
    assert [attention(None, *args)[0] for args in ((trained, key, key, mask), (trained, key, key, None))] == [0, 1]
    assert attention(None, query, key, key, mask)[0], "generating may use cuDNN"


def test_layers_with_hooks_are_called(model, batch, monkeypatch):
    """Where their weights would otherwise be used directly, on a CPU or a GPU."""
    monkeypatch.setattr(modeling_step3, "is_on_gpu", lambda tensor: True)
    first, second = model.model.vision_model.transformer.layers
    hooked = [model.lm_head, first.mlp.fc1, second.mlp.fc2]
    with torch.no_grad():
        expected = model(**batch).logits
        called = set()
        for layer in hooked:
            layer.register_forward_hook(lambda module, args, output: called.add(module))
        assert_close(model(**batch).logits, expected)
    assert called == set(hooked)


def test_pictures_are_encoded_in_parts_of_bounded_size(model, batch):
    pictures = pictures_of(batch)
    rows = []
    hook = model.model.vision_model.register_forward_hook(lambda _, args, output: rows.append(output[0].shape[:2]))
    with torch.no_grad():
        together = model.get_image_features(**pictures, output_hidden_states=True)
        assert rows == [(3, 64), (3, 16)]
        rows.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(Step3VLModel.max_encoder_bytes, "cpu", 130 * 64 * 4)  # of 130 rows
            parts = model.get_image_features(**pictures, output_hidden_states=True)
    hook.remove()
    assert rows == [(2, 64), (1, 64), (3, 16)]
    for name in ("last_hidden_state", "hidden_states", "pooler_output"):
        assert_close(parts[name], together[name])


@pytest.mark.defect(30)
def test_logits_are_made_only_where_they_are_wanted(model, batch):
    made = []
    model.lm_head.register_forward_pre_hook(lambda module, args: made.append(args[0].shape[:-1].numel()))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        all_logits = model(**batch).logits
        for keep, expected in [
            (2, all_logits[:, -2:]),
            (torch.tensor([0, 3]), all_logits[:, [0, 3]]),
            (torch.tensor([[1], [2], [3]]), all_logits[torch.arange(3), [1, 2, 3]][:, None]),
            (torch.tensor([[-1], [2], [3]]), all_logits[torch.arange(3), [-1, 2, 3]][:, None]),
            (real, all_logits[real]),
        ]:
            torch.testing.assert_close(model(**batch, logits_to_keep=keep).logits, expected)
    assert made == [3 * 14, 6, 6, 3, 3, real.sum()]
    with pytest.raises(IndexError, match="out of bounds"):
        model(**batch, logits_to_keep=torch.tensor([[14], [2], [3]]))
    made.clear()
    model.generate(**batch, max_new_tokens=2)
    assert made[0] == 3


@pytest.mark.defect(6)
def test_loss_is_cross_entropy_of_the_next_tokens(model, batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    for wrong in (-1, 97):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            model(**batch, labels=labels.masked_fill(labels == 13, wrong))


@pytest.mark.defect(21)
def test_recorded_outputs_and_load_balancing(batch):
    model = small_model(small_config(text={"router_aux_loss_coef": 0.5}), attn_implementation="eager")
    labels = batch["input_ids"]
    plain = model(**batch, labels=labels)
    assert plain.aux_loss is None and plain.router_logits is None and plain.hidden_states is None
    output = model(**batch, labels=labels, output_router_logits=True, output_hidden_states=True, output_attentions=True)
    tokens = labels.numel()
    assert [tuple(logits.shape) for logits in output.router_logits] == [(tokens, 6)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(*labels.shape, 48)] * 4
    length = labels.shape[1]
    assert [tuple(attentions.shape) for attentions in output.attentions] == [(3, 6, length, length)] * 3
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * output.aux_loss)

    # Switch Transformer's loss, equations (4) to (6), by its definition: over real tokens, all MoE layers together.
    real = batch["attention_mask"].bool().flatten()
    probabilities = torch.cat([logits[real].softmax(-1) for logits in output.router_logits])
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(2).indices, 1.0)
    expected = 6 * (chosen.mean(0) * probabilities.mean(0)).sum()
    torch.testing.assert_close(output.aux_loss, expected)


@pytest.mark.defect(12, 27)
def test_recorded_outputs_of_the_vision_encoder(model, batch):
    """Its attention is switched without the decoder's."""
    expected = model(**batch).logits
    model.set_attn_implementation({"vision_config": "eager"})
    pictures = pictures_of(batch)
    output = model.get_image_features(**pictures, output_hidden_states=True, output_attentions=True)
    assert [tuple(features.shape) for features in output.pooler_output] == [(6, 48), (4, 48), (5, 48)]
    assert output.last_hidden_state.shape == (3, 64, 32)  # a row for each patch; four class rows stand before them
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 68, 32)] * 3
    assert [tuple(attentions.shape) for attentions in output.attentions] == [(3, 4, 68, 68)] * 2
    torch.testing.assert_close(output.hidden_states[-1][:, 4:], output.last_hidden_state)
    assert model.config.text_config._attn_implementation == "sdpa"
    assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache": DynamicCache}, {"cache": partial(Step3BoundedCache, max_length=20)}]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_rows_are_the_rows(attention, options, not_compiled):
    """Told by positions that start anew; together they may be longer than the positions."""
    config = small_config(text={"max_position_embedding": 8})
    model = small_model(config, attn_implementation={"text_config": attention, "vision_config": "sdpa"})
    texts = [torch.arange(20, 26)[None], torch.arange(40, 45)[None]]
    ids, positions = torch.cat(texts, 1), torch.cat([torch.arange(6), torch.arange(5)])[None]
    if "cache" in options:
        options = {"cache": options["cache"](config=model.config)}
    labels = torch.cat([texts[0], torch.full((1, 1), -100), texts[1][:, 1:]], 1)
    with torch.no_grad():
        output = model(ids, position_ids=positions, labels=labels, **options)
        assert_close(output.logits, torch.cat([model(text).logits for text in texts], 1))
        losses = [5 * model(texts[0], labels=texts[0]).loss, 4 * model(texts[1], labels=texts[1]).loss]
    torch.testing.assert_close(output.loss, sum(losses) / 9)
    with pytest.raises(ValueError, match="0 cached and 11 new tokens are more than the 8 positions of the model"):
        model(ids)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_and_softmaxes_are_taken_in_float32(dtype, experts):
    class Types(TorchDispatchMode):
        seen = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if func.overloadpacket in (torch.ops.aten._softmax, torch.ops.aten.rsqrt):
                self.seen.add((func.overloadpacket._qualified_op_name, output.dtype))
            return output

    model = small_model(dtype=dtype, attn_implementation="eager", experts_implementation=experts)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small_batch(model).items()}
    with Types() as types:  # without gradients, the CPU and CUDA kernels round in the same way
        assert model(**batch).logits.isfinite().all()
    assert types.seen == {("aten::_softmax", torch.float32), ("aten::rsqrt", torch.float32)}


def test_gradient_checkpointing_changes_nothing_or_is_refused(batch):
    model = small_model(small_config(text={"router_aux_loss_coef": 0.5})).train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # since 5.24
    model.enable_input_require_grads()
    inputs = {**batch, "labels": batch["input_ids"], "use_cache": False}

    def gradients():
        model.zero_grad()
        model(**inputs, output_router_logits=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    for options in ((), ({"use_reentrant": False},)):
        enable(*options)
        torch.testing.assert_close(gradients(), expected)
    enable({"use_reentrant": True})
    with pytest.raises(ValueError, match='no gradient: turn checkpointing on with .*"use_reentrant": False'):
        gradients()
    model(**inputs).loss.backward()  # without that loss, such checkpointing is right
    # torch's own, which transformers does not know of
    wrapper = partial(wrapping.checkpoint_wrapper, checkpoint_impl=wrapping.CheckpointImpl.REENTRANT)
    layers = set(model.model.language_model.layers)
    wrapping.apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=layers.__contains__)
    with pytest.raises(ValueError, match="no gradient: turn checkpointing on"):
        gradients()


@pytest.mark.defect(17)
def test_a_model_from_scratch_is_initialised_and_learns():
    torch.use_deterministic_algorithms(True)  # uninitialised memory is then full of NaN
    try:
        assert torch.empty(3).isnan().all()
        config = small_config(text={"initializer_range": 0.02}, vision={"initializer_range": 0.02})
        model = Step3VLForConditionalGeneration(config)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.ndim == 1 or name.endswith("bias") or 0.01 < parameter.std() < 0.03, name
    batch, losses = small_batch(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        losses.append(model(**batch, labels=batch["input_ids"], output_router_logits=True).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0], losses


def test_several_key_value_heads_are_each_shared_by_their_own_query_heads():
    """More key/value heads than Step3's one: equal to as many query heads as key/value heads, repeated."""
    model = small_model(small_config(text={"num_attention_groups": 2}))
    repeated = small_model(small_config(text={"num_attention_groups": 6}))
    state_dict = model.state_dict()
    for name in state_dict:
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            state_dict[name] = state_dict[name].view(2, 1, 16, 48).expand(-1, 3, -1, -1).reshape(96, 48)
    repeated.load_state_dict(state_dict)
    batch = small_batch(model)
    for attention in ("eager", "sdpa"):
        for each in (model, repeated):
            each.set_attn_implementation({"text_config": attention})
        assert torch.equal(*(each.generate(**batch, max_new_tokens=5, do_sample=False) for each in (model, repeated)))
        assert_close(model(**batch).logits, repeated(**batch).logits)


def test_grouped_mm_with_narrow_experts_is_refused_or_replaced(batch):
    config = small_config(text={"moe_intermediate_size": 12})
    model = small_model(config, dtype=torch.bfloat16)
    model(**batch)  # left to itself it takes another implementation
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="grouped_mm.*bfloat16.*moe_intermediate_size.* 12"):
        model(**batch)


def test_the_default_config_is_the_released_model():
    with torch.device("meta"):
        model = Step3VLForConditionalGeneration(Step3VLConfig())
    total = sum(parameter.numel() for parameter in model.parameters())
    vision = sum(parameter.numel() for name, parameter in model.named_parameters() if ".vi" in name)
    assert round((total - vision) / 1e9, 1) == 316.3 and 320.5e9 < total < 321.5e9


@pytest.mark.defect(1)
@pytest.mark.parametrize("tower", ["text", "vision"])
def test_attention_dropout_is_for_training_alone(tower):
    model = small_model(small_config(**{tower: {"attention_dropout": 0.5}}))
    plain = small_model()
    batch = small_batch(model)
    with torch.no_grad():
        assert_close(model(**batch).logits, plain(**batch).logits)
        assert not torch.allclose(model.train()(**batch).logits, plain(**batch).logits, atol=1e-2)
        assert_close(plain.train()(**batch).logits, plain.eval()(**batch).logits)


@pytest.mark.defect(7, 16)
@pytest.mark.parametrize("wrong", [-1, 6])
def test_indices_of_experts_are_within_range(wrong):
    """A caller's own, that is; those of the router cannot be otherwise."""
    experts = small_model().model.language_model.layers[1].moe.experts
    with pytest.raises(RuntimeError, match="Indices of experts must lie between 0 and 5"):
        experts(torch.randn(3, 48), torch.tensor([[0, 1], [2, wrong], [3, 4]]), torch.ones(3, 2))


@pytest.mark.defect(26)
@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm", "step3"])
def test_only_chosen_experts_run(experts):
    model = small_model(experts_implementation=experts).model.language_model
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad():
        for layer in model.layers[1:]:
            layer.moe.gate.weight.zero_()  # all are alike, so that every token gets the same two
        expected = model(ids).last_hidden_state
        for layer in model.layers[1:]:
            chosen = layer.moe.gate(torch.randn(1, 48))[2][0].tolist()
            for weight in layer.moe.experts.parameters():
                weight[[expert for expert in range(6) if expert not in chosen]] = torch.nan
        assert_close(model(ids).last_hidden_state, expected)


@pytest.mark.defect(18)
@pytest.mark.parametrize("wrap", [lambda interface: interface, share_key_value_heads], ids=["eager", "sdpa"])
def test_queries_must_go_with_keys(wrap):
    query, key = torch.randn(1, 6, 5, 16), torch.randn(1, 1, 5, 24)
    with pytest.raises(ValueError, match=r"do not go with keys.*\(1, 6, 5, 16\), \(1, 1, 5, 24\)"):
        wrap(eager_attention_forward)(torch.nn.Module(), query, key, key, None, scaling=1.0)


@pytest.mark.defect(15)
def test_modules_hold_weights_and_no_state(model, batch):
    def contents():
        modules = model.named_modules()
        return {(name, key): x for name, module in modules for key, x in vars(module).items() if key[0] != "_"}

    model(**batch)  # once, for what transformers itself notes down
    before = contents()
    model.generate(**batch, max_new_tokens=3)
    after = contents()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert (value is after[name] or value == after[name]) and not isinstance(value, torch.Tensor), name
