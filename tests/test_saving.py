import json
import re

import pytest
import torch
import transformers
from checkpoint_files import expected_shapes
from conftest import (
    GOLDENS,
    assert_close,
    assert_same_tensors,
    edit_json,
    load_whole,
    python,
    small_config,
    small_model,
    weights_in,
    with_original_names,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping

import step3_vl
from step3_vl import (
    Step3TextConfig,
    Step3TextForCausalLM,
    Step3TextModel,
    Step3VLConfig,
    Step3VLForConditionalGeneration,
    Step3VLModel,
)


pytestmark = pytest.mark.releases


@pytest.mark.parametrize("projector_bias", [False, True])
def test_saved_names_and_shapes_are_those_that_the_converter_expects(tmp_path, projector_bias):
    model = small_model(small_config(projector_bias=projector_bias))
    model.save_pretrained(tmp_path)
    assert {name: tuple(tensor.shape) for name, tensor in weights_in(tmp_path).items()} == expected_shapes(model.config)


def released_part(model_class) -> dict[str, torch.Tensor]:
    """What the released layout has of `mixed` for one of the classes."""
    prefixes = {Step3TextForCausalLM: ("model.", "lm_head."), Step3VLModel: ("model.", "vision_model.", "vit_")}
    released = weights_in(GOLDENS / "mixed")
    return {name: x for name, x in released.items() if name.startswith(prefixes.get(model_class, ""))}


@pytest.mark.parametrize("name", ["text_only", "mixed", "renorm"])
def test_released_layout_round_trip(name, tmp_path):
    load_whole(Step3VLForConditionalGeneration, GOLDENS / name).save_pretrained(tmp_path, max_shard_size="300KB")
    assert_same_tensors(weights_in(tmp_path), weights_in(GOLDENS / name))


@pytest.mark.parametrize("model_class", [Step3VLForConditionalGeneration, Step3VLModel, Step3TextForCausalLM])
def test_every_class_reads_its_part_and_saves_it_in_the_released_layout(model_class, tmp_path):
    """Also from the layout of the original remote code."""
    original = with_original_names(GOLDENS / "mixed", tmp_path / "original")
    for directory in [GOLDENS / "mixed", original][: 1 + (model_class is not Step3TextForCausalLM)]:
        model = load_whole(model_class, directory)
        model.save_pretrained(tmp_path / "saved")
        assert_same_tensors(weights_in(tmp_path / "saved"), released_part(model_class))
    model_class(model.config).save_pretrained(tmp_path / "built")  # which was not loaded
    assert weights_in(tmp_path / "built").keys() == released_part(model_class).keys()
    if model_class is Step3VLModel:  # the head is new, and said to be
        _, info = Step3VLForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]
    if model_class is Step3TextForCausalLM:
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) is Step3TextForCausalLM
        assert type(AutoModel.from_pretrained(tmp_path / "saved")) is Step3TextModel


def test_wrong_tensors_are_named(tmp_path, transformers_log):
    weights = weights_in(GOLDENS / "mixed")
    del weights["model.layers.0.self_attn.wq.weight"]
    surprises = ("model.layers.0.self_attn.surprise.weight", "vision_model.surprise.weight", "lm_head.bias")
    weights |= {name: torch.zeros(2) for name in surprises}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDENS / "mixed" / "config.json").read_text())
    _, info = Step3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    prefix = "model.language_model.layers.0.self_attn."
    assert info["missing_keys"] == {f"{prefix}wq.weight"}
    assert info["unexpected_keys"] == {f"{prefix}surprise.weight", "model.vision_model.surprise.weight", "lm_head.bias"}

    weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        Step3VLForConditionalGeneration.from_pretrained(tmp_path)
    assert all(text in transformers_log.text for text in ("norm.weight", "[5]", "[48]"))


