"""What Prometheus is told, against what was done and what `status` says. How it is served:
test_metrics_http.py."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd import __version__
from kvd.core.ages import SAMPLED
from kvd.core.reasons import Reason
from kvd_proto.errors import BY_CODE, NoSequenceFree
from kvd_proto.messages import OPERATIONS, Evict, OpenContext, Ping, Release
from tests.shell import raw
from tests.shell.raw import BLOCK_TOKENS, STRIDE, Raw, make_alloc, many_tokens, raw_client, until
from tests.shell.scraping import Series, get, scrape, value
from tests.support import Daemon, running_daemon

N_BLOCKS = SAMPLED + 4
TOKENS = many_tokens(0, N_BLOCKS * BLOCK_TOKENS)
MAX_MODELS = 4
STATES = ("free", "filling", "active", "cached", "pinned")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    flags = ("--max-memory", "8MiB", "--metrics", "unix")
    environ = {"KVD_MAX_MODELS": str(MAX_MODELS)}
    with running_daemon(*flags, runtime_dir=tmp_path / "rt", environ=environ) as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Raw]:
    with raw_client(daemon) as opened:
        yield opened


def as_soon_as(daemon: Daemon, name: str, expected: float, **labels: str) -> Series:
    """All series, once one of them is what it must be: an answer may be a moment old."""

    def look() -> Series | None:
        series = scrape(daemon)
        return series if series.get((name, frozenset(labels.items()))) == expected else None

    found = until(look)
    assert found is not None
    return found


def arena_series(series: Series) -> list[dict[str, str]]:
    return [dict(labels) for name, labels in series if name == "kvd_arena_bytes"]


def test_tokens_are_counted_and_memory_adds_up(daemon: Daemon, client: Raw) -> None:
    context = client.open()
    client.release(context, client.store(context, TOKENS))
    held = client.alloc(context, TOKENS[: 4 * 4 * BLOCK_TOKENS])
    assert held.matched_tokens == 4 * BLOCK_TOKENS
    queried = len(TOKENS) // 4 + 4 * BLOCK_TOKENS
    series = as_soon_as(daemon, "kvd_prefix_cache_queries_total", queried)
    assert value(series, "kvd_prefix_cache_hits_total") == 4 * BLOCK_TOKENS
    blocks = {"free": 0, "filling": 0, "active": 4, "cached": N_BLOCKS - 4, "pinned": 0}
    for state, count in blocks.items():
        of_arena = value(series, "kvd_arena_bytes", arena="default/model", state=state)
        assert of_arena == value(series, "kvd_memory_bytes", state=state) == count * STRIDE
    memory = {
        dict(labels)["state"]: n
        for (name, labels), n in series.items()
        if name == "kvd_memory_bytes"
    }
    assert set(memory) == {"unassigned", "directory", "staging", *STATES}
    assert sum(memory.values()) == value(series, "kvd_memory_budget_bytes") == 8 << 20
    assert value(series, "kvd_accounting_drift_bytes") == 0
    used = (8 << 20) - memory["unassigned"]
    assert value(series, "kvd_memory_os_bytes") == used > 0
    assert value(series, "kvd_tenant_held_bytes", tenant="default") == used
    assert value(series, "kvd_stored_blocks_total") == N_BLOCKS
    assert value(series, "kvd_sessions") == 1
    assert value(series, "kvd_sequences", state="processing") == 1
    assert value(series, "kvd_sequences_opened_total") == 2
    assert value(series, "kvd_build_info", version=__version__, python=sys.version.split()[0]) == 1


def test_each_request_is_in_the_histogram_of_its_operation(daemon: Daemon, client: Raw) -> None:
    for _ in range(5):
        client.call(Ping())
    name = "kvd_request_duration_seconds"
    series = as_soon_as(daemon, f"{name}_count", 5, operation="ping")
    assert 0 < value(series, f"{name}_sum", operation="ping") < 5
    assert value(series, f"{name}_bucket", operation="ping", le="+Inf") == 5
    operations = {dict(labels)["operation"] for each, labels in series if each == f"{name}_count"}
    assert len(operations) == len(OPERATIONS) + 1
    buckets = [
        (float(dict(labels)["le"]), count)
        for (each, labels), count in series.items()
        if each == f"{name}_bucket" and ("operation", "ping") in labels
    ]
    counts = [count for _, count in sorted(buckets)]
    assert counts == sorted(counts), "they are cumulative"


def test_a_request_that_waits_counts_until_its_answer(daemon: Daemon, client: Raw) -> None:
    context = client.open(n_seq_max=1)
    client.alloc(context, b"")
    refused = client.ask(make_alloc(context, b"", wait_ms=300))
    assert isinstance(refused, NoSequenceFree)
    name = "kvd_request_duration_seconds"
    series = as_soon_as(daemon, f"{name}_count", 2, operation="alloc")
    assert 0.3 <= value(series, f"{name}_sum", operation="alloc") < 3
    assert value(series, f"{name}_bucket", operation="alloc", le="0.25") == 1
    assert value(series, "kvd_request_errors_total", code=NoSequenceFree.code) == 1


def test_sequences_are_counted_by_state(daemon: Daemon, client: Raw) -> None:
    context = client.open(n_seq_max=2)
    client.alloc(context, b"")
    stale = client.alloc(context, b"", idle_ms=1)
    client.post(make_alloc(context, b"", wait_ms=20_000))
    series = as_soon_as(daemon, "kvd_sequences", 1, state="timed_out")
    assert value(series, "kvd_sequences", state="processing") == 1
    assert value(series, "kvd_sequences", state="pending") == 1
    assert value(series, "kvd_sequences_timed_out_total") == 1
    client.post(Release(context, stale.seq_id, stale.generation, raw.COMPLETED))
    series = as_soon_as(daemon, "kvd_sequences", 0, state="timed_out")
    assert value(series, "kvd_sequences", state="processing") == 2


def test_evictions_are_counted_by_reason_and_timed(daemon: Daemon, client: Raw) -> None:
    context = client.open()
    client.release(context, client.store(context, TOKENS))
    assert client.call(Evict("", 3)).blocks == 3
    series = as_soon_as(daemon, "kvd_evicted_blocks_total", 3, reason="command")
    reasons = {
        dict(labels)["reason"] for name, labels in series if name == "kvd_evicted_blocks_total"
    }
    assert reasons == {reason.value for reason in Reason}
    assert value(series, "kvd_eviction_duration_seconds_count") == 1
    assert 0 < value(series, "kvd_eviction_duration_seconds_sum") < 1
    # One in SAMPLED is looked at, and the first.
    for name in ("lifetime", "idle_before_eviction"):
        assert value(series, f"kvd_block_{name}_seconds_count") == 1
        assert 0 <= value(series, f"kvd_block_{name}_seconds_sum") < 20
    client.call(Evict("", 0))
    series = as_soon_as(daemon, "kvd_evicted_blocks_total", N_BLOCKS, reason="command")
    assert value(series, "kvd_block_lifetime_seconds_count") == 2


def test_a_prefix_that_is_found_again_has_a_gap(daemon: Daemon, client: Raw) -> None:
    context = client.open()
    for _ in range(2 + SAMPLED):
        client.release(context, client.store(context, TOKENS))
    series = as_soon_as(daemon, "kvd_block_reuse_gap_seconds_count", 2)
    assert 0 <= value(series, "kvd_block_reuse_gap_seconds_sum") < 20


def test_process_metrics(daemon: Daemon) -> None:
    series = scrape(daemon)
    assert value(series, "process_resident_memory_bytes") > 10 << 20
    assert value(series, "process_open_fds") > 5
    assert value(series, "process_start_time_seconds") > 1.6e9


def test_settings_are_told_but_no_secret(tmp_path: Path) -> None:
    salt = "0f6c1d7a5be24f08a3e9d2c4b1870a5f"
    file = tmp_path / "kvd.toml"
    file.write_text(f'max_memory = "4MiB"\n[tenants.a]\nuids = [1]\nsalt = "{salt}"\n')
    file.chmod(0o600)
    flags = ("--config", str(file), "--metrics", "unix")
    with running_daemon(*flags, runtime_dir=tmp_path / "rt") as daemon:
        text = get(daemon, "/metrics").body + get(daemon, "/history.json").body
        assert salt not in text
        (labels,) = (dict(each) for name, each in scrape(daemon) if name == "kvd_config_info")
    assert labels["max_memory"] == str(4 << 20)
    assert labels["metrics"] == "unix"
    assert "tenants" not in labels


def test_names_follow_prometheus_conventions(daemon: Daemon) -> None:
    text = get(daemon, "/metrics").body
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\S+) (.+)$", text, re.MULTILINE))
    assert len(kinds) > 30
    assert set(kinds) == set(helps)
    for name, kind in kinds.items():
        assert re.fullmatch(r"(kvd|process)_[a-z_]+", name), name
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"(_ms|_milliseconds|_kib|_mib|_percent|_ratio_total)\b", name), name
        if kind == "histogram":
            assert name.endswith("_seconds"), name
    names = {name for name, _ in scrape(daemon)}
    assert {"kvd_prefix_cache_queries_total", "kvd_prefix_cache_hits_total"} <= names


def test_labels_are_bounded_whatever_clients_do(daemon: Daemon) -> None:
    """Models come and go, without end: there are never more arenas than max_models."""
    for round_ in range(3):
        with raw_client(daemon) as client:
            for number in range(MAX_MODELS):
                key = bytes([round_, number]) * 16
                context = client.open(name=f"model {round_} {number}", fingerprint=key)
                client.release(context, client.store(context, TOKENS[: 4 * BLOCK_TOKENS]))
    as_soon_as(daemon, "kvd_sessions_opened_total", 3)
    series = as_soon_as(daemon, "kvd_sessions", 0)
    arenas = arena_series(series)
    assert len(arenas) == MAX_MODELS * len(STATES)
    assert {each["state"] for each in arenas} == set(STATES)
    codes = {dict(labels)["code"] for name, labels in series if name == "kvd_request_errors_total"}
    assert codes == set(BY_CODE)


def test_models_of_one_name_are_one_series_and_any_name_is_only_a_label(
    daemon: Daemon, client: Raw
) -> None:
    name = '<script>alert(1)</script>"\\ {x="y"} 1\n# TYPE evil counter'
    for number in range(2):
        context = client.open(name=name, fingerprint=bytes([number]) * 32)
        client.release(context, client.store(context, TOKENS))
    arena = f"default/{name}"
    expected = 2 * N_BLOCKS * STRIDE
    series = as_soon_as(daemon, "kvd_arena_bytes", expected, arena=arena, state="cached")
    assert {each["arena"] for each in arena_series(series)} == {arena}
    assert not [each for each, _ in series if "evil" in each]


def test_contexts_of_a_client_do_not_add_series(daemon: Daemon, client: Raw) -> None:
    before = len(scrape(daemon))
    model = client.register()
    for _ in range(20):
        client.call(OpenContext(model, 1, []))
    for number in range(10):
        with raw_client(daemon, name=f"client {number}") as other:
            other.call(Ping())
    series = as_soon_as(daemon, "kvd_sessions_opened_total", 11)
    assert len(series) == before + len(STATES) + 2, "one arena, and one tenant with two"


def test_it_is_off_unless_asked_for(tmp_path: Path) -> None:
    with running_daemon("--max-memory", "4MiB", runtime_dir=tmp_path / "rt") as daemon:
        assert not (daemon.runtime_dir / "metrics.sock").exists()
        tasks = Path(f"/proc/{daemon.process.pid}/task").iterdir()
        assert "kvd-metrics" not in {(task / "comm").read_text().strip() for task in tasks}


BLOCKING = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    return None if name.startswith("prometheus_client") else find(name, path, target)
PathFinder.find_spec = find_others
from kvd import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path) -> None:
    """And without the setting the package is not needed."""
    command = [sys.executable, "-c", BLOCKING, "serve", "--runtime-dir", str(tmp_path / "rt")]
    command += ["--instance", "no-package", "--max-memory", "4MiB", "--no-keep-on-stop"]
    asked = subprocess.run(
        [*command, "--metrics", "unix"], capture_output=True, text=True, timeout=60
    )
    assert asked.returncode == 2
    assert "prometheus_client is not installed: pip install 'kvd-cache[metrics]'" in asked.stderr
    not_asked = subprocess.run(
        [*command, "--linger-seconds", "1"], capture_output=True, text=True, timeout=60
    )
    assert (not_asked.returncode, "stopped" in not_asked.stderr) == (0, True)
