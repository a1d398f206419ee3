"""The command line as a parser: commands, flags, their help, and what a user is told who mistypes one of them."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.cli.settings_options import add_settings
from vllm_companion_plugin.core.text import did_you_mean
from vllm_companion_plugin.errors import SettingsError

PROGRAM = "vllm-companion"
_DEVICE_HELP = "GPU or MIG UUID, index of a visible GPU (1 or cuda:1), cpu, or all (default)"
TAKES_FLAGS_OF_VLLM = ("serve", "verify")

EXAMPLES = {
    "": (
        ("vllm serve MODEL --load-format companion", "an engine that shares; the first one starts a companion"),
        ("vllm-companion status", "what is held, by whom it is used, until when it stays"),
        ("vllm-companion doctor", "what is wrong here, and what repairs it"),
    ),
    "serve": (
        ("vllm-companion serve", "a companion for each GPU, which engines fill"),
        ("vllm-companion serve Qwen/Qwen3-8B -tp 2 --dtype bfloat16", "load a model before any engine exists"),
        ("vllm-companion serve --device 0 --config serve.yaml", "with the config file of `vllm serve`"),
    ),
    "status": (
        ("vllm-companion status", "a table that fits the terminal"),
        ("vllm-companion status --wide", "all columns, full names"),
        ("vllm-companion status -q | xargs -n1 vllm-companion unload", "unload all that nobody uses"),
        ("vllm-companion status >/dev/null; echo $?", "0: companions answer, 4: none runs"),
    ),
    "watch": (("vllm-companion watch --device cpu", "follow one companion, over upgrades as well"),),
    "unload": (
        ("vllm-companion unload Qwen3-8B", "by the last parts of its name"),
        ("vllm-companion unload 3f2a91c0", "by its id, or the first characters of it"),
        ("vllm-companion unload --all --force", "everything, also while engines use it"),
    ),
    "generations": (
        ("vllm-companion generations", "of all models: numbers, versions, which one is current, who maps which"),
        ("vllm-companion generations Qwen3-8B --json", "for programs"),
    ),
    "rollback": (
        ("vllm-companion rollback Qwen3-8B", "to the one that was current before it was written"),
        ("vllm-companion rollback Qwen3-8B --to 4", "to that generation, older or newer"),
    ),
    "advance": (
        ("vllm-companion advance Qwen3-8B --engine http://a:8000 --engine http://b:8000", "to what is current"),
        ("vllm-companion advance Qwen3-8B --to 4 --engine http://a:8000", "to that generation, older or newer"),
    ),
    "stop": (("vllm-companion stop --device 0", "end the companion of the first GPU"),),
    "upgrade": (("pip install -U vllm-companion-plugin && vllm-companion upgrade", "engines serve all the while"),),
    "verify": (
        ("vllm-companion verify Qwen/Qwen3-8B --max-model-len 4096", "with the flags that the engines will have"),
    ),
    "metrics": (("vllm-companion metrics --metrics-port 9464", "then: curl http://127.0.0.1:9464/metrics"),),
    "doctor": (("vllm-companion doctor", "exit status 1 if a check failed"),),
    "completion": (
        ("source <(vllm-companion completion bash)", "in ~/.bashrc"),
        ("vllm-companion completion zsh > ~/.zfunc/_vllm-companion", "with `fpath+=~/.zfunc` before compinit"),
    ),
}


def model_and_flags(command: str, rest: Sequence[str], flags: Iterable[str]) -> tuple[str | None, list[str]]:
    """Return the model that a command is about, and the flags of vLLM; None if no words are left.

    The model comes first, or is named by `--model` or in the file of `--config`, as for `vllm serve`.

    Raises:
        SettingsError: no model is named, or that file cannot be read.
    """
    words = [part for word in rest for part in _split(word)]
    if not words or not words[0].startswith("-"):
        return (rest[0], [*rest[1:]]) if rest else (None, [])
    for number, word in enumerate(words[:-1]):
        if word == "--model":
            return words[number + 1], [*words[:number], *words[number + 2 :]]
    for word, path in itertools.pairwise(words):
        if word == "--config" and (model := _model_in(command, path)):
            return model, words
    raise _before_the_model(command, words[0], flags)


def _split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith(("--model=", "--config=")) else [word]


def _model_in(command: str, path: str) -> str | None:
    """Return the model that a config file of `vllm serve` names."""
    import yaml  # type: ignore[import-untyped]  # vLLM needs it

    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SettingsError(f"{command}: --config: {path} cannot be read: {error}") from error
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, str) else None


def _before_the_model(command: str, word: str, flags: Iterable[str]) -> SettingsError:
    """Return the error for a flag before a model that the command does not know."""
    name = word.split("=")[0]
    return SettingsError(
        f"{command}: {name} is not known here{did_you_mean(name, flags)}.",
        remedy=f"Flags of vLLM follow a model: {PROGRAM} {command} MODEL {name} ...",
    )


class _Help(argparse.HelpFormatter):
    """Wraps paragraphs, and leaves indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines = text.splitlines()
        return "\n".join(line if line.startswith(" ") else textwrap.fill(line, width) for line in lines)


