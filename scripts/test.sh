#!/usr/bin/env bash
# Runs the tests: bash scripts/test.sh [options of pytest]
set -euo pipefail
source "$(dirname "$0")/setup.sh"
python -m pip install --quiet --constraint scripts/constraints.txt '.[test]'
python -m pytest --numprocesses auto --dist worksteal "$@"
