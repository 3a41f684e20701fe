"""A chart for each part of the report: every row's ratio to what it is measured beside."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(parts: Mapping[str, Sequence[Any]], folder: Path) -> list[Path]:
    """Write `report-PART.png` for each part (title to rows) into `folder`; returns the files. None
    without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    for old in folder.glob("report-*.png"):
        with contextlib.suppress(OSError):
            old.unlink()
    written: list[Path] = []
    for title, rows in parts.items():
        figure = Figure(figsize=(11, 1.2 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        labels = [f"{row.name} / {row.floor_name}" for row in rows]
        axes.barh(range(len(rows)), [max(row.ratio, 1e-3) for row in rows])
        axes.set_yticks(range(len(rows)), labels, fontsize=7)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("ratio: left of 1 is faster, or smaller")
        axes.set_title(title)
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        written.append(folder / f"report-{name}.png")
        FigureCanvasAgg(figure).print_png(written[-1])
    return written
