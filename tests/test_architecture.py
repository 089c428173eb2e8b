"""ARCHITECTURE.md: its recipes train together, its files exist; the docstrings' examples are right."""

import doctest
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import agro_kernels
import agro_lightning
from agro_lightning.commands.main import main
from agro_lightning.models.pretrained import load_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
IMPORTS = """
from dataclasses import dataclass
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.objectives.base import LossInputs, Objective, ObjectiveOutput
from agro_lightning.rollout import Generation, RolloutEngine
from agro_lightning.types import Completion, Prompt, PromptGroup
"""


@pytest.fixture
def page():
    if not PAGE.exists():
        pytest.skip("ARCHITECTURE.md is in the checkout alone")
    return PAGE.read_text()


@pytest.fixture
def mine(page, tmp_path, monkeypatch):
    """The page's recipes as a module."""
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 5
    assert max(sum(bool(line.strip()) for line in block.split("\n")) for block in blocks) <= 10
    (tmp_path / "mine.py").write_text(IMPORTS + "\n\n".join(blocks))
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("mine")


def test_the_recipes_train_together(mine, tmp_path):
    collected = mine.collect(tmp_path / "rows", load_tokenizer("quickstart"))
    sources = [{"name": "live"}, {"paths": [str(collected.parent)], "repeat": True, "name": "by_hand"}]
    reward = {"class_path": "agro_lightning.rewards.PythonReward", "init_args": {"function": "mine:brevity"}}
    options = {
        "--run_dir": tmp_path / "run",
        "--model.objective": "mine.Reinforce",
        "--data.rewards": json.dumps([reward]),
        "--data.engine": "mine.Echo",
        "--data.sources": json.dumps(sources),
        "--data.batch_size": 2,
        "--data.group_size": 2,
        "--data.max_logprob_gap": 1e9,
        "--trainer.callbacks": '[{"class_path": "mine.StopWhenSolved", "init_args": {"reward": -1.0}}]',
        "--trainer.accelerator": "cpu",
        "--trainer.limit_val_batches": 0,
        "--trainer.val_check_interval": 1000,
        "--trainer.max_steps": 4,
    }
    main(["fit", *(str(part) for pair in options.items() for part in pair)])
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) == 2, "the callback stopped the run after its first step"
    assert any("by_hand" in name for name in rows[0].split(","))
    assert mine.brevity(completions=["3", "33", "4"], answers=["3"] * 3) == [1.0, 0.5, 0.0]


def test_the_objective_of_the_recipe_is_reinforce(mine):
    inputs = mine.LossInputs(
        logprobs=torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
        ref_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        rewards=torch.tensor([1.0, 0.0]),
        sequence_ids=torch.tensor([0, 0, 1]),
        group_ids=torch.tensor([0, 0]),
    )
    found = mine.Reinforce()(inputs)
    (gradient,) = torch.autograd.grad(found.loss, inputs.logprobs)
    assert gradient.tolist() == [-0.25, -0.25, 0.25] and float(found.objective) == 0.5


def test_every_file_that_the_page_names_exists(page):
    named = set(re.findall(r"`([\w/]+(?:\.py|/))`", page))
    assert len(named) > 20
    package = Path(agro_lightning.__file__).parent  # of the checkout, or of the installed wheel
    roots = [
        ROOT,
        package.parent,
        package,
        *(package / name for name in ("commands", "rollout", "models", "data", "training")),
    ]
    names = {name.removeprefix("kernels/") for name in named}
    roots.append(Path(agro_kernels.__file__).parents[1])
    missing = [name for name in names if not any((root / name).exists() for root in roots)]
    assert missing == []


WITH_EXAMPLES = {
    "agro_lightning.objectives.agro": "Agro",
    "agro_lightning.rewards.base": "Reward",
    "agro_lightning.rollout.engines.base": "RolloutEngine",
    "agro_lightning.data.buffer.buffer": "RolloutBuffer",
    "agro_kernels._linear_logprobs": "linear_logprobs",
}


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_the_docstrings_examples_are_right(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    loaded = importlib.import_module(module)
    documented = getattr(loaded, WITH_EXAMPLES[module])
    assert "Examples:" in (documented.__doc__ or ""), f"{module}.{WITH_EXAMPLES[module]} has no example"
    assert ">>>" in documented.__doc__
    results = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.attempted >= 2 and results.failed == 0
