"""One block of a sequence of arrays: its memory, and the arrays that show it.

The memory is in the arena once the block is sealed, before that in the staging, or the process's
own when there is no staging. Who moves it from one to the next: array_storage.py.
"""

import weakref
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from kvd_client.array_model import KV, ArrayModel
from kvd_client.staging import Staged


class Block:
    """Memory for block_tokens tokens. `staged` is set while it lies in the staging.

    Arrays that users get are all made from one array over the block, and keep it alive. We hold it
    only while it is shown, so when we let go of it and it stays, somebody looks at the block.
    """

    __slots__ = ("_memory", "_model", "_rows", "_shown", "_whole", "staged")

    def __init__(self, model: ArrayModel, memory: memoryview, staged: Staged | None = None) -> None:
        self._model = model
        self._memory = memory
        self.staged = staged
        self._whole: npt.NDArray[np.uint8] | None = None
        self._shown: dict[int, KV] = {}
        self._rows: dict[int, KV] = {}

    @property
    def memory(self) -> memoryview:
        """All bytes of the block."""
        return self._memory

    def show(self, layer: int) -> KV:
        """Read-only arrays of the layer with room for block_tokens tokens, without a copy."""
        shown = self._shown.get(layer)
        if shown is None:
            if self._whole is None:
                self._whole = np.frombuffer(self._memory.toreadonly(), np.uint8)
            # NumPy takes a memoryview in half the time, and it keeps the array alive, too.
            shown = self._shown[layer] = self._model.show(layer, memoryview(cast(Any, self._whole)))
        return shown

    def rows(self, layer: int) -> KV:
        """The same, writable: for the sequence itself, and only before the block is committed."""
        rows = self._rows.get(layer)
        if rows is None:
            whole = np.frombuffer(self._memory, np.uint8)
            rows = self._rows[layer] = self._model.show(layer, whole)
        return rows

    def clear_rows(self, start: int) -> None:
        """Fill the rows from token `start` on with zeros: what was in the memory before is no part
        of the block, and equal blocks shall be equal bytes."""
        for layer in range(len(self._model.layers)):
            for plane in self.rows(layer):
                plane[start:] = 0

    def hide(self) -> bool:
        """Whether nobody looks at the block any more. It can be shown again in both cases."""
        self._shown.clear()
        if self._whole is None:
            return True
        still_alive = weakref.ref(self._whole)
        self._whole = None
        self._whole = still_alive()
        return self._whole is None

    def move(self, memory: memoryview, staged: Staged | None = None) -> None:
        """Be in other memory with the same content from now on. Arrays that are alive stay with the
        memory before."""
        self._shown.clear()
        self._rows.clear()
        self._whole = None
        self._memory = memory
        self.staged = staged

    def close(self) -> None:
        """Let go of the memory."""
        self.move(memoryview(b""))
