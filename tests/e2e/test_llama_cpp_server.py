"""`kvd_client.integrations.llama_cpp_server` in several processes, and `openai` asks them.

Which Llama shares, and what of its settings is changed, is in tests/llama.
"""

import contextlib
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import llama_cpp.llama_chat_format as chat_format
import openai
import pytest

import kvd_client
from bench.serving import Server
from kvd_client.integrations.llama.runtime.model import LlamaModel
from tests.e2e.servers import running_server
from tests.support import Daemon, running_daemon

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

MODULE = "kvd_client.integrations.llama_cpp_server"
ROOT = Path(__file__).resolve().parents[2]
MATCHED = re.compile(r"matched (\d+) of (\d+) tokens")
PATIENT = "10"
"""Seconds: tests that are not about outages must not see one on a busy machine."""
FLAGS = ("--chat_format", "chatml", "--n_threads", "1", "--verbose", "false")


class Match(NamedTuple):
    """What a server said of a request, in tokens of its prompt."""

    matched: int
    prompt: int


class Asked(NamedTuple):
    """An answer of a server: the text of each token, and why it ended."""

    pieces: list[str]
    end: str

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@pytest.fixture(scope="module")
def vocabulary(smollm2: Path) -> Iterator[LlamaModel]:
    with LlamaModel(smollm2) as model:
        yield model


def sharing(model: Path, runtime_dir: Path, *flags: str, timeout: str = PATIENT) -> tuple[str, ...]:
    ours = ("--kvd-runtime-dir", str(runtime_dir), "--kvd-timeout", timeout)
    return ("--model", str(model), *FLAGS, *ours, *flags)


ClientOf = Callable[[Server], openai.OpenAI]


@pytest.fixture
def client_of() -> Iterator[ClientOf]:
    """Of each server one client, which is closed."""
    with contextlib.ExitStack() as opened:

        @functools.cache
        def of(server: Server) -> openai.OpenAI:
            url = f"{server.url}/v1"
            made = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
            return opened.enter_context(made)

        yield of


def matches(server: Server, n: int) -> list[Match]:
    """What the server says of its first `n` requests."""
    return [Match(int(m[1]), int(m[2])) for m in server.wait_for(MATCHED, n)]


def ask(client: openai.OpenAI, messages: list[dict[str, str]], max_tokens: int) -> Asked:
    """Stream an answer: of greedy text one chunk is one token."""
    pieces, end = [], ""
    with client.chat.completions.create(
        model="any", messages=messages, max_tokens=max_tokens, temperature=0, stream=True
    ) as stream:
        for chunk in stream:
            (choice,) = chunk.choices
            if choice.delta.content is not None:
                pieces.append(choice.delta.content)
            end = choice.finish_reason or end
    return Asked([piece for piece in pieces if piece], end)


def prompt_of(vocabulary: LlamaModel, messages: list[dict[str, str]]) -> list[int]:
    """The tokens that the server makes of a chat."""
    text = chat_format.format_chatml(messages).prompt
    return vocabulary.tokenize(text, add_special=True).tolist()


def common_prefix(one: list[int], other: list[int]) -> int:
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n


def document(n_words: int, seed: int) -> str:
    """Text that no other test sends."""
    words = ("river", "stone", "window", "paper", "garden", "metal", "letter", "music", "road")
    return " ".join(f"{words[(i * i + seed) % 9]} {(i * 7 + seed) % 83}" for i in range(n_words))


