"""The draft of speculative decoding, as vLLM configures, loads and runs it."""

from __future__ import annotations

from typing import Any

from torch import nn

# Set by vLLM while a draft's checkpoint is read.
DRAFT_FLAGS = ("has_own_embed_tokens", "has_own_lm_head")


def draft_config(vllm_config: Any) -> Any | None:
    """The model config of the engine's draft; None if it has none, as with n-grams, whose "draft" is the target."""
    speculative = vllm_config.speculative_config
    config = speculative.draft_model_config if speculative is not None else None
    return None if config is None or config is speculative.target_model_config else config


def is_draft(vllm_config: Any, model_config: Any) -> bool:
    return model_config is draft_config(vllm_config)


def loads_draft_alike(vllm_config: Any) -> bool:
    """Whether this worker is about to load a draft, with the target's load config."""
    from vllm.distributed.parallel_state import get_pp_group

    return (
        draft_config(vllm_config) is not None
        and has_draft_weights(vllm_config)
        and vllm_config.speculative_config.draft_load_config is None
        and get_pp_group().is_last_rank
    )


def has_draft_weights(vllm_config: Any) -> bool:
    """Whether the draft is a model with weights: `extract_hidden_states` only looks like one."""
    return bool(vllm_config.speculative_config.method != "extract_hidden_states")


def replaced_by_target(vllm_config: Any, draft: nn.Module, target: nn.Module) -> dict[str, nn.Module]:
    """Modules of a draft that vLLM replaces by the target's after loading, by path, with the target's.

    Those that the draft `owns` are replaced if they are equal, the others always.
    """
    from vllm.distributed.parallel_state import get_pp_group

    if vllm_config.speculative_config.method not in ("eagle", "eagle3", "mtp") or get_pp_group().world_size > 1:
        return {}
    get_language_model: Any = getattr(target, "get_language_model", None)
    language = get_language_model() if get_language_model is not None else target
    inner, layers = getattr(language, "model", None), getattr(getattr(draft, "model", None), "layers", None)
    head = getattr(language, "lm_head", None)
    embedding = getattr(inner, "embed_tokens", None) or getattr(inner, "embedding", None)
    found = {"model.embed_tokens": embedding, "lm_head": head}
    named = [name for name, _ in layers.named_children()] if isinstance(layers, nn.Module) else []
    if getattr(vllm_config.speculative_config, "use_step3p5_mtp", lambda: False)():
        named, head = [], None  # it keeps its own
    found |= {f"model.layers.{name}.shared_head.head": head for name in named}
    there = dict(draft.named_modules(remove_duplicate=False))
    return {path: module for path, module in found.items() if isinstance(module, nn.Module) and path in there}


def owns(draft: nn.Module, path: str) -> bool:
    """Whether the draft's checkpoint has the module at `path`. For MTP models the answer is always no."""
    return bool(getattr(draft, DRAFT_FLAGS[0] if path.endswith("embed_tokens") else DRAFT_FLAGS[1], False))


def running_draft(runner: Any) -> nn.Module | None:
    """The draft of a model runner, of either generation."""
    model: Any = getattr(_proposer(runner), "model", None)
    model = model.unwrap() if hasattr(model, "unwrap") else model  # from what replays CUDA graphs
    return model if isinstance(model, nn.Module) else None


def _proposer(runner: Any) -> Any:
    return getattr(runner, "drafter", None) or getattr(runner, "speculator", None)


def draft_recipe(runner: Any) -> tuple[Any, Any, str]:
    """With which vLLM config, model config and prefix `runner` built its draft."""
    create = getattr(_proposer(runner), "_create_draft_vllm_config", None)
    config = create() if create is not None else getattr(_proposer(runner), "_draft_vllm_config", runner.vllm_config)
    alone = runner.speculative_config.method == "draft_model"
    return config, runner.speculative_config.draft_model_config, "draft_model" if alone else ""
