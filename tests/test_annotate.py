"""The command `annotate`, and a run that trains on what it made without a reference model."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from forked import run

from agro_lightning.commands.annotate import annotate
from agro_lightning.commands.main import main
from agro_lightning.commands.rollout import rollout
from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import FrozenReference

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A buffer: rollouts in two files, one of them in a folder within, and text rows in a JSONL file."""
    folder = tmp_path_factory.mktemp("source")
    rollout(
        out=str(folder),
        prompts=PromptSettings(path="quickstart-val", limit=6),
        n=3,
        groups_per_file=3,
        device="cpu",
    )
    (folder / "more").mkdir()
    (folder / "part-00000001.parquet").rename(folder / "more" / "part-00000001.parquet")
    lines = [{"prompt": "1+1=", "completion": str(i), "reward": i / 2} for i in range(2)]
    lines += [
        {"prompt": "2+2=", "completion": "4", "reward": 1},
        {"prompt": "3+2=", "completion": "5", "reward": 1},
    ]
    lines += [
        {"prompt": "2+2=", "completion": "5", "reward": 0},
        {"prompt": "3+2=", "completion": "6", "reward": 0},
    ]
    (folder / "human.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def copy(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "annotated"
    annotate(str(source), str(folder), temperature=TEMPERATURE, rows_per_file=4, device="cpu")
    return folder


def own_logprobs(policy: Policy, prompt_ids, completion_ids) -> torch.Tensor:
    """Log-probs from the model's own logits, one sequence at a time."""
    ids = torch.tensor([*prompt_ids, *completion_ids])
    with policy.generating() as lm:
        logits = lm(input_ids=ids[None]).logits[0, len(prompt_ids) - 1 : -1].float()
    logprobs = torch.log_softmax(logits / policy.temperature, -1)
    return logprobs[torch.arange(len(completion_ids)), ids[len(prompt_ids) :]]


def test_every_row_has_the_references_logprobs_and_nothing_else_changed(source, copy, quickstart_tokenizer):
    policy = Policy(PolicySettings(), temperature=TEMPERATURE)
    reference_id = FrozenReference(policy).reference_id
    before, after = (
        RolloutBuffer(folder, tokenizer=quickstart_tokenizer, vocab_size=policy.vocab_size)
        for folder in (source, copy)
    )
    old = {g.prompt.prompt_id: g for g in before.iter_groups()}
    new = {g.prompt.prompt_id: g for g in after.iter_groups()}
    assert old.keys() == new.keys() and after.num_rows == before.num_rows == 24
    for prompt_id, group in new.items():
        assert group.prompt == old[prompt_id].prompt
        theirs = {c.completion_ids: c for c in old[prompt_id].completions}
        assert len(group) == len(old[prompt_id])
        for c in group.completions:
            assert c.reference_id == reference_id and c.ref_logprobs is not None
            own = own_logprobs(policy, group.prompt.prompt_ids, c.completion_ids)
            torch.testing.assert_close(torch.tensor(c.ref_logprobs), own, atol=1e-5, rtol=1e-5)
            same = theirs[c.completion_ids]
            assert (c.completion, c.reward, c.source) == (same.completion, same.reward, same.source)
            assert c.behavior_logprobs == same.behavior_logprobs


def test_the_copy_has_the_files_of_the_buffer_large_ones_in_pieces(copy):
    made = {
        path.relative_to(copy).as_posix(): pq.read_metadata(path).num_rows for path in copy.rglob("*.parquet")
    }
    assert made == {
        "human-jsonl-000000.parquet": 4,
        "human-jsonl-000001.parquet": 2,
        "more/part-00000001-000000.parquet": 4,
        "more/part-00000001-000001.parquet": 4,
        "more/part-00000001-000002.parquet": 1,
        "part-00000000-000000.parquet": 4,
        "part-00000000-000001.parquet": 4,
        "part-00000000-000002.parquet": 1,
    }


def test_started_again_only_missing_files_are_made(source, copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.parquet")}
    lost = copy / "more" / "part-00000001-000001.parquet"
    rows = pq.read_table(lost).drop_columns(["created_at"])
    lost.unlink()
    annotate(str(source), str(copy), temperature=TEMPERATURE, rows_per_file=4, device="cpu")
    assert "4 rows of 3 files annotated, 20 were there already" in capsys.readouterr().out
    assert pq.read_table(lost).drop_columns(["created_at"]).to_pylist() == rows.to_pylist()
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path != lost)


def test_shards_make_the_copy_between_them(source, copy, tmp_path):
    for shard in ("0/2", "1/2"):
        annotate(
            str(source),
            str(tmp_path / "c"),
            temperature=TEMPERATURE,
            rows_per_file=4,
            shard=shard,
            device="cpu",
        )
    names = [sorted(p.relative_to(f) for p in f.rglob("*.parquet")) for f in (copy, tmp_path / "c")]
    assert names[0] == names[1]


def test_a_copy_is_made_with_one_reference_only(source, copy):
    with pytest.raises(ValueError, match="was begun with reference_id '.*@0.8', not '.*@1'"):
        annotate(str(source), str(copy), rows_per_file=4, device="cpu")


def test_the_time_that_rows_were_made_at_is_kept(source, tmp_path, quickstart_tokenizer):
    buffer = RolloutBuffer(source / "more", tokenizer=quickstart_tokenizer, vocab_size=17)
    moment = datetime(2024, 5, 6, tzinfo=UTC)
    groups = list(buffer.iter_groups())
    names = tokenizer_id(quickstart_tokenizer)
    append_rollouts(tmp_path / "old", groups, name="a", tokenizer_id=names, created_at=moment)
    annotate(str(tmp_path / "old"), str(tmp_path / "new"), device="cpu")
    assert pq.read_table(tmp_path / "new" / "a.parquet").column("created_at")[0].as_py() == moment


def fit(run_dir: Path, *args: str) -> tuple[int | None, str]:
    """(exit code, output) of a short run."""
    return run(
        [
            *("fit", "--run_dir", str(run_dir)),
            *("--trainer.max_steps", "3", "--trainer.enable_progress_bar", "false"),
            *("--data.batch_size", "2", "--data.group_size", "3"),
            *("--data.validation.path", "quickstart-val", "--data.validation.limit", "2"),
            *args,
        ],
        run_dir.with_suffix(".log"),
    )


def test_a_run_on_an_annotated_buffer_needs_no_reference_and_takes_the_same_steps(source, copy, tmp_path):
    reference_id = json.loads((copy / "_annotate.json").read_text())["reference_id"]
    common = ("--data.sampling.temperature", str(TEMPERATURE), "--data.sources")
    frozen = fit(tmp_path / "a", *common, json.dumps([{"paths": [str(copy)]}]))
    cached = fit(
        tmp_path / "b",
        *common,
        json.dumps([{"paths": [str(copy)]}]),
        *("--model.reference", "cached", "--model.reference_id", reference_id),
    )
    assert (frozen[0], cached[0]) == (0, 0), frozen[1] + cached[1]
    weights = [
        torch.load(next((tmp_path / run / "checkpoints").glob("step-*.ckpt")), weights_only=True)[
            "state_dict"
        ]
        for run in "ab"
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name

    bare = fit(
        tmp_path / "c",
        *common,
        json.dumps([{"paths": [str(source)]}]),
        *("--model.reference", "cached", "--model.reference_id", reference_id),
    )
    assert bare[0] == 2
    assert bare[1].splitlines()[-1].startswith("error: reference: cached, but a completion of prompts")


def test_live_rollouts_are_annotated_once_and_replay_needs_no_reference(tmp_path):
    sources = [{"weight": 1.0, "name": "live"}, {"weight": 1.0, "capacity": 1000, "name": "replay"}]
    ran = fit(tmp_path / "a", "--data.sources", json.dumps(sources))
    assert ran[0] == 0, ran[1]
    files = sorted((tmp_path / "a" / "replay").glob("*.parquet"))
    policy = Policy(PolicySettings())
    reference_id = FrozenReference(policy).reference_id
    tokenizer = load_tokenizer("quickstart")
    buffer = RolloutBuffer(tmp_path / "a" / "replay", tokenizer=tokenizer, vocab_size=policy.vocab_size)
    assert buffer.num_rows > 0 and len(files) == 3
    for group in buffer.iter_groups():
        for c in group.completions:
            assert c.reference_id == reference_id and c.ref_logprobs is not None
            own = own_logprobs(policy, group.prompt.prompt_ids, c.completion_ids)
            torch.testing.assert_close(torch.tensor(c.ref_logprobs), own, atol=1e-5, rtol=1e-5)
    again = fit(
        tmp_path / "b",
        *("--data.sources", json.dumps([{"paths": [str(tmp_path / "a" / "replay")], "repeat": True}])),
        *("--model.reference", "cached", "--model.reference_id", reference_id),
    )
    assert again[0] == 0, again[1]


def test_the_command_line_prints_the_reference_id(source, tmp_path, capsys):
    main(["annotate", "--buffer", str(source), "--out", str(tmp_path / "c"), "--device", "cpu"])
    out = capsys.readouterr().out
    reference_id = json.loads((tmp_path / "c" / "_annotate.json").read_text())["reference_id"]
    assert f"--model.reference cached --model.reference_id {reference_id}" in out


def test_inspect_shows_a_buffer(source, capsys):
    main(["inspect", "--buffer", str(source), "--samples", "1"])
    out = capsys.readouterr().out
    assert "24 rows in 3 files" in out and "rollout: 18 rows" in out
