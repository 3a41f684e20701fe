"""llama.cpp through llama-cpp-python: needs the extra `llama`.

`share` makes an ordinary `Llama` share its K/V; `worker.py` has a worker with several sequences.
`kv/engine.py` owns a llama.cpp context, `kv/mover.py` moves blocks of K/V in and out of one, and
`kv/fingerprint.py` says which contexts may share blocks: they know nothing of the daemon.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvd_client.integrations.llama.attached.sharing import LlamaShare


def share(llama: Any, **options: Any) -> "LlamaShare":
    """Make a `llama_cpp.Llama` share its K/V through the daemon of this machine.

        llama = Llama("model.gguf", n_ctx=4096, flash_attn=True)
        share(llama)

    Options are those of `attached.sharing.LlamaShare`, which it returns. Raises NotShareable, and
    changes nothing, for a Llama that cannot share exactly. Without a daemon the Llama goes on as
    ever.
    """
    # Not before it is needed: importing it loads llama.cpp, and takes its log.
    from kvd_client.integrations.llama.attached.sharing import LlamaShare

    return LlamaShare(llama, **options)
