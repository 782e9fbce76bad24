import json
import os
import re
import shutil
import subprocess
import sys
from logging import Handler, getLogger
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # everything the tests load is on disk
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # which share the processors
    os.environ["OMP_NUM_THREADS"] = str(max(os.cpu_count() // int(workers), 1))
ROOT = Path(__file__).parents[1]
GOLDENS = ROOT / "tests" / "goldens"
# The environment with vLLM, of the tests that are marked `engines`.
VLLM_HOME = Path(os.environ["STEP3_ENGINES"]).resolve() if os.environ.get("STEP3_ENGINES") else None
sys.path[:0] = [str(ROOT / "scripts" / folder) for folder in ("", "tiny", "develop")]

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, set_seed
from transformers.utils import logging

import step3_vl
from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration
from step3_vl.configuration_step3 import num_image_tokens
from step3_vl.generation_step3 import CACHE_NAME


assert Path(step3_vl.__file__).resolve().parent == ROOT, f"`pip install --editable .`: found {step3_vl.__file__}"
logging.disable_progress_bar()

IMAGE_TOKEN = 7
PICTURES = ("pixel_values", "patch_pixel_values", "num_patches")
needs_vllm = pytest.mark.skipif(VLLM_HOME is None, reason="run by `bash scripts/test.sh --engines DIRECTORY`")


def python(*arguments, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python in another process."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment})


def run(script: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """Runs one of the scripts, in whichever folder it is, as from a shell."""
    return python(next((ROOT / "scripts").rglob(script)), *arguments, **environment)


def cache_of(output):
    """The cache in a model's output, whatever this release calls it."""
    return output[CACHE_NAME]


# The longest sum in a model of `small_config`, over a patch's pixels, and how many products follow one another in it.
LONGEST_SUM, PRODUCTS = 3 * 14 * 14, 24


def assert_close(actual: torch.Tensor, expected: torch.Tensor):
    """
    Equal but for the order of sums, which differs between processors and batch sizes. Rounding errors add up as a
    random walk: the square root of their number, LONGEST_SUM * PRODUCTS, times one of them, the number type's epsilon
    at the size of the largest value.
    """
    if not isinstance(actual, torch.Tensor):
        for pair in zip(actual, expected, strict=True):
            assert_close(*pair)
        return
    size = float(expected.detach().abs().max())
    atol = (LONGEST_SUM * PRODUCTS) ** 0.5 * torch.finfo(expected.dtype).eps * size
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def assert_same_tensors(first: dict, second: dict):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def assert_same_files(directory: Path, other: Path):
    names = {path.name for path in directory.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    assert [name for name in names if (directory / name).read_bytes() != (other / name).read_bytes()] == []


def weights_in(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, by their names on disk."""
    return {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}


def one_by_one(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights, with every expert's under names of their own."""
    single = {}
    for name, tensor in weights.items():
        layer, is_moe, rest = name.partition(".moe.")
        if is_moe and "_proj.weight" in rest:
            single |= {f"{layer}.moe.experts.{number}.{rest}": part.clone() for number, part in enumerate(tensor)}
        else:
            single[name] = tensor
    return single


def with_original_names(source: Path, directory: Path) -> Path:
    """The same checkpoint in one file, under the names that the original remote code saved."""

    def original(name: str) -> str:
        if name.startswith("model."):
            return name.replace("model.", "model.language_model.", 1)
        return name if name.startswith("lm_head") else f"model.{name}"

    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {original(name): tensor for name, tensor in weights_in(source).items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def load_whole(model_class, directory: Path | None, **options):
    """A model of which nothing is missing in a directory, which holds nothing else."""
    model, report = model_class.from_pretrained(directory, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def edit_json(path: Path, change) -> None:
    """Changes the object in a JSON file, in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def small_config(text=None, vision=None, **top) -> Step3VLConfig:
    """A config of a few thousand weights: two MoE layers among three; pictures of 112 px take 4 tokens."""
    text_config = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "head_dim": 16,
        "share_q_dim": 32,
        "moe_num_experts": 6,
        "moe_top_k": 2,
        "moe_intermediate_size": 24,
        "share_expert_dim": 40,
        "moe_layers_enum": "1,2",
        "max_position_embedding": 512,
        "initializer_range": 0.15,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    vision_config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "output_hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 112,
        "initializer_range": 0.15,
    }
    return Step3VLConfig(
        text_config={**text_config, **(text or {})},
        vision_config={**vision_config, **(vision or {})},
        **{"image_token_id": IMAGE_TOKEN, **top},
    )


def small_model(config=None, seed=0, **kwargs) -> Step3VLForConditionalGeneration:
    set_seed(seed)
    model = Step3VLForConditionalGeneration._from_config(config or small_config(), **kwargs).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases that do something
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    return model


def small_batch(model) -> dict[str, torch.Tensor]:
    """Three rows, left-padded: one without pictures, one with a picture and its patches, one with two pictures."""
    patch_size, stride = model.config.vision_config.patch_size, model.config.understand_projector_stride
    picture, patch = ([IMAGE_TOKEN] * num_image_tokens(side, patch_size, stride) for side in (112, 56))
    rows = [
        [11, 12, 13, 14],
        [21, *patch, 22, *patch, 23, *picture, 24],
        [31, *picture, 32, 33, *patch, *picture, 34, 35],
    ]
    length = max(map(len, rows))
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.tensor([[2] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": torch.randn(3, 3, 112, 112, generator=generator),
        "patch_pixel_values": torch.randn(3, 3, 56, 56, generator=generator),
        "num_patches": torch.tensor([2, 0, 1]),
    }


def pictures_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in PICTURES}


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """What `small_batch` holds of one row, without padding."""
    real = batch["attention_mask"][row].bool()
    alone = {"input_ids": batch["input_ids"][row, real][None], "attention_mask": torch.ones(1, int(real.sum())).long()}
    if row > 0:
        pictures, patches = ((slice(0, 1), slice(0, 2)), (slice(1, 3), slice(2, 3)))[row - 1]
        places = dict(zip(PICTURES, (pictures, patches, pictures)))
        alone |= {name: batch[name][place] for name, place in places.items()}
    return alone


def make_fp8_checkpoint(directory: Path, *overrides: str, block: tuple[int, int] = (128, 128)) -> Path:
    """
    A random checkpoint as the fp8 release has it, in several files: the scales lie in another file than their weights,
    and the vision encoder in a third. Few of its sizes are multiples of 128, and `wq` is not in fp8.
    """
    from block_fp8 import choose_scales, quantize
    from make_random_model import make_random_model

    overrides = ["hidden_size=200", "moe_intermediate_size=136", "initializer_range=0.05", *overrides]
    make_random_model(directory, [f"text_config.{override}" for override in overrides], dtype="bfloat16")
    files = [{}, {}, {}]
    for name, weight in load_file(directory / "model.safetensors").items():
        if re.fullmatch(r"model\.layers\..*_proj\.weight", name):
            matrices = weight.float().view(-1, *weight.shape[-2:])
            scales = torch.stack([choose_scales(matrix, block) for matrix in matrices])
            weight = torch.stack([quantize(*pair, block) for pair in zip(matrices, scales)]).view(weight.shape)
            files[1][f"{name}_scale_inv"] = scales.view(*weight.shape[:-2], *scales.shape[-2:])
        files[2 if name.startswith("vi") else 0][name] = weight
    weight_map = {}
    for number, tensors in enumerate(files, start=1):
        file = f"model-0000{number}-of-00003.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    edit_json(directory / "config.json", lambda config: config.update(quantization_config=quantization))
    return directory


def dequantised(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What an fp8 checkpoint stands for, each element times the scale of its block."""
    block = json.loads((directory / "config.json").read_text())["quantization_config"]["weight_block_size"]
    tensors = weights_in(directory)
    plain = {name: tensor.to(dtype) for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name, weight in tensors.items():
        if f"{name}_scale_inv" in tensors:
            rows, columns = (torch.arange(size) // side for size, side in zip(weight.shape[-2:], block))
            scale = tensors[f"{name}_scale_inv"][..., rows, :][..., columns]
            plain[name] = (weight.float() * scale).to(dtype)
    return plain


def pytest_collection_modifyitems(items):
    """The files that train come first, so that no worker is left with one of their tests at the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_finetune", "test_tiny"))


@pytest.fixture(autouse=True)
def no_deprecated_names():
    """Nothing that the package does makes transformers warn that it gives up the cache's older name."""
    logging.set_verbosity_warning()  # also after a script that ran in this process
    records = []
    handler = Handler()
    handler.emit = records.append
    logger = getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert not [text for text in (record.getMessage() for record in records) if "`past_key_values`" in text]


@pytest.fixture
def transformers_log(caplog):
    """What transformers logs, where its reports on loading go."""
    logger = getLogger("transformers")
    logger.addHandler(caplog.handler)
    with caplog.at_level("WARNING", "transformers"):  # scripts that tests call in this process set a higher one
        yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch(model):
    return small_batch(model)


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory) -> Path:
    """A directory as `scripts/tiny/make_random_model.py` makes it."""
    from make_random_model import make_random_model

    directory = tmp_path_factory.mktemp("random") / "model"
    make_random_model(directory)
    return directory


@pytest.fixture(scope="session")
def processor(random_model_dir):
    return AutoProcessor.from_pretrained(random_model_dir)
