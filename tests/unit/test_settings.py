"""Where a setting's value comes from, and what is refused."""

from __future__ import annotations

from dataclasses import fields
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
        ({"linger_s": "soon"}, "expected float"),
        ({"linger_s": True}, "expected float"),
        ({"linger_s": float("nan")}, "expected float"),
        ({"share": "mine"}, "readonly | copy"),
        ({"fallback": "perhaps"}, "expected bool"),
        ({"runtime_dir": ""}, "expected str"),
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


def test_a_child_resolves_the_same_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = resolve({"linger_s": 12.5, "share": "copy", "fallback": False, "runtime_dir": "/tmp/somewhere"})
    for name, value in to_environment(ours).items():
        monkeypatch.setenv(name, value)
    assert resolve() == ours


def test_the_runtime_directory_is_private_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/5")
    assert resolve().runtime_dir == "/run/user/5/vllm-companion"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert resolve().runtime_dir.endswith(f"vllm-companion-{module.os.getuid()}")


def test_table_fields_and_documentation_agree() -> None:
    assert [f.name for f in fields(Settings)] == [s.name for s in TABLE]
    assert all(f"| `{setting.name}` |" in module.to_markdown() for setting in TABLE)
