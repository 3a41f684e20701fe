"""kvctl pin, unpin and pins. There is no tokenizer here: `pin` takes token ids."""

import argparse
import json
import sys

from kvd_client.client import Client
from kvd_client.errors import BadMessage, RequestError
from kvd_client.kvctl import views
from kvd_client.kvctl.answer import FAILED, Answer, BadUsage, check_model
from kvd_client.kvctl.command import Command, asking
from kvd_client.kvctl.tables import count, duration
from kvd_client.state import pack_tokens
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.messages import MAX_TTL_MS

_OWNER = "kvctl"
_SHORTEST_FINGERPRINT = 8
"""Hex digits that name a model as well as its name does."""


def _pin(client: Client, options: argparse.Namespace) -> Answer:
    fingerprint = _find_model(client, options.model)
    tokens = _read_tokens(options.file)
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
    command.add_argument(
        "--model", required=True, metavar="NAME", help="its name, or how its fingerprint begins"
    )
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
        help='a JSON list of token ids (default, and "-": standard input)',
    )


def _add_unpin_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="", metavar="NAME", help="on this model only")
    whose = command.add_mutually_exclusive_group()
    whose.add_argument(
        "--owner", default=_OWNER, metavar="NAME", help="whose pins (default: kvctl)"
    )
    whose.add_argument("--all", action="store_true", help="everybody's; needs --yes")
    command.add_argument("--yes", action="store_true", help="do it, however many these are")


def _find_model(client: Client, name: str) -> bytes:
    """The arena fingerprint of the one model of this name, or that begins like this."""
    rows = client.status()["models"]
    found = {row["fingerprint"] for row in rows if row["fingerprint"].startswith(name.lower())}
    if len(name) < _SHORTEST_FINGERPRINT or len(found) != 1:
        found = {row["fingerprint"] for row in check_model(client, name)}
    if len(found) > 1:
        raise RequestError(
            f"several models are called {name!r}: say the beginning of a fingerprint instead, of "
            + ", ".join(sorted(each[:16] for each in found))
        )
    return bytes.fromhex(found.pop())


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


def _read_tokens(path: str) -> bytes:
    """The packed token ids of a file. Read when all else is known to be right, since standard input
    may be a person. Raises BadUsage."""
    try:
        if path == "-":
            found = json.load(sys.stdin)
        else:
            with open(path) as file:
                found = json.load(file)
        if not isinstance(found, list) or not found:
            raise ValueError("it is not a list with something in it")
        return pack_tokens(found)
    except (OSError, ValueError, RecursionError, BadMessage) as error:
        raise BadUsage(f"a file with a JSON list of token ids, not {path!r}: {error}") from None


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
