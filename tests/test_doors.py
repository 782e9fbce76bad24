"""What the doors refuse, what the checks cost, and properties that hold for any picture and any config."""

import struct
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import assert_close, cache_of, row_alone, small_batch, small_config, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.debug_utils import DebugUnderflowOverflow

import step3_vl.modeling_step3
import step3_vl.processing_step3
from step3_vl import (
    Step3TextConfig,
    Step3TextForCausalLM,
    Step3TextModel,
    Step3VLConfig,
    Step3VLImageProcessor,
    Step3VLModel,
)
from step3_vl.processing_step3 import plan_picture


IDS = torch.tensor([[11, 12, 13], [21, 22, 23]])


def png(width: int, height: int) -> bytes:
    """A file that says it is a picture of this size, and holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg() -> bytes:
    file = BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (png(30000, 30000), Image.DecompressionBombError, "900000000 pixels.*exceeds limit"),
        (png(300, 300), OSError, "(?i)truncated"),
        (jpeg()[:400], OSError, "(?i)truncated"),
        (b"no picture", OSError, "cannot identify image file"),
        (b"", OSError, "cannot identify image file"),
    ],
)
def test_broken_files_are_refused(processor, tmp_path, content, error, message):
    (tmp_path / "picture").write_bytes(content)
    with pytest.raises(error, match=message):
        processor(text="<im_patch>", images=str(tmp_path / "picture"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"images": Image.new("RGB", (0, 5))}, "at least one pixel a side, got 0 x 5"),
        ({"images": Image.new("RGB", (30000, 20))}, "narrower than 32 pixels.* got 30000 x 20"),
        ({"images": np.zeros((9, 9, 5), np.uint8)}, "channel dimension"),
        ({"images": np.zeros((9, 9, 3), complex)}, "must be real numbers, got complex128"),
        ({"images": np.full((9, 9, 3), -1)}, "from -1 to -1"),
        ({"images": Image.new("RGB", (9, 9)), "image_std": [0.0] * 3}, "`image_std` must be finite numbers above 0"),
        ({"images": Image.new("RGB", (9, 9)), "image_mean": [0.5]}, "a value for each of the 3 channels"),
        ({"images": Image.new("RGB", (9, 9)), "patch_size": 0}, "`patch_size` must be a positive number, got 0"),
        ({"text": ""}, "`text` must be a string or a list of strings, none of them empty, got ''"),
        ({"text": []}, r"none of them empty, got \[\]"),
        ({"text": ["a", None]}, r"got \['a', None\]"),
        ({"text": 5}, "got 5"),
        (
            {"text": "a <im_patch>", "images": Image.new("RGB", (300, 300)), "truncation": True, "max_length": 6},
            "truncation",
        ),
    ],
)
def test_what_the_processor_refuses(processor, call, message):
    with pytest.raises(ValueError, match=message):
        processor(**{"text": "<im_patch>", **call})


def test_pictures_of_one_pixel_and_of_30000(processor):
    inputs = processor(
        text="<im_patch>" * 2, images=[Image.new("L", (1, 1)), Image.new("RGB", (30000, 3000))], return_tensors="pt"
    )
    assert inputs["num_patches"].tolist() == [0, 10]
    assert inputs["pixel_values"].isfinite().all()
    assert "pixel_values" not in processor(text="no picture", images=[])


def test_videos_and_sound_are_left_aside(processor, monkeypatch):
    warned = []
    monkeypatch.setattr(step3_vl.processing_step3.logger, "warning_once", warned.append)
    expected = processor(text="a", return_tensors="pt")
    assert processor(text="a", videos=[np.zeros((2, 9, 9, 3), np.uint8)], return_tensors="pt").keys() == expected.keys()
    assert processor(text="a", audio=[np.zeros(9)], return_tensors="pt")["input_ids"].equal(expected["input_ids"])
    assert [next(name for name in ("videos", "audio") if name in text) for text in warned] == ["videos", "audio"]


def test_image_tokens_without_pictures_are_tokens_like_others(monkeypatch):
    model = small_model()
    batch = small_batch(model)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    warned = []
    monkeypatch.setattr(step3_vl.modeling_step3.logger, "warning_once", warned.append)
    with torch.no_grad():
        logits = model(**text).logits
    assert warned == ["The text has image tokens, but no pictures are given: their own embeddings are used."]
    embeds = model.get_input_embeddings()(text["input_ids"])
    with torch.no_grad():
        wanted = model(inputs_embeds=embeds, attention_mask=text["attention_mask"]).logits
    assert torch.equal(logits, wanted)


def test_features_in_every_form():
    model = small_model()
    batch = small_batch(model)
    pictures = {name: batch.pop(name) for name in ("pixel_values", "patch_pixel_values", "num_patches")}
    with torch.no_grad():
        expected = model(**batch, **pictures).logits
        features = torch.cat(model.get_image_features(**pictures).pooler_output)
        for shape in ((15, 48), (1, 15, 48), (3, 5, 48), (1, 5, 3, 48)):
            assert_close(model(**batch, image_embeds=features.view(shape)).logits, expected)
            beams = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}
            wanted = model.generate(**batch, **pictures, **beams)
            assert torch.equal(model.generate(**batch, image_embeds=features.view(shape), **beams), wanted)
        for parts in (features.split([6, 4, 5]), list(features.split([6, 9]))):
            assert_close(model(**batch, image_embeds=parts).logits, expected)
            assert torch.equal(model.generate(**batch, image_embeds=parts, **beams), wanted)


@pytest.mark.parametrize("model_class", [Step3TextModel, Step3TextForCausalLM, Step3VLModel, None])
def test_a_resized_vocabulary_is_the_one_that_is_checked(model_class, tmp_path):
    model = small_model() if model_class is None else None
    if model is None:
        config = small_config() if model_class is Step3VLModel else small_config().text_config
        model = model_class._from_config(config).eval()
    if hasattr(model.config, "image_token_id"):
        with pytest.raises(ValueError, match="vocabulary of 7 would not have `image_token_id` 7 any more"):
            model.resize_token_embeddings(7)
    with pytest.raises(ValueError, match="vocabulary of 2 would not have `.*_token_id` [27] any more"):
        model.resize_token_embeddings(1, pad_to_multiple_of=2)
    assert model.get_input_embeddings().weight.shape[0] == 97
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path)):
        with torch.no_grad():
            each(torch.tensor([[11, 99]]))
            with pytest.raises(ValueError, match="between 0 and 99, got 11 to 100"):
                each(torch.tensor([[11, 100]]))
    model.resize_token_embeddings(50)
    with pytest.raises(ValueError, match="between 0 and 49, got 11 to 50"):
        model(torch.tensor([[11, 50]]))


def test_what_the_model_refuses():
    model = small_model()
    batch = small_batch(model)

    def fails(message, **inputs):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(**inputs)

    fails("between 0 and 96, got 11 to 97", input_ids=torch.tensor([[11, 97]]))
    fails("between 0 and 96, got -1 to 11", input_ids=torch.tensor([[11, -1]]))
    fails(r"`input_ids` must be whole numbers.*torch.float32 of shape \(2, 3\)", input_ids=IDS.float())
    fails(r"at least one token, got torch.int64 of shape \(2, 0\)", input_ids=IDS[:, :0])
    fails(r"at least one token, got torch.int64 of shape \(0, 3\)", input_ids=IDS[:0])
    fails(r"got torch.int64 of shape \(3,\)", input_ids=IDS[0])
    fails(
        r"`inputs_embeds` must have the shape \(batch, tokens, 48\).*\(2, 3, 47\)", inputs_embeds=torch.ones(2, 3, 47)
    )
    fails("exactly one of", input_ids=IDS, inputs_embeds=torch.ones(2, 3, 48))
    fails("0 image tokens.* 4 image features", input_ids=IDS, pixel_values=batch["pixel_values"][:1])
    fails(
        r"`image_embeds` must have the shape \(..., rows, 48\), got \(15, 40\)",
        input_ids=batch["input_ids"],
        image_embeds=torch.ones(15, 40),
    )
    fails("belong to `pixel_values`", input_ids=IDS, patch_pixel_values=batch["patch_pixel_values"])
    for shape in ((2, 4), (1, 3), (2, 3, 3), (2, 1, 4, 3)):
        fails(r"`attention_mask` must have the shape.*got \(", input_ids=IDS, attention_mask=torch.ones(shape))
    with torch.no_grad():
        cached = cache_of(model(IDS))
        others = cache_of(small_model(small_config(text={"head_dim": 32})).eval()(IDS))
        deeper = cache_of(small_model(small_config(text={"num_hidden_layers": 4}))(IDS))
    step = {"input_ids": IDS[:, :1]}
    fails("a batch of 1 and `head_dim` 16, got 3 layers", input_ids=IDS[:1, :1], cache=cached)
    fails(r"`head_dim` 16, got 3 layers with \(batch, head_dim\) \[\(2, 32\)\]", **step, cache=others)
    fails("with 3 layers of keys.*got 4 layers", **step, cache=deeper)
    fails(
        r"for 3 cached and \(2, 1\) new tokens, got \(2, 3\)",
        **step,
        cache=cached,
        attention_mask=IDS * 0 + 1,
    )
    small = StaticCache(config=model.config, max_cache_len=2)
    fails("0 cached and 3 new tokens are more than the cache's 2", input_ids=IDS, cache=small)
    assert cached.get_seq_length() == 3
    with torch.no_grad():
        expected = model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(model(**step, cache=cached).logits, expected)


class HostReads(TorchDispatchMode):
    """Notes every operation that has to wait for a tensor's values."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in self.WAITING):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm"])
