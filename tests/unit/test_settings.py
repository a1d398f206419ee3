"""Where a setting's value comes from, and what is refused."""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from vllm_companion_plugin import settings as module
from vllm_companion_plugin.errors import SettingsError
from vllm_companion_plugin.settings import TABLE, Settings, resolve, resolve_extra_config, to_environment


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in TABLE:
        monkeypatch.delenv(setting.env, raising=False)


def test_given_values_win_over_the_environment_and_that_over_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve().linger_s == 600
    monkeypatch.setenv("COMPANION_LINGER_S", "5")
    assert resolve().linger_s == 5
    assert resolve({"linger_s": 7, "share": None}).linger_s == 7


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"linger": 1}, "unknown key"),
        ({"linger_s": -1}, "least allowed value is 0"),
        ({"linger_s": "soon"}, "expected a number"),
        ({"linger_s": True}, "expected a number"),
        ({"linger_s": float("nan")}, "expected a number"),
        ({"share": "mine"}, "readonly | copy"),
        ({"fallback": "perhaps"}, "expected true or false"),
        ({"runtime_dir": ""}, "expected a text"),
        ({"runtime_dir": "r"}, "another directory for each process. Give a path from the root, e.g. /"),
        ({"runtime_dir": "~/r"}, "another directory for each process"),
        ({"source_extra_config": "[1]"}, "expected a JSON object"),
        ({"source_extra_config": {"pattern": {1, 2}}}, "expected a JSON object"),
        ({"source_extra_config": '{"concurrency": NaN'}, "expected a JSON object"),
        ({"wait_timeout_s": 0}, "least allowed value is 0.1"),
        ({"wait_timeout_s": float("inf")}, "greatest allowed value is 2.592e+06"),
        ({"spawn_timeout_s": 1e12}, "greatest allowed value is 2.592e+06"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_origin(given: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=r"flag: .*") as caught:
        resolve(given)
    assert text in str(caught.value)


def test_a_bad_environment_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPANION_SHARE", "maybe")
    with pytest.raises(SettingsError, match="environment variable COMPANION_SHARE"):
        resolve()


@pytest.mark.parametrize("extra", [["a"], "x", {"log_level": "INFO"}, {"nonsense": 1}])
def test_extra_config_takes_only_a_mapping_of_engine_settings(extra: Any) -> None:
    with pytest.raises(SettingsError, match="--model-loader-extra-config"):
        resolve_extra_config(extra)


@pytest.mark.parametrize("extra", [None, {}, {"share": "copy", "fallback": False}])
def test_extra_config_may_be_absent(extra: Any) -> None:
    assert resolve_extra_config(extra).share == (extra or {}).get("share", "readonly")


class TestVariables:
    """Only those that the caller uses are read."""

    LINK = "tcp://10.0.0.1:9464"

    def test_empty_is_absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A manifest often has them empty."""
        for setting in TABLE:
            monkeypatch.setenv(setting.env, "")
        empty = resolve(reads=module.BY_NAME)
        for setting in TABLE:
            monkeypatch.delenv(setting.env)
        assert empty == resolve(reads=module.BY_NAME)

    def test_service_link(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A link to a service named companion-metrics ends no engine, and is explained where it matters."""
        monkeypatch.setenv("COMPANION_METRICS_PORT", self.LINK)
        assert resolve_extra_config({}).metrics_port == 0
        with pytest.raises(SettingsError, match=r"COMPANION_METRICS_PORT.*Kubernetes.*enableServiceLinks: false"):
            resolve(reads=module.BY_NAME)

    def test_service_links_are_no_typing_errors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {
            "COMPANION_SERVICE_HOST": "10.0.0.1",
            "COMPANION_SERVICE_PORT": "80",
            "COMPANION_SERVICE_PORT_HTTP": "80",
            "COMPANION_PORT": self.LINK,
            "COMPANION_PORT_80_TCP": self.LINK,
            "COMPANION_METRICS_PORT_80_TCP_ADDR": "10.0.0.1",
            "COMPANION_METRIC_PORT": "9464",
        }
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        assert module.unknown_variables() == ["COMPANION_METRIC_PORT"]


def test_a_child_resolves_the_same_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"enable_multithread_load": True, "num_threads": 4}
    ours = resolve(
        {
            **{"linger_s": 12.5, "share": "copy", "fallback": False, "runtime_dir": "/tmp/somewhere"},
            "source_extra_config": extra,
        }
    )
    assert ours.source_extra_config == extra
    for name, value in to_environment(ours).items():
        monkeypatch.setenv(name, value)
    assert resolve() == ours


class TestDefaultRuntimeDirectory:
    """It is the user's own, and one that is there."""

    def test_of_the_session(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert resolve().runtime_dir == f"{tmp_path}/vllm-companion"
        assert module.xdg_problem() is None

    @pytest.mark.parametrize(
        ("directory", "problem"),
        [("{}/none", "no such file"), ("{}/file", "no directory"), ("relative", "from the root"), ("/proc/1", None)],
        ids=["gone", "file", "relative", "of another user"],
    )
    def test_falls_back(
        self, directory: str, problem: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory.format(tmp_path))
        if problem is None:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
            problem = "belongs to uid 0"
        assert problem in str(module.xdg_problem())
        assert resolve().runtime_dir == os.path.join(tempfile.gettempdir(), f"vllm-companion-{os.getuid()}")

    def test_nowhere(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A read-only container without a temp directory is told what to set."""
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/self"])
        with pytest.raises(SettingsError, match="Set COMPANION_RUNTIME_DIR"):
            resolve()


def test_table_fields_and_documentation_agree() -> None:
    assert [f.name for f in fields(Settings)] == [s.name for s in TABLE]
    assert all(f"| `{setting.name}` |" in module.to_markdown() for setting in TABLE)
