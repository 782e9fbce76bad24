"""`scripts/convert_checkpoint.py`, by its command line."""

import fcntl
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import pytest
import torch
from conftest import ROOT, dequantised, make_fp8_checkpoint, run
from make_random_model import make_random_model
from safetensors.torch import load_file, save_file
from test_saving import assert_same_tensors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerBase

from step3_vl import Step3TextForCausalLM, Step3VLConfig


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


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(directory: Path, auto=AutoModelForImageTextToText) -> torch.Tensor:
    model = auto.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A checkpoint in bfloat16, in several files."""
    folder = tmp_path_factory.mktemp("released")
    assert run("make_random_model.py", folder / "whole", "--dtype", "bfloat16").returncode == 0
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole")
    AutoProcessor.from_pretrained(folder / "whole").save_pretrained(folder / "source")
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
    code = "import sys; from transformers import AutoModelForImageTextToText as A, AutoProcessor as P; "
    code += "o = {'trust_remote_code': True}; A.from_pretrained(sys.argv[1], **o); P.from_pretrained(sys.argv[1], **o)"
    assert subprocess.run([sys.executable, "-c", code, target], cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("options", [[], ["--to-single"], ["--text-only"], ["--layers", "0-1", "--verify"]])
def test_a_tied_model_gets_the_head_that_engines_ask_for(source, tmp_path, sharded, options):
    model = AutoModelForImageTextToText.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "tied", max_shard_size="100KB" if sharded else "1GB")
    assert "lm_head.weight" not in weights(tmp_path / "tied")
    target = converted(tmp_path / "tied", tmp_path / "target", *options)
    found = weights(target)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    if (target / "model.safetensors.index.json").exists():  # then the index, not the one file, is what is read
        index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == found.keys() and not (target / "model.safetensors").exists()
        assert set(index.values()) == {path.name for path in target.glob("*.safetensors")}
    auto = AutoModelForCausalLM if "--text-only" in options else AutoModelForImageTextToText
    again, report = auto.from_pretrained(target, output_loading_info=True)
    assert not any(report.values()), report
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert convert_checkpoint.main([str(target), "--check"]) == 0


def test_a_processor_comes_along_where_none_is_described(copied, tmp_path):
    for name in ("processor_config.json", "chat_template.jinja"):
        (copied / name).unlink()
    processor = AutoProcessor.from_pretrained(converted(copied, tmp_path / "target"))
    assert processor.image_processor.patch_size == 504 and processor.chat_template


def test_another_sharding_and_back(source, tmp_path):
    many = converted(source, tmp_path / "many", "--max-shard-size", "100KB", "--verify")
    assert len(list(many.glob("*.safetensors"))) > len(list(source.glob("*.safetensors")))
    assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=many).returncode == 0
    single = converted(many, tmp_path / "single", "--to-single")
    assert_same_tensors(load_file(single / "model.safetensors"), weights(source))
    assert (single / "model.safetensors").read_bytes() == (source.parent / "whole" / "model.safetensors").read_bytes()
    assert not (single / "model.safetensors.index.json").exists()
    again = converted(single, tmp_path / "again", "--max-shard-size", "100KB", "--verify")
    assert {path.name for path in again.iterdir()} == {path.name for path in many.iterdir()}
    for path in many.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_another_type(source, tmp_path):
    wide = converted(source, tmp_path / "wide", "--dtype", "float32")
    assert_same_tensors(weights(wide), {name: tensor.float() for name, tensor in weights(source).items()})
    back = converted(wide, tmp_path / "back", "--dtype", "bfloat16")
    assert_same_tensors(weights(back), weights(source))
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logits(wide), logits(source))


def test_original_names_become_released_ones(source, tmp_path):
    whole = source.parent / "whole"
    old = Path(shutil.copytree(whole, tmp_path / "old"))
    renamed = {}
    for name, tensor in load_file(whole / "model.safetensors").items():
        if name.startswith(("vision_model.", "vit_")):
            name = f"model.{name}"
        elif name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        renamed[name] = tensor
    save_file(renamed, old / "model.safetensors", metadata={"format": "pt"})
    target = converted(old, tmp_path / "target")
    assert (target / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_fp8(fp8_source, tmp_path):
    adopted = converted(fp8_source, tmp_path / "adopted")
    assert_same_tensors(weights(adopted), weights(fp8_source))
    assert Step3VLConfig.from_pretrained(adopted).quantization_config["quant_method"] == "fp8"
    for dtype in ("bfloat16", "float32"):
        plain = converted(fp8_source, tmp_path / dtype, "--dtype", dtype, "--max-shard-size", "300KB", "--verify")
        assert not hasattr(Step3VLConfig.from_pretrained(plain), "quantization_config")
        assert_same_tensors(weights(plain), dequantised(fp8_source, getattr(torch, dtype)))
        assert convert(plain, "--check").returncode == 0
    text = converted(fp8_source, tmp_path / "text", "--text-only", "--dtype", "bfloat16")
    assert set(weights(text)) < set(weights(plain)) and convert(text, "--check").returncode == 0


def test_some_layers(source, tmp_path):
    target = converted(source, tmp_path / "target", "--layers", "1-2")
    config = Step3VLConfig.from_pretrained(target)
    assert config.text_config.num_hidden_layers == 2 and config.text_config.moe_layers == [0, 1]
    assert torch.equal(
        weights(target)["model.layers.0.moe.gate.weight"], weights(source)["model.layers.1.moe.gate.weight"]
    )
    logits(target)
    dense = converted(source, tmp_path / "dense", "--layers", "0-0")
    assert Step3VLConfig.from_pretrained(dense).text_config.moe_layers == []
    logits(dense)
    result = convert(source, tmp_path / "none", "--layers", "1-3")
    assert result.returncode == 1 and "between 0 and 2" in result.stderr


def test_layers_without_experts(tmp_path):
    make_random_model(tmp_path / "model", ['text_config.moe_layers_enum="2"'])
    target = converted(tmp_path / "model", tmp_path / "target", "--layers", "0-1")
    text = json.loads((target / "config.json").read_text())["text_config"]
    assert not {0, 1} & {int(i) for i in text["moe_layers_enum"].strip().split(",")}  # as the serving engines read it
    model = AutoModelForImageTextToText.from_pretrained(target)
    assert not any("moe" in name for name in model.state_dict())
    ids = torch.arange(20)[None]
    assert model(ids, labels=ids, output_router_logits=True).loss.isfinite()


def test_text_only(source, tmp_path):
    target = converted(source, tmp_path / "target", "--text-only")
    assert not any(name.startswith("vi") for name in weights(target))
    assert type(AutoModelForCausalLM.from_pretrained(target)) is Step3TextForCausalLM
    assert torch.equal(logits(target, AutoModelForCausalLM), logits(source))
    assert isinstance(AutoProcessor.from_pretrained(target), PreTrainedTokenizerBase)  # as of any text model
    assert convert(target, "--check").returncode == 0


def test_everything_wrong_is_listed_before_anything_is_written(copied, tmp_path):
    path = copied / "model-00001-of-00004.safetensors"
    path = path if path.exists() else sorted(copied.glob("*.safetensors"))[0]
    tensors = load_file(path)
    index = json.loads((copied / "model.safetensors.index.json").read_text())
    missing, flat, foreign = list(tensors)[:3]
    del tensors[missing], index["weight_map"][missing]
    tensors[flat] = tensors[flat].flatten()[:-1]
    tensors[foreign] = tensors[foreign].int()
    tensors["surplus.weight"] = torch.ones(2)
    index["weight_map"]["surplus.weight"] = path.name
    save_file(tensors, path)
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    for arguments in ([copied, "--check"], [copied, tmp_path / "target"]):
        result = convert(*arguments)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        lines = result.stderr.splitlines()
        assert len(lines) == 4, result.stderr
        for name, complaint in [
            (missing, "missing"),
            (flat, "expected shape"),
            (foreign, "found I32"),
            ("surplus", "not part"),
        ]:
            assert [line for line in lines if name in line and complaint in line], (name, result.stderr)
    assert not (tmp_path / "target").exists() and not (tmp_path / "target.partial").exists()


def test_values_that_are_not_finite(copied):
    path = sorted(copied.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = float("nan")
    tensors[name].view(-1)[4] = -float("inf")
    save_file(tensors, path)
    assert convert(copied, "--check").returncode == 0
    result = convert(copied, "--check", "--check-finite")
    assert result.returncode == 1 and f"{path.name}: {name}: 2 values are NaN or infinite" in result.stderr


def set_header(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header) or json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])


def edit_config(directory: Path, change) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def edit_index(directory: Path, change) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def first_file(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[0]


def leave_by_a_link(directory: Path) -> None:
    outside = directory.parent / "outside.safetensors"
    shutil.move(first_file(directory), outside)
    (directory / "model-00001-of-00004.safetensors").unlink(missing_ok=True)
    name = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values()
    (directory / sorted(set(name))[0]).symlink_to(outside)


def overlap(header: dict) -> None:
    first, second = [entry for name, entry in header.items() if name != "__metadata__"][:2]
    size = second["data_offsets"][1] - second["data_offsets"][0]
    second["data_offsets"] = [first["data_offsets"][0], first["data_offsets"][0] + size]


def lie(header: dict) -> None:
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["shape"] = [10**12, *entry["shape"]]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: edit_index(d, lambda m: m.update({next(iter(m)): "../evil.safetensors"})), "is missing"),
        (lambda d: edit_index(d, lambda m: m.update({next(iter(m)): "pytorch_model.bin"})), "pickled weights"),
        (leave_by_a_link, "is outside the directory"),
        (lambda d: [path.rename(path.with_suffix(".bin")) for path in d.glob("model*")], "pickled weights"),
        (lambda d: first_file(d).write_bytes(first_file(d).read_bytes()[:-5]), "not fully covered"),
        (lambda d: first_file(d).write_bytes(first_file(d).read_bytes() + b"more"), "not fully covered"),
        (lambda d: first_file(d).write_bytes((2**40).to_bytes(8, "little") + b"{}"), "header too large"),
        (lambda d: set_header(first_file(d), overlap), "invalid offset"),
        (lambda d: set_header(first_file(d), lie), "invalid shape"),
        (lambda d: set_header(first_file(d), lambda h: json.dumps(h)[:-1] + ',"__metadata__":{}}'), "duplicate field"),
        (lambda d: [(d / "config.json").unlink(), os.mkfifo(d / "config.json")], "not a regular file"),
        (lambda d: (d / "config.json").unlink(), "'config.json' is missing"),
        (lambda d: (d / "config.json").write_text("[" * 10**5), "nested too deep"),
        (
            lambda d: (d / "config.json").write_text(
                (d / "config.json").read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 1000000000')
            ),
            "'num_hidden_layers': ValueError: Value must be greater or equal to 1 and smaller or equal to 1000",
        ),
    ],
)
def test_unsafe_input_is_refused(copied, spoil, message):
    spoil(copied)
    result = convert(copied, "--check")
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("text_config"), "`text_config` must be an object, got None"),
        (lambda c: c.pop("vision_config"), "`vision_config` must be an object, got None"),
        (lambda c: c["text_config"].update(model_type="llama"), "`text_config.model_type` must be step3_text, got 'll"),
        (lambda c: c["vision_config"].update(model_type="clip"), "`vision_config.model_type` must be step3_vision_e"),
    ],
)
def test_a_config_of_another_model_is_one_fault(copied, change, message):
    edit_config(copied, change)
    result = convert(copied, "--check")
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_few_of_many_faults_are_listed(copied):
    edit_config(copied, lambda config: config["text_config"].update(hidden_size=72))
    *faults, last = convert(copied, "--check").stderr.splitlines()
    assert len(faults) == 20 and last.startswith("... and ") and int(last.split()[2]) > 10


@pytest.mark.parametrize("target", ["copied", "copied/target", "copied/deep/target", ".", "link/target", "released"])
def test_source_and_target_are_kept_apart(copied, tmp_path, target):
    if target == "released":  # whose unfinished run would be where the source is
        copied = copied.rename(tmp_path / "released.partial")
    else:
        (tmp_path / "link").symlink_to(copied)
    before = sorted(copied.rglob("*"))
    result = convert(copied, tmp_path / target)
    assert result.returncode == 1 and "the source" in result.stderr and sorted(copied.rglob("*")) == before


@pytest.mark.parametrize(
    "stored, value, dtype, name, options",
    [
        ("float32", 1e6, "float16", "lm_head.weight", ["--check-finite", "--verify"]),
        ("float32", 3.4e38, "bfloat16", "vit_downsampler.bias", []),
        ("float64", 1e300, "bfloat16", "vit_downsampler.weight", ["--check-finite"]),
        ("float64", -1e39, "float32", "lm_head.weight", []),
        ("float64", 1e39, "fp8", "model.layers.1.moe.up_proj.weight", []),
        ("float32", 3.4e38, "fp8", "lm_head.weight", []),
    ],
)
def test_a_cast_that_overflows_is_refused(source, tmp_path, stored, value, dtype, name, options):
    tensors = {name: tensor.to(getattr(torch, stored)) for name, tensor in weights(source).items()}
    tensors["model.norm.weight"][0] = float("inf")
    wide = Path(shutil.copytree(source, tmp_path / "wide", ignore=shutil.ignore_patterns("model*")))
    save_file(tensors, wide / "model.safetensors")
    if dtype == "float32":  # an infinity stays one
        assert weights(converted(wide, tmp_path / "infinite", "--dtype", dtype))["model.norm.weight"][0].isinf()
    tensors["model.norm.weight"][0] = 1
    tensors[name].view(-1)[-1] = value
    save_file(tensors, wide / "model.safetensors")
    result = convert(wide, tmp_path / "target", "--dtype", dtype, *options)
    assert result.returncode == 1 and f"model.safetensors: {name}: has numbers that are too large" in result.stderr
    assert not list(tmp_path.glob("target*"))


def test_a_scale_that_overflows_is_refused(fp8_source, tmp_path):
    copied = Path(shutil.copytree(fp8_source, tmp_path / "copied"))
    path = copied / "model-00002-of-00003.safetensors"
    save_file({name: scale.fill_(3e38) for name, scale in load_file(path).items()}, path)
    result = convert(copied, tmp_path / "target", "--dtype", "bfloat16")
    assert result.returncode == 1 and "_proj.weight: has numbers that are too large for" in result.stderr
    assert not list(tmp_path.glob("target*"))


@pytest.mark.parametrize("how", ["--copy", "--to-single"])
def test_what_was_written_wrong_is_seen(source, tmp_path, monkeypatch, how):
    def spoil(path, *rest):
        original(path, *rest)
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    def spoil_link(origin, path, how):
        link(origin, path, how)
        path.write_bytes(path.read_bytes()[:-1] + b"?")

    original, link = convert_checkpoint.write_shard, convert_checkpoint.link
    monkeypatch.setattr(convert_checkpoint, "write_shard", spoil)
    monkeypatch.setattr(convert_checkpoint, "link", spoil_link)
    result = convert(source, tmp_path / "target", how, "--verify")
    assert result.returncode == 1 and "was not written correctly" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, limit, file",
    [
        (["--copy"], 100_000, "package/model-00001-of-"),
        (["--to-single"], 100_000, "package/model.safetensors: "),
        ([], 60_000, "package/modeling_step3.py: "),
        ([], 6_000, "package/configuration_step3.py: "),
    ],
)
def test_a_file_that_does_not_fit_is_named(source, tmp_path, options, limit, file):
    command = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", source, tmp_path / "target", *options]

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith(f"{tmp_path}/target.partial/{file}"), result.stderr
    assert "File too large" in last
    converted(source, tmp_path / "target", *options)


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_killed_runs_go_on(source, tmp_path, dtype):
    options = ["--max-shard-size", "20KB", "--dtype", dtype]
    undisturbed = converted(source, tmp_path / "undisturbed", *options)
    command = [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", source, tmp_path / "target", *options]
    choose, kills = random.Random(0), 0
    for _ in range(6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "target.partial" / "package").exists():
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
        if (tmp_path / "target").exists():
            break
        assert (tmp_path / "target.partial" / "run.json").exists() or not (
            tmp_path / "target.partial" / "package"
        ).exists()
    assert kills
    if not (tmp_path / "target").exists():
        converted(source, tmp_path / "target", *options)
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {path.name for path in (tmp_path / "target").iterdir()}
    for name in names:
        assert (tmp_path / "target" / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_finished_shards_are_kept_and_other_runs_refused(source, tmp_path, monkeypatch):
    options = ["--max-shard-size", "100KB"]
    whole = converted(source, tmp_path / "whole", *options)
    result = convert(source, whole, *options)
    assert result.returncode == 1 and "exists already" in result.stderr
    target, partial = tmp_path / "target", tmp_path / "target.partial"

    def stop_at_second_shard(path, *rest):
        if "-00002-" in path.name:
            raise KeyboardInterrupt
        write_shard(path, *rest)

    write_shard = convert_checkpoint.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(convert_checkpoint, "write_shard", stop_at_second_shard)
        result = convert(source, target, *options)
    assert result.returncode == 130 and "Repeat the command" in result.stderr and not target.exists()
    first = first_file(whole).name
    inode = os.stat(partial / "package" / first).st_ino
    result = convert(source, target, "--max-shard-size", "50KB")
    assert result.returncode == 1 and "with other options" in result.stderr
    with open(partial / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = convert(source, target, *options)
        assert result.returncode == 1 and "another run is writing" in result.stderr

    def die(path, **options):
        if path == partial:
            raise KeyboardInterrupt
        rmtree(path, **options)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:  # the target is whole, but not all is tidied up
        patch.setattr(convert_checkpoint.shutil, "rmtree", die)
        assert convert(source, target, *options).returncode == 130
    assert target.exists() and partial.exists()
    converted(source, target, *options)
    assert os.stat(target / first).st_ino == inode


def test_a_full_disk_is_seen_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    for options in (["--dtype", "float32"], ["--copy"]):
        result = convert(source, tmp_path / "target", *options)
        assert result.returncode == 1 and "1000 free" in result.stderr and not list(tmp_path.iterdir())
    converted(source, tmp_path / "target")


def test_mutated_files_are_refused_or_read(source, tmp_path):
    """Bytes changed, cut or repeated anywhere in the headers, the index or the config; the clean copy is all right."""
    choose, refused = random.Random(0), 0
    for number in range(150):
        copied = tmp_path / str(number)
        copied.mkdir()
        for path in source.iterdir():
            (copied / path.name).hardlink_to(path)
        name = choose.choice(["config.json", "model.safetensors.index.json", first_file(source).name])
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
        assert result.returncode in (0, 1)
        refused += result.returncode
        named = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
        assert (result.returncode == 1) == bool(named)
    assert refused > 100


def test_engines_lists_what_each_would_do(tmp_path):
    released = ["vision_config.image_size=728", "vision_config.patch_size=14"]
    assert "as here" in convert(ROOT / "checkpoints" / "step3-tiny", "--engines").stdout

    def rows(*settings: str, patch_size: int = 504, options: tuple[str, ...] = ()) -> dict[str, list[str]]:
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        make_random_model(directory, [*released, *settings], patch_size=patch_size)
        result = convert(directory, "--engines", *options)
        assert result.returncode == 0 and not result.stderr, result.stderr
        lines = [line.split("  ") for line in result.stdout.splitlines()[1:]]
        lines = [[cell.strip() for cell in line if cell.strip()] for line in lines]
        warned = convert(directory, "--check", *options).stderr.splitlines()
        assert len(warned) == sum(cell != "as here" for line in lines for cell in line[2:])
        return {subject: verdicts for subject, _, *verdicts in lines}

    assert all(verdicts == ["as here"] * 2 for verdicts in rows().values())
    assert rows('text_config.hidden_act="gelu"')["activation"] == ["wrong: computes with silu"] * 2
    assert rows("text_config.num_attention_groups=2")["key/value heads"] == ["error: supports one"] * 2
    assert rows("text_config.tie_word_embeddings=true")["output head"] == ["as here"] * 2  # the converter writes it
    rope = '{"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 2048, '
    rope += '"low_freq_factor": 1.0, "high_freq_factor": 4.0}'
    assert rows(f"text_config.rope_parameters={rope}")["rotary embedding"][0].startswith("error")
    rope = '{"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}'
    assert rows(f"text_config.rope_parameters={rope}")["rotary embedding"][0].startswith("wrong")
    assert rows(patch_size=252)["pictures"][1].startswith("wrong")
    assert rows(options=("--text-only",))["part"] == ["as here", "error: has no class for it"]
