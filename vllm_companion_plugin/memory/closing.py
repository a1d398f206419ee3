"""When an arena that nobody closes ends: with the last reference to it."""

from __future__ import annotations

import sys


class Closing:
    """Closes itself when nothing refers to it any more, and not while the interpreter ends.

    Every tensor that views an arena refers to it, or to the writer that it came from (`tensors.views`), so nothing
    is unmapped under one.
    """

    def close(self) -> None:
        raise NotImplementedError

    def __del__(self) -> None:
        if sys is not None and not sys.is_finalizing():
            self.close()