class Parser(argparse.ArgumentParser):
    """Answers a wrong command line with the usage of the command that was meant, the error and the nearest right word.

    Attributes:
        commands: the parser of each command, by name.
    """

    commands: dict[str, Parser]

    def flags(self) -> list[str]:
        """Return all flags of this command."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """Say that this command does not know these words."""
        flags = [word.split("=")[0] for word in rest if word.startswith("-")]
        if flags:
            self.error(f"unknown flag {flags[0]}{did_you_mean(flags[0], self.flags())}")
        self.error(f"unexpected argument {rest[0]}")


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line; return what was parsed, and the words that are for vLLM.

    Ends the process with status 0 after printing help, and with status 2 if the command line is wrong.
    """
    parser = make_parser()
    if not arguments:
        parser.print_help()
        parser.exit()
    first = arguments[0]
    if first.startswith("-"):
        if first not in parser.flags() and any(word in parser.commands for word in arguments):
            parser.error(f"{first.split('=')[0]} is no flag of all commands; a command's flags follow it")
    elif first not in parser.commands:
        parser.error(f"unknown command {first}{did_you_mean(first, parser.commands)}")
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None:
        parser.refuse(rest)
    command = parser.commands[parsed.command]
    if rest and parsed.command not in TAKES_FLAGS_OF_VLLM:
        command.refuse(rest)
    parsed.flags = command.flags()
    return parsed, rest


