import os
import subprocess
import sys
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"  # everything the tests load is on disk
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pytest
import torch
from transformers import AutoProcessor, set_seed
from transformers.utils import logging

from step3_vl import Step3VLConfig, Step3VLForConditionalGeneration


logging.disable_progress_bar()

IMAGE_TOKEN = 7


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    """Runs one of the scripts as from a shell."""
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def small_config(text=None, vision=None, **top) -> Step3VLConfig:
    """A config of a few thousand weights: two mixtures among three layers; pictures of 112 px take 4 tokens."""
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
    picture, patch = [IMAGE_TOKEN] * model.model.num_image_tokens(112), [IMAGE_TOKEN] * model.model.num_image_tokens(56)
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


def row_alone(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """What `small_batch` holds of one row, without padding."""
    real = batch["attention_mask"][row].bool()
    alone = {"input_ids": batch["input_ids"][row, real][None], "attention_mask": torch.ones(1, int(real.sum())).long()}
    pictures, patches = {1: (slice(0, 1), slice(0, 2)), 2: (slice(1, 3), slice(2, 3))}.get(row, (None, None))
    if pictures is not None:
        alone["pixel_values"] = batch["pixel_values"][pictures]
        alone["num_patches"] = batch["num_patches"][pictures]
        alone["patch_pixel_values"] = batch["patch_pixel_values"][patches]
    return alone


@pytest.fixture
def model():
    return small_model()


@pytest.fixture
def batch(model):
    return small_batch(model)


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory) -> Path:
    """A directory as `scripts/make_random_model.py` makes it."""
    from make_random_model import make_random_model

    directory = tmp_path_factory.mktemp("random") / "model"
    make_random_model(directory)
    return directory


@pytest.fixture(scope="session")
def processor(random_model_dir):
    return AutoProcessor.from_pretrained(random_model_dir)
