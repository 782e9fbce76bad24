"""Checks a directory with a Step3 model and uploads it to the Hugging Face hub.

python scripts/push_to_hub.py DIRECTORY USER/NAME --dry-run
python scripts/push_to_hub.py DIRECTORY USER/NAME --private --space
"""

import argparse
import re
import sys
from pathlib import Path

from checkpoint_files import (
    CODE_FILES,
    INDEX,
    ROOT,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    Step3VLConfig,
    collecting,
    expected_shapes,
    failure,
    locate,
    read_checkpoint,
    read_json,
)
from convert_checkpoint import CARRIED_FILES, CHECKSUMS
from engines import engine_facts, engine_warnings
from files import write_bytes
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from yaml import YAMLError


# What the hub and its client add to a model and do not upload.
HUB_FILES = (".cache", ".git", ".gitattributes")
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
    "a path on a machine": r"(?<![\w.-])/(?:home|Users)/[\w.-]+[/\"']|[\"'\s=:]/root/\w|\b[A-Za-z]:\\+Users\\+\w"
    r'|name_or_path"\s*:\s*"(?:[/~.\\]|[A-Za-z]:)',
}
RELEASED = "stepfun-ai/step3"
CONVERT = "create the directory with convert_checkpoint.py."
USAGE = """## Usage

```python
from transformers import pipeline
pipe = pipeline("{task}", model="{repo_id}", trust_remote_code=True)
content = {content}
messages = [{{"role": "user", "content": content}}]
print(pipe(messages, max_new_tokens=100, return_full_text=False)[0]["generated_text"])
```
"""
# The files of a Space beside `page.py`, which is app.py. A Space runs the code in the model's repository.
SPACE = {
    "README.md": """---
title: {name}
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
models: [{repo_id}]
---

A page on which to ask [{repo_id}](https://huggingface.co/{repo_id}) about pictures.
""",
    "app.py": """from page import Local, launch
from transformers import AutoModelForImageTextToText, AutoProcessor


processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{repo_id}", device_map="auto", trust_remote_code=True)
launch(Local(model, processor), processor, "{name}")
""",
    "requirements.txt": "accelerate\npillow\ntorch>=2.8\ntransformers>=5.19,<6\n",
}
CONTENTS = {
    "image-text-to-text": '[{"type": "image", "path": "picture.jpg"}, {"type": "text", "text": "What is this?"}]',
    "text-generation": '"What are you?"',
}


def check_package(checkpoint: Checkpoint) -> list[Path]:
    """
    The files of the model in a directory. Raises a `CheckpointError` with everything that must not be uploaded: other
    code and classes than the package's, secrets, and files that are not part of a model.
    """
    directory, problems, files = checkpoint.directory, [], []
    weights = {path.name for path in checkpoint.paths}
    known = {"config.json", INDEX, CHECKSUMS, *CODE_FILES, *CARRIED_FILES, *weights}
    for path in sorted(directory.iterdir()):
        if path.name in known:
            with collecting(problems):
                files.append(locate(directory, path.name))
        elif path.name not in HUB_FILES:
            problems.append(f"{repr(path.name)[1:-1]}: is not part of a model; move it away.")
    names = {path.name for path in files}
    auto_maps = {"config.json": type(checkpoint.config).carried_auto_map}
    if isinstance(checkpoint.config, Step3VLConfig):
        auto_maps["processor_config.json"] = {"AutoProcessor": Step3VLConfig.carried_auto_map["AutoProcessor"]}
    for name in [name for name in (*CODE_FILES, *auto_maps) if name not in names]:
        problems.append(f"{name}: is missing; {CONVERT}")
    for name in CODE_FILES:
        if name in names and (directory / name).read_bytes() != (ROOT / name).read_bytes():
            problems.append(f"{name}: is not the package's version; {CONVERT}")
    for name, wanted in auto_maps.items():
        if name in names:
            problems += check_auto_map(directory / name, wanted)
    for path in files:
        if path.name in weights:
            with safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            lines = {f"metadata {key!r:.200}": f"{key}: {value}" for key, value in metadata.items()}
        else:
            text = path.read_text(errors="replace")
            lines = {f"line {number}": line for number, line in enumerate(text.splitlines(), start=1)}
        for place, line in lines.items():
            found = [secret for secret, pattern in SECRETS.items() if re.search(pattern, line)]
            problems += [f"{path.name}: {place} looks like {secret}." for secret in found]
    if problems:
        raise CheckpointError(problems)
    return files


