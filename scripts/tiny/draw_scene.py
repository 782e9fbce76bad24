"""Draws a random scene of coloured shapes, and prints what can be asked about it and the answers.

python scripts/tiny/draw_scene.py scene.png --seed 7 --layout wide
"""

import argparse
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


sys.path.append(str(Path(__file__).parents[1]))
from files import replacing


KINDS = ("circle", "square", "triangle", "star", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 200),
    "yellow": (215, 195, 40),
    "purple": (148, 60, 190),
    "black": (40, 40, 40),
}
# Half a shape's width in pixels.
SIZES = {"small": 20, "large": 33}
# For each layout: the side of a cell in pixels, and what the cells are called, row by row.
LAYOUTS = {
    "square": (
        80,
        (("top left", "top", "top right"), ("left", "centre", "right"), ("bottom left", "bottom", "bottom right")),
    ),
    "wide": (160, (("left", "centre", "right"),)),
    "tall": (160, (("top",), ("centre",), ("bottom",))),
}
NUMBERS = ("no", "one", "two", "three")
# A shape's centre is up to so many pixels off its cell's.
JITTER = 8
# Stripes are lighter and darker lines of one pixel by so much, across the longer side of an elongated picture: plain to
# see in a patch, and exactly evened out in the global view, which halves that side.
STRIPES = 40


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    size: str
    place: str
    is_striped: bool = False

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
    cell, places = LAYOUTS[layout]
    height, width = cell * len(places), cell * len(places[0])

    level = choose.randint(150, 255)
    pixels = np.full((height, width, 3), [level + choose.randint(-20, 20) for _ in range(3)], dtype=np.float32)
    if choose.random() < 0.5:
        noise = np.random.default_rng(choose.getrandbits(32)).standard_normal((height, width, 1), dtype=np.float32)
        pixels += choose.randint(4, 20) * noise

    cells = [(row, column) for row in range(len(places)) for column in range(len(places[0]))]
    shapes = []
    for row, column in sorted(choose.sample(cells, choose.randint(1, 3))):
        kind, colour, size = choose.choice(KINDS), choose.choice(list(COLOURS)), choose.choice(list(SIZES))
        shape = Shape(kind, colour, size, places[row][column], layout != "square" and choose.random() < 0.5)
        radius = SIZES[size] * choose.uniform(0.93, 1.07)
        room = min(cell / 2 - 4 - radius, JITTER)
        centre = (cell / 2 + choose.uniform(-room, room), cell / 2 + choose.uniform(-room, room))
        # Drawn at four times the size, for smooth edges.
        mask = Image.new("L", (4 * cell, 4 * cell))
        ImageDraw.Draw(mask).polygon(outline(kind, *(4 * x for x in centre), 4 * radius), fill=255)
        opacity = np.asarray(mask.reduce(4), dtype=np.float32)[..., None] / 255
        paint = np.broadcast_to(np.array(COLOURS[colour], dtype=np.float32), (cell, cell, 3)).copy()
        if shape.is_striped:
            lines = paint.swapaxes(0, 1) if layout == "wide" else paint
            lines[::2] += STRIPES
            lines[1::2] -= STRIPES
        area = pixels[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        area += opacity * (paint - area)
        shapes.append(shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return Scene(layout, image, tuple(shapes), ask(choose, layout, shapes))


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def ask(choose: random.Random, layout: str, shapes: Sequence[Shape]) -> dict[str, tuple[str, str]]:
    """A question of each kind that has one answer, and the answer."""
    questions = {
        "describe": ("Describe this picture.", sentence(", ".join(f"at the {s.place} {s}" for s in shapes))),
        "count": ("How many shapes are there?", sentence(NUMBERS[len(shapes)])),
    }
    kinds = [shape.kind for shape in shapes]
    single = [shape for shape in shapes if kinds.count(shape.kind) == 1]
    if single:
        shape = choose.choice(single)
        questions["colour"] = (f"What colour is the {shape.kind}?", sentence(shape.colour))
        if layout != "square":
            shape = choose.choice(single)
            questions["stripes"] = (f"Is the {shape.kind} striped?", "Yes." if shape.is_striped else "No.")
    by_place = {shape.place: shape for shape in shapes}
    place = choose.choice([place for row in LAYOUTS[layout][1] for place in row])
    if choose.random() < 0.5:
        place = choose.choice(shapes).place
    questions["place"] = (f"What is at the {place}?", sentence(str(by_place.get(place, "nothing"))))

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


def save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="where to save it, as PNG")
    parser.add_argument("--seed", type=int, help="draw this scene (default: any)")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="shape of the picture (default: any)")
    arguments = parser.parse_args()
    seed = random.getrandbits(32) if arguments.seed is None else arguments.seed
    scene = draw_scene(seed, arguments.layout)
    save_png(scene.image, arguments.picture)
    for question, answer in scene.questions.values():
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
