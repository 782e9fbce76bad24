"""`scripts/convert_checkpoint.py`, by its command line."""

import fcntl
import io
import json
import os
import random
import resource
import shutil
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_files,
    assert_same_tensors,
    dequantised,
    edit_json,
    load_whole,
    make_fp8_checkpoint,
    weights_in,
    with_original_names,
)
from make_random_model import make_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from step3_vl import Step3TextForCausalLM, Step3VLConfig


INDEX = "model.safetensors.index.json"


def convert(*arguments) -> SimpleNamespace:
    """The script's command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        returncode = convert_checkpoint.main(list(map(str, arguments)))
    return SimpleNamespace(returncode=returncode, stdout=out.getvalue(), stderr=err.getvalue())


def converted(*arguments) -> Path:
    result = convert(*arguments)
    assert result.returncode == 0, result.stderr
    assert not list(Path(arguments[1]).parent.glob("*.partial"))
    return Path(arguments[1])


def refused(*arguments) -> str:
    """What is told of a source that is not converted."""
    result = convert(*arguments)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def logits(directory: Path, auto=AutoModelForImageTextToText) -> torch.Tensor:
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint in bfloat16, in several files; the same in one file lies beside it, as `whole`."""
    folder = tmp_path_factory.mktemp("released")
    make_random_model(folder / "whole", dtype="bfloat16")
    AutoProcessor.from_pretrained(folder / "whole").save_pretrained(folder / "source")
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole")
    model.save_pretrained(folder / "source", max_shard_size="200KB")
    assert len(list((folder / "source").glob("*.safetensors"))) > 2
    (folder / "source" / "notes.py").write_text("raise SystemExit('code of the source was run')")
    return folder / "source"


@pytest.fixture
def copied(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copied"))


@pytest.fixture(scope="module")
def fp8_source(tmp_path_factory) -> Path:
    return make_fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "source")


@pytest.mark.parametrize("how", [[], ["--symlink"], ["--copy"]])
def test_adopt(source, tmp_path, how):
    target = converted(source, tmp_path / "target", *how)
    for path in source.glob("*.safetensors"):
        adopted = target / path.name
        assert adopted.read_bytes() == path.read_bytes()
        assert adopted.samefile(path) == (how != ["--copy"]) and adopted.is_symlink() == (how == ["--symlink"])
    assert not (target / "notes.py").exists()
    for module in ROOT.glob("*_step3.py"):
        assert (target / module.name).read_bytes() == module.read_bytes()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("options", [[], ["--to-single"], ["--text-only"], ["--layers", "0-1", "--verify"]])
def test_a_tied_model_gets_the_head_that_engines_ask_for(source, tmp_path, sharded, options):
    model = AutoModelForImageTextToText.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tied", max_shard_size="100KB" if sharded else "1GB")
    assert "lm_head.weight" not in weights_in(tmp_path / "tied")
    target = converted(tmp_path / "tied", tmp_path / "target", *options)
    found = weights_in(target)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    if (target / INDEX).exists():  # then the index, not the one file, is what is read
        index = json.loads((target / INDEX).read_text())["weight_map"]
        assert index.keys() == found.keys() and not (target / "model.safetensors").exists()
        assert set(index.values()) == {path.name for path in target.glob("*.safetensors")}
    auto = AutoModelForCausalLM if "--text-only" in options else AutoModelForImageTextToText
    again = load_whole(auto, target)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert convert(target, "--check").returncode == 0


def test_a_processor_comes_along_where_none_is_described(copied, tmp_path):
    for name in ("processor_config.json", "chat_template.jinja"):
        (copied / name).unlink()
    target = converted(copied, tmp_path / "target")
    assert "auto_map" in json.loads((target / "processor_config.json").read_text())
    processor = AutoProcessor.from_pretrained(target)
    assert processor.image_processor.patch_size == 504 and processor.chat_template


