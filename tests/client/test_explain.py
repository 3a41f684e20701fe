"""Explain, forget, and requests that are not stored or not matched: both clients and kvctl, with a
real daemon. What is answered in which case: tests/core/test_explaining.py, test_forgetting.py.
"""

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvd_client
from kvd_client import aio, errors
from kvd_client.arrays import ArrayContext, ArrayLayer, ArrayModel
from kvd_client.asking import traits_of
from kvd_client.kvctl import explaining
from kvd_client.kvctl.tables import NARROW, Look
from kvd_proto.messages import MAX_TRAIT_NAME, MAX_TRAIT_TEXT, MAX_TRAITS
from tests.client.blocks import MODEL, STRIDE, payloads, store
from tests.proto.protocol_doc import report_keys
from tests.support import Daemon

PROMPT = list(range(24))
"""Three blocks."""


def kvctl(daemon: Daemon, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", str(daemon.runtime_dir)]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=60, **options
    )


@pytest.fixture
def stored(client: kvd_client.Client) -> kvd_client.Context:
    """With PROMPT cached, and something that goes on otherwise after its first block."""
    context = client.open_context(MODEL)
    store(context, PROMPT)
    store(context, [*PROMPT[:8], *range(100, 108)])
    return context


# --- not stored, not matched


def test_a_sequence_that_is_not_stored_is_matched_and_takes_no_append(
    client: kvd_client.Client, stored: kvd_client.Context
) -> None:
    before = client.status()["counters"]
    with stored.alloc([*PROMPT, 7], store=False) as sequence:
        assert (sequence.matched_tokens, sequence.stores) == (24, False)
        with pytest.raises(errors.NotStored, match="store=False"):
            sequence.append([7], payloads([*PROMPT, 7], 24))
        with pytest.raises(errors.NotStored):
            sequence.stage(1)
        with pytest.raises(errors.NotStored):
            sequence.post_append([7], payloads([*PROMPT, 7], 24))
        assert bytes(sequence.block(2)) == payloads(PROMPT)[2]
        sequence.stores = True  # the daemon holds to it, too
        with pytest.raises(errors.NotStored, match="alloc asked"):
            sequence.append([7], payloads([*PROMPT, 7], 24))
    after = client.status()["counters"]
    assert after["stored_blocks"] == before["stored_blocks"]
    assert after["sequences_not_stored"] == before["sequences_not_stored"] + 1


def test_a_sequence_that_is_not_matched_computes_all_anew(
    client: kvd_client.Client, stored: kvd_client.Context
) -> None:
    before = client.status()["counters"]
    with stored.alloc(PROMPT, use=False) as sequence:
        assert (sequence.matched_tokens, sequence.n_blocks, sequence.stores) == (0, 0, True)
        commit = sequence.append(PROMPT, payloads(PROMPT))
        assert (commit.stored, commit.present) == (0, 3)
    after = client.status()["counters"]
    assert after["sequences_not_matched"] == before["sequences_not_matched"] + 1
    assert after["queried_tokens"] == before["queried_tokens"]


def test_a_sequence_of_arrays_that_is_not_stored_works_to_its_end(
    client: kvd_client.Client,
) -> None:
    model = ArrayModel("arrays", "engine 1", [ArrayLayer(1, 2, 2)] * 2, np.float32, 4)
    tokens = list(range(10))
    k = v = np.arange(20, dtype=np.float32).reshape(10, 1, 2)

    def run(context: ArrayContext, **wishes: bool) -> tuple[int, int]:
        """Matched and stored tokens."""
        with context.alloc(tokens, **wishes) as sequence:
            new = slice(sequence.matched_tokens, 10)
            if sequence.matched_tokens < 10:
                sequence.append(tokens[new], [k[new]] * 2, [v[new]] * 2)
            assert np.array_equal(sequence.gather(1).k, k)
            stored = sequence.flush()
            is_declined = isinstance(sequence.store_error, errors.NotStored)
            assert is_declined == (not wishes.get("store", True))
        client.flush()
        return sequence.matched_tokens, stored

    with ArrayContext(client, model) as context:
        assert run(context, store=False) == (0, 0)
        assert client.explain(model.model, tokens)["matched_tokens"] == 0
        assert run(context) == (0, 8)
        assert run(context, use=False) == (0, 8)
        assert run(context) == (10, 8)
    traits = dict(model.model.traits)
    assert traits["identity"] == "engine 1"
    assert (traits["dtype"], traits["layers"]) == ("float32", "2 of 1 heads, k 2, v 2")


