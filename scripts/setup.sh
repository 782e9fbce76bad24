# Sourced by demo.sh and test.sh: a virtual environment with the package, at the releases in constraints.txt.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
PATH="$PWD/.venv/bin:$PATH"
