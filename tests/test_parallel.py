"""Two processes on the CPU against one: logits, gradients and what is saved."""

import os
import socket
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from conftest import assert_close, row_alone, small_batch, small_config, small_model
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from step3_vl import Step3TextForCausalLM, Step3VLForConditionalGeneration


EXPERT_PARALLEL = (
    {"ep_size": 2} if Version(transformers.__version__) >= Version("5.19") else {"enable_expert_parallel": True}
)


def compare(rank, port, directory, options):
    sys.stderr = open(os.devnull, "w")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    alone = Step3VLForConditionalGeneration.from_pretrained(directory)
    model = Step3VLForConditionalGeneration.from_pretrained(
        directory, distributed_config=DistributedConfig(tp_size=2, **options)
    )
    attention = model.model.language_model.layers[0].self_attn
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in model.named_parameters()}
    prefix = "model.language_model.layers.1."
    assert local[prefix + "self_attn.wq.weight"].shape == (48, 32)  # 3 of 6 query heads
    assert local[prefix + "self_attn.o_proj.weight"].shape == (48, 48)
    assert local[prefix + "self_attn.k_proj.weight"].shape == (16, 48)  # the one key/value head, whole
    assert local[prefix + "moe.experts.gate_up_proj"].shape == (3, 48, 48)  # 3 of 6 experts, whole

    heads = []
    attention.wq.register_forward_hook(lambda module, args, output: heads.append(output.shape[-1] // 16))
    batch = small_batch(alone)
    real = batch["attention_mask"].bool()
    results = {}
    for name, each in (("alone", alone), ("split", model)):
        with torch.no_grad():
            logits = each(**batch).logits[real]
        each(**batch, labels=batch["input_ids"]).loss.backward()
        results[name] = logits
    assert set(heads) <= {3, 6}
    assert_close(results["split"], results["alone"])
    for (name, expected), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    model.save_pretrained(directory / "saved")
    dist.barrier()
    if rank == 0:
        saved, expected = (load_file(folder / "model.safetensors") for folder in (directory / "saved", directory))
        assert saved.keys() == expected.keys()
        for name in saved:
            assert torch.equal(saved[name], expected[name]), name
    with pytest.raises(ValueError, match="`step3_gate_up` cannot be applied to .*mlp: .* split over ranks"):
        model.fuse("step3_gate_up")
    dist.barrier()
    dist.destroy_process_group()


def compare_pipeline(rank, port, directory):
    sys.stderr = open(os.devnull, "w")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    alone = Step3TextForCausalLM.from_pretrained(directory).eval()
    stages = Step3TextForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(pp_size=2)).eval()
    inputs = row_alone(small_batch(small_model()), 0)
    with torch.no_grad():
        torch.testing.assert_close(stages(**inputs).logits, alone(**inputs).logits)
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


@pytest.mark.parametrize("options", [{}, EXPERT_PARALLEL], ids=["tensor parallel", "expert parallel"])
def test_two_ranks_give_what_one_gives(options, tmp_path):
    small_model(small_config(text={"num_attention_heads": 6})).save_pretrained(tmp_path)
    mp.spawn(compare, args=(free_port(), tmp_path, options), nprocs=2)


def test_two_pipeline_stages_give_what_one_model_gives(tmp_path):
    small_model(small_config()).save_pretrained(tmp_path)
    mp.spawn(compare_pipeline, args=(free_port(), tmp_path), nprocs=2)
