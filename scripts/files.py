"""Writes files and directories that appear only when they are complete, and parses untrusted JSON and data: URLs."""

import argparse
import base64
import errno
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


MAX_JSON_DEPTH = 50


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Makes the `OSError` of a full disk name `path`, or the file beside it that was being written, not a source."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None
    except OSError as error:
        if error.filename is None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = Path(error.filename2 or path).name
            raise OSError(error.errno, error.strerror or str(error), str(path.with_name(name))) from None
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yields a temporary path beside `path` for a file or directory, and renames it to `path` when it is complete and on
    the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path), tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        yield unfinished
        sync_all(unfinished)
        unfinished.replace(path)
        sync(path.parent)


@contextmanager
def locked(path: Path, target: Path) -> Iterator[None]:
    """
    Holds the lock of a file, which it creates, while `target` is written. Raises a `BlockingIOError` if another process
    holds it.
    """
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another run is writing it", str(target)) from None
        yield


def sync_all(path: Path) -> None:
    """Waits until a file, or a directory with all that is in it, is on the disk."""
    for part in (*path.rglob("*"), path):
        sync(part)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(data)


def write_json(path: Path, value: dict) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def new_directory(text: str) -> Path:
    """Parses the option for a directory to create."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} exists already; choose another directory or remove it")
    return Path(text)


def save_whole(directory: Path, *parts) -> None:
    """Saves a model and its processor in `directory`."""
    with replacing(directory) as unfinished:
        for part in parts:
            part.save_pretrained(unfinished)


def shown(value: object) -> str:
    """The value as JSON in ASCII for a message, at most 60 characters long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def parse_json(data: bytes) -> dict:
    """
    The JSON object in `data`, which is UTF-8. Raises a `ValueError` if it is something else, repeats a key, is nested
    too deeply or contains NaN or an infinity.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"has the key {shown(max(keys, key=keys.count))} twice in one object")
        return dict(pairs)

    def refuse(name: str):
        raise ValueError(f"is not JSON: {name} is not a number")

    try:
        value = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg}, at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, got {shown(value)}")
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        entries = (entry for parent in level for entry in (parent.values() if isinstance(parent, dict) else parent))
        level = [entry for entry in entries if isinstance(entry, dict | list)]
    if level:
        raise ValueError("is nested too deeply")
    return value


def picture_of(url: str) -> bytes:
    """The image file in a base64 data: URL. Raises a `ValueError` if it is not one."""
    head, _, data = url.partition(",")
    if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ValueError(f"a data: URL must start with data:image/...;base64, got {shown(head)}")
    try:
        return base64.b64decode("".join(data.split()), validate=True)  # lines may end anywhere
    except ValueError as error:
        raise ValueError(f"the data: URL is not base64: {error}") from None
