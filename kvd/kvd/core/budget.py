"""Who may use which bytes: arenas' slots, holds over ancestors, tail-first LRU, making room.

Every slot of an arena is in one of these places:

    fresh      never backed, numbered from `high_water` up
    punched    has been used, or was to be, and has no memory now
    free       backed, holds nothing
    filling    set aside or being written
    active     sealed, and held by a lease on it or on a block below it
    cached     sealed and not held: in the LRU
    retired    holds nothing that is served, but a client of an earlier daemon may still read it;
               counts as filling

What an earlier daemon has left counts as active or cached like the rest, though it is not sealed
before it has been checked.

`unassigned` is what remains of the budget after directories, staging and all backed slots. There is
an LRU for each tenant, for all of its arenas, so memory moves to where it is used. It is ordered by
last use, and because a release appends a block before its parent, a child always comes before its
parent: the head never has resident children, and tail-first eviction takes one step. A tenant at
its quota gives way itself, from its own LRU. If it is the budget that has no room, the oldest head
of all LRUs goes, whosever it is: a comparison for each tenant.

A directory never shrinks. It goes with its arena, when nobody uses that: no session has registered
it, and nothing in it is held. An empty one goes before anything is evicted; one with blocks, when
its tenant has as many models as it may, and registers another.

The records tell this order: a block's place is that of the latest `last_use` of itself and all
below it. So a use is recorded for the deepest block alone, and a block that is dropped leaves its
own to its parent.
"""

from collections.abc import Iterable, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter, itemgetter
from typing import NamedTuple

from kvd.core.events import (
    Back,
    DropRecord,
    Effect,
    Punch,
    RemoveArena,
    SessionId,
    UseRecord,
)
from kvd.core.tenants import Tenant, TenantRule
from kvd.core.tree import FILLING, GONE, NO_SLOT, SEALED, Block
from kvd_proto.errors import AllLeased, BudgetTooSmall, Detail
from kvd_proto.geometry import Geometry, round_up
from kvd_proto.layout import DIRECTORY_HEADER_BYTES, record_bytes
from kvd_proto.payload import PayloadFormat

DIRECTORY_CHUNK = 64 * 1024
"""Directories grow by so much: a few hundred records, so that small arenas stay small."""


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
    ) -> None:
        self.number = number
        self.tenant = tenant
        self.lru = tenant.lru
        self.name = name
        self.fingerprint = fingerprint
        self.geometry = geometry
        self.format = payload_format
        self.block_tokens = block_tokens
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
        self.filling = 0
        self.active = 0
        self.cached = 0
        self.directory_bytes = min(self.directory_limit, round_up(DIRECTORY_HEADER_BYTES))

    @property
    def backed(self) -> int:
        """Slots that have memory."""
        return len(self.free) + self.filling + self.active + self.cached

    @property
    def is_unused(self) -> bool:
        """Whether no session has registered it, and none of its slots is held: all of it may go."""
        return not self.sessions and self.backed == len(self.free) + self.cached

    @property
    def reclaimable(self) -> int:
        """Bytes that may go: of free and cached slots; and if it is unused, of its directory."""
        slots = (len(self.free) + self.cached) * self.stride
        return slots + self.directory_bytes if self.is_unused else slots

    @property
    def directory_limit(self) -> int:
        """The directory's length when every slot has been used."""
        return directory_bytes_for(self.slots, self.block_tokens)

    def directory_for(self, high_water: int) -> int:
        """The directory's backed bytes once slots below `high_water` have been used."""
        wanted = directory_bytes_for(high_water, self.block_tokens)
        if wanted <= self.directory_bytes:
            return self.directory_bytes
        return min(self.directory_limit, round_up(wanted, DIRECTORY_CHUNK))

    def cost_of_fresh(self, n_slots: int) -> int:
        """Bytes of the budget that backing `n_slots` more takes, the directory's growth
        included."""
        beyond = self.high_water + max(0, n_slots - len(self.punched))
        growth = self.directory_for(beyond) - self.directory_bytes
        return n_slots * self.stride + growth


