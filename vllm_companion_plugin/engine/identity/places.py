"""Folders that belong to no model: those of the machine, of Python and its packages, and of caches."""

from __future__ import annotations

import os
import sys
import sysconfig
import tempfile
from functools import cache

_KERNEL = ("/proc", "/sys", "/dev")
_SHARED_MEMORY = "/dev/shm"
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr", "/lib", "/lib64", "/bin", "/sbin", "/run", "/var", "/opt/nvidia")
# Who the machine is, and what it gives to each pod: other in each, and no model's.
_OF_THE_MACHINE = (
    *("/run/secrets", "/var/run/secrets", "/var/lib/dbus", "/etc/machine-id", "/etc/hostname", "/etc/hosts"),
    *("/etc/resolv.conf", "/etc/mtab", "/etc/os-release", "/etc/mime.types", "/etc/localtime", "/etc/ssl", "/etc/pki"),
)
_OWN = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_CACHES = (
    *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "NUMBA_CACHE_DIR"),
    "XDG_CACHE_HOME",
)
"""Variables that name a folder of caches, wherever that is. Other caches are in hidden folders."""


def is_below(path: str, directory: str) -> bool:
    """Tell whether `path` is below `directory`; both are absolute."""
    return path.startswith(directory.rstrip("/") + "/")


def is_vllms(path: str) -> bool:
    """Tell whether a file belongs to vLLM's package."""
    return is_below(path, vllm())


def is_vllms_configuration(path: str) -> bool:
    """Tell whether a file belongs to vLLM's package of configurations."""
    return is_below(path, os.path.join(vllm(), "config"))


def is_own(path: str) -> bool:
    """Tell whether a file belongs to this package."""
    return is_below(path, _OWN)


def is_pythons(path: str) -> bool:
    """Tell whether a file belongs to Python or its packages."""
    return any(is_below(path, place) for place in _pythons())


def is_no_models(path: str) -> bool:
    """Tell whether a file belongs to the machine, Python, vLLM or this package, or is the user's key to the hub."""
    return any(path == place or is_below(path, place) for place in _no_models())


def is_systems(path: str) -> bool:
    """Tell whether a file is in a folder of the system where an administrator may put files of a model (/etc)."""
    if not path.startswith(_SYSTEM):
        return False
    is_kernels = any(path == place or is_below(path, place) for place in _KERNEL)
    if is_kernels and not is_below(path, _SHARED_MEMORY):
        return False
    if any(path == place or is_below(path, place) for place in _OF_THE_MACHINE):
        return False
    is_others = any(is_below(path, place) for place in _no_models() if place not in _SYSTEM)
    return not is_others and any(is_below(path, place) for place in _SYSTEM)


def is_anybodys(folder: str) -> bool:
    """Tell whether a folder is the machine's root, the user's home, or the one of temporary files."""
    return folder in ("/", os.path.abspath(os.path.expanduser("~")), os.path.abspath(tempfile.gettempdir()))


def may_be_cached(path: str) -> bool:
    """Tell whether a path is, or could be, in a hidden folder or in a folder of caches."""
    return not path.startswith("/") or "/." in path or path.startswith(_caches())


def hub() -> str:
    """Return the folder of the hub's cache."""
    from huggingface_hub import constants

    return os.path.abspath(str(constants.HF_HUB_CACHE))


def remote_code() -> str:
    """Return the folder into which Transformers copies the code of checkpoints."""
    from transformers.utils import hub

    return os.path.abspath(hub.HF_MODULES_CACHE)


def _caches() -> tuple[str, ...]:
    named = (os.path.join(place, "") for name in _CACHES if (place := os.environ.get(name)))
    return (*named, os.path.join(tempfile.gettempdir(), "torchinductor_"))  # and the user's name


@cache
def vllm() -> str:
    """Return the folder of vLLM's package."""
    import vllm as package

    return os.path.dirname(os.path.abspath(str(package.__file__)))


@cache
def _pythons() -> tuple[str, ...]:
    found = (sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values())
    return tuple({os.path.abspath(place) for place in found} - {"/"})


@cache
def _no_models() -> tuple[str, ...]:
    from huggingface_hub import constants
    from vllm import envs

    secrets = (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH)
    others = (vllm(), _OWN, envs.VLLM_CACHE_ROOT, envs.VLLM_CONFIG_ROOT, *secrets)
    return (*_SYSTEM, *_pythons(), *map(os.path.abspath, others))
