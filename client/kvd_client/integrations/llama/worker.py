"""A worker: a llama.cpp context whose sequences share their prefixes through kvd.

    with LlamaWorker("model.gguf", n_ctx=4096) as worker:
        with worker.open(worker.engine.tokenize(prompt)) as sequence:
            sequence.prefill()                  # imports what is cached, computes the rest
            for token in sequence.generate(64): ...

Covers what happens to one sequence: match, import, decode the rest, export new blocks (storing.py),
release. The engine that moves the bytes is kv/engine.py; what may share with what,
kv/fingerprint.py. A worker belongs to one thread at a time, as its engine and its client do.
"""

import logging
import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvd_client.asking import traits_of
from kvd_client.client import DEFAULT_STAGING, Client, Context, Sequence
from kvd_client.context import Model
from kvd_client.integrations.llama.errors import ImportFailed, NotExportable
from kvd_client.integrations.llama.kv.engine import LlamaEngine
from kvd_client.integrations.llama.kv.fingerprint import KvSource, fingerprint
from kvd_client.integrations.llama.kv.mover import BlockAt
from kvd_client.integrations.llama.runtime.params import kv_type_name
from kvd_client.integrations.llama.storing import Storer, blocks_at_once
from kvd_proto.payload import llama_state_name

logger = logging.getLogger("kvd_client")

Tokens = npt.NDArray[np.int32]
Pick = Callable[[npt.NDArray[np.float32]], int]
"""Chooses the next token from logits, float32 [n_vocab]."""

_NO_WAIT = 0.0


def model_of(engine: KvSource, block_tokens: int = 32) -> Model:
    """What the daemon must know of an engine's K/V. Raises NotShareable if it cannot be shared, and
    ValueError if a block is longer than the model's window."""
    layout = engine.layout
    if layout.window and block_tokens > layout.window:
        raise ValueError(
            f"block_tokens must be at most {layout.window}, the model's window, not {block_tokens}"
        )
    layers = tuple(
        (kv_type_name(row.k_type), row.k_row_bytes, kv_type_name(row.v_type), row.v_row_bytes)
        for part in layout.parts
        for row in part
    )
    found = fingerprint(engine)
    return Model(
        engine.model.path.name,
        found.digest,
        llama_state_name(len(layout.window_layers), layout.m_rope),
        layers,
        block_tokens,
        traits_of(found.fields),
    )


def explain_engine(
    engine: LlamaEngine, client: Client, tokens: npt.ArrayLike, block_tokens: int = 32
) -> dict[str, Any]:
    """Like LlamaWorker.explain, for an engine without a worker. Of one that cannot be shared (see
    `require_shareable` of LlamaEngine) no block is ever stored or found: `not_exportable` says why,
    and there is nothing else to tell."""
    prompt = _checked_prompt(tokens)
    if engine.not_shareable is not None:
        return {"asked_tokens": prompt.size - 1, "not_exportable": str(engine.not_shareable)}
    found = client.explain(model_of(engine, block_tokens), prompt[:-1])
    return {**found, "not_exportable": None}


def _checked_prompt(tokens: npt.ArrayLike) -> Tokens:
    prompt = np.ascontiguousarray(tokens, dtype=np.int32)
    if prompt.ndim != 1 or prompt.size == 0:
        raise ValueError("a prompt is a flat array of at least one token")
    return prompt


