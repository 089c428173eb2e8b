"""What the doctor prints: a line for each check, tables of memory and communication."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence

from agro_lightning.commands.doctor.memory.estimate import ROLLOUT, Estimate, Workload
from agro_lightning.commands.doctor.memory.tracker import KV_CACHE, PARTS, Traffic

GIB = 1 << 30


class CheckFailed(ValueError):
    """What a check found wrong, with lines to print below."""

    def __init__(self, words: str, details: str = "") -> None:
        super().__init__(words)
        self.details = details


class Checks:
    """Runs checks one by one and prints a line for each; one that fails does not stop those after it.

    Args:
        rank: of this process; the first one speaks, and others of what failed on them.
        as_json: print nothing but one object at the end.
    """

    def __init__(self, rank: int = 0, *, as_json: bool = False) -> None:
        self.passed: set[str] = set()
        self.failed: list[str] = []
        self.rank, self._as_json = rank, as_json
        self.records: list[dict[str, str]] = []

    def run(
        self, name: str, action: Callable[[], str], *, needs: Sequence[str] = (), advice: str = ""
    ) -> None:
        """Runs a check.

        Args:
            name: of the check.
            action: returns what to say; lines after the first are printed below. Raises what is wrong.
            needs: checks that must have passed; otherwise this one is not run.
            advice: what to do where it fails and the error does not say so.
        """
        lacking = [other for other in needs if other not in self.passed]
        if lacking:
            self.skip(name, f"needs: {', '.join(lacking)}")
            return
        try:
            words = action()
        except Exception as error:  # whatever goes wrong is this check's finding
            self.fail(name, error, advice)
        else:
            self.ok(name, words)

    def ok(self, name: str, words: str) -> None:
        """Notes and prints a check that passed; lines of `words` after the first stand below."""
        self.passed.add(name)
        first, _, rest = words.partition("\n")
        self._note(name, "ok", first, rest)

    def fail(self, name: str, error: BaseException, advice: str = "") -> None:
        """Notes and prints a check that failed: the error in one line, and what to do."""
        self.failed.append(name)
        kind = "" if isinstance(error, ValueError | OSError | RuntimeError) else f"{type(error).__name__}: "
        words = " ".join(str(error).split()) or type(error).__name__
        where = f"rank {self.rank}: " if self.rank else ""
        details = error.details if isinstance(error, CheckFailed) else ""
        self._note(name, "FAILED", f"{where}{kind}{words}{f'. {advice}' if advice else ''}", details)

    def skip(self, name: str, words: str) -> None:
        """Prints a check that was not run, which counts as not passed."""
        self._note(name, "not run", words)

    def _note(self, name: str, verdict: str, words: str, details: str = "") -> None:
        self.records.append({"check": name, "verdict": verdict, "words": words, "details": details})
        if self.rank == 0 or verdict == "FAILED":
            self.say(f"{verdict:<8} {name:<12} {words}", every_rank=True)
            below = [f"         {line}".rstrip() for line in details.splitlines()]
            if below:
                self.say("\n".join(below))

    def say(self, text: str, *, every_rank: bool = False) -> None:
        """Prints a line, on the first rank unless told otherwise."""
        if (self.rank == 0 or every_rank) and not self._as_json:
            self._write(text)

    def finish(self) -> None:
        """Prints the verdict on all checks, or the JSON object."""
        failed = ", ".join(self.failed)
        self.say(f"\n{len(self.failed)} failed: {failed}" if failed else "\nall is well")
        if self._as_json and self.rank == 0:
            self._write(json.dumps({"checks": self.records, "failed": self.failed}, indent=1))

    def _write(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def memory_table(estimate: Estimate) -> str:
    """Bytes of one rank by part, when each phase of a step holds most."""
    names = list(estimate.phases)
    parts = [part for part in PARTS if any(held[part] for held in estimate.phases.values())]
    rows = [("one rank's memory", *names)]
    rows += [(part, *(amount(estimate.phases[name][part]) for name in names)) for part in parts]
    rows.append(("sum", *(amount(sum(estimate.phases[name].values())) for name in names)))
    return _aligned(rows)


def traffic_table(estimate: Estimate, workload: Workload) -> str:
    """What one rank sends in a step, by kind and group; ring algorithms."""
    rows = [("one rank sends", "over", "calls", "bytes")]
    both = (("rollout", estimate.rollout_traffic), ("training", estimate.step_traffic))
    least = 1e-4 * max((item.sent_bytes for _, traffic in both for item in traffic), default=0.0)
    for when, traffic in both:
        rows += [
            (f"{when}: {item.kind}", f"{len(item.ranks)} {axis(item, workload)} ranks", str(item.calls),
             amount(item.sent_bytes))
            for item in traffic
            if item.sent_bytes > least  # of the rest, numbers that ranks agree on
        ]  # fmt: skip
    return _aligned(rows)


def axis(traffic: Traffic, workload: Workload) -> str:
    """Which ranks a group joins: those that split each layer, that split one copy, or that hold copies."""
    apart = traffic.ranks[1] - traffic.ranks[0] if len(traffic.ranks) > 1 else 0
    if apart < workload.tensor_parallel:
        return "tensor"
    whole = apart * len(traffic.ranks) == workload.ranks
    return "replica" if whole and apart > workload.tensor_parallel else "shard"


def not_counted(workload: Workload) -> str:
    """What the estimate leaves out."""
    engine = "what a rollout engine other than BatchedDecoding holds, sampling's scratch"
    if workload.gpu:
        return (
            "not counted: the CUDA context and libraries, NCCL's buffers, what the allocator rounds up and "
            f"fragments, {engine}. The GPU's kernels (flex attention, the Triton head) are counted by what "
            "they allocate"
        )
    return (
        "not counted: the process without the model, gloo's buffers, the inside of operators, what malloc "
        f"keeps of freed blocks (MALLOC_MMAP_THRESHOLD_=1048576 gives them back), {engine}"
    )


def amount(size: float) -> str:
    """Bytes with a unit."""
    for unit, factor in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B" if size else "-"


def totals(estimate: Estimate) -> str:
    """The highest moment, and how much of it is sized by the engine."""
    cache = estimate.phases[ROLLOUT][KV_CACHE]
    return (
        f"at most {amount(estimate.peak)}, while training {amount(estimate.training_peak)}; the head by "
        f"itself at most {amount(estimate.head)}, the rollout's KV cache and logits {amount(cache)}"
    )


def _aligned(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
