"""Reads a Step3 checkpoint without trusting it: config, index, safetensors headers and single tensors, but no code."""

import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from files import parse_json
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open


# Where the package's modules are: in the checkout, or installed.
ROOT = Path(__file__).parents[1]
if not (ROOT / "configuration_step3.py").exists():
    ROOT = Path(importlib.util.find_spec("step3_vl").origin).parent


def import_configuration():
    """
    The package's configuration module by itself, without torch, which takes longer to load than all that is done here.
    transformers loads what it can where there is no torch, and configs need none.
    """
    sys.path.insert(0, str(ROOT))
    is_loaded, quiet = "torch" in sys.modules, "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if not is_loaded:
        sys.modules["torch"] = None
        os.environ[quiet] = os.environ.get(quiet, "1")
    try:
        return importlib.import_module("configuration_step3")
    finally:
        if not is_loaded:
            del sys.modules["torch"]


configuration = import_configuration()
logging = importlib.import_module("transformers.utils.logging")
Step3TextConfig, Step3VLConfig = configuration.Step3TextConfig, configuration.Step3VLConfig

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CODE_FILES = tuple(
    f"{name}_step3.py" for name in ("configuration", "checkpoint", "experts", "generation", "modeling", "processing")
)
CONFIG_CLASSES = {config_class.model_type: config_class for config_class in (Step3VLConfig, Step3TextConfig)}
# The block-fp8 of the release; docs/converting.md says what this rests on.
FP8_QUANTIZATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
FP8_BLOCK = (128, 128)
# Bytes of an element; weights are of these types only.
WEIGHT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PICKLED = "pickled weights can run any code, and are refused; safetensors are read."
# What JSON is read at all: in the released model the index has 0.2 MB.
MAX_JSON_BYTES = 16 * 2**20
# Far beyond any model, and small enough to reckon with.
MAX_LAYERS, MAX_SIZE, MAX_TENSORS = configuration.MAX_LAYERS, 2**31, 10**5
SHOWN_PROBLEMS = 20


class CheckpointError(ValueError):
    """All that is wrong with a checkpoint, a line for each `problems`; as text, the first 20 and how many more."""

    def __init__(self, problems: list[str]):
        more = len(problems) - SHOWN_PROBLEMS
        super().__init__("\n".join(problems[:SHOWN_PROBLEMS] + [f"... and {more} more."] * (more > 0)))
        self.problems = problems


@dataclass(frozen=True)
class Tensor:
    """
    A tensor in a safetensors file.

    Args:
        name: The released name.
        stored_name: The name in the file.
        dtype: Its type as safetensors calls it.
    """

    name: str
    stored_name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * WEIGHT_TYPES[self.dtype]

    @property
    def is_fp8_in_release(self) -> bool:
        """Every matrix of the decoder layers is but the router's; embeddings, head, norms and vision are not."""
        in_layer = self.name.startswith("model.layers.") and not self.name.endswith((".moe.gate.weight", "_scale_inv"))
        return in_layer and len(self.shape) > 1

    def read(self):
        """The torch tensor; its memory is the file's, mapped."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.stored_name)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: every tensor that its config implies is there, in the right shape, and no other; they
    are in the order of the model."""

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


def quote(value: object) -> str:
    """A value that came from a file, fit for a message."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def read_json(path: Path) -> dict:
    """
    The JSON object in a file, UTF-8.

    Raises:
        `CheckpointError`: if it is not one, as `parse_json` reads it, or is too long.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"must be at most {MAX_JSON_BYTES} bytes of JSON")
        return parse_json(data)
    except OSError as error:
        raise CheckpointError([f"{path.name}: cannot be read: {error.strerror}."]) from None
    except ValueError as error:
        raise CheckpointError([f"{path.name}: {error}."]) from None