def test_without_a_daemon_it_is_remembered_too(tmp_path: Path) -> None:
    with (
        kvd_client.connect(tmp_path / "none", fail_open=True) as client,
        client.open_context(MODEL) as context,
        context.alloc(PROMPT, store=False) as sequence,
    ):
        assert not sequence.stores


def test_room_for_what_is_not_stored_is_refused(stored: kvd_client.Context) -> None:
    with pytest.raises(errors.BadMessage, match="reserve"):
        stored.alloc(PROMPT, reserve_tokens=8, store=False)


# --- explain


def test_explain(client: kvd_client.Client, stored: kvd_client.Context) -> None:
    report = client.explain(MODEL, [*PROMPT, 7])
    assert (report["matched_tokens"], report["matched_blocks"]) == (24, 3)
    assert report["missing"]["why"] == "too_short"
    client.evict(blocks=1)
    missing = client.explain(MODEL.arena_fingerprint, PROMPT)["missing"]
    assert (missing["block"], missing["reason"]) == (2, "command")
    assert 0 <= missing["seconds_ago"] < 60


def test_what_models_tell_of_themselves_is_compared(
    client: kvd_client.Client, stored: kvd_client.Context
) -> None:
    fields = {"type_k": "f16", "threads": "x"}
    told = replace(MODEL, name="other", fingerprint=b"o" * 32, traits=traits_of(fields))
    with client.open_context(told) as context:
        store(context, list(range(200, 216)))
    asker = replace(told, fingerprint=b"p" * 32, traits=traits_of({**fields, "type_k": "q8_0"}))
    report = client.explain(asker, list(range(200, 216)))
    assert report["model"] is None, "it asks for one that nobody has registered"
    (row,) = report["others"]
    assert (row["model"], row["tokens"], row["traits_known"]) == ("other", 16, True)
    assert row["differs"] == [{"name": "type_k", "here": "q8_0", "there": "f16"}]
    missing = client.explain(MODEL, list(range(200, 216)))["missing"]
    assert keys_of({**report, "missing": missing}) == report_keys("explain"), "as PROTOCOL.md says"


def keys_of(report: dict[str, Any], prefix: str = "") -> set[str]:
    """As PROTOCOL.md writes them."""
    keys = set()
    for name, value in report.items():
        if isinstance(value, list):
            keys |= keys_of(value[0], f"{prefix}{name}[].")
            continue
        keys.add(prefix + name)
        if isinstance(value, dict):
            keys |= keys_of(value, f"{prefix}{name}.")
    return keys


def test_traits_are_as_long_as_they_may_be_and_stay_different() -> None:
    long, longer = ("n" * 99, "x" * 9999), ("n" * 99, "x" * 9999 + "y")
    ((name, text),) = traits_of(dict([long]))
    assert (len(name), len(text)) == (MAX_TRAIT_NAME, MAX_TRAIT_TEXT)
    assert traits_of(dict([longer])) != traits_of(dict([long]))
    assert len(traits_of({f"{number}": "" for number in range(999)})) == MAX_TRAITS
    assert traits_of({"b": "2", "a": "1"}) == (("a", "1"), ("b", "2"))


# --- forget


def test_forget(client: kvd_client.Client, stored: kvd_client.Context) -> None:
    with stored.alloc(PROMPT):
        assert client.forget(MODEL, PROMPT) == (24, 0, 1, 0)
    assert client.forget(MODEL, PROMPT) == (24, 2, 0, 2 * STRIDE)
    assert client.explain(MODEL, PROMPT)["matched_tokens"] == 8, "the other has it too"
    with pytest.raises(errors.UnknownModel):
        client.forget(bytes(32), PROMPT)
    with pytest.raises(errors.BadMessage):
        client.forget(MODEL, [])
    with pytest.raises(errors.BadMessage, match="no such tenant"):
        client.evict(tenant="nobody")
    assert client.evict(tenant="default").blocks == 2


