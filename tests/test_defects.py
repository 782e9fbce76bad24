"""
Tests that show that a defect in docs/defects.md is impossible bear the mark `defect` with its number. Those here show
what the rewrite that the report proposes would answer.
"""

import ast
import json
import math
import re
from collections import defaultdict
from functools import partial

import pytest
import reference
import torch
from conftest import IMAGE_TOKEN, ROOT, cache_of, row_alone, small_batch, small_model, weights_in
from transformers import DynamicCache

from step3_vl import Step3BoundedCache


PAGE = (ROOT / "docs" / "defects.md").read_text()


def test_the_page_names_the_tests_of_every_defect():
    names, marked = set(), defaultdict(set)
    for path in (ROOT / "tests").glob("test_*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                names.add(function.name)
                for mark in function.decorator_list:
                    if ast.unparse(mark).startswith("pytest.mark.defect("):
                        for number in mark.args:
                            marked[number.value].add(function.name)
    rows = re.findall(r"(?m)^\| (\d+) \|.*\| ([^|]+) \|$", PAGE)
    assert {int(number): set(re.findall(r"\w+", tests)) for number, tests in rows} == marked
    assert [int(number) for number, _ in rows] == list(range(1, 31))
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= names


def attention(x, w, prefix, config, positions, is_causal=True, has_low_rank=True):
    """
    The reference's attention as matrix products. Without a causal mask, unless the caller gives one, each token attends
    to all. Without low-rank queries, one matrix maps to the heads: here the product of the released two.
    """
    states = x @ w[prefix + "q_proj.weight"].T
    if has_low_rank:
        states = reference.rms_norm(states, w[prefix + "inter_norm.weight"], config["rms_norm_eps"])
    queries = (states @ w[prefix + "wq.weight"].T).view(len(x), -1, config["head_dim"])
    angles, rotate = positions[:, None] * reference.frequencies(config)[0], reference.rotate
    keys = torch.stack([rotate(key, angles[i]) for i, key in enumerate(x @ w[prefix + "k_proj.weight"].T)])
    queries = torch.stack([torch.stack([rotate(head, angles[i]) for head in heads]) for i, heads in enumerate(queries)])
    scores = queries.transpose(0, 1) @ keys.T / math.sqrt(config["head_dim"])
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores[0]).triu(1).bool(), -torch.inf)
    attended = scores.softmax(-1) @ (x @ w[prefix + "v_proj.weight"].T)
    return attended.transpose(0, 1).flatten(1) @ w[prefix + "o_proj.weight"].T


def always_renormalised(x, w, prefix, config, mixture=reference.mixture):
    return mixture(x, w, prefix, {**config, "norm_expert_weight": True})


def no_vision_tower(picture, w, config, encode=reference.encode):
    """Image tokens keep their own embeddings."""
    return w["model.embed_tokens.weight"][IMAGE_TOKEN].expand(len(encode(picture, w, config)), -1)


@pytest.fixture
def case(tmp_path):
    """A model, a row with pictures without a mask, and a function that gives the reference's logits for it."""
    model = small_model()
    inputs = row_alone(small_batch(model), 2)
    del inputs["attention_mask"]
    model.save_pretrained(tmp_path)
    config, weights = json.loads((tmp_path / "config.json").read_text()), weights_in(tmp_path)
    return model, inputs, partial(reference.step3_logits, config, weights)


@pytest.mark.parametrize(
    ("name", "replacement", "is_right"),
    [
        pytest.param("text_attention", attention, True, id="the same attention"),
        pytest.param("text_attention", partial(attention, is_causal=False), False, id="no causal mask"),
        pytest.param("text_attention", partial(attention, has_low_rank=False), False, id="no low-rank queries"),
        pytest.param("mixture", always_renormalised, False, id="always renormalised"),
        pytest.param("encode", no_vision_tower, False, id="no vision tower"),
    ],
)
@torch.no_grad()
def test_the_proposed_rewrite_gives_other_logits(case, name, replacement, is_right, monkeypatch):
    model, inputs, logits = case
    expected = logits(**inputs)
    torch.testing.assert_close(model(**inputs).logits.double(), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(reference, name, replacement)
    error = (logits(**inputs) - expected).abs().max() / expected.abs().max()
    assert error < 1e-9 if is_right else error > 0.05


class CountedTwice(DynamicCache):
    """Measures the first layer for every layer, although it holds the new tokens once the second one asks."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self.get_seq_length() + key_states.shape[2] > 6:
            raise OverflowError("more than 6 tokens")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def test_the_proposed_rewrite_counts_new_tokens_twice(case):
    model, _, logits = case
    ids, refusing = torch.arange(20, 26)[None], CountedTwice(config=model.config)
    with pytest.raises(OverflowError, match="more than 6 tokens"):
        model(ids, cache=refusing)
    assert [layer.get_seq_length() for layer in refusing.layers] == [6, 0, 0]  # it fits, but for the second layer
    output = model(ids, cache=Step3BoundedCache(model.config, max_length=6))
    torch.testing.assert_close(output.logits.double(), logits(ids), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_proposed_rewrite_never_gives_its_cache_back(case):
    """Without the cache of the prompt, a step attends to its own token alone."""
    model, inputs, logits = case
    prompt, token = inputs.pop("input_ids").split([13, 1], dim=1)
    expected = logits(torch.cat([prompt, token], 1), **inputs)[:, -1:]
    step = model(token, cache=cache_of(model(prompt, **inputs))).logits
    torch.testing.assert_close(step.double(), expected, atol=1e-4, rtol=0)
    assert (logits(token) - expected).abs().max() > 0.05 * expected.abs().max()
