#!/usr/bin/env bash
# Describes a picture, or one drawn for the occasion: bash scripts/demo.sh [PICTURE] [options of describe.py]
set -euo pipefail
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then picture=$(realpath -- "$1") && shift; fi
source "$(dirname "$0")/setup.sh"
python -m pip install --quiet --constraint scripts/constraints.txt --editable .
if [ -z "${picture:-}" ]; then
  picture="$(mktemp -d)/picture.png"
  python scripts/tiny/draw_scene.py "$picture" >"${picture%.png}.txt"
  echo "Picture: $picture"
fi
python scripts/describe.py "$picture" "$@"
