"""What sessions hold, counted in steps: of one moment, whatever happens meanwhile, and adding up.

The expected counts come from walking each lease to its root, at once.
"""

from random import Random

import pytest

from kvd.core import holdings
from kvd.core.amounts import Amount
from kvd.core.cache import Cache
from kvd.core.holdings import Holdings
from kvd.core.tree import ADOPTED, SEALED, Block
from kvd_proto.messages import COMPLETED, Release
from tests.core.driver import PAGE, Driver, alloc, walk_in_steps_of
from tests.core.test_long_walks import Steps


def counted(cache: Cache) -> Holdings:
    """Count, without a pause."""
    walk = holdings.count(cache)
    while True:
        try:
            next(walk)
        except StopIteration as stop:
            found: Holdings = stop.value
            return found


def leased_by_each(cache: Cache) -> dict[str, set[Block]]:
    """By the client's name: the different sealed blocks that its sequences lease."""
    found: dict[str, set[Block]] = {each.client: set() for each in cache.sessions.values()}
    for sequence in cache.sequences():
        node = sequence.leased
        while node.parent is not None:
            if node.state in (ADOPTED, SEALED):
                found[sequence.context.session.client].add(node)
            node = node.parent
    return found


def amount_of(blocks: set[Block]) -> Amount:
    stride = sum(block.arena.stride for block in blocks)
    return Amount(len(blocks), sum(block.n_tokens for block in blocks), stride)


def check(cache: Cache, expected: dict[str, set[Block]], found: Holdings) -> None:
    shared: dict[str, set[Block]] = {name: set() for name in cache.budget.tenants}
    assert {session.client for session in found.of} == expected.keys()
    for session, holding in found.of.items():
        own = expected[session.client]
        others = {
            block for name, blocks in expected.items() if name != session.client for block in blocks
        }
        assert holding.leased == amount_of(own), session.client
        assert holding.alone == amount_of(own - others), session.client
        shared[session.tenant.name] |= own & others
    assert found.together == {name: amount_of(blocks) for name, blocks in shared.items()}


def test_what_several_lease_is_counted_for_each_and_once_together() -> None:
    driver = Driver()
    for name in ("a", "b"):
        driver.connect(name)
        driver.register(name.encode())
    contexts = {name: driver.context(name) for name in (b"a", b"b")}
    first = driver.alloc(b"a", contexts[b"a"])
    driver.store(first, 0, 1, 2, 3, 4, 5)  # three blocks, the last one open
    driver.alloc(b"b", contexts[b"b"], 1, 2)
    driver.alloc(b"b", contexts[b"b"], 1, 2, 3)  # the second block agrees in part
    found = {session.client: held for session, held in counted(driver.cache).of.items()}
    assert found["a"] == holdings.Holding(Amount(3, 5, 3 * PAGE), Amount(1, 1, PAGE))
    assert found["b"] == holdings.Holding(Amount(2, 4, 2 * PAGE), Amount())
    assert counted(driver.cache).together == {"t": Amount(2, 4, 2 * PAGE)}
    driver.ask(b"a", Release(*first.fields, COMPLETED))
    found = {session.client: held for session, held in counted(driver.cache).of.items()}
    assert found["a"] == holdings.Holding()
    assert found["b"].alone == found["b"].leased == Amount(2, 4, 2 * PAGE)
    assert counted(driver.cache).together == {"t": Amount()}


def test_what_is_reserved_or_being_stored_is_its_sessions() -> None:
    driver = Driver()
    driver.connect("a")
    driver.register(b"a")
    context = driver.context(b"a")
    session = driver.cache.sessions[b"a"]
    driver.ask(b"a", alloc(context, reserve=5))
    assert session.reserved == Amount(3, 0, 3 * PAGE)  # at once, though it has no memory yet
    driver.work()
    handle = driver.alloc(b"a", context)
    driver.append(handle, 0, 1, 2, 3)
    assert session.filling == Amount(2, 3, 2 * PAGE)
    assert driver.cache.budget.arenas[1].filling_tokens == 3
    assert counted(driver.cache).of[session] == holdings.Holding(), "leased, and not sealed yet"
    driver.work()
    assert session.filling == Amount()
    assert driver.cache.budget.arenas[1].filling_tokens == 0
    assert counted(driver.cache).of[session].alone == Amount(2, 3, 2 * PAGE)


def test_who_takes_over_has_it_from_then_on() -> None:
    driver = Driver()
    handles = {}
    for name in ("a", "b"):
        driver.connect(name)
        driver.register(name.encode())
        handles[name] = driver.alloc(name.encode(), driver.context(name.encode()))
        driver.append(handles[name], 0, 1, 2)
    first, second = driver.cache.sessions[b"a"], driver.cache.sessions[b"b"]
    assert (first.filling.blocks, second.filling.blocks) == (1, 0)
    driver.back()
    driver.copy(0)  # the first copy is not accepted
    assert (first.filling.blocks, second.filling.blocks) == (0, 1)
    driver.work()
    assert (first.filling, second.filling) == (Amount(), Amount())


@pytest.mark.parametrize("seed", range(20))
def test_a_count_in_steps_is_of_its_first_moment(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event is followed by a recount, of what sessions fill and have reserved, too."""
    random = Random(seed)
    walk_in_steps_of(random.choice((1, 2, 1024)), monkeypatch)
    monkeypatch.setattr(holdings, "STEP_BLOCKS", 1)
    steps = Steps(random)
    in_between = 0
    for _ in range(80):
        for _ in range(5):
            steps.step()
        cache = steps.driver.cache
        expected = leased_by_each(cache)
        walk = holdings.count(cache)
        while True:
            try:
                next(walk)
            except StopIteration as stop:
                check(cache, expected, stop.value)
                break
            in_between += 1
            steps.step()
    assert in_between > 20
