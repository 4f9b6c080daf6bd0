"""Draws what cpu.py measured: a row of panels for each shape, a group of bars for each precision."""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"llama": "#0072b2", "llama.cpp": "#e69f00", "transformers": "#999999"}  # told apart by all eyes
Medians = dict[tuple[str, str], dict[str, float]]


def draw(shapes: dict[str, Medians], figures: dict[str, str], lower_is_better: set[str], path: Path) -> None:
    """Bars of every figure (name → title), from shape → (runner, precision) → figure → median."""
    size = (3.1 * len(figures), 3.3 * len(shapes) + 0.6)
    canvas, grid = plt.subplots(len(shapes), len(figures), figsize=size, squeeze=False, layout="constrained")
    for row, (shape, medians) in zip(grid, shapes.items(), strict=True):
        for axes, (name, title) in zip(row, figures.items(), strict=True):
            bars(axes, medians, name)
            better = "lower" if name in lower_is_better else "higher"
            axes.set_title(f"{title}\n{better} is better", fontsize=9)
        row[0].set_ylabel(shape, fontsize=13, fontweight="bold")
    handles, labels = grid[0][0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    canvas.savefig(path, dpi=80)
    plt.close(canvas)


def bars(axes: plt.Axes, medians: Medians, name: str) -> None:
    """One figure: the runners side by side, for each precision."""
    precisions = list(dict.fromkeys(precision for _, precision in medians))
    runners = [runner for runner in COLOURS if any(runner == found for found, _ in medians)]
    width = 0.8 / len(runners)
    for i, runner in enumerate(runners):
        places = [at for at, precision in enumerate(precisions) if (runner, precision) in medians]
        values = [medians[runner, precisions[at]][name] for at in places]
        shifted = [at + (i - (len(runners) - 1) / 2) * width for at in places]
        drawn = axes.bar(shifted, values, width * 0.92, color=COLOURS[runner], label=runner)
        axes.bar_label(drawn, [f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in values], fontsize=6.5)
    axes.set_xticks(range(len(precisions)), precisions)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.12)
