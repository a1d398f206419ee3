"""vLLM's own command line, for processes that start an engine or a part of one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_companion_plugin.core.text import did_you_mean, several
from vllm_companion_plugin.engine.vllm.naming import LOAD_FORMAT
from vllm_companion_plugin.errors import SettingsError
from vllm_companion_plugin.settings import BY_NAME, TABLE, resolve_extra_config

_MAX_NAMED = 3
OF_COMMAND = {
    "serve": ("--device", *(setting.option for setting in TABLE if setting.flag)),
    "verify": ("--json", "--adapter", "--publisher"),
    "update": (),  # `CompanionClient.update`, whose own arguments are no flags
}
"""Flags of our own commands, which may have been meant as well as vLLM's."""


def parse(command: str, arguments: Sequence[str] | None = None) -> EngineArgs:
    """`MODEL [flags of vLLM]` as `vllm serve` would read them, its `--config` file included.

    What only the server needs is ignored, and named in a line. A wrong flag ends the process with status 2.
    """
    given = [part for word in (sys.argv[1:] if arguments is None else arguments) for part in _split(word)]
    parser, of_server = _parser(command)
    try:
        parsed = parser.parse_args(given)
    except (ValueError, OSError, AssertionError) as error:  # vLLM's words about its config file
        parser.error(f"--config: {error}")
    ignored = sorted(flag for dest, flag in of_server.items() if hasattr(parsed, dest))
    if ignored:
        print(f"Ignored, because the weights do not depend on the server's flags: {', '.join(ignored)}", flush=True)
    parsed.model = given[0] if given and not given[0].startswith("-") else parsed.model_tag
    return EngineArgs.from_cli_args(parsed)


def _split(word: str) -> list[str]:
    """vLLM reads the file only of a `--config` that is a word of its own."""
    return word.split("=", 1) if word.startswith("--config=") else [word]


def _parser(command: str) -> tuple[FlexibleArgumentParser, dict[str, str]]:
    """The parser of `vllm serve`, and the flags by destination that are the server's: they are set only if given."""
    from vllm.entrypoints.cli.serve import make_arg_parser

    parser = make_arg_parser(_Parser(OF_COMMAND[command], prog=f"vllm-companion {command}", allow_abbrev=False))
    of_engine = {field.name for field in fields(EngineArgs)} | {"help", "config", "model_tag"}
    of_server = {}
    for action in parser._actions:
        if action.dest not in of_engine:
            action.default = argparse.SUPPRESS
            of_server[action.dest] = next(flag for flag in action.option_strings if flag.startswith("--"))
    return parser, of_server


class _Parser(FlexibleArgumentParser):
    """Says what is wrong in a line, and not vLLM's whole usage. A flag of `ours` may have been meant, too."""

    def __init__(self, ours: tuple[str, ...], **options: Any) -> None:
        super().__init__(**options)
        self._ours = ours

    def error(self, message: str) -> NoReturn:
        _, found, words = message.partition("unrecognized arguments: ")
        names = [word.split("=")[0] for word in words.split() if word.startswith("-")] if found else []
        if names:
            message = f"vLLM has no flag {several(list(map(self._with_nearest, names)), _MAX_NAMED)}"
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    def _with_nearest(self, name: str) -> str:
        return name + did_you_mean(name, [*self._option_string_actions, *self._ours])


def through_companion(args: EngineArgs, **forced: Any) -> EngineArgs:
    """`args` with `--load-format companion`; a load format given becomes the source format, with its options.

    Args:
        forced: keys of `--model-loader-extra-config` that are set whatever the user said.

    Raises:
        SettingsError: the extra config is not a JSON object.
    """
    ours, of_source = _divided(args)
    if args.load_format not in ("auto", LOAD_FORMAT):
        ours.setdefault("source_format", args.load_format)
    if of_source:
        ours["source_extra_config"] = of_source
    args.load_format = LOAD_FORMAT
    args.model_loader_extra_config = ours | forced
    return args


def without_companion(args: EngineArgs) -> EngineArgs:
    """`args` with the load format that the companion would read through, and its options.

    Raises:
        SettingsError: the extra config is not what a companion understands.
    """
    ours, of_source = _divided(args)
    settings = resolve_extra_config(ours)
    if args.load_format in ("auto", LOAD_FORMAT):
        args.load_format = settings.source_format
    args.model_loader_extra_config = of_source or settings.source_extra_config
    return args


def _divided(args: EngineArgs) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the extra config that are a companion's, and those of the loader that reads the checkpoint.

    With `--load-format companion` all are a companion's, which refuses what it does not know. Otherwise the
    loader refuses that.
    """
    extra = _mapping(args.model_loader_extra_config)
    if args.load_format == LOAD_FORMAT:
        return extra, {}
    ours = {name: value for name, value in extra.items() if name in BY_NAME}
    return ours, {name: value for name, value in extra.items() if name not in ours}


def _mapping(extra: Any) -> dict[str, Any]:
    try:
        value = json.loads(extra) if isinstance(extra, str) and extra else extra or {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"--model-loader-extra-config: expected a JSON object, got {extra!r}.")
    return dict(value)
