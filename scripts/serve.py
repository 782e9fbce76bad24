"""Serves a Step3 directory with an installed engine, through the OpenAI API.

python scripts/serve.py DIRECTORY
python scripts/serve.py DIRECTORY --engine vllm --port 8080 -- --tensor-parallel-size 8
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.error import URLError

from checkpoint_files import Checkpoint, CheckpointError, Step3VLConfig, read_checkpoint
from engines import RELEASED_SIZES, picture_sizes
from request_guard import Rules
from transformers import AutoTokenizer


SCRIPTS = Path(__file__).resolve().parent
LOOPBACK = "127.0.0.1"
TOOL_TOKENS = ("<｜tool_calls_begin｜>", "<｜tool_call_begin｜>", "<｜tool_call_end｜>", "<｜tool_calls_end｜>")
THINK_START, THINK_END = "<think>", "</think>"
# Seconds that an engine has to stop after a signal.
PATIENCE = 10

TEXT_REQUEST = """
curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
"""
PICTURE_REQUEST = """
import base64, openai
data = "data:image/png;base64," + base64.b64encode(open("picture.png", "rb").read()).decode()
content = [{{"type": "image_url", "image_url": {{"url": data}}}}, {{"type": "text", "text": "Describe this picture."}}]
completions = openai.OpenAI(base_url="{url}/v1", api_key="none").chat.completions
print(completions.create(model="{name}", messages=[{{"role": "user", "content": content}}]).choices[0].message.content)
"""


class ServingError(Exception):
    """Says why a directory cannot be served."""


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def find_vllm() -> str | None:
    """The `vllm` command next to this Python, or else on the path."""
    return shutil.which("vllm", path=Path(sys.executable).parent) or shutil.which("vllm")


def parser_options(directory: Path, thinks: bool) -> list[str]:
    """
    vLLM's options for tool calls, if the tokenizer has their tokens, and for reasoning, if the prompt starts it. Raises
    a `ServingError` if there is no chat template, or if `thinks` and the model has no token for the end of reasoning.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ServingError(f"{directory}: has no chat template, which vLLM needs; save the processor there.")
    vocabulary = tokenizer.get_vocab()
    messages, extra = [{"role": "user", "content": "Hello"}], {"enable_thinking": True} if thinks else {}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **extra)
    options = []
    if vocabulary.keys() >= set(TOOL_TOKENS):
        options += ["--enable-auto-tool-choice", "--tool-call-parser", "step3"]
    # vLLM removes special tokens before it looks for the end of the reasoning. If the prompt does not start reasoning,
    # there is no end, and the whole answer would count as reasoning.
    can_end = THINK_END in vocabulary and not tokenizer.added_tokens_decoder[vocabulary[THINK_END]].special
    if prompt.rstrip().endswith(THINK_START) and can_end:
        options += ["--reasoning-parser", "step3"]
    elif thinks:
        needed = f"a template that starts answers with {THINK_START}, and {THINK_END} as a token that is not special"
        raise ServingError(f"--thinking needs {needed}.")
    if thinks:
        options += ["--default-chat-template-kwargs", '{"enable_thinking": true}']
    return options