def test_another_sharding_and_back(source, tmp_path):
    many = converted(source, tmp_path / "many", "--max-shard-size", "100KB", "--verify")
    assert len(list(many.glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=many).returncode == 0
    single = converted(many, tmp_path / "single", "--to-single")
    assert (single / "model.safetensors").read_bytes() == (source.parent / "whole" / "model.safetensors").read_bytes()
    assert not (single / INDEX).exists()
    assert_same_files(converted(single, tmp_path / "again", "--max-shard-size", "100KB", "--verify"), many)


def test_another_type(source, tmp_path):
    wide = converted(source, tmp_path / "wide", "--dtype", "float32")
    assert_same_tensors(weights_in(wide), {name: tensor.float() for name, tensor in weights_in(source).items()})
    back = converted(wide, tmp_path / "back", "--dtype", "bfloat16")
    assert_same_tensors(weights_in(back), weights_in(source))
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logits(wide), logits(source))


def test_original_names_become_released_ones(source, tmp_path):
    whole = source.parent / "whole"
    old = with_original_names(whole, tmp_path / "old")
    target = converted(old, tmp_path / "target")
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_fp8(fp8_source, tmp_path):
    adopted = converted(fp8_source, tmp_path / "adopted")
    assert_same_tensors(weights_in(adopted), weights_in(fp8_source))
    assert Step3VLConfig.from_pretrained(adopted).quantization_config["quant_method"] == "fp8"
    for dtype in ("bfloat16", "float32"):
        plain = converted(fp8_source, tmp_path / dtype, "--dtype", dtype, "--max-shard-size", "300KB", "--verify")
        assert not hasattr(Step3VLConfig.from_pretrained(plain), "quantization_config")
        assert_same_tensors(weights_in(plain), dequantised(fp8_source, getattr(torch, dtype)))
        assert convert(plain, "--check").returncode == 0
    text = converted(fp8_source, tmp_path / "text", "--text-only", "--dtype", "bfloat16")
    assert set(weights_in(text)) < set(weights_in(plain)) and convert(text, "--check").returncode == 0


@pytest.mark.parametrize(
    ("layers", "listed", "moe_layers"), [("1-2", "1,2", [0, 1]), ("0-0", "1,2", []), ("0-1", "2", [])]
)
def test_some_layers(tmp_path, layers, listed, moe_layers):
    make_random_model(tmp_path / "model", [f'text_config.moe_layers_enum="{listed}"'])
    target = converted(tmp_path / "model", tmp_path / "target", "--layers", layers)
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert model.config.text_config.moe_layers == moe_layers
    as_engines_read = json.loads((target / "config.json").read_text())["text_config"]["moe_layers_enum"]
    assert {int(i) for i in as_engines_read.strip().split(",")} & {0, 1} == set(moe_layers)
    name = "model.layers.{}.self_attn.wq.weight".format
    assert torch.equal(weights_in(target)[name(0)], weights_in(tmp_path / "model")[name(layers[0])])
    ids = torch.arange(20)[None]
    assert model(ids, labels=ids, output_router_logits=True).loss.isfinite()
    assert "between 0 and 2" in refused(tmp_path / "model", tmp_path / "none", "--layers", "1-3")


def test_text_only(source, tmp_path):
    target = converted(source, tmp_path / "target", "--text-only")
    assert not any(name.startswith("vi") for name in weights_in(target))
    assert type(AutoModelForCausalLM.from_pretrained(target)) is Step3TextForCausalLM
    assert torch.equal(logits(target, AutoModelForCausalLM), logits(source))
    assert isinstance(AutoProcessor.from_pretrained(target), PreTrainedTokenizerBase)  # as of any text model
    assert convert(target, "--check").returncode == 0


