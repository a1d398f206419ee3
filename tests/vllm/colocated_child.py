"""One of several processes under torchrun: an engine and a trainer in it, and an adapter that is sampled at once.

Arguments: the model, and a runtime directory. Prints "RESULT {...}".
"""

from __future__ import annotations

import os
import sys
from typing import Any

import peft
import torch
from vllm import SamplingParams

from tests.support.lora import TARGETS
from tests.vllm.results import tell
from vllm_companion_plugin.errors import BadRequestError, EntryNotFoundError
from vllm_companion_plugin.training import colocated, sharing_of

PROMPT = [1, 2, 3, 4, 5]


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    engine: dict[str, Any] = {"enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
    engine |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 1 << 28} if on_gpu else {"dtype": "float32"}
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    parameters = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
    torch.manual_seed(0)
    with colocated(sys.argv[1], engine, lora=lora, runtime_dir=sys.argv[2]) as both:

        def says(name: str | None) -> int:
            prompt = {"prompt_token_ids": PROMPT}
            return int(both.sample(name, prompt, parameters, use_tqdm=False)[0].outputs[0].token_ids[0])

        name, target = f"user {rank}", 77 + rank
        base = says(None)
        model = both.create_adapter(name)
        assert says(name) == base  # PEFT's B is zero
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-2)
        tokens = torch.tensor([[*PROMPT, target]], device=model.device)
        labels = torch.tensor([[*[-100] * len(PROMPT), target]], device=model.device)
        for _ in range(15):
            with both.training():
                model(tokens, labels=labels).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        found = {"base": base, "mine": says(name), "wanted": target}
        trained = {each: each.detach().clone() for each in model.parameters() if each.requires_grad}
        for each in trained:
            each.data.zero_()  # which PyTorch does not count
        found["emptied"] = says(name)
        for each, kept in trained.items():
            each.data.copy_(kept)
        found["again"] = says(name)
        layers = [each.scaling for each in model.modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
        for scaling in layers:
            scaling[name] = 0.0
        found["unscaled"] = says(name)
        for scaling in layers:
            scaling[name] = 2.0
        assert says(name) == target
        torch.distributed.barrier()  # all have published
        found["others"] = says(f"user {(rank + 1) % ranks}")
        try:
            says("nobody")
        except EntryNotFoundError as error:
            found["nobody"] = str(error)
        torch.distributed.barrier()  # all have sampled this one
        both.create_adapter("second")
        both.remove_adapter("second")
        found["active"] = (both.adapters, both.model.active_adapters, says(name))
        both.remove_adapter(name)
        found["none"] = (both.adapters, type(both.model).__name__, says(None))
        for bad in ("a.b", ""):
            try:
                both.create_adapter(bad)
            except BadRequestError:
                found.setdefault("refused", []).append(bad)
        third = f"third {rank}"
        both.create_adapter(third)
        found["third"] = (both.adapters, says(third))
        weights = [entry for entry in both.client.status().entries if entry.key.kind == "weights"]
        found["pids"] = [sorted({lease.pid for lease in entry.leases}) for entry in weights]
        found["copied"] = getattr(sharing_of(model), "copied", None)
        found["pid"] = os.getpid()
        tell(found)
        torch.distributed.barrier()


if __name__ == "__main__":
    main()
