"""The C side: typed prototypes for the calls that move blocks, and llama.cpp's log.

The prototypes take addresses as plain ints, so that a call converts nothing. They are function
objects of their own (`library["name"]`), so the ones of llama_cpp keep their argument types.

Importing this module redirects llama.cpp's log for the whole process: each line goes to the logger
`kvd_client.integrations.llama` at level DEBUG, so nothing is printed unless that is asked for, and
error lines are kept for the message of the exception that follows.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import llama_cpp.llama_cpp as bindings
from llama_cpp._logger import llama_log_callback

from kvd_client.integrations.llama.runtime.params import env_int

logger = logging.getLogger("kvd_client.integrations.llama")

# enum ggml_log_level of ggml.h (the numbers in llama_cpp/_logger.py are those of an older one).
_GGML_LOG_ERROR = 4
_GGML_LOG_CONT = 5


def _prototype(name: str, restype: Any, *argtypes: Any) -> Any:
    function = bindings._lib[name]
    function.restype = restype
    function.argtypes = argtypes
    return function


_VOID = ctypes.c_void_p
_SIZE = ctypes.c_size_t
_I32 = ctypes.c_int32

state_seq_get_size = _prototype("llama_state_seq_get_size", _SIZE, _VOID, _I32)
state_seq_get_data = _prototype("llama_state_seq_get_data", _SIZE, _VOID, _VOID, _SIZE, _I32)
state_seq_set_data = _prototype("llama_state_seq_set_data", _SIZE, _VOID, _VOID, _SIZE, _I32)
memory_seq_rm = _prototype("llama_memory_seq_rm", ctypes.c_bool, _VOID, _I32, _I32, _I32)
memory_seq_cp = _prototype("llama_memory_seq_cp", None, _VOID, _I32, _I32, _I32, _I32)
memory_seq_pos_min = _prototype("llama_memory_seq_pos_min", _I32, _VOID, _I32)
memory_seq_pos_max = _prototype("llama_memory_seq_pos_max", _I32, _VOID, _I32)
get_logits_ith = _prototype("llama_get_logits_ith", _VOID, _VOID, _I32)
# llama_cpp declares adapters as pointers to pointers, which ctypes then wraps.
adapter_lora_init = _prototype("llama_adapter_lora_init", _VOID, _VOID, ctypes.c_char_p)
adapter_lora_free = _prototype("llama_adapter_lora_free", None, _VOID)
set_adapters_lora = _prototype("llama_set_adapters_lora", _I32, _VOID, _VOID, _SIZE, _VOID)
tokenize = _prototype(
    "llama_tokenize", _I32, _VOID, ctypes.c_char_p, _I32, _VOID, _I32, ctypes.c_bool, ctypes.c_bool
)
detokenize = _prototype(
    "llama_detokenize", _I32, _VOID, _VOID, _I32, _VOID, _I32, ctypes.c_bool, ctypes.c_bool
)


class _Log:
    """Takes llama.cpp's log lines, from any of its threads."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=4)
        self._last_level = 0
        self.shown_by: Callable[[int, bytes, object], object] | None = None

    def __call__(self, level: int, text: bytes, _user_data: object) -> None:
        if self.shown_by is not None:
            self.shown_by(level, text, None)
        if level == _GGML_LOG_CONT:
            level = self._last_level
        self._last_level = level
        is_error = level == _GGML_LOG_ERROR
        if not is_error and not logger.isEnabledFor(logging.DEBUG):
            return
        line = text.decode("utf-8", "replace").strip()
        if line:
            logger.debug("%s", line)
            if is_error:
                self._errors.append(line)

    def take_errors(self) -> str:
        """The last few error lines, joined; they are forgotten here."""
        lines = "; ".join(self._errors)
        self._errors.clear()
        return lines


_log = _Log()
take_errors = _log.take_errors


def show_log() -> None:
    """Let llama_cpp have the log too, which prints it as far as its `verbose` says: for who uses
    llama_cpp itself beside this package."""
    _log.shown_by = llama_log_callback


# llama.cpp keeps the bare pointer: the callback object must live as long as the process.
_log_callback = bindings.llama_log_callback(_log)
bindings.llama_log_set(_log_callback, ctypes.c_void_p(0))
bindings.llama_backend_init()

cpu_fusion_disabled = env_int("GGML_CPU_DISABLE_FUSION") == 1
"""What ggml reads once in a process, when it first computes; read here at the same time."""
