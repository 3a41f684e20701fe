"""The commands of kvctl that only look: status, seqs, clients, models, ping, verify."""

import argparse
import time

from kvd_client.client import Client
from kvd_client.kvctl import views
from kvd_client.kvctl.answer import FAILED, OK, Answer
from kvd_client.kvctl.command import Command, asking
from kvd_client.kvctl.tables import duration


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


def _verify(client: Client, options: argparse.Namespace) -> Answer:
    report = client.verify(checksums=options.checksums)
    code = OK if report["ok"] else FAILED
    return Answer(report, lambda look: views.verify(report, look), code)


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="compare the bytes of every block with its checksum, too",
    )


COMMANDS = (
    Command("status", "memory, hit rate, models: everything at a glance", asking(_status)),
    Command("seqs", "open and waiting sequences", asking(_seqs)),
    Command("clients", "who is connected, and what each holds", asking(_clients)),
    Command("models", "registered models and their blocks", asking(_models)),
    Command("ping", "whether the daemon answers, and how fast", asking(_ping)),
    Command(
        "verify",
        "recount everything from blocks, directories and the system",
        asking(_verify),
        _add_verify_options,
    ),
)
