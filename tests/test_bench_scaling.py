"""bench.scaling: its figures keep what they promise, and the cheapest ones come out again."""

import json
from pathlib import Path

import pytest

from agro_lightning.commands.doctor.memory.estimate import simulate
from bench import scaling
from bench._records import FIELDS

RESULTS = Path(scaling.__file__).parent / "results" / "scaling.json"


@pytest.fixture(scope="module")
def figures():
    """The committed figures by case and metric."""
    records = json.loads(RESULTS.read_text())
    assert all(set(FIELDS) <= set(item) and item["provider"] == "ours" for item in records)
    assert not any(item["commit"].endswith("+changes") for item in records)
    return {(item["case"], item["metric"]): item["value"] for item in records}


def test_state_per_rank_is_that_of_one_rank_divided(figures):
    one = figures["1", "state_bytes_per_rank"]
    for ranks in (1, 2, 4):
        assert figures[str(ranks), "state_bytes_per_rank"] == pytest.approx(one / ranks, rel=0.05)


def test_traffic_follows_the_formula_and_the_peak_the_estimate(figures):
    for case, (ranks, _) in scaling.REAL.items():
        if ranks > 1:
            assert figures[case, "communication_over_formula"] == pytest.approx(1, rel=1e-3)
    assert figures["2", "estimate_over_resident"] == pytest.approx(1, abs=0.1)


def test_state_and_formula_come_out_again(figures, tmp_path):
    path = scaling.write_model(tmp_path, "small")
    for case, (ranks, replicate) in scaling.REAL.items():
        estimate = simulate(scaling.settings(path, replicate), scaling.workload(ranks))
        state = estimate.state["parameters"] + estimate.state["optimiser"]
        assert figures[case, "state_bytes_per_rank"] == pytest.approx(state, rel=1e-3)
        if ranks > 1:
            formula = scaling.formula(path, ranks, replicate)
            assert figures[case, "communication_formula_bytes"] == pytest.approx(formula)
            assert sum(item.sent_bytes for item in estimate.step_traffic) == pytest.approx(formula, rel=1e-3)


@pytest.mark.parametrize(
    ("case", "parameters", "shards"),
    [
        ("llama3_8b/8", 8_030_261_248, 8),
        ("llama3_8b/16", 8_030_261_248, 8),
        ("llama3_70b/64", 70_553_706_496, 64),
        ("llama3_70b/128", 70_553_706_496, 128),
    ],
)
def test_simulated_state_is_the_models_size_divided(figures, case, parameters, shards):
    share = parameters * 4 / shards
    assert figures[case, "parameters_bytes"] == pytest.approx(share, rel=0.01)
    assert figures[case, "gradients_bytes"] == pytest.approx(share, rel=0.01)
    assert figures[case, "optimiser_bytes"] == pytest.approx(2 * share, rel=0.01)
    assert figures[case, "reference_bytes"] == pytest.approx(share / 2, rel=0.01)  # bf16
    peaks = [figures[case, f"{phase}_peak_bytes"] for phase in ("rollout", "forward", "backward")]
    assert 4.5 * share < min(peaks) and max(peaks) < 80 * 2**30  # fits into the GPUs it was made for
