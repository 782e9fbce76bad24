"""Checks on this machine's GPU that the package's answers are right, and measures its speed: one table in Markdown.

python scripts/gpu_check.py --json results.json
python scripts/gpu_check.py --only attention experts decode --layers 1 --seconds 120
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_optimum_quanto_available,
    logging,
)

from step3_vl import Step3BoundedCache


sys.path.append(str(Path(__file__).parent / "develop"))
sys.path.append(str(Path(__file__).parent / "tiny"))
import benchmark
from describe import TINY
from evaluate_tiny import answer_scenes, fresh_scenes
from files import write_json


GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXPERTS = ("step3", "eager", "batched_mm", "grouped_mm", "linear", "mapped")
# Modules of step3-tiny, by a part of their names, and where to put them; the others are on the device.
PLACES = {
    "two layers on the CPU": {"layers.1": "cpu", "layers.2": "cpu"},
    "a layer and the head on the disk": {"layers.1": "disk", "lm_head": "disk"},
    "vision on the CPU": {"model.vi": "cpu"},
    "vision on the disk": {"model.vi": "disk"},
}
# A check's rows: what was done, what came out, and whether that is right; `None` where only time was measured.
Rows = Iterator[tuple[str, str, bool | None]]


class Quiz:
    """`count` drawn scenes, and questions about them that step3-tiny can answer."""

    def __init__(self, device: torch.device, count: int):
        self.device = 0 if device.type == "cuda" else device.type  # as `device_map` takes it
        self.processor = AutoProcessor.from_pretrained(TINY)
        self.scenes = fresh_scenes(seed=7, count=count)

    def load(self, dtype: torch.dtype = torch.bfloat16, **loading):
        return AutoModelForImageTextToText.from_pretrained(
            TINY, **{"dtype": dtype, "device_map": {"": self.device}, **loading}
        )

    def ask(self, model, **asking) -> tuple[str, bool]:
        """How many answers are right, and whether 95 % are; `asking` are arguments of `answer_scenes`."""
        answers = answer_scenes(model, self.processor, self.scenes, device=self.device, **asking)
        right = sum(answer.is_right for answer in answers)
        return f"{right} of {len(answers)} right", right >= 0.95 * len(answers)


def check_goldens(quiz: Quiz) -> Rows:
    """Logits and image features in float32 against a reference in float64."""
    for name in ("text_only", "mixed", "renorm"):
        inputs, expected = (load_file(GOLDENS / name / f"{kind}.safetensors") for kind in ("inputs", "expected"))
        for attention in ("eager", "sdpa"):
            model = AutoModelForImageTextToText.from_pretrained(
                GOLDENS / name, attn_implementation=attention, device_map={"": quiz.device}
            )
            with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                output = model(**{key: value.to(quiz.device) for key, value in inputs.items()})
            real = inputs["attention_mask"].bool()
            errors = [(output.logits.cpu() - expected["logits"])[real].abs().max().item()]
            if "image_features" in expected:
                errors.append((output.image_hidden_states.cpu() - expected["image_features"]).abs().max().item())
            yield f"{name}, {attention}", f"off by up to {max(errors):.1e}", max(errors) < 1e-4


def places_of(name: str, device: int | str) -> dict[str, int | str]:
    """The `device_map` of one of `PLACES`."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(TINY)).model
    parts = {"model.": model, "model.language_model.": model.language_model}
    parts["model.language_model.layers."] = model.language_model.layers
    names = ["lm_head", *(prefix + child for prefix, part in parts.items() for child, _ in part.named_children())]
    names = [each for each in names if f"{each}." not in parts]
    return {each: next((place for part, place in PLACES[name].items() if part in each), device) for each in names}


def check_answers(quiz: Quiz, case: str, make_loading: Callable[[], dict], cache: str | None = None) -> Rows:
    """Answers of a model that is loaded with some arguments, or that generates with a cache."""
    with tempfile.TemporaryDirectory() as folder:
        model = quiz.load(**make_loading(), offload_folder=folder)
        asking = {"cache_implementation": cache} if cache else {}
        if cache == "bounded":
            asking = {"cache": Step3BoundedCache(model.config, 4096), "batch_size": 10**6}
        yield case, *quiz.ask(model, **asking)


