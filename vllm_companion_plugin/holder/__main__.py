"""`python -m vllm_companion_plugin.holder`: command line, detaching, logging, exit status.

Only light modules are imported before the process has detached: gRPC must not see a fork.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from vllm_companion_plugin.core import logs
from vllm_companion_plugin.core.process import raise_file_limit
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.host.detach import detach, report
from vllm_companion_plugin.host.runtime_dir import DevicePaths, device_paths
from vllm_companion_plugin.settings import BY_NAME, Settings, resolve

START_GRACE_S = 10.0
"""Whoever spawned a companion must be able to attach, however short its linger time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a companion. Returns the exit status: 0 ended as asked, 1 error."""
    parsed = _parser().parse_args(arguments)
    try:
        given = {name: getattr(parsed, name) for name in ("runtime_dir", "log_level", "log_format")}
        settings = resolve(given, reads={*given, "linger_s", "keep_previous"})
        paths = device_paths(parsed.device, settings)
        if parsed.detach:
            detach(paths.log)
        logs.configure(settings.log_level, settings.log_format, paths.device, bounded=parsed.detach)
        _run(paths, parsed, settings)
    except CompanionError as error:
        report(parsed.ready_fd, f"{error.code} {error}")
        with contextlib.suppress(OSError):  # the log may be on the disk that is full
            logs.fatal(error)
        return 1
    return 0


def _run(paths: DevicePaths, parsed: argparse.Namespace, settings: Settings) -> None:
    import asyncio

    from vllm_companion_plugin.holder.process import InstanceLock, serve

    linger_s = settings.linger_s if parsed.linger_s is None else parsed.linger_s
    grace_s = START_GRACE_S if parsed.ready_fd is not None else 0.0

    async def run() -> None:
        ready = asyncio.Event()
        serving = asyncio.ensure_future(serve(paths, lock, linger_s, grace_s, ready, settings.keep_previous))
        waiting = asyncio.ensure_future(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if ready.is_set():
            report(parsed.ready_fd, "ok")
        await serving

    lock = InstanceLock(paths)
    try:
        raise_file_limit()
        asyncio.run(run())
    finally:
        lock.release()


def _seconds(text: str) -> float:
    return -1.0 if text == "never" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_companion_plugin.holder", description=__doc__)
    parser.add_argument("--device", required=True, help="GPU or MIG UUID, or cpu")
    parser.add_argument("--runtime-dir", help=BY_NAME["runtime_dir"].help)
    parser.add_argument(
        "--linger-s",
        type=_seconds,
        help="seconds to stay with nobody attached; negative or 'never': until stopped",
    )
    parser.add_argument("--log-level", choices=BY_NAME["log_level"].choices, help=BY_NAME["log_level"].help)
    parser.add_argument("--log-format", choices=BY_NAME["log_format"].choices, help=BY_NAME["log_format"].help)
    parser.add_argument("--detach", action="store_true", help="run in the background, with init as parent")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write 'ok' or the error to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
