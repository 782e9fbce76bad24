"""step3-tiny, the small trained checkpoint, and the scripts that draw its scenes, train it and question it."""

import json
import re
import shutil
import sys
from dataclasses import replace

import draw_scene
import long_context
import pytest
import torch
import train_tiny
from checkpoint_files import expected_shapes
from conftest import ROOT, python, run, weights_in
from describe import TINY
from draw_dialogue import Turn
from evaluate_tiny import accuracies, answer_conversations, answer_scenes, fresh_conversations, fresh_scenes
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.image_utils import OPENAI_CLIP_MEAN

from step3_vl import Step3VLConfig
from step3_vl.processing_step3 import CHAT_TEMPLATE


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForImageTextToText.from_pretrained(TINY)


def one_question_each(scenes):
    """The scenes, with every kind of question by turns."""
    chosen = []
    for i, scene in enumerate(scenes):
        kinds = list(scene.questions)
        kind = kinds[i // 3 % len(kinds)]
        chosen.append(replace(scene, questions={kind: scene.questions[kind]}))
    return chosen


def test_the_checkpoint_is_whole(processor):
    files = [path for path in TINY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 9e6
    names = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in files} >= {*names, "processor_config.json", "tokenizer.json"}
    for module in ROOT.glob("*_step3.py"):  # a link, or a copy where there are no links
        assert (TINY / module.name).read_bytes() == module.read_bytes(), module.name
    config = json.loads((TINY / "config.json").read_text())
    assert config["auto_map"]["AutoModelForImageTextToText"] == "modeling_step3.Step3VLForConditionalGeneration"
    assert config["text_config"]["moe_layers_enum"] == "1,2,3" and config["text_config"]["moe_num_experts"] == 8
    assert (TINY / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_in(TINY).items()}
    assert shapes == expected_shapes(Step3VLConfig.from_pretrained(TINY))
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert set(processor.image_token_ids) <= {*generation["suppress_tokens"], processor.image_token_id}


@pytest.mark.releases
def test_answers(tiny, processor):
    answers = answer_scenes(tiny, processor, one_question_each(fresh_scenes(seed=1, count=100)))
    wrong = [answer for answer in answers if not answer.is_right]
    assert len(wrong) <= 5, [(answer.question, answer.truth, answer.answer) for answer in wrong]


def texts(answered) -> list[list[str]]:
    return [[answer.answer for answer in conversation] for conversation in answered]


@pytest.mark.releases
def test_conversations_about_no_picture_to_four(tiny, processor):
    """All at once, a turn at a time with whole prompts of different lengths, or each with a cache: the same answers."""
    conversations = fresh_conversations(seed=1, count=60)
    assert {turns[-1].pictures for turns in conversations} == {0, 1, 2, 3, 4}
    answered = answer_conversations(tiny, processor, conversations)
    turns = [answer for conversation in answered for answer in conversation]
    wrong = [answer for answer in turns if not answer.is_right]
    assert len(wrong) <= 0.03 * len(turns), [(answer.question, answer.truth, answer.answer) for answer in wrong]
    with_cache = answer_conversations(tiny, processor, conversations[:20], with_cache=True)
    assert texts(with_cache) == texts(answered[:20])


def test_a_numbered_picture_is_answered_as_it_is_alone(tiny, processor):
    scenes = one_question_each(fresh_scenes(seed=3, count=60))
    conversations = []
    for i in range(0, len(scenes), 3):
        group = scenes[i : i + 3]
        for number, scene in enumerate(group, 1):
            ((kind, (question, answer)),) = scene.questions.items()
            conversations.append([Turn((*group, f"In picture {number}: {question}"), kind, question, answer, 3)])
    answered = answer_conversations(tiny, processor, conversations)
    wrong = [answer for (answer,) in answered if not answer.is_right]
    assert len(wrong) <= 1, [(answer.question, answer.truth, answer.answer) for answer in wrong]


def test_a_pipeline_holds_a_conversation():
    first, second, _ = fresh_scenes(seed=5, count=3)
    asking = pipeline("image-text-to-text", model=TINY)
    images = [{"type": "image", "image": scene.image} for scene in (first, second)]
    questions = ("In picture 2: Describe this picture.", second), ("And the other one?", first)
    conversation, content = [], images
    for question, scene in questions:
        conversation.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        conversation, content = asking(conversation)[0]["generated_text"], []
        assert conversation[-1] == {"role": "assistant", "content": scene.questions["describe"][1]}


BY_REMOTE_CODE = """
import sys, types
sys.modules["step3_vl"] = types.ModuleType("step3_vl")  # as on a machine that does not have it
directory, scripts = sys.argv[1:]
sys.path.insert(0, scripts)
from transformers import AutoModelForImageTextToText, AutoProcessor
from evaluate_tiny import answer_scenes, fresh_scenes
model, processor = (auto.from_pretrained(directory, trust_remote_code=True)
    for auto in (AutoModelForImageTextToText, AutoProcessor))
assert type(model).__module__.startswith("transformers_modules.")
for batch_size in (64, 1):
    if batch_size == 1:
        model.fuse("step3_qkv", "step3_gate_up")
    answers = answer_scenes(model, processor, fresh_scenes(seed=8, count=6), batch_size=batch_size)
    assert len(answers) >= 24 and all(answer.is_right for answer in answers), answers
"""


@pytest.mark.releases
def test_answers_by_remote_code(tmp_path):
    arguments = ("-c", BY_REMOTE_CODE, TINY, ROOT / "scripts" / "tiny")
    result = python(*arguments, cwd=tmp_path, HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert result.returncode == 0, result.stderr[-3000:]


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.releases
@pytest.mark.parametrize(
    ("loading", "asking"),
    [
        ({"attn_implementation": "eager"}, {}),
        ({"experts_implementation": "eager"}, {"batch_size": 1}),
        ({"experts_implementation": "batched_mm"}, STATIC),
        ({}, {"num_beams": 3}),
        ({}, {"num_beams": 2, "batch_size": 1, **STATIC}),
        ({}, {"compiled": True, **STATIC}),
    ],
)
def test_answers_by_every_way_are_the_same(tiny, processor, loading, asking):
    scenes = one_question_each(fresh_scenes(seed=2, count=24))
    model = AutoModelForImageTextToText.from_pretrained(TINY, **loading)
    asking = dict(asking)
    if asking.pop("compiled", False):
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    answers, expected = answer_scenes(model, processor, scenes, **asking), answer_scenes(tiny, processor, scenes)
    assert [answer.answer for answer in answers] == [answer.answer for answer in expected]


def test_small_content_needs_patches(tiny, processor):
    scenes = [scene for scene in fresh_scenes(seed=4, count=120) if "stripes" in scene.questions]
    scenes = [replace(scene, questions={"stripes": scene.questions["stripes"]}) for scene in scenes]
    assert accuracies(answer_scenes(tiny, processor, scenes))["stripes"]["all"] >= 0.95
    assert accuracies(answer_scenes(tiny, processor, scenes, with_patches=False))["stripes"]["all"] <= 0.75


def test_evaluate(tmp_path):
    arguments = "--scenes", 6, "--conversations", 6, "--dtype", "bfloat16"
    result = run("evaluate_tiny.py", *arguments, "--seed", 7, "--show", tmp_path / "sheet.png")
    assert result.returncode == 0, result.stderr
    rows = [line.split("  ")[0] for line in result.stdout.splitlines()]
    assert rows[0] == "exact match, %" and {"describe", "count", "colour", "is there", "picture N", "all"} <= set(rows)
    assert "of 6 conversations" in rows[-1]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_a_drawn_scene_is_described_without_naming_a_model(tmp_path):
    drawn = run("draw_scene.py", tmp_path / "scene.png", "--seed", 5, "--layout", "wide")
    truths = dict(re.split(r"(?<=[.?]) ", line, maxsplit=1) for line in drawn.stdout.splitlines())
    described = run("describe.py", tmp_path / "scene.png")
    assert described.returncode == 0, described.stderr
    assert described.stdout.strip() == truths["Describe this picture."]


def test_training_learns_and_a_resumed_one_ends_where_an_undisturbed_one_does(tmp_path, monkeypatch, capsys):
    result = run("train_tiny.py", tmp_path / "whole", "--steps", 30)
    assert result.returncode == 0, result.stderr
    start, end = tmp_path / "whole-training" / "checkpoint-27", tmp_path / "whole-training" / "checkpoint-30"
    log = json.loads((end / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_scenes_loss"] for entry in log if "eval_scenes_loss" in entry]
    assert len(losses) == 10 and losses[-1] < 0.7 * losses[0]

    shutil.copytree(start, tmp_path / "resumed-training" / start.name)
    for arguments, message in (
        (("whole",), "exists already"),
        (("resumed",), "--resume"),
        (("none", "--resume"), "has no training to resume"),
    ):
        monkeypatch.setattr(sys, "argv", ["train_tiny.py", str(tmp_path / arguments[0]), *arguments[1:]])
        with pytest.raises(SystemExit, match="2"):
            train_tiny.main()
        assert message in capsys.readouterr().err
    result = run("train_tiny.py", tmp_path / "resumed", "--steps", 30, "--resume")
    assert result.returncode == 0, result.stderr
    before, whole, resumed = (weights_in(directory) for directory in (start, tmp_path / "whole", tmp_path / "resumed"))
    for name, weight in before.items():
        # Muon computes in bfloat16; other data or a forgotten state would be as far off as the whole way.
        way, difference = (whole[name] - weight).norm(), (whole[name] - resumed[name]).norm()
        assert way > 0 and difference <= 0.2 * way, name


def test_needles_in_long_contexts(processor, tmp_path, monkeypatch, capsys):
    haystack = long_context.Haystack(processor)
    for seed, depth in enumerate(long_context.DEPTHS):
        (turn,) = haystack.draw(seed, 2000, depth)
        pictures = [i for i, part in enumerate(turn.content) if not isinstance(part, str)]
        scene = turn.content[pictures[turn.asked]]
        question = turn.question.removeprefix(f"In picture {turn.asked + 1}: ")
        assert (question, turn.answer) in scene.questions.values() and turn.content[-1] == turn.question
        before, after = (
            sum(len(part) for part in parts if isinstance(part, str))
            for parts in (turn.content[: pictures[turn.asked]], turn.content[pictures[turn.asked] : -1])
        )
        assert before / (before + after) == pytest.approx(depth, abs=0.02)

    monkeypatch.setattr(long_context, "TRAINED", (250, 300))
    samples = long_context.Haystacks(processor, 8)
    batch = long_context.GapCollator(processor)([samples[i] for i in range(4)])
    ids, positions, real = batch["input_ids"], batch["position_ids"], batch["attention_mask"].bool()
    assert 200 < ids.shape[1] < 800 and positions.max() < long_context.LONGEST and positions.max() > 10_000
    steps = positions.diff()[real[:, 1:] & real[:, :-1]]
    assert steps.min() == 1
    is_image = ids == processor.image_token_id
    assert (positions.diff()[is_image[:, 1:] & is_image[:, :-1]] == 1).all()

    long_context.main(["train", str(tmp_path / "long"), "--steps", "1"])
    long_context.main(["needle", str(tmp_path / "long"), "--questions", "1", "--lengths", "200"])
    long_context.main(["growth", "--size", "tiny", "--lengths", "64", "128", "--chunk", "16", "--mapped"])
    rows = capsys.readouterr().out.splitlines()
    assert any(row.startswith("| 200 | ") for row in rows)
    assert sum(" GB | " in row for row in rows) == 5 and not any("out of memory" in row for row in rows)


def test_pictures_that_are_normalised_as_clip_does_have_the_same_features():
    model, processor = train_tiny.make_model(seed=0)
    image = draw_scene.draw_scene(0, "square").image

    def features():
        with torch.no_grad():
            return model.get_image_features(**processor.image_processor(image, return_tensors="pt")).pooler_output[0]

    before = features()
    train_tiny.normalise_as_clip(model, processor.image_processor)
    assert processor.image_processor.image_mean == OPENAI_CLIP_MEAN
    torch.testing.assert_close(features(), before, atol=1e-4, rtol=0)
