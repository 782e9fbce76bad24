import base64
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO

import pytest
from conftest import ROOT, run


pytest.importorskip("peft")
pytest.importorskip("trl")

import finetune_lora
import torch
from conversations import check_pictures, check_tokens, read_conversations
from describe import TINY
from draw_scene import draw_scene
from finetune_lora import Collator
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel


pytestmark = pytest.mark.releases
OPTIONS = ("--target", "attention,mlp,experts", "--epochs", 5, "--save-steps", 15, "--learning-rate", 5e-3)
QUESTION, ANSWER = "What is there?", "Yes, a star."


def user(content, **more) -> dict:
    return {"role": "user", "content": content, **more}


def assistant(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


def write_lines(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and conversations in which every answer is the same."""
    folder = tmp_path_factory.mktemp("data")
    for number, layout in enumerate(["square", "wide", "tall"] * 20):
        draw_scene(number, layout).image.save(folder / f"{number}.png")
    rows = [{"messages": [user(f"<image>{QUESTION}"), assistant(ANSWER)], "images": [f"{n}.png"]} for n in range(60)]
    write_lines(folder / "train.jsonl", rows[:48])
    write_lines(folder / "test.jsonl", rows[48:])
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    result = finetune(folder, "trained", *OPTIONS, "--merge")
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def finetune(folder, output, *options):
    data = (folder / "train.jsonl", folder / output, "--eval", folder / "test.jsonl")
    return run("finetune_lora.py", TINY.relative_to(ROOT), *data, *options)


def test_every_fault_is_told_before_anything_is_loaded(folder, tmp_path):
    picture = (folder / "0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(picture[: len(picture) // 2])
    Image.new("1", (20000, 10000)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.png")
    good = [user("Hello."), assistant("Two.")]
    cases = [
        (b'{"messages": [', "is not JSON"),
        (b'{"messages": "\xff"}', "is not UTF-8"),
        (b'{"messages": [], "messages": []}', 'has the key "messages" twice'),
        (b'{"a":' + b"[" * 100_000, "is nested too deeply"),
        ({"messages": []}, "`messages` must be a list with at least one"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "message 1: the role must be system, user or assistant"),
        ({"messages": [*good, *good[::-1]]}, "message 3 (assistant): it is the user's turn"),
        ({"messages": [user("<image>?"), assistant("Two.")]}, "has 0 in `images`, and 1 placeholders"),
        ({"messages": good, "images": [str(folder / "0.png")]}, "has 1 in `images`, and 0 placeholders"),
        ({"messages": [user("Hello."), assistant(" ")]}, "message 2 (assistant): is empty"),
        ({"messages": [user("Hello.")]}, "has no assistant's message"),
        ({"messages": [*good, user("And?")]}, "ends with the user's message"),
        ({"messages": [user("\ud800"), assistant("Two.")]}, "half of a surrogate pair"),
        ({"messages": [user([{"type": "video", "video": "a.mp4"}]), assistant("Two.")]}, "a part must be of the type"),
        *(
            ({"messages": [user("<image>"), assistant("Two.")], "images": [name]}, message)
            for name, message in [
                ("none.png", 'no image at "none.png"'),
                ("broken.png", "broken.png cannot be read"),
                ("huge.png", "huge.png cannot be read: DecompressionBombError"),
                ("pipe.png", 'no image at "pipe.png"'),
                ("https://example.com/a.png", "download it first"),
                ("data:image/png;base64,?", "is not base64"),
            ]
        ),
    ]
    for first in range(0, len(cases), 10):
        rows = cases[first : first + 10]
        data = write_lines(tmp_path / "data.jsonl", [row for row, _ in rows])
        result = run("finetune_lora.py", tmp_path / "no model", data, tmp_path / "out")
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        faults = [line for line in result.stderr.splitlines() if line.startswith(str(data))]
        for number, (_, message) in enumerate(rows, 1):
            assert any(line.startswith(f"{data}:{number}: ") and message in line for line in faults), (message, faults)
        assert not (tmp_path / "out").exists()


def with_part(**part) -> dict:
    return {"messages": [user([part, {"type": "text", "text": "One?"}]), assistant("Two.")], "images": ["0.png"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(
            ({"messages": [user("Hello."), assistant("Two.")], key: value}, f'has "{key}", and only messages, ')
            for key, value in [
                ("tools", [1]),
                ("videos", ["a.mp4"]),
                ("objects", {"bbox": [[1, 2, 3, 4]]}),
                ("rejected_response", "No."),
                ("rejected", [assistant("No.")]),
                ("label", False),
            ]
        ),
        *(
            ({"messages": [user("Hello."), assistant("Two.", **{key: value})]}, f'(assistant): has "{key}", and only')
            for key, value in [("reasoning", "1 + 1"), ("thinking", "1 + 1"), ("loss_scale", 0.0)]
        ),
        ({"messages": [user("<image>?", images=["0.png"]), assistant("Two.")]}, '(user): has "images", and only role,'),
        ({"messages": [user("Hello.", loss=True), assistant("Two.")]}, '(user): has "loss", and only role,'),
        ({"messages": [user("<video>One?"), assistant("Two.")]}, "(user): has <video> in its text"),
        ({"messages": [user([{"type": "text", "text": "?", "image": "0.png"}]), assistant("2")]}, 'has "image", and'),
        (with_part(type="image", max_pixels=9), 'has "max_pixels", and only'),
        (with_part(type="image", source="0.png"), 'has "source", and only'),
        (with_part(type="image_url", image_url={"url": "0.png", "detail": "low"}), 'has "detail", and only url'),
    ],
)
def test_nothing_in_a_line_is_lost(folder, tmp_path, row, message):
    faults = []
    assert not read_conversations(write_lines(folder / "lost.jsonl", [row]), faults)
    assert len(faults) == 1 and faults[0].startswith(f"{folder / 'lost.jsonl'}:1: ") and message in faults[0], faults


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--seed", value) for value in ("-1", str(2**32), "0.5")),
        *(("--epochs", value) for value in ("inf", "nan", "0", "1e300")),
        *(("--save-steps", value) for value in ("inf", "nan", "0", "-1", "1.5")),
        *(("--learning-rate", value) for value in ("inf", "nan", "0", "2")),
        *(("--rank", value) for value in ("0", "129", "1000000000")),
        *((option, "0") for option in ("--batch-size", "--gradient-accumulation", "--max-length", "--ask")),
    ],
)
def test_numbers_that_mean_nothing_are_refused(folder, tmp_path, monkeypatch, capsys, option, value):
    command = ["finetune_lora.py", str(TINY), str(folder / "train.jsonl"), str(tmp_path / "out"), option, value]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        finetune_lora.main()
    assert stopped.value.code == 2 and option in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_only_a_tokenizer_tells(folder, tmp_path):
    rows = [
        {"messages": [user("<image>" * 3), assistant("Two.")], "images": [str(folder / "1.png")] * 3},
        {"messages": [user("Hello.<|EOT|>"), assistant("Two.")]},
        {"messages": [user([{"type": "text", "text": text} for text in ("<|EO", "T|>")]), assistant("Two.")]},
        {"messages": [user("Hello."), assistant("Two.")]},
    ]
    data, faults, processor = write_lines(tmp_path / "data.jsonl", rows), [], AutoProcessor.from_pretrained(TINY)
    conversations = read_conversations(data, faults)
    sizes = check_pictures(conversations, faults, quiet=True)
    length = Collator(conversations, processor)([{"number": 0}])["input_ids"].shape[1]
    assert check_tokens(conversations[:1], sizes, processor, length, faults) == length and not faults
    check_tokens(conversations, sizes, processor, length - 1, faults)
    assert faults == [
        f"{data}:1: has {length} tokens, more than {length - 1}",
        f"{data}:2: has the special token <|EOT|> in its text",
        f"{data}:3: has the special token <|EOT|> in its text",
    ]


def test_labels_are_the_assistants_words(folder, tmp_path):
    """However the pictures are given, and with line breaks where a tokenizer could join them with the template's."""
    stream = BytesIO()
    Image.open(folder / "1.png").save(stream, format="PNG")
    uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    answers = ["\n\nTwo.", "At the left, a star.\n", "assistant\nNo."]
    marks = [user("<image>One?<image>"), assistant(answers[0]), user("\nAnd?"), assistant(answers[1])]
    question = [{"type": "text", "text": text} for text in ("<im_", "patch>On", "e?")]
    parts = [user([*question, {"type": "image_url", "image_url": {"url": uri}, "text": None}], tools=[]), *marks[1:]]
    rows = [
        {"messages": [{"role": "system", "content": "Hello."}, *marks], "images": [str(folder / "0.png"), uri]},
        {"id": 1, "messages": [{"role": "system", "content": "Hello."}, *parts], "images": [str(folder / "0.png")]},
        {"messages": [user("One?"), assistant("Two.", weight=0), user("Is there?"), assistant(answers[2])]},
    ]
    faults, processor = [], AutoProcessor.from_pretrained(TINY)
    conversations = read_conversations(write_lines(tmp_path / "data.jsonl", rows), faults)
    assert not faults
    collator = Collator(conversations, processor)
    batch = collator([{"number": 0}, {"number": 1}, {"number": 2}])
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["".join(f"{answer}<|EOT|>" for answer in answers[:2])] * 2 + [f"{answers[2]}<|EOT|>"]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert len(batch["num_patches"]) == 4 and torch.equal(batch["pixel_values"][:2], batch["pixel_values"][2:])

    question = collator([{"number": 2}], asks=True)
    prompt = processor.apply_chat_template(rows[2]["messages"][:3], add_generation_prompt=True)
    assert processor.tokenizer.decode(question["input_ids"][0]) == prompt


def test_it_learns_and_merges_into_the_released_layout(trained, folder):
    reports = [line for line in trained.stdout.splitlines() if line.startswith("after step")]
    assert reports[0].startswith("after step 0: 0 of 12") and reports[-1].startswith("after step 30: 12 of 12")
    merged = folder / "trained" / "merged"
    before, after = load_file(TINY / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(
        any(part in name for name in changed) for part in ("wq", "share_expert.up", "moe.gate_proj", "moe.down_proj")
    )
    assert not any(name.startswith("vision") or "norm" in name or "embed" in name for name in changed)
    config = (json.loads((path / "config.json").read_text()) for path in (TINY, merged))
    assert next(config)["text_config"] == next(config)["text_config"]
    assert not (folder / "trained" / "README.md").exists()  # TRL's, of a model without a name
    adapter = json.loads((folder / "trained" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(TINY.resolve())
    assert run("convert_checkpoint.py", merged, "--check").returncode == 0
    answer = run("describe.py", folder / "50.png", "--prompt", QUESTION, "--model", merged)
    assert answer.stdout.strip() == ANSWER


def adapter_of(folder) -> dict:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_resumed_training_ends_where_an_undisturbed_one_does(trained, folder):
    """From the last checkpoint that is whole: the newest was not written to its end."""
    stopped = folder / "stopped"
    shutil.copytree(folder / "trained", stopped)
    for name in ("adapter", "merged"):
        shutil.rmtree(stopped / name)
    (stopped / "checkpoint-30" / "trainer_state.json").unlink()
    for name in (".adapter-1", ".merged-1"):  # as a run leaves them that is killed
        shutil.copytree(folder / "trained" / "merged", stopped / name)
    other = finetune(folder, "stopped", *OPTIONS, "--resume", "--rank", 4)
    assert other.returncode == 2 and "began with another rank" in other.stderr
    assert "exists already" in finetune(folder, "stopped", *OPTIONS).stderr
    result = finetune(folder, "stopped", *OPTIONS, "--resume")
    assert result.returncode == 0, result.stderr
    assert not list(stopped.glob(".*"))
    reports = [line for line in result.stdout.splitlines() if line.startswith("after step")]
    assert len(reports) == 2 and reports[0].startswith("after step 15:") and reports[1].startswith("after step 30: 12")
    for name, weight in adapter_of(folder / "trained").items():
        torch.testing.assert_close(adapter_of(stopped)[name], weight)
    assert "is finished" in finetune(folder, "stopped", *OPTIONS, "--resume").stderr


@pytest.mark.parametrize("limit", [2**16, 2**20], ids=["adapter", "optimizer"])
def test_a_full_disk_and_how_to_go_on_are_told_in_a_line(folder, tmp_path, limit):
    """A file that may not grow stands for the disk."""
    command = [sys.executable, ROOT / "scripts" / "finetune_lora.py", TINY, folder / "train.jsonl", tmp_path / "full"]
    result = subprocess.run(
        [*map(str, command), *map(str, OPTIONS)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert any(
        line.startswith("finetune_lora.py: a file could not be") and line.endswith(": resume with --resume")
        for line in result.stderr.splitlines()
    )


def test_an_interrupted_training_says_how_to_go_on(folder, tmp_path):
    command = [sys.executable, ROOT / "scripts" / "finetune_lora.py", TINY, folder / "train.jsonl"]
    command += [tmp_path / "stopped", "--epochs", "1000"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "stopped" / "settings.json").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors
    assert "finetune_lora.py: interrupted: resume with --resume" in errors.splitlines()


def test_the_trained_model_is_gone_before_the_merged_one_is_made(folder, tmp_path, monkeypatch):
    def models() -> int:
        return sum(issubclass(type(value), PreTrainedModel) for value in gc.get_objects())

    found = []
    monkeypatch.setattr(finetune_lora, "merge", lambda *_: found.append(models()))
    command = ["finetune_lora.py", str(TINY), str(folder / "test.jsonl"), str(tmp_path / "out"), "--merge"]
    monkeypatch.setattr(sys, "argv", command)
    gc.collect()
    before = models()
    gc.disable()  # it may happen by itself, or not
    try:
        finetune_lora.main()
    finally:
        gc.enable()
    assert found == [before]


def test_two_processes_learn_what_one_does(trained, folder):
    options = [*OPTIONS, "--batch-size", 4]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [ROOT / "scripts" / "finetune_lora.py", TINY, folder / "train.jsonl", folder / "two"]
    command += ["--eval", folder / "test.jsonl", *options]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("after step 30: 12 of 12") == 1
    for name, weight in adapter_of(folder / "trained").items():
        torch.testing.assert_close(adapter_of(folder / "two")[name], weight, atol=1e-4, rtol=0)


def test_vocabulary_and_vision_are_trained_and_merged(folder):
    options = ("--target", "vision,vocabulary", "--bf16", "--gradient-checkpointing", "--merge")
    result = finetune(folder, "whole", *options)
    assert result.returncode == 0, result.stderr
    before = load_file(TINY / "model.safetensors")
    after = load_file(folder / "whole" / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"lm_head.weight", "model.embed_tokens.weight", "vit_large_projector.weight"} <= changed
    assert not any("layers" in name and "vision" not in name for name in changed)
    model = AutoModelForImageTextToText.from_pretrained(folder / "whole" / "merged")
    assert model.dtype == torch.float32


def test_four_bits_reach_the_experts_and_are_merged_into_the_released_layout(folder):
    pytest.importorskip("bitsandbytes")
    targets = ("--target", "attention,mlp,experts,vision")
    result = finetune(folder, "four", *OPTIONS, *targets, "--4bit", "--merge", "--ask", 4)
    assert result.returncode == 0, result.stderr
    assert "after step 30: 4 of 4" in result.stdout
    assert any(".moe.experts.7.up_proj." in name for name in adapter_of(folder / "four"))
    merged = folder / "four" / "merged"
    before, after = load_file(TINY / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert not torch.equal(before["model.layers.1.moe.up_proj.weight"], after["model.layers.1.moe.up_proj.weight"])
    answer = run("describe.py", folder / "50.png", "--prompt", QUESTION, "--model", merged)
    assert answer.stdout.strip() == ANSWER


def test_made_up_conversations(tmp_path):
    """Every second one to learn from is of an old kind, and those to measure with are all new."""
    assert run("draw_conversations.py", tmp_path / "scenes", "--train", 8, "--test", 3).returncode == 0
    faults = []
    for name, news in (("train", 4), ("test", 3)):
        conversations = read_conversations(tmp_path / "scenes" / f"{name}.jsonl", faults)
        check_pictures(conversations, faults, quiet=True)
        questions = [conversation.messages[0]["content"][1]["text"] for conversation in conversations]
        assert questions.count("What is there?") == news
    assert not faults
    answer = conversations[0].messages[1]["content"][0]["text"]
    assert answer.split(". ")[0] in ("One", "Two", "Three") and " at the " in answer
