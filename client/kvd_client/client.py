"""The blocking client.

    with kvd_client.connect() as client:
        with client.open_context(model, n_seq_max=4) as context:
            with context.alloc(tokens) as sequence:
                ...  # sequence.matched_tokens, sequence.block(0), sequence.append(tokens, payloads)

Threads: one thread at a time uses a client and what it opened; calls from several are put in a
queue behind each other, so a thread that waits for a sequence id holds up the others. Give each
thread a client of its own. Views of blocks are read-only memory and may be read from anywhere.
Processes: a client does not survive a fork; the child gets `Forked` and opens its own. Interrupts:
KeyboardInterrupt may end any wait, and what was asked for is given back when the reply comes.

Errors: every call can raise Unavailable and DeadlineExceeded (see `Client` for fail_open) besides
those named. `StaleHandle` is what a sequence raises after the session in which it was opened has
ended; release works nevertheless.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import numpy.typing as npt

from kvd_client import appending
from kvd_client import context as ops
from kvd_client.appending import Payload
from kvd_client.asking import explain_message, forget_message
from kvd_client.errors import KvdError, copy_error
from kvd_client.following import EventBatch, read_events
from kvd_client.operations import (
    DEFAULT_STAGING,
    ClientState,
    Operation,
    Wait,
    settle_appends,
)
from kvd_client.pins import pin_message
from kvd_client.private import start_private_daemon
from kvd_client.session import Commit, Session, Source
from kvd_client.staging import Staged
from kvd_client.state import ContextState, Model, SequenceState, Tokens
from kvd_proto.messages import (
    MAX_EVENTS,
    Config,
    Evict,
    Evicted,
    Flushed,
    Forgotten,
    ListClients,
    ListPins,
    ListSequences,
    Ping,
    Pinned,
    Pong,
    Reload,
    Status,
    Unpin,
    Unpinned,
    Verify,
)

__all__ = ["DEFAULT_STAGING", "Client", "Context", "Sequence", "connect"]

T = TypeVar("T")
_LONGEST_POLL = 3600.0
"""Seconds: poll(2) takes an int of milliseconds."""


class Sequence(SequenceState):
    """An open sequence: its cached prefix, and room for what comes after. A context manager.

    `matched_tokens` tokens of the prompt are in `slots`' blocks, all full but perhaps the last,
    which holds `last_block_tokens` (some of them perhaps of another continuation). The blocks are
    leased until release; one beyond the last full match, until the first append. `full_tokens` is
    where the next append starts. `shared` is False once the daemon knows nothing of the sequence.
    """

    __slots__ = ()

    @property
    def n_blocks(self) -> int:
        """Blocks whose payload can be read."""
        return len(self.slots)

    def block(self, index: int) -> memoryview:
        """The payload of a block: read-only bytes, without a copy.

        Valid as long as the block's lease (see the class). At the lease's end the memoryview
        becomes invalid; arrays over it must be gone by then (ViewsAlive). If the daemon has gone
        the bytes stay readable; once `shared` is False, they may be another block's.
        """
        with self._client.lock:
            return ops.block_view(self, index)

    def read_into(self, index: int, target: memoryview | npt.NDArray[Any]) -> int:
        """Copy the payload of a block to the start of `target`; returns its length in bytes.

        Raises BadPayload if `target` is too small, or not writable contiguous memory.
        """
        return ops.read_into(self, index, target)

    def stage(self, n_tokens: int, *, wait: float | None = None) -> Staged:
        """Room for the payloads of an append of `n_tokens` tokens, to be written in place.

        If the staging is full of earlier commits, waits up to `wait` seconds (None: the client's
        timeout) for them. Raises StagingFull then, and at once if it can never fit.
        """
        return self._client.run(appending.stage(self, n_tokens, wait))

    def unstage(self, staged: Staged) -> None:
        """Give back what `stage` gave and no append will use. Afterwards that does nothing."""
        with self._client.lock:
            appending.unstage(self, staged)

    def append(
        self,
        tokens: Tokens,
        payloads: Staged | Iterable[Payload],
        *,
        start: int | None = None,
    ) -> Commit:
        """Commit the blocks of `tokens`, which follow the sequence's full blocks.

        `payloads` is what `stage` gave, written; or one buffer for each block, which is copied. The
        last block may be shorter than block_tokens; a later append, from the same start, replaces
        it. `start` is the position that the payloads were made for, if other calls came between
        reading `full_tokens` and this one: an append that was posted may have been refused in them.
        One round trip; the blocks are visible to others after `Client.flush`, or a moment later.
        Raises BadPayload, BadPosition, ReservationExceeded, SequenceEnded, AllLeased,
        BudgetTooSmall, NoSpace; ViewsAlive while arrays are alive over a block that it replaces.
        """
        return self._client.run(appending.append(self, tokens, payloads, start))

    def post_append(
        self,
        tokens: Tokens,
        payloads: Staged | Iterable[Payload],
        *,
        start: int | None = None,
    ) -> Commit:
        """Like append, without waiting for the reply: the commit's `error` is known once it is
        `answered`, which any later call of the client may find out. After an error `full_tokens`
        is back where the append started, and a call that finds it out in the middle of an append
        raises BadPosition, instead of storing what was made for another position."""
        return self._client.run(appending.post(self, tokens, payloads, start))

    def refresh(self, first_block: int = 0) -> int:
        """Learn the slots of appended blocks that are sealed by now, from `first_block` (at most
        n_blocks) on; returns how many tokens of the sequence are sealed."""
        return self._client.run(ops.refresh(self, first_block)).sealed_tokens

    def keep_alive(self) -> None:
        """Say that the sequence is still worked with: its `idle_timeout` begins anew, as with
        append and refresh. One round trip; `Context.keep_alive` does it for all. Raises
        SequenceEnded if it has timed out already."""
        self._client.run(ops.keep_alive(self))

    def release(self, *, failed: bool = False) -> None:
        """Say that the engine has removed the sequence's K/V. Its id may be handed out again.

        Works without a daemon, too. Raises ViewsAlive, and the sequence goes on, while arrays over
        its blocks are alive; memoryviews are invalid all the same.
        """
        self._client.run(ops.release(self, failed))

    @property
    def _client(self) -> "Client":
        return cast(Client, self.context.client)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.released and not self.context.client.forked:
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
        use: bool = True,
        store: bool = True,
    ) -> Sequence:
        """A sequence id, and the longest cached prefix of `tokens`, leased. One round trip.

        `wait` seconds for an id if none is free; `reserve_tokens` sets room aside after the last
        full matched block; a sequence that nobody touches for `idle_timeout` seconds (0: never)
        takes no more appends; see `keep_alive`. `use` False: nothing is matched, whatever is
        cached. `store` False: nothing of it is stored; its `stores` is False, and its appends raise
        NotStored. With fail_open and no daemon: a sequence that matches nothing, and whose `shared`
        is False. Raises NoSequenceFree, SequenceLimit, AllLeased, BudgetTooSmall.
        """
        operation = ops.alloc(
            self, tokens, request, reserve_tokens, wait, idle_timeout, use, store, Sequence
        )
        return cast(Client, self.client).run(operation)

    def keep_alive(self) -> list[SequenceState]:
        """Say that all sequences of the context are still worked with, in one round trip; returns
        those that have timed out already. Without a daemon, with fail_open also if it hangs,
        nothing times out."""
        return cast(Client, self.client).run(ops.keep_all_alive(self))

    def reopen(self) -> bool:
        """Open the context again if the daemon has been away, as alloc does by itself: for who only
        peeks. Returns whether it is open; with fail_open and no daemon it is not."""
        return cast(Client, self.client).run(ops.reopen(self))

    def close(self) -> None:
        """Give back the context and all of its sequences. Works without a daemon, too.

        Raises ViewsAlive, and everything goes on, while arrays over blocks are alive; memoryviews
        are invalid all the same.
        """
        cast(Client, self.client).run(ops.close_context(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.closed and not self.client.forked:
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
        welcome_timeout: float | None = None,
        start_private: bool = False,
        max_memory: str = "1GiB",
    ) -> None:
        """Connect. Raises Unavailable without a daemon, unless `fail_open` or `start_private`.

        `runtime_dir` is where the daemon's sockets are; by default wherever `instance` listens.
        `staging_bytes` is the memory for commits on their way (0: none, for readers); the daemon
        may grant less, see `staging_room`. `timeout` is for each answer, in seconds: 5; with
        fail_open it is what a request loses at most, 0.05, four fifths of which are waited; then it
        takes 1 at the most to open the client or a context, and 5 for flush and reports;
        `welcome_timeout` is for opening the client, if that is to be another one.
        `fail_open` makes alloc go on without a daemon, and come back to it by itself.
        `start_private` starts a daemon with `max_memory` if none runs there; it stops by itself
        some seconds after its last client.
        """
        super().__init__(
            runtime_dir,
            instance=instance,
            name=name,
            staging_bytes=staging_bytes,
            timeout=timeout,
            fail_open=fail_open,
            welcome_timeout=welcome_timeout,
        )
        self.lock = threading.RLock()
        self._polled: Source | None = None
        self._poll = select.poll()
        self._readers: dict[int, Callable[[], None]] = {}
        try:
            if start_private:
                start_private_daemon(self.runtime_dirs, instance, max_memory)
            self.run(self.first_session())
        except BaseException as error:
            if not (isinstance(error, KvdError) and fail_open):
                self.shut_down()
                raise

    def goes_on(self, session: Session) -> bool:
        # Who has the lock looks as well.
        if self.lock.acquire(blocking=False):
            try:
                session.look()
            finally:
                self.lock.release()
        return session.lost is None

    def open_context(self, model: Model, n_seq_max: int = 8) -> Context:
        """Register `model` and open a context with sequence ids 0 .. n_seq_max-1.

        With fail_open and no daemon the context opens later by itself. Raises GeometryMismatch,
        ModelTooLarge, NoSpace, and BadMessage for a model or n_seq_max that cannot be.
        """
        context = Context(self, model, n_seq_max)
        self.run(ops.open_new_context(context))
        return context

    def flush(self, commit: Commit | None = None, timeout: float | None = None) -> Flushed:
        """Wait until `commit` (None: the last one) and all before it are visible, or have failed.

        `failures` of the result are [commit number, error code, message] of all that have failed
        since the last flush; the commits' `error` tells the same. Raises the commit's error if it
        was refused, and Unavailable if its session has ended. `timeout` in seconds: as the
        client's, but 5 with fail_open.
        """
        return self.run(self.flush_commit(commit, timeout))

    def ping(self) -> Pong:
        """Who answers."""
        return cast(Pong, self.run(self.ask(Ping())))

    def status(self) -> dict[str, Any]:
        """The map of `kvctl status --json`."""
        return self._report(Status())

    def sequences(self) -> list[dict[str, Any]]:
        """A row for each open or waiting sequence of the daemon."""
        return cast(list[dict[str, Any]], self._report(ListSequences())["sequences"])

    def clients(self) -> list[dict[str, Any]]:
        """A row for each session of the daemon."""
        return cast(list[dict[str, Any]], self.holders()["clients"])

    def holders(self) -> dict[str, Any]:
        """What each client and each tenant holds, of one moment: {clients, tenants}."""
        return self._report(ListClients())

    def verify(self, *, checksums: bool = False) -> dict[str, Any]:
        """Recount: {ok, differences, terms}. With `checksums` every block's bytes are compared with
        their checksum, too: a pass over all of the cache's memory."""
        return self._report(Verify(int(checksums)))

    def evict(self, model: str = "", blocks: int = 0, tenant: str = "") -> Evicted:
        """Drop cached blocks, unless they are leased or pinned: of one model ("": all), so many
        (0: all), of one tenant ("": all that this client may evict). Raises Forbidden."""
        return cast(Evicted, self.run(self.ask(Evict(model, blocks, tenant))))

    def forget(self, model: Model | bytes, tokens: Tokens, *, tenant: str = "") -> Forgotten:
        """Drop what is cached of a prompt, and all that goes on from it, unless it is leased or
        pinned. What it shares with others that go on otherwise stays; so does all, if only a
        beginning of it is cached that others share. Of `tenant` ("": the client's own; another is
        the administrator's). Raises UnknownModel, Forbidden, TooMany."""
        return cast(Forgotten, self.run(self.ask(forget_message(model, tokens, tenant))))

    def explain(self, model: Model | bytes, tokens: Tokens, *, tenant: str = "") -> dict[str, Any]:
        """What of a prompt is cached, the first block that is not, and why: the map of
        `kvctl explain --json`. Leases nothing, and is no use of anything. `model` need not be
        registered; `tenant` as in `forget`. Raises Forbidden, TooMany."""
        return self._report(explain_message(model, tokens, tenant))

    def pin(self, model: Model | bytes, tokens: Tokens, *, owner: str, ttl: float = 0.0) -> int:
        """Pin the cached prefix of `tokens` in the name of `owner` (1 to 64 ASCII letters); returns
        how many tokens of it are cached, and stay: 0 if nothing was there to pin.

        It is not evicted for `ttl` seconds (0: until it is unpinned), whoever leases it; also when
        this client has gone, and when the daemon is restarted. Pin it again to change `ttl`.
        `model` is one that somebody of this tenant has registered, or its arena fingerprint.
        Raises UnknownModel, TooMany, OverQuota, AllLeased, NoSpace, BadMessage.
        """
        message = pin_message(model, tokens, owner, ttl)
        return cast(Pinned, self.run(self.ask(message))).tokens

    def unpin(self, owner: str, model: str = "") -> int:
        """End the pins of `owner` on models of this name ("": all); returns how many."""
        return cast(Unpinned, self.run(self.ask(Unpin(owner, model)))).pins

    def config(self) -> dict[str, Any]:
        """Every setting of the daemon, and where it comes from."""
        return self._report(Config())

    def reload(self) -> dict[str, Any]:
        """Let the daemon read its configuration again; what became of each setting. If `ok` is
        false, `errors` says why nothing was changed."""
        return self._report(Reload())

    def pins(self) -> list[dict[str, Any]]:
        """A row for each pin of the daemon."""
        return cast(list[dict[str, Any]], self._report(ListPins())["pins"])

    def events(
        self,
        since: int | None = None,
        wait: float = 0.0,
        *,
        most: int = MAX_EVENTS,
        kinds: Iterable[str] = (),
        model: str = "",
    ) -> EventBatch:
        """What has happened in the daemon from event number `since` on (None: from now on): at most
        `most` events, of these kinds (none: all) and this model ("": all). A client is told of its
        tenant's, an administrator of all.

        If there are none it waits for some, up to `wait` seconds (60 at most). Ask again from
        `next` on: who is slow loses events, and `lost` says how many. Frequent ones (alloc, hit,
        release, seal, evict) are noted only while somebody asks. Numbers begin anew with each
        start of the daemon.
        """
        return self.run(read_events(self, since, wait, most, kinds, model))

    def close(self) -> None:
        """End the session: all that it held is given back. Closing again does nothing.

        Waits, at most the client's timeout, until posted appends are answered: what the daemon has
        not accepted when a session ends is never stored. Raises ViewsAlive, and everything goes on,
        while views of blocks are alive. In a forked child it closes what is the child's; the
        parent's session goes on.
        """
        if self.closed or self.forked:
            self.shut_down()
            return
        with self.lock:
            session = self.session
            if session is not None and session.lost is None:
                with suppress(KvdError):
                    self.run(settle_appends(session, self.timeout))
            self.shut_down()

    def run(self, operation: Operation[T]) -> T:
        """Drive an operation to its end."""
        self.check()  # before the lock, which a thread of the parent may have held at a fork
        with self.lock:
            try:
                wait = next(operation)
                while True:
                    try:
                        self._wait(wait)
                    except BaseException as error:
                        wait = operation.throw(error)
                    else:
                        wait = next(operation)
            except StopIteration as stop:
                return cast(T, stop.value)

    def _wait(self, wait: Wait) -> None:
        source, condition = wait.source, wait.condition
        deadline = time.monotonic() + wait.timeout
        if isinstance(source, Session) and wait.timeout > 0:
            # A poll of both descriptors would cost half as much as the round trip.
            while not condition() and source.lost is None and source.receive_soon():
                pass
        else:
            source.receive()
        while not condition():
            if source.lost is not None:
                raise copy_error(source.lost)
            if source is not self._polled:
                self._watch(source)
            left = deadline - time.monotonic()
            milliseconds = int(min(left, _LONGEST_POLL) * 1000) + 1 if left > 0 else 0
            ready = self._poll.poll(milliseconds)
            if not ready and left <= 0:
                raise wait.expire()
            for fd, _ in ready:
                self._readers[fd]()

    def _watch(self, source: Source) -> None:
        self._polled = source
        self._readers = source.readers()
        self._poll = select.poll()
        for fd in self._readers:
            self._poll.register(fd, select.POLLIN)

    def _report(self, message: Any) -> dict[str, Any]:
        return cast(dict[str, Any], self.run(self.ask(message)).report)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(runtime_dir: str | os.PathLike[str] | None = None, **options: Any) -> Client:
    """A blocking client; the options are those of `Client`."""
    return Client(runtime_dir, **options)
