"""The loss curve of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambakit._files import replacing


def why_no_plot() -> str | None:
    """Say why no picture can be drawn, or ``None`` if it can."""
    try:
        import matplotlib.figure  # noqa: F401  an extra, and one that may be broken
    except ModuleNotFoundError as error:
        if error.name == "matplotlib":
            return "loss.png is left out: it needs matplotlib: pip install 'mambakit[plot]'"
        return f"loss.png is left out: matplotlib cannot be imported: {error}"
    except ImportError as error:
        return f"loss.png is left out: matplotlib cannot be imported: {error}"
    return None


def plot_loss(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw training and validation bits per byte against the step.

    Args:
        path: The PNG file to write.
        rows: The lines of ``metrics.jsonl``.

    Raises:
        RuntimeError: matplotlib cannot be imported, or the file cannot be written.
    """
    missing = why_no_plot()
    if missing is not None:
        raise RuntimeError(f"plot_loss: {missing}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for kind, style in (("train", {"linewidth": 0.8}), ("validation", {"marker": "o"})):
        points = [(row["step"], row["bits_per_byte"]) for row in rows if row["kind"] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), label=kind, markersize=3.5, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
