"""Quantisers that take `nn.Linear` alone, on step3-tiny's right answers."""

import shutil

import pytest
import torch
from conftest import assert_close, assert_same_tensors, edit_json, load_whole, one_by_one, weights_in
from describe import TINY
from evaluate_tiny import answer_scenes, fresh_scenes
from safetensors.torch import save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    QuantoConfig,
    TorchAoConfig,
)

from step3_vl import Step3VLForConditionalGeneration


pytestmark = pytest.mark.releases

IDS = torch.arange(1, 21)[None]


@pytest.fixture(scope="module")
def scenes():
    return fresh_scenes(seed=424242, count=12)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in plain_parts(getattr(tensor, name))]


def bytes_of_experts(model) -> int:
    parts = [plain_parts(tensor) for name, tensor in model.state_dict().items() if ".experts." in name]
    return sum(part.numel() * part.element_size() for tensors in parts for part in tensors)


def share_right(model, processor, scenes) -> float:
    answers = answer_scenes(model, processor, scenes)
    return sum(answer.is_right for answer in answers) / len(answers)


def test_linear_experts_are_the_stacked_ones(tmp_path):
    stacked = AutoModelForImageTextToText.from_pretrained(TINY)
    linear = load_whole(AutoModelForImageTextToText, TINY, experts_implementation="linear")
    layers = [
        name for name, module in linear.named_modules() if type(module) is torch.nn.Linear and ".experts." in name
    ]
    assert len(layers) == 3 * 8 * 3
    expected = logits(stacked)
    assert_close(logits(linear), expected)

    # Saved as released, also from a state dict; read from files of either kind and from state dicts of either names.
    for state_dict in (None, linear.state_dict()):
        linear.save_pretrained(tmp_path, state_dict=state_dict)
        assert_same_tensors(weights_in(tmp_path), weights_in(TINY))
    assert "linear" not in (tmp_path / "config.json").read_text()
    fresh = Step3VLForConditionalGeneration._from_config(linear.config, experts_implementation="linear").eval()
    for state_dict in (linear.state_dict(), weights_in(TINY)):
        torch.nn.init.zeros_(fresh.lm_head.weight)
        fresh.load_state_dict(state_dict)
        assert_close(logits(fresh), expected)
    (tmp_path / "model.safetensors").unlink()
    for weights in (weights_in(TINY), one_by_one(weights_in(TINY))):
        torch.save(weights, tmp_path / "pytorch_model.bin")
        for implementation in ("linear", None):
            again = AutoModelForImageTextToText.from_pretrained(tmp_path, experts_implementation=implementation)
            assert_close(logits(again), expected)


def test_every_linear_expert_gets_a_gradient():
    """Also those that no token chose, since processes that share weights wait for one another's gradients."""
    model = AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation="linear").train()
    model(input_ids=IDS[:, :1]).logits.sum().backward()
    assert all(weight.grad is not None for name, weight in model.named_parameters() if ".experts." in name)


def test_experts_are_linear_or_stacked_from_the_beginning():
    for first, then in (("linear", "eager"), ("eager", "linear")):
        model = AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation=first)
        with pytest.raises(ValueError, match=f"when a model is loaded: .*experts_implementation='{then}'"):
            model.set_experts_implementation(then)


def test_an_explicit_implementation_outweighs_a_quantisation():
    pytest.importorskip("bitsandbytes")
    model = AutoModelForImageTextToText.from_pretrained(
        TINY, quantization_config=BitsAndBytesConfig(load_in_8bit=True), experts_implementation="eager"
    )
    assert model.model.language_model.layers[1].moe.experts.gate_up_proj.is_floating_point()


def int8_weights():
    return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("package", "make_config", "factor", "is_saved"),
    [
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), 3.4, True),
        ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), 1.9, True),
        ("torchao", int8_weights, 1.85, True),
        ("optimum.quanto", lambda: QuantoConfig(weights="int8"), 1.9, False),
        ("optimum.quanto", lambda: QuantoConfig(weights="int4"), 3.5, False),
    ],
    ids=["nf4", "bnb-int8", "torchao-int8", "quanto-int8", "quanto-int4"],
)
def test_experts_are_quantised_too(tmp_path, processor, scenes, package, make_config, factor, is_saved):
    """`factor` is that of the experts' bytes, bfloat16 before; scales of step3-tiny's short rows are counted in."""
    pytest.importorskip(package)
    whole = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=make_config())
    assert bytes_of_experts(whole) / bytes_of_experts(model) > factor
    assert share_right(model, processor, scenes) >= 0.95
    if not is_saved:
        return
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = load_whole(AutoModelForImageTextToText, tmp_path)
    assert bytes_of_experts(again) == bytes_of_experts(model)
    assert torch.equal(logits(again), expected) and torch.equal(logits(model), expected)


def test_four_bits_after_a_forward_have_right_gradients_and_are_merged(processor, scenes):
    """bitsandbytes packs weights for some CPUs, unless it is kept from it."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16, quantization_config=settings)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*\.(wq|o_proj)|.*experts.*_proj")).eval()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    before = gradients()
    logits(model)
    assert before and all(map(torch.equal, gradients(), before))
    assert share_right(model.merge_and_unload(), processor, scenes) >= 0.95


def save_as_llm_compressor(directory, compress, form: str, ignored=(), **scheme) -> None:
    """step3-tiny with the parts of the text model's layers that `compress` makes, experts one by one."""
    shutil.copytree(TINY, directory, ignore=shutil.ignore_patterns("*.py", "*.safetensors"))
    weights = {}
    for name, weight in one_by_one(weights_in(TINY)).items():
        is_compressed = name.startswith("model.") and name.endswith(("_proj.weight", ".wq.weight"))
        parts = compress(weight) if is_compressed else {"": weight}
        weights |= {f"{name}{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    quantization = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
        "ignore": ["lm_head", "re:.*vision_model.*", "re:.*vit_.*", *ignored],
    }
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=quantization))