class LlamaWorker:
    """An engine and its context at the daemon. A context manager."""

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        engine: LlamaEngine | None = None,
        client: Client | None = None,
        runtime_dir: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        block_tokens: int = 32,
        name: str = "llama",
        **engine_options: Any,
    ) -> None:
        """Load `model_path` with `engine_options` (those of LlamaEngine), or take `engine`.

        Without a `client` the worker opens one that fails open: while no daemon answers within
        `timeout` seconds (None: 0.05), the worker computes by itself. Raises NotShareable for a
        model or options that cannot be shared.
        """
        if engine is None:
            if model_path is None:
                raise ValueError("give a model_path or an engine")
            engine = LlamaEngine(model_path=model_path, **engine_options)
            self._own_engine = True
        else:
            self._own_engine = False
        self.engine = engine
        self._own_client = client is None
        self.not_exportable: str | None = None
        """Why the engine did not give a block out, of the last sequence of which it did not."""
        try:
            model = model_of(engine, block_tokens)
            self.client = client or Client(
                runtime_dir,
                name=name,
                fail_open=True,
                timeout=timeout,
                staging_bytes=DEFAULT_STAGING,
            )
            self.context: Context = self.client.open_context(model, engine.n_seq_max)
        except BaseException:
            self._close_own()
            raise

    @property
    def blocks_at_once(self) -> int:
        """Blocks of one append (storing.py)."""
        return blocks_at_once(self.context)

    def open(
        self,
        tokens: npt.ArrayLike,
        *,
        request: str = "",
        wait: float = 0.0,
        use: bool = True,
        store: bool = True,
        like: "LlamaSequence | None" = None,
    ) -> "LlamaSequence":
        """A sequence for a prompt (int [n], n >= 1), with as much of it as is cached.

        At least the last token is left to decode, since logits are not cached. `wait` seconds for
        a free sequence id. `use` False: all of it is computed, whatever is cached. `store` False:
        nothing of it is stored, neither by `store` nor at its end. With `like`, an open sequence of
        this worker, the two share the cells of what they have in common, of which nothing is
        imported. Raises NoSequenceFree, SequenceLimit.
        """
        prompt = _checked_prompt(tokens)
        leased = self.context.alloc(prompt[:-1], request=request, wait=wait, use=use, store=store)
        sequence = LlamaSequence(self, leased, prompt)
        try:
            sequence.import_prefix(like)
        except BaseException:
            sequence.close(store=False, failed=True)
            raise
        return sequence

    def explain(self, tokens: npt.ArrayLike) -> dict[str, Any]:
        """What `open` would find of this prompt, and why not the rest: the map of `kvctl explain
        --json`, and `not_exportable`: why this worker could not export a sequence last, or None.
        See also `explain_engine`."""
        found = self.client.explain(self.context.model, _checked_prompt(tokens)[:-1])
        return {**found, "not_exportable": self.not_exportable}

    def decode_each(self, sequences: "SequenceOf[LlamaSequence]", tokens: SequenceOf[int]) -> None:
        """Append one token to each of several sequences in one batch; `logits` of each are new."""
        positions = [sequence.length for sequence in sequences]
        ids = [sequence.seq_id for sequence in sequences]
        self.engine.decode(np.asarray(tokens, np.int32), positions, ids, True)
        for row, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
            sequence.took(token, self.engine.logits(row))

    def close(self) -> None:
        """Give everything back."""
        try:
            if self._own_client:
                self.client.close()
            elif not self.client.closed:
                self.context.close()
        finally:
            self._close_own()

    def _close_own(self) -> None:
        if self._own_engine:
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LlamaSequence:
    """One sequence of a worker. A context manager; its end stores what is new and frees the id.

    `tokens` is the prompt and what came after; `length` of them are in the context.
    `matched_tokens` were found in the cache, and `copied_tokens` of all, matched or not, in another
    sequence of the worker, whose cells they share: what was imported is the rest of the matched
    ones. `logits` are those after the last decoded token, float32
    [n_vocab].
    """

    def __init__(self, worker: LlamaWorker, leased: Sequence, prompt: Tokens) -> None:
        self.worker = worker
        self._engine = worker.engine
        self.leased = leased
        self._buffer = np.empty(max(self._engine.n_ctx, len(prompt)), np.int32)
        self._buffer[: len(prompt)] = prompt
        self._n_tokens = len(prompt)
        self.seq_id = leased.seq_id
        self.length = 0
        self.matched_tokens = 0
        self.copied_tokens = 0
        self.logits: npt.NDArray[np.float32] | None = None
        self._closed = False
        self._storer = Storer(leased, self._engine, leased.seq_id)

    @property
    def problem(self) -> str:
        """Why nothing more of it is stored."""
        return self._storer.problem

    @property
    def tokens(self) -> Tokens:
        """The prompt, and tokens decoded after it; a read-only view."""
        view = self._buffer[: self._n_tokens]
        view.flags.writeable = False
        return view

    def import_prefix(self, like: "LlamaSequence | None" = None) -> None:
        """Bring the leased blocks into the context; called once, by LlamaWorker.open.

        What an open sequence, `like`, has of them, and beyond them of the prompt, is shared with it
        instead. If llama.cpp does not take a block the sequence is emptied, and everything is
        computed.
        """
        leased, engine = self.leased, self._engine
        block_tokens = self.worker.context.model.block_tokens
        matched, copied = leased.matched_tokens, self._common(like)
        if copied < matched:
            copied -= copied % block_tokens  # blocks are imported as a whole
        end = max(matched, copied)
        try:
            if like is not None:
                engine.copy_prefix(like.seq_id, self.seq_id, copied)
            if copied < matched:
                first = copied // block_tokens
                payloads = leased.payloads()
                counts = [block_tokens] * (leased.n_blocks - 1) + [leased.last_block_tokens]
                blocks = map(
                    BlockAt, payloads.addresses[first:], payloads.sizes[first:], counts[first:]
                )
                engine.import_blocks(self.seq_id, copied, blocks)
                engine.truncate(self.seq_id, matched)
            engine.check_range(self.seq_id, 0, end)
        except (ImportFailed, NotExportable) as error:
            engine.clear(self.seq_id)
            if copied:
                # Not all that a sequence has computed need be there to be shared: a window moves.
                self.import_prefix()
                return
            logger.warning("computing a cached prefix again: %s", error)
            return
        self.length = end
        self.matched_tokens = self._storer.posted_tokens = matched
        self.copied_tokens = copied

    def _common(self, like: "LlamaSequence | None") -> int:
        """How many tokens of the prompt, but for its last one, `like` has in the context."""
        if like is None:
            return 0
        n = min(self._n_tokens - 1, like.length)
        differs = self._buffer[:n] != like.tokens[:n]
        return int(differs.argmax()) if differs.any() else n

    def prefill(self) -> npt.NDArray[np.float32]:
        """Decode what of the prompt is not in the context; returns the last token's logits."""
        rest = self._buffer[self.length : self._n_tokens]
        if self._engine.drops_cells:
            while self.prefill_some():
                pass
        elif rest.size:
            self._engine.prefill(self.seq_id, rest, self.length)
            self.length = self._n_tokens
            self.logits = self._engine.logits()
        assert self.logits is not None
        return self.logits

    def prefill_some(self) -> int:
        """Decode the next batch of what `prefill` would decode, the same batches as it makes;
        returns how many tokens of the prompt are left. For who shows its progress.

        Of an engine that drops cells (`drops_cells`) the full blocks are stored before another
        batch is decoded, as long as they are there.
        """
        if self._engine.drops_cells:
            self.store(wait=_NO_WAIT)
        end = min(self._n_tokens, self.length + self._engine.n_batch)
        if self.length < end:
            is_last = end == self._n_tokens
            rest = self._buffer[self.length : end]
            self._engine.prefill(self.seq_id, rest, self.length, logits_last=is_last)
            self.length = end
            if is_last:
                self.logits = self._engine.logits()
        return self._n_tokens - self.length

    def decode(self, token: int) -> npt.NDArray[np.float32]:
        """Append one token; returns the logits after it."""
        self.worker.decode_each([self], [token])
        assert self.logits is not None
        return self.logits

    def took(self, token: int, logits: npt.NDArray[np.float32] | None) -> None:
        """A token was decoded for this sequence, by LlamaWorker.decode_each."""
        self._buffer[self.length] = token
        self.length += 1
        self._n_tokens = self.length
        self.logits = logits

    def generate(self, max_tokens: int, pick: Pick | None = None) -> Iterator[int]:
        """Up to `max_tokens` next tokens, until the model ends its text; greedy without `pick`.

        The last one is not decoded: append it with `decode` to go on.
        What is new is stored after the first token and whenever a block is full, so nothing of that
        delays the first one.
        """
        logits = self.prefill()
        for left in range(max_tokens - 1, -1, -1):
            token = int(logits.argmax()) if pick is None else pick(logits)
            if self._engine.is_eog(token):
                return
            yield token
            self.store(wait=_NO_WAIT)
            if left:
                logits = self.decode(token)

    @property
    def unstored_tokens(self) -> int:
        """Tokens in the context that are not in the cache, nor on their way to it; 0 if nothing
        more of this sequence is stored."""
        leased = self.leased
        if self.problem or not leased.shared or not leased.stores:
            return 0
        return max(0, self.length - self._storer.posted_tokens)

    def store(
        self, *, tail: bool = False, wait: float | None = None, most: int | None = None
    ) -> int:
        """Export the full blocks that are new, and with `tail` the open one; `most` blocks at most
        (None: all). Returns how many were exported: Storer.store.

        After a commit that failed the sequence goes on and is stored no further.
        """
        exported = self._storer.store(self._buffer[: self.length], tail=tail, wait=wait, most=most)
        if self._storer.not_exportable is not None:
            self.worker.not_exportable = self._storer.not_exportable
        return exported

    def close(self, *, store: bool = True, failed: bool = False) -> None:
        """Store what is new, the open tail included; empty the sequence, and free its id."""
        if self._closed:
            return
        self._closed = True
        if store:
            self.store(tail=True)
        # The id may be handed out again as soon as it is released: first its K/V must be gone.
        self._engine.clear(self.seq_id)
        self.leased.release(failed=failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(store=error is None, failed=error is not None)