def test_a_decoding_step_never_waits_and_checks_little(cache, experts):
    model = small_model(experts_implementation=experts)
    batch = small_batch(model)
    length = batch["input_ids"].shape[1]
    past = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=length + 9)
    )
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
        with HostReads() as reads:
            model(**step)
        sys.setprofile(count)
        model(**{**step, "attention_mask": torch.cat([mask, mask[:, -1:]], 1)})
        sys.setprofile(None)
    assert not reads.seen
    assert 0 < calls["checks"] < 0.1 * calls["all"], calls


def test_checks_do_not_compile_anew_for_each_token():
    model = small_model().model.language_model
    step = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        past = cache_of(model(IDS))
        for length in range(4, 16):  # more lengths than a function is compiled for
            output = step(IDS[:, :1], attention_mask=torch.ones(2, length).long(), cache=past)
        expected = model(torch.cat([IDS, *[IDS[:, :1]] * 12], 1)).last_hidden_state[:, -1:]
    assert_close(output.last_hidden_state, expected)


def test_the_first_value_that_is_not_finite_is_found(model, batch):
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.wq.weight[3, 4] = torch.inf
    DebugUnderflowOverflow(model)
    with pytest.raises(ValueError, match="inf/nan"), torch.no_grad():
        model(**batch)


