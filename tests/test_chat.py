"""Conversations in the terminal, and requests that are answered in batches."""

import json
import re
import signal
import sys
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, TextIOWrapper
from threading import Thread

import answer
import chat
import pytest
from conversations import iterate_conversations
from describe import TINY, load
from draw_scene import draw_scene
from files import locked

from step3_vl.modeling_step3 import Step3TextModel, Step3TextMoE, Step3VisionModel


QUESTIONS = ("Describe this picture.", "How many shapes are there?")


@pytest.fixture
def scenes(tmp_path) -> list:
    """Images of one size, which have the same tokens, in files `0.png`, `1.png` and `2.png`."""
    images = [draw_scene(seed, "wide").image for seed in (1, 2, 3)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    (tmp_path / "text.png").write_text("no image")
    return images


@pytest.fixture
def say(scenes, tmp_path, monkeypatch, capsys):
    """Runs chat.py on lines of standard input, and returns the lines of its output and of its errors."""

    def run(*lines: str, model=TINY) -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["chat.py", str(model), "--max-new-tokens", "40"])
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO("\n".join(lines).encode())))
        monkeypatch.chdir(tmp_path)
        chat.main()
        output = capsys.readouterr()
        return output.out.splitlines(), output.err.splitlines()

    return run


@pytest.fixture
def computed(monkeypatch) -> Counter:
    """Counts the tokens that the text model computes, and the images and patches that the vision model encodes."""
    counter, text_forward, vision_forward = Counter(), Step3TextModel.forward, Step3VisionModel.forward

    def count_tokens(self, input_ids=None, *args, inputs_embeds=None, **kwargs):
        counter["tokens"] += (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        return text_forward(self, input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)

    def count_images(self, pixel_values, *args, **kwargs):
        counter["images"] += len(pixel_values)
        return vision_forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(Step3TextModel, "forward", count_tokens)
    monkeypatch.setattr(Step3VisionModel, "forward", count_images)
    return counter


class Whole:
    """A conversation of which each turn is computed from the whole prompt."""

    def __init__(self):
        self.model, self.processor = load(TINY, "cpu")
        self.messages, self.num_tokens = [], 0  # the number of tokens of the last prompt and its answer

    def ask(self, text: str, *images) -> str:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": content})
        inputs = self.processor.apply_chat_template(
            self.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = self.model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": answer})
        self.num_tokens = output.shape[1]
        return answer


@pytest.mark.releases
def test_answers_are_those_of_the_whole_prompt_and_nothing_is_computed_twice(say, scenes, computed):
    lines = ["/image 0.png", *QUESTIONS, "word " * 3000, "/image 1.png", "/image none.png", "/image text.png"]
    lines += ["/picture 2.png", "<im_patch>", "/image 2.png", QUESTIONS[0], "", QUESTIONS[1]]
    answers, complaints = say(*lines)
    counts, whole, other = dict(computed), Whole(), Whole()
    expected = [whole.ask(QUESTIONS[0], scenes[0]), whole.ask(QUESTIONS[1])]
    expected += [whole.ask(QUESTIONS[0], *scenes[1:]), whole.ask(QUESTIONS[1])]
    assert answers == expected
    words = ("2048 positions", "none.png", "text.png", "/picture", "<im_patch>")
    assert len(complaints) == len(words) and all(map(str.__contains__, complaints, words)), complaints
    num_patches = whole.processor.image_processor(scenes)["num_patches"]
    num_tokens = whole.num_tokens - 1  # the last token need not be computed
    assert counts == {"tokens": num_tokens, "images": len(scenes) + sum(num_patches)}
    other = other.ask(QUESTIONS[0], scenes[1])
    assert other != expected[0], "the images have different answers"
    assert say("/image 0.png", QUESTIONS[0], "/reset", "/image 1.png", QUESTIONS[0])[0] == [expected[0], other]


def test_a_template_may_leave_out_earlier_answers(say, scenes, computed, monkeypatch):
    whole = Whole()
    template = whole.processor.chat_template.replace("{{ answer(message) }}", "")
    assert template != whole.processor.chat_template
    whole.processor.chat_template = template
    monkeypatch.setattr(chat, "load", lambda *_: (whole.model, whole.processor))
    answers, _ = say("/image 0.png", *QUESTIONS)
    num_tokens = computed["tokens"]
    assert answers == [whole.ask(QUESTIONS[0], scenes[0]), whole.ask(QUESTIONS[1])]
    left_out = len(whole.processor.tokenizer(answers[0], add_special_tokens=False)["input_ids"])
    assert num_tokens == left_out + whole.num_tokens - 1


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(say, scenes, monkeypatch, presses):
    calls, forward = [], Step3TextMoE.forward

    def press(self, *args, **kwargs):
        calls.append(1)
        for _ in range(presses * (len(calls) == 11)):  # in the second of three MoE layers, at the fourth token
            signal.raise_signal(signal.SIGINT)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Step3TextMoE, "forward", press)
    answers, complaints = say("/image 0.png", *QUESTIONS)
    monkeypatch.undo()
    whole = Whole()
    complete = whole.ask(QUESTIONS[0], scenes[0])
    if presses == 1:
        assert complete.startswith(answers[0]) and answers[0] != complete and not complaints
        whole.messages[-1]["content"] = answers[0]
        assert answers[1] == whole.ask(QUESTIONS[1])
    else:
        whole.messages = []
        assert answers[-1].endswith(whole.ask(QUESTIONS[1], scenes[0])) and "Stopped" in complaints[0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def server():
    """A server that gives scripted answers, with the requests that it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, b'{"data": [{"id": "scripted"}]}')

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.headers["Authorization"], body))
            self.reply(*server.script.pop(0))

        def reply(self, status: int, data: bytes):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.script = [], []
        Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def events(*texts: str, end: str | None = "stop") -> bytes:
    choices = [{"delta": {"content": text}} for text in texts] + [{"delta": {}, "finish_reason": end}]
    return b"".join(b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode() for choice in choices)


def test_faults_of_a_server_are_told_and_not_part_of_the_conversation(say, server, monkeypatch):
    monkeypatch.setenv("STEP3_API_KEY", "secret")
    good, broken = events("Two ", "shapes."), events("Tw", end=None)
    full = b'data: {"error": {"message": "full"}}\n'
    server.script = [(401, b'{"error": "Unauthorized"}'), (200, broken), (200, full), (200, good), (200, good)]
    url = f"http://127.0.0.1:{server.server_port}/v1"
    answers, complaints = say("/image 0.png", "One", "Two", "Three", "Four", "Five", model=url)
    assert answers == ["Tw", "Two shapes.", "Two shapes."]
    reasons = ("401 Unauthorized: Unauthorized", "the answer broke off", "full")
    assert complaints == [f"{url}: {reason}" for reason in reasons]
    keys, bodies = zip(*server.requests)
    assert set(keys) == {"Bearer secret"} and {body["model"] for body in bodies} == {"scripted"}
    kept = [(message["role"], [part["type"] for part in message["content"]]) for message in bodies[3]["messages"]]
    assert kept == [("user", ["image_url", "text"])]
    assert [message["content"] for message in bodies[4]["messages"][1:]] == [
        "Two shapes.",
        [{"type": "text", "text": "Five"}],
    ]


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Runs answer.py on `requests.jsonl`, and returns its status and its errors."""

    def run(*options) -> tuple[int, str]:
        paths = (tmp_path / "requests.jsonl", tmp_path / "out" / "answers.jsonl")
        monkeypatch.setattr(sys, "argv", ["answer.py", *map(str, (*paths, "--max-new-tokens", 40, *options))])
        try:
            answer.main()
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


@pytest.mark.releases
def test_interrupted_requests_are_each_answered_once_in_their_order(ask, scenes, tmp_path, monkeypatch):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "out" / "answers.jsonl"
    turns = [[QUESTIONS[0]], ["Hello"], [*QUESTIONS, QUESTIONS[0]], ["Thank you. " * 20], [QUESTIONS[1]]]
    used, rows, expected = [[0], [], [1, 2], [], [2]], [], []
    for number, (texts, images) in enumerate(zip(turns, used)):
        texts = ["<image>" * len(images) + texts[0], *texts[1:]]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        rows.append({"id": number, "messages": messages, "images": [f"{image}.png" for image in images]})
        whole = Whole()
        for question, reply in zip(turns[number][:-1:2], turns[number][1::2]):
            whole.ask(question, *(scenes[image] for image in images))
            whole.messages[-1]["content"] = reply
        expected.append(whole.ask(turns[number][-1], *(scenes[image] for image in images if not whole.messages)))
    requests.write_text("\n".join(map(json.dumps, rows)))

    sizes, generate = [], answer.generate_answers

    def interrupted(model, processor, conversations, options):
        sizes.append(len(conversations))
        if len(sizes) in (2, 4):
            raise KeyboardInterrupt
        return generate(model, processor, conversations, options)

    monkeypatch.setattr(answer, "generate_answers", interrupted)
    assert ask("--batch-size", 2)[0] == 130 and not output.exists()
    (partial,) = output.parent.iterdir()
    with partial.open("a") as file:
        file.write('{"number": 4, "mess')  # as if killed here
    requests.write_text("\n".join(map(json.dumps, rows[::-1])))
    assert "was begun with another requests" in ask()[1]
    requests.write_text("\n".join(map(json.dumps, rows)))
    assert "was begun with another temperature" in ask("--temperature", 1)[1]
    with locked(partial, output):
        assert "another run is writing it" in ask()[1]
    assert [ask("--batch-size", 2)[0] for _ in range(2)] == [130, 0] and sizes == [2, 2, 2, 1, 1]

    assert list(output.parent.iterdir()) == [output]
    answered = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["messages"].pop() for row in answered] == [{"role": "assistant", "content": text} for text in expected]
    assert [row | {"images": [name.removeprefix("../") for name in row["images"]]} for row in answered] == rows
    faults = []
    assert len(list(iterate_conversations(output, faults))) == len(rows) and not faults, "they are data for fine-tuning"
    assert "exists already" in ask()[1]


def test_faults_in_requests_are_told_with_their_lines_before_the_model_is_loaded(ask, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "load", None)
    question, image = {"role": "user", "content": "Hello"}, {"role": "user", "content": "<image>Hello"}
    faulty = [{"messages": [question, {"role": "assistant", "content": "Hi."}]}, {"messages": "Hello"}]
    faulty += [{"messages": [image], "images": ["none.png"]}, {"messages": [question], "tools": [1]}]
    faulty.append({"messages": [image], "images": ["broken.png"]})
    (tmp_path / "broken.png").write_text("no image")
    (tmp_path / "requests.jsonl").write_text("\n".join(["{", *map(json.dumps, faulty), ""]))
    status, told = ask()
    assert status == 2 and re.findall(r"jsonl:(\d):", told) == list("123456")
    long, special = ({"messages": [{"role": "user", "content": text}]} for text in ("word " * 3000, "<|EOT|>"))
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, [long, special])))
    status, told = ask()
    assert status == 2 and "tokens, more than 2048" in told and "jsonl:2: has the special token <|EOT|>" in told
    assert not (tmp_path / "out").exists()
