"""Shares of sources: among the groups of a step, and within each group."""

import logging
from collections import Counter

import lightning as L
import numpy as np
import pytest
from prompt_rows import load
from rollout_files import open_buffer, write_jsonl

from agro_lightning import AgroDataModule, AgroModule
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.sources import (
    Live,
    Offline,
    Replay,
    describe_within_group,
    share_out,
    split_group,
)
from agro_lightning.training.optimizer import OptimizerSettings

# Lightning's own warnings, which no setting of ours ends
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


@pytest.mark.parametrize(
    ("weights", "count", "least", "most"),
    [
        ([2, 1, 1], 8, [4, 2, 2], [4, 2, 2]),
        ([7, 1], 4, [3, 0], [4, 1]),
        ([1, 1, 1], 4, [1, 1, 1], [2, 2, 2]),
        ([1], 5, [5], [5]),
        ([1e-9, 1], 3, [0, 3], [0, 3]),
    ],
)
def test_share_out_rounds_each_share_up_or_down_and_is_exact_on_average(weights, count, least, most):
    draws = [share_out(weights, count, np.random.default_rng(seed)) for seed in range(4000)]
    counts = np.array([np.bincount(draw, minlength=len(weights)) for draw in draws])
    assert (counts.sum(1) == count).all()
    assert counts.min(0).tolist() == least and counts.max(0).tolist() == most
    exact = np.array(weights) / sum(weights) * count
    assert np.abs(counts.mean(0) - exact).max() < 0.04


def test_share_out_puts_sources_in_random_order():
    firsts = Counter(int(share_out([1, 1], 2, np.random.default_rng(seed))[0]) for seed in range(400))
    assert abs(firsts[0] - 200) < 60


@pytest.mark.parametrize(
    ("weights", "size", "expected"),
    [
        ([2, 1, 1], 8, [4, 2, 2]),
        ([0.5, 0.25, 0.25], 6, [3, 2, 1]),
        ([0.6, 0.4], 4, [2, 2]),  # 2.4 and 1.6: the larger remainder is rounded up
        ([0.875, 0.125], 4, [4, 0]),  # 3.5 and 0.5: the first of equal remainders
        ([1, 1, 1], 2, [1, 1, 0]),
    ],
)
def test_split_group_rounds_the_largest_remainders_up(weights, size, expected):
    assert split_group(weights, size) == expected


def test_split_group_gives_small_shares_their_due_over_many_groups():
    counts = np.array([split_group([7, 1], 4, np.random.default_rng(seed)) for seed in range(4000)])
    assert (counts.sum(1) == 4).all() and set(counts[:, 1]) == {0, 1}
    assert abs(counts[:, 1].mean() - 0.5) < 0.03


@pytest.fixture
def covered(tmp_path, quickstart_tokenizer):
    """8 prompts, of which the first 4 have 4 rows each, and the fifth has one."""
    prompts = [f"{i}+{i}=" for i in range(8)]
    rows = [
        {"prompt": prompts[i], "completion": str(copy), "reward": copy % 2}
        for i in range(5)
        for copy in range(4 if i < 4 else 1)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    prompt_path = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": text, "answer": "1"} for text in prompts]
    )
    return path, prompt_path


def test_what_a_buffer_cannot_give_is_described(covered, tmp_path, quickstart_tokenizer):
    path, prompt_path = covered
    prompts = list(load(prompt_path, quickstart_tokenizer))
    buffers = {"offline": open_buffer(path, quickstart_tokenizer, tmp_path, on_bad_row="drop")}
    sources = [Live(weight=2), Offline(paths=[str(path)], weight=1), Replay(weight=1)]
    # 2 of 8 rows are wanted of each prompt: 4 prompts give 2, one gives 1, three give none: 9 of 64
    assert describe_within_group(sources, 8, prompts, buffers) == [
        "source offline gives 14.1% of the completions instead of 25.0%: 38% of the prompts have no rows in "
        "it, 12% too few; the rest is sampled live",
        "source replay gives nothing to a prompt until that comes again",
    ]
    assert describe_within_group(sources[:2], 3, prompts[:4], buffers) == [
        "source offline: about 6% of its 17 rows belong to prompts that data.train does not have, and are "
        "never drawn"
    ]
    assert describe_within_group(sources[:2], 3, prompts[:4], buffers, num_prompts=5) == []


class Sources(L.Callback):
    def __init__(self):
        self.groups = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        for group in trainer.datamodule.last_groups:
            kinds = Counter(completion.source for completion in group.completions)
            self.groups.append((group.prompt.prompt, kinds))


def test_within_groups_each_source_gives_what_it_has(covered, tmp_path, caplog):
    path, prompt_path = covered
    seen = Sources()
    data = AgroDataModule(
        train=PromptSettings(path=str(prompt_path)),
        sources=[Live(weight=0.5), Offline(paths=[str(path)], weight=0.5)],
        batch_size=8,
        group_size=4,
        mixing="within_group",
        on_bad_row="drop",
        validation=PromptSettings(path="quickstart-val", limit=1),
        max_logprob_gap=1.0,
    )
    trainer = L.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        callbacks=[seen],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(AgroModule(optimizer=OptimizerSettings(learning_rate=1e-5)), data)
    assert (
        "mixing within groups: source offline gives 28.1% of the completions instead of 50.0%" in caplog.text
    )
    offline = dict.fromkeys([f"{i}+{i}=" for i in range(4)], 2) | {"4+4=": 1}
    assert len(seen.groups) == 16
    for prompt, kinds in seen.groups:
        assert kinds == Counter(live=4 - offline.get(prompt, 0), offline=offline.get(prompt, 0)) - Counter()


@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_prompts_beyond_the_context_are_named_or_dropped_counted_and_said(tmp_path, caplog, on_bad_row):
    rows = [{"prompt": "1" * length, "answer": "1"} for length in (3, 5, 60, 70)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    data = AgroDataModule(
        train=PromptSettings(path=str(path)),
        sources=[Live()],
        batch_size=2,
        group_size=2,
        on_bad_row=on_bad_row,
        validation=PromptSettings(path="quickstart-val", limit=1),
        max_logprob_gap=1.0,
    )
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    module = AgroModule(optimizer=OptimizerSettings(learning_rate=1e-5))
    if on_bad_row == "error":
        with pytest.raises(ValueError, match="longest prompt of .* has 71 tokens"):
            trainer.fit(module, data)
        return
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, data)
    limit = data.policy.max_positions - data.sampling.max_new_tokens
    beyond = sum(length + 1 > limit for length in (3, 5, 60, 70))
    assert 0 < beyond < 4
    assert data.train_prompts.dropped == {"too_long": beyond} and len(data.train_prompts) == 4 - beyond
    assert f"{beyond} of 4 prompts of {path} have more than {limit} tokens (up to 71)" in caplog.text
