"""Routed experts in other forms than stacked parameters: as linear layers, or mapped from files."""

# Copyright 2026 The Step3-VL for Hugging Face authors.
# SPDX-License-Identifier: Apache-2.0

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache
from itertools import count, takewhile
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN


class LinearExperts(nn.ModuleList):
    """
    Routed experts as gated MLPs of `nn.Linear` layers: the experts implementation `"linear"`. It is for quantisers and
    adapters that support only `nn.Linear`. Each layer waits for the device to learn which experts have tokens.

    `make_expert` makes one expert from the config and the width inside it.
    """

    def __init__(self, config, make_expert: Callable[[Any, int], nn.Module]):
        super().__init__(make_expert(config, config.moe_intermediate_size) for _ in range(config.moe_num_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Maps (tokens, hidden_size) to the same shape, by the expert indices and weights (tokens, top_k)."""
        output = torch.zeros_like(hidden_states)
        # In training, every expert gets a gradient, if only of zeros, as processes that share weights need.
        is_trained = self.training and torch.is_grad_enabled()
        for number in range(len(self)) if is_trained else top_k_index.unique().tolist():
            token, slot = torch.where(top_k_index == number)
            states = self[number](hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, states.to(output.dtype))
        return output


def divide_blocks(weight: torch.Tensor, scale: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """
    Repeats scales so that they belong to smaller blocks, all of one size, which transformers requires. Those given, of
    shape (..., blocks of rows, blocks of columns), belong to blocks of `block_size` (rows, columns), of which the last
    may reach beyond the `weight` (..., rows, columns).
    """
    for dim, size in ((-2, block_size[0]), (-1, block_size[1])):
        smaller = math.gcd(size, weight.shape[dim])
        scale = scale.repeat_interleave(size // smaller, dim).narrow(dim, 0, weight.shape[dim] // smaller)
    return scale


@torch.no_grad()
def dequantize(
    weight: torch.Tensor, scale: torch.Tensor | None, block_size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """
    Converts a `weight` (rows, columns) to `dtype` and multiplies each block of `block_size` (rows, columns) by its
    number in `scale` (blocks of rows, blocks of columns). Without a `scale`, only converts.
    """
    if scale is None:
        return weight.to(dtype)
    scale = divide_blocks(weight, scale, block_size)
    rows, columns = (size // blocks for size, blocks in zip(weight.shape, scale.shape, strict=True))
    if weight.device.type != "cpu":
        blocks = weight.to(dtype).view(scale.shape[0], rows, scale.shape[1], columns)  # exact for fp8
        return blocks.mul_(scale[:, None, :, None]).view_as(weight)
    # On a CPU, looking numbers up in a table of all 256 is several times as fast as torch's conversion from fp8.
    values = torch.arange(256, dtype=torch.uint8).view(weight.dtype).to(torch.float32)
    output = torch.empty(weight.shape, dtype=dtype)
    codes = weight.view(torch.uint8).split(rows)
    for part, code, row_scale in zip(output.split(rows), codes, scale.repeat_interleave(columns, 1), strict=True):
        part.copy_(values.index_select(0, code.flatten().int()).view(code.shape).mul_(row_scale))
    return output


class BlockFP8Linear(nn.Linear):
    """Linear layer whose weight stays in block-fp8, and is dequantised when it is used."""

    is_fp8 = True

    def __init__(self, layer: nn.Linear, block_size: tuple[int, int]):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta", dtype=torch.float8_e4m3fn)
        blocks = [math.ceil(size / block) for size, block in zip(self.weight.shape, block_size, strict=True)]
        self.block_size = block_size
        self.weight.requires_grad_(False)
        self.weight_scale_inv = nn.Parameter(torch.empty(blocks, device="meta"), requires_grad=False)

    def _apply(self, fn, recurse=True):
        """Moves the tensors, but never casts them."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return linear(states, dequantize(self.weight, self.weight_scale_inv, self.block_size, states.dtype))


@cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream that copies experts to a GPU. torch would keep the memory that each further stream has used."""
    return torch.cuda.Stream(device)


def copies_ahead(weights: Iterable[list[torch.Tensor]], device: torch.device) -> Iterator[list[torch.Tensor]]:
    """Copies lists of CPU tensors to a GPU through pinned memory, each list while the one before it is used."""
    main, copying, ahead = torch.cuda.current_stream(device), copying_stream(device), None
    buffers = [torch.empty(0, dtype=torch.uint8)] * 2
    events = [torch.cuda.Event(), torch.cuda.Event()]
    for number, tensors in enumerate(weights):
        buffer, copied = buffers[number % 2], events[number % 2]
        copied.synchronize()  # what the buffer held before has arrived
        sizes = [tensor.nbytes for tensor in tensors]
        if buffer.numel() != sum(sizes):
            buffer = buffers[number % 2] = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=True)
        for tensor, part in zip(tensors, buffer.split(sizes), strict=True):
            part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        with torch.cuda.stream(copying):
            copy = buffer.to(device, non_blocking=True)
            copied.record()
        copy.record_stream(main)
        if ahead is not None:
            yield ahead
        main.wait_event(copied)
        parts = zip(tensors, copy.split(sizes), strict=True)
        ahead = [part.view(tensor.dtype).view(tensor.shape) for tensor, part in parts]
    if ahead is not None:
        yield ahead


class MappedExperts(nn.Module):
    """
    Routed experts whose weights stay in the checkpoint's memory-mapped files, in the files' types and layout: the
    experts implementation `"mapped"`. A weight takes no memory until it is read, and then that of the page cache, which
    all processes share. The weights are not parameters: nothing casts, moves or trains them.

    With hidden states on a GPU, few tokens are copied to the CPU and computed there. For many tokens, each expert that
    has any is copied to the GPU once. Rates measured at the first use decide what is many.
    """

    names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
    scale_names = tuple(f"{name}_scale_inv" for name in names)
    rates: dict[tuple, tuple[float, float, float]] = {}  # what `measure` returned, for all layers

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self.shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        self.num_experts = config.moe_num_experts
        self.act_fn = ACT2FN[config.hidden_act]
        self.weights: dict[str, torch.Tensor | list[torch.Tensor]] = {}  # stacked, or one tensor for each expert
        self.block_size = (128, 128)  # rows and columns of fp8 weights that share a scale
        self.held: dict[int, list[torch.Tensor]] = {}  # copies of some experts' weights on a GPU

    def map_weights(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> set[str]:
        """
        Uses the `tensors` whose names start with `prefix`, without copying them, and returns their names. Experts are
        stacked, as `gate_proj.weight`, or saved one by one, as `0.gate_proj.weight`. Names of scales, which fp8 weights
        need, end with `_scale_inv`. Raises a `ValueError` if weights or scales are missing, or differ from the config
        in their number or shapes.
        """
        weights, used = {}, set()
        for matrix, scale, shape in zip(self.names, self.scale_names, self.shapes, strict=True):
            blocks = tuple(math.ceil(size / block) for size, block in zip(shape, self.block_size, strict=True))
            for name, wanted in ((matrix, shape), (scale, blocks)):
                if prefix + name in tensors:
                    names, found = [prefix + name], tensors[prefix + name]
                else:
                    single = (f"{prefix}{number}.{name}" for number in count())
                    names = list(takewhile(tensors.__contains__, single))
                    found = [tensors[name] for name in names]
                if name == scale and not names and weights[matrix][0].dtype.itemsize > 1:
                    continue  # not fp8
                shapes = {tuple(part.shape) for part in found}
                if len(found) != self.num_experts or shapes != {wanted}:
                    raise ValueError(
                        f"{prefix}{name} takes {self.num_experts} experts of the shape {wanted}, the checkpoint has "
                        f"{len(found)}{' of ' * bool(shapes)}{', '.join(map(str, shapes))}."
                    )
                weights[name] = found
                used.update(names)
        self.weights = weights
        for expert, (copy, *_) in self.held.items():
            self.hold(expert, copy.device)
        return used

    @property
    def is_fp8(self) -> bool:
        return len(self.weights) > len(self.names)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for name, weight in self.weights.items():
            if isinstance(weight, torch.Tensor):
                destination[prefix + name] = weight
            else:
                destination.update({f"{prefix}{number}.{name}": part for number, part in enumerate(weight)})

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        given = {name: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        own = {}
        self._save_to_state_dict(own, prefix, False)
        if given:  # replaces weights rather than writing to mapped pages
            self.map_weights(own | given, prefix)
        if strict:
            missing.extend(own.keys() - given.keys())
            unexpected.extend(given.keys() - own.keys())

    def __deepcopy__(self, memo):
        copied = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.weights)] = self.weights
        copied.__dict__ = deepcopy(self.__dict__, memo)
        return copied

    def stored(self, expert: int) -> list[torch.Tensor]:
        """An expert's weights as they lie in the file: three matrices and, if they are fp8, their scales."""
        return [self.weights[name][expert] for name in self.names + self.scale_names if name in self.weights]

    def compute(self, states: torch.Tensor, stored: list[torch.Tensor]) -> torch.Tensor:
        """An expert's output for `states` (rows, hidden_size), on whose device its `stored` weights are."""
        pairs = zip(stored[:3], stored[3:] or [None] * 3, strict=True)
        gate, up, down = (dequantize(weight, scale, self.block_size, states.dtype) for weight, scale in pairs)
        return linear(self.act_fn(linear(states, gate)) * linear(states, up), down)

    def fetch_and_compute(self, states: torch.Tensor, expert: int) -> torch.Tensor:
        """As `compute`, but fetches the weights itself, so that the backward pass can do it again."""
        return self.compute(states, next(self.fetch([expert], states.device)))

    def hold(self, expert: int, device: torch.device | int | str) -> None:
        """Keeps a copy of an expert on a GPU, which then computes it. On a CPU, experts stay mapped."""
        if torch.device(device).type != "cpu":
            self.held[expert] = [tensor.to(device) for tensor in self.stored(expert)]

    def fetch(self, experts: list[int], device: torch.device) -> Iterator[list[torch.Tensor]]:
        """Yields the stored weights of each expert on `device`; copies those that a GPU does not hold."""
        if device.type == "cpu":
            yield from map(self.stored, experts)
            return
        copies = copies_ahead((self.stored(expert) for expert in experts if expert not in self.held), device)
        for expert in experts:
            yield self.held[expert] if expert in self.held else next(copies)

    @torch.no_grad()
    def measure(self, states: torch.Tensor) -> tuple[float, float, float]:
        """Seconds for one row of an expert on the CPU, for each further row, and to copy it to the GPU of `states`."""
        stored = self.stored(0)
        key = (states.device, states.dtype, *((tensor.shape, tensor.dtype) for tensor in stored))
        if key not in self.rates:
            times = []
            for rows in (1, 256):
                on_cpu = torch.zeros(rows, states.shape[1], dtype=states.dtype)
                for _ in range(3):  # the first reads the file
                    start = time.perf_counter()
                    self.compute(on_cpu, stored)
                    seconds = time.perf_counter() - start
                times.append(seconds)
            for _ in range(2):
                start = time.perf_counter()
                for _ in copies_ahead([stored] * 4, states.device):
                    pass
                torch.cuda.synchronize(states.device)
                seconds = (time.perf_counter() - start) / 4
            self.rates[key] = times[0], max(times[1] - times[0], 0) / 255, seconds
        return self.rates[key]

    @torch.compiler.disable
    def run(self, states: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """
        The sum of the outputs of `experts` for `states` (tokens, hidden_size), computed on their device. Of `index` and
        `weights` (tokens, top_k), `index` is on the CPU.
        """
        output = torch.zeros_like(states)
        uses_mapped = states.device.type == "cpu" and self.weights[self.names[0]][0].dtype == states.dtype
        uses_mapped &= not torch.is_autocast_enabled(states.device.type)
        # Otherwise gradients would keep a copy of each weight.
        recomputes = torch.is_grad_enabled() and not uses_mapped
        fetched = None if recomputes else self.fetch(experts, states.device)
        for expert in experts:
            token, slot = (places.to(states.device) for places in torch.where(index == expert))
            if recomputes:
                rows = checkpoint(self.fetch_and_compute, states[token], expert, use_reentrant=False)
            else:
                rows = self.compute(states[token], next(fetched))
            output.index_add_(0, token, (rows * weights[token, slot, None]).to(output.dtype))
        return output

    @torch.compiler.disable
    def begin(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """
        As `forward`, but returns a function that computes the output. Work that the GPU is given before it is called
        runs while the CPU computes experts. Raises a `ValueError` if no weights are mapped, as in a model that was not
        loaded from files.
        """
        if not self.weights:
            raise ValueError('Experts are "mapped" from files: load the model by `from_pretrained`.')
        device, index = hidden_states.device, top_k_index.cpu()
        experts, counts = (numbers.tolist() for numbers in index.unique(return_counts=True))
        on_cpu = [expert for expert in experts if expert not in self.held]
        on_gpu = [expert for expert in experts if expert in self.held]
        if device.type == "cuda" and on_cpu:
            one, further, copying = self.measure(hidden_states)
            rows = sum(count for expert, count in zip(experts, counts, strict=True) if expert not in self.held)
            computing = len(on_cpu) * one + (rows - len(on_cpu)) * further
            if len(on_cpu) * copying < computing:
                on_cpu, on_gpu = [], experts
        states, weights = (hidden_states.cpu(), top_k_weights.cpu()) if on_cpu else (None, None)

        def compute() -> torch.Tensor:
            output = self.run(hidden_states, index, top_k_weights, on_gpu) if on_gpu else 0
            return output + self.run(states, index, weights, on_cpu).to(device) if on_cpu else output

        return compute

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Maps (tokens, hidden_size) to the same shape, by the expert indices and weights (tokens, top_k)."""
        return self.begin(hidden_states, top_k_index, top_k_weights)()
