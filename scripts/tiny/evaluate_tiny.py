"""Asks a model about newly drawn scenes, and prints how many answers are exactly right.

python scripts/tiny/evaluate_tiny.py --seed 1234
python scripts/tiny/evaluate_tiny.py DIRECTORY --seed 1234 --show answers.png
"""

import argparse
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draw_dialogue import MAX_PICTURES, Turn, draw_dialogue, messages_of
from draw_scene import LAYOUTS, Scene, draw_scene, save_png
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import step3_vl  # noqa: F401  (registers Step3-VL with the Auto classes)


TINY = Path(__file__).parents[2] / "checkpoints" / "step3-tiny"


@dataclass(frozen=True)
class Answer:
    """An answer to a question about a scene, or in a conversation with `pictures` pictures so far."""

    scene: Scene | None
    kind: str
    question: str
    truth: str
    answer: str
    pictures: int = 1

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth


def fresh_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes that training never draws, alternating between the layouts."""
    layouts = list(LAYOUTS)
    return [draw_scene(2 * 10**9 + seed * 10**6 + i, layouts[i % len(layouts)]) for i in range(count)]


def fresh_conversations(seed: int, count: int, **options) -> list[list[Turn]]:
    """Conversations that training never draws; `options` are those of `draw_dialogue`."""
    return [draw_dialogue(2 * 10**9 + seed * 10**6 + i, **options) for i in range(count)]


def generate_answers(model, processor, conversations: list[list[dict]], device=None, **options) -> list[str]:
    """
    The model's greedy answers to a batch of conversations. Inputs are moved to `device`, by default the model's;
    `options` are passed to `generate`.
    """
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    ).to(model.device if device is None else device)
    output = model.generate(**inputs, do_sample=False, **options)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_scenes(
    model, processor, scenes: list[Scene], batch_size: int = 64, with_patches: bool = True, **options
) -> list[Answer]:
    """
    The answer to each question about `scenes`, in batches of conversations with one question. Without patches, the
    model only sees the pictures' global views. `options` are those of `generate_answers`.
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
            texts = generate_answers(model, processor, conversations, **options)
            answers += [Answer(*question, text) for question, text in zip(batch, texts, strict=True)]
            progress.update(len(batch))
    return answers


def answer_conversations(
    model, processor, conversations: list[list[Turn]], batch_size: int = 64, with_cache: bool = False, **options
) -> list[list[Answer]]:
    """
    The answers to each turn of `conversations`, given the model's own answers before, in batches that encode the whole
    conversation in each turn. With a cache, each conversation runs alone and its turns only encode what is new.
    `options` are those of `generate_answers`.
    """
    batch_size = 1 if with_cache else batch_size
    answers = []
    for start in tqdm(range(0, len(conversations), batch_size), desc="Conversing"):
        batch = conversations[start : start + batch_size]
        histories, given = [[] for _ in batch], [[] for _ in batch]
        cache = {"cache": DynamicCache(config=model.config)} if with_cache else {}
        for number in range(max(map(len, batch))):
            rows = [row for row, turns in enumerate(batch) if number < len(turns)]
            for row in rows:
                histories[row] += messages_of([batch[row][number]])[:1]
            texts = generate_answers(model, processor, [histories[row] for row in rows], **cache, **options)
            for row, text in zip(rows, texts, strict=True):
                turn = batch[row][number]
                histories[row].append({"role": "assistant", "content": text})
                scene = next((part for part in turn.content if isinstance(part, Scene)), None)
                given[row].append(Answer(scene, turn.kind, turn.question, turn.answer, text, turn.pictures))
        answers += given
    return answers


def accuracies(answers: list[Answer], column=lambda answer: answer.scene.layout) -> dict[str, dict[str, float]]:
    """
    The share of right answers by kind of question and column, a scene's layout if not given; `"all"` stands for all
    kinds or columns.
    """
    counts = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        for kind in (answer.kind, "all"):
            for name in (column(answer), "all"):
                counts[kind][name].append(answer.is_right)
    return {kind: {name: sum(right) / len(right) for name, right in row.items()} for kind, row in counts.items()}


def table(shares: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """The shares in per cent, with a row for each kind of question."""
    lines = [f"{'exact match, %':16}" + "".join(f"{column:>9}" for column in (*columns, "all"))]
    for kind in sorted(shares, key=lambda kind: kind == "all"):
        cells = (f"{100 * shares[kind][c]:9.1f}" if c in shares[kind] else f"{'':9}" for c in (*columns, "all"))
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
    parser.add_argument("--conversations", type=int, default=200, help="number of conversations (default: %(default)s)")
    parser.add_argument("--with-cache", action="store_true", help="keep a cache from turn to turn of a conversation")
    parser.add_argument("--dtype", default="float32", help="number type of the model (default: %(default)s)")
    parser.add_argument("--without-patches", action="store_true", help="show the model only the global views")
    parser.add_argument("--show", type=Path, metavar="FILE.png", help="save pictures with questions and answers")
    arguments = parser.parse_args()
    processor = AutoProcessor.from_pretrained(arguments.model)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype).eval()
    scenes = fresh_scenes(arguments.seed, arguments.scenes)
    answers = answer_scenes(model, processor, scenes, with_patches=not arguments.without_patches)
    print(table(accuracies(answers), list(LAYOUTS)))
    if arguments.conversations:
        conversations = fresh_conversations(arguments.seed, arguments.conversations)
        answered = answer_conversations(model, processor, conversations, with_cache=arguments.with_cache)
        turns = [answer for conversation in answered for answer in conversation]
        columns = {count: f"{count} pict." for count in range(MAX_PICTURES + 1)}
        print(f"\n{table(accuracies(turns, lambda answer: columns[answer.pictures]), list(columns.values()))}")
        right = sum(all(answer.is_right for answer in conversation) for conversation in answered)
        print(f"{100 * right / len(answered):.1f} % of {len(answered)} conversations are right in every turn")
    if arguments.show:
        save_png(contact_sheet(answers), arguments.show)


if __name__ == "__main__":
    main()