def released_name(name: str) -> str:
    """The released name of a tensor that may be called as the original remote code saved it."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith(("model.vision_model.", "model.vit_")) else name


def read_header(path: Path) -> list[Tensor]:
    """
    The tensors of a safetensors file.

    Raises:
        `CheckpointError`: if the library does not take the file: the header must be what the format asks for, and every
        byte belong to one tensor.
    """
    try:
        with safe_open(path, "np") as file:  # which needs no torch
            slices = {name: file.get_slice(name) for name in file.keys()}
            return [
                Tensor(released_name(name), name, path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            ]
    except (OSError, SafetensorError) as error:
        raise CheckpointError([f"{path.name}: cannot be read: {error}."]) from None


def locate(directory: Path, name: str) -> Path:
    """
    The file called `name` in `directory`.

    Raises:
        `CheckpointError`: if it is no regular file, or the name leads out of the directory, also by a link; links into
        the hub's cache are its own.
    """
    if name != Path(name).name or "\\" in name or "\0" in name:
        raise CheckpointError([f"{INDEX}: file names must stay in the directory, got {quote(name)}."])
    path, home = directory / name, directory.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # not there, a circle of links, no name for a file
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError([f"{quote(name)[1:-1]}: cannot be read: {reason}."]) from None
    in_cache = home.parent.name == "snapshots" and target.parent == home.parents[1] / "blobs"
    if target.parent != home and not in_cache:
        raise CheckpointError([f"{name}: is a link that leaves the directory, to {quote(str(target))}."])
    if not target.is_file():  # a pipe would be waited for
        raise CheckpointError([f"{name}: must be a regular file."])
    return path


def locate_weights(directory: Path, name: str) -> Path:
    """
    The weight file called `name` in `directory`.

    Raises:
        `CheckpointError`: if it is not a safetensors file in the directory.
    """
    if name.endswith(PICKLES):
        raise CheckpointError([f"{quote(name)[1:-1]}: {PICKLED}"])
    path = locate(directory, name)
    if not name.endswith(".safetensors"):
        raise CheckpointError([f"{INDEX}: weights must be safetensors files, got {quote(name)}."])
    return path


def read_config(directory: Path) -> Step3VLConfig | Step3TextConfig:
    """
    The configuration in `directory`.

    Raises:
        `CheckpointError`: if it is not a valid one of Step3.
    """
    settings = read_json(locate(directory, "config.json"))
    problems = []

    def look(value: object, where: str) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                look(entry, f"{where}.{key}" if where else key)
        elif isinstance(value, list):
            for entry in value:
                look(entry, where)
        elif type(value) in (int, float):
            limit = MAX_LAYERS if where.endswith("num_hidden_layers") else MAX_SIZE
            if not -limit <= value <= limit:
                problems.append(f"config.json: `{quote(where)[1:-1]}` must be at most {limit}, got {quote(value)}.")

    look(settings, "")
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_CLASSES:
        problems.append(f"config.json: `model_type` must be {' or '.join(CONFIG_CLASSES)}, got {quote(model_type)}.")
    if not isinstance(quantization := settings.get("quantization_config"), dict | None):
        problems.append(f"config.json: `quantization_config` must be an object, got {quote(quantization)}.")
    # What is left out would be that of the released model.
    parts = Step3VLConfig.sub_configs if model_type == Step3VLConfig.model_type else {}
    for name, part in parts.items():
        if not isinstance(settings.get(name), dict):
            problems.append(f"config.json: `{name}` must be an object, got {quote(settings.get(name))}.")
        elif (found := settings[name].get("model_type", part.model_type)) != part.model_type:
            problems.append(f"config.json: `{name}.model_type` must be {part.model_type}, got {quote(found)}.")
    if problems:
        raise CheckpointError(problems)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings of unknown keys quote them at any length
    try:
        return CONFIG_CLASSES[model_type].from_dict(settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise CheckpointError([f"config.json: {text[:1000]}"]) from None
    finally:
        logging.set_verbosity(verbosity)


def text_shapes(text: Step3TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the language model's tensors in the released layout."""
    hidden, queries = text.hidden_size, text.num_attention_heads * text.head_dim
    keys = text.num_attention_groups * text.head_dim

    def gated(width: int, *experts: int) -> dict[str, tuple[int, ...]]:
        inner = (*experts, width, hidden)
        return {"gate_proj": inner, "up_proj": inner, "down_proj": (*experts, hidden, width)}

    shapes = {"model.embed_tokens": (text.vocab_size, hidden)}
    for i in range(text.num_hidden_layers):
        parts = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (text.share_q_dim, hidden),
            "self_attn.inter_norm": (text.share_q_dim,),
            "self_attn.wq": (queries, text.share_q_dim),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
        }
        if i in text.moe_layers:
            parts["moe.gate"] = (text.moe_num_experts, hidden)
            mlps = {"moe": gated(text.moe_intermediate_size, text.moe_num_experts)}
            mlps["share_expert"] = gated(text.share_expert_dim)
        else:
            mlps = {"mlp": gated(text.intermediate_size)}
        parts |= {f"{mlp}.{name}": shape for mlp, weights in mlps.items() for name, shape in weights.items()}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in parts.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (text.vocab_size, hidden)}
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def vision_shapes(config: Step3VLConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower's and the projector's tensors in the released layout."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    width, channels, inner = vision.hidden_size, vision.output_hidden_size, vision.intermediate_size
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    with_bias = {
        "vision_model.embeddings.patch_embedding": (width, vision.num_channels, vision.patch_size, vision.patch_size),
        "vit_downsampler": (channels, width, 2, 2),
        "vit_downsampler2": (2 * channels, channels, 3, 3),
    }
    for i in range(vision.num_hidden_layers):
        layer = f"vision_model.transformer.layers.{i}"
        with_bias |= {
            f"{layer}.self_attn.qkv_proj": (3 * width, width),
            f"{layer}.self_attn.out_proj": (width, width),
            f"{layer}.mlp.fc1": (inner, width),
            f"{layer}.mlp.fc2": (width, inner),
            f"{layer}.layer_norm1": (width,),
            f"{layer}.layer_norm2": (width,),
        }
    shapes = {
        "vision_model.embeddings.class_embedding": (1, width),
        "vision_model.embeddings.position_embedding.weight": (positions, width),
        "vit_large_projector.weight": (hidden, 2 * channels),
    }
    if config.projector_bias:
        shapes["vit_large_projector.bias"] = (hidden,)
    for name, shape in with_bias.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def expected_shapes(config: Step3VLConfig | Step3TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a model of this config has on disk, the scales of fp8 weights apart."""
    if isinstance(config, Step3TextConfig):
        return text_shapes(config)
    return text_shapes(config.text_config) | vision_shapes(config)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 weight, one for each block of its last two dimensions."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def weight_block(config: Step3VLConfig | Step3TextConfig) -> tuple[int, int] | None:
    """
    Rows and columns of the blocks that share a scale, or `None` if the config names no block-fp8.

    Raises:
        `CheckpointError`: if the config names another quantisation, or impossible blocks.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    block = settings.get("weight_block_size")
    if settings.get("quant_method") != "fp8" or not (
        isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)
    ):
        message = "config.json: `quantization_config` must be fp8 with a `weight_block_size` of two sizes, got "
        raise CheckpointError([message + quote(settings)])
    return tuple(block)


def compare(config: Step3VLConfig | Step3TextConfig, tensors: dict[str, Tensor]) -> list[str]:
    """What is wrong with `tensors` as those of a model of this config."""
    problems = []
    block = weight_block(config)
    expected = expected_shapes(config)
    unclaimed = dict(tensors)

    def claim(name: str, shape: tuple[int, ...], types: dict[str, int]) -> Tensor | None:
        tensor = unclaimed.pop(name, None)
        if tensor is None:
            problems.append(f"{name}: missing, expected shape {list(shape)}.")
            return None
        where = f"{tensor.path.name}: {tensor.stored_name}"
        if tensor.shape != shape:
            problems.append(f"{where}: expected shape {list(shape)}, found {quote(list(tensor.shape))}.")
        if tensor.dtype not in types:
            problems.append(f"{where}: expected one of {', '.join(types)}, found {tensor.dtype}.")
        return tensor

    tied = config.get_text_config().tie_word_embeddings
    for name, shape in expected.items():
        if tied and name == "lm_head.weight" and name not in tensors:
            continue
        tensor = claim(name, shape, WEIGHT_TYPES)
        if tensor is not None and tensor.dtype == "F8_E4M3":
            if block is None or len(shape) < 2:
                problems.append(
                    f"{tensor.path.name}: {tensor.stored_name}: fp8, but no block-fp8 weight by the config."
                )
            else:
                claim(f"{name}_scale_inv", scale_shape(shape, block), {"F32": 4, "BF16": 2})
    for name, tensor in unclaimed.items():
        problems.append(f"{tensor.path.name}: {quote(name)}: not part of the model that config.json describes.")
    return problems


def read_checkpoint(directory: Path) -> Checkpoint:
    """
    Reads and checks the checkpoint in `directory`.

    Raises:
        `CheckpointError`: with everything that is wrong, by file and tensor.
    """
    if not directory.is_dir():
        raise CheckpointError([f"{directory}: is not a directory."])
    problems, config, index, names = [], None, None, []
    try:
        config = read_config(directory)
    except CheckpointError as error:
        problems += error.problems
    if (directory / INDEX).exists():
        try:
            index = read_json(locate(directory, INDEX)).get("weight_map")
            if not isinstance(index, dict) or not index:
                raise CheckpointError([f"{INDEX}: must have a `weight_map` of names and files, got {quote(index)}."])
            if len(index) > MAX_TENSORS:
                raise CheckpointError([f"{INDEX}: must name at most {MAX_TENSORS} tensors, got {len(index)}."])
            names = sorted({name if isinstance(name, str) else quote(name) for name in index.values()})
        except CheckpointError as error:
            problems += error.problems
    elif (directory / WEIGHTS).exists():
        names = [WEIGHTS]
    else:
        pickles = sorted(path.name for path in directory.iterdir() if path.name.endswith(PICKLES))
        if pickles:
            problems += [f"{name}: {PICKLED}" for name in pickles]
        else:
            problems.append(f"{directory}: holds neither {WEIGHTS} nor {INDEX}.")

    tensors, unread = {}, False
    for name in names:
        try:
            for tensor in read_header(locate_weights(directory, name)):
                if index is not None and index.get(tensor.stored_name) != name:
                    problems.append(f"{name}: {quote(tensor.stored_name)}: the index does not place it there.")
                if tensor.name in tensors:
                    first = tensors[tensor.name].path.name
                    problems.append(f"{name}: {quote(tensor.stored_name)}: is in {first}, too.")
                tensors[tensor.name] = tensor
        except CheckpointError as error:
            problems += error.problems
            unread = True
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError([*problems, f"{directory}: must hold at most {MAX_TENSORS} tensors."])
    if names:
        extra = sorted(path.name for path in directory.glob("model*.safetensors") if path.name not in names)
        problems += [f"{name}: is not named in the index." for name in extra]
    stored_names = {tensor.stored_name for tensor in tensors.values()}
    if index is not None and not unread:
        missing = sorted(name for name in index if name not in stored_names)
        problems += [f"{index[name]}: {quote(name)}: missing, the index places it there." for name in missing]
    if config is not None and names and not unread:
        try:
            problems += compare(config, tensors)
        except CheckpointError as error:
            problems += error.problems
    if problems:
        raise CheckpointError(problems)
    places = {name: place for place, name in enumerate(expected_shapes(config))}
    names = sorted(tensors, key=lambda name: (places[name.removesuffix("_scale_inv")], name))
    return Checkpoint(directory, config, {name: tensors[name] for name in names})
