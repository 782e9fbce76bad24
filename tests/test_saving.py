import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_close, row_alone, small_batch, small_config, small_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
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


GOLDENS = Path(__file__).parent / "goldens"


def assert_same_tensors(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def released_name_shapes(config: Step3VLConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by the description of the released layout."""
    text, vision = config.text_config, config.vision_config
    hidden, queries = text.hidden_size, text.num_attention_heads * text.head_dim
    shapes = {"model.embed_tokens.weight": (text.vocab_size, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (text.vocab_size, hidden)
    for layer in range(text.num_hidden_layers):
        p = f"model.layers.{layer}."
        shapes |= {p + "input_layernorm.weight": (hidden,), p + "post_attention_layernorm.weight": (hidden,)}
        a = p + "self_attn."
        shapes |= {a + "q_proj.weight": (text.share_q_dim, hidden), a + "inter_norm.weight": (text.share_q_dim,)}
        shapes |= {a + "wq.weight": (queries, text.share_q_dim), a + "o_proj.weight": (hidden, queries)}
        shapes |= {a + "k_proj.weight": (text.head_dim, hidden), a + "v_proj.weight": (text.head_dim, hidden)}

        def gated(prefix, width, experts=()):
            narrow, wide = (*experts, width, hidden), (*experts, hidden, width)
            return {
                f"{prefix}gate_proj.weight": narrow,
                f"{prefix}up_proj.weight": narrow,
                f"{prefix}down_proj.weight": wide,
            }

        if layer in text.moe_layers:
            shapes[p + "moe.gate.weight"] = (text.moe_num_experts, hidden)
            shapes |= gated(p + "moe.", text.moe_intermediate_size, (text.moe_num_experts,))
            shapes |= gated(p + "share_expert.", text.share_expert_dim)
        else:
            shapes |= gated(p + "mlp.", text.intermediate_size)
    width, channels, size = vision.hidden_size, vision.output_hidden_size, vision.patch_size
    e = "vision_model.embeddings."
    shapes |= {e + "class_embedding": (1, width), e + "patch_embedding.bias": (width,)}
    shapes[e + "patch_embedding.weight"] = (width, vision.num_channels, size, size)
    shapes[e + "position_embedding.weight"] = ((vision.image_size // size) ** 2 + 1, width)
    for layer in range(vision.num_hidden_layers):
        p = f"vision_model.transformer.layers.{layer}."
        for name, (rows, columns) in {
            "self_attn.qkv_proj": (3 * width, width),
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (vision.intermediate_size, width),
            "mlp.fc2": (width, vision.intermediate_size),
        }.items():
            shapes |= {f"{p}{name}.weight": (rows, columns), f"{p}{name}.bias": (rows,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{p}{name}.weight": (width,), f"{p}{name}.bias": (width,)}
    shapes |= {"vit_downsampler.weight": (channels, width, 2, 2), "vit_downsampler.bias": (channels,)}
    shapes |= {"vit_downsampler2.weight": (2 * channels, channels, 3, 3), "vit_downsampler2.bias": (2 * channels,)}
    shapes["vit_large_projector.weight"] = (hidden, 2 * channels)
    if config.projector_bias:
        shapes["vit_large_projector.bias"] = (hidden,)
    return shapes


@pytest.mark.parametrize("projector_bias", [False, True])
def test_saved_names_and_shapes_are_the_released_ones(tmp_path, projector_bias):
    model = small_model(small_config(projector_bias=projector_bias))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == released_name_shapes(model.config)


@pytest.mark.parametrize("name", ["text_only", "mixed", "renorm"])
def test_released_layout_round_trip(name, tmp_path):
    model, info = Step3VLForConditionalGeneration.from_pretrained(GOLDENS / name, output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    saved = {}
    for shard in tmp_path.glob("*.safetensors"):
        saved |= load_file(shard)
    assert_same_tensors(saved, load_file(GOLDENS / name / "model.safetensors"))


def test_old_remote_code_layout_loads_and_is_saved_in_the_released_one(tmp_path):
    released = load_file(GOLDENS / "mixed" / "model.safetensors")

    def old_name(name):
        if name.startswith("lm_head"):
            return name
        return "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else "model." + name

    old = tmp_path / "old"
    old.mkdir()
    save_file(
        {old_name(name): tensor for name, tensor in released.items()}, old / "model.safetensors", {"format": "pt"}
    )
    (old / "config.json").write_text((GOLDENS / "mixed" / "config.json").read_text())
    for model_class in (Step3VLForConditionalGeneration, Step3VLModel):
        model, info = model_class.from_pretrained(old, output_loading_info=True)
        assert not any(info.values()), info
        model.save_pretrained(tmp_path / "new")
        saved = load_file(tmp_path / "new" / "model.safetensors")
        expected = dict(released)
        if model_class is Step3VLModel:
            del expected["lm_head.weight"]
        assert_same_tensors(saved, expected)


def test_the_bare_model_reads_and_writes_the_released_names(tmp_path):
    model, info = Step3VLModel.from_pretrained(GOLDENS / "mixed", output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "loaded")
    Step3VLModel(model.config).save_pretrained(tmp_path / "built")
    names = load_file(GOLDENS / "mixed" / "model.safetensors").keys() - {"lm_head.weight"}
    assert load_file(tmp_path / "loaded" / "model.safetensors").keys() == names
    assert load_file(tmp_path / "built" / "model.safetensors").keys() == names
    # The head is new, and said to be; everything else is found again.
    _, info = Step3VLForConditionalGeneration.from_pretrained(tmp_path / "loaded", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]


def test_the_text_part_of_a_whole_checkpoint(tmp_path):
    whole = Step3VLForConditionalGeneration.from_pretrained(GOLDENS / "mixed").eval()
    text, info = Step3TextForCausalLM.from_pretrained(GOLDENS / "mixed", output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.tensor([[11, 12, 13]])
    torch.testing.assert_close(text.eval()(ids).logits, whole(ids).logits)
    text.save_pretrained(tmp_path)
    released = load_file(GOLDENS / "mixed" / "model.safetensors")
    released = {name: tensor for name, tensor in released.items() if name.startswith(("model.", "lm_head."))}
    assert_same_tensors(load_file(tmp_path / "model.safetensors"), released)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is Step3TextForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is Step3TextModel


def test_wrong_tensors_are_named(tmp_path, transformers_log):
    weights = load_file(GOLDENS / "mixed" / "model.safetensors")
    del weights["model.layers.0.self_attn.wq.weight"]
    surprises = ("model.layers.0.self_attn.surprise.weight", "vision_model.surprise.weight", "lm_head.bias")
    weights |= {name: torch.zeros(2) for name in surprises}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((GOLDENS / "mixed" / "config.json").read_text())
    _, info = Step3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"model.language_model.layers.0.self_attn.wq.weight"}
    prefix = "model.language_model.layers.0.self_attn."
    assert info["unexpected_keys"] == {f"{prefix}surprise.weight", "model.vision_model.surprise.weight", "lm_head.bias"}

    weights["model.norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError):
        Step3VLForConditionalGeneration.from_pretrained(tmp_path)
    report = transformers_log.text
    assert "norm.weight" in report and "[5]" in report and "[48]" in report


def test_tied_embeddings(tmp_path):
    model = small_model(small_config(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = Step3VLForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = row_alone(small_batch(model), 1)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("level", ["whole", "text", "both", "object", "loading", "later", "later text"])
def test_what_is_tied_is_known_on_both_levels(tmp_path, level):
    whole = {"tie_word_embeddings": True} if level in ("whole", "both") else {}
    text = {"tie_word_embeddings": True} if level in ("text", "both", "object") else {}
    config = small_config(text=text, **whole)
    if level == "object":
        parts = {name: getattr(config, name) for name in ("text_config", "vision_config")}
        config = Step3VLConfig(**parts, image_token_id=7)
    elif level == "loading":
        config.save_pretrained(tmp_path / "untied")
        config = Step3VLConfig.from_pretrained(tmp_path / "untied", tie_word_embeddings=True)
    elif level == "later":
        config.tie_word_embeddings = True
    elif level == "later text":
        config.text_config.tie_word_embeddings = True
    assert config.tie_word_embeddings and config.text_config.tie_word_embeddings
    model = small_model(config)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["tie_word_embeddings"] and saved["text_config"]["tie_word_embeddings"]
    ids = torch.tensor([[11, 12, 13]])
    text = Step3TextForCausalLM.from_pretrained(tmp_path / "model")
    assert text.lm_head.weight is text.model.embed_tokens.weight
    assert_close(text(ids).logits, model(ids).logits)
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


def test_auto_classes_of_the_import(random_model_dir):
    for auto_class, expected in {
        AutoModel: Step3VLModel,
        AutoModelForImageTextToText: Step3VLForConditionalGeneration,
        AutoModelForCausalLM: Step3VLForConditionalGeneration,
        AutoModelForMultimodalLM: Step3VLForConditionalGeneration,
        AutoProcessor: step3_vl.Step3VLProcessor,
        AutoConfig: Step3VLConfig,
    }.items():
        assert type(auto_class.from_pretrained(random_model_dir)) is expected


WITHOUT_THE_PACKAGE = """
import json, sys
sys.modules["step3_vl"] = None  # as on a machine that does not have it
import torch
from PIL import Image
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText,
    AutoModelForMultimodalLM, AutoProcessor)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

directory, target = sys.argv[1:]
remote = {"trust_remote_code": True}
names = {}
for auto_class in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoImageProcessor):
    names[auto_class.__name__] = type(auto_class.from_pretrained(directory, **remote)).__name__
