"""The command `step3`, which runs one of the scripts for users. Only that script is imported."""

import argparse
import ast
import importlib
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parent
# The module and the optional dependencies of each command.
COMMANDS = {
    "convert": ("convert_checkpoint", None),
    "plan": ("plan", None),
    "describe": ("describe", None),
    "chat": ("chat", None),
    "answer": ("answer", None),
    "data": ("training_data", None),
    "finetune": ("finetune", "finetune"),
    "serve": ("serve", "serve"),
    "app": ("app", "app"),
    "push": ("push_to_hub", None),
    "experts": ("experts", None),
    "quantise": ("quantise", "quantize"),
    "export": ("export_onnx", "export"),
    "onnx": ("run_onnx", "export"),
}


def summary(module: str) -> str:
    """The first line of a script's docstring, without importing the script."""
    return ast.get_docstring(ast.parse((SCRIPTS / f"{module}.py").read_text())).split("\n", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        "step3",
        usage="step3 COMMAND ...",
        description="Commands for Step3-VL checkpoints. `step3 COMMAND --help` describes one.",
        epilog="commands:\n"
        + "\n".join(f"  {command:9} {summary(module)}" for command, (module, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    module, extra = COMMANDS[command]
    sys.argv[:2] = [f"step3 {command}"]
    sys.path.insert(0, str(SCRIPTS))  # where the scripts import each other from
    try:
        script = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        parser.exit(2, f'step3 {command} needs {error.name}: pip install "step3-vl[{extra}]"\n')
    sys.exit(script.main())


if __name__ == "__main__":
    main()
