"""Which module and package code belongs to, by what Python says; nothing is imported."""

from __future__ import annotations

import glob
import os
import sys
from functools import cache
from types import ModuleType
from typing import Any

_INSTALLED = ("/site-packages/", "/dist-packages/")


def is_installed(path: str) -> bool:
    """Tell whether a file is in a folder into which packages are installed, which may have any name."""
    return any(name in path for name in _INSTALLED) or path.startswith(_targets(tuple(sys.path)))


@cache
def _targets(places: tuple[str, ...]) -> tuple[str, ...]:
    """Return the folders of `sys.path` in which an installer has left its records (`pip install --target`)."""
    return tuple(
        os.path.join(os.path.abspath(place), "")
        for place in places
        if next(glob.iglob(os.path.join(glob.escape(place), "*.dist-info", "RECORD")), None)
    )


def top(module: str) -> str:
    """Return the name of the package that a module belongs to, which is its own name if it is in none."""
    return module.partition(".")[0]


def module_of(value: Any) -> str:
    """Return the name of the module that a value is, or comes from; "" if it does not say."""
    if issubclass(type(value), ModuleType):
        name = dictionary(value).get("__name__")
    else:
        try:
            name = getattr(value, "__module__", None)
        except Exception:  # a proxy of what is not there
            return ""
    return name if isinstance(name, str) else ""


def dictionary(value: Any) -> dict[str, Any]:
    """Return the attributes that a module or an object has by itself, without running code of its class.

    A module that is imported when it is asked for something is not imported by this.
    """
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return {}
    return found if isinstance(found, dict) else {}
