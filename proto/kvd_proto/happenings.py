"""The kinds of events that a daemon tells of, and what each of them has. How they are asked for:
messages.py; what they mean: PROTOCOL.md.
"""

from enum import StrEnum


class Kind(StrEnum):
    """What has happened."""

    ALLOC = "alloc"
    HIT = "hit"
    RELEASE = "release"
    SEAL = "seal"
    EVICT = "evict"
    PIN = "pin"
    UNPIN = "unpin"
    MODEL = "model"
    MODEL_GONE = "model-gone"
    ADOPTED = "adopted"
    NOT_ADOPTED = "not-adopted"
    DAMAGED = "damaged"
    TIMED_OUT = "timed-out"
    REFUSED = "refused"
    SESSION_OPENED = "session-opened"
    SESSION_REFUSED = "session-refused"
    SESSION_GONE = "session-gone"


FREQUENT = frozenset((Kind.ALLOC, Kind.HIT, Kind.RELEASE, Kind.SEAL, Kind.EVICT))

FIELDS: dict[Kind, tuple[str, ...]] = {
    Kind.ALLOC: (
        *("client", "pid", "context", "seq_id", "generation", "request"),
        *("tokens", "hit_tokens"),
    ),
    Kind.HIT: ("client", "pid", "context", "seq_id", "tokens", "hit_tokens", "blocks"),
    Kind.RELEASE: ("client", "pid", "context", "seq_id", "generation", "tokens", "outcome"),
    Kind.SEAL: ("client", "pid", "start", "tokens", "slot"),
    Kind.EVICT: ("reason", "start", "tokens", "slot"),
    Kind.PIN: ("owner", "tokens", "ttl_seconds"),
    Kind.UNPIN: ("owner", "tokens", "reason"),
    Kind.MODEL: ("client", "pid", "block_tokens", "stride_bytes"),
    Kind.MODEL_GONE: ("blocks",),
    Kind.ADOPTED: ("blocks", "pins"),
    Kind.NOT_ADOPTED: ("reason",),
    Kind.DAMAGED: ("blocks",),
    Kind.TIMED_OUT: ("client", "pid", "context", "seq_id", "generation", "request", "idle_seconds"),
    Kind.REFUSED: ("client", "pid", "code", "message"),
    Kind.SESSION_OPENED: ("client", "pid", "uid", "session", "staging_bytes"),
    Kind.SESSION_REFUSED: ("client", "pid", "uid", "code", "message"),
    Kind.SESSION_GONE: ("client", "pid", "session", "reason", "sequences", "connected_seconds"),
}
"""What is said of each, in this order; besides when, of which tenant and model."""
