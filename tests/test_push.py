"""`scripts/push_to_hub.py` with the hub's real client, and a hub that answers on this machine."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import push_to_hub
import pytest
from checkpoint_files import Step3TextConfig, Step3VLConfig
from conftest import ROOT, run
from safetensors.torch import load_file, save_file


REPO = "someone/step3-variant"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload and a download ask for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.blobs, self.uploads = {}, {}, []
        self.broken = False

    def files(self) -> dict[str, bytes]:
        return self.repos[REPO]["files"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: bytes | dict | list = b"", status: int = 200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self):
        hub, body = self.server, self.body()
        if self.path == "/api/repos/create":
            settings = json.loads(body)
            repo_id = f"{settings['organization']}/{settings['name']}"
            is_private = settings.get("visibility") == "private" or settings.get("private")  # by the client's version
            hub.repos.setdefault(repo_id, {"files": {}, "private": is_private})
            self.answer({"url": f"{hub.address}/{repo_id}", "id": repo_id})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for entry in objects:
                if entry["oid"] not in hub.blobs:
                    entry["actions"] = {"upload": {"href": f"{hub.address}/blobs/{entry['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files()[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files()[value["path"]] = hub.blobs[value["oid"]]
            self.answer({"commitUrl": f"{hub.address}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer(status=404)

    def do_PUT(self):
        oid, body = self.path.removeprefix("/blobs/"), self.body()
        if self.server.broken and self.server.uploads:
            self.answer(status=403)
            return
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.blobs[oid] = body
        self.server.uploads.append(oid)
        self.answer(ETag=oid)

    def do_GET(self):
        hub = self.server
        match = re.fullmatch(rf"/(api/models/)?{REPO}(?:/(resolve|tree|revision)/[^/]+)?/?([^?]*)(\?.*)?", self.path)
        if match is None or REPO not in hub.repos:
            self.answer(status=404, X_Error_Code="RepoNotFound")
        elif match[2] == "tree":
            prefix = match[3]
            entries = [] if prefix else hub.files()
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "1"} for path in entries])
        elif match[1]:
            siblings = [{"rfilename": path} for path in hub.files()]
            self.answer({"id": REPO, "sha": "0" * 40, "siblings": siblings, "private": False})
        elif match[3] in hub.files():
            content = hub.files()[match[3]]
            etag = hashlib.sha256(content).hexdigest()
            self.answer(content, ETag=f'"{etag}"', X_Repo_Commit="0" * 40)
        else:
            self.answer(status=404, X_Error_Code="EntryNotFound", X_Repo_Commit="0" * 40)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(hub, tmp_path):
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "nobody",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # Xet's servers are not of this hub's kind
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }

    def push(*arguments):
        return run("push_to_hub.py", *arguments, **environment)

    push.environment = environment
    return push


@pytest.fixture
def directory(random_model_dir, tmp_path) -> Path:
    target = tmp_path / "model"
    assert convert_checkpoint.main([str(random_model_dir), str(target), "--max-shard-size", "300KB", "--verify"]) == 0
    return target


def test_what_is_pushed_loads_from_the_hub(hub, push, directory, tmp_path):
    listed = push(directory, REPO, "--dry-run")
    assert listed.returncode == 0 and not hub.repos, listed.stderr
    assert "Warning: vLLM" in listed.stderr and "224 and 112 px" in listed.stderr

    hub.broken = True  # after the first file
    result = push(directory, REPO, "--private")
    assert result.returncode == 1 and "403" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(hub.uploads) >= 1 and not hub.files()
    hub.broken = False
    sent = list(hub.uploads)
    result = push(directory, REPO, "--private")
    assert result.returncode == 0, result.stderr
    assert hub.repos[REPO]["private"] and len(set(hub.uploads)) == len(hub.uploads) > len(sent)
    assert hub.files() == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    lines = [line.split() for line in listed.stdout.splitlines()[:-1]]
    assert {name: int(size.replace(",", "")) for size, name in lines} == {
        name: len(content) for name, content in hub.files().items()
    }

    card = hub.files()["README.md"].decode()
    for line in ("library_name: transformers", "pipeline_tag: image-text-to-text", "license: apache-2.0"):
        assert line in card
    assert "base_model" not in card  # it was made from nothing
    usage = card.split("```python\n")[1].split("```")[0]
    code = "import sys, torch; from transformers import AutoModelForImageTextToText as A\n"
    code += "load = lambda name: A.from_pretrained(name, trust_remote_code=True)(torch.arange(20)[None]).logits\n"
    code += f"assert torch.equal(load({REPO!r}), load(sys.argv[1]))\n" + usage
    shutil.copy(ROOT / "LICENSE", tmp_path)
    from draw_scene import draw_scene

    draw_scene(0).image.convert("RGB").save(tmp_path / "picture.jpg")
    environment = {**os.environ, **push.environment}
    command = [sys.executable, "-c", code, directory]
    used = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert used.returncode == 0 and used.stdout.strip(), used.stderr


def test_a_checkpoint_on_the_hub_is_converted(push, directory, tmp_path):
    assert push(directory, REPO).returncode == 0
    result = run("convert_checkpoint.py", REPO, tmp_path / "target", "--to-single", **push.environment)
    assert result.returncode == 0, result.stderr
    single = run("convert_checkpoint.py", directory, tmp_path / "expected", "--to-single")
    assert single.returncode == 0, single.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "target").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    missing = run("convert_checkpoint.py", "someone/nothing", tmp_path / "none", **push.environment)
    assert missing.returncode == 1 and "the hub does not provide it" in missing.stderr, missing.stderr


def test_a_card_is_completed_not_replaced(hub, push, directory):
    (directory / "README.md").write_text("---\nlicense: mit\nbase_model: someone/else\n---\n# Mine\n\nMy words.\n")
    assert push(directory, REPO).returncode == 0
    card = hub.files()["README.md"].decode()
    assert "license: mit" in card and "base_model: someone/else" in card and "# Mine\n\nMy words." in card
    assert "library_name: transformers" in card and "trust_remote_code=True" in card


def test_the_base_is_named_where_it_is_known(push, directory):
    assert push_to_hub.base_model_of(SimpleNamespace(config=Step3VLConfig())) == "stepfun-ai/step3"
    assert push_to_hub.base_model_of(SimpleNamespace(config=Step3TextConfig())) == "stepfun-ai/step3"
    assert push_to_hub.base_model_of(SimpleNamespace(config=Step3VLConfig.from_pretrained(directory))) is None
    assert push(directory, REPO, "--base-model", "someone/base").returncode == 0
    assert "base_model: someone/base" in (directory / "README.md").read_text()


@pytest.mark.parametrize("header", ["license: [mit", "- mit", "1: mit", "model-index: 5", "license: \x01", "a: \udcff"])
def test_a_broken_header_is_one_fault(directory, capsys, header):
    (directory / "README.md").write_bytes(f"---\n{header}\n---\n# Mine\n".encode(errors="surrogateescape"))
    assert push_to_hub.main([str(directory), REPO, "--dry-run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("README.md: its YAML header cannot be read: "), lines


@pytest.mark.parametrize("repo_id", ["noslash", "a/b/c", ".a/b", "a/b.git", "a/b--c", "a/", "/b", "a/b c", ""])
def test_a_malformed_id_is_refused(capsys, repo_id):
    assert push_to_hub.main(["nothing", repo_id, "--dry-run"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{repo_id}: "), lines


# With a bar in each, so that what looks for secrets finds none here.
SECRETS = {
    "hf_|aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": "a Hugging Face token",
    "github_pat|_11AAAAAAA0aaaaaaaaaaaa_bbbbbbbbbbbbbbbbbb": "a GitHub token",
    "ghp|_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": "a GitHub token",
    "glpat|-aaaaaaaaaaaaaaaaaaaa": "a GitLab token",
    "AIza|SyAaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": "a Google API key",
    "xoxb|-123456789012-aaaaaaaa": "a Slack token",
    "AKIA|AAAAAAAAAAAAAAAA": "an AWS key",
    "aws_secret_access_key = aaaaaaaaaaaaaaaaaaaa/|aaaaaaaaaaaaaaaaaaa": "an AWS key",
    "WANDB_API_KEY=0123456789abcdef0123|456789abcdef01234567": "a W&B API key",
    "sk-proj-|aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa": "an API key",
    "eyJhbGciOiJIUzI1NiJ9.|eyJzdWIiOiIxMjM0In0.aaaaaaaaaaaaaaaa": "a JSON web token",
    "https://me:word|@example.org/x": "a password in a URL",
    "-----BEGIN RSA PRIV|ATE KEY-----": "a private key",
    "/home/|me/model": "a path on a machine",
    "C:\\Users|\\me\\model": "a path on a machine",
}


def test_secrets_are_found_wherever_they_are(directory, capsys):
    secrets = [text.replace("|", "") for text in SECRETS]
    (directory / "README.md").write_text("\n".join(secrets))
    path = sorted(directory.glob("*.safetensors"))[0]
    save_file(load_file(path), path, metadata={"format": "pt", "made by": secrets[0], "from": "/Users/me/base"})
    for name, key in {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path"}.items():
        settings = json.loads((directory / name).read_text()) | {key: "/data/base"}
        (directory / name).write_text(json.dumps(settings))
    generation = json.loads((directory / "generation_config.json").read_text()) | {"base": "/root/base"}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    assert push_to_hub.main([str(directory), REPO, "--dry-run"]) == 1
    found = capsys.readouterr().err.splitlines()
    expected = [f"README.md: line {number} looks like {kind}." for number, kind in enumerate(SECRETS.values(), start=1)]
    places = ["config.json: line 1", "generation_config.json: line 1", "tokenizer_config.json: line 1"]
    expected += [f"{place} looks like a path on a machine." for place in [*places, f"{path.name}: metadata 'from'"]]
    expected.append(f"{path.name}: metadata 'made by' looks like a Hugging Face token.")
    assert sorted(found) == sorted(expected)


def test_what_is_no_secret_goes_up(tmp_path, capsys):
    assert convert_checkpoint.main([str(ROOT / "checkpoints" / "step3-tiny"), str(tmp_path / "tiny")]) == 0
    assert push_to_hub.main([str(tmp_path / "tiny"), REPO, "--dry-run"]) == 0, capsys.readouterr()
    for line in (
        "https://wandb.ai/me/project/runs/a1b2c3d4 at 0123456789abcdef0123456789abcdef01234567",
        "https://example.org:8000/@me",
        "risk-adjusted-returns-of-many-and-various-portfolios",
        '{"_name_or_path": "stepfun-ai/step3", "text": "/home/ and /Users/"}',
    ):
        assert not [kind for kind, pattern in push_to_hub.SECRETS.items() if re.search(pattern, line)], line


def test_everything_that_must_not_go_up_is_named(hub, push, directory):
    (directory / ".env").write_text("PASSWORD=1")
    (directory / "training_args.bin").write_bytes(b"\x80\x04.")
    with (directory / "modeling_step3.py").open("a") as file:
        file.write("\nimport os\n")
    (directory / "README.md").write_text("# Mine\n\ntoken: hf_" + "a" * 34)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling_step3.Step3VLModel"
    (directory / "config.json").write_text(json.dumps(config))
    result = push(directory, REPO)
    assert result.returncode == 1 and not hub.repos
    for text in (
        ".env: is not part of a model",
        "training_args.bin: is not part",
        "modeling_step3.py: is not the package's version",
        "README.md: line 3 looks like a Hugging Face token",
        "`auto_map` must name modeling_step3.Step3VLModel for AutoModel, got 'someone/else--",
    ):
        assert text in result.stderr, (text, result.stderr)
    assert len(result.stderr.splitlines()) == 5 and "a" * 34 not in result.stderr
