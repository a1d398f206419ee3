"""The command line against real companions: what it prints, its exit status, what it leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.place import KEY, Place, alive, arena_of, listens, until
from tests.support.sleeping import Sleeping, seeded
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.client.connection import CompanionConnection, Granted, Ready, connect
from vllm_companion_plugin.core.status import EntryState
from vllm_companion_plugin.errors import CompanionError
from vllm_companion_plugin.host.models import model_name
from vllm_companion_plugin.host.runtime_dir import device_paths
from vllm_companion_plugin.host.spawn import ensure_companion, is_listening

pytestmark = pytest.mark.usefixtures("serve_ends_its_companions")

CLI = ("-m", "vllm_companion_plugin.cli.main")
WITHIN_S = 100


def cli(place: Place, *arguments: str) -> tuple[int, str, str]:
    process = place.run(*CLI, *arguments)
    out, error = process.communicate(timeout=WITHIN_S)
    assert "Traceback" not in error, error
    return process.returncode, out, error


def serve(place: Place, *arguments: str) -> subprocess.Popen[str]:
    """`serve` that has said it is ready."""
    process = place.run(*CLI, "serve", "--device", "cpu", *arguments)
    read_until(process, "Ready")
    return process


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    """Output up to a line that contains `wanted`; fails if the process ends or takes too long first."""
    assert process.stdout is not None
    timer = threading.Timer(WITHIN_S, process.kill)
    timer.start()
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if wanted in line:
                return "".join(lines)
    finally:
        timer.cancel()
    raise AssertionError(f"no {wanted!r} in {lines}")


def publish(connection: CompanionConnection) -> None:
    """An entry whose lease lives as long as `connection`."""
    outcome = connection.attach(KEY, may_load=True, client_name="loader").wait(30)
    assert isinstance(outcome, Granted)
    arena, fds = arena_of(b"weights")
    outcome.publication.publish(arena, fds, b"manifest", 3)
    fds.close()


def published(place: Place) -> None:
    """An entry that nobody is attached to any more."""
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
    until(lambda: '"leases": []' in cli(place, "status", "--json")[1], WITHIN_S, "the lease has ended")


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_serve_ends_within_two_seconds_of_a_signal_and_leaves_nothing(place: Place, number: int) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    try:
        process = serve(place)
    finally:
        signal.signal(number, before)
    pid = place.companion_pid()
    assert alive(pid)
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(30) == 0
    assert time.monotonic() - began < 2
    assert not alive(pid)
    assert not os.path.exists(place.paths.grpc_socket)


def test_what_serve_starts_stays_until_it_is_stopped(place: Place) -> None:
    serve(place)
    [companion] = json.loads(cli(place, "status", "--json")[1])
    assert companion["linger_s"] is None
    assert companion["pid"] == place.companion_pid()
    assert "until stopped" in cli(place, "status")[1]


def test_a_companion_whose_serve_was_killed_stays_only_for_its_linger_time(place: Place) -> None:
    place.environment["COMPANION_LINGER_S"] = "4"
    process, pid = serve(place), place.companion_pid()
    time.sleep(4.2)  # which does not count
    killed_at_s = time.time()
    process.kill()
    process.wait(30)
    with connect("cpu", place.settings, spawn=False) as connection:
        for status in connection.watch(5):
            if status.exits_at_unix_s:
                break
        assert (status.linger_s, status.owner_pid) == (4, 0)
        assert status.exits_at_unix_s > killed_at_s + 3.9
    until(lambda: not alive(pid), 5, "it has ended")


def test_a_model_loaded_twice_is_unloaded_by_the_first_characters_of_its_key(place: Place) -> None:
    serve(place)
    published(place)
    code, _, error = cli(place, "unload", "--key", "ffff", KEY.model)
    assert code == 1
    assert KEY.id[:12] in error
    assert cli(place, "unload", "--key", KEY.id[:12], KEY.model)[0] == 0
    published(place)
    assert cli(place, "unload", KEY.id[:8])[0] == 0
    published(place)
    assert cli(place, "unload", "model")[0] == 0


def test_a_second_serve_is_refused_and_the_first_one_stays(place: Place) -> None:
    first = serve(place)
    code, _, error = cli(place, "serve", "--device", "cpu")
    assert code == 1
    assert re.fullmatch(
        rf"vllm-companion: error: A companion of cpu runs already \(pid {place.companion_pid()}\).*\n", error
    )
    assert first.poll() is None


def test_serve_ends_when_its_companion_is_stopped(place: Place) -> None:
    process = serve(place)
    assert cli(place, "stop")[0] == 0
    assert process.wait(30) == 0


def memory_of(process: subprocess.Popen[str]) -> list[str]:
    """Arenas of which a process has descriptors."""
    directory = f"/proc/{process.pid}/fd"
    found = []
    for name in os.listdir(directory):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"{directory}/{name}"))
    return [link for link in found if link.startswith("/memfd:arena")]


def followed(place: Place, owner: subprocess.Popen[str], pid: int) -> int:
    """Another companion than `pid`, of the same owner, has the entry that nobody uses."""

    def holds_it() -> bool:
        with contextlib.suppress(CompanionError), connect("cpu", place.settings, spawn=False) as connection:
            status = connection.status()
            ready = [(e.state, e.generation, e.leases) for e in status.entries] == [(EntryState.READY, 1, ())]
            return ready and status.pid != pid and status.owner_pid == owner.pid and status.linger_s < 0
        return False

    until(holds_it, WITHIN_S, "the next companion has it all")
    return place.companion_pid()


def test_what_nobody_maps_survives_every_companion_of_a_serve(place: Place) -> None:
    process = serve(place)
    published(place)
    until(lambda: memory_of(process), 5, "serve holds it, too")
    first = place.companion_pid()
    os.kill(first, signal.SIGKILL)
    second = followed(place, process, first)
    code, out, error = cli(place, "upgrade")
    assert (code, f"was pid {second}" in out) == (0, True), error
    third = followed(place, process, second)
    with connect("cpu", place.settings, spawn=False) as connection:
        ready = connection.attach(KEY, may_load=False, client_name="reader").wait(30)
        assert isinstance(ready, Ready)
        fds = ready.redeem()
        assert (os.pread(fds[0], 9, 0), ready.manifest) == (b"weights", b"manifest")
        fds.close()
    assert cli(place, "unload", "--all")[0] == 0
    until(lambda: not memory_of(process), 5, "its memory is free")
    began = time.monotonic()
    process.terminate()
    assert process.wait(30) == 0
    assert time.monotonic() - began < 15
    assert not alive(third)  # whoever started it


class TestOwner:
    """A `serve` that holds the last copy of something keeps it until it is told to end."""

    @pytest.mark.parametrize("how", ["readers leave", "no space"])
    def test_survives_its_output(self, place: Place, how: str) -> None:
        """`| tee` that was killed, or a full disk, takes no weights along, and is no error in the end."""
        process = serve(place)
        if how == "no space":
            process.terminate()
            process.wait(30)
            with open("/dev/full", "w") as full:
                process = subprocess.Popen(
                    [sys.executable, *CLI, "serve", "--device", "cpu"],
                    **{"stdin": subprocess.PIPE, "stdout": full, "stderr": full, "text": True},
                    env=place.environment,
                )
            place.processes.append(process)
            until(lambda: is_owned_by(place, process.pid), WITHIN_S, "it is ready")
        else:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()
            process.stdout = process.stderr = None
        published(place)
        until(lambda: memory_of(process), 5, "serve holds it, too")
        first = place.companion_pid()
        os.kill(first, signal.SIGKILL)
        followed(place, process, first)
        process.terminate()
        assert process.wait(30) == 0

    def test_waits_for_a_companion_that_cannot_be_started(self, place: Place) -> None:
        """It tries again, says so once, and loses nothing."""
        process = serve(place)
        published(place)
        until(lambda: memory_of(process), 5, "serve holds it, too")
        first = place.companion_pid()
        os.chmod(place.settings.runtime_dir, 0o755)  # refused, until somebody mends it
        os.kill(first, signal.SIGKILL)
        assert process.stderr is not None
        error = process.stderr.readline()
        while "error" not in error:
            error = process.stderr.readline()
        assert re.search(r"has mode 0755.* trying again until .* told to end", error)
        time.sleep(2.5)  # several attempts
        assert process.poll() is None
        assert memory_of(process)
        os.chmod(place.settings.runtime_dir, 0o700)
        followed(place, process, first)
        process.terminate()
        assert process.wait(30) == 0
        rest = process.stderr.read()
        assert ("it is now pid" in rest, "trying again" in rest) == (True, False)

    def test_ends_while_it_waits_for_a_companion_when_it_is_told_to(self, place: Place) -> None:
        """Trying for ever is no reason to ignore a signal."""
        process = serve(place)
        os.chmod(place.settings.runtime_dir, 0o755)
        os.kill(place.companion_pid(), signal.SIGKILL)
        assert process.stderr is not None
        while "trying again" not in process.stderr.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 0


def is_owned_by(place: Place, pid: int) -> bool:
    with contextlib.suppress(CompanionError), connect("cpu", place.settings, spawn=False) as connection:
        return connection.status().owner_pid == pid
    return False


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_what_cannot_be_written_is_one_line_and_no_traceback(place: Place, stream: str) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, *CLI, *(["status"] if stream == "stdout" else ["unload"])]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: full}
        done = subprocess.run(command, **streams, text=True, env=place.environment, timeout=WITHIN_S)
    assert done.returncode == (Exit.FAILED if stream == "stdout" else Exit.USAGE)
    said = done.stderr if stream == "stdout" else done.stdout
    assert re.fullmatch(r"vllm-companion: error: .*No space left on device.\n" if stream == "stdout" else "", said)


def test_a_serve_that_was_killed_is_followed_by_the_next_which_finds_all(place: Place) -> None:
    first = serve(place)
    published(place)
    companion = place.companion_pid()
    first.kill()
    first.wait(30)
    until(lambda: '"owner_pid": null' in cli(place, "status", "--json")[1], WITHIN_S, "it has noticed")
    second = serve(place)
    assert followed(place, second, 0) == companion
    second.terminate()
    assert second.wait(30) == 0
    assert not alive(companion)


@pytest.mark.parametrize("running", [pytest.param(True, marks=pytest.mark.slow), False], ids=["joined", "started"])
def test_when_loading_fails_serve_stops_only_what_it_started(place: Place, running: bool) -> None:
    if running:
        ensure_companion("cpu", place.settings)
    # No engine flag of that name: vLLM's parser refuses before it loads anything.
    process = place.run(*CLI, "serve", "/nonexistent/model", "--device", "cpu", "--no-such-flag-of-vllm")
    out, error = process.communicate(timeout=100)
    assert process.returncode == Exit.USAGE
    assert "/nonexistent/model was not loaded: vLLM refuses these flags" in error.splitlines()[-1]
    assert ("Using the companion of cpu" in out) is running
    assert is_listening(place.paths) is running


@pytest.mark.alone
def test_serve_stopped_while_loading_leaves_no_process(place: Place) -> None:
    process = place.run(*CLI, "serve", "/nonexistent/model", "--device", "cpu")
    read_until(process, "Loading")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: len(children.read_text().split()) == 2, WITHIN_S, "companion and loader run")
    pids = [int(pid) for pid in children.read_text().split()]
    process.terminate()
    began = time.monotonic()
    assert process.wait(30) == 0
    assert time.monotonic() - began < 2
    assert not any(map(alive, pids))


def sockets(pid: int) -> int:
    count = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


def test_serve_stopped_while_another_process_starts_the_companion_is_gone(place: Place) -> None:
    with open(place.paths.spawn_lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = place.run(*CLI, "serve", "--device", "cpu")
        until(lambda: sockets(process.pid) >= 2, 20, "it listens for signals")
        time.sleep(0.5)  # to where it waits for us
        assert process.poll() is None
        process.terminate()
        began = time.monotonic()
        assert process.wait(30) == 0
        assert time.monotonic() - began < 10  # it would have waited for 20 s


def test_without_a_companion_status_and_stop_say_so(place: Place) -> None:
    assert cli(place, "status") == (Exit.NOTHING_RUNS, "No companion is running.\n", "")
    assert cli(place, "status", "--json") == (Exit.NOTHING_RUNS, "[]\n", "")
    assert cli(place, "status", "-q") == (Exit.NOTHING_RUNS, "", "")
    assert cli(place, "stop") == (Exit.DONE, "No companion is running.\n", "")
    for command in (["unload", "--all"], ["watch"], ["upgrade"]):
        code, out, error = cli(place, *command)
        assert (code, out) == (Exit.NOTHING_RUNS, "")
        assert error.startswith("vllm-companion: error: No companion is running.")


def test_a_killed_companion_is_not_shown(place: Place) -> None:
    companion = place.companion()
    companion.kill()
    companion.wait(30)
    assert os.path.exists(place.paths.grpc_socket)
    assert cli(place, "status")[1] == "No companion is running.\n"


def test_a_serve_under_nohup_outlives_its_terminal(place: Place) -> None:
    """It may hold the only copy of its weights."""
    line = [sys.executable, *CLI, "serve", "--device", "cpu"]
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$0" "$@"', *line], env=place.environment, stdout=subprocess.PIPE, text=True
    )
    place.processes.append(process)
    read_until(process, "Ready")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.terminate()
    assert process.wait(30) == 0


@pytest.mark.parametrize("command", ["status", "status --wide", "status --json", "status -q", "generations"])
def test_a_command_whose_output_is_closed_says_how_it_went(place: Place, command: str) -> None:
    """`>&-` instead of `>/dev/null`: a probe wants the exit status alone."""
    serve(place)
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        python = ("sh", "-c", 'exec "$0" "$@" >&-', sys.executable)
        line = [*python, *CLI, *command.split()]
        process = subprocess.run(line, env=place.environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_processes_that_a_command_starts_have_all_streams(tmp_path: Path, closed: str) -> None:
    """vLLM asks for the descriptor of its standard output, and ends if it has none."""
    says = f"import sys; open({str(tmp_path / 'said')!r}, 'w').write(str([sys.stdin, sys.stdout, sys.stderr]))"
    command = f"[sys.executable, '-c', {says!r}]"
    code = f"""
