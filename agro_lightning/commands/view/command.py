"""`view`: what a run has written, as one HTML file that needs no server and loads nothing."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agro_lightning.checkpoints.files import newest_checkpoint
from agro_lightning.checkpoints.trained import load_trained
from agro_lightning.commands.run_settings import CONFIG_FILE, run_defaults
from agro_lightning.commands.view.rows import ShownRows, gather
from agro_lightning.data.buffer.files import offline_paths
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.primitives.atomic_files import replace_text
from agro_lightning.primitives.device import choose_device
from agro_lightning.primitives.quiet import without_progress_bars
from agro_lightning.training.callbacks.csv_log import whole_rows

HERE = Path(__file__).parent
POINTS = 400
"""Most points of a curve; of more steps, each point is the mean of some."""


def view(
    run: str,
    out: str,
    rows: int = 5000,
    compute: bool = True,
    tokenizer: str | None = None,
    max_tokens: int = 16384,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Writes one HTML file with a run's curves, settings and completions, for any browser, without a server.

    Tokens are coloured by log pi - log pi_ref. log pi is that of the policy that sampled the completion, and
    log pi_ref that of the run's reference, where the rows hold them; else the newest checkpoint and its
    reference are run over the shown rows.

    Args:
        run: a run's folder; or a buffer: a Parquet or JSONL file, a folder, a glob.
        out: the HTML file to write; an older one is replaced.
        rows: most completions in it, whole groups evenly over all there are.
        compute: compute log-probs that no row holds; false leaves such tokens without a colour.
        tokenizer: the model folder or hub id whose tokenizer reads the rows; by default the run's, and for a
            buffer the quick start's.
        max_tokens: most input tokens of one forward pass.
        device: where log-probs are computed; "auto" is the GPU if there is one.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        FileNotFoundError: there is no such run or buffer.
        ValueError: nothing in the buffer can be read as rows, or the reference is gone (`compute`).
    """
    for name, value in (("rows", rows), ("max_tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    folder, target = Path(run).expanduser(), Path(out).expanduser()
    if target.is_dir():
        raise ValueError(f"{out} is a folder; name the file to write, {target / 'view.html'} say")
    of_run = (folder / CONFIG_FILE).is_file() or (folder / "metrics.csv").is_file()
    about: dict[str, Any] = {"name": folder.resolve().name if of_run else run}
    trained, paths = None, offline_paths([run])
    if of_run:
        about |= {"settings": _text(folder / CONFIG_FILE), "curves": curves(folder / "metrics.csv")}
        about["summary"] = _text(folder / "summary.json")
        paths = [str(folder / name) for name in ("samples", "replay", "stream") if (folder / name).is_dir()]
        if (folder / CONFIG_FILE).is_file():
            said = run_defaults(run, {"path": "model.policy.path", "trust": "model.policy.trust_remote_code"})
            tokenizer = tokenizer or said.get("path")
            trust_remote_code = trust_remote_code or said.get("trust", False)
        if compute and newest_checkpoint(folder / "checkpoints") is not None:
            trained = load_trained(run, device=choose_device(device))
    elif not any(Path(path).exists() for path in paths) and not any(mark in run for mark in "*?["):
        raise FileNotFoundError(f"{run} does not exist; give a run's folder, or a buffer's file or folder")
    tokens = load_tokenizer(tokenizer or "quickstart", trust_remote_code=trust_remote_code)
    with without_progress_bars():
        shown = gather(paths, tokens, limit=rows, trained=trained, max_tokens=max_tokens, may_be_empty=of_run)
    replace_text(target, page({**about, **shown.data()}))
    print(f"{run} -> {target} ({_counts(shown)}, {target.stat().st_size / 1e6:.1f} MB)")


def _counts(shown: ShownRows) -> str:
    words = f"{shown.rows} of {shown.found} completions"
    return f"{words}; {shown.unread} rows or files could not be read" if shown.unread else words


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def curves(path: Path) -> dict[str, list[list[float]]]:
    """The metrics of a run by name, as [steps, values] of at most POINTS points."""
    if not path.is_file():
        return {}
    lines = whole_rows(path)
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in next(lines) if name != "step"}
    for row in lines:
        for name, line in points.items():
            if row[name] and math.isfinite(value := float(row[name])):
                line.append((int(row["step"]) + 1, value))
    return {name: _thinned(line) for name, line in points.items() if line}


def _thinned(line: Sequence[tuple[int, float]]) -> list[list[float]]:
    width = math.ceil(len(line) / POINTS)
    parts = [line[start : start + width] for start in range(0, len(line), width)]
    means = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]
    return [[round(step, 1) for step, _ in means], [float(f"{value:.5g}") for _, value in means]]


def page(data: dict[str, Any]) -> str:
    """The HTML file. Data stand in it as JSON that no parser of HTML can take for markup; the page's policy
    lets the browser run this one script, and load nothing."""
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {"POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": as_script_data(data)}
    html = (HERE / "page.html").read_text(encoding="utf-8")
    before, *rest = html.split("@@")
    return before + "".join(parts.get(piece, piece) for piece in rest)


def as_script_data(data: Any) -> str:
    """JSON in ASCII without <, > and &: whatever texts it holds, it cannot end the script tag around it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
