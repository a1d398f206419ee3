"""Trainers beside real engines, on one copy of the weights."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.support.place import Place, until
from tests.vllm.conftest import entries
from tests.vllm.nursery import ROOT
from tests.vllm.test_adapters import LORA, Ask, start  # noqa: F401
from tests.vllm.test_fleet import PROMPT
from tests.vllm.test_sharing import arena_pss_bytes
from vllm_companion_plugin.fleet.http import Http

pytestmark = [pytest.mark.vllm, pytest.mark.core, pytest.mark.timeout(600)]


class Trainer:
    """tests/vllm/lora_trainer_child.py, running."""

    def __init__(self, place: Place, model: Path, name: str) -> None:
        self.process = place.run("-m", "tests.vllm.lora_trainer_child", str(model), name)
        self.first = self._answer()

    def ask(self, asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
                return answer
        raise AssertionError(self.process.communicate()[1][-5000:])


def test_a_trainer_and_an_engine_use_the_same_bytes(
    start: Callable[..., Ask],  # noqa: F811
    place: Place,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """Twenty steps, each sampled at once; one copy of the weights; and the engine goes on after the trainer's death."""
    for name in ("HF_HUB_OFFLINE", "VLLM_CPU_KVCACHE_SPACE"):
        place.environment[name] = "1"
    trainer = Trainer(place, tiny_llama, "mine")  # which has vLLM load the model: nobody has it yet
    ask = start(model=tiny_llama)
    assert trainer.first["copied"] == {}
    answers, sure = [], 0
    for step in range(20):
        trained = trainer.ask(PROMPT)
        assert trained["generation"] == step + 1
        (answer,) = ask("mine")["tokens"]
        answers.append(answer)
        sure += len(trained["tokens"])
        assert answer[: len(trained["tokens"])] == trained["tokens"], step
    assert (len({*map(tuple, answers)}) > 5, sure > 100) == (True, True), answers

    weights, *others = [entry for entry in entries(place) if entry.key.kind == "weights"]
    assert [other.key.differences(weights.key) for other in others] == []
    pids = {lease.pid for lease in weights.leases}
    assert len(pids) == 2
    assert trainer.first["pid"] in pids
    sizes = [arena_pss_bytes(pid, weights.size_bytes) for pid in pids]
    assert sum(pss for pss, _ in sizes) == pytest.approx(weights.size_bytes, rel=0.02)
    assert [private for _, private in sizes] == [0, 0]

    saved, merged = tmp_path / "adapter", tmp_path / "merged"
    trainer.ask(str(saved))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    PeftModel.from_pretrained(model, saved).merge_and_unload().save_pretrained(merged)
    fresh = start(model=merged, enable_lora=False, load_format="auto")
    assert ask("mine")["tokens"] == fresh(None)["tokens"] == [answers[-1]]

    trainer.process.send_signal(signal.SIGKILL)
    trainer.process.wait(60)
    base = ask(None)["tokens"]
    assert ask("mine")["tokens"] == [answers[-1]]
    assert ask(None)["tokens"] == base


USERS = ([77, 78, 79, 80], [90, 91, 92, 93], [11, 12, 13, 14])


