"""Makes a Step3 of the released size whose weights are zeros: in sparse files, which take seconds and no disk space.

python scripts/develop/make_sparse_model.py DIRECTORY
python scripts/develop/make_sparse_model.py DIRECTORY --fp8 --layers 8 --vision-layers 2
"""

import argparse
import errno
import json
import os
import sys
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))
from checkpoint_files import (
    FP8_BLOCK,
    FP8_QUANTIZATION,
    INDEX,
    Step3VLConfig,
    Tensor,
    expected_shapes,
    read_checkpoint,
    scale_shape,
)
from files import replacing, write_json
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError


def write_sparse(path: Path, tensors: list[Tensor]) -> None:
    """
    Writes a safetensors file of zeros: its header, followed by a hole.

    Raises:
        `OSError`: if the file system limits the size of files or would store the zeros.
    """
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
        file.flush()
        if os.fstat(file.fileno()).st_blocks * 512 > end // 2 + 2**20:
            raise OSError(errno.EOPNOTSUPP, "the file system has no sparse files", str(path))


def make_sparse_model(directory: Path, config: Step3VLConfig, fp8: bool = False) -> None:
    """
    Writes a model of zeros to `directory`, in the released bfloat16 or block-fp8 layout, in files of up to 5 GB.

    Raises:
        `FileExistsError`: if `directory` exists.
        `OSError`: if the file system limits the size of files or has no sparse ones.
    """
    if directory.exists():
        raise FileExistsError(errno.EEXIST, "exists already; choose another place or remove it", str(directory))
    config.dtype = config.text_config.dtype = config.vision_config.dtype = "bfloat16"
    if fp8:
        config.quantization_config = FP8_QUANTIZATION
    tensors = {}
    for name, shape in expected_shapes(config).items():
        tensors[name] = Tensor(name, name, directory, "BF16", shape)
        if fp8 and tensors[name].is_fp8_in_release:
            tensors[name] = Tensor(name, name, directory, "F8_E4M3", shape)
            scale = f"{name}_scale_inv"
            tensors[scale] = Tensor(scale, scale, directory, "F32", scale_shape(shape, FP8_BLOCK))
    split = split_state_dict_into_shards_factory(
        tensors, get_storage_size=lambda tensor: tensor.num_bytes, filename_pattern="model{suffix}.safetensors"
    )
    with replacing(directory) as unfinished:
        config.save_pretrained(unfinished)
        for file, names in split.filename_to_tensors.items():
            write_sparse(unfinished / file, [tensors[name] for name in names])
        if split.is_sharded:
            write_json(unfinished / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        read_checkpoint(unfinished)  # by the safetensors library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path, help="where to put it; must not exist yet")
    parser.add_argument("--fp8", action="store_true", help="in the block-fp8 layout (default: bfloat16)")
    parser.add_argument("--layers", type=int, help="decoder layers; if not 61, only the first is dense (default: 61)")
    parser.add_argument("--vision-layers", type=int, default=63, help="layers of the encoder (default: %(default)s)")
    arguments = parser.parse_args()
    text = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    try:
        config = Step3VLConfig(text_config=text, vision_config={"num_hidden_layers": arguments.vision_layers})
        make_sparse_model(arguments.directory, config, arguments.fp8)
    except OSError as error:
        parser.exit(2, f"{parser.prog}: {error.filename}: {error.strerror}\n")
    except StrictDataclassError as error:
        parser.error(str(error))
    checkpoint = read_checkpoint(arguments.directory)
    on_disk = sum(path.stat().st_blocks for path in checkpoint.paths) * 512
    print(f"{arguments.directory}: {checkpoint.num_bytes / 1e9:.1f} GB, of which the disk holds {on_disk / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
