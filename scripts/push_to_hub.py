"""Uploads a directory with a Step3 model to the Hugging Face hub, after it has been checked.

python scripts/push_to_hub.py DIRECTORY USER/NAME --dry-run
python scripts/push_to_hub.py DIRECTORY USER/NAME --private
"""

import argparse
import ast
import functools
import re
import sys
from pathlib import Path

from checkpoint_files import (
    CODE_FILES,
    INDEX,
    ROOT,
    Checkpoint,
    CheckpointError,
    Step3VLConfig,
    expected_shapes,
    locate,
    quote,
    read_checkpoint,
    read_json,
)
from convert_checkpoint import CARRIED_FILES, MANIFEST
from engines import engine_facts, warnings
from files import write_bytes
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError  # of httpx, or of what took its place
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from yaml import YAMLError


# What the hub's client leaves in a directory, and does not upload.
OWN_FOLDERS = (".cache", ".git")
SECRETS = {
    "a Hugging Face token": r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": r"gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}",
    "a GitLab token": r"glpat-[\w-]{20,}",
    "a Google API key": r"AIza[\w-]{35}",
    "a Slack token": r"xox[abeprs]-[\w-]{10,}",
    "an AWS key": r"(?:AKIA|ASIA)[0-9A-Z]{16}|(?i:secret_?access_?key)\W{1,9}[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])",
    "a W&B API key": r"(?i:wandb).{0,30}\b[0-9a-f]{40}\b|wandb_v1_\w{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a JSON web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password in a URL": r"\w://[^\s/:@\"']*:[^\s/@\"']+@[\w\[]",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a path on a machine": r"/(?:home|Users)/[\w.-]+[/\"']|[\"'\s=:]/root/\w|\b[A-Za-z]:\\+Users\\+\w"
    r'|name_or_path"\s*:\s*"(?:[/~.\\]|[A-Za-z]:)',
}
RELEASED = "stepfun-ai/step3"
USAGE = """## Usage

```python
from transformers import pipeline
pipe = pipeline("{task}", model="{repo_id}", trust_remote_code=True)
content = {content}
messages = [{{"role": "user", "content": content}}]
print(pipe(messages, max_new_tokens=100, return_full_text=False)[0]["generated_text"])
```
"""
CONTENTS = {
    "image-text-to-text": '[{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is this?"}]',
    "text-generation": '"What are you?"',
}


def check_package(checkpoint: Checkpoint) -> list[Path]:
    """
    The files of a directory that make up the model.

    Raises:
        `CheckpointError`: with everything that must not go to the hub: other code than the package's, classes that are
        not in it, secrets, and files that are no part of a model.
    """
    directory, problems = checkpoint.directory, []
    weights = {path.name for path in checkpoint.paths}
    known = {"config.json", INDEX, MANIFEST, *CODE_FILES, *CARRIED_FILES, *weights}
    files = []
    for path in sorted(directory.iterdir()):
        if path.name in OWN_FOLDERS:
            continue
        if path.name not in known:
            problems.append(f"{quote(path.name)[1:-1]}: is no part of a model; move it away.")
            continue
        try:
            files.append(locate(directory, path.name))
        except CheckpointError as error:
            problems += error.problems
    names = {path.name for path in files}
    for name in CODE_FILES:
        if name not in names:
            problems.append(f"{name}: missing; adopt the directory with convert_checkpoint.py.")
        elif (directory / name).read_bytes() != (ROOT / name).read_bytes():
            problems.append(f"{name}: is not the package's own; adopt the directory with convert_checkpoint.py.")
    problems += check_auto_map(checkpoint, "config.json", type(checkpoint.config).carried_auto_map)
    if isinstance(checkpoint.config, Step3VLConfig):
        if "processor_config.json" in names:
            wanted = {"AutoProcessor": Step3VLConfig.carried_auto_map["AutoProcessor"]}
            problems += check_auto_map(checkpoint, "processor_config.json", wanted)
        else:
            problems.append("processor_config.json: missing; adopt the directory with convert_checkpoint.py.")
    for path in files:
        if path.name in weights:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            lines = {f"metadata {quote(key)}": f"{key}: {value}" for key, value in metadata.items()}
        else:
            text = path.read_text(errors="replace")
            lines = {f"line {number}": line for number, line in enumerate(text.splitlines(), start=1)}
        for place, line in lines.items():
            for secret, pattern in SECRETS.items():
                if re.search(pattern, line):
                    problems.append(f"{path.name}: {place} looks like {secret}.")
    if problems:
        raise CheckpointError(problems)
    return files


