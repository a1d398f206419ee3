"""Versions of the formats in which processes of different releases talk to each other."""

from __future__ import annotations

PROTOCOL_VERSION = 3
"""The protocol version. Every change that an older client or companion would misread raises it."""
