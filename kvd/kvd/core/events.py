"""What can happen to the core, and what it asks of the shell. Plain data, both ways.

An effect is carried out by the shell in the order given. Jobs (`Back`, `BackPins`, `Copy`,
`Check`) come back as an event with the same job number. The shell carries out a `Punch` and a
`RemoveArena` before any `Back` or `BackPins` that comes later, which count with what they give
back, and behind every `Check` before them; jobs of several sessions take turns. The core leaves a
slot alone while a job has it, so no order of jobs can hurt it; but what is being checked may go,
and then the check's result means nothing.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

from kvd_proto.errors import KvdError
from kvd_proto.geometry import LayerGeometry

if TYPE_CHECKING:
    from kvd.core.cache import Limits

SessionId = bytes
NO_SLOT = -1

# --- events


class Connected(NamedTuple):
    """A client said hello. The budget is charged with its staging, or `RefuseSession` is
    answered. An `administrator` may see and evict what is other tenants'."""

    session: SessionId
    client: str
    pid: int
    uid: int
    tenant: str
    staging_bytes: int
    administrator: bool = True


class Disconnected(NamedTuple):
    """The session's lifeline ended or its process died, for this `reason`. Also safe for a session
    that never opened."""

    session: SessionId
    reason: str = "closed"


class TurnedAway(NamedTuple):
    """Somebody who is of no tenant, or spoke no hello that makes sense, and so never was a session.
    `client` is what it calls itself, as far as it said."""

    client: str
    pid: int
    uid: int
    error: KvdError


class Requested(NamedTuple):
    """A decoded request. `staging` is the session's staging, read for append only."""

    session: SessionId
    correlation: int
    message: Any
    staging: memoryview | None = None


class Backed(NamedTuple):
    """A `Back` or `BackPins` job ended; with an error it has given no memory."""

    job: int
    error: KvdError | None


class CopyResult(NamedTuple):
    """One block's copy: the checksum of the bytes in the arena, or why they were not accepted."""

    checksum: int
    error: KvdError | None


class Copied(NamedTuple):
    """A `Copy` job ended, with one result for each of its items."""

    job: int
    results: list[CopyResult]


class FoundRecord(NamedTuple):
    """A record of a directory that was found, of a slot whose memory is all there."""

    slot: int
    key: bytes
    parent_key: bytes
    start: int
    tokens: bytes
    generation: int
    checksum: int
    last_use: int


class FoundPin(NamedTuple):
    """A pin of a directory that was found: `owner` keeps the block of this key until `expires`
    (0.0: for ever), in the clock of `now`."""

    place: int
    key: bytes
    owner: str
    expires: float


class ArenaFound(NamedTuple):
    """An arena that an earlier daemon left, before any session is there. `arena` is the number that
    it gets. `has_readers`: clients of that daemon can still read it, until `ReadersGone`.
    `unrecorded` are slots that have memory and no record: what was there may be read still."""

    arena: int
    tenant: str
    name: str
    fingerprint: bytes
    payload_format: str
    block_tokens: int
    layers: tuple[LayerGeometry, ...]
    slots: int
    stride_bytes: int
    has_readers: bool
    records: list[FoundRecord]
    unrecorded: list[int]
    pins: list[FoundPin]


class ReadersGone(NamedTuple):
    """No client of an earlier daemon can read this arena any more."""

    arena: int


class Checked(NamedTuple):
    """A `Check` job ended: for each of its items, whether the slot's bytes have the checksum."""

    job: int
    results: list[bool]


class ArenaFailed(NamedTuple):
    """A `CreateArena` could not be carried out; the shell has told the client."""

    arena: int


class Reconfigured(NamedTuple):
    """Other limits are in effect from now on: see resizing.py."""

    limits: "Limits"


class Ticked(NamedTuple):
    """Time has passed: see `Core.next_deadline`."""


Event = (
    Connected
    | Disconnected
    | TurnedAway
    | Requested
    | Backed
    | Copied
    | Checked
    | ArenaFound
    | ReadersGone
    | ArenaFailed
    | Reconfigured
    | Ticked
)

# --- effects


class Reply(NamedTuple):
    """Answer a request: `body` is a reply message or a KvdError."""

    session: SessionId
    correlation: int
    body: Any


class OpenStaging(NamedTuple):
    """Make the session's staging and welcome it."""

    session: SessionId
    n_bytes: int