def engine_command(checkpoint: Checkpoint, arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """
    The command that serves a checkpoint, to be run in its parent directory, and the environment variables to add.
    Raises a `ServingError` if the engine is not installed or cannot serve the checkpoint.
    """
    name, takes_pictures = checkpoint.directory.name, isinstance(checkpoint.config, Step3VLConfig)
    sizes = picture_sizes(checkpoint) if takes_pictures else RELEASED_SIZES
    rules = Rules(
        folder=arguments.pictures_from and str(arguments.pictures_from.resolve()),
        domains=arguments.pictures_from_host,
        takes_pictures=takes_pictures,
        takes_stop=arguments.engine == "vllm" or not takes_pictures,
        sizes=sizes if arguments.engine == "vllm" and sizes != RELEASED_SIZES else None,
        starts_streams_early=arguments.engine == "transformers",
    )
    environment = {"HF_HUB_OFFLINE": "1", **rules.to_environment()}
    options = ["--host", arguments.host, "--port", str(arguments.port)]
    if arguments.engine == "transformers":
        if missing := [name for name in ("fastapi", "uvicorn", "openai", "step3_vl") if not is_installed(name)]:
            raise ServingError(f'transformers serve needs {", ".join(missing)}: pip install "step3-vl[serve]"')
        options += ["--reasoning", "on"] * arguments.thinking
        command = [sys.executable, str(SCRIPTS / "request_guard.py"), "serve", name, *options]
        return [*command, *arguments.options], environment
    vllm = find_vllm()
    if vllm is None:
        raise ServingError("The `vllm` command was not found; activate the environment that has it.")
    options += ["--served-model-name", name, "--middleware", "request_guard.RequestGuard"]
    options += ["--allowed-media-domains", *(arguments.pictures_from_host or ["nowhere.invalid"])]
    options += parser_options(checkpoint.directory, arguments.thinking)
    if checkpoint.config.dtype is not None:
        options += ["--dtype", str(checkpoint.config.dtype).removeprefix("torch.")]
    if rules.sizes:
        options += ["--mm-processor-kwargs", json.dumps(sizes), "--trust-request-mm-kwargs"]
    environment |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")])),
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
    }
    return [vllm, "serve", name, *options, *arguments.options], environment


def is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def wait_until_ready(server: subprocess.Popen, url: str) -> None:
    """
    Waits until a server answers, without a time limit, because models can take long to load. Raises a `ServingError` if
    the server stops first.
    """
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
        if server.poll() is not None:
            raise ServingError(f"The engine stopped with status {server.returncode} before it was ready.")


def stop(server: subprocess.Popen) -> None:
    """Stops a server and all its processes, by force if they ignore other signals."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        if server.poll() is None:
            os.killpg(server.pid, kind)
            try:
                server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have stopped
        pass
    server.wait()


def serve(arguments: argparse.Namespace) -> None:
    checkpoint = read_checkpoint(Path(os.path.abspath(arguments.directory)))
    command, environment = engine_command(checkpoint, arguments)
    if not is_free(arguments.host, arguments.port):
        raise ServingError(f"Port {arguments.port} of {arguments.host} is taken or not available; choose another.")
    url = f"http://{LOOPBACK if arguments.host == '0.0.0.0' else arguments.host}:{arguments.port}"
    print("Starting:", *command, file=sys.stderr, flush=True)
    # In its own session, so that Ctrl-C reaches only this process, which stops the server.
    server = subprocess.Popen(
        command,
        stdout=sys.stderr,
        cwd=checkpoint.directory.parent,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        wait_until_ready(server, url)
        request = TEXT_REQUEST + PICTURE_REQUEST * isinstance(checkpoint.config, Step3VLConfig)
        print(f"Serving at {url}/v1 until Ctrl-C. Try it with curl or Python:")
        print(request.format(url=url, name=checkpoint.directory.name), flush=True)
        if server.wait() != 0:
            raise ServingError(f"The engine stopped with status {server.returncode}.")
    finally:
        stop(server)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="Options after -- are passed to the engine's own `serve` command."
    )
    parser.add_argument("directory", type=Path, help="a checkpoint that convert_checkpoint.py --check accepts")
    parser.add_argument("--engine", choices=["transformers", "vllm"], help="(default: vllm if installed)")
    parser.add_argument("--host", default=LOOPBACK, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    pictures = parser.add_argument_group("images", "Requests contain their images as data: URLs. Also accept:")
    pictures.add_argument("--pictures-from", type=Path, metavar="FOLDER", help="paths of images in this folder")
    host_help = "URLs of images on this host"
    pictures.add_argument("--pictures-from-host", action="append", default=[], metavar="HOST", help=host_help)
    parsed = parser.parse_args(arguments[:end])
    parsed.options = arguments[end + 1 :]
    parsed.engine = parsed.engine or ("vllm" if find_vllm() else "transformers")
    if parsed.pictures_from and not parsed.pictures_from.is_dir():
        parser.error(f"--pictures-from must be a directory, got {parsed.pictures_from}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it for background processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        serve(parsed)
    except (CheckpointError, ServingError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
