"""The command `step3`: runs the scripts that users need, each loaded only when it is asked for."""

import argparse
import ast
import importlib
import sys
from pathlib import Path


SCRIPTS = Path(__file__).parent
# The module of each command, and the extra that it needs.
COMMANDS = {
    "convert": ("convert_checkpoint", None),
    "plan": ("plan", None),
    "describe": ("describe", None),
    "finetune": ("finetune_lora", "finetune"),
    "serve": ("serve", "serve"),
    "push": ("push_to_hub", None),
    "experts": ("experts", None),
    "export": ("export_onnx", "export"),
}


def summary(module: str) -> str:
    """The first line of a script's docstring, read without importing it."""
    return ast.get_docstring(ast.parse((SCRIPTS / f"{module}.py").read_text())).split("\n", 1)[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        "step3",
        usage="step3 COMMAND ...",
        description="Works with checkpoints of Step3-VL. `step3 COMMAND --help` says more.",
        epilog="commands:\n"
        + "\n".join(f"  {command:9} {summary(module)}" for command, (module, _) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    command = parser.parse_args(sys.argv[1:2]).command
    module, extra = COMMANDS[command]
    sys.argv[:2] = [f"step3 {command}"]
    sys.path.insert(0, str(SCRIPTS))  # the scripts import each other as when they run by themselves
    try:
        script = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        parser.exit(2, f'step3 {command} needs {error.name}: pip install "step3-vl[{extra}]"\n')
    sys.exit(script.main())


if __name__ == "__main__":
    main()