def first_file(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def test_everything_wrong_is_listed_before_anything_is_written(copied, tmp_path):
    path = first_file(copied)
    tensors = load_file(path)
    missing, flat, foreign = list(tensors)[:3]
    del tensors[missing]
    tensors[flat] = tensors[flat].flatten()[:-1]
    tensors[foreign] = tensors[foreign].int()
    tensors["surplus.weight"] = torch.ones(2)
    save_file(tensors, path)
    named = dict.fromkeys(tensors, path.name)
    edit_json(copied / INDEX, lambda index: (index["weight_map"].pop(missing), index["weight_map"].update(named)))
    for arguments in ([copied, "--check"], [copied, tmp_path / "target"]):
        lines = refused(*arguments).splitlines()
        assert len(lines) == 4, lines
        complaints = {missing: "missing", flat: "expected shape", foreign: "found I32", "surplus": "not part"}
        for name, complaint in complaints.items():
            assert [line for line in lines if name in line and complaint in line], (name, lines)
    assert not list(tmp_path.glob("target*"))


def test_values_that_are_not_finite(copied):
    path = first_file(copied)
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[3:5] = torch.tensor([torch.nan, -torch.inf])
    save_file(tensors, path)
    assert convert(copied, "--check").returncode == 0
    told = refused(copied, "--check", "--check-finite")
    assert f"{path.name}: {name}: 2 values are NaN or infinite" in told


def replaced(old: bytes, new: bytes):
    return lambda data: data.replace(old, new, 1)


def in_header(old: bytes, new: bytes):
    """A change in the header of a weight file, which begins with its length."""

    def change(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        text = data[8:end].replace(old, new, 1)
        return len(text).to_bytes(8, "little") + text + data[end:]

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (INDEX, replaced(b'"model-', b'"../model-'), "is missing"),
        (INDEX, replaced(b'.safetensors"', b'.bin"'), "pickled weights"),
        ("model-*", lambda data: data[:-5], "not fully covered"),
        ("model-*", lambda data: (2**40).to_bytes(8, "little") + b"{}", "header too large"),
        ("model-*", in_header(b'"shape":[', b'"shape":[1000000000000,'), "invalid shape"),
        ("model-*", in_header(b"{", b'{"__metadata__":{},'), "duplicate field"),
        ("config.json", lambda data: b"[" * 10**5, "nested too deep"),
        (
            "config.json",
            replaced(b'_layers": 3', b'_layers": 1001'),
            "'num_hidden_layers': ValueError: Value must be greater or equal to 1 and smaller or equal to 1000",
        ),
        ("config.json", replaced(b'"text_config"', b'"other"'), "`text_config` must be an object, got None"),
        ("config.json", replaced(b'"vision_config"', b'"other"'), "`vision_config` must be an object, got None"),
        (
            "config.json",
            replaced(b"step3_vision_encoder", b"clip"),
            "`vision_config.model_type` must be step3_vision_en",
        ),
    ],
)
def test_unsafe_input_is_refused(copied, name, change, message):
    path = min(copied.glob(name))
    path.write_bytes(change(path.read_bytes()))
    told = refused(copied, "--check")
    assert message in told and (name != "config.json" or len(told.splitlines()) == 1), told


def test_files_of_other_kinds_are_refused(copied):
    path, config = first_file(copied), copied / "config.json"
    path.symlink_to(shutil.move(path, copied.parent / "outside.safetensors"))
    assert "is outside the directory" in refused(copied, "--check")
    config.unlink()
    assert "'config.json' is missing" in refused(copied, "--check")
    os.mkfifo(config)
    assert "not a regular file" in refused(copied, "--check")
    for path in copied.glob("model*"):
        path.rename(path.with_suffix(".bin"))
    assert "pickled weights" in refused(copied, "--check")


def test_few_of_many_faults_are_listed(copied):
    edit_json(copied / "config.json", lambda config: config["text_config"].update(hidden_size=72))
    *faults, last = refused(copied, "--check").splitlines()
    assert len(faults) == 20 and last.startswith("... and ") and int(last.split()[2]) > 10


