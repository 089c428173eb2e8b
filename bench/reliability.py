"""The campaign of faults: kills, full disks, damaged files, bombs and fuzz; tries and outcomes.

A try holds where the promise of its case was kept:

- `kill, one process`, `kill, a rank of two`: after SIGKILL at a random moment, the same command goes on to
  the end, and the last checkpoint is bitwise that of a run that nobody killed.
- `kill, both sides of a stream`: `fit` and `rollout --follow` are killed in turn; every row is trained on
  exactly as often as configured.
- `full disk`: a run that may write no file above a size ends in one line that says how much room was needed;
  with room it goes on to the same weights.
- `flipped bit`: any bit of a checkpoint; the file is named before anything is loaded from it.
- `damaged run`: a file of a run's folder is cut, emptied, overwritten or removed; `fit --ckpt_path last`
  goes on from what is whole, or ends in one line that names the file.
- `bomb`: a checkpoint, model folder, config or data file that carries code; none of it runs.
- `fuzz, buffers`, `fuzz, settings`: any rows, columns and YAML; rows, named errors or counted drops.

The harness is the tests' (`tests/forked.py` and the modules named below); it needs the checkout. `--quick`
makes fewer tries of each. Exit status 1 where a try did not hold.
"""

import contextlib
import functools
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench._records import emit, parser, record

BENCH = "reliability"
TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
STEPS = 8
DECIDES = ("state_dict", "optimizer_states", "lr_schedulers", "AgroDataModule")
"""What a checkpoint holds, besides the seconds that a run has taken."""


@dataclass(frozen=True)
class Try:
    """One try of a case."""

    held: bool
    outcome: str


@dataclass(frozen=True)
class Size:
    """How often each case is tried."""

    kills: int
    rank_kills: int
    stream_kills: int
    full_disks: int
    bits: int
    damages: int
    examples: int


QUICK = Size(kills=3, rank_kills=1, stream_kills=1, full_disks=3, bits=200, damages=6, examples=60)
WHOLE = Size(kills=20, rank_kills=6, stream_kills=20, full_disks=12, bits=5000, damages=60, examples=1000)


@dataclass
class Campaign:
    """What the cases share: a folder, a source of chance, and a run that nothing happened to."""

    folder: Path
    size: Size
    rng: random.Random

    @functools.cached_property
    def config(self) -> Path:
        import test_fit

        path = self.folder / "small.yaml"
        path.write_text(test_fit.SMALL)
        return path

    @functools.cached_property
    def whole(self) -> Path:
        """The folder of a finished run."""
        code, said = self.fit(self.folder / "whole")
        assert code == 0, said
        return self.folder / "whole"

    def arguments(self, run_dir: Path, *more: str) -> list[str]:
        return ["fit", "--config", str(self.config), "--run_dir", str(run_dir), "--ckpt_path", "last", *more]

    def fit(self, run_dir: Path, *more: str, largest_file: int | None = None) -> tuple[int | None, str]:
        """Runs to the end; exit status and output."""
        return run(self.arguments(run_dir, *more), run_dir.with_suffix(".log"), largest_file)

    def equals_whole(self, run_dir: Path) -> bool:
        import test_fit

        try:
            whole, other = test_fit.final_state(self.whole), test_fit.final_state(run_dir)
            for key in DECIDES:
                test_fit.assert_same(whole[key], other[key], key)
        except (AssertionError, OSError):
            return False
        return True


def run(args: list[str], log: Path, largest_file: int | None = None) -> tuple[int | None, str]:
    """A command in a process of its own; exit status and what it said."""
    import forked

    log.unlink(missing_ok=True)
    process = forked.CONTEXT.Process(target=_limited, args=(args, str(log), largest_file))
    process.start()
    process.join(300)
    if process.is_alive():
        process.kill()
        return None, "still running after 300 s"
    return process.exitcode, log.read_text(errors="replace")


def _limited(args: list[str], log: str, largest_file: int | None) -> None:
    import forked

    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    forked.call(args, log)


def one_line(code: int | None, said: str, *names: str) -> Try:
    """Whether a refusal is one line that has one of the names in it."""
    last = said.strip().splitlines()[-1] if said.strip() else "nothing was said"
    held = code in (1, 2) and "Traceback" not in said and last.startswith("error: ")
    held = held and (not names or any(name in last for name in names))
    return Try(held, "refused in one line" if held else f"exit {code}: {last[:120]}")


