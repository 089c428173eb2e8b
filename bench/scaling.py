"""Memory and communication per rank: real gloo ranks on this machine, then simulated 8B and 70B policies.

Real ranks (a Llama of 25M parameters with random weights, fp32, FSDP2) take two optimiser steps:

- `state_bytes_per_rank`: parameters and optimiser state on the fullest rank, cases `1`, `2`, `4`; with it
  `share_of_one_rank`, times the ranks: 1 where sharding is even.
- `communication_bytes`: what a rank sends in a step, from the tensors that it hands to collectives, over
  `communication_formula_bytes`. With n shards, a ring sends (n - 1) / n of what is gathered or scattered, and
  2 (m - 1) / m of what is summed over m replicas. Per step, with P the policy's bytes, L those of its decoder
  layers, both in the type that is communicated:

      gathered   P + L + P      policy forward, its layers again in the backward, the reference's forward
      scattered  P              gradients
      summed     P / n          over replicas, each rank's shard

- `peak_resident_bytes`: what the operating system gave the process (`_scaling_rank.py` says how that is
  measured) against `peak_estimated_bytes`, what `doctor` estimates of the same ranks without data;
  `estimate_over_resident` is their ratio.

Simulated ranks (`doctor --simulate-ranks`): the configurations of `configs/`, every prompt and completion at
full length; cases such as `llama3_70b/128`. `--quick` simulates one of them, and leaves the replicas out.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, LlamaConfig

from agro_lightning.commands.doctor.command import CHATTY, load
from agro_lightning.commands.doctor.memory.estimate import ROLLOUT, Estimate, Workload, simulate
from agro_lightning.commands.doctor.memory.tracker import KV_CACHE
from agro_lightning.commands.doctor.report import memory_table, traffic_table
from agro_lightning.primitives.quiet import quiet
from bench._records import emit, parser, record, table
from bench._scaling_rank import settings

BENCH = "scaling"
CONFIGS = Path(__file__).parents[1] / "configs"
REAL = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "2x2 replicas": (4, 2)}
"""Ranks, and replicas among them."""
SIMULATED: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "llama3_8b/8": ("llama3_8b_fsdp.yaml", 8, ("--model.sharding.replicate", "1")),
    "llama3_8b/16": ("llama3_8b_fsdp.yaml", 16, ()),
    "llama3_70b/64": ("llama3_70b_fsdp.yaml", 64, ()),
    "llama3_70b/128": ("llama3_70b_fsdp.yaml", 128, ()),
}
"""Configuration, ranks, and what is changed."""
QUICK = ("1", "2", "4", "llama3_8b/8")
"""What --quick runs of both."""
SIZES = {"tiny": (64, 2), "small": (512, 6)}
"""Hidden size and layers."""


def workload(ranks: int) -> Workload:
    """What a real rank's step takes: few tokens, so that state and not activations decide."""
    return Workload(
        ranks=ranks, gpu=False, groups=2, group_size=4, prompt_tokens=16, completion_tokens=16, clip=1.0
    )


def write_model(folder: Path, size: str) -> str:
    """A Llama with random weights."""
    hidden, layers = SIZES[size]
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / size)
    return str(folder / size)


