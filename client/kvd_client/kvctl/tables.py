"""Text for people: aligned tables, sizes, times, a bar; with or without colour.

Everything takes the `Look` of the place where it is printed, and returns text. What is shown:
views.py.
"""

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TextIO

NARROW = 80
"""Columns of a pipe, and of the terminal that everybody has."""
_SHORTEST = 6
"""Characters of a text that had to be cut, at the least."""

_ESCAPE = re.compile("\x1b\\[[0-9;]*m")

_COLOURS = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}


class Look(NamedTuple):
    """How to print: `width` in columns, whether escapes for colours are understood, and whether
    more than ASCII can be written."""

    width: int = NARROW
    colour: bool = False
    unicode: bool = True

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str] = os.environ) -> "Look":
        """For a terminal its width, and colours unless NO_COLOR is set; else plain text, of 80
        columns unless COLUMNS says otherwise."""
        is_tty = stream.isatty()
        plain = environ.get("NO_COLOR") or environ.get("TERM", "dumb") == "dumb"
        try:
            "█…".encode(stream.encoding or "ascii")
        except UnicodeEncodeError:
            can_unicode = False
        else:
            can_unicode = True
        width = shutil.get_terminal_size((NARROW, 24)).columns
        return cls(max(width, 40), is_tty and not plain, can_unicode)

    def paint(self, text: str, colour: str) -> str:
        """`text` in a colour or style, if there are any."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self.colour and colour else text


class Column(NamedTuple):
    """A column: numbers are aligned at the right; what is `elastic` is cut when space is short."""

    title: str
    right: bool = False
    elastic: bool = False
    colour_of: Callable[[str], str] | None = None
    """The colour of a cell, by its text."""


class Part(NamedTuple):
    """A part of a bar: its size, and the character and the colour that stand for it."""

    size: int
    character: str
    colour: str


def table(columns: Sequence[Column], rows: Sequence[Sequence[object]], look: Look) -> str:
    """Lines of aligned cells under their titles, no longer than the look is wide if cutting the
    elastic columns can achieve that."""
    cells = [[clean(str(cell)) for cell in row] for row in rows]
    widths = [
        max([len(column.title), *(width_of(row[index]) for row in cells)])
        for index, column in enumerate(columns)
    ]
    _squeeze(widths, columns, look.width)
    lines = [look.paint(_line([column.title for column in columns], widths, columns, look), "bold")]
    for row in cells:
        styles = [
            column.colour_of(cell) if column.colour_of else ""
            for column, cell in zip(columns, row, strict=True)
        ]
        lines.append(_line(row, widths, columns, look, styles))
    return "\n".join(lines)


def bar(parts: Sequence[Part], width: int, look: Look) -> str:
    """A bar of `width` cells; whatever is not 0 gets at least one."""
    total = sum(part.size for part in parts)
    if not total:
        return " " * width
    cells = [max(part.size * width // total, part.size > 0) for part in parts]
    # What rounding has lost or added is the largest part's: there it is seen least.
    cells[cells.index(max(cells))] += width - sum(cells)
    return "".join(
        look.paint(part.character * count, part.colour)
        for part, count in zip(parts, cells, strict=True)
    )


def size(n_bytes: float) -> str:
    """Bytes for people: 0 B, 1023 B, 1.5 KiB, 23.0 GiB."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        n_bytes /= 1024
        # 1023.95 would be shown as 1024.0
        if abs(n_bytes) < 1023.95 or unit == "TiB":
            break
    return f"{n_bytes:.1f} {unit}"


def count(n: int) -> str:
    """12345678 as 12,345,678."""
    return f"{n:,}"


def percent(part: float, whole: float) -> str:
    """93.1 %; a dash if there is no whole."""
    if not whole:
        return "-"
    return "< 0.1 %" if 0 < part < whole / 1000 else f"{100 * part / whole:.1f} %"


def duration(seconds: float) -> str:
    """0.2 s, 59 s, 12 min, 3 h 12 min, 5 d 7 h."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def clean(text: str) -> str:
    """Names come from other programs: nothing in them may steer the terminal."""
    return "".join(each if each.isprintable() else "?" for each in text)


def width_of(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in text)


def width_of_painted(line: str) -> int:
    """The same, of a line with colours."""
    return width_of(_ESCAPE.sub("", line))


def clip(line: str, width: int) -> str:
    """The line's first `width` columns; colours that were on are off at the end."""
    if width_of_painted(line) <= width:
        return line
    kept, used = "", 0
    for piece in re.split(f"({_ESCAPE.pattern})", line):
        if _ESCAPE.fullmatch(piece):
            kept += piece
            continue
        for letter in piece:
            used += width_of(letter)
            if used > width:
                return kept + "\x1b[0m" * ("\x1b" in kept)
            kept += letter
    return kept


def _squeeze(widths: list[int], columns: Sequence[Column], most: int) -> None:
    """Take from the widest elastic column, one by one, what is too much."""
    elastic = [index for index, column in enumerate(columns) if column.elastic]
    while sum(widths) + 2 * (len(widths) - 1) > most:
        widest = max(elastic, key=lambda index: widths[index], default=None)
        if widest is None or widths[widest] <= max(_SHORTEST, len(columns[widest].title)):
            return
        widths[widest] -= 1


def _line(
    cells: Sequence[str],
    widths: Sequence[int],
    columns: Sequence[Column],
    look: Look,
    styles: Sequence[str] | None = None,
) -> str:
    line = []
    for index, (cell, width, column) in enumerate(zip(cells, widths, columns, strict=True)):
        text = _cut(cell, width, look)
        padding = " " * (width - width_of(text))
        painted = look.paint(text, styles[index] if styles else "")
        line.append(padding + painted if column.right else painted + padding)
    return "  ".join(line).rstrip()


def _cut(text: str, width: int, look: Look) -> str:
    if width_of(text) <= width:
        return text
    end = "…" if look.unicode else "~"
    while width_of(text) > width - 1:
        text = text[:-1]
    return text + end
