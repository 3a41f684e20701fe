"""The asyncio client: the same operations as the blocking one, for many coroutines at once.

    async with aio.connect() as client:
        async with client.open_context(model, n_seq_max=4) as context:
            async with context.alloc(tokens) as sequence:
                ...  # sequence.matched_tokens, sequence.block(0), await sequence.append(...)

What opens something can be awaited as well: `sequence = await context.alloc(tokens)`, and then
`await sequence.release()`. Calls of one client may overlap: an alloc that waits for an id holds
nobody up. A coroutine may be cancelled in any call, and what was asked for is given back when the
reply comes. A client belongs to the event loop and thread that connected it. Errors, views and
fork: as in client.py.

Not zmq.asyncio, which costs twice the time of a round trip: the loop watches libzmq's own
descriptor.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Generator, Iterable
from contextlib import suppress
from functools import partial
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
from kvd_client.session import Commit, Source
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

__all__ = ["AsyncClient", "AsyncContext", "AsyncSequence", "connect"]


T = TypeVar("T")


class Opening(Coroutine[Any, Any, T]):
    """Opens something when it is awaited; `async with` closes it as well."""

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._opened: Any = None

    def send(self, value: Any) -> Any:
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> T:
        self._opened = await self._coroutine
        return cast(T, await self._opened.__aenter__())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._opened.__aexit__(kind, error, trace)


class AsyncSequence(SequenceState):
    """An open sequence, see `client.Sequence`: the attributes are the same."""

    __slots__ = ()

    @property
    def n_blocks(self) -> int:
        """Blocks whose payload can be read."""
        return len(self.slots)

    def block(self, index: int) -> memoryview:
        """The payload of a block, read-only and without a copy; see `client.Sequence.block`."""
        return ops.block_view(self, index)

    def read_into(self, index: int, target: memoryview | npt.NDArray[Any]) -> int:
        """Copy the payload of a block to the start of `target`; returns its length in bytes."""
        return ops.read_into(self, index, target)

    async def stage(self, n_tokens: int, *, wait: float | None = None) -> Staged:
        """Room for the payloads of an append of `n_tokens` tokens, to be written in place; see
        `client.Sequence.stage`."""
        return await self._client.run(appending.stage(self, n_tokens, wait))

    def unstage(self, staged: Staged) -> None:
        """Give back what `stage` gave and no append will use. Afterwards that does nothing."""
        appending.unstage(self, staged)
        self._client.wake()

    async def append(
        self,
        tokens: Tokens,
        payloads: Staged | Iterable[Payload],
        *,
        start: int | None = None,
    ) -> Commit:
        """Commit the blocks of `tokens`, which follow the sequence's full blocks; see
        `client.Sequence.append`. Appends of one sequence must not overlap."""
        return await self._client.run(appending.append(self, tokens, payloads, start))

    async def post_append(
        self,
        tokens: Tokens,
        payloads: Staged | Iterable[Payload],
        *,
        start: int | None = None,
    ) -> Commit:
        """Like append, without waiting for the reply; it may wait for room in the staging."""
        return await self._client.run(appending.post(self, tokens, payloads, start))

    async def refresh(self, first_block: int = 0) -> int:
        """Learn the slots of appended blocks that are sealed by now, from `first_block` (at most
        n_blocks) on; returns how many tokens of the sequence are sealed."""
        return (await self._client.run(ops.refresh(self, first_block))).sealed_tokens

    async def keep_alive(self) -> None:
        """Let the sequence's `idle_timeout` begin anew; see `client.Sequence.keep_alive`."""
        await self._client.run(ops.keep_alive(self))

    async def release(self, *, failed: bool = False) -> None:
        """Say that the engine has removed the sequence's K/V; see `client.Sequence.release`."""
        await self._client.run(ops.release(self, failed))

    @property
    def _client(self) -> "AsyncClient":
        return cast(AsyncClient, self.context.client)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.released and not self.context.client.forked:
            await self.release(failed=error is not None)


