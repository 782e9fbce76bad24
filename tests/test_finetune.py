import base64
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from io import BytesIO

import pytest
from conftest import ROOT, python, run


pytest.importorskip("peft")
pytest.importorskip("trl")

import conversations
import datasets
import finetune
import pyarrow
import torch
from conversations import iterate_conversations
from describe import TINY
from draw_scene import draw_scene
from finetune import Collator, rows_of
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from training_data import read_samples
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from trl import ModelConfig


pytestmark = pytest.mark.releases
SCRIPTS = ROOT / "scripts"
OPTIONS = ("--target", "attention,mlp,experts", "--num_train_epochs", 5, "--save_steps", 15, "--eval_steps", 15)
OPTIONS += ("--learning_rate", 5e-3, "--gradient_checkpointing", "false", "--ask", 12)
QUESTION, ANSWER, WORSE = "What is there?", "Yes, a star.", "No."
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setattr(conversations, "SIZES", tmp_path_factory.mktemp("cache") / "sizes.json")
        yield


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


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
    pairs = [{**row, "rejected_response": WORSE} for row in rows]
    write_lines(folder / "pairs.jsonl", pairs[:24])
    write_lines(folder / "test_pairs.jsonl", pairs[48:])
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    result = tune(folder, "trained", *OPTIONS, "--merge")
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def options_of(folder, output, *more) -> list[str]:
    data = ("--dataset_name", folder / "train.jsonl", "--eval_dataset", folder / "test.jsonl")
    model = TINY.relative_to(ROOT)
    return list(map(str, ("--model_name_or_path", model, *data, "--output_dir", folder / output, *more)))


def tune(folder, output, *more):
    return run("finetune.py", *options_of(folder, output, *more))


