"""Making command line options from the rows of the settings table."""

from __future__ import annotations

import argparse

from vllm_companion_plugin.settings import BY_NAME, EVERYWHERE, TABLE, Settings, resolve


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add options for these settings. `settings_of` checks their values, as it checks values of any origin."""
    group = parser.add_argument_group("settings")
    for name in names:
        setting = BY_NAME[name]
        assert setting.flag, name
        metavar = "{" + ",".join(setting.choices) + "}" if setting.choices else setting.name.upper()
        group.add_argument(setting.option, dest=name, metavar=metavar, help=setting.help)


def settings_of(parsed: argparse.Namespace) -> Settings:
    """Resolve the settings of this command line. Raises `SettingsError`."""
    given = {s.name: getattr(parsed, s.name) for s in TABLE if s.flag and hasattr(parsed, s.name)}
    return resolve(given, origin="command line", reads=EVERYWHERE | given.keys())
