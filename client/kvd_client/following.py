"""The request for events, from what callers have, and what they get. Who asks: client.py, aio.py.

since = None                                  # from now on
while True:
    batch = client.events(since, wait=30)     # at once when there is something
    ...                                       # batch.events, and batch.lost were not kept
    since = batch.next
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from kvd_client.errors import BadMessage
from kvd_client.operations import ClientState, Operation
from kvd_proto.messages import MAX_EVENTS, MAX_FOLLOW_MS, Events, Reported

_FROM_NOW_ON = (1 << 64) - 1
MAX_WAIT = MAX_FOLLOW_MS / 1000


class EventBatch(NamedTuple):
    """`events`, oldest first: maps with number, time, kind, tenant, model, and what the kind has
    (proto/PROTOCOL.md). `next`: where to go on. `lost`: how many before `next` were not kept."""

    events: list[dict[str, Any]]
    next: int
    lost: int


def read_events(
    client: ClientState,
    since: int | None,
    wait: float,
    most: int,
    kinds: Iterable[str],
    model: str,
) -> Operation[EventBatch]:
    """See `client.Client.events`."""
    if not 0 <= wait <= MAX_WAIT:
        raise BadMessage(f"wait is from 0 to {MAX_WAIT:.0f} seconds", got=str(wait))
    number = _FROM_NOW_ON if since is None else since
    message = Events(number, int(wait * 1000), min(most, MAX_EVENTS), list(kinds), model)
    reply: Reported = yield from client.ask(message, wait)
    return EventBatch(**reply.report)
