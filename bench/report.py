"""The rows of a report, how they are written, and what the machine was."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

REPORT = Path(__file__).resolve().parent / "report.json"


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


def write(rows: Sequence[Row], n_requests: int, n_hits: int) -> None:
    """Write bench/report.json and print the same as a table."""
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
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}; load average before: {_LOAD_AT_START:.2f}\n"
    )
    for each in rows:
        print(
            f"{each.name}\n    {each.value:10.3f} {each.unit:3} (quartiles {each.spread:.3f} apart)"
            f"   {each.ratio:8.3f} x {each.floor:.3f} {each.unit}, {each.floor_name}"
        )
    print(f"\nwritten: {REPORT.parent.name}/{REPORT.name}")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


_LOAD_AT_START = os.getloadavg()[0]
