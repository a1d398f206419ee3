"""A client or trainer in a process of its own: for each line of standard input, a JSON object, one answer in JSON.

Its values are those of `values(step)`, so that whoever compares bytes needs nothing but the number of a step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.support.place import until
from vllm_companion_plugin import CompanionClient, CompanionError
from vllm_companion_plugin.client.attachment import Attachment, Prepared
from vllm_companion_plugin.client.connection import Granted, Lease, connect
from vllm_companion_plugin.client.mapped import tensors_by_name
from vllm_companion_plugin.client.update import Owned, begin_training
from vllm_companion_plugin.core.residency import WhenAsleep
from vllm_companion_plugin.memory.tensors.views import ArenaViews

MODEL = "test/model"
SHAPES = {"embed.weight": (64, 16), "turned": (3, 6), "quantized": (8,), "steps": (5,)}


def values(step: int) -> dict[str, torch.Tensor]:
    """Every tensor of `Small` but the tied one, as the trainer has it after `step`."""
    random = torch.Generator().manual_seed(step)
    made = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    return {
        "embed.weight": made["embed.weight"].to(torch.bfloat16),
        "turned": made["turned"],
        "quantized": made["quantized"].to(torch.float8_e4m3fn),
        "steps": (made["steps"] * 100).to(torch.int64),
    }


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensors[name].contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name in SHAPES
    }


class Child:
    """What this process has: an attachment, a generation that it has prepared, an update that it has begun."""

    def __init__(self, client: CompanionClient) -> None:
        self.client = client
        self.attachment: Attachment
        self.prepared: Prepared
        self.owned: Owned
        self.begun = contextlib.ExitStack()

    def tell(self, do: str, **options: Any) -> dict[str, Any]:
        """What the method says, or the error of this package that it raises."""
        try:
            answer: dict[str, Any] = getattr(self, do)(**options)
        except CompanionError as error:
            return {"error": error.code, "text": str(error)}
        return answer

    def attach(self) -> dict[str, Any]:
        self.attachment = self.client.attach(MODEL, name="engine")
        return self.look()

    def look(self) -> dict[str, Any]:
        held = self.attachment.held
        return {
            "generation": held.generation,
            "version": held.published.version,
            "digests": digests(self.attachment.tensors),
            "address": self.attachment.arena.address,
            "is_stale": self.attachment.is_stale,
        }

    def open(self) -> dict[str, Any]:
        """How many descriptors, and mappings of arenas."""
        maps = Path("/proc/self/maps").read_text().count("memfd:vllm-companion")
        return {"fds": len(os.listdir("/proc/self/fd")), "maps": maps}

    def write(self, step: int, only: list[str] | None = None) -> dict[str, Any]:
        with self.client.update(MODEL, version=f"step-{step}", name="trainer") as new:
            new.load({name: tensor for name, tensor in values(step).items() if only is None or name in only})
        return {}

    def begin(self, step: int) -> dict[str, Any]:
        """Stay the writer."""
        new = self.begun.enter_context(self.client.update(MODEL, version=f"step-{step}", name="trainer"))
        return {"wrote": new.load(values(step))}

    def finish(self) -> dict[str, Any]:
        self.begun.close()
        return {}

    def own(self, version: str) -> dict[str, Any]:
        """Train in place, from what is current on."""
        attachment = self.client.attach(MODEL, name="trainer")
        self.attachment = self.begun.enter_context(attachment)
        self.owned = begin_training(attachment, version, self.client.settings)
        return self.look()

    def step(self, step: int, only: list[str] | None = None) -> dict[str, Any]:
        """Write all values of a step, or some of them, in place."""
        views = ArenaViews(self.owned.arena, self.attachment.size_bytes, self.attachment.device)
        mine = tensors_by_name(self.attachment.manifest, views)
        with self.owned.arena.writing():
            for name, tensor in values(step).items():
                if only is None or name in only:
                    mine[name].copy_(tensor)
        return self.look()

    def leave(self) -> dict[str, Any]:
        """Own nothing any more."""
        self.owned.arena.close()
        self.begun.close()
        return {}

    def rights(self) -> dict[str, Any]:
        """What this process may do to each arena that it maps."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {"rights": sorted(line.split()[1] for line in lines if "memfd:vllm-companion" in line)}

    def verify(self) -> dict[str, Any]:
        views = self.attachment.views()
        said = self.attachment.verification(views, "full").check(self.attachment.manifest, "it")
        return {"said": said}

    def privatize(self) -> dict[str, Any]:
        self.attachment.privatize(None)
        return {}

    def prepare(self, to: int = 0) -> dict[str, Any]:
        self.prepared = self.attachment.prepare(to, self.client.settings)
        return {"prepared": self.prepared.generation}

    def advance(self, to: int = 0) -> dict[str, Any]:
        self.prepare(to)
        return self.switch()

    def switch(self) -> dict[str, Any]:
        self.attachment.advance(self.prepared)
        return self.look()

    def sleep(self, level: int = 1) -> dict[str, Any]:
        where = self.attachment.fall_asleep(level, WhenAsleep.AUTO)
        self.attachment.let_go(self.client.settings, "engine")
        return {"where": where}

    def wake(self) -> dict[str, Any]:
        def load(lease: Lease, granted: Granted) -> Attachment:
            raise AssertionError("nobody has it")

        connection = connect("cpu", self.client.settings, spawn=True)
        source = self.attachment.wake(connection, self.client.settings, "engine", load)
        return {"source": source, **self.look()}

    def wait_known(self) -> dict[str, Any]:
        """After the death of a companion, which this process may not have noticed yet."""
        until(self._is_known, 20, "the next companion knows of this process")
        self.attachment.wait_known(20)
        return {"lost": self.attachment.lost, **self.look()}

    def _is_known(self) -> bool:
        try:
            entries = self.client.status().entries
        except CompanionError:
            return False
        return any(lease.pid == os.getpid() for entry in entries for lease in entry.leases)


def main() -> None:
    child = Child(CompanionClient("cpu"))
    for line in sys.stdin:
        print(json.dumps(child.tell(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
