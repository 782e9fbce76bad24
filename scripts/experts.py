"""Counts how often each expert of each layer is chosen in the conversations of a data file.

python scripts/experts.py MODEL DATA.jsonl
python scripts/experts.py MODEL DATA.jsonl --output counts.json --picture heat.png

`conversations.py` says what a line of the data looks like.
"""

import argparse
from pathlib import Path

import torch
from conversations import BadData
from describe import load
from files import replacing, write_json
from PIL import Image, ImageDraw
from tqdm import tqdm
from training_data import Sample, read_all
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from step3_vl import Step3VLProcessor


CELL = 12  # pixels of an expert in the heat map
COLOURS = ((255, 255, 255), (214, 40, 40))  # of an expert that is never chosen, and of the one chosen most often


@torch.no_grad()
def count_choices(
    model: PreTrainedModel, processor: Step3VLProcessor, samples: list[Sample], batch_size: int
) -> torch.Tensor:
    """Counts how many tokens of the conversations, without padding, choose each expert: (MoE layers, experts)."""
    text = model.config.get_text_config()
    counts = torch.zeros(len(text.moe_layers), text.moe_num_experts, dtype=torch.long)
    is_token = None

    def count(row: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        _, _, chosen = output
        row += chosen[is_token.to(chosen.device)].flatten().bincount(minlength=len(row)).cpu()

    routers = [module for name, module in model.named_modules() if name.endswith(".moe.gate")]
    for router, row in zip(routers, counts, strict=True):
        router.register_forward_hook(lambda module, inputs, output, row=row: count(row, output))
    for start in tqdm(range(0, len(samples), batch_size), "Batches"):
        batch = samples[start : start + batch_size]
        inputs = processor(
            text=[sample.prompt + sample.answer for sample in batch],
            images=[sample.images for sample in batch],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        ).to(model.device)
        is_token = inputs["attention_mask"].flatten().bool()
        model(**inputs, use_cache=False, logits_to_keep=1)
    return counts


def describe_counts(counts: torch.Tensor, layers: list[int]) -> str:
    """A line for each layer: its most and least used expert, the share of the most used quarter, and unused ones."""
    lines = ["layer  most used         least used        top quarter  never"]
    for layer, row in zip(layers, counts, strict=True):
        shares = row / row.sum()
        quarter = shares.sort(descending=True).values[: max(len(row) // 4, 1)].sum()
        ends = [f"{shares[expert]:7.2%} of {expert:3d}" for expert in (int(row.argmax()), int(row.argmin()))]
        lines.append(f"{layer:5d}  {ends[0]:16}  {ends[1]:16}  {quarter:11.1%}  {int((row == 0).sum()):5d}")
    return "\n".join(lines)


def draw(counts: torch.Tensor, layers: list[int]) -> Image.Image:
    """A heat map with a row for each layer and a column for each expert; a layer's most used expert is the darkest."""
    none, most = (torch.tensor(colour, dtype=torch.float32) for colour in COLOURS)
    share = (counts / counts.max(1, keepdim=True).values)[..., None]
    cells = Image.fromarray((none + share * (most - none)).round().to(torch.uint8).numpy())
    cells = cells.resize((CELL * cells.width, CELL * cells.height), Image.Resampling.NEAREST)
    margin = 3 * CELL
    picture = Image.new("RGB", (cells.width + margin, cells.height + margin), "white")
    picture.paste(cells, (margin, margin))
    canvas = ImageDraw.Draw(picture)
    for row, layer in enumerate(layers):
        canvas.text((margin - CELL // 3, margin + CELL * row), str(layer), "black", anchor="ra")
    for expert in range(0, counts.shape[1], 4):
        canvas.text((margin + CELL * expert, margin - CELL // 3), str(expert), "black", anchor="ls")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", help="directory or hub id")
    parser.add_argument("data", type=Path, help="conversations, one in each line")
    parser.add_argument("--output", type=Path, help="write the counts to this JSON file")
    parser.add_argument("--picture", type=Path, help="draw them as a heat map to this PNG file")
    parser.add_argument("--batch-size", type=int, default=8, help="conversations at a time (default: %(default)s)")
    parser.add_argument("--experts-implementation", help='such as "mapped" (default: the model\'s)')
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    device = None if torch.cuda.is_available() else "cpu"
    try:
        max_length = AutoConfig.from_pretrained(arguments.model).get_text_config().longest_sequence
        samples = read_all(arguments.data, AutoProcessor.from_pretrained(arguments.model), max_length)
        model, processor = load(arguments.model, device, experts_implementation=arguments.experts_implementation)
        layers = model.config.get_text_config().moe_layers
        if not layers:
            raise ValueError(f"{arguments.model} has no MoE layers, whose experts could be counted")
    except (BadData, OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    counts = count_choices(model, processor, samples, arguments.batch_size)
    print(describe_counts(counts, layers))
    if arguments.output:
        write_json(arguments.output, {"layers": layers, "counts": counts.tolist()})
    if arguments.picture:
        with replacing(arguments.picture) as unfinished:
            draw(counts, layers).save(unfinished, "PNG")


if __name__ == "__main__":
    main()
