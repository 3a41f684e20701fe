"""The command `kvd`: `kvd serve` runs the daemon in the foreground, `kvd purge` removes what one
that is not running has left in shared memory.

Exit codes: 0 stopped when asked to, 1 a fault, 2 bad usage or settings, 3 another daemon has the
instance.
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

import zmq

from kvd import __version__, descriptors, log, pauses
from kvd.instance import InstanceBusy, InstanceLock, UnsafePath, default_runtime_dir, purge
from kvd.notify import Notifier
from kvd.server import Server
from kvd.settings import BadSetting, Settings, load
from kvd.signals import StopSignals
from kvd_proto.paths import DEFAULT_INSTANCE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.run == "purge":
        return _purge(options.instance)
    flags = {name: value for name, value in vars(options).items() if name not in ("run", "config")}
    try:
        settings = load(options.config, flags)
        notifier = Notifier.from_env()
    except (BadSetting, ValueError) as error:
        return _fail(2, error)
    log.set_up(settings.log_level)
    try:
        with closing(notifier):
            return serve(settings, notifier)
    finally:
        log.close()


def serve(settings: Settings, notifier: Notifier) -> int:
    """Run one daemon until it is told to stop; returns the exit code."""
    directory = settings.runtime_dir or default_runtime_dir(settings.instance)
    try:
        lock = InstanceLock(directory, settings.instance, settings.socket_group)
    except InstanceBusy as error:
        return _fail(3, error)
    except (UnsafePath, OSError) as error:
        return _fail(1, error)
    with StopSignals() as stop, lock:
        descriptors.raise_limit(settings)
        pauses.bound()
        try:
            server = Server(settings, lock, notifier)
        except (OSError, zmq.ZMQError) as error:
            return _fail(1, error)
        log.info(
            "ready",
            version=__version__,
            instance=settings.instance,
            runtime_dir=lock.runtime_dir,
            max_memory=settings.max_memory,
        )
        try:
            with closing(server):
                server.run(stop.fd)
        except Exception as error:  # beyond repair: see server.py
            log.error("fault", error, consequence="the daemon ends")
            return 1
        log.info("stopped")
    return 0


def _purge(instance: str) -> int:
    try:
        removed = purge(instance)
    except InstanceBusy as error:
        return _fail(3, error)
    except ValueError as error:
        return _fail(2, error)
    except (UnsafePath, OSError) as error:
        return _fail(1, error)
    for name in removed:
        print(f"removed /dev/shm/{name}")
    if not removed:
        print(f"instance {instance} has left nothing in shared memory")
    return 0


def _fail(code: int, error: Exception) -> int:
    with suppress(OSError):  # the exit code tells it as well
        print(f"kvd: {error}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvd", description="One shared K/V cache for the LLM workers of a machine."
    )
    parser.add_argument("--version", action="version", version=f"kvd {__version__}")
    commands = parser.add_subparsers(dest="run", required=True, metavar="COMMAND")
    serving = commands.add_parser("serve", help="run the daemon in the foreground")
    serving.add_argument("--config", type=Path, metavar="FILE", help="default: /etc/kvd/kvd.toml")
    serving.add_argument("--instance", help='name of this daemon (default: "default")')
    serving.add_argument("--runtime-dir", metavar="DIR", help="where its sockets are")
    serving.add_argument(
        "--socket-group", metavar="GROUP", help="whose members may connect (default: only its user)"
    )
    serving.add_argument("--max-memory", metavar="SIZE", help="the budget (default: 4096MiB)")
    serving.add_argument("--max-sequences", type=int, metavar="N", help="default: 100")
    serving.add_argument("--max-sessions", type=int, metavar="N", help="default: 256")
    serving.add_argument("--n-seq-max", type=int, metavar="N", help="ids a context may have: 8")
    serving.add_argument("--max-staging", metavar="SIZE", help="of one client (default: 256MiB)")
    serving.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    serving.add_argument(
        "--keep-on-stop",
        action=argparse.BooleanOptionalAction,
        help="keep the cache in shared memory for the next start (default: yes)",
    )
    serving.add_argument(
        "--linger-seconds", type=int, metavar="S", help="stop after so long without a client"
    )
    purging = commands.add_parser(
        "purge", help="remove the cache that a stopped daemon keeps in shared memory"
    )
    purging.add_argument("--instance", default=DEFAULT_INSTANCE, help='default: "default"')
    return parser
