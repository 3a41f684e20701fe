"""Two processes of llama-cpp-python's example server, the real script, with SmolLM2."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.serving import ServerFailed, example_command, script_path
from kvd_client.client import Client
from kvd_client.integrations.llama.runtime.model import LlamaModel
from kvd_client.integrations.llama.worker import LlamaWorker
from kvd_client.integrations.llama_example_server import load_script, put_cache_into
from tests.e2e.example_servers import OPTIONS, ExampleServer, example_server
from tests.llama import tiny_models
from tests.support import Daemon, running_daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TEXT = (
    "The lighthouse keeper wrote down the weather every evening, as his father had done before "
    "him, and sent the book to the harbour master at the end of each year. "
)


@pytest.fixture(scope="module")
def words(smollm2: Path) -> Iterator[LlamaModel]:
    with LlamaModel(smollm2) as model:
        yield model


@pytest.fixture(scope="module")
def pair(
    daemon: Daemon, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ExampleServer, ExampleServer]]:
    """Two processes on one daemon. With so few sequences that idle ones must go for a match."""
    directory = tmp_path_factory.mktemp("servers")
    with (
        example_server(directory, smollm2, daemon.runtime_dir, n_seq_max=2) as one,
        example_server(directory, smollm2, daemon.runtime_dir, n_seq_max=2) as other,
    ):
        yield one, other


def tokens_of(words: LlamaModel, text: str) -> list[int]:
    return [int(token) for token in words.tokenize(text)]


def generated(words: LlamaModel, choice: dict[str, Any]) -> list[int]:
    """The ids of the tokens of an answer, which tells their texts only."""
    ids = {words.detokenize([token], special=True): token for token in range(words.n_vocab)}
    assert choice["finish_reason"] == "length"
    return [ids[text] for text in choice["logprobs"]["tokens"]]


def common(one: list[int], other: list[int]) -> int:
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))


def test_each_turn_of_a_chat_decodes_only_what_is_new(
    pair: tuple[ExampleServer, ExampleServer], words: LlamaModel
) -> None:
    """Ten turns, each in the other process than the one before, which alone has its answer."""
    text = "A conversation about lighthouses. " + 3 * TEXT
    known: list[int] = []
    previous: list[int] = []
    for turn in range(10):
        server = pair[turn % 2]
        text += f"\n\nUser: What about year {turn * 37}?\n\nAssistant:"
        prompt = tokens_of(words, text)
        before = server.metrics()
        choice = server.complete(text, 20, logprobs=1)
        after = server.metrics()
        decoded = after["llamacpp:prompt_tokens_total"] - before["llamacpp:prompt_tokens_total"]
        shared = common(prompt, known)
        assert decoded == len(prompt) - shared, f"turn {turn}: {shared} of {len(prompt)} known"
        if turn:
            # More than the prompt of the turn before: its answer, too.
            assert shared > len(previous)
            name = "batch_server:sequence_cache_tokens_loaded_total"
            assert after[name] - before[name] == shared
        previous = prompt
        known = prompt + generated(words, choice)
        text += choice["text"]
    for server in pair:
        failures = {k: v for k, v in server.metrics().items() if "cache" in k and "fail" in k}
        assert len(failures) == 3
        assert not any(failures.values())


def test_a_prompt_that_shares_900_tokens_decodes_the_other_16(
    pair: tuple[ExampleServer, ExampleServer], words: LlamaModel
) -> None:
    one, other = pair
    document = tokens_of(words, "A document. " + 40 * TEXT)[:900]
    random = np.random.default_rng(3)
    first, second = ([*document, *random.integers(500, 40_000, 16).tolist()] for _ in range(2))
    one.complete(first, 1)
    before = other.decoded()
    other.complete(second, 1)
    assert other.decoded() - before == 16


def test_a_prompt_is_saved_behind_its_first_token(
    daemon: Daemon, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, in place of uvicorn: what its one scheduler thread does is in order."""
    script = load_script(script_path())
    put_cache_into(script, 32, runtime_dir=daemon.runtime_dir, timeout=10)
    happened: list[str] = []

    def ask(app: Any, **_: Any) -> None:
        service = app.state.service
        save = service.scheduler.sequence_cache.save

        def note_and_save(*given: Any) -> None:
            happened.append("saved")
            save(*given)

        service.scheduler.sequence_cache.save = note_and_save
        request = service.request_from_payload(
            script.CreateCompletionRequest(
                prompt="Who is told first? " + TEXT, max_tokens=3, temperature=0.0, stream=True
            )
        )
        ended = threading.Event()
        request.on_stream_chunk = lambda _: happened.append("told")
        request.on_done = request.on_error = lambda _: ended.set()
        service.enqueue(lambda: service.scheduler.submit_request(request))
        assert ended.wait(60)

    config = tmp_path / "config.json"
    example_command(config, smollm2, None, **OPTIONS)
    monkeypatch.setattr(sys, "argv", ["server.py", "-C", str(config)])
    monkeypatch.setattr(script.uvicorn, "run", ask)
    script.main()
    assert happened[:2] == ["told", "saved"]
    assert happened.count("saved") == 2, "the prompt, and with its completion"