def in_its_own_process(options: argparse.Namespace, name: str, case: str) -> Rows:
    """Runs a check that may crash in another process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        command = [sys.executable, __file__, "--only", name, "--case", case, "--json", path]
        command += ["--device", options.device, "--scenes", options.scenes]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
        if not path.exists():
            raise RuntimeError(f"exit status {result.returncode}: {result.stderr.strip()[-150:]}")
        for row in json.loads(path.read_text())["rows"]:
            yield row["case"], row["result"], row["is_right"]


def measure(machine: benchmark.Machine, options: argparse.Namespace, name: str, prefix: str = "", **settings) -> Rows:
    """Runs a benchmark with random weights, by default at the released dimensions; `settings` are its options."""
    defaults = {name: getattr(options, name) for name in ("directory", "repeats", "layers")}
    arguments = benchmark.make_parser().parse_args([name])
    vars(arguments).update(defaults | {"pictures": 1, "original": False} | settings)
    with torch.no_grad():
        rows = benchmark.BENCHMARKS[name](machine, arguments, options.size, DTYPES[options.dtype])
    for row in rows:
        case = [
            prefix,
            *(f"{row[key]} {unit}" for key, unit in (("batch", "rows"), ("context", "tokens")) if key in row),
        ]
        case.append(row["what"].removeprefix("package").strip(", "))
        yield ", ".join(filter(None, case)), f"{row['seconds'] * 1e3:.1f} ms, {row['of_limit']:.2f} of the limit", None


def measure_limits(machine: benchmark.Machine, options: argparse.Namespace) -> Rows:
    for each in (machine, benchmark.Machine(torch.device("cpu"))):
        yield f"reading, {each.device}", f"{1e-9 / each.best_reading():,.0f} GB/s", None
    products = min(machine.seconds_per_flop(DTYPES[options.dtype]) for _ in range(3))
    yield f"products in {options.dtype}", f"{1e-12 / products:,.1f} TFLOP/s", None


def checks(quiz: Quiz, machine: benchmark.Machine, options: argparse.Namespace) -> Iterator[tuple[str, str, Callable]]:
    """Each check's name, case and call, which makes its rows."""
    attention = ["eager", "sdpa", "flex_attention"]
    attention += ["flash_attention_2"] * is_flash_attn_2_available()
    attention += ["flash_attention_3"] * is_flash_attn_3_available()
    caches = ["dynamic", "bounded", "static", "offloaded", "offloaded_static"]
    caches += ["quantized"] * is_optimum_quanto_available()
    yield "goldens", "", partial(check_goldens, quiz)
    loads = [("dtype", name, partial(dict, dtype=dtype)) for name, dtype in DTYPES.items()]
    for name in attention:  # flex attention does not take the encoder's heads everywhere
        vision = "sdpa" if name == "flex_attention" else name
        implementation = {"": name, "text_config": name, "vision_config": vision}
        loads.append(("attention", name, partial(dict, attn_implementation=implementation)))
    loads += [("experts", name, partial(dict, experts_implementation=name)) for name in EXPERTS]
    loads += [("place", name, lambda name=name: {"device_map": places_of(name, quiz.device)}) for name in PLACES]
    for name, case, make_loading in loads:
        yield name, case, partial(check_answers, quiz, case, make_loading)
    for case in caches:
        check = partial(check_answers, quiz, case, dict, cache=case)
        if case == "offloaded_static" and options.case is None:
            check = partial(in_its_own_process, options, "cache", case)
        yield "cache", case, check
    run = partial(measure, machine, options)
    yield "limits", "", partial(measure_limits, machine, options)
    yield "decode", "", partial(run, "decode", batch=options.batch, context=[512, 8192], compile=True)
    yield "prefill", "", partial(run, "prefill", context=options.context)
    yield "vision", "", partial(run, "vision")
    yield "train", "", partial(run, "train", context=options.context[-1:], layers=1)
    run = partial(run, layers=1)
    yield "offload", "decode", partial(run, "decode", "decode", batch=options.batch[:2], offload=["mapped"])
    # For each token, accelerate copies all experts.
    few = {"offload": ["accelerate"], "steps": 3, "repeats": 1}
    yield "offload", "decode by accelerate", partial(run, "decode", "decode", **few)
    yield "offload", "prefill", partial(run, "prefill", "prefill", offload=["mapped", "accelerate"], repeats=1)


def main(arguments: list[str] | None = None) -> int:
    names = ("goldens", "dtype", "attention", "experts", "cache", "place")
    names += ("limits", "decode", "prefill", "vision", "train", "offload")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    text = f"these, in this order, of {', '.join(names)} (default: all)"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=text)
    parser.add_argument("--case", help="one case of a check, such as `sdpa`")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda if available)")
    parser.add_argument("--scenes", type=int, default=6, help="to ask four or more questions about each (default: 6)")
    parser.add_argument("--seconds", type=float, default=300, help="start no check after this time (default: 300)")
    parser.add_argument("--size", choices=benchmark.TEXT_SIZES, default="real-layer", help="(default: real-layer)")
    parser.add_argument("--layers", type=int, default=3, help="MoE layers in decode and prefill (default: 3, 38 GB)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="to measure with (default: bfloat16)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32], help="rows to decode (default: 1 8 32)")
    parser.add_argument("--context", nargs="+", type=int, default=[512, 2048], help="to prefill (default: 512 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    parser.add_argument("--directory", type=Path, help="for temporary weights to offload (default: the system's)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    device = torch.device(options.device)
    quiz, machine = Quiz(device, options.scenes), benchmark.Machine(device)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    title = ", ".join([machine.name, *(f"{name} {version}" for name, version in versions.items())])
    print(f"{title}\n\n| check | case | result | seconds |\n| --- | --- | --- | --- |", flush=True)
    rows = []
    chosen = [check for check in checks(quiz, machine, options) if check[0] in options.only]
    for name, case, call in sorted(chosen, key=lambda check: options.only.index(check[0])):
        if options.case not in (None, case):
            continue
        before = time.perf_counter()
        found = []
        try:
            if before - start > options.seconds:
                found.append((case, f"not run: {options.seconds:.0f} seconds are over", None))
            else:
                found += call()
        except Exception as error:  # a check's failure is one of its results
            traceback.print_exc()
            message = f"failed: {type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")
            found.append((case, message[:200], False if name in names[:6] else None))
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        seconds = (time.perf_counter() - before) / len(found)
        for case_found, result, is_right in found:
            rows.append({"check": name, "case": case_found, "result": result, "is_right": is_right, "seconds": seconds})
            mark = "**wrong**: " if is_right is False else ""
            print(f"| {name} | {case_found} | {mark}{result} | {seconds:.1f} |", flush=True)
    if options.json:
        write_json(options.json, {"machine": machine.name, **versions, "rows": rows})
    return int(any(row["is_right"] is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
