"""What every benchmark writes: flat records, a table on the screen, a JSON list.

A benchmark builds its records with :func:`record`, parses `[--quick] [--json PATH]` with :func:`parser`, and
ends with :func:`emit`. One record is one figure.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "lightning")
FIELDS = ("bench", "case", "provider", "metric", "value", "unit", "device", "versions", "commit")


@cache
def device_name() -> str:
    """The accelerator's name where there is one, else the processor's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()} ({torch.get_num_threads()} threads)"


@cache
def versions() -> dict[str, str]:
    """Versions of Python, of the packages that decide the figures, and of the GPU driver if any."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    return found


@cache
def commit() -> str:
    """The commit, with `+changes` where tracked files differ from it; `unknown` outside git."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def record(
    bench: str,
    case: str,
    provider: str,
    metric: str,
    value: float | int | None,
    unit: str,
    note: str | None = None,
) -> dict[str, Any]:
    """One figure.

    Args:
        bench: the benchmark's module name, such as `linear_logprobs`.
        case: what was run, such as `4096x512x32000`.
        provider: `ours` for this project's default path, a peer by its package name.
        metric: such as `seconds`; `absent` marks a peer that could not be run.
        value: the figure; None where there is none (a NaN is stored as None, since JSON has no NaN).
        unit: such as `s`, `bytes`, `ratio`.
        note: why a value is missing, or how it was measured; left out of the record where None.
    """
    if isinstance(value, float) and not math.isfinite(value):
        value = None
    figures = (bench, case, provider, metric, value, unit, device_name(), versions(), commit())
    fields: dict[str, Any] = dict(zip(FIELDS, figures, strict=True))
    return fields if note is None else {**fields, "note": note}


def absent(bench: str, case: str, provider: str, reason: str) -> dict[str, Any]:
    """The record of a peer that could not be run, with the reason; peers are never dropped silently."""
    return record(bench, case, provider, "absent", None, "", note=reason)


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the two options every benchmark has."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument(
        "--quick", action="store_true", help="small cases only: under 2 minutes on 2 cores"
    )
    arguments.add_argument("--json", type=Path, metavar="PATH", help="also write the records to this file")
    return arguments


def table(records: list[dict[str, Any]]) -> str:
    """The records as an aligned table, one figure a line."""
    rows = [("case", "provider", "metric", "value", "unit", "note")]
    for item in records:
        value = item["value"]
        shown = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        rows.append(
            (item["case"], item["provider"], item["metric"], shown, item["unit"], item.get("note", ""))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def emit(records: list[dict[str, Any]], json_path: Path | None, shown: str | None = None) -> None:
    """Prints the table (or `shown`, a better one), and writes the JSON where a path was given."""
    print(table(records) if shown is None else shown)
    if json_path is not None:
        write(records, json_path)


def write(records: list[dict[str, Any]], json_path: Path) -> None:
    """Writes the JSON list aside and renames it, so that a stopped process leaves the last whole one."""
    json_path.parent.mkdir(parents=True, exist_ok=True)
    aside = json_path.with_name(json_path.name + ".partial")
    aside.write_text(json.dumps(records, indent=1) + "\n")
    aside.replace(json_path)