def test_whatever_a_lookup_raises_the_one_thread_goes_on(
    daemon: Daemon, smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load_script(script_path())
    put_cache_into(script, 32, runtime_dir=daemon.runtime_dir, timeout=10)
    done: list[bool] = []

    def ask(app: Any, **_: Any) -> None:
        service = app.state.service

        def fails(_: Any) -> None:
            raise OSError("out of something")

        for number in range(2):  # the second one finds an idle sequence, which might go
            request = service.request_from_payload(
                script.CreateCompletionRequest(prompt=f"{number} " + TEXT, max_tokens=2)
            )
            ended = threading.Event()
            request.on_done = lambda _, ended=ended: ended.set()
            service.enqueue(lambda request=request: service.scheduler.submit_request(request))
            done.append(ended.wait(60 if not number else 10))
            service.scheduler.sequence_cache.lookup = fails

    config = tmp_path / "config.json"
    example_command(config, smollm2, None, **OPTIONS)
    monkeypatch.setattr(sys, "argv", ["server.py", "-C", str(config)])
    monkeypatch.setattr(script.uvicorn, "run", ask)
    script.main()
    assert done == [True, True]


def test_a_prompt_that_asks_for_no_tokens_is_saved(
    pair: tuple[ExampleServer, ExampleServer], words: LlamaModel
) -> None:
    prompt = tokens_of(words, "Only to be known. " + 2 * TEXT)
    pair[0].complete(prompt, 0)
    before = pair[1].decoded()
    pair[1].complete([*prompt, 30], 1)
    assert pair[1].decoded() - before == 1


def test_a_worker_with_the_same_parameters_shares_with_it(
    daemon: Daemon, smollm2: Path, pair: tuple[ExampleServer, ExampleServer], words: LlamaModel
) -> None:
    prompt = tokens_of(words, "Together. " + 2 * TEXT)
    pair[0].complete(prompt, 1)
    with LlamaWorker(
        smollm2, runtime_dir=daemon.runtime_dir, timeout=10, n_ctx=1024, n_threads=1
    ) as worker:
        with worker.open(np.array(prompt)) as sequence:
            assert sequence.matched_tokens == len(prompt) - 1
        longer = tokens_of(words, "Apart. " + 2 * TEXT)
        with worker.open(np.array(longer)) as sequence:
            sequence.prefill()
        worker.client.flush()
    before = pair[1].decoded()
    pair[1].complete([*longer, 30], 1)
    assert pair[1].decoded() - before == 1


def test_what_it_says_is_what_the_script_says(
    daemon: Daemon,
    smollm2: Path,
    pair: tuple[ExampleServer, ExampleServer],
    tmp_path: Path,
) -> None:
    """Of a prompt that is cached nowhere: the same batches, so the same text."""
    prompt = "Nobody has asked this before. " + TEXT
    with example_server(tmp_path, smollm2, None, n_seq_max=2) as plain:
        expected = plain.complete(prompt, 30)
    found = pair[0].complete(prompt, 30)
    assert found["text"] == expected["text"]


def test_many_requests_at_once_are_all_answered(
    pair: tuple[ExampleServer, ExampleServer], words: LlamaModel
) -> None:
    """More than there are sequences, with a beginning in common, some given up in the middle."""
    common_text = "All at once. " + TEXT
    done = [0, 0]

    def ask(number: int) -> int:
        server = pair[number % 2]
        choice = server.complete(f"{common_text} Number {number} says", 6)
        return len(choice["text"])

    def give_up(number: int) -> None:
        body = {"prompt": f"{common_text} Leave {number}", "max_tokens": 200, "stream": True}
        request = urllib.request.Request(
            pair[number % 2].url + "/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=100) as answer:
            answer.readline()
            done[number % 2] += 1

    with ThreadPoolExecutor(12) as pool:
        given_up = [pool.submit(give_up, number) for number in range(4)]
        asked = [pool.submit(ask, number) for number in range(8)]
        assert all(each.result() for each in asked)
        for each in given_up:
            each.result()
    assert done == [2, 2]
    for server in pair:
        failures = {k: v for k, v in server.metrics().items() if "cache" in k and "fail" in k}
        assert not any(failures.values())


def test_nothing_is_left_leased(daemon: Daemon, pair: tuple[ExampleServer, ExampleServer]) -> None:
    pair[0].complete("Something to do. " + TEXT, 4)
    with Client(daemon.runtime_dir) as client:
        wait_until(lambda: client.status()["sequences"]["in_use"] == 0)
        client.flush()
        assert client.verify()["ok"]


def test_the_daemon_may_die_and_come_back(smollm2: Path, tmp_path: Path) -> None:
    runtime_dir = tmp_path / "kvd"
    prompt = "The daemon is not needed. " + TEXT
    with (
        running_daemon(runtime_dir=runtime_dir) as daemon,
        example_server(tmp_path, smollm2, runtime_dir) as server,
        example_server(tmp_path, smollm2, runtime_dir) as other,
    ):
        first = server.complete(prompt, 10)["text"]
        saved = server.metrics()["batch_server:sequence_cache_save_requests_total"]
        assert saved == 2, "the prompt, and the answer"
        daemon.kill()
        # Its own idle sequence has this prompt; and it has none of that.
        assert server.complete(prompt, 10)["text"] == first
        assert server.complete("Nothing of this is known. " + TEXT, 10)["text"]
        assert other.complete(prompt, 10)["text"] == first
        # For nobody no state is copied out of the context.
        assert server.metrics()["batch_server:sequence_cache_save_requests_total"] == saved
        with running_daemon(runtime_dir=runtime_dir, instance=daemon.instance):
            asked = iter(range(1000))

            def is_shared() -> bool:
                again = f"Back again {next(asked)}. " + TEXT
                server.complete(again, 1)
                before = other.decoded()
                other.complete(again + "So be it", 1)
                return other.decoded() - before < 10

            wait_until(is_shared)


UNSHAREABLE = pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_unified": False, "n_ctx": 1024}, "set kv_unified to true"),
        ({"kv_overrides": {"llama.rope.freq_base": 5000.0}}, "kv_overrides"),
    ],
)