# ---------------------------------------------------------------------- kills


def kill_one_process(at: Campaign) -> Iterator[Try]:
    import forked

    run_dir = at.folder / "killed"
    side = forked.Side(
        at.arguments(run_dir), at.folder / "killed.log", run_dir / "metrics.csv", at.size.kills, at.rng
    )
    forked.run_both([side])
    same = at.equals_whole(run_dir)
    for _ in range(side.killed):
        yield Try(same, "bitwise the same" if same else "other weights")


def kill_a_rank(at: Campaign) -> Iterator[Try]:
    from test_checkpoint_sharded import OFFLINE, tensors_of
    from test_fit import assert_same

    config = at.folder / "ranks.yaml"
    config.write_text(OFFLINE)
    finals = {}
    for name, kills in (("ranks-whole", 0), ("ranks-killed", at.size.rank_kills)):
        run_dir = at.folder / name
        options = ["--config", config, "--run_dir", run_dir, "--trainer.devices", 2, "--ckpt_path", "last"]
        options += ["--trainer.max_steps", 12, "--checkpoint_every", 2]
        killed, code, said = _ranks(run_dir, list(map(str, options)), kills, at.rng)
        if code or killed < kills:
            yield Try(False, f"exit {code} after {killed} kills: {said[-200:]}")
            return
        finals[name] = tensors_of(run_dir / "checkpoints" / "step-00000012.ckpt")
    try:
        assert_same(finals["ranks-whole"], finals["ranks-killed"])
        outcome = Try(True, "bitwise the same")
    except AssertionError as error:
        outcome = Try(False, f"other state: {error}")
    yield from [outcome] * at.size.rank_kills