def test_the_same_with_asyncio(daemon: Daemon, stored: kvd_client.Context) -> None:
    async def work() -> None:
        async with (
            aio.connect(daemon.runtime_dir, staging_bytes=1 << 20) as client,
            client.open_context(MODEL) as context,
        ):
            async with context.alloc(PROMPT, use=False, store=False) as sequence:
                assert (sequence.matched_tokens, sequence.stores) == (0, False)
                with pytest.raises(errors.NotStored):
                    await sequence.append(PROMPT, payloads(PROMPT))
            assert (await client.explain(MODEL, PROMPT))["missing"] is None
            assert (await client.forget(MODEL, PROMPT)).blocks == 2
            missing = (await client.explain(MODEL, PROMPT))["missing"]
            assert (missing["block"], missing["reason"]) == (1, "command")
            assert (await client.evict(tenant="default")).blocks == 2

    asyncio.run(work())


# --- kvctl


def test_kvctl_explain(
    daemon: Daemon, client: kvd_client.Client, stored: kvd_client.Context, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(PROMPT))
    done = kvctl(daemon, "explain", "--model", "tiny", str(prompt))
    assert (done.returncode, done.stdout) == (0, "24 of 24 tokens are cached, in 3 blocks of 8\n")
    client.evict(blocks=1)
    done = kvctl(daemon, "explain", "--model", "tiny", "--json", str(prompt))
    assert json.loads(done.stdout)["missing"]["block"] == 2
    done = kvctl(daemon, "explain", "--model", "tiny", input=json.dumps(PROMPT))
    first, second, third = done.stdout.splitlines()
    assert first == "16 of 24 tokens are cached, in 2 blocks of 8"
    assert second == "block 2 is not: tokens 16 to 23"
    assert third.startswith("  it was evicted ")
    assert third.endswith(" s ago: somebody asked for it")
    wrong = kvctl(daemon, "explain", "--model", "large", str(prompt))
    assert (wrong.returncode, "no model is called 'large'" in wrong.stderr) == (1, True)
    wrong = kvctl(daemon, "explain", "--model", "tiny", "--tenant", "nobody", str(prompt))
    assert (wrong.returncode, "no such tenant" in wrong.stderr) == (1, True)
    wrong = kvctl(daemon, "explain", "--model", "tiny", input="{}")
    assert (wrong.returncode, "list of token ids" in wrong.stderr) == (2, True)


def test_kvctl_evicts_all_only_if_one_is_sure(
    daemon: Daemon, client: kvd_client.Client, stored: kvd_client.Context
) -> None:
    for more in ([], ["--model", "tiny"], ["--tenant", "default"]):
        done = kvctl(daemon, "evict", "--all", *more)
        assert (done.returncode, done.stdout) == (2, "")
        assert "this would drop 4 blocks of 1 model, 16.0 KiB: do it with --yes" in done.stderr
    assert client.explain(MODEL, PROMPT)["missing"] is None
    done = kvctl(daemon, "evict", "--all", "--tenant", "default", "--yes", "--json")
    assert json.loads(done.stdout) == {"blocks": 4, "freed_bytes": 4 * STRIDE}


def test_kvctl_forgets_a_prompt(
    daemon: Daemon, client: kvd_client.Client, stored: kvd_client.Context, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(PROMPT))
    client.pin(MODEL, PROMPT[:16], owner="o")
    done = kvctl(daemon, "evict", "--model", "tiny", "--prompt", str(prompt))
    assert done.stdout == (
        "24 of its tokens were cached; 1 block evicted, 4.0 KiB given back to the system; 1 stay, "
        "leased or pinned\n"
    )
    client.unpin("o")
    short = MODEL.arena_fingerprint.hex()[:8]
    done = kvctl(
        daemon, "evict", "--model", short, "--prompt", "-", "--json", input=json.dumps(PROMPT)
    )
    assert json.loads(done.stdout) == {
        "tokens": 16, "blocks": 1, "kept": 0, "freed_bytes": STRIDE,
    }  # fmt: skip
    wrong = kvctl(daemon, "evict", "--prompt", str(prompt))
    assert (wrong.returncode, "--prompt needs --model" in wrong.stderr) == (2, True)
    wrong = kvctl(daemon, "evict", "--prompt", str(prompt), "--all")
    assert wrong.returncode == 2


