"""Requests that come and go, and weights that change while they are being decoded."""

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_lm

from agro_lightning.commands.rollout import rollout
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.rewards import Score
from agro_lightning.rollout import BatchedDecoding, HFGenerate, Sampling
from agro_lightning.rollout.engines.base import Generation, Request, WholeBatches
from agro_lightning.rollout.flow import InFlight
from agro_lightning.rollout.weight_sync import RunFacts, publish_weights, whole_weights

PROMPTS = [(5, 6, 7), (9, 10, 11, 12, 13, 14), (20,)]
SAMPLING = Sampling(max_new_tokens=12)


def policy(seed: int = 0) -> Policy:
    return Policy(PolicySettings(packing="plain"), lm=tiny_lm("llama_tied", seed))


def engine_for(policy: Policy, **options) -> BatchedDecoding:
    engine = BatchedDecoding(**options)
    engine.attach(policy, load_tokenizer("quickstart"))
    return engine


def requests(count: int, first: int = 0) -> list[Request]:
    return [
        Request(number=i, prompt_ids=PROMPTS[i // 4 % 3], seed=1000 + i) for i in range(first, first + count)
    ]


def drain(decoding, count: int) -> dict[int, Generation]:
    ended: dict[int, Generation] = {}
    for _ in range(1000):
        ended |= dict(decoding.step())
        if len(ended) == count:
            return ended
    raise AssertionError(f"{len(ended)} of {count} requests ended")


@torch.no_grad()
def swap(policy: Policy, other: Policy) -> None:
    for mine, theirs in zip(policy.base.parameters(), other.base.parameters(), strict=True):
        mine.copy_(theirs)


@torch.no_grad()
def logprobs_of(policy: Policy, request: Request, answer: Generation) -> list[float]:
    ids = torch.tensor([[*request.prompt_ids, *answer.completion_ids]])
    with policy.generating() as lm:
        logprobs = lm(input_ids=ids).logits[0].float().log_softmax(-1)
    targets = torch.tensor(answer.completion_ids)
    return logprobs[len(request.prompt_ids) - 1 : -1].gather(-1, targets[:, None])[:, 0].tolist()


def test_a_completion_does_not_depend_on_what_else_is_in_flight():
    model = policy()
    wanted = requests(24)
    alone = {}
    for request in wanted[::5]:
        decoding = engine_for(model).in_flight(SAMPLING, policy_version=0, caches="keep")
        decoding.submit([request])
        alone |= drain(decoding, 1)
    decoding = engine_for(model).in_flight(SAMPLING, policy_version=0, caches="keep")
    ended: dict[int, Generation] = {}
    for start in range(0, 24, 3):  # three at a time, while others are on their way
        decoding.submit(wanted[start : start + 3])
        ended |= dict(decoding.step())
    ended |= drain(decoding, 24 - len(ended)) if len(ended) < 24 else {}
    assert sorted(ended) == list(range(24))
    assert {len(one.completion_ids) for one in ended.values()} != {12}  # some end early
    for number, one in alone.items():
        assert ended[number].completion_ids == one.completion_ids
        assert ended[number].behavior_logprobs == pytest.approx(one.behavior_logprobs, abs=1e-4)


@pytest.mark.parametrize("memory", [None, 200_000])
def test_versions_say_which_weights_drew_each_token_and_dropped_caches_are_computed_anew(memory):
    model, versions = policy(0), [policy(0), policy(1), policy(2)]
    engine = engine_for(model, memory_bytes=memory)
    decoding = engine.in_flight(SAMPLING, policy_version=10, caches="drop")
    wanted = requests(24)
    decoding.submit(wanted)
    ended: dict[int, Generation] = {}
    for version in (11, 12):
        for _ in range(3):
            ended |= dict(decoding.step())
        swap(model, versions[version - 10])
        decoding.update_weights(version)
    ended |= drain(decoding, 24 - len(ended))
    assert sorted(ended) == list(range(24))
    mixed = 0
    for request in wanted:
        one = ended[request.number]
        assert one.policy_versions is not None
        assert sum(tokens for _, tokens in one.policy_versions) == len(one.completion_ids)
        names = [version for version, _ in one.policy_versions]
        assert names == sorted(set(names)) and set(names) <= {10, 11, 12}
        mixed += len(names) > 1
        start = 0
        for version, tokens in one.policy_versions:
            expected = logprobs_of(versions[version - 10], request, one)[start : start + tokens]
            assert one.behavior_logprobs[start : start + tokens] == pytest.approx(expected, abs=1e-4)
            start += tokens
    assert mixed > 2


def test_kept_caches_are_those_of_the_weights_that_made_them():
    """The first token after a change reads old keys under new weights; neither version explains it."""
    model, new = policy(0), policy(1)
    decoding = engine_for(model).in_flight(SAMPLING, policy_version=0, caches="keep")
    wanted = requests(8)
    decoding.submit(wanted)
    ended = dict(decoding.step())
    swap(model, new)
    decoding.update_weights(1)
    ended |= drain(decoding, 8 - len(ended))
    gaps = []
    for request in wanted:
        one = ended[request.number]
        if len(one.policy_versions) == 2:
            assert one.policy_versions[0] == (0, 1)
            gaps.append(abs(logprobs_of(new, request, one)[1] - one.behavior_logprobs[1]))
    assert gaps and max(gaps) > 1e-2


def test_engines_that_take_whole_batches_change_weights_between_them():
    model = policy()
    engine = HFGenerate()
    engine.attach(model, load_tokenizer("quickstart"))
    decoding = engine.in_flight(SAMPLING, policy_version=3, caches="keep")
    assert isinstance(decoding, WholeBatches)
    decoding.submit(requests(6))
    first = dict(decoding.step())
    decoding.update_weights(4)
    decoding.submit(requests(2, first=6))
    second = dict(decoding.step())
    assert sorted(first) == list(range(6)) and sorted(second) == [6, 7]
    assert {one.policy_versions for one in first.values()} == {
        ((3, len(one.completion_ids)),) for one in first.values()
    }
    assert all(one.policy_versions[0][0] == 4 for one in second.values())


# ---------------------------------------------------------------------- groups


class FailsAtFirst(BatchedDecoding):
    """Loses every third request, as a server may."""

    def in_flight(self, sampling, *, policy_version, caches):
        decoding = super().in_flight(sampling, policy_version=policy_version, caches=caches)
        inner, seen = decoding.step, []

        def step():
            ended = []
            for number, answer in inner():
                seen.append(number)
                lost = len(seen) % 3 == 0
                failed = Generation(completion_ids=(), finish_reason="error", behavior_logprobs=None)
                ended.append((number, failed if lost else answer))
            return ended

        decoding.step = step
        return decoding


class Moody:
    """Abstains from every `period`-th completion."""

    name, weight = "moody", 1.0

    def __init__(self, period: int) -> None:
        self.period, self.seen = period, 0

    def __call__(self, prompts, completions):
        scores = []
        for text in completions:
            self.seen += 1
            scores.append(Score(reward=None if self.seen % self.period == 0 else float(len(text))))
        return scores


def follow(run_dir: Path, **changes) -> None:
    options = {"prompts": PromptSettings(path="quickstart-val"), "groups": 12, "timeout_s": 5.0}
    rollout(follow=str(run_dir), device="cpu", **{**options, **changes})


def publish(run_dir: Path, version: int = 0, **changes) -> None:
    model, facts = Policy(PolicySettings()), RunFacts(temperature=1.0, group_size=4, groups_per_step=16)
    publish_weights(
        run_dir,
        model,
        whole_weights(model),
        load_tokenizer("quickstart"),
        policy_version=version,
        facts=facts,
        **changes,
    )


@pytest.mark.parametrize("case", ["generation", "reward"])
def test_members_that_are_missing_are_asked_for_again(tmp_path, capsys, quickstart_tokenizer, case):
    publish(tmp_path)
    changes = {"engine": FailsAtFirst()} if case == "generation" else {"rewards": [Moody(4)]}
    follow(tmp_path, in_flight=InFlight(retries=8), **changes)
    buffer = RolloutBuffer(tmp_path / "stream", tokenizer=quickstart_tokenizer, vocab_size=64)
    assert buffer.num_rows == 12 * 4  # each group is whole
    assert len({path.name for path in (tmp_path / "stream").glob("part-*")}) == 12  # each flowed by itself
    shown = capsys.readouterr().out
    assert "0 failed" not in shown and ("generation" if case == "generation" else "abstained") in shown


def test_a_group_that_stays_short_is_dropped_and_counted_and_never_padded(tmp_path, capsys):
    publish(tmp_path)
    follow(tmp_path, rewards=[Moody(1)], in_flight=InFlight(retries=1), groups=2, max_failure_fraction=1.0)
    assert not list((tmp_path / "stream").glob("part-*"))
    assert "2 prompts left out" in capsys.readouterr().out


class Broken(BatchedDecoding):
    """Fails on everything."""

    def in_flight(self, sampling, *, policy_version, caches):
        decoding = super().in_flight(sampling, policy_version=policy_version, caches=caches)
        inner, failed = (
            decoding.step,
            Generation(completion_ids=(), finish_reason="error", behavior_logprobs=None),
        )
        decoding.step = lambda: [(number, failed) for number, _ in inner()]
        return decoding


def test_an_engine_that_fails_on_everything_ends_the_command_and_not_the_prompts(tmp_path):
    publish(tmp_path)
    with pytest.raises(RuntimeError, match="failed on 64 requests in a row"):
        follow(tmp_path, engine=Broken(), groups=200)
    assert not list((tmp_path / "stream").glob("part-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"requests": 0}, "requests is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"caches": "x"}, "caches is 'x'"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        InFlight(**options)
