"""The blocking client.

    with kvd_client.connect() as client:
        with client.open_context(model, n_seq_max=4) as context:
            with context.alloc(tokens) as sequence:
                ...  # sequence.matched_tokens, sequence.block(0), sequence.append(tokens, payloads)

Threads: one thread at a time uses a client and what it opened; calls from several are put in a
queue behind each other, so a thread that waits for a sequence id holds up the others. Give each
thread a client of its own. Views of blocks are read-only memory and may be read from anywhere.
Processes: a client does not survive a fork; the child gets `Forked` and opens its own.
"""

import os
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy as np
import numpy.typing as npt
import zmq

from kvd_client import context as ops
from kvd_client.context import Commit, ContextState, Model, SequenceState, Tokens
from kvd_client.errors import BadPayload, DeadlineExceeded, KvdError
from kvd_client.operations import Ask, ClientState, Connect, Operation, Wait
from kvd_client.private import start_private_daemon
from kvd_client.session import Session
from kvd_client.staging import Staged
from kvd_proto.messages import (
    Evict,
    Evicted,
    Flush,
    Flushed,
    ListClients,
    ListSequences,
    Ping,
    Pong,
    Status,
    Verify,
)

T = TypeVar("T")
DEFAULT_STAGING = 64 << 20
"""Bytes: a prompt of a few thousand tokens of a small model at once, larger ones in pieces."""
DEFAULT_TIMEOUT = 5.0
FAIL_OPEN_TIMEOUT = 0.05
"""Seconds that a worker loses at most when the daemon hangs; it computes by itself then."""

Payload = bytes | bytearray | memoryview | npt.NDArray[Any]


