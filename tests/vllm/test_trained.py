"""Full fine-tuning in place of what a real engine serves: after each step it answers with the trained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.place import Place
from tests.vllm.conftest import Engine, StartEngine, entries
from vllm_companion_plugin.training import trained

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

OPTIONS = {
    "prompts": [[*range(1, 100)], [9, 8, 7]],
    "block_size": 32,  # a prompt fills some, of which the prefix cache is made
    "skip_tokenizer_init": True,
    "enable_prefix_caching": True,
}
TOKENS = torch.arange(3, 60).view(1, -1)
STEPS = 2


class Llm:
    """The methods of vLLM's `LLM` that a fleet calls, of an engine in another process."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collective_rpc(self, method: str, timeout: float | None = None, kwargs: Any = None) -> Any:
        return self._engine.call("collective_rpc", method, kwargs=kwargs)

    def sleep(self, level: int, mode: str) -> None:
        self._engine.call("sleep", level=level, mode=mode)

    def wake_up(self, tags: list[str]) -> None:
        self._engine.call("wake_up", tags=tags)

    def reset_prefix_cache(self, *arguments: bool) -> Any:
        return self._engine.call("reset_prefix_cache", *arguments)

    def reset_mm_cache(self) -> None:
        self._engine.call("reset_mm_cache")

    def reset_encoder_cache(self) -> None:
        self._engine.call("reset_encoder_cache")


def arenas(pid: int | str = "self") -> tuple[int, set[str]]:
    """Bytes that a process has of arenas, each page divided by those who share it; and which arenas these are."""
    shared_kib, inodes, counts = 0, set(), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            counts = "memfd:vllm-companion" in line
            if counts:
                inodes.add(words[4])
        elif counts and words[0] == "Pss:":
            shared_kib += int(words[1])
    return shared_kib << 10, inodes


def test_an_engine_has_the_tokens_of_the_trained_weights_after_each_step(
    place: Place, start_engine: StartEngine, tiny_llama: Path, tmp_path: Path
) -> None:
    """They are those of an engine that loads these weights from files; and the weights exist once."""
    engine = start_engine(model=tiny_llama, load_format="companion", **OPTIONS)
    seen = [engine.result()["tokens"]]
    pid = engine.result()["workers"][0]["pid"]
    with trained(
        str(tiny_llama), [Llm(engine)], version="run", device="cpu", runtime_dir=place.settings.runtime_dir
    ) as training:
        assert engine.tokens_now() == seen[0]
        optimizer = torch.optim.SGD(training.model.parameters(), lr=3.0)
        for number in range(1, STEPS + 1):
            training.model(TOKENS, labels=TOKENS).loss.backward()
            with training.step():
                optimizer.step()
            optimizer.zero_grad()
            answered = engine.tokens_now()
            saved = tmp_path / f"saved-{number}"
            training.model.save_pretrained(saved)
            fresh = start_engine(model=saved, load_format="auto", **OPTIONS)
            assert answered == fresh.result()["tokens"]
            fresh.stop()
            seen.append(answered)
        assert len({str(tokens) for tokens in seen}) == STEPS + 1, "each step has changed what it answers"
        assert training.report is not None
        assert "has run (generation 2), after a pause of" in str(training.report)
        (entry,) = entries(place)
        size = entry.size_bytes
        (mine, my_arenas), (its, its_arenas) = arenas(), arenas(pid)
        assert my_arenas == its_arenas
        assert len(my_arenas) == 1
        assert mine + its <= size * 1.02
    assert engine.tokens_now() == seen[-1]
    assert engine.update({str(tiny_llama): 1})["tokens"] == seen[0], "the generation that was kept is the way back"
