"""The figure of `bench.off_policy`, from its records: accuracy against steps, a panel a kind of data."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

LOOKS = {
    "ours": ("#0b5fa5", "AGRO (ours), one setting"),
    "agro_weight1": ("#6baed6", "AGRO, weight 1"),
    "grpo": ("#d55e00", "GRPO, clipped"),
    "regularized_pg": ("#009e73", "regularised PG"),
    "regularized_pg_weighted": ("#7bc8a4", "regularised PG, negatives weighted 0.3"),
    "topr": ("#b8860b", "TOPR"),
    "rloo_frozen_kl": ("#a3246f", "RLOO, KL frozen at rollout"),
}
"""Colour and label of each provider."""
TITLES = {
    "live": "live",
    "stale4": "4 updates old",
    "stale16": "16 updates old",
    "stale64": "64 updates old",
    "offline_reference": "offline, from the reference",
    "offline_other": "offline, from a weaker policy",
    "half": "half live, half offline",
    "half_reference": "half live, half from the reference",
}
COLUMNS = 4
Figures = dict[tuple[str, str, str], Any]
"""(case, provider, metric) -> value."""


def steps_of(records: list[dict[str, Any]], data: str, last: int) -> dict[int, str]:
    """The steps at which a kind of data was measured, each with its case, in order."""
    cases = {record["case"] for record in records}
    found = {int(case.split("/step")[1]): case for case in cases if case.startswith(f"{data}/step")}
    found |= {last: data} if data in cases else {}
    return dict(sorted(found.items()))


def draw(axes: Axes, found: Figures, steps: dict[int, str], metric: str) -> None:
    """Accuracy against steps, one line a provider, with its interval."""
    start = found["start", "start", metric]
    for provider, (color, label) in LOOKS.items():
        if any((case, provider, metric) not in found for case in steps.values()):
            continue
        middle = [start, *(found[case, provider, metric] for case in steps.values())]
        half = [0.0, *(found[case, provider, f"{metric}_interval"] or 0.0 for case in steps.values())]
        low, high = ([m + sign * h for m, h in zip(middle, half, strict=True)] for sign in (-1, 1))
        axes.fill_between([0, *steps], low, high, color=color, alpha=0.12, linewidth=0)
        axes.plot([0, *steps], middle, color=color, linewidth=2.4 if provider == "ours" else 1.4, label=label)


def plot(records: list[dict[str, Any]], path: Path, last: int, *, metric: str = "exact_accuracy") -> None:
    """One panel for each kind of data that was finished, written to `path`; `last` is the number of steps."""
    found: Figures = {(r["case"], r["provider"], r["metric"]): r["value"] for r in records}
    kinds = [data for data in TITLES if steps_of(records, data, last)]
    rows = max(1, -(-len(kinds) // COLUMNS))
    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context({**style, "axes.titlesize": 10, "axes.axisbelow": True}):
        canvas = Figure(figsize=(13, 2.9 * rows + 0.5), layout="constrained")
        panels = list(canvas.subplots(rows, COLUMNS, squeeze=False, sharey=True).flat)
        for axes, data in zip(panels, kinds, strict=False):
            draw(axes, found, steps_of(records, data, last), metric)
            axes.set(title=TITLES[data], xlabel="steps")
            axes.grid(color="#e6e6e6", linewidth=0.6)
        for axes in panels[len(kinds) :]:
            axes.remove()
        panels[0].set(ylabel=metric.replace("_", " "))
        lines, labels = panels[0].get_legend_handles_labels()
        canvas.legend(lines, labels, frameon=False, ncols=4, loc="outside lower center")
        canvas.savefig(path, dpi=110)
