"""`python -m vllm_companion_plugin.engine.warm MODEL [flags of vLLM]`: load, publish, exit.

Runs the workers that an engine with these flags would have, through vLLM's own executor, so that
every rank is laid out as the engine lays it out; without a KV cache and without serving.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.executor.abstract import Executor

from vllm_companion_plugin.engine.register import LOAD_FORMAT
from vllm_companion_plugin.errors import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Load and publish all ranks of a model. Raises what vLLM or the loader raises."""
    load_general_plugins()
    vllm_config = engine_args(arguments).create_engine_config()
    executor = Executor.get_class(vllm_config)(vllm_config)
    executor.shutdown()
    return 0


def engine_args(arguments: Sequence[str] | None = None) -> EngineArgs:
    """vLLM's engine arguments from a command line, set to publish or to fail."""
    parser = FlexibleArgumentParser(prog="vllm-companion serve", allow_abbrev=False)
    parser.add_argument("model_tag", metavar="MODEL")
    parsed = EngineArgs.add_cli_args(parser).parse_args(None if arguments is None else list(arguments))
    parsed.model = parsed.model_tag
    args = EngineArgs.from_cli_args(parsed)
    extra = _mapping(args.model_loader_extra_config)
    # An engine may load alone if it must; here nothing would be left of that.
    extra["fallback"] = False
    if args.load_format not in ("auto", LOAD_FORMAT):
        extra.setdefault("source_format", args.load_format)
    args.load_format = LOAD_FORMAT
    args.model_loader_extra_config = extra
    return args


def _mapping(extra: Any) -> dict[str, Any]:
    value = json.loads(extra) if isinstance(extra, str) and extra else extra or {}
    if not isinstance(value, dict):
        raise SettingsError(f"--model-loader-extra-config: expected a JSON object, got {extra!r}.")
    return dict(value)


if __name__ == "__main__":  # vLLM spawns workers, which import this module again
    sys.exit(main())
