"""Versions of what two processes of different releases tell each other."""

from __future__ import annotations

PROTOCOL_VERSION = 3
"""Raised by every change that an older client or companion would misread."""
