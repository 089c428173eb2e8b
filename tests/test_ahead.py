"""Groups made ahead: completions that are suspended, go on under new weights, and outlive a kill."""

import signal
import time
from dataclasses import asdict, replace

import pytest
import torch
from forked import run, start
from test_fit import assert_same, final_state, metrics
from test_in_flight import PROMPTS, SAMPLING, drain, engine_for, logprobs_of, policy, requests, swap

from agro_lightning.data.sources import Live, Offline, check_sources, check_streams
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rewards import PythonReward, RewardSet
from agro_lightning.rollout import HFGenerate, Sampling
from agro_lightning.rollout.ahead import Unfinished, rollout_ahead
from agro_lightning.types import Prompt


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize("memory", [None, 200_000])
def test_a_completion_that_was_suspended_goes_on_as_if_it_had_not_been(memory):
    engine, wanted = engine_for(policy(), memory_bytes=memory), requests(24)
    whole = engine.in_flight(SAMPLING, policy_version=0, caches="drop")
    whole.submit(wanted)
    expected = drain(whole, 24)
    ended, left = {}, wanted
    while left:
        decoding = engine.in_flight(SAMPLING, policy_version=0, caches="drop")
        decoding.submit(left)
        for _ in range(4):
            ended |= dict(decoding.step())
        begun = decoding.suspend()
        assert begun.keys() == {request.number for request in left} - ended.keys()
        left = [replace(one, begun=begun[one.number]) for one in left if one.number in begun]
    for number, one in expected.items():
        assert ended[number].completion_ids == one.completion_ids
        assert ended[number].policy_versions == one.policy_versions == ((0, len(one.completion_ids)),)
        assert ended[number].behavior_logprobs == pytest.approx(one.behavior_logprobs, abs=1e-4)


LONG = Sampling(max_new_tokens=60)


def in_the_making(count: int) -> list[Unfinished]:
    return [
        Unfinished.of(Prompt(prompt_id=f"p{i}", prompt="", prompt_ids=PROMPTS[i % 3]), (2 * i, 2 * i + 1))
        for i in range(count)
    ]


@pytest.mark.filterwarnings("ignore:.*truncat")
def test_what_a_step_leaves_goes_on_under_the_next_weights_and_nothing_is_lost():
    model, versions = policy(0), [policy(seed) for seed in range(5)]
    engine, tokenizer = engine_for(model), load_tokenizer("quickstart")
    rewards = RewardSet([PythonReward(function="test_ahead:length", timeout_s=None)])

    def draw(groups, wanted, version):
        swap(model, versions[version])
        return rollout_ahead(
            engine, groups, wanted, LONG, rewards, tokenizer, source="live", policy_version=version
        )

    left, taken, fresh = [], [], iter(in_the_making(12))
    for version, begun in enumerate((8, 2, 2, 0, 0)):
        left += [next(fresh) for _ in range(begun)]
        again = [Unfinished.from_dict(asdict(group)) for group in left]
        groups, left, report = draw(left, 2, version)
        assert draw(again, len(groups), version)[:2] == (groups, left)  # the state is all of it, bitwise
        taken += groups
        assert report.completions == 2 * len(groups) and not report.failures
    assert [group.prompt.prompt_id for group in taken] != [f"p{i}" for i in range(10)]  # the whole ones first
    names = [group.prompt.prompt_id for group in taken] + [one.prompt.prompt_id for one in left]
    assert sorted(names) == sorted(f"p{i}" for i in range(12))
    mixed = 0
    for group in taken:
        for one in group.completions:
            runs, start = one.policy_versions or ((one.policy_version, len(one.completion_ids)),), 0
            assert one.policy_version == min(version for version, _ in runs)
            mixed += len(runs) > 1
            for version, tokens in runs:
                expected = logprobs_of(versions[version], group.prompt, one)[start : start + tokens]
                assert one.behavior_logprobs[start : start + tokens] == pytest.approx(expected, abs=1e-4)
                start += tokens
            assert start == len(one.completion_ids)
    assert mixed > 2


AHEAD = """
trainer: {max_steps: 8, accumulate_grad_batches: 2, val_check_interval: 1000, enable_progress_bar: false}
checkpoint_every: 3
model: {optimizer: {learning_rate: 1.0e-3, warmup_steps: 2}}
data:
  validation: {path: quickstart-val, limit: 2}
  batch_size: 2
  group_size: 4
  validation_samples: 2
  pass_at: [2]
  sampling: {max_new_tokens: 8, temperature: 3.0}
  sources:
  - {weight: 3, name: live, ahead: 5}
  - {weight: 1, capacity: 48, max_staleness: 6, name: replay}
"""


def test_a_killed_run_goes_on_bitwise_with_what_was_unfinished(tmp_path):
    (tmp_path / "run.yaml").write_text(AHEAD)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit = ["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu", "--run_dir"]
    code, said = run([*fit, str(whole)], tmp_path / "whole.log")
    assert code == 0, said
    process = start([*fit, str(broken)], tmp_path / "broken.log")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list((broken / "replay").glob("step-00000004-*")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "broken.log").read_text()
    saved = torch.load(broken / "checkpoints" / "step-00000003.ckpt", weights_only=True)
    unfinished = saved["AgroDataModule"]["feed"]["unfinished"]
    assert len(unfinished) == 5
    assert any(one.get("completion_ids") for group in unfinished for one in group["members"])
    again = [*fit, str(broken), "--ckpt_path", "last"]
    other = ["--data.sources", '[{"name": "live", "ahead": 2}]']
    code, said = run([*again, *other], tmp_path / "other.log")
    assert code and "holds 5 live groups in the making" in said and "Go on with ahead: 5" in said
    code, said = run(again, tmp_path / "again.log")
    assert code == 0, said
    one, two = final_state(whole), final_state(broken)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "AgroDataModule"):
        assert_same(one[key], two[key], key)
    assert metrics(broken) == metrics(whole)
    assert max(float(row.get("train/staleness/live", 0)) for row in metrics(whole)) > 0


def test_what_cannot_be_made_ahead_is_refused_with_what_to_set(tmp_path):
    with pytest.raises(ValueError, match="ahead -1; it must be 0 or more"):
        check_sources([Live(ahead=-1)])
    with pytest.raises(ValueError, match="set ahead: 0, or mixing: per_group"):
        check_streams([Live(ahead=1), Offline(paths=["quickstart"])], "within_group", 1)
    engine = HFGenerate()
    engine.attach(policy(), load_tokenizer("quickstart"))
    assert not engine.can_suspend
    with pytest.raises(NotImplementedError, match="WholeBatches cannot go on"):
        engine.in_flight(SAMPLING, policy_version=0, caches="keep").suspend()
    (tmp_path / "run.yaml").write_text(AHEAD + "  engine: HFGenerate\n")
    fit = ["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.accelerator=cpu"]
    code, said = run([*fit, "--run_dir", str(tmp_path / "run")], tmp_path / "log")
    assert (
        code
        and "source live has ahead 5: HFGenerate cannot go on with" in said
        and "rollout --follow" in said
    )
