"""`vllm-companion` runs a command, and turns an error into one line and an exit status (`exits.py`).

No command imports torch or vLLM; work that needs them runs in another process.
"""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Sequence

from vllm_companion_plugin.cli import parser
from vllm_companion_plugin.cli.exits import Exit, NothingRunsError
from vllm_companion_plugin.core.text import one_line
from vllm_companion_plugin.errors import CompanionError, SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    from vllm_companion_plugin.core import output, process

    process.open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a reader may not know every character
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except CompanionError as error:
        output.say(f"vllm-companion: error: {one_line(str(error))}", error=True)
        if isinstance(error, SettingsError):
            return Exit.USAGE
        return Exit.NOTHING_RUNS if isinstance(error, NothingRunsError) else Exit.FAILED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except OSError as error:
        if error.errno not in output.LOST:
            raise
        if error.errno != errno.EPIPE:  # with `| head` no user wants to know
            output.say(f"vllm-companion: error: The output cannot be written: {error.strerror}.", error=True)
        return Exit.FAILED
    finally:
        output.settle()


def _run(arguments: Sequence[str]) -> int:
    parsed, rest = parser.parse(arguments)
    if parsed.command == "doctor":  # other commands need packages whose absence doctor reports
        from vllm_companion_plugin.cli.doctor import command as doctor

        return doctor.main(parsed)
    if parsed.command == "completion":
        from vllm_companion_plugin.cli import completion

        return completion.main(parsed)
    try:
        from vllm_companion_plugin.cli import advance, generations, look, metrics, serve, upgrade, verify
    except Exception as error:  # protobuf and gRPC report mismatches with several types
        raise CompanionError(
            f"A package that this command needs cannot be imported: {type(error).__name__}: {error}",
            remedy="Run: vllm-companion doctor",
        ) from error

    if parsed.command == "serve":
        return serve.serve(parsed, rest)
    if parsed.command == "verify":
        return verify.main(parsed, rest)
    commands = {"status": look.status, "watch": look.watch, "unload": look.unload, "stop": look.stop}
    commands |= {"generations": generations.generations, "rollback": generations.rollback, "advance": advance.advance}
    commands |= {"upgrade": upgrade.upgrade, "metrics": metrics.main}
    return commands[parsed.command](parsed)


if __name__ == "__main__":
    sys.exit(main())