def save_compressed(directory, number_type: str) -> None:
    """In 8 bits, a row at a time."""

    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        scale = weight.abs().amax(1, keepdim=True) / (127 if number_type == "int" else 448)
        scaled = weight / scale
        weight = scaled.round().to(torch.int8) if number_type == "int" else scaled.to(torch.float8_e4m3fn)
        return {"": weight, "_scale": scale}

    form = {"num_bits": 8, "type": number_type, "symmetric": True}
    scheme = {"weights": {**form, "strategy": "channel", "dynamic": False}}
    scheme["input_activations"] = {**form, "strategy": "token", "dynamic": True}
    save_as_llm_compressor(directory, compress, f"{number_type}-quantized", **scheme)


@pytest.mark.parametrize("number_type", ["int", "float"])
def test_what_llm_compressor_saves_is_read(tmp_path, processor, scenes, number_type):
    pytest.importorskip("compressed_tensors")
    save_compressed(tmp_path / "compressed", number_type)
    model = load_whole(AutoModelForImageTextToText, tmp_path / "compressed")
    assert share_right(model, processor, scenes) >= 0.99

    # The same weights without a word of how they are quantised.
    edit_json(tmp_path / "compressed" / "config.json", lambda config: config.pop("quantization_config"))
    for options in ({}, {"experts_implementation": "linear"}):
        with pytest.raises(ValueError, match=r"weights or scales, such as .*moe\.experts\..*_scale, are in a form"):
            AutoModelForImageTextToText.from_pretrained(tmp_path / "compressed", **options)


def save_packed(directory) -> None:
    """In W4A16: in groups of 32 weights of 4 bits."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    def compress(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        groups = weight.unflatten(1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = (groups / scale).round().to(torch.int8).flatten(1)
        return {"_packed": pack_to_int32(codes, 4), "_scale": scale[..., 0], "_shape": torch.tensor(weight.shape)}

    form = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    save_as_llm_compressor(directory, compress, "pack-quantized", ["re:.*gate$"], weights=form)


@pytest.mark.parametrize("base", ["nf4", "W4A16"])
def test_adapters_of_a_quantised_base_learn_in_the_right_direction(tmp_path, base):
    """As the whole model's do. Packed weights must be dequantised, since PEFT looks for a layer's weight."""
    peft = pytest.importorskip("peft")
    pytest.importorskip({"nf4": "bitsandbytes", "W4A16": "compressed_tensors"}[base])
    save_packed(tmp_path / "W4A16") if base == "W4A16" else (tmp_path / "nf4").symlink_to(TINY)
    setting = CompressedTensorsConfig(dequantize=True)
    if base == "nf4":
        setting = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")

    def gradients(directory, **options) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(directory, **options)
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=r".*\.(wq|o_proj)|.*experts.*_proj", init_lora_weights=False)
        model = peft.get_peft_model(model, config).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return torch.cat([x.grad.flatten().float() for _, x in sorted(model.named_parameters()) if x.requires_grad])

    whole = gradients(TINY, experts_implementation="linear")
    quantised = gradients(tmp_path / base, quantization_config=setting)
    assert torch.nn.functional.cosine_similarity(whole, quantised, dim=0) > 0.9


def test_adapters_reach_linear_experts(tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation="linear")
    config = peft.LoraConfig(target_modules=r".*\.experts\.\d+\.(gate|up|down)_proj", init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    models = [AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation="linear") for _ in range(2)]
    models[0].load_adapter(tmp_path / "adapter")
    models[1] = peft.PeftModel.from_pretrained(models[1], tmp_path / "adapter")
    for again in models:
        assert_close(logits(again), expected)
    merged = adapted.merge_and_unload()
    assert (expected - logits(AutoModelForImageTextToText.from_pretrained(TINY))).abs().max() > 0.1
    merged.save_pretrained(tmp_path)
    assert weights_in(tmp_path).keys() == weights_in(TINY).keys()
    assert_close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path)), expected)


@pytest.mark.parametrize("how", ["PEFT", "transformers"])
@pytest.mark.parametrize("made_for", ["linear", "eager"])
def test_an_adapter_for_other_experts_is_refused(tmp_path, made_for, how):
    peft = pytest.importorskip("peft")

    def load(implementation):
        return AutoModelForImageTextToText.from_pretrained(TINY, experts_implementation=implementation)

    def adapt(model):
        if how == "PEFT":
            return peft.PeftModel.from_pretrained(model, tmp_path)
        model.load_adapter(tmp_path)
        return model

    targets = {"target_modules": r".*\.wq|.*\.experts\.\d+\.\w+_proj"}
    if made_for == "eager":
        targets = {"target_modules": ["wq"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted = peft.get_peft_model(load(made_for), peft.LoraConfig(**targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    assert_close(logits(adapt(load(made_for))), logits(adapted))
    with pytest.raises(ValueError, match=f"experts_implementation='{made_for}'"):
        adapt(load("linear" if made_for == "eager" else "eager"))
