"""What decides how the weights of one worker are laid out: versions, kind of device, ranks."""

from __future__ import annotations

import torch
import vllm
from vllm.platforms import current_platform

from vllm_companion_plugin.engine.vllm.devices import EngineDevice


def versions() -> dict[str, str]:
    """Versions that decide how weights are laid out."""
    return {"vllm": vllm.__version__, "torch": torch.__version__, "cuda": str(torch.version.cuda)}


def device_kind(device: EngineDevice) -> str:
    """What two devices must have in common for one layout to fit both."""
    if device.torch_device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device.torch_device)
        return f"sm_{major}{minor} {torch.cuda.get_device_name(device.torch_device)}"
    return f"{current_platform.get_cpu_architecture()} {torch.backends.cpu.get_cpu_capability()}"


def ranks() -> dict[str, str]:
    """ "rank/size" of this worker in each parallel group that splits weights.

    Data parallelism does: mixtures of experts are split over all its ranks, also without expert parallelism.
    vLLM makes no such group for replicas of a dense model.
    """
    from vllm.distributed import parallel_state

    groups = {name: getattr(parallel_state, f"get_{name}_group")() for name in ("tp", "pp", "dp")}
    for name in ("pcp", "dcp"):
        get = getattr(parallel_state, f"get_{name}_group", None)
        if get is not None:
            groups[name] = get()
    return {name: f"{group.rank_in_group}/{group.world_size}" for name, group in groups.items()}