import os, sys
from unittest import mock
from vllm_companion_plugin.cli import main
from vllm_companion_plugin.core.output import relayed
from vllm_companion_plugin.supervise.children import Signals, run_to_end

def started(arguments):
    with Signals() as signals, relayed() as streams:
        return run_to_end({command}, dict(os.environ), signals, *streams)

with mock.patch.object(main, "_run", started):
    sys.exit(main.main([]))
"""
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], timeout=60)
    assert done.returncode == 0
    said = (tmp_path / "said").read_text()
    assert "None" not in said, said


def test_status_shows_entries_and_who_holds_them(place: Place) -> None:
    serve(place)
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        [companion] = json.loads(cli(place, "status", "--json", "--device", "cpu")[1])
        [entry] = companion["entries"]
        assert (entry["model"], entry["state"], entry["generation"], entry["tensor_count"]) == (
            KEY.model,
            "ready",
            1,
            3,
        )
        assert [lease["pid"] for lease in entry["leases"]] == [os.getpid()]
        assert re.search(rf"{KEY.model} .* ready .* {os.getpid()} \(\d+s\)", cli(place, "status", "--wide")[1])
        short = cli(place, "status")[1]
        assert re.search(rf"^{KEY.id[:8]}  model  1 KiB  {os.getpid()} +ready  stopped$", short, re.MULTILINE)
        assert cli(place, "status", "-q")[1] == f"{KEY.id[:8]}\n"


def test_unload_refuses_what_is_in_use_unless_forced(place: Place) -> None:
    serve(place)
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        code, _, error = cli(place, "unload", KEY.model)
        assert (code, f"pid {os.getpid()}" in error) == (1, True)
        code, out, _ = cli(place, "unload", KEY.model, "--force")
        assert (code, "keeps its mapping" in out) == (0, True)


@pytest.mark.parametrize("command", [("stop",), ("unload", KEY.model, "--force")], ids=" ".join)
def test_who_sleeps_is_not_said_to_map_anything(place: Place, command: tuple[str, ...]) -> None:
    """What it would wake with is gone."""
    place.companion()
    sleeping = Sleeping.of(place, KEY, seeded())
    awake, sleeper = sleeping.attach(), sleeping.attach()
    sleeping.sleep(sleeper, 1)
    code, out, _ = cli(place, *command)
    assert (code, out.count(" keeps "), out.count("sleeps, and has to find or load")) == (0, 1, 1)
    assert awake.in_use
    sleeping.close()


UNNAMED = "vllm-companion: error: {}: MODEL is empty. Name one as `vllm-companion status` shows it.\n"


def test_unload_by_model_rank_and_all(place: Place) -> None:
    serve(place)
    published(place)
    assert cli(place, "unload", "other/model")[0] == 1
    for command in ("unload", "rollback", "generations"):  # as "$MODEL" is, if nobody has set it
        assert cli(place, command, "")[::2] == (2, UNNAMED.format(command))
    assert cli(place, "unload", KEY.model, "--rank", "tp1/2")[0] == 1
    assert cli(place, "unload", KEY.model, "--rank", "single")[:2] == (0, "Unloaded test/model (single) from cpu.\n")
    assert cli(place, "unload", "--all")[:2] == (0, "Nothing was loaded.\n")
    published(place)
    assert cli(place, "unload", "--all")[:2] == (0, "Unloaded test/model (single) from cpu.\n")


ODD_NAMES = ["org/模型", "/models/a\N{NO-BREAK SPACE}b\N{IDEOGRAPHIC SPACE}c", "/models/\udcff"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("name", ODD_NAMES, ids=["not ASCII", "spaces", "not UTF-8"])
@pytest.mark.parametrize("terminal", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_a_terminal_that_cannot_show_a_name(place: Place, name: str, terminal: dict[str, str]) -> None:
    """It is shown escaped, and can be asked for as it is and as it is shown."""
    serve(place)
    place.environment |= terminal
    with connect("cpu", place.settings, spawn=False) as connection:
        for number, asked in enumerate((name, model_name(name))):
            named = replace(KEY, id=f"{number:02x}" * 32, model=model_name(name))
            outcome = connection.attach(named, may_load=True, client_name="test").wait(30)
            assert isinstance(outcome, Granted)
            arena, fds = arena_of(b"weights")
            outcome.publication.publish(arena, fds, b"manifest", 1)
            fds.close()
            code, shown, _ = cli(place, "status", "--wide")
            assert code == 0
            assert model_name(name).encode("ascii" if terminal else "utf-8", "backslashreplace").decode() in shown
            assert all(map(str.isprintable, shown.splitlines()))
            code, said, error = cli(place, "unload", asked, "--force")
            assert (code, said.partition(" ")[0]) == (0, "Unloaded"), error
            code, _, error = cli(place, "unload", asked)
            assert code == 1
            assert error.startswith("vllm-companion: error: ")


def test_stop_names_who_keeps_serving_and_waits_for_the_end(place: Place) -> None:
    ensure_companion("cpu", place.settings)
    pid = place.companion_pid()
    with connect("cpu", place.settings, spawn=False) as connection:
        publish(connection)
        code, out, _ = cli(place, "stop")
    assert not alive(pid)
    assert (code, f"pid {pid}" in out) == (0, True)
    assert f"loader (pid {os.getpid()}) keeps serving {KEY.model}" in out


def test_serve_that_cannot_hold_says_so_and_does_not_ask_again_and_again(place: Place) -> None:
    serving = serve(place)
    os.makedirs(place.paths.holders, exist_ok=True)
    os.chmod(place.paths.holders, 0o755)
    published(place)
    assert serving.stderr is not None
    said = serving.stderr.readline()
    while "would be lost" not in said:
        said += serving.stderr.readline()
    time.sleep(2)
    serving.terminate()
    said += serving.communicate(timeout=100)[1]
    assert said.count("would be lost with its companion") == 1
    assert said.count("asks for") < 10


def test_watch_prints_every_change_and_ctrl_c_ends_it(place: Place) -> None:
    serve(place)
    watching = place.run("-u", *CLI, "watch")
    read_until(watching, "holds nothing")
    published(place)
    read_until(watching, "ready")
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 130
    watching = place.run("-u", *CLI, "watch")
    read_until(watching, "ready")
    assert cli(place, "stop")[0] == 0
    assert place.ended(watching, 60) == 0


@pytest.mark.parametrize("fault", ["hangs", "damaged"])
def test_watch_waits_for_no_successor_for_ever(place: Place, fault: str) -> None:
    """Somebody who is starting one may hang, and it may not be possible to see whether anybody is."""
    companion = place.companion()
    place.environment["COMPANION_SPAWN_TIMEOUT_S"] = "1"
    watching = place.run("-u", *CLI, "watch")
    read_until(watching, "holds nothing")
    with contextlib.ExitStack() as undo:
        if fault == "hangs":
            file = undo.enter_context(open(place.paths.spawn_lock, "w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        else:
            os.symlink("nowhere", place.paths.spawn_lock)
        companion.kill()
        assert place.ended(watching, 60) == (0 if fault == "hangs" else 1)
    said, error = watching.communicate()
    assert "The companion of cpu has ended." in said
    assert ("cannot be followed: OSError" in error) is (fault == "damaged")


SPEECHLESS = """
import os, runpy, sys
from vllm_companion_plugin.holder.service.service import CompanionService
inner = CompanionService.close
def close(self):
    inner(self)
    os._exit(0)
