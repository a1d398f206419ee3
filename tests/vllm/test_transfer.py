"""A trainer gives real servers new weights by vLLM's weight transfer, over vLLM's own routes."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from benchmarks.servers import Server
from tests.support.place import Place, alive, until
from tests.vllm.conftest import FLAGS, START_TIMEOUT_S, StartEngine, entries
from tests.vllm.nursery import Forked, Nursery
from tests.vllm.test_update import OPTIONS, trained
from vllm_companion_plugin.settings import to_environment

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

TRANSFER = ("--load-format", "companion", "--weight-transfer-config", '{"backend": "companion"}')
CHILD = "tests.vllm.transfer_child"
UPDATES = 20
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Serving(Server):
    """A server that takes weights, with the routes of `VLLM_SERVER_DEV_MODE`; a fork of `nursery`."""

    def __init__(self, nursery: Nursery, *arguments: Any) -> None:
        self._nursery = nursery
        super().__init__(*arguments)

    def _start(self, arguments: list[str], environment: dict[str, str], log: IO[str]) -> Forked:
        return self._nursery.start("tests.vllm.serve_child", *arguments, environment=environment, stderr=log)

    def post(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer; of an error that the server tells, too."""
        data = json.dumps(body).encode() if body is not None else b""
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        try:
            with _http.open(request, timeout=200) as response:
                return json.loads(response.read() or b"{}")  # type: ignore[no-any-return]
        except urllib.error.HTTPError as error:
            return json.loads(error.read())  # type: ignore[no-any-return]

    def refusal(self, path: str, body: dict[str, Any] | None = None) -> str:
        answer = self.post(path, body)
        assert "error" in answer, (path, answer)
        return str(answer["error"]["message"])

    def tokens(self) -> list[list[int]]:
        sampling = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        body = {"model": "model", "prompt": OPTIONS["prompts"], "detokenize": False, **sampling}
        assert "error" not in self.post("reset_prefix_cache")
        choices = sorted(self.post("v1/completions", body)["choices"], key=lambda choice: choice["index"])
        return [choice["token_ids"] for choice in choices]

    def version(self) -> str:
        with _http.open(f"{self.url}/weight_info", timeout=60) as response:
            return str(json.load(response)["weight_version"])

    def open(self) -> list[tuple[int, int]]:
        """Of each of its processes that maps weights: how many descriptors, and how many mappings."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(path.name)) == self.process.pid:
                    maps = (path / "maps").read_text().count("memfd:vllm-companion")
                    found += [(len(list((path / "fd").iterdir())), maps)] if maps else []
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found


class Trainer:
    """tests/vllm/transfer_child.py as a child: a new process, as a user's, or a fork of the nursery, which is fast."""

    def __init__(self, process: subprocess.Popen[str] | Forked) -> None:
        self.process = process

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("SAID "):
                return json.loads(line.removeprefix("SAID "))  # type: ignore[no-any-return]
        raise AssertionError(f"the trainer ended: {self.process.communicate(timeout=10)}")

    def begin(self, do: str, **options: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()

    def tell(self, do: str, **options: Any) -> dict[str, Any]:
        self.begin(do, **options)
        return self.said()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@pytest.fixture
def start_trainer(
    place: Place, nursery: Nursery, fork_environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Trainer]]:
    forks: list[Forked] = []

    def start(model: Path, servers: list[Serving], *, is_fork: bool = True) -> Trainer:
        arguments = (str(model), *(server.url for server in servers))
        if not is_fork:
            return Trainer(place.run("-m", CHILD, *arguments))
        environment = fork_environment | to_environment(place.settings)
        with (tmp_path / f"trainer-{len(forks)}.log").open("w") as log:
            forks.append(nursery.start(CHILD, *arguments, environment=environment, stderr=log))
        return Trainer(forks[-1])

    yield start
    for fork in forks:
        fork.close()


