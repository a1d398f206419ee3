"""`vllm-companion` parses the command line, and turns an error into one line and an exit status.

Exit status: 0 as asked, 1 an error (or a failed check of `doctor` or `verify`), 2 a wrong command line,
3 a model that is not shared (`verify`), 130 Ctrl-C. No command imports torch or vLLM; work that needs
them runs in another process.
"""

from __future__ import annotations

import argparse
import errno
import io
import sys
from collections.abc import Sequence

from vllm_companion_plugin._version import __version__
from vllm_companion_plugin.core.text import one_line
from vllm_companion_plugin.errors import CompanionError

_DEVICE_HELP = "GPU or MIG UUID, index of a visible GPU, cpu, or all (default)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    from vllm_companion_plugin.core import output

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a reader may not know every character
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except CompanionError as error:
        output.say(f"vllm-companion: error: {one_line(str(error))}", error=True)
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in output.LOST:
            raise
        if error.errno != errno.EPIPE:  # with `| head` no user wants to know
            output.say(f"vllm-companion: error: The output cannot be written: {error.strerror}.", error=True)
        return 1
    finally:
        output.settle()


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command == "doctor":  # other commands need packages whose absence doctor reports
        _refuse(parser, rest)
        from vllm_companion_plugin.cli.doctor import command as doctor

        return doctor.main(parsed)
    from vllm_companion_plugin.cli import look, metrics, serve, upgrade, verify

    if parsed.command == "serve":
        return serve.serve(parsed, rest)
    if parsed.command == "verify":
        return verify.main(parsed, rest)
    _refuse(parser, rest)
    commands = {"status": look.status, "watch": look.watch, "unload": look.unload, "stop": look.stop}
    commands |= {"upgrade": upgrade.upgrade, "metrics": metrics.main}
    return commands[parsed.command](parsed)


def _refuse(parser: argparse.ArgumentParser, rest: list[str]) -> None:
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")


def _parser() -> argparse.ArgumentParser:
    from vllm_companion_plugin.cli.settings_options import add_settings

    parser = argparse.ArgumentParser(prog="vllm-companion", description="Model weights, held once for all engines.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, *settings: str, usage: str | None = None) -> argparse.ArgumentParser:
        # Abbreviations are off, because --li could be a flag of vLLM that must be passed on.
        made = commands.add_parser(name, help=help, description=help, usage=usage, allow_abbrev=False)
        if name not in ("doctor", "metrics", "verify"):
            made.add_argument("--device", help=_DEVICE_HELP)
        if name != "verify":
            add_settings(made, "runtime_dir", *settings)
        return made

    command(
        "serve",
        "Run companions until stopped. With MODEL: also load that model, as an engine with these flags would. "
        "Takes over a running companion, and replaces one that dies without losing weights. Companions owned by "
        "another `serve` are only used.",
        *("linger_s", "log_level", "log_format", "metrics_port", "spawn_timeout_s", "wait_timeout_s"),
        usage="vllm-companion serve [MODEL] [--device DEVICE] [settings] [flags of vLLM]",
    )
    command("status", "Show which models companions hold, for which clients and how long.").add_argument(
        "--json", action="store_true"
    )
    command("watch", "Show the status at every change, until Ctrl-C.")
    unload = command("unload", "Drop a model; attached engines keep what they have mapped.")
    unload.add_argument("model", nargs="?", metavar="MODEL")
    unload.add_argument("--rank", help="only this rank, e.g. tp0/2")
    unload.add_argument("--key", help="only this load of the model: the first characters of its key in status --json")
    unload.add_argument("--force", action="store_true", help="also while engines are attached")
    unload.add_argument("--all", action="store_true", help="every model")
    command("stop", "End companions; attached engines keep serving.")
    command("upgrade", "Replace companions by ones of this installation, while engines serve.", "spawn_timeout_s")
    verify = command(
        "verify",
        "Prove that MODEL with these flags is the same with and without a companion: every tensor byte for byte, "
        "every Python value that the model leads to, and the answers to prompts. Prompts are short and long, with "
        "pictures and sound if the model takes them, one at a time and several at once. Starts three engines, one "
        "after the other, and its own companion. Exit status 0: equal, 1: different, 3: not shared, with the reason.",
        usage="vllm-companion verify MODEL [--json] [--adapter DIR] [--publisher FLAGS] [flags of vLLM]",
    )
    verify.add_argument("--json", action="store_true")
    verify.add_argument("--adapter", metavar="DIR", help="also ask with this LoRA adapter; needs --enable-lora")
    verify.add_argument(
        "--publisher",
        metavar="FLAGS",
        default="",
        help="give these flags of vLLM to the publishing engine only: does an engine without them attach and equal it?",
    )
    command("metrics", "Serve metrics of all companions to Prometheus, on loopback, until stopped.", "metrics_port")
    doctor = command("doctor", "Check this installation, and name the command that repairs each fault.", "metrics_port")
    doctor.add_argument("--json", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