def _ranks(run_dir: Path, options: list[str], kills: int, rng: random.Random) -> tuple[int, int, str]:
    """A torchrun job of two ranks, one of which is killed now and then: kills, exit status, output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(kills), "-m", "agro_lightning", "fit", *options]
    log = run_dir.with_suffix(".log")
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    killed, seen, until = 0, 0, time.monotonic() + 600
    try:
        while job.poll() is None and time.monotonic() < until:
            saved = len(list((run_dir / "checkpoints").glob("step-*")))
            victims = _children(job.pid)
            if killed < kills and saved > seen and len(victims) == 2:
                time.sleep(rng.uniform(0, 0.5))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    killed, seen = killed + 1, 0
                    time.sleep(2.0)  # the agent ends the other rank
            time.sleep(0.02)
    finally:
        if job.poll() is None:
            job.kill()
    return killed, job.wait(), log.read_text(errors="replace")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_both_sides(at: Campaign) -> Iterator[Try]:
    import forked
    import test_async

    from agro_lightning.models.pretrained import load_tokenizer

    kills = at.size.stream_kills
    steps, run_dir = 12 * kills, at.folder / "stream" / "run"
    run_dir.parent.mkdir()
    both = test_async.sides(run_dir, steps=steps, kills=kills, per_file=4, seed=at.rng.randrange(1000))
    try:
        forked.run_both(both)
        test_async.check_accounts(run_dir, steps, 4, load_tokenizer("quickstart"))
        outcome = Try(True, "each row used exactly as often as configured")
    except AssertionError as error:
        outcome = Try(False, " ".join(str(error).split())[:200])
    yield from [outcome] * sum(side.killed for side in both)


# ---------------------------------------------------------------------- full disk, damage


def full_disk(at: Campaign) -> Iterator[Try]:
    largest = max(path.stat().st_size for path in at.whole.rglob("*") if path.is_file())
    for number in range(at.size.full_disks):
        run_dir = at.folder / f"full-{number}"
        limit = int(largest * at.rng.uniform(0.02, 0.95))
        said = one_line(*at.fit(run_dir, largest_file=limit), "no room", "cannot", " needs ")
        if said.held:
            code, words = at.fit(run_dir)
            if code or not at.equals_whole(run_dir):
                said = Try(False, f"with room again: exit {code}: {words[-150:]}")
        yield said
        shutil.rmtree(run_dir, ignore_errors=True)


def flipped_bit(at: Campaign) -> Iterator[Try]:
    from agro_lightning.checkpoints.files import DamagedCheckpointError, check_checkpoint

    copy = at.folder / "step-00000008.ckpt"
    shutil.copy(at.whole / "checkpoints" / copy.name, copy)
    size = copy.stat().st_size
    with copy.open("r+b") as file:
        for _ in range(at.size.bits):
            place, bit = at.rng.randrange(size), at.rng.randrange(8)
            file.seek(place)
            (old,) = file.read(1)
            _put(file, place, old ^ 1 << bit)
            try:
                check_checkpoint(copy)
                yield Try(False, f"bit {bit} of byte {place} passed")
            except DamagedCheckpointError as error:
                yield Try(copy.name in str(error), "named")
            _put(file, place, old)


def _put(file: Any, place: int, value: int) -> None:
    file.seek(place)
    file.write(bytes([value]))
    file.flush()


def damaged_run(at: Campaign) -> Iterator[Try]:
    damages: dict[str, Callable[[Path], None]] = {
        "cut": lambda path: os.truncate(path, at.rng.randrange(path.stat().st_size)),
        "emptied": lambda path: path.write_bytes(b""),
        "overwritten": lambda path: path.write_bytes(at.rng.randbytes(200)),
        "removed": lambda path: path.unlink(),
    }
    files = sorted(path.relative_to(at.whole) for path in at.whole.rglob("*") if path.is_file())
    for number in range(at.size.damages):
        run_dir = at.folder / f"damaged-{number}"
        shutil.copytree(at.whole, run_dir, symlinks=True)
        kind, name = at.rng.choice(sorted(damages)), at.rng.choice(files)
        if not (run_dir / name).is_symlink():
            damages[kind](run_dir / name)
        code, said = at.fit(run_dir, "--trainer.max_steps", str(STEPS + 2))
        went_on = code == 0 and (run_dir / "checkpoints" / f"step-{STEPS + 2:08d}.ckpt").exists()
        went_on = went_on and "Traceback" not in said
        found = Try(True, "went on") if went_on else one_line(code, said, name.name, name.parts[0])
        yield found if found.held else Try(False, f"{name} {kind}: {found.outcome}")
        shutil.rmtree(run_dir)


# ---------------------------------------------------------------------- bombs


class _Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def bomb(at: Campaign) -> Iterator[Try]:
    for number, (name, args) in enumerate(_bombs(at.folder / "bombs")):
        mark = at.folder / "bombs" / "went-off"
        code, said = run(args, at.folder / f"bomb-{number}.log")
        if mark.exists():
            yield Try(False, f"{name}: its code ran")
            mark.unlink()
            continue
        found = one_line(code, said)
        yield found if found.held else Try(False, f"{name}: {found.outcome}")


def _bombs(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands that are given something that carries code."""
    from agro_lightning.quickstart import FOLDER

    folder.mkdir()
    mark = folder / "went-off"
    checkpoint = folder / "bomb.ckpt"
    checkpoint.write_bytes(pickle.dumps(_Bomb(mark)))
    zipped = folder / "zipped.ckpt"
    torch.save({"state_dict": _Bomb(mark)}, zipped)
    for path in (checkpoint, zipped):
        yield "checkpoint", ["fit", "--run_dir", str(folder / "run"), "--ckpt_path", str(path)]
        yield "checkpoint", ["validate", "--ckpt_path", str(path)]
        yield "checkpoint", ["export", "--ckpt", str(path), "--out", str(folder / "out")]
    weights = folder / "weights"
    shutil.copytree(FOLDER / "policy", weights)
    (weights / "model.safetensors").unlink()
    torch.save({"lm_head.weight": _Bomb(mark)}, weights / "pytorch_model.bin")
    yield "weights", ["fit", "--run_dir", str(folder / "run"), "--model.policy.path", str(weights)]
    code = folder / "code"
    shutil.copytree(FOLDER / "policy", code)
    config = json.loads((code / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {k: "mine.A" for k in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (code / "config.json").write_text(json.dumps(config))
    (code / "mine.py").write_text(f"open({str(mark)!r}, 'w')\n")
    yield "model code", ["fit", "--run_dir", str(folder / "run"), "--model.policy.path", str(code)]
    settings = folder / "settings.yaml"
    settings.write_text(f"data: {{batch_size: !!python/object/apply:os.system ['touch {mark}']}}\n")
    yield "settings", ["fit", "--config", str(settings)]
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": ' + "[" * 100_000 + "\n")
    yield "nested rows", ["inspect", str(rows)]


# ---------------------------------------------------------------------- fuzz


def fuzz_buffers(at: Campaign) -> Iterator[Try]:
    import test_buffer_fuzz as fuzz
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from agro_lightning.models.pretrained import load_tokenizer

    tokenizer, found = load_tokenizer("quickstart"), []
    limits = settings(fuzz.fuzz, max_examples=at.size.examples, derandomize=False, database=None)

    @limits
    @given(rows=st.lists(fuzz.lines, min_size=1, max_size=4), table=fuzz.tables())
    def check(rows: list[str], table: Any) -> None:
        with tempfile.TemporaryDirectory() as name:
            path = fuzz.write_jsonl(Path(name, "r.jsonl"), [fuzz.token_row(), *rows])
            total = 1 + sum(bool(row.encode().strip()) for row in rows)
            fuzz.check_file(path, total, tokenizer, Path(name))
            fuzz.pq.write_table(table, Path(name, "r.parquet"))
            fuzz.check_file(Path(name, "r.parquet"), table.num_rows, tokenizer, Path(name))
        found.append(Try(True, "rows, a named error, or counted drops"))

    yield from _examples(check, found)


def fuzz_settings(at: Campaign) -> Iterator[Try]:
    import test_config_fuzz as fuzz
    from hypothesis import given, settings

    parsers, found = fuzz.build_parsers(), []
    limits = settings(fuzz.FUZZ, max_examples=at.size.examples, derandomize=False, database=None)

    @limits
    @given(text=fuzz.malformed(fuzz.FIT))
    def check(text: str) -> None:
        code, said = fuzz.outcome(parsers, "fit", text, at.folder)
        fuzz.check(code, said)
        found.append(Try(True, "refused in one line" if code else "accepted"))

    yield from _examples(check, found)


def _examples(check: Callable[[], None], found: list[Try]) -> list[Try]:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            check()
    except Exception as error:  # hypothesis raises what the smallest failing example raised
        found.append(Try(False, " ".join(str(error).split())[:200]))
    return found


CASES: dict[str, Callable[[Campaign], Iterator[Try]]] = {
    "kill, one process": kill_one_process,
    "kill, a rank of two": kill_a_rank,
    "kill, both sides of a stream": kill_both_sides,
    "full disk": full_disk,
    "flipped bit": flipped_bit,
    "damaged run": damaged_run,
    "bomb": bomb,
    "fuzz, buffers": fuzz_buffers,
    "fuzz, settings": fuzz_settings,
}


def report(results: dict[str, list[Try]]) -> str:
    """A line for each case, and for each outcome that did not hold."""
    lines = [f"{'case':<30} {'tries':>6} {'held':>6}  outcomes"]
    for case, tries in results.items():
        kinds = Counter(item.outcome for item in tries)
        shown = "; ".join(f"{count} {outcome}" for outcome, count in kinds.most_common())
        lines.append(f"{case:<30} {len(tries):>6} {sum(item.held for item in tries):>6}  {shown}")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seed", type=int, default=0, help="of the moments, places and kinds")
    options.add_argument("--only", default="", help="cases whose names begin with this")
    options.add_argument("--keep", type=Path, default=None, help="a new folder for runs and logs, which stay")
    arguments = options.parse_args()
    results: dict[str, list[Try]] = {}
    with contextlib.ExitStack() as stack:
        if arguments.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="reliability-")))
        else:
            folder = arguments.keep.absolute()
            folder.mkdir(parents=True)
        campaign = Campaign(folder, QUICK if arguments.quick else WHOLE, random.Random(arguments.seed))
        for case, function in CASES.items():
            if case.startswith(arguments.only):
                started = time.monotonic()
                results[case] = []
                try:
                    results[case] += function(campaign)
                except Exception as error:  # the others are tried all the same
                    results[case].append(Try(False, f"{type(error).__name__}: {error}"[:200]))
                print(f"{case}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    records = [
        record(BENCH, case, "ours", metric, value, "tries")
        for case, tries in results.items()
        for metric, value in (("tries", len(tries)), ("held", sum(item.held for item in tries)))
    ]
    emit(records, arguments.json, report(results))
    if not all(item.held for tries in results.values() for item in tries):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
