"""Get what `make bench` can compare with: `python3 scripts/peers.py`, or `make bench-peers`.

Redis and memcached come from Debian's packages, which are unpacked into `.venv-bench/debian`, and
not installed: no service of the system is started, and nobody has to be root. Those on PATH are
taken as they are. LMCache comes from PyPI into an environment of its own, `.venv-bench/lmcache`,
without what its packages depend on for other uses; torch in the variant for CPUs, 200 MB.

What cannot be had is said, and left out by the benchmark: this never fails for want of one.
Only the standard library.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".venv-bench"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Complete what is there, and say what became of each."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["kvd"]
    peers = asked["bench-peers"]
    ENVIRONMENTS.mkdir(exist_ok=True)
    for program, package in peers["debian"].items():
        say(package, get_program(program, package, ENVIRONMENTS))
    say("LMCache", get_lmcache(peers["torch"], peers["lmcache"], ENVIRONMENTS / "lmcache"))


def get_program(program: str, package: str, environments: Path) -> str:
    """See that a program of a Debian package can be run; returns what became of it."""
    if shutil.which(program):
        return "is on PATH"
    target = environments / "debian"
    if (target / "usr" / "bin" / program).exists():
        return "is there"
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return "left out: this is no Debian"
    archives = environments / "archives"
    (archives / "partial").mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "install", "--download-only", "--yes", "--no-install-recommends"]
    command += ["-o", "Debug::NoLocking=1", "-o", f"Dir::Cache::archives={archives}", package]
    done = run(command)
    if not done:
        return "left out: apt-get does not get it (apt-get update, as root, may help)"
    for archive in archives.glob("*.deb"):
        if not run(["dpkg-deb", "--extract", str(archive), str(target)]):
            return f"left out: {archive.name} cannot be unpacked"
    shutil.rmtree(archives)
    return "done" if (target / "usr" / "bin" / program).exists() else "left out: not in its package"


def get_lmcache(torch: str, packages: list[str], environment: Path) -> str:
    """See that LMCache's server can be run in `environment`; returns what became of it. `packages`
    begins with LMCache itself, whose version the stamp holds."""
    version = packages[0].partition("==")[2]
    stamp = environment / "complete"
    if stamp.exists() and stamp.read_text(encoding="ascii") == version:
        return "is there"
    python = environment / "bin" / "python"
    if not python.exists() and not run([sys.executable, "-m", "venv", str(environment)]):
        return "left out: no virtual environment can be made"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--prefer-binary"]
    # Some have it on disk, or in an index of their own, where the general one is out of reach.
    if not run([*install, torch]) and not run([*install, "--index-url", TORCH_INDEX, torch]):
        return f"left out: {torch} cannot be had"
    if not run([*install, *packages]):
        return "left out: pip does not get it"
    if not run([str(python), "-P", "-c", "import lmcache.v1.multiprocess.server"]):
        return "left out: it does not run"
    stamp.write_text(version, encoding="ascii")
    return "done"


def run(command: list[str]) -> bool:
    """Whether it ran; its errors are shown."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/", check=False
    )
    return done.returncode == 0


def say(name: str, what: str) -> None:
    print(f"== {name}: {what}", flush=True)


if __name__ == "__main__":
    main()
