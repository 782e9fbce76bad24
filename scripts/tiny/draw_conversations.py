"""Draws scenes and writes conversations about them for `finetune.py`, with answers of a new kind for step3-tiny.

python scripts/tiny/draw_conversations.py DIRECTORY
"""

import argparse
import json
import random
import sys
from pathlib import Path

from draw_scene import NUMBERS, Scene, draw_scene, sentence


sys.path.append(str(Path(__file__).parents[1]))
from files import new_directory, replacing


QUESTION = "What is there?"
# The two files and step3-tiny's training data have no seed in common.
FIRST_SEEDS = {"train": 5 * 10**9, "test": 6 * 10**9}


def count_and_name(scene: Scene) -> str:
    """The new kind of answer: "Two. A large red circle at the top left, a small blue square at the right." """
    names = sentence(", ".join(f"{shape} at the {shape.place}" for shape in scene.shapes))
    return f"{sentence(NUMBERS[len(scene.shapes)])} {names}"


def draw_conversations(directory: Path, counts: dict[str, int], pairs: bool = False) -> None:
    """
    Writes `train.jsonl` and `test.jsonl` with `counts` conversations each, and their images, to `directory`. Every
    second training conversation has a question that step3-tiny knows, so that it does not forget those; in pairs, each
    answer of the new kind stands beside step3-tiny's own description, which is the worse one.
    """
    with replacing(directory) as unfinished:
        for name, count in counts.items():
            (unfinished / name).mkdir(parents=True)
            with (unfinished / f"{name}.jsonl").open("w", encoding="utf-8") as file:
                for number in range(count):
                    scene = draw_scene(FIRST_SEEDS[name] + number)
                    pair = QUESTION, count_and_name(scene)
                    if name == "train" and number % 2 and not pairs:
                        pair = random.Random(number).choice(list(scene.questions.values()))
                    picture = f"{name}/{number}.png"
                    scene.image.save(unfinished / picture)
                    question = {"role": "user", "content": f"<image>{pair[0]}"}
                    answer = {"role": "assistant", "content": pair[1]}
                    row = {"messages": [question, answer], "images": [picture]}
                    if pairs:
                        row["rejected_response"] = scene.questions["describe"][1]
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=new_directory, help="directory to create; must not exist yet")
    parser.add_argument("--train", type=int, default=2000, help="training conversations (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="test conversations (default: %(default)s)")
    parser.add_argument("--pairs", action="store_true", help="write a worse answer beside each, for DPO and KTO")
    arguments = parser.parse_args()
    draw_conversations(arguments.directory, {"train": arguments.train, "test": arguments.test}, arguments.pairs)


if __name__ == "__main__":
    main()
