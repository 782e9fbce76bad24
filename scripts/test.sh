#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [--transformers VERSION|newest] [options of pytest]
# Another release of transformers than the one in constraints.txt gets an environment of its own.
set -euo pipefail
release=
if [ "${1:-}" = --transformers ]; then
  release=${2:?usage: bash scripts/test.sh [--transformers VERSION|newest] [options of pytest]}
  shift 2
fi
environment=.venv${release:+-$release}
source "$(dirname "$0")/setup.sh"
constraints=scripts/constraints.txt
extras=test,notebook,finetune,quantize
if [ -n "$release" ]; then
  # What goes with the pinned release is not asked of another one.
  constraints="$environment/constraints.txt"
  extras=test,finetune
  grep -vE '^(transformers|huggingface_hub|accelerate|safetensors)==' scripts/constraints.txt >"$constraints"
  if [ "$release" != newest ]; then echo "transformers==$release" >>"$constraints"; fi
fi
python -m pip install --quiet ${release:+--upgrade} --constraint "$constraints" ".[$extras]"
if [ -n "$release" ]; then python -c "import transformers; print('transformers', transformers.__version__)"; fi
python -m pytest --numprocesses auto --dist worksteal "$@"