# --- what kvctl explain says

NOTHING: dict[str, Any] = {
    "model": "m",
    "fingerprint": "ab" * 32,
    "tenant": "t",
    "block_tokens": 32,
    "asked_tokens": 2048,
    "matched_tokens": 1024,
    "matched_blocks": 32,
    "missing": None,
    "memory_seconds": None,
    "model_dropped_seconds": None,
    "sequences_not_stored": 0,
    "others": [],
    "another_tenant": None,
}


def said(why: str, **other: Any) -> list[str]:
    missing: dict[str, Any] = {
        "block": 32, "start": 1024, "end": 1056, "why": why,
        "tokens": 0, "reason": None, "seconds_ago": None,
    }  # fmt: skip
    report = {
        **NOTHING,
        "missing": {**missing, **{k: other.pop(k) for k in [*other] if k in missing}},
    }
    first, second, *rest = explaining.text({**report, **other}, Look()).splitlines()
    assert first == "1,024 of 2,048 tokens are cached, in 32 blocks of 32"
    assert second == "block 32 is not: tokens 1,024 to 1,055"
    return rest


def test_each_answer_has_its_words() -> None:
    assert said("not_known") == ["  it was never stored, or was gone before the daemon's start"]
    assert said("not_known", memory_seconds=7200.0) == [
        "  it was never stored, or was gone before 2 h 0 min ago"
    ]
    assert said("too_short", sequences_not_stored=2)[1] == (
        "  2 sequences since then asked that nothing is stored"
    )
    assert "being stored" in said("filling")[0]
    assert "checked before it is served" in said("unchecked")[0]
    for reason in ("room", "quota", "reduced", "command", "superseded", "damaged", "orphaned"):
        (line,) = said("evicted", reason=reason, seconds_ago=720.0, tokens=32)
        assert line.startswith("  it was evicted 12 min ago: ")
    assert said("evicted", reason="room", seconds_ago=1.0, tokens=7)[1] == (
        "  7 of its tokens had been stored"
    )
    assert said("not_known", model_dropped_seconds=60.0)[1] == (
        "all blocks of this model went 1 min ago, when it gave way to another"
    )
    assert said("not_known", another_tenant=True)[1] == (
        "another tenant has more of these tokens; tenants do not share"
    )
    none = explaining.text({**NOTHING, "model": None, "matched_tokens": 0}, Look())
    assert none == "tenant t has no model of this fingerprint"
    assert explaining.text({**NOTHING, "matched_tokens": 0}, Look()) == (
        "none of 2,048 tokens is cached"
    )


def test_another_model_is_named_with_what_differs_and_nothing_steers_the_terminal() -> None:
    row = {
        "model": "evil\x1b[2J",
        "fingerprint": "cd" * 32,
        "tokens": 1500,
        "traits_known": True,
        "differs": [{"name": "type_k", "here": "q8_0", "there": "f16"},
                    {"name": "lora", "here": "", "there": None}],
    }  # fmt: skip
    lines = said("not_known", others=[row, {**row, "traits_known": False, "differs": []}])[1:]
    assert lines == [
        "another model, evil?[2J cdcdcdcdcdcd, has 1,500 of these tokens; it differs in",
        "  type_k: f16 there, q8_0 here",
        '  lora: none there, "" here',
        "another model, evil?[2J cdcdcdcdcdcd, has 1,500 of these tokens; it differs in",
        "  what its client, or this one's, has not told since the daemon's start",
    ]
    assert all(len(line) <= NARROW for line in lines)