def check_auto_map(path: Path, wanted: dict[str, str]) -> list[str]:
    """A problem for each Auto class whose entry in the `auto_map` of a config is not the package's."""
    given = read_json(path).get("auto_map")
    given = given if isinstance(given, dict) else {}
    return [
        f"{path.name}: `auto_map` must name {reference} for {auto_class}, got {given.get(auto_class)!r:.200}."
        for auto_class, reference in wanted.items()
        if given.get(auto_class) != reference
    ]


def base_model_of(checkpoint: Checkpoint) -> str | None:
    """The id of the released model if the checkpoint has its sizes."""
    config = checkpoint.config
    return RELEASED if expected_shapes(config) == expected_shapes(type(config)()) else None


def complete_card(directory: Path, repo_id: str, task: str, base_model: str | None, licence: str) -> str:
    """
    The text of the directory's model card, with missing metadata and usage added. Raises a `CheckpointError` if the
    metadata of an existing card cannot be read.
    """
    path = directory / "README.md"
    try:
        text = path.read_text() if path.exists() else f"---\n{{}}\n---\n\n# {repo_id.split('/')[-1]}\n"
        card = ModelCard(text, ignore_metadata_errors=False)
    except (YAMLError, ValueError, TypeError) as error:  # TypeError: a key that is not a string
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


def upload_space(api: HfApi, repo_id: str, private: bool) -> None:
    """Makes the Space of the same name, with the page of app.py for the uploaded model."""
    api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    files = {name: text.format(repo_id=repo_id, name=repo_id.split("/")[1]).encode() for name, text in SPACE.items()}
    files["page.py"] = (Path(__file__).parent / "app.py").read_bytes()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(repo_id, operations, repo_type="space", commit_message="A page to ask the model")
    print(f"{constants.ENDPOINT}/spaces/{repo_id}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        epilog="To resume an interrupted upload, repeat the command: files that are on the hub are not sent again.",
    )
    parser.add_argument("directory", type=Path, help="a model that was converted, trained or fine-tuned")
    parser.add_argument("repo_id", help="repository to upload to, USER/NAME")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--space", action="store_true", help="also make a Space, with a page to ask the model")
    parser.add_argument("--dry-run", action="store_true", help="only check, and list what would be uploaded")
    parser.add_argument(
        "--base-model",
        metavar="ID",
        help=f"base model, if the card has none; '' for none (default: {RELEASED} if the model has its sizes)",
    )
    license_help = "licence, if the card has none (default: %(default)s)"
    parser.add_argument("--license", default="apache-2.0", metavar="ID", help=license_help)
    arguments = parser.parse_args(arguments)
    directory, repo_id = arguments.directory, arguments.repo_id
    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise ValueError("the repository must be USER/NAME.")
        checkpoint = read_checkpoint(directory)
        files = check_package(checkpoint)
        is_whole = isinstance(checkpoint.config, Step3VLConfig)
        if arguments.space and not is_whole:
            raise CheckpointError(["--space needs a model that takes pictures."])
        task = "image-text-to-text" if is_whole else "text-generation"
        base_model = base_model_of(checkpoint) if arguments.base_model is None else arguments.base_model
        card = complete_card(directory, repo_id, task, base_model, arguments.license)
        sizes = {path.name: path.stat().st_size for path in files} | {"README.md": len(card.encode())}
        for name in sorted(sizes):
            print(f"{sizes[name]:>16,}  {name}")
        print(f"{sum(sizes.values()):>16,}  bytes in {len(sizes)} files to {constants.ENDPOINT}/{repo_id}")
        facts = engine_facts(checkpoint, checkpoint.config, has_head="lm_head.weight" in checkpoint.tensors)
        for warning in engine_warnings(facts):
            print(warning, file=sys.stderr)
        if arguments.dry_run:
            return 0
        api = HfApi()
        api.create_repo(repo_id, private=arguments.private, exist_ok=True)
        if not (directory / "README.md").exists() or (directory / "README.md").read_text() != card:
            write_bytes(directory / "README.md", card.encode())
        # Weights of an upload before, in other files, would be loaded instead or as well.
        stale = [WEIGHTS, "model-?????-of-?????.safetensors", INDEX]
        api.upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=list(sizes), delete_patterns=stale)
        if arguments.space:
            upload_space(api, repo_id, arguments.private)
    except (CheckpointError, KeyboardInterrupt) as error:
        return failure(error, repo_id)
    except (HTTPError, ValueError) as error:  # ValueError: a card or repository id that the hub refuses
        print(f"{repo_id}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        return failure(error, repo_id)
    except RuntimeError as error:  # raised by the hub's client for a file that it could not send
        print(f"{repo_id}: {error} {error.__cause__ or ''}\nRepeat the command to resume.", file=sys.stderr)
        return 1
    print(f"{constants.ENDPOINT}/{repo_id}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
