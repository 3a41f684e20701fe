"""A prompt of very many blocks is matched in steps, and its lease ends in steps: others get their
turn in between, and whatever they do, everything adds up at every moment.

Every event is followed by a recount (driver.py).
"""

import math
from random import Random
from typing import Any

import pytest

from kvd.core.events import DropRecord, UseRecord
from kvd.core.holds import WALK_BLOCKS
from kvd.core.sequences import State
from kvd_proto.errors import (
    AllLeased,
    KvdError,
    NoSequenceFree,
    StaleHandle,
    TooMany,
    UnknownContext,
)
from kvd_proto.messages import (
    COMPLETED,
    Allocated,
    CloseContext,
    Evict,
    Evicted,
    Get,
    KeepAlive,
    KeptAlive,
    Release,
)
from tests.core.driver import (
    BUDGET,
    FULL_DIRECTORY,
    PAGE,
    STAGING,
    Driver,
    Handle,
    alloc,
    append,
    slots_of,
    walk_in_steps_of,
)

N_BLOCKS = 7
STEP = 2
PROMPT = tuple(range(2 * N_BLOCKS))
STEPS = 4
"""To match 7 blocks, 2 in a step; and to let them go."""


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A prompt of 7 blocks is cached in slots 0 to 6, in a context of two ids."""
    driver = Driver()
    driver.connect("s")
    driver.register(b"s")
    handle = driver.alloc(b"s", driver.context(b"s", n_ids=2))
    driver.store(handle, 0, *PROMPT)
    driver.ask(b"s", release(handle))
    assert driver.counts() == {"cached": N_BLOCKS}
    walk_in_steps_of(STEP, monkeypatch)
    return driver


def release(handle: Handle) -> Release:
    return Release(*handle.fields, COMPLETED)


def opened(driver: Driver, *tokens: int, **other: int) -> Handle:
    """Allocate to the end."""
    driver.ask(b"s", alloc(1, *tokens, **other))
    asked = driver.asked
    driver.settle()
    return Handle(b"s", 1, driver.replies[asked])


def test_a_long_prompt_is_matched_in_steps(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT, 99))
    asked = driver.asked
    for step in range(1, STEPS):
        assert driver.core.next_deadline() == -math.inf
        assert asked not in driver.replies
        assert driver.counts() == {"active": step * STEP, "cached": N_BLOCKS - step * STEP}
        driver.pass_time(0)
    assert driver.replies[asked] == Allocated(1, 2, 14, 2, slots_of_bytes(range(7)))
    assert driver.counts() == {"active": N_BLOCKS}
    assert driver.core.next_deadline() is None
    counters = driver.counters
    assert (counters.queried_tokens, counters.hit_tokens) == (15, 14)
    assert counters.sequences_opened == 2


@pytest.mark.parametrize("n_tokens", range(len(PROMPT) + 1))
def test_every_length_matches_as_in_one_go(driver: Driver, n_tokens: int) -> None:
    tokens = PROMPT[:n_tokens]
    driver.ask(b"s", alloc(1, *tokens, 77))
    asked = driver.asked
    driver.settle()
    n_blocks = -(-n_tokens // 2)
    last = 0 if not n_blocks else 2
    expected = Allocated(1, 2, n_tokens, last, slots_of_bytes(range(n_blocks)))
    assert driver.replies[asked] == expected
    (sequence,) = driver.cache.sequences()
    assert (sequence.tip.end, sequence.length) == (n_tokens // 2 * 2, n_tokens)


def test_long_prompts_of_several_take_turns(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT))
    driver.ask(b"s", alloc(1, *PROMPT))
    first, second = driver.asked - 1, driver.asked
    for _ in range(2 * (STEPS - 1) - 1):
        driver.pass_time(0)
    assert first in driver.replies
    assert second not in driver.replies
    driver.pass_time(0)
    assert second in driver.replies


def test_what_is_matched_so_far_is_leased(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT))
    driver.ask(b"s", Evict("", 0))
    driver.settle()
    assert driver.replies[driver.asked] == Evicted(N_BLOCKS - STEP, (N_BLOCKS - STEP) * PAGE)
    assert driver.replies[driver.asked - 1].matched_tokens == 2 * STEP


def test_nobody_knows_a_handle_before_the_reply(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT))
    asked = driver.asked
    (sequence,) = driver.cache.sequences()
    assert sequence.state is State.PENDING
    for message in (
        Release(1, 1, 2, COMPLETED),
        Get(1, 1, 2, 0),
        append(Handle(b"s", 1, Allocated(1, 2, 0, 0, b"")), 0, 1),
        KeepAlive(1, [1], [2]),
    ):
        assert driver.refusal(b"s", message) is StaleHandle
    assert driver.ask(b"s", KeepAlive(1, [], [])) == KeptAlive([])
    driver.settle()
    handle = Handle(b"s", 1, driver.replies[asked])
    assert driver.ask(b"s", Get(*handle.fields, 0)).sealed_tokens == 14


def test_the_id_is_in_use_meanwhile(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT))
    driver.ask(b"s", alloc(1, *PROMPT))
    assert driver.refusal(b"s", alloc(1)) is NoSequenceFree
    driver.ask(b"s", alloc(1, wait_ms=1000))
    waiting = driver.asked
    driver.settle()
    assert waiting not in driver.replies


def test_idle_time_begins_with_the_reply(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT, idle_ms=1000))
    driver.pass_time(5.0)
    driver.settle()
    assert driver.core.next_deadline() == 6.0


def test_a_context_that_closes_ends_its_long_allocs(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT))
    asked = driver.asked
    driver.ask(b"s", CloseContext(1))
    driver.settle()
    assert isinstance(driver.replies[asked], StaleHandle)
    assert driver.refusal(b"s", alloc(1)) is UnknownContext
    assert driver.counts() == {"cached": N_BLOCKS}


def test_who_dies_leaves_nothing_of_a_long_alloc(driver: Driver) -> None:
    driver.connect("other")
    driver.ask(b"s", alloc(1, *PROMPT))
    asked = driver.asked
    driver.disconnect(b"s")
    driver.settle()
    assert asked not in driver.replies
    assert driver.counts() == {"cached": N_BLOCKS}
    assert (driver.cache.open_sequences, driver.cache.openings) == (
        0,
        type(driver.cache.openings)(),
    )


def test_a_long_alloc_reserves_when_it_has_matched(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT, reserve=4))
    asked = driver.asked
    driver.settle()
    assert asked not in driver.replies
    driver.back()
    assert driver.replies[asked].matched_tokens == 14
    assert driver.counts() == {"active": N_BLOCKS, "filling": 2}


def test_a_long_alloc_that_cannot_reserve_leaves_nothing(driver: Driver) -> None:
    driver.ask(b"s", alloc(1, *PROMPT, reserve=1000))
    asked = driver.asked
    driver.settle()
    assert isinstance(driver.replies[asked], AllLeased | KvdError)
    assert driver.counts() == {"cached": N_BLOCKS}
    assert driver.cache.open_sequences == 0


def test_a_long_alloc_that_is_refused_leaves_its_id_to_who_waits(driver: Driver) -> None:
    for tokens in (PROMPT, ()):
        driver.ask(b"s", alloc(1, *tokens, reserve=1000 if tokens else 0))
    driver.ask(b"s", alloc(1, wait_ms=1000))
    waiting = driver.asked
    driver.settle()
    assert isinstance(driver.replies[waiting], Allocated)


# --- the end of a lease


def test_a_long_lease_ends_in_steps_from_its_end(driver: Driver) -> None:
    handle = opened(driver, *PROMPT)
    assert driver.ask(b"s", release(handle)) is not None
    assert driver.cache.open_sequences == 0
    for step in range(1, STEPS):
        assert driver.core.next_deadline() == -math.inf
        assert driver.counts() == {"cached": step * STEP, "active": N_BLOCKS - step * STEP}
        driver.pass_time(0)
    assert driver.counts() == {"cached": N_BLOCKS}
    assert driver.core.next_deadline() is None
    driver.ask(b"s", Evict("", 0))
    assert [effect.slot for effect in driver.of_kind(DropRecord)] == [6, 5, 4, 3, 2, 1, 0]


def test_each_step_is_a_use_of_what_is_left(driver: Driver) -> None:
    """So that the records tell the order in which the blocks would be evicted. The record of block
    6 tells its last use already, of which nothing was later."""
    handle = opened(driver, *PROMPT)
    driver.ask(b"s", release(handle))
    uses = driver.of_kind(UseRecord)
    while driver.core.next_deadline() == -math.inf:
        driver.pass_time(0)
        uses += driver.of_kind(UseRecord)
    assert [use.slot for use in uses] == [4, 2, 0]
    assert [use.last_use for use in uses] == sorted({use.last_use for use in uses})


def test_who_needs_the_room_need_not_wait_for_it(driver: Driver) -> None:
    """A client that has released everything must not hear that everything is leased."""
    handle = opened(driver, *PROMPT)
    n_free = (BUDGET - FULL_DIRECTORY - STAGING) // PAGE - N_BLOCKS
    driver.ask(b"s", release(handle))
    assert driver.refusal(b"s", alloc(1, reserve=2 * (n_free + N_BLOCKS + 1))) is not TooMany
    driver.cache.budget.charge_staging(
        driver.cache.budget.tenant("t"), driver.cache.budget.unassigned, []
    )
    # (That charge was not made by a session, so there is no recount from here on.)
    driver.checked = False
    taken = driver.alloc(b"s", 1, reserve=2 * N_BLOCKS)
    assert taken.matched == 0
    assert driver.counts() == {"filling": N_BLOCKS}


def test_an_eviction_of_all_waits_for_what_was_released_before(driver: Driver) -> None:
    handle = opened(driver, *PROMPT)
    driver.ask(b"s", release(handle))
    driver.ask(b"s", Evict("", 0))
    asked = driver.asked
    driver.settle()
    assert driver.replies[asked] == Evicted(N_BLOCKS, N_BLOCKS * PAGE)


def test_the_prompt_can_be_leased_again_while_it_is_let_go(driver: Driver) -> None:
    handle = opened(driver, *PROMPT)
    driver.ask(b"s", release(handle))
    again = opened(driver, *PROMPT)
    assert again.matched == 14
    assert driver.counts() == {"active": N_BLOCKS}


def test_a_death_lets_go_step_by_step_whatever_the_number_of_sequences(driver: Driver) -> None:
    driver.connect("other")
    handles = [opened(driver, *PROMPT), opened(driver, *PROMPT[:4])]
    driver.store(handles[1], 4, 50, 51, 52, 53, 54, 55)
    n_blocks = N_BLOCKS + 3
    assert driver.counts() == {"active": n_blocks}
    driver.disconnect(b"s")
    assert driver.counts() == {"cached": STEP, "active": n_blocks - STEP}
    driver.settle()
    assert driver.counts() == {"cached": n_blocks}


# --- anything, at any moment


class Steps:
    """Random steps of two clients over a tiny vocabulary, with prompts of up to 10 blocks. The
    recount after each event is the test."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.driver = Driver(random.choice((1 << 16, 3 << 15)) + 2 * STAGING + (1 << 15))
        self.n_sessions = 0
        self.names: list[str] = []
        self.known: dict[int, tuple[bytes, int]] = {}
        """Of allocs that are not answered: whose, and in which context."""
        self.handles: list[Handle] = []
        self.contexts: dict[bytes, int] = {}
        self.connect()
        self.connect()

    def connect(self) -> None:
        if len(self.names) == 2:
            return
        self.n_sessions += 1
        name = f"s{self.n_sessions}"
        session = self.driver.connect(name)
        if session not in self.driver.cache.sessions:  # there is no room for its staging
            return
        self.driver.register(session)
        self.contexts[session] = self.driver.context(session, n_ids=3)
        self.names.append(name)

    def disconnect(self) -> None:
        if not self.names:
            self.connect()
            return
        session = self.names.pop(self.random.randrange(len(self.names))).encode()
        self.driver.disconnect(session)
        self.handles = [each for each in self.handles if each.session != session]
        self.known = {key: each for key, each in self.known.items() if each[0] != session}
        del self.contexts[session]
        self.connect()

    def alloc(self) -> None:
        if not self.names:
            return
        session = self.random.choice(self.names).encode()
        reserve = self.random.choice((0, 0, 0, 2, 5))
        self.driver.ask(session, alloc(self.contexts[session], *self.tokens(20), reserve=reserve))
        self.known[self.driver.asked] = (session, self.contexts[session])

    def append(self) -> None:
        if handle := self.handle():
            sequences = self.driver.cache.contexts[handle.context].open
            tip = sequences[handle.seq_id].tip.end if handle.seq_id in sequences else 0
            self.driver.ask(handle.session, append(handle, tip, *self.tokens(9), 1))

    def release(self) -> None:
        if handle := self.handle():
            self.handles.remove(handle)
            self.driver.ask(handle.session, release(handle))

    def evict(self) -> None:
        if not self.names:
            return
        session = self.random.choice(self.names).encode()
        self.driver.ask(session, Evict("", self.random.choice((0, 1, 3))))

    def work(self) -> None:
        if not self.driver.jobs:
            return
        bad = self.random.choice(((), (), (), (0,), (0,), (1, 2)))
        job = self.driver.jobs[0]
        if type(job).__name__ == "Copy":
            self.driver.copy(*bad)
        else:
            self.driver.back()

    def tick(self) -> None:
        self.driver.pass_time(0)

    def handle(self) -> Handle | None:
        for asked, (session, context) in list(self.known.items()):
            reply: Any = self.driver.replies.get(asked)
            if reply is not None:
                del self.known[asked]
            if isinstance(reply, Allocated):
                self.handles.append(Handle(session, context, reply))
        return self.random.choice(self.handles) if self.handles else None

    def tokens(self, most: int) -> tuple[int, ...]:
        n_tokens = self.random.randint(0, most)
        return tuple(self.random.choices((1, 2, 256), (9, 1, 1), k=n_tokens))

    def step(self) -> None:
        steps = [self.alloc, self.append, self.release, self.work, self.tick]
        rare = [self.evict, self.disconnect]
        (step,) = self.random.choices([*steps, *rare], [*[8] * 5, 1, 1])
        step()

    def live(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.step()
        self.names, names = [], self.names
        for name in names:
            self.driver.disconnect(name.encode())
        self.driver.work()
        self.driver.settle()
        assert set(self.driver.counts()) <= {"cached", "free"}
        assert not self.driver.cache.budget.letting_go


@pytest.mark.parametrize("seed", range(20))
def test_anything_may_happen_between_two_steps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(seed)
    walk_in_steps_of(random.choice((1, 2, 3)), monkeypatch)
    Steps(random).live(400)


def test_no_usual_prompt_needs_a_second_step() -> None:
    """32,768 tokens in blocks of 32."""
    assert WALK_BLOCKS >= 32_768 // 32


def slots_of_bytes(slots: range) -> bytes:
    packed = b"".join(slot.to_bytes(4, "little") for slot in slots)
    assert slots_of(packed) == list(slots)
    return packed
