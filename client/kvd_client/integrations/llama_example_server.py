"""The OpenAI-compatible example server of llama-cpp-python, sharing its K/V through kvd.

    python -m kvd_client.integrations.llama_example_server PATH/TO/server.py -C config.json

The script is `examples/server/server.py` of llama-cpp-python's source distribution. It is loaded as
it is, with its own flags and configuration file, and gets kvd in place of its `SequenceCache`; its
`disk_cache` is not used then. It needs the extra `llama`, and what the script itself imports:
fastapi, uvicorn and openai. Without a daemon it serves as without a cache, and comes back by
itself.

Beside the cache some things are added, or done otherwise, where the script would make little of it:

- It saves a prompt before it samples the first token. Here that is done after it has been told.
- Its scheduler saves prompts only. Here the state of a finished completion is saved, too, so that
  the next turn of a chat finds the answer of this one in whichever process it is.
- It drops no idle sequence for the sake of a cached prefix, so that once all of its sequences have
  been used it looks into the cache in vain. Here the idle ones that were used longest ago go; what
  they hold is in kvd.

A model or context that cannot be shared exactly is served by the script as it is; one line says
why, and what to change.
"""

import argparse
import ctypes
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import llama_cpp.llama_cpp as bindings
import numpy as np
from llama_cpp._logger import llama_log_callback

from kvd_client.client import DEFAULT_STAGING, Client
from kvd_client.errors import KvdError
from kvd_client.integrations.llama.errors import LlamaEngineError, NotShareable
from kvd_client.integrations.llama.foreign import Before, ForeignContext
from kvd_client.integrations.llama.runtime.params import LoraAdapter
from kvd_client.integrations.llama.sequence_cache import SequenceCache
from kvd_client.integrations.llama.worker import model_of

logger = logging.getLogger("kvd_client")

# What is used of the script. It has no version, so that this is how another one is told.
_NAMES = {
    "": ("main", "Model", "SequenceCache", "SequenceDiskCache", "CompletionScheduler"),
    "Model": ("build_model_params", "build_context_params", "close"),
    "CompletionScheduler": (
        "can_admit",
        "can_lookup_sequence_cache",
        "close",
        "delete_free_sequence",
        "finalize_request_if_ready",
        "maybe_save_sequence_cache",
        "save_sequence_state_bytes",
        "step",
    ),
}


class NotTheScript(Exception):
    """The file is not the server that this launcher knows. The message says what is missing."""


