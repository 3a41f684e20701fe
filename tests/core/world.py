"""Drives the core beside the reference and the fake shell, and compares all three after each step.

What may be tried is a method of `World`; each works out from the reference what must be answered.
Who chooses the steps: test_model.py (hypothesis) and test_simulation.py (a seed).
"""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from struct import pack, unpack
from typing import Any, NamedTuple

from kvd.core import accounting, recount
from kvd.core.cache import AllocBacking, AppendBacking, Limits, PinsGrowing
from kvd.core.events import (
    Back,
    Backed,
    BackPins,
    CloseStaging,
    Completed,
    Connected,
    Copied,
    Copy,
    CreateArena,
    Disconnected,
    DropPin,
    DropRecord,
    Effect,
    Event,
    OpenStaging,
    Punch,
    Reconfigured,
    RefuseSession,
    RemoveArena,
    RenewPin,
    Reply,
    Requested,
    ShareArena,
    Ticked,
    WritePin,
    WriteRecord,
)
from kvd.core.machine import Core
from kvd.core.reasons import Reason
from kvd.core.sequences import State
from kvd.core.shares import ModelRule
from kvd.core.tenants import TenantRule
from kvd.core.tree import FILLING, Block
from kvd_proto import errors
from kvd_proto.errors import KvdError
from kvd_proto.keys import arena_fingerprint, block_key, root_key
from kvd_proto.messages import (
    COMPLETED,
    FAILED,
    Alloc,
    Allocated,
    Append,
    Appended,
    Blocks,
    CloseContext,
    ContextOpened,
    Done,
    Evict,
    Evicted,
    Explain,
    Flush,
    Flushed,
    Forget,
    Forgotten,
    Get,
    KeepAlive,
    KeptAlive,
    ModelRegistered,
    OpenContext,
    Pin,
    Pinned,
    RegisterModel,
    Release,
    Reported,
    Unpin,
    Unpinned,
)
from tests.core.driver import sealed_blocks
from tests.core.fake_shell import FakeShell, checksum
from tests.core.reference import (
    Arena,
    Commit,
    Context,
    Filling,
    Path,
    Planned,
    Sequence,
    Session,
    Source,
    Wanted,
    common,
    packed,
)

VOCABULARY = (1, 2, 256)
"""As little-endian bytes 256 sorts first."""
PAGE = 4096
STAGING = 3 * PAGE
FIRST_DIRECTORY = 5 * PAGE
DIRECTORY = 6 * PAGE
MAX_PINS = 3
"""Of a tenant, so that one page of a directory has room for all."""
MOST_SPARE_PAGES = 8
MAX_SESSIONS = 3
N_SEQ_MAX = 2
FIRST_CONTEXT = 70

_ANY_BYTES = memoryview(bytes(STAGING))
"""Whatever a staging holds: an array payload is always right."""

Answered = Callable[[Any], None]