processor = AutoProcessor.from_pretrained(directory, **remote)
model = AutoModelForImageTextToText.from_pretrained(directory, **remote).eval()
content = [{"type": "image", "image": Image.new("RGB", (400, 150), "teal")}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
model.save_pretrained(target)
processor.save_pretrained(target)
print(json.dumps({"names": names, "tokens": tokens.tolist(), "module": type(model).__module__}))
"""


def test_a_saved_directory_needs_nothing_else(random_model_dir, tmp_path):
    def run(directory, target):
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
        command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(directory), str(target)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    first = run(random_model_dir, tmp_path / "again")
    assert first["module"].startswith("transformers_modules.")
    assert first["names"] == {
        "AutoConfig": "Step3VLConfig",
        "AutoModel": "Step3VLModel",
        "AutoModelForCausalLM": "Step3VLForConditionalGeneration",
        "AutoModelForMultimodalLM": "Step3VLForConditionalGeneration",
        "AutoImageProcessor": "Step3VLImageProcessor",
    }
    # What the directory's own code saves is complete too, in the same layout, and answers the same.
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in random_model_dir.iterdir()}
    assert_same_tensors(*(load_file(d / "model.safetensors") for d in (random_model_dir, tmp_path / "again")))
    for name in ("config.json", "processor_config.json", "modeling_step3.py"):
        assert (tmp_path / "again" / name).read_text() == (random_model_dir / name).read_text(), name
    assert run(tmp_path / "again", tmp_path / "third")["tokens"] == first["tokens"]


class EngineTextConfig:
    """What vLLM's and SGLang's own text config classes read, and how their models then use it."""

    def __init__(self, moe_layers_enum=None, rope_theta=None, rope_scaling=None, max_position_embedding=None, **rest):
        self.moe_layers = [int(i) for i in moe_layers_enum.strip().split(",")]
        self.rope_theta, self.rope_scaling, self.max_position_embedding = (
            rope_theta,
            rope_scaling,
            max_position_embedding,
        )
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
    assert sorted(text.moe_layers) == [1, 2] and text.rope_theta == 1e4 and text.max_position_embedding == 512
    assert text.rope_scaling["factor"] == 4.0 and text.share_q_dim == 32 and text.num_attention_groups == 1
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
