"""What kvctl prints for programs is what docs/schema says, and the schemas are what the papers say;
for every command, from a real daemon."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import kvd_client
from kvd_client.integrations.llama.warm import Warmed
from kvd_client.kvctl.main import MODULES
from kvd_proto.happenings import FIELDS, Kind
from tests.client import test_kvctl_model_size
from tests.client.blocks import MODEL, store
from tests.support import Daemon, start_daemon

ROOT = Path(__file__).resolve().parents[2]
SCHEMAS = ROOT / "docs" / "schema"
NAMES = [command.name for module in MODULES for command in module.COMMANDS]
DAEMONS = [
    ["status"], ["seqs"], ["clients"], ["models"], ["pins"], ["verify"], ["verify", "--checksums"],
    ["ping"], ["events"], ["top", "--once", "--interval", "0.5"], ["unpin"],
    ["pin", "--model", "tiny"], ["explain", "--model", "tiny"], ["evict", "--blocks", "1"],
    ["evict", "--model", "tiny", "--prompt", "-"], ["completion", "bash"],
]  # fmt: skip


def schema(command: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / f"kvctl-{command}.json").read_text())
    return found


def strict(part: Any) -> Any:
    """The schema without room for keys that it does not describe."""
    if not isinstance(part, dict):
        return part
    closed = {"additionalProperties": False} if "properties" in part else {}
    return {**closed, **{name: strict(each) for name, each in part.items()}}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With something of everything: models, sequences, clients, pins and events."""
    running = start_daemon(
        "--max-memory", "64MiB", runtime_dir=tmp_path_factory.mktemp("json") / "run"
    )
    try:
        with (
            kvd_client.connect(running.runtime_dir, name="worker", staging_bytes=1 << 20) as client,
            client.open_context(MODEL, n_seq_max=1) as context,
        ):
            client.events()
            store(context, range(40))
            client.pin(MODEL, range(16), owner="a")
            client.pin(MODEL, range(24), owner="b", ttl=3600)
            with context.alloc(range(8), request="chat"):
                yield running
    finally:
        running.stop()


def printed(daemon: Daemon, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "kvd_client.kvctl", *arguments, "--json"],
        capture_output=True, text=True, input="[0, 1, 2]", timeout=30, check=True,
        env={**os.environ, "KVD_RUNTIME_DIR": str(daemon.runtime_dir)},
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.parametrize("arguments", DAEMONS, ids=" ".join)
def test_what_is_printed_is_what_the_schema_says(daemon: Daemon, arguments: list[str]) -> None:
    report = printed(daemon, *arguments)
    closed = strict(schema(arguments[0]))
    if arguments[0] == "events":
        kinds = check_events(report["events"], closed["properties"]["events"]["items"])
        assert kinds > {"session-opened", "model", "alloc", "seal", "pin"}
        del closed["properties"]["events"]["items"]
    elif isinstance(next(iter(report.values())), list):
        assert all(report.values()), "a list without rows shows nothing"
    jsonschema.validate(report, closed)


def check_events(events: list[dict[str, Any]], closed: dict[str, Any]) -> set[str]:
    """Beside what all have, each has what its kind has; returns the kinds."""
    for event in events:
        of_kind = FIELDS[Kind(event["kind"])]
        assert set(of_kind) <= set(event)
        common = {name: value for name, value in event.items() if name not in of_kind}
        jsonschema.validate(common, closed)
    return {event["kind"] for event in events}


def test_model_size(daemon: Daemon, tmp_path: Path) -> None:
    model = test_kvctl_model_size.write(tmp_path / "model.gguf")
    report = printed(daemon, "model-size", str(model))
    assert report["budget"]["source"] == "daemon"
    jsonschema.validate(report, strict(schema("model-size")))


def test_warm_has_these_keys() -> None:
    """What it prints from a real model: tests/llama."""
    rows = schema("warm")["properties"]["prompts"]["items"]["properties"]
    assert tuple(rows) == ("file", *Warmed._fields)


def test_a_schema_finds_what_is_wrong(daemon: Daemon) -> None:
    """So that the others mean something."""
    good = json.dumps(printed(daemon, "status"))
    closed = strict(schema("status"))
    jsonschema.validate(json.loads(good), closed)
    spoilers: tuple[Callable[[dict[str, Any]], object], ...] = (
        lambda report: report["accounting"].pop("os_bytes"),
        lambda report: report["models"][0]["blocks"].update(free="none"),
        lambda report: report["counters"].update(new=1),
    )
    for spoil in spoilers:
        report = json.loads(good)
        spoil(report)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(report, closed)


def test_every_command_has_a_schema_which_is_what_the_papers_say() -> None:
    assert {f"kvctl-{name}.json" for name in NAMES} == {path.name for path in SCHEMAS.iterdir()}
    spec = importlib.util.spec_from_file_location("schemas", ROOT / "scripts" / "schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.texts().items():
        assert (SCHEMAS / name).read_text() == text, "run `make docs`"
        jsonschema.Draft202012Validator.check_schema(json.loads(text))