class Sequence(SequenceState):
    """An open sequence: its cached prefix, and room for what comes after. A context manager.

    `matched_tokens` tokens of the prompt are in `slots`' blocks, all full but perhaps the last. The
    blocks are leased until release; one beyond the last full match, until the first append.
    """

    __slots__ = ()

    @property
    def n_blocks(self) -> int:
        """Blocks whose payload can be read."""
        return len(self.slots)

    def block(self, index: int) -> memoryview:
        """The payload of a block, read-only and without a copy; valid until release."""
        return ops.block_view(self, index)

    def read_into(self, index: int, target: memoryview | npt.NDArray[np.uint8]) -> int:
        """Copy the payload of a block to the start of `target` (bytes); returns its length."""
        payload = np.frombuffer(ops.block_view(self, index), np.uint8)
        room = np.frombuffer(target, np.uint8)
        if room.size < payload.size:
            raise BadPayload("the buffer is too small", needs=payload.size, has=room.size)
        np.copyto(room[: payload.size], payload)
        size = payload.size
        del payload
        self.views.pop().release()
        return size

    def stage(self, n_tokens: int, *, wait: float | None = None) -> Staged:
        """Room for the payloads of an append of `n_tokens` tokens, to be written in place.

        If the staging is full of earlier commits, waits up to `wait` seconds (None: the client's
        timeout) for them. Raises StagingFull then, and at once if it can never fit.
        """
        return self._client.run(ops.stage(self, n_tokens, wait))

    def unstage(self, staged: Staged) -> None:
        """Give room back that `stage` gave and that will not be appended."""
        ops.unstage(self, staged)

    def append(self, tokens: Tokens, payloads: Staged | Iterable[Payload]) -> Commit:
        """Commit the blocks of `tokens`, which follow the sequence's full blocks.

        `payloads` is what `stage` gave, written; or one buffer for each block, which is copied. The
        last block may be shorter than block_tokens; a later append replaces it. One round trip; the
        blocks are visible to others after `Client.flush`, or a moment later.
        """
        packed = ops.pack_tokens(tokens)
        staged = self._staged(packed, payloads)
        return self._client.run(ops.append(self, packed, staged))

    def post_append(self, tokens: Tokens, payloads: Staged | Iterable[Payload]) -> Commit:
        """Like append, without waiting: the commit's `error` is known once it is `answered`."""
        packed = ops.pack_tokens(tokens)
        return ops.post_append(self, packed, self._staged(packed, payloads))

    def refresh(self, first_block: int = 0) -> int:
        """Learn the slots of appended blocks that are sealed by now; returns the sealed tokens."""
        return self._client.run(ops.refresh(self, first_block)).sealed_tokens

    def release(self, *, failed: bool = False) -> None:
        """Say that the engine has removed the sequence's K/V. Its id may be handed out again."""
        self._client.run(ops.release(self, failed))

    @property
    def _client(self) -> "Client":
        return cast(Client, self.context.client)

    def _staged(self, packed: bytes, payloads: Staged | Iterable[Payload]) -> Staged:
        if isinstance(payloads, Staged):
            return payloads
        buffers = [memoryview(cast(Any, each)).cast("B") for each in payloads]
        staged = self.stage(len(packed) // 4)
        sizes = [len(each) for each in buffers]
        if sizes != staged.sizes:
            self.unstage(staged)
            raise BadPayload(
                "one payload of the exact size for each block",
                expected=str(staged.sizes),
                got=str(sizes),
            )
        for index, buffer in enumerate(buffers):
            staged.block(index)[:] = buffer
        return staged

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.released:
            self.release(failed=error is not None)


class Context(ContextState):
    """An open context: a pool of sequence ids for one model. A context manager."""

    __slots__ = ()

    def alloc(
        self,
        tokens: Tokens,
        *,
        request: str = "",
        reserve_tokens: int = 0,
        wait: float = 0.0,
        idle_timeout: float = 0.0,
    ) -> Sequence:
        """A sequence id, and the longest cached prefix of `tokens`, leased. One round trip.

        `wait` seconds for an id if none is free; `reserve_tokens` sets room aside; a sequence that
        nobody touches for `idle_timeout` seconds (0: never) takes no more appends. With fail_open
        and no daemon: a sequence that matches nothing, and whose `shared` is False.
        Raises NoSequenceFree, SequenceLimit, AllLeased, BudgetTooSmall.
        """
        operation = ops.alloc(self, tokens, request, reserve_tokens, wait, idle_timeout, Sequence)
        found: Sequence = cast(Client, self.client).run(operation)
        return found

    def close(self) -> None:
        """Give back the context and all of its sequences."""
        cast(Client, self.client).run(ops.close_context(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.client.closed:
            self.close()


class Client(ClientState):
    """A connection to the daemon of this machine. A context manager; see the module."""

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        instance: str = "default",
        name: str = "python",
        staging_bytes: int = DEFAULT_STAGING,
        timeout: float | None = None,
        fail_open: bool = False,
        start_private: bool = False,
        max_memory: str = "1GiB",
    ) -> None:
        """Connect. Raises Unavailable without a daemon, unless `fail_open` or `start_private`.

        `staging_bytes` is the memory for commits on their way (0: none, for readers). `timeout` is
        for each answer, in seconds: 5, or 0.05 with fail_open. `fail_open` makes alloc go on
        without a daemon, and come back to it by itself. `start_private` starts a daemon with
        `max_memory` if none runs there; it stops by itself some seconds after its last client.
        """
        if timeout is None:
            timeout = FAIL_OPEN_TIMEOUT if fail_open else DEFAULT_TIMEOUT
        super().__init__(runtime_dir, instance, name, staging_bytes, timeout, fail_open)
        self._lock = threading.RLock()
        self._polled: Session | None = None
        self._poller = zmq.Poller()
        if start_private:
            start_private_daemon(self.path, instance, max_memory)
        try:
            # The first welcome may take longer than an answer: staging is given memory.
            self.timeout = max(timeout, DEFAULT_TIMEOUT)
            self.run(self.ensure_session())
        except KvdError:
            if not fail_open:
                raise
        finally:
            self.timeout = timeout

    def open_context(self, model: Model, n_seq_max: int = 8) -> Context:
        """Register `model` and open a context with sequence ids 0 .. n_seq_max-1.

        With fail_open and no daemon the context opens later by itself.
        """
        context = Context(self, model, n_seq_max)
        try:
            self.run(ops.open_context(context))
        except KvdError:
            if not self.fail_open or (self.session is not None and self.session.lost is None):
                raise
        return context

    def flush(self, commit: Commit | None = None) -> Flushed:
        """Wait until `commit` (None: the last one) and all before it are visible, or have failed.

        Raises the error that `commit` was answered with; what failed later is in `failures`.
        """
        return self.run(self._flush(commit))

    def ping(self) -> Pong:
        """Who answers."""
        return cast(Pong, self.run(self.call(Ping())))

    def status(self) -> dict[str, Any]:
        """The map of `kvctl status --json`."""
        return self._report(Status())

    def sequences(self) -> list[dict[str, Any]]:
        """A row for each open or waiting sequence of the daemon."""
        return cast(list[dict[str, Any]], self._report(ListSequences())["sequences"])

    def clients(self) -> list[dict[str, Any]]:
        """A row for each session of the daemon."""
        return cast(list[dict[str, Any]], self._report(ListClients())["clients"])

    def verify(self) -> dict[str, Any]:
        """Recount: {ok, differences, terms}."""
        return self._report(Verify())

    def evict(self, model: str = "", blocks: int = 0) -> Evicted:
        """Drop cached blocks that nobody leases: of one model ("": all), so many (0: all)."""
        return cast(Evicted, self.run(self.call(Evict(model, blocks))))

    def close(self) -> None:
        """End the session: all that it held is given back. Raises ViewsAlive while views live.

        Waits, at most the client's timeout, until posted appends are answered: what the daemon has
        not accepted when a session ends is never stored.
        """
        if self.closed:
            return
        with self._lock:
            self.check()
            if self.session is not None and self.session.lost is None:
                self.session.close_mappings()
                with suppress(KvdError):
                    self.run(ops.settle(self.session, self.timeout))
                self.session.lose(KvdError("the client was closed"))
            self.closed = True

    def run(self, operation: Operation[T]) -> T:
        """Drive an operation to its end."""
        with self._lock:
            try:
                ask = next(operation)
                while True:
                    try:
                        answer = self._answer(ask)
                    except KvdError as error:
                        ask = operation.throw(error)
                    else:
                        ask = operation.send(answer)
            except StopIteration as stop:
                return cast(T, stop.value)

    def _answer(self, ask: Ask) -> Session | None:
        if isinstance(ask, Connect):
            return Session.connect(ask.path, ask.client, ask.staging_bytes, ask.timeout)
        self._wait(ask)
        return None

    def _wait(self, wait: Wait) -> None:
        session = wait.session
        if session is not self._polled and session.lost is None:
            self._polled = session
            self._poller = zmq.Poller()
            self._poller.register(session.dealer, zmq.POLLIN)
            self._poller.register(session.lifeline_fd, zmq.POLLIN)
        deadline = time.monotonic() + wait.timeout
        while not wait.condition():
            if session.lost is not None:
                raise session.lost
            left = deadline - time.monotonic()
            if left <= 0:
                if wait.may_fail:
                    raise DeadlineExceeded("it took too long", waited_seconds=wait.timeout)
                raise session.time_out(wait.timeout)
            for ready, _ in self._poller.poll(int(left * 1000) + 1):
                if ready is session.dealer:
                    session.receive()
                else:
                    session.receive_lifeline()

    def _flush(self, commit: Commit | None) -> Operation[Flushed]:
        session = yield from self.ensure_session()
        if commit is None:
            yield Wait(session, lambda: not session.in_flight, self.timeout)
        else:
            yield Wait(session, lambda: commit.answered, self.timeout)
            if commit.error is not None:
                raise commit.error
        number = session.last_commit if commit is None else commit.number
        return cast(Flushed, (yield from self.call(Flush(number))))

    def _report(self, message: Any) -> dict[str, Any]:
        return cast(dict[str, Any], self.run(self.call(message)).report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(runtime_dir: str | os.PathLike[str] | None = None, **options: Any) -> Client:
    """A blocking client; the options are those of `Client`."""
    return Client(runtime_dir, **options)
