"""Real vLLM engines on CPU in containers that share only the runtime directory, and a model that they can only read.

`python -m benchmarks.containers`, as root or where user namespaces are permitted. The containers are those of
tests/process/test_containers.py; raw output in docs/results/containers-cpu.txt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.servers import SMALL_CPU_ENGINE
from tests.process.test_containers import ROOT, UNSHARE
from vllm_companion_plugin.client.connection import connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.settings import resolve

ENTER = (
    'mount --bind "$1" /mnt && mount --bind "$2" /media && mount -o remount,bind,ro /media && '
    "mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && ip link set lo up && "
    'hostname "$3" && cd / && shift 3 && exec "$@"'
)
OPTIONS = {
    "model": "/media",
    "load_format": "companion",
    "skip_tokenizer_init": True,
    "prompts": [[1, 2, 3, 4, 5]],
}
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"},
    "COMPANION_RUNTIME_DIR": "/mnt/r",
    **SMALL_CPU_ENGINE,
    "PYTHONPATH": str(ROOT),
    "VLLM_CACHE_ROOT": "/tmp/cache",
    "VLLM_CONFIG_ROOT": "/tmp/config",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
MODEL = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8,
    vocab_size=16000, max_position_embeddings=256,
)).save_pretrained(sys.argv[1])
"""


def start(name: str, root: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """An engine in a container of its own, and what it reported."""
    began = time.monotonic()
    engine = [sys.executable, str(ROOT / "tests/vllm/engine_child.py"), json.dumps(OPTIONS)]
    with (root / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [*UNSHARE, ENTER, "sh", str(root / "shared"), str(root / "model"), name, *engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=ENVIRONMENT,
        )
    assert process.stdout is not None
    found = next((line for line in process.stdout if line.startswith("RESULT ")), None)
    assert found is not None, (root / f"{name}.log").read_text()[-5000:]
    result = json.loads(found.removeprefix("RESULT "))
    (worker,) = result["workers"]
    mapped = sum(tensor["in_arena"] for tensor in worker["tensors"].values())
    print(
        f"{name}: up in {time.monotonic() - began:.1f} s, worker has pid {worker['pid']}, "
        f"{mapped} of {len(worker['tensors'])} tensors in the arena, tokens {result['tokens'][0][:8]}",
        flush=True,
    )
    return process, result


def show(runtime_dir: str) -> None:
    environment = {**ENVIRONMENT, "COMPANION_RUNTIME_DIR": runtime_dir}
    subprocess.run([sys.executable, "-m", "vllm_companion_plugin.cli.main", "status"], env=environment, check=True)
    with connect("cpu", resolve({"runtime_dir": runtime_dir}), spawn=False) as connection:
        for entry in connection.status().entries:
            print([lease.client for lease in entry.leases], flush=True)


def taken_over(runtime_dir: str, before: int) -> bool:
    """Whether a companion other than the one with pid `before` holds the model for somebody."""
    try:
        with connect("cpu", resolve({"runtime_dir": runtime_dir}), spawn=False) as connection:
            status = connection.status()
            return status.pid != before and any(e.state is EntryState.READY and e.leases for e in status.entries)
    except CompanionError:
        return False


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor["value"] for name, tensor in result["workers"][0]["tensors"].items()}


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="vc") as place:
        root = Path(place)
        runtime_dir = str(root / "shared" / "r")
        (root / "shared").mkdir()
        subprocess.run([sys.executable, "-c", MODEL, str(root / "model")], check=True)
        first, loaded = start("web-1", root)
        second, attached = start("web-2", root)
        print(f"equal tensors: {values(loaded) == values(attached)}, tokens: {loaded['tokens'] == attached['tokens']}")
        show(runtime_dir)
        with connect("cpu", resolve({"runtime_dir": runtime_dir}), spawn=False) as connection:
            before = connection.status().pid
        began = time.monotonic()
        first.kill()
        first.wait()
        while not taken_over(runtime_dir, before):
            time.sleep(0.02)
        print(f"web-1 was killed, and the companion with it; web-2 took over in {time.monotonic() - began:.2f} s")
        show(runtime_dir)
        third, late = start("web-3", root)
        print(f"equal tokens: {late['tokens'] == loaded['tokens']}")
        show(runtime_dir)
        for process in (second, third):
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
