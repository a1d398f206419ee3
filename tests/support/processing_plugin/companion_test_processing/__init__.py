"""A plugin with which engines on a CPU share processed weights, as on a GPU: put its folder on PYTHONPATH.

It brings a quantization that runs on a CPU, and a model whose own code copies a weight by hand.
"""


def register() -> None:
    from dataclasses import replace
    from importlib import import_module

    import torch
    from vllm import ModelRegistry
    from vllm.model_executor.layers import utils

    from vllm_companion_plugin.core.module_tree import Stage
    from vllm_companion_plugin.engine.vllm import devices

    ModelRegistry.register_model("ByHandForCausalLM", "companion_test_processing.model:ByHandForCausalLM")
    import_module("companion_test_processing.quantization")
    found = devices.engine_device

    def engine_device(*args: object) -> devices.EngineDevice:
        return replace(found(*args), stage=Stage.PROCESSED)

    def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
        """As vLLM does where it packs nothing: packed weights are in a handle that no process can share."""
        layer.cpu_linear = torch.nn.functional.linear

    devices.engine_device = engine_device
    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm
