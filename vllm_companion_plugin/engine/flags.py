"""vLLM's own command line, for processes that start an engine or a part of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_companion_plugin.engine.register import LOAD_FORMAT
from vllm_companion_plugin.errors import SettingsError


def parse(command: str, arguments: Sequence[str] | None = None) -> EngineArgs:
    """`MODEL [flags of vLLM]` as an engine would read them; a wrong one ends the process with status 2."""
    parser = FlexibleArgumentParser(prog=f"vllm-companion {command}", allow_abbrev=False)
    parser.add_argument("model_tag", metavar="MODEL")
    parsed = EngineArgs.add_cli_args(parser).parse_args(None if arguments is None else list(arguments))
    parsed.model = parsed.model_tag
    return EngineArgs.from_cli_args(parsed)


def through_companion(args: EngineArgs, **forced: Any) -> EngineArgs:
    """`args` with `--load-format companion`; a load format given becomes the source format.

    Args:
        forced: keys of `--model-loader-extra-config` that are set whatever the user said.

    Raises:
        SettingsError: the extra config is not a JSON object.
    """
    extra = _mapping(args.model_loader_extra_config) | forced
    if args.load_format not in ("auto", LOAD_FORMAT):
        extra.setdefault("source_format", args.load_format)
    args.load_format = LOAD_FORMAT
    args.model_loader_extra_config = extra
    return args


def without_companion(args: EngineArgs) -> EngineArgs:
    """`args` with the load format that the companion would read through; the extra config is the companion's."""
    extra = _mapping(args.model_loader_extra_config)
    if args.load_format in ("auto", LOAD_FORMAT):
        args.load_format = extra.get("source_format", "auto")
    args.model_loader_extra_config = {}
    return args


def _mapping(extra: Any) -> dict[str, Any]:
    try:
        value = json.loads(extra) if isinstance(extra, str) and extra else extra or {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SettingsError(f"--model-loader-extra-config: expected a JSON object, got {extra!r}.")
    return dict(value)
