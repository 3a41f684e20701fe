"""Every operation's request and reply: their fields in wire order, types and limits.

A message is a NamedTuple: its fields are the wire's array, in order. `Annotated` carries the check
that `codec.py` runs once, at the border, so whoever holds a message may trust its types and
ranges. What depends on state (is this handle mine?) is the core's to answer. `bytes` fields that
hold integers are packed little-endian: tokens and slots u32, staged offsets u64.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from kvd_proto.checks import Ascii, Blob, Evidence, Int, Items, Packed, Row, Table, Text
from kvd_proto.errors import Detail
from kvd_proto.geometry import LAYERS
from kvd_proto.keys import FINGERPRINT_BYTES, TOKEN_BYTES
from kvd_proto.layout import MAX_OWNER

MAX_TOKENS = 1 << 20
"""Tokens of one sequence: more than any model's context, and 4 MiB on the wire."""
MAX_BLOCK_TOKENS = 1024
MAX_APPEND_BLOCKS = 256
"""Each costs the daemon's loop 4 to 8 us, and everybody waits meanwhile."""
MAX_SEQ_IDS = 255
"""LLAMA_MAX_SEQ is 256, and one id of each context is scratch."""
MAX_WAIT_MS = 24 * 3600 * 1000
MAX_TTL_MS = 366 * MAX_WAIT_MS
"""Of a pin that ends by itself."""
MAX_TRAITS = 64
MAX_TRAIT_NAME = 40
MAX_TRAIT_TEXT = 200
"""What a client may tell people of a model's fingerprint: fields, and letters of each."""
MAX_FAILURES = 1000
"""A session that never flushes is told of so many failed commits, the latest ones."""
MAX_EVENTS = 500
"""In one answer: the daemon makes them in about a millisecond."""
MAX_FOLLOW_MS = 60_000
"""A request for events is answered after so long, with none if there are none."""
MAX_ERROR_TEXT = 2000
MAX_DETAILS = 32
MAX_DETAIL_NAME = 40
MAX_DETAIL_TEXT = 200
"""An error, in letters and entries. So it always fits a datagram of the lifeline, too."""

U32 = Annotated[int, Int(0, (1 << 32) - 1)]
U64 = Annotated[int, Int(0, (1 << 64) - 1)]
Milliseconds = Annotated[int, Int(0, MAX_WAIT_MS)]
SeqId = Annotated[int, Int(0, MAX_SEQ_IDS - 1)]
Name = Annotated[str, Text(1, 200)]
OptionalName = Annotated[str, Text(0, 200)]
Owner = Annotated[str, Ascii(1, MAX_OWNER)]
Tokens = Annotated[bytes, Packed(TOKEN_BYTES, 0, MAX_TOKENS)]
SomeTokens = Annotated[bytes, Packed(TOKEN_BYTES, 1, MAX_TOKENS)]
Slots = Annotated[bytes, Packed(4, 0, MAX_TOKENS)]
Offsets = Annotated[bytes, Packed(8, 0, MAX_APPEND_BLOCKS)]
Fingerprint = Annotated[bytes, Blob(FINGERPRINT_BYTES)]
Digest16 = Annotated[bytes, Blob(16)]
Layers = Annotated[list[Any], LAYERS]
SeqIds = Annotated[list[int], Items(0, MAX_SEQ_IDS, Int(0, MAX_SEQ_IDS - 1))]
Generations = Annotated[list[int], Items(0, MAX_SEQ_IDS, Int(0, (1 << 64) - 1))]
Flag = Annotated[int, Int(0, 1)]
Traits = Annotated[
    Sequence[Any], Items(0, MAX_TRAITS, Row((Text(1, MAX_TRAIT_NAME), Text(0, MAX_TRAIT_TEXT))))
]
ErrorText = Annotated[str, Text(0, MAX_ERROR_TEXT)]
Details = Annotated[dict[str, Detail], Evidence(MAX_DETAILS)]
Failures = Annotated[
    list[Any],
    Items(0, MAX_FAILURES, Row((Int(1, (1 << 64) - 1), Text(1, 200), Text(0, MAX_ERROR_TEXT)))),
]
Report = Annotated[dict[str, Any], Table()]

COMPLETED, FAILED = 0, 1
"""How a released sequence ended, by its owner's word."""

Message = tuple[Any, ...]
"""A request or reply: a NamedTuple of this module, so that it packs as an array of its fields."""


class Done(NamedTuple):
    """The reply of operations that have nothing to tell but success."""


class Ping(NamedTuple):
    """Is the serving loop alive?"""


class Pong(NamedTuple):
    version: Name
    instance: Name
    pid: U32
    uptime_ms: U64


class RegisterModel(NamedTuple):
    """Make the arena of (tenant, model) exist, or find it. Idempotent.

    `traits`: [name, text] rows that say in words what the fingerprint is made of. For people, who
    ask why another model's blocks are not theirs; nothing rests on them.
    """

    name: Name
    fingerprint: Fingerprint
    payload_format: Name
    block_tokens: Annotated[int, Int(1, MAX_BLOCK_TOKENS)]
    layers: Layers
    traits: Traits = ()


