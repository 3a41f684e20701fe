"""PROTOCOL.md says what the code does: every operation, field, type, limit and error code."""

import re
from typing import Any

import pytest

from kvd_proto import PROTOCOL_VERSION, codec
from kvd_proto.errors import BY_CODE, NoSequenceFree, RequestError, ResourceError
from kvd_proto.geometry import GGML_TYPES, MAX_LAYERS, MAX_ROW_BYTES, Geometry
from kvd_proto.index import ENTRY_BYTES, INDEX_HEADER_BYTES, MAX_CHAIN
from kvd_proto.layout import (
    DIRECTORY_HEADER_BYTES,
    MAX_OWNER,
    MAX_PINS,
    PIN_BYTES,
    directory_length,
    pins_offset,
    record_bytes,
)
from kvd_proto.messages import (
    DATAGRAMS,
    MAX_APPEND_BLOCKS,
    MAX_BLOCK_TOKENS,
    MAX_DETAIL_NAME,
    MAX_DETAIL_TEXT,
    MAX_DETAILS,
    MAX_ERROR_TEXT,
    MAX_FAILURES,
    MAX_SEQ_IDS,
    MAX_TOKENS,
    MAX_TRAIT_NAME,
    MAX_TRAIT_TEXT,
    MAX_TRAITS,
    MAX_TTL_MS,
    MAX_WAIT_MS,
    OPERATIONS,
    Alloc,
    Allocated,
    ErrorReply,
    Operation,
)
from kvd_proto.payload import FORMATS, LLAMA_MAGIC, LlamaState
from tests.proto.make_vectors import CONTEXT, GEMMA3, SMOLLM2, VECTORS, tokens
from tests.proto.protocol_doc import TEXT, Row, Section, report_keys, sections
from tests.proto.shapes import fields_of, wire_name, wording

SECTIONS = sections()
EVERYWHERE = {"bad_message", "internal"}

LIMITS = {
    "longest request or reply, bytes": codec.MAX_MESSAGE_BYTES,
    "longest datagram from the daemon, bytes": codec.MAX_DATAGRAM_BYTES,
    "tokens of a sequence, and of one alloc or append": MAX_TOKENS,
    "blocks of one append": MAX_APPEND_BLOCKS,
    "tokens of a block": MAX_BLOCK_TOKENS,
    "sequence ids of a context": MAX_SEQ_IDS,
    "layers of a model": MAX_LAYERS,
    "bytes of a row": MAX_ROW_BYTES,
    "longest `wait_ms` and `idle_timeout_ms`": MAX_WAIT_MS,
    "longest `ttl_ms`": MAX_TTL_MS,
    "characters of an owner of pins": MAX_OWNER,
    "traits of a model": MAX_TRAITS,
    "characters of a trait's name": MAX_TRAIT_NAME,
    "characters of a trait's text": MAX_TRAIT_TEXT,
    "commits that one `flush` tells have failed": MAX_FAILURES,
    "characters of an error's message": MAX_ERROR_TEXT,
    "entries of an error's details": MAX_DETAILS,
    "characters of a detail's name": MAX_DETAIL_NAME,
    "characters of a detail's text": MAX_DETAIL_TEXT,
}


def section_of(operation: Operation) -> Section:
    return SECTIONS[f"{wire_name(operation.request)} ({operation.code})"]


def described(rows: list[Row]) -> list[tuple[str, ...]]:
    return [(row.name, row.cells[1]) for row in rows]


def expected(cls: type[Any]) -> list[tuple[str, str]]:
    return [(field.name, wording(field.check)) for field in fields_of(cls)]


