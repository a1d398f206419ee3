"""Every broken state that can be made here is made, explained, and mended by the command that doctor names."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.process.test_cli import CLI, read_until, serve
from tests.support.place import KEY, Place, alive, answering, listens, until
from tests.support.publishing import hold_zeros
from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.cli.doctor import states
from vllm_companion_plugin.cli.doctor.check import FAIL, OK, WARN, Check
from vllm_companion_plugin.host import notes
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.keeper.process import Keeper
from vllm_companion_plugin.settings import resolve

COMPANION, LOADING, KEEPER = "companion of cpu", "loading on cpu", "keeper of cpu"

HANG = "print('ready', flush=True)\nimport time\ntime.sleep(600)\n"
LISTEN = "import socket, sys\ns = socket.socket(socket.AF_UNIX, socket.{})\ns.bind(sys.argv[1])\ns.listen(8)\n"


@pytest.fixture(autouse=True)
def _quick(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is broken here stays so: no need to look at it for long."""
    monkeypatch.setattr(states, "LASTING_S", 0.2)
    monkeypatch.setattr(states, "ANSWER_S", 2.0)
    yield
    for process in place.processes:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.terminate()


def look(place: Place) -> dict[str, Check]:
    """Findings by name; those about other tests' companions aside."""
    checks = [
        c for c in states.check_companions(place.settings) if c.name not in ("lost companion", "companion elsewhere")
    ]
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def found(place: Place, name: str, level: str, *texts: str) -> Check:
    check = look(place)[name]
    assert check.level == level, check
    assert all(text in check.text for text in texts), check
    return check


def mend(place: Place, check: Check) -> None:
    """Do what it says, as one would: in a shell."""
    command = check.mend.replace("vllm-companion", f"{sys.executable} {' '.join(CLI)}")
    subprocess.run(command, shell=True, env=place.environment, check=True, timeout=100, stdout=subprocess.DEVNULL)
    if command.startswith("kill -CONT"):
        until(lambda: not states._is_stopped(int(command.split()[2])), 5, "it goes on")


def mended(place: Place, check: Check) -> None:
    mend(place, check)
    until(lambda: {c.level for c in look(place).values()} <= {OK}, 10, f"{check.mend!r} mends it")


def child(place: Place, code: str, *arguments: str) -> int:
    process = place.run("-u", "-c", code + HANG, *arguments)
    read_until(process, "ready")
    return process.pid


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: states._is_stopped(pid), 5, "it is stopped")


# ---- companions


def test_one_that_is_well_or_absent(place: Place) -> None:
    assert look(place) == {}
    companion = place.companion()
    found(place, COMPANION, OK, f"pid {companion.pid}")
    companion.kill()
    companion.wait(30)
    found(place, COMPANION, OK, "replaces its socket")


def test_one_that_is_stopped_by_a_signal(place: Place) -> None:
    companion = place.companion()
    stop(companion.pid)
    check = found(place, COMPANION, FAIL, f"pid {companion.pid} is stopped")
    mended(place, check)
    assert companion.poll() is None


def test_one_that_hangs(place: Place) -> None:
    lock = (
        "import fcntl, os\nfd = os.open(sys.argv[2], os.O_RDWR | os.O_CREAT, 0o600)\nfcntl.flock(fd, fcntl.LOCK_EX)\n"
    )
    paths = place.paths
    pid = child(place, LISTEN.format("SOCK_STREAM") + lock, paths.grpc_socket, paths.companion_lock)
    mended(place, found(place, COMPANION, FAIL, f"pid {pid}", "does not answer"))


@pytest.mark.parametrize("accepts", [False, True])
def test_something_that_is_no_companion(place: Place, accepts: bool) -> None:
    accept = "import threading\nthreading.Thread(target=lambda: s.accept()[0].close(), daemon=True).start()\n"
    pid = child(place, LISTEN.format("SOCK_STREAM") + accept * accepts, place.paths.grpc_socket)
    mended(place, found(place, COMPANION, FAIL, f"pid {pid}", "is no companion"))
    assert not os.path.exists(place.paths.grpc_socket)


@pytest.mark.parametrize("which", ["grpc_socket", "fd_socket"])
def test_one_whose_socket_was_removed(place: Place, which: str) -> None:
    companion = place.companion()
    os.unlink(getattr(place.paths, which))
    mended(place, found(place, COMPANION, FAIL, f"pid {companion.pid}"))
    companion.wait(30)


def test_one_of_another_version(place: Place) -> None:
    code = (
        "import sys, vllm_companion_plugin._version as version\nversion.__version__ = '0.0.9'\n"
        "from vllm_companion_plugin.holder.__main__ import main\nsys.exit(main(['--device', 'cpu']))"
    )
    old = place.run("-c", code)
    until(lambda: listens(place.paths.fd_socket), 20, "it listens")
    mended(place, found(place, COMPANION, WARN, "version 0.0.9", f"installed is {__version__}"))
    assert old.wait(30) == 0


