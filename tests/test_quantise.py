"""`step3 quantise` and what it writes: as right as the model, loaded, trained on, merged, and turned back."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import assert_same_files, load_whole, run, weights_in
from describe import TINY
from draw_conversations import draw_conversations
from evaluate_tiny import answer_scenes, fresh_scenes
from transformers import AutoModelForImageTextToText, AutoProcessor, CompressedTensorsConfig


pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")
import quantise
from compare_formats import bytes_of_experts, score
from quantise import main
from rounding import BLOCK, apply_gptq, make_settings, read_form


IDS = torch.arange(1, 41)[None]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "few"
    draw_conversations(directory, {"train": 12})
    return directory / "train.jsonl"


def log_probs(model) -> torch.Tensor:
    """Of all tokens of conversations about four scenes that the model describes: (tokens, vocab_size)."""
    return score(model, AutoProcessor.from_pretrained(TINY), fresh_scenes(seed=424243, count=4))[0]


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return log_probs(AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.bfloat16))


def divergence(whole: torch.Tensor, model) -> float:
    return float((whole.exp() * (whole - log_probs(model))).sum(-1).mean())


def options_of(name: str, data: Path) -> list[str]:
    form, method = name.split("-")
    calibration = [] if method == "rtn" else ["--calibrate", str(data), "--min-tokens", "64"]
    return ["--format", form, "--method", method, *["--group-size", "32"] * (form == "w4a16"), *calibration]


@pytest.fixture(scope="module")
def written(tmp_path_factory, data):
    """What `quantise.py` writes for a format and a method, made once."""
    made = {}

    def write(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            assert main([str(TINY), str(made[name]), *options_of(name, data)]) == 0
        return made[name]

    return write


@pytest.mark.parametrize(
    ("name", "factor"),
    [("w4a16-rtn", 3.5), ("w4a16-gptq", 3.5), ("w4a16-awq", 3.5), ("w8a8-gptq", 1.9), ("fp8-rtn", 1.9), ("nf4-rtn", 2)],
)
def test_what_is_written_answers_right_and_turns_back(tmp_path, written, whole, name, factor):
    """`factor` is that of the experts' bytes in bfloat16; NF4 keeps two tables beside each of the small matrices."""
    model = load_whole(AutoModelForImageTextToText, written(name))
    processor = AutoProcessor.from_pretrained(written(name))
    answers = answer_scenes(model, processor, fresh_scenes(seed=424242, count=4))
    assert sum(answer.is_right for answer in answers) / len(answers) >= 0.95
    assert divergence(whole, model) < 0.1

    assert main([str(written(name)), str(tmp_path / "plain"), "--format", "bfloat16"]) == 0
    index = json.loads((written(name) / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_in(written(name)).values())
    weights, plain = weights_in(TINY), weights_in(tmp_path / "plain")
    assert {n: x.shape for n, x in plain.items()} == {n: x.shape for n, x in weights.items()}
    assert bytes_of_experts(tmp_path / "plain") / bytes_of_experts(written(name)) > factor
    for part in ("vision_model.", "vit_", "lm_head", "model.embed_tokens", "model.norm"):
        assert all(torch.equal(plain[n], x.bfloat16()) for n, x in weights.items() if n.startswith(part)), part
    if name not in ("w8a8-gptq", "fp8-rtn"):  # whose activations are rounded as well
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain")
        assert divergence(log_probs(plain), model) < 1e-3  # bfloat16's sums in another order


def test_engines_do_not_take_it(written):
    result = run("convert_checkpoint.py", written("w4a16-rtn"), "--engines")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("quantised"))
    verdicts = [cell.strip() for cell in line.split("  ") if cell.strip()][1:]
    assert verdicts[0] == "compressed-tensors, pack-quantized" and verdicts[1].startswith("error: expects stacked")
    assert verdicts[2].startswith("wrong: skips experts"), result.stderr


def test_calibration_helps(written, whole):
    """GPTQ at least halves the divergence from the whole model."""
    models = [load_whole(AutoModelForImageTextToText, written(name)) for name in ("w4a16-rtn", "w4a16-gptq")]
    rounded, calibrated = (divergence(whole, model) for model in models)
    assert calibrated < rounded / 2


