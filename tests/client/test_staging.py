"""Room in the staging: who gets it, who waits for it, and that it always comes back."""

import mmap
import random
import select
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import zmq

import kvd_client
from kvd_client import errors
from kvd_client.staging import Staged, StagingArea
from tests.client.blocks import BLOCK_TOKENS, MODEL, STRIDE, eventually, holds, payloads
from tests.support import Daemon, running_daemon

PAGE = 4096
PROMPT = list(range(3 * BLOCK_TOKENS))


def area_of(pages: int) -> StagingArea:
    """With so many pages behind the header."""
    return StagingArea(mmap.mmap(-1, (1 + pages) * PAGE))


def complete(area: StagingArea, number: int) -> None:
    """What the daemon does when all commits up to `number` are finished."""
    np.frombuffer(area.buffer, "<u8", 1)[0] = number


def test_first_fit_in_pages_behind_the_header() -> None:
    area = area_of(4)
    staged = area.take([1, PAGE, PAGE + 1])
    assert staged is not None
    assert staged.offsets == [PAGE, 2 * PAGE, 3 * PAGE]
    assert [len(staged.block(index)) for index in range(3)] == [1, PAGE, PAGE + 1]
    assert area.take([1]) is None
    area.give_back(staged)
    again = area.take([4 * PAGE])
    assert again is not None
    assert again.offsets == [PAGE]


def test_what_never_fits_is_refused_and_what_does_not_fit_now_takes_nothing() -> None:
    area = area_of(4)
    with pytest.raises(errors.StagingFull):
        area.take([PAGE] * 5)
    first = area.take([PAGE])
    assert first is not None
    assert area.take([2 * PAGE, 2 * PAGE]) is None
    assert area.take([3 * PAGE]) is not None


def test_commits_free_their_room_when_they_are_finished_and_not_before() -> None:
    area = area_of(2)
    first, second = area.take([PAGE]), area.take([PAGE])
    assert first is not None
    assert second is not None
    area.committed(second, 2)
    area.committed(first, 1)
    assert area.oldest_commit == 1
    assert area.take([PAGE]) is None
    complete(area, 1)
    again = area.take([PAGE])
    assert again is not None
    assert again.offsets == first.offsets
    assert area.oldest_commit == 2


def test_what_is_kept_is_freed_by_its_owner_alone() -> None:
    area = area_of(1)
    staged = area.take([PAGE])
    assert staged is not None
    staged.kept = True
    area.committed(staged, 1)
    complete(area, 1)
    assert area.take([PAGE]) is None
    staged.kept = False
    area.give_back(staged)
    assert area.take([PAGE]) is not None


def test_room_is_never_given_twice_and_all_of_it_comes_back() -> None:
    """Against the simplest reference: the set of pages that are out."""
    area, draw = area_of(64), random.Random(7)
    out: list[Staged] = []
    committed: list[tuple[int, Staged]] = []
    done = 0
    for number in range(1, 3000):
        action = draw.random()
        if action < 0.5:
            sizes = [draw.randrange(1, 5 * PAGE) for _ in range(draw.randrange(1, 4))]
            staged = area.take(sizes)
            committed = [entry for entry in committed if entry[0] > done]
            if staged is not None:
                out.append(staged)
            pages = [page for each in (*out, *(s for _, s in committed)) for page in pages_of(each)]
            assert len(pages) == len(set(pages))
            assert all(0 < page <= 64 for page in pages)
        elif out and action < 0.75:
            area.give_back(out.pop(draw.randrange(len(out))))
        elif out:
            staged = out.pop(draw.randrange(len(out)))
            area.committed(staged, number)
            committed.append((number, staged))
            if draw.random() < 0.5:
                done = number
                complete(area, done)
    for staged in out:
        area.give_back(staged)
    complete(area, 3000)
    assert area.take([64 * PAGE]) is not None


def pages_of(staged: Staged) -> list[int]:
    return [
        page
        for offset, size in zip(staged.offsets, staged.sizes, strict=True)
        for page in range(offset // PAGE, (offset + size - 1) // PAGE + 1)
    ]


# --- with a daemon


def test_many_posted_appends_flow_through_a_small_staging(daemon: Daemon) -> None:
    """Of two blocks at a time 600 are stored, without a word about it."""
    tokens = list(range(600 * BLOCK_TOKENS))
    blocks = payloads(tokens)
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=2 * STRIDE) as client,
        client.open_context(MODEL) as context,
        context.alloc([]) as sequence,
    ):
        commits = [
            sequence.post_append(tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS], [blocks[at]])
            for at in range(600)
        ]
        assert client.flush().failures == []
        assert all(commit.answered and commit.error is None for commit in commits)
        assert sum(commit.stored for commit in commits) == 600
        assert sequence.refresh() == len(tokens)
        assert holds(sequence, tokens)


def test_unanswered_appends_are_limited_however_much_room_there_is(daemon: Daemon) -> None:
    """More replies than that the daemon would drop."""
    tokens = list(range(1000 * BLOCK_TOKENS))
    blocks = payloads(tokens)
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=8 << 20) as client,
        client.open_context(MODEL) as context,
        context.alloc([]) as sequence,
    ):
        commits: list[kvd_client.Commit] = []

        def post_all() -> None:
            for at in range(1000):
                staged = sequence.stage(BLOCK_TOKENS, wait=0.1)
                staged.block(0)[:] = blocks[at]
                block = tokens[at * BLOCK_TOKENS : (at + 1) * BLOCK_TOKENS]
                commits.append(sequence.post_append(block, staged))

        daemon.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(errors.StagingFull):
                post_all()
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert 100 < len(commits) < 500
        client.flush()
        assert sequence.refresh() == len(commits) * BLOCK_TOKENS
        assert holds(sequence, tokens[: len(commits) * BLOCK_TOKENS])


