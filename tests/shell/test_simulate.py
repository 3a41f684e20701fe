"""`kvd simulate`: its figures beside those of caches that are written here in a few lines, and what
it says of traces and capacities that are none.
"""

import json
import pty
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import product
from os import close, read
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvd.optimum import most_hits
from kvd.replay import Replay
from kvd.simulate import simulate
from kvd.trace import Trace, parse
from tests.core.driver import packed

Request = tuple[int, ...]


def conversations(seed: int, n_requests: int) -> list[Request]:
    """Prompts of a chat: some begin anew, below one of a few system prompts, the others go on."""
    random = Random(seed)
    fresh = iter(range(1000, 1 << 30))
    systems = [tuple(range(100 * n, 100 * n + random.randint(1, 5))) for n in range(4)]
    chats = list(systems)
    requests: list[Request] = []
    for _ in range(n_requests):
        chat = random.choice(systems if random.random() < 0.3 else chats[-20:])
        chats.append(chat + tuple(next(fresh) for _ in range(random.randint(1, 8))))
        requests.append(chats[-1])
    return requests


def lines_of(requests: Sequence[Sequence[Any]]) -> list[bytes]:
    return [json.dumps({"hash_ids": list(request)}).encode() + b"\n" for request in requests]


def trace_of(requests: Sequence[Request]) -> Trace:
    return parse(lines_of(requests), "trace")


def lru_hits(requests: Sequence[Request], n_blocks: int) -> tuple[int, int]:
    """Hits and evictions of an LRU of prefixes, said as simply as possible."""
    cached: OrderedDict[Request, None] = OrderedDict()
    hits = evictions = 0
    for request in requests:
        prefixes = [request[: n + 1] for n in range(min(len(request), n_blocks))]
        n_hit = next((n for n, each in enumerate(prefixes) if each not in cached), len(prefixes))
        hits += n_hit
        for prefix in prefixes[:n_hit]:
            del cached[prefix]  # leased
        n_over = len(cached) + len(prefixes) - n_blocks
        for _ in range(n_over):
            cached.popitem(last=False)
            evictions += 1
        cached.update(dict.fromkeys(reversed(prefixes)))
    return hits, evictions


@cache
def best(references: Request, n_blocks: int, held: frozenset[int] = frozenset()) -> int:
    """The most hits that are possible at all: every choice is tried."""
    if not references:
        return 0
    block, rest = references[0], references[1:]
    if block in held:
        return 1 + best(rest, n_blocks, held)
    ways = [best(rest, n_blocks, held)]
    if len(held) < n_blocks:
        ways.append(best(rest, n_blocks, held | {block}))
    ways += [best(rest, n_blocks, held - {other} | {block}) for other in held]
    return max(ways)


@pytest.mark.parametrize("n_blocks", [5, 40, 150, 400])
@pytest.mark.parametrize("seed", range(3))
def test_hits_are_those_of_a_plain_lru(seed: int, n_blocks: int) -> None:
    """Also of requests that are longer than the cache."""
    requests = conversations(seed, 400)
    assert max(map(len, requests)) > 40
    outcome = simulate(trace_of(requests), "some", n_blocks)
    assert (outcome.hits, outcome.evicted) == lru_hits(requests, n_blocks)
    assert 0 < outcome.hits <= outcome.most_hits


def test_a_cache_of_everything_hits_all_that_came_before() -> None:
    requests = conversations(7, 200)
    trace = trace_of(requests)
    outcome = simulate(trace, "100%", trace.n_blocks)
    assert outcome.hits == outcome.most_hits == len(trace.references) - trace.n_blocks
    assert outcome.evicted == 0


@pytest.mark.parametrize("n_blocks", [1, 2, 100, 5000])
def test_exactly_so_many_blocks_fit_a_replay(n_blocks: int) -> None:
    replay = Replay(n_blocks)
    for number in range(n_blocks):
        assert replay.request(packed(number)) == 0
    assert (replay.arena.cached, replay.evicted_blocks) == (n_blocks, 0)
    assert replay.request(packed(n_blocks)) == 0
    assert (replay.arena.cached, replay.evicted_blocks) == (n_blocks, 1)
    assert replay.request(packed(n_blocks)) == 1
    assert replay.request(packed(0)) == 0, "the oldest went"


def test_belady_is_the_best_of_all_choices() -> None:
    for references in product(range(3), repeat=7):
        for n_blocks in (1, 2):
            assert most_hits(references, n_blocks) == best(references, n_blocks)
    random = Random(1)
    for _ in range(150):
        some = tuple(random.choices(range(5), k=11))
        for n_blocks in (1, 2, 3, 4):
            assert most_hits(some, n_blocks) == best(some, n_blocks)
    best.cache_clear()


