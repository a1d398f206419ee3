"""Manifests on their way in: bytes that the companion never reads."""

from __future__ import annotations

import hashlib

from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.holder.registry.entries import StoredManifest
from vllm_companion_plugin.wire.manifest import MAX_MANIFEST_BYTES
from vllm_companion_plugin.wire.messages import PublishRequest

MIN_CHUNK_BYTES = 64 << 10
"""The least that a chunk has, but for the last one: many small ones would take many times their size."""


class IncomingManifest:
    """A manifest on its way in: bounded, and hashed as it comes."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._chunks: list[bytes] = []
        self._hash = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        """Take the next chunk. Raises `BadRequestError` if that is too much, or the one before was too small."""
        self.size_bytes += len(chunk)
        if self.size_bytes > MAX_MANIFEST_BYTES:
            raise BadRequestError(f"The manifest is larger than {MAX_MANIFEST_BYTES} bytes.")
        if self._chunks and len(self._chunks[-1]) < MIN_CHUNK_BYTES:
            raise BadRequestError(
                f"A chunk of a manifest has less than {MIN_CHUNK_BYTES} bytes and is not the last one."
            )
        self._hash.update(chunk)
        self._chunks.append(chunk)

    def finish(self, commit: PublishRequest.Commit) -> StoredManifest:
        """The whole. Raises `BadRequestError` unless it is what the `Commit` message says."""
        if self.size_bytes != commit.manifest_bytes or self._hash.digest() != commit.manifest_sha256:
            raise BadRequestError(
                f"The manifest arrived damaged: {self.size_bytes} of {commit.manifest_bytes} bytes, or another sha256."
            )
        return StoredManifest(tuple(self._chunks), self.size_bytes, self._hash.digest())
