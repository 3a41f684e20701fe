"""Which contexts may share blocks: those with equal fingerprints.

The blocks themselves say nothing of what made them, and llama.cpp takes a foreign one silently.
So the fingerprint covers all that changes K/V for the same tokens at the same positions:

    format                 version of this package's canonical llama-state form
    model                  content of the model's file or files (files/model_hash.py)
    llama_cpp              llama-cpp-python's version
    libraries              content of the loaded libllama, libggml and libm (RoPE takes its sines
                           there): another build or CPU variant rounds differently
    cpu                    the CPU features ggml uses
    cpu_fusion             GGML_CPU_DISABLE_FUSION: fused operations round differently
    type_k, type_v         element types; n_stream, v_trans: the form of the state
    attn_rot               LLAMA_ATTN_ROT_DISABLE: whether quantised K/V is rotated
    rope.*                 parameters given for the context; "model" is what the model's file says,
                           and what llama.cpp takes where neither says anything
    rope.factors           "long" in a context longer than the model's original one, else "short"
    lora                   content and scale of the adapter

Not in it: n_threads, n_batch, n_ubatch, which sequences lie in the context, swa_full. They too
change last bits, as they do without sharing (n_threads in one-token decodes, whose attention is
split among the threads; swa_full where it makes cells lie otherwise). n_ctx is in it through
rope.factors alone: llama.cpp chooses between the two sets of RoPE factors of a LongRoPE model by
n_ctx. Which model has such factors cannot be asked, so the field counts for all of them; that costs
sharing only between contexts on both sides of that length. GPUs do not occur: models are loaded for
the CPU (runtime/model.py).
"""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import llama_cpp
import llama_cpp.llama_cpp as bindings

from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable
from kvd_client.integrations.llama.files.architectures import ARCHITECTURES
from kvd_client.integrations.llama.files.model_hash import file_digest
from kvd_client.integrations.llama.kv.state import N_STREAM, KvLayout
from kvd_client.integrations.llama.runtime import native
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.runtime.params import LoraAdapter, RopeParams

FORMAT = "kvd llama-state 1"
_LIBRARY_PREFIXES = ("libllama", "libggml", "libm.so", "libm-")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`digest` is blake2b-256 over `fields`, equal in all processes for equal fields."""

    digest: bytes
    fields: Mapping[str, str]

    @classmethod
    def of_fields(cls, fields: Mapping[str, str]) -> "Fingerprint":
        """Over names and values in the order of names, each with its length in front."""
        state = hashlib.blake2b(digest_size=32, person=b"kvd llama")
        for name in sorted(fields):
            for text in (name, fields[name]):
                encoded = text.encode("utf-8")
                state.update(struct.pack("<I", len(encoded)))
                state.update(encoded)
        return cls(state.digest(), dict(fields))


class KvParams(Protocol):
    """The parameters of a context that change its K/V, as ContextParams names them."""

    @property
    def type_k(self) -> str: ...
    @property
    def type_v(self) -> str: ...
    @property
    def rope(self) -> RopeParams: ...


class KvSource(Protocol):
    """A context, whoever has made it, and what was known when it was made: LlamaEngine has all of
    it, and attached/llama_params.py finds it out of a Llama."""

    @property
    def model(self) -> LlamaModel: ...
    @property
    def params(self) -> KvParams: ...
    @property
    def loras(self) -> Sequence[LoraAdapter]: ...
    @property
    def lora_digests(self) -> Sequence[bytes]: ...
    @property
    def n_ctx(self) -> int: ...
    @property
    def attn_rot_disabled(self) -> bool: ...
    @property
    def v_trans(self) -> int:
        """Whether V was computed transposed, as it is without flash attention: its last bits are
        others, though blocks of it have the same form."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def not_shareable(self) -> NotShareable | None: ...


def fingerprint(engine: KvSource) -> Fingerprint:
    """The fingerprint of an engine's K/V.

    Hashes the model's file if that is not cached (one to two seconds a GB). Raises NotShareable if
    the engine is not shareable, and LlamaEngineError if the model's file or a loaded library is no
    longer the one in use.
    """
    if engine.not_shareable is not None:
        raise engine.not_shareable.with_traceback(None)
    params = engine.params
    original_context = engine.model.rope_original_context
    return Fingerprint.of_fields(
        {
            "format": FORMAT,
            "model": engine.model.content_digest().hex(),
            "llama_cpp": llama_cpp.__version__,
            "libraries": _libraries_digest().hex(),
            "cpu": bindings.llama_print_system_info().decode().strip(" |"),
            "cpu_fusion": "off" if native.cpu_fusion_disabled else "on",
            "type_k": params.type_k,
            "type_v": params.type_v,
            "n_stream": str(N_STREAM),
            "v_trans": str(engine.v_trans),
            "attn_rot": "off" if engine.attn_rot_disabled else "on",
            **_rope_fields(params.rope, engine.model),
            "rope.factors": "long" if engine.n_ctx > original_context else "short",
            "lora": " ".join(
                f"{digest.hex()}@{_float32(adapter.scale)}"
                for adapter, digest in zip(engine.loras, engine.lora_digests, strict=True)
            ),
        }
    )


_YARN_DEFAULTS = {"yarn_attn_factor": 1.0, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0}
"""llama_hparams: what llama.cpp takes if nothing is given. `Llama` always gives these numbers."""
_YARN_DEFAULTS_OF = ("0.3.36",)
"""The versions of llama-cpp-python whose llama.cpp was read for this."""
_OWN_YARN_DEFAULTS = ("grok", "mistral3")
"""The architectures of these versions that take others, or let the file say them."""


def _rope_fields(rope: RopeParams, model: LlamaModel) -> dict[str, str]:
    """One field for each parameter, numbers as the exact value of the 32-bit float llama.cpp gets.

    A parameter that repeats the file's own value still differs from "model". Resolving it would
    need the model's value, which architectures may change after reading it: a wrong guess would
    share foreign K/V, while this only fails to share. The exception are the numbers of
    _YARN_DEFAULTS, which do not come from the file.
    """
    architecture = model.metadata("general.architecture")
    is_known = (
        llama_cpp.__version__ in _YARN_DEFAULTS_OF
        and architecture in ARCHITECTURES
        and architecture not in _OWN_YARN_DEFAULTS
    )
    values: dict[str, str] = {}
    for field in fields(rope):
        value = getattr(rope, field.name)
        if value is None or (is_known and value == _YARN_DEFAULTS.get(field.name)):
            text = "model"
        elif isinstance(value, str):
            text = value
        else:
            text = _float32(value)
        values[f"rope.{field.name}"] = text
    return values


def _float32(value: float) -> str:
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded).hex()


def _libraries_digest() -> bytes:
    """Over the content of the libraries that are mapped into this process, whatever their names."""
    paths = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and path[0].rpartition("/")[2].startswith(_LIBRARY_PREFIXES):
                paths.add(path[0])
    try:
        digests = sorted({file_digest(Path(path)) for path in paths})
    except OSError as error:
        raise LlamaEngineError(
            f"a library in use has been replaced, restart this process: {error}"
        ) from error
    return hashlib.blake2b(b"".join(digests), digest_size=32).digest()
