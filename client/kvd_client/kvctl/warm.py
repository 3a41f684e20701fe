"""kvctl warm: computes prompts with a real worker, stores and pins them."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from kvd_client.client import DEFAULT_STAGING, Client
from kvd_client.kvctl.answer import FAILED, OK, Answer, BadUsage
from kvd_client.kvctl.command import Command, connect, positive
from kvd_client.kvctl.pins import lifetime
from kvd_client.kvctl.tables import Column, Look, clean, count, duration, table

OWNER = "warm"
_BAR = 24


def _warm(options: argparse.Namespace) -> Answer:
    """Warm each file's prompt; all are read before anything is computed."""
    connect(options).close()  # which tells soon if there is no daemon, or one that hangs
    try:
        from kvd_client.integrations.llama import warm as warming
        from kvd_client.integrations.llama.errors import LlamaEngineError
        from kvd_client.integrations.llama.runtime.params import LoraAdapter
    except ImportError as error:
        raise BadUsage(f"it needs llama.cpp: pip install 'kvd-cache[llama]' ({error})") from error
    rows = []
    try:
        with (
            Client(
                options.runtime_dir,
                instance=options.instance,
                name="kvctl warm",
                staging_bytes=DEFAULT_STAGING,
                timeout=options.timeout,
            ) as client,
            warming.open_worker(
                options.model,
                options.files,
                client,
                n_ctx=options.n_ctx,
                block_tokens=options.block_tokens,
                n_batch=options.n_batch,
                n_threads=options.threads,
                type_k=options.type_k,
                type_v=options.type_v,
                loras=[LoraAdapter(*_adapter(each)) for each in options.lora],
            ) as (worker, prompts),
        ):
            for path, tokens in prompts.items():
                bar = Progress(path.name, len(tokens), sys.stderr)
                warmed = warming.warm(worker, tokens, options.owner, options.ttl, bar.show)
                bar.clear()
                rows.append({"file": str(path), **warmed._asdict()})
    except (LlamaEngineError, OSError, ValueError) as error:
        raise BadUsage(str(error)) from error
    report = {"owner": options.owner, "prompts": rows}
    is_whole = all(row["cached"] == row["tokens"] for row in rows)
    return Answer(report, lambda look: _show(rows, look), OK if is_whole else FAILED)


class Progress:
    """A bar for one prompt, on a terminal; elsewhere nothing."""

    def __init__(self, name: str, n_tokens: int, out: TextIO) -> None:
        self._name = clean(name)[:_BAR]
        self._n_tokens = n_tokens
        self._out = out if out.isatty() else None
        self._begun: tuple[float, int] | None = None

    def show(self, done: int) -> None:
        """So many tokens are done."""
        if self._out is None:
            return
        now = time.monotonic()
        if self._begun is None:  # what was cached took no time
            self._begun = now, done
        began, first = self._begun
        per_second = (done - first) / (now - began) if done > first else 0.0
        filled = "#" * (_BAR * done // self._n_tokens)
        line = f"{self._name} [{filled:<{_BAR}}] {count(done)} of {count(self._n_tokens)} tokens"
        if per_second:
            left = (self._n_tokens - done) / per_second
            line += f", {per_second:.0f}/s, {duration(left)} left"
        self._out.write(f"\r\x1b[K{line[:79]}")
        self._out.flush()

    def clear(self) -> None:
        """The line is free again."""
        if self._out is not None:
            self._out.write("\r\x1b[K")
            self._out.flush()


def _add_options(command: argparse.ArgumentParser) -> None:
    """Of `kvctl warm`. What determines the K/V must be as the workers have it: else they would not
    find it."""
    command.add_argument("--model", type=Path, required=True, metavar="FILE", help="a GGUF file")
    command.add_argument(
        "--owner", default=OWNER, metavar="NAME", help="of the pins (default: warm)"
    )
    command.add_argument(
        "--for",
        dest="ttl",
        type=lifetime,
        default=0.0,
        metavar="SECONDS",
        help="when the pins end by themselves (default: never)",
    )
    command.add_argument("--type-k", default="f16", metavar="TYPE", help="of K (default: f16)")
    command.add_argument("--type-v", default="f16", metavar="TYPE", help="of V (default: f16)")
    command.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=SCALE]", help="an adapter"
    )
    command.add_argument(
        "--n-ctx", type=positive, metavar="N", help="default: as long as the longest prompt"
    )
    command.add_argument(
        "--n-batch", type=positive, default=512, metavar="N", help="tokens of a batch (512)"
    )
    command.add_argument(
        "--block-tokens", type=positive, default=32, metavar="N", help="tokens of a block (32)"
    )
    command.add_argument("--threads", type=positive, metavar="N", help="default: all there are")
    command.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help='a prompt: text, or .json with token ids, or with "messages" as a chat has them',
    )


def _show(rows: list[dict[str, Any]], look: Look) -> str:
    columns = (
        Column("PROMPT", elastic=True),
        Column("TOKENS", right=True),
        Column("FOUND", right=True),
        Column("COMPUTED", right=True),
        Column("PINNED", right=True),
    )
    names = ("tokens", "found", "computed", "cached")
    cells = [(row["file"], *(count(row[name]) for name in names)) for row in rows]
    text = table(columns, cells, look)
    problems = [f"{row['file']}: {row['problem']}" for row in rows if row["problem"]]
    return "\n".join([text, *problems])


def _adapter(text: str) -> tuple[str, float]:
    path, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        return text, 1.0


COMMANDS = (
    Command(
        "warm", "compute prompts with a llama.cpp model, store and pin them", _warm, _add_options
    ),
)
