"""Adapters that a trainer publishes, in real engines: by name, at once, and the one that a request began with.

Requests of the base model are never in a batch with others: there, vLLM 0.32 on a CPU applies an adapter to them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model_state_dict

from tests.support import lora
from tests.support.place import Place, alive, until
from tests.vllm.conftest import MANY_PROCESSES, Engine, StartEngine, make_llama
from tests.vllm.nursery import Nursery
from tests.vllm.test_fleet import BLOCK, PROMPT, Server
from vllm_companion_plugin import CompanionClient
from vllm_companion_plugin.errors import BadRequestError
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.core, pytest.mark.timeout(600)]

CHILD = "tests.vllm.adapter_child"
LONG = 900
"""Tokens of a request that is in flight while others come."""
LORA = {"load_format": "companion", "enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2}
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def client(place: Place) -> Iterator[CompanionClient]:
    with closing(CompanionClient("cpu", runtime_dir=place.settings.runtime_dir)) as made:
        yield made


@pytest.fixture
def start(start_engine: StartEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ask]:
    """Start an engine, and ask it: `ask(("companion:NAME", prompt), ...)`; a name alone has the usual prompt."""
    monkeypatch.setattr("tests.vllm.conftest.CHILD", CHILD)

    def one(**options: Any) -> Ask:
        engine: Engine = start_engine(**LORA | options)
        engine.result()

        def ask(
            *names: Any, removed: Sequence[str] = (), replaced: dict[str, str | None] | None = None
        ) -> dict[str, Any]:
            asked = [name if isinstance(name, tuple) else (name and f"companion:{name}", PROMPT) for name in names]
            return engine._ask(json.dumps({"requests": asked, "removed": removed, "replaced": replaced or {}}))

        return ask

    return one


def said(model: PeftModel) -> list[int]:
    return lora.greedy(model, PROMPT)


def refused(answer: dict[str, Any], *texts: str) -> None:
    assert {"VLLMNotFoundError", "VLLMValidationError"} & {*answer["error"]}, answer
    assert [text for text in texts if text not in answer["text"]] == []


@pytest.mark.core
def test_offline(
    start: Callable[..., Ask], client: CompanionClient, place: Place, tiny_llama: Path, tmp_path: Path
) -> None:
    """What an engine without a server says is what the trainer's own model says, after every step."""
    ask = start(model=tiny_llama)
    model = lora.peft_of(tiny_llama, rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 32}, use_rslora=True)
    with model.disable_adapter():
        base = said(model)
    assert ask(None)["tokens"] == [base]

    # One name, retrained: the prefix cache has the prompt of every step.
    answers = []
    for step in range(4):
        lora.train(model, step)
        client.publish_adapter("mine", model)
        answers.append(said(model))
        assert ask("mine", "mine")["tokens"] == [answers[-1]] * 2
    assert ask("mine?generation=3", "mine")["tokens"] == [answers[2], answers[3]]
    assert ask(None)["tokens"] == [base]
    assert len({*map(tuple, [base, *answers])}) == 5

    # A fresh engine of merged weights says the same.
    merged = tmp_path / "merged"
    copied = lora.peft_of(tiny_llama, 3, rank_pattern={"v_proj": 8}, alpha_pattern={"q_proj": 32}, use_rslora=True)
    copied.merge_and_unload().save_pretrained(merged)
    assert start(model=merged, enable_lora=False, load_format="auto")(None)["tokens"] == [answers[3]]

    # More adapters at once than there is room for, so that some are loaded again in the middle of a step.
    models = {f"user {number}": lora.peft_of(tiny_llama, 10 + number, r=2 + number) for number in range(4)}
    for name, each in models.items():
        client.publish_adapter(name, each)
    assert ask(*models, *models)["tokens"] == [said(each) for each in models.values()] * 2

    # What cannot be served is refused by name, and the engine goes on.
    refused(ask("nobody"), "Adapter nobody is not held")
    client.publish_adapter("large", lora.peft_of(tiny_llama, r=16))
    refused(ask("large"), "cannot serve Adapter large, generation 1: LoRA rank 16 is greater than max_lora_rank 8")
    part = {name.replace("layers.0.", "layers.9."): t for name, t in get_peft_model_state_dict(model).items()}
    fields = model.peft_config["default"].to_dict() | {"rank_pattern": {"v_proj": 8}}
    client.publish_adapter("part", part, fields)
    for _ in range(2):  # also after it has been read once
        refused(ask("part"), "3 of its 9 modules have no place in this engine's model", "layers.9.mlp.down_proj")
    narrow = {name: t[:, :8] if "lora_A" in name else t for name, t in get_peft_model_state_dict(model).items()}
    client.publish_adapter("narrow", narrow, fields)
    for _ in range(2):
        refused(ask("narrow"), "does not fit this engine's model", "has 8 inputs")
    strange = {name.replace("q_proj", "strange"): t for name, t in get_peft_model_state_dict(model).items()}
    client.publish_adapter("strange", strange, fields)
    refused(ask("strange"), "While loading Adapter strange, generation 1, expected target modules")

    # Requests that have come end with what they began with, though it is removed before the engine has room for it.
    assert ask(*models, removed=["user 1", "user 3"])["tokens"] == [said(each) for each in models.values()]
    refused(ask("user 1"), "Adapter user 1 is not held")
    assert ask("user 2", "mine")["tokens"] == [said(models["user 2"]), answers[3]]
    assert ask(None)["tokens"] == [base]

    # What is removed before the engine has loaded it is not there any more, or is what was published since.
    client.publish_adapter("brief", model)
    refused(ask("brief", replaced={"brief": None}), "Adapter brief is not held")
    client.publish_adapter("brief", model)
    models["user 0"].save_pretrained(tmp_path / "user 0")
    answer = ask("brief", replaced={"brief": str(tmp_path / "user 0")})
    assert answer["tokens"] == [said(models["user 0"])]

    # The companion dies, and the trainer hands on what it has published.
    pid = place.companion_pid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(pid), 5, "the companion is gone")
    assert ask("user 0", "mine")["tokens"] == [said(models["user 0"]), answers[3]]
    lora.train(model, 20)
    client.publish_adapter("mine", model)
    assert ask("mine")["tokens"] == [said(model)]


