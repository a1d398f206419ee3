"""Engines of one model go through whatever may happen to them, in any order: what each one says is what it has."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import models
from tests.support.place import Place, alive, until
from tests.vllm.conftest import Engine, StartEngine
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.core.status import LeaseState
from vllm_companion_plugin.errors import CompanionError

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

OPTIONS: dict[str, Any] = {"prompts": [[1, 2, 3, 4], [9, 8, 7]], "skip_tokenizer_init": True}
CONTENTS = 3
STEPS = {"write": 4, "update": 6, "back": 1, "sleep": 6, "wake": 6, "kill companion": 3, "start": 2, "kill": 1}
MOST, LEAST = 3, 2
FOLLOWS_S = 15.0


class Walk:
    """Engines that share a model whose checkpoint has small tensors, too, and what each version of it says."""

    def __init__(self, place: Place, start: StartEngine, directory: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.model = directory / "gemma4"
        models.make("gemma4", self.model, tiny=True)
        self.client = CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)
        self._start = start
        # The version that each engine mapped when it was last known.
        self.mapped: dict[Engine, str] = {}
        self.weights = [load_file(self.model / "model.safetensors")]
        self.said = [self._answers(self.model)]
        for content in range(1, CONTENTS):
            changed, other = self._changed(content), directory / f"content-{content}"
            shutil.copytree(self.model, other)
            save_file(changed, other / "model.safetensors", {"format": "pt"})
            self.weights.append(changed)
            self.said.append(self._answers(other))
        assert len({str(said) for said in self.said}) == CONTENTS
        self.content = {"": 0}  # by the name of a version
        self.engines: list[Engine] = []
        self.asleep: set[Engine] = set()
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        for _ in range(LEAST):
            self.start()

    def _changed(self, content: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(content)
        return {
            name: tensor * (1 + content) if "layer_scalar" in name else self._noisy(tensor, generator)
            for name, tensor in self.weights[0].items()
        }

    @staticmethod
    def _noisy(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return tensor + 0.05 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    def _answers(self, path: Path) -> list[list[int]]:
        engine = self._start(model=path, load_format="auto", **OPTIONS)
        tokens: list[list[int]] = engine.result()["tokens"]
        engine.stop()
        return tokens

    def start(self) -> None:
        wish = self.random.choice(("auto", "stay", "park", "drop"))
        extra = {"when_asleep": wish, "follow_updates": self.random.random() < 0.5}
        engine = self._start(model=self.model, load_format="companion", model_loader_extra_config=extra, **OPTIONS)
        engine.result()
        if "are not shared: what is held of" in engine.output():  # a trainer wrote it, and this one does not follow
            assert not extra["follow_updates"]
            engine.stop()
            return
        self.engines.append(engine)

    def step(self) -> None:
        what = self.random.choices(list(STEPS), list(STEPS.values()))[0]
        engine = self.random.choice(self.engines)
        is_asleep = engine in self.asleep
        if what == "write":
            what += f": {self._write()}"
        elif what == "update" and not is_asleep:
            answer = engine.update()
            assert "updated" in answer, answer
        elif what == "back":
            what += f": {self._tried(self._back)}"
        elif what == "sleep" and not is_asleep:
            engine.call("sleep", self.random.choice((1, 2)))
            self.asleep.add(engine)
        elif what == "wake" and is_asleep:
            what += f": {self._wake(engine)}"
        elif what == "kill companion":
            self._kill_companion()
        elif what == "start" and len(self.engines) < MOST:
            self.start()
        elif what == "kill" and len(self.engines) > LEAST:
            engine.kill()
            self._forget(engine)
        else:
            return
        self.counts[what.partition(":")[0]] += 1
        self.log.append(f"{self.engines.index(engine) if engine in self.engines else '-'} {what}")
        self.check()

    def _write(self) -> str:
        content, version = self.random.randrange(CONTENTS), f"v{len(self.content)}"

        def write() -> None:
            with self.client.update(str(self.model), version=version) as new:
                new.load(self.weights[content])

        self.content[version] = content
        return f"{version} {self._tried(write)}"

    def _back(self) -> None:
        (entry,) = self.client.status().entries
        self.client.make_current(str(self.model), self.random.choice(entry.generations).number)

    def _tried(self, act: Callable[[], Any]) -> str:
        """Until somebody has handed the entry back; if nobody has it that is never."""
        late = time.monotonic() + FOLLOWS_S
        while True:
            try:
                act()
            except (CompanionError, IndexError, ValueError) as error:
                is_there = len(self.asleep) < len(self.engines)
                if not is_there:
                    return str(error)
                if time.monotonic() > late:
                    raise
                time.sleep(0.1)
            else:
                return "done"

    def _wake(self, engine: Engine) -> str:
        """Or be told why not, and end: what it had is not there any more."""
        try:
            engine.call("wake_up")
        except RuntimeError as error:
            if not str(error).startswith("LayoutError: "):
                raise
            engine.kill()
            self._forget(engine)
            while len(self.engines) < LEAST:
                self.start()
            return str(error)
        self.asleep.discard(engine)
        return "done"

    def _forget(self, engine: Engine) -> None:
        self.engines.remove(engine)
        self.asleep.discard(engine)

    def _kill_companion(self) -> None:
        pid = self.place.companion_pid()
        if pid and alive(pid):
            os.kill(pid, signal.SIGKILL)
            until(lambda: not alive(pid), 5, "it is dead")

    def check(self) -> None:
        """Every engine that is awake answers as the version says that it maps, by the companion's word.

        A companion that followed another has the generation that was current there. Of an engine with another one it
        knows no more than that it is attached; that engine maps what it mapped before.
        """
        awake = [engine for engine in self.engines if engine not in self.asleep]
        versions: dict[int, str] = {}

        def are_known() -> bool:
            versions.clear()
            attached: set[int] = set()
            held: set[str] = set()
            with contextlib.suppress(CompanionError):
                for entry in self.client.status().entries:
                    attached.update(each.pid for each in entry.leases if each.state is LeaseState.ATTACHED)
                    for generation in entry.generations:
                        held.add(generation.version)
                        versions.update(dict.fromkeys(generation.pids, generation.version))
            on_others = {engine.process.pid for engine, version in self.mapped.items() if version not in held}
            known = versions.keys() | (attached & on_others)
            return all(engine.process.pid in known for engine in awake)

        until(are_known, FOLLOWS_S, f"the companion knows who is awake: {self.log[-9:]}", every_s=0.05)
        for engine in awake:
            if engine.process.pid in versions:
                self.mapped[engine] = versions[engine.process.pid]
            version = self.mapped[engine]
            assert engine.tokens_now() == self.said[self.content[version]], (version, self.log)


@pytest.mark.parametrize("seed", range(3))
def test_what_an_engine_says_is_what_it_has(place: Place, start_engine: StartEngine, tmp_path: Path, seed: int) -> None:
    walk = Walk(place, start_engine, tmp_path, seed)
    walk.check()
    for _ in range(120):
        walk.step()
    assert set(STEPS) == set(walk.counts), walk.counts
