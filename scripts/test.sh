#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [--transformers VERSION|newest | --engines DIRECTORY | --tuning | --page] [options of pytest]
# Another release of transformers than the one in constraints.txt gets an environment of its own, and so do the libraries
# that fine-tune and quantise (--tuning) and those that show the page (--page). --engines runs the tests that ask vLLM,
# whose environment is made in DIRECTORY unless it is there.
set -euo pipefail
release= engines= tuning= page=
case "${1:-}" in
  --transformers) release=${2:?give a version, or newest} && shift 2 ;;
  --tuning) tuning=tuning && shift ;;
  --page) page=page && shift ;;
  --engines) engines=$(realpath -m -- "${2:?give a directory}") && shift 2 ;;
esac
environment=.venv${release:+-$release}${tuning:+-$tuning}${page:+-$page}
source "$(dirname "$0")/setup.sh"
constraints=scripts/constraints.txt
extras=test,notebook,serve,export
if [ -n "$tuning" ]; then
  extras=test,finetune,quantize
  set -- tests/test_finetune.py tests/test_quantisation.py tests/test_quantise.py tests/test_processing_step3.py "$@"
fi
if [ -n "$page" ]; then
  # gradio does not take the pinned pillow yet.
  constraints="$environment/constraints.txt"
  grep -v '^pillow==' scripts/constraints.txt >"$constraints"
  extras=test,app
  set -- tests/test_app.py "$@"
fi
if [ -n "$release" ]; then
  # What goes with the pinned release is not asked of another one.
  constraints="$environment/constraints.txt"
  extras=test,finetune
  grep -vE '^(transformers|huggingface_hub|accelerate|safetensors)==' scripts/constraints.txt >"$constraints"
  if [ "$release" != newest ]; then echo "transformers==$release" >>"$constraints"; fi
fi
python -m pip install --quiet ${release:+--upgrade} --constraint "$constraints" --editable ".[$extras]"
if [ -n "$release" ]; then python -c "import transformers; print('transformers', transformers.__version__)"; fi
if [ -n "$engines" ]; then
  [ -e "$engines/env.sh" ] || bash scripts/develop/engines.sh "$engines"
  STEP3_ENGINES="$engines" exec python -m pytest -m engines "$@"
fi
python -m pytest --numprocesses auto --dist worksteal "$@"
