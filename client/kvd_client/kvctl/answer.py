"""What a command of kvctl gives back, and what several of them need."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kvd_client.client import Client
from kvd_client.errors import RequestError
from kvd_client.kvctl.tables import Look

OK, FAILED, USAGE, NO_DAEMON = 0, 1, 2, 3


class BadUsage(Exception):
    """What was given with the command cannot be used."""


class Answer(NamedTuple):
    """What to print, for programs or for people, and the exit code."""

    report: Any
    show: Callable[[Look], str]
    code: int = OK


class Printed(NamedTuple):
    """Everything has been printed already."""

    code: int = OK


def check_model(client: Client, name: str) -> list[dict[str, Any]]:
    """The rows of the models of this name; raises RequestError if there is none."""
    rows = client.status()["models"]
    found = [row for row in rows if row["name"] == name]
    if not found:
        known = sorted({row["name"] for row in rows})
        raise RequestError(
            f"no model is called {name!r}; there "
            + (f"are: {', '.join(known)}" if known else "is none")
        )
    return found