@pytest.mark.parametrize("target", ["copied", "copied/target", "copied/deep/target", ".", "link/target", "released"])
def test_source_and_target_are_kept_apart(copied, tmp_path, target):
    if target == "released":  # whose unfinished run would be where the source is
        copied = copied.rename(tmp_path / "released.partial")
    else:
        (tmp_path / "link").symlink_to(copied)
    before = sorted(copied.rglob("*"))
    assert "the source" in refused(copied, tmp_path / target) and sorted(copied.rglob("*")) == before


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "name", "options"),
    [
        ("float32", 1e6, "float16", "lm_head.weight", ["--check-finite", "--verify"]),
        ("float32", 3.4e38, "bfloat16", "vit_downsampler.bias", []),
        ("float64", -1e39, "float32", "lm_head.weight", []),
        ("float64", 1e39, "fp8", "model.layers.1.moe.up_proj.weight", []),
        ("float32", 3.4e38, "fp8", "lm_head.weight", []),
    ],
)
def test_a_cast_that_overflows_is_refused(source, tmp_path, stored, value, dtype, name, options):
    tensors = {key: tensor.to(getattr(torch, stored)) for key, tensor in weights_in(source).items()}
    wide = Path(shutil.copytree(source, tmp_path / "wide", ignore=shutil.ignore_patterns("model*")))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, wide / "model.safetensors")
    told = refused(wide, tmp_path / "target", "--dtype", dtype, *options)
    assert f"model.safetensors: {name}: has numbers that are too large" in told
    assert not list(tmp_path.glob("target*"))
    if dtype == "float32":  # an infinity stays one
        tensors[name].view(-1)[-1] = torch.inf
        save_file(tensors, wide / "model.safetensors")
        infinite = converted(wide, tmp_path / "infinite", "--dtype", dtype)
        assert weights_in(infinite)[name].view(-1)[-1].isinf()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: scales[min(scales)].fill_(3e38), "_proj.weight: has numbers that are too large"),
        (lambda scales: scales.pop(min(scales)), "weight_scale_inv: missing, expected shape"),
        (lambda scales: scales.update({min(scales): torch.ones(1)}), "weight_scale_inv: expected shape"),
    ],
)
def test_scales_that_do_not_fit_are_refused(fp8_source, tmp_path, change, message):
    copied = Path(shutil.copytree(fp8_source, tmp_path / "copied"))
    path = copied / "model-00002-of-00003.safetensors"
    scales = load_file(path)
    change(scales)
    save_file(scales, path)
    edit_json(
        copied / INDEX, lambda index: index.update(weight_map={n: index["weight_map"][n] for n in weights_in(copied)})
    )
    assert message in refused(copied, tmp_path / "target", "--dtype", "bfloat16")
    assert not list(tmp_path.glob("target*"))


