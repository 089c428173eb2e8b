"""The figure of `bench.off_policy`, from its records: accuracy against steps, and against KL."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "ours": "#0b5fa5",
    "rloo": "#7a7a7a",
    "rloo_frozen_kl": "#a3246f",
    "grpo": "#d55e00",
    "regularized_pg": "#009e73",
}
LABELS = {
    "ours": "AGRO (ours)",
    "rloo": "RLOO, KL of the current policy",
    "rloo_frozen_kl": "RLOO, KL frozen at rollout",
    "grpo": "GRPO, clipped",
    "regularized_pg": "regularised PG, KL in the loss",
}
TITLES = {
    "live": "live",
    "stale4": "4 updates old",
    "stale16": "16 updates old",
    "stale64": "64 updates old",
    "offline_reference": "offline, from the reference",
    "offline_other": "offline, from a weaker policy",
    "half": "half live, half offline",
}
COLUMNS = 5
LEAST_KL = 0.005
"""The left end of the frontiers, in nats: smaller ones are drawn there."""
Figures = dict[tuple[str, str, str], Any]
"""(case, provider, metric) -> value."""


def draw_curves(axes: Axes, found: Figures, data: str) -> None:
    """Sampled accuracy against steps, one line an objective, with its interval."""
    start = found["start", "start", "sampled_accuracy"]
    steps = sorted({int(case.split("/step")[1]) for case, _, _ in found if case.startswith(f"{data}/step")})
    last = f"{data}/step{steps[-1]}"
    for provider in [name for name in COLORS if (last, name, "sampled_accuracy") in found]:
        cases = [(f"{data}/step{step}", provider) for step in steps]
        middle = [start, *(found[(*case, "sampled_accuracy")] for case in cases)]
        half = [0.0, *(found[(*case, "sampled_accuracy_interval")] or 0.0 for case in cases)]
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        axes.fill_between([0, *steps], low, high, color=COLORS[provider], alpha=0.12, linewidth=0)
        wide = 2.2 if provider == "ours" else 1.4
        style = "--" if provider == "rloo" else "-"
        axes.plot([0, *steps], middle, style, color=COLORS[provider], linewidth=wide, label=LABELS[provider])
    axes.set(title=TITLES[data], xlabel="steps", ylim=(0.25, 0.75))


def draw_frontier(axes: Axes, found: Figures, data: str) -> None:
    """Every setting of the search: accuracy against KL. The line is the best accuracy that a KL buys."""
    for provider, color in COLORS.items():
        cases = {case for case, name, _ in found if name == provider and case.startswith(f"search/{data}/")}
        points = sorted(
            (max(kl, LEAST_KL), found[case, provider, "sampled_accuracy"])
            for case in cases
            for kl in [found[case, provider, "kl_to_reference"]]
        )
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o", color=color, markersize=4, alpha=0.8)
        rising = [point for i, point in enumerate(points) if point[1] >= max(y for _, y in points[: i + 1])]
        axes.plot(*zip(*rising, strict=True), "-", color=color, linewidth=1.2)
    start = found["start", "start", "sampled_accuracy"]
    axes.axhline(start, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(title=f"search: {TITLES[data]}", xlabel="KL to the reference (nats)", xscale="log")
    axes.set(xlim=(LEAST_KL, 12), ylim=(0, 0.8))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """One panel for each kind of data, one for each frontier, written to `path`."""
    found: Figures = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    cases = {case for case, _, _ in found}
    kinds = [data for data in TITLES if any(case.startswith(f"{data}/step") for case in cases)]
    frontiers = [data for data in TITLES if any(case.startswith(f"search/{data}/") for case in cases)]
    count = len(kinds) + len(frontiers)
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**style, "axes.titlesize": 10, "axes.axisbelow": True}):
        rows = -(-count // COLUMNS)
        canvas = Figure(figsize=(14, 2.9 * rows + 0.4), layout="constrained")
        panels = canvas.subplots(rows, COLUMNS, squeeze=False).flat
        for axes, data in zip(panels, kinds, strict=False):
            draw_curves(axes, found, data)
        lines, labels = panels[0].get_legend_handles_labels()
        for axes, data in zip(panels[len(kinds) :], frontiers, strict=False):
            draw_frontier(axes, found, data)
        for axes in panels[count:]:
            axes.remove()
        for axes in panels[:count]:
            axes.grid(color="#e6e6e6", linewidth=0.6)
        for axes in panels[::COLUMNS]:
            axes.set(ylabel="sampled accuracy")
        canvas.legend(lines, labels, frameon=False, ncols=5, loc="outside lower center")
        canvas.savefig(path, dpi=110)
