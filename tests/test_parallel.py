"""Two processes on the CPU against one: logits, gradients and what is saved."""

import os
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_close, assert_same_tensors, row_alone, small_batch, small_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from step3_vl import Step3TextForCausalLM, Step3VLForConditionalGeneration


def compare_split(directory, options):
    """Tensor or expert parallelism."""
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
            results[name] = each(**batch).logits[real]
        each(**batch, labels=batch["input_ids"]).loss.backward()
    assert set(heads) <= {3, 6}
    assert_close(results["split"], results["alone"])
    for (name, expected), parameter in zip(alone.named_parameters(), model.parameters(), strict=True):
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, expected.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    model.save_pretrained(directory / "saved")
    dist.barrier()
    if dist.get_rank() == 0:
        saved, expected = (load_file(folder / "model.safetensors") for folder in (directory / "saved", directory))
        assert_same_tensors(saved, expected)
    with pytest.raises(ValueError, match="`step3_gate_up` cannot be applied to .*mlp: .* split over ranks"):
        model.fuse("step3_gate_up")


def compare_pipeline(directory):
    alone = Step3TextForCausalLM.from_pretrained(directory).eval()
    stages = Step3TextForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(pp_size=2)).eval()
    inputs = row_alone(small_batch(small_model()), 0)
    with torch.no_grad():
        torch.testing.assert_close(stages(**inputs).logits, alone(**inputs).logits)


def compare(rank, directory):
    sys.stderr = open(os.devnull, "w")
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=2)
    for way in (partial(compare_split, options={}), partial(compare_split, options={"ep_size": 2}), compare_pipeline):
        way(directory)
        dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    """One pair of them for all ways, as starting it takes longest."""
    small_model().save_pretrained(tmp_path)
    mp.spawn(compare, args=(tmp_path,), nprocs=2)
