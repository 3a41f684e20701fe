"""How long requests take: answered at once, later, or never."""

from kvd.timing import INVALID, RequestTimes
from kvd_proto.errors import BY_CODE, BadMessage, NoSpace
from kvd_proto.messages import OPERATIONS, Alloc, Done, Ping, Release

ALLOC = Alloc(1, "", b"", 0, 0, 0)
RELEASE = Release(1, 1, 1, 0)


def counts(times: RequestTimes) -> dict[str, int]:
    found = {name: sum(each.counts) for name, each in times.durations.items()}
    return {name: count for name, count in found.items() if count}


def test_every_operation_has_a_histogram_and_every_error_a_counter() -> None:
    times = RequestTimes()
    assert len(times.durations) == len(OPERATIONS) + 1
    assert {"alloc", "keep_alive", "register_model", INVALID} <= set(times.durations)
    assert times.errors == dict.fromkeys(BY_CODE, 0)


def test_what_is_answered_while_it_is_served() -> None:
    times = RequestTimes()
    for number in range(3):
        times.begin(b"s", number, RELEASE)
        times.answered(b"s", number, Done())
        times.finish()
    assert counts(times) == {"release": 3}
    assert 0 < times.durations["release"].total < 1
    assert not times._later


def test_what_is_answered_later_counts_until_then() -> None:
    times = RequestTimes()
    times.begin(b"s", 1, ALLOC)
    times.finish()
    assert counts(times) == {}
    times.begin(b"t", 1, RELEASE)  # the same number, of somebody else
    times.answered(b"s", 1, NoSpace("full"))
    times.answered(b"t", 1, Done())
    times.finish()
    assert counts(times) == {"alloc": 1, "release": 1}
    assert times.durations["alloc"].total > times.durations["release"].total
    assert times.errors["no_space"] == 1
    assert not times._later, "nothing is kept of what is over"


def test_what_cannot_be_decoded_is_an_operation_of_its_own() -> None:
    times = RequestTimes()
    times.begin(b"s", 0, BadMessage("nonsense"))
    times.answered(b"s", 0, BadMessage("nonsense"))
    times.finish()
    assert counts(times) == {INVALID: 1}
    assert times.errors["bad_message"] == 1


def test_who_has_gone_leaves_nothing_behind() -> None:
    times = RequestTimes()
    for session in (b"s", b"t"):
        times.begin(session, 1, ALLOC)
        times.finish()
    times.forget(b"s")
    times.forget(b"never was")
    times.answered(b"s", 1, Done())
    assert list(times._later) == [b"t"]
    assert counts(times) == {}


def test_an_answer_to_nothing_that_was_asked_is_no_request() -> None:
    times = RequestTimes()
    times.begin(b"s", 1, Ping())
    times.answered(b"s", 2, Done())
    times.answered(b"s", 1, Done())
    times.finish()
    assert counts(times) == {"ping": 1}
