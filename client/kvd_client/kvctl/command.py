"""A command of kvctl: its name, its options, and what it does. Each module of commands has a tuple
COMMANDS of them, and main.py a list of the modules.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

from kvd_client.client import Client
from kvd_client.kvctl.answer import Answer, Printed

WELCOME_SECONDS = 0.6
"""A daemon that lives welcomes a client within milliseconds. With this, and the start of Python, it
is told within a second that one does not."""

Run = Callable[[argparse.Namespace], Answer | Printed]


def _no_options(_: argparse.ArgumentParser) -> None:
    pass


class Command(NamedTuple):
    """A command, as `kvctl --help` lists it; `run` gets the options, common ones too, and may raise
    KvdError and BadUsage. What needs the daemon: `asking`."""

    name: str
    summary: str
    run: Run
    add_options: Callable[[argparse.ArgumentParser], None] = _no_options
    needs_daemon: bool = True
    """Whether it takes the options that say which daemon, and how long to wait."""


def asking(run: Callable[[Client, argparse.Namespace], Answer]) -> Run:
    """The command that connects to the daemon first, and ends the session when it is done."""

    def connect_and_run(options: argparse.Namespace) -> Answer:
        with connect(options) as client:
            return run(client, options)

    return connect_and_run


def connect(options: argparse.Namespace) -> Client:
    """A session of the daemon that the options name. One that does not welcome us at once hangs,
    and that is told soon, however long an answer may take."""
    return Client(
        options.runtime_dir,
        instance=options.instance,
        name="kvctl",
        staging_bytes=0,
        timeout=options.timeout,
        welcome_timeout=min(options.timeout, WELCOME_SECONDS),
    )


def positive(text: str) -> int:
    """The type of an option: a whole number from 1 on."""
    if not text.isdecimal() or not 0 < int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """The type of an option: seconds, up to a day."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found <= 86400:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0, not {text!r}")
    return found