@pytest.mark.slow  # most of it is the start of such an engine; test_transfer.py has one in `make test`
def test_two_ranks(
    start: Callable[..., Ask], client: CompanionClient, tiny_llama: Path, engine_environment: dict[str, str]
) -> None:
    """Each rank loads all of an adapter, and each refuses one that does not fit, without a trace."""
    ask = start(model=tiny_llama, tensor_parallel_size=2, environment=MANY_PROCESSES)
    model = lora.peft_of(tiny_llama)
    client.publish_adapter("large", lora.peft_of(tiny_llama, r=16))
    for step in range(3):
        lora.train(model, step)
        client.publish_adapter("mine", model)
        refused(ask("large"), "rank 16 is greater than max_lora_rank 8")
        assert ask("mine")["tokens"] == [said(model)]
    refused(ask("nobody"), "Adapter nobody is not held")


@pytest.fixture
def long_llama(nursery: Nursery, tmp_path: Path) -> Path:
    """A random Llama that knows as many positions as a request in flight takes."""
    return make_llama(nursery, tmp_path / "llama", max_position_embeddings=1024, num_hidden_layers=2)


@pytest.fixture
def server(
    nursery: Nursery, place: Place, fork_environment: dict[str, str], long_llama: Path, tmp_path: Path
) -> Iterator[Server]:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    flags = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--load-format", "companion"]
    flags += ["--served-model-name", str(long_llama), "taken", "--dtype", "float32", "--enforce-eager"]
    flags += ["--max-model-len", "1024", "--skip-tokenizer-init"]
    lora.peft_of(long_llama, 9).save_pretrained(tmp_path / "static")
    flags += ["--lora-modules", f"static={tmp_path / 'static'}"]
    flags += ["--host", "127.0.0.1", "--port", str(port), "--block-size", str(BLOCK)]
    with log.open("w") as file:
        process = nursery.start(
            *("tests.vllm.serve_child", str(long_llama), *flags),
            environment=fork_environment | to_environment(place.settings),
            stderr=file,
        )
    made = Server(process, str(long_llama), port, log)
    made.wait_healthy()
    yield made
    process.close()


def test_served(server: Server, client: CompanionClient, long_llama: Path) -> None:
    """Over HTTP an adapter is a model of its name."""

    def ask(model: str, **more: Any) -> tuple[int, Any]:
        asked = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        asked |= {"return_token_ids": True, "detokenize": False}
        return server.http.ask("POST", "/v1/completions", 120, asked | more)

    def tokens(model: str) -> list[int]:
        status, answer = ask(model)
        assert (status, answer.get("model")) == (200, model), answer
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    assert ask("mine")[0] == 404
    model = lora.peft_of(long_llama)
    with model.disable_adapter():
        base = said(model)
    assert tokens(server.model) == base
    for step in range(3):
        lora.train(model, step)
        client.publish_adapter("mine", model)
        assert tokens("mine") == said(model)

    # A request in flight ends on the generation that it began with; the next one has the new one.
    server.model = "mine"
    before = [token for part in server.stream(PROMPT, LONG) for token in part]
    assert before[:100] == lora.greedy(model, PROMPT, 100)
    stream = server.stream(PROMPT, LONG)
    begun = next(stream)
    lora.train(model, 7)
    client.publish_adapter("mine", model)
    lora.train(model, 8)
    client.publish_adapter("mine", model)
    [entry] = client.list_adapters()
    assert (server.running(), len(entry.generations)) == (1, 3)
    assert tokens("mine") == said(model)
    assert ask("mine?generation=3")[0] == 404  # a path names a generation, and no model does
    assert begun + [token for part in stream for token in part] == before
    until(lambda: len(client.list_adapters()[0].generations) < 3, 5, "the first one is held no more")

    # An answer with a status, also where tokens would be streamed.
    client.publish_adapter("large", lora.peft_of(long_llama, r=16))
    for more in ({}, {"stream": True}):
        status, answer = ask("large", **more)
        assert (status, "rank 16 is greater than max_lora_rank 8" in str(answer)) == (400, True), answer
    assert " ERROR " not in server.log.read_text()  # a worker would write a page of them for each request
    client.remove_adapter("mine")
    assert "Adapter mine is not held" in str(ask("mine")[1])
    for more in ({}, {"stream": True}):
        assert ask("mine", **more)[0] == 404
    assert ask("a/../b\n")[0] == 404

    # Names that the server has itself.
    with pytest.raises(BadRequestError, match="has the name of a model"):
        client.publish_adapter(str(long_llama), model)
    client.publish_adapter("taken", model)
    assert ask("taken")[1]["choices"][0]["token_ids"] == base
    client.publish_adapter("static", model)
    assert tokens("static") == said(lora.peft_of(long_llama, 9)) != said(model)
    for name in ("taken", "static"):
        until(lambda name=name: f"not with the adapter {name} that" in server.log.read_text(), 10, "the log says so")
        client.remove_adapter(name)
    status, listed = server.http.ask("GET", "/v1/models", 20)
    assert (status, [each["id"] for each in listed["data"]]) == (200, [str(long_llama), "taken", "static"])  # type: ignore[index]
