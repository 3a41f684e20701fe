"""kvctl top: the daemon live, on a terminal; --once prints one picture. What is shown: frame.py.

It outlives the daemon: it says that there is none, and goes on with the next one.
"""

import argparse
import sys
import time

from kvd_client.kvctl import frame
from kvd_client.kvctl.answer import Answer, BadUsage, Printed
from kvd_client.kvctl.command import Command, connect, seconds
from kvd_client.kvctl.samples import History, Sampler, take
from kvd_client.kvctl.screen import Screen
from kvd_client.kvctl.tables import Look

_SHORTEST, _LONGEST = 0.5, 60.0
_BY_KEY = {order[0]: order for order in frame.ORDERS}


def _top(options: argparse.Namespace) -> Answer | Printed:
    options.interval = min(max(options.interval, _SHORTEST), _LONGEST)
    if options.once:
        return _once(options)
    if options.json:
        raise BadUsage("a live picture is for people: --once --json is for programs")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise BadUsage("it needs a terminal: --once prints one picture")
    connect(options).close()  # without a daemon at first, it is an error as with other commands
    return _live(options)


def _once(options: argparse.Namespace) -> Answer:
    """Rates need two looks."""
    history = History()
    with connect(options) as client:
        history.add(take(client))
        time.sleep(min(options.interval, 1.0))
        sample = take(client)
    history.add(sample)
    rates = history.rates
    report = {
        "status": sample.status,
        "clients": sample.clients,
        "sequences": sample.sequences,
        "rates": {"seconds": round(rates.seconds, 3), **rates.per_second},
        "round_trip_us": round(sample.round_trip * 1e6, 1),
    }
    return Answer(report, lambda look: frame.whole(frame.View(sample, rates), look))


def _live(options: argparse.Namespace) -> Printed:
    view = frame.View(None, History().rates, interval=options.interval)
    look = Look.of(sys.stdout)
    screen = Screen()
    sampler = Sampler(options, screen.wake)
    try:
        with screen:
            while True:
                if not view.is_paused:
                    view = view._replace(**sampler.now._asdict())
                room = screen.size
                screen.draw(frame.draw(view, room, look._replace(width=max(room.columns, 20))))
                key = screen.key(1.0)
                if key == "q":
                    return Printed()
                view = _after(key, view)
                sampler.interval = view.interval
    except EOFError:
        return Printed()
    finally:
        # The terminal is back already, should the sampler still wait for an answer.
        sampler.stop()
        screen.close()


def _after(key: str, view: frame.View) -> frame.View:
    """The view after a key."""
    if key in _BY_KEY:
        return view._replace(order=_BY_KEY[key])
    match key:
        case "p" | " ":
            return view._replace(is_paused=not view.is_paused)
        case "h" | "?":
            return view._replace(wants_help=not view.wants_help)
        case "+":
            return view._replace(interval=max(view.interval / 2, _SHORTEST))
        case "-":
            return view._replace(interval=min(view.interval * 2, _LONGEST))
    return view


def _add_options(command: argparse.ArgumentParser) -> None:
    command.epilog = f"keys: {frame.KEYS}"
    command.add_argument("--once", action="store_true", help="print one picture, and end")
    command.add_argument(
        "--interval", type=seconds, default=2.0, metavar="SECONDS",
        help="between two looks (default: 2)",
    )  # fmt: skip


COMMANDS = (
    Command("top", "the daemon live: memory, hit rate, clients, sequences", _top, _add_options),
)
