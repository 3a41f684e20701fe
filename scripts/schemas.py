"""Write docs/schema: a JSON Schema for what each command of kvctl prints with --json.

They are made from the tables that describe it to people: docs/json.md for what kvctl makes itself,
and the reports in proto/PROTOCOL.md for what it passes on. Run by `make docs`; what kvctl really
prints is compared in tests/client/test_kvctl_json.py.

    | `models[].blocks.free` | int | ... |      a place: a dot enters a map, [] an item of a list
    | `rates.seconds` | float or nil | ... |     a type of TYPES
    | `kept` | int or absent | ... |             not always there
    | `status` | as kvctl status | ... |         the schema of another command,
    | `models` | as kvctl status: models | ... | or of one of its keys
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = ROOT / "docs" / "schema"
Schema = dict[str, Any]

_ABSENT = " or absent"
TYPES: dict[str, Schema] = {
    "any": {},
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "nil": {"type": "null"},
    "map": {"type": "object"},
    "array of str": {"type": "array", "items": {"type": "string"}},
    "array of int": {"type": "array", "items": {"type": "integer"}},
    "map of int": {"type": "object", "additionalProperties": {"type": "integer"}},
}


def schemas() -> dict[str, Schema]:
    """By the command's name."""
    reports = _sections((ROOT / "proto" / "PROTOCOL.md").read_text(), r"### Report of (\w+)")
    commands = _sections((ROOT / "docs" / "json.md").read_text(), r"## kvctl ([\w-]+)")
    made: dict[str, Schema] = {}
    for name, text in commands.items():
        of_daemon = re.search(r"#report-of-(\w+)\)", text)
        rows = _rows(reports[of_daemon[1]] if of_daemon else text)
        assert rows, f"docs/json.md has no table for kvctl {name}"
        made[name] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"kvctl {name} --json",
            **_schema_of(rows, made),
        }
    return made


def _sections(text: str, heading: str) -> dict[str, str]:
    """What stands below each such heading, up to the next one of any kind."""
    parts = re.split(rf"^{heading}$", text, flags=re.MULTILINE)[1:]
    return {
        name: re.split(r"^#", below, maxsplit=1, flags=re.MULTILINE)[0]
        for name, below in zip(parts[::2], parts[1::2], strict=True)
    }


def _rows(text: str) -> list[tuple[str, str, str]]:
    """Key, type and meaning of the first table's rows."""
    table = re.search(r"^\| key \|.*\n\|[-| ]+\|\n((?:\|.*\n)*)", text, re.MULTILINE)
    rows = table[1].splitlines() if table else []
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    return [(key.strip("| `"), kind, meaning.strip("| ")) for key, kind, meaning in cells]


def _schema_of(rows: list[tuple[str, str, str]], made: dict[str, Schema]) -> Schema:
    whole: Schema = {}
    for key, kind, meaning in rows:
        place = whole
        for part in key.split("."):
            place.setdefault("type", "object")
            name = part.removesuffix("[]")
            place = place.setdefault("properties", {}).setdefault(name, {})
            if part.endswith("[]"):
                place["type"] = "array"
                place = place.setdefault("items", {})
        if kind.endswith(_ABSENT):
            place[_ABSENT] = True
        description = re.sub(r"[`\[\]]|\(#.*?\)", "", meaning)
        place |= {**_type(kind.removesuffix(_ABSENT), made), "description": description}
    return _all_required(whole)


def _type(kind: str, made: dict[str, Schema]) -> Schema:
    other = re.fullmatch(r"as kvctl ([\w-]+)(?:: (\w+))?", kind)
    if other is None:
        kinds = [TYPES[each] for each in kind.split(" or ")]
        return kinds[0] if len(kinds) == 1 else {"type": [each["type"] for each in kinds]}
    schema = made[other[1]]
    if other[2]:
        schema = schema["properties"][other[2]]
    return {name: value for name, value in schema.items() if name not in ("$schema", "title")}


def _all_required(schema: Schema) -> Schema:
    """Every key that is described is there, unless it says otherwise; others may come to be."""
    if "properties" in schema:
        properties = schema["properties"]
        schema["required"] = [name for name in properties if _ABSENT not in properties[name]]
        for each in properties.values():
            each.pop(_ABSENT, None)
            _all_required(each)
    if "items" in schema:
        _all_required(schema["items"])
    return schema


def texts() -> dict[str, str]:
    """What each file has."""
    return {
        f"kvctl-{name}.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in schemas().items()
    }


def main() -> None:
    SCHEMAS.mkdir(exist_ok=True)
    for name, text in texts().items():
        (SCHEMAS / name).write_text(text)
        sys.stdout.write(f"docs/schema/{name} is written\n")


if __name__ == "__main__":
    main()
