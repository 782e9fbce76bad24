"""Reads and checks a Step3 checkpoint from an untrusted source: config, index, safetensors headers and tensors. It
never runs the checkpoint's code."""

import importlib.util
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from files import parse_json
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open


# The directory of the package's modules: the checkout, or where pip installed them.
ROOT = Path(__file__).parents[1]
if not (ROOT / "configuration_step3.py").exists():
    ROOT = Path(importlib.util.find_spec("step3_vl").origin).parent


def import_configuration():
    """
    The package's configuration module, imported without torch: with it, the import takes three times as long as all of
    `convert_checkpoint.py --check`. transformers leaves torch out if it cannot be imported, and configs do not need it.
    """
    sys.path.insert(0, str(ROOT))
    if "torch" in sys.modules:
        return importlib.import_module("configuration_step3")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing
    sys.modules["torch"] = None
    try:
        return importlib.import_module("configuration_step3")
    finally:
        del sys.modules["torch"]


configuration = import_configuration()
Step3TextConfig, Step3VLConfig = configuration.Step3TextConfig, configuration.Step3VLConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_FILES = tuple(sorted(path.name for path in ROOT.glob("*_step3.py")))
CONFIG_CLASSES = {config_class.model_type: config_class for config_class in (Step3VLConfig, Step3TextConfig)}
# The release's block-fp8; docs/converting.md gives the sources.
FP8_QUANTIZATION = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
FP8_QUANTIZATION["weight_block_size"] = [128, 128]
FP8_BLOCK = (128, 128)
# Bytes per element of the types that weights and fp8 scales may have.
WEIGHT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
SCALE_TYPES = ("F32", "BF16")
SHOWN_PROBLEMS = 20


class CheckpointError(ValueError):
    """Everything that is wrong with a checkpoint, one line for each of `problems`; its text has the first 20."""

    def __init__(self, problems: list[str]):
        more = len(problems) - SHOWN_PROBLEMS
        super().__init__("\n".join(problems[:SHOWN_PROBLEMS] + [f"... and {more} more."] * (more > 0)))
        self.problems = problems


