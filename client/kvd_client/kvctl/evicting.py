"""kvctl evict: dropping what nobody uses."""

import argparse

from kvd_client.client import Client
from kvd_client.kvctl.answer import Answer, check_model
from kvd_client.kvctl.command import Command, asking, positive
from kvd_client.kvctl.tables import count, size


def _evict(client: Client, options: argparse.Namespace) -> Answer:
    if options.model:
        check_model(client, options.model)
    evicted = client.evict(options.model, 0 if options.all else options.blocks)
    blocks = f"{count(evicted.blocks)} block{'s' if evicted.blocks != 1 else ''}"
    text = f"{blocks} evicted, {size(evicted.freed_bytes)} given back to the system"
    return Answer(evicted._asdict(), lambda _: text)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="", metavar="NAME", help="of this model only")
    how_many = command.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--blocks", type=positive, metavar="N", help="at most so many")
    how_many.add_argument("--all", action="store_true", help="all of them")


COMMANDS = (
    Command(
        "evict",
        "drop cached blocks that nobody leases or pins, the oldest first",
        asking(_evict),
        _add_options,
    ),
)
