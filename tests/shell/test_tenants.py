"""Tenants: who is of which, by the kernel's word; and real processes of several users that get
nothing of each other's.

The latter takes root, to become other users.
"""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvd_client
from kvd.lifeline import Listener
from kvd.tenants import Membership, Tenants, TenantTables
from kvd_proto import codec, errors
from kvd_proto.keys import arena_fingerprint, root_key
from kvd_proto.messages import (
    Config,
    Events,
    Evict,
    Explain,
    Forget,
    ListClients,
    ListPins,
    ListSequences,
    Ping,
    Pong,
    Reload,
    Status,
    Unpin,
    Verify,
)
from tests.shell.raw import BLOCK_TOKENS, FINGERPRINT, STRIDE, many_tokens, raw_client, until
from tests.support import Daemon, running_daemon, start_daemon

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="to become another user takes root: NOT TESTED HERE"
)
SALT_A, SALT_B = "the salt of tenant a, a secret", "the salt of tenant b, a secret"
MIB = 1 << 20


# --- who is of which tenant


def tenants(table: Any, own_uid: int = 500) -> Tenants:
    return Tenants(TenantTables().read(table), 64 * MIB, 4 * MIB, own_uid)


TABLE = {
    "a": {"uids": [1001], "gids": [2001], "quota": "8MiB"},
    "b": {"uids": [1002], "gids": [2002, 2003]},
}


def no_groups() -> frozenset[int]:
    raise AssertionError("groups do not matter here")


def test_without_tables_everybody_is_of_one_tenant_and_administers() -> None:
    for uid in (0, 500, 1001):
        assert tenants({}).find(uid, no_groups) == Membership("default", True, 4 * MIB)


@pytest.mark.parametrize(
    ("uid", "groups", "tenant"),
    [
        (1001, {2002}, "a"),  # the uid is stronger than any group
        (1002, {2001, 2002}, "b"),
        (1003, {2001}, "a"),
        (1003, {5, 2003, 2002}, "b"),
    ],
)
def test_uid_then_groups(uid: int, groups: set[int], tenant: str) -> None:
    found = tenants(TABLE).find(uid, lambda: frozenset(groups))
    assert (found.tenant, found.administrator) == (tenant, False)


