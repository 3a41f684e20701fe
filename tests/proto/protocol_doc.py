"""Reads PROTOCOL.md: its sections, tables and blocks of code. What they must say:
test_protocol_doc.py, and for the reports whoever makes them.
"""

import re
from pathlib import Path
from typing import NamedTuple

TEXT = (Path(__file__).parents[2] / "proto" / "PROTOCOL.md").read_text()


class Row(NamedTuple):
    """A row of a table, without the marks around its cells."""

    cells: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.cells[0].strip("`")


class Section(NamedTuple):
    """What stands below one heading, up to the next one."""

    title: str
    level: int
    text: str

    def rows(self, after: str = "") -> list[Row]:
        """The rows of the first table behind `after`, without its head; [] if there is none before
        the next blank line but one."""
        lines = self.text.partition(after)[2].strip("\n").split("\n") if after else []
        if not after:
            lines = self.text.split("\n")
            first = next((at for at, line in enumerate(lines) if line.startswith("|")), len(lines))
            lines = lines[first:]
        found = []
        for line in lines:
            if not line.startswith("|"):
                break
            cells = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append(Row(tuple(cell.strip("| ") for cell in cells)))
        return found[2:]

    def code(self) -> list[str]:
        """The fenced blocks."""
        return re.findall(r"^```\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)


def sections() -> dict[str, Section]:
    """Every section by its title."""
    parts = re.split(r"^(#{1,3}) (.+)$", TEXT, flags=re.MULTILINE)[1:]
    found = [
        Section(title, len(marks), text)
        for marks, title, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    ]
    titles = [section.title for section in found]
    assert len(set(titles)) == len(titles), "two sections have one title"
    return {section.title: section for section in found}


def report_keys(report: str) -> set[str]:
    """The keys that a report has: "sequences.max"; "models[].name" for each item of a list."""
    return {row.name for row in sections()[f"Report of {report}"].rows()}