def make_parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Model weights, held once for all engines.",
        epilog=f"{_examples('')}\n\n{PROGRAM} COMMAND --help says more. "
        "Exit status: 0 done, 1 failed, 2 wrong command line, 3 not shared (verify), 4 no companion runs.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    parser.commands = commands.choices

    def command(
        name: str, short: str, *settings: str, description: str = "", usage: str | None = None, device: bool = True
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=short,
            description=description or short,
            usage=usage,
            epilog=_examples(name),
            formatter_class=_Help,
            allow_abbrev=False,  # --li could be a flag of vLLM that must be passed on
        )
        if device:
            made.add_argument("--device", help=_DEVICE_HELP)
        if settings:
            add_settings(made, *settings)
        return made

    def selection(of: argparse.ArgumentParser, *, required: bool = False) -> None:
        """Let a command name entries."""
        name_help = "its name, the end of it, or an id of `status`"
        of.add_argument("model", nargs=None if required else "?", metavar="MODEL", help=name_help)
        of.add_argument("--rank", help="only this rank, e.g. tp0/2")
        of.add_argument("--key", metavar="ID", help="only this load of the model, as MODEL can be an id, too")

    command(
        "serve",
        "Run companions in the foreground, and load MODEL into them.",
        *("runtime_dir", "linger_s", "keep_previous", "log_level", "log_format", "metrics_port", "spawn_timeout_s"),
        "wait_timeout_s",
        description="Run companions until stopped. With MODEL: also load that model, as an engine with these flags "
        "would. Flags that only the server of `vllm serve` needs are ignored. Takes over a running companion, and "
        "replaces one that dies without losing weights. Companions owned by another `serve` are only used.",
        usage=f"{PROGRAM} serve [MODEL] [--device DEVICE] [settings] [vLLM flags]",
    )
    status = command("status", "Show which models companions hold, who uses them and until when.", "runtime_dir")
    shapes = status.add_mutually_exclusive_group()
    shapes.add_argument("--wide", action="store_true", help="all columns, and full names")
    shapes.add_argument("--json", action="store_true", help="for programs; docs/guide/cli.md has the schema")
    shapes.add_argument("-q", "--quiet", action="store_true", help="only ids, as `unload` takes them, one a line")
    command("watch", "Show the status at every change, until Ctrl-C.", "runtime_dir")
    unload = command("unload", "Drop a model; attached engines keep what they have mapped.", "runtime_dir")
    selection(unload)
    unload.add_argument("--force", action="store_true", help="also while engines are attached")
    unload.add_argument("--all", action="store_true", help="every model")
    generations = command(
        "generations",
        "Show the weights that trainers have written: which generation is current, who maps which.",
        "runtime_dir",
    )
    selection(generations)
    generations.add_argument("--json", action="store_true", help="for programs; docs/guide/cli.md has the schema")
    rollback = command(
        "rollback",
        "Make the generation before the current one current again.",
        "runtime_dir",
        description="Make the generation before the current one current again, or another one that is held. Clients "
        "that attach get it from then on; those that map another one go on with that until they are told to advance.",
    )
    selection(rollback, required=True)
    rollback.add_argument("--to", type=int, metavar="GEN", help="its number, as `generations` shows it")
    advance = command(
        "advance",
        "Have running engines take the current weights of MODEL, all of them or none.",
        description="Have running engines take the current generation of the weights of MODEL, or another one. All of "
        "them prepare while they serve; then they pause, switch and go on with their requests. If one cannot, all keep "
        "what they have. Engines need VLLM_SERVER_DEV_MODE=1. Prints what each engine has. Exit status 0: all have "
        "these weights.",
        device=False,
    )
    advance.add_argument("model", metavar="MODEL", help="its name, or the last parts of it")
    advance.add_argument(
        "--engine", metavar="URL", action="append", required=True, help="base URL of a `vllm serve`; may be repeated"
    )
    advance.add_argument("--to", type=int, metavar="GEN", default=0, help="its number, as `generations` shows it")
    advance.add_argument(
        "--keep-caches", action="store_true", help="let what older weights computed answer for the new ones"
    )
    command("stop", "End companions; attached engines keep serving.", "runtime_dir")
    command(
        "upgrade",
        "Replace companions by ones of this installation, while engines serve.",
        *("runtime_dir", "spawn_timeout_s"),
    )
    verify = command(
        "verify",
        "Prove that MODEL is the same with and without a companion.",
        description="Prove that MODEL with these flags is the same with and without a companion: every tensor byte for "
        "byte, every Python value that the model leads to, and the answers to prompts. Prompts are short and long, "
        "with pictures and sound if the model takes them, one at a time and several at once. Starts three engines, "
        "one after the other, and its own companion. Exit status 0: equal, 1: different, 3: not shared, with the "
        "reason.",
        usage=f"{PROGRAM} verify MODEL [--json] [--adapter DIR]\n{' ' * 29}[--publisher FLAGS] [vLLM flags]",
        device=False,
    )
    verify.add_argument("--json", action="store_true", help="for programs; docs/guide/cli.md has the schema")
    verify.add_argument("--adapter", metavar="DIR", help="also ask with this LoRA adapter; needs --enable-lora")
    verify.add_argument(
        "--publisher",
        metavar="FLAGS",
        default="",
        help="give these flags of vLLM to the publishing engine only: does an engine without them attach and equal it?",
    )
    command(
        "metrics",
        "Serve metrics of all companions to Prometheus, on loopback, until stopped.",
        *("runtime_dir", "metrics_port"),
        device=False,
    )
    doctor = command(
        "doctor",
        "Check this installation, and name the command that repairs each fault.",
        *("runtime_dir", "metrics_port"),
        device=False,
    )
    doctor.add_argument("--json", action="store_true", help="for programs; docs/guide/cli.md has the schema")
    completion = command("completion", "Print a script that completes commands and flags in a shell.", device=False)
    completion.add_argument("shell", choices=("bash", "zsh"))
    return parser


def _examples(command: str) -> str:
    lines = [f"  {line}\n      {meaning}" for line, meaning in EXAMPLES[command]]
    return "\n".join(["examples:", *lines])