@functools.cache
def classes_of(module: str) -> set[str]:
    """What one of the package's modules defines."""
    return {node.name for node in ast.parse((ROOT / f"{module}.py").read_text()).body if hasattr(node, "name")}


def check_auto_map(checkpoint: Checkpoint, name: str, wanted: dict[str, str]) -> list[str]:
    """What is wrong with the classes that a config names for transformers' Auto classes."""
    given = read_json(checkpoint.directory / name).get("auto_map")
    given = given if isinstance(given, dict) else {}
    problems = []
    for auto_class, reference in wanted.items():
        module, _, class_name = reference.partition(".")
        if given.get(auto_class) != reference or class_name not in classes_of(module):
            found = quote(given.get(auto_class))
            problems.append(f"{name}: `auto_map` must name {reference} for {auto_class}, got {found}.")
    return problems


def base_model_of(checkpoint: Checkpoint) -> str | None:
    """The released model, if a model has its sizes."""
    config = checkpoint.config
    return RELEASED if expected_shapes(config) == expected_shapes(type(config)()) else None


def complete_card(directory: Path, repo_id: str, task: str, base_model: str | None, licence: str) -> str:
    """
    The text of the model card, with what was missing: metadata and how the model is used.

    Raises:
        `CheckpointError`: if the metadata of the one that is there cannot be read.
    """
    path = directory / "README.md"
    try:
        text = path.read_text() if path.exists() else f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n"
        card = ModelCard(text, ignore_metadata_errors=False)
    except (YAMLError, ValueError, TypeError) as error:  # TypeError: a key that is no text
        reason = " ".join(str(error).split())
        raise CheckpointError([f"README.md: its YAML header cannot be read: {reason}"]) from None
    wanted = {"library_name": "transformers", "pipeline_tag": task, "license": licence, "base_model": base_model}
    for key, value in wanted.items():
        if value and card.data.get(key) is None:
            card.data[key] = value
    text = str(card).rstrip() + "\n"
    if "trust_remote_code=True" not in text:
        text += "\n" + USAGE.format(task=task, repo_id=repo_id, content=CONTENTS[task])
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="An interrupted upload goes on when it is repeated: what is on the hub already is not sent again.",
    )
    parser.add_argument("directory", type=Path, help="a converted, trained or fine-tuned model")
    parser.add_argument("repo_id", help="where to upload it, USER/NAME")
    parser.add_argument("--private", action="store_true", help="nobody else sees it; for a repository that is new")
    parser.add_argument("--dry-run", action="store_true", help="only check, and list what would go up")
    parser.add_argument(
        "--base-model",
        metavar="ID",
        help=f"what it was made from, for a card that does not say; '' for nothing (default: {RELEASED} if it has that "
        "model's sizes)",
    )
    parser.add_argument(
        "--license", default="apache-2.0", metavar="ID", help="for a card that does not say (default: apache-2.0)"
    )
    arguments = parser.parse_args(arguments)
    directory, repo_id = arguments.directory, arguments.repo_id
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError("must be USER/NAME.")
        checkpoint = read_checkpoint(directory)
        files = check_package(checkpoint)
        is_whole = isinstance(checkpoint.config, Step3VLConfig)
        task = "image-text-to-text" if is_whole else "text-generation"
        base_model = base_model_of(checkpoint) if arguments.base_model is None else arguments.base_model
        card = complete_card(directory, repo_id, task, base_model, arguments.license)
        sizes = {path.name: path.stat().st_size for path in files} | {"README.md": len(card.encode())}
        for name in sorted(sizes):
            print(f"{sizes[name]:>16,}  {name}")
        print(f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files to {constants.ENDPOINT}/{repo_id}")
        facts = engine_facts(checkpoint, checkpoint.config, has_head="lm_head.weight" in checkpoint.tensors)
        for warning in warnings(facts):
            print(warning, file=sys.stderr)
        if arguments.dry_run:
            return 0
        api = HfApi()
        api.create_repo(repo_id, private=arguments.private, exist_ok=True)
        if not (directory / "README.md").exists() or (directory / "README.md").read_text() != card:
            write_bytes(directory / "README.md", card.encode())
        # Sends what is not there yet, large files in parts, in several commits if need be.
        api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=list(sizes))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    except (HTTPError, ValueError) as error:  # ValueError: of a card or a name that the hub does not take
        print(f"{repo_id}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{error.filename or repo_id}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # what the hub's client makes of a file that it could not send
        print(f"{repo_id}: {error} {error.__cause__ or ''}\nThe same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        return 130
    print(f"{constants.ENDPOINT}/{repo_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
