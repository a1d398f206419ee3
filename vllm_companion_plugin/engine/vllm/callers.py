"""Who of vLLM calls us, where no hook says it."""

from __future__ import annotations

import sys
import types
from typing import Any


def calling_worker(*attributes: str) -> Any:
    """The worker that has called, however deep: the nearest caller's `self` with these attributes; None if none has."""
    frame: types.FrameType | None = sys._getframe()
    while frame is not None:
        caller: Any = frame.f_locals.get("self")
        if caller is not None and all(hasattr(caller, name) for name in attributes):
            return caller
        frame = frame.f_back
    return None
