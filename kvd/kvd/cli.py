"""The command `kvd`: `kvd serve` runs the daemon in the foreground, `kvd purge` removes what one
that is not running has left in shared memory, `kvd config` looks at settings (config_cli.py), and
`kvd simulate` replays a trace (simulate.py).
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import zmq

from kvd import __version__, advice, config_cli, descriptors, log, pauses, simulate
from kvd.arena import SHM_DIR
from kvd.configuration import DEFAULT_FILE, BadSetting, Configuration, flag_of, load
from kvd.instance import InstanceBusy, InstanceLock, UnsafePath, default_runtime_dir, purge
from kvd.kinds import Switch
from kvd.metrics import listening
from kvd.metrics.listening import CannotServe
from kvd.notify import Notifier
from kvd.server import Server
from kvd.settings import ABOUT, Settings
from kvd.signals import Signals
from kvd.simulate import BadCapacity
from kvd.trace import BadTrace
from kvd_proto.paths import DEFAULT_INSTANCE

_EXIT_CODES = """exit codes:
  0  done, or stopped when asked to
  1  a fault
  2  bad usage or settings
  3  another daemon has the instance"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = make_parser().parse_args(arguments)
    if options.run == "purge":
        return _purge(options.instance, options.yes)
    flags = {name: value for name, value in vars(options).items() if name in ABOUT}
    try:
        if options.run == "config":
            return config_cli.run(options, flags)
        if options.run == "simulate":
            return simulate.run(options)
        configuration = load(options.config, flags)
        notifier = Notifier.from_env()
        listening.check_installed(configuration.settings.metrics)
    except (BadSetting, BadTrace, BadCapacity, CannotServe, ValueError) as error:
        return _fail(2, error)
    log.set_up(configuration.settings.log_level)
    try:
        with closing(notifier):
            return serve(configuration, partial(load, options.config, flags), notifier)
    finally:
        log.close()


def serve(
    configuration: Configuration, load_again: Callable[[], Configuration], notifier: Notifier
) -> int:
    """Run one daemon until it is told to stop; returns the exit code."""
    settings = configuration.settings
    directory = settings.runtime_dir or default_runtime_dir(settings.instance)
    try:
        lock = InstanceLock(directory, settings.instance, settings.socket_group)
    except InstanceBusy as error:
        return _fail(3, error)
    except (UnsafePath, OSError) as error:
        return _fail(1, error)
    with Signals() as signals, lock:
        descriptors.raise_limit(settings)
        pauses.bound()
        try:
            server = Server(configuration, load_again, lock, notifier)
        except CannotServe as error:
            return _fail(2, error)
        except (OSError, zmq.ZMQError) as error:
            return _fail(1, error)
        for warning in [*configuration.warnings, *advice.of_machine(settings)]:
            log.warning("settings", reason=warning)
        log.info(
            "ready",
            version=__version__,
            instance=settings.instance,
            runtime_dir=lock.runtime_dir,
            max_memory=settings.max_memory,
        )
        try:
            with closing(server):
                server.run(signals)
        except Exception as error:  # beyond repair: see server.py
            log.error("fault", error, consequence="the daemon ends")
            return 1
        log.info("stopped")
    return 0


def _purge(instance: str, yes: bool) -> int:
    try:
        names = purge(instance, only_look=not yes)
        if names and not yes:
            n_bytes = sum(512 * os.stat(f"{SHM_DIR}/{name}").st_blocks for name in names)
            raise ValueError(
                f"this would remove the cache of instance {instance}, {n_bytes >> 20} MiB in "
                f"{len(names)} files of {SHM_DIR}: do it with --yes"
            )
    except InstanceBusy as error:
        return _fail(3, error)
    except ValueError as error:
        return _fail(2, error)
    except (UnsafePath, OSError) as error:
        return _fail(1, error)
    for name in names:
        print(f"removed {SHM_DIR}/{name}")
    if not names:
        print(f"instance {instance} has left nothing in shared memory")
    return 0


def _fail(code: int, error: Exception) -> int:
    with suppress(OSError):  # the exit code tells it as well
        for line in str(error).splitlines():
            print(f"kvd: {line}", file=sys.stderr, flush=True)
    return code


def make_parser() -> argparse.ArgumentParser:
    """All of the command line."""
    parser = argparse.ArgumentParser(
        prog="kvd",
        description="One shared K/V cache for the LLM workers of a machine.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvd {__version__}")
    commands = parser.add_subparsers(dest="run", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="run the daemon in the foreground")
    _add_settings(serving)
    config_cli.add_commands(
        commands.add_parser("config", help="check or show the settings"), _add_settings
    )
    simulate.add_arguments(
        commands.add_parser(
            "simulate",
            help="what a cache would have hit of a trace of requests",
            description="Replay a trace through the code that the daemon runs, and print which "
            "part of its blocks a cache of each capacity would have hit, beside Belady's optimum, "
            "which knows the future. Needs no daemon.",
        )
    )
    purging = commands.add_parser(
        "purge", help="remove the cache that a stopped daemon keeps in shared memory"
    )
    purging.add_argument("--instance", default=DEFAULT_INSTANCE, help='default: "default"')
    purging.add_argument("--yes", action="store_true", help="do it, however much it is")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """`--config`, and a flag for each setting that is no table."""
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {DEFAULT_FILE}")
    for name, about in ABOUT.items():
        meaning = f"{about.meaning} (default: {about.kind.show(getattr(Settings(), name))})"
        if isinstance(about.kind, Switch):
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag_of(name), action=action, help=meaning)
        elif not about.kind.is_table:
            parser.add_argument(flag_of(name), metavar=about.kind.metavar, help=meaning)