def test_the_daemons_user_and_root_are_administrators_wherever_they_are_listed() -> None:
    for uid in (0, 500):
        assert tenants(TABLE).find(uid, no_groups) == Membership("default", True, 4 * MIB)
    listed = tenants({**TABLE, "c": {"uids": [0]}, "default": {"quota": "1MiB"}})
    assert listed.find(0, no_groups) == Membership("c", True, 4 * MIB)
    assert listed.find(500, no_groups) == Membership("default", True, MIB // 4)


def test_a_staging_is_a_quarter_of_the_quota_at_most() -> None:
    assert tenants(TABLE).find(1001, no_groups).max_staging == 2 * MIB
    assert tenants(TABLE).find(1002, no_groups).max_staging == 4 * MIB


@pytest.mark.parametrize("groups", [set(), {7}, {2001, 2002}])
def test_who_is_of_none_or_of_several_is_told_what_to_do(groups: set[int]) -> None:
    with pytest.raises(errors.NoTenant, match="list your uid") as refused:
        tenants(TABLE).find(1003, lambda: frozenset(groups))
    shown = ",".join(map(str, sorted(groups)))
    assert refused.value.details == {"uid": 1003, "gids": shown}


@needs_root
@pytest.mark.parametrize("count", [0, 1, 300, 65536])
def test_all_groups_of_a_peer_are_found(tmp_path: Path, count: int) -> None:
    listener = Listener(str(tmp_path / "lifeline.sock"))
    try:
        program = f"""
            import os, socket
            os.setgroups(range(100000, 100000 + {count}))
            os.setgid(4711)
            lifeline = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            lifeline.connect({listener.path!r})
            lifeline.recv(1)
        """
        child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        listener._sock.setblocking(True)
        peer = listener.accept()
        assert peer is not None
        assert peer.groups() == {4711, *range(100000, 100000 + count)}
        peer.close()
        assert child.wait(30) == 0
    finally:
        listener.close()


# --- real users


CLIENT = """
    import json, os, sys
    groups, gid, uid, runtime_dir = json.loads(sys.argv[1])
    # The interpreter and the modules lie where other users may not look: all is loaded before.
    from pathlib import Path
    from struct import pack
    from types import SimpleNamespace
    from kvd_proto import errors
    from kvd_proto.keys import arena_fingerprint
    from kvd_client import PromptKeys
    from kvd_proto.index import IndexReader
    from kvd_proto.messages import *
    from tests.shell.raw import *
    os.setgroups(groups)
    os.setgid(gid)
    os.setuid(uid)
    daemon = SimpleNamespace(runtime_dir=Path(runtime_dir))

    def step(client, contexts, order):
        name, *values = order
        if name == "store":
            first, n_blocks, fill = values
            context = contexts[-1] if contexts else client.open()
            sequence = client.store(context, many_tokens(first, n_blocks * BLOCK_TOKENS), fill)
            contexts.append(context)
            blocks = client.read(context, sequence)
            client.release(context, sequence)
            return {
                "context": context,
                "matched": sequence.matched_tokens,
                "right": blocks == expected_blocks(n_blocks, fill),
                "size": len(client.arena),
                "arena": os.fstat(client.arena_fd).st_ino,
                "index": os.fstat(client.index_fd).st_ino,
            }
        if name == "peek":
            first, n_blocks = values
            index = IndexReader(memoryview(mmap.mmap(client.index_fd, 0, prot=mmap.PROT_READ)))
            keys = PromptKeys(many_tokens(first, n_blocks * BLOCK_TOKENS))
            found = index.count(keys.prefixes(index.root_key, BLOCK_TOKENS))
            return [found, index.root_key.hex()]
        if name == "hold":
            first, n_blocks = values
            sequence = client.alloc(contexts[-1], many_tokens(first, n_blocks * BLOCK_TOKENS))
            return sequence.matched_tokens
        if name == "steal":
            (context,) = values
            asked = (
                Get(context, 0, 1, 0), Release(context, 0, 1, 0), CloseContext(context),
                Alloc(context, "", b"", 0, 0, 0),
                Append(context, 0, 1, 0, tokens(1), pack("<Q", 4096)),
            )
            return [type(client.ask(message)).__name__ for message in asked]
        if name == "guess":  # a model of this number was registered by another tenant
            return type(client.ask(OpenContext(values[0], 1, []))).__name__
        if name == "events":
            return client.call(Events(0, 0, 500, [], "")).report
        if name == "report":
            kinds = {
                "status": Status, "sequences": ListSequences, "clients": ListClients,
                "pins": ListPins,
            }
            return client.call(kinds[values[0]]()).report
        if name in ("verify", "config", "reload"):
            message = {"verify": Verify, "config": Config, "reload": Reload}[name]()
            return type(client.ask(message)).__name__
        if name == "evict":
            reply = client.ask(Evict("", 0, *values))
            return reply.blocks if isinstance(reply, Evicted) else type(reply).__name__
        if name in ("explain", "forget"):
            first, n_blocks, *tenant = values
            model = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
            prompt, tenant = many_tokens(first, n_blocks * BLOCK_TOKENS), "".join(tenant)
            if name == "forget":
                reply = client.ask(Forget(model, prompt, tenant))
                return reply.blocks if isinstance(reply, Forgotten) else type(reply).__name__
            reply = client.ask(Explain(model, prompt, tenant, []))
            return reply.report if isinstance(reply, Reported) else type(reply).__name__
        if name == "pin":
            first, n_blocks = values
            model = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
            reply = client.ask(Pin(model, many_tokens(first, n_blocks * BLOCK_TOKENS), "me", 0))
            return reply.tokens if isinstance(reply, Pinned) else type(reply).__name__
        if name == "unpin":
            return client.call(Unpin("me", "")).pins
        if name == "reserve":
            n_blocks = values[0]
            message = make_alloc(contexts[-1], b"", reserve=n_blocks * BLOCK_TOKENS)
            return type(client.ask(message)).__name__
        if name == "reopen":  # for writing, what was handed out for reading
            for fd in (client.arena_fd, client.index_fd):
                try:
                    os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
                except PermissionError:
                    continue
                return "opened"
            return "PermissionError"

    try:
        client = Raw(daemon)
    except errors.KvdError as error:
        print(json.dumps([error.code, error.message, error.details]), flush=True)
        sys.exit()
    contexts = []
    print(json.dumps(len(client.staging)), flush=True)
    for line in sys.stdin:
        print(json.dumps(step(client, contexts, json.loads(line))), flush=True)
    client.close()
"""


class User:
    """A process of another user with one session; `said` is what it said first."""

    def __init__(self, daemon: Daemon, uid: int, gid: int, *groups: int) -> None:
        who = json.dumps([groups, gid, uid, str(daemon.runtime_dir)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CLIENT), who],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.said = self._hear()

    def __call__(self, *order: Any) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._hear()

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the client died"
        return json.loads(line)

    def end(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(30)


@pytest.fixture
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """With tenants a (uid 61001, or group 62001; a quota) and b (uid 61002)."""
    directory = tmp_path_factory.mktemp("tenants")
    config = directory / "kvd.toml"
    config.write_text(
        f"""
        [tenants.a]
        uids = [61001]
        gids = [62001]
        salt = "{SALT_A}"
        quota = "2MiB"
        [tenants.b]
        uids = [61002]
        salt = "{SALT_B}"
        """
    )
    config.chmod(0o600)
    flags = ("--max-memory", "16MiB", "--config", str(config))
    with running_daemon(*flags, runtime_dir=directory / "rt") as running:
        for path in (*directory.parents, directory, running.runtime_dir):
            if str(path).startswith("/tmp/pytest-of"):
                path.chmod(0o711)
        for name in ("lifeline.sock", "requests.sock"):
            (running.runtime_dir / name).chmod(0o666)
        yield running


@pytest.fixture
def become(daemon: Daemon) -> Iterator[Any]:
    """Makes users; all are gone afterwards."""
    made: list[User] = []

    def user(uid: int, gid: int = 63000, *groups: int) -> User:
        made.append(User(daemon, uid, gid, *groups))
        return made[-1]

    yield user
    for each in made:
        each.end()


A, B, NOBODYS = 61001, 61002, 61003


@needs_root
def test_two_tenants_get_nothing_of_each_others(daemon: Daemon, become: Any) -> None:
    a, b, a2 = become(A), become(B), become(NOBODYS, 63000, 62001)
    stored = a("store", 0, 3, 1)
    assert (stored["matched"], stored["right"]) == (0, True)
    # The same model, the same tokens, another K/V: and each finds its own.
    others = b("store", 0, 3, 2)
    assert (others["matched"], others["right"]) == (0, True)
    assert others["arena"] != stored["arena"], "an arena of its own"
    again = a2("store", 0, 3, 1)
    assert (again["matched"], again["right"]) == (3 * BLOCK_TOKENS, True)
    assert again["arena"] == stored["arena"]
    assert b("steal", stored["context"]) == ["UnknownContext"] * 5
    assert a2("steal", stored["context"]) == ["ForeignHandle"] * 5
    assert b("guess", 1) == "UnknownModel"
    assert a("hold", 0, 3) == 3 * BLOCK_TOKENS
    for user in (a, b):
        assert user("reopen") == "PermissionError"


@needs_root
def test_an_index_tells_of_ones_own_tenant_alone(become: Any) -> None:
    a, b, a2 = become(A), become(B), become(NOBODYS, 63000, 62001)
    stored = [user("store", 0, 3, 1) for user in (a, b, a2)]
    assert stored[0]["index"] == stored[2]["index"] != stored[1]["index"]
    model = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
    roots = [root_key(model, salt.encode()).hex() for salt in (SALT_A, SALT_B, SALT_A)]
    assert [user("peek", 0, 4) for user in (a, b, a2)] == [[3, root] for root in roots]
    assert a("forget", 0, 3) == 3
    assert [user("peek", 0, 4)[0] for user in (a, b, a2)] == [0, 3, 0]


@needs_root
def test_events_are_a_tenants_own(daemon: Daemon, become: Any) -> None:
    """Also their numbers, which would tell how much others do."""
    a, b = become(A), become(B)
    for user, fill in ((a, 1), (b, 2)):
        user("events")  # from now on the frequent ones are noted, too
        user("store", 0, 3, fill)
    for user, tenant in ((a, "a"), (b, "b")):
        report = user("events")
        assert {event["tenant"] for event in report["events"]} == {tenant}
        assert [event["number"] for event in report["events"]] == list(range(report["next"]))
        assert [event["kind"] for event in report["events"]] == [
            "session-opened", "model", "alloc", "seal", "seal", "seal", "release",
        ]  # fmt: skip
    with raw_client(daemon) as root:
        everything = root.call(Events(0, 0, 500, [], "")).report["events"]
        assert [event["tenant"] for event in everything].count("a") == 7
        assert [event["number"] for event in everything] == list(range(15))


@needs_root
def test_pins_are_a_tenants_own(daemon: Daemon, become: Any) -> None:
    a, b, a2 = become(A), become(B), become(NOBODYS, 63000, 62001)
    assert a("pin", 0, 3) == "UnknownModel"
    a("store", 0, 3, 1)
    assert a("pin", 0, 3) == 3 * BLOCK_TOKENS
    assert b("pin", 0, 3) == "UnknownModel", "that model is another tenant's"
    b("store", 0, 2, 2)
    assert b("pin", 0, 3) == 2 * BLOCK_TOKENS
    assert [row["tenant"] for row in b("report", "pins")["pins"]] == ["b"]
    assert b("unpin") == 1
    assert [row["tokens"] for row in a("report", "pins")["pins"]] == [3 * BLOCK_TOKENS]
    assert a("report", "status")["tenants"][0]["pinned_bytes"] == 3 * STRIDE
    assert a2("evict") == 0
    assert a2("unpin") == 1, "owners are names, and a tenant's own business"
    assert b("pin", 0, 1) == BLOCK_TOKENS
    with raw_client(daemon) as root:
        assert [row["tenant"] for row in root.call(ListPins()).report["pins"]] == ["b"]
        assert root.call(Unpin("me", "")).pins == 1
        assert root.verify()["differences"] == []


@needs_root
def test_a_tenant_cannot_pin_beyond_its_quota(daemon: Daemon, become: Any) -> None:
    """2 MiB, of which its staging and its directory take some."""
    a, b = become(A), become(B)
    n_pins, left = 0, 2 * MIB
    while left >= 40 * STRIDE:
        n_pins += 1
        a("store", 10_000 * n_pins, 20, 1)
        assert a("pin", 10_000 * n_pins, 20) == 20 * BLOCK_TOKENS
        left = a("report", "status")["accounting"]["unassigned_bytes"]
    assert a("reserve", 40) == "OverQuota"
    assert b("store", 0, 20, 1)["right"], "others have room"
    assert a("unpin") == n_pins
    assert a("reserve", 40) == "Allocated"


@needs_root
def test_reports_tell_a_tenant_of_itself_and_an_administrator_of_all(
    daemon: Daemon, become: Any
) -> None:
    a, b = become(A), become(B)
    a("store", 0, 3, 1)
    b("store", 0, 5, 2)
    b("hold", 0, 5)
    with raw_client(daemon) as root:
        everything = root.status()
    status = a("report", "status")
    assert set(status) == set(everything)
    assert [row["name"] for row in status["tenants"]] == ["a"]
    assert [row["name"] for row in everything["tenants"]] == ["a", "b", "default"]
    assert [row["tenant"] for row in status["models"]] == ["a"]
    assert [row["tenant"] for row in everything["models"]] == ["a", "b"]
    assert status["clients"] == 1
    assert status["sequences"]["in_use"] == 0
    assert status["counters"]["stored_blocks"] == 3
    assert everything["counters"]["stored_blocks"] == 8
    account = status["accounting"]
    assert account["budget_bytes"] == 2 * MIB
    assert account["cached_bytes"] == 3 * STRIDE
    assert account["drift_bytes"] == 0
    shares = ("unassigned", "free", "filling", "active", "cached", "directory", "staging")
    assert sum(account[f"{name}_bytes"] for name in shares) == 2 * MIB
    for row, total in ((status["tenants"][0], account), (everything["tenants"][0], account)):
        assert row["held_bytes"] == total["budget_bytes"] - total["unassigned_bytes"]
        assert row["quota_bytes"] == 2 * MIB
        assert row["cached_bytes"] == 3 * STRIDE
    held = sum(row["held_bytes"] for row in everything["tenants"])
    whole = everything["accounting"]
    assert held == whole["budget_bytes"] - whole["unassigned_bytes"] == whole["os_bytes"]
    assert [row["uid"] for row in a("report", "clients")["clients"]] == [A]
    assert [row["uid"] for row in b("report", "clients")["clients"]] == [B]
    assert a("report", "sequences")["sequences"] == []
    assert len(b("report", "sequences")["sequences"]) == 1
    assert [a(name) for name in ("verify", "config", "reload")] == ["Forbidden"] * 3
    with raw_client(daemon) as root:
        assert root.verify()["ok"]


@needs_root
def test_kvctl_shows_each_tenant_to_an_administrator(daemon: Daemon, become: Any) -> None:
    become(A)("store", 0, 3, 1)
    command = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", str(daemon.runtime_dir)]
    shown = {
        name: subprocess.run([*command, name], capture_output=True, text=True, check=True).stdout
        for name in ("status", "clients")
    }
    (row,) = [line.split() for line in shown["status"].splitlines() if line.startswith("a ")]
    assert row[1:3] == ["2.0", "MiB"]
    assert "12.0 KiB" in " ".join(row), "three blocks are cached"
    (row,) = [line.split() for line in shown["clients"].splitlines() if line.startswith("raw")]
    assert row[2] == "a"


@needs_root
def test_who_has_no_session_is_told_nothing(daemon: Daemon) -> None:
    with raw_client(daemon) as root:
        stranger = root.connect(b"")
        try:
            reports = (Status(), ListSequences(), ListClients(), Verify())
            for message in (*reports, Config(), Reload()):
                stranger.send(codec.encode_request(1, message))
                assert stranger.poll(20_000)
                reply = codec.decode_reply(stranger.recv(), {1: type(message)})
                assert type(reply.body) is errors.UnknownSession
            stranger.send(codec.encode_request(1, Ping()))
            assert stranger.poll(20_000)
            assert isinstance(codec.decode_reply(stranger.recv(), {1: Ping}).body, Pong)
        finally:
            stranger.close()


@needs_root
def test_evict_is_for_ones_own_unless_one_administers(daemon: Daemon, become: Any) -> None:
    a, b = become(A), become(B)
    a("store", 0, 3, 1)
    b("store", 0, 5, 2)
    assert a("evict") == 3
    with raw_client(daemon) as root:
        assert root.call(Evict("", 0)).blocks == 5


@needs_root
def test_nobody_is_told_of_another_tenant_or_drops_anything_of_it(
    daemon: Daemon, become: Any
) -> None:
    """Whether it is cached, or was."""
    a, b = become(A), become(B)
    b("store", 90_000, 1, 2)
    nothing = b("explain", 0, 3)
    assert (nothing["matched_tokens"], nothing["missing"]["why"]) == (0, "not_known")
    a("store", 0, 3, 1)
    assert b("explain", 0, 3) == nothing, "it is cached"
    assert b("forget", 0, 3) == 0
    assert a("explain", 0, 3)["missing"] is None
    assert a("forget", 0, 3) == 3
    assert a("explain", 0, 3)["missing"]["reason"] == "command"
    assert b("explain", 0, 3) == nothing, "it was evicted"
    for order in ("explain", "forget"):
        assert b(order, 0, 3, "a") == b(order, 0, 3, "no such tenant") == "Forbidden"
    assert b("evict", "a") == b("evict", "no such tenant") == "Forbidden"


@needs_root
def test_an_administrator_explains_and_drops_what_is_another_tenants(
    daemon: Daemon, become: Any
) -> None:
    a, b = become(A), become(B)
    a("store", 0, 3, 1)
    b("store", 0, 5, 2)
    model = arena_fingerprint(FINGERPRINT, "llama-state", BLOCK_TOKENS)
    prompt = many_tokens(0, 5 * BLOCK_TOKENS)
    with raw_client(daemon) as root:
        report = root.call(Explain(model, prompt, "a", [])).report
        assert (report["tenant"], report["matched_tokens"]) == ("a", 3 * BLOCK_TOKENS)
        assert report["another_tenant"]
        assert not root.call(Explain(model, prompt, "b", [])).report["another_tenant"]
        assert root.call(Forget(model, prompt[: 4 * BLOCK_TOKENS], "a")).blocks == 3
        assert root.call(Evict("", 0, "b")).blocks == 5
    command = [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", str(daemon.runtime_dir)]
    both = subprocess.run(
        [*command, "explain", "--model", "model"], input="[1]", capture_output=True, text=True
    )
    assert (both.returncode, "say with --tenant which is meant, of a, b" in both.stderr) == (
        1,
        True,
    )
    asked = subprocess.run(
        [*command, "explain", "--model", "model", "--tenant", "b", "--json"],
        input=json.dumps([7]),
        capture_output=True,
        text=True,
    )
    assert json.loads(asked.stdout)["tenant"] == "b"


@needs_root
def test_a_quota_is_kept_and_named(daemon: Daemon, become: Any) -> None:
    a, b = become(A), become(B)
    b("store", 0, 20, 2)
    for first in range(0, 600_000, 10_000):  # 600 blocks: more than two MiB
        assert a("store", first, 10, 1)["right"]
    row = a("report", "status")["tenants"][0]
    assert row["quota_bytes"] - row["held_bytes"] < STRIDE
    assert a("report", "status")["counters"]["evicted_blocks"] > 0
    assert b("report", "status")["counters"]["evicted_blocks"] == 0
    assert a("reserve", 440) == "OverQuota"
    assert a("report", "status")["accounting"]["drift_bytes"] == 0
    with raw_client(daemon) as root:
        assert root.verify()["ok"]


@needs_root
def test_who_is_of_no_tenant_is_refused(daemon: Daemon, become: Any) -> None:
    code, message, details = become(NOBODYS, 63000, 64000).said
    assert code == "no_tenant"
    assert "list your uid" in message
    assert details == {"uid": NOBODYS, "gids": "63000,64000"}
    assert become(A).said > 0


@needs_root
def test_a_staging_is_granted_that_leaves_the_tenant_room(daemon: Daemon) -> None:
    with raw_client(daemon, staging_bytes=64 * MIB) as root:
        assert root.staging is not None
        assert len(root.staging) == 4 * MIB + 4096


@needs_root
def test_salts_are_nowhere(daemon: Daemon, become: Any) -> None:
    """Not in reports, the log, errors or shared memory."""
    a, b = become(A), become(B)
    a("store", 0, 3, 1)
    b("store", 0, 3, 1)
    become(NOBODYS)
    places = [daemon.log.read_bytes()]
    for name in daemon.segments():
        with open(f"/dev/shm/{name}", "rb") as segment:
            places.append(segment.read(1 << 20))
    for user in (a, b):
        for kind in ("status", "sequences", "clients"):
            places.append(json.dumps(user("report", kind)).encode())  # noqa: PERF401
    with raw_client(daemon) as root:
        places.append(json.dumps([root.status(), root.verify()]).encode())
    assert any(b"team" in place or b"tenant" in place for place in places)
    for salt in (SALT_A, SALT_B):
        assert not any(salt.encode() in place for place in places)
        assert not any(salt[:12].encode() in place for place in places)


CONFIGURED = f'[tenants.mine]\nuids = [{os.geteuid()}]\nsalt = "{SALT_A}"\nquota = "4MiB"\n'


@pytest.mark.parametrize(
    ("then", "matched"),
    [
        (CONFIGURED, 245 * BLOCK_TOKENS),
        (CONFIGURED.replace("4MiB", "8MiB"), 245 * BLOCK_TOKENS),
        (CONFIGURED.replace("mine", "renamed"), 0),
        (CONFIGURED.replace(SALT_A, SALT_B), 0),
        ("", 0),
    ],
    ids=["same", "more quota", "renamed", "another salt", "no tenants"],
)
def test_a_restart_keeps_what_is_still_the_tenants(tmp_path: Path, then: str, matched: int) -> None:
    config = tmp_path / "kvd.toml"
    config.write_text(CONFIGURED)
    config.chmod(0o600)
    flags = ("--max-memory", "16MiB", "--config", str(config))
    tokens = many_tokens(0, 245 * BLOCK_TOKENS)
    before = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    with raw_client(before, staging_bytes=MIB) as client:
        context = client.open()
        client.release(context, client.store(context, tokens))
        before.kill()
    config.write_text(then)
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt", instance=before.instance) as after,
        raw_client(after) as client,
    ):
        assert client.alloc(client.open(), tokens).matched_tokens == matched
        until(lambda: client.status()["recovery"]["unchecked_blocks"] == 0)
        report = client.verify()
        assert report["ok"], report["differences"]
        for table in client.status()["tenants"]:
            assert table["held_bytes"] <= table["quota_bytes"]


def test_a_daemon_smaller_than_the_usual_staging_welcomes_a_client(tmp_path: Path) -> None:
    with (
        running_daemon("--max-memory", "16MiB", runtime_dir=tmp_path / "rt") as small,
        kvd_client.connect(small.runtime_dir) as client,
    ):
        assert client.staging_bytes == 64 * MIB
        assert client.staging_room == 4 * MIB


def test_a_restart_with_less_quota_evicts_what_is_too_much(tmp_path: Path) -> None:
    config = tmp_path / "kvd.toml"
    config.write_text(CONFIGURED)
    config.chmod(0o600)
    flags = ("--max-memory", "16MiB", "--config", str(config))
    tokens = many_tokens(0, 245 * BLOCK_TOKENS)
    before = start_daemon(*flags, runtime_dir=tmp_path / "rt")
    with raw_client(before, staging_bytes=MIB) as client:
        context = client.open()
        client.release(context, client.store(context, tokens))
        before.kill()
    config.write_text(CONFIGURED.replace("4MiB", "1MiB"))
    with (
        running_daemon(*flags, runtime_dir=tmp_path / "rt", instance=before.instance) as after,
        raw_client(after) as client,
    ):

        def quota() -> int:
            (row,) = [each for each in client.status()["tenants"] if each["name"] == "mine"]
            assert row["held_bytes"] <= row["quota_bytes"]
            return int(row["quota_bytes"])

        until(lambda: quota() == MIB)
        assert 0 < client.alloc(client.open(), tokens).matched_tokens < MIB // STRIDE * BLOCK_TOKENS
        report = client.verify()
        assert report["ok"], report["differences"]
