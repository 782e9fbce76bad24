"""The scripts that draw scenes and train a small model on them."""

import itertools
import shutil

import draw_scene
import numpy as np
from conftest import run
from safetensors.torch import load_file


def test_a_scene_is_what_is_said_of_it():
    for seed, (layout, (cell, places)) in itertools.product(range(20), draw_scene.LAYOUTS.items()):
        scene = draw_scene.draw_scene(seed, layout)
        assert scene.image == draw_scene.draw_scene(seed, layout).image
        assert scene.image.size == (cell * len(places[0]), cell * len(places))
        # Halved, which evens out stripes; by place, the colours that are there and how wide they reach.
        pixels = np.asarray(scene.image.reduce(2)).astype(int)
        seen = {}
        side = cell // 2
        for row, names in enumerate(places):
            for column, name in enumerate(names):
                area = pixels[row * side : (row + 1) * side, column * side : (column + 1) * side]
                for colour, rgb in draw_scene.COLOURS.items():
                    columns = (abs(area - rgb).max(-1) <= 3).any(0).nonzero()[0]
                    if len(columns) > 3:
                        seen[name, colour] = "large" if np.ptp(columns) > 21 else "small"
        assert seen == {(shape.place, shape.colour): shape.size for shape in scene.shapes}
        described = [f"at the {place} a {size} {colour} " for (place, colour), size in seen.items()]
        answer = scene.questions["describe"][1].lower()
        assert [answer.find(part) for part in described] == sorted(answer.find(part) for part in described)
        assert answer.count(" a ") == len(described) and all(part in answer for part in described)
        assert scene.questions["count"][1] == ("One.", "Two.", "Three.")[len(seen) - 1]


def test_a_resumed_training_ends_where_an_undisturbed_one_does(tmp_path):
    assert run("train_tiny.py", tmp_path / "whole", "--steps", 3).returncode == 0
    nothing = run("train_tiny.py", tmp_path / "resumed", "--steps", 3, "--resume")
    assert nothing.returncode == 2 and "no training to resume" in nothing.stderr
    shutil.copytree(tmp_path / "whole-training" / "checkpoint-2", tmp_path / "resumed-training" / "checkpoint-2")
    unasked = run("train_tiny.py", tmp_path / "resumed", "--steps", 3)
    assert unasked.returncode == 2 and "--resume" in unasked.stderr
    result = run("train_tiny.py", tmp_path / "resumed", "--steps", 3, "--resume")
    assert result.returncode == 0, result.stderr
    before = load_file(tmp_path / "whole-training" / "checkpoint-2" / "model.safetensors")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    for name, start in before.items():
        # Muon computes in bfloat16; other data or a forgotten state would be as far off as the whole step.
        step, difference = (whole[name] - start).norm(), (whole[name] - resumed[name]).norm()
        assert step > 0 and difference <= 0.2 * step, name
