"""Draws a random scene of coloured shapes, and prints questions about it with their answers.

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
# For each layout: the side of a cell in pixels, and the names of the cells by row.
SQUARE = ("top left", "top", "top right"), ("left", "centre", "right"), ("bottom left", "bottom", "bottom right")
LAYOUTS = {
    "square": (80, SQUARE),
    "wide": (160, (("left", "centre", "right"),)),
    "tall": (160, (("top",), ("centre",), ("bottom",))),
}
NUMBERS = ("none", "one", "two", "three", "four")
# Largest distance in pixels between the centres of a shape and its cell.
JITTER = 8
# How much lighter and darker stripes are than their shape. They are one pixel wide and lie across the longer side of an
# elongated picture: patches show them, but the global view, which halves that side, averages them out.
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
    """An image, its shapes in reading order, and a question with its answer for each kind of question."""

    layout: str
    image: Image.Image
    shapes: tuple[Shape, ...]
    questions: dict[str, tuple[str, str]]


def outline(kind: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The corners of a shape around (x, y) that reaches `radius` pixels."""
    if kind == "square":
        corners = [(-0.85 * radius, -0.85 * radius), (0.85 * radius, -0.85 * radius)]
        corners += [(0.85 * radius, 0.85 * radius), (-0.85 * radius, 0.85 * radius)]
    elif kind == "triangle":
        corners = [(0, -radius), (radius, 0.9 * radius), (-radius, 0.9 * radius)]
    elif kind == "cross":
        third = radius / 3
        corners = [(-third, -radius), (third, -radius), (third, -third)]
        for _ in range(3):  # a quarter turn each
            corners += [(-b, a) for a, b in corners[-3:]]
    else:
        points = 10 if kind == "star" else 40  # a circle is drawn as a polygon
        radii = [radius * (0.42 if kind == "star" and i % 2 else 1) for i in range(points)]
        angles = [2 * math.pi * i / points for i in range(points)]
        corners = [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]
    return [(x + a, y + b) for a, b in corners]


def draw_shape(choose: random.Random, place: str, layout: str) -> Shape:
    kind, colour, size = choose.choice(KINDS), choose.choice(list(COLOURS)), choose.choice(list(SIZES))
    return Shape(kind, colour, size, place, layout != "square" and choose.random() < 0.5)


def draw_scene(seed: int, layout: str | None = None, shapes: Sequence[Shape] | None = None) -> Scene:
    """A scene of `shapes`, by default one to three in different places, determined by `seed` and `layout`."""
    choose = random.Random(f"{seed} {layout}")
    layout = layout or choose.choices(list(LAYOUTS), weights=(2, 1, 1))[0]
    cell, places = LAYOUTS[layout]
    height, width = cell * len(places), cell * len(places[0])

    level = choose.randint(150, 255)
    pixels = np.full((height, width, 3), [level + choose.randint(-20, 20) for _ in range(3)], dtype=np.float32)
    if choose.random() < 0.5:
        noise = np.random.default_rng(choose.getrandbits(32)).standard_normal((height, width, 1), dtype=np.float32)
        pixels += choose.randint(4, 20) * noise

    cells = {name: (row, column) for row, names in enumerate(places) for column, name in enumerate(names)}
    if shapes is None:
        chosen = sorted(choose.sample(list(cells), choose.randint(1, 3)), key=cells.get)
        given = {}
    else:
        given = {shape.place: shape for shape in shapes}
        chosen = list(given)
    shapes = []
    for place in chosen:
        row, column = cells[place]
        shape = given.get(place) or draw_shape(choose, place, layout)
        radius = SIZES[shape.size] * choose.uniform(0.93, 1.07)
        room = min(cell / 2 - 4 - radius, JITTER)
        centre = (cell / 2 + choose.uniform(-room, room), cell / 2 + choose.uniform(-room, room))
        # Drawn at four times the size for smooth edges.
        mask = Image.new("L", (4 * cell, 4 * cell))
        ImageDraw.Draw(mask).polygon(outline(shape.kind, *(4 * x for x in centre), 4 * radius), fill=255)
        opacity = np.asarray(mask.reduce(4), dtype=np.float32)[..., None] / 255
        paint = np.broadcast_to(np.array(COLOURS[shape.colour], dtype=np.float32), (cell, cell, 3)).copy()
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
    """A question with its answer for each kind of question that has a single answer."""
    questions = {
        "describe": (
            "Describe this picture.",
            sentence(", ".join(f"at the {s.place} {s}" for s in shapes) or "there are no shapes"),
        ),
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
    if shapes and choose.random() < 0.5:
        place = choose.choice(shapes).place
    questions["place"] = (f"What is at the {place}?", sentence(str(by_place.get(place, "nothing"))))

    pairs = {(shape.colour, shape.kind) for shape in shapes}
    if pairs and choose.random() < 0.5:
        colour, kind = choose.choice(sorted(pairs))
    else:  # half of them near misses, with the colour or the kind of a shape in the scene
        colour, kind = choose.choice(list(COLOURS)), choose.choice(KINDS)
        if pairs and choose.random() < 0.5:
            near = choose.choice(shapes)
            colour, kind = choose.choice([(near.colour, kind), (colour, near.kind)])
    questions["is there"] = (f"Is there a {colour} {kind}?", "Yes." if (colour, kind) in pairs else "No.")
    return questions


def save_png(image: Image.Image, path: Path) -> None:
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument("--seed", type=int, help="number of the scene (default: random)")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="shape of the picture (default: random)")
    arguments = parser.parse_args()
    seed = random.getrandbits(32) if arguments.seed is None else arguments.seed
    scene = draw_scene(seed, arguments.layout)
    save_png(scene.image, arguments.picture)
    for question, answer in scene.questions.values():
        print(f"{question} {answer}")


if __name__ == "__main__":
    main()
