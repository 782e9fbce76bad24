"""What releases of transformers call things: both names of the cache, names that a later release may change or drop."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cache_of, row_alone, small_config, small_model
from transformers import DynamicCache, PreTrainedModel, StaticCache, Trainer, TrainingArguments
from transformers.generation import GenerationMixin

from step3_vl import Step3TextForCausalLM, Step3TextModel, Step3VLForConditionalGeneration, Step3VLModel
from step3_vl.checkpoint_step3 import CACHE_NAME


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
    expected = model.generate(**batch, **GREEDY)
    cache = make(config=model.config)
    output = model.generate(**batch, **GREEDY, disable_compile=True, **{name: cache})
    assert torch.equal(output, expected)
    assert int(cache.get_seq_length()) == output.shape[1] - 1
    with pytest.raises(ValueError, match="not as both"):
        model.generate(**batch, **GREEDY, **dict.fromkeys(NAMES, cache))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_of_the_pictures_of_a_cache_does_not_disturb(model, batch, name):
    first = row_alone(batch, 2)
    cache = DynamicCache(config=model.config)
    answer = model.generate(**first, **GREEDY, **{name: cache})
    ids = torch.cat([answer, torch.tensor([[41, 42, 43]])], 1)
    mask = torch.ones_like(ids)
    pictures = {key: first[key] for key in ("pixel_values", "patch_pixel_values", "num_patches")}
    expected = model.generate(input_ids=ids, attention_mask=mask, **pictures, **GREEDY)
    for left_over in ({}, {"num_patches": first["num_patches"]}, {"mm_encoder_outputs": {}}):
        held = model.generate(**first, **{**GREEDY, CACHE_NAME: (cache := DynamicCache(config=model.config))})
        assert torch.equal(held, answer)
        output = model.generate(input_ids=ids, attention_mask=mask, **left_over, **GREEDY, **{name: cache})
        assert torch.equal(output, expected)


def test_preparing_inputs_takes_either_name(model):
    for each in (model, Step3TextForCausalLM._from_config(model.config.text_config)):
        for name in NAMES:
            cache = DynamicCache(config=each.config)
            inputs = each.prepare_inputs_for_generation(IDS, **{name: cache})
            assert inputs[CACHE_NAME] is cache and OTHER_NAME not in inputs
        with pytest.raises(ValueError, match="not as both"):
            each.prepare_inputs_for_generation(IDS, **dict.fromkeys(NAMES, cache))


def test_evaluation_leaves_the_cache_out(model, batch, tmp_path):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=3)
    trainer = Trainer(model, arguments, data_collator=lambda samples: {**batch, "labels": labels})
    with torch.no_grad():
        expected = model(**batch, labels=labels)
    prediction = trainer.predict([0, 1, 2])
    torch.testing.assert_close(torch.tensor(prediction.predictions), expected.logits)
    assert trainer.evaluate([0, 1, 2])["eval_loss"] == pytest.approx(expected.loss.item())


def renamed(function, **names):
    """The function, as a later release may have it: some of its arguments by other names."""

    @functools.wraps(function)
    def later(*args, **kwargs):
        return function(*args, **{names.get(name, name): value for name, value in kwargs.items()})

    parameters = inspect.signature(function).parameters.values()
    back = {old: new for new, old in names.items()}
    later.__signature__ = inspect.Signature([p.replace(name=back.get(p.name, p.name)) for p in parameters])
    return later


@pytest.mark.parametrize("name", ["is_first_iteration", "next_sequence_length", "inputs_embeds"])
def test_a_renamed_argument_of_generation_is_an_error(model, batch, monkeypatch, name):
    prepare = renamed(GenerationMixin.prepare_inputs_for_generation, later_name=name)
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", prepare)
    with pytest.raises(TypeError, match=f"other names for what `generate` passes on as {name}"):
        model.generate(**batch, **GREEDY)


@pytest.mark.parametrize("name", ["attention_mask", "position_ids", CACHE_NAME])
def test_a_renamed_argument_of_the_model_is_an_error(model, batch, monkeypatch, name):
    prepare = GenerationMixin.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def later(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        return {("later_name" if key == name else key): value for key, value in inputs.items()}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", later)
    with pytest.raises(TypeError, match="later_name"):
        model.generate(**batch, **GREEDY)


WITHOUT_NAMES = """
import importlib, sys, types
import torch, transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationMixin

