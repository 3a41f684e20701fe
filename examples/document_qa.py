"""Several processes answer questions about one document of several pages, and read it once.

    python examples/document_qa.py model.gguf
    python examples/document_qa.py model.gguf --document report.txt -q "Who wrote it?" -q "When?"

Each question goes to the next process. Whoever comes first computes the document's K/V; the others
find it in the cache, and decode only their question. Each question is asked once more without
kvd, to compare. All that concerns kvd is in `work`: `connect`, and the block of `share`.
"""

import argparse
import multiprocessing
import pydoc_data.topics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from llama_cpp import Llama

import kvd_client
from kvd_client.integrations.llama import share

QUESTIONS = ("What is a block?", "What is a free variable?", "What does global do?")
"""About the default document, which comes with Python: on names, of its language reference."""


class Row(NamedTuple):
    """One question: tokens of its prompt, and seconds to the first token of its answer."""

    answer: str
    tokens: int
    cached_tokens: int
    seconds: float
    seconds_without: float


def work(pipe: Connection, options: argparse.Namespace, document: str) -> None:
    """A worker process: answers each question that comes through the pipe."""
    llama = Llama(options.model, n_ctx=options.n_ctx, flash_attn=True, verbose=False)
    # With a daemon that runs anyway, `share(llama)` is enough: this starts one if there is none.
    with kvd_client.connect(
        options.runtime_dir, instance=options.instance, start_private=True
    ) as client:
        while question := pipe.recv():
            # The document comes before the question: only what prompts begin with can be shared.
            system = f"Answer in one sentence, and only from this document.\n\n{document}"
            chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
            llama.reset()  # forget the prompt before, so that both begin with nothing
            with share(llama, client=client) as shared:
                answer, seconds = ask(llama, chat, options.tokens)
                tokens, cached = shared.counters.prompt_tokens, shared.matched_tokens
            client.flush()  # what was computed is there for whoever asks next
            llama.reset()
            _, seconds_without = ask(llama, chat, 1)
            pipe.send(Row(answer, tokens, cached, seconds, seconds_without))
    llama.close()


def ask(llama: Llama, chat: list[dict[str, str]], n_tokens: int) -> tuple[str, float]:
    """The answer, and the seconds to its first token."""
    begun = time.perf_counter()
    text, seconds = "", 0.0
    for chunk in llama.create_chat_completion(
        chat, max_tokens=n_tokens, temperature=0.0, stream=True
    ):
        piece = chunk["choices"][0]["delta"].get("content", "")
        if piece and not seconds:
            seconds = time.perf_counter() - begun
        text += piece
    return " ".join(text.split()), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a GGUF file with a chat template")
    parser.add_argument("--document", type=Path, help="a text file (default: one on Python)")
    parser.add_argument("-q", "--question", action="append", help="may be given several times")
    parser.add_argument("--workers", type=int, default=3, help="processes (default: 3)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    parser.add_argument("--n-ctx", type=int, default=4096, help="of each worker (default: 4096)")
    parser.add_argument("--runtime-dir", help="of the daemon; one is started if none runs")
    parser.add_argument("--instance", default="default", help="of the daemon (default: default)")
    options = parser.parse_args()
    if options.document is None:
        document = pydoc_data.topics.topics["naming"]
    else:
        document = options.document.read_text()
    questions = options.question or QUESTIONS

    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(min(options.workers, len(questions))):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(theirs, options, document), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    print(f"{'question':32} {'worker':>6} {'tokens':>7} {'cached':>7} {'first':>8} {'without':>8}")
    for number, question in enumerate(questions):
        worker = number % len(pipes)
        pipes[worker].send(question)
        row: Row = pipes[worker].recv()
        print(
            f"{question[:32]:32} {worker + 1:6} {row.tokens:7} {row.cached_tokens:7} "
            f"{row.seconds:6.2f} s {row.seconds_without:6.2f} s\n    {row.answer!r}",
            flush=True,
        )
    print("cached: tokens that another process has computed; first, without: to the first token")
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()


if __name__ == "__main__":
    main()
