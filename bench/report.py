"""The rows of a report, how they are written, and what the machine was."""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import plots

REPORT = Path(__file__).resolve().parent / "report.json"
PAPER = REPORT.with_suffix(".md")
NOISY = 0.25
"""A spread of more than this part of the value is said to be noise."""


@dataclass(frozen=True)
class Row:
    """One measured number and what it is compared with.

    `ratio` is value / floor. `spread` is the distance between the quartiles of the value, in
    `unit`. `peer` names a floor that is another program's number, and is "" for a physical floor.
    """

    name: str
    value: float
    unit: str
    floor: float
    floor_name: str
    ratio: float
    spread: float
    peer: str = ""


def row(
    name: str, values: Sequence[float], unit: str, floors: Sequence[float], floor_name: str
) -> Row:
    """Medians of the repeats, with the ratio of the medians."""
    value, floor = statistics.median(values), statistics.median(floors)
    low, _, high = statistics.quantiles(values, n=4)
    return Row(
        name,
        round(value, 6),
        unit,
        round(floor, 6),
        floor_name,
        round(value / floor, 4),
        high - low,
    )


def paired_row(
    name: str,
    values: Sequence[float],
    unit: str,
    floors: Sequence[float],
    floor_name: str,
    *,
    peer: str = "",
) -> Row:
    """As `row`, of values and floors that were measured in pairs: the ratio is the median of those
    of the pairs, so that what was slow for both does not count."""
    ratios = [value / floor for value, floor in zip(values, floors, strict=True)]
    found = row(name, values, unit, floors, floor_name)
    return replace(found, ratio=round(statistics.median(ratios), 4), peer=peer)


def tail_row(
    name: str, values: Sequence[float], unit: str, floors: Sequence[float], floor_name: str
) -> Row:
    """As `row`, of the 99th percentiles."""
    value, floor = (statistics.quantiles(each, n=100)[98] for each in (values, floors))
    low, _, high = statistics.quantiles(values, n=4)
    return Row(
        name,
        round(value, 6),
        unit,
        round(floor, 6),
        floor_name,
        round(value / floor, 4),
        high - low,
    )


def write(
    parts: Mapping[str, Sequence[Row]], remarks: Sequence[str], n_requests: int, n_hits: int
) -> None:
    """Write bench/report.json and bench/report.md, and print the rows. `parts` are those of the
    report, by their titles; `remarks` are sentences about what is missing, or not as promised."""
    rows = [each for part in parts.values() for each in part]
    machine = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": _LOAD_AT_START,
        "requests": n_requests,
        "hits": n_hits,
    }
    content = {"machine": machine, "rows": [asdict(each) for each in rows]}
    REPORT.write_text(json.dumps(content, indent=2) + "\n")
    PAPER.write_text(paper(parts, remarks, machine))
    plots.draw(parts, REPORT.parent)
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}; load average before: {_LOAD_AT_START:.2f}\n"
    )
    for each in rows:
        print(
            f"{each.name}\n    {each.value:10.3f} {each.unit:3} (quartiles {each.spread:.3f} apart)"
            f"   {each.ratio:8.3f} x {each.floor:.3f} {each.unit}, {each.floor_name}"
        )
    for remark in remarks:
        print(f"\n{remark}")
    print(f"\nwritten: {REPORT.parent.name}/{REPORT.name}, {PAPER.parent.name}/{PAPER.name}")


def paper(
    parts: Mapping[str, Sequence[Row]], remarks: Sequence[str], machine: Mapping[str, Any]
) -> str:
    """The report in Markdown."""
    lines = [
        "# What was measured",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}. Load average before: {machine['load_before']:.2f}; above "
        "about 0.5 others were at work, and the numbers are worth that much less.",
        "",
        "Medians. *Spread* is the distance between the quartiles; where it is more than "
        f"{NOISY:.0%} of the value, the row is marked ~: noise. *Ratio* is the value by that "
        "beside it, which was measured in the same run.",
    ]
    for title, rows in parts.items():
        lines += ["", f"## {title}", "", "| what | measured | spread | ratio | beside | |"]
        lines += ["|---|---:|---:|---:|---:|---|", *map(_line, rows)]
    if remarks:
        lines += ["", "## Remarks", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    noisy = " ~" if row.spread > NOISY * abs(row.value) else ""
    cells = [row.name, f"{_number(row.value)} {row.unit}{noisy}", _number(row.spread)]
    cells += [f"{row.ratio:.3f}", f"{_number(row.floor)} {row.unit}", row.floor_name]
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


_LOAD_AT_START = os.getloadavg()[0]
