"""The errors of the llama.cpp side. Errors of the cache itself are elsewhere (kvd_proto.errors).

    LlamaEngineError            llama.cpp refused or failed; also: the engine is closed
    ├── NotShareable            this model or context cannot share K/V exactly (reason)
    ├── NotExportable           this block cannot be stored as it lies in the context now
    ├── ImportFailed            a block's bytes were not taken; the sequence is as it was before
    └── DecodeFailed            llama_decode returned non-zero (code)

A wrong argument (an id out of range, too many tokens for a batch) is a ValueError.
"""

from enum import StrEnum


class LlamaEngineError(Exception):
    """llama.cpp refused or failed; the message carries what it logged."""


class Reason(StrEnum):
    """Why a model or context cannot share its K/V."""

    RECURRENT = "recurrent"
    SLIDING_WINDOW = "sliding-window"
    M_ROPE = "m-rope"
    ENCODER = "encoder"
    NOT_CAUSAL = "not-causal"
    FLASH_ATTENTION = "flash-attention"
    STREAMS = "streams"
    LAYOUT = "layout"
    LORA = "lora"
    SEQUENCE_IDS = "sequence-ids"
    OVERRIDES = "overrides"
    GPU = "gpu"
    EMBEDDINGS = "embeddings"
    PARAMETERS = "parameters"
    MODEL_FILE = "model-file"


class NotShareable(LlamaEngineError):
    """`reason` says what stands in the way; the message also says what to change."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class NotExportable(LlamaEngineError):
    """The range is not in the sequence as a whole, or no longer in the cache of its window."""


class ImportFailed(LlamaEngineError):
    """The bytes are not the expected block, or llama.cpp did not take them."""


_DECODE_CODES = {1: "no room in the context", 2: "aborted", -1: "invalid batch"}


class DecodeFailed(LlamaEngineError):
    """`code` is what llama_decode returned.

    1: no room in the context. 2: aborted. -1: invalid batch, for example a position that does not
    follow the sequence's last one. Less than -1: fatal. With 1 and -1 nothing has changed;
    otherwise a part of the batch may be in the context: truncate the sequences that were decoded.
    """

    def __init__(self, code: int, detail: str) -> None:
        meaning = _DECODE_CODES.get(code, "failure")
        super().__init__(f"llama_decode returned {code} ({meaning}) {detail}".rstrip())
        self.code = code
        self.detail = detail