def failure(error: BaseException, name: object) -> int:
    """Says why a command ended, and returns its exit status. `name` stands for a file that an `OSError` lacks."""
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted. Repeat the command to resume.", file=sys.stderr)
        return 130
    told = f"{error.filename or name}: {error.strerror or error}" if isinstance(error, OSError) else error
    print(told, file=sys.stderr)
    return 1


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Adds the problems of a `CheckpointError` to the list instead of raising it."""
    try:
        yield
    except CheckpointError as error:
        problems += error.problems


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file."""

    name: str  # in the released layout
    stored_name: str  # in the file
    path: Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path.name}: {repr(self.stored_name)[1:-1]:.200}"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * WEIGHT_TYPES[self.dtype]

    @property
    def is_fp8_in_release(self) -> bool:
        """Whether the release has it in fp8: all matrices of the decoder layers except the routers'."""
        in_layer = self.name.startswith("model.layers.") and not self.name.endswith((".moe.gate.weight", "_scale_inv"))
        return in_layer and len(self.shape) > 1

    def read(self):
        """The torch tensor, memory-mapped from the file."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.stored_name)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: exactly the tensors that its config implies, in the right shapes, in the model's order."""

    directory: Path
    config: Step3VLConfig | Step3TextConfig
    tensors: dict[str, Tensor]

    @property
    def paths(self) -> list[Path]:
        return sorted({tensor.path for tensor in self.tensors.values()})

    @property
    def has_original_names(self) -> bool:
        return any(tensor.name != tensor.stored_name for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises a `CheckpointError` if it cannot be read or `parse_json` refuses it."""
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError([f"{path.name}: cannot be read: {error.strerror}."]) from None
    except ValueError as error:
        raise CheckpointError([f"{path.name}: {error}."]) from None


def locate(directory: Path, name: str) -> Path:
    """
    The path of the file called `name` in `directory`. Raises a `CheckpointError` if it is missing, not a regular file,
    or outside the directory; links into the hub's cache are allowed.
    """
    path, home = directory / name, directory.resolve()
    if not os.path.isfile(path):  # False for any name that the system refuses
        raise CheckpointError([f"{name!r:.200} is missing from {directory} or not a regular file."])
    target = path.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs"
    if target.parent != home and not in_cache:
        raise CheckpointError([f"{name!r:.200} is outside the directory, at {str(target)!r:.200}."])
    return path


def read_config(directory: Path) -> Step3VLConfig | Step3TextConfig:
    """The configuration in `directory`. Raises a `CheckpointError` if it is not a valid one of Step3."""
    settings = read_json(locate(directory, "config.json"))
    model_type, quantization = settings.get("model_type"), settings.get("quantization_config")
    problems = []
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        problems.append(f"`model_type` must be {' or '.join(CONFIG_CLASSES)}, got {model_type!r:.200}.")
    if not isinstance(quantization, dict | None):
        problems.append(f"`quantization_config` must be an object, got {quantization!r:.200}.")
    # The config classes would describe the released model where a part is left out.
    parts = Step3VLConfig.sub_configs if model_type == Step3VLConfig.model_type else {}
    for name, part in parts.items():
        if not isinstance(settings.get(name), dict):
            problems.append(f"`{name}` must be an object, got {settings.get(name)!r:.200}.")
        elif (found := settings[name].get("model_type", part.model_type)) != part.model_type:
            problems.append(f"`{name}.model_type` must be {part.model_type}, got {found!r:.200}.")
    if problems:
        raise CheckpointError([f"config.json: {problem}" for problem in problems])
    try:
        return CONFIG_CLASSES[model_type].from_dict(settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError([f"config.json: {' '.join(str(error).split()):.1000}"]) from None


def expected_shapes(config: Step3VLConfig | Step3TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this config has on disk, without the scales of fp8 weights."""
    text = config.get_text_config()
    hidden, rank, queries = text.hidden_size, text.share_q_dim, text.num_attention_heads * text.head_dim
    keys = text.num_attention_groups * text.head_dim

    def gated(width: int, *experts: int) -> dict[str, tuple[int, ...]]:
        inner = (*experts, width, hidden)
        return {"gate_proj": inner, "up_proj": inner, "down_proj": (*experts, hidden, width)}

    shapes = {"model.embed_tokens.weight": (text.vocab_size, hidden)}
    for i in range(text.num_hidden_layers):
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (rank, hidden),
            "self_attn.inter_norm": (rank,),
            "self_attn.wq": (queries, rank),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
        }
        mlps = {"mlp": gated(text.intermediate_size)}
        if i in text.moe_layers:
            layer["moe.gate"] = (text.moe_num_experts, hidden)
            mlps = {"moe": gated(text.moe_intermediate_size, text.moe_num_experts)}
            mlps["share_expert"] = gated(text.share_expert_dim)
        layer |= {f"{mlp}.{name}": shape for mlp, weights in mlps.items() for name, shape in weights.items()}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (text.vocab_size, hidden)}
    if isinstance(config, Step3TextConfig):
        return shapes

    vision = config.vision_config
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    channels = vision.output_hidden_size
    shapes["vision_model.embeddings.class_embedding"] = (1, width)
    shapes["vision_model.embeddings.position_embedding.weight"] = ((vision.image_size // patch) ** 2 + 1, width)
    shapes["vit_large_projector.weight"] = (hidden, 2 * channels)
    if config.projector_bias:
        shapes["vit_large_projector.bias"] = (hidden,)
    with_bias = {
        "vision_model.embeddings.patch_embedding": (width, vision.num_channels, patch, patch),
        "vit_downsampler": (channels, width, 2, 2),
        "vit_downsampler2": (2 * channels, channels, 3, 3),
    }
    for i in range(vision.num_hidden_layers):
        layer = {
            "self_attn.qkv_proj": (3 * width, width),
            "self_attn.out_proj": (width, width),
            "mlp.fc1": (inner, width),
            "mlp.fc2": (width, inner),
            "layer_norm1": (width,),
            "layer_norm2": (width,),
        }
        with_bias |= {f"vision_model.transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in with_bias.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight, one for each block of its last two dimensions."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def weight_block(config: Step3VLConfig | Step3TextConfig) -> tuple[int, int] | None:
    """
    Rows and columns of the blocks that share a scale, or `None` for a model that is not quantised. Raises a
    `CheckpointError` if the config has another quantisation or an invalid block size.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    match settings:
        case {"quant_method": "fp8", "weight_block_size": [int(rows), int(columns)]} if min(rows, columns) > 0:
            return rows, columns
    message = "config.json: `quantization_config` must be fp8 with a `weight_block_size` of two positive integers"
    raise CheckpointError([f"{message}, got {settings!r:.200}."])


def check_tensors(config: Step3VLConfig | Step3TextConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """
    The tensors in the model's order, each fp8 weight followed by its scales. Raises a `CheckpointError` if they are not
    those of a model of this config.
    """
    problems, expected, block = [], {}, weight_block(config)
    tied = config.get_text_config().tie_word_embeddings
    for name, shape in expected_shapes(config).items():
        if tied and name == "lm_head.weight" and name not in tensors:
            continue
        expected[name] = shape, WEIGHT_TYPES
        if name in tensors and tensors[name].dtype == "F8_E4M3":
            if block is None or len(shape) < 2:
                problems.append(f"{tensors[name]}: is fp8, but config.json does not describe it as block-fp8.")
            else:
                expected[f"{name}_scale_inv"] = scale_shape(shape, block), SCALE_TYPES
    for name, (shape, types) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name}: missing, expected shape {list(shape)}.")
            continue
        if tensor.shape != shape:
            problems.append(f"{tensor}: expected shape {list(shape)}, found {list(tensor.shape)!r:.200}.")
        if tensor.dtype not in types:
            problems.append(f"{tensor}: expected type {' or '.join(types)}, found {tensor.dtype}.")
    extra = [tensor for name, tensor in tensors.items() if name not in expected]
    problems += [f"{tensor}: not part of the model that config.json describes." for tensor in extra]
    if problems:
        raise CheckpointError(problems)
    return {name: tensors[name] for name in expected}


def released_name(name: str) -> str:
    """The released name of a tensor, which the original remote code may have saved under another."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith(("model.vision_model.", "model.vit_")) else name


def read_header(directory: Path, name: str) -> list[Tensor]:
    """
    The tensors of the file called `name` in `directory`. Raises a `CheckpointError` if it is not a safetensors file in
    the directory, or its header does not match its contents.
    """
    if not name.endswith(".safetensors"):
        raise CheckpointError([f"{name!r:.200}: only safetensors files are read; pickled weights can run any code."])
    path = locate(directory, name)
    try:
        with safe_open(path, "np") as file:  # "np" needs no torch
            slices = {key: file.get_slice(key) for key in file.keys()}
            headers = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError([f"{name}: cannot be read: {error}."]) from None
    return [Tensor(released_name(key), key, path, *header) for key, header in headers.items()]


def read_index(directory: Path) -> dict[str, object] | None:
    """
    The file of each tensor by the index, which is not checked further, or `None` if all are in one file. Raises a
    `CheckpointError` if there are no weights or the index is not valid.
    """
    if not (directory / INDEX).exists():
        if not (directory / WEIGHTS).exists():
            message = f"has neither {WEIGHTS} nor {INDEX}; pickled weights are not read, because they can run any code"
            raise CheckpointError([f"{directory} {message}."])
        return None
    weight_map = read_json(locate(directory, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError([f"{INDEX}: `weight_map` must map tensors to files, got {weight_map!r:.200}."])
    return weight_map


def read_checkpoint(directory: Path) -> Checkpoint:
    """Reads and checks the checkpoint in `directory`. Raises a `CheckpointError` with everything that is wrong."""
    if not directory.is_dir():
        raise CheckpointError([f"{directory} is not a directory."])
    problems, unread, config, index, files, tensors = [], [], None, None, [], {}
    with collecting(problems):
        config = read_config(directory)
    with collecting(problems):
        index = read_index(directory)
        files = [WEIGHTS] if index is None else sorted(set(map(str, index.values())))
    for file in files:
        with collecting(unread):
            for tensor in read_header(directory, file):
                if index is not None and index.get(tensor.stored_name) != file:
                    problems.append(f"{tensor}: {INDEX} does not say that it is in this file.")
                if tensor.name in tensors:
                    problems.append(f"{tensor}: is also in {tensors[tensor.name].path.name}.")
                tensors[tensor.name] = tensor
    problems += unread
    if files and not unread:
        stored_names = {tensor.stored_name for tensor in tensors.values()}
        lost = sorted((index or {}).keys() - stored_names)
        problems += [f"{index[name]!r:.200} has no tensor {name!r:.200}, but {INDEX} says so." for name in lost]
        if config is not None:
            with collecting(problems):
                tensors = check_tensors(config, tensors)
    if problems:
        raise CheckpointError(problems)
    return Checkpoint(directory, config, tensors)