class AsyncContext(ContextState):
    """An open context: a pool of sequence ids for one model."""

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
    ) -> Opening[AsyncSequence]:
        """A sequence id, and the longest cached prefix of `tokens`, leased; see
        `client.Context.alloc`."""
        operation = ops.alloc(
            self, tokens, request, reserve_tokens, wait, idle_timeout, use, store, AsyncSequence
        )
        return Opening(cast(AsyncClient, self.client).run(operation))

    async def keep_alive(self) -> list[SequenceState]:
        """The same for all sequences; see `client.Context.keep_alive`."""
        return await cast(AsyncClient, self.client).run(ops.keep_all_alive(self))

    async def reopen(self) -> bool:
        """Open it again if the daemon has been away; see `client.Context.reopen`."""
        return await cast(AsyncClient, self.client).run(ops.reopen(self))

    async def close(self) -> None:
        """Give back the context and all of its sequences; see `client.Context.close`."""
        await cast(AsyncClient, self.client).run(ops.close_context(self))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self.closed and not self.client.forked:
            await self.close()


class AsyncClient(ClientState):
    """A connection to the daemon of this machine; made by `connect`."""

    overlapping = True

    def __init__(
        self,
        runtime_dir: str | os.PathLike[str] | None = None,
        *,
        instance: str = "default",
        name: str = "python",
        staging_bytes: int = DEFAULT_STAGING,
        timeout: float | None = None,
        fail_open: bool = False,
    ) -> None:
        """The options are those of `client.Client`. Connects when it is first used."""
        super().__init__(
            runtime_dir,
            instance=instance,
            name=name,
            staging_bytes=staging_bytes,
            timeout=timeout,
            fail_open=fail_open,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[asyncio.Future[None], Wait] = {}

    def open_context(self, model: Model, n_seq_max: int = 8) -> Opening[AsyncContext]:
        """Register `model` and open a context with sequence ids 0 .. n_seq_max-1; see
        `client.Client.open_context`."""
        return Opening(self._open_context(model, n_seq_max))

    async def flush(self, commit: Commit | None = None, timeout: float | None = None) -> Flushed:
        """Wait until `commit` (None: the last one) and all before it are visible, or have failed;
        see `client.Client.flush`. Each failure is told to one flush only, and to its commit."""
        return await self.run(self.flush_commit(commit, timeout))

    async def ping(self) -> Pong:
        """Who answers."""
        return cast(Pong, await self.run(self.ask(Ping())))

    async def status(self) -> dict[str, Any]:
        """The map of `kvctl status --json`."""
        return await self._report(Status())

    async def sequences(self) -> list[dict[str, Any]]:
        """A row for each open or waiting sequence of the daemon."""
        return cast(list[dict[str, Any]], (await self._report(ListSequences()))["sequences"])

    async def clients(self) -> list[dict[str, Any]]:
        """A row for each session of the daemon."""
        return cast(list[dict[str, Any]], (await self.holders())["clients"])

    async def holders(self) -> dict[str, Any]:
        """What each client and each tenant holds, of one moment: {clients, tenants}."""
        return await self._report(ListClients())

    async def verify(self, *, checksums: bool = False) -> dict[str, Any]:
        """Recount: {ok, differences, terms}. With `checksums` every block's bytes are compared with
        their checksum, too: a pass over all of the cache's memory."""
        return await self._report(Verify(int(checksums)))

    async def evict(self, model: str = "", blocks: int = 0, tenant: str = "") -> Evicted:
        """Drop cached blocks, unless they are leased or pinned: of one model ("": all), so many
        (0: all), of one tenant ("": all that this client may evict)."""
        return cast(Evicted, await self.run(self.ask(Evict(model, blocks, tenant))))

    async def forget(self, model: Model | bytes, tokens: Tokens, *, tenant: str = "") -> Forgotten:
        """Drop what is cached of a prompt, and all that goes on from it; see
        `client.Client.forget`."""
        return cast(Forgotten, await self.run(self.ask(forget_message(model, tokens, tenant))))

    async def explain(
        self, model: Model | bytes, tokens: Tokens, *, tenant: str = ""
    ) -> dict[str, Any]:
        """What of a prompt is cached, the first block that is not, and why; see
        `client.Client.explain`."""
        return await self._report(explain_message(model, tokens, tenant))

    async def pin(
        self, model: Model | bytes, tokens: Tokens, *, owner: str, ttl: float = 0.0
    ) -> int:
        """Pin the cached prefix of `tokens` in the name of `owner`; see `client.Client.pin`."""
        message = pin_message(model, tokens, owner, ttl)
        return cast(Pinned, await self.run(self.ask(message))).tokens

    async def unpin(self, owner: str, model: str = "") -> int:
        """End the pins of `owner` on models of this name ("": all); returns how many."""
        return cast(Unpinned, await self.run(self.ask(Unpin(owner, model)))).pins

    async def config(self) -> dict[str, Any]:
        """As `client.Client.config`."""
        return await self._report(Config())

    async def reload(self) -> dict[str, Any]:
        """As `client.Client.reload`."""
        return await self._report(Reload())

    async def pins(self) -> list[dict[str, Any]]:
        """A row for each pin of the daemon."""
        return cast(list[dict[str, Any]], (await self._report(ListPins()))["pins"])

    async def events(
        self,
        since: int | None = None,
        wait: float = 0.0,
        *,
        most: int = MAX_EVENTS,
        kinds: Iterable[str] = (),
        model: str = "",
    ) -> EventBatch:
        """What has happened in the daemon since then; see `client.Client.events`."""
        return await self.run(read_events(self, since, wait, most, kinds, model))

    async def close(self) -> None:
        """End the session: all that it held is given back; see `client.Client.close`. Calls that
        are still waiting raise Closed."""
        session = self.session
        is_open = not self.closed and not self.forked
        # After the end of its loop nobody can wait any more.
        if is_open and session is not None and not (self._loop and self._loop.is_closed()):
            with suppress(KvdError):
                await self.run(settle_appends(session, self.timeout))
        self.shut_down()
        self.wake()

    async def _open_context(self, model: Model, n_seq_max: int) -> AsyncContext:
        context = AsyncContext(self, model, n_seq_max)
        await self.run(ops.open_new_context(context))
        return context

    async def _report(self, message: Any) -> dict[str, Any]:
        return cast(dict[str, Any], (await self.run(self.ask(message))).report)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- the driver

    async def run(self, operation: Operation[T]) -> T:
        """Drive an operation to its end."""
        self.check()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None:
                raise RuntimeError("this client belongs to another event loop")
            self._loop = loop
        try:
            wait = next(operation)
            while True:
                self.wake()
                try:
                    await self._wait(wait, loop)
                except BaseException as error:
                    wait = operation.throw(error)
                else:
                    wait = next(operation)
        except StopIteration as stop:
            return cast(T, stop.value)
        finally:
            self.wake()

    def wake(self) -> None:
        """To be called after anything that may have sent, or changed what others wait for: takes
        in what has arrived, and wakes whom that concerns."""
        session = self.session
        if session is not None and session.lost is None and not self.forked:
            session.receive()
        for future, wait in list(self._waiting.items()):
            if future.done():
                continue
            if wait.condition():
                future.set_result(None)
            elif wait.source.lost is not None:
                future.set_exception(copy_error(wait.source.lost))

    async def _wait(self, wait: Wait, loop: asyncio.AbstractEventLoop) -> None:
        source = wait.source
        source.receive()
        if wait.condition():
            return
        if source.lost is not None:
            raise copy_error(source.lost)
        if wait.timeout <= 0:
            raise wait.expire()
        self._watch(source, loop)
        future: asyncio.Future[None] = loop.create_future()
        self._waiting[future] = wait
        timer = loop.call_later(wait.timeout, self._expire, future)
        try:
            await future
        finally:
            timer.cancel()
            del self._waiting[future]

    def _expire(self, future: asyncio.Future[None]) -> None:
        wait = self._waiting[future]
        wait.source.receive()
        self.wake()  # the loop may have been held up for longer than the daemon
        if not future.done():
            future.set_exception(wait.expire())
            self.wake()

    def _watch(self, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        if source.on_end is None:
            readers = source.readers()
            for fd, reader in readers.items():
                loop.add_reader(fd, self._readable, reader)
            source.on_end = partial(_unwatch, loop, list(readers))

    def _readable(self, reader: Callable[[], None]) -> None:
        try:
            reader()
        finally:
            self.wake()


def _unwatch(loop: asyncio.AbstractEventLoop, fds: list[int]) -> None:
    for fd in fds:
        loop.remove_reader(fd)


def connect(
    runtime_dir: str | os.PathLike[str] | None = None,
    *,
    start_private: bool = False,
    max_memory: str = "1GiB",
    **options: Any,
) -> Opening[AsyncClient]:
    """A connected client, to be awaited or entered; the options are those of `client.Client`."""
    client = AsyncClient(runtime_dir, **options)
    return Opening(_connect(client, max_memory if start_private else None))


async def _connect(client: AsyncClient, max_memory: str | None) -> AsyncClient:
    try:
        if max_memory is not None:
            await asyncio.to_thread(
                start_private_daemon, client.runtime_dirs, client.instance, max_memory
            )
        await client.run(client.first_session())
    except BaseException as error:
        if not (isinstance(error, KvdError) and client.fail_open):
            client.shut_down()
            raise
    return client
