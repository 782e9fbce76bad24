"""Quantises step3-tiny in every format and method, and prints how right and how large the results are.

python scripts/develop/compare_formats.py DIRECTORY --picture formats.png

Perplexity is that of descriptions of scenes that no calibration has seen; divergence from bfloat16 is that of all
tokens of these conversations, since the model has few doubts about its answers.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import nll_loss
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("", "tiny"))
from draw_conversations import draw_conversations
from evaluate_tiny import TINY, answer_scenes, fresh_scenes
from files import new_directory, replacing
from quantise import main as quantise


METHODS = {"w4a16": ("rtn", "gptq", "awq"), "nf4": ("rtn",), "w8a8": ("rtn", "gptq"), "fp8": ("rtn", "gptq")}
COLOURS = {"rtn": "C7", "gptq": "C0", "awq": "C1"}


def run(output: Path, options: list[str]) -> tuple[float, float]:
    """Quantises step3-tiny in this process, and returns seconds of processor time and the memory it took, in bytes."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if quantise([str(TINY), str(output), *options]):
        raise SystemExit(f"{output} was not written")
    return time.process_time() - start, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def bytes_of_experts(directory: Path) -> int:
    tensors = [pair for path in directory.glob("model*.safetensors") for pair in load_file(path).items()]
    parts = (".moe.experts.", ".moe.gate_proj", ".moe.up_proj", ".moe.down_proj")
    return sum(tensor.nbytes for name, tensor in tensors if any(part in name for part in parts))


@torch.no_grad()
def score(model, processor, scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (tokens, vocab_size) in conversations about scenes, and the losses of the answers' tokens."""
    everything, losses = [], []
    for scene in scenes:
        question, answer = scene.questions["describe"]
        content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(turns, **options)
        start = processor.apply_chat_template(turns[:1], add_generation_prompt=True, **options)["input_ids"].shape[1]
        log_probs = model(**inputs).logits[0].float().log_softmax(-1)
        everything.append(log_probs)
        losses.append(nll_loss(log_probs[start - 1 : -1], inputs["input_ids"][0, start:], reduction="none"))
    return torch.cat(everything), torch.cat(losses)


def evaluate(directory: Path, scenes: list, base: torch.Tensor | None) -> tuple[dict, torch.Tensor]:
    """The figures of a model, of which `base` are the log-probabilities in bfloat16, and its own."""
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.bfloat16).eval()
    processor = AutoProcessor.from_pretrained(directory)
    log_probs, losses = score(model, processor, scenes)
    answers = answer_scenes(model, processor, scenes)
    base = log_probs if base is None else base
    figures = {
        "right": f"{sum(answer.is_right for answer in answers)} of {len(answers)}",
        "perplexity": losses.mean().exp().item(),
        "KL": (base.exp() * (base - log_probs)).sum(-1).mean().item(),
    }
    return figures, log_probs


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    for row in reversed(rows[1:]):
        name = f"{row['format']} {row['method']}, 1/{rows[0]['bytes'] / row['bytes']:.1f}"
        axes.barh(name, row["KL"], color=COLOURS[row["method"]])
    axes.set(xlabel="KL divergence from bfloat16, nats a token", ylabel="format, bytes of experts")
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create, for the data and the models")
    parser.add_argument("--samples", type=int, default=64, help="conversations for calibration (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=30, help="scenes to ask about (default: %(default)s)")
    parser.add_argument(
        "--group-size", type=int, default=32, help="4-bit weights with one scale (default: %(default)s)"
    )
    parser.add_argument("--picture", type=Path, help="draw divergence over bytes to this PNG file")
    arguments = parser.parse_args()
    draw_conversations(arguments.directory / "data", {"train": arguments.samples})
    results = {}
    for form, method in ((form, method) for form, methods in METHODS.items() for method in methods):
        options = ["--format", form, "--method", method, "--group-size", str(arguments.group_size)]
        if method != "rtn":
            options += ["--calibrate", str(arguments.directory / "data" / "train.jsonl")]
        with multiprocessing.get_context("fork").Pool(1) as pool:  # so that memory is that of one run
            results[form, method] = pool.apply(run, (arguments.directory / f"{form}-{method}", options))
    scenes = fresh_scenes(seed=424242, count=arguments.scenes)
    figures, base = evaluate(TINY, scenes, None)
    rows = [{"format": "bfloat16", "method": "", "bytes": bytes_of_experts(TINY) // 2, **figures}]  # stored in float32
    for (form, method), (seconds, memory) in results.items():
        directory = arguments.directory / f"{form}-{method}"
        figures, _ = evaluate(directory, scenes, base)
        cost = {"seconds": seconds, "MB": memory / 1e6}
        rows.append({"format": form, "method": method, "bytes": bytes_of_experts(directory), **figures, **cost})
    print("| format | method | bytes of the experts | factor | right | perplexity | KL divergence | seconds | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        cost = f"{row['seconds']:.1f} | {row['MB']:.0f}" if "MB" in row else " | "
        size = f"{row['bytes']:,} | {rows[0]['bytes'] / row['bytes']:.1f}"
        figures = f"{row['right']} | {row['perplexity']:.4f} | {row['KL']:.4f}"
        print(f"| {row['format']} | {row['method']} | {size} | {figures} | {cost} |")
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
