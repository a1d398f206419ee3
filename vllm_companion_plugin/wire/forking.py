"""gRPC in processes that fork; everything here that uses gRPC has it from here.

gRPC's threads do not come along to a child. What the child inherits waits for them for ever or aborts, at random. And
the handlers by which gRPC prepares for a fork may stop the parent in `fork` for ever, if it has just closed a channel
(seen with gRPC 1.85). So they are off, which makes any fork harmless that does not use the companion, as PyTorch's
loaders of data do not, and one that does gets an error.

`GRPC_ENABLE_FORK_SUPPORT=1` in the environment turns gRPC's full support on instead: then a child may use the
companion, by connections of its own, and each fork takes up to a second.
https://github.com/grpc/grpc/blob/master/doc/fork_support.md. docs/adr/0020-forks.md has the measurements.
"""

from __future__ import annotations

import os
import sys

from vllm_companion_plugin.errors import ForkedError

SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"

_unsaid = SUPPORT not in os.environ and "grpc" not in sys.modules
if _unsaid:
    os.environ[SUPPORT] = "0"  # read once, by this import
try:
    import grpc
    from grpc._cython import cygrpc
finally:
    if _unsaid:
        del os.environ[SUPPORT]

_used_by = 0
"""The process that has used gRPC, or the one that it was forked from."""


def use() -> None:
    """Say that this process uses gRPC.

    Raises:
        ForkedError: it was forked from one that does.
    """
    global _used_by
    if _used_by and not cygrpc.is_fork_support_enabled():
        check(_used_by)
    _used_by = os.getpid()


def check(pid: int) -> None:
    """Raises `ForkedError` unless this is process `pid`, which opened a channel."""
    if os.getpid() != pid:
        raise ForkedError(
            f"Process {os.getpid()} was forked from process {pid}, which uses the companion, "
            "and gRPC does not work in a fork.",
            remedy="Start it by spawn, as VLLM_WORKER_MULTIPROCESSING_METHOD=spawn does with vLLM's processes, or set "
            f"{SUPPORT}=1 in the environment of both: then each fork takes up to a second.",
        )


__all__ = ["SUPPORT", "check", "grpc", "use"]