def forms(picture: str) -> dict[str, dict]:
    """One conversation in every form."""
    question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    shared = [{"from": "human", "value": f"<image>{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    rows = {
        "messages": {"messages": [user(f"<image>{QUESTION}"), assistant(ANSWER)]},
        "parts": {"messages": [user(question), assistant([{"type": "text", "text": ANSWER}])]},
        "ShareGPT": {"conversations": shared},
        "Alpaca": {"instruction": f"<image>{QUESTION}", "input": "", "output": ANSWER},
        "query": {"query": f"<image>{QUESTION}", "response": ANSWER, "history": []},
        "texts": {"prompt": f"<image>{QUESTION}", "completion": ANSWER},
        "TRL": {"prompt": [user(question)], "completion": [assistant(ANSWER)]},
        "TRL, no mark": {"prompt": [user(QUESTION)], "completion": [assistant(ANSWER)]},
    }
    rows = {name: {**row, "images": [picture]} for name, row in rows.items()}
    rows["LLaVA"] = {"id": 7, "image": picture, "conversations": shared}
    rows["object"] = {**rows["messages"], "images": [{"path": picture, "bytes": None}]}
    rows["URL"] = {
        "messages": [user([{"type": "image_url", "image_url": {"url": picture}}, question[1]]), assistant(ANSWER)]
    }
    return rows


def test_one_conversation_in_every_form_has_the_same_labels(folder, tmp_path, processor):
    picture = str(folder / "1.png")
    rows = list(forms(picture).values())
    write_lines(tmp_path / "lines.jsonl", rows)
    (tmp_path / "array.json").write_text(json.dumps(rows, indent=1))
    embedded = [{**rows[0], "images": [{"bytes": (folder / "1.png").read_bytes(), "path": None}]}]
    parquet.write_table(pyarrow.Table.from_pylist(embedded), tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{**rows[1], "images": [Image.open(picture)]}]).save_to_disk(tmp_path / "saved")
    for name in ("train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"):
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "lines.jsonl", tmp_path / "folder" / name)
    prompt, answer = rows[1]["messages"]
    given = [{**prompt, "content": [{"type": "image", "image": picture}, prompt["content"][1]]}, answer]
    expected = processor.apply_chat_template(given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    counts = {"lines.jsonl": len(rows), "array.json": len(rows), "folder": len(rows), "rows.parquet": 1, "saved": 1}
    for name, count in counts.items():
        faults = []
        samples = list(read_samples(tmp_path / name, processor, faults, "sft"))
        assert not faults and len(samples) == count
        for sample in samples:
            assert sample.input_ids == expected["input_ids"][0]
            assert sample.learned == list(map(bool, expected["assistant_masks"][0]))
            assert processor.tokenizer.decode(sample.input_ids[sample.num_prompt :]) == f"{ANSWER}<|EOT|>"


def test_tools_and_reasoning_are_learned(tmp_path, processor):
    """In OpenAI's and in ShareGPT's form; the mask is the chat template's."""
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "left"}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "a star"}
    messages = [
        user("?"),
        assistant("", tool_calls=[call]),
        result,
        assistant(ANSWER, reasoning_content="a star is one"),
    ]
    steps = [("human", "?"), ("function_call", '{"name": "look", "arguments": {"at": "left"}}')]
    steps += [("observation", "a star"), ("gpt", f"<think>a star is one</think>{ANSWER}")]
    shared = {"conversations": [{"from": role, "value": text} for role, text in steps], "tools": json.dumps([TOOL])}
    data, faults = write_lines(tmp_path / "data.jsonl", [{"messages": messages, "tools": [TOOL]}, shared]), []
    samples = list(read_samples(data, processor, faults))
    assert not faults and samples[0] == samples[1]
    expected = processor.apply_chat_template(
        messages, tools=[TOOL], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert samples[0].input_ids == expected["input_ids"][0]
    assert samples[0].learned == list(map(bool, expected["assistant_masks"][0]))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("One?")], "chosen": [assistant(ANSWER)], "rejected": [assistant(WORSE)]},
        {"chosen": [user("One?"), assistant(ANSWER)], "rejected": [user("One?"), assistant(WORSE)]},
        {"prompt": "One?", "chosen": ANSWER, "rejected": WORSE},
        {"messages": [user("One?"), assistant(ANSWER)], "rejected_response": WORSE},
        {
            "conversations": [{"from": "human", "value": "One?"}],
            "chosen": {"from": "gpt", "value": ANSWER},
            "rejected": WORSE,
        },
    ],
)
def test_a_pair_in_every_form(tmp_path, processor, row):
    sample = next(read_samples(write_lines(tmp_path / "data.jsonl", [row]), processor, [], "dpo"))
    prompt = processor.apply_chat_template([user("One?")], add_generation_prompt=True)
    assert (sample.prompt, sample.answer, sample.rejected) == (prompt, f"{ANSWER}<|EOT|>", f"{WORSE}<|EOT|>")
    good, bad = rows_of(sample, "kto")
    assert (good["completion"], good["label"]) == (sample.answer, True)
    assert (bad["completion"], bad["label"]) == (sample.rejected, False)
    faults = []
    assert not list(read_samples(tmp_path / "data.jsonl", processor, faults, "sft")) and "--method sft" in faults[0][1]


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
        ({"text": "Hello."}, "has none of messages, conversations, instruction"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "message 1 (tool): it is the user's turn"),
        ({"messages": [*good, *good[::-1]]}, "message 3 (assistant): it is the user's turn"),
        ({"messages": [user("<image>?"), assistant("Two.")]}, "has 0 in `images`, and 1 placeholders"),
        ({"messages": good, "images": [str(folder / "0.png")]}, "has 1 in `images`, and 0 placeholders"),
        ({"messages": [user("Hello."), assistant(" ")]}, "message 2 (assistant): is empty"),
        ({"messages": [user("Hello.")]}, "has no assistant's message"),
        ({"messages": [*good, user("And?")]}, "ends with the user's message"),
        ({"messages": [user("\ud800"), assistant("Two.")]}, "half of a surrogate pair"),
        ({"messages": [user([{"type": "video", "video": "a.mp4"}]), assistant("Two.")]}, "a part must be of the type"),
        ({"messages": [user("?"), assistant(None, tool_calls=[{"name": "f", "arguments": "{"}])]}, "must be JSON"),
        ({"messages": good, "label": "good"}, "`label` must be true or false"),
        ({"prompt": "?", "chosen": "Two."}, "has `chosen` without `rejected`"),
        ({"query": "?", "response": "Two.", "history": ["One."]}, "`history` must be a list of pairs"),
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
        ({"messages": [user("Hello.<|EOT|>"), assistant("Two.")]}, "has the special token <|EOT|>"),
        ({"messages": [user([{"type": "text", "text": x} for x in ("<|EO", "T|>")]), assistant("2")]}, "special token"),
        ({"messages": [user("<image>" * 24), assistant("2")], "images": ["1.png"] * 24}, "tokens, more than 250"),
    ]
    shutil.copy(folder / "1.png", tmp_path)
    data = write_lines(tmp_path / "data.jsonl", [*(row for row, _ in cases), {"messages": good}])
    options = ("--model_name_or_path", TINY, "--dataset_name", data, "--max_length", 250)
    result = run("finetune.py", *options, "--output_dir", tmp_path / "out")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert f"{data}:1: is not JSON" in result.stderr and re.search(r"\nand \d+ more\n", result.stderr)
    assert not (tmp_path / "out").exists()

    result = run("finetune.py", *options, "--output_dir", tmp_path / "out", "--on_fault", "skip", "--max_steps", 1)
    assert result.returncode == 0, result.stderr
    left_out = (tmp_path / "out" / "data" / "left_out.txt").read_text().splitlines()
    for number, (_, message) in enumerate(cases, 1):
        found = [line for line in left_out if line.startswith(f"{data}:{number}: ")]
        assert any(message in line for line in found), (message, found)
    assert "1 conversations" in result.stdout

    # The lines of a JSON array are those where its elements begin.
    elements = [row for row, _ in cases if isinstance(row, dict)]
    (tmp_path / "data.json").write_text(json.dumps(elements, indent=1))
    list(iterate_conversations(tmp_path / "data.json", faults := []))
    assert faults[0][0] == f"{tmp_path / 'data.json'}:2" and "`messages` must be a list" in faults[0][1]

    parquet.write_table(pyarrow.Table.from_pylist([{"query": "?" * 1000, "response": "!"}]), tmp_path / "data.parquet")
    damaged = bytearray((tmp_path / "data.parquet").read_bytes())
    damaged[30:50] = bytes(20)
    (tmp_path / "data.parquet").write_bytes(damaged)
    list(iterate_conversations(tmp_path / "data.parquet", faults := []))
    assert [place for place, _ in faults] == [str(tmp_path / "data.parquet")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        *(
            ({"messages": [user("Hello."), assistant("Two.")], key: value}, f'has "{key}", and only messages, ')
            for key, value in [
                ("videos", ["a.mp4"]),
                ("objects", {"bbox": [[1, 2]]}),
                ("output", "Two."),
                ("thinking", "1"),
            ]
        ),
        *(
            ({"messages": [user("Hello."), assistant("Two.", **{key: value})]}, f'(assistant): has "{key}", and only')
            for key, value in [("function_call", {"name": "f"}), ("thinking", "1 + 1"), ("loss_scale", 0.0)]
        ),
        ({"messages": [user("<image>?", images=["0.png"]), assistant("Two.")]}, '(user): has "images", and only role,'),
        ({"messages": [user("Hello.", loss=True), assistant("Two.")]}, '(user): has "loss", and only role,'),
        ({"messages": [user("<video>One?"), assistant("Two.")]}, "(user): has <video> in its text"),
        ({"messages": [user([{"type": "text", "text": "?", "image": "0.png"}]), assistant("2")]}, 'has "image", and'),
        ({"messages": [user([{"type": "image", "max_pixels": 9}]), assistant("2")]}, 'has "max_pixels", and only'),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": "a", "detail": "low"}}]), assistant("2")]},
            '"detail"',
        ),
        ({"prompt": "?", "completion": "2", "response": "3"}, 'has "response", and only prompt, completion'),
    ],
)
def test_nothing_in_a_row_is_lost(tmp_path, row, message):
    data, faults = write_lines(tmp_path / "lost.jsonl", [row]), []
    assert not list(iterate_conversations(data, faults))
    assert faults[0][0] == f"{data}:1" and message in faults[0][1], faults


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", "-1"),
        ("num_train_epochs", "nan"),
        ("save_steps", "0"),
        ("learning_rate", "inf"),
        ("lora_r", "0"),
        ("per_device_train_batch_size", "0"),
        ("max_patches", "-1"),
        ("target", "everything"),
        ("method", "ppo"),
        ("no_such_option", "1"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options_of(folder, "refused", f"--{option}", value)])
    with pytest.raises(SystemExit) as stopped:
        finetune.main()
    assert stopped.value.code == 2 and option in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_labels_are_the_assistants_words(folder, tmp_path, processor):
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
    faults = []
    samples = list(read_samples(write_lines(tmp_path / "data.jsonl", rows), processor, faults))
    assert not faults
    batch = Collator(processor)([row for sample in samples for row in rows_of(sample, "sft")])
    learned = [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["".join(f"{answer}<|EOT|>" for answer in answers[:2])] * 2 + [f"{answers[2]}<|EOT|>"]
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert len(batch["num_patches"]) == 4 and torch.equal(batch["pixel_values"][:2], batch["pixel_values"][2:])
    prompt = processor.apply_chat_template(rows[2]["messages"][:3], add_generation_prompt=True)
    assert processor.tokenizer.decode(samples[2].input_ids[: samples[2].num_prompt]) == prompt


def test_the_data_command(folder, tmp_path, monkeypatch):
    """Its file, its table, and pictures that are read once."""
    data = write_lines(tmp_path / "data.jsonl", [*(folder / "train.jsonl").read_bytes().splitlines(), b"{}"])
    for number in range(48):
        shutil.copy(folder / f"{number}.png", tmp_path)
    options = (data, "--model", TINY, "--json", tmp_path / "learned.jsonl", "--max-length", 60)
    environment = {"HF_HOME": str(tmp_path / "home")}
    result = run("training_data.py", *options, **environment)
    assert result.returncode == 2 and f"{data}:49: has none of" in result.stderr
    assert not (tmp_path / "learned.jsonl").exists()
    result = run("training_data.py", *options, "--on-fault", "skip", **environment)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "learned.jsonl").read_text().splitlines()]
    lengths = [len(row["input_ids"]) for row in rows]
    assert len(rows) == 48 and "48 conversations, 1 left out" in result.stdout
    assert f"--max-length 60 drops {sum(length > 60 for length in lengths)} of 48" in result.stdout
    table = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[3:7]}
    assert table["tokens"][0] == str(sum(lengths)) and table["learned"][0] == str(
        sum(sum(row["learned"]) for row in rows)
    )
    known = json.loads((tmp_path / "home" / "step3_vl" / "picture_sizes.json").read_text())
    assert len(known) == 48
    read = list(iterate_conversations(folder / "train.jsonl", []))[:1]
    known = {read[0].images[0]: [os.stat(read[0].images[0]).st_mtime_ns, 7, 8]}
    assert conversations.check_pictures(read, [], known) == {read[0].images[0]: (7, 8)}


