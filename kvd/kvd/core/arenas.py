"""The slots and the prefix tree of one (tenant, model).

Every slot of an arena is in one of these places:

    fresh      never backed, numbered from `high_water` up
    punched    has been used, or was to be, and has no memory now
    free       backed, holds nothing
    filling    set aside or being written
    active     sealed, and held by a lease on it or on a block below it
    pinned     sealed and not held, but kept by a pin on it or on a block below it
    cached     sealed, neither held nor kept: in the LRU
    retired    holds nothing that is served, but a client of an earlier daemon may still read it;
               counts as filling

What an earlier daemon has left counts as active, pinned or cached like the rest, though it is not
sealed before it has been checked.

Who holds a slot and makes room for it: budget.py.
"""

from kvd.core.events import NO_SLOT
from kvd.core.eviction import LRU, Policy
from kvd.core.pins import PinTable
from kvd.core.shares import ModelShare
from kvd.core.tenants import Tenant
from kvd.core.tree import SEALED, Block
from kvd_proto import index
from kvd_proto.geometry import Geometry, round_up
from kvd_proto.keys import TOKEN_BYTES
from kvd_proto.layout import directory_growth
from kvd_proto.payload import PayloadFormat


class Arena:
    """The slots and the prefix tree of one (tenant, model)."""

    def __init__(
        self,
        number: int,
        tenant: Tenant,
        name: str,
        fingerprint: bytes,
        geometry: Geometry,
        payload_format: PayloadFormat,
        block_tokens: int,
        slots: int,
        root_key: bytes,
        model: ModelShare | None = None,
    ) -> None:
        self.number = number
        self.tenant = tenant
        self.model = model
        """If there is a rule for it."""
        self.share = model.share if model is not None and model.share.minimum else tenant.share
        # What goes for one reason, and not for another, has an order of its own.
        self.evictable: Policy = tenant.evictable if model is None else LRU()
        self.name = name
        self.fingerprint = fingerprint
        self.geometry = geometry
        self.format = payload_format
        self.block_tokens = block_tokens
        self.token_bytes = block_tokens * TOKEN_BYTES
        """Of the tokens of a full block."""
        self.payload_bytes = payload_format.max_bytes
        self.stride = round_up(payload_format.max_bytes)
        self.slots = slots
        self.root = Block(self, None, b"", root_key, NO_SLOT)
        self.root.state = SEALED
        self.high_water = 0
        self.punched: list[int] = []
        self.free: list[int] = []
        self.retired: list[int] = []
        self.sessions = 0
        """So many have registered it."""
        self.former: dict[Block, None] = {}
        """What clients of an earlier daemon may still read: it is leased to them until they are
        gone."""
        self.blocks: list[Block | None] = []
        """By slot below `high_water`: the block that is there or will be; also one that is gone, as
        long as a job has its slot."""
        self.unchecked = 0
        """Blocks that an earlier daemon left, and that are not served before they are checked."""
        self.traits: dict[str, str] = {}
        """What somebody has told of its fingerprint, for people."""
        self.pins = PinTable()
        self.filling = 0
        self.filling_blocks = 0
        """Of these: what is set aside is none."""
        self.filling_tokens = 0
        """Theirs."""
        self.active = 0
        self.pinned = 0
        self.cached = 0
        # Tokens that the blocks in each of these states lack to be full. Only the last block of a
        # sequence does, so a walk over many blocks counts them for one.
        self.active_lacks = 0
        self.pinned_lacks = 0
        self.cached_lacks = 0
        self.directory_bytes = index.memory_beside(0, slots, block_tokens)
        """Of the directory and the index, without pins."""

    @property
    def backed(self) -> int:
        """Slots that have memory."""
        return len(self.free) + self.filling + self.active + self.pinned + self.cached

    @property
    def slots_left(self) -> int:
        """Slots that could be given memory still, if there is any."""
        return self.slots - self.high_water + len(self.punched)

    @property
    def memory_beside(self) -> int:
        """Bytes of the directory, its pins included, and of the index."""
        return self.directory_bytes + self.pins.n_bytes

    @property
    def records_bytes(self) -> int:
        """Of these, what the header and the records of the directory take."""
        return directory_growth(self.high_water, self.slots, self.block_tokens)

    def lack_of(self, block: Block) -> int:
        """How many tokens a block lacks to be full."""
        return self.block_tokens - block.n_tokens

    @property
    def is_unused(self) -> bool:
        """Whether no session has registered it, and none of its slots is held or pinned: all of it
        may go."""
        return not self.sessions and self.backed == len(self.free) + self.cached

    @property
    def reclaimable(self) -> int:
        """Bytes that may go: of free and cached slots; and if it is unused, of its directory."""
        slots = (len(self.free) + self.cached) * self.stride
        return slots + self.memory_beside if self.is_unused else slots

    @property
    def directory_limit(self) -> int:
        """Bytes of directory and index when every slot has been used."""
        return index.memory_beside(self.slots, self.slots, self.block_tokens)

    def directory_for(self, high_water: int) -> int:
        """Their backed bytes once slots below `high_water` have been used."""
        wanted = index.memory_beside(high_water, self.slots, self.block_tokens)
        return max(wanted, self.directory_bytes)

    def cost_of_fresh(self, n_slots: int) -> int:
        """Bytes of the budget that backing `n_slots` more takes, the growth of directory and index
        included."""
        beyond = self.high_water + max(0, n_slots - len(self.punched))
        growth = self.directory_for(beyond) - self.directory_bytes
        return n_slots * self.stride + growth
