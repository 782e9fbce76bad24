"""`scripts/export_onnx.py`, and a model in onnxruntime that answers."""

import numpy as np
import pytest
import torch
from conftest import PICTURES, run


onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")

from describe import TINY
from draw_scene import draw_scene
from transformers import AutoModelForImageTextToText, AutoProcessor


def test_the_parts_answer_together_in_onnxruntime(tmp_path):
    result = run("export_onnx.py", tmp_path / "onnx")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]

    def part(name: str, argument: np.ndarray) -> np.ndarray:
        session = sessions.setdefault(name, onnxruntime.InferenceSession(tmp_path / "onnx" / f"{name}.onnx"))
        return session.run(None, {session.get_inputs()[0].name: argument})[0]

    sessions, processor = {}, AutoProcessor.from_pretrained(TINY)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    end = processor.tokenizer.convert_tokens_to_ids("<|EOT|>")
    for layout in ("square", "wide"):  # without patches and with them
        scene = draw_scene(2 * 10**9 + 3, layout)
        for question, answer in scene.questions.values():
            content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            inputs = processor.apply_chat_template(messages, return_tensors="np", **options)
            # One picture: its patches' features come first.
            features = [part("patch_encoder", inputs["patch_pixel_values"])] if layout == "wide" else []
            features.append(part("picture_encoder", inputs["pixel_values"]))
            features = [rows.reshape(-1, rows.shape[-1]) for rows in features]
            embeddings = part("embeddings", inputs["input_ids"])
            embeddings[inputs["input_ids"] == processor.image_token_id] = np.concatenate(features)
            tokens = []
            while tokens[-1:] != [end] and len(tokens) < 40:
                tokens.append(int(part("text_model", embeddings)[0, -1].argmax()))
                embeddings = np.concatenate([embeddings, part("embeddings", np.array([tokens[-1:]]))], axis=1)
            assert processor.decode(tokens, skip_special_tokens=True) == answer


def test_all_pictures_are_one_program_for_any_number_of_patches():
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    model.model.max_encoder_bytes = {"cuda": 2**62}

    class Pictures(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model.model.eval()

        def forward(self, pixel_values, patch_pixel_values, num_patches):
            return torch.cat(self.model.get_image_features(pixel_values, patch_pixel_values, num_patches).pooler_output)

    def pictures(*layouts: str) -> tuple[torch.Tensor, ...]:
        images = [draw_scene(i, layout).image for i, layout in enumerate(layouts)]
        inputs = processor.image_processor(images, return_tensors="pt")
        return tuple(inputs[name] for name in PICTURES)

    dynamic = ({0: torch.export.Dim.DYNAMIC},) * 3
    program = torch.export.export(Pictures(), pictures("wide", "tall"), dynamic_shapes=dynamic).module()
    for layouts in (("wide", "square", "square"), ("square", "tall", "wide", "tall", "wide")):
        with torch.no_grad():
            torch.testing.assert_close(program(*pictures(*layouts)), Pictures()(*pictures(*layouts)), atol=1e-4, rtol=0)
