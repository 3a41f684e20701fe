"""Registering models, and contexts as they open. What closing one ends: test_sequences.py."""

import pytest

from kvd.core.events import ArenaFailed, CreateArena, ShareArena
from kvd_proto.errors import (
    AllLeased,
    BadMessage,
    BudgetTooSmall,
    GeometryMismatch,
    ModelTooLarge,
    SequenceLimit,
    UnknownModel,
)
from kvd_proto.geometry import LayerGeometry
from kvd_proto.keys import arena_fingerprint, root_key
from kvd_proto.messages import ContextOpened, ModelRegistered, OpenContext
from tests.core.driver import BUDGET, PAGE, SMALL_DIRECTORY, STAGING, Driver, model

FIRST_DIRECTORY = 5 * PAGE


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.connect("s")
    return driver


def test_the_first_to_register_a_model_makes_its_arena(driver: Driver) -> None:
    slots = BUDGET // PAGE
    assert driver.ask(b"s", model()) == ModelRegistered(1, 1, PAGE, PAGE, slots)
    fingerprint = arena_fingerprint(b"m".ljust(32), "array", 2)
    assert driver.effects[:2] == [
        CreateArena(
            arena=1,
            tenant="t",
            name="m",
            fingerprint=fingerprint,
            payload_format="array",
            block_tokens=2,
            layers=(LayerGeometry("f16", 1024, "f16", 1024),),
            payload_bytes=PAGE,
            stride_bytes=PAGE,
            slots=slots,
            directory_bytes=FIRST_DIRECTORY - PAGE,
            root_key=root_key(fingerprint),
        ),
        ShareArena(b"s", 1),
    ]
    assert driver.cache.budget.unassigned == BUDGET - STAGING - FIRST_DIRECTORY


def test_others_find_it_and_everybody_is_sent_its_descriptor_once(driver: Driver) -> None:
    driver.register(b"s")
    assert driver.register(b"s") == 1
    assert driver.of_kind(ShareArena) == []
    driver.connect("other")
    assert driver.register(b"other") == 1
    assert (driver.of_kind(ShareArena), driver.of_kind(CreateArena)) == (
        [ShareArena(b"other", 1)],
        [],
    )


def test_each_tenant_has_an_arena_of_its_own(driver: Driver) -> None:
    driver.register(b"s")
    driver.connect("stranger", tenant="other")
    assert driver.register(b"stranger") == 2
    # One may not use the other's, though it may know its number.
    assert driver.refusal(b"stranger", OpenContext(1, 1, [])) is UnknownModel
    assert driver.refusal(b"s", OpenContext(2, 1, [])) is UnknownModel


def test_a_model_is_one_fingerprint_format_and_block_size(driver: Driver) -> None:
    assert driver.register(b"s") == 1
    assert driver.register(b"s", fingerprint=b"x" * 32) == 2
    assert driver.register(b"s", block_tokens=4) == 3
    assert driver.register(b"s", payload_format="llama-state") == 4
    assert driver.register(b"s", name="m", fingerprint=b"m".ljust(32)) == 1


def test_another_geometry_under_the_same_fingerprint(driver: Driver) -> None:
    driver.register(b"s")
    error = driver.ask(b"s", model(layers=[["f16", 1024, "f16", 512]]))
    assert isinstance(error, GeometryMismatch)
    assert error.details["registered_bytes_per_token"] == 2048
    assert error.details["asked_bytes_per_token"] == 1536
    assert driver.effects[:-1] == []


def test_formats_and_types_that_are_not_known(driver: Driver) -> None:
    for other in (
        {"payload_format": "pickle"},
        {"payload_format": "llama-state", "layers": [["q9_9", 34, "f16", 2]]},
        {"payload_format": "llama-state", "layers": [["q8_0", 33, "f16", 2]]},
        {"layers": [["f16", 0, "f16", 0]]},
    ):
        assert driver.refusal(b"s", model(**other)) is BadMessage
    assert not driver.cache.budget.arenas