def real_ranks(ranks: int, replicate: int, folder: Path, timeout: float = 300.0) -> list[dict[str, Any]]:
    """What each of so many real ranks measured; models are expected in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = folder / f"ranks-{ranks}-{replicate}"
    command = [sys.executable, "-m", "bench._scaling_rank", "--model", str(folder / "small")]
    command += ["--tiny", str(folder / "tiny"), "--replicate", str(replicate), "--out", str(out)]
    command += ["--load", json.dumps(asdict(workload(ranks)))]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    common |= {"TORCHELASTIC_RUN_ID": "bench"}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **(common if ranks > 1 else {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=timeout)
            if process.returncode:
                raise RuntimeError(f"a rank of {ranks} failed:\n{errors}")
    finally:
        for process in processes:
            process.kill()
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(ranks)]


def sent(traffic: list[dict[str, Any]]) -> float:
    """Bytes that a rank sends in ring algorithms."""
    return sum(
        item["bytes"] * (item["ranks"] - 1) / item["ranks"] * (2 if item["kind"] == "all-reduce" else 1)
        for item in traffic
    )


def formula(path: str, ranks: int, replicate: int) -> float:
    """Bytes that a rank sends in a step, from the model's sizes alone; see the module's docstring."""
    lm = AutoModelForCausalLM.from_pretrained(path)
    whole = sum(parameter.nbytes for parameter in lm.parameters())
    layers = sum(parameter.nbytes for parameter in lm.model.layers.parameters())
    shards = ranks // replicate
    ring = (shards - 1) / shards
    return ring * (2 * whole + layers + whole) + 2 * (replicate - 1) / replicate * whole / shards


def of_real_ranks(folder: Path, cases: Iterable[str]) -> list[dict[str, Any]]:
    """Records of the real runs; the first one is that of a single rank."""
    records, one = [], 0
    for size in SIZES:
        write_model(folder, size)
    path = str(folder / "small")
    for case in cases:
        ranks, replicate = REAL[case]
        found = real_ranks(ranks, replicate, folder)
        state = max(rank["parameters"] + rank["optimiser"] for rank in found)
        one = one or state
        estimate = simulate(settings(path, replicate), workload(ranks))
        resident = max(rank["resident"] for rank in found)
        figures: list[tuple[str, float, str]] = [
            ("state_bytes_per_rank", state, "bytes"),
            ("share_of_one_rank", state * (ranks // replicate) / one, "ratio"),
            ("peak_resident_bytes", resident, "bytes"),
            ("peak_estimated_bytes", estimate.training_peak, "bytes"),
            ("estimate_over_resident", estimate.training_peak / resident, "ratio"),
        ]
        if ranks > 1:
            measured, expected = max(sent(rank["traffic"]) for rank in found), formula(path, ranks, replicate)
            figures += [
                ("communication_bytes", measured, "bytes"),
                ("communication_formula_bytes", expected, "bytes"),
                ("communication_over_formula", measured / expected, "ratio"),
            ]
        records += [record(BENCH, case, "ours", metric, value, unit) for metric, value, unit in figures]
    return records


def of_simulated_ranks(case: str) -> tuple[list[dict[str, Any]], str]:
    """Records of one simulated case, and its tables."""
    config, ranks, changes = SIMULATED[case]
    cli = load(["--config", str(CONFIGS / config), *changes])
    load_of, estimate = cli.estimate(ranks)
    figures = {f"{name.replace(' ', '_')}_peak_bytes": sum(parts.values()) for name, parts in
               estimate.phases.items()}  # fmt: skip
    figures |= {f"{part}_bytes": size for part, size in estimate.state.items()}
    figures |= {
        "head_bytes": estimate.head,
        "kv_cache_bytes": estimate.phases[ROLLOUT][KV_CACHE],
        "activations_bytes": activations(estimate),
    }
    traffic: dict[str, float] = {}
    for item in estimate.step_traffic:
        name = f"sent_{item.kind.replace('-', '_')}_bytes"
        traffic[name] = traffic.get(name, 0.0) + item.sent_bytes
    records = [
        record(BENCH, case, "ours", metric, value, "bytes", note="simulated")
        for metric, value in {**figures, **traffic}.items()
    ]
    return records, f"{case}\n{memory_table(estimate)}\n\n{traffic_table(estimate, load_of)}"


def activations(estimate: Estimate) -> int:
    """Most bytes of activations, masks included, of a phase."""
    return max(parts["activations"] + parts["attention masks"] for parts in estimate.phases.values())


def main() -> None:
    arguments = parser(__doc__).parse_args()
    wanted = QUICK if arguments.quick else (*REAL, *SIMULATED)
    with tempfile.TemporaryDirectory() as folder, quiet(*CHATTY):
        records = of_real_ranks(Path(folder), [case for case in wanted if case in REAL])
        shown = [table(records)]
        for case in wanted:
            if case in SIMULATED:
                simulated, text = of_simulated_ranks(case)
                records += simulated
                shown.append(text)
    emit(records, arguments.json, "\n\n".join(shown))


if __name__ == "__main__":
    main()
