"""Look after the daemon of the shared K/V cache.

exit codes:
  0  done
  1  verify found a difference, or the daemon refused what was asked
  2  bad usage
  3  no daemon answers

If another program called kvctl comes first on PATH (the package kvcached installs one),
`python -m kvd_client.kvctl` is always this one.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

from kvd_client.client import Client
from kvd_client.errors import DeadlineExceeded, KvdError, Unavailable
from kvd_client.kvctl import pins, views
from kvd_client.kvctl.answer import FAILED, NO_DAEMON, OK, USAGE, Answer, BadUsage, check_model
from kvd_client.kvctl.tables import Look, count, duration, size
from kvd_client.operations import DEFAULT_TIMEOUT
from kvd_proto.paths import DEFAULT_INSTANCE

_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Raises SystemExit(2) for bad usage."""
    options = _parser().parse_args(arguments)
    try:
        with Client(
            options.runtime_dir,
            instance=options.instance,
            name="kvctl",
            staging_bytes=0,
            timeout=options.timeout,
        ) as client:
            answer: Answer = options.run(client, options)
    except (Unavailable, DeadlineExceeded) as error:
        _complain(error, _what_to_do(error))
        return NO_DAEMON
    except KvdError as error:
        _complain(error)
        return FAILED
    except BadUsage as error:
        _complain(error)
        return USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    as_json = options.json
    text = json.dumps(answer.report, indent=2) if as_json else answer.show(Look.of(sys.stdout))
    return _print(text, answer.code)


# --- commands


def _status(client: Client, _: argparse.Namespace) -> Answer:
    report = client.status()
    return Answer(report, lambda look: views.status(report, look))


def _seqs(client: Client, _: argparse.Namespace) -> Answer:
    rows = client.sequences()
    return Answer({"sequences": rows}, lambda look: views.sequences(rows, look))


def _clients(client: Client, _: argparse.Namespace) -> Answer:
    report = client.holders()
    return Answer(report, lambda look: views.clients(report, look))


def _models(client: Client, _: argparse.Namespace) -> Answer:
    rows = client.status()["models"]
    return Answer({"models": rows}, lambda look: views.models(rows, look))


def _verify(client: Client, _: argparse.Namespace) -> Answer:
    report = client.verify()
    code = OK if report["ok"] else FAILED
    return Answer(report, lambda look: views.verify(report, look), code)


def _ping(client: Client, _: argparse.Namespace) -> Answer:
    started = time.perf_counter()
    pong = client.ping()
    seconds = time.perf_counter() - started
    report = {**pong._asdict(), "round_trip_us": round(seconds * 1e6, 1)}
    text = (
        f"kvd {pong.version}, instance {pong.instance}, pid {pong.pid}, "
        f"up {duration(pong.uptime_ms / 1000)}: answered in {seconds * 1000:.2f} ms"
    )
    return Answer(report, lambda _: text)


def _evict(client: Client, options: argparse.Namespace) -> Answer:
    if options.model:
        check_model(client, options.model)
    evicted = client.evict(options.model, 0 if options.all else options.blocks)
    blocks = f"{count(evicted.blocks)} block{'s' if evicted.blocks != 1 else ''}"
    text = f"{blocks} evicted, {size(evicted.freed_bytes)} given back to the system"
    return Answer(evicted._asdict(), lambda _: text)


# --- in and out


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="kvctl",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvctl {version('kvd-cache')}")
    _add_common(parser, suppress=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    table: tuple[tuple[str, Callable[[Client, argparse.Namespace], Answer], str], ...] = (
        ("status", _status, "memory, hit rate, models: everything at a glance"),
        ("seqs", _seqs, "open and waiting sequences"),
        ("clients", _clients, "who is connected, and what each holds"),
        ("models", _models, "registered models and their blocks"),
        ("evict", _evict, "drop cached blocks that nobody leases or pins, the oldest first"),
        ("pin", pins.pin, "keep the cached prefix of these token ids from eviction"),
        ("unpin", pins.unpin, "end pins"),
        ("pins", pins.show, "what is pinned, by whom, and for how long"),
        ("ping", _ping, "whether the daemon answers, and how fast"),
        ("verify", _verify, "recount everything from the blocks and the system"),
    )
    for name, run, summary in table:
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        _add_common(command, suppress=True)
        command.set_defaults(run=run)
        if name == "evict":
            command.add_argument("--model", default="", metavar="NAME", help="of this model only")
            how_many = command.add_mutually_exclusive_group(required=True)
            how_many.add_argument("--blocks", type=_positive, metavar="N", help="at most so many")
            how_many.add_argument("--all", action="store_true", help="all of them")
        elif name == "pin":
            pins.add_pin_options(command)
        elif name == "unpin":
            pins.add_unpin_options(command)
    return parser


def _add_common(parser: argparse.ArgumentParser, *, suppress: bool) -> None:
    """Options that may come before the command, or after it: there an absent one must not undo the
    one before (`suppress`)."""

    def default(value: Any) -> Any:
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
        type=_seconds,
        metavar="SECONDS",
        default=default(DEFAULT_TIMEOUT),
        help="how long to wait for an answer (default: 5)",
    )
    parser.add_argument(
        "--json", action="store_true", default=default(False), help="print it for programs"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 32:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"a number of seconds above 0, not {text!r}")
    return seconds


def _print(text: str, code: int) -> int:
    """Print, and return the code; who reads us may have seen enough before the end."""
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"kvctl: cannot write: {error.strerror}", file=sys.stderr)
        return FAILED
    return code


def _complain(error: Exception, advice: str = "") -> None:
    print(f"kvctl: {error}", file=sys.stderr)
    if advice:
        print(f"kvctl: {advice}", file=sys.stderr)


def _what_to_do(error: KvdError) -> str:
    if isinstance(error, DeadlineExceeded):
        return "it hangs, or is busy: look at its log, or wait longer with --timeout"
    if "Permission denied" in error.message:
        return (
            "only the daemon's own user, root, and members of its socket_group may talk to it: run "
            "kvctl as one of them"
        )
    return (
        "start one with `kvd serve`, or say where it is with --runtime-dir (KVD_RUNTIME_DIR) or "
        "--instance (KVD_INSTANCE)"
    )
