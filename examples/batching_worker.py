"""Two processes that each answer eight questions about one document, all eight at the same time.

    python examples/batching_worker.py MODEL.gguf

The first process computes the document once, for all of its eight requests. The second one finds it
in the cache, imports it once, and computes only the questions.
"""

import argparse
import multiprocessing
import time
from pathlib import Path

import kvd_client
from kvd_client.integrations.llama.batching.worker import BatchingWorker

DOCUMENT = (Path(__file__).resolve().parent.parent / "LICENSE").read_text()[:2800]
QUESTIONS = [
    "What is this document?",
    "Who is the Licensor?",
    "What is a Contribution?",
    "Who is a Contributor?",
    "What does Source form mean?",
    "What does Object form mean?",
    "What is a Derivative Work?",
    "Which version of the license is it?",
]
CHAT = (
    "<|im_start|>system\nAnswer in one sentence, and only from this document.\n{}<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""As the model of the demo, SmolLM2, was trained; other models have other templates."""


def answer_all(model: str, runtime_dir: str | None, n_tokens: int) -> None:
    """What each of the two processes does."""
    with BatchingWorker(model, runtime_dir=runtime_dir, n_ctx=4096, n_seq_max=8) as worker:
        worker.start()
        tokenize = worker.engine.tokenize
        begun = time.perf_counter()
        requests = [
            worker.submit(tokenize(CHAT.format(DOCUMENT, question)), n_tokens, timeout=120)
            for question in QUESTIONS
        ]
        # They are all computed at once; this waits for the first token of the first one.
        next(iter(requests[0]))
        first_token = time.perf_counter() - begun
        for question, request in zip(QUESTIONS, requests, strict=True):
            result = request.result()
            print(
                f"  {question:36} {result.ended:7} matched {result.matched_tokens:4}  "
                f"shared {result.copied_tokens:4}  computed {result.computed_tokens:4}"
            )
            print(f"      {worker.engine.detokenize(result.tokens).strip()!r}")
        seconds = time.perf_counter() - begun
        print(f"  first token after {first_token:.2f} s, all answers after {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--runtime-dir", help="of the daemon; one is started if none runs")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    options = parser.parse_args()

    spawn = multiprocessing.get_context("spawn")
    with kvd_client.connect(options.runtime_dir, start_private=True):
        for name in ("first", "second"):
            print(f"{name} process", flush=True)
            arguments = (options.model, options.runtime_dir, options.tokens)
            process = spawn.Process(target=answer_all, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"the {name} process failed")


if __name__ == "__main__":
    main()
