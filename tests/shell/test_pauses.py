"""The collector of cycles looks at the young alone, so what lives for long must have no cycles when
it is dropped: clients that come, store, fail and die leave nothing to be collected.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from kvd import pauses
from kvd_proto import errors
from kvd_proto.messages import Evict, Flush, Get, ListClients
from tests.shell.raw import (
    BLOCK_TOKENS,
    Raw,
    make_alloc,
    make_append,
    many_tokens,
    raw_client,
    tokens,
    until,
)
from tests.support import Daemon, running_daemon

FEW, MANY = 3, 9


def test_no_garbage_grows_with_the_number_of_clients(tmp_path: Path) -> None:
    few, many = (garbage_of(tmp_path / str(n), n) for n in (FEW, MANY))
    grown = {name: many[name] - few[name] for name in many if many[name] > few[name]}
    assert not grown, f"only a walk of all objects would free {grown}"


def test_only_the_young_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    switch, thresholds = sys.getswitchinterval(), gc.get_threshold()
    try:
        pauses.bound()
        assert sys.getswitchinterval() < switch
        assert gc.get_threshold()[2] > 1 << 30
        assert gc.isenabled()
    finally:
        sys.setswitchinterval(switch)
        gc.set_threshold(*thresholds)


def garbage_of(directory: Path, n_clients: int) -> Counter[str]:
    """What a daemon has left in cycles when so many clients have come and gone, by type."""
    directory.mkdir()
    told = directory / "garbage"
    prefix = (sys.executable, "-m", "tests.shell.collecting_daemon", str(told))
    with running_daemon(
        "--max-memory", "1MiB", runtime_dir=directory / "rt", prefix=prefix
    ) as daemon:
        for number in range(n_clients):
            with raw_client(daemon) as client:
                live(client, number)
            until(lambda: daemon_is_alone(daemon))
    return Counter(json.loads(told.read_text()))


def live(client: Raw, number: int) -> None:
    """All that a client does, what is refused included; and it leaves in the middle of it."""
    context = client.open()
    prompt = many_tokens(number * 1000, 4 * BLOCK_TOKENS)
    client.release(context, client.store(context, prompt))
    sequence = client.alloc(context, prompt)
    client.call(Get(context, sequence.seq_id, sequence.generation, 0))
    for refused in (
        make_alloc(context, b"", reserve=1 << 20),
        make_append(context, sequence, 0, tokens(1), client.stage(tokens(1))),
        make_append(context, sequence, 4 * BLOCK_TOKENS, tokens(1), b"\0" * 8),
        make_append(context, sequence, 4 * BLOCK_TOKENS, tokens(1), b"\0\x10" + b"\0" * 6),
        Flush(1 << 30),
    ):
        assert isinstance(client.ask(refused), errors.KvdError)
    # A copy that is not accepted: the staging is changed under it, if it comes in time.
    more = many_tokens(number * 1000 + 500, 8 * BLOCK_TOKENS)
    offsets = client.stage(more, 4 * BLOCK_TOKENS)
    client.post(make_append(context, sequence, 4 * BLOCK_TOKENS, more, offsets))
    client.staging[4096 : 4096 + (1 << 15)] = bytes(1 << 15)
    client.receive()
    client.call(Evict("", 2))
    client.call(ListClients())
    client.status()
    assert client.verify()["ok"]
    for _ in range(6):
        client.post(make_alloc(context, prompt, wait_ms=60_000))
    client.dealer.send(b"\xc1")


def daemon_is_alone(daemon: Daemon) -> bool:
    with raw_client(daemon, staging_bytes=0) as client:
        return bool(client.status()["clients"] == 1)
