"""A whole run on rows with masks: killed, resumed, equal bit by bit."""

import pytest
from rollout_files import token_row, write_parquet
from test_fit import SMALL, assert_same, final_state, kill_after_checkpoint, metrics, run


@pytest.mark.slow
def test_a_killed_run_on_masked_rows_resumes_bitwise(tmp_path):
    rows = [
        token_row(
            prompt_id=f"1+{digit}", prompt=f"1+{digit}=", prompt_ids=[1, 5, 14, 4 + digit, 16],
            completion=None, completion_ids=[4 + copy, 16, 14, 2], policy_mask=[True, False, False, True],
            reward=float(copy == 1 + digit), behavior_logprobs=None, ref_logprobs=None, reference_id=None,
        )
        for digit in range(1, 7) for copy in range(8)
    ]  # fmt: skip
    masked = write_parquet(tmp_path / "masked.parquet", rows)
    config = tmp_path / "small.yaml"
    config.write_text(SMALL.replace("paths: [quickstart]", f"paths: [{masked}]"))
    run("fit", "--config", config, "--run_dir", tmp_path / "whole")
    kill_after_checkpoint(config, tmp_path / "killed", 3)
    run("fit", "--config", config, "--run_dir", tmp_path / "killed", "--ckpt_path", "last")
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    for key in ("state_dict", "optimizer_states", "AgroDataModule"):
        assert_same(whole[key], resumed[key], key)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    read = [float(row.get("train/observation_fraction") or 0) for row in metrics(tmp_path / "whole")]
    assert 0 < max(read) <= 0.5
