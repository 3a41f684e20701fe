"""The metadata of a GGUF file, read from its header alone; neither llama.cpp nor `gguf` is needed.

    magic "GGUF" | u32 version | u64 tensors | u64 pairs
    per pair:   u64 length, key | u32 type | value
    a string:   u64 length, bytes
    an array:   u32 type of its elements | u64 how many | elements

Versions 2 and 3, little-endian. Behind it come the tensors, of which nothing is read: a file that
ends there is told by llama.cpp, and its metadata is whole. The reader of the package `gguf` makes
several objects for each element of each array (27 s for the vocabulary of Gemma 3 on one slow core,
0.2 s here), and follows any count that a file claims.

The file may be anything: every count and length is held against what is left of the file and
against a limit before anything is read or set aside for it. Values that are long are passed over.
"""

import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
"""As GGUF's specification has it."""
MAX_KEPT_BYTES = 1 << 12
"""A longer string is passed over."""
MAX_KEPT_ELEMENTS = 1 << 12
"""An array of more is passed over. Those with one element a layer have 512 at most."""
MAX_STRINGS = 1 << 21
"""In all arrays together: only strings must be walked one by one."""

Value = bool | int | float | str | tuple[bool, ...] | tuple[int, ...] | tuple[float, ...]

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_COUNTS = struct.Struct("<QQ")
_STRING = 8
_ARRAY = 9
# ggml's gguf.h (enum gguf_type).
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_CHUNK = 1 << 16


class BadModelFile(Exception):
    """The file is no GGUF file that can be read; the message names it and says what to do."""


class GgufHeader(NamedTuple):
    """`values` has the pairs that are not long, by key; `n_tensors` is what the file claims."""

    path: Path
    version: int
    n_tensors: int
    values: Mapping[str, Value]


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of the file at `path`. Raises BadModelFile, and nothing else."""
    path = Path(path)
    try:
        # Not blocking: a FIFO would wait for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=_CHUNK) as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise BadModelFile(f"{path} is not a file: name a GGUF file")
            return _Reader(path, file, found.st_size).header()
    except OSError as error:
        raise BadModelFile(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a path with a zero byte in it
        raise BadModelFile(f"{str(path)!r} cannot be read: {error}") from error
    except struct.error as error:
        raise BadModelFile(f"{path} has become shorter while it was read") from error


class _Reader:
    """A position in a file that never goes beyond the file's end."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._file = file
        self._left = size
        self._strings_left = MAX_STRINGS

    def header(self) -> GgufHeader:
        if self._left < len(MAGIC) or self._take(len(MAGIC)) != MAGIC:
            raise self._bad("it is not a GGUF file: it does not begin with GGUF")
        raw = self._take(_U32.size)
        (version,) = _U32.unpack(raw)
        if version not in VERSIONS:
            if int.from_bytes(raw, "big") in VERSIONS:
                raise self._bad("it is a big-endian GGUF file: convert it for this machine")
            raise self._bad(f"it is a GGUF file of version {version}, not 2 or 3: convert it anew")
        n_tensors, n_pairs = _COUNTS.unpack(self._take(_COUNTS.size))
        self._limit("pairs of metadata", n_pairs, MAX_PAIRS)
        pairs: dict[str, Value | None] = {}
        for _ in range(n_pairs):
            key = self._key()
            if key in pairs:
                raise self._bad(f"its metadata has {key} twice")
            pairs[key] = self._value(key)
        values = {key: value for key, value in pairs.items() if value is not None}
        return GgufHeader(self._path, version, n_tensors, values)

    def _key(self) -> str:
        length = self._u64()
        self._limit("bytes of a key", length, MAX_KEY_BYTES)
        return self._text(self._take(length), "a key")

    def _value(self, key: str) -> Value | None:
        """None for what is passed over."""
        kind = self._u32()
        if kind == _STRING:
            length = self._u64()
            if length > MAX_KEPT_BYTES:
                self._skip(length)
                return None
            return self._text(self._take(length), key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._bad(f"the value of {key} has type {kind}, which GGUF does not have")
        scalar = struct.Struct("<" + _SCALARS[kind])
        value: bool | int | float = scalar.unpack(self._take(scalar.size))[0]
        return value

    def _array(self, key: str) -> Value | None:
        kind, count = self._u32(), self._u64()
        if kind == _STRING:
            self._skip_strings(count)
            return None
        if kind not in _SCALARS:
            raise self._bad(f"{key} is an array of type {kind}, which GGUF does not have")
        n_bytes = count * struct.calcsize("<" + _SCALARS[kind])
        if count > MAX_KEPT_ELEMENTS:
            self._skip(n_bytes)
            return None
        return struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(n_bytes))

    def _skip_strings(self, count: int) -> None:
        """Pass over an array of strings. It has no length: each of them does."""
        self._limit("strings", count, self._strings_left)
        self._strings_left -= count
        read, unpack, left = self._file.read, _U64.unpack, self._left
        for _ in range(count):
            left -= _U64.size
            if left < 0:
                raise self._short()
            (length,) = unpack(read(_U64.size))
            left -= length
            if left < 0:
                raise self._short()
            if length <= MAX_KEPT_BYTES:
                read(length)
            else:
                self._file.seek(length, os.SEEK_CUR)
        self._left = left

    def _u32(self) -> int:
        return int(_U32.unpack(self._take(_U32.size))[0])

    def _u64(self) -> int:
        return int(_U64.unpack(self._take(_U64.size))[0])

    def _take(self, n_bytes: int) -> bytes:
        """The next bytes, all of them; only for lengths that a limit has bounded."""
        if n_bytes > self._left:
            raise self._short()
        self._left -= n_bytes
        return self._file.read(n_bytes)

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self._left:
            raise self._short()
        self._left -= n_bytes
        self._file.seek(n_bytes, os.SEEK_CUR)

    def _text(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"{what} is not text") from None

    def _limit(self, what: str, count: int, limit: int) -> None:
        if count > limit:
            raise self._bad(f"it claims {count} {what}, more than the {limit} of any model")

    def _short(self) -> BadModelFile:
        return self._bad("it ends within its metadata: it is cut off, or damaged; get it again")

    def _bad(self, what: str) -> BadModelFile:
        return BadModelFile(f"{self._path}: {what}")