class Kind:
    """A model that can be registered."""

    def __init__(self, name: str, block_tokens: int, row_bytes: int) -> None:
        self.name = name
        self.block_tokens = block_tokens
        self.message = RegisterModel(
            name, name.encode() * 32, "array", block_tokens, [["f16", row_bytes, "f16", row_bytes]]
        )
        self.payload_bytes = 2 * row_bytes * block_tokens
        self.stride = -(-self.payload_bytes // PAGE) * PAGE

    @property
    def fingerprint(self) -> bytes:
        """Of its arenas."""
        return arena_fingerprint(self.message.fingerprint, "array", self.message.block_tokens)

    def root(self, tenant: str) -> bytes:
        return root_key(self.fingerprint, b"salt of " + tenant.encode())


TENANTS: tuple[tuple[int | None, ...], ...] = (
    (None,),
    (None, None),
    (3, None),
    (4, 2, None),
    (1, 12, 5),
)
"""Each of a world: what the quotas of its tenants have room for beside what is always there, in
pages; None: no quota."""
KINDS = (Kind("a", 2, 64), Kind("b", 3, 1000))
"""Of one page a block, and of two."""


class Shares(NamedTuple):
    """Minima of tenants, in the order of their names, and rules of models; in pages."""

    minima: tuple[int, ...] = ()
    models: tuple[tuple[str, int, int | None], ...] = ()

    def rules(self) -> tuple[ModelRule, ...]:
        return tuple(
            ModelRule(name, minimum * PAGE, None if cap is None else cap * PAGE)
            for name, minimum, cap in self.models
        )


SHARES = (
    Shares(),
    Shares(minima=(12,)),
    Shares(minima=(8, 10)),
    Shares(models=(("a", 8, None),)),
    Shares(models=(("b", 0, 9),)),
    Shares(models=(("a", 7, 9), ("b", 8, None))),
    Shares(minima=(9,), models=(("a", 8, 12), ("b", 0, 13))),
)
"""Some of a world; the first one changes nothing. All fit the smallest budget there is."""
OWNERS = ("o", "p")
TOGETHER: dict[str, str] = {
    **dict.fromkeys((Reason.ROOM, Reason.QUOTA, Reason.REDUCED, Reason.COMMAND), "evicted"),
    **dict.fromkeys((Reason.DAMAGED, Reason.ORPHANED), "lost"),
}
"""Reasons that are not told apart here: elsewhere."""
EITHER = "lost or superseded"
"""A tail that goes since what is above it is lost; but perhaps its lease ended a moment before."""
LARGEST_PAYLOAD = max(kind.payload_bytes for kind in KINDS)
LARGEST_STRIDE = max(kind.stride for kind in KINDS)


class Waiting(NamedTuple):
    """An alloc that has not been answered."""

    context: Context
    message: Alloc
    deadline: float


class Backing(NamedTuple):
    """An append whose slots are being backed."""

    sequence: Sequence
    commit: Commit
    first: Path
    birth: int
    new: list[Filling]


class World:
    def __init__(
        self,
        spare_pages: int = 6,
        max_sequences: int = 5,
        spare_of_tenants: tuple[int | None, ...] = (None,),
        max_models: int = len(KINDS),
        shares: Shares = SHARES[0],
    ) -> None:
        """The budget has room for all directories and stagings, and `spare_pages` beside. There is
        a tenant for each of `spare_of_tenants`, whose quota has room for its directories and one
        staging, and so many pages beside; None: it has no quota. Each has at most `max_models`."""
        directories = len(spare_of_tenants) * len(KINDS) * DIRECTORY
        self.always = directories + MAX_SESSIONS * STAGING
        self.n_bytes = self.always + spare_pages * PAGE
        self.max_sequences = max_sequences
        self.max_models = max_models
        rules = []
        for name, spare, pages in zip(
            "tuv", spare_of_tenants, (*shares.minima, 0, 0, 0), strict=False
        ):
            quota = _quota(spare)
            minimum = min(pages * PAGE, quota or self.n_bytes)
            rules.append(TenantRule(name, b"salt of " + name.encode(), quota, minimum))
        self.limited = {rule.name for rule in rules if rule.quota is not None}
        """Those that have, or have had, a quota."""
        self.is_reconfigured = False
        self.tenants = [rule.name for rule in rules]
        self.rules = tuple(rules)
        self.model_rules = shares.rules()
        self.has_shares = bool(shares.minima or shares.models)
        minima = [rule.minimum for rule in (*self.rules, *self.model_rules)]
        assert sum(minima) <= self.n_bytes
        self.n_contexts = 0
        self.core = self._new_core()
        self.shell = FakeShell()
        self.now = 0.0
        self.steps = 0
        self.sessions: dict[bytes, Session] = {}
        self.contexts: dict[int, Context] = {}
        self.arenas: dict[int, Arena] = {}
        self.kinds: dict[int, Kind] = {}
        """By arena, also of those that have gone."""
        self.n_connected = 0
        self.n_asked = 0
        self.answers: dict[int, Answered] = {}
        """By correlation: what to make of the reply, of each request that has none yet."""
        self.askers: dict[int, Session] = {}
        self.answering: set[int] = set()
        """By correlation: what is answered, or given memory, in the step that is looked at."""
        self.allocs: dict[int, Waiting] = {}
        """By correlation, in the order of their coming: those that wait for an id, and the one that
        is asked at this moment."""
        self.reserving: dict[int, Sequence] = {}
        """By job: whose reservation is being backed."""
        self.backing: dict[int, Backing] = {}
        self.copying: dict[int, list[Filling]] = {}
        self.seals: list[Filling] = []
        """What must be sealed in this step, in order."""
        self.staged: dict[Commit, list[int]] = {}
        """Offsets that are not to be written until the commit has finished."""
        self.unheld: dict[tuple[int, Path], int] = {}
        """Since which step no sequence leases a sealed block."""
        self.evicting = False
        """Whether it is by command, and not for want of room."""
        self.dropped: Counter[tuple[str, str]] = Counter()
        """By tenant and why; "lost" and "evicted" are several reasons."""
        self.commanded = 0
        """Blocks that are gone by command."""
        self.registering = ""
        """Whose minimum counts what makes room for another model, while one is registered."""
        self.in_vain = ""
        """Whose minimum counts an arena that could not be made."""
        self.counts_for: dict[int, str] = {}
        """By arena: for whose minimum it counts, those that have just gone included."""
        self.forgetting: set[tuple[int, Path]] = set()
        """What goes in this step since it is to be forgotten."""
        self.ghosts: dict[tuple[str, Kind, Path], tuple[float, str]] = {}
        """Of each tenant's and model's blocks that were dropped: when it was last, and why."""
        self.gave_way: dict[tuple[str, Kind], float] = {}
        """When all blocks of a model went with it."""
        self.not_stored: Counter[str] = Counter()
        """By tenant: sequences that are not stored."""
        self.given_up = 0
        """Bytes of arenas that nobody used, and that went in this step."""
        self.returned = 0
        """Bytes that were wanted, and were not needed in the end."""
        self.paths: dict[bytes, Path] = {}
        """By the block's key."""

    def _new_core(self) -> Core:
        return Core(self._limits())

    def _limits(self) -> Limits:
        return Limits(
            self.n_bytes,
            self.max_sequences,
            MAX_SESSIONS,
            N_SEQ_MAX,
            FIRST_CONTEXT + self.n_contexts,
            self.rules,
            self.model_rules,
            self.always + MOST_SPARE_PAGES * PAGE,
            self.max_models,
            max_pins=MAX_PINS,
        )

    def reconfigure(self, spare_pages: int, which: int, spare: int | None) -> None:
        """Another budget, and another quota of one tenant, as the constructor has them. Smaller
        ones may be too small for what is in use, and for all directories, but not for minima."""
        minima = sum(rule.minimum for rule in (*self.rules, *self.model_rules))
        self.n_bytes = max(self.always + spare_pages * PAGE, minima)
        which %= len(self.rules)
        rules, quota = list(self.rules), _quota(spare)
        if quota is not None:
            quota = max(quota, rules[which].minimum)
            self.limited.add(rules[which].name)
        rules[which] = replace(rules[which], quota=quota)
        self.rules = tuple(rules)
        self.is_reconfigured = True
        self.evicting = True
        self._settle(self._handle(Reconfigured(self._limits())))
        self.evicting = False

    def _check_resized(self) -> None:
        """The budget and the quotas are what they are to be, but for what cannot go."""
        budget = self.core.cache.budget
        assert budget.n_bytes >= self.n_bytes
        for rule in self.rules:
            tenant = budget.tenants.get(rule.name)
            limit = self.n_bytes if rule.quota is None else min(rule.quota, self.n_bytes)
            assert tenant is None or tenant.quota >= min(limit, budget.n_bytes)
            if tenant is not None and tenant.excess:
                assert tenant.headroom == 0
                can_go = self._available(f"tenant {rule.name}", rule.name)
                assert not can_go, "more of it could have gone"
        if budget.n_bytes > self.n_bytes:
            assert budget.unassigned == 0
        minima, held = self._minima(), self._held()
        promised = sum(max(0, minima[each] - held[each]) for each in minima)
        if budget.n_bytes > self.n_bytes or promised > budget.unassigned:
            can_go = self._available("", None) - (budget.unassigned - promised)
            assert not can_go, "more of it could have gone"

    # --- sessions and models

    def connect(self, which: int = 0) -> Session | None:
        """As a client of one of the tenants; every other one is an administrator."""
        self.n_connected += 1
        name = b"session-%08d" % self.n_connected
        tenant = self.tenants[which % len(self.tenants)]
        is_administrator = which % 2 == 0
        event = Connected(name, f"c{self.n_connected}", 1, 1, tenant, STAGING, is_administrator)
        effects = self._handle(event)
        refused = [each.error for each in effects if isinstance(each, RefuseSession)]
        session = None
        if len(self.sessions) == MAX_SESSIONS:
            assert isinstance(refused[0], errors.TooManySessions)
        elif refused:
            self._check_no_room(refused[0], tenant, None, STAGING)
        else:
            session = self.sessions[name] = Session(name, tenant, is_administrator)
        self._settle(effects)
        return session

    def disconnect(self, session: Session) -> None:
        del self.sessions[session.id]
        session.alive = False
        for correlation in [each for each, asker in self.askers.items() if asker is session]:
            del self.askers[correlation], self.answers[correlation]
            self.allocs.pop(correlation, None)
        for context in [each for each in self.contexts.values() if each.session is session]:
            self._drop(context)
        for commit in session.commits.values():
            for filling in list(commit.pending):
                if filling.sources[0].commit is not commit:
                    filling.drop_source(commit)
        self._settle(self._handle(Disconnected(session.id)))

    def register(self, session: Session, kind: Kind) -> None:
        known = next(
            (
                each.number
                for each in self.arenas.values()
                if self._kind(each.number) is kind and each.tenant == session.tenant
            ),
            None,
        )

        def answered(body: Any) -> None:
            if isinstance(body, errors.TooMany):
                assert known is None
                own = [each for each in self.arenas.values() if each.tenant == session.tenant]
                assert len(own) == self.max_models
                assert not any(self._is_unused(arena) and not self._is_kept(arena) for arena in own)
                return
            if isinstance(body, KvdError):
                assert known is None
                self._check_no_room(body, session.tenant, kind.name, FIRST_DIRECTORY)
                return
            assert isinstance(body, ModelRegistered)
            assert (body.payload_bytes, body.stride_bytes) == (kind.payload_bytes, kind.stride)
            assert known in (None, body.model)
            session.models.add(body.model)
            if known is None:
                self.arenas[body.model] = Arena(
                    body.model, session.tenant, kind.block_tokens, kind.stride
                )

        self.registering = f"tenant {session.tenant}"
        self._request(session, kind.message, answered)
        self.registering = ""

    def open_context(self, session: Session, model: int, n_ids: int, busy: list[int]) -> None:
        in_use = len(self.sequences())

        def answered(body: Any) -> None:
            if model not in session.models:
                assert isinstance(body, errors.UnknownModel)
            elif n_ids > N_SEQ_MAX or len(set(busy)) < len(busy) or max(busy, default=0) >= n_ids:
                assert isinstance(body, errors.BadMessage)
            elif in_use + len(busy) > self.max_sequences:
                assert isinstance(body, errors.SequenceLimit)
            else:
                generations = list(range(1, len(busy) + 1))
                assert body == ContextOpened(FIRST_CONTEXT + self.n_contexts, generations)
                self.n_contexts += 1
                free = deque(each for each in range(n_ids) if each not in busy)
                context = Context(body.context, session, self.arenas[model], free, len(busy))
                self.contexts[body.context] = context
                for seq_id, generation in zip(busy, generations, strict=True):
                    context.open[seq_id] = Sequence(
                        context, seq_id, generation, (), (), 0, self.now, 0.0
                    )

        self._request(session, OpenContext(model, n_ids, busy), answered)

    def close_context(self, context: Context) -> None:
        for correlation in [
            each for each, alloc in self.allocs.items() if alloc.context is context
        ]:
            del self.allocs[correlation]
            self.answers[correlation] = _fails(errors.UnknownContext)
        self._drop(context)
        self._request(context.session, CloseContext(context.number), _is(Done()))

    def _drop(self, context: Context) -> None:
        for sequence in list(context.open.values()):
            self._close(sequence)
        del self.contexts[context.number]

    # --- sequences

    def alloc(
        self,
        context: Context,
        tokens: Path,
        reserve_tokens: int = 0,
        wait_ms: int = 0,
        idle_timeout_ms: int = 0,
        use: bool = True,
        store: bool = True,
    ) -> None:
        message = Alloc(
            context.number,
            "",
            packed(tokens),
            reserve_tokens,
            wait_ms,
            idle_timeout_ms,
            int(use),
            int(store),
        )
        if reserve_tokens and not store:
            self._request(context.session, message, _fails(errors.BadMessage))
            return
        correlation = self.n_asked + 1
        full = len(self.sequences()) >= self.max_sequences
        before = any(alloc.context is context for alloc in self.allocs.values())
        must_wait = full or before or not context.free_ids
        if must_wait and not wait_ms:
            error = errors.SequenceLimit if full else errors.NoSequenceFree
            self._request(context.session, message, _fails(error))
            return
        self.allocs[correlation] = Waiting(context, message, self.now + wait_ms / 1000)
        self._request(context.session, message, lambda body: self._allocated(correlation, body))
        assert (correlation in self.allocs) == must_wait

    def append(
        self,
        sequence: Sequence,
        tokens: Path,
        start: int | None = None,
        offset: int | None = None,
    ) -> None:
        """`start` and the last `offset` are right unless given."""
        context, session = sequence.context, sequence.context.session
        planned = context.arena.plan(sequence.full, tokens)
        right_start = len(sequence.full)
        start = right_start if start is None else start
        offsets = self._stage(session, planned.paths)
        sent = offsets if offset is None else [*offsets[:-1], offset]
        message = Append(
            context.number,
            sequence.seq_id,
            sequence.generation,
            start,
            packed(tokens),
            pack(f"<{len(sent)}Q", *sent),
        )
        sequence.touched = self.now
        wrong: type[KvdError] | None = None
        if not sequence.stores:
            wrong = errors.NotStored
        elif sequence.timed_out:
            wrong = errors.SequenceEnded
        elif start != right_start:
            wrong = errors.BadPosition
        elif sequence.limit is not None and start + len(tokens) > sequence.limit:
            wrong = errors.ReservationExceeded
        elif not tokens:
            wrong = errors.BadMessage
        elif offset is not None:
            wrong = errors.BadStaging
        if wrong is not None:
            self._unstage(session, offsets)
            self._request(session, message, _fails(wrong))
        else:
            self._append(sequence, planned, offsets, message)

    def _append(
        self, sequence: Sequence, planned: Planned, offsets: list[int], message: Append
    ) -> None:
        """An append with nothing wrong, which will be taken unless there is no room."""
        session, arena = sequence.context.session, sequence.context.arena
        commit = Commit(session, session.last_commit + 1)
        reserved = self._real(sequence).reserved
        n_slots = max(0, len(planned.stored) - len(reserved))
        appended = Appended(
            commit.number, len(planned.stored), len(planned.present), len(planned.joined)
        )

        def answered(body: Any) -> None:
            if not isinstance(body, KvdError):
                assert body == appended
                return
            # The client may write something else there now.
            self.staged.pop(commit, None)
            self._unstage(session, offsets)
            if not isinstance(body, errors.NoSpace):
                existing = [path for path in planned.paths if path not in planned.stored]
                named = existing[-1] if existing else sequence.full
                self._check_refusal(body, arena, n_slots, named)

        effects = self._send(session, message, answered)
        reply = self._immediate(effects)
        if not isinstance(reply, KvdError):
            n_tokens = len(_tokens(message.tokens))
            self._take_in(sequence, planned, offsets, commit, n_tokens)
            if reply is None:
                back = next(each for each in effects if isinstance(each, Back))
                new = [arena.filling[path] for path in planned.stored]
                first = planned.paths[0]
                self.backing[back.job] = Backing(sequence, commit, first, arena.births[first], new)
            else:
                commit.answered = True
        self._settle(effects)

    def _take_in(
        self,
        sequence: Sequence,
        planned: Planned,
        offsets: list[int],
        commit: Commit,
        n_tokens: int,
    ) -> None:
        """The append's blocks are in the tree, and the sequence goes on."""
        arena, session = sequence.context.arena, sequence.context.session
        session.last_commit += 1
        session.commits[commit.number] = commit
        self.staged[commit] = offsets
        for path, offset in zip(planned.paths, offsets, strict=True):
            if path in planned.stored:
                arena.filling[path] = Filling(arena, path, [])
                arena.births[path] = arena.births.get(path, 0) + 1
                self._name(arena, path)
            if path not in planned.present:
                filling = arena.filling[path]
                filling.sources.append(Source(commit, offset))
                commit.pending.add(filling)
        sequence.leased = planned.paths[-1]  # longer than what was appended, perhaps
        sequence.length = len(sequence.full) + n_tokens
        is_full = n_tokens % arena.block_tokens == 0
        sequence.full = sequence.leased if is_full else arena.parent(sequence.leased)

    def get(self, sequence: Sequence, first_block: int = 0) -> None:
        arena = sequence.context.arena
        sequence.touched = self.now
        sealed: list[Path] = []
        for path in arena.chain(sequence.leased):
            if path not in arena.sealed or path in arena.unchecked:
                break
            sealed.append(path)
        end = len(sealed[-1]) if sealed else 0
        last_block = end - len(arena.parent(sealed[-1])) if sealed else 0

        def answered(body: Any) -> None:
            assert isinstance(body, Blocks)
            slots = _slots(body.slots)
            assert slots == [arena.sealed[path] for path in sealed][first_block:]
            self._check_bytes(arena, sealed[first_block:], slots)
            assert body.sealed_tokens == min(sequence.length, end)
            assert body.last_block_tokens == last_block

        message = Get(sequence.context.number, sequence.seq_id, sequence.generation, first_block)
        self._request(sequence.context.session, message, answered)

    def keep_alive(self, sequences: list[Sequence]) -> None:
        """Those named; of the first one's context, if it is alone, all."""
        context = sequences[0].context
        named = sequences[1:]
        chosen = named or list(context.open.values())
        for sequence in chosen:
            sequence.touched = self.now
        message = KeepAlive(
            context.number,
            [sequence.seq_id for sequence in named],
            [sequence.generation for sequence in named],
        )
        timed_out = [sequence.seq_id for sequence in chosen if sequence.timed_out]
        self._request(context.session, message, _is(KeptAlive(timed_out)))

    def release(self, sequence: Sequence, outcome: int = COMPLETED) -> None:
        context = sequence.context
        self._close(sequence)
        self._request(
            context.session,
            Release(context.number, sequence.seq_id, sequence.generation, outcome),
            _is(Done()),
        )

    def _close(self, sequence: Sequence) -> None:
        context = sequence.context
        del context.open[sequence.seq_id]
        context.free_ids.append(sequence.seq_id)

    def misuse(self, session: Session, number: int, seq_id: int, generation: int) -> None:
        """Use a handle for everything that takes one, if it is wrong in any way."""
        context = self.contexts.get(number)
        error: type[KvdError] = errors.StaleHandle
        if context is None or context.session.tenant != session.tenant:
            error = errors.UnknownContext
        elif context.session is not session:
            error = errors.ForeignHandle
        elif seq_id in context.open and context.open[seq_id].generation == generation:
            return
        for message in (
            Release(number, seq_id, generation, FAILED),
            Append(number, seq_id, generation, 0, packed((1,)), pack("<Q", PAGE)),
            Get(number, seq_id, generation, 0),
            KeepAlive(number, [seq_id], [generation]),
        ):
            self._request(session, message, _fails(error))
        if error is not errors.StaleHandle:
            for message in (Alloc(number, "", b"", 0, 1000, 0), CloseContext(number)):
                self._request(session, message, _fails(error))

    def flush(self, session: Session, commit: int) -> None:
        correlation = self.n_asked + 1
        waits = session.completed < commit <= session.last_commit
        if waits:
            session.flushes[correlation] = commit

        def answered(body: Any) -> None:
            if commit > session.last_commit:
                assert isinstance(body, errors.BadMessage)
                return
            session.flushes.pop(correlation, None)
            assert isinstance(body, Flushed)
            assert body.completed == session.completed >= commit
            assert [row[0] for row in body.failures] == session.failures
            session.failures.clear()

        self._request(session, Flush(commit), answered)
        assert (correlation in self.answers) == waits

    def evict(self, session: Session, name: str, n_blocks: int, tenant: str = "") -> None:
        message = Evict(name, n_blocks, tenant)
        if (wrong := self._wrong_tenant(session, tenant)) is not None:
            self._request(session, message, _fails(wrong))
            return
        everybodys = session.administrator and not tenant
        chosen = [
            arena
            for arena in self.arenas.values()
            if name in ("", self._kind(arena.number).name)
            and (everybodys or arena.tenant == (tenant or session.tenant))
        ]
        cached = sum(len(arena.sealed.keys() - self._in_use(arena)) for arena in chosen)

        def answered(body: Any) -> None:
            assert isinstance(body, Evicted)
            assert body.blocks == (min(cached, n_blocks) if n_blocks else cached)
            self.commanded += body.blocks
            for arena in chosen:
                assert not self.core.cache.budget.arenas[arena.number].free

        self.evicting = True
        self._settle(self._send(session, message, answered), chosen)
        self.evicting = False

    def _wrong_tenant(self, session: Session, name: str) -> type[KvdError] | None:
        """What is answered to who names this tenant, if he may not."""
        if name in ("", session.tenant):
            return None
        if not session.administrator:
            return errors.Forbidden
        return None if name in self.tenants else errors.BadMessage

    def forget(self, session: Session, kind: Kind, tokens: Path, tenant: str = "") -> None:
        """What belongs to the prompt goes, and from its end up what nothing else goes on from."""
        message = Forget(kind.fingerprint, packed(tokens), tenant)
        arena = self._arena(tenant or session.tenant, kind)
        wrong = self._wrong_tenant(session, tenant)
        if wrong is None and arena is None:
            wrong = errors.UnknownModel
        if wrong is not None:
            self._request(session, message, _fails(wrong))
            return
        assert arena is not None
        held = self._in_use(arena)
        doomed = arena.belongs_to(tokens)
        start = arena.common_blocks(tokens)
        there = [
            common(path, tokens) for path in arena.sealed if arena.parent(path) == tokens[:start]
        ]
        n_tokens = max([start, *there])
        going, kept = doomed - held, doomed & held
        node = tokens[:start]
        while node and not [
            path for path in arena.known() - going if arena.parent(path) == node and path != node
        ]:
            if node in held:
                kept.add(node)
                break
            going.add(node)
            node = arena.parent(node)
        self.forgetting = {(arena.number, path) for path in going}
        self.commanded += len(going)
        reply = Forgotten(n_tokens, len(going), len(kept), len(going) * arena.stride)
        self._settle(self._send(session, message, _is(reply)), [arena])
        assert not going & arena.sealed.keys()
        self.forgetting = set()

    def explain(self, session: Session, kind: Kind, tokens: Path, tenant: str = "") -> None:
        message = Explain(kind.fingerprint, packed(tokens), tenant, [])
        if (wrong := self._wrong_tenant(session, tenant)) is not None:
            self._request(session, message, _fails(wrong))
            return
        whose = tenant or session.tenant
        arena = self._arena(whose, kind)
        matched = arena.matched(tokens) if arena else 0

        def answered(body: Any) -> None:
            assert isinstance(body, Reported)
            report = body.report
            missing = report.pop("missing")
            assert missing == self._explained(arena, whose, kind, tokens, missing)
            others = {row["model"]: row["tokens"] for row in report.pop("others")}
            assert others == {
                self._kind(other.number).name: other.matched(tokens)
                for other in self.arenas.values()
                if other.tenant == whose and other is not arena and other.matched(tokens) > matched
            }
            elsewhere = [self._arena(name, kind) for name in self.tenants if name != whose]
            has_more = any(each.matched(tokens) > matched for each in elsewhere if each)
            dropped = self.gave_way.get((whose, kind))
            assert report == {
                "model": kind.name if arena else None,
                "fingerprint": kind.fingerprint.hex(),
                "tenant": whose,
                "block_tokens": kind.block_tokens if arena else None,
                "asked_tokens": len(tokens),
                "matched_tokens": matched,
                "matched_blocks": len(arena.chain(arena.best(tokens))) if arena else 0,
                "memory_seconds": None,
                "model_dropped_seconds": None if dropped is None else self.now - dropped,
                "sequences_not_stored": self.not_stored[whose],
                "another_tenant": has_more if session.administrator else None,
            }

        self._request(session, message, answered)

    def _explained(
        self, arena: Arena | None, tenant: str, kind: Kind, tokens: Path, told: Any
    ) -> dict[str, Any] | None:
        """What must be told of the first block that does not match. Of the reasons in TOGETHER the
        one that is `told` is right."""
        matched = arena.matched(tokens) if arena else 0
        if arena is None or matched == len(tokens):
            return None
        start = matched // kind.block_tokens * kind.block_tokens
        path = tokens[: start + kind.block_tokens]
        why = arena.not_served(path)
        reason, seconds, n_tokens = None, None, 0
        if why is None:
            why = "not_known" if len(path) == start + kind.block_tokens else "too_short"
            for end in range(matched + 1, len(path) + 1):  # the longest one is told
                if (tenant, kind, path[:end]) in self.ghosts:
                    when, reason = self.ghosts[tenant, kind, path[:end]]
                    why, seconds, n_tokens = "evicted", self.now - when, end - start
        if told and TOGETHER.get(told["reason"], told["reason"]) in (reason or "").split(" or "):
            reason = told["reason"]
        return {
            "block": start // kind.block_tokens,
            "start": start,
            "end": len(path),
            "why": why,
            "tokens": n_tokens,
            "reason": reason,
            "seconds_ago": seconds,
        }

    # --- pins

    def pin(
        self, session: Session, kind: Kind, tokens: Path, owner: str = "o", ttl_ms: int = 0
    ) -> None:
        message = Pin(kind.fingerprint, packed(tokens), owner, ttl_ms)
        arena = self.arena_of(session, kind)
        if arena is None:
            self._request(session, message, _fails(errors.UnknownModel))
            return
        path = arena.best(tokens)
        if not path:
            self._request(session, message, _is(Pinned(0)))
            return
        wanted = Wanted(
            session, self.n_asked + 1, owner, path, arena.matched(tokens), ttl_ms / 1000
        )
        effects = self._send(session, message, lambda body: self._pinned(arena, wanted, body))
        if self._immediate(effects) is None:
            assert not self.shell.arenas[arena.number].pins_backed, "there was memory for it"
            arena.wanted.append(wanted)
        self._settle(effects)

    def _pinned(self, arena: Arena, wanted: Wanted, body: Any) -> None:
        """A pin of what is cached is answered."""
        budget = self.core.cache.budget
        key = (wanted.owner, wanted.path)
        has_waited = wanted in arena.wanted
        if has_waited:
            arena.wanted.remove(wanted)
        if body == Pinned(wanted.n_tokens):
            arena.pins[key] = self.now + wanted.seconds if wanted.seconds else 0.0
        elif isinstance(body, errors.TooMany):
            assert key not in arena.pins
            assert budget.tenants[arena.tenant].pins + len(arena.wanted) >= MAX_PINS
        elif isinstance(body, errors.NoSpace):
            assert has_waited
        else:
            need = 0 if budget.arenas[arena.number].pins.n_bytes else PAGE
            name = self._kind(arena.number).name
            self._check_no_room(body, arena.tenant, name, need, arena, wanted.path)
            self._touch(arena, wanted.path)

    def unpin(self, session: Session, owner: str, name: str) -> None:
        ended = [
            (arena, key)
            for arena in self.arenas.values()
            for key in arena.pins
            if name in ("", self._kind(arena.number).name)
            and key[0] == owner
            and (session.administrator or arena.tenant == session.tenant)
        ]
        for arena, key in ended:
            del arena.pins[key]
        self._request(session, Unpin(owner, name), _is(Unpinned(len(ended))))

    def arena_of(self, session: Session, kind: Kind) -> Arena | None:
        return self._arena(session.tenant, kind)

    def _arena(self, tenant: str, kind: Kind) -> Arena | None:
        return next(
            (
                each
                for each in self.arenas.values()
                if self._kind(each.number) is kind and each.tenant == tenant
            ),
            None,
        )

    def _touch(self, arena: Arena, path: Path) -> None:
        """What was held for a moment counts as used."""
        for up in arena.chain(path):
            if (arena.number, up) in self.unheld:
                self.unheld[arena.number, up] = self.steps

    def ask_as_nobody(self) -> None:
        assert [
            type(effect.body)
            for effect in self._handle(Requested(b"nobody", 7, Flush(0)))
            if isinstance(effect, Reply) and effect.session == b"nobody"
        ] == [errors.UnknownSession]

    # --- time and jobs

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        full = len(self.sequences()) >= self.max_sequences
        for correlation, alloc in list(self.allocs.items()):
            if alloc.deadline <= self.now:
                del self.allocs[correlation]
                error = errors.SequenceLimit if full else errors.NoSequenceFree
                self.answers[correlation] = _fails(error)
        for sequence in self.sequences():
            if sequence.idle and sequence.touched + sequence.idle <= self.now:
                sequence.timed_out = True
        for arena in self.arenas.values():
            arena.end_pins(self.now)
        self._settle(self._handle(Ticked()))

    def work(self, fails: int = 0, which: int = 0) -> bool:
        """Let the shell do one of its jobs, of which the items in `fails` fail; False if it has
        none."""
        if not self.shell.queue:
            return False
        event = self.shell.work(fails, which)
        if event is not None:
            self._job_ended(event)
            self._settle(self._handle(event))
        return True

    def _job_ended(self, event: Event) -> None:
        if isinstance(event, Copied):
            self._copied(event)
        elif isinstance(event, Backed) and event.job in self.reserving:
            sequence = self.reserving.pop(event.job)
            if event.error is not None and sequence.is_open:
                self._close(sequence)
        elif isinstance(event, Backed) and event.job in self.backing:
            self._append_backed(event)
        elif isinstance(event, Backed):
            self._pins_backed(event)

    def _pins_backed(self, event: Backed) -> None:
        """All who wait are answered; the dead are not pinned for."""
        job = self.core.cache.jobs[event.job]
        assert isinstance(job, PinsGrowing)
        arena = self.arenas[job.arena.number]
        arena.wanted = [each for each in arena.wanted if each.session.alive]
        assert [each.correlation for each in arena.wanted] == [
            each.correlation for each in job.wanted if each.session.alive
        ]

    def _append_backed(self, event: Backed) -> None:
        sequence, commit, first, birth, new = self.backing.pop(event.job)
        arena = sequence.context.arena
        commit.answered = True
        if event.error is None and commit.session.alive:
            return
        if sequence.is_open and sequence.rests_on(first) and arena.births[first] == birth:
            sequence.fall_back(first)
        job = self.core.cache.jobs[event.job]
        assert isinstance(job, AppendBacking)
        if event.error is not None:
            for block, filling in zip(job.blocks, new, strict=True):
                if block.slot in job.to_back and not filling.gone:
                    arena.remove(filling.path, self.sequences())
        for filling in sorted(commit.pending, key=lambda each: len(each.path)):
            if not filling.gone:
                self._lose_source(filling, commit)
        commit.failed = False

    def _copied(self, event: Copied) -> None:
        for filling, result in zip(self.copying.pop(event.job), event.results, strict=True):
            if filling.gone:
                continue
            if result.error is not None:
                self._lose_source(filling, filling.sources[0].commit)
                continue
            self.seals.append(filling)
            del filling.arena.filling[filling.path]
            for source in filling.sources:
                source.commit.pending.discard(filling)

    def _lose_source(self, filling: Filling, commit: Commit) -> None:
        filling.drop_source(commit)
        commit.failed = True
        if not filling.sources:
            filling.arena.remove(filling.path, self.sequences())

    def drain(self) -> None:
        while self.work():
            pass

    def finish(self) -> None:
        """All is answered. Everybody leaves, and then nothing is left but the directories."""
        self.drain()
        assert self.answers.keys() == self.allocs.keys()
        for session in list(self.sessions.values()):
            self.disconnect(session)
        self.drain()
        for which in range(len(self.rules)):
            self.reconfigure(100, which, None)
        last = self.connect()
        assert last is not None
        for owner in OWNERS:
            self.unpin(last, owner, "")
        self.evict(last, "", 0)
        self.disconnect(last)
        self.drain()
        cache = self.core.cache
        totals = accounting.totals(cache)
        assert totals.unassigned == totals.budget - totals.directory
        assert self.shell.arenas.keys() == self.arenas.keys()
        for slots in self.shell.arenas.values():
            assert not any((slots.memory, slots.records, slots.pins))
        assert not self.shell.stagings
        for left in (cache.jobs, cache.sessions, cache.leaving, cache.contexts, cache.waiting):
            assert not left
        assert cache.open_sequences == 0
        assert cache.deadlines.next() is None

    # --- what can be used

    def sequences(self) -> list[Sequence]:
        return [each for context in self.contexts.values() for each in context.open.values()]

    def known_sequences(self) -> list[Sequence]:
        """Those that their clients know."""
        reserving = list(self.reserving.values())
        return [each for each in self.sequences() if each not in reserving]

    # --- what the steps share

    def _kind(self, model: int) -> Kind:
        return self.kinds[model]

    def _real(self, sequence: Sequence) -> Any:
        return self.core.cache.contexts[sequence.context.number].open[sequence.seq_id]

    def _in_use(self, arena: Arena) -> set[Path]:
        """What must not be evicted."""
        return arena.leased(self.sequences()) | arena.former | arena.pinned()

    def _stage(self, session: Session, paths: list[Path]) -> list[int]:
        """Write payloads where no commit's may still be read."""
        staged = self.shell.stagings[session.id]
        free = (each for each in range(PAGE, STAGING - LARGEST_PAYLOAD, 8) if each not in staged)
        offsets = [next(free) for _ in paths]
        staged.update(zip(offsets, paths, strict=True))
        return offsets

    def _unstage(self, session: Session, offsets: list[int]) -> None:
        """Write over them: a copy would fail."""
        for offset in offsets:
            del self.shell.stagings[session.id][offset]

    def _name(self, arena: Arena, path: Path) -> None:
        """Know the path again when its key comes along."""
        key = self._kind(arena.number).root(arena.tenant)
        for each in arena.chain(path):
            key = block_key(key, packed(each[len(arena.parent(each)) :]))
        self.paths[key] = path

    def _request(self, session: Session, message: Any, answered: Answered) -> None:
        self._settle(self._send(session, message, answered))

    def _send(self, session: Session, message: Any, answered: Answered) -> list[Effect]:
        self.n_asked += 1
        self.answers[self.n_asked] = answered
        self.askers[self.n_asked] = session
        return self._handle(Requested(session.id, self.n_asked, message, _ANY_BYTES))

    def _immediate(self, effects: list[Effect]) -> Any:
        """The reply to the latest request, if it is among the effects."""
        for effect in effects:
            if isinstance(effect, Reply) and effect.correlation == self.n_asked:
                return effect.body
        return None

    def _handle(self, event: Event) -> list[Effect]:
        """Let it happen, and what takes long to its end. In between: test_long_walks.py."""
        self.steps += 1
        effects = self.core.handle(event, self.now)
        while self.core.next_deadline() == -math.inf:
            effects += self.core.handle(Ticked(), self.now)
        return effects

    # --- effects

    def _settle(self, effects: list[Effect], evicting: list[Arena] | None = None) -> None:
        """Carry out the effects, in order, and compare everything."""
        evicted: list[tuple[int, Path]] = []
        jobs = [self.core.cache.jobs.get(each.job) for each in effects if isinstance(each, Back)]
        self.answering = {each.correlation for each in effects if isinstance(each, Reply)}
        self.answering |= {job.correlation for job in jobs if isinstance(job, AllocBacking)}
        self.given_up = 0
        all_arenas = dict(self.arenas)
        for effect in effects:
            self._apply(effect, evicted)
        all_arenas |= self.arenas
        self._check_eviction(evicted, all_arenas, evicting)
        self._check_minima(effects, evicting is not None or self.evicting)
        self._compare()

    def _apply(self, effect: Effect, evicted: list[tuple[int, Path]]) -> None:
        shell = self.shell
        match effect:
            case Reply(session, correlation, body):
                assert self.askers.pop(correlation).id == session
                self.answers.pop(correlation)(body)
            case OpenStaging():
                shell.open_staging(effect)
            case CloseStaging(session):
                assert session not in self.sessions
                shell.close_staging(effect)
            case Completed(session, commit):
                self.sessions[session].advance()
                shell.complete(session, commit)
                self._free_staging(self.sessions[session])
            case CreateArena(number, _, name):
                self.kinds[number] = next(each for each in KINDS if each.name == name)
                shell.create_arena(effect)
            case RemoveArena(number):
                self._give_up(self.arenas.pop(number))
                shell.remove_arena(effect)
            case ShareArena(session, arena):
                assert arena in shell.arenas
                owner = self.core.cache.budget.arenas[arena].tenant
                assert owner.name == self.sessions[session].tenant, "another tenant's descriptor"
                assert arena not in self.sessions[session].models
            case Back():
                self._back(effect)
                shell.submit(effect)
            case Copy():
                self._copy(effect)
                shell.submit(effect)
            case BackPins() | Punch():
                shell.submit(effect)
            case WritePin():
                shell.write_pin(effect)
            case RenewPin():
                shell.renew_pin(effect)
            case DropPin():
                shell.drop_pin(effect)
            case WriteRecord():
                self._seal(effect)
                shell.write_record(effect)
            case DropRecord(arena, slot):
                self._drop_block(arena, slot, evicted)
                shell.drop_record(effect)

    def _is_unused(self, arena: Arena) -> bool:
        """Whether no session has registered it, and nothing in it is held."""
        real = self.core.cache.budget.arenas.get(arena.number)
        set_aside = real is not None and (real.filling or real.retired)
        registered = any(arena.number in each.models for each in self.sessions.values())
        return not registered and not set_aside and not self._in_use(arena)

    def _give_up(self, arena: Arena) -> None:
        """For want of room an empty one goes; if there are too many models, that of which nothing
        was used for longest."""
        assert self._is_unused(arena)
        assert not arena.filling
        if arena.sealed:
            own = [each for each in self.arenas.values() if each.tenant == arena.tenant]
            assert len(own) == self.max_models - 1
            for other in own:
                may_stay = not self._is_unused(other) or self._is_kept(other)
                assert may_stay or self._latest(arena) <= self._latest(other)
        # And its pins' page, if it has ever had one.
        size = PAGE + (FIRST_DIRECTORY if not arena.births else DIRECTORY)
        self.given_up += size + len(self.shell.arenas[arena.number].memory) * arena.stride
        self.dropped[arena.tenant, "arena"] += len(arena.sealed)
        if arena.sealed:
            self.gave_way[arena.tenant, self.kinds[arena.number]] = self.now
        for path in arena.sealed:
            self.unheld.pop((arena.number, path), None)
        arena.sealed.clear()
        arena.unchecked.clear()

    def _latest(self, arena: Arena) -> int:
        """Since which step nothing of it is leased."""
        return max((self.unheld.get((arena.number, path), 0) for path in arena.sealed), default=0)

    def _free_staging(self, session: Session) -> None:
        for commit in session.commits.values():
            if commit.number <= session.completed:
                self._unstage(session, self.staged.pop(commit, []))

    def _back(self, effect: Back) -> None:
        assert len(set(effect.slots)) == len(effect.slots) > 0
        job = self.core.cache.jobs[effect.job]
        if not isinstance(job, AllocBacking):
            return
        opened = self._open(job.correlation, job.reply)
        self.reserving[effect.job] = opened

        def answered(body: Any) -> None:
            if opened.is_open:
                assert body == job.reply
            else:
                assert isinstance(body, errors.NoSpace | errors.StaleHandle)

        self.answers[job.correlation] = answered

    def _copy(self, effect: Copy) -> None:
        arena = self.arenas[effect.arena]
        staged = self.shell.stagings[effect.session]
        fillings = []
        for item in effect.items:
            filling = arena.filling[staged[item.offset]]
            source = filling.sources[0]
            assert source.offset == item.offset
            assert source.commit.session.id == effect.session
            assert source.commit.answered, "read before its append was answered"
            assert item.start == len(arena.parent(filling.path))
            assert item.start + item.n_tokens == len(filling.path)
            fillings.append(filling)
        self.copying[effect.job] = fillings

    def _seal(self, effect: WriteRecord) -> None:
        arena, path = self.arenas[effect.arena], self.paths[effect.key]
        filling = self.seals.pop(0)
        assert (filling.arena, filling.path) == (arena, path)
        parent = arena.parent(path)
        assert self.paths.get(effect.parent_key, ()) == parent
        assert (effect.start, effect.tokens) == (len(parent), packed(path[len(parent) :]))
        assert effect.checksum == checksum(path), "the checksum of another copy"
        assert self.shell.arenas[effect.arena].memory[effect.slot] == path
        arena.sealed[path] = effect.slot

    def _drop_block(self, number: int, slot: int, evicted: list[tuple[int, Path]]) -> None:
        arena = self.arenas[number]
        path = self.paths[self.shell.arenas[number].records[slot].key]
        assert path not in self._in_use(arena), "dropped under a lease"
        del arena.sealed[path]
        assert not [each for each in arena.sealed if path in arena.chain(each)], "had children"
        is_orphan = any(
            each not in arena.sealed and each not in arena.filling
            for each in arena.chain(path)[:-1]
        )
        is_superseded = len(path) % arena.block_tokens and arena.extension(path)
        is_lost = is_orphan or self._is_damaged(number, path)
        if is_lost and is_superseded:
            why = EITHER
        elif is_lost:
            why = "lost"
        else:
            why = "superseded" if is_superseded else "evicted"
        self.dropped[arena.tenant, why] += 1
        self.ghosts[arena.tenant, self.kinds[number], path] = (self.now, why)
        if not is_orphan and not is_superseded and (number, path) not in self.forgetting:
            evicted.append((number, path))

    def _is_damaged(self, number: int, path: Path) -> bool:
        """Whether it was left by an earlier daemon and is not as that had left it."""
        return False

    def _allocated(self, correlation: int, body: Any) -> None:
        """An alloc is answered that waits for no memory."""
        if not isinstance(body, KvdError):
            self._open(correlation, body)
            return
        context, message, _ = self._take_turn(correlation)
        arena = context.arena
        context.generation += 1
        context.free_ids.rotate(-1)
        n_slots = -(-message.reserve_tokens // arena.block_tokens)
        named = arena.best(_tokens(message.tokens)) if message.use else ()
        self._check_refusal(body, arena, n_slots, named)

    def _take_turn(self, correlation: int) -> Waiting:
        """Nobody who came before could have been served."""
        assert len(self.sequences()) < self.max_sequences
        for earlier, alloc in self.allocs.items():
            if earlier == correlation:
                break
            # One that has its id already may match for longer, and be answered behind it.
            assert earlier in self.answering or not alloc.context.free_ids, "not its turn"
        return self.allocs.pop(correlation)

    def _open(self, correlation: int, body: Any) -> Sequence:
        """Check the match, and that the slots hold these very tokens; the sequence is open."""
        context, message, _ = self._take_turn(correlation)
        assert isinstance(body, Allocated)
        arena, tokens = context.arena, _tokens(message.tokens)
        context.generation += 1
        assert (body.seq_id, body.generation) == (context.free_ids.popleft(), context.generation)
        matched = arena.matched(tokens) if message.use else 0
        assert body.matched_tokens == matched
        leased = arena.best(tokens) if message.use else ()
        slots = _slots(body.slots)
        assert slots == [arena.sealed[path] for path in arena.chain(leased)]
        assert body.last_block_tokens == len(leased) - len(arena.parent(leased))
        self._check_bytes(arena, arena.chain(leased), slots)
        full = tokens[: matched // arena.block_tokens * arena.block_tokens]
        sequence = Sequence(
            context,
            body.seq_id,
            body.generation,
            full,
            leased,
            matched,
            self.now,
            message.idle_timeout_ms / 1000,
            bool(message.store),
        )
        self.not_stored[arena.tenant] += not message.store
        if message.reserve_tokens:
            sequence.limit = len(full) + message.reserve_tokens
        context.open[body.seq_id] = sequence
        return sequence

    # --- checks

    def _check_bytes(self, arena: Arena, paths: list[Path], slots: list[int]) -> None:
        memory = self.shell.arenas[arena.number].memory
        assert [memory[slot] for slot in slots] == paths

    def _taker(self, tenant: str, model: str | None) -> str:
        """For whose minimum bytes count: "tenant t", or "model a". Of a staging `model` is None."""
        ruled = {rule.name for rule in self.model_rules if rule.minimum}
        return f"model {model}" if model in ruled else f"tenant {tenant}"

    def _taker_of(self, number: int) -> str:
        return self._taker(
            self.core.cache.budget.arenas[number].tenant.name, self._kind(number).name
        )

    def _minima(self) -> dict[str, int]:
        minima = {f"tenant {rule.name}": rule.minimum for rule in self.rules}
        return minima | {f"model {rule.name}": rule.minimum for rule in self.model_rules}

    def _held(self) -> dict[str, int]:
        """What counts for each minimum."""
        budget = self.core.cache.budget
        held = {f"tenant {name}": each.staging for name, each in budget.tenants.items()}
        held |= {f"model {rule.name}": 0 for rule in self.model_rules}
        for number, real in budget.arenas.items():
            held[self._taker_of(number)] += real.memory_beside + real.backed * real.stride
        return held

    def _available(
        self,
        taker: str,
        tenant: str | None,
        model: str | None = None,
        arena: Arena | None = None,
        named: Path = (),
    ) -> int:
        """Bytes that could be made free for `taker` while the chain of `named` stays: of the
        budget, of the quota of `tenant`, or of the cap of `model`."""
        budget, minima, held = self.core.cache.budget, self._minima(), self._held()
        if tenant is not None:
            found = budget.tenants[tenant].headroom
        elif model is not None:
            found = budget.models[model].headroom
        else:
            promised = [max(0, minima[each] - held[each]) for each in minima if each != taker]
            found = budget.unassigned - sum(promised)
        limited: dict[str, list[int]] = {}
        for number, real in budget.arenas.items():
            whose = self.arenas.get(number)
            of_model = real.name if model is None else model
            if (tenant or real.tenant.name, of_model) != (real.tenant.name, real.name):
                continue
            n_slots = len(real.free) + real.cached
            if whose is not None and whose is arena:
                cached = whose.sealed.keys() - self._in_use(whose)
                n_slots -= len(cached.intersection(whose.chain(named)))
            loser = self._taker_of(number)
            if loser == taker or not minima[loser]:
                found += n_slots * real.stride
                if whose is not None and whose is not arena and self._is_unused(whose):
                    found += real.memory_beside
            else:
                limited.setdefault(loser, []).extend([real.stride] * n_slots)
        for loser, strides in limited.items():
            surplus = max(0, held[loser] - minima[loser])
            if len(set(strides)) == 1:
                found += min(len(strides), surplus // strides[0]) * strides[0]
            elif strides:
                found += min(sum(strides), max(0, surplus - max(strides) + 1))
        return found

    def _has_quota(self, tenant: str) -> bool:
        (quota,) = [each.quota for each in self.rules if each.name == tenant]
        return quota is not None and quota < self.core.cache.budget.n_bytes

    def _has_cap(self, model: str | None) -> bool:
        return model in self.core.cache.budget.models

    def _is_beyond_a_limit(
        self, tenant: str, model: str | None, need: int, arena: Arena | None, named: Path
    ) -> bool:
        """Whether the quota or the cap has no room for that."""
        taker = self._taker(tenant, model)
        of_quota = self._has_quota(tenant) and need > self._available(
            taker, tenant, None, arena, named
        )
        return of_quota or (
            self._has_cap(model) and need > self._available(taker, None, model, arena, named)
        )

    def _can_never(self, taker: str, need: int, own: int = 0) -> bool:
        """Whether there is no room for `need` beside a directory of one's `own`, whatever goes."""
        others = sum(minimum for each, minimum in self._minima().items() if each != taker)
        budget = self.core.cache.budget
        return need + own + max(budget.directories - own, others) > budget.n_bytes

    def _check_no_room(
        self,
        error: KvdError,
        tenant: str,
        model: str | None,
        need: int,
        arena: Arena | None = None,
        named: Path = (),
    ) -> None:
        """For a staging (of no model) or a directory there was none, and the right error says
        so."""
        if self._is_beyond_a_limit(tenant, model, need, arena, named):
            assert type(error) is errors.OverQuota
            return
        taker = self._taker(tenant, model)
        never = self._can_never(taker, need)
        assert type(error) is (errors.BudgetTooSmall if never else errors.AllLeased)
        assert need > self._available(taker, None, None, arena, named), "there was room"

    def _check_refusal(self, error: KvdError, arena: Arena, n_slots: int, named: Path) -> None:
        """There was no room indeed, and the right error says so. What it named counts as used."""
        budget = self.core.cache.budget
        # Directories so small grow once, at the first slot.
        real = budget.arenas[arena.number]
        growth = real.directory_limit - real.directory_bytes
        need = n_slots * arena.stride + growth
        # Which of both is said if neither has room: test_quota.py. Here, others may have been
        # served since, and have taken what there was.
        if isinstance(error, errors.OverQuota):
            beyond = self._is_beyond_a_limit(arena.tenant, real.name, need, arena, named)
            if not beyond:
                # A budget that shrinks may have come below the quota since, in this very event.
                details: dict[str, Any] = error.details
                assert self.is_reconfigured, "its quota had room"
                assert details["asked_bytes"] > details["available_bytes"], "its quota had room"
                if "quota_bytes" in details:
                    limit, told = budget.tenants[arena.tenant].limit, details["quota_bytes"]
                else:
                    limit, told = budget.models[real.name].limit, details["cap_bytes"]
                assert limit is not None, "it has none"
                assert told >= limit
        else:
            taker = self._taker_of(arena.number)
            never = self._can_never(taker, need, real.directory_bytes)
            assert type(error) is (errors.BudgetTooSmall if never else errors.AllLeased)
            available = self._available(taker, None, None, arena, named)
            assert need > available, "refused, though there was room"
        self._touch(arena, named)

    def _is_kept(self, arena: Arena) -> bool:
        """Whether its model has a minimum, so that it never gives way to another model."""
        return self._taker_of(arena.number).startswith("model ")

    def _check_eviction(
        self,
        evicted: list[tuple[int, Path]],
        all_arenas: dict[int, Arena],
        evicting: list[Arena] | None,
    ) -> None:
        """Nothing of its tenant stayed that had been unused for longer than what went; and nothing
        of anybody, unless its tenant is at its quota."""
        arenas = list(all_arenas.values()) if evicting is None else evicting
        unleased = {
            (arena.number, path)
            for arena in self.arenas.values()
            for path in arena.sealed.keys() - arena.leased(self.sequences()) - arena.pinned()
        }
        former = {(each.number, path) for each in self.arenas.values() for path in each.former}
        numbers = {arena.number for arena in arenas}
        stayed = [
            place for place in unleased - former if place in self.unheld and place[0] in numbers
        ]
        for place in evicted:
            assert place[0] in numbers
            tenant = all_arenas[place[0]].tenant
            unused = self.unheld.get(place, self.steps)
            own = [each for each in stayed if self._has_same_order(each[0], place[0], all_arenas)]
            assert unused <= min((self.unheld[each] for each in own), default=self.steps)
            if self.has_shares:
                continue  # who may lose what: _check_minima
            if len(arenas) == len(all_arenas) and not self._gave_way_itself(tenant, len(evicted)):
                assert unused <= min((self.unheld[each] for each in stayed), default=self.steps)
                # No more than was needed for one block that is larger than what went last.
                budget = self.core.cache.budget
                spare = self._spare(len(evicted))
                assert budget.unassigned < spare or self.evicting
        self.unheld = {place: self.unheld.get(place, self.steps) for place in unleased}

    def _has_same_order(self, one: int, other: int, arenas: dict[int, Arena]) -> bool:
        """Whether blocks of two arenas are evicted in one order: they are of one tenant, and of
        models without a rule, or it is one arena."""
        rules = {rule.name for rule in self.model_rules}
        ruled = {kind.stride for kind in KINDS if kind.name in rules}
        both = {one, other}
        return len(both) == 1 or (
            arenas[one].tenant == arenas[other].tenant
            and not any(arenas[each].stride in ruled for each in both)
        )

    def _check_minima(self, effects: list[Effect], by_command: bool) -> None:
        """What is promised is there, and nobody has lost what is of his minimum to others."""
        minima, held = self._minima(), self._held()
        budget = self.core.cache.budget
        promised = sum(max(0, minima[each] - held[each]) for each in minima)
        assert promised <= budget.unassigned or self.is_reconfigured  # then: _check_resized
        assert all(each.headroom >= 0 for each in budget.models.values())
        # Another model of its own may have gone for it, or what counts for the same minimum.
        takers = {self.registering, self.in_vain}
        takers |= {f"tenant {name}" for name in self.limited}  # or for a smaller quota
        for effect in effects:
            match effect:
                case Back(_, number) | BackPins(_, number):
                    takers.add(self._taker_of(number))
                case CreateArena(_, tenant, name):
                    takers.add(self._taker(tenant, name))
                case OpenStaging(session):
                    takers.add(f"tenant {self.sessions[session].tenant}")
        given = {each.arena for each in effects if isinstance(each, Punch | RemoveArena)}
        # Not of one that was just found, of which nobody holds that yet.
        lost = {self.counts_for[number] for number in given & self.counts_for.keys()}
        for each in lost - takers:
            assert by_command or held[each] >= minima[each], f"{each} has lost of its minimum"
        self.counts_for = {number: self._taker_of(number) for number in budget.arenas}

    def _gave_way_itself(self, tenant: str, n_evicted: int) -> bool:
        """Whether it has no more left of its quota than what its own evictions may have made."""
        of = self.core.cache.budget.tenants[tenant]
        return of.headroom < self._spare(n_evicted)

    def _spare(self, n_evicted: int) -> int:
        """What is left, at most, behind an eviction of only what was needed."""
        return self.given_up + self.returned + (1 + n_evicted) * LARGEST_STRIDE

    def _compare(self) -> None:
        cache = self.core.cache
        recount.check(cache)
        assert not self.seals, "a copy was good, and its block was not sealed"
        for arena in self.arenas.values():
            self._compare_arena(arena)
        for session in self.sessions.values():
            session.advance()
            assert self.shell.headers[session.id] == session.completed
            assert all(commit > session.completed for commit in session.flushes.values())
        reading = {job.session for job in self.shell.queue if isinstance(job, Copy)}
        assert self.shell.stagings.keys() == self.sessions.keys() | reading
        self._compare_sequences()
        self._compare_reasons()
        assert self.arenas.keys() == cache.budget.arenas.keys()
        if not self.shell.queue:
            assert not any(arena.wanted for arena in self.arenas.values()), "a pin was forgotten"
            self._compare_memory()
        self._check_resized()

    def _compare_sequences(self) -> None:
        cache = self.core.cache
        assert {
            (each.context.number, each.seq_id): (
                each.generation,
                each.full,
                each.leased,
                each.length,
                each.timed_out,
            )
            for each in self.sequences()
        } == {
            (each.context.number, each.seq_id): (
                each.generation,
                _path(each.tip),
                _path(each.leased),
                each.length,
                each.state is State.TIMED_OUT,
            )
            for each in cache.sequences()
        }
        full = len(self.sequences()) >= self.max_sequences
        for context in self.contexts.values():
            assert cache.contexts[context.number].free_ids == context.free_ids
        for alloc in self.allocs.values():
            assert full or not alloc.context.free_ids, "left waiting"
        rows = accounting.report_of_sequences(cache, self.now)
        assert len(rows) == len(self.sequences()) + len(self.allocs)
        for tenant in cache.budget.tenants.values():
            rows = accounting.report_of_sequences(cache, self.now, tenant)
            contexts = [each.context for each in [*self.sequences(), *self.allocs.values()]]
            assert len(rows) == sum(each.session.tenant == tenant.name for each in contexts)
            accounting.totals(cache, tenant).check()
        deadlines = [alloc.deadline for alloc in self.allocs.values()]
        ends = [arena.next_end() for arena in self.arenas.values()]
        deadlines += [end for end in ends if end is not None]
        for sequence in self.sequences():
            if sequence.idle and not sequence.timed_out:
                deadlines.append(sequence.touched + sequence.idle)
        assert self.core.next_deadline() == min(deadlines, default=None)

    def _compare_arena(self, arena: Arena) -> None:
        real = self.core.cache.budget.arenas[arena.number]
        records = self.shell.arenas[arena.number].records
        sealed = sealed_blocks(real)
        assert {_path(block): block.slot for block in sealed} == arena.sealed
        assert {block.slot: block.key for block in sealed} == {
            slot: record.key for slot, record in records.items()
        }
        self._compare_pins(arena, real)
        filling = {_path(block): block for block in real.root.below() if block.state is FILLING}
        assert filling.keys() == arena.filling.keys()
        for path, block in filling.items():
            sources = arena.filling[path].sources
            assert [_source(source) for source in (block.sources or {}).values()] == [
                _source(source) for source in sources
            ]
            # It will end: the shell has a job for it, or for the append that is to fill it.
            assert block.in_flight or not sources[0].commit.answered
        known = {*arena.sealed, *arena.filling, ()}
        assert all(arena.parent(path) in known for path in known)

    def _compare_pins(self, arena: Arena, real: Any) -> None:
        """Pins are as they should be, in the core and in the directory; and each block counts as
        what it is."""
        pins = {(pin.owner, _path(pin.block)): pin for pin in real.pins.pins.values()}
        assert {key: pin.expires for key, pin in pins.items()} == arena.pins
        written = self.shell.arenas[arena.number].pins
        assert {place: (pin.key, pin.owner, pin.expires) for place, pin in written.items()} == {
            pin.place: (pin.block.key, pin.owner, pin.expires) for pin in pins.values()
        }
        in_use = (arena.leased(self.sequences()) | arena.former) & arena.sealed.keys()
        pinned = arena.pinned() - in_use
        counts = accounting.arena_counts(real)
        assert (counts["active"], counts["pinned"]) == (len(in_use), len(pinned))
        assert counts["cached"] == len(arena.sealed.keys() - in_use - pinned)
        self._compare_tokens(arena, real, in_use, pinned)
        rows = accounting.report_of_pins(self.core.cache, self.now)
        assert len(rows) == sum(len(each.pins) for each in self.arenas.values())

    def _compare_reasons(self) -> None:
        """Each block that was dropped is counted once, by why that was."""
        counted: Counter[tuple[str, str]] = Counter()
        tenants = self.core.cache.budget.tenants.values()
        for tenant in tenants:
            for reason, count in tenant.evicted.items():
                counted[tenant.name, TOGETHER.get(reason, reason)] += count
            may_be_at_one = tenant.name in self.limited or self.model_rules
            assert may_be_at_one or not tenant.evicted[Reason.QUOTA]
            assert self.is_reconfigured or not tenant.evicted[Reason.REDUCED]
        for tenant in tenants:
            both = self.dropped[tenant.name, EITHER]
            lost, superseded = (
                counted[tenant.name, why] - self.dropped[tenant.name, why]
                for why in ("lost", Reason.SUPERSEDED)
            )
            assert min(lost, superseded) >= 0 <= both == lost + superseded
            for why in ("evicted", Reason.ARENA):
                assert counted[tenant.name, why] == self.dropped[tenant.name, why]
        assert self.commanded == sum(tenant.evicted[Reason.COMMAND] for tenant in tenants)

    def _compare_tokens(
        self, arena: Arena, real: Any, in_use: set[Path], pinned: set[Path]
    ) -> None:
        """How many tokens, and bytes of payload, blocks of each state hold."""
        held = accounting.contents(real)
        by_state = {
            "filling": set(arena.filling),
            "active": in_use,
            "pinned": pinned,
            "cached": arena.sealed.keys() - in_use - pinned,
        }
        for state, paths in by_state.items():
            sizes = [len(path) - len(arena.parent(path)) for path in paths]
            assert held.tokens[state] == sum(sizes), state
            assert held.payload[state] == sum(real.format.size(each) for each in sizes), state
        free, payload = held.bytes["free"], held.payload["total"]
        assert held.bytes["total"] == free + payload + held.padding + held.open
        assert held.padding >= 0 <= held.open

    def _compare_memory(self) -> None:
        """The shell is idle: its memory is what the core accounts for."""
        totals = accounting.totals(self.core.cache)
        backed = totals.directory + totals.staging
        for arena in self.arenas.values():
            counts = accounting.arena_counts(self.core.cache.budget.arenas[arena.number])
            assert len(self.shell.arenas[arena.number].memory) == counts["total"]
            backed += counts["total"] * arena.stride
        assert backed == totals.backed


def _quota(spare: int | None) -> int | None:
    """A tenant's, with so many pages beside what is always there."""
    return None if spare is None else len(KINDS) * DIRECTORY + STAGING + spare * PAGE


def _tokens(data: bytes) -> Path:
    return unpack(f"<{len(data) // 4}I", data)


def _slots(data: bytes) -> list[int]:
    return list(unpack(f"<{len(data) // 4}I", data))


def _path(block: Block) -> Path:
    path: Path = ()
    node: Block | None = block
    while node is not None:
        path = _tokens(node.tokens) + path
        node = node.parent
    return path


def _source(source: Any) -> tuple[bytes, int, int]:
    return (source.commit.session.id, source.commit.number, source.offset)


def _is(expected: Any) -> Answered:
    def answered(body: Any) -> None:
        assert body == expected

    return answered


def _fails(error: type[KvdError]) -> Answered:
    def answered(body: Any) -> None:
        assert type(body) is error, body

    return answered
