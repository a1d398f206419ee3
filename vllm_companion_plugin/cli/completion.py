"""Scripts that complete commands, flags and their values in bash and zsh, made of the parser that reads them.

vLLM depends on no package for this, and neither do we; a script needs no Python until it completes an id.
"""

from __future__ import annotations

import argparse

from vllm_companion_plugin.cli.exits import Exit
from vllm_companion_plugin.cli.parser import PROGRAM, Parser, make_parser
from vllm_companion_plugin.settings import BY_NAME

IDS = f"{PROGRAM} status -q 2>/dev/null"
TAKE_IDS = ("unload", "generations", "rollback")
_DIRECTORIES = ("--runtime-dir", "--adapter")


def main(parsed: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print(bash() if parsed.shell == "bash" else zsh())
    return Exit.DONE


def _values(action: argparse.Action) -> tuple[str, ...]:
    """Return the words that may follow a flag; empty if there are too many to list."""
    if action.dest == "device":
        return ("cpu", "all")
    setting = BY_NAME.get(action.dest)
    return setting.choices if setting else tuple(action.choices or ())


def bash() -> str:
    parser = make_parser()
    flags = "\n".join(f'    {name}) words="{" ".join(made.flags())}" ;;' for name, made in parser.commands.items())
    values = {}
    for command in parser.commands.values():
        for action in command._actions:
            if action.option_strings and _values(action):
                values["|".join(action.option_strings)] = " ".join(_values(action))
    following = "\n".join(
        f'    {names}) COMPREPLY=($(compgen -W "{words}" -- "$current")); return ;;' for names, words in values.items()
    )
    return f"""# bash completion of {PROGRAM}: source <({PROGRAM} completion bash)
_vllm_companion() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W "{" ".join([*parser.commands, *parser.flags()])}" -- "$current"))
        return
    fi
    case $before in
{following}
    {"|".join(_DIRECTORIES)}) COMPREPLY=($(compgen -d -- "$current")); return ;;
    esac
    case ${{COMP_WORDS[1]}} in
{flags}
    esac
    if [[ $current != -* ]]; then
        case ${{COMP_WORDS[1]}} in
        {"|".join(TAKE_IDS)}) words=$({IDS}) ;;
        completion) words="bash zsh" ;;
        serve|verify) COMPREPLY=($(compgen -d -- "$current")); return ;;
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o filenames -F _vllm_companion {PROGRAM}"""


def zsh() -> str:
    parser = make_parser()
    helps = {choice.dest: choice.help or "" for choice in _subcommands(parser)}
    described = "\n".join(f"        '{name}:{_quoted(helps[name])}'" for name in parser.commands)
    cases = "\n".join(f"    {name}) _arguments {_arguments(name, made)} ;;" for name, made in parser.commands.items())
    return f"""#compdef {PROGRAM}
# zsh completion of {PROGRAM}: {PROGRAM} completion zsh > a directory of $fpath, as _{PROGRAM}
_vllm_companion() {{
    local -a commands
    if (( CURRENT == 2 )); then
        commands=(
{described}
        )
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
{cases}
    esac
}}
if [[ $funcstack[1] == _vllm_companion || $funcstack[1] == _vllm-companion ]]; then
    _vllm_companion "$@"
else
    compdef _vllm_companion {PROGRAM}
fi"""


def _subcommands(parser: Parser) -> list[argparse.Action]:
    return [choice for action in parser._actions for choice in getattr(action, "_choices_actions", ())]


def _arguments(name: str, command: Parser) -> str:
    specs = []
    for action in command._actions:
        first = (action.help or "").split(". ")[0].rstrip(".")
        text = _quoted(first).replace("[", "(").replace("]", ")").replace(":", "\\:")
        value = ""
        if action.nargs != 0:
            words = " ".join(_values(action))
            what = "_files -/" if set(action.option_strings) & set(_DIRECTORIES) else f"({words})" if words else ""
            value = f":{action.dest}:{what}"
        specs += [f"'{flag}[{text}]{value}'" for flag in action.option_strings]
    last = {**dict.fromkeys(TAKE_IDS, f'"*:id:($({IDS}))"'), "completion": "'*:shell:(bash zsh)'"}
    if name in ("serve", "verify"):
        specs.append("'*:model:_files -/'")
    specs += [last[name]] if name in last else []
    return " ".join(specs)


def _quoted(text: str) -> str:
    return text.replace("'", "'\\''")
