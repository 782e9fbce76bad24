"""The real servers, started and asked as from a shell: transformers' always, vLLM's by `scripts/test.sh --engines`."""

import base64
import functools
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import ExifTags, Image


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai")

from conftest import ROOT, VLLM_HOME, needs_vllm, run
from describe import TINY
from draw_scene import draw_scene
from evaluate_tiny import fresh_scenes
from make_random_model import make_random_model, make_tokenizer
from request_guard import MAX_BODY, Refusal, Rules
from serve import THINK_END, THINK_START, TOOL_TOKENS
from transformers import AutoModelForImageTextToText, AutoProcessor


each_engine = pytest.mark.parametrize(
    "server", ["transformers", pytest.param("vllm", marks=[needs_vllm, pytest.mark.engines])], indirect=True
)


def command(engine: str, *arguments) -> list[str]:
    """The command line of serve.py, in the engine's own environment."""
    line = [sys.executable, ROOT / "scripts" / "serve.py", *arguments, "--engine", engine]
    if engine == "vllm":
        python = VLLM_HOME / "venv" / "bin" / "python"
        line = ["bash", "-c", 'source "$1"; shift; exec "$@"', "-", VLLM_HOME / "env.sh", python, *line[1:]]
        line += ["--", "--enforce-eager"]
    return [str(word) for word in line]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def as_url(image, kind: str = "PNG") -> str:
    buffer = BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def huge_picture(side: int) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def question(url: str, text: str, **more) -> dict:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": TINY.name, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}


class Server:
    def __init__(self, engine: str, log: Path, directory: Path, *options):
        self.log, self.port = log, free_port()
        line = command(engine, directory, "--port", self.port, *options)
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
        self.url = f"http://127.0.0.1:{self.port}"
        self.told = ""
        while "print(" not in self.told:
            text = self.process.stdout.readline()
            assert text, log.read_text()[-3000:]
            self.told += text
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def ask(self, url: str, text: str, **more) -> str:
        answer = self.client.chat.completions.create(**question(url, text, **more))
        if not more.get("stream"):
            return answer.choices[0].message.content
        parts = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
        whole = "".join(parts)
        assert len(whole) < 20 or sum(map(bool, parts)) > 1, "a stream comes in parts"
        return whole

    def post(self, path: str, data: bytes) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0, "the server is still there"


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    (home / "pictures").mkdir()
    server = Server(request.param, home / "log.txt", TINY, "--pictures-from", home / "pictures")
    yield server
    server.stop()


TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}, "times": {"type": "integer"}}},
    },
}
ASKED, GREETED = {"role": "user", "content": "What is there?"}, {"role": "user", "content": "Hello"}
CALLED = {
    "role": "assistant",
    "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "the top", "times": 2}}}
    ],
}
SEEN, TOLD = (
    {"role": "tool", "tool_call_id": "1", "content": "a star"},
    {"role": "assistant", "reasoning_content": "Seen.", "content": "A star."},
)
THOUGHT = {"role": "assistant", "reasoning_content": "Be brief.", "content": "Hi."}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory) -> Path:
    """A small model with the marks of tools and reasoning, which knows three answers by heart."""
    directory = tmp_path_factory.mktemp("parrot") / "parrot"
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([*TOOL_TOKENS, "<｜tool_sep｜>"], special_tokens=True)
    tokenizer.add_tokens([THINK_START, THINK_END])
    sizes = ["text_config.head_dim=64", "text_config.hidden_size=128", "text_config.initializer_range=0.05"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("make_random_model.make_tokenizer", lambda: tokenizer)
        make_random_model(directory, sizes)
    model, processor = AutoModelForImageTextToText.from_pretrained(directory), AutoProcessor.from_pretrained(directory)
    samples = []
    for turns, options in (
        ([ASKED, {**CALLED, "reasoning_content": "Look first."}], {"tools": [TOOL]}),
        ([ASKED, CALLED, SEEN, TOLD], {"tools": [TOOL]}),
        ([GREETED, THOUGHT], {}),
    ):
        options["enable_thinking"] = True
        prompt = processor.apply_chat_template(turns[:-1], add_generation_prompt=True, **options)
        whole = processor.apply_chat_template(turns, **options)
        assert whole.startswith(prompt)
        prompt, whole = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (prompt, whole))
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        samples.append({"input_ids": whole, "labels": labels})
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.inf
    for _ in range(300):
        losses = [model(**sample).loss for sample in samples]
        loss = sum(losses)
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.01
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=[needs_vllm, pytest.mark.engines])])
def test_tools_and_thoughts_go_round(engine, parrot, tmp_path):
    server = Server(engine, tmp_path / "log.txt", parrot, "--thinking")
    create = functools.partial(server.client.chat.completions.create, model="parrot", temperature=0, max_tokens=300)
    try:
        thought = create(messages=[GREETED]).choices[0].message
        assert (getattr(thought, "reasoning_content", None) or thought.reasoning, thought.content) == (
            "Be brief.",
            "Hi.",
        )
        choice = create(messages=[ASKED], tools=[TOOL]).choices[0]
        assert choice.message.tool_calls, choice
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and call.function.name == "look"
        assert json.loads(call.function.arguments) == {"at": "the top", "times": 2}
        turns = [ASKED, {"role": "assistant", "tool_calls": [call.model_dump()]}, {**SEEN, "tool_call_id": call.id}]
        answer = create(messages=turns, tools=[TOOL]).choices[0].message
        assert answer.content == TOLD["content"] and not answer.tool_calls
        parts = create(messages=[ASKED], tools=[TOOL], stream=True)
        calls = [call.function for part in parts if part.choices for call in part.choices[0].delta.tool_calls or []]
        assert "".join(call.name or "" for call in calls) == "look"
        assert json.loads("".join(call.arguments or "" for call in calls)) == {"at": "the top", "times": 2}
    finally:
        server.stop()


