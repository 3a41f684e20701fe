"""Two processes, each with an ordinary Llama, answer a chat in turns, and share its K/V by kvd.

    python examples/llama_share.py model.gguf

All that concerns kvd is the line `share(llama, ...)`. Whoever answers finds in the cache what the
other one has computed: the long system prompt, and the turns before. It decodes only what is new.
"""

import argparse
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from llama_cpp import Llama

import kvd_client
from kvd_client.integrations.llama import share

RULES = """You are the help desk of a small harbour. Answer in one short sentence.
Ships of up to 40 metres berth at the north quay, longer ones at the south quay. Water and power are
at every berth. The harbour master is Ann; her office opens at eight. Diesel is sold until noon.
"""
QUESTIONS = ("Where does a ship of 30 metres berth?", "When does the office open?", "Who is Ann?")


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    found_tokens: int
    first_token_seconds: float


def work(pipe: Connection, model: str, runtime_dir: str | None) -> None:
    """A worker process: answers each chat that comes through the pipe."""
    llama = Llama(model, n_ctx=2048, flash_attn=True, verbose=False)
    # With a daemon that runs anyway, `share(llama)` is enough: this starts one if there is none.
    with kvd_client.connect(runtime_dir, fail_open=True, start_private=True) as client:
        shared = share(llama, client=client)
        while chat := pipe.recv():
            pipe.send(answer(llama, shared, chat))
        llama.close()


def answer(llama: Llama, shared: Any, chat: list[dict[str, str]]) -> Answer:
    started, first, text = time.perf_counter(), 0.0, ""
    before = shared.counters.prompt_tokens
    for chunk in llama.create_chat_completion(chat, max_tokens=20, temperature=0.0, stream=True):
        piece = chunk["choices"][0]["delta"].get("content", "")
        if piece and not first:
            first = time.perf_counter() - started
        text += piece
    n_prompt = shared.counters.prompt_tokens - before
    return Answer(text.strip(), n_prompt, shared.matched_tokens, first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--runtime-dir", help="where the daemon's sockets are")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(2):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=work, args=(theirs, options.model, options.runtime_dir))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    chat = [{"role": "system", "content": RULES * 3}]
    for turn, question in enumerate(QUESTIONS):
        chat.append({"role": "user", "content": question})
        worker = turn % 2
        pipes[worker].send(chat)
        reply: Answer = pipes[worker].recv()
        chat.append({"role": "assistant", "content": reply.text})
        print(
            f"worker {worker + 1} found {reply.found_tokens} of {reply.prompt_tokens} tokens, "
            f"first token after {reply.first_token_seconds * 1e3:.0f} ms: {reply.text}"
        )
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()


if __name__ == "__main__":
    main()
