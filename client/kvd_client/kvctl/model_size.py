"""kvctl model-size: what a model's K/V takes, before anything is loaded."""

import argparse
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvd_client.errors import KvdError
from kvd_client.integrations.llama.files.architectures import NoKvShape
from kvd_client.integrations.llama.files.gguf_header import BadModelFile
from kvd_client.integrations.llama.files.model_size import BadKvType, ModelSize, model_size
from kvd_client.kvctl.answer import FAILED, Answer, BadUsage
from kvd_client.kvctl.command import Command, connect, positive
from kvd_client.kvctl.tables import Column, Look, clean, count, size, table
from kvd_proto.geometry import GGML_TYPES
from kvd_proto.index import memory_beside
from kvd_proto.layout import DIRECTORY_CHUNK
from kvd_proto.messages import MAX_BLOCK_TOKENS

DEFAULT_BUDGET = 4096 << 20
"""That of a daemon whose settings do not say another one."""
_UNITS = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE = re.compile(r"\s*([0-9]{1,19})\s*([a-zA-Z]*)\s*")


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes, and who says so: "daemon", "option" or "default"."""

    n_bytes: int
    source: str


def blocks_in(budget: int, stride: int, block_tokens: int) -> int:
    """How many blocks fit a budget that nothing else takes from, directory and index included."""
    n_blocks = slots = budget // stride

    def taken(n: int) -> int:
        return n * stride + memory_beside(n, slots, block_tokens)

    while n_blocks and taken(n_blocks) > budget:
        n_blocks -= -(-(taken(n_blocks) - budget) // (stride + DIRECTORY_CHUNK))
    return n_blocks


def _model_size(options: argparse.Namespace) -> Answer:
    if options.block_tokens > MAX_BLOCK_TOKENS:
        raise BadUsage(f"--block-tokens is at most {MAX_BLOCK_TOKENS}, not {options.block_tokens}")
    try:
        found = model_size(options.file, options.type_k, options.type_v)
    except (BadModelFile, BadKvType) as error:
        raise BadUsage(clean(str(error))) from error
    except NoKvShape as error:
        text = f"{options.file.name}: {error}"
        report = {"file": str(options.file), "shared": False, "reason": str(error.reason)}
        return Answer({**report, "why": str(error)}, lambda look: _wrap(text, look), FAILED)
    window = found.shape.window
    if window is not None and options.block_tokens > window.n_tokens:
        raise BadUsage(
            f"--block-tokens is at most {window.n_tokens}, the model's window, not "
            f"{options.block_tokens}"
        )
    report = _report(found, options, _budget(options))
    return Answer(report, lambda look: _show(report, look))


def _budget(options: argparse.Namespace) -> Budget:
    """The one that is given, or the daemon's, or what one would have that starts."""
    if options.budget:
        return Budget(options.budget, "option")
    try:
        with connect(options) as client:
            return Budget(client.status()["accounting"]["budget_bytes"], "daemon")
    except KvdError:  # there is none, or it has other things to do
        return Budget(DEFAULT_BUDGET, "default")