def test_a_block_is_its_id_and_all_before_it() -> None:
    trace = trace_of([(1, 2), (3, 2), (1, 2, 2), ()])
    assert trace == Trace([[0, 1], [2, 3], [0, 1, 4], []], 5)
    assert parse(lines_of([("a", "b"), ("a", 1)]), "") == Trace([[0, 1], [0, 2]], 3)


# --- the command


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "kvd", "simulate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(lines_of(conversations(1, 300))))
    return path


def test_the_report_says_what_was_simulated(file: Path) -> None:
    requests = conversations(1, 300)
    done = run(file, "--capacity", "10%,64,1MiB", "--block-bytes", "10KiB", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    n_references = sum(map(len, requests))
    n_different = trace_of(requests).n_blocks
    assert report["requests"] == 300
    assert (report["blocks"], report["different_blocks"]) == (n_references, n_different)
    blocks = [each["blocks"] for each in report["capacities"]]
    assert blocks == [n_different // 10, 64, 102]
    for each in report["capacities"]:
        assert (each["hits"], each["evicted"]) == lru_hits(requests, each["blocks"])
        assert each["hit_rate"] == each["hits"] / n_references
        assert each["most_hit_rate"] == each["most_hits"] / n_references


def test_the_command_of_the_readme_runs(file: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (command,) = re.findall(r"^kvd simulate (.*)$", readme, re.MULTILINE)
    done = run(*command.replace("trace.jsonl", str(file)).split())
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 8)


def test_the_table_fits_a_terminal(file: Path) -> None:
    done = run(file, "--capacity", "64")
    first, _, blank, head, row = done.stdout.splitlines()
    assert first.startswith("300 requests for ")
    assert (blank, head.split()[0]) == ("", "capacity")
    hits, _ = lru_hits(conversations(1, 300), 64)
    rate = 100 * hits / sum(map(len, conversations(1, 300)))
    assert row.split()[:4] == ["64", "64", f"{rate:.1f}", "%"]
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_progress_is_for_terminals(file: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "kvd", "simulate", str(file), "--capacity", "64"]
    subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, timeout=120, check=True)
    close(follower)
    assert b"capacity 64: 0 % replayed" in read(leader, 4096)
    close(leader)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "trace.jsonl: there are no blocks in it"),
        (b'\n{"hash_ids": []}\n', "trace.jsonl: there are no blocks in it"),
        (b'{"hash_ids": [1]}\n\n{"hash_ids": [1\n', "trace.jsonl, line 3: it is not JSON"),
        (b"\xff\n", "trace.jsonl, line 1: it is not JSON"),
        (b"[" * 100_000 + b"\n", "trace.jsonl, line 1: it is not JSON"),
        (b'{"hash_ids": [1]}\n[1]\n', 'trace.jsonl, line 2: it is not an object with "hash_ids"'),
        (b'{"ids": [1]}\n', 'trace.jsonl, line 1: it is not an object with "hash_ids"'),
        (b'{"hash_ids": [1, true]}\n', 'trace.jsonl, line 1: it is not an object with "hash_ids"'),
        (b'{"hash_ids": [1, 2.5]}\n', 'trace.jsonl, line 1: it is not an object with "hash_ids"'),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(content)
    done = run(path)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_request_that_is_too_long_for_a_prompt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(b"".join(lines_of([(1,), (1,) * ((1 << 20) + 1)])))
    done = run(path)
    assert done.returncode == 2
    assert "line 2: it has 1,048,577 blocks; 1,048,576 are the most" in done.stderr


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = run(tmp_path / "none.jsonl")
    assert done.returncode == 2
    assert done.stderr == f"kvd: {tmp_path}/none.jsonl cannot be read: No such file or directory\n"


@pytest.mark.parametrize(
    ("capacity", "says"),
    [
        ("0%", "--capacity 0%: not even one block fits"),
        ("0.0001%", "--capacity 0.0001%: not even one block fits"),
        ("0", "--capacity 0: not even one block fits"),
        ("5%,", "--capacity : it is no size, like 4GiB, no number of blocks and no part, like 5%"),
        ("many", "--capacity many: it is no size"),
        ("-5", "--capacity -5: it is no size"),
        ("4GiB", "--capacity 4GiB: a size needs --block-bytes"),
    ],
)
def test_a_bad_capacity_is_refused(file: Path, capacity: str, says: str) -> None:
    done = run(file, "--capacity", capacity)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_bytes_of_a_block_must_be_a_size(file: Path) -> None:
    done = run(file, "--capacity", "4GiB", "--block-bytes", "0")
    assert (done.returncode, done.stderr) == (2, "kvd: --block-bytes 0: it is no size, like 4GiB\n")
