# Sourced by demo.sh and test.sh: a virtual environment with the package, in $environment or .venv.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
environment="$PWD/${environment:-.venv}"
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
PATH="$environment/bin:$PATH"
