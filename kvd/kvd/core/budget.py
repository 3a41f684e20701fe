"""Who may use which bytes: tail-first LRU, making room, and every running total.

The places in which a slot can be: arenas.py. What keeps a block from eviction: holds.py.

`unassigned` is what remains of the budget after directories, staging and all backed slots. There is
an LRU (eviction.py) for each tenant, for all of its arenas, so memory moves to where it is used. It
is ordered by last use, and because a release lists a block before its parent, a child always comes
before its parent: the head never has resident children, and tail-first eviction takes one step. A
tenant at its quota gives way itself, from its own LRU. If it is the budget that has no room, the
oldest head of all LRUs goes, whosever it is: a comparison for each tenant.

A directory never shrinks. It goes with its arena, when nobody uses that: no session has registered
it, and nothing in it is held or pinned. An empty one goes before anything is evicted; one with
blocks, when its tenant has as many models as it may, and registers another.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from kvd.core.ages import SAMPLED
from kvd.core.arenas import Arena
from kvd.core.dropping import Dropping
from kvd.core.events import (
    Back,
    Effect,
    Punch,
    RemoveArena,
    SessionId,
)
from kvd.core.eviction import Policy, arrange_by_records
from kvd.core.holds import WALK_BLOCKS
from kvd.core.pins import pins_bytes_for
from kvd.core.reasons import Reason
from kvd.core.shares import ModelRule, ModelShare, Share, may_lose, reclaimable
from kvd.core.tenants import Tenant, TenantRule
from kvd.core.tree import GONE, Block
from kvd_proto.errors import AllLeased, BudgetTooSmall, Detail, ResourceError
from kvd_proto.happenings import Kind


def _oldest_first(policies: Iterable[Policy]) -> Iterator[Block]:
    return merge(*policies, key=attrgetter("used"))


class SlotsTaken(NamedTuple):
    """Slots set aside as filling; `to_back` of them need memory first (an empty list: none)."""

    slots: list[int]
    to_back: list[int]


class Budget(Dropping):
    """The bytes of the daemon: makes room, and keeps every running total."""

    reason = Reason.ROOM
    """Why a block goes, if it does for want of what there is here."""

    def __init__(
        self,
        n_bytes: int,
        rules: Iterable[TenantRule] = (),
        models: Iterable[ModelRule] = (),
    ) -> None:
        super().__init__()
        self.n_bytes = n_bytes
        self.unassigned = n_bytes
        self.wanted = n_bytes
        """What the configuration says. `n_bytes` is more as long as more is held: resizing.py."""
        self.is_over = False
        """Whether it, or a quota, is more than it is to be."""
        self.arenas: dict[int, Arena] = {}
        self.tenants = {rule.name: Tenant(rule, n_bytes) for rule in rules}
        self.models = {rule.name: ModelShare(rule) for rule in models}
        """Those that there are rules for."""
        self.promised = sum(share.minimum for share in self.shares)
        """Of `unassigned`: what is missing of all minima."""
        self._given_back: dict[int, list[int]] = {}
        """By arena: slots that have given way, and are punched with the last of them."""
        self._policies: list[Policy] | None = None
        """None: to be made anew, for tenants or arenas have come or gone."""

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name. One that there are no rules for has no quota and no salt."""
        if name not in self.tenants:
            self.tenants[name] = Tenant(TenantRule(name), self.n_bytes)
            self._policies = None
        return self.tenants[name]

    @property
    def shares(self) -> list[Share]:
        """All that there are minima for, or may be."""
        of_tenants = [each.share for each in self.tenants.values()]
        return of_tenants + [each.share for each in self.models.values()]

    def available(self, share: Share) -> int:
        """Bytes that this one may take, and nothing has to go."""
        return self.unassigned - self.promised + share.promised

    @property
    def policies(self) -> list[Policy]:
        """The orders of eviction of all tenants, and of models that there are rules for."""
        if self._policies is None:
            self._policies = [tenant.evictable for tenant in self.tenants.values()]
            for model in self.models.values():
                self._policies += model.policies
        return self._policies

    @property
    def staging(self) -> int:
        """Bytes of all stagings."""
        return sum(tenant.staging for tenant in self.tenants.values())

    def oldest_first(self) -> Iterator[Block]:
        """All that is cached; nothing may change meanwhile."""
        return _oldest_first(self.policies)

    @property
    def directories(self) -> int:
        """Bytes of the directories that cannot go, since their arenas are used."""
        used = (arena for arena in self.arenas.values() if not arena.is_unused)
        return sum(arena.memory_beside for arena in used)

    # --- what an earlier daemon left

    def adopt(self, arena: Arena, blocks: list[Block], retired: list[int]) -> None:
        """Take over an arena with `blocks`, each leased once to whoever may still read it, and with
        `retired` slots."""
        used = {block.slot for block in blocks}.union(retired)
        arena.high_water = max(used, default=-1) + 1
        arena.directory_bytes = arena.directory_for(arena.high_water)
        arena.punched = [slot for slot in range(arena.high_water) if slot not in used]
        arena.active = len(blocks)
        arena.active_lacks = sum(arena.lack_of(block) for block in blocks)
        arena.filling = len(retired)
        arena.retired = retired
        arena.former = dict.fromkeys(blocks)
        arena.unchecked = len(blocks)
        arena.blocks = [None] * arena.high_water
        for block in blocks:
            block.holds = 1 + len(block.children)
            arena.blocks[block.slot] = block
        self._enter(arena)
        self.spend(arena.tenant, arena.memory_beside + arena.backed * arena.stride, arena)

    def readers_gone(self, arena: Arena, effects: list[Effect]) -> None:
        """End the leases of those who could read the arena before this daemon was there. What
        nobody else leases takes the place in the LRU that its last use gives it: a walk of all."""
        former, arena.former = arena.former, {}
        for block in former:
            self._let_go(block, arena.backed)
        arrange_by_records(arena.evictable)
        for block in former:
            if len(block.tokens) < arena.token_bytes:  # a full one has no longer sibling
                self._drop_superseded(block, effects)
        arena.filling -= len(arena.retired)
        arena.free.extend(arena.retired)
        arena.retired.clear()

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
        self._make_room(arena.tenant, arena.directory_bytes, effects, arena)
        self._enter(arena)
        self.spend(arena.tenant, arena.directory_bytes, arena)

    def _enter(self, arena: Arena) -> None:
        self.arenas[arena.number] = arena
        arena.tenant.arenas.append(arena)
        if arena.model is not None:
            arena.model.arenas.append(arena)
            self._policies = None

    def charge_pins(self, arena: Arena, effects: list[Effect]) -> None:
        """Take the bytes for one more pin in the arena's directory, unless it has them already;
        raises ResourceError."""
        table = arena.pins
        growth = pins_bytes_for(table.high_water + 1) - table.n_bytes
        if growth > 0:
            self._make_room(arena.tenant, growth, effects, arena)
            self.spend(arena.tenant, growth, arena)
            table.n_bytes += growth

    def forget_arena(self, arena: Arena) -> None:
        """Take an arena out in which nothing is held, with all that is cached in it."""
        del self.arenas[arena.number]
        arena.tenant.arenas.remove(arena)
        if arena.model is not None:
            arena.model.arenas.remove(arena)
            self._policies = None
        for block in arena.root.below():
            assert block.parent is not None
            evictions = self.evictions
            self.evictions = evictions + 1
            if not evictions % SAMPLED:
                self.ages.evicted(block, block.used)
            arena.evictable.remove(block, block.parent)
            block.state = GONE
        if arena.cached:
            arena.tenant.ghosts.note_arena(arena.fingerprint, self.journal.now, arena.cached)
        self.journal.note(Kind.MODEL_GONE, arena.tenant.name, arena.name, arena.cached)
        self.spend(arena.tenant, -arena.memory_beside - arena.backed * arena.stride, arena)

    def give_up(self, arena: Arena, effects: list[Effect]) -> None:
        """Forget an arena that is unused, and give its memory back."""
        self.forget_arena(arena)
        effects.append(RemoveArena(arena.number))

    def give_up_oldest(self, tenant: Tenant, effects: list[Effect]) -> None:
        """Give up the tenant's unused arena, if it has one, of which nothing was used for longest;
        first of all those that are empty. Not of a model with a minimum. A walk of the LRU."""
        may_go = [arena for arena in tenant.arenas if arena.share is tenant.share]
        unused = [arena for arena in may_go if arena.is_unused]
        if unused:
            latest = {block.arena: block.used for each in tenant.policies for block in each}
            self.give_up(min(unused, key=lambda each: latest.get(each, 0)), effects)

    def spend(self, tenant: Tenant, n_bytes: int, arena: Arena | None = None) -> None:
        """Bytes that are the tenant's now (negative: given back), in `arena` or, if it is None, in
        a staging. Whoever spends has looked whether there are so many."""
        self.unassigned -= n_bytes
        tenant.held += n_bytes
        share = tenant.share
        if arena is not None:
            share = arena.share
            if arena.model is not None:
                arena.model.held += n_bytes
        if share.minimum:
            self.promised -= share.promised
            share.held += n_bytes
            self.promised += share.promised
        else:
            share.held += n_bytes

    def take(self, arena: Arena, n_slots: int, effects: list[Effect]) -> SlotsTaken:
        """Set `n_slots` aside as filling. All or none: raises OverQuota, BudgetTooSmall or
        AllLeased."""
        self._find_room(lambda: self.check_room(arena, n_slots), effects)
        tenant, model, share, free = arena.tenant, arena.model, arena.share, arena.free
        to_back: list[int] = []
        slots: list[int] = []
        while len(slots) < n_slots:
            if free:
                slots.append(free.pop())
                arena.filling += 1
                continue
            if not arena.slots_left:
                self._drop_own(arena, effects)
                continue
            cost = arena.cost_of_fresh(1)
            if cost > tenant.headroom:
                self._give_way(arena, tenant, share, effects, n_slots - len(slots))
            elif model is not None and cost > model.headroom:
                self._give_way(arena, model, share, effects, n_slots - len(slots))
            elif cost > self.available(share):
                self._give_way(arena, self, share, effects, n_slots - len(slots))
            else:
                self.spend(tenant, cost, arena)
                slot = arena.punched.pop() if arena.punched else self._raise_high_water(arena)
                slots.append(slot)
                to_back.append(slot)
                arena.filling += 1
        self._punch_given_back(effects)
        return SlotsTaken(slots, to_back)

    def give_back(self, arena: Arena, slot: int) -> None:
        """A slot that was set aside and is not needed stays backed, and is free."""
        arena.filling -= 1
        arena.free.append(slot)
        arena.blocks[slot] = None

    def unback(self, arena: Arena, slots: set[int]) -> None:
        """Slots that were set aside, but the operating system had no memory for them."""
        arena.filling -= len(slots)
        arena.punched.extend(sorted(slots))
        for slot in slots:
            arena.blocks[slot] = None
        self.spend(arena.tenant, -len(slots) * arena.stride, arena)

    def drop_some(self, arena: Arena, blocks: Iterable[Block], effects: list[Effect]) -> int:
        """Drop these blocks of an arena, children first, as somebody asked for, and give their
        memory back; but what is gone already, is kept, or has children by now. Returns how many."""
        n_dropped = 0
        for block in blocks:
            if block.state is not GONE and not block.is_kept and not block.children:
                self.drop(block, Reason.COMMAND, effects)
                n_dropped += 1
        self._punch(arena, n_dropped, effects)
        return n_dropped

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
        order = _oldest_first((self if tenant is None else tenant).policies)
        chosen = list(islice((block for block in order if block.arena in wanted), n_blocks))
        for block in chosen:
            self.drop(block, Reason.COMMAND, effects)
        for arena in arenas:
            if arena in wanted:
                self._punch(arena, len(arena.free), effects)
        return len(chosen)

    def back_effect(self, job: int, arena: Arena, session: SessionId, to_back: list[int]) -> Back:
        """The effect that gives `to_back` memory, for `session`."""
        return Back(job, arena.number, session, to_back, arena.records_bytes)

    def check_room(self, arena: Arena, n_slots: int) -> None:
        """Whether `n_slots` can be had at all, if everything that may go does. Mutates nothing."""
        fresh = n_slots - len(arena.free) - arena.cached
        if fresh <= 0:
            return
        cost = arena.cost_of_fresh(fresh)
        share = arena.share
        arena.tenant.check_quota(cost, share, but=arena)
        if arena.model is not None:
            arena.model.check_cap(cost, share, but=arena)
        could = self.available(share) + reclaimable(self.arenas.values(), share, but=arena)
        if cost <= could and fresh <= arena.slots_left:
            return
        minima = sum(each.minimum for each in self.shares if each is not share)
        own = arena.directory_for(n_slots)
        directories = self.directories - arena.directory_bytes
        evidence: dict[str, Detail] = {
            "model": arena.name,
            "blocks": n_slots,
            "stride_bytes": arena.stride,
            "budget_bytes": self.n_bytes,
            "directory_bytes": directories + own,
            "staging_bytes": self.staging,
            "pinned_bytes": sum(each.pinned * each.stride for each in self.arenas.values()),
            "unassigned_bytes": self.unassigned,
            "minima_bytes": minima,
            "slots": arena.slots,
        }
        # What others are promised has room for their directories.
        needed = n_slots * arena.stride + own + max(directories, minima)
        if needed > self.n_bytes or n_slots > arena.slots:
            raise BudgetTooSmall("so many blocks can never fit the budget", **evidence)
        raise AllLeased("the budget is full and every block in it is in use", **evidence)

    def _make_room(
        self, tenant: Tenant, n_bytes: int, effects: list[Effect], arena: Arena | None = None
    ) -> None:
        """Give memory of free and cached slots back until `tenant` may take `n_bytes`, for `arena`
        or (None) for a staging."""
        share = tenant.share if arena is None else arena.share
        model = None if arena is None else arena.model
        self._find_room(lambda: self._check_bytes(tenant, n_bytes, share, model), effects)
        while n_bytes > tenant.headroom:
            self._give_way(None, tenant, share, effects)
        while model is not None and n_bytes > model.headroom:
            self._give_way(None, model, share, effects)
        while n_bytes > self.available(share):
            self._give_way(None, self, share, effects)
        self._punch_given_back(effects)

    def _find_room(self, check: Callable[[], None], effects: list[Effect]) -> None:
        """Let `check` raise ResourceError, but not for want of what is being let go."""
        while self.letting_go:
            try:
                check()
            except ResourceError:
                self.allowance = WALK_BLOCKS
                self.let_go_some(effects)
            else:
                return
        check()

    def _check_bytes(
        self, tenant: Tenant, n_bytes: int, share: Share, model: ModelShare | None
    ) -> None:
        """Whether `tenant` may take so many, if everything that may go does. Mutates nothing."""
        tenant.check_quota(n_bytes, share)
        if model is not None:
            model.check_cap(n_bytes, share)
        could = self.available(share) + reclaimable(self.arenas.values(), share)
        if n_bytes > could:
            minima = sum(each.minimum for each in self.shares if each is not share)
            can_never = n_bytes + max(self.directories, minima) > self.n_bytes
            raise (BudgetTooSmall if can_never else AllLeased)(
                "the budget has no room for this",
                asked_bytes=n_bytes,
                budget_bytes=self.n_bytes,
                directory_bytes=self.directories,
                minima_bytes=minima,
                available_bytes=could,
            )

    def reduce(
        self,
        whose: "Tenant | ModelShare | Budget",
        taker: Share,
        n_bytes: int,
        most: int,
        effects: list[Effect],
    ) -> int:
        """Give `n_bytes` of one tenant, one model or all back to the operating system, as far as
        they may go for `taker`, in at most so many steps, of which a block takes two. Returns how
        many it took."""
        arenas = whose.arenas.values() if isinstance(whose, Budget) else whose.arenas
        before = self.unassigned
        sure = min(n_bytes, reclaimable(arenas, taker))
        steps = 0
        while self.unassigned - before < sure and steps < most:
            self._give_way(None, whose, taker, effects, reason=Reason.REDUCED)
            steps += 1
        self._punch_given_back(effects)
        return steps

    def _give_way(
        self,
        arena: Arena | None,
        whose: "Tenant | ModelShare | Budget",
        taker: Share,
        effects: list[Effect],
        n_slots: int = 1,
        reason: Reason | None = None,
    ) -> None:
        """One step towards room for `n_slots` of `arena`, which `taker` wants, by one tenant, one
        model or all: another arena that is empty and unused, or one of its free slots; else the
        oldest cached block that may go, and of `arena` those that come next."""
        others = whose.arenas.values() if isinstance(whose, Budget) else whose.arenas
        for other in others:
            if other is arena:
                continue
            share = other.share
            if not other.cached and other.is_unused and (share is taker or not share.minimum):
                self.give_up(other, effects)
                return
            if other.free and may_lose(share, taker, other.stride):
                self._given_back.setdefault(other.number, []).extend(self._return_free(other, 1))
                return
        self.pop_oldest(whose.policies, effects, reason or whose.reason, taker, arena, n_slots)

    def _punch(self, arena: Arena, n_slots: int, effects: list[Effect]) -> None:
        """Give `n_slots` free slots back to the operating system."""
        if n_slots:
            effects.append(Punch(arena.number, self._return_free(arena, n_slots)))

    def _return_free(self, arena: Arena, n_slots: int) -> list[int]:
        """Free slots that have no memory from now on: to be punched before any is taken."""
        slots = [arena.free.pop() for _ in range(n_slots)]
        arena.punched.extend(slots)
        self.spend(arena.tenant, -n_slots * arena.stride, arena)
        return slots

    def _punch_given_back(self, effects: list[Effect]) -> None:
        """All slots of an arena at once. One that has been given up meanwhile needs none."""
        for number, slots in self._given_back.items():
            if number in self.arenas:
                effects.append(Punch(number, slots))
        self._given_back.clear()

    def _drop_own(self, arena: Arena, effects: list[Effect]) -> None:
        """Evict the oldest of an arena that has used all of its slots, being shorter than the
        budget is now. A walk of the LRU up to there."""
        oldest = next(block for block in arena.evictable if block.arena is arena)
        self.drop(oldest, Reason.ROOM, effects)

    @staticmethod
    def _raise_high_water(arena: Arena) -> int:
        slot = arena.high_water
        arena.directory_bytes = arena.directory_for(slot + 1)
        arena.high_water += 1
        arena.blocks.append(None)
        return slot