def directory_bytes_for(slots: int, block_tokens: int) -> int:
    """Bytes of a directory that has records for `slots` slots, in whole pages."""
    return round_up(DIRECTORY_HEADER_BYTES + slots * record_bytes(block_tokens))


def places_in(lru: Iterable[Block]) -> dict[Block, int]:
    """When each block of an LRU was used last, by the records of itself and all below it. A walk of
    the whole LRU."""
    places: dict[Block, int] = {}
    for block in sorted(lru, key=lambda block: -block.start):
        places[block] = max([block.last_use, *(places[child] for child in block.children)])
    return places


class SlotsTaken(NamedTuple):
    """Slots set aside as filling; `to_back` of them need memory first (an empty list: none)."""

    slots: list[int]
    to_back: list[int]


class Budget:
    """The bytes of the daemon: makes room, and keeps every running total."""

    def __init__(self, n_bytes: int, rules: Iterable[TenantRule] = ()) -> None:
        self.n_bytes = n_bytes
        self.unassigned = n_bytes
        self.arenas: dict[int, Arena] = {}
        self.tenants = {rule.name: Tenant(rule, n_bytes) for rule in rules}
        self.clock = 0
        """Counts uses of blocks. A sealed block's generation is its first use."""

    def tick(self) -> int:
        """The clock's next moment."""
        self.clock += 1
        return self.clock

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name. One that there are no rules for has no quota and no salt."""
        if name not in self.tenants:
            self.tenants[name] = Tenant(TenantRule(name), self.n_bytes)
        return self.tenants[name]

    @property
    def staging(self) -> int:
        """Bytes of all stagings."""
        return sum(tenant.staging for tenant in self.tenants.values())

    @property
    def evicted_blocks(self) -> int:
        """Blocks dropped for room, or by `evict`, since the start."""
        return sum(tenant.evicted_blocks for tenant in self.tenants.values())

    def oldest_first(self) -> Iterator[Block]:
        """All that is cached; nothing may change meanwhile."""
        uses = merge(*(each.lru.items() for each in self.tenants.values()), key=itemgetter(1))
        return (block for block, _ in uses)

    @property
    def n_cached(self) -> int:
        """How many blocks are cached."""
        return sum(len(each.lru) for each in self.tenants.values())

    @property
    def directories(self) -> int:
        """Bytes of the directories that cannot go, since their arenas are used."""
        used = (arena for arena in self.arenas.values() if not arena.is_unused)
        return sum(arena.directory_bytes for arena in used)

    # --- holds: what a living sequence leases is never evicted

    def hold(self, block: Block) -> None:
        """Keep `block` and all its ancestors. Stops at the first that is held already."""
        node: Block | None = block
        arena = block.arena
        while node is not None and node.parent is not None:
            node.holds += 1
            if node.holds > 1:
                return
            if node.state is not FILLING:
                del arena.lru[node]
                arena.cached -= 1
                arena.active += 1
            node = node.parent

    def unhold(self, block: Block, effects: list[Effect]) -> None:
        """Undo one `hold`. What nobody holds any more becomes the youngest of the LRU, tail first;
        but not an open tail that a longer block has replaced meanwhile: that goes."""
        if block.holds == 1 or block in block.arena.former:
            self.use(block, effects)
        self._let_go(block)
        if block.parent is not None and not block.holds and block.is_superseded:
            self.drop(block, effects)

    def use(self, block: Block, effects: list[Effect]) -> None:
        """A lease on this very block has ended: that enters its record, if it has one, and does not
        say so already (it was sealed just now)."""
        has_record = block.parent is not None and block.state not in (FILLING, GONE)
        if has_record and block.last_use < self.clock:
            self._record_use(block, self.tick(), effects)

    def _record_use(self, block: Block, last_use: int, effects: list[Effect]) -> None:
        block.last_use = last_use
        effects.append(UseRecord(block.arena.number, block.slot, last_use))

    def _let_go(self, block: Block) -> None:
        """Count one `hold` less. What nobody holds any more is cached, and was used now."""
        node: Block | None = block
        arena = block.arena
        while node is not None and node.parent is not None:
            node.holds -= 1
            if node.holds:
                break
            arena.active -= 1
            arena.cached += 1
            arena.lru[node] = self.clock
            node = node.parent

    # --- what an earlier daemon left

    def adopt(self, arena: Arena, blocks: list[Block], retired: list[int]) -> None:
        """Take over an arena with `blocks`, each leased once to whoever may still read it, and with
        `retired` slots."""
        used = {block.slot for block in blocks}.union(retired)
        arena.high_water = max(used, default=-1) + 1
        arena.directory_bytes = arena.directory_for(arena.high_water)
        arena.punched = [slot for slot in range(arena.high_water) if slot not in used]
        arena.active = len(blocks)
        arena.filling = len(retired)
        arena.retired = retired
        arena.former = dict.fromkeys(blocks)
        for block in blocks:
            block.holds = 1 + len(block.children)
        self.spend(arena.tenant, arena.directory_bytes + arena.backed * arena.stride)
        self.arenas[arena.number] = arena
        arena.tenant.arenas.append(arena)

    def readers_gone(self, arena: Arena, effects: list[Effect]) -> None:
        """End the leases of those who could read the arena before this daemon was there. What
        nobody else leases takes the place in the LRU that its last use gives it: a walk of all."""
        former, arena.former = arena.former, {}
        for block in former:
            self._let_go(block)
        places = places_in(arena.lru)
        arena.lru.clear()
        arena.lru.update(sorted(places.items(), key=lambda each: (each[1], -each[0].start)))
        for block in former:
            if not block.holds and block.is_superseded:
                self.drop(block, effects)
        arena.filling -= len(arena.retired)
        arena.free.extend(arena.retired)
        arena.retired.clear()

    def drop_unleased(self, block: Block, effects: list[Effect]) -> None:
        """Forget a block that has no children and that no sequence leases. If a client of an
        earlier daemon may still read it, its slot is set aside until nobody can."""
        arena = block.arena
        is_read = block in arena.former
        if is_read:
            del arena.former[block]
            self._let_go(block)
        self.drop(block, effects)
        if is_read:
            arena.retired.append(arena.free.pop())
            arena.filling += 1

    # --- room

    def charge_staging(self, tenant: Tenant, n_bytes: int, effects: list[Effect]) -> None:
        """Take bytes for a session's staging, evicting if it must; raises ResourceError."""
        self._make_room(tenant, n_bytes, effects)
        self.spend(tenant, n_bytes)
        tenant.staging += n_bytes

    def return_staging(self, tenant: Tenant, n_bytes: int) -> None:
        tenant.staging -= n_bytes
        self.spend(tenant, -n_bytes)

    def charge_directory(self, arena: Arena, effects: list[Effect]) -> None:
        """Take the bytes of a new arena's directory, and make the arena known."""
        self._make_room(arena.tenant, arena.directory_bytes, effects)
        self.spend(arena.tenant, arena.directory_bytes)
        self.arenas[arena.number] = arena
        arena.tenant.arenas.append(arena)

    def forget_arena(self, arena: Arena) -> None:
        """Take an arena out in which nothing is held, with all that is cached in it."""
        del self.arenas[arena.number]
        arena.tenant.arenas.remove(arena)
        for block in arena.root.below():
            del arena.lru[block]
            block.state = GONE
        arena.tenant.evicted_blocks += arena.cached
        self.spend(arena.tenant, -arena.directory_bytes - arena.backed * arena.stride)

    def give_up(self, arena: Arena, effects: list[Effect]) -> None:
        """Forget an arena that is unused, and give its memory back."""
        self.forget_arena(arena)
        effects.append(RemoveArena(arena.number))

    def give_up_oldest(self, tenant: Tenant, effects: list[Effect]) -> None:
        """Give up the tenant's unused arena, if it has one, of which nothing was used for longest;
        first of all those that are empty. A walk of the LRU."""
        unused = [arena for arena in tenant.arenas if arena.is_unused]
        if unused:
            latest = {block.arena: use for block, use in tenant.lru.items()}
            self.give_up(min(unused, key=lambda each: latest.get(each, 0)), effects)

    def spend(self, tenant: Tenant, n_bytes: int) -> None:
        """Bytes that are the tenant's now (negative: given back). Whoever spends has looked whether
        there are so many."""
        self.unassigned -= n_bytes
        tenant.held += n_bytes

    def take(self, arena: Arena, n_slots: int, effects: list[Effect]) -> SlotsTaken:
        """Set `n_slots` aside as filling. All or none: raises OverQuota, BudgetTooSmall or
        AllLeased."""
        self.check_room(arena, n_slots)
        tenant = arena.tenant
        to_back: list[int] = []
        slots: list[int] = []
        while len(slots) < n_slots:
            if arena.free:
                slots.append(arena.free.pop())
                arena.filling += 1
                continue
            # A slot is left: the arena has as many as the whole budget has strides.
            cost = arena.cost_of_fresh(1)
            if cost > tenant.headroom:
                self._give_way(arena, tenant, effects)
            elif cost > self.unassigned:
                self._give_way(arena, None, effects)
            else:
                self.spend(tenant, cost)
                slot = arena.punched.pop() if arena.punched else self._raise_high_water(arena)
                slots.append(slot)
                to_back.append(slot)
                arena.filling += 1
        return SlotsTaken(slots, to_back)

    def give_back(self, arena: Arena, slot: int) -> None:
        """A slot that was set aside and is not needed stays backed, and is free."""
        arena.filling -= 1
        arena.free.append(slot)

    def unback(self, arena: Arena, slots: set[int]) -> None:
        """Slots that were set aside, but the operating system had no memory for them."""
        arena.filling -= len(slots)
        arena.punched.extend(sorted(slots))
        self.spend(arena.tenant, -len(slots) * arena.stride)

    def drop(self, block: Block, effects: list[Effect]) -> None:
        """Forget a cached block, which has no children: its slot is free."""
        assert block.parent is not None
        assert not block.children, "a parent goes after its children"
        del block.arena.lru[block]
        parent = block.parent
        parent.remove(block)
        has_record = parent.parent is not None and parent.state is not FILLING
        if has_record and parent.last_use < block.last_use:
            self._record_use(parent, block.last_use, effects)
        block.state = GONE
        block.arena.cached -= 1
        block.arena.free.append(block.slot)
        effects.append(DropRecord(block.arena.number, block.slot))

    def pop_oldest(self, effects: list[Effect], tenant: Tenant | None = None) -> Block:
        """Evict the least recently used block that has no resident children: the head of the
        tenant's LRU, or the oldest of all heads."""
        if tenant is None:
            tenant = min(
                (each for each in self.tenants.values() if each.lru), key=attrgetter("oldest_use")
            )
        block = next(iter(tenant.lru))  # there is one: check_room counted it
        self.drop(block, effects)
        tenant.evicted_blocks += 1
        return block

    def evict(
        self, name: str, n_blocks: int, effects: list[Effect], tenant: Tenant | None = None
    ) -> int:
        """Drop up to `n_blocks` cached blocks of the models called `name` ("": any), of one tenant
        or (None) of all.

        Oldest first; a walk of the LRU, for the administrator. What is free in these models' arenas
        then goes back to the operating system. Returns how many were dropped.
        """
        arenas = self.arenas.values() if tenant is None else tenant.arenas
        wanted = {arena for arena in arenas if not name or arena.name == name}
        # Whoever names a model without blocks causes no walk.
        n_blocks = min(n_blocks, sum(arena.cached for arena in wanted))
        lru = self.oldest_first() if tenant is None else tenant.lru
        chosen = list(islice((block for block in lru if block.arena in wanted), n_blocks))
        for block in chosen:
            self.drop(block, effects)
            block.arena.tenant.evicted_blocks += 1
        for arena in arenas:
            if arena in wanted:
                self._punch(arena, len(arena.free), effects)
        return len(chosen)

    def back_effect(self, job: int, arena: Arena, session: SessionId, to_back: list[int]) -> Back:
        """The effect that gives `to_back` memory, for `session`."""
        return Back(job, arena.number, session, to_back, arena.directory_bytes)

    def check_room(self, arena: Arena, n_slots: int) -> None:
        """Whether `n_slots` can be had at all, if everything that may go does. Mutates nothing."""
        fresh = n_slots - len(arena.free) - arena.cached
        if fresh <= 0:
            return
        cost = arena.cost_of_fresh(fresh)
        arena.tenant.check_quota(cost, but=arena)
        if cost <= self.unassigned + self._reclaimable(but=arena):
            return
        directories = self.directories - arena.directory_bytes + arena.directory_for(n_slots)
        evidence: dict[str, Detail] = {
            "model": arena.name,
            "blocks": n_slots,
            "stride_bytes": arena.stride,
            "budget_bytes": self.n_bytes,
            "directory_bytes": directories,
            "staging_bytes": self.staging,
            "unassigned_bytes": self.unassigned,
        }
        if n_slots * arena.stride + directories > self.n_bytes:
            raise BudgetTooSmall("so many blocks can never fit the budget", **evidence)
        raise AllLeased("the budget is full and every block in it is in use", **evidence)

    def _make_room(self, tenant: Tenant, n_bytes: int, effects: list[Effect]) -> None:
        """Give memory of free and cached slots back until `tenant` may take `n_bytes`, and they are
        unassigned."""
        tenant.check_quota(n_bytes)
        could = self.unassigned + self._reclaimable()
        if n_bytes > could:
            kind = BudgetTooSmall if n_bytes + self.directories > self.n_bytes else AllLeased
            raise kind(
                "the budget has no room for this",
                asked_bytes=n_bytes,
                budget_bytes=self.n_bytes,
                directory_bytes=self.directories,
                available_bytes=could,
            )
        while n_bytes > tenant.headroom:
            self._give_way(None, tenant, effects)
        while n_bytes > self.unassigned:
            self._give_way(None, None, effects)

    def _reclaimable(self, but: Arena | None = None) -> int:
        """Bytes that may go, whosever they are, those of the arena `but` left out."""
        return sum(arena.reclaimable for arena in self.arenas.values() if arena is not but)

    def _give_way(self, arena: Arena | None, tenant: Tenant | None, effects: list[Effect]) -> None:
        """One step towards room for `arena`, by `tenant` or (None) by all: another arena that is
        empty and unused, or one of its free slots; else the oldest cached block."""
        for other in self.arenas.values() if tenant is None else tenant.arenas:
            if other is arena:
                continue
            if not other.cached and other.is_unused:
                self.give_up(other, effects)
                return
            if other.free:
                self._punch(other, 1, effects)
                return
        self.pop_oldest(effects, tenant)

    def _punch(self, arena: Arena, n_slots: int, effects: list[Effect]) -> None:
        """Give `n_slots` free slots back to the operating system."""
        if not n_slots:
            return
        slots = [arena.free.pop() for _ in range(n_slots)]
        arena.punched.extend(slots)
        self.spend(arena.tenant, -n_slots * arena.stride)
        effects.append(Punch(arena.number, slots))

    @staticmethod
    def _raise_high_water(arena: Arena) -> int:
        slot = arena.high_water
        arena.directory_bytes = arena.directory_for(slot + 1)
        arena.high_water += 1
        return slot