def test_a_posted_append_that_is_refused_gives_its_room_back(daemon: Daemon) -> None:
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=2 * STRIDE) as client,
        client.open_context(MODEL) as context,
        context.alloc([], reserve_tokens=BLOCK_TOKENS) as sequence,
    ):
        for _ in range(10):
            commit = sequence.post_append(PROMPT[:16], payloads(PROMPT[:16]))
            assert sequence.full_tokens == 16
            client.ping()  # any later call finds out
            assert commit.answered
            assert isinstance(commit.error, errors.ReservationExceeded)
            assert sequence.full_tokens == 0
        with pytest.raises(errors.ReservationExceeded):
            client.flush(commit)
        client.flush(sequence.append(PROMPT[:8], payloads(PROMPT[:8])))
        assert sequence.refresh() == 8


def post_what_is_refused(sequence: kvd_client.Sequence) -> None:
    """Post an append that the daemon refuses, and wait until its answer is here, but not yet taken
    in."""
    sequence.post_append(PROMPT[:16], payloads(PROMPT[:16]))
    session = sequence.session
    assert session is not None
    arrived, _, _ = select.select([session.dealer.getsockopt(zmq.FD)], [], [], 10)
    assert arrived


@pytest.mark.parametrize("beforehand", [False, True])
def test_what_was_made_for_another_position_is_not_stored(
    client: kvd_client.Client, beforehand: bool
) -> None:
    """The answer that moves the sequence back is taken in within the next append, or in a call
    between the caller's look at where it is and that append."""
    with client.open_context(MODEL) as context:
        with context.alloc([], reserve_tokens=BLOCK_TOKENS) as sequence:
            post_what_is_refused(sequence)
            start = sequence.full_tokens
            assert start == 16
            rest, blocks = PROMPT[16:], payloads(PROMPT, 16)
            if beforehand:
                staged = sequence.stage(len(rest))
                staged.block(0)[:] = blocks[0]
                append = partial(sequence.append, rest, staged, start=start)
            else:
                append = partial(sequence.append, rest, blocks)
            with pytest.raises(errors.BadPosition):
                append()
            assert sequence.full_tokens == 0
            client.flush(sequence.append(PROMPT[:8], payloads(PROMPT[:8])))
        with context.alloc(rest) as sequence:
            assert sequence.matched_tokens == 0
        with context.alloc(PROMPT[:8]) as sequence:
            assert holds(sequence, PROMPT[:8])


def reserve_all(context: kvd_client.Context) -> kvd_client.Sequence:
    """A sequence with all the room that the budget still has."""
    for n_blocks in range(400, 0, -1):
        with suppress(errors.AllLeased, errors.BudgetTooSmall):
            return context.alloc([], reserve_tokens=n_blocks * BLOCK_TOKENS)
    raise AssertionError("there is no room at all")


def test_appends_behind_a_refused_one_are_refused_too_and_the_sequence_goes_on(
    tmp_path: Path,
) -> None:
    with (
        running_daemon(
            "--max-memory",
            "1MiB",
            runtime_dir=tmp_path / "run",
            environ={"KVD_MAX_RESERVED": "1MiB"},
        ) as daemon,
        kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 16) as client,
        client.open_context(MODEL, n_seq_max=2) as context,
        context.alloc([]) as sequence,
    ):
        hog = reserve_all(context)
        daemon.process.send_signal(signal.SIGSTOP)
        commits = [
            sequence.post_append(PROMPT[at : at + 8], payloads(PROMPT[: at + 8], at))
            for at in (0, 8, 16)
        ]
        daemon.process.send_signal(signal.SIGCONT)
        client.ping()
        assert [type(commit.error) for commit in commits] == [
            errors.AllLeased,
            errors.BadPosition,
            errors.BadPosition,
        ]
        assert sequence.full_tokens == 0
        hog.release()
        client.flush(sequence.append(PROMPT, payloads(PROMPT)))
        assert sequence.refresh() == len(PROMPT)


def test_room_that_others_hold_back_is_not_waited_for(
    daemon: Daemon, client: kvd_client.Client
) -> None:
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=2 * STRIDE) as small,
        small.open_context(MODEL) as context,
        context.alloc([]) as sequence,
    ):
        staged = sequence.stage(16)
        with pytest.raises(errors.StagingFull):
            sequence.stage(8)
        with pytest.raises(errors.StagingFull):
            sequence.stage(17)
        sequence.unstage(staged)
        sequence.unstage(sequence.stage(16))
        for n_tokens in (0, -8):
            with pytest.raises(errors.BadMessage):
                sequence.stage(n_tokens)
    with (
        kvd_client.connect(daemon.runtime_dir, staging_bytes=0) as reader,
        reader.open_context(MODEL) as context,
        context.alloc([]) as sequence,
        pytest.raises(errors.StagingFull),
    ):
        sequence.append(PROMPT, payloads(PROMPT))
    assert client.status()["accounting"]["staging_bytes"] == (1 << 20) + PAGE


def test_posted_appends_are_stored_although_the_client_closes_at_once(
    daemon: Daemon, context: kvd_client.Context
) -> None:
    with kvd_client.connect(daemon.runtime_dir, staging_bytes=1 << 20) as client:
        sequence = client.open_context(MODEL).alloc([])
        sequence.post_append(PROMPT, payloads(PROMPT))

    def matched() -> int:
        with context.alloc(PROMPT) as found:
            return found.matched_tokens

    eventually(lambda: matched() == len(PROMPT))
