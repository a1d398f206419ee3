"""`python -m vllm_companion_plugin.engine.run.warm MODEL [flags of vLLM]` loads and publishes a model, then exits.

The process runs the workers that an engine with these flags would have, through vLLM's own executor. So every
rank has the engine's layout, without a KV cache and without serving.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vllm.plugins import load_general_plugins
from vllm.v1.executor.abstract import Executor

from vllm_companion_plugin.engine.vllm import flags
from vllm_companion_plugin.errors import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Load and publish all ranks of a model. Raises what vLLM or the loader raises."""
    load_general_plugins()
    # An engine may load alone if necessary. This process would keep nothing of such a load.
    args = flags.through_companion(flags.parse("serve", arguments), fallback=False)
    if args.data_parallel_size > 1:
        raise SettingsError(
            "serve: --data-parallel-size starts replicas, and `serve` loads only one.",
            remedy="Leave that flag out for a dense model, whose replicas share. A mixture of experts is split over "
            "its replicas: let the first engine load such a model.",
        )
    vllm_config = args.create_engine_config()
    executor = Executor.get_class(vllm_config)(vllm_config)
    executor.shutdown()
    return 0


if __name__ == "__main__":  # vLLM spawns workers, which import this module again
    sys.exit(main())