@UNSHAREABLE
def test_what_cannot_be_shared_is_served_by_the_script_as_it_is(
    daemon: Daemon, smollm2: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    """With the disk cache that it was asked for; and nothing of it is in the daemon."""
    folder = tmp_path / "cache"
    with (
        Client(daemon.runtime_dir) as client,
        example_server(
            tmp_path, smollm2, daemon.runtime_dir, disk_cache=folder, **options
        ) as server,
    ):
        assert len(server.complete("Served all the same. " + TEXT, 3)["text"]) > 0
        (warning,) = [line for line in server.said.splitlines() if line.startswith("WARNING:")]
        assert re.search(f"{smollm2.name} is served without sharing: .*{said}", warning)
        assert server.process.pid not in [row["pid"] for row in client.clients()]
        assert folder.is_dir()


def test_a_daemon_without_room_does_not_keep_the_script_from_serving(
    smollm2: Path, tmp_path: Path
) -> None:
    runtime_dir = tmp_path / "kvd"
    with (
        running_daemon("--max-memory", "1MiB", runtime_dir=runtime_dir),
        example_server(tmp_path, smollm2, runtime_dir, flags=("--block-tokens", "64")) as server,
    ):
        assert len(server.complete("Served all the same. " + TEXT, 3)["text"]) > 0
        assert "is served without sharing: " in server.said


@UNSHAREABLE
def test_what_cannot_be_shared_is_refused_if_that_is_required(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    model = tiny_models.write_llama(tmp_path / "llama.gguf")
    with (
        pytest.raises(ServerFailed, match=f"llama_example_server: .*{said}"),
        example_server(
            tmp_path, model, tmp_path / "kvd", flags=("--require-shareable",), **options
        ),
    ):
        pass


def test_another_script_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "server.py"
    other.write_text("def main() -> None: ...\n")
    needs = tmp_path / "needs.py"
    needs.write_text("import no_such_package\n")
    for path, said in [
        (other, "has no Model"),
        (tmp_path / "none.py", "not a Python file"),
        (needs, "pip install fastapi uvicorn openai"),
    ]:
        command = [sys.executable, "-m", "kvd_client.integrations.llama_example_server"]
        result = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
        assert result.returncode == 1
        assert said in result.stderr


def test_its_disk_cache_is_not_used(daemon: Daemon, smollm2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with example_server(tmp_path, smollm2, daemon.runtime_dir, disk_cache=folder) as server:
        server.complete("On disk or not. " + 4 * TEXT, 1)
        assert "kvd takes its place" in server.said
    assert not folder.exists()


def test_the_example_configuration_serves_a_chat(
    daemon: Daemon, smollm2: Path, tmp_path: Path
) -> None:
    """As it stands in examples/, but for the port and the model's path."""
    config = json.loads((EXAMPLES / "llama_example_server.json").read_text())
    assert config["model"].pop("path") == "model.gguf"
    (tmp_path / "model.gguf").symlink_to(smollm2)
    messages = [{"role": "user", "content": "Who was here? " + TEXT}]
    with example_server(
        tmp_path, tmp_path / "model.gguf", daemon.runtime_dir, **config["model"]
    ) as server:
        answer = server.ask("/v1/chat/completions", messages=messages, max_tokens=8)
        messages.append(answer["choices"][0]["message"])
        messages.append({"role": "user", "content": "And then?"})
    with example_server(
        tmp_path, tmp_path / "model.gguf", daemon.runtime_dir, **config["model"]
    ) as server:
        answer = server.ask("/v1/chat/completions", messages=messages, max_tokens=8)
        assert server.decoded() < answer["usage"]["prompt_tokens"] // 2


def test_the_script_is_not_in_the_tree() -> None:
    assert not script_path().resolve().is_relative_to(Path(__file__).resolve().parents[1])


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in 60 s"
        time.sleep(0.05)
