"""kvctl evict: dropping what nobody uses; the oldest, all, or what belongs to a prompt."""

import argparse
from typing import Any

from kvd_client.client import Client
from kvd_client.kvctl.answer import Answer, BadUsage, check_model
from kvd_client.kvctl.command import Command, asking, positive
from kvd_client.kvctl.prompts import find_model, read_tokens
from kvd_client.kvctl.tables import count, size


def _evict(client: Client, options: argparse.Namespace) -> Answer:
    if options.prompt is not None:
        return _forget(client, options)
    rows = check_model(client, options.model) if options.model else client.status()["models"]
    if options.all and not options.yes:
        raise BadUsage(_what_would_go(rows, options.tenant))
    n_blocks = 0 if options.all else options.blocks
    evicted = client.evict(options.model, n_blocks, options.tenant)
    text = (
        f"{_blocks(evicted.blocks)} evicted, {size(evicted.freed_bytes)} given back to the system"
    )
    return Answer(evicted._asdict(), lambda _: text)


def _forget(client: Client, options: argparse.Namespace) -> Answer:
    if not options.model:
        raise BadUsage("--prompt needs --model: token ids mean nothing without it")
    model = find_model(client, options.model)
    tenant = model.whose(options.tenant)
    forgotten = client.forget(model.fingerprint, read_tokens(options.prompt), tenant=tenant)
    text = (
        f"{count(forgotten.tokens)} of its tokens were cached; {_blocks(forgotten.blocks)} "
        f"evicted, {size(forgotten.freed_bytes)} given back to the system"
    )
    if forgotten.kept:
        text += f"; {count(forgotten.kept)} stay, leased or pinned"
    return Answer(forgotten._asdict(), lambda _: text)


def _what_would_go(rows: list[dict[str, Any]], tenant: str) -> str:
    """Why nothing was done."""
    rows = [row for row in rows if tenant in ("", row["tenant"]) and row["blocks"]["cached"]]
    n_bytes = sum(row["blocks"]["cached"] * row["stride_bytes"] for row in rows)
    blocks = _blocks(sum(row["blocks"]["cached"] for row in rows))
    models = f"{count(len(rows))} model{'s' if len(rows) != 1 else ''}"
    return f"this would drop {blocks} of {models}, {size(n_bytes)}: do it with --yes"


def _blocks(n: int) -> str:
    return f"{count(n)} block{'s' if n != 1 else ''}"


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default="",
        metavar="NAME",
        help="of this model only; with --prompt also how its fingerprint begins",
    )
    command.add_argument("--tenant", default="", metavar="NAME", help="of this tenant only")
    how_many = command.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--blocks", type=positive, metavar="N", help="at most so many")
    how_many.add_argument("--all", action="store_true", help="all of them; needs --yes")
    how_many.add_argument(
        "--prompt",
        metavar="FILE",
        help="those of a prompt, and of all that goes on from it, but not what it shares with "
        'others: a JSON list of token ids ("-": standard input)',
    )
    command.add_argument("--yes", action="store_true", help="do it, however much it is")


COMMANDS = (
    Command(
        "evict",
        "drop cached blocks that nobody leases or pins, the oldest first",
        asking(_evict),
        _add_options,
    ),
)