@pytest.mark.parametrize("level", ["whole", "text", "both", "object", "loading", "later", "later text"])
def test_what_is_tied_is_known_on_both_levels(tmp_path, level):
    tied = {"tie_word_embeddings": True}
    whole = tied if level in ("whole", "both") else {}
    config = small_config(tied if level in ("text", "both", "object") else None, **whole)
    if level == "object":
        config = Step3VLConfig(text_config=config.text_config, vision_config=config.vision_config, image_token_id=7)
    elif level == "loading":
        config.save_pretrained(tmp_path / "untied")
        config = Step3VLConfig.from_pretrained(tmp_path / "untied", **tied)
    elif level == "later":
        config.tie_word_embeddings = True
    elif level == "later text":
        config.text_config.tie_word_embeddings = True
    assert config.tie_word_embeddings and config.text_config.tie_word_embeddings
    small_model(config).save_pretrained(tmp_path / "model")
    assert "lm_head.weight" not in weights_in(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["tie_word_embeddings"] and saved["text_config"]["tie_word_embeddings"]
    logits = []
    for model_class in (Step3VLForConditionalGeneration, Step3TextForCausalLM):
        model = load_whole(model_class, tmp_path / "model")
        assert model.lm_head.weight is model.get_input_embeddings().weight
        logits.append(model(torch.tensor([[11, 12, 13]])).logits)
    assert_close(*logits)
    edit_json(tmp_path / "model" / "config.json", lambda saved: saved["text_config"].pop("tie_word_embeddings"))
    assert Step3TextConfig.from_pretrained(tmp_path / "model").tie_word_embeddings
    config.tie_word_embeddings = False
    assert not config.text_config.tie_word_embeddings and not config.to_dict()["text_config"]["tie_word_embeddings"]


@pytest.mark.parametrize("model_class", [Step3VLForConditionalGeneration, Step3VLModel, Step3TextForCausalLM])
def test_every_pattern_of_the_conversion_matches_something_that_is_saved(tmp_path, model_class):
    """As transformers' own models are tested; experts may be saved one by one, and have scales, and what
    begins with `(?!)` is for saving alone."""
    config = small_config()
    model = model_class._from_config(config if "VL" in model_class.__name__ else config.text_config)
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    names |= {name.replace(".moe.", ".moe.experts.3.") for name in names} | {f"{name}_scale_inv" for name in names}
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        for pattern in transform.source_patterns:
            assert any(re.search(pattern.removeprefix("(?!)"), name) for name in names), pattern


AUTO_CLASSES = {
    "AutoConfig": "Step3VLConfig",
    "AutoModel": "Step3VLModel",
    "AutoModelForCausalLM": "Step3VLForConditionalGeneration",
    "AutoModelForImageTextToText": "Step3VLForConditionalGeneration",
    "AutoModelForMultimodalLM": "Step3VLForConditionalGeneration",
    "AutoProcessor": "Step3VLProcessor",
}


def test_auto_classes_of_the_import(random_model_dir):
    for name, expected in AUTO_CLASSES.items():
        assert type(getattr(transformers, name).from_pretrained(random_model_dir)) is getattr(step3_vl, expected)


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["step3_vl"] = None  # as on a machine that does not have it
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoProcessor)

directory, target = sys.argv[1:]
auto_classes = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoImageProcessor,
    AutoProcessor, AutoModelForImageTextToText)
*others, processor, model = (auto.from_pretrained(directory, trust_remote_code=True) for auto in auto_classes)
names = {auto.__name__: type(each).__name__ for auto, each in zip(auto_classes, (*others, processor, model))}
content = [{"type": "image", "image": Image.new("RGB", (400, 150), "teal")}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
assert type(model).__module__.startswith("transformers_modules.")
assert model.eval().generate(**inputs, max_new_tokens=8, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps(names))
"""


def test_a_saved_directory_needs_nothing_else(random_model_dir, tmp_path):
    """What its own code saves is complete, too."""
    arguments = ("-c", WITHOUT_THE_PACKAGE, random_model_dir, tmp_path / "again")
    result = python(*arguments, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {**AUTO_CLASSES, "AutoImageProcessor": "Step3VLImageProcessor"}
    folders = (random_model_dir, tmp_path / "again")
    first, again = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert first.pop("tokenizer_config.json") and again.pop("tokenizer_config.json")  # which names how it was loaded
    assert again == first


class EngineTextConfig:
    """What vLLM's and SGLang's own text config classes read, and how their models then use it."""

    def __init__(self, moe_layers_enum=None, rope_theta=None, rope_scaling=None, max_position_embedding=None, **rest):
        self.moe_layers = [int(i) for i in moe_layers_enum.strip().split(",")]
        self.rope = rope_theta, rope_scaling
        self.max_position_embedding = max_position_embedding
        self.__dict__.update(rest)


@pytest.mark.parametrize("moe_layers", ["1,2", [1, 2], (2, 1), "", None])
def test_saved_configs_read_in_the_serving_engines(moe_layers, tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0}
    config = small_config(text={"moe_layers_enum": moe_layers, "rope_theta": 1e4, "rope_scaling": scaling})
    config.text_config.moe_layers_enum = moe_layers  # whatever is assigned later is saved as text, too
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["text_config"]["model_type"]) == ("step3_vl", "step3_text")
    assert saved["text_config"]["architectures"] == ["Step3TextForCausalLM"]  # which vLLM makes the text part from
    text = EngineTextConfig(**saved["text_config"])
    assert sorted(text.moe_layers) == [1, 2] and text.rope[0] == 1e4 and text.rope[1]["factor"] == 4.0
    assert (text.max_position_embedding, text.share_q_dim, text.num_attention_groups) == (512, 32, 1)
    again = Step3VLConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert Step3TextConfig.from_pretrained(tmp_path).moe_layers == [1, 2]


def test_an_adapter_brings_embeddings_that_were_resized(random_model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    model = Step3VLForConditionalGeneration.from_pretrained(random_model_dir)
    tokens = model.config.vocab_size + 5
    model.resize_token_embeddings(tokens)
    assert model.config.vocab_size == model.config.text_config.vocab_size == tokens
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    ids = torch.tensor([[11, 12, tokens - 1]])
    with torch.no_grad():
        expected = adapted(ids).logits
    adapted.save_pretrained(tmp_path)
    again = Step3VLForConditionalGeneration.from_pretrained(random_model_dir)
    again.resize_token_embeddings(tokens)
    with torch.no_grad():
        assert_close(peft.PeftModel.from_pretrained(again, tmp_path).eval()(ids).logits, expected)
