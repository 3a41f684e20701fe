"""`scripts/bootstrap.py`: what it installs for which job, and what it reads off pip's output.

Does not cover the installing itself, which every run of the Makefile does.
"""

import hashlib
import importlib.util
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Lines of real builds with `pip install --verbose`, cut short, and what is shown after each.
LINES_AND_WHAT_IS_SHOWN = [
    ("Collecting llama-cpp-python<0.4,>=0.3.36", "collecting llama-cpp-python"),
    (
        "  Downloading llama_cpp_python-0.3.36.tar.gz (76.6 MB)",
        "downloading llama_cpp_python-0.3.36.tar.gz",
    ),
    ("  Installing build dependencies: started", "installing build tools"),
    ("  Collecting scikit-build-core>=0.9.2", "installing build tools"),
    (
        "Collecting jinja2>=2.11.3 (from llama-cpp-python<0.4,>=0.3.36)",
        "collecting jinja2",
    ),
    (
        "  Building wheel for llama-cpp-python (pyproject.toml): started",
        "building llama-cpp-python",
    ),
    ("  *** Building project with Ninja...", "building llama-cpp-python"),
    (
        "  [1/247] /usr/bin/c++ -DGGML_BUILD -O3 -o ggml.cpp.o",
        "building llama-cpp-python, 1 of 247 steps (0 %)",
    ),
    ("  ggml.c:12:3: warning: [1/2] in a message", None),
    (
        "  [124/247] /usr/bin/c++ -O3 -o llama.cpp.o",
        "building llama-cpp-python, 124 of 247 steps (50 %)",
    ),
    (
        "  [247/247] : && /usr/bin/c++ -shared",
        "building llama-cpp-python, 247 of 247 steps (100 %)",
    ),
    ("  [ 12%] Building CXX object ggml.cpp.o", "building llama-cpp-python, 12 %"),
    ("Installing collected packages: MarkupSafe, llama-cpp-python", "installing"),
]


@pytest.fixture(scope="module")
def bootstrap() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "scripts" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bootstrap"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_progress_follows_a_build(bootstrap: ModuleType) -> None:
    progress = bootstrap.PipProgress()
    before = str(progress)
    for line, expected in LINES_AND_WHAT_IS_SHOWN:
        progress.feed(line + "\n")
        assert str(progress) == (before if expected is None else expected), line
        before = str(progress)


def test_failing_pip_ends_with_the_end_of_its_log(
    bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "step.log"
    with pytest.raises(SystemExit, match="1"):
        bootstrap.run_pip(["--no-index", "kvd-no-such-package"], "nothing", log)
    said = capsys.readouterr()
    assert "nothing: FAILED" in said.out
    assert "No matching distribution found for kvd-no-such-package" in said.err
    assert str(log) in said.err
    assert "No matching distribution found for kvd-no-such-package" in log.read_text()


def test_lint_needs_neither_the_engine_nor_the_model(bootstrap: ModuleType) -> None:
    names = {step.name for step in bootstrap.steps_of("lint", PYPROJECT)}
    assert names == {"package", "lint"}


def test_the_example_server_is_taken_out_of_the_right_archive_only(
    bootstrap: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.py").write_text("print()")
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    archive = downloads / "llama_cpp_python-0.3.36.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(tmp_path / "server.py", f"{archive.name[:-7]}/examples/server/server.py")
    asked = PYPROJECT["tool"]["kvd"]["example-server"]
    target = tmp_path / "example-server" / "server.py"
    with pytest.raises(SystemExit):
        bootstrap.take_example_server(asked, downloads, target)
    assert f"pyproject.toml wants {asked['sha256']}" in capsys.readouterr().err
    assert not target.exists()
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    bootstrap.take_example_server(asked | {"sha256": digest}, downloads, target)
    assert target.read_text() == "print()"
    assert not downloads.exists()


def test_the_example_server_is_of_a_version_that_the_engine_takes() -> None:
    asked = PYPROJECT["tool"]["kvd"]["example-server"]["requirement"]
    oldest = PYPROJECT["project"]["optional-dependencies"]["llama"][0].split(">=")[1].split(",")[0]
    assert asked == f"llama-cpp-python=={oldest}"


def test_stamp_follows_what_is_installed_and_nothing_else(bootstrap: ModuleType) -> None:
    digest = bootstrap.digest_of(PYPROJECT)
    with_other_rules = PYPROJECT | {"tool": PYPROJECT["tool"] | {"ruff": {}}}
    assert bootstrap.digest_of(with_other_rules) == digest
    with_other_group = PYPROJECT | {"dependency-groups": {"test": ["pytest>=9"]}}
    assert bootstrap.digest_of(with_other_group) != digest


@pytest.mark.parametrize("job", ["lint", "test", "bench", "demo"])
def test_every_job_of_the_makefile_is_known(bootstrap: ModuleType, job: str) -> None:
    assert f"scripts/bootstrap.py {job}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert bootstrap.steps_of(job, PYPROJECT)