SCENE = draw_scene(2 * 10**9 + 5)
QUESTION, ANSWER = SCENE.questions["describe"]


@each_engine
def test_fresh_scenes_are_answered_right(server):
    scenes = fresh_scenes(seed=16, count=24)
    asked = [(as_url(scene.image), *list(scene.questions.values())[i % 3]) for i, scene in enumerate(scenes)]
    for stream in (False, True):
        with ThreadPoolExecutor(8) as clients:
            answers = clients.map(lambda entry, stream=stream: server.ask(*entry[:2], stream=stream), asked)
            assert list(answers) == [truth for _, _, truth in asked]


@each_engine
def test_several_pictures_and_turns_reach_the_model(server):
    text, scenes = {"type": "text", "text": QUESTION}, (SCENE, draw_scene(7, "wide"), draw_scene(8, "square"))
    turns = [
        {"role": "system", "content": "You see pictures."},
        {"role": "user", "content": [{"type": "image", "image": SCENE.image}, text]},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": [*({"type": "image", "image": scene.image} for scene in scenes), text]},
    ]
    processor = AutoProcessor.from_pretrained(TINY)
    wanted = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=True)
    for turn in turns:
        for part in turn["content"] if isinstance(turn["content"], list) else []:
            if "image" in part:
                part.update(type="image_url", image_url={"url": as_url(part.pop("image"))})
    answer = server.client.chat.completions.create(model=TINY.name, messages=turns, max_tokens=4)
    assert answer.usage.prompt_tokens == len(wanted["input_ids"][0])


@each_engine
def test_what_is_printed_works(server):
    folder = server.log.parent / "pictures"
    SCENE.image.save(folder / "picture.png")
    curl, python = re.search(r"\n(curl .*?)\n\n(.*\))\n", server.told, flags=re.DOTALL).groups()
    assert len(python.splitlines()) == 5
    by_curl = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
    assert json.loads(by_curl.stdout)["choices"][0]["message"]["content"]
    by_python = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, cwd=folder)
    assert by_python.stdout.strip() == ANSWER, by_python.stderr


@each_engine
def test_describe_asks_a_server(server):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 8
    SCENE.image.rotate(-90, expand=True).save(server.log.parent / "turned.jpg", exif=turned, quality=95)
    result = run("describe.py", server.log.parent / "turned.jpg", "--server", f"{server.url}/v1")
    assert result.stdout == f"{ANSWER}\n", result.stderr


