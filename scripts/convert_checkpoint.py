"""Converts a Step3 checkpoint into a directory that transformers, vLLM and SGLang can load.

python scripts/convert_checkpoint.py SOURCE TARGET
python scripts/convert_checkpoint.py SOURCE TARGET --dtype bfloat16
python scripts/convert_checkpoint.py SOURCE TARGET --dtype fp8
python scripts/convert_checkpoint.py SOURCE --check
python scripts/convert_checkpoint.py SOURCE --engines
"""

import argparse
import copy
import errno
import filecmp
import hashlib
import math
import shutil
import sys
from collections.abc import Callable, Iterator
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
    failure,
    locate,
    read_checkpoint,
    read_config,
    read_json,
    scale_shape,
    weight_block,
)
from engines import engine_facts, engine_warnings, packed_form, table
from files import locked, naming, replacing, sync, sync_all, write_bytes, write_json
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from tqdm import tqdm


DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
TORCH_NAMES = {stored: name for name, stored in DTYPES.items()} | {"F8_E4M3": "float8_e4m3fn"}
# Files to copy besides the weights, the index, the config and the code. None of them can contain code.
CARRIED_FILES = tuple(
    "README.md LICENSE added_tokens.json chat_template.jinja chat_template.json generation_config.json merges.txt "
    "preprocessor_config.json processor_config.json special_tokens_map.json tokenizer.json tokenizer_config.json "
    "vocab.json".split()
)
PROCESSOR = {
    "processor_class": "Step3VLProcessor",
    "auto_map": {name: Step3VLConfig.carried_auto_map[name] for name in ("AutoProcessor", "AutoImageProcessor")},
}
PROCESSOR_FILES = {
    "processor_config.json": PROCESSOR,
    "preprocessor_config.json": {**PROCESSOR, "image_processor_type": "Step3VLImageProcessor"},
}
# Bytes of float32 to check or convert at a time.
CHUNK = 16 * 2**20
CHECKSUMS = "SHA256SUMS"
EXISTS = "exists already; choose another directory or remove it."
DIFFERS = "was not written correctly."


