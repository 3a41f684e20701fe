"""The content hash of a model file, remembered so that a large file is read once.

The hash is blake2b-256 over the file's bytes. It is kept in `$XDG_CACHE_HOME/kvd/file-digests.json`
(or `~/.cache/kvd/...`) under the file's path with its size, inode, mtime and ctime; ctime, which no
program can set back, also tells a file that was rewritten with its old mtime restored. The cache is
an aid only: missing, unreadable, corrupt or unwritable, the file is simply hashed. Two processes
that write it at once may lose one entry, never damage it.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

_CACHE_VERSION = 1
_SPLIT_NAME = re.compile(r"(?P<prefix>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")


class FileStamp(NamedTuple):
    """What tells that a file is still the one that was hashed or loaded."""

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int


def file_stamp(path: Path) -> FileStamp:
    """The stamp of the file that `path` names now; OSError if there is none."""
    return _stamp(path.stat())


def model_files(path: Path) -> tuple[Path, ...]:
    """All files of the model that is loaded from `path`: all parts of a split GGUF, in order."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    names = (
        f"{match['prefix']}-{part:05d}-of-{match['parts']}.gguf"
        for part in range(1, int(match["parts"]) + 1)
    )
    return tuple(part for name in names if (part := path.with_name(name)).exists())


def model_digest(path: Path) -> bytes:
    """32 bytes over the content of all of the model's files; OSError if one cannot be read."""
    digests = [file_digest(part) for part in model_files(path)]
    if len(digests) == 1:
        return digests[0]
    return hashlib.blake2b(b"".join(digests), digest_size=32).digest()


def file_digest(path: Path) -> bytes:
    """blake2b-256 of the file's content, from the cache when its stamp is unchanged."""
    path = path.resolve()
    cached = _load_cache().get(str(path))
    if cached is not None and cached[0] == file_stamp(path):
        return cached[1]
    with path.open("rb") as file:
        before = _stamp(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).digest()
        after = _stamp(os.fstat(file.fileno()))
    if before == after:
        _store(path, after, digest)
    return digest


def _stamp(stat: os.stat_result) -> FileStamp:
    return FileStamp(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


_Entries = dict[str, tuple[FileStamp, bytes]]


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "kvd" / "file-digests.json"


def _load_cache() -> _Entries:
    """All entries; none if the file is missing or is not what this version writes."""
    try:
        content = json.loads(_cache_file().read_bytes())
        if content["version"] != _CACHE_VERSION:
            return {}
        entries: _Entries = {}
        for path, (size, mtime_ns, inode, ctime_ns, digest) in content["files"].items():
            blake2b = bytes.fromhex(digest)
            if len(blake2b) != 32:
                return {}
            entries[path] = (FileStamp(size, mtime_ns, inode, ctime_ns), blake2b)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError):
        return {}
    return entries


def _store(path: Path, stamp: FileStamp, digest: bytes) -> None:
    """Add one entry, drop those of files that are gone; atomic, and silent if it cannot be done."""
    entries = {name: entry for name, entry in _load_cache().items() if os.path.exists(name)}
    entries[str(path)] = (stamp, digest)
    content = {
        "version": _CACHE_VERSION,
        "files": {name: [*kept, blake2b.hex()] for name, (kept, blake2b) in entries.items()},
    }
    with contextlib.suppress(OSError, RuntimeError):
        cache = _cache_file()
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=cache.parent, prefix=cache.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file)
            os.replace(temporary, cache)
        except BaseException:
            os.unlink(temporary)
            raise
