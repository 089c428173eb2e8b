"""32k tokens in one group on a CPU: the process's peak against the doctor's estimate."""

import ctypes
import re
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
from ranks import run_ranks
from tiny_models import tiny_lm

from agro_lightning.commands.doctor.memory.estimate import Workload, full_batch, simulate
from agro_lightning.models.config import PolicySettings
from agro_lightning.training.module import AgroModule

MIB = 1 << 20
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""
PROMPT, COMPLETION, GROUP_SIZE = 512, 2016, 16


def module_of(folder, max_tokens):
    return AgroModule(policy=PolicySettings(path=folder), max_tokens=max_tokens)


def load():
    return Workload(
        groups=1, group_size=GROUP_SIZE, prompt_tokens=PROMPT, completion_tokens=COMPLETION, gpu=False
    )


def memory_of(name: str) -> int:
    """Bytes that /proc/self/status gives for this process."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


class Twice:
    """A sized loader of the same batch: optimiser and gradients of the first step are there in the second."""

    def __init__(self, batch):
        self.batches = [batch, batch]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def grown(rank, world, folder, max_tokens):
    """Bytes that two steps took at the most, beside what a process takes that has trained on a few tokens.

    What is freed goes back to the system at once, so that tensors count, and not what malloc keeps of them.
    """
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MIB)
    batch, few = full_batch(load()), full_batch(replace(load(), prompt_tokens=2, completion_tokens=3))
    assert batch.num_tokens == PROMPT + GROUP_SIZE * (COMPLETION - 1)
    fit(module_of(folder, max_tokens), few)  # imports and pools
    before = memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of from now on
    fit(module_of(folder, max_tokens), batch)
    return memory_of("VmHWM") - before


def fit(module, batch):
    trainer = L.Trainer(
        max_epochs=1, max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        accelerator="cpu", devices=1, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, Twice(batch))
    assert trainer.global_step == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_of_32k_tokens_stays_within_the_estimate(tmp_path):
    max_tokens = 8192  # of a pass
    lm = tiny_lm("llama", hidden_size=128, intermediate_size=256, max_position_embeddings=4096)
    lm.save_pretrained(tmp_path)
    estimate = simulate(module_of(str(tmp_path), max_tokens), load())
    (found,) = run_ranks(grown, 1, str(tmp_path), max_tokens, timeout=800)
    said = f"grew by {found / MIB:.0f} MiB, estimated {estimate.training_peak / MIB:.0f} MiB"
    print(said)
    assert found < 1.05 * estimate.training_peak + 64 * MIB, said
    assert found > 0.5 * estimate.training_peak, said
