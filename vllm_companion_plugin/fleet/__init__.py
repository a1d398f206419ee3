"""Several engines that take new weights together, or none of them: `advance`. Needs neither torch nor vLLM: engines are
reached by the routes, actors or objects that vLLM has.

May import: core, errors.
"""

from vllm_companion_plugin.fleet.report import EngineReport, FleetReport
from vllm_companion_plugin.fleet.together import advance, advance_async

__all__ = ["EngineReport", "FleetReport", "advance", "advance_async"]
