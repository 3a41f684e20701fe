"""K/V for engines that keep it in arrays: NumPy, PyTorch on a CPU, ONNX Runtime.

    model = ArrayModel("tiny", identity, [ArrayLayer(kv_heads=2, k_dim=64, v_dim=64)] * 4)
    with kvd_client.connect() as client, ArrayContext(client, model) as context:
        with context.alloc(prompt[:-1]) as sequence:
            positions = sequence.extend(prompt[sequence.matched_tokens :])
            for layer in range(4):
                ...                                     # k, v of the new tokens: [token][head][dim]
                sequence.write(layer, k, v)
                for block in sequence.views(layer):     # of all tokens, the new ones included
                    ...                                 # attention over block.k and block.v

For each chunk of tokens, a prompt or one decoded token: `extend` once, then `write` every layer
once. An engine that has all layers' K/V at once calls `append` instead of both. Written rows are
copied once, into memory that is shared with the daemon; when a block is full and all layers are
written it is posted to the daemon without waiting, and read in the arena once it is sealed there.
A decoded token takes no round trip, a full block one.

Once alloc has succeeded a sequence works to its end whatever happens to the daemon: what cannot be
stored (the daemon is gone, or has no room) stays in this process, with the same results;
`store_error` says why. A prefix in the arena stays readable, too: the mapping outlives the daemon.

Threads: one thread at a time uses a context and its sequences; views may be read from anywhere.
The sequence is in array_sequence.py, how blocks get into the arena in array_storage.py, and what a
block looks like in array_model.py.
"""

from contextlib import suppress
from types import TracebackType
from typing import Self

from kvd_client.array_model import KV, ArrayLayer, ArrayModel
from kvd_client.array_sequence import ArraySequence
from kvd_client.array_storage import Storage
from kvd_client.client import Client
from kvd_client.errors import ViewsAlive
from kvd_client.state import Tokens, pack_tokens
from kvd_proto.keys import TOKEN_BYTES

__all__ = ["KV", "ArrayContext", "ArrayLayer", "ArrayModel", "ArraySequence"]


class ArrayContext:
    """A pool of sequences for one model. A context manager."""

    def __init__(self, client: Client, model: ArrayModel, n_seq_max: int = 8) -> None:
        """Registers the model; up to `n_seq_max` sequences can be open at once.

        The client's `staging_bytes` should hold the open block of each of them, and the largest
        chunk; what does not fit is copied once more. With fail_open and no daemon everything works
        in this process alone, and is shared again from the first alloc after the daemon is back.
        """
        self.client = client
        self.model = model
        self.context = client.open_context(model.model, n_seq_max)
        self._sequences: list[ArraySequence] = []
        self._storages: list[Storage] = []

    def alloc(
        self,
        tokens: Tokens,
        *,
        request: str = "",
        wait: float = 0.0,
        use: bool = True,
        store: bool = True,
    ) -> ArraySequence:
        """A sequence that begins with the longest cached prefix of `tokens`.

        Leave out the last token of a prompt if its logits are needed: it has to be computed even
        where its K/V is cached. Of a block that agrees only in part the rows that agree are copied.
        `wait` seconds for an id if none is free. `use` False: nothing is matched, whatever is
        cached. `store` False: nothing of it is stored, and its `store_error` is NotStored. Raises
        what Context.alloc raises.
        """
        packed = pack_tokens(tokens)
        sequence = self.context.alloc(packed, request=request, wait=wait, use=use, store=store)
        matched = packed[: sequence.matched_tokens * TOKEN_BYTES]
        storage = Storage(self.model, sequence, self._storages, matched)
        try:
            self.client.run(storage.take_match())
        except BaseException:
            storage.close()
            sequence.release(failed=True)
            raise
        made = ArraySequence(self.client, self.model, sequence, storage)
        self._sequences = [each for each in self._sequences if not each.released]
        self._sequences.append(made)
        return made

    def close(self) -> None:
        """Give back the context and all of its sequences, whose open blocks are not stored.

        Raises ViewsAlive while views of one are alive.
        """
        for sequence in self._sequences:
            if not sequence.released:
                sequence.release(store=False)
        self.context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.client.closed:
            return
        if error is None:
            self.close()
            return
        with suppress(ViewsAlive):
            self.close()
