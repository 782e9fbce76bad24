"""Serves a Step3 directory with an installed engine, through the OpenAI API.

python scripts/serve.py DIRECTORY
python scripts/serve.py DIRECTORY --engine vllm --port 8080 -- --tensor-parallel-size 8

Clients need the key in the environment variable STEP3_API_KEY, if there is one.
"""

import argparse
import asyncio
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


# Seconds that an engine has to stop after a signal.
PATIENCE = 10
PR_SET_PDEATHSIG = 1  # of Linux

TOLD = "Serving at {url}/v1 until Ctrl-C. Try it with curl or Python:\n"
TEXT_REQUEST = """
curl {url}/v1/chat/completions -H 'Content-Type: application/json' {header}\\
  -d {body}
"""
PICTURE_REQUEST = """
import base64, openai, os
data = "data:image/png;base64," + base64.b64encode(open("picture.png", "rb").read()).decode()
content = [{{"type": "image_url", "image_url": {{"url": data}}}}, {{"type": "text", "text": "Describe this picture."}}]
completions = openai.OpenAI(base_url="{url}/v1", api_key=os.environ.get("STEP3_API_KEY", "none")).chat.completions
print(completions.create(model={name}, messages=[{{"role": "user", "content": content}}]).choices[0].message.content)
"""


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Starts an engine, in its own session, so that Ctrl-C does not reach it. On Linux, it ends with this process."""

    def end_with_parent() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    environment.pop("STEP3_API_KEY", None)
    options = {"stdout": sys.stderr, "start_new_session": True, "preexec_fn": end_with_parent}
    return subprocess.Popen(command, env=environment, **options)


def stop(engine: subprocess.Popen) -> None:
    """Stops an engine and all its processes, by force if they ignore other signals."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        if engine.poll() is None:
            os.killpg(engine.pid, kind)
            try:
                engine.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(engine.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have stopped
        pass
    engine.wait()


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """A socket that listens, and its URL for a client on this machine. Raises a `ValueError` if that is impossible."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = f"Port {port} of {host} is taken or not available; choose another. ({error})"
        raise ValueError(reason) from None
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return listener, f"http://{name}:{listener.getsockname()[1]}"


async def run(server, gateway, listener: socket.socket, engine: subprocess.Popen, told: str) -> int | None:
    """Serves until a signal comes or the engine stops. Returns the engine's status, or None after a signal."""
    from starlette.exceptions import HTTPException

    async def watch() -> None:
        while engine.poll() is None:
            if not gateway.is_ready:
                try:
                    await gateway.health()
                    gateway.is_ready = True
                    print(told, flush=True)
                except HTTPException:  # models can take long to load
                    pass
            await asyncio.sleep(0.5)
        server.should_exit = True

    watcher = asyncio.create_task(watch())
    await server.serve(sockets=[listener])
    watcher.cancel()
    return engine.poll()


def serve(arguments: argparse.Namespace) -> None:
    """Serves until a signal comes. Raises an `OSError` or `ValueError` if it is not possible or the engine stops."""
    from checkpoint_files import read_checkpoint
    from gateway import Gateway, web_server
    from request_guard import Pictures
    from serving_engines import ENGINES

    directory, key = Path(os.path.abspath(arguments.directory)), os.environ.get("STEP3_API_KEY")
    if (directory / "adapter_config.json").exists() and not (directory / "config.json").exists():
        raise ValueError(f"{directory} holds a LoRA adapter, which no engine serves; merge it: finetune.py --merge.")
    installed = [name for name in ENGINES if ENGINES[name].is_installed()]
    kind = arguments.engine or next(iter(installed), "transformers")
    if kind not in installed:
        raise ValueError(f"--engine must be one of {', '.join(ENGINES)} and installed here, got {kind}.")
    if key == "":
        raise ValueError("STEP3_API_KEY is empty; unset it, or set it to a key.")
    if key is None and arguments.host not in ("127.0.0.1", "::1", "localhost"):
        print("Warning: anyone who reaches this machine can ask. Set STEP3_API_KEY to a key.", file=sys.stderr)
    engine, name = ENGINES[kind](read_checkpoint(directory), arguments.thinking), arguments.name or directory.name
    with tempfile.TemporaryDirectory(prefix="step3-") as folder:
        command, environment = engine.command(f"{folder}/engine", arguments.options)
        listener, url = listen(arguments.host, arguments.port)
        gateway = Gateway(
            engine=engine,
            socket=f"{folder}/engine",
            name=name,
            pictures=Pictures(arguments.pictures_from, tuple(map(str.lower, arguments.pictures_from_host))),
            key=key,
            hosts=[host.lower() for host in (arguments.host, socket.gethostname(), *arguments.allow_host)],
            max_requests=arguments.max_requests or engine.max_requests,
        )
        server = web_server(gateway)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, server.handle_exit)
        body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello"}]})
        header = '-H "Authorization: Bearer $STEP3_API_KEY" ' if key else ""
        told = f"{TOLD}{TEXT_REQUEST}{PICTURE_REQUEST * engine.takes_pictures}".format(
            url=url, name=json.dumps(name), body=shlex.quote(body), header=header
        )
        print("Starting:", shlex.join(command), file=sys.stderr, flush=True)
        process = start(command, environment)
        try:
            status = asyncio.run(run(server, gateway, listener, process, told))
        finally:
            stop(process)
    if status is not None:
        raise ValueError(f"The engine stopped with status {status}.")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], epilog="Options after -- are passed to the engine's own `serve` command."
    )
    parser.add_argument("directory", type=Path, help="a checkpoint that convert_checkpoint.py --check accepts")
    parser.add_argument("--engine", metavar="NAME", help="vllm or transformers (default: the first that is installed)")
    parser.add_argument("--name", help="the model's name for clients (default: the directory's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    parser.add_argument("--allow-host", action="append", default=[], metavar="HOST", help="a name of this server")
    parser.add_argument("--max-requests", type=int, metavar="N", help="open at a time, others get status 429")
    parser.add_argument("--thinking", action="store_true", help="let the model reason before it answers")
    pictures = parser.add_argument_group("images", "Requests contain their images as data: URLs. Also accept:")
    pictures.add_argument("--pictures-from", type=Path, metavar="FOLDER", help="paths of images in this folder")
    host_help = "URLs of images on this host"
    pictures.add_argument("--pictures-from-host", action="append", default=[], metavar="HOST", help=host_help)
    parsed = parser.parse_args(arguments[:end])
    parsed.options = arguments[end + 1 :]
    if parsed.pictures_from and not parsed.pictures_from.is_dir():
        parser.error(f"--pictures-from must be a directory, got {parsed.pictures_from}")
    try:
        serve(parsed)
    except ModuleNotFoundError as error:
        print(f'Serving needs {error.name}: pip install "step3-vl[serve]"', file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print("Stopped.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
