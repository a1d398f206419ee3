"""The exit statuses of all commands, one table."""

from __future__ import annotations

from enum import IntEnum

from vllm_companion_plugin.errors import CompanionUnavailableError


class Exit(IntEnum):
    """Exit statuses. docs/guide/cli.md shows `MEANING`."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_SHARED = 3
    NOTHING_RUNS = 4
    INTERRUPTED = 130


MEANING = {
    Exit.DONE: "Done. `status`: all companions answer. `stop`: none runs any more, or none ran.",
    Exit.FAILED: "It failed, or a check of `doctor` failed, or `verify` found a difference. A line on standard error "
    "says why and what to do.",
    Exit.USAGE: "The command line or a setting is wrong. Nothing was done.",
    Exit.NOT_SHARED: "`verify`: the model cannot be shared, and loads normally.",
    Exit.NOTHING_RUNS: "No companion runs that could be asked: `status`, `watch`, `unload`, `generations`, "
    "`rollback`, `upgrade`.",
    Exit.INTERRUPTED: "Ctrl-C.",
}


class NothingRunsError(CompanionUnavailableError):
    """No companion runs that a command could ask."""


def to_markdown() -> str:
    """Return the table of docs/guide/cli.md."""
    lines = ["| status | meaning |", "| --- | --- |", *(f"| {exit:d} | {text} |" for exit, text in MEANING.items())]
    return "\n".join(lines) + "\n"