class ModelRegistered(NamedTuple):
    """`segment` names the arena's descriptor, which arrives over the lifeline."""

    model: U32
    segment: U32
    payload_bytes: U64
    stride_bytes: U64
    slots: U32


class OpenContext(NamedTuple):
    """Open a context with sequence ids 0 .. n_seq_max-1.

    `busy` lists ids that are in use already (a worker that went on without a daemon): each becomes
    a sequence without blocks, whose generation the reply tells in the same order.
    """

    model: U32
    n_seq_max: Annotated[int, Int(1, MAX_SEQ_IDS)]
    busy: SeqIds


class ContextOpened(NamedTuple):
    context: U64
    generations: Generations


class CloseContext(NamedTuple):
    """Give back a context and all of its sequences."""

    context: U64


class Alloc(NamedTuple):
    """Take a sequence id, match the cached prefix of `tokens`, and lease what matched.

    `reserve_tokens` > 0 sets aside room for so many tokens after the last full matched block.
    `wait_ms` is how long to wait for an id, first come first served; 0 asks for an answer at once.
    `idle_timeout_ms` > 0: after so long without a request for it, the sequence is TIMED_OUT.
    `use` 0: nothing is matched, whatever is cached. `store` 0: the sequence takes no appends.
    """

    context: U64
    request: OptionalName
    tokens: Tokens
    reserve_tokens: Annotated[int, Int(0, MAX_TOKENS)]
    wait_ms: Milliseconds
    idle_timeout_ms: Milliseconds
    use: Flag = 1
    store: Flag = 1


class Allocated(NamedTuple):
    """The handle, and the blocks that cover the first `matched_tokens` tokens, in order.

    All blocks are full but the last, which holds `last_block_tokens` tokens, of which the last few
    may go beyond the match (they are another continuation's). No block: 0 and 0.
    """

    seq_id: SeqId
    generation: U64
    matched_tokens: U32
    last_block_tokens: U32
    slots: Slots


class Append(NamedTuple):
    """Reserve and commit blocks: `tokens` from position `start`, payloads at `staged` offsets.

    `start` is where the sequence's full blocks end. One offset for each block of block_tokens
    tokens, the last block may be shorter; a later append replaces such an open tail, from the same
    start.
    """

    context: U64
    seq_id: SeqId
    generation: U64
    start: U32
    tokens: Tokens
    staged: Offsets


class Appended(NamedTuple):
    """The staging is free again when the session's completed number has reached `commit`.

    stored, present, joined: blocks that are copied, that were already there, and that another
    session is storing at this moment (this copy stands by until that one is sealed).
    """

    commit: U64
    stored: U32
    present: U32
    joined: U32


class Get(NamedTuple):
    """The sequence's sealed blocks from block number `first_block` on."""

    context: U64
    seq_id: SeqId
    generation: U64
    first_block: U32


class Blocks(NamedTuple):
    """`sealed_tokens` of the sequence are in the arena; `slots` start at the block asked for."""

    sealed_tokens: U32
    last_block_tokens: U32
    slots: Slots


class Release(NamedTuple):
    """The owner has removed the sequence's K/V: the id returns to its pool, the leases end."""

    context: U64
    seq_id: SeqId
    generation: U64
    outcome: Annotated[int, Int(COMPLETED, FAILED)]


class KeepAlive(NamedTuple):
    """The owner still works with these sequences: their idle time begins anew.

    `generations` belong to `seq_ids`, in the same order. None at all: every sequence of the
    context.
    """

    context: U64
    seq_ids: SeqIds
    generations: Generations


class KeptAlive(NamedTuple):
    """`timed_out`: those of them that had timed out already, and stay so."""

    timed_out: SeqIds


class Flush(NamedTuple):
    """Answered when every commit of this session up to and including `commit` is finished."""

    commit: U64


class Flushed(NamedTuple):
    """`failures`: [commit, code, message] of commits that did not become visible, told once."""

    completed: U64
    failures: Failures


class Status(NamedTuple):
    """Totals, see the design of `kvctl status --json`."""


class ListSequences(NamedTuple):
    """Every open or waiting sequence."""


class ListClients(NamedTuple):
    """Every session and what it holds."""


class Verify(NamedTuple):
    """Recount from the directory and the operating system. With `checksums` (1) every block's bytes
    are compared with their checksum, too."""

    checksums: Annotated[int, Int(0, 1)] = 0


class Reported(NamedTuple):
    """A table for people and scripts; its keys are in PROTOCOL.md."""

    report: Report


class Evict(NamedTuple):
    """Drop cached blocks that nobody leases, oldest first.

    `model` "" means every model; `blocks` 0 means as many as there are. `tenant` "" means all that
    the session may evict, and otherwise that one's.
    """

    model: OptionalName
    blocks: U32
    tenant: OptionalName = ""


class Evicted(NamedTuple):
    blocks: U32
    freed_bytes: U64