def test_sizes_of_pictures_are_remembered(tmp_path, monkeypatch):
    """Also of changed pictures, and after an interruption. A cache that cannot be read or written is done without."""
    cache = tmp_path / "sizes.json"
    monkeypatch.setattr(conversations, "SIZES", cache)
    cache.write_text("damaged")
    with pytest.raises(KeyboardInterrupt), conversations.remembered_sizes() as known:
        assert known == {}
        known["a.png"] = [1, 7, 8]
        raise KeyboardInterrupt
    with conversations.remembered_sizes() as known:
        assert known == {"a.png": [1, 7, 8]}
        known["a.png"] = [2, 9, 8]
    assert json.loads(cache.read_text()) == {"a.png": [2, 9, 8]}
    monkeypatch.setattr(conversations, "SIZES", cache / "in a file.json")
    with conversations.remembered_sizes() as known:
        known["a.png"] = [1, 7, 8]


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
    (stopped / "checkpoint-30" / "trainer_state.json").write_text('{"epoch": ')
    for name in (".adapter-1", ".merged-1"):  # as a run leaves them that is killed
        shutil.copytree(folder / "trained" / "merged", stopped / name)
    (stopped / ".venv-3.12").mkdir()  # the user's
    other = tune(folder, "stopped", *OPTIONS, "--resume", "--lora_r", 4)
    assert other.returncode == 2 and "began with another lora_r" in other.stderr
    assert "exists already" in tune(folder, "stopped", *OPTIONS).stderr
    result = tune(folder, "stopped", *OPTIONS, "--resume")
    assert result.returncode == 0, result.stderr
    assert [path.name for path in stopped.glob(".*")] == [".venv-3.12"]
    for name, weight in adapter_of(folder / "trained").items():
        assert torch.equal(adapter_of(stopped)[name], weight)
    assert "is finished" in tune(folder, "stopped", *OPTIONS, "--resume").stderr