def test_users_train_and_sample_adapters_of_one_base_at_once(
    place: Place, tiny_llama: Path, engine_environment: dict[str, str], tmp_path: Path
) -> None:
    """docs/examples/tinker_service.py, asked by three users in turns and at once."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--skip-tokenizer-init"]
    command = [sys.executable, "docs/examples/tinker_service.py", str(tiny_llama), "--port", str(port), *flags]
    log = tmp_path / "service.log"
    with log.open("w") as file:
        service = subprocess.Popen(
            command, stdout=file, stderr=file, env=engine_environment | place.environment, cwd=ROOT
        )
    place.processes.append(service)  # type: ignore[arg-type]
    http = Http(f"http://127.0.0.1:{port}")

    def is_up() -> bool:
        assert service.poll() is None, log.read_text()[-5000:]
        try:
            return http.ask("GET", "/openapi.json", 20)[0] == 200
        except OSError:
            return False

    until(is_up, 300, "the service answers", every_s=0.2)

    def call(name: str, expected: int = 200, **body: Any) -> Any:
        status, answer = http.ask("POST", f"/api/v1/{name}", 200, body)
        assert status == expected, answer
        return answer

    def sampled(path: str | None) -> list[int]:
        params = {"max_tokens": 4, "temperature": 0}
        found: list[int] = call("sample", model_path=path, prompt=[1, 2, 3, 4, 5], sampling_params=params)["sequences"][
            0
        ]["tokens"]
        return found

    base = sampled(None)
    models: dict[int, str] = {}
    losses: dict[int, list[float]] = {}

    def train(user: int) -> None:
        models[user] = call("create_model", lora_config={"rank": 8})["model_id"]
        losses[user] = []
        for _ in range(15):  # five are enough from any start, as one token is all that is asked
            data = [{"tokens": [1, 2, 3, 4, 5, *USERS[user]], "weights": [0.0] * 5 + [1.0] + [0.0] * 3}]
            losses[user].append(call("forward_backward", model_id=models[user], data=data)["loss"])
            call("optim_step", model_id=models[user], adam_params={"learning_rate": 1e-2})

    threads = [threading.Thread(target=train, args=(user,)) for user in range(len(USERS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    paths = [call("save_weights_for_sampler", model_id=models[user])["path"] for user in range(len(USERS))]
    for _ in range(2):  # in turns
        assert [sampled(path)[0] for path in paths] == [target[0] for target in USERS], losses
    assert sampled(None) == base
    assert all(each[-1] < each[0] for each in losses.values()), losses
    assert "not_found" in str(call("sample", 404, model_path="companion:nobody", prompt=[1, 2]))
    assert "not_found" in str(call("optim_step", 404, model_id="nobody"))
    wrong: list[tuple[str, int, dict[str, Any]]] = [
        # What is no adapter of this service would be one that the engine has under the same number.
        *(("sample", 422, {"model_path": path, "prompt": [1, 2]}) for path in ("nobody", str(tmp_path), "")),
        ("sample", 400, {"model_path": "companion:", "prompt": [1, 2]}),
        *(("sample", 400, {"prompt": prompt}) for prompt in ([-1], [10**9], [1] * 200)),
        ("sample", 422, {"prompt": []}),
        ("sample", 422, {"prompt": [1], "num_samples": 0}),
        ("sample", 400, {"prompt": [1], "sampling_params": {"temperature": -1}}),
        ("forward_backward", 422, {"model_id": models[1], "data": [{"tokens": []}]}),
        ("forward_backward", 400, {"model_id": models[1], "data": [{"tokens": [1, 2], "weights": []}]}),
        ("optim_step", 422, {"model_id": models[1], "adam_params": {"learning_rate": -1}}),
    ]
    for name, status, body in wrong:
        call(name, status, **body)
    assert [sampled(path)[0] for path in paths] == [target[0] for target in USERS]
    assert len(call("sample", prompt=[1, 2], num_samples=3)["sequences"]) == 3
    call("unload_model", model_id=models[0])
    call("sample", 404, model_path=paths[0], prompt=[1, 2])
    assert sampled(paths[1])[0] == USERS[1][0]
    (weights,) = [entry for entry in entries(place) if entry.key.kind == "weights"]
    assert {lease.pid for lease in weights.leases} == {service.pid}
    service.terminate()
    service.wait(60)


@pytest.mark.slow  # the service above is one process of this kind
def test_engines_and_trainers_in_the_processes_of_torchrun(
    place: Place, tiny_llama: Path, engine_environment: dict[str, str]
) -> None:
    """Two processes, each an engine and a trainer, on one copy; each samples what both have trained."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.vllm.colocated_child", str(tiny_llama), place.settings.runtime_dir],
        env=engine_environment,  # where the companion is, only the call says
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    lines = [line.partition("RESULT ")[2] for line in done.stdout.splitlines() if "RESULT " in line]
    found = sorted(map(json.loads, lines), key=lambda each: each["wanted"])
    assert [each["mine"] for each in found] == [77, 78]
    assert [each["others"] for each in found] == [78, 77]
    # One that is removed while it is active, and the last one, leave a model that takes others.
    for number, each in enumerate(found):
        assert each["active"] == [[f"user {number}"], [f"user {number}"], each["wanted"]]
        assert each["none"] == [[], "LlamaForCausalLM", each["base"]]
        assert each["refused"] == ["a.b", ""]
        assert each["third"] == [[f"third {number}"], each["base"]]
    # An adapter is sampled as it is, however it was written to.
    assert [(each["emptied"], each["again"], each["unscaled"]) for each in found] == [
        (each["base"], each["mine"], each["base"]) for each in found
    ]
    assert found[0]["base"] == found[1]["base"] not in (77, 78)
    assert all("Adapter nobody is not held" in each["nobody"] and each["copied"] == {} for each in found)
    assert [each["pids"] for each in found] == [[sorted(each["pid"] for each in found)]] * 2
