"""`python -m kvd_client.integrations.llama_cpp_server`: llama-cpp-python's own server, sharing.

It starts `llama_cpp.server` with that one's flags, environment and config file, and makes each
`Llama` that it loads share its K/V through the daemon, with two differences:

    flash_attn    is on unless a flag, the environment or the config file says another thing
    cache         of llama_cpp.server is left out of a model that shares: it would copy the whole
                  context after each completion

A model that cannot be shared is served as llama_cpp.server serves it; one line says why, unless
--kvd-require-shareable makes that an error. Of
several models in a config file one is loaded at a time, and gives its sequence and its context at
the daemon back when it is unloaded. How a `Llama` shares is in llama/attached/sharing.py. Needs the
extra `llama-server`.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kvd_client.errors import KvdError
from kvd_client.integrations.llama import share
from kvd_client.integrations.llama.errors import NotShareable, Reason
from kvd_client.kvctl.command import positive, seconds
from kvd_proto.messages import MAX_BLOCK_TOKENS

logger = logging.getLogger("kvd_client.llama_cpp_server")

PROGRAM = "python -m kvd_client.integrations.llama_cpp_server"


class CannotShare(Exception):
    """Of a model that was to be shared. The message names it, and says what to change."""


class Options(NamedTuple):
    """Our own flags; None is what `share` does by itself."""

    runtime_dir: str | None
    timeout: float | None
    block_tokens: int
    require_shareable: bool = False


def load_and_share(load: Callable[[Any], Any], settings: Any, options: Options) -> Any:
    """The Llama that `load` makes of llama_cpp.server's ModelSettings, sharing if it can.

    With `require_shareable` one that cannot is closed, and CannotShare is raised.
    What it has at the daemon it gives back when the server closes it to load another one, and when
    the process ends.
    """
    if "flash_attn" not in settings.model_fields_set:
        settings = settings.model_copy(update={"flash_attn": True})
    llama = load(settings)
    cache = llama.cache
    llama.set_cache(None)
    name = settings.model_alias or settings.model
    try:
        share(
            llama,
            name="llama_cpp.server",
            runtime_dir=options.runtime_dir,
            timeout=options.timeout,
            block_tokens=options.block_tokens,
        )
    except (NotShareable, KvdError) as error:
        if options.require_shareable:
            llama.close()
            raise CannotShare(f"{name} cannot be shared: {_why(error)}") from error
        llama.set_cache(cache)
        logger.warning("%s is served without sharing: %s", name, _why(error))
        return llama
    if cache is not None:
        logger.warning(
            "%s: the setting cache is left out, since kvd takes its place: remove it, or start "
            "llama_cpp.server to have that cache instead",
            name,
        )
    return llama


def _why(error: NotShareable | KvdError) -> str:
    """In the words of who has flags and a config file, and no Llama to construct."""
    if isinstance(error, NotShareable) and error.reason is Reason.FLASH_ATTENTION:
        return "its flash_attn is set to false: set it to true, or leave it out"
    return str(error)


def parser_of_our_flags() -> argparse.ArgumentParser:
    """Of those that begin with --kvd-, without usage and --help."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False
    )
    flags = parser.add_argument_group(
        "sharing through kvd",
        "Each model shares its K/V. For that --flash_attn is on by default, and --cache is left "
        "out.",
    )
    flags.add_argument(
        "--kvd-runtime-dir",
        metavar="DIR",
        help="where the daemon's sockets are (default: KVD_RUNTIME_DIR, or wherever it listens)",
    )
    flags.add_argument(
        "--kvd-timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long a request waits for the daemon before it goes on alone (default: 0.05)",
    )
    flags.add_argument(
        "--kvd-block-tokens",
        type=_block_tokens,
        default=32,
        metavar="N",
        help="tokens of a block; only those with the same number share (default: 32)",
    )
    flags.add_argument(
        "--kvd-require-shareable",
        action="store_true",
        help="end with an error, rather than serve without sharing, if a model cannot be shared",
    )
    return parser


def log_as_uvicorn_does() -> None:
    """Our lines from INFO on to stderr, in the form and at the place of the server's own."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: kvd: %(message)s"))
    ours = logging.getLogger("kvd_client")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def main(arguments: Sequence[str]) -> None:
    """Serve until a signal comes. Exits as llama_cpp.server does: 0 after --help, 2 after a flag
    that neither knows, 1 after a setting that cannot be, or a model that cannot be shared if that
    is required."""
    ours = parser_of_our_flags()
    found, theirs = ours.parse_known_args(arguments)
    options = Options(
        found.kvd_runtime_dir,
        found.kvd_timeout,
        found.kvd_block_tokens,
        found.kvd_require_shareable,
    )
    try:
        import llama_cpp.server.__main__ as server
        from llama_cpp.server.model import LlamaProxy
    except ModuleNotFoundError as error:
        ours.exit(
            1, f"llama_cpp.server needs {error.name}: pip install 'kvd-cache[llama-server]'\n"
        )

    log_as_uvicorn_does()
    load = LlamaProxy.load_llama_from_model_settings
    LlamaProxy.load_llama_from_model_settings = staticmethod(
        lambda settings: load_and_share(load, settings, options)
    )
    sys.argv = [PROGRAM, *theirs]
    try:
        server.main()
    except CannotShare as error:
        ours.exit(1, f"{error}\n")
    finally:
        if {"-h", "--help"} & set(theirs):
            print()
            ours.print_help()


def _block_tokens(text: str) -> int:
    n_tokens = positive(text)
    if n_tokens > MAX_BLOCK_TOKENS:
        raise argparse.ArgumentTypeError(f"at most {MAX_BLOCK_TOKENS}, not {n_tokens}")
    return n_tokens


if __name__ == "__main__":
    main(sys.argv[1:])