sizes = st.integers(1, 6000)


@settings(max_examples=300, deadline=None)
@given(width=sizes, height=sizes, view=st.integers(14, 900), patch=st.integers(14, 900), longest=st.integers(100, 4000))
def test_every_patch_lies_in_the_plan(width, height, view, patch, longest):
    plan = plan_picture(width, height, view, min(patch, view), longest)
    assert max(plan.view_size) <= max(longest, 1) and min(plan.view_size) >= 1
    assert plan.num_newlines == sum(plan.newline_mask) == max(plan.rows - 1, 0)
    assert len(plan.newline_mask) == plan.num_patches == plan.rows * plan.columns
    if plan.num_patches:
        assert 0 < plan.window <= max(plan.view_size)
        for side, count in zip(plan.cut_size, (plan.columns, plan.rows), strict=True):
            assert (count - 1) * plan.window < side <= count * plan.window  # each square has something of the picture


@settings(max_examples=25, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_what_is_counted_is_what_is_made(width, height):
    released = Step3VLImageProcessor()
    processor = Step3VLImageProcessor(size={"height": 56, "width": 56}, patch_size=42, max_image_size=210)
    plan = processor.plan(width, height)
    output = processor([Image.new("RGB", (width, height), "white")], return_tensors="pt")
    assert output["num_patches"].tolist() == [plan.num_patches]
    assert output["pixel_values"].shape == (1, 3, 56, 56)
    if plan.num_patches:
        assert output["patch_pixel_values"].shape == (plan.num_patches, 3, 42, 42)
        white, black = (
            torch.tensor(v - np.array(released.image_mean)) / torch.tensor(released.image_std) for v in (1, 0)
        )
        pixels = output["patch_pixel_values"].movedim(1, -1)
        assert (pixels <= white + 1e-4).all() and (pixels >= black - 1e-4).all()


@settings(max_examples=60, deadline=None)
@given(width=sizes, height=sizes)
def test_a_picture_takes_83_tokens_a_patch_its_newlines_and_171(processor_with_released_sizes, width, height):
    counts = processor_with_released_sizes._get_num_multimodal_tokens([(height, width)])
    plan = processor_with_released_sizes.image_processor.plan(width, height)
    assert counts["num_image_tokens"] == [83 * plan.num_patches + plan.num_newlines + 171]
    assert counts["num_image_patches"] == [plan.num_patches]


@pytest.fixture(scope="module")
def processor_with_released_sizes(processor):
    return type(processor)(Step3VLImageProcessor(), processor.tokenizer)


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 9),
    chosen=st.sets(st.integers(0, 8)),
    as_text=st.booleans(),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 40).map(lambda n: 2 * n),
    experts=st.integers(1, 9),
    theta=st.floats(1, 1e7),
)
def test_configs_survive_a_round_trip(layers, chosen, as_text, heads, head_dim, experts, theta):
    chosen = sorted(layer for layer in chosen if layer < layers)
    text = {
        "num_hidden_layers": layers,
        "moe_layers_enum": ",".join(map(str, chosen)) if as_text else chosen,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "moe_num_experts": experts,
        "moe_top_k": experts,
        "rope_theta": theta,
    }
    config = Step3VLConfig(text_config=text)
    again = Step3VLConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.text_config.moe_layers == (chosen or list(range(1, layers)))
    assert again.text_config.rope_parameters["rope_theta"] == theta
    assert Step3TextConfig(**config.to_dict()["text_config"]).to_dict() == config.text_config.to_dict()


def test_a_row_alone_is_still_the_row(model, batch):
    """The checks take what the tests of the model take."""
    with torch.no_grad():
        assert model(**row_alone(batch, 1)).logits.isfinite().all()
