"""kvctl events: what has happened in the daemon, and with --follow what happens, one line each.

A follower outlives the daemon: it says so on standard error when there is none, and goes on with
the next one. For programs each event is one line of JSON, and so is what was lost.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from kvd_client.client import Client
from kvd_client.errors import DeadlineExceeded, Unavailable
from kvd_client.following import MAX_WAIT
from kvd_client.kvctl import output
from kvd_client.kvctl.answer import Answer, Printed
from kvd_client.kvctl.command import Command, connect, positive
from kvd_client.kvctl.tables import Look, clean, count, duration, size
from kvd_proto.happenings import FREQUENT, Kind

Event = dict[str, Any]

WAIT_SECONDS = min(30.0, MAX_WAIT)
"""For one answer, when nothing happens."""
RETRY_SECONDS = 0.5
"""Between looks for a daemon that is not there."""
_KIND_WIDTH = max(map(len, Kind))


def _events(options: argparse.Namespace) -> Answer | Printed:
    if options.follow:
        return _follow(options)
    with connect(options) as client:
        events, following, lost = _kept(client, options)
    report = {"events": events, "next": following, "lost": lost}
    return Answer(report, lambda look: _show(events, lost, look))


def _kept(client: Client, options: argparse.Namespace) -> tuple[list[Event], int, int]:
    """What the daemon has kept until now, or the last of it; what comes next; how much it has not
    kept."""
    end, since, lost = client.events().next, 0, 0
    events: list[Event] = []
    while since < end:
        batch = client.events(since, kinds=options.kind, model=options.model)
        events += [event for event in batch.events if event["number"] < end]
        lost += batch.lost
        since = batch.next
    if options.last is not None:
        events = events[-options.last :]
    return events, end, lost


def _follow(options: argparse.Namespace) -> Printed:
    look = Look.of(sys.stdout)
    for event in _happening(options):
        if options.json:
            output.write(json.dumps(event))
        elif "lost" in event:
            output.write(look.paint(_lost(event["lost"]), "yellow"))
        else:
            output.write(line(event, look))
    return Printed()


def _happening(options: argparse.Namespace) -> Iterator[Event]:
    """Events as they happen, and {"lost": n}, without end. Raises if there is no daemon at first;
    when one has gone, it waits for the next and begins with its first event."""
    since: int | None = None
    was_there = False
    while True:
        try:
            with connect(options) as client:
                if was_there:
                    print("kvctl: the daemon is back", file=sys.stderr)
                elif options.last is not None:
                    kept, since, _ = _kept(client, options)
                    yield from kept
                was_there = True
                while True:
                    batch = client.events(
                        since, WAIT_SECONDS, kinds=options.kind, model=options.model
                    )
                    if batch.lost:
                        yield {"lost": batch.lost}
                    yield from batch.events
                    since = batch.next
        except (Unavailable, DeadlineExceeded) as error:
            if not was_there:
                raise
            if since != 0:
                print(f"kvctl: no daemon, waiting: {error}", file=sys.stderr)
            since = 0  # the next one counts anew
            time.sleep(RETRY_SECONDS)


def _show(events: list[Event], lost: int, look: Look) -> str:
    lines = [line(event, look) for event in events] or ["nothing has happened that was kept"]
    if lost:
        lines.insert(0, look.paint(_lost(lost), "yellow"))
    return "\n".join(lines)


def _lost(n: int) -> str:
    return f"{count(n)} event{'s' if n != 1 else ''} lost"


def line(event: Event, look: Look) -> str:
    """One event for people: when, what, of which model, and the rest in words."""
    when = event["time"]
    clock = time.strftime("%H:%M:%S", time.localtime(when)) + f".{int(when % 1 * 1000):03d}"
    kind = event["kind"]
    known = _WORDS.get(kind)
    words = known(event) if known else " ".join(f"{name}={event[name]}" for name in event)
    of = [event["model"]] if event["model"] else []
    if event["tenant"] not in ("", "default"):
        of.append(f"({event['tenant']})")
    painted = look.paint(f"{kind:<{_KIND_WIDTH}}", _COLOURS.get(kind, ""))
    return f"{clock}  {painted}  {clean(' '.join([*of, words]))}"


_COLOURS = {
    Kind.HIT: "green",
    Kind.EVICT: "yellow",
    Kind.DAMAGED: "red",
    Kind.NOT_ADOPTED: "red",
    Kind.REFUSED: "red",
    Kind.SESSION_REFUSED: "red",
    Kind.TIMED_OUT: "red",
}


def _who(event: Event) -> str:
    return f"{event['client']}[{event['pid']}]"


def _sequence(event: Event) -> str:
    return f"seq {event['seq_id']} of {_who(event)}"


def _of_blocks(event: Event) -> str:
    return f"tokens {event['start']}..{event['start'] + event['tokens'] - 1}"


def _pinned(event: Event) -> str:
    ttl = event["ttl_seconds"]
    until = f"for {duration(ttl)}" if ttl else "until it is unpinned"
    return f"{count(event['tokens'])} tokens for {event['owner']}, {until}"


_WORDS: dict[str, Callable[[Event], str]] = {
    Kind.ALLOC: lambda event: (
        f"{_sequence(event)}: {count(event['hit_tokens'])} of {count(event['tokens'])} cached"
        + (f", {event['request']}" if event["request"] else "")
    ),
    Kind.HIT: lambda event: (
        f"{_sequence(event)}: {count(event['hit_tokens'])} tokens, {count(event['blocks'])} blocks"
    ),
    Kind.RELEASE: lambda event: f"{_sequence(event)}: {event['outcome']}, {event['tokens']} tokens",
    Kind.SEAL: lambda event: f"{_of_blocks(event)} from {_who(event)}, slot {event['slot']}",
    Kind.EVICT: lambda event: f"{_of_blocks(event)}, slot {event['slot']}: {event['reason']}",
    Kind.PIN: _pinned,
    Kind.UNPIN: lambda event: f"{event['tokens']} tokens of {event['owner']}: {event['reason']}",
    Kind.MODEL: lambda event: (
        f"registered by {_who(event)}: blocks of {event['block_tokens']} tokens, "
        f"{size(event['stride_bytes'])}"
    ),
    Kind.MODEL_GONE: lambda event: f"with {count(event['blocks'])} cached blocks",
    Kind.ADOPTED: lambda event: f"{count(event['blocks'])} blocks, {count(event['pins'])} pins",
    Kind.NOT_ADOPTED: lambda event: str(event["reason"]),
    Kind.DAMAGED: lambda event: f"{count(event['blocks'])} blocks",
    Kind.TIMED_OUT: lambda event: f"{_sequence(event)}: idle for {duration(event['idle_seconds'])}",
    Kind.REFUSED: lambda event: f"{_who(event)}: {event['code']}, {event['message']}",
    Kind.SESSION_OPENED: lambda event: (
        f"{_who(event)}, user {event['uid']}, staging {size(event['staging_bytes'])}"
    ),
    Kind.SESSION_REFUSED: lambda event: f"{_who(event)}: {event['code']}, {event['message']}",
    Kind.SESSION_GONE: lambda event: (
        f"{_who(event)} after {duration(event['connected_seconds'])}: {event['reason']}"
    ),
}


def _add_options(command: argparse.ArgumentParser) -> None:
    often = ", ".join(kind for kind in Kind if kind in FREQUENT)
    command.epilog = (
        f"The daemon notes frequent events ({often}) only while somebody follows, and for 10 "
        "seconds after that. It keeps the last few thousand."
    )
    command.add_argument(
        "-f", "--follow", action="store_true", help="go on with what happens from now on"
    )
    command.add_argument(
        "--kind",
        action="append",
        default=[],
        choices=[kind.value for kind in Kind],
        metavar="KIND",
        help="of this kind only; may be given several times: " + ", ".join(Kind),
    )
    command.add_argument("--model", default="", metavar="NAME", help="of this model only")
    command.add_argument(
        "--last", type=positive, metavar="N", help="the last N of what is kept (with -f: none)"
    )


COMMANDS = (Command("events", "what happens in the daemon, one line each", _events, _add_options),)
