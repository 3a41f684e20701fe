"""The reader of GGUF headers: against what `gguf` writes, and against anything else."""

import os
import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from kvd_client.integrations.llama.files.gguf_header import (
    MAX_KEPT_BYTES,
    MAX_KEPT_ELEMENTS,
    MAX_STRINGS,
    BadModelFile,
    read_header,
)

SCALARS = {
    "uint8": 200, "int8": -100, "uint16": 60_000, "int16": -30_000, "uint32": 4_000_000_000,
    "int32": -2_000_000_000, "float32": 0.5, "bool": True, "uint64": 1 << 60, "int64": -(1 << 60),
    "float64": 0.1,
}  # fmt: skip
SEED = int(os.environ.get("KVD_SEED", "1"))


def write(path: Path) -> Path:
    """Each type of value, a vocabulary, and a tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in SCALARS.items():
        getattr(writer, f"add_{name}")(f"scalar.{name}", value)
    writer.add_string("text", "K and V, \N{GREEK SMALL LETTER ALPHA}")
    writer.add_string("long", "x" * (MAX_KEPT_BYTES + 1))
    writer.add_array("numbers", [4, 0, 2])
    writer.add_array("flags", [True, False])
    writer.add_array("many", list(range(MAX_KEPT_ELEMENTS + 1)))
    writer.add_array("words", [f"word {index}" for index in range(100)] + ["y" * 9000, ""])
    writer.add_uint32("llama.block_count", 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_what_gguf_writes_is_read(written: Path) -> None:
    header = read_header(written)
    assert (header.path, header.version, header.n_tensors) == (written, 3, 0)
    assert header.values == {
        "general.architecture": "llama",
        **{f"scalar.{name}": value for name, value in SCALARS.items()},
        "text": "K and V, \N{GREEK SMALL LETTER ALPHA}",
        "numbers": (4, 0, 2),
        "flags": (True, False),
        "llama.block_count": 7,
    }


def test_it_agrees_with_the_reader_of_gguf(written: Path) -> None:
    reader = gguf.GGUFReader(written)
    for key, value in read_header(written).values.items():
        contents = reader.get_field(key).contents()
        assert (tuple(contents) if isinstance(contents, list) else contents) == value


def test_a_file_of_40_gb_is_read_at_once(written: Path, tmp_path: Path) -> None:
    """A sparse one: its tensors are not looked at."""
    large = tmp_path / "large.gguf"
    large.write_bytes(written.read_bytes())
    os.truncate(large, 40 << 30)
    began = time.process_time()
    assert read_header(large).values["llama.block_count"] == 7
    assert time.process_time() - began < 0.5


# --- whatever else a file may be


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(BadModelFile) as error:
        read_header(path)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A file that costs nothing to write."""
    descriptor = os.memfd_create("gguf")
    yield Path(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def test_a_header_cut_off_at_any_byte_is_refused(written: Path, in_memory: Path) -> None:
    whole = written.read_bytes()
    needed = whole.index(b"llama.block_count") + len(b"llama.block_count") + 8
    cut = in_memory
    lengths = [*range(1500), *range(1500, needed, 97), *range(needed - 200, needed)]
    for length in lengths:
        message = refused(cut, whole[:length])
        assert ("does not begin with GGUF" if length < 4 else "ends within") in message
    cut.write_bytes(whole[:needed])
    assert read_header(cut).values == read_header(written).values


def test_flipped_bytes_are_refused_or_read(written: Path, in_memory: Path) -> None:
    """Never another error, and never long."""
    whole = written.read_bytes()[:2000]
    chance = random.Random(SEED)
    outcomes = {True: 0, False: 0}
    for _ in range(4000):
        content = bytearray(whole + bytes(40_000))
        for _ in range(chance.choice((1, 1, 2, 8))):
            content[chance.randrange(len(whole))] = chance.choice(
                (0, 1, 127, 255, chance.randrange(256))
            )
        in_memory.write_bytes(content)
        try:
            read_header(in_memory)
        except BadModelFile:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
    assert outcomes[False] > 1000


def head(n_pairs: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, n_pairs)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


HUGE = struct.pack("<Q", (1 << 64) - 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4 something else", "not a GGUF file"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version 1"),
        (head(0, version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head((1 << 64) - 1), "pairs of metadata"),
        (head(1) + HUGE, "bytes of a key"),
        (head(1) + pair(b"key", 8, HUGE), "cut off"),
        (head(1) + pair(b"key", 9, struct.pack("<I", 4) + HUGE), "cut off"),
        (head(1) + pair(b"key", 9, struct.pack("<I", 8) + HUGE), "strings"),
        (head(1) + pair(b"key", 9, struct.pack("<IQ", 9, 1)), "array of type 9"),
        (head(1) + pair(b"key", 13, b""), "type 13"),
        (head(1) + pair(b"\xff", 4, b"\0\0\0\0"), "not text"),
        (head(1) + pair(b"key", 8, struct.pack("<Q", 1) + b"\xff"), "key is not text"),
        (head(2) + 2 * pair(b"key", 4, b"\0\0\0\0"), "key twice"),
    ],
)  # fmt: skip
def test_what_is_no_header_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    assert said in refused(tmp_path / "odd.gguf", content)


def test_no_file_takes_long(tmp_path: Path) -> None:
    """As many strings as a file may have, all of holes: strings without a letter."""
    hostile = tmp_path / "hostile.gguf"
    for count in (MAX_STRINGS, MAX_STRINGS + 1):
        hostile.write_bytes(head(1) + pair(b"a", 9, struct.pack("<IQ", 8, count)))
        os.truncate(hostile, 1 << 40)
        began = time.process_time()
        if count > MAX_STRINGS:
            with pytest.raises(BadModelFile, match="strings"):
                read_header(hostile)
        else:
            assert read_header(hostile).values == {}
        assert time.process_time() - began < 10


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, tmp_path / "absent.gguf", Path("/dev/null"), Path("a\0b")):
        with pytest.raises(BadModelFile) as error:
            read_header(path)
        assert repr(str(path))[1:-1] in str(error.value)


def test_a_file_without_permission_is_named(written: Path) -> None:
    """As a user who may not; root may read everything."""
    written.chmod(0)
    try:
        pid = os.fork()
        if not pid:
            code = 2
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                read_header(written)
            except BadModelFile as error:
                code = 0 if "Permission denied" in str(error) else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        written.chmod(0o644)
