"""One name for a model, however the user wrote it."""

from __future__ import annotations

import contextlib
import os
import re

from vllm_companion_plugin.core.text import printable

_HUB_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/[^/]+$")


def model_name(model: str) -> str:
    """Return one name for all ways to write a model: the hub id, or the real path of a local model.

    A path into the hub cache becomes its hub id again, because vLLM replaces the id by the path when it is offline.
    Characters that cannot be printed are escaped: the name can be shown anywhere, a user can ask for it as it was
    shown, and it is the same in every locale.
    """
    path = os.path.abspath(model)
    if snapshot := _HUB_SNAPSHOT.search(path):
        name = snapshot["id"].replace("--", "/", 1)
    else:
        name = os.path.realpath(path) if model and os.path.exists(path) else model
    with contextlib.suppress(UnicodeEncodeError):  # such text names no file
        name = os.fsencode(name).decode("utf-8", "surrogateescape")
    return printable(name)