hidden = {}
for entry in sys.argv[3:]:
    module, name = entry.rsplit(".", 1)
    hidden.setdefault(module, set()).add(name)

def without(module, names):
    real = importlib.import_module("transformers." + module)
    class Proxy(types.ModuleType):
        def __getattr__(self, name):
            if name in names:
                raise AttributeError(name)
            return getattr(real, name)
    return Proxy(real.__name__)

for module, names in hidden.items():
    sys.modules["transformers." + module] = without(module, names)
sys.path.insert(0, sys.argv[2])
import draw_scene
directory = sys.argv[1]
model = AutoModelForImageTextToText.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
scene = draw_scene.draw_scene(5, "wide")
question, truth = scene.questions["describe"]
content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs)
assert processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True) == truth
model.save_pretrained("saved")

def fails(name, call):
    try:
        call()
    except ImportError as error:
        assert f"`transformers.{name}`" in str(error) and transformers.__version__ in str(error), error
    else:
        raise AssertionError(f"{name} was not missed")

on_disk = {"model.norm.weight": torch.ones(128)}
features = {
    "models.mixtral.modeling_mixtral.load_balancing_loss_func": lambda: model(**inputs, output_router_logits=True),
    "conversion_mapping.get_model_conversion_mapping": lambda: model.load_state_dict(on_disk),
    "core_model_loading.rename_source_key": lambda: model.load_state_dict(on_disk),
}
for name in ("ALL_PARALLEL_STYLES", "TensorParallelLayer"):
    features[f"distributed.tensor_parallel.{name}"] = lambda: AutoModelForImageTextToText.from_pretrained(
        directory, trust_remote_code=True, tp_plan="auto")
for entry in sys.argv[3:]:
    if entry in features:
        fails(entry, features[entry])
if any(entry.startswith("integrations.moe") for entry in sys.argv[3:]):
    assert model.config._experts_implementation == "eager"
"""


@pytest.mark.parametrize(
    "names",
    [
        ["models.mixtral.modeling_mixtral.load_balancing_loss_func", "conversion_mapping.get_model_conversion_mapping"],
        ["core_model_loading.rename_source_key", "distributed.tensor_parallel.ALL_PARALLEL_STYLES"],
        ["integrations.moe.grouped_mm_experts_forward", "integrations.finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS"],
        ["distributed.tensor_parallel.TensorParallelLayer", "integrations.finegrained_fp8.FP8Linear"],
        ["integrations.moe.ALL_EXPERTS_FUNCTIONS", "models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"],
    ],
)
def test_a_private_name_that_is_gone_costs_its_feature_alone(names, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(ROOT / "checkpoints" / "step3-tiny"), str(ROOT / "scripts"), *names]
    command = [sys.executable, "-c", WITHOUT_NAMES, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


def test_quantised_weights_are_not_read_where_the_method_for_it_is_gone(monkeypatch):
    monkeypatch.delattr(PreTrainedModel, "_load_pretrained_model")
    small_model()
    config = small_config()
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ImportError, match="quantised weights needs .*_load_pretrained_model"):
        Step3VLForConditionalGeneration(config)


def test_the_table_of_private_names_is_whole():
    """Every name that is looked up stands in it, and every name in it is used."""
    source = Path(ROOT / "checkpoint_step3.py").read_text()
    table = [line for line in source.splitlines() if line.startswith("# | ")]
    code = "".join((ROOT / f"{name}_step3.py").read_text() for name in ("checkpoint", "modeling", "processing"))
    code = "\n".join(line for line in code.splitlines() if not line.startswith("# | "))
    names = [name for line in table[1:] for name in line.split("|")[1].strip().rsplit(".", 1)[-1].split(", ")]
    names = [name.split(".")[-1].split("*")[-1] for name in names if not name.startswith("-")]
    assert len(names) >= 10 and all(name in code for name in names)
