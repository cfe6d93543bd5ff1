"""The chart of a comparison: ``python -m benchmarks.chart FILE --output benchmarks/compare.png``.

``FILE`` is what ``python -m benchmarks.compare --json FILE`` wrote. One panel a case: tokens/s as bars, the fastest
first, ours coloured, and for ours a tick at the machine's limit in that precision. Needs matplotlib, the extra "plot".
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.engines import OWN

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = {True: "#2563eb", False: "#c3c8d1"}
NAMES = {"openvino": "OpenVINO", "ctranslate2": "CTranslate2", "llama_cpp": "llama.cpp", "vllm": "vLLM"}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def label(row: dict[str, Any]) -> str:
    """As in "OpenVINO int8"."""
    return f"{NAMES.get(row['engine'], row['engine'])} {SHORT.get(row['precision'], row['precision'])}"


def panels(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Case -> its rows, the fastest first; cases in the order of the file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return {case: sorted(among, key=lambda row: -row["tokens_per_s"]) for case, among in found.items()}


def title(case: str) -> str:
    """A case in words."""
    kind, number = case.split()
    if kind == "prefill":
        return f"prompt of {number} tokens: tokens/s"
    return f"decoding {number} sequence{'s' if number != '1' else ''}: tokens/s"


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """One case on one axes: bars from the fastest down, the limit's tick behind ours."""
    speeds = [row["tokens_per_s"] for row in rows]
    colours = [COLOURS[row["engine"] in OWN] for row in rows]
    bars = axes.barh([label(row) for row in rows], speeds, color=colours, height=0.72)
    ours = {place: row for place, row in enumerate(rows) if row["engine"] in OWN}
    limits = {place: row["tokens_per_s"] / row["share_of_limit"] for place, row in ours.items()}
    axes.vlines(limits.values(), [p - 0.36 for p in limits], [p + 0.36 for p in limits], color=INK, linewidth=1.4)
    shares = [f" {row['share_of_limit']:.0%} of the limit" if row["engine"] in OWN else "" for row in rows]
    for bar, place, speed, share in zip(bars, range(len(rows)), speeds, shares, strict=True):
        right = max(speed, limits.get(place, 0))
        text = f"{speed:,.0f}" if speed >= 100 else f"{speed:,.1f}"
        middle = bar.get_y() + bar.get_height() / 2
        axes.text(right, middle, f" {text}{share}", va="center", fontsize=8, color=INK)
    axes.set_xlim(0, max(*speeds, *limits.values()) * 1.5)
    axes.invert_yaxis()
    axes.set_title(title(rows[0]["case"]), fontsize=10, color=MUTED, loc="left")
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(GRID)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row["engine"] in OWN:
            tick.set_color(COLOURS[True])
            tick.set_fontweight("bold")


def save_chart(result: dict[str, Any], path: Path) -> None:
    """Write the chart as what ``path`` ends in, PNG or SVG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    cases = panels(result["rows"])
    lines = -(-len(cases) // 2)
    tallest = max(map(len, cases.values()))
    figure = Figure(figsize=(10, lines * (0.7 + 0.21 * tallest) + 0.6), dpi=110, layout="constrained")
    words = f"{result['machine']}, {result['isa']}, {result['threads']} threads; GPT-2 124M, random weights"
    words += "\nTick: the machine's limit, were every weight read in its type's size; in bf16 ours take 12 bits"
    figure.suptitle(words, fontsize=10, color=INK, x=0.01, ha="left")
    grid = figure.subplots(lines, 2 if len(cases) > 1 else 1, squeeze=False)
    for axes, rows in zip(grid.flat, cases.values(), strict=False):
        draw(axes, rows)
    for axes in grid.flat[len(cases) :]:
        axes.set_visible(False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, draw."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("result", type=Path, metavar="FILE")
    made.add_argument("--output", type=Path, default=Path(__file__).with_name("compare.png"))
    args = made.parse_args(arguments)
    save_chart(json.loads(args.result.read_text(encoding="utf-8")), args.output)


if __name__ == "__main__":
    main()
