"""One llama_batch over arrays that are allocated once and filled in place."""

import ctypes

import llama_cpp.llama_cpp as bindings
import numpy as np
import numpy.typing as npt


class Batch:
    """Room for `capacity` tokens, each of one sequence."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.native = bindings.llama_batch()
        self._tokens = np.zeros(capacity, dtype=np.int32)
        self._positions = np.zeros(capacity, dtype=np.int32)
        self._seq_ids = np.zeros(capacity, dtype=np.int32)
        self._flags = np.zeros(capacity, dtype=np.int8)
        # llama.cpp wants a list of ids for each token: the i-th points at one id, the i-th.
        self._n_seq_ids = np.ones(capacity, dtype=np.int32)
        ids = self._seq_ids
        self._seq_id_lists = ids.ctypes.data + ids.itemsize * np.arange(capacity, dtype=np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.native.token = self._tokens.ctypes.data_as(int32)
        self.native.pos = self._positions.ctypes.data_as(int32)
        self.native.n_seq_id = self._n_seq_ids.ctypes.data_as(int32)
        self.native.seq_id = self._seq_id_lists.ctypes.data_as(ctypes.POINTER(int32))
        self.native.logits = self._flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def fill(
        self,
        tokens: npt.ArrayLike,
        positions: npt.ArrayLike,
        seq_ids: npt.ArrayLike,
        logits_flags: npt.ArrayLike,
    ) -> None:
        """Replace the content; `tokens` is [n], the others [n] or a scalar for all n.

        ValueError for no or too many tokens or unequal lengths, TypeError for numbers that are not
        whole.
        """
        n = np.size(tokens)
        if not 1 <= n <= self.capacity:
            raise ValueError(f"a batch has 1 to {self.capacity} tokens, not {n}")
        np.copyto(self._tokens[:n], tokens, casting="same_kind")
        np.copyto(self._positions[:n], positions, casting="same_kind")
        np.copyto(self._seq_ids[:n], seq_ids, casting="same_kind")
        np.copyto(self._flags[:n], logits_flags, casting="same_kind")
        self.native.n_tokens = n

    def __len__(self) -> int:
        return int(self.native.n_tokens)

    def has_logits(self, row: int) -> bool:
        """Whether logits were asked for at this row (0 .. len-1)."""
        return bool(self._flags[row])
