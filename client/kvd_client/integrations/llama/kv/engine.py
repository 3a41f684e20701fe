"""The engine of a worker: a llama.cpp context that moves blocks of K/V to and from memory.

Covers whether this model and context can share at all. Does not know of the daemon, of block keys
or of leases. How blocks are moved is in mover.py, decoding in runtime/context.py, loading and
tokens in runtime/model.py. The context has one sequence id more than its user, the scratch id.

An engine belongs to one thread at a time.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from types import TracebackType

from kvd_client.integrations.llama.errors import (
    NotShareable,
    Reason,
)
from kvd_client.integrations.llama.kv.mover import (
    BlockAt,
    BlockMover,
    ScratchSequence,
    read_layout,
)
from kvd_client.integrations.llama.kv.state import V_TRANS, KvLayout
from kvd_client.integrations.llama.runtime.context import LlamaContext, not_causal
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import (
    ContextParams,
    LoraAdapter,
    RopeParams,
    kv_type_name,
)

MAX_SEQUENCES = 255
"""LLAMA_MAX_SEQ is 256, and one id is scratch."""


class LlamaEngine(LlamaContext):
    """A context with sequence ids 0 .. n_seq_max-1 for its user.

    `model` may be shared with other engines; with `model_path` the engine loads and owns one.
    `n_ctx` is in tokens, for all sequences together; llama.cpp rounds it up to a multiple of 256
    (attribute `n_ctx`). `n_threads` is by default all CPUs this process may use. `type_k` and
    `type_v` are names or numbers of params.KV_TYPES. Adapters of scale 0 are left out.

    `swa_full`, of a model with a sliding window: whether the layers that have one keep cells for
    n_ctx tokens too, or for little more than the windows of all sequences and a batch, which takes
    less memory. Then blocks must be exported before the window has left them (NotExportable), and
    `truncate` and `copy_prefix` refuse what the window has left. Both kinds share with each other.

    Raises NotShareable if K/V cannot be shared exactly. With `require_shareable=False` that is
    left in `not_shareable`, and only the calls that need sharing raise it (layout, export_block,
    import_blocks, check_range, copy_prefix). All is freed if the constructor raises, and by
    close().
    """

    not_shareable: NotShareable | None
    v_trans = V_TRANS

    def __init__(
        self,
        *,
        model_path: str | os.PathLike[str] | None = None,
        model: LlamaModel | None = None,
        n_ctx: int,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        n_seq_max: int = 8,
        type_k: str | int = "f16",
        type_v: str | int = "f16",
        rope: RopeParams | None = None,
        loras: Sequence[LoraAdapter] = (),
        flash_attn: bool = True,
        kv_unified: bool = True,
        swa_full: bool = True,
        require_shareable: bool = True,
    ) -> None:
        if not 1 <= n_seq_max <= MAX_SEQUENCES:
            raise NotShareable(
                Reason.SEQUENCE_IDS,
                f"n_seq_max must be 1 to {MAX_SEQUENCES}, not {n_seq_max}: llama.cpp has "
                f"{MAX_SEQUENCES + 1} ids in a context, and one is scratch",
            )
        params = ContextParams(
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            n_seq_max=n_seq_max,
            type_k=kv_type_name(type_k),
            type_v=kv_type_name(type_v),
            rope=rope or RopeParams(),
            flash_attn=flash_attn,
            kv_unified=kv_unified,
            swa_full=swa_full,
        )
        loras = [adapter for adapter in loras if adapter.scale]
        with contextlib.ExitStack() as resources:
            if model is None:
                if model_path is None:
                    raise ValueError("give a model or a model_path")
                model = resources.enter_context(LlamaModel(model_path))
            elif model_path is not None:
                raise ValueError("give a model or a model_path, not both")
            self.not_shareable = model.unshareable_kind(loras)
            if self.not_shareable is not None and require_shareable:
                raise self.not_shareable
            super().__init__(model, params, loras, resources)
            if self.not_shareable is None:
                self.not_shareable = self._probe_layout()
                if self.not_shareable is not None and require_shareable:
                    raise self.not_shareable
            self._resources = resources.pop_all()

    def _probe_layout(self) -> NotShareable | None:
        """Decode one token in the scratch sequence, read its state, and empty the context again."""
        reason = not_causal(self._context)
        if reason is not None:
            return reason
        scratch = ScratchSequence(self._context, self._memory, self._scratch, is_narrow=False)
        self._decode([0], 0, self._scratch, False)
        try:
            self._mover = BlockMover(scratch, read_layout(scratch), self.n_ctx)
        except NotShareable as reason:
            return reason
        return None

    @property
    def layout(self) -> KvLayout:
        """Types and row bytes of each layer's K and V; NotShareable if they cannot be shared."""
        self._check_shareable()
        return self._mover.layout

    @property
    def drops_cells(self) -> bool:
        """Whether a block is soon gone from the context: there is a window, and no swa_full."""
        return bool(self.layout.window) and not self.params.swa_full

    def _check_shareable(self) -> None:
        if self.not_shareable is not None:
            raise self.not_shareable.with_traceback(None)

    def export_block(self, seq: int, start: int, n: int, dst_address: int, capacity: int) -> int:
        """BlockMover.export_block."""
        self._check(seq)
        self._check_shareable()
        return self._mover.export_block(seq, start, n, dst_address, capacity)

    def import_blocks(self, seq: int, start: int, blocks: Iterable[BlockAt]) -> None:
        """BlockMover.import_blocks."""
        self._check(seq)
        self._check_shareable()
        self._mover.import_blocks(seq, start, blocks)

    def check_range(self, seq: int, start: int, end: int) -> None:
        """BlockMover.check_range."""
        self._check(seq)
        self._check_shareable()
        self._mover.check_range(seq, start, end)

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        """BlockMover.copy_prefix."""
        self._check(src)
        self._check(dst)
        self._check_shareable()
        self._mover.copy_prefix(src, dst, n)

    def close(self) -> None:
        """Free the context, the adapters and a model of its own. Closing twice does nothing."""
        self._context = self._memory = self._n_rows = 0
        self._resources.close()

    def __enter__(self) -> "LlamaEngine":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()
