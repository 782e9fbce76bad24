"""`scripts/export_onnx.py`, and `scripts/run_onnx.py`, which answers with what it makes."""

import json

import numpy as np
import pytest
import torch
from conftest import python, run


pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

from describe import TINY
from draw_scene import save_png
from evaluate_tiny import fresh_scenes
from PIL import Image
from run_onnx import OnnxModel, plan, process
from transformers import AutoModelForImageTextToText, AutoProcessor

from step3_vl import Step3VLImageProcessor


# Runs a program as in an environment without this package and what it needs.
ALONE = "import sys; sys.modules.update(dict.fromkeys({}, None)); import runpy; "


def run_alone(program: str, *missing: str) -> str:
    result = python("-c", ALONE.format(missing) + program)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """step3-tiny, exported with every option."""
    directory = tmp_path_factory.mktemp("exported") / "onnx"
    result = run("export_onnx.py", directory, "--aoti")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in directory.parent.iterdir()] == ["onnx"]
    return directory


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForImageTextToText.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)


def test_onnxruntime_answers_as_generate_does_token_for_token(exported, tiny):
    model, processor = tiny
    exported = OnnxModel(exported)
    scenes = fresh_scenes(3, 3)  # one of each layout: two have patches
    prompts = [(question, [scene.image]) for scene in scenes for question, _ in scene.questions.values()]
    question = prompts[0][0]
    prompts += [(question, [scene.image for scene in scenes]), (question, [scenes[0].image] * 2), (question, [])]
    for question, images in prompts:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=256)
        assert exported.generate(question, images) == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_answer_ends_where_the_positions_do(exported):
    model = OnnxModel(exported)
    model.settings["longest_sequence"] = model.embed("Why?", []).shape[1] + 2
    assert len(model.generate("Why?", [])) <= 2
    model.settings["longest_sequence"] -= 2
    with pytest.raises(ValueError, match="leaves none of"):
        model.generate("Why?", [])


def test_a_picture_is_answered_without_torch_and_transformers(exported, tiny, tmp_path):
    scene = fresh_scenes(3, 2)[1]
    save_png(scene.image, tmp_path / "scene.png")
    question = next(iter(scene.questions.values()))[0]
    arguments = ["run_onnx.py", str(exported), question, str(tmp_path / "scene.png")]
    program = f"sys.argv = {arguments}; runpy.run_path('scripts/run_onnx.py', run_name='__main__')"
    output = run_alone(program, "torch", "transformers", "step3_vl")
    assert output.strip() == OnnxModel(exported).tokenizer.decode(OnnxModel(exported).generate(question, [scene.image]))


@pytest.mark.parametrize("options", [{}, {"resample": 3, "max_patches": 3}, {"do_patch": False, "max_pixels": 90000}])
@pytest.mark.parametrize("released", [False, True])
def test_pictures_are_processed_as_by_the_image_processor(tiny, options, released):
    processor = AutoProcessor.from_pretrained(TINY)
    if released:
        processor.image_processor = Step3VLImageProcessor(**options)
    else:
        settings = {**processor.image_processor.to_dict(), **options}
        processor.image_processor = Step3VLImageProcessor.from_dict(settings)
    settings = json.loads(json.dumps(processor.image_processor.to_dict()))
    # Padded; with a window of its shorter side; without patches; enlarged, and cut beyond its edge; scaled down.
    for size in ((150, 20), (25, 90), (240, 130), (230, 220), (800, 300), (70, 1100), (3100, 500)):
        image = Image.effect_noise(size, 80).convert("RGB")
        expected = processor.image_processor(image, return_tensors="np")
        pixels, patches, text = process(image, settings)
        np.testing.assert_allclose(pixels, expected["pixel_values"][0], atol=5e-6)
        assert len(patches) == expected["num_patches"][0]
        if len(patches):
            np.testing.assert_allclose(patches, expected["patch_pixel_values"], atol=5e-6)
        assert text == processor.text_of_image(expected.get("patch_newline_mask", []))
    choose = np.random.default_rng(0)
    for width, height in (2 ** choose.uniform(0, 12, (500, 2))).astype(int).tolist():
        expected = processor.image_processor.plan(width, height)
        expected = (expected.padded_size, expected.view_size, expected.cut_size, expected.window)
        assert plan(width, height, settings) == expected


def test_a_compiled_decoder_runs_without_transformers(exported, tiny):
    """A prompt, then a token, against the model."""
    model, _ = tiny
    embeddings, logits = (exported.parent / name for name in ("embeddings.pt", "logits.pt"))
    config = model.config.text_config
    empty = (1, config.num_attention_groups, 0, config.head_dim)
    program = f"""import torch
decoder = torch._inductor.aoti_load_package({str(exported / "decoder.pt2")!r})
embeddings = torch.load({str(embeddings)!r})
past = [[torch.zeros{empty}] * {config.num_hidden_layers}] * 2
_, *past = decoder(embeddings[:, :8], *past)
torch.save(decoder(embeddings[:, 8:], *past)[0], {str(logits)!r})
"""
    with torch.no_grad():
        torch.save(model.get_input_embeddings()(torch.arange(9)[None]), embeddings)
        run_alone(program, "transformers", "step3_vl")
        expected = model(torch.arange(9)[None]).logits[:, -1]
    torch.testing.assert_close(torch.load(logits), expected, atol=1e-4, rtol=1e-4)