@pytest.mark.parametrize("spare", [0, -1])
def test_a_model_fits_if_one_block_and_its_directory_do(spare: int) -> None:
    driver = Driver(SMALL_DIRECTORY + 3 * PAGE + spare)
    driver.connect("s", staging=0)
    if spare < 0:
        assert driver.refusal(b"s", model(pages=3)) is ModelTooLarge
        assert not driver.cache.budget.arenas
        return
    context = driver.context(b"s", driver.register(b"s", pages=3))
    assert driver.alloc(b"s", context).seq_id == 0
    assert driver.cache.budget.arenas[1].cost_of_fresh(1) == driver.cache.budget.unassigned


def test_a_model_whose_single_block_is_larger_than_the_budget(driver: Driver) -> None:
    error = driver.ask(b"s", model(pages=300))
    assert isinstance(error, ModelTooLarge)
    assert error.details["stride_bytes"] == 300 * PAGE
    assert error.details["budget_bytes"] == BUDGET


def test_records_of_long_blocks_count_too() -> None:
    """One slot fits, but not the directory, which has room for the records of all slots."""
    driver = Driver(6 * PAGE)
    driver.connect("s", staging=0)
    layers = [["f16", 1, "f16", 1]]
    assert driver.refusal(b"s", model(block_tokens=1024, layers=layers)) is ModelTooLarge


def test_no_room_for_another_directory() -> None:
    driver = Driver(SMALL_DIRECTORY + STAGING)
    driver.connect("s", staging=STAGING)
    driver.register(b"s")
    assert driver.refusal(b"s", model("second")) is AllLeased
    driver.disconnect(b"s")
    driver.connect("s", staging=0)
    driver.register(b"s")
    for number in range(3):
        assert driver.register(b"s", f"more {number}") == 2 + number
    assert driver.refusal(b"s", model("last")) is BudgetTooSmall


def test_an_arena_that_could_not_be_made_is_forgotten(driver: Driver) -> None:
    driver.register(b"s")
    before = driver.cache.budget.unassigned
    assert driver.register(b"s", "second") == 2
    driver.handle(ArenaFailed(2))
    assert driver.effects == []
    assert driver.cache.budget.unassigned == before
    assert driver.refusal(b"s", OpenContext(2, 1, [])) is UnknownModel
    # Its number is not given again: the shell may know it still.
    assert driver.register(b"s", "second") == 3
    assert driver.of_kind(ShareArena) == [ShareArena(b"s", 3)]


# --- contexts


def test_contexts_are_numbered_and_name_their_busy_ids(driver: Driver) -> None:
    driver.register(b"s")
    assert driver.ask(b"s", OpenContext(1, 4, [])) == ContextOpened(1, [])
    assert driver.ask(b"s", OpenContext(1, 4, [2, 0])) == ContextOpened(2, [1, 2])
    assert list(driver.cache.contexts[2].free_ids) == [1, 3]


def test_free_ids_come_in_order_however_many_are_busy() -> None:
    driver = Driver(n_seq_max=255, max_sequences=255)
    driver.connect("s")
    driver.register(b"s")
    free = [7, 64, 128, 250]
    busy = [seq_id for seq_id in range(255) if seq_id not in free]
    driver.context(b"s", n_ids=255, busy=busy)
    assert list(driver.cache.contexts[1].free_ids) == free


def test_what_is_wrong_with_a_context(driver: Driver) -> None:
    driver.register(b"s")
    for message in (
        OpenContext(1, 9, []),
        OpenContext(1, 4, [4]),
        OpenContext(1, 4, [1, 1]),
        OpenContext(1, 4, [0, 1, 2, 3, 4]),
    ):
        assert driver.refusal(b"s", message) is BadMessage
    assert driver.refusal(b"s", OpenContext(2, 4, [])) is UnknownModel
    assert not driver.cache.contexts


def test_busy_ids_count_as_sequences() -> None:
    driver = Driver(max_sequences=3)
    driver.connect("s")
    driver.register(b"s")
    driver.context(b"s", busy=[0, 1])
    assert driver.refusal(b"s", OpenContext(1, 4, [0, 1])) is SequenceLimit
    assert driver.ask(b"s", OpenContext(1, 4, [3])) == ContextOpened(2, [1])