@pytest.mark.parametrize("limit", [2**16, 2**20], ids=["adapter", "optimizer"])
def test_a_full_disk_and_how_to_go_on_are_told_in_a_line(folder, tmp_path, limit):
    """A file that may not grow stands for the disk."""
    command = [sys.executable, SCRIPTS / "finetune.py", *options_of(folder, "full", *OPTIONS)]
    command[command.index("--output_dir") + 1] = tmp_path / "full"
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert any(
        line.startswith("finetune.py: a file could not be") and line.endswith(": resume with --resume")
        for line in result.stderr.splitlines()
    )


def test_an_interrupted_training_says_how_to_go_on(folder):
    options = options_of(folder, "broken_off", "--num_train_epochs", 1000)
    command = [sys.executable, str(SCRIPTS / "finetune.py"), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while process.poll() is None and not (folder / "broken_off" / "data").exists():
        time.sleep(0.1)
    errors = None
    while errors is None:  # an import may swallow the first one
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "finetune.py: interrupted: resume with --resume" in errors.splitlines()


def test_the_trained_model_is_gone_before_the_merged_one_is_made(folder, monkeypatch):
    def models() -> int:
        return sum(issubclass(type(value), PreTrainedModel) for value in gc.get_objects())

    found = []
    monkeypatch.setattr(finetune, "merge", lambda *_: found.append(models()))
    monkeypatch.setattr(sys, "argv", ["finetune.py", *options_of(folder, "gone", "--max_steps", 1, "--merge")])
    monkeypatch.chdir(ROOT)
    gc.collect()
    before = models()
    gc.disable()  # it may happen by itself, or not
    try:
        finetune.main()
    finally:
        gc.enable()
    assert found == [before]


def tune_in_two(folder, output, *more, launch=("--config_file", SCRIPTS / "fsdp2.yaml")):
    options = options_of(folder, output, *more, "--per_device_train_batch_size", 4)
    command = ("-m", "accelerate.commands.launch", *launch, "--num_processes", 2, SCRIPTS / "finetune.py", *options)
    result = python(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.parametrize("way", ["copies", "split"])
def test_two_processes_learn_what_one_does(trained, folder, way):
    """Each with a copy of the weights, or with half of them."""
    launch = {"launch": ["--multi_gpu"]} if way == "copies" else {}
    result = tune_in_two(folder, way, *OPTIONS, "--merge", **launch)
    assert result.stdout.count("after step 30: 12 of 12") == 1
    one, two = (load_file(folder / name / "merged" / "model.safetensors") for name in ("trained", way))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-4, rtol=0)
    held = [float(size) for size in re.findall(r" holds ([\d.]+) MiB", trained.stdout + result.stdout)]
    assert held[1:] == pytest.approx([held[0] / (2 if way == "split" else 1)] * 2, rel=0.02)


def test_all_weights_are_learned_by_two_processes_that_split_them(folder):
    """The head among them. Without momentum, no rounding is magnified."""
    options = ("--use_peft", "false", "--optim", "sgd", "--learning_rate", 0.01, "--max_steps", 2, "--ask", 0)
    assert tune(folder, "whole", *options).returncode == 0
    tune_in_two(folder, "whole_split", *options)
    directories = (TINY, folder / "whole" / "model", folder / "whole_split" / "model")
    before, one, two = (load_file(directory / "model.safetensors") for directory in directories)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=0)
    assert not any(
        torch.equal(before[name], one[name]) for name in ("lm_head.weight", "model.layers.1.moe.gate.weight")
    )
    assert len({tuple(sorted(path.name for path in directory.iterdir())) for directory in directories[1:]}) == 1
    configs = [json.loads((directory / "config.json").read_text()) for directory in directories]
    assert all(config[part] == configs[0][part] for config in configs for part in ("text_config", "auto_map"))