def _report(found: ModelSize, options: argparse.Namespace, budget: Budget) -> dict[str, Any]:
    shape, block_tokens = found.shape, options.block_tokens
    n_ctx = options.n_ctx or shape.context_length or block_tokens
    payload, stride = found.state_bytes(block_tokens), found.stride_bytes(block_tokens)
    n_blocks = blocks_in(budget.n_bytes, stride, block_tokens)
    context_blocks = -(-n_ctx // block_tokens)
    return {
        "file": str(options.file),
        "architecture": shape.architecture,
        "type_k": found.type_k,
        "type_v": found.type_v,
        "shared": shape.unshareable is None,
        "reason": str(shape.unshareable or ""),
        "why": shape.why,
        "layers": [group._asdict() for group in found.groups],
        "window_tokens": shape.window.n_tokens if shape.window else None,
        "bytes_per_token": found.bytes_per_token,
        "block": {
            "tokens": block_tokens,
            "payload_bytes": payload,
            "stride_bytes": stride,
            "padding_bytes": stride - payload,
        },
        "context": {
            "tokens": n_ctx,
            "state_bytes": found.state_bytes(n_ctx),
            "blocks": context_blocks,
            "blocks_bytes": context_blocks * stride,
        },
        "budget": {
            "bytes": budget.n_bytes,
            "source": budget.source,
            "blocks": n_blocks,
            "tokens": n_blocks * block_tokens,
        },
    }


_SOURCES = {
    "daemon": "of the running daemon",
    "option": "as given",
    "default": "the default; no daemon answers",
}


def _show(report: dict[str, Any], look: Look) -> str:
    block, context, budget = report["block"], report["context"], report["budget"]
    shared = "kvd shares it"
    if not report["shared"]:
        shared = _wrap(f"kvd does not share it: {report['why']}", look)
    lines = [
        look.paint(clean(Path(report["file"]).name), "bold"),
        f"{clean(report['architecture'])}, K in {report['type_k']}, V in {report['type_v']}",
        shared,
        "",
        _layers(report, look),
        "",
        f"token    {count(report['bytes_per_token'])} bytes",
        f"block    {size(block['stride_bytes'])}: {count(block['tokens'])} tokens, "
        f"{count(block['payload_bytes'])} bytes and {count(block['padding_bytes'])} of padding",
        f"context  {size(context['state_bytes'])}: {count(context['tokens'])} tokens, or "
        f"{count(context['blocks'])} blocks with {size(context['blocks_bytes'])}",
        f"budget   {size(budget['bytes'])}, {_SOURCES[budget['source']]}",
        f"fit      {count(budget['blocks'])} blocks, {count(budget['tokens'])} tokens",
    ]
    return "\n".join(lines)


def _wrap(text: str, look: Look) -> str:
    return textwrap.fill(clean(text), look.width)


def _layers(report: dict[str, Any], look: Look) -> str:
    columns = (
        Column("LAYERS", right=True),
        Column("SEE", elastic=True),
        Column("K ROW", right=True),
        Column("V ROW", right=True),
        Column("TOKEN", right=True),
    )
    cells = []
    for group in report["layers"]:
        k_bytes, v_bytes = group["k_row_bytes"], group["v_row_bytes"]
        seen = f"{count(report['window_tokens'])} tokens" if group["has_window"] else "all"
        cells.append(
            (
                group["n_layers"],
                seen if k_bytes or v_bytes else "no K/V",
                f"{count(k_bytes)} B",
                "-" if v_bytes is None else f"{count(v_bytes)} B",
                f"{count(group['n_layers'] * (k_bytes + (v_bytes or 0)))} B",
            )
        )
    return table(columns, cells, look)


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS or not int(found[1]):
        raise argparse.ArgumentTypeError(
            f"a size above 0: a number of bytes, KiB, MiB, GiB or TiB, not {text!r}"
        )
    return int(found[1]) * _UNITS[found[2].lower()]


def _add_options(command: argparse.ArgumentParser) -> None:
    types = ", ".join(GGML_TYPES)
    command.add_argument(
        "--n-ctx", type=positive, metavar="N", help="tokens of a context (default: the model's)"
    )
    command.add_argument(
        "--type-k", default="f16", metavar="TYPE", help=f"of K (default: f16); one of {types}"
    )
    command.add_argument("--type-v", default="f16", metavar="TYPE", help="of V (default: f16)")
    command.add_argument(
        "--block-tokens", type=positive, default=32, metavar="N", help="tokens of a block (32)"
    )
    command.add_argument(
        "--budget",
        type=_bytes,
        metavar="SIZE",
        help="that it has to fit (default: the running daemon's, else 4GiB)",
    )
    command.add_argument("file", type=Path, metavar="MODEL.gguf", help="its first file, if split")


COMMANDS = (
    Command(
        "model-size",
        "what a model's K/V takes, from its GGUF file's metadata",
        _model_size,
        _add_options,
    ),
)