@each_engine
def test_pictures_are_read_from_one_folder_alone(server):
    folder = server.log.parent / "pictures"
    SCENE.image.save(folder / "scene.png")
    for url in ("scene.png", str(folder / "scene.png"), (folder / "scene.png").as_uri()):
        assert server.ask(url, QUESTION) == ANSWER
    SCENE.image.save(folder.parent / "secret.png")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    reasons = set()
    for url in ("../secret.png", "link.png", "../nothing.png", (folder.parent / "secret.png").as_uri(), "/etc/passwd"):
        with pytest.raises(openai.BadRequestError) as error:
            server.ask(url, QUESTION)
        reasons.add(re.sub(r"'.*?'", "...", error.value.body["message"]))
    assert reasons == {"There is no image ... in the directory that images are read from."}


@each_engine
def test_hostile_requests_end_in_a_reason(server):
    good, broken = as_url(SCENE.image), base64.b64encode(b"GIF89a" + bytes(20)).decode()
    cut = base64.b64encode(base64.b64decode(good.partition(",")[2])[:200]).decode()
    picture = f"data:image/png;base64,{base64.b64encode(huge_picture(20_000)).decode()}"
    chat = "/v1/chat/completions"
    requests = {
        "huge": (chat, question(picture, QUESTION), (413,), "pixels"),
        "cut": (chat, question(f"data:image/png;base64,{cut}", QUESTION), (400,), ""),
        "broken": (chat, question(f"data:image/gif;base64,{broken}", QUESTION), (400,), ""),
        "text": (chat, question("data:image/png;base64,aGVsbG8=", QUESTION), (400,), "The image must be one of"),
        "no base64": (chat, question("data:image/png;base64,%%%", QUESTION), (400,), "base64"),
        "remote": (chat, question("http://127.0.0.1:9/picture.png", QUESTION), (400,), "not fetched from '127.0.0.1'"),
        "role": (chat, {"messages": [{"role": "wizard", "content": "Hello"}]}, (400,), "'wizard'"),
        "no role": (chat, {"messages": [{"content": "Hello"}]}, (400,), "role"),
        "messages": (chat, {"messages": "Hello"}, (400,), "`messages`"),
        "video": (chat, {"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, (400,), "image_url"),
        "image token": (chat, question(good, "<im_patch>"), (400,), "<im_patch>"),
        "sizes": (chat, question(good, QUESTION, mm_processor_kwargs={"image_size": 728}), (400,), "server"),
        "tokens": (chat, question(good, QUESTION, max_tokens=-1), (400,), "max_tokens"),
        "long": (chat, question(good, "word " * 5000), (400,), "tokens"),
        "long stream": (chat, question(good, "word " * 5000, stream=True), (400,), "tokens"),
        "model": (chat, question(good, QUESTION) | {"model": "another"}, (400, 404), "another"),
        "no object": (chat, [1], (400,), "object"),
        "large": (chat, question("x" * MAX_BODY, QUESTION), (413,), "bytes"),
        "other doors": ("/load_model", {"model": "another"}, (404,), "/v1/chat/completions"),
    }
    for name, (path, body, statuses, reason) in requests.items():
        status, text = server.post(path, json.dumps(body).encode())
        assert status in statuses and reason in text, (name, status, text[:300])
        assert server.ask(good, QUESTION) == ANSWER, name
    assert server.post(chat, b"{nonsense")[0] == 400


def test_no_file_is_read_unless_a_folder_is_allowed(tmp_path):
    SCENE.image.save(tmp_path / "scene.png")
    for url in (str(tmp_path / "scene.png"), (tmp_path / "scene.png").as_uri(), "scene.png"):
        with pytest.raises(Refusal, match="must be a data: URL"):
            Rules().check("/v1/chat/completions", json.dumps(question(url, QUESTION)).encode())


def test_remote_pictures_are_left_to_the_engine_where_their_host_is_allowed():
    body = json.dumps(question("https://example.org/scene.png", QUESTION)).encode()
    assert b"https://example.org/scene.png" in Rules(domains=("example.org",)).check("/v1/chat/completions", body)
    for url in ("https://example.org.evil/scene.png", "https://user@evil/example.org", "ftp://example.org/scene.png"):
        with pytest.raises(Refusal):
            Rules(domains=("example.org",)).check("/v1/chat/completions", json.dumps(question(url, "")).encode())


def test_serve_names_what_is_wrong(tmp_path):
    def serve(*arguments) -> str:
        result = subprocess.run(command("transformers", *arguments), capture_output=True, text=True)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        return result.stderr

    assert "is not a directory" in serve(tmp_path / "none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "is taken" in serve(TINY, "--port", taken.getsockname()[1])