def test_a_quantised_base_is_not_quantised_again():
    config = AutoConfig.from_pretrained(TINY)
    config.quantization_config = {"quant_method": "fp8"}
    model_options = ModelConfig(model_name_or_path=str(TINY), load_in_4bit=True)
    with pytest.raises(ValueError, match="stored by fp8, which --load_in_4bit"):
        finetune.load_model(None, model_options, config, quantization_config=object())


def test_vocabulary_and_vision_are_trained_and_merged(folder):
    options = ("--target", "vision,vocabulary", "--dtype", "bfloat16", "--max_steps", 2, "--ask", 1, "--merge")
    result = tune(folder, "vocabulary", *options)
    assert result.returncode == 0, result.stderr
    before = load_file(TINY / "model.safetensors")
    after = load_file(folder / "vocabulary" / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"lm_head.weight", "model.embed_tokens.weight", "vit_large_projector.weight"} <= changed
    assert not any("layers" in name and "vision" not in name for name in changed)
    model = AutoModelForImageTextToText.from_pretrained(folder / "vocabulary" / "merged")
    assert model.dtype == torch.float32


def test_four_bits_reach_the_experts_and_are_merged_into_the_released_layout(folder):
    pytest.importorskip("bitsandbytes")
    result = tune(folder, "four", *OPTIONS, "--load_in_4bit", "--use_bnb_nested_quant", "--merge")
    assert result.returncode == 0, result.stderr
    assert "after step 30: 12 of 12" in result.stdout
    assert any(".moe.experts.7.up_proj." in name for name in adapter_of(folder / "four"))
    merged = folder / "four" / "merged"
    before, after = load_file(TINY / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys() and {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert not torch.equal(before["model.layers.1.moe.up_proj.weight"], after["model.layers.1.moe.up_proj.weight"])
    answer = run("describe.py", folder / "50.png", "--prompt", QUESTION, "--model", merged)
    assert answer.stdout.strip() == ANSWER


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_it_learns_to_prefer_an_answer_about_patches(folder, processor, method):
    """By a YAML file; patches are limited to two, which the adapter's processor keeps."""
    recipe = {"model_name_or_path": str(TINY), "dataset_name": str(folder / "pairs.jsonl"), "method": method}
    recipe |= {"eval_dataset": str(folder / "test_pairs.jsonl"), "output_dir": str(folder / method), "max_patches": 2}
    recipe |= {"learning_rate": 2e-3, "max_steps": 6, "ask": 0, "gradient_checkpointing": False, "merge": True}
    (folder / f"{method}.yaml").write_text(json.dumps(recipe))
    result = run("finetune.py", "--config", folder / f"{method}.yaml")
    assert result.returncode == 0, result.stderr
    assert AutoProcessor.from_pretrained(folder / method / "merged").image_processor.max_patches == 2

    history = json.loads((folder / method / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    gaps = [log["eval_logps/chosen"] - log["eval_logps/rejected"] for log in history if "eval_logps/chosen" in log]
    assert gaps[-1] > gaps[0] + 5, gaps


def test_text_is_packed(folder, tmp_path):
    rows = [{"messages": [user(f"How many are {n}?"), assistant(ANSWER)]} for n in range(16)]
    data = write_lines(tmp_path / "text.jsonl", rows)
    options = ("--packing", "--max_length", 128, "--max_steps", 2)
    result = run(
        "finetune.py", "--model_name_or_path", TINY, "--dataset_name", data, "--output_dir", tmp_path / "out", *options
    )
    assert result.returncode == 0, result.stderr
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["epoch"] >= 1


def test_made_up_conversations(tmp_path):
    """Every second one to learn from is of an old kind, and those to measure with are all new."""
    assert run("draw_conversations.py", tmp_path / "scenes", "--train", 8, "--test", 3).returncode == 0
    for name, news in (("train", 4), ("test", 3)):
        rows = list(iterate_conversations(tmp_path / "scenes" / f"{name}.jsonl", []))
        assert [row.messages[0]["content"][1]["text"] for row in rows].count("What is there?") == news
    answer = rows[0].messages[1]["content"][0]["text"]
    assert answer.split(". ")[0] in ("One", "Two", "Three") and " at the " in answer

    options = "--train", 3, "--test", 1, "--pairs"
    assert run("draw_conversations.py", tmp_path / "pairs", *options).returncode == 0
    for row in iterate_conversations(tmp_path / "pairs" / "train.jsonl", []):
        assert row.messages[0]["content"][1]["text"] == "What is there?"
        assert row.rejected["content"][0]["text"].startswith("At the ")
