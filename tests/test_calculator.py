"""The calculator that ships: its arithmetic, and a few steps of its config."""

import csv
from pathlib import Path

import pytest

from agro_lightning.commands.main import main
from agro_lightning.environments import Calculator

CONFIG = Path(__file__).parents[1] / "configs" / "calculator.yaml"


@pytest.mark.parametrize(
    ("expression", "value"),
    [("37*48", "1776"), (" 7 - -2", "9"), ("(1+2)/4", "0.75"), ("2*(3+4)-1", "13"), ("1e3/3", "333.3333333")],
)
def test_arithmetic(expression, value):
    assert Calculator().calculate(expression) == value


@pytest.mark.parametrize(
    "expression", ["", "37*", "2**9", "abs(1)", "x+1", "True", "'a'*9", "1j", "9//2", "[1]", "1" + "+1" * 40]
)
def test_what_is_no_arithmetic_is_refused_by_name(expression):
    with pytest.raises(ValueError, match="arithmetic|characters|worked out"):
        Calculator().calculate(expression)


def test_a_few_steps_call_the_tool_and_read_its_results(tmp_path):
    run = tmp_path / "run"
    options = {
        "run_dir": run, "trainer.max_steps": 2, "trainer.val_check_interval": 2, "checkpoint_every": 0,
        "data.batch_size": 8, "data.validation.limit": 4, "data.validation_samples": 1,
    }  # fmt: skip
    main(["fit", "--config", str(CONFIG), *(f"--{name}={value}" for name, value in options.items())])
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    steps = [row for row in rows if row["train/reward"]]
    assert len(steps) == 2
    for row in steps:
        assert float(row["train/rollout/episodes"]) == 64
        assert 0 < float(row["train/rollout/tool_calls"]) <= float(row["train/rollout/turns"]) - 64 + 3
        assert 0 < float(row["train/observation_fraction"]) < 0.5