def named_errors(operation: Operation) -> set[str]:
    found = re.search(r"^Errors: (.+?)\n\n", section_of(operation).text, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([a-z_]+)`", found[1])) & set(BY_CODE) if found else set()


# --- operations and datagrams


def test_every_operation_has_its_section_and_no_other() -> None:
    titles = [title for title in SECTIONS if re.fullmatch(r"[a-z_]+ \(\d+\)", title)]
    wanted = [f"{wire_name(op.request)} ({op.code})" for op in OPERATIONS]
    kinds = [f"{wire_name(cls)} ({kind})" for kind, cls in DATAGRAMS]
    assert titles == kinds + wanted


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: wire_name(op.request))
@pytest.mark.parametrize("part", ["request", "reply"])
def test_fields_and_types_of_an_operation(operation: Operation, part: str) -> None:
    section = section_of(operation)
    cls = getattr(operation, part)
    heading = f"{part.capitalize()}:"
    if not cls._fields:
        assert f"{heading} no fields." in section.text
        return
    rows = section.rows(after=f"\n{heading}\n")
    assert described(rows) == expected(cls)
    assert all(len(row.cells) == 3 and row.cells[2] for row in rows), "a field is not explained"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda op: wire_name(op.request))
def test_every_operation_says_what_happens_when_it_is_sent_again(operation: Operation) -> None:
    text = section_of(operation).text
    assert re.search(r"idempotent|second one|Again|Appending the same again", text, re.IGNORECASE)


@pytest.mark.parametrize(("kind", "cls"), DATAGRAMS, ids=lambda value: str(value))
def test_fields_and_types_of_a_datagram(kind: int, cls: type[Any]) -> None:
    rows = SECTIONS[f"{wire_name(cls)} ({kind})"].rows()
    assert described(rows) == expected(cls)


def test_fields_and_types_of_an_error_reply() -> None:
    rows = SECTIONS["Requests and replies"].rows()
    assert described(rows) == expected(ErrorReply)


# --- errors


def test_every_error_code_is_in_the_table_with_its_kind() -> None:
    kinds = {RequestError: "request", ResourceError: "resource"}
    wanted = {code: kinds.get(cls.__base__, "service") for code, cls in BY_CODE.items()}
    assert {row.name: row.cells[1] for row in SECTIONS["Error codes"].rows()} == wanted


def test_the_table_of_errors_and_the_operations_agree() -> None:
    from_sections: dict[str, set[str]] = {code: set() for code in BY_CODE}
    for operation in OPERATIONS:
        for code in named_errors(operation):
            from_sections[code].add(wire_name(operation.request))
    refused = SECTIONS["refused (4)"].text.partition("Codes:")[2]
    for code in re.findall(r"`([a-z_]+)`", refused):
        from_sections[code].add("refused")
    failures = re.search(r"The codes among the failures are (.+?)\n\n", TEXT, re.DOTALL)
    assert failures is not None
    for code in re.findall(r"`([a-z_]+)`", failures[1]):
        from_sections[code].add("flush's failures")
    for row in SECTIONS["Error codes"].rows():
        told = set(row.cells[2].split(", "))
        if row.name in EVERYWHERE:
            assert "every operation" in told
            continue
        if row.name == "unknown_session":
            assert told == {"every operation that needs a session"}
            continue
        wanted = from_sections[row.name] or {"the client library"}
        assert told == wanted, row.name


def test_only_error_codes_are_named_as_errors() -> None:
    for title, section in SECTIONS.items():
        for line in re.findall(r"^(?:Errors|Codes): (.+?)\n\n", section.text, re.M | re.S):
            plain = re.sub(r"\(.*?\)", "", line, flags=re.DOTALL)
            assert set(re.findall(r"`(\w+)`", plain)) <= set(BY_CODE), title


# --- numbers


def test_limits() -> None:
    found = {row.cells[0]: int(row.cells[1]) for row in SECTIONS["Limits"].rows()}
    assert found == LIMITS
    assert f"arrays of more than {MAX_LAYERS} items" in TEXT


def test_the_version() -> None:
    assert f"# The kvd protocol, version {PROTOCOL_VERSION}\n" in TEXT
    for title in ("hello (1)", "welcome (2)"):
        version = SECTIONS[title].rows()[0]
        assert version.name == "version"
        assert version.cells[2].endswith(f": {PROTOCOL_VERSION}")


def test_payload_formats_and_types() -> None:
    assert set(FORMATS) <= set(SECTIONS)
    text = SECTIONS["llama-state"].text
    assert f"{LLAMA_MAGIC:#x}" in text
    types = Section("types", 3, text.partition("bytes of 32 elements:")[2]).rows()
    assert [(row.name, int(row.cells[1]), int(row.cells[2])) for row in types] == [
        (name, size.ggml_id, 32 * size.block_bytes // size.block_elements)
        for name, size in GGML_TYPES.items()
    ]
    smollm2 = Geometry.from_wire(SMOLLM2)
    for number in (
        smollm2.bytes_per_token,
        LlamaState(smollm2, 32).max_bytes,
        LlamaState(smollm2, 64).max_bytes,
    ):
        assert f"{number:,}" in text
    gemma3 = Geometry.from_wire(GEMMA3)
    for n_tokens in (32, 64):
        number = LlamaState(gemma3, n_tokens, window_layers=15).max_bytes
        assert f"{number:,}" in SECTIONS["llama-state:window=W"].text


def test_the_directory() -> None:
    text = SECTIONS["The directory"].text
    assert f"The header, {DIRECTORY_HEADER_BYTES:,} bytes" in text
    assert f"{record_bytes(0)} + 4 * block_tokens" in text
    assert f"`pins` + i * {PIN_BYTES}, for each i below {MAX_PINS}" in text
    assert f"`pins + {directory_length(9, 32) - pins_offset(9, 32)}` bytes" in text


def test_the_index() -> None:
    text = SECTIONS["The index"].text
    assert f"`{INDEX_HEADER_BYTES} + {ENTRY_BYTES} * slots` bytes" in text
    assert f"Entry i, at {INDEX_HEADER_BYTES} + i * {ENTRY_BYTES}" in text
    assert f"at most {MAX_CHAIN} slots" in text
    assert f"if {MAX_CHAIN} others" in text


# --- reports


def test_the_reports_have_the_public_keys() -> None:
    """The names that the design promises for good; that the daemon gives all of these, and no
    others, is for the tests of the daemon."""
    status = report_keys("status")
    assert {key.split(".")[0] for key in status} == {
        "version", "instance", "uptime_seconds", "rss_bytes", "clients", "stopped_clients",
        "sequences", "recovery", "accounting", "tenants[]", "models[]", "counters",
    }  # fmt: skip
    assert {f"sequences.{key}" for key in ("max", "in_use", "free")} <= status
    for key in ("free", "filling", "active", "cached", "pinned", "total"):
        assert f"models[].blocks.{key}" in status
    for use in (
        "budget", "unassigned", "free", "filling", "active", "cached", "pinned", "padding",
        "directory", "staging", "os", "drift",
    ):  # fmt: skip
        assert f"accounting.{use}_bytes" in status
    assert report_keys("verify") == {"ok", "terms", "differences"}
    assert "sequences[].generation" in report_keys("list_sequences")
    assert "clients[].session" in report_keys("list_clients")
    assert "pins[].owner" in report_keys("list_pins")
    assert "missing.why" in report_keys("explain")


# --- the worked example


def test_the_worked_example() -> None:
    request, reply, error = (bytes.fromhex(block) for block in SECTIONS["A worked example"].code())
    asked = Alloc(CONTEXT, "request-17", tokens(1, 2, 3, 49151), 0, 1500, 0, use=1, store=1)
    assert codec.encode_request(7, asked) == request
    assert codec.encode_reply(7, Allocated(0, 1, 3, 32, tokens(12))) == reply
    refusal = NoSequenceFree("every sequence id of the context is in use", in_use=8)
    assert codec.encode_error(7, refusal) == error
    assert codec.decode_request(request).message == asked
    assert f"0x{CONTEXT:016x}" in SECTIONS["A worked example"].text


# --- the document itself


def test_links_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in SECTIONS}
    for link in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert link in anchors
    contents = re.findall(r"^\d+\. \[([^]]+)\]", SECTIONS["Contents"].text, re.MULTILINE)
    chapters = [section.title for section in SECTIONS.values() if section.level == 2]
    assert contents == [title for title in chapters if title != "Contents"]


def test_every_file_of_vectors_is_described() -> None:
    described_files = {row.name for row in SECTIONS["Golden vectors"].rows()}
    assert described_files == {path.name for path in VECTORS.iterdir()}
