"""Asks a model about newly drawn scenes, and prints how many answers are exactly right.

python scripts/tiny/evaluate_tiny.py --seed 1234
python scripts/tiny/evaluate_tiny.py DIRECTORY --seed 1234 --show answers.png
"""

import argparse
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from draw_scene import LAYOUTS, Scene, draw_scene, save_png
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import step3_vl  # noqa: F401  (registers Step3-VL with the Auto classes)


TINY = Path(__file__).parents[2] / "checkpoints" / "step3-tiny"


@dataclass(frozen=True)
class Answer:
    scene: Scene
    kind: str
    question: str
    truth: str
    answer: str

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth


def fresh_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes that training never draws, alternating between the layouts."""
    layouts = list(LAYOUTS)
    return [draw_scene(2 * 10**9 + seed * 10**6 + i, layouts[i % len(layouts)]) for i in range(count)]


def answer_scenes(
    model, processor, scenes: list[Scene], batch_size: int = 64, with_patches: bool = True, device=None, **options
) -> list[Answer]:
    """
    The model's greedy answer to each question about `scenes`, in batches of conversations with one question. Without
    patches, the model only sees the pictures' global views. Inputs are moved to `device`, by default the model's;
    `options` are passed to `generate`.
    """
    questions = [(scene, kind, *pair) for scene in scenes for kind, pair in scene.questions.items()]
    side = processor.image_processor.size["height"]
    answers = []
    with tqdm(total=len(questions), desc="Asking", unit=" questions") as progress:
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            conversations = []
            for scene, _, question, _ in batch:
                # A square image of the size of the global view is not cut into patches.
                image = scene.image if with_patches else scene.image.resize((side, side), Image.Resampling.BILINEAR)
                content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
                conversations.append([{"role": "user", "content": content}])
            inputs = processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            ).to(model.device if device is None else device)
            output = model.generate(**inputs, do_sample=False, **options)
            texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [Answer(*question, text) for question, text in zip(batch, texts, strict=True)]
            progress.update(len(batch))
    return answers


def accuracies(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """The share of right answers by kind of question and layout; `"all"` stands for all kinds or layouts."""
    counts = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for kind in (answer.kind, "all"):
            for layout in (answer.scene.layout, "all"):
                counts[kind][layout].append(answer.is_right)
    return {
        kind: {layout: sum(right) / len(right) for layout, right in layouts.items()} for kind, layouts in counts.items()
    }


def table(shares: dict[str, dict[str, float]]) -> str:
    """The shares in per cent, with a row for each kind of question."""
    columns = [*LAYOUTS, "all"]
    lines = [f"{'exact match, %':16}" + "".join(f"{column:>9}" for column in columns)]
    for kind in sorted(shares, key=lambda kind: kind == "all"):
        cells = (f"{100 * shares[kind][c]:9.1f}" if c in shares[kind] else f"{'':9}" for c in columns)
        lines.append(f"{kind:16}" + "".join(cells))
    return "\n".join(lines)


def contact_sheet(answers: list[Answer], limit: int = 24) -> Image.Image:
    """Pictures with a question, the answer and the truth: wrong answers first, then evenly spaced right ones."""
    chosen = [answer for answer in answers if not answer.is_right][:limit]
    if room := limit - len(chosen):
        right = [answer for answer in answers if answer.is_right]
        chosen += right[:: max(len(right) // room, 1)][:room]
    width, height, columns = 500, 590, 4
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, answer in enumerate(chosen):
        x, y = i % columns * width, i // columns * height
        sheet.paste(answer.scene.image, (x + 10, y + 10))
        lines = [answer.question, f"answer: {answer.answer}", f"truth:  {answer.truth}"]
        wrapped = [part for line in lines for part in textwrap.wrap(line, 78)]
        colour = "black" if answer.is_right else "crimson"
        pen.multiline_text((x + 10, y + 20 + answer.scene.image.height), "\n".join(wrapped), fill=colour)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", default=TINY, help="directory or hub id (default: step3-tiny)")
    parser.add_argument("--seed", type=int, default=0, help="first seed of the scenes (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=300, help="number of scenes (default: %(default)s)")
    parser.add_argument("--without-patches", action="store_true", help="show the model only the global views")
    parser.add_argument("--show", type=Path, metavar="FILE.png", help="save pictures with questions and answers")
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model).eval()
    scenes = fresh_scenes(arguments.seed, arguments.scenes)
    answers = answer_scenes(model, processor, scenes, with_patches=not arguments.without_patches)
    print(table(accuracies(answers)))
    if arguments.show:
        save_png(contact_sheet(answers), arguments.show)


if __name__ == "__main__":
    main()