@pytest.fixture
def start_server(
    tmp_path: Path, place: Place, nursery: Nursery, fork_environment: dict[str, str]
) -> Iterator[Callable[..., Serving]]:
    servers: list[Serving] = []

    def start(model: Path, *flags: str) -> Serving:
        environment = fork_environment | to_environment(place.settings) | {"VLLM_SERVER_DEV_MODE": "1"}
        log = tmp_path / f"server-{len(servers)}.log"
        servers.append(Serving(nursery, model, [*FLAGS, *TRANSFER, *flags], ("", {}), environment, log))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def generations(place: Place) -> list[tuple[int, str]]:
    (entry,) = entries(place)
    return [(each.number, each.version) for each in entry.generations]


def test_transfer(
    place: Place,
    start_server: Callable[..., Serving],
    start_trainer: Callable[..., Trainer],
    start_engine: StartEngine,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """Two servers have the tokens of engines that load what was trained; whatever goes wrong, those of before."""
    checkpoints = [str(trained(tiny_llama, tmp_path, seed)) for seed in (1, 2)]
    servers = [start_server(tiny_llama) for _ in range(2)]
    one, two = (start_engine(model=path, load_format="auto", **OPTIONS).result()["tokens"] for path in checkpoints)
    until(lambda: all(server.is_up() for server in servers), START_TIMEOUT_S, "both servers are up", every_s=0.2)
    trainer, first = start_trainer(tiny_llama, servers, is_fork=False), servers[0]

    def answers() -> list[Any]:
        return [server.tokens() for server in servers]

    loaded = first.tokens()
    assert answers() == [loaded, loaded]
    assert len({str(tokens) for tokens in (loaded, one, two)}) == 3

    # Wrong order, and what nobody has written.
    (key_id,) = {entry.key.id for entry in entries(place)}
    assert "without a matching start_weight_update" in first.refusal("finish_weight_update")
    assert "start_weight_update must be called" in first.refusal("update_weights", {"update_info": {}})
    assert "trainer writes org/other" in first.refusal(
        "init_weight_transfer_engine", {"init_info": {"model": "org/other"}}
    )
    for generations_, expected in (
        ({"cpu": {key_id: 7}}, "7"),
        ({"cpu": {"ab" * 32: 1}}, "the trainer has written abababababab"),
        ({"GPU-1": {key_id: 1}}, "is not on GPU-1, which the trainer has written to"),
    ):
        assert "error" not in first.post("start_weight_update")
        assert expected in first.refusal("update_weights", {"update_info": {"generations": generations_}})
    assert "error" not in first.post("start_weight_update")
    assert "announced mine" in first.refusal(
        "update_weights", {"update_info": {"generations": {"cpu": {key_id: 1}}, "version": "mine"}}
    )
    assert "error" not in first.post("start_weight_update")
    assert "already active" in first.refusal("start_weight_update")
    assert "were announced in this update" in first.refusal("finish_weight_update")
    assert answers() == [loaded, loaded]

    # The update that was left open is none of the trainer's.
    assert trainer.said() == {}
    assert trainer.tell("send", checkpoints=checkpoints[:1], versions=["step-1"]) == {"generations": [2]}
    assert answers() == [one, one]
    assert [server.version() for server in servers] == ["step-1", "step-1"]

    # Asleep: neither switches, and the one that is awake can begin another update.
    first.post("sleep?level=1")
    assert "sleeps, so it cannot advance. Wake the engine first." in first.refusal("start_weight_update")
    refused = trainer.tell("send", checkpoints=checkpoints[1:], versions=["step-2"])
    assert refused["error"] == "update_refused"
    assert refused["text"].startswith(f"Of 2 engines 1 refused. {first.url} cannot take new weights now: ")
    assert "error" not in first.post("wake_up")  # and has what the other one has
    assert answers() == [one, one]
    assert [server.version() for server in servers] == ["step-1", "step-1"]
    assert "error" not in first.post("start_weight_update")
    assert "error" not in first.post("update_weights", {"update_info": {"generations": {"cpu": {key_id: 2}}}})
    assert "error" not in first.post("sleep?level=1")  # which keeps nothing that was prepared
    assert "error" not in first.post("wake_up")
    assert "were announced in this update" in first.refusal("finish_weight_update")

    # Killed while it writes, and when all have prepared: nothing has changed, and the next trainer goes on.
    for hangs in ({"do": "hang_while_writing"}, {"do": "hang_before_the_switch", "checkpoint": checkpoints[1]}):
        assert trainer.tell(**hangs) == {"hangs": True}
        trainer.kill()
        assert answers() == [one, one]
        if hangs["do"] == "hang_while_writing":
            assert generations(place) == [(2, "step-1")]
        trainer = start_trainer(tiny_llama, servers)
        assert trainer.said() == {}
    assert "error" not in trainer.tell("send", checkpoints=checkpoints[1:], versions=["step-2"])
    assert answers() == [two, two]

    # Many.
    before = [server.open() for server in servers]
    assert all(len(each) == 1 for each in before)
    versions = [f"step-{number}" for number in range(3, 3 + UPDATES)]
    sent = [checkpoints[number % 2] for number in range(UPDATES)]
    assert "error" not in trainer.tell("send", checkpoints=sent, versions=versions)
    assert [server.open() for server in servers] == before
    assert answers() == [two, two]
    assert [server.version() for server in servers] == [versions[-1]] * 2
    assert len(generations(place)) == 2

    refused = trainer.tell("send_other_shapes")
    assert refused["error"] == "bad_request"
    assert "lm_head.weight of shape (300, 128) instead of (512, 128)" in refused["text"]
    assert answers() == [two, two]
    assert all(alive(server.process.pid) for server in servers)


def test_ranks(
    place: Place,
    start_server: Callable[..., Serving],
    start_trainer: Callable[..., Trainer],
    start_engine: StartEngine,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """What one rank refuses no rank takes, and each answer is the one to the call that was made.

    The trainer has several ranks, too, each with a part of every tensor; all of them know what became of the weights.
    """
    checkpoint = str(trained(tiny_llama, tmp_path, 1))
    server = start_server(tiny_llama, "--tensor-parallel-size", "2")
    expected = start_engine(model=checkpoint, load_format="auto", **OPTIONS).result()["tokens"]
    until(server.is_up, START_TIMEOUT_S, "the server is up", every_s=0.2)
    loaded = server.tokens()
    first, second = sorted((entry.key for entry in entries(place)), key=lambda key: key.rank)
    for written, refused in ((first, second), (second, first)):
        assert "error" not in server.post("start_weight_update")
        info = {"generations": {"cpu": {written.id: 1}}}
        assert f"({refused.rank}) on cpu has the key" in server.refusal("update_weights", {"update_info": info})
        assert "start_weight_update must be called" in server.refusal("update_weights", {"update_info": info})
    assert server.tokens() == loaded
    trainers = [start_trainer(tiny_llama, [server]) for _ in range(2)]

    def tell(do: str, options: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for trainer, each in zip(trainers, options, strict=True):
            trainer.begin(do, **each)
        return [trainer.said() for trainer in trainers]

    assert [trainer.said() for trainer in trainers] == [{}, {}]
    store = str(tmp_path / "store")
    tell("join", [{"rank": rank, "world_size": 2, "store": store} for rank in range(2)])
    send = [{"checkpoints": [checkpoint], "versions": ["step-1"]}] * 2
    assert tell("send", send) == [{"generations": [2, 2]}] * 2
    assert server.tokens() == expected

    assert "error" not in server.post("sleep?level=1")
    writer, other = tell("send", send)
    assert writer["error"] == other["error"] == "update_refused"
    assert "Another process of this trainer failed: UpdateRefusedError: Of 1 engines 1 refused" in other["text"]
    assert "error" not in server.post("wake_up")
    assert server.tokens() == expected