class Pin(NamedTuple):
    """Keep the cached prefix of `tokens` from eviction, in the name of `owner`, for `ttl_ms` (0:
    until it is unpinned). `model` is the arena fingerprint (keys.py): no registration is needed.

    A pin is no session's: it stays when whoever made it has gone, and when the daemon is restarted.
    Another one of the same owner and prefix replaces `ttl_ms`.
    """

    model: Fingerprint
    tokens: Tokens
    owner: Owner
    ttl_ms: Annotated[int, Int(0, MAX_TTL_MS)]


class Pinned(NamedTuple):
    """So many of the tokens are cached, exact to the token, and stay. 0: nothing is pinned."""

    tokens: U32


class Unpin(NamedTuple):
    """End the pins of `owner` on models called `model` ("": all)."""

    owner: Owner
    model: OptionalName


class Unpinned(NamedTuple):
    pins: U32


class ListPins(NamedTuple):
    """Every pin."""


class Config(NamedTuple):
    """Every setting that is in effect, and where it comes from."""


class Reload(NamedTuple):
    """Read the configuration again, and let what can change be in effect."""


class Explain(NamedTuple):
    """What of `tokens` is cached, and why not the rest. `model` is the arena fingerprint.

    `tenant` "" is the session's own; to ask for another is the administrator's. `traits` as in
    RegisterModel, for a model that is not registered. Leases nothing and is no use of anything.
    """

    model: Fingerprint
    tokens: Tokens
    tenant: OptionalName
    traits: Traits


class Forget(NamedTuple):
    """Drop what is cached of `tokens` and all that goes on from them; what is before them only as
    far as nothing else goes on from it. `model` and `tenant` as in Explain."""

    model: Fingerprint
    tokens: SomeTokens
    tenant: OptionalName


class Forgotten(NamedTuple):
    """`tokens` of them were cached; so many blocks are gone, and so many were kept, because they
    are leased or pinned."""

    tokens: U32
    blocks: U32
    kept: U32
    freed_bytes: U64


class Events(NamedTuple):
    """What has happened, from event number `since` on; 2^64 - 1: from now on.

    At most `most` events. `kinds` and `model` choose among them; empty ones take all. If there are
    none yet, the answer waits for one, up to `wait_ms`. Frequent kinds are noted only while
    somebody asks, and for some seconds after that.
    """

    since: U64
    wait_ms: Annotated[int, Int(0, MAX_FOLLOW_MS)]
    most: Annotated[int, Int(1, MAX_EVENTS)]
    kinds: Annotated[list[str], Items(0, 32, Text(1, 40))]
    model: OptionalName


class Operation(NamedTuple):
    """A row of the table of operations."""

    code: int
    request: type[Any]
    reply: type[Any]


OPERATIONS: tuple[Operation, ...] = (
    Operation(1, Ping, Pong),
    Operation(2, RegisterModel, ModelRegistered),
    Operation(3, OpenContext, ContextOpened),
    Operation(4, CloseContext, Done),
    Operation(5, Alloc, Allocated),
    Operation(6, Append, Appended),
    Operation(7, Get, Blocks),
    Operation(8, Release, Done),
    Operation(9, Flush, Flushed),
    Operation(10, Status, Reported),
    Operation(11, ListSequences, Reported),
    Operation(12, ListClients, Reported),
    Operation(13, Verify, Reported),
    Operation(14, Evict, Evicted),
    Operation(15, KeepAlive, KeptAlive),
    Operation(16, Pin, Pinned),
    Operation(17, Unpin, Unpinned),
    Operation(18, ListPins, Reported),
    Operation(19, Config, Reported),
    Operation(20, Reload, Reported),
    Operation(21, Explain, Reported),
    Operation(22, Forget, Forgotten),
    Operation(23, Events, Reported),
)

REPLY_OF: Mapping[type[Any], type[Any]] = {op.request: op.reply for op in OPERATIONS}


class ErrorReply(NamedTuple):
    """The reply of any operation that failed: an error of errors.py."""

    code: Name
    message: ErrorText
    details: Details


# Datagrams of the lifeline: [kind, fields...]; descriptors ride along as SCM_RIGHTS.


class Hello(NamedTuple):
    """Client to daemon, first: who asks, in which version, with how much staging."""

    version: U32
    client: Name
    staging_bytes: U64


class Welcome(NamedTuple):
    """Daemon to client: the session. One descriptor, the staging, comes along if staging_bytes > 0.

    `session` is the routing id that the client's DEALER must use; `epoch` is new at each start of
    the daemon.
    """

    version: U32
    session: Digest16
    epoch: Digest16
    instance: Name
    staging_bytes: U64


class SegmentShared(NamedTuple):
    """Daemon to client, at any time: the read-only descriptor of an arena comes along."""

    segment: U32
    size: U64


class Refused(NamedTuple):
    """Daemon to client instead of Welcome: an error of errors.py; the lifeline closes."""

    code: Name
    message: ErrorText
    details: Details


DATAGRAMS: tuple[tuple[int, type[Any]], ...] = (
    (1, Hello),
    (2, Welcome),
    (3, SegmentShared),
    (4, Refused),
)
