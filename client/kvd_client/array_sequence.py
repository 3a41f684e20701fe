"""The K/V of one sequence as an engine sees it: chunks of tokens, layers, rows, views.

How it is used is in arrays.py, which opens sequences. Where blocks lie and how they get into the
arena: array_storage.py.
"""

from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from kvd_client.array_model import KV, ArrayModel
from kvd_client.array_storage import Storage
from kvd_client.client import Client, Sequence
from kvd_client.errors import BadMessage, BadPayload, Closed, KvdError, ViewsAlive
from kvd_client.session import Commit
from kvd_client.state import Tokens, pack_tokens
from kvd_proto.keys import TOKEN_BYTES


class ArraySequence:
    """The K/V of one sequence of tokens. A context manager; from ArrayContext.alloc.

    `matched_tokens` tokens of the prompt had K/V in the cache; the sequence begins with them.
    """

    def __init__(
        self, client: Client, model: ArrayModel, sequence: Sequence, storage: Storage
    ) -> None:
        self._client = client
        self._model = model
        self._sequence = sequence
        self._storage = storage
        self.matched_tokens = sequence.matched_tokens
        self._length = self.matched_tokens
        self._chunk = range(self._length, self._length)
        self._written = [self._length] * len(self._model.layers)
        self._missing = 0
        """Layers of the chunk that are not written yet."""

    @property
    def length(self) -> int:
        """Tokens in the sequence, the chunk that is being written included."""
        return self._length

    @property
    def sealed_tokens(self) -> int:
        """Tokens whose blocks are read in the arena."""
        return self._storage.sealed * self._model.block_tokens

    @property
    def store_error(self) -> KvdError | None:
        """Why nothing more of this sequence is stored; None while all is well."""
        return self._storage.error

    @property
    def released(self) -> bool:
        return self._sequence.released

    def extend(self, tokens: Tokens) -> range:
        """Begin a chunk: make room for the K/V of `tokens`, to be written layer by layer.

        Returns their positions. Waits, if the staging is full, for blocks that are being stored.
        Raises BadMessage while layers of the chunk before are not written.
        """
        self._check()
        if self._missing:
            raise BadMessage(
                "write all layers of a chunk before the next one",
                chunk=str(self._chunk),
                missing_layers=self._missing,
            )
        packed = pack_tokens(tokens)
        if not packed:
            raise BadMessage("a chunk has at least one token")
        end = self._length + len(packed) // TOKEN_BYTES
        storage = self._storage
        n_blocks = -(-end // self._model.block_tokens) - len(storage.blocks)
        if n_blocks > 0 or storage.sealed < storage.committed:
            self._client.run(storage.grow(n_blocks))
        storage.add_tokens(packed)
        self._chunk = range(self._length, end)
        self._length = end
        self._missing = len(self._model.layers)
        return self._chunk

    def write(self, layer: int, k: npt.ArrayLike, v: npt.ArrayLike) -> None:
        """Copy K and V of the chunk's tokens in `layer`: [token][head][dim] of the model's dtype.

        From now on `views(layer)` shows them. A chunk's last write posts the blocks that are full.
        Raises BadPayload for another shape or type, BadMessage for a layer that has been written;
        nothing is changed then.
        """
        self._check()
        self._check_layer(layer)
        if self._written[layer] == self._length:
            raise BadMessage("this layer has no tokens to be written: extend first", layer=layer)
        heads, k_dim, v_dim = self._model.layers[layer]
        n_tokens = len(self._chunk)
        new = KV(
            self._checked("k", layer, k, (n_tokens, heads, k_dim)),
            self._checked("v", layer, v, (n_tokens, heads, v_dim)),
        )
        self._copy_rows(layer, new)
        self._written[layer] = self._length
        self._missing -= 1
        full = self._length // self._model.block_tokens
        if not self._missing and full > self._storage.committed and self.store_error is None:
            self._client.run(self._storage.commit(full * self._model.block_tokens))

    def append(self, tokens: Tokens, k: Any, v: Any) -> range:
        """Append a chunk whose K/V is known in all layers: `extend`, and `write` for every layer.

        `k[layer]` and `v[layer]` are [token][head][dim]. Returns the positions. Everything is
        checked before anything is changed.
        """
        self._check()
        n_layers = len(self._model.layers)
        if len(k) != n_layers or len(v) != n_layers:
            raise BadPayload("one K and one V for each layer", layers=n_layers, k=len(k), v=len(v))
        n_tokens = len(pack_tokens(tokens)) // TOKEN_BYTES
        for layer, (heads, k_dim, v_dim) in enumerate(self._model.layers):
            self._checked("k", layer, k[layer], (n_tokens, heads, k_dim))
            self._checked("v", layer, v[layer], (n_tokens, heads, v_dim))
        positions = self.extend(tokens)
        for layer in range(n_layers):
            self.write(layer, k[layer], v[layer])
        return positions

    def views(self, layer: int) -> list[KV]:
        """K and V of every token written in `layer`, block by block, in order, without a copy.

        Each is [token][head][dim], all of block_tokens tokens but perhaps the last. They are
        read-only, and show the same until release, which raises ViewsAlive while one is alive. Drop
        them before the next `extend` all the same: what somebody looks at keeps its staging. An
        empty list for a sequence without tokens.
        """
        self._check()
        self._check_layer(layer)
        n_full, rest = divmod(self._written[layer], self._model.block_tokens)
        blocks = self._storage.blocks
        shown = [block.show(layer) for block in blocks[:n_full]]
        if rest:
            k, v = blocks[n_full].show(layer)
            shown.append(KV(k[:rest], v[:rest]))
        return shown

    def gather(self, layer: int) -> KV:
        """A contiguous copy of K and V of every token written in `layer`: [token][head][dim]."""
        blocks = self.views(layer)
        if not blocks:
            k, v = self._model.planes[layer]
            return KV(
                np.empty((0, *k.shape[1:]), self._model.dtype),
                np.empty((0, *v.shape[1:]), self._model.dtype),
            )
        return KV(
            np.concatenate([block.k for block in blocks]),
            np.concatenate([block.v for block in blocks]),
        )

    def flush(self) -> int:
        """Wait until the blocks posted so far are sealed, so that others find them.

        Returns `sealed_tokens`. Gives up after the client's timeout without progress; see
        `store_error`.
        """
        self._check()
        self._client.run(self._storage.flush())
        return self.sealed_tokens

    def release(self, *, store: bool = True, failed: bool = False) -> Commit | None:
        """End the sequence. The open block is stored as a shorter one, unless `store` is False.

        Tokens of a chunk that is not written in all layers are not stored. Does not wait until the
        rest is: `Client.flush` of the result does (None: there was nothing to store). Raises
        ViewsAlive before anything changes. The sequence cannot be used any more.
        """
        self._check()
        self._storage.hide()
        commit: Commit | None = None
        try:
            if store:
                complete = self._chunk.start if self._missing else self._length
                commit = self._client.run(self._storage.seal_tail(complete))
        finally:
            self._storage.close()
            self._sequence.release(failed=failed)
        return commit

    def _check(self) -> None:
        self._client.check()
        if self._sequence.released:
            raise Closed("this sequence has been released", seq_id=self._sequence.seq_id)

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < len(self._model.layers):
            raise BadMessage("no such layer", layer=layer, layers=len(self._model.layers))

    def _checked(
        self, name: str, layer: int, rows: npt.ArrayLike, shape: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        array = np.asarray(rows)
        if array.shape != shape or array.dtype != self._model.dtype:
            raise BadPayload(
                f"{name} has another shape or type than the model and the chunk demand",
                layer=layer,
                expected=f"{shape} {self._model.dtype}",
                got=f"{array.shape} {array.dtype}",
            )
        return array

    def _copy_rows(self, layer: int, new: KV) -> None:
        """Copy the chunk's rows to their places, block by block."""
        block_tokens = self._model.block_tokens
        at, end = self._chunk.start, self._chunk.stop
        first = at
        while at < end:
            index, row = divmod(at, block_tokens)
            n = min(block_tokens - row, end - at)
            rows = self._storage.blocks[index].rows(layer)
            rows.k[row : row + n] = new.k[at - first : at - first + n]
            rows.v[row : row + n] = new.v[at - first : at - first + n]
            at += n

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.released:
            return
        if error is None:
            self.release()
            return
        # The frames of the error may hold views. The context gives the sequence back then.
        with suppress(ViewsAlive):
            self.release(store=False, failed=True)