def test_a_growing_chat_goes_from_server_to_server(
    client_of: ClientOf, daemon: Daemon, smollm2: Path, vocabulary: LlamaModel, tmp_path: Path
) -> None:
    """Each turn decodes what follows the longest prefix that any turn before it decoded."""
    token_of = {vocabulary.detokenize([token]): token for token in range(vocabulary.n_vocab)}
    flags = sharing(smollm2, daemon.runtime_dir)
    with (
        running_server(MODULE, *flags, directory=tmp_path) as one,
        running_server(MODULE, *flags, directory=tmp_path) as other,
    ):
        messages = [{"role": "system", "content": document(60, seed=1)}]
        decoded: list[list[int]] = []
        expected = {one: [], other: []}
        for turn in range(10):
            server = (one, other)[turn % 2]
            messages.append({"role": "user", "content": f"{turn}. {document(4, seed=turn)}?"})
            prompt = prompt_of(vocabulary, messages)
            known = max((common_prefix(prompt, before) for before in decoded), default=0)
            expected[server].append(Match(known, len(prompt)))
            answer = ask(client_of(server), messages, max_tokens=8)
            tokens = [token_of[piece] for piece in answer.pieces]
            # The last token of a text that was cut off is never decoded.
            decoded.append(prompt + (tokens if answer.end == "stop" else tokens[:-1]))
            messages.append({"role": "assistant", "content": answer.text})
            assert matches(server, turn // 2 + 1) == expected[server]
        assert all(found.matched > 100 for found in expected[one][1:] + expected[other])


def test_another_process_decodes_what_the_first_has_not(
    client_of: ClientOf, daemon: Daemon, smollm2: Path, vocabulary: LlamaModel, tmp_path: Path
) -> None:
    flags = sharing(smollm2, daemon.runtime_dir)
    shared = vocabulary.detokenize(vocabulary.tokenize(document(600, seed=2))[:900])
    first = [{"role": "user", "content": f"{shared} What is the first word of this?"}]
    second = [{"role": "user", "content": f"{shared} Name all numbers that are in it."}]
    common = common_prefix(prompt_of(vocabulary, first), prompt_of(vocabulary, second))
    with (
        running_server(MODULE, *flags, directory=tmp_path) as one,
        running_server(MODULE, *flags, directory=tmp_path) as other,
    ):
        client_of(one).chat.completions.create(model="any", messages=first, max_tokens=2)
        done = client_of(other).chat.completions.create(model="any", messages=second, max_tokens=2)
        assert done.usage is not None
        assert common > 900
        assert matches(other, 1) == [Match(common, done.usage.prompt_tokens)]
        assert 15 * (done.usage.prompt_tokens - common) < done.usage.prompt_tokens


def test_the_daemon_dies_while_a_request_runs(
    client_of: ClientOf, smollm2: Path, tmp_path: Path
) -> None:
    """It is answered to its end, as are those after it; and the next daemon is found."""
    one, other = ([{"role": "user", "content": document(40, seed=seed)}] for seed in (3, 30))
    runtime_dir = tmp_path / "run"
    memory = ("--max-memory", "256MiB")
    with (
        running_daemon(*memory, runtime_dir=runtime_dir) as daemon,
        running_server(MODULE, *sharing(smollm2, runtime_dir), directory=tmp_path) as server,
    ):
        client = client_of(server)
        whole = ask(client, one, max_tokens=40)
        pieces = []
        with client.chat.completions.create(
            model="any", messages=one, max_tokens=40, temperature=0, stream=True
        ) as stream:
            for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
                if len(pieces) == 5:
                    daemon.kill()
        assert "".join(pieces) == whole.text
        assert ask(client, other, max_tokens=4).pieces
        n_asked = 3
        with running_daemon(*memory, runtime_dir=runtime_dir, instance=daemon.instance):
            deadline = time.monotonic() + 30
            # In turn: what the server's own context still has of the one before is no match.
            for messages in itertools.cycle((one, other)):
                ask(client, messages, max_tokens=2)
                n_asked += 1
                matched, prompt = matches(server, n_asked)[-1]
                if matched == prompt - 1:
                    break
                assert time.monotonic() < deadline, "it did not come back in 30 s"


def test_without_a_daemon_requests_are_answered(
    client_of: ClientOf, smollm2: Path, tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Say hello."}]
    flags = sharing(smollm2, tmp_path / "nobody", timeout="0.05")
    with running_server(MODULE, *flags, directory=tmp_path) as server:
        assert ask(client_of(server), messages, max_tokens=4).pieces
        assert matches(server, 1)[0].matched == 0
        assert server.stop() == -15, "it ends as the plain server does"


def test_the_example_of_settings_serves_two_models_one_after_another(
    client_of: ClientOf, daemon: Daemon, smollm2: Path, tmp_path: Path
) -> None:
    """One cache for both, and the daemon knows of the one that is loaded."""
    (tmp_path / "model.gguf").symlink_to(smollm2)
    messages = [{"role": "user", "content": document(40, seed=4)}]
    file = ROOT / "examples" / "llama_cpp_server.yaml"
    environ = {"PORT": "0", "KVD_RUNTIME_DIR": str(daemon.runtime_dir)}
    flags = ("--config_file", str(file), "--kvd-timeout", PATIENT)
    with (
        running_server(MODULE, *flags, directory=tmp_path, environ=environ) as server,
        kvd_client.connect(daemon.runtime_dir) as watcher,
    ):
        client = client_of(server)
        assert [model.id for model in client.models.list()] == ["chat", "documents"]
        for number, alias in enumerate(("chat", "documents", "chat"), 1):
            client.chat.completions.create(model=alias, messages=messages, max_tokens=2)
            matched, prompt = matches(server, number)[-1]
            assert matched < 10 if number == 1 else matched == prompt - 1
            assert [row["pid"] for row in watcher.clients()].count(server.process.pid) == 1
            assert len(watcher.sequences()) <= 1
