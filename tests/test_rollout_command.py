"""The command `rollout`: a buffer that can be made in pieces, by several processes, and after a kill."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from forked import start

from agro_lightning.commands.main import main
from agro_lightning.commands.rollout import rollout
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.primitives.device import choose_device
from agro_lightning.rewards import ExactMatch, PythonReward
from agro_lightning.rollout import Sampling
from agro_lightning.rollout.output_files import OutputFiles, WorkerShare, claim_folder
from agro_lightning.rollout.weight_sync import RunFacts, publish_weights, whole_weights

FACTS = RunFacts(temperature=1.0, group_size=3, groups_per_step=4)


def settings(**changes) -> dict:
    """Options of a small rollout."""
    return {
        "prompts": PromptSettings(path="quickstart-val", limit=10),
        "n": 2,
        "groups_per_file": 4,
        "device": "cpu",
        **changes,
    }


def rows(folder: Path) -> dict[str, list[dict]]:
    """Every file's rows, without the time they were made at."""
    return {
        path.name: [
            {k: v for k, v in row.items() if k != "created_at"} for row in pq.read_table(path).to_pylist()
        ]
        for path in sorted(folder.glob("*.parquet"))
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rollout that is made at one go."""
    folder = tmp_path_factory.mktemp("rollout") / "whole"
    rollout(out=str(folder), **settings())
    return folder


def test_every_prompt_is_answered_n_times_in_files_of_the_given_size(whole, quickstart_tokenizer):
    made = rows(whole)
    assert [len(part) for part in made.values()] == [8, 8, 4]
    everything = [row for part in made.values() for row in part]
    assert len({row["prompt_id"] for row in everything}) == 10
    for row in everything:
        assert row["completion"] == quickstart_tokenizer.decode(
            row["completion_ids"], skip_special_tokens=True
        )
        assert row["reward"] == float(row["completion"] == row["answer"])
        assert row["policy_version"] == -1 and row["source"] == "rollout"
        assert len(row["behavior_logprobs"]) == len(row["completion_ids"])


def test_started_again_only_missing_files_are_made_and_they_are_the_same(whole, tmp_path, capsys):
    rollout(out=str(tmp_path / "b"), **settings())
    kept = (tmp_path / "b" / "part-00000000.parquet").stat().st_mtime_ns
    (tmp_path / "b" / "part-00000001.parquet").unlink()
    capsys.readouterr()
    rollout(out=str(tmp_path / "b"), **settings())
    assert "made 1 files, 4 groups, 8 completions" in capsys.readouterr().out
    assert (tmp_path / "b" / "part-00000000.parquet").stat().st_mtime_ns == kept
    assert rows(tmp_path / "b") == rows(whole)


def test_shards_make_the_same_files_between_them(whole, tmp_path):
    rollout(out=str(tmp_path / "b"), shard="1/2", **settings())
    assert list(rows(tmp_path / "b")) == ["part-00000001.parquet"]
    rollout(out=str(tmp_path / "b"), shard="0/2", **settings())
    assert rows(tmp_path / "b") == rows(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "begun with seed 0, not 1"),
        ({"n": 3}, "begun with n 2, not 3"),
        ({"sampling": Sampling(max_new_tokens=4)}, "begun with sampling"),
        ({"rewards": [ExactMatch(weight=2.0)]}, "begun with rewards"),
        ({"prompts": PromptSettings(path="quickstart-val", limit=9)}, "begun with groups 10, not 9"),
        ({"policy": PolicySettings(weights="random")}, "begun with policy"),
    ],
)
def test_a_folder_is_not_filled_with_two_kinds_of_rollouts(whole, changes, message):
    with pytest.raises(ValueError, match=message):
        rollout(out=str(whole), **settings(**changes))


def failing(prompts, completions):
    """No score for the prompts whose first digit is odd."""
    return [float("nan") if int(prompt[0]) % 2 else 1.0 for prompt in prompts]


def test_failures_are_counted_and_their_completions_left_out(tmp_path, capsys):
    reward = PythonReward("test_rollout_command:failing", name="half")
    rollout(out=str(tmp_path / "b"), **settings(rewards=[reward], max_failure_fraction=1.0))
    made = rows(tmp_path / "b")
    failed = 10 - sum(map(len, made.values())) // 2
    assert 0 < failed < 10
    out = capsys.readouterr().out
    assert f"{2 * failed} failed (non_finite {2 * failed}), {failed} prompts left out" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, "n is 1; it must be at least 2"),
        ({"groups_per_file": 0}, "groups_per_file is 0"),
        ({"shard": "2/2"}, "shard is '2/2'; it must be i/k"),
        ({"shard": "one"}, "shard is 'one'"),
        ({"device": "abacus"}, "device is 'abacus'; it must be auto, cpu, cuda"),
        ({"out": None}, "needs --out"),
    ],
)
def test_options_that_cannot_work_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        rollout(**{"out": str(tmp_path), **settings(**options)})


def test_a_killed_rollout_is_completed_by_starting_it_again(tmp_path):
    command = [
        *("rollout", "--out", str(tmp_path / "b"), "--n", "2", "--groups_per_file", "1", "--device", "cpu"),
        *("--prompts.path", "quickstart-val", "--prompts.limit", "300"),
    ]
    process = start(command, tmp_path / "log")
    while len(list((tmp_path / "b").glob("part-*"))) < 3:
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.005)
    process.kill()
    process.join()
    before = len(rows(tmp_path / "b"))
    assert 3 <= before < 300
    main(command)
    made = rows(tmp_path / "b")
    assert list(made) == [f"part-{i:08d}.parquet" for i in range(300)]
    assert all(len(part) == 2 for part in made.values())


def test_the_command_line_takes_the_same_options(whole, tmp_path):
    main(
        [
            "rollout",
            "--out",
            str(tmp_path / "b"),
            "--policy.path",
            "quickstart",
            "--prompts.path",
            "quickstart-val",
        ]
        + ["--prompts.limit", "10", "--n", "2", "--groups_per_file", "4", "--temperature", "1.0"]
        + ['--rewards=[{"class_path": "agro_lightning.rewards.ExactMatch"}]', "--device", "cpu"]
    )
    assert rows(tmp_path / "b") == rows(whole)


# ---------------------------------------------------------------------- following a run


@pytest.fixture(scope="module")
def policy():
    return Policy(PolicySettings())


def put(run_dir: Path, policy: Policy, version: int, **changes) -> Path:
    facts = replace(FACTS, **changes.pop("facts", {}))
    tokenizer = load_tokenizer("quickstart")
    return publish_weights(
        run_dir, policy, whole_weights(policy), tokenizer, policy_version=version, facts=facts, **changes
    )


def follow(run_dir: Path, **changes) -> None:
    options = {"prompts": PromptSettings(path="quickstart-val"), "groups_per_file": 2, "timeout_s": 0.5}
    rollout(follow=str(run_dir), device="cpu", **{**options, **changes})


def test_a_follower_stops_ahead_of_a_run_that_stands_still(tmp_path, policy):
    put(tmp_path, policy, 7)
    with pytest.raises(
        TimeoutError, match=f"8 groups wait in {tmp_path / 'stream'}, and the run {tmp_path} has stayed"
    ):
        follow(tmp_path, max_ahead=8)
    made = rows(tmp_path / "stream")
    assert [len(part) for part in made.values()] == [6] * 4  # the run's group_size is 3
    assert {row["policy_version"] for part in made.values() for row in part} == {7}


def test_a_follower_goes_on_as_the_run_uses_groups_and_stops_with_it(tmp_path, policy):
    put(tmp_path, policy, 0)
    with pytest.raises(TimeoutError):
        follow(tmp_path, max_ahead=8)
    (tmp_path / "stream" / "_progress.json").write_text(
        '{"step": 2, "finished_groups": 5, "expired_groups": 0}'
    )
    put(tmp_path, policy, 2)
    with pytest.raises(TimeoutError, match="7 groups wait"):
        follow(tmp_path, max_ahead=8)
    made = rows(tmp_path / "stream")
    assert [part[0]["policy_version"] for part in made.values()] == [0, 0, 0, 0, 2, 2]
    put(tmp_path, policy, 3, final=True)
    (tmp_path / "stream" / "_progress.json").write_text(
        '{"step": 3, "finished_groups": 12, "expired_groups": 0}'
    )
    follow(tmp_path, max_ahead=8)
    assert len(rows(tmp_path / "stream")) == 6


def test_followers_that_share_a_folder_leave_room_for_each_other(tmp_path, policy):
    put(tmp_path, policy, 0)
    for shard in ("1/2", "0/2"):
        with pytest.raises(TimeoutError):
            follow(tmp_path, max_ahead=10, shard=shard)
    assert sorted(rows(tmp_path / "stream")) == [f"part-{i:08d}.parquet" for i in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"max_ahead": 4}, ValueError, "max_ahead is 4; the run uses 4 groups a step"),
        (
            {"temperature": 0.5},
            ValueError,
            "trains at data.sampling.temperature 1, this command samples at 0.5",
        ),
    ],
)
def test_a_follower_refuses_what_would_not_fit_the_run(tmp_path, policy, changes, error, message):
    put(tmp_path, policy, 0)
    with pytest.raises(error, match=message):
        follow(tmp_path, **changes)


def test_a_follower_waits_for_weights_and_names_the_folder(tmp_path):
    with pytest.raises(TimeoutError, match=f"no weights appeared in {tmp_path / 'weights'} within 0.5 s"):
        follow(tmp_path)


def test_a_follower_answers_prompts_in_another_order_each_time_round(tmp_path, policy):
    put(tmp_path, policy, 0)
    prompts = PromptSettings(path="quickstart-val", limit=6)
    follow(tmp_path, prompts=prompts, groups=12, groups_per_file=6, max_ahead=100)
    first, second = ([row["prompt_id"] for row in part[::3]] for part in rows(tmp_path / "stream").values())
    assert sorted(first) == sorted(second) and first != second


# ---------------------------------------------------------------------- parts


def test_parts_cover_every_group_once_whatever_the_number_of_shards(tmp_path):
    parts = OutputFiles(folder=tmp_path, prompts=None, size=4, groups=22, seed=0, shuffle=False)  # type: ignore[arg-type]
    for count in (1, 2, 3, 7):
        shards = [WorkerShare(index=i, count=count) for i in range(count)]
        assert sorted(part for shard in shards for part in parts.missing(shard)) == list(range(6))
        assert sum(parts.count(shard) or 0 for shard in shards) == 6


def test_a_claimed_folder_keeps_its_settings(tmp_path):
    claim_folder(tmp_path / "a", {"x": 1, "s": asdict(FACTS)})
    claim_folder(tmp_path / "a", {"x": 1, "s": asdict(FACTS)})
    with pytest.raises(ValueError, match="begun with x 1, not 2"):
        claim_folder(tmp_path / "a", {"x": 2, "s": asdict(FACTS)})
    assert json.loads((tmp_path / "a" / "_rollout.json").read_text())["x"] == 1


def test_devices_by_name():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="shows 0 GPUs to torch|shows [0-9] GPUs"):
        choose_device("cuda:99")
