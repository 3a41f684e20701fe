"""The cached content hash of model files."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from kvd_client.integrations.llama.files.model_hash import file_digest, model_digest, model_files


def blake2b(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=32).digest()


@pytest.fixture
def cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvd" / "file-digests.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def test_the_digest_is_of_the_content_and_is_kept(cache_file: Path, model: Path) -> None:
    assert file_digest(model) == blake2b(b"weights")
    # Another digest in the cache is what comes back, so the file is not read again.
    planted = blake2b(b"planted").hex()
    content = json.loads(cache_file.read_text())
    content["files"][str(model)][-1] = planted
    cache_file.write_text(json.dumps(content))
    assert file_digest(model).hex() == planted
    assert [path.name for path in cache_file.parent.iterdir()] == [cache_file.name]


def test_a_changed_file_is_noticed(cache_file: Path, model: Path) -> None:
    file_digest(model)
    before = model.stat()
    model.write_bytes(b"WEIGHTS")  # the same size, and the old times put back
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(model) == blake2b(b"WEIGHTS")

    replacement = model.with_name("new")
    replacement.write_bytes(b"wEIGHTS")
    os.utime(replacement, ns=(before.st_atime_ns, before.st_mtime_ns))
    replacement.replace(model)
    assert file_digest(model) == blake2b(b"wEIGHTS")


def test_a_link_is_the_file_it_names(cache_file: Path, model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    assert file_digest(link) == blake2b(b"weights")
    assert list(json.loads(cache_file.read_text())["files"]) == [str(model)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[1, 2",
        b"[]",
        b"null",
        b'{"version": 2, "files": {}}',
        b'{"version": 1}',
        b'{"version": 1, "files": [1]}',
        b'{"version": 1, "files": {"x": [1, 2]}}',
        b'{"version": 1, "files": {"x": [1, 2, 3, 4, "zz"]}}',
        b'{"version": 1, "files": {"x": [1, 2, 3, 4, "00"]}}',
        b'{"version": 1, "files": {"x": [1, 2, 3, 4, 5]}}',
    ],
)
def test_a_corrupt_cache_is_ignored_and_replaced(
    cache_file: Path, model: Path, content: bytes
) -> None:
    cache_file.parent.mkdir(parents=True)
    cache_file.write_bytes(content)
    assert file_digest(model) == blake2b(b"weights")
    assert list(json.loads(cache_file.read_text())["files"]) == [str(model)]


def test_entries_of_other_files_stay_and_those_of_gone_ones_go(
    cache_file: Path, model: Path, tmp_path: Path
) -> None:
    other, gone = tmp_path / "other", tmp_path / "gone"
    for path in (other, gone):
        path.write_bytes(b"x")
        file_digest(path)
    gone.unlink()
    file_digest(model)
    assert set(json.loads(cache_file.read_text())["files"]) == {str(other), str(model)}


def test_no_place_for_the_cache_is_no_obstacle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file"))
    assert file_digest(model) == blake2b(b"weights")


def test_a_relative_cache_home_is_ignored(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    file_digest(model)
    assert (tmp_path / "home" / ".cache" / "kvd" / "file-digests.json").exists()
    assert not (tmp_path / "relative").exists()


def test_a_split_model_is_all_its_parts(cache_file: Path, tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for path in parts:
        path.write_bytes(path.name.encode())
    assert model_files(parts[0]) == tuple(parts)
    before = model_digest(parts[0])
    parts[1].write_bytes(b"changed")
    assert model_digest(parts[0]) != before
    assert model_digest(parts[0]) not in (file_digest(parts[0]), file_digest(parts[1]))


def test_a_missing_file_is_an_error(cache_file: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        model_digest(tmp_path / "missing.gguf")
