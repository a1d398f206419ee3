"""vLLM's two Ray executors on CPU: two ranks load and publish, another engine's two attach, with equal tokens.

    python -m benchmarks.ray_cpu [--out FILE]

Needs `pip install ray msgpack`, which the project does without, and root: Ray's servers listen on all interfaces, so
all of this runs in a network of its own, where there is only loopback. vLLM refuses Ray on CPU only for want of a name
for the device, so it is given one, and Ray is told of two GPUs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.servers import SMALL_CPU_ENGINE
from tests.support.checkpoints import models
from vllm_companion_plugin import CompanionClient

ADDRESS = "127.0.0.2"  # Ray takes 127.0.0.1 for a mistake
PORT = 26379
EXECUTORS = {"first": "0", "second": "1"}
DEVICE_NAME = """
from vllm_companion_plugin.engine.vllm.imports import when_imported
when_imported("vllm.platforms.cpu", lambda cpu: setattr(cpu.CpuPlatform, "ray_device_key", "GPU"))
"""
ENGINE = """
import json, sys
import ray
from vllm import LLM, SamplingParams

ray.init(address=sys.argv[1])
llm = LLM(sys.argv[2], load_format=sys.argv[3], skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
          max_model_len=64, tensor_parallel_size=2, distributed_executor_backend="ray")
prompts = [{"prompt_token_ids": list(range(start, start + 8))} for start in range(5, 85, 10)]
outputs = llm.generate(prompts, SamplingParams(max_tokens=4, temperature=0, detokenize=False))
print("TOKENS", json.dumps([token for output in outputs for token in output.outputs[0].token_ids]), flush=True)
"""
LOOPBACK_UP = struct.pack("16sh14s", b"lo", 0x41, b"")  # IFF_UP, IFF_RUNNING
SIOCSIFFLAGS = 0x8914


def in_its_own_network(arguments: list[str]) -> int:
    """This program again, where nothing but loopback is, and every process ends with it."""
    alone = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return subprocess.run([*alone, sys.executable, "-m", "benchmarks.ray_cpu", "--inside", *arguments]).returncode


def tokens(name: str, load_format: str, model: Path, environment: dict[str, str], directory: Path) -> list[int]:
    log = directory / f"{name}.log"
    with log.open("w") as output:
        command = [sys.executable, "-c", ENGINE, f"{ADDRESS}:{PORT}", str(model), load_format]
        subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=240)
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("TOKENS "):
            return list(json.loads(line.removeprefix("TOKENS ")))
    raise SystemExit(f"{name} failed:\n{log.read_text(errors='replace')[-6000:]}")


def executor(name: str, model: Path, directory: Path) -> list[str]:
    """What was seen of one executor, of three engines in turn."""
    runtime_dir = directory / f"run-{name}"
    environment = (
        os.environ
        | SMALL_CPU_ENGINE
        | {
            "PYTHONPATH": os.pathsep.join([str(directory / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "COMPANION_RUNTIME_DIR": str(runtime_dir),
            "RAY_ADDRESS": f"{ADDRESS}:{PORT}",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "VLLM_HOST_IP": ADDRESS,
            "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "COMPANION_",
            "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": EXECUTORS[name],
        }
    )
    start = f"start --head --node-ip-address {ADDRESS} --port {PORT} --num-cpus 4 --num-gpus 2 --block"
    start += f" --include-dashboard false --object-store-memory 200000000 --temp-dir {directory / 'ray'}"
    with (directory / f"ray-{name}.log").open("w") as log:
        ray = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", *start.split()], env=environment, stdout=log, stderr=log
        )
    try:
        time.sleep(15)
        reference = tokens(f"{name}-auto", "auto", model, environment, directory)
        loaded = tokens(f"{name}-loaded", "companion", model, environment, directory)
        attached = tokens(f"{name}-attached", "companion", model, environment, directory)
        client = CompanionClient("cpu", runtime_dir=str(runtime_dir))
        ranks = [(entry.key.rank, entry.generation) for entry in client.status().entries]
    finally:
        ray.terminate()
        ray.wait(30)
    said = (runtime_dir / "cpu" / "companion.log").read_text()
    assert loaded == attached == reference, (reference, loaded, attached)
    assert sorted(ranks) == [("tp0/2", 1), ("tp1/2", 1)], ranks
    assert (said.count(" published "), said.count(": attached.")) == (2, 2), said
    lines = [line for line in said.splitlines() if "service.py" in line]
    return [f"{name} executor: tokens of auto, loaded and attached: {reference}", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("/dev/stdout"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        raise SystemExit(in_its_own_network(sys.argv[1:]))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, LOOPBACK_UP)
    import ray
    import vllm

    lines = [f"vLLM {vllm.__version__}, Ray {ray.__version__}, {time.strftime('%Y-%m-%d')}, {parser.prog}"]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as made:
        directory = Path(made)
        (directory / "site").mkdir()
        (directory / "site" / "sitecustomize.py").write_text(DEVICE_NAME)
        models.make("llama", directory / "llama", tiny=True)
        for name in EXECUTORS:
            lines += executor(name, directory / "llama", directory)
    args.out.write_text("\n".join(lines).replace(str(directory), "") + "\n")


if __name__ == "__main__":
    main()
