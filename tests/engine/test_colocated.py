"""Adapters of a trainer that has its engine in its own process: made, refused and removed. There is no engine here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support import lora
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import BadRequestError, EntryNotFoundError
from vllm_companion_plugin.training.together import Colocated

TOKENS = torch.arange(1, 9).view(1, -1)


class Client:
    """Takes every adapter."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.count = 0

    def publish_adapter(self, id: str, *_: Any, **__: Any) -> int:
        self.count += 1
        self.held[id] = self.count
        return self.count

    def remove_adapter(self, id: str) -> None:
        if self.held.pop(id, None) is None:
            raise EntryNotFoundError(f"There is no adapter {id}.")

    def list_adapters(self) -> list[Any]:
        return [
            SimpleNamespace(key=SimpleNamespace(model=id), generation=number, state=EntryState.READY)
            for id, number in self.held.items()
        ]


@pytest.fixture
def both() -> Colocated:
    config = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=None))
    engine = SimpleNamespace(llm_engine=config, generate=lambda *_, lora_request: [lora_request.lora_path])
    made = LlamaForCausalLM(lora.TINY).requires_grad_(False)
    usual = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    return Colocated(engine, made, Client(), usual)  # type: ignore[arg-type]


def says(both: Colocated) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = both.model(TOKENS).logits
    return found


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"bias": "all"}, "bias='all'"),
        ({"use_dora": True}, "DoRA"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
)
def test_what_no_engine_can_have_is_refused_before_the_model_is_changed(
    both: Colocated, options: dict[str, Any], text: str, others: int
) -> None:
    """It would change the base of all adapters, or what is left when it is removed."""
    base = says(both)
    if others:
        lora.train(both.create_adapter("other"), 1)
    before, modules = says(both), {name: type(each) for name, each in both.model.named_modules()}
    with pytest.raises(BadRequestError, match=text):
        both.create_adapter("mine", peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
    assert {name: type(each) for name, each in both.model.named_modules()} == modules
    assert torch.equal(says(both), before)
    lora.train(both.create_adapter("next"), 2)
    assert not torch.equal(says(both), before)
    for name in both.adapters:
        both.remove_adapter(name)
    assert torch.equal(says(both), base)


@pytest.mark.parametrize("others", [0, 1])
def test_what_peft_computes_in_its_own_way_is_not_made(both: Colocated, others: int) -> None:
    """It could not be published. Nothing is left of it."""
    base = says(both)
    if others:
        lora.train(both.create_adapter("other"), 1)
    before = says(both)
    with pytest.raises(BadRequestError, match="PEFT would compute adapter mine in its way of Mi"):
        both.create_adapter("mine", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica"))
    assert both.adapters == ["other"][:others]
    assert torch.equal(says(both), before)
    for name in both.adapters:
        both.remove_adapter(name)
    assert torch.equal(says(both), base)


@pytest.mark.parametrize("id", ["a.b", "", "keys", "training", "forward", "T_destination", "lora_A"])
def test_ids_that_peft_cannot_have(both: Colocated, id: str) -> None:
    """PEFT's layers have adapters as attributes."""
    both.create_adapter("other")
    with pytest.raises(BadRequestError, match="is no "):
        both.create_adapter(id)
    assert both.adapters == ["other"]


def test_what_is_sampled_is_the_trainers_own(both: Colocated) -> None:
    """Also after somebody else has published under its id, or has removed it."""
    lora.train(both.create_adapter("mine"), 1)
    asked = [both.sample("mine", "")[0] for _ in range(2)]
    both.client.publish_adapter("mine", both.model)
    asked += [both.sample("mine", "")[0] for _ in range(2)]
    both.client.remove_adapter("mine")
    asked.append(both.sample("mine", "")[0])
    assert asked == [f"companion:mine?generation={number}" for number in (1, 1, 3, 3, 4)]
    assert both.sample("other", "") == ["companion:other"]


def trained(both: Colocated) -> set[str]:
    return {name for name, each in both.model.named_parameters() if each.requires_grad}


def test_publishing_changes_nothing_of_what_is_trained(both: Colocated) -> None:
    """Whichever adapters are active, and whatever of them is frozen."""
    both.create_adapter("a")
    lora.train(both.create_adapter("b"), 1)
    for name, each in both.model.named_parameters():
        each.requires_grad_("lora_B" in name)
    for active in (["b"], ["a", "b"], ["a"]):
        both.model.base_model.set_adapter(active)
        for name, each in both.model.named_parameters():
            each.requires_grad_("lora_B" in name)
        before, said = trained(both), says(both)
        for id in ("a", "b"):
            both.publish(id)
        assert (both.model.active_adapters, trained(both)) == (active, before)
        assert torch.equal(says(both), said)


def test_what_somebody_else_has_removed_is_removed_here(both: Colocated) -> None:
    lora.train(both.create_adapter("mine"), 1)
    both.publish("mine")
    both.client.remove_adapter("mine")
    both.remove_adapter("mine")
    assert both.adapters == []
