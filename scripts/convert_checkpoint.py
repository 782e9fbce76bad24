"""Makes a directory that transformers, vLLM and SGLang load out of a Step3 checkpoint.

python scripts/convert_checkpoint.py SOURCE TARGET
python scripts/convert_checkpoint.py SOURCE TARGET --dtype bfloat16
python scripts/convert_checkpoint.py SOURCE TARGET --dtype fp8
python scripts/convert_checkpoint.py SOURCE --check
python scripts/convert_checkpoint.py SOURCE --engines
"""

import argparse
import copy
import errno
import fcntl
import filecmp
import hashlib
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint_files import (
    CODE_FILES,
    FP8_BLOCK,
    FP8_QUANTIZATION,
    INDEX,
    ROOT,
    WEIGHT_TYPES,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    Step3TextConfig,
    Step3VLConfig,
    Tensor,
    locate,
    read_checkpoint,
    read_json,
    scale_shape,
    weight_block,
)
from engines import engine_facts, table, warnings
from files import blaming, replacing, sync, write_bytes, write_json
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.serialization._base import parse_size_to_int
from safetensors import safe_open
from tqdm import tqdm


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
TORCH_NAMES = {stored: name for name, stored in DTYPES.items()} | {"F8_E4M3": "float8_e4m3fn"}
# What goes with the weights, apart from the config, the code and the index. No file that could be code is among them.
CARRIED_FILES = (
    "README.md",
    "LICENSE",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
PROCESSOR = {
    "processor_class": "Step3VLProcessor",
    "auto_map": {name: Step3VLConfig.carried_auto_map[name] for name in ("AutoProcessor", "AutoImageProcessor")},
}
PROCESSOR_FILES = {
    "processor_config.json": PROCESSOR,
    "preprocessor_config.json": {**PROCESSOR, "image_processor_type": "Step3VLImageProcessor"},
}
# Bytes of float32 that are looked at or converted at a time.
CHUNK = 16 * 2**20
MANIFEST = "SHA256SUMS"


@dataclass(frozen=True)
class Item:
    """
    A tensor to be written as it is, in another type or dequantised.

    Args:
        name: Its name in the target.
        tensor: Where it comes from.
        dtype: The type it is written in.
        scale: The scales it is multiplied by, if it is dequantised.
        block: Rows and columns that share one of them.
    """

    name: str
    tensor: Tensor
    dtype: str
    scale: Tensor | None = None
    block: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * WEIGHT_TYPES[self.dtype]

    @property
    def is_copy(self) -> bool:
        return self.scale is None and self.dtype == self.tensor.dtype

    def read(self):
        """
        The torch tensor that is to be written.

        Raises:
            `CheckpointError`: if the type is too small for a number.
        """
        import torch

        if self.is_copy:
            return self.tensor.read()
        output, end = torch.empty(math.prod(self.shape), dtype=torch_type(self.dtype)), 0
        for part in self.parts():
            converted = self.convert(part)
            start, end = end, end + converted.numel()
            output[start:end] = converted.flatten()
        return output.view(self.shape)

    def parts(self) -> Iterator:
        """What is to be converted, a part at a time."""
        return self.rows() if self.scale else iter(self.tensor.read().flatten().split(CHUNK // 4))

    def convert(self, part):
        return self.cast(part, self.dtype)

    def cast(self, part, dtype: str):
        converted = part.to(torch_type(dtype))
        self.check_overflow(converted, part)
        return converted

    def rows(self) -> Iterator:
        """
        The tensor's matrices, dequantised if it has scales, some rows at a time: (rows, columns). All but a matrix's
        last are whole blocks, of the tensor's and the release's.
        """
        from block_fp8 import spread

        height = self.block[0] if self.block else 1
        multiple = math.lcm(FP8_BLOCK[0], height)
        step = multiple * max(CHUNK // (4 * multiple * max(self.tensor.shape[-1], 1)), 1)
        matrices = [
            tensor.read().view(-1, *tensor.shape[-2:]) for tensor in (self.tensor, self.scale) if tensor is not None
        ]
        for matrix, *scales in zip(*matrices, strict=True):
            parts = matrix.split(step)
            if not scales:
                yield from parts
                continue
            for part, scale in zip(parts, scales[0].split(step // height), strict=True):
                part, factors = part.float(), spread(scale.float(), self.block, part.shape)
                dequantized = part * factors
                self.check_overflow(dequantized, part, factors)
                yield dequantized

    def check_overflow(self, output, *sources) -> None:
        """Raises a `CheckpointError` if a number is not finite that was made of finite ones."""
        if count_not_finite(output) and (math.prod(map(is_finite, sources)) & ~is_finite(output)).any():
            where = f"{self.tensor.path.name}: {self.tensor.stored_name}"
            raise CheckpointError([f"{where}: has numbers that are too large for {str(output.dtype)[6:]}."])


class QuantizedItem(Item):
    """A tensor to be quantised, by the released blocks; it may come from others."""

    is_copy = False

    def parts(self) -> Iterator:
        return (self.cast(part, "F32") for part in self.rows())

    def convert(self, part):
        from block_fp8 import choose_scales, quantize

        return quantize(part, choose_scales(part, FP8_BLOCK), FP8_BLOCK)


class ScaleItem(QuantizedItem):
    """The scales of a tensor to be quantised."""

    @property
    def shape(self) -> tuple[int, ...]:
        return scale_shape(self.tensor.shape, FP8_BLOCK)

    def convert(self, part):
        from block_fp8 import choose_scales

        return choose_scales(part, FP8_BLOCK)


@dataclass(frozen=True)
class Plan:
    """What is to be written: the config, the items of every weight file, and the files to be linked, by their names in
    the target."""

    config: Step3VLConfig | Step3TextConfig
    shards: dict[str, list[Item]]
    linked: dict[str, Path]

    @property
    def weight_map(self) -> dict[str, str]:
        return {item.name: name for name, items in self.shards.items() for item in items}

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for items in self.shards.values() for item in items)


def torch_type(dtype: str):
    """The torch type of what safetensors calls `dtype`."""
    import torch

    return getattr(torch, TORCH_NAMES[dtype])


def is_finite(tensor):
    """Which numbers are neither infinite nor NaN; fp8 has no infinity."""
    import torch

    return ~tensor.isnan() if tensor.dtype == torch.float8_e4m3fn else tensor.isfinite()


def count_not_finite(tensor) -> int:
    is_whole = tensor.dtype.itemsize > 1 and all(is_finite(extreme) for extreme in tensor.aminmax())  # which is fast
    return 0 if is_whole else int((~is_finite(tensor)).sum())


def is_same(tensor, other) -> bool:
    """Whether two tensors are equal in type, shape and every bit."""
    import torch

    return (tensor.dtype, tensor.shape) == (other.dtype, other.shape) and torch.equal(
        tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8)
    )


def parse_size(text: str) -> str:
    """A size such as `5GB`."""
    try:
        parse_size_to_int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like 5GB, got {text!r}") from None
    return text


def parse_layers(text: str) -> range:
    """Layers such as `0-3`, both ends included."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"must be like 0-3, got {text!r}")
    return range(int(first), int(last or first) + 1)


def select(checkpoint: Checkpoint, layers: range | None, text_only: bool) -> tuple[object, dict[str, Tensor]]:
    """
    The config and the tensors, under their new names, of the part of a model that is asked for.

    Raises:
        `CheckpointError`: if there are no such layers.
    """
    config, tensors = copy.deepcopy(checkpoint.config), dict(checkpoint.tensors)
    if text_only and isinstance(config, Step3VLConfig):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("vision_model.", "vit_"))}
        quantization = getattr(config, "quantization_config", None)
        config, dtype = config.text_config, config.dtype
        config.dtype = config.dtype or dtype
        if quantization is not None:
            config.quantization_config = quantization
    text = config.get_text_config()
    if layers is not None:
        if layers[-1] >= text.num_hidden_layers:
            raise CheckpointError(
                [f"--layers must lie between 0 and {text.num_hidden_layers - 1}, got {layers[0]}-{layers[-1]}."]
            )
        moe_layers = [layers.index(layer) for layer in text.moe_layers if layer in layers]
        text.use_moe = bool(moe_layers)
        text.moe_layers_enum = ",".join(map(str, moe_layers)) or "-1"
        text.num_hidden_layers = len(layers)
        chosen = {}
        for name, tensor in tensors.items():
            if name.startswith("model.layers."):
                _, _, layer, rest = name.split(".", 3)
                if int(layer) not in layers:
                    continue
                name = f"model.layers.{layers.index(int(layer))}.{rest}"
            chosen[name] = tensor
        tensors = chosen
    config.auto_map = None
    kind = "Step3VLForConditionalGeneration" if isinstance(config, Step3VLConfig) else "Step3TextForCausalLM"
    config.architectures = [kind]
    return config, tensors


def make_plan(
    checkpoint: Checkpoint,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    to_single: bool = False,
    layers: range | None = None,
    text_only: bool = False,
) -> Plan:
    config, tensors = select(checkpoint, layers, text_only)
    text_only = text_only and isinstance(checkpoint.config, Step3VLConfig)
    # The serving engines never tie: for them, the head that a tied model has not got on disk is written out.
    head = None
    if "lm_head.weight" not in tensors:
        embeddings = tensors["model.embed_tokens.weight"]
        head = tensors["lm_head.weight"] = replace(embeddings, name="lm_head.weight")
    if not (dtype or max_shard_size or to_single or layers or text_only or checkpoint.has_original_names):
        linked = {path.name: path for path in checkpoint.paths}
        if head is None:
            return Plan(config, {}, linked)
        if WEIGHTS in linked:  # which transformers reads instead of an index
            linked = {"model-00001-of-00002.safetensors": linked[WEIGHTS]}
        return Plan(config, {"model-lm_head.safetensors": [Item(head.name, head, head.dtype)]}, linked)
    to_fp8 = dtype == "fp8"
    dtype = "bfloat16" if to_fp8 else dtype  # of all that is not quantised
    target = DTYPES[dtype] if dtype else None
    block = weight_block(checkpoint.config)
    items = []
    for name, tensor in tensors.items():
        if target and name.endswith("_scale_inv"):
            continue
        is_fp8, scale_name = tensor.dtype == "F8_E4M3", f"{name}_scale_inv"
        dequantized = (tensors[scale_name], block) if target and is_fp8 else ()
        if not (to_fp8 and tensor.is_fp8_in_release):
            items.append(Item(name, tensor, target or tensor.dtype, *dequantized))
        elif is_fp8 and block == FP8_BLOCK:
            items += [Item(name, tensor, tensor.dtype), Item(scale_name, tensors[scale_name], "F32")]
        else:
            items.append(QuantizedItem(name, tensor, "F8_E4M3", *dequantized))
            items.append(ScaleItem(scale_name, tensor, "F32", *dequantized))
    if dtype:
        config.dtype = dtype
        for part in (config, config.get_text_config()):
            part.__dict__.pop("quantization_config", None)
        if isinstance(config, Step3VLConfig):
            config.text_config.dtype = config.vision_config.dtype = dtype
    if to_fp8:
        config.quantization_config = copy.deepcopy(FP8_QUANTIZATION)
    split = split_state_dict_into_shards_factory(
        {item.name: item for item in items},
        get_storage_size=lambda item: item.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=sum(item.num_bytes for item in items) + 1 if to_single else max_shard_size or "5GB",
    )
    by_name = {item.name: item for item in items}
    shards = {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}
    return Plan(config, shards, {})


def check_finite(checkpoint: Checkpoint) -> list[str]:
    """The tensors that hold a NaN or an infinity."""
    problems = []
    with progress_bar(checkpoint.num_bytes, "Checking") as progress:
        for tensor in checkpoint.tensors.values():
            bad = 0
            for part in tensor.read().flatten().split(CHUNK // 4):
                bad += count_not_finite(part)
                progress.update(part.nbytes)
            if bad:
                problems.append(f"{tensor.path.name}: {tensor.stored_name}: {bad} values are NaN or infinite.")
    return problems


def note_on_widths(config: Step3VLConfig | Step3TextConfig) -> str | None:
    """What is to be said of a block-fp8 model whose layers the serving engines cannot fuse."""
    text, side = config.get_text_config(), FP8_BLOCK[0]
    names = ("share_q_dim", "head_dim", "intermediate_size", "share_expert_dim", "moe_intermediate_size")
    odd = [f"`{name}` {width}" for name in names if (width := getattr(text, name)) % side]
    if not odd:
        return None
    return (
        f"Note: {', '.join(odd)}: no multiple of {side}. transformers loads this dequantised; vLLM and SGLang cannot "
        "fuse its layers, and vLLM may give wrong answers without an error."
    )


def progress_bar(total: int, what: str, initial: int = 0) -> tqdm:
    return tqdm(total=total, initial=initial, desc=what, unit="B", unit_scale=True, disable=not total)


def write_shard(path: Path, items: list[Item]) -> None:
    from safetensors.torch import save_file

    tensors = {item.name: item.read() for item in items}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def link(source: Path, target: Path, how: str) -> None:
    """Puts a file in place without copying it, if the file systems allow."""
    source = source.resolve()
    if target.exists():
        return
    if how == "symlink":
        target.symlink_to(source)
        return
    if how == "hardlink":
        try:
            target.hardlink_to(source)
            return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
                raise
    with replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)


def carry_files(source: Path, target: Path, has_vision: bool) -> None:
    """The tokenizer's, the processor's (of a model that has pictures) and the other small files, without any reference
    to code but the package's."""
    for name in CARRIED_FILES:
        if not (source / name).exists() or (name in PROCESSOR_FILES and not has_vision):
            continue
        path = locate(source, name)
        if name.endswith("_config.json"):
            settings = read_json(path)
            settings.pop("auto_map", None)
            if not has_vision:
                settings.pop("processor_class", None)
            if name in PROCESSOR_FILES:
                settings |= PROCESSOR_FILES[name]
            write_json(target / name, settings)
        else:
            write_bytes(target / name, path.read_bytes())
    name = "processor_config.json"
    if has_vision and not (target / name).exists():
        write_json(target / name, PROCESSOR_FILES[name])
    for name in CODE_FILES:
        write_bytes(target / name, (ROOT / name).read_bytes())


def fingerprint(checkpoint: Checkpoint, options: dict) -> dict:
    """What a run must have in common with the unfinished one that it goes on with."""
    files = {}
    for path in [checkpoint.directory / "config.json", *checkpoint.paths]:
        status = path.stat()
        files[path.name] = [status.st_size, status.st_mtime_ns]
    return {"source": str(checkpoint.directory.resolve()), "files": files, "options": options}


def check_room(checkpoint: Checkpoint, plan: Plan, target: Path, how: str) -> None:
    """
    Raises:
        `CheckpointError`: if `target` exists or would be mixed up with the source, or what is yet to be written does
        not fit on the disk.
    """
    source = checkpoint.directory.resolve()
    for path in (target.resolve(), partial_of(target.resolve())):
        if path.is_relative_to(source) or source.is_relative_to(path):
            raise CheckpointError([f"{target}: lies in the source, or the source in it; choose another place."])
    if target.exists() and not partial_of(target).exists():
        raise CheckpointError([f"{target} exists already; choose another place or remove it."])
    parent = next(path for path in target.absolute().parents if path.exists())
    sizes = {name: sum(item.num_bytes for item in items) for name, items in plan.shards.items()}
    for name, path in plan.linked.items():
        status = path.stat()
        if how == "copy" or (how == "hardlink" and status.st_dev != parent.stat().st_dev):
            sizes[name] = status.st_size
    needed = sum(size for name, size in sizes.items() if not (partial_of(target) / "package" / name).exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError([f"{target}: {needed} bytes are to be written, and {free} are free."])


def partial_of(target: Path) -> Path:
    """Where a run is until its target is whole."""
    return target.with_name(f"{target.name}.partial")


def convert(checkpoint: Checkpoint, plan: Plan, target: Path, options: dict, how: str, verify: bool) -> None:
    """
    Writes `plan` to `target`, which is there whole or not at all: until then the run is in `TARGET.partial`, from which
    the same call goes on.

    Raises:
        `CheckpointError`: if `target` exists or another run is under way or unfinished.
    """
    partial = partial_of(target)
    package = partial / "package"
    mark = fingerprint(checkpoint, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError([f"another run is writing {target}."]) from None
        if (partial / "run.json").exists():
            if read_json(partial / "run.json") != mark:
                text = "an unfinished run of another source or with other options; repeat that one, or remove it."
                raise CheckpointError([f"{partial} is {text}"])
        elif target.exists():
            raise CheckpointError([f"{target} exists already; choose another place or remove it."])
        else:
            write_json(partial / "run.json", mark)
        if not target.exists():  # else the run was stopped while it tidied up
            package.mkdir(exist_ok=True)
            for unfinished in package.glob(".*"):  # by a run that was killed
                shutil.rmtree(unfinished)
            try:
                write_package(checkpoint, plan, package, how, verify)
            except CheckpointError:  # which the same call would meet again
                shutil.rmtree(partial)
                raise
            package.rename(target)
            sync(target.parent)
        shutil.rmtree(partial)


def total_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Of all weights that the target will have."""
    return plan.num_bytes + (checkpoint.num_bytes if plan.linked else 0)


def write_package(checkpoint: Checkpoint, plan: Plan, package: Path, how: str, verify: bool) -> None:
    """
    Writes what is not in `package` yet.

    Raises:
        `CheckpointError`: if a number is too large for its new type, or a weight was not written as it should be.
    """
    with blaming(package / "config.json"):
        plan.config.save_pretrained(package)
    carry_files(checkpoint.directory, package, isinstance(plan.config, Step3VLConfig))
    for name, path in plan.linked.items():
        link(path, package / name, how)
    with progress_bar(plan.num_bytes, "Writing") as progress:
        for name, items in plan.shards.items():
            if not (package / name).exists():
                write_shard(package / name, items)
            progress.update(sum(item.num_bytes for item in items))
    names = {path: name for name, path in plan.linked.items()}
    linked = {name: names[tensor.path] for name, tensor in checkpoint.tensors.items() if tensor.path in names}
    weight_map = linked | plan.weight_map
    if set(weight_map.values()) != {WEIGHTS}:
        metadata = {"total_size": total_bytes(checkpoint, plan)}
        write_json(package / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    if verify:
        write_manifest(plan, package)
    for path in [*package.iterdir(), package]:
        sync(path)


def write_manifest(plan: Plan, package: Path) -> None:
    """
    Reads back every weight file, compares it with the source and writes its SHA-256 down, as `sha256sum -c` reads it.

    Raises:
        `CheckpointError`: if a tensor is not what it should be.
    """
    lines, problems = [], []
    for name in tqdm(sorted(plan.shards.keys() | plan.linked.keys()), desc="Verifying", unit="file"):
        path = package / name
        if name in plan.linked:
            wrong = [] if filecmp.cmp(plan.linked[name], path, shallow=False) else ["the file"]
        else:
            items = plan.shards[name]
            with safe_open(path, "pt") as file:
                wrong = [item.name for item in items if not is_same(file.get_tensor(item.name), item.read())]
        problems += [f"{name}: {part}: was not written as it should be." for part in wrong]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    if problems:
        raise CheckpointError(problems)
    write_bytes(package / MANIFEST, "".join(lines).encode())


def resolve(source: str) -> Path:
    """
    The directory of a checkpoint, downloaded if it is on the hub.

    Raises:
        `CheckpointError`: if there is no such directory and no such repository.
    """
    path = Path(source)
    if path.exists() or source.count("/") != 1:
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", INDEX, "*.safetensors", *CARRIED_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError([f"{source}: no directory here, and not to be had from the hub: {reason}"]) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="Without any of the rewriting options the weights are linked, which takes seconds for any size. A run "
        "that was interrupted goes on when it is repeated.",
    )
    parser.add_argument("source", help="directory or hub id of the checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="directory to be made; must not exist yet")
    parser.add_argument("--check", action="store_true", help="only check the source, and list everything wrong with it")
    parser.add_argument(
        "--engines", action="store_true", help="only list what vLLM and SGLang would do with the target"
    )
    parser.add_argument("--check-finite", action="store_true", help="also look for NaN and infinite weights")
    parser.add_argument("--verify", action="store_true", help=f"read back and compare; write {MANIFEST}")
    placing = parser.add_argument_group("linking").add_mutually_exclusive_group()
    placing.add_argument("--symlink", dest="how", action="store_const", const="symlink", help="by symbolic links")
    placing.add_argument("--copy", dest="how", action="store_const", const="copy", help="copy instead")
    rewriting = parser.add_argument_group("rewriting")
    rewriting.add_argument("--dtype", choices=[*DTYPES, "fp8"], help="type of all weights; fp8: as in the fp8 release")
    rewriting.add_argument(
        "--max-shard-size", type=parse_size, metavar="SIZE", help="such as 5GB (the default when rewriting)"
    )
    rewriting.add_argument("--to-single", action="store_true", help=f"one file, {WEIGHTS}")
    rewriting.add_argument("--layers", type=parse_layers, metavar="A-B", help="only these layers, renumbered from 0")
    rewriting.add_argument("--text-only", action="store_true", help="the language model, Step3TextForCausalLM")
    arguments = parser.parse_args(arguments)
    if arguments.target is None and not (arguments.check or arguments.engines):
        parser.error("give a TARGET, --check or --engines")
    if arguments.to_single and arguments.max_shard_size:
        parser.error("--to-single and --max-shard-size contradict each other")
    layers, how = arguments.layers, arguments.how or "hardlink"
    options = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "to_single", "text_only")}
    try:
        checkpoint = read_checkpoint(resolve(arguments.source))
        plan = make_plan(checkpoint, **options, layers=layers)
        facts = engine_facts(checkpoint, plan.config, has_head=True)
        if arguments.engines:
            print(table(facts))
            return 0
        if arguments.target is not None:
            check_room(checkpoint, plan, arguments.target, how)
        # What is not finite has no scale.
        if (arguments.check_finite or arguments.dtype == "fp8") and (problems := check_finite(checkpoint)):
            raise CheckpointError(problems)
        if not arguments.check:
            options |= {"layers": [layers[0], layers[-1]] if layers else None, "how": how}
            convert(checkpoint, plan, arguments.target, options, how, arguments.verify)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or arguments.target}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    if arguments.dtype == "fp8" and (note := note_on_widths(plan.config)):
        print(note, file=sys.stderr)
    gigabytes = total_bytes(checkpoint, plan) / 1e9
    verdict = "nothing wrong" if arguments.check else arguments.target
    for warning in warnings(facts):
        print(warning, file=sys.stderr)
    print(f"{len(checkpoint.tensors)} tensors, {gigabytes:.3g} GB: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