def load_script(path: Path) -> ModuleType:
    """The script as a module, unchanged; its `main` has not run. Raises NotTheScript."""
    spec = importlib.util.spec_from_file_location("llama_example_server_script", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise NotTheScript(f"{path} is not a Python file")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # pydantic and dataclasses look the module up there
    spec.loader.exec_module(script)
    for owner, names in _NAMES.items():
        where = getattr(script, owner) if owner else script
        for name in names:
            if not hasattr(where, name):
                raise NotTheScript(
                    f"{path} has no {owner}{'.' if owner else ''}{name}: it is not "
                    "examples/server/server.py of llama-cpp-python 0.3.36, or of another version"
                )
    return script


def put_cache_into(
    script: ModuleType,
    block_tokens: int,
    *,
    require_shareable: bool = False,
    **client_options: Any,
) -> None:
    """Let the script's `main` use kvd; `client_options` are those of Client, which fails open.

    Once `main` has loaded a model that cannot be shared, nothing more of the script is replaced:
    that serves as if kvd were not there. With `require_shareable` it raises NotShareable, or the
    KvdError of a daemon that cannot have this model.
    """

    class Model(script.Model):  # type: ignore[misc,name-defined]
        """Keeps what llama.cpp is given for the model and the context."""

        def __init__(self, **options: Any) -> None:
            loras = [LoraAdapter(each.path, each.scale) for each in options.get("loras") or ()]
            self.kvd_before = Before.now(Path(options["model_path"]), loras)
            self.kvd_model_params: Any = None
            self.kvd_context_params: Any = None
            super().__init__(**options)
            try:
                self.kvd_cache = self.open_cache()
            except (NotShareable, KvdError) as error:
                if require_shareable:
                    raise
                logger.warning("%s is served without sharing: %s", self.model_path, error)
                return
            script.CompletionScheduler = CompletionScheduler  # type: ignore[attr-defined]
            script.SequenceDiskCache = SequenceDiskCache  # type: ignore[attr-defined]

        def open_cache(self) -> SequenceCache:
            shared = ForeignContext(
                Path(self.model_path),
                self.llama_model,
                self.kvd_model_params,
                self.ctx,
                self.kvd_context_params,
                self.kvd_before,
            )
            client = Client(fail_open=True, staging_bytes=DEFAULT_STAGING, **client_options)
            try:
                model = model_of(shared, block_tokens)
                return SequenceCache(model, shared.form, self.n_vocab, client)
            except BaseException:
                client.close()
                raise

        def build_model_params(self, **options: Any) -> Any:
            built = super().build_model_params(**options)
            if self.kvd_model_params is None:
                self.kvd_model_params = built[0]
            return built

        def build_context_params(self, **options: Any) -> Any:
            params = super().build_context_params(**options)
            if self.kvd_context_params is None:  # a second one is a draft model's
                self.kvd_context_params = params
            return params

    class CompletionScheduler(script.CompletionScheduler):  # type: ignore[misc,name-defined]
        def __init__(self, model: Any, sequence_cache: Any = None) -> None:
            super().__init__(model, sequence_cache=model.kvd_cache)
            self.kvd_unsaved: dict[str, Any] = {}
            """Requests, by id, whose prompts are to be saved once their first tokens are told."""

        def close(self) -> None:
            self.sequence_cache.close()
            super().close()

        def can_admit(self, request: Any) -> bool:
            self.make_room_for_match(request)
            return bool(super().can_admit(request))

        def make_room_for_match(self, request: Any) -> None:
            """Drop idle sequences, if a cached prefix is longer than what any of them has."""
            if not self.free_sequences or not self.can_lookup_sequence_cache(request):
                return
            try:
                match = self.sequence_cache.lookup(request.prompt_tokens)
            except Exception:  # as the script does, whose one thread this is
                return  # it asks again, and counts it
            if match is None:
                return
            prompt = len(request.prompt_tokens)
            _, resident = self.radix_trie.longest_prefix(request.prompt_tokens)
            if match.length <= min(resident, prompt - 1):
                return
            count = request.internal_completion_count
            cells = prompt + count * (request.effective_max_len - prompt)
            for seq_id in list(self.free_sequences):  # those used longest ago first
                if (
                    len(self.unused_sequences) >= count
                    and self.sequence_history.size + cells <= self.model.n_ctx
                ):
                    return
                self.delete_free_sequence(seq_id)

        def step(self) -> bool:
            # What the last step has sampled is told. Nothing has been decoded since.
            for request in list(self.kvd_unsaved.values()):
                self.save_prompt(request)
            return bool(super().step())

        def maybe_save_sequence_cache(self, request: Any) -> None:
            self.kvd_unsaved[request.id] = request

        def save_prompt(self, request: Any) -> None:
            """Save it now, if that is still to be done."""
            if self.kvd_unsaved.pop(request.id, None) is None or request.id not in self.requests:
                return
            if len(request.prompt_tokens) == self.radix_trie.length(request.base_seq_id):
                super().maybe_save_sequence_cache(request)

        def save_sequence_state_bytes(self, seq_id: int) -> Any:
            """As the script's, without a buffer of zeros before and a copy after it, which take
            longer than the state itself, and hold up the thread that tells tokens. None if nothing
            can be stored."""
            if not self.sequence_cache.can_store():
                return None
            size = int(bindings.llama_state_seq_get_size(self.model.ctx, seq_id))
            state = np.empty(size, np.uint8)
            address = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            n = int(bindings.llama_state_seq_get_data(self.model.ctx, address, size, seq_id))
            return state[:n] if n else None

        def finalize_request_if_ready(self, request: Any) -> None:
            if request.completions and all(each.finished for each in request.completions):
                self.save_prompt(request)  # of one that asks for no tokens
                for completion in request.completions:
                    self.save_completion(request, completion)
            super().finalize_request_if_ready(request)

        def save_completion(self, request: Any, completion: Any) -> None:
            """Save what was generated, too, as far as it has been decoded."""
            if self.model.draft_provider is not None:
                return  # drafts that were not taken may still be in the sequence
            length = self.radix_trie.length(completion.seq_id)
            tokens = [*request.prompt_tokens, *completion.completion_tokens]
            if not len(request.prompt_tokens) < length <= len(tokens):
                return
            state = self.save_sequence_state_bytes(completion.seq_id)
            if state is None:
                return
            try:
                self.sequence_cache.save(tokens[:length], state, None)
                # Whoever has the answer may ask another process for the next turn at once.
                self.sequence_cache.settle()
            except Exception as error:  # as the script does with what a cache raises
                logger.warning("a completion was not stored: %s", error)
                self.metrics.sequence_cache_save_failures_total += 1
                return
            self.metrics.sequence_cache_save_requests_total += 1

    class SequenceDiskCache:
        """Stands where the script would open its own."""

        compatibility_key_for_model = staticmethod(lambda _model: "")

        def __init__(self, **options: Any) -> None:
            logger.warning("disk_cache %s is not used: kvd takes its place", options.get("path"))

    script.Model = Model  # type: ignore[attr-defined]


def main(arguments: list[str] | None = None) -> None:
    """Serve until the script's `main` ends."""
    parser = argparse.ArgumentParser(
        prog="python -m kvd_client.integrations.llama_example_server",
        description="Run llama-cpp-python's examples/server/server.py with its K/V shared by kvd.",
    )
    parser.add_argument("--runtime-dir", help="where the daemon's sockets are")
    parser.add_argument("--instance", default="default", help="the daemon's instance name")
    parser.add_argument(
        "--timeout",
        type=float,
        help="seconds that a request waits for the daemon, before it does without (0.05)",
    )
    parser.add_argument("--block-tokens", type=int, default=32, help="as all who share have it")
    parser.add_argument(
        "--require-shareable",
        action="store_true",
        help="end with an error, rather than serve without sharing, if the model cannot be shared",
    )
    parser.add_argument("script", type=Path, help="the path of server.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own flags")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # The engine takes llama.cpp's log for itself; here it is the script's.
    bindings.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    try:
        script = load_script(options.script)
    except ImportError as error:
        _give_up(f"{error}: {options.script} needs it (pip install fastapi uvicorn openai)")
    except (NotTheScript, OSError) as error:
        _give_up(error)
    put_cache_into(
        script,
        options.block_tokens,
        require_shareable=options.require_shareable,
        runtime_dir=options.runtime_dir,
        instance=options.instance,
        timeout=options.timeout,
        name="llama-example-server",
    )
    sys.argv = [str(options.script), *options.arguments]
    try:
        script.main()
    except (LlamaEngineError, KvdError) as error:
        _give_up(error)


def _give_up(error: object) -> NoReturn:
    print(f"llama_example_server: {error}", file=sys.stderr, flush=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
