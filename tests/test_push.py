"""`scripts/push_to_hub.py` with the hub's real client, and a hub that answers on this machine."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import convert_checkpoint
import push_to_hub
import pytest
from checkpoint_files import Step3TextConfig, Step3VLConfig
from conftest import ROOT, assert_same_files, edit_json, python, run
from draw_scene import draw_scene
from safetensors.torch import load_file, save_file


REPO = "someone/step3-variant"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload and a download ask for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files, self.space, self.is_private, self.broken = {}, {}, None, False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

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
        hub = self.server
        lines = [json.loads(line) for line in self.rfile.read(int(self.headers["Content-Length"])).splitlines()]
        if self.path == "/api/repos/create":
            # By the client's version.
            hub.is_private = lines[0].get("visibility") == "private" or bool(lines[0].get("private"))
            self.answer({"url": f"{hub.address}/{REPO}", "id": REPO})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": file["path"], **mode} for file in lines[0]["files"]]})
        elif "/commit/" in self.path and not hub.broken:
            files = [line["value"] for line in lines if line["key"] == "file"]
            uploaded = hub.space if self.path.startswith("/api/spaces/") else hub.files
            uploaded |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            for line in lines:
                if line["key"] == "deletedFile":
                    del uploaded[line["value"]["path"]]
            self.answer({"commitUrl": f"{hub.address}/{REPO}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer(status=403)

    def do_GET(self):
        hub = self.server
        match = re.fullmatch(rf"/(api/models/)?{REPO}(?:/(resolve|tree|revision)/[^/]+)?/?([^?]*)(\?.*)?", self.path)
        if match is None or hub.is_private is None:  # not created
            self.answer(status=404, X_Error_Code="RepoNotFound")
        elif match[2] == "tree":
            paths = [] if match[3] else hub.files  # of a folder that is not there, or all
            self.answer([{"type": "file", "path": path, "size": 1, "oid": "1"} for path in paths])
        elif match[1]:
            siblings = [{"rfilename": path} for path in hub.files]
            self.answer({"id": REPO, "sha": "0" * 40, "siblings": siblings, "private": False})
        elif match[3] in hub.files:
            content = hub.files[match[3]]
            self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit="0" * 40)
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


def test_what_is_pushed_loads_from_the_hub(hub, push, directory, tmp_path, capsys):
    assert push_to_hub.main([str(directory), REPO, "--dry-run"]) == 0
    listed = capsys.readouterr()
    assert "Warning: vLLM" in listed.err and "224 and 112 px" in listed.err

    hub.broken = True
    result = push(directory, REPO, "--private")
    assert result.returncode == 1 and "403" in result.stderr and "Traceback" not in result.stderr, result.stderr
    hub.broken = False
    hub.files["model.safetensors"] = b"weights of an earlier upload, which would be loaded instead"
    (directory / ".gitattributes").write_text("the hub's own")
    result = push(directory, REPO, "--private", "--space")
    assert result.returncode == 0 and hub.is_private, result.stderr
    assert hub.space.keys() == {"README.md", "app.py", "page.py", "requirements.txt"}
    assert f"models: [{REPO}]" in hub.space["README.md"].decode()
    (directory / ".gitattributes").unlink()
    assert hub.files == {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    lines = [line.split() for line in listed.out.splitlines()[:-1]]
    sizes = {name: len(content) for name, content in hub.files.items()}
    assert {name: int(size.replace(",", "")) for size, name in lines} == sizes

    card = hub.files["README.md"].decode()
    for line in ("library_name: transformers", "pipeline_tag: image-text-to-text", "license: apache-2.0"):
        assert line in card
    assert "base_model" not in card  # it was made from nothing
    usage = card.split("```python\n")[1].split("```")[0]
    code = "import sys, torch; from transformers import AutoModelForImageTextToText as A\n"
    code += "load = lambda name: A.from_pretrained(name, trust_remote_code=True)(torch.arange(20)[None]).logits\n"
    code += f"assert torch.equal(load({REPO!r}), load(sys.argv[1]))\n" + usage
    shutil.copy(ROOT / "LICENSE", tmp_path)
    draw_scene(0).image.convert("RGB").save(tmp_path / "picture.jpg")
    used = python("-c", code, directory, cwd=tmp_path, **push.environment)
    assert used.returncode == 0 and used.stdout.strip(), used.stderr


def test_a_checkpoint_on_the_hub_is_converted(push, directory, tmp_path):
    assert push(directory, REPO).returncode == 0
    result = run("convert_checkpoint.py", REPO, tmp_path / "target", "--to-single", **push.environment)
    assert result.returncode == 0, result.stderr
    assert convert_checkpoint.main([str(directory), str(tmp_path / "expected"), "--to-single"]) == 0
    assert_same_files(tmp_path / "target", tmp_path / "expected")
    missing = run("convert_checkpoint.py", "someone/nothing", tmp_path / "none", **push.environment)
    assert missing.returncode == 1 and "the hub does not provide it" in missing.stderr, missing.stderr


def test_a_card_is_completed_not_replaced(hub, push, directory):
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    assert push(directory, REPO, "--base-model", "someone/base").returncode == 0
    card = hub.files["README.md"].decode()
    for text in ("license: mit", "base_model: someone/base", "# Mine\n\nMy words.", "library_name: transformers"):
        assert text in card
    assert "trust_remote_code=True" in card


def test_the_base_is_named_where_it_is_known(directory):
    own = Step3VLConfig.from_pretrained(directory)
    for config, base in ((Step3VLConfig(), "stepfun-ai/step3"), (Step3TextConfig(), "stepfun-ai/step3"), (own, None)):
        assert push_to_hub.base_model_of(SimpleNamespace(config=config)) == base


def the_fault(capsys, *arguments) -> str:
    """The only line that a run tells, which fails."""
    assert push_to_hub.main([*map(str, arguments), "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("header", ["license: [mit", "- mit", "1: mit", "model-index: 5", "license: \x01", "a: \udcff"])
def test_a_broken_header_is_one_fault(directory, capsys, header):
    (directory / "README.md").write_bytes(f"---\n{header}\n---\n# Mine\n".encode(errors="surrogateescape"))
    assert the_fault(capsys, directory, REPO).startswith("README.md: its YAML header cannot be read: ")


@pytest.mark.parametrize("repo_id", ["noslash", "a/b/c", ".a/b", "a/b.git", "a/b--c", "a/", "/b", "a/b c", ""])
def test_a_malformed_id_is_refused(capsys, repo_id):
    assert the_fault(capsys, "nothing", repo_id).startswith(f"{repo_id}: ")


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
    paths = {"config.json": "_name_or_path", "tokenizer_config.json": "name_or_path", "generation_config.json": "base"}
    for name, key in paths.items():
        edit_json(directory / name, lambda settings, key=key: settings.update({key: "/root/base"}))
    assert push_to_hub.main([str(directory), REPO, "--dry-run"]) == 1
    expected = [f"README.md: line {number} looks like {kind}." for number, kind in enumerate(SECRETS.values(), start=1)]
    places = [*(f"{name}: line 1" for name in paths), f"{path.name}: metadata 'from'"]
    expected += [f"{place} looks like a path on a machine." for place in places]
    expected.append(f"{path.name}: metadata 'made by' looks like a Hugging Face token.")
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(expected)


def test_what_is_no_secret_goes_up(tmp_path, capsys):
    assert convert_checkpoint.main([str(ROOT / "checkpoints" / "step3-tiny"), str(tmp_path / "tiny")]) == 0
    assert push_to_hub.main([str(tmp_path / "tiny"), REPO, "--dry-run"]) == 0, capsys.readouterr()
    for line in (
        "https://wandb.ai/me/project/runs/a1b2c3d4 at 0123456789abcdef0123456789abcdef01234567",
        "https://example.org:8000/@me",
        "risk-adjusted-returns-of-many-and-various-portfolios",
        '{"_name_or_path": "stepfun-ai/step3", "text": "/home/ and /Users/, https://example.com/home/page/"}',
    ):
        assert not [kind for kind, pattern in push_to_hub.SECRETS.items() if re.search(pattern, line)], line


def test_everything_that_must_not_go_up_is_named(directory, capsys):
    (directory / ".env").write_text("PASSWORD=1")
    (directory / "training_args.bin").write_bytes(b"\x80\x04.")
    with (directory / "modeling_step3.py").open("a") as file:
        file.write("\nimport os\n")
    (directory / "README.md").write_text("# Mine\n\ntoken: hf_" + "a" * 34)
    foreign = {"AutoModel": "someone/else--modeling_step3.Step3VLModel"}
    edit_json(directory / "config.json", lambda config: config["auto_map"].update(foreign))
    assert push_to_hub.main([str(directory), REPO]) == 1
    told = capsys.readouterr().err
    for text in (
        ".env: is not part of a model",
        "training_args.bin: is not part",
        "modeling_step3.py: is not the package's version",
        "README.md: line 3 looks like a Hugging Face token",
        "`auto_map` must name modeling_step3.Step3VLModel for AutoModel, got 'someone/else--",
    ):
        assert text in told, (text, told)
    assert len(told.splitlines()) == 5 and "a" * 34 not in told
