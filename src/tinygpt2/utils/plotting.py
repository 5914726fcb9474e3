"""Create matplotlib figures and write them as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinygpt2.utils.files import atomic_path


def figure_of(columns: int) -> tuple[Any, Any]:
    """Return an empty figure and a list of its panels, which are side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * columns, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, columns, column + 1) for column in range(columns)]


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file. If that fails, no partial file is left."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
