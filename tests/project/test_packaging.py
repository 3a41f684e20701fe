"""The distribution: what is in the wheel, which names can be imported, which commands it brings.

The wheel is built by the backend that pip calls, without the isolation that needs a network.
"""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {"kvd": "kvd", "client": "kvd_client", "proto": "kvd_proto"}  # room: package
MODULES = {"pyzmq": "zmq", "llama-cpp-python": "llama_cpp"}  # where the names differ


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder],
        cwd=ROOT,
        check=True,
    )
    (built,) = folder.iterdir()
    return built


def run_isolated(code: str) -> str:
    """What `code` prints in an interpreter that sees neither this folder nor our environment."""
    return subprocess.run(
        [sys.executable, "-I", "-c", code], cwd="/", check=True, capture_output=True, text=True
    ).stdout.strip()


def test_wheel_is_named_after_distribution_and_version(wheel: Path) -> None:
    assert wheel.name == f"kvd_cache-{PROJECT['version']}-py3-none-any.whl"


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    dist_info = f"kvd_cache-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES.values(), dist_info}
    assert f"{dist_info}/licenses/LICENSE" in names


def test_wheel_holds_every_source_file_and_the_type_marker(wheel: Path) -> None:
    endings = (".py", "/py.typed", ".html")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(endings)}
    sources = {
        str(path.relative_to(ROOT / room))
        for room, package in PACKAGES.items()
        for path in (ROOT / room / package).rglob("*")
        if path.suffix in (".py", ".html") or path.name == "py.typed"
    }
    assert packed == sources
    assert {f"{package}/py.typed" for package in PACKAGES.values()} <= packed


def test_packages_are_imported_from_the_wheel(wheel: Path) -> None:
    names = ", ".join(PACKAGES.values())
    files = run_isolated(
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        f"import {names}\n"
        f"for package in ({names}): print(package.__file__)"
    )
    assert files.splitlines() == [f"{wheel}/{name}/__init__.py" for name in PACKAGES.values()]


def test_packages_are_imported_from_the_source_tree_when_installed_editable() -> None:
    names = ", ".join(PACKAGES.values())
    files = run_isolated(f"import {names}\nfor package in ({names}): print(package.__file__)")
    assert files.splitlines() == [
        str(ROOT / room / package / "__init__.py") for room, package in PACKAGES.items()
    ]


@pytest.mark.parametrize("room", ["client", "proto"])
def test_room_is_no_import_name(room: str) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({room!r}))"
    assert run_isolated(code) == "None"


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_command_leads_to_a_function(command: str) -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    assert entry.value == PROJECT["scripts"][command]
    assert callable(entry.load())


def test_metadata_says_what_pyproject_says() -> None:
    metadata = importlib.metadata.metadata("kvd-cache")
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])


def test_third_party_imports_are_the_declared_ones() -> None:
    """A package that only happens to be there, through another one or the tools, is found out."""
    extras = PROJECT["optional-dependencies"]
    declared = [*PROJECT["dependencies"], *extras["llama"], *extras["metrics"]]
    distributions = {re.split(r"[<>=!~\[; ]", line)[0] for line in declared}
    modules = {MODULES.get(name, name) for name in distributions}
    imported = {
        module.split(".")[0]
        for room, package in PACKAGES.items()
        for path in (ROOT / room / package).rglob("*.py")
        for module in imported_modules(path)
    }
    assert imported - sys.stdlib_module_names - set(PACKAGES.values()) == modules


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return found
