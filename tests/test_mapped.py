"""Experts that stay in the checkpoint's files: `experts_implementation="mapped"`."""

import copy
import re
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_close,
    assert_same_tensors,
    dequantised,
    make_fp8_checkpoint,
    one_by_one,
    small_batch,
    small_model,
    weights_in,
)
from describe import TINY
from evaluate_tiny import answer_scenes, fresh_scenes
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, set_seed

from step3_vl import Step3VisionModel, Step3VLForConditionalGeneration
from step3_vl.experts_step3 import MappedExperts


def mapped(directory, auto_class=AutoModelForImageTextToText, **options):
    return auto_class.from_pretrained(directory, experts_implementation="mapped", **options)


def experts_of(model) -> list[MappedExperts]:
    return [module for module in model.modules() if isinstance(module, MappedExperts)]


def inputs_for(model) -> dict[str, torch.Tensor]:
    """Rows with pictures for the model of `small_model`, text for others."""
    if model.config.get_text_config().vocab_size == 97 and "image" in model.input_modalities:
        return small_batch(model)
    return {"input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 7, 7]])}


def files_at(tensors) -> set[str]:
    """The files in which the tensors lie, or `""` for memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [([int(end, 16) for end in line[0].split("-")], "".join(line[5:])) for line in lines]
    return {
        next(path for (start, end), path in places if start <= tensor.data_ptr() < end).rpartition("/")[2]
        for tensor in tensors
    }


@pytest.fixture(scope="module", params=["stacked", "single", "fp8"])
def directory(request, tmp_path_factory) -> Path:
    """A small checkpoint in bfloat16 or block-fp8."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "fp8":
        return make_fp8_checkpoint(directory)
    small_model(dtype=torch.bfloat16).save_pretrained(directory)
    if request.param == "single":
        save_file(one_by_one(weights_in(directory)), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_experts_are_views_of_the_files_and_equal_loaded_ones(directory):
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM, AutoModel):
        model, plain = mapped(directory, auto_class), auto_class.from_pretrained(directory, dtype=torch.float32)
        weights = [weight for experts in experts_of(model) for stored in experts.weights.values() for weight in stored]
        parameters = [parameter for name, parameter in model.named_parameters() if "proj.weight" in name]
        names = {path.name for path in directory.glob("*.safetensors")}
        assert files_at(weights) | files_at(parameters) <= names
        assert not any("experts" in name for name, _ in model.named_parameters())
        batch = inputs_for(plain)
        with torch.no_grad():
            assert_close(model.float()(**batch)[0], plain(**batch)[0])  # each weight is cast when it is used
            output, expected = model.bfloat16()(**batch)[0], plain.bfloat16()(**batch)[0]
            torch.testing.assert_close(output, expected, rtol=0.05, atol=0.05)


def test_saving_gives_the_same_tensors_and_leaves_the_mapped_file_whole(directory, tmp_path):
    model = mapped(directory)
    batch = inputs_for(model)
    model.save_pretrained(tmp_path)
    assert_same_tensors(weights_in(tmp_path), weights_in(directory))
    for options in ({"experts_implementation": "mapped"}, {}):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32, **options)
        assert_close(again(**batch).logits, model.float()(**batch).logits)
    again = mapped(tmp_path)
    before = again(**batch).logits
    again.save_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, before)
    for part in (again.model, again.model.language_model):
        part.save_pretrained(tmp_path / type(part).__name__)
        saved = weights_in(tmp_path / type(part).__name__)
        names = {name.removeprefix("model.") for name in weights_in(directory)}
        assert {name.removeprefix("model.") for name in saved if "layers" in name} <= names
    copied = copy.deepcopy(again)
    assert files_at(experts_of(copied)[0].stored(0)) == files_at(experts_of(again)[0].stored(0))


@pytest.mark.parametrize("unquantised", [r"\.moe\.", r"layers\.1\.", r"layers\.2\.moe\.", r"self_attn"])
def test_fp8_in_some_layers_only(unquantised, tmp_path):
    directory = make_fp8_checkpoint(tmp_path / "model")
    weights, plain = weights_in(directory), dequantised(directory, torch.bfloat16)
    for name in [name for name in plain if f"{name}_scale_inv" in weights and re.search(unquantised, name)]:
        weights[name] = plain[name]
        del weights[f"{name}_scale_inv"]
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = mapped(directory)
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(weights_in(tmp_path / "saved"), weights)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    batch = inputs_for(model)
    assert_close(mapped(tmp_path / "saved", dtype=torch.float32)(**batch).logits, loaded(**batch).logits)


