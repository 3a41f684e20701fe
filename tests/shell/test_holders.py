"""Who holds what, in blocks, tokens and bytes, as a real daemon tells it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvd_proto.messages import Evict, ListClients
from tests.proto.protocol_doc import report_keys
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, many_tokens, raw_client
from tests.support import Daemon, running_daemon

STAGING = 1 << 18
PROMPT = many_tokens(0, 5 * BLOCK_TOKENS - 3)
"""Five blocks, the last one open."""
USES = ("staging", "directory", "free", "filling", "active", "pinned", "cached")
OF_FILLING = ("reserved", "filling", "filling_other")
OF_ACTIVE = ("alone", "together", "active_other")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon("--max-memory", "16MiB", runtime_dir=tmp_path / "rt") as running:
        yield running


def holders(client: Raw) -> dict[str, Any]:
    report: dict[str, Any] = client.call(ListClients()).report
    return report


def keys(report: Any, path: str = "") -> set[str]:
    """The places of a report, as PROTOCOL.md writes them."""
    if isinstance(report, list):
        return {key for each in report for key in keys(each, f"{path}[]")}
    if isinstance(report, dict):
        dot = "." if path else ""
        return {key for name, each in report.items() for key in keys(each, f"{path}{dot}{name}")}
    return {path}


def check_sums(client: Raw) -> dict[str, Any]:
    """Nothing happens meanwhile: all that adds up does, to what `status` says. The report."""
    report, accounting = holders(client), client.status()["accounting"]
    rows = report["tenants"]
    for row in rows:
        filling = sum(row[f"{part}_bytes"] for part in OF_FILLING)
        active = sum(row[f"{part}_bytes"] for part in OF_ACTIVE)
        others = ("staging", "directory", "free", "pinned", "cached")
        held = filling + active + sum(row[f"{part}_bytes"] for part in others)
        assert row["held_bytes"] == held <= row["quota_bytes"]
    for use in USES:
        parts = {"filling": OF_FILLING, "active": OF_ACTIVE}.get(use, (use,))
        told = sum(row[f"{part}_bytes"] for row in rows for part in parts)
        assert told == accounting[f"{use}_bytes"], use
    clients = report["clients"]
    for part in ("alone", "filling", "reserved"):
        of_clients = sum(row[f"{part}_bytes"] for row in clients)
        assert of_clients == sum(row[f"{part}_bytes"] for row in rows), part
    return report


def test_all_that_adds_up_does(daemon: Daemon) -> None:
    with (
        raw_client(daemon, staging_bytes=STAGING, name="first") as first,
        raw_client(daemon, staging_bytes=STAGING, name="second") as second,
    ):
        contexts = {client: client.open() for client in (first, second)}
        sequence = first.store(contexts[first], PROMPT)
        check_sums(first)
        second.alloc(contexts[second], PROMPT[: 4 * 2 * BLOCK_TOKENS])
        second.alloc(contexts[second], b"", reserve=2 * BLOCK_TOKENS)
        report = check_sums(first)
        found = {row["client"]: row for row in report["clients"]}
        leased = ("leased_blocks", "leased_tokens", "leased_bytes")
        alone = ("alone_blocks", "alone_tokens", "alone_bytes")
        assert [found["first"][key] for key in leased] == [5, 37, 5 * STRIDE]
        assert [found["first"][key] for key in alone] == [3, 21, 3 * STRIDE]
        assert [found["second"][key] for key in leased] == [2, 16, 2 * STRIDE]
        assert [found["second"][key] for key in alone] == [0, 0, 0]
        assert found["second"]["reserved_blocks"] == 2
        (tenant,) = report["tenants"]
        assert (tenant["together_bytes"], tenant["reserved_bytes"]) == (2 * STRIDE, 2 * STRIDE)
        first.release(contexts[first], sequence)
        first.call(Evict("", 1))
        report = check_sums(first)
        (tenant,) = report["tenants"]
        assert (tenant["alone_bytes"], tenant["together_bytes"]) == (2 * STRIDE, 0)


def test_the_reports_have_the_documented_keys(daemon: Daemon) -> None:
    with raw_client(daemon, staging_bytes=STAGING) as client:
        client.store(client.open(), PROMPT)
        assert keys(holders(client)) == report_keys("list_clients")
        assert keys(client.status()) == report_keys("status")
