"""kvctl pin, unpin and pins."""

import argparse

from kvd_client.client import Client
from kvd_client.kvctl import views
from kvd_client.kvctl.answer import FAILED, Answer, BadUsage, check_model
from kvd_client.kvctl.command import Command, asking
from kvd_client.kvctl.prompts import FILE_HELP, MODEL_HELP, find_model, read_tokens
from kvd_client.kvctl.tables import count, duration
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_TTL_MS

_OWNER = "kvctl"


def _pin(client: Client, options: argparse.Namespace) -> Answer:
    fingerprint = find_model(client, options.model).fingerprint
    tokens = read_tokens(options.file)
    asked = len(tokens) // TOKEN_BYTES
    pinned = client.pin(fingerprint, tokens, owner=options.owner, ttl=options.ttl)
    report = {"tokens": pinned, "asked": asked, "owner": options.owner}
    if not pinned:
        return Answer(report, lambda _: "nothing of it is cached: nothing was pinned", FAILED)
    until = f"for {duration(options.ttl)}" if options.ttl else "until it is unpinned"
    text = f"{count(pinned)} of {count(asked)} tokens are cached, and pinned {until}"
    return Answer(report, lambda _: text)


def _unpin(client: Client, options: argparse.Namespace) -> Answer:
    if options.model:
        check_model(client, options.model)
    if options.all:
        return _unpin_all(client, options)
    ended = client.unpin(options.owner, options.model)
    text = f"{count(ended)} pin{'s' if ended != 1 else ''} of {options.owner!r} ended"
    return Answer({"pins": ended}, lambda _: text)


def _unpin_all(client: Client, options: argparse.Namespace) -> Answer:
    """Whoever has pinned them."""
    rows = [row for row in client.pins() if options.model in ("", row["model"])]
    owners = sorted({row["owner"] for row in rows})
    if rows and not options.yes:
        raise BadUsage(
            f"this would end {count(len(rows))} pin{'s' if len(rows) != 1 else ''} of "
            f"{', '.join(map(repr, owners))}: do it with --yes"
        )
    ended = sum(client.unpin(owner, options.model) for owner in owners)
    text = f"{count(ended)} pin{'s' if ended != 1 else ''} of {count(len(owners))} owners ended"
    return Answer({"pins": ended}, lambda _: text)


def _pins(client: Client, _: argparse.Namespace) -> Answer:
    rows = client.pins()
    return Answer({"pins": rows}, lambda look: views.pins(rows, look))


def _add_pin_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, metavar="NAME", help=MODEL_HELP)
    command.add_argument(
        "--owner", default=_OWNER, metavar="NAME", help="in whose name (default: kvctl)"
    )
    command.add_argument(
        "--for",
        dest="ttl",
        type=lifetime,
        default=0.0,
        metavar="SECONDS",
        help="when it ends by itself (default: never)",
    )
    command.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help=FILE_HELP,
    )


def _add_unpin_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="", metavar="NAME", help="on this model only")
    whose = command.add_mutually_exclusive_group()
    whose.add_argument(
        "--owner", default=_OWNER, metavar="NAME", help="whose pins (default: kvctl)"
    )
    whose.add_argument("--all", action="store_true", help="everybody's; needs --yes")
    command.add_argument("--yes", action="store_true", help="do it, however many these are")


def lifetime(text: str) -> float:
    """Seconds that a pin may last; an argument's type."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MAX_TTL_MS / 1000:
        raise argparse.ArgumentTypeError(
            f"a number of seconds above 0, at most {MAX_TTL_MS // 1000}, not {text!r}"
        )
    return seconds


COMMANDS = (
    Command(
        "pin",
        "keep the cached prefix of these token ids from eviction",
        asking(_pin),
        _add_pin_options,
    ),
    Command("unpin", "end pins", asking(_unpin), _add_unpin_options),
    Command("pins", "what is pinned, by whom, and for how long", asking(_pins)),
)
