"""The name of a model, whatever way it is written."""

from __future__ import annotations

import contextlib
import os
import re

_HUB_SNAPSHOT = re.compile(r"/models--(?P<id>[^/]+)/snapshots/[^/]+$")


def model_name(model: str) -> str:
    """One name for all ways to write a model: the hub id, or the real path of a local one.

    A path into the hub cache is its hub id again: offline, vLLM replaces the one by the other. What cannot be printed
    is escaped, so that the name can be shown anywhere, asked for as it was shown, and is the same in every locale.
    """
    path = os.path.abspath(model)
    if snapshot := _HUB_SNAPSHOT.search(path):
        name = snapshot["id"].replace("--", "/", 1)
    else:
        name = os.path.realpath(path) if model and os.path.exists(path) else model
    with contextlib.suppress(UnicodeEncodeError):  # no name of a file
        name = os.fsencode(name).decode("utf-8", "surrogateescape")
    return name if name.isprintable() else "".join(map(_escaped, name))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
