"""kvctl completion: a script for bash, zsh or fish that completes commands, options and files.

It is made from the parser, so it knows what kvctl knows, and asks nobody when it is used: neither
kvctl, which would take Python's start for each key, nor the daemon.
"""

import argparse
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from kvd_client.kvctl.answer import Answer
from kvd_client.kvctl.command import Command

SHELLS = ("bash", "zsh", "fish")
_FILES, _DIRECTORIES = ("FILE", "MODEL.gguf"), ("DIR",)
"""Names of values that are those of files."""


class _Option(NamedTuple):
    """An option: its names, its meaning, and its value if it `takes` one."""

    names: tuple[str, ...]
    meaning: str
    takes: str
    choices: tuple[str, ...]


class _Words(NamedTuple):
    """What may follow a command: options, and files or words without one."""

    name: str
    summary: str
    options: list[_Option]
    choices: tuple[str, ...]
    takes_files: bool


def _completion(options: argparse.Namespace) -> Answer:
    script = script_of(options.parser, options.shell)
    return Answer({"shell": options.shell, "script": script}, lambda _: script)


def script_of(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of SHELLS."""
    common, commands = _tree(parser)
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](common, commands)


def _tree(parser: argparse.ArgumentParser) -> tuple[_Words, list[_Words]]:
    """What may come before a command, and each command."""
    commands: list[_Words] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands += [
                _words(action.choices[each.dest], each.dest, each.help or "")
                for each in action._choices_actions
            ]
    return _words(parser, "", ""), commands


def _words(parser: argparse.ArgumentParser, name: str, summary: str) -> _Words:
    options: list[_Option] = []
    choices: tuple[str, ...] = ()
    takes_files = False
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        takes = "" if action.nargs == 0 else str(action.metavar or action.dest).upper()
        values = tuple(map(str, action.choices or ()))
        if action.option_strings:
            meaning = (action.help or "").partition(" (default")[0].partition(": ")[0]
            options.append(_Option(tuple(action.option_strings), meaning, takes, values))
        else:
            choices += values
            takes_files |= takes in _FILES
    return _Words(name, summary, options, choices, takes_files)


def _flags(options: Sequence[_Option]) -> str:
    return " ".join(name for option in options for name in option.names)


# --- bash


def _bash(common: _Words, commands: list[_Words]) -> str:
    with_value = "|".join(
        name for option in common.options if option.takes for name in option.names
    )
    values = _bash_values("", common) + [
        line for command in commands for line in _bash_values(command.name, command)
    ]
    after = []
    for command in commands:
        words = shlex.quote(_flags(command.options))
        after.append(f"        {command.name}) options={words}")
        after.append(f"            words={shlex.quote(' '.join(command.choices))}")
        after.append(f"            files={'yes' if command.takes_files else ''} ;;")
    names = " ".join(command.name for command in commands)
    return "\n".join(
        [
            "# kvctl, for bash: source <(kvctl completion bash)",
            "_kvctl() {",
            "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
            "    local command='' options='' words='' files='' i",
            "    COMPREPLY=()",
            "    for ((i = 1; i < COMP_CWORD; i++)); do",
            "        case ${COMP_WORDS[i]} in",
            f"            {with_value}) ((i++)) ;;",
            "            -*) ;;",
            "            *) command=${COMP_WORDS[i]}; break ;;",
            "        esac",
            "    done",
            '    case "$command $prev" in',
            *values,
            "    esac",
            "    case $command in",
            f"        '') options={shlex.quote(_flags(common.options))}",
            f"            words={shlex.quote(names)} ;;",
            *after,
            "    esac",
            "    if [[ $cur == -* ]]; then",
            '        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$cur")',
            "    elif [[ $files ]]; then",
            "        compopt -o filenames 2> /dev/null",
            '        mapfile -t COMPREPLY < <(compgen -f -- "$cur")',
            "    else",
            '        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")',
            "    fi",
            "}",
            "complete -F _kvctl kvctl",
        ]
    )


def _bash_values(command: str, words: _Words) -> list[str]:
    """Cases of an option's value, where the option is the word before."""
    lines = []
    for option in words.options:
        if not option.takes:
            continue
        pattern = "|".join(f"{shlex.quote(f'{command} {name}')}" for name in option.names)
        if option.choices:
            kind = f"-W {shlex.quote(' '.join(option.choices))}"
        elif option.takes in _DIRECTORIES:
            kind = "-d"
        elif option.takes in _FILES:
            kind = "-f"
        else:
            lines.append(f"        {pattern}) return ;;")
            continue
        lines.append(f"        {pattern})")
        if not option.choices:
            lines.append("            compopt -o filenames 2> /dev/null")
        lines.append(f'            mapfile -t COMPREPLY < <(compgen {kind} -- "$cur"); return ;;')
    return lines


# --- zsh


def _zsh(common: _Words, commands: list[_Words]) -> str:
    described = " ".join(_quoted(f"{each.name}:{each.summary}") for each in commands)
    cases = []
    for command in commands:
        cases.append(f"                {command.name}) _arguments \\")
        cases += [f"                    {spec} \\" for spec in _zsh_specs(command)]
        rest = "_files" if command.takes_files else f"({' '.join(command.choices)})"
        cases.append(f"                    {_quoted('*:value:' + rest)} ;;")
    return "\n".join(
        [
            "#compdef kvctl",
            "# kvctl, for zsh: source <(kvctl completion zsh)",
            "_kvctl() {",
            '    local curcontext="$curcontext" state line',
            "    _arguments -C \\",
            *[f"        {spec} \\" for spec in _zsh_specs(common)],
            "        '1:command:->command' '*::argument:->argument'",
            "    case $state in",
            "        command)",
            f"            local -a commands=({described})",
            "            _describe command commands ;;",
            "        argument)",
            "            case $line[1] in",
            *cases,
            "            esac ;;",
            "    esac",
            "}",
            "compdef _kvctl kvctl",
        ]
    )


def _zsh_specs(words: _Words) -> list[str]:
    specs = []
    for option in words.options:
        for name in option.names:
            meaning = option.meaning.replace("[", "(").replace("]", ")").replace(":", ",")
            spec = f"*{name}[{meaning}]"
            if option.takes:
                if option.choices:
                    value = f"({' '.join(option.choices)})"
                elif option.takes in _DIRECTORIES:
                    value = "_directories"
                else:
                    value = "_files" if option.takes in _FILES else " "
                spec += f":{option.takes}:{value}"
            specs.append(_quoted(spec))
    return specs


# --- fish


def _fish(common: _Words, commands: list[_Words]) -> str:
    lines = ["# kvctl, for fish: kvctl completion fish | source", "complete -c kvctl -f"]
    lines += [
        f"complete -c kvctl -n __fish_use_subcommand -a {each.name} -d {_quoted(each.summary)}"
        for each in commands
    ]
    lines += _fish_options("__fish_use_subcommand", common)
    for each in commands:
        condition = f"__fish_seen_subcommand_from {each.name}"
        lines += _fish_options(condition, each)
        begin = f"complete -c kvctl -n {_quoted(condition)}"
        if each.choices:
            lines.append(f"{begin} -a {_quoted(' '.join(each.choices))}")
        if each.takes_files:
            lines.append(f"{begin} -F")
    return "\n".join(lines)


def _fish_options(condition: str, words: _Words) -> list[str]:
    lines = []
    for option in words.options:
        parts = [f"complete -c kvctl -n {_quoted(condition)}"]
        parts += [
            f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
        ]
        if option.takes:
            parts.append("-r")
            if option.choices:
                parts.append(f"-a {_quoted(' '.join(option.choices))}")
            elif option.takes in _DIRECTORIES:
                parts.append("-a '(__fish_complete_directories)'")
            elif option.takes in _FILES:
                parts.append("-F")
        parts.append(f"-d {_quoted(option.meaning)}")
        lines.append(" ".join(parts))
    return lines


def _quoted(text: str) -> str:
    """In single quotes, for each of these shells; one that is in it becomes another."""
    return "'" + text.replace("'", "`") + "'"


def _add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = (
        "bash: add `source <(kvctl completion bash)` to ~/.bashrc; zsh: the same with zsh to "
        "~/.zshrc, behind compinit; fish: `kvctl completion fish > "
        "~/.config/fish/completions/kvctl.fish`."
    )
    command.add_argument("shell", choices=SHELLS, help="which shell")


COMMANDS = (
    Command(
        "completion",
        "a script that completes commands and options in a shell",
        _completion,
        _add_options,
        needs_daemon=False,
    ),
)