def test_rounding_follows_the_inputs():
    """Where two columns of inputs are nearly equal, GPTQ makes their errors cancel; smoothing spares large inputs."""
    torch.manual_seed(0)
    form = read_form(make_settings(Namespace(format="w4a16", group_size=32, zero_points=False, vision=False)))
    common = torch.randn(4096, 8)
    columns = 2 * BLOCK + 32
    inputs = common @ torch.randn(8, columns) + 0.1 * torch.randn(4096, columns)
    weight = torch.randn(32, columns)

    def loss(rounded: torch.Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().mean())

    nearest = form.round(weight, *form.choose_scales(weight))
    gptq, scale, zero_point = apply_gptq(form, weight, inputs.T @ inputs)
    assert loss(gptq) < loss(nearest) / 10
    assert torch.equal(form.round(gptq, scale, zero_point), gptq)


def test_smoothing_alone_changes_nothing(tmp_path, data, whole):
    """AWQ in 8 bits, where rounding hardly disturbs, shows that each scale is taken back where it was put."""
    output = tmp_path / "model"
    assert main([str(TINY), str(output), *options_of("fp8-awq", data)]) == 0
    before, after = weights_in(TINY), weights_in(output)
    for norm in ("input_layernorm", "self_attn.inter_norm", "post_attention_layernorm"):
        name = f"model.layers.1.{norm}.weight"
        assert not torch.equal(after[name], before[name].bfloat16())
    router = "model.layers.1.moe.gate.weight"
    products = [weights[router].float() * weights[name].float() for weights in (before, after)]  # as tokens meet them
    torch.testing.assert_close(*products, rtol=2**-6, atol=1e-6)
    dense = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForImageTextToText.from_pretrained(output, quantization_config=dense)
    assert divergence(whole, model) < 0.01


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch, data, written):
    quantise_layer, layers = quantise.Quantiser.quantise_layer, []

    def stop(self, number, states):
        layers.append(number)
        if layers == [0, 1, 2]:
            raise KeyboardInterrupt
        return quantise_layer(self, number, states)

    monkeypatch.setattr(quantise.Quantiser, "quantise_layer", stop)
    command = [str(TINY), str(tmp_path / "model"), *options_of("w4a16-gptq", data)]
    assert main(command) == 130 and not (tmp_path / "model").exists()
    assert main([*command, "--samples", "3"]) == 1  # other options
    assert main(command) == 0
    assert layers[:4] == [0, 1, 2, 2] and not (tmp_path / "model.partial").exists()
    assert_same_files(tmp_path / "model", written("w4a16-gptq"))
    assert main(command) == 1  # exists


def test_rarely_chosen_experts_are_named_and_calibrated(tmp_path, data, capsys):
    options = [*options_of("w4a16-gptq", data), "--samples", "1"]
    packed = []
    for count in ("1", "100000"):
        assert main([str(TINY), str(tmp_path / count), *options, "--min-tokens", count]) == 0
        packed.append(weights_in(tmp_path / count))
    text = AutoModelForImageTextToText.from_pretrained(TINY).config.text_config
    said = re.findall(r"layer (\d+): calibrated on the nearest (\d+) tokens: experts (.*)", capsys.readouterr().out)
    layers, nearest, rare = zip(*said[-len(text.moe_layers) :], strict=True)
    assert list(map(int, layers)) == list(text.moe_layers)
    assert set(rare) == {str(list(range(text.moe_num_experts)))}
    assert all(1 < int(number) < 1000 for number in nearest)  # all that the conversation has
    for name in packed[0]:
        if re.search(rf"layers\.{text.moe_layers[0]}\..*experts.*packed", name):
            assert not torch.equal(packed[0][name], packed[1][name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "w4a16", "--group-size", "48"], "no multiple of the group size 48"),
        (["--format", "w4a16", "--group-size", "32", "--method", "awq", "--calibrate", "BAD"], "bad.jsonl:2"),
        (["--format", "bfloat16"], "`quantization_config` must be"),
    ],
)
def test_refusals(tmp_path, data, capsys, options, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n{')
    options = [str(tmp_path / "bad.jsonl") if option == "BAD" else option for option in options]
    assert main([str(TINY), str(tmp_path / "model"), *options]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("name", ["w4a16-gptq", "nf4-rtn"])
def test_adapters_are_trained_on_it_and_merged(tmp_path, written, name):
    peft = pytest.importorskip("peft")
    dense = {} if name.startswith("nf4") else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForImageTextToText.from_pretrained(written(name), **dense)
    config = peft.LoraConfig(target_modules=r".*\.(wq|o_proj)|.*experts.*_proj", r=4)
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.3
    model.eval().merge_and_unload().save_pretrained(tmp_path / "merged")
    names = weights_in(written(name) if name.startswith("nf4") else TINY).keys()
    assert weights_in(tmp_path / "merged").keys() == names
    merged = load_whole(AutoModelForImageTextToText, tmp_path / "merged")
    assert float(merged(input_ids=IDS, labels=IDS).loss) < losses[0] - 0.3
