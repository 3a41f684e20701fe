"""What the client makes of answers that a healthy daemon does not give on demand."""

import resource
from pathlib import Path
from typing import Any

import pytest

import kvd_client
from kvd_client import errors
from kvd_proto import codec
from kvd_proto.messages import (
    Append,
    Appended,
    Blocks,
    Flush,
    Flushed,
    Get,
    Hello,
    Ping,
    Pong,
    Refused,
    Welcome,
)
from tests.client.blocks import MODEL, open_files, payloads
from tests.client.fake_daemon import fake_daemon, usual_welcome

PROMPT = list(range(24))
PONG = Pong("1", "fake", 1, 1)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"nonsense",
        codec.encode_reply(1, Pong("", "fake", 1, 1)),  # an empty name is out of range
        codec.encode_reply(1, Appended(1, 1, 1, 1)),  # of another operation
    ],
)
def test_an_unreadable_reply_ends_the_session(tmp_path: Path, frame: bytes) -> None:
    answers = [frame, PONG]
    with (
        fake_daemon(tmp_path, lambda _: answers.pop(0)),
        kvd_client.connect(tmp_path, staging_bytes=0) as client,
    ):
        with pytest.raises(errors.Unavailable, match="cannot be read"):
            client.ping()
        assert client.ping() == PONG


def test_a_reply_to_nobody_is_passed_over(tmp_path: Path) -> None:
    def answer(message: Any) -> Any:
        return codec.encode_reply(999, PONG) if isinstance(message, Flush) else None

    with (
        fake_daemon(tmp_path, lambda m: PONG if isinstance(m, Ping) else answer(m)),
        kvd_client.connect(tmp_path, staging_bytes=0) as client,
    ):
        with pytest.raises(errors.DeadlineExceeded):
            client.flush(timeout=0.05)
        assert client.ping() == PONG


@pytest.mark.parametrize(
    ("welcome", "error", "text"),
    [
        (b"", errors.Unavailable, "hung up"),
        (b"\xc1", errors.Unavailable, "cannot be read"),
        (codec.encode_datagram(Hello(1, "x", 0)), errors.Unavailable, "did not welcome"),
        (codec.encode_datagram(Refused("unsupported_version", "no", {"daemon": 9})),
         errors.UnsupportedVersion, "daemon=9"),
        (codec.encode_datagram(Welcome(1, b"\1" * 16, bytes(16), "fake", 1 << 20)),
         errors.Unavailable, "did not welcome"),  # the descriptor is missing
    ],
)  # fmt: skip
def test_a_bad_welcome_is_an_error_and_leaves_nothing_open(
    tmp_path: Path, welcome: bytes, error: type[errors.KvdError], text: str
) -> None:
    with fake_daemon(tmp_path, welcome=lambda _: welcome):
        before = open_files()
        for _ in range(3):
            with pytest.raises(error, match=text):
                kvd_client.connect(tmp_path, timeout=5)
        # The peer's end of the last one is still open.
        assert open_files() <= before + 1


def test_a_staging_that_cannot_be_mapped_is_an_error(tmp_path: Path) -> None:
    def too_long(hello: Hello) -> Welcome:
        return usual_welcome(hello)._replace(staging_bytes=1 << 46)

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 45, hard))
    try:
        with (
            fake_daemon(tmp_path, welcome=too_long),
            pytest.raises(errors.Unavailable, match="cannot be opened"),
        ):
            kvd_client.connect(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_session_that_the_daemon_does_not_know_is_given_up(tmp_path: Path) -> None:
    answers = [errors.UnknownSession("who?"), PONG]
    with (
        fake_daemon(tmp_path, lambda _: answers.pop(0)),
        kvd_client.connect(tmp_path, staging_bytes=0) as client,
    ):
        first = client.session
        with pytest.raises(errors.UnknownSession):
            client.ping()
        assert client.ping() == PONG
        assert client.session is not first


def test_an_error_of_a_newer_daemon_keeps_its_code(tmp_path: Path) -> None:
    class Newer(errors.KvdError):
        code = "quota"

    with (
        fake_daemon(tmp_path, lambda _: Newer("over quota", limit=3)),
        kvd_client.connect(tmp_path, staging_bytes=0) as client,
    ):
        with pytest.raises(errors.ServiceError, match="over quota") as raised:
            client.ping()
        assert (raised.value.code, raised.value.details) == ("quota", {"limit": 3})


def test_failures_after_the_reply_reach_the_commit_and_one_flush(tmp_path: Path) -> None:
    """Also those that the daemon told a flush that only waited for room."""
    failures = iter([[[1, "bad_payload", "first"]], [[3, "internal", "third"]]])

    def answer(message: Any) -> Any:
        if isinstance(message, Flush):
            return Flushed(message.commit, next(failures, []))
        return None

    with (
        fake_daemon(tmp_path, answer),
        kvd_client.connect(tmp_path, staging_bytes=2 * 4096) as client,
    ):
        sequence = client.open_context(MODEL).alloc([])
        commits = [
            sequence.append(PROMPT[at : at + 8], payloads(PROMPT[: at + 8], at)) for at in (0, 8)
        ]
        # The staging is full, and this peer never says there that a commit has completed.
        with pytest.raises(errors.StagingFull):
            sequence.stage(8, wait=0.1)
        told = client.flush()
        assert [row[:2] for row in told.failures] == [[1, "bad_payload"], [3, "internal"]]
        assert isinstance(commits[0].error, errors.BadPayload)
        assert commits[1].error is None
        assert client.flush(commits[1]).failures == []


def test_a_sequence_follows_the_daemon_after_a_late_failure(tmp_path: Path) -> None:
    """An append was accepted, and its block is gone after all: the next append tells so."""

    def answer(message: Any) -> Any:
        if isinstance(message, Append) and message.start == 16:
            return errors.BadPosition("not there", start=16, expected=8)
        if isinstance(message, Get):
            return Blocks(0, 0, b"")
        return None

    with (
        fake_daemon(tmp_path, answer),
        kvd_client.connect(tmp_path, staging_bytes=1 << 20) as client,
    ):
        sequence = client.open_context(MODEL).alloc([])
        sequence.append(PROMPT[:16], payloads(PROMPT[:16]))
        with pytest.raises(errors.BadPosition):
            sequence.append(PROMPT[16:], payloads(PROMPT, 16))
        assert sequence.full_tokens == 8
        sequence.append(PROMPT[8:16], payloads(PROMPT[:16], 8))
        assert sequence.full_tokens == 16
