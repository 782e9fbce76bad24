"""`step3 experts` counts what the router chose, of the conversations' own tokens."""

import json

import torch
from conftest import run
from describe import TINY
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def test_counts_are_those_of_each_conversation_alone(tmp_path):
    Image.effect_noise((300, 100), 80).convert("RGB").save(tmp_path / "noise.png")
    questions = ["<image>Describe this picture.", "How many shapes are there?", "<image>Why?"]
    pictures = [[tmp_path / "noise.png"], [], [tmp_path / "noise.png"]]
    answer = {"role": "assistant", "content": "A large red circle."}
    rows = [
        {"messages": [{"role": "user", "content": question}, answer], "images": list(map(str, images))}
        for question, images in zip(questions, pictures)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--batch-size", 2, "--output", tmp_path / "counts.json", "--picture", tmp_path / "heat.png")
    result = run("experts.py", TINY, tmp_path / "data.jsonl", *options)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "counts.json").read_text())

    model, processor = AutoModelForImageTextToText.from_pretrained(TINY), AutoProcessor.from_pretrained(TINY)
    text = model.config.text_config
    expected, num_tokens = torch.zeros(len(text.moe_layers), text.moe_num_experts, dtype=torch.long), 0
    for row, question, images in zip(rows, questions, pictures):
        content = question.replace("<image>", processor.image_token)
        prompt = processor.apply_chat_template([{"role": "user", "content": content}, row["messages"][1]])
        inputs = processor(text=prompt, images=images or None, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, output_router_logits=True).router_logits
        num_tokens += inputs["input_ids"].shape[1]
        for layer, layer_logits in enumerate(logits):
            for chosen in layer_logits.argsort(-1, descending=True)[:, : text.moe_top_k]:
                expected[layer, chosen] += 1
    assert written == {"layers": text.moe_layers, "counts": expected.tolist()}
    assert expected.sum(1).tolist() == [num_tokens * text.moe_top_k] * len(text.moe_layers)
    lines = result.stdout.splitlines()
    for line, layer, row in zip(lines[1:], text.moe_layers, expected, strict=True):
        most, least = int(row.argmax()), int(row.argmin())
        share = row.sort().values[-2:].sum() / row.sum()  # two of eight experts
        shown = [layer, f"{row[most] / row.sum():.2%}", "of", most, f"{row[least] / row.sum():.2%}", "of", least]
        assert line.split() == [*map(str, shown), f"{share:.1%}", str(int((row == 0).sum()))]
    with Image.open(tmp_path / "heat.png") as heat:
        cells = heat.crop((36, 36, heat.width, heat.height)).resize((8, 3), Image.Resampling.NEAREST)
    darkest = torch.tensor([[cells.getpixel((x, y))[1] for x in range(8)] for y in range(3)]).argmin(1)
    assert darkest.tolist() == expected.argmax(1).tolist()


def test_faults_are_told_before_anything_is_counted(tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    result = run("experts.py", TINY, tmp_path / "data.jsonl", "--output", tmp_path / "counts.json")
    assert result.returncode == 2 and "data.jsonl:1" in result.stderr and "Traceback" not in result.stderr
    long = [{"role": "user", "content": "word " * 3000}, {"role": "assistant", "content": "Two."}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": long}))
    result = run("experts.py", TINY, tmp_path / "data.jsonl", "--output", tmp_path / "counts.json")
    assert result.returncode == 2 and "tokens, more than 2048" in result.stderr, result.stderr
    assert not (tmp_path / "counts.json").exists()
    result = run("experts.py", TINY, tmp_path / "data.jsonl", "--batch-size", -1)
    assert result.returncode == 2 and "--batch-size must be at least 1" in result.stderr
