"""The README.md beside an exported model: what it is made of, from the run's own files."""

import csv
import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

METRICS = ("train/reward", "train/objective", "train/kl", "train/log_ratio")
"""Shown with their value of the last step that has one."""


def model_card(about: dict[str, Any], run: Path | None, *, command: str, adapter: bool, name: str) -> str:
    """Markdown with the front matter that model hubs read.

    Local folders are called by their last name alone: the card may be published.

    Args:
        about: what the checkpoint says, as read_policy gives it.
        run: the run's folder, with config.yaml, summary.json and metrics.csv; None where it is not at hand.
        command: the command line that made this folder.
        adapter: whether the folder holds a LoRA adapter.
        name: the title.
    """
    config = _yaml(run / "config.yaml") if run else {}
    model, data = _at(config, "model"), _at(config, "data")
    base = about["policy"]["path"]
    front: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["agro", "agro-lightning", "reinforcement-learning"],
    }
    if _public(base) == base and "/" in base:
        front["base_model"] = base
    lora = about["policy"]["lora"]
    rows = {
        "base": _public(base) + (f", LoRA of rank {lora['rank']}" if lora else ""),
        "reference": about.get("reference_id"),
        "objective": _class(_at(model, "objective")),
        "rewards": ", ".join(map(_class, data.get("rewards") or [])) or None,
        "prompts": _prompts(_at(data, "train")),
        "sampling": _pairs(_at(data, "sampling")),
        "optimizer": _pairs(_at(model, "optimizer")),
        "batch": f"{data['batch_size']} prompts × {data['group_size']} completions a micro-batch, "
        f"{_at(config, 'trainer').get('accumulate_grad_batches') or 1} a step"
        if {"batch_size", "group_size"} <= data.keys()
        else None,
        "steps": about.get("global_step"),
    }
    lines = [f"# {name}", "", "Trained with agro-lightning, whose algorithm is AGRO (arXiv 2503.19612)."]
    lines += [
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value),
    ]
    if sources := data.get("sources"):
        total = sum(source.get("weight") or 1.0 for source in sources)
        lines += ["", "## Data", "", "| source | share | files |", "|---|---|---|"]
        for source in sources:
            files = ", ".join(map(_public, source.get("paths") or [])) or "–"
            share = (source.get("weight") or 1.0) / total
            lines.append(f"| {_cell(source.get('name') or _kind(source))} | {share:.1%} | {_cell(files)} |")
    lines += ["", *_measured(run)]
    fit = "python -m agro_lightning fit --config config.yaml   # that of the run's folder"
    lines += ["## How it was made", "", "```", fit, command, "```", "", _software(), ""]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(lines)


def _measured(run: Path | None) -> list[str]:
    """Accuracy before and after, and the last metrics."""
    lines: list[str] = []
    summary = _json(run / "summary.json") if run else {}
    before, after = summary.get("before") or {}, summary.get("after") or {}
    if after:
        lines += ["## Metrics", "", "| | before | after |", "|---|---|---|"]
        lines += [
            f"| {key.replace('_', ' ')} | {_number(before.get(key))} | {_number(after[key])} |"
            for key in after
        ]
        lines.append("")
    if run and (run / "metrics.csv").is_file():
        last: dict[str, str] = {}
        with (run / "metrics.csv").open(newline="", encoding="utf-8", errors="replace") as handle:
            for row in csv.DictReader(handle):
                last |= {name: value for name, value in row.items() if name and value}
        shown = [name for name in last if name in METRICS or name.startswith(("train/reward/", "val/"))]
        if shown:
            lines += ["| last value of | |", "|---|---|"]
            lines += [f"| {_cell(name)} | {_number(last[name])} |" for name in shown]
            lines.append("")
    return lines


def _software() -> str:
    try:
        made = f"agro-lightning {version('agro-lightning')}"
    except PackageNotFoundError:  # run from a checkout that is not installed
        made = "agro-lightning"
    if commit := _commit():
        made += f" (commit {commit})"
    parts = (f"PyTorch {torch.__version__}", f"transformers {transformers.__version__}")
    return f"{made}, {', '.join(parts)}, Python {platform.python_version()}."


def _commit() -> str | None:
    """Of the checkout that this package runs from; None where it is installed."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(here), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _public(path: str) -> str:
    """A hub id as it is; of a local path its last name."""
    local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).expanduser().exists()
    return Path(path).name or path if local else path


def _prompts(train: dict[str, Any]) -> str | None:
    if not train.get("path"):
        return None
    kept = {name: train.get(name) for name in ("format", "split", "subset", "limit") if train.get(name)}
    return f"{_public(train['path'])} ({_pairs(kept)})"


def _class(found: Any) -> str:
    """`Agro(beta=0.02)` of a class_path with init_args."""
    if not isinstance(found, dict) or "class_path" not in found:
        return str(found) if found else ""
    return f"{_kind(found)}({_pairs(found.get('init_args') or {})})"


def _kind(found: dict[str, Any]) -> str:
    return str(found.get("class_path", "source")).rpartition(".")[2]


def _pairs(values: dict[str, Any]) -> str:
    shown = {name: _public(value) if isinstance(value, str) else value for name, value in values.items()}
    return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)


def _number(value: Any) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return "–"
    return f"{number:.4g}" if math.isfinite(number) else "–"


def _cell(value: Any) -> str:
    """Text that cannot break a Markdown table, nor be markup."""
    text = " ".join(str(value).split())
    for mark, written in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("`", "\\`")):
        text = text.replace(mark, written)
    return text


def _at(config: Any, name: str) -> dict[str, Any]:
    found = config.get(name) if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return _dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]})") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        return _dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from None


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
