"""A trainer that uses vLLM's weight transfer, in a process of its own: a Hugging Face model, and engines behind HTTP.

Arguments: the directory of the model, and the engines' URLs. For each line of standard input, a JSON object, one line
in JSON that begins with "SAID ".
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM
from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient, ModuleSource, WeightTransferTrainerFactory

from vllm_companion_plugin import CompanionError
from vllm_companion_plugin.engine.vllm.transfer.engines import Engines
from vllm_companion_plugin.engine.vllm.transfer.trainer import CompanionTrainerInitInfo


def say(answer: dict[str, Any]) -> None:
    print("SAID " + json.dumps(answer), flush=True)


def hang() -> NoReturn:
    say({"hangs": True})
    while True:
        time.sleep(60)


class Stuck(ModuleSource):
    """Hangs when some tensors have been written."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, tensor) in enumerate(self._module.named_parameters()):
            if number == 5:
                hang()
            yield name, tensor

    iter_full = __iter__


class Trainer:
    def __init__(self, path: str, urls: list[str]) -> None:
        self.path = path
        self.model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.engines = Engines([HTTPVLLMWeightSyncClient(url) for url in urls])
        self.rank = 0

    def join(self, rank: int, world_size: int, store: str) -> dict[str, Any]:
        """Be one of several processes, each of which has a part of every tensor. Only the first one writes.

        They compute with more digits than engines do.
        """
        self.rank = rank
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        fully_shard(self.model.double(), mesh=init_device_mesh("cpu", (world_size,)))
        return {}

    def made(self, source: type[ModuleSource] = ModuleSource) -> Any:
        info = CompanionTrainerInitInfo(self.path, rank=self.rank, devices=[] if self.rank else ["cpu"])
        return WeightTransferTrainerFactory.trainer_init(info, client=self.engines, source=source(self.model))

    def take(self, checkpoint: str) -> None:
        """Train for a while."""
        weights = load_file(Path(checkpoint, "model.safetensors"))
        options = StateDictOptions(full_state_dict=distributed.is_initialized(), strict=False)
        set_model_state_dict(self.model, weights, options=options)

    def send(self, checkpoints: list[str], versions: list[str]) -> dict[str, Any]:
        trainer = self.made()
        for checkpoint, version in zip(checkpoints, versions, strict=True):
            self.take(checkpoint)
            trainer.send_weights(version)
        trainer.shutdown()
        return {"generations": sorted(trainer.written["cpu"].values())}

    def hang_while_writing(self) -> dict[str, Any]:
        self.made(Stuck).send_weights("never")
        return {}

    def hang_before_the_switch(self, checkpoint: str) -> dict[str, Any]:
        trainer = self.made()
        self.take(checkpoint)
        trainer.write_weights("written, and not served")
        self.engines.start_weight_update()
        self.engines.update_weights({"generations": trainer.written, "version": trainer.version})
        hang()

    def send_other_shapes(self) -> dict[str, Any]:
        self.model.resize_token_embeddings(300)
        self.made().send_weights("of another model")
        return {}


def main() -> None:
    trainer = Trainer(sys.argv[1], sys.argv[2:])
    say({})
    for line in sys.stdin:
        told = json.loads(line)
        try:
            say(getattr(trainer, told.pop("do"))(**told))
        except CompanionError as error:
            say({"error": error.code, "text": str(error)})


if __name__ == "__main__":
    main()
