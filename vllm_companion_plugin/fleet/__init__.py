"""Several engines that take new weights together, or none of them: `advance`. Or whose weights are
written in place while they are paused: `writing`. Needs neither torch nor vLLM: engines are
reached by the routes, actors or objects that vLLM has.

May import: core, errors.
"""

from vllm_companion_plugin.fleet.report import EngineReport, FleetReport
from vllm_companion_plugin.fleet.together import InPlace, Written, advance, advance_async, check, identity_of, writing

__all__ = [
    "EngineReport",
    "FleetReport",
    "InPlace",
    "Written",
    "advance",
    "advance_async",
    "check",
    "identity_of",
    "writing",
]
