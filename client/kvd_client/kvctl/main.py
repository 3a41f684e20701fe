"""Look after the daemon of the shared K/V cache.

exit codes:
    0  done
    1  verify found a difference, or the daemon refused what was asked
    2  bad usage
    3  no daemon answers: it is down, or hangs
  130  interrupted

If another program called kvctl comes first on PATH (the package kvcached
installs one), `python -m kvd_client.kvctl` is always this one.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version

from kvd_client.errors import DeadlineExceeded, KvdError, Unavailable
from kvd_client.kvctl import (
    completion,
    config,
    events,
    evicting,
    explaining,
    model_size,
    output,
    pins,
    reading,
    top,
    warm,
)
from kvd_client.kvctl.answer import FAILED, NO_DAEMON, OK, USAGE, Answer, BadUsage, Printed
from kvd_client.kvctl.command import seconds
from kvd_client.kvctl.tables import Look
from kvd_client.kvctl.trouble import what_to_do
from kvd_client.operations import DEFAULT_TIMEOUT
from kvd_proto.paths import DEFAULT_INSTANCE

MODULES = (reading, top, events, explaining, evicting, pins, warm, model_size, config, completion)
"""In the order in which --help shows their commands."""
_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Raises SystemExit(2) for bad usage."""
    options = make_parser().parse_args(arguments)
    try:
        answer: Answer | Printed = options.run(options)
        if isinstance(answer, Answer):
            as_json = options.json
            look = Look.of(sys.stdout)
            text = json.dumps(answer.report, indent=2) if as_json else answer.show(look)
            with suppress(output.NobodyReads):
                output.write(text)
    except (Unavailable, DeadlineExceeded) as error:
        _complain(error, what_to_do(error))
        return NO_DAEMON
    except KvdError as error:
        _complain(error)
        return FAILED
    except BadUsage as error:
        _complain(error)
        return USAGE
    except output.CannotWrite as error:
        _complain(error)
        return FAILED
    except output.NobodyReads:
        return OK
    except KeyboardInterrupt:
        return _INTERRUPTED
    return answer.code


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that reads files, which not everybody may."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"kvctl {version('kvd-cache')}")
        parser.exit()


def make_parser() -> argparse.ArgumentParser:
    """All of the command line."""
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="kvctl",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="show program's version number and exit")
    _add_common(parser, suppress=False)
    _add_json(parser, suppress=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (each for module in MODULES for each in module.COMMANDS):
        summary = command.summary
        options = commands.add_parser(
            command.name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if command.needs_daemon:
            _add_common(options, suppress=True)
        _add_json(options, suppress=True)
        command.add_options(options)
        options.set_defaults(run=command.run, parser=parser)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    """Options that may come before the command, or after it: there an absent one must not undo the
    one before (`suppress`)."""

    def default(value: object) -> object:
        return argparse.SUPPRESS if suppress else value

    parser.add_argument(
        "--runtime-dir",
        metavar="DIR",
        default=default(None),
        help="where its sockets are (default: $KVD_RUNTIME_DIR, or wherever it listens)",
    )
    parser.add_argument(
        "--instance",
        metavar="NAME",
        default=default(os.environ.get("KVD_INSTANCE") or DEFAULT_INSTANCE),
        help='which daemon (default: $KVD_INSTANCE, or "default")',
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        default=default(DEFAULT_TIMEOUT),
        help="how long to wait for an answer (default: 5)",
    )


def _add_json(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS if suppress else False,
        help="print it for programs",
    )


def _complain(error: Exception, advice: str = "") -> None:
    print(f"kvctl: {error}", file=sys.stderr)
    if advice:
        print(f"kvctl: {advice}", file=sys.stderr)