CompanionService.close = close
sys.argv = ["holder", "--device", "cpu"]
runpy.run_module("vllm_companion_plugin.holder", run_name="__main__")
"""


@pytest.mark.parametrize("how", ["stop", "signal"])
def test_who_does_not_hear_that_a_companion_was_stopped_starts_no_other(place: Place, how: str) -> None:
    """It ends before its last words are on their way, as on a host that is very busy."""
    companion = place.run("-c", SPEECHLESS)
    until(lambda: listens(place.paths.fd_socket), WITHIN_S, "the companion listens")
    serving = serve(place)
    published(place)
    watching = place.run("-u", *CLI, "watch")
    read_until(watching, "ready")
    if how == "stop":
        assert cli(place, "stop")[0] == 0
    else:
        companion.terminate()
    assert place.ended(watching, 60) == 0
    assert place.ended(serving, 60) == 0
    assert "The companion of cpu was stopped." in serving.communicate()[1]
    assert not is_listening(place.paths)


@pytest.mark.parametrize("how", ["upgrade", "kill"])
def test_watch_goes_on_with_the_next_companion(place: Place, how: str) -> None:
    """An upgrade and a crash are changes like others."""
    serve(place)
    published(place)
    watching = place.run("-u", *CLI, "watch")
    read_until(watching, "ready")
    before = place.companion_pid()
    if how == "upgrade":
        assert cli(place, "upgrade")[0] == 0
    else:
        os.kill(before, signal.SIGKILL)
    read_until(watching, "is now pid")
    after = place.companion_pid()
    assert f"pid {after}" in read_until(watching, "cpu: pid")
    read_until(watching, "ready")
    assert (watching.poll(), after != before) == (None, True)


# ---- doctor


def findings(place: Place, **environment: str) -> tuple[int, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, *CLI, "doctor", "--json", "--runtime-dir", place.settings.runtime_dir],
        **{"capture_output": True, "text": True, "timeout": WITHIN_S, "check": False},
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", **environment},
    )
    assert not done.stderr
    return done.returncode, {check["name"]: check["level"] for check in json.loads(done.stdout)}


@pytest.mark.core
def test_doctor_finds_nothing_wrong_here(place: Place) -> None:
    serve(place)
    code, found = findings(place)
    found.pop("lost companion", None)  # of another test
    assert (code, {name for name, level in found.items() if level != "ok"}) == (0, set())
    assert {"companion of cpu", "trial", "PyTorch", "vllm command"} <= found.keys()


def test_doctor_prints_the_command_that_mends(place: Place) -> None:
    os.mkdir(place.settings.runtime_dir)
    os.chmod(place.settings.runtime_dir, 0o755)
    code, out, _ = cli(place, "doctor")
    assert code == 1
    assert "FAIL  runtime directory: " in out
    assert re.fullmatch(r"1 of \d+ checks failed \(runtime directory\).*", out.splitlines()[-1])
    assert f"chmod 0700 {place.settings.runtime_dir}" in out
    os.chmod(place.settings.runtime_dir, 0o700)
    assert cli(place, "doctor")[0] == 0


def test_doctor_sees_that_vllm_leaves_the_plugin_out(place: Place) -> None:
    code, found = findings(place, VLLM_PLUGINS="lora")
    assert (code, found["VLLM_PLUGINS"]) == (1, "FAIL")


def test_doctor_works_without_grpc(place: Place, tmp_path: Path) -> None:
    (tmp_path / "grpc.py").write_text("raise ImportError('broken on purpose')")
    code, found = findings(place, PYTHONPATH=str(tmp_path))
    assert (code, found["grpcio"]) == (1, "FAIL")


def test_doctor_sees_something_that_is_no_companion_of_ours(place: Place) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(place.paths.grpc_socket)
        sock.listen()
        sock.settimeout(WITHIN_S)
        accepting = threading.Thread(target=lambda: sock.accept()[0].close(), daemon=True)
        accepting.start()
        code, found = findings(place)
    assert (code, found["companion of cpu"]) == (1, "FAIL")


# ---- a companion that hangs


@pytest.fixture
def frozen(place: Place) -> Iterator[int]:
    """Pid of a stopped companion of a GPU that is not here; another one, of cpu, is well."""
    gpu = "GPU-00000000-0000-0000-0000-000000000000"
    place.companion()
    process = place.run("-m", "vllm_companion_plugin.holder", "--device", gpu)
    paths = device_paths(gpu, place.settings)
    until(lambda: is_listening(paths), WITHIN_S, "it listens")
    process.send_signal(signal.SIGSTOP)
    yield process.pid
    process.kill()


def test_one_companion_that_hangs_hides_no_other_and_is_named_with_its_remedy(place: Place, frozen: int) -> None:
    code, out, error = cli(place, "status", "--json")
    assert code == 1
    assert [status["device"] for status in json.loads(out)] == ["cpu"]
    assert f"kill -9 {frozen}" in error


@pytest.mark.slow
def test_one_companion_that_hangs_keeps_no_other_from_being_stopped(place: Place, frozen: int) -> None:
    well = place.companion_pid()
    code, out, error = cli(place, "stop")
    assert code == 1
    assert "Stopped the companion of cpu" in out
    assert f"kill -9 {frozen}" in error
    assert not alive(well)
    assert f"kill -CONT {frozen}" in cli(place, "doctor")[1]
