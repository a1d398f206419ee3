"""The command `advance`: running engines take other weights together."""

from __future__ import annotations

import argparse

from vllm_companion_plugin import fleet
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.core.output import say
from vllm_companion_plugin.core.text import one_line
from vllm_companion_plugin.errors import FleetError
from vllm_companion_plugin.host.models import model_name


def advance(parsed: argparse.Namespace) -> int:
    """Print a line for each engine; if they have not all taken the weights, an error ends the command after that."""
    try:
        report = fleet.advance(
            parsed.engine, {model_name(parsed.model): parsed.to}, clear_caches=not parsed.keep_caches
        )
    except FleetError as error:
        _show(error.report)
        raise FleetError("Not all engines have taken these weights.", remedy=error.remedy) from error
    _show(report)
    return Exit.DONE


def _show(report: fleet.FleetReport) -> None:
    for engine in report.engines:
        say(one_line(str(engine)))
