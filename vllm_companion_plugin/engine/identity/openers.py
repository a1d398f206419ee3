"""Whose code opens a file, lists a folder or loads a module, as the frames on the stack say."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from types import CodeType

from vllm_companion_plugin.core.packages import is_installed
from vllm_companion_plugin.engine.identity import outside, places
from vllm_companion_plugin.engine.vllm.threads import begins_work

# What these read is no data of their caller: modules and their sources.
_IMPORTING = ("<frozen importlib", "<frozen zipimport", "importlib/metadata/", "pkgutil.py", "linecache.py")
# Packages that keep what they compile for their callers.
_COMPILERS = (
    *("torch/_inductor/", "torch/_dynamo/", "torch/_functorch/", "torch/utils/cpp_extension.py", "triton/"),
    *("flashinfer/", "deep_gemm/", "deep_ep/", "tvm_ffi/", "tilelang/", "cutlass/", "nvidia_cutlass_dsl/", "humming/"),
    *("aiter/", "numba/", "llvmlite/", "cupy/"),
)


def is_outside(*, acting: Callable[[CodeType], bool] = lambda code: False, by_packages: bool = True) -> bool:
    """Tell whether the nearest caller that opens files on its own account is code outside vLLM, such as a model's.

    Args:
        acting: tells of code of vLLM whether it acts for its caller, as packages do.
        by_packages: what to say of a thread that runs nothing but functions of packages, and that no load has begun.

    Packages open files for whoever calls them, except what imports modules, and compilers. If a thread runs nothing but
    functions of packages, then nothing says who called them, and it may have been a model.
    """
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        by_packages |= begins_work(caller.f_code)
        name = caller.f_code.co_filename
        if not acting(caller.f_code):
            known = _is_outside(name)
            if known is not None or outside.has_read(name):  # a plugin may be installed
                return known is not False
        frame = caller
    return by_packages and threading.get_ident() != threading.main_thread().ident


def is_compiler() -> bool:
    """Tell whether the nearest caller that is no part of Python's import system is a compiler."""
    frame = sys._getframe(1).f_back
    while frame is not None and _is_importing(frame.f_code.co_filename):
        frame = frame.f_back
    return frame is not None and _is_compilers(os.path.abspath(frame.f_code.co_filename))


def _is_importing(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename == importlib.__file__ or places.is_own(filename)


@cache
def _is_compilers(path: str) -> bool:
    is_package = is_installed(path) or places.is_pythons(path)
    return is_package and any(f"/{part}" in path for part in _COMPILERS)


@cache
def _is_outside(filename: str) -> bool | None:
    """Return whether code in a file is outside vLLM; None if it acts for its caller."""
    if filename.startswith(_IMPORTING):
        return False
    if filename.startswith("<"):  # made by its caller, wherever this process is
        return None
    path = os.path.abspath(filename)
    if places.is_vllms(path):
        return False
    if places.is_own(path):  # around a function of its caller
        return None
    if not is_installed(path) and not places.is_pythons(path):
        return True
    return False if _is_compilers(path) or any(f"/{part}" in path for part in _IMPORTING) else None
