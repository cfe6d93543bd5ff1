"""The bench's chart."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.bench.measure import BatchResult, LoopResult
from engine.cli import writable

_INK, _MUTED, _GRID = "#1f2430", "#6b7280", "#e5e7eb"
_COLOURS = ("#9ca3af", "#60a5fa", "#2563eb", "#1e3a8a")


def chart_path(text: str) -> Path:
    """An argument's path for a chart, once it is known that it can be written and in which format.

    Raises:
        ArgumentTypeError: it cannot be written, or its ending names no format.
        ImportError: matplotlib is not installed, with the line that installs it.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from error
    path, known = writable(text), sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in known:
        raise argparse.ArgumentTypeError(f"{text} must end in one of .{', .'.join(known)}")
    return path


def save_plot(
    path: Path, title: str, loops: dict[str, LoopResult], batches: Sequence[BatchResult], bandwidth: float
) -> None:
    """Write a chart: the loops as bars on the left, decode throughput against the ceiling on the right."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12, color=_INK, x=0.01, ha="left", weight="bold")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25)) if loops else (None, figure.subplots())
    if left is not None:
        speeds = [loop.tokens_per_second for loop in loops.values()]
        bars = left.barh(list(loops), speeds, color=_COLOURS[: len(loops)], height=0.62)
        naive = speeds[0]
        labels = [f" {s:,.1f}" + ("" if s == naive else f"  ({s / naive:.1f}x)") for s in speeds]
        left.bar_label(bars, labels, fontsize=9, color=_INK)
        left.set_xlim(0, max(speeds) * 1.35)
        left.invert_yaxis()
        left.set_title("one sequence, tokens/s", fontsize=10, color=_MUTED, loc="left")
    sizes = [b.batch for b in batches]
    right.plot(sizes, [b.ceiling(bandwidth) for b in batches], "--", color=_COLOURS[0], label="memory ceiling")
    right.plot(sizes, [b.decode_tokens_per_second for b in batches], "o-", color=_COLOURS[2], label="decode")
    for b in batches:
        right.annotate(
            f"{b.decode_tokens_per_second:,.0f}",
            (b.batch, b.decode_tokens_per_second),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
            color=_INK,
        )
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.margins(x=0.08, y=0.15)
    right.set_xticks(sizes, [str(size) for size in sizes])
    right.set_xlabel("sequences at once", color=_MUTED)
    right.set_title("decode, tokens/s", fontsize=10, color=_MUTED, loc="left")
    right.grid(True, which="major", color=_GRID)
    right.legend(frameon=False, fontsize=9)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_MUTED)
    figure.savefig(path)