class RefuseSession(NamedTuple):
    """Tell a client why it gets no session."""

    session: SessionId
    error: KvdError


class CloseStaging(NamedTuple):
    """No copy reads this session's staging any more: unmap and close it."""

    session: SessionId


class Completed(NamedTuple):
    """Write the session's completed number into its staging's header."""

    session: SessionId
    commit: int


class CreateArena(NamedTuple):
    """Make the segments of a new arena: `slots` sparse slots, its directory, and its index, which
    tells clients `root_key`."""

    arena: int
    tenant: str
    name: str
    fingerprint: bytes
    payload_format: str
    block_tokens: int
    layers: tuple[LayerGeometry, ...]
    payload_bytes: int
    stride_bytes: int
    slots: int
    directory_bytes: int
    root_key: bytes


class RemoveArena(NamedTuple):
    """Nobody uses this arena: all of its segments go, and their memory before any `Back` that
    comes later."""

    arena: int


class ShareArena(NamedTuple):
    """Send read-only descriptors of the arena and its index to the session, before the reply that
    names it."""

    session: SessionId
    arena: int


class Back(NamedTuple):
    """Give slots memory, all or none, and the directory up to `directory_bytes`, with what belongs
    to that of the index; for `session`."""

    job: int
    arena: int
    session: SessionId
    slots: list[int]
    directory_bytes: int


class BackPins(NamedTuple):
    """Give the first `n_bytes` of the directory's pins memory; for `session`."""

    job: int
    arena: int
    session: SessionId
    n_bytes: int


class Punch(NamedTuple):
    """Take the memory of slots that nobody can still read."""

    arena: int
    slots: list[int]


class CopyItem(NamedTuple):
    """Copy `n_bytes` at `offset` of the staging into a slot; the copy must be such a block."""

    slot: int
    offset: int
    n_bytes: int
    start: int
    n_tokens: int


class Copy(NamedTuple):
    """Copy, validate and checksum blocks of one session's staging."""

    job: int
    arena: int
    session: SessionId
    items: list[CopyItem]


class CheckItem(NamedTuple):
    """`n_bytes` of a slot should have this checksum."""

    slot: int
    n_bytes: int
    checksum: int


class Check(NamedTuple):
    """Compare what an earlier daemon left in slots with the checksums of its records."""

    job: int
    arena: int
    items: list[CheckItem]


class BlocksDamaged(NamedTuple):
    """So many adopted blocks did not have their checksum, and are gone with all below them."""

    arena: int
    blocks: int


class ArenaAdopted(NamedTuple):
    """What was found is used on: so many blocks, and of the directory the first
    `directory_bytes`, and of its pins the first `pins_bytes`. Its index is a new one."""

    arena: int
    blocks: int
    directory_bytes: int
    pins_bytes: int
    root_key: bytes


class ArenaRefused(NamedTuple):
    """What was found cannot be used; its segments are to be removed."""

    arena: int
    reason: str


class UseRecord(NamedTuple):
    """A sequence has let go of a block: `last_use` enters its record."""

    arena: int
    slot: int
    last_use: int


class WriteRecord(NamedTuple):
    """A block is sealed: its record enters the directory. It was last used at its `generation`."""

    arena: int
    slot: int
    key: bytes
    parent_key: bytes
    start: int
    tokens: bytes
    generation: int
    checksum: int


class DropRecord(NamedTuple):
    """A block is gone: its record leaves the directory before the slot is used again. If it has an
    `heir`, `last_use` has entered the record of that slot before."""

    arena: int
    slot: int
    heir: int = NO_SLOT
    last_use: int = 0


class WritePin(NamedTuple):
    """A block is pinned: that enters the directory, before it is answered. `place` has memory."""

    arena: int
    place: int
    key: bytes
    owner: str
    expires: float


class RenewPin(NamedTuple):
    """A pin ends at another time."""

    arena: int
    place: int
    expires: float


class DropPin(NamedTuple):
    """A pin has ended: it leaves the directory."""

    arena: int
    place: int


Effect = (
    Reply
    | OpenStaging
    | RefuseSession
    | CloseStaging
    | Completed
    | CreateArena
    | RemoveArena
    | ShareArena
    | Back
    | BackPins
    | Punch
    | Copy
    | Check
    | WriteRecord
    | UseRecord
    | DropRecord
    | WritePin
    | RenewPin
    | DropPin
    | BlocksDamaged
    | ArenaAdopted
    | ArenaRefused
)