@dataclass(frozen=True)
class Item:
    """A tensor to write: `tensor` in another type, or its fp8 `"weights"` or `"scales"` in the release's blocks."""

    name: str  # in the target
    tensor: Tensor
    dtype: str  # to write, as safetensors names it
    scale: Tensor | None = None  # of `tensor`, to dequantise it
    block: tuple[int, int] | None = None  # rows and columns that share one of these scales
    result: str = "cast"

    @property
    def shape(self) -> tuple[int, ...]:
        return scale_shape(self.tensor.shape, FP8_BLOCK) if self.result == "scales" else self.tensor.shape

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * WEIGHT_TYPES[self.dtype]

    def read(self):
        """The torch tensor to write. Raises a `CheckpointError` if a number is too large for the new type."""
        import torch

        if self.scale is None and self.result == "cast" and self.dtype == self.tensor.dtype:
            return self.tensor.read()
        output, end = torch.empty(math.prod(self.shape), dtype=torch_type(self.dtype)), 0
        parts = self.tensor.read().flatten().split(CHUNK // 4)
        for part in parts if self.scale is None and self.result == "cast" else self.rows():
            converted = self.convert(part)
            start, end = end, end + converted.numel()
            output[start:end] = converted.flatten()
        return output.view(self.shape)

    def rows(self) -> Iterator:
        """
        Rows (rows, columns) of the tensor's matrices, about `CHUNK` bytes at a time, dequantised if there are scales.
        Blocks are never split.
        """
        from block_fp8 import spread

        height = self.block[0] if self.block else 1
        multiple = math.lcm(FP8_BLOCK[0], height)
        step = multiple * max(CHUNK // (4 * multiple * self.tensor.shape[-1]), 1)
        sources = [tensor for tensor in (self.tensor, self.scale) if tensor is not None]
        matrices = [tensor.read().view(-1, *tensor.shape[-2:]) for tensor in sources]
        for matrix, *scales in zip(*matrices, strict=True):
            if not scales:
                yield from matrix.split(step)
                continue
            for part, scale in zip(matrix.split(step), scales[0].split(step // height), strict=True):
                part, factors = part.float(), spread(scale.float(), self.block, part.shape)
                dequantized = part * factors
                self.check_overflow(dequantized, part, factors)
                yield dequantized

    def convert(self, part):
        from block_fp8 import choose_scales, quantize

        converted = part.to(torch_type(self.dtype if self.result == "cast" else "F32"))
        self.check_overflow(converted, part)
        if self.result == "cast":
            return converted
        scales = choose_scales(converted, FP8_BLOCK)
        return scales if self.result == "scales" else quantize(converted, scales, FP8_BLOCK)

    def check_overflow(self, output, *sources) -> None:
        """Raises a `CheckpointError` if a number that was computed from finite numbers is not finite."""
        if count_not_finite(output) and (math.prod(map(is_finite, sources)) & ~is_finite(output)).any():
            raise CheckpointError([f"{self.tensor}: has numbers that are too large for {str(output.dtype)[6:]}."])


@dataclass(frozen=True)
class Plan:
    """What to write: the config, the tensors of each new weight file, and the files to link, by name in the target."""

    config: Step3VLConfig | Step3TextConfig
    shards: dict[str, list[Item]]
    linked: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        return sum(item.num_bytes for items in self.shards.values() for item in items)


def torch_type(dtype: str):
    """The torch type of a type that safetensors names."""
    import torch

    return getattr(torch, TORCH_NAMES[dtype])


def is_finite(tensor):
    """Which numbers are neither infinite nor NaN. torch's own function lacks fp8, which has no infinity."""
    import torch

    return ~tensor.isnan() if tensor.dtype == torch.float8_e4m3fn else tensor.isfinite()


def count_not_finite(tensor) -> int:
    all_finite = tensor.dtype.itemsize > 1 and all(is_finite(extreme) for extreme in tensor.aminmax())  # fast
    return 0 if all_finite else int((~is_finite(tensor)).sum())


def parse_layers(text: str) -> range:
    """The layers of a range such as `0-3`, which includes both ends."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"must be a range such as 0-3, got {text!r}")
    return range(int(first), int(last or first) + 1)


def select(checkpoint: Checkpoint, layers: range | None, text_only: bool) -> tuple[object, dict[str, Tensor]]:
    """
    The config of a part of the model, and the part's tensors by their new names. Raises a `CheckpointError` if the
    model has no such layers.
    """
    config, tensors = copy.deepcopy(checkpoint.config), dict(checkpoint.tensors)
    if text_only and isinstance(config, Step3VLConfig):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("vision_model.", "vit_"))}
        whole, config = config, config.text_config
        config.dtype = config.dtype or whole.dtype
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    text = config.get_text_config()
    if layers is not None:
        if layers[-1] >= text.num_hidden_layers:
            last = text.num_hidden_layers - 1
            raise CheckpointError([f"--layers must be between 0 and {last}, got {layers[0]}-{layers[-1]}."])
        moe_layers = [layers.index(layer) for layer in text.moe_layers if layer in layers]
        text.use_moe = bool(moe_layers)
        text.moe_layers_enum = ",".join(map(str, moe_layers)) or "-1"
        text.num_hidden_layers = len(layers)
        whole, tensors = tensors, {}
        for name, tensor in whole.items():
            if name.startswith("model.layers."):
                _, _, layer, rest = name.split(".", 3)
                if int(layer) not in layers:
                    continue
                name = f"model.layers.{layers.index(int(layer))}.{rest}"
            tensors[name] = tensor
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
    """What to write for options of the command line. Raises a `CheckpointError` if they are not valid for the model."""
    config, tensors = select(checkpoint, layers, text_only)
    text_only = text_only and isinstance(checkpoint.config, Step3VLConfig)
    # The serving engines never tie weights, so the head of a tied model is written as well.
    is_tied = "lm_head.weight" not in tensors
    if is_tied:
        tensors["lm_head.weight"] = replace(tensors["model.embed_tokens.weight"], name="lm_head.weight")
    if not (dtype or max_shard_size or to_single or layers or text_only or checkpoint.has_original_names):
        linked = {path.name: path for path in checkpoint.paths}
        if not is_tied:
            return Plan(config, {}, linked)
        if WEIGHTS in linked:  # transformers would read this file instead of the index
            linked = {"model-00001-of-00002.safetensors": linked[WEIGHTS]}
        head = tensors["lm_head.weight"]
        return Plan(config, {"model-lm_head.safetensors": [Item(head.name, head, head.dtype)]}, linked)
    to_fp8 = dtype == "fp8"
    dtype = "bfloat16" if to_fp8 else dtype  # of the weights that are not quantised
    target = DTYPES.get(dtype)
    block = weight_block(checkpoint.config)
    items = []
    for name, tensor in tensors.items():
        if target and name.endswith("_scale_inv"):
            continue
        is_fp8, scale_name = tensor.dtype == "F8_E4M3", f"{name}_scale_inv"
        dequantized = {"scale": tensors[scale_name], "block": block} if target and is_fp8 else {}
        if not (to_fp8 and tensor.is_fp8_in_release):
            items.append(Item(name, tensor, target or tensor.dtype, **dequantized))
        elif is_fp8 and block == FP8_BLOCK:
            items += [Item(name, tensor, tensor.dtype), Item(scale_name, tensors[scale_name], "F32")]
        else:
            items.append(Item(name, tensor, "F8_E4M3", **dequantized, result="weights"))
            items.append(Item(scale_name, tensor, "F32", **dequantized, result="scales"))
    if dtype:
        config.dtype = dtype
        for part in (config, config.get_text_config()):
            part.__dict__.pop("quantization_config", None)
        if isinstance(config, Step3VLConfig):
            config.text_config.dtype = config.vision_config.dtype = dtype
    if to_fp8:
        config.quantization_config = copy.deepcopy(FP8_QUANTIZATION)
    by_name = {item.name: item for item in items}
    try:
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda item: item.num_bytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=sum(item.num_bytes for item in items) + 1 if to_single else max_shard_size or "5GB",
        )
    except ValueError as error:
        raise CheckpointError([f"--max-shard-size: {error}"]) from None
    shards = {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}
    return Plan(config, shards, {})


def check_finite(checkpoint: Checkpoint) -> list[str]:
    """A problem for each tensor with NaN or infinite values."""
    problems = []
    with progress_bar(checkpoint.num_bytes, "Checking") as progress:
        for tensor in checkpoint.tensors.values():
            count = 0
            for part in tensor.read().flatten().split(CHUNK // 4):
                count += count_not_finite(part)
                progress.update(part.nbytes)
            if count:
                problems.append(f"{tensor}: {count} values are NaN or infinite.")
    return problems


def note_on_widths(config: Step3VLConfig | Step3TextConfig) -> str | None:
    """A note for a block-fp8 model whose layers the serving engines cannot fuse."""
    text, side = config.get_text_config(), FP8_BLOCK[0]
    names = ("share_q_dim", "head_dim", "intermediate_size", "share_expert_dim", "moe_intermediate_size")
    odd = [f"`{name}` {width}" for name in names if (width := getattr(text, name)) % side]
    if not odd:
        return None
    return (
        f"Note: not a multiple of {side}: {', '.join(odd)}. transformers dequantises this model when loading it. vLLM "
        "and SGLang cannot fuse its layers, and vLLM may give wrong answers without an error."
    )


def progress_bar(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=not total)


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def write_index(package: Path, weight_map: dict[str, str], total_size: int) -> None:
    """Says which file has which tensor."""
    metadata = {"total_size": total_size}
    write_json(package / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def link(source: Path, target: Path, how: str) -> None:
    """Links a file, or copies it where the file system has no hard links."""
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


def copy_files(source: Path, target: Path, has_vision: bool) -> None:
    """
    Copies the files of the tokenizer and, if the model `has_vision`, of the processor, and adds the package's code.
    References to other code are removed.
    """
    for name in CARRIED_FILES:
        if not (source / name).exists() or (name in PROCESSOR_FILES and not has_vision):
            continue
        path = locate(source, name)
        if name.endswith("_config.json"):
            settings = read_json(path)
            settings.pop("auto_map", None)
            if not has_vision:
                settings.pop("processor_class", None)
            write_json(target / name, settings | PROCESSOR_FILES.get(name, {}))
        else:
            write_bytes(target / name, path.read_bytes())
    name = "processor_config.json"
    if has_vision and not (target / name).exists():
        write_json(target / name, PROCESSOR_FILES[name])
    for name in CODE_FILES:
        write_bytes(target / name, (ROOT / name).read_bytes())


def fingerprint(checkpoint: Checkpoint, options: dict) -> dict:
    """What must be the same for an unfinished run to be resumed."""
    statuses = {path.name: path.stat() for path in [checkpoint.directory / "config.json", *checkpoint.paths]}
    files = {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}
    return {"source": str(checkpoint.directory.resolve()), "files": files, "options": options}


def check_target(checkpoint: Checkpoint, plan: Plan, target: Path, how: str) -> None:
    """
    Raises a `CheckpointError` if `target` exists, if it is inside the source or contains it, or if the files that are
    still to be written do not fit on the disk.
    """
    source = checkpoint.directory.resolve()
    for path in (target.resolve(), partial_of(target.resolve())):
        if path.is_relative_to(source) or source.is_relative_to(path):
            raise CheckpointError([f"{target} must not be inside the source, nor the source inside it."])
    if target.exists() and not partial_of(target).exists():
        raise CheckpointError([f"{target} {EXISTS}"])
    parent = next(path for path in target.absolute().parents if path.exists())
    sizes = {name: sum(item.num_bytes for item in items) for name, items in plan.shards.items()}
    for name, path in plan.linked.items():
        status = path.stat()
        if how == "copy" or (how == "hardlink" and status.st_dev != parent.stat().st_dev):
            sizes[name] = status.st_size
    needed = sum(size for name, size in sizes.items() if not (partial_of(target) / "package" / name).exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise CheckpointError([f"{target} needs {needed} more bytes, and the disk has {free} free."])


def partial_of(target: Path) -> Path:
    """Where an unfinished run is kept."""
    return target.with_name(f"{target.name}.partial")


def write_whole(target: Path, run: dict, write: Callable[[Path], None]) -> None:
    """
    Has `write` fill a directory, and renames it to `target` when it is complete. Until then it is
    `TARGET.partial/package`, which the same call, with the same `run`, hands to `write` again. Raises a
    `CheckpointError` if `target` exists or a run with other options has stopped, and a `BlockingIOError` if another run
    is writing it.
    """
    partial = partial_of(target)
    package, run_file = partial / "package", partial / "run.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(exist_ok=True)
    with locked(partial / "lock", target):
        if run_file.exists():
            if read_json(run_file) != run:
                message = "is an unfinished run of another source or with other options; repeat that one or remove it"
                raise CheckpointError([f"{partial} {message}."])
        elif target.exists():
            raise CheckpointError([f"{target} {EXISTS}"])
        else:
            write_json(run_file, run)
        if not target.exists():  # otherwise the run was stopped while it removed `partial`
            package.mkdir(exist_ok=True)
            for unfinished in [*package.glob(".*"), *partial.glob(".*")]:  # left by a run that was killed
                shutil.rmtree(unfinished)
            try:
                write(package)
            except CheckpointError:  # resuming would fail in the same way
                shutil.rmtree(partial)
                raise
            sync_all(package)
            package.rename(target)
            sync(target.parent)
        shutil.rmtree(partial)


def total_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of all weights in the target."""
    return plan.num_bytes + (checkpoint.num_bytes if plan.linked else 0)


def write_package(checkpoint: Checkpoint, plan: Plan, package: Path, how: str, verify: bool) -> None:
    """Writes the files that are not in `package` yet. Raises a `CheckpointError` if a tensor cannot be converted."""
    with naming(package / "config.json"):
        plan.config.save_pretrained(package)
    copy_files(checkpoint.directory, package, isinstance(plan.config, Step3VLConfig))
    for name, path in plan.linked.items():
        link(path, package / name, how)
    with progress_bar(plan.num_bytes, "Writing") as progress:
        for name, items in plan.shards.items():
            if not (package / name).exists():
                write_shard(package / name, {item.name: item.read() for item in items})
            progress.update(sum(item.num_bytes for item in items))
    names = {path: name for name, path in plan.linked.items()}
    weight_map = {name: names[tensor.path] for name, tensor in checkpoint.tensors.items() if tensor.path in names}
    weight_map |= {item.name: name for name, items in plan.shards.items() for item in items}
    if set(weight_map.values()) != {WEIGHTS}:
        write_index(package, weight_map, total_bytes(checkpoint, plan))
    if verify:
        write_checksums(plan, package)


def has_same_bits(tensor, other) -> bool:
    """Whether two tensors have the same type, shape and bits, also where these are NaN."""
    import torch

    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def write_checksums(plan: Plan, package: Path) -> None:
    """
    Compares every weight file with the source, and writes the SHA-256 sums as `sha256sum --check` reads them. Raises a
    `CheckpointError` if a file or tensor differs.
    """
    lines, problems = [], []
    for name in tqdm(sorted(plan.shards.keys() | plan.linked.keys()), desc="Verifying", unit="file"):
        path = package / name
        if name in plan.shards:
            with safe_open(path, "pt") as file:
                for item in plan.shards[name]:
                    if not has_same_bits(file.get_tensor(item.name), item.read()):
                        problems.append(f"{name}: {item.name} {DIFFERS}")
        elif not filecmp.cmp(plan.linked[name], path, shallow=False):
            problems.append(f"{name} {DIFFERS}")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    if problems:
        raise CheckpointError(problems)
    write_bytes(package / CHECKSUMS, "".join(lines).encode())


def resolve(source: str) -> Path:
    """
    The directory of a checkpoint, downloaded if `source` is a hub id. Raises a `CheckpointError` if there is neither
    such a directory nor such a repository.
    """
    path = Path(source)
    if path.exists() or source.count("/") != 1:
        return path
    try:
        return Path(snapshot_download(source, allow_patterns=["config.json", INDEX, "*.safetensors", *CARRIED_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError([f"{source} is not a directory, and the hub does not provide it: {reason}"]) from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="Without a rewriting option the weights are linked, which takes seconds at any size. To resume an "
        "interrupted run, repeat the command.",
    )
    parser.add_argument("source", help="directory or hub id of the checkpoint")
    parser.add_argument("target", type=Path, nargs="?", help="directory to create; must not exist yet")
    parser.add_argument("--check", action="store_true", help="only check the source and list all problems")
    parser.add_argument("--engines", action="store_true", help="only list what vLLM and SGLang do with the target")
    parser.add_argument("--check-finite", action="store_true", help="also check for NaN and infinite weights")
    parser.add_argument("--verify", action="store_true", help=f"read back and compare all weights; write {CHECKSUMS}")
    placing = parser.add_argument_group("linking").add_mutually_exclusive_group()
    placing.add_argument("--symlink", dest="how", action="store_const", const="symlink", help="use symbolic links")
    placing.add_argument("--copy", dest="how", action="store_const", const="copy", help="copy instead of linking")
    rewriting = parser.add_argument_group("rewriting")
    rewriting.add_argument("--dtype", choices=[*DTYPES, "fp8"], help="type of all weights; fp8: as in the fp8 release")
    rewriting.add_argument("--max-shard-size", metavar="SIZE", help="maximum size of a file (default: 5GB)")
    rewriting.add_argument("--to-single", action="store_true", help=f"write a single file, {WEIGHTS}")
    rewriting.add_argument("--layers", type=parse_layers, metavar="A-B", help="keep only these layers, renumbered")
    rewriting.add_argument("--text-only", action="store_true", help="keep only the language model")
    arguments = parser.parse_args(arguments)
    if arguments.target is None and not (arguments.check or arguments.engines):
        parser.error("give a TARGET, --check or --engines")
    if arguments.to_single and arguments.max_shard_size:
        parser.error("--to-single and --max-shard-size exclude each other")
    layers, how = arguments.layers, arguments.how or "hardlink"
    options = {name: getattr(arguments, name) for name in ("dtype", "max_shard_size", "to_single", "text_only")}
    try:
        directory = resolve(arguments.source)
        if arguments.engines and packed_form(config := read_config(directory)):
            print(table(engine_facts(Checkpoint(directory, config, {}), config, has_head=True)))
            return 0
        checkpoint = read_checkpoint(directory)
        plan = make_plan(checkpoint, **options, layers=layers)
        facts = engine_facts(checkpoint, plan.config, has_head=True)
        if arguments.engines:
            print(table(facts))
            return 0
        if arguments.target is not None:
            check_target(checkpoint, plan, arguments.target, how)
        # fp8 scales cannot be computed from NaN or infinities.
        if (arguments.check_finite or arguments.dtype == "fp8") and (problems := check_finite(checkpoint)):
            raise CheckpointError(problems)
        if not arguments.check:
            options |= {"layers": [layers[0], layers[-1]] if layers else None, "how": how}
            run, verify = fingerprint(checkpoint, options), arguments.verify
            write_whole(arguments.target, run, lambda package: write_package(checkpoint, plan, package, how, verify))
    except (CheckpointError, OSError, KeyboardInterrupt) as error:
        return failure(error, arguments.target)
    if arguments.dtype == "fp8" and (note := note_on_widths(plan.config)):
        print(note, file=sys.stderr)
    for warning in engine_warnings(facts):
        print(warning, file=sys.stderr)
    outcome = "nothing wrong" if arguments.check else arguments.target
    print(f"{len(checkpoint.tensors)} tensors, {total_bytes(checkpoint, plan) / 1e9:.3g} GB: {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