def test_weights_are_replaced_and_never_written_to_the_file(directory):
    model, other = mapped(directory), mapped(directory)
    before = {path: path.read_bytes() for path in directory.glob("*.safetensors")}
    weights = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    experts = experts_of(model)[0]
    experts.hold(0, "meta")
    held = experts.held[0]
    model.load_state_dict(weights)
    assert experts.held.pop(0)[0] is not held[0]
    assert not any(weight.float().any() for weight in experts_of(model)[0].stored(0))
    assert any(weight.float().any() for weight in experts_of(other)[0].stored(0))
    assert before == {path: path.read_bytes() for path in before}
    del weights[next(name for name in weights if "moe.experts" in name)]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step3_tiny_answers_as_ever(dtype):
    model, processor = mapped(TINY, dtype=dtype), AutoProcessor.from_pretrained(TINY)
    answers = answer_scenes(model, processor, fresh_scenes(seed=6, count=12), batch_size=12)
    assert len(answers) >= 36 and all(answer.is_right for answer in answers)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"prefill_chunk_size": 5}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}],
    ids=str,
)
def test_generates_the_same_tokens(options, tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    model, plain = mapped(tmp_path / "model"), AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    batch = small_batch(plain)
    if "prompt_lookup_num_tokens" in options:
        batch = {"input_ids": torch.tensor([[5, 6, 7, 5, 6, 7, 5]])}
    tokens, expected = (x.generate(**batch, **options, max_new_tokens=8, do_sample=False) for x in (model, plain))
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_adapters_learn_as_with_loaded_experts(directory, is_checkpointed):
    """Weights that are cast or dequantised are not kept for the backward pass but fetched again."""
    peft = pytest.importorskip("peft")
    gradients = []
    for options in ({"experts_implementation": "mapped"}, {"experts_implementation": "eager"}):
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, **options)
        targets = r".*(self_attn\.(\w_proj|wq)|share_expert\.\w+_proj|fc1)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets)).train()
        set_seed(0)
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            torch.nn.init.normal_(parameter, std=0.1)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        batch = inputs_for(model.base_model.model)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "stored, is_autocast", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_training_keeps_no_copies_of_experts(stored, is_autocast, tmp_path):
    small_model(dtype=stored).save_pretrained(tmp_path)
    model, kept = mapped(tmp_path, dtype=torch.float32), []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=is_autocast),
    ):
        logits = model(input_ids=torch.tensor([[5, 6, 8, 9]])).logits
    experts = [tensor for tensor in kept if sorted(tensor.shape) == [24, 48]]
    assert files_at(experts) <= {"model.safetensors"}
    logits.sum().backward()
    assert model.get_input_embeddings().weight.grad.any()


def test_adapters_with_a_router_of_their_own_are_loaded(tmp_path):
    peft = pytest.importorskip("peft")
    small_model().save_pretrained(tmp_path / "model")
    tuned = peft.get_peft_model(
        mapped(tmp_path / "model"), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"])
    )
    for parameter in filter(lambda parameter: parameter.requires_grad, tuned.parameters()):
        torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    model = mapped(tmp_path / "model")
    model.load_adapter(str(tmp_path / "adapter"))
    batch = small_batch(model)
    assert torch.equal(model(**batch).logits, tuned(**batch).logits)


def test_hooks_of_experts_are_called(tmp_path):
    small_model().save_pretrained(tmp_path)
    model, outputs = mapped(tmp_path), []
    expected = model(input_ids=torch.tensor([[5, 6]])).logits
    for experts in experts_of(model):
        experts.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    assert torch.equal(model(input_ids=torch.tensor([[5, 6]])).logits, expected)
    assert [output.shape for output in outputs] == [(2, 48)] * 2


def test_the_vision_encoder_has_no_experts(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert not experts_of(Step3VisionModel.from_pretrained(tmp_path, experts_implementation="mapped"))


def test_what_cannot_be_mapped_is_an_error(tmp_path):
    small_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="when a model is loaded"):
        model.set_experts_implementation("mapped")
    unmapped = Step3VLForConditionalGeneration._from_config(model.config, experts_implementation="mapped")
    with pytest.raises(ValueError, match="load the model by `from_pretrained`"):
        unmapped(input_ids=torch.tensor([[5]]))
    name = next(name for name in tensors if name.endswith("moe.up_proj.weight"))
    for change, message in (
        ({name: tensors[name][1:].clone()}, rf"{name} takes \d+ experts of the shape .*, the checkpoint has \d+ of"),
        ({name: tensors[name][:, 1:].clone()}, rf"{name} takes \d+ experts of the shape"),
        ({name: None}, rf"{name} takes \d+ experts of the shape .*, the checkpoint has 0"),
        ({name: tensors[name].to(torch.float8_e4m3fn)}, f"{name} is fp8: .* must have `weight_block_size`"),
        ({name.replace("up_proj", "gate"): None}, "moe.experts has no weights"),
        ({other: None for other in tensors if other.startswith("model.layers.2.")}, "moe.experts has no weights"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            mapped(tmp_path / "model")


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.moe.up_proj.weight"])
def test_fp8_without_scales_is_an_error(name, tmp_path):
    directory = make_fp8_checkpoint(tmp_path / "model")
    weights = weights_in(directory)
    del weights[f"{name}_scale_inv"]
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is fp8, but the checkpoint has no {name}_scale_inv"):
        mapped(directory)
