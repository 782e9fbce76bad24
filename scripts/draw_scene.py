"""Draws a random scene of coloured shapes, and prints what can be asked about it and the answers.

python scripts/draw_scene.py scene.png --seed 7 --layout wide
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 220, 30),
    "purple": (148, 60, 190),
    "black": (20, 20, 20),
}
# Half a shape's width, as a share of the cell that it stands in.
SIZES = {"small": 0.2, "large": 0.4}
SQUARE_PLACES = tuple(
    (f"{row} {column}".replace("middle middle", "middle"))
    for row in ("top", "middle", "bottom")
    for column in ("left", "middle", "right")
)
# For each layout: width and height in pixels, columns and rows of cells, and what the places are called.
LAYOUTS = {
    "square": ((224, 224), (3, 3), SQUARE_PLACES),
    "wide": ((336, 112), (3, 1), ("left", "middle", "right")),
    "tall": ((112, 336), (1, 3), ("top", "middle", "bottom")),
}
NUMBERS = ("no", "one", "two", "three")
# A shape's mark is this many pixels wide: seen in a patch, lost in the global view of an elongated picture.
MARK_WIDTH = 6


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str
    place: str
    mark: str | None = None

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """A picture, its shapes in reading order, and pairs of questions and answers by kind of question."""

    layout: str
    image: Image.Image
    shapes: tuple[Shape, ...]
    questions: dict[str, tuple[str, str]]


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a shape around (x, y) that reaches `radius` pixels."""
    if kind == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        return [(x + 0.85 * radius * a, y + 0.85 * radius * b) for a, b in corners]
    if kind == "triangle":
        return [(x, y - radius), (x + radius, y + 0.9 * radius), (x - radius, y + 0.9 * radius)]
    if kind == "cross":
        a, b = radius / 3, radius
        corners = [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
        return [(x + dx, y + dy) for dx, dy in corners]
    points = 10 if kind == "star" else 40  # a circle is a polygon of many corners
    return [
        (
            x + radius * (0.42 if kind == "star" and i % 2 else 1) * math.sin(2 * math.pi * i / points),
            y - radius * (0.42 if kind == "star" and i % 2 else 1) * math.cos(2 * math.pi * i / points),
        )
        for i in range(points)
    ]


def draw_scene(seed: int, layout: str | None = None) -> Scene:
    """A scene of one to three shapes in different places, the same for the same `seed` and `layout`."""
    choose = random.Random(f"{seed} {layout}")
    layout = layout or choose.choices(list(LAYOUTS), weights=(2, 1, 1))[0]
    (width, height), (columns, rows), places = LAYOUTS[layout]

    level = choose.randint(150, 255)
    background = np.full((height, width, 3), level, dtype=np.float32)
    background += np.array([choose.randint(-20, 20) for _ in range(3)], dtype=np.float32)
    if choose.random() < 0.5:
        background += np.random.default_rng(choose.getrandbits(32)).normal(0, choose.randint(4, 20), background.shape)
    # Drawn at twice the size and halved, for smooth edges.
    image = Image.fromarray(background.clip(0, 255).astype(np.uint8)).resize((2 * width, 2 * height))
    pen = ImageDraw.Draw(image)

    cells = sorted(choose.sample(range(len(places)), choose.randint(1, 3)))
    cell = min(width / columns, height / rows)
    shapes = []
    for index in cells:
        kind, colour, size = choose.choice(KINDS), choose.choice(list(COLOURS)), choose.choice(list(SIZES))
        radius = cell * SIZES[size] * choose.uniform(0.9, 1.1)
        room = 0.45 * cell - radius
        x = (index % columns + 0.5) * width / columns + choose.uniform(-room, room)
        y = (index // columns + 0.5) * height / rows + choose.uniform(-room, room)
        pen.polygon(outline(kind, 2 * x, 2 * y, 2 * radius), fill=COLOURS[colour])
        mark = None
        if layout != "square":  # where there are patches to see it
            mark = choose.choice([name for name in COLOURS if name != colour])
            pen.rectangle(
                (2 * x - MARK_WIDTH, 2 * y - MARK_WIDTH, 2 * x + MARK_WIDTH, 2 * y + MARK_WIDTH), fill=COLOURS[mark]
            )
        shapes.append(Shape(kind, colour, size, places[index], mark))
    image = image.resize((width, height), Image.Resampling.BOX)
    return Scene(layout, image, tuple(shapes), ask(choose, shapes))


def ask(choose: random.Random, shapes: list[Shape]) -> dict[str, tuple[str, str]]:
    """A question of each kind that has one answer, and the answer."""
    described = ", ".join(f"{shape} at the {shape.place}" for shape in shapes)
    questions = {
        "describe": ("Describe this picture.", described[0].upper() + described[1:] + "."),
        "count": ("How many shapes are there?", NUMBERS[len(shapes)].capitalize() + "."),
    }
    kinds = [shape.kind for shape in shapes]
    single = [shape for shape in shapes if kinds.count(shape.kind) == 1]
    if single:
        shape = choose.choice(single)
        questions["colour"] = (f"What colour is the {shape.kind}?", shape.colour.capitalize() + ".")
        if shape.mark:
            questions["mark"] = (f"What colour is the mark on the {shape.kind}?", shape.mark.capitalize() + ".")
    present = choose.random() < 0.5
    pairs = {(shape.colour, shape.kind) for shape in shapes}
    if present:
        colour, kind = choose.choice(sorted(pairs))
    else:  # half the time near misses: the colour or the kind of a shape that is there
        colour, kind = choose.choice(list(COLOURS)), choose.choice(KINDS)
        if choose.random() < 0.5:
            near = choose.choice(shapes)
            colour, kind = choose.choice([(near.colour, kind), (colour, near.kind)])
    questions["is there"] = (f"Is there a {colour} {kind}?", "Yes." if (colour, kind) in pairs else "No.")
    return questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="where to save it, as PNG")
    parser.add_argument("--seed", type=int, help="draw this scene (default: any)")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="shape of the picture (default: any)")
    arguments = parser.parse_args()
    seed = random.getrandbits(32) if arguments.seed is None else arguments.seed
    scene = draw_scene(seed, arguments.layout)
    scene.image.save(arguments.picture)
    for question, answer in scene.questions.values():
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