@pytest.mark.parametrize(
    ("version", "command"), [(0, "vllm-companion stop --device cpu"), (99, "pip install -U vllm-companion-plugin")]
)
def test_one_of_another_protocol(place: Place, version: int, command: str) -> None:
    with answering(place, version):
        assert found(place, COMPANION, FAIL, f"speaks protocol {version}").mend == command


def test_one_that_has_hardly_any_files_left(place: Place) -> None:
    companion = place.companion()
    used = len(os.listdir(f"/proc/{companion.pid}/fd"))
    resource.prlimit(companion.pid, resource.RLIMIT_NOFILE, (used + 3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    check = found(place, COMPANION, WARN, f"of {used + 3} possible files")
    assert check.mend == f"prlimit --pid {companion.pid} --nofile=65536:65536"


def test_one_that_nobody_can_reach_and_one_that_is_elsewhere(place: Place) -> None:
    companion = place.companion()
    elsewhere = resolve({"runtime_dir": f"{place.settings.runtime_dir}2"})
    (check,) = [c for c in states._check_elsewhere(elsewhere) if f"pid {companion.pid} " in c.text]
    assert (check.name, check.level) == ("companion elsewhere", OK)
    assert place.settings.runtime_dir in check.mend
    stop(companion.pid)
    shutil.rmtree(place.settings.runtime_dir)
    (check,) = [c for c in states._check_elsewhere(elsewhere) if f"pid {companion.pid} " in c.text]
    assert (check.name, check.level) == ("lost companion", WARN)
    mend(place, check)
    assert companion.wait(30) == -signal.SIGKILL


# ---- entries


def test_what_is_mapped_while_no_companion_can_be_started(place: Place) -> None:
    note = notes.hold(place.paths, KEY, 3)
    Path(place.paths.log).write_text("INFO begins\nvllm-companion: no module named grpc\n")
    check = found(place, COMPANION, FAIL, "test/model, generation 3", "no module named grpc")
    assert check.mend == "vllm-companion serve --device cpu"
    os.close(note)
    assert look(place) == {}


def test_what_is_mapped_and_unknown_to_the_companion(place: Place) -> None:
    place.companion()
    until(lambda: look(place)[COMPANION].level == OK, 5, "it answers")
    note = notes.hold(place.paths, KEY, 3)
    assert found(place, "test/model on cpu", WARN).mend.startswith(f"kill {os.getpid()},")
    os.close(note)


def test_who_has_not_followed_an_update_is_well(place: Place) -> None:
    """The companion has what it maps, beside what is current."""
    place.companion()
    client = hold_zeros(place)
    with client.attach("test/model"):
        with client.update("test/model", version="ones") as new:
            new.load({"embed.weight": torch.ones(64, 16, dtype=torch.bfloat16)})
        assert [number for _, number in notes.held(place.paths)] == [1]
        assert "test/model on cpu" not in look(place)


def test_a_load_that_does_not_get_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.companion()
    loader = place.client("loader", "attach")
    read_until(loader, "granted")
    name = "loading of test/model (single)"
    assert name not in look(place)
    stop(loader.pid)
    mend(place, found(place, name, FAIL, f"pid {loader.pid}", "is stopped"))
    until(lambda: name not in look(place), 5, "it goes on")
    monkeypatch.setattr(states, "SILENT_S", 0.0)
    mended(place, found(place, name, WARN, f"pid {loader.pid}", "no progress"))


# ---- locks and the keeper


def test_a_loader_that_keeps_the_device(place: Place) -> None:
    code = (
        "from vllm_companion_plugin.host.election import LoaderElection\n"
        "from vllm_companion_plugin.host.runtime_dir import device_paths\n"
        "from vllm_companion_plugin.settings import resolve\n"
        "e = LoaderElection(device_paths('cpu', resolve())).acquire(1, 'loading test/model')\n"
    )
    pid = child(place, code)
    found(place, LOADING, OK, "loading test/model")
    stop(pid)
    mend(place, found(place, LOADING, FAIL, f"pid {pid}", "is stopped"))
    long_ago = time.time() - 300
    os.utime(place.paths.loader_lock + ".holder", (long_ago, long_ago))
    mended(place, found(place, LOADING, WARN, f"pid {pid}", "no sign of life for 30"))


@pytest.mark.parametrize("which", ["spawn", "keeper"])
def test_a_start_that_does_not_get_on(place: Place, which: str) -> None:
    path = getattr(place.paths, f"{which}_lock")
    pid = child(place, f"from filelock import FileLock\nlock = FileLock({path!r})\nlock.acquire()\n")
    what = {"spawn": "companion", "keeper": "keeper"}[which]
    mended(place, found(place, f"start of a {what} of cpu", WARN, f"pid {pid}"))


def test_a_keeper_that_hangs_is_gone_or_well(place: Place) -> None:
    pid = child(place, LISTEN.format("SOCK_SEQPACKET"), place.paths.keeper_socket)
    stop(pid)
    mend(place, found(place, KEEPER, FAIL, f"pid {pid} is stopped"))
    mended(place, found(place, KEEPER, FAIL, f"pid {pid} does not answer"))
    assert look(place) == {}
    os.unlink(place.paths.keeper_socket)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(place.paths.keeper_socket)
    listener.listen(8)
    keeper = threading.Thread(target=Keeper(listener, lambda size: (1, b""), lambda address: None).run, args=(3.0,))
    keeper.start()
    found(place, KEEPER, OK, f"pid {os.getpid()}")
    keeper.join(30)
    listener.close()


# ---- the surroundings


def doctor(place: Place, *flags: str, shell: str = "", **environment: str) -> dict[str, Check]:
    """Findings of the command itself, started from a shell that has said `shell`."""
    command = [sys.executable, *CLI, "doctor", "--json", "--runtime-dir", place.settings.runtime_dir, *flags]
    done = subprocess.run(
        ["bash", "-c", f'{shell}\nexec "$@"', "bash", *command],
        **{"capture_output": True, "text": True, "timeout": 100, "check": False},
        env={**os.environ, **environment},
    )
    assert not done.stderr
    return {check["name"]: Check(**check) for check in json.loads(done.stdout)}


def test_protobuf_in_pure_python(place: Place) -> None:
    """Everything works, so it is a warning."""
    name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    check = doctor(place, **{name: "python"})["protobuf"]
    assert (check.level, check.mend) == (WARN, f"unset {name}")


def test_an_implementation_of_protobuf_that_is_no_more(place: Place) -> None:
    """Old recipes set `cpp`. No other version of protobuf mends that, and commands say whom to ask."""
    name = "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"
    check = doctor(place, **{name: "cpp"}, PYTHONWARNINGS="ignore")["protocol"]
    assert (check.level, check.mend) == (FAIL, f"unset {name}")
    environment = {**place.environment, name: "cpp"}
    status = subprocess.run([sys.executable, *CLI, "status"], capture_output=True, text=True, env=environment)
    assert (status.returncode, "Traceback" in status.stderr) == (1, False)
    assert "Run: vllm-companion doctor" in status.stderr


def test_a_runtime_directory_that_is_not_what_was_meant(place: Place) -> None:
    """A session's directory that is gone is not used; a relative one would be another one for each process."""
    check = doctor(place, XDG_RUNTIME_DIR="/run/user/none")["XDG_RUNTIME_DIR"]
    assert (check.level, check.mend) == (WARN, "unset XDG_RUNTIME_DIR")
    assert "no such file" in check.text
    relative = doctor(place, "--runtime-dir", "r")["settings"]
    assert (relative.level, "another directory for each process" in relative.text) == (FAIL, True)
    linked = doctor(place, COMPANION_METRICS_PORT="tcp://10.0.0.1:9464")["settings"]
    assert (linked.level, linked.mend) == (FAIL, "unset COMPANION_METRICS_PORT")
    assert "enableServiceLinks: false" in linked.text


def test_limits_and_variables_and_a_port_that_is_taken(place: Place) -> None:
    device_paths("cpu", place.settings)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # A file size limit of 0 is as good as a full disk: nothing can be written.
        checks = doctor(place, "--metrics-port", port, shell="ulimit -f 0; ulimit -n 1000", COMPANION_LINGER="5")
    machine = ("lost companion", "torchvision", "vllm command")
    bad = {name: check for name, check in checks.items() if check.level != OK and name not in machine}
    assert {name: check.level for name, check in bad.items()} == {
        "runtime directory": FAIL,
        "trial": FAIL,
        "COMPANION_LINGER": WARN,
        "open files": WARN,
        "shared memory": FAIL,
        "metrics port": FAIL,
    }
    assert f"df -h {place.settings.runtime_dir}" in bad["runtime directory"].mend
    assert "did you mean COMPANION_LINGER_S?" in bad["COMPANION_LINGER"].text
    assert bad["COMPANION_LINGER"].mend == "unset COMPANION_LINGER"
    assert bad["shared memory"].mend == "ulimit -f unlimited"
    assert "COMPANION_METRICS_PORT" in bad["metrics port"].mend


def test_a_metrics_port_that_serves_metrics_is_well(place: Place) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        settings = resolve({"metrics_port": sock.getsockname()[1], "runtime_dir": place.settings.runtime_dir})
    (check,) = states.check_metrics(settings)
    assert (check.level, check.mend) == (OK, f"vllm-companion metrics --metrics-port {settings.metrics_port}")
    serving = serve(place, "--metrics-port", str(settings.metrics_port))
    (check,) = states.check_metrics(settings)
    assert (check.level, check.mend) == (OK, "")
    serving.terminate()
    assert serving.wait(30) == 0
    assert not alive(place.companion_pid())


def test_a_setting_that_cannot_be(place: Place) -> None:
    check = doctor(place, COMPANION_SHARE="perhaps")["settings"]
    assert (check.level, check.mend) == (FAIL, "unset COMPANION_SHARE")
    assert doctor(place, "--metrics-port", "99999")["settings"].mend == "correct the flag"
