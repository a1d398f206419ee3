"""A plugin with models that vLLM does not know, as an installed one: put its folder on PYTHONPATH."""


def register() -> None:
    from vllm import ModelRegistry

    for name in ("Plain", "Tree", "Values"):
        ModelRegistry.register_model(f"{name}PluginForCausalLM", f"companion_test_model.model:{name}PluginForCausalLM")