@pytest.mark.parametrize(("how", "name"), [("--copy", "link"), ("--to-single", "write_shard")])
def test_what_was_written_wrong_is_seen(source, tmp_path, monkeypatch, how, name):
    def spoil(*arguments):
        write(*arguments)
        path = next(path for path in arguments if isinstance(path, Path) and path.is_relative_to(tmp_path))
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    write = getattr(convert_checkpoint, name)
    monkeypatch.setattr(convert_checkpoint, name, spoil)
    assert "was not written correctly" in refused(source, tmp_path / "target", how, "--verify")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "limit", "file"),
    [
        (["--copy"], 100_000, "package/model-00001-of-"),
        (["--to-single"], 100_000, "package/model.safetensors: "),
        ([], 60_000, "package/modeling_step3.py: "),
        ([], 6_000, "package/configuration_step3.py: "),
    ],
)
def test_a_file_that_does_not_fit_is_named(source, tmp_path, options, limit, file):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        last = refused(source, tmp_path / "target", *options).splitlines()[-1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last.startswith(f"{tmp_path}/target.partial/{file}") and "File too large" in last, last
    converted(source, tmp_path / "target", *options)


def test_a_full_disk_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for options in (["--dtype", "float32"], ["--copy"]):
        assert "1000 free" in refused(source, tmp_path / "target", *options) and not list(tmp_path.iterdir())
    converted(source, tmp_path / "target")


def test_finished_shards_are_kept_and_other_runs_refused(source, tmp_path, monkeypatch):
    options = ["--max-shard-size", "100KB"]
    whole = converted(source, tmp_path / "whole", *options)
    assert "exists already" in refused(source, whole, *options)
    target, partial = tmp_path / "target", tmp_path / "target.partial"
    write_shard, rmtree = convert_checkpoint.write_shard, shutil.rmtree

    def stop_at_second_shard(path, *rest):
        if "-00002-" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    def stop_tidying_up(path, **options):
        if path == partial:
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "write_shard", stop_at_second_shard)
        result = convert(source, target, *options)
    assert result.returncode == 130 and "Repeat the command" in result.stderr and not target.exists()
    (partial / "package" / ".model-00002-left-by-a-killed-run").mkdir()
    first = first_file(whole).name
    inode = os.stat(partial / "package" / first).st_ino
    assert "with other options" in refused(source, target, "--max-shard-size", "50KB")
    with open(partial / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing" in refused(source, target, *options)
    with monkeypatch.context() as patch:  # the target is whole, but not all is tidied up
        patch.setattr(convert_checkpoint.shutil, "rmtree", stop_tidying_up)
        assert convert(source, target, *options).returncode == 130
    assert target.exists() and partial.exists()
    converted(source, target, *options)
    assert os.stat(target / first).st_ino == inode
    assert_same_files(target, whole)


def test_mutated_files_are_refused_or_read(source, tmp_path):
    """Bytes changed, cut or repeated anywhere in the headers, the index or the config; the clean copy is all right."""
    choose, num_refused = random.Random(0), 0
    for number in range(150):
        copied = Path(shutil.copytree(source, tmp_path / str(number), copy_function=os.link))
        name = choose.choice(["config.json", INDEX, first_file(source).name])
        data = bytearray((source / name).read_bytes())
        for _ in range(choose.choice([1, 1, 5])):
            start = choose.randrange(min(len(data), 4000))
            if choose.random() < 0.5:
                data[start] = choose.randrange(256)
            else:
                data[start : start + choose.randrange(50)] = bytes(data[: choose.randrange(50)])
        (copied / name).unlink()
        (copied / name).write_bytes(data)
        result = convert(copied, "--check")
        faults = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
        assert result.returncode == bool(faults)
        num_refused += result.returncode
    assert num_refused > 100


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2048}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("settings", "subject", "verdicts"),
    [
        ([], "activation", ["as here", "as here"]),
        (['text_config.hidden_act="gelu"'], "activation", ["wrong: computes with silu"] * 2),
        (["text_config.num_attention_groups=2"], "key/value heads", ["error: supports one"] * 2),
        # The converter writes the head.
        (["text_config.tie_word_embeddings=true"], "output head", ["as here"] * 2),
        ([f"text_config.rope_parameters={json.dumps(LLAMA3)}"], "rotary embedding", ["error", ""]),
        ([f"text_config.rope_parameters={json.dumps(PARTIAL)}"], "rotary embedding", ["wrong", ""]),
        (["patch_size=252"], "pictures", ["", "wrong"]),
        (["--text-only"], "part", ["as here", "error: has no class for it"]),
    ],
)
def test_engines_lists_what_each_would_do(tmp_path, settings, subject, verdicts):
    patch_size = 252 if settings == ["patch_size=252"] else 504
    options = [setting for setting in settings if setting.startswith("--")]
    released = ["vision_config.image_size=728", "vision_config.patch_size=14"]
    released += [setting for setting in settings if setting.startswith("text_config")]
    make_random_model(tmp_path / "model", released, patch_size=patch_size)
    result = convert(tmp_path / "model", "--engines", *options)
    assert result.returncode == 0 and not result.stderr, result.stderr
    lines = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()[1:]]
    found = {name: cells for name, _, *cells in lines}
    assert all(map(str.startswith, found[subject], verdicts))
    others = [cell for cells in found.values() for cell in cells if cell != "as here"]
    assert settings or not others
    assert len(convert(tmp_path / "model", "--check", *options).stderr.splitlines()) == len(others)
