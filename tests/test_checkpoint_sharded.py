"""Checkpoints of real runs on gloo ranks: whole or absent, resumed bitwise, on other numbers of ranks too."""

import csv
import json
import logging
import os
import re
import resource
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from agro_lightning.checkpoints.files import MARKER, newest_checkpoint, read_marker
from agro_lightning.checkpoints.sharded import merge_ranks, remove_folder
from agro_lightning.distributed.fsdp import DataRank

SMALL = """
trainer: {accelerator: cpu, accumulate_grad_batches: 2, val_check_interval: 1000, enable_progress_bar: false}
checkpoint_every: 2
model: {optimizer: {learning_rate: 1.0e-4, warmup_steps: 2}}
data:
  validation: {path: quickstart-val, limit: 3}
  batch_size: 2
  group_size: 3
  updates_per_rollout: 2
  validation_samples: 2
  pass_at: [2]
  sources:
  - {weight: 1, name: live}
  - {weight: 1, capacity: 48, max_staleness: 6, name: replay}
  - {weight: 2, paths: [quickstart], repeat: true, name: offline}
"""
OFFLINE = """
trainer: {accelerator: cpu, val_check_interval: 1000, enable_progress_bar: false}
checkpoint_every: 2
model: {optimizer: {learning_rate: 1.0e-4, warmup_steps: 2}}
data:
  validation: {path: quickstart-val, limit: 2}
  group_size: 3
  validation_samples: 2
  pass_at: [2]
  sources: [{paths: [quickstart], weight: 1, repeat: true, name: offline}]
"""


def fit(rank, world, config, folder, options, kill=None, room=None):
    """The command line on one rank.

    Args:
        kill: (rank, step, signal); that rank gets the signal before the step.
        room: (rank, step, bytes); from that step on the rank cannot write larger files.
    """
    import lightning as L

    from agro_lightning.commands import fit
    from agro_lightning.commands import main as cli

    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.dup2(os.open(f"{folder}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    if kill is not None or room is not None:

        class Misfortune(L.Callback):
            def on_train_batch_start(self, trainer, *args):
                if kill is not None and (rank, trainer.global_step) == kill[:2]:
                    os.kill(os.getpid(), kill[2])
                if room is not None and (rank, trainer.global_step) == room[:2]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (room[2], resource.RLIM_INFINITY))

        original = fit.AgroCLI.make_trainer

        def with_misfortune(self, config, callbacks):
            return original(self, config, [*callbacks, Misfortune()])

        fit.AgroCLI.make_trainer = with_misfortune
    try:
        cli.main(["fit", "--config", config, "--run_dir", folder, "--trainer.devices", str(world), *options])
    except SystemExit as leave:
        return leave.code


@pytest.fixture
def config(tmp_path):
    def make(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return make


def tensors_of(folder):
    """All tensors of a checkpoint, read in one process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder, f"{folder}.whole")
    return torch.load(f"{folder}.whole", weights_only=True)


def flat(tree, path=""):
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in flat(value, f"{path}.{key}").items()}
    if isinstance(tree, list):
        return flat(dict(enumerate(tree)), path)
    return {path: tree}


def assert_same(one, other, exact=True):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if not isinstance(value, torch.Tensor):
            assert value == other[name], name
        elif exact:
            assert torch.equal(value, other[name]), name
        else:
            torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-6, msg=name)


def logged(folder):
    """What is logged of every step but seconds and memory, by step."""
    other = ("train/seconds", "train/tokens_per_second", "train/peak_memory")
    with open(f"{folder}/metrics.csv", newline="") as handle:
        return {
            row["step"]: {
                name: float(value)
                for name, value in row.items()
                if name.startswith("train/") and not name.startswith(other) and value
            }
            for row in csv.DictReader(handle)
        }


@pytest.mark.parametrize("live", ["live", pytest.param("live, ahead: 3", marks=pytest.mark.slow)])
def test_killed_and_resumed_on_two_ranks_is_bitwise_the_uninterrupted_run(tmp_path, config, live):
    small = config(SMALL.replace("name: live", f"name: {live}"))
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    steps = ["--trainer.max_steps", "7"]
    assert run_ranks(fit, 2, small, whole, steps) == [None, None]
    with pytest.raises(AssertionError, match="rank 1: died without an answer"):
        run_ranks(fit, 2, small, broken, steps, (1, 5, signal.SIGKILL), grace=30)
    assert "because of rank 1, which gave no sign of life" in Path(f"{broken}.rank0.log").read_text()
    run_ranks(fit, 2, small, broken, [*steps, "--ckpt_path", "last"])
    assert_same(
        tensors_of(f"{whole}/checkpoints/step-00000007.ckpt"),
        tensors_of(f"{broken}/checkpoints/step-00000007.ckpt"),
    )
    assert logged(whole) == logged(broken)
    names = sorted(os.listdir(f"{whole}/checkpoints"))
    assert [name for name in names if name.startswith("step") and not name.endswith("whole")] == [
        "step-00000006.ckpt",
        "step-00000007.ckpt",
    ]  # the last two
    weights = tensors_of(f"{whole}/checkpoints/step-00000007.ckpt")["state_dict"]
    assert all(name.startswith("policy.") for name in weights)  # no reference


def test_other_numbers_of_ranks_go_on_with_the_same_weights_and_data(tmp_path, config):
    offline = config(OFFLINE)

    def run(name, world, stop=None, *options):
        """Trains to step 6, or up to `stop`, where rank 0 gets SIGTERM."""
        kill = None if stop is None else (0, stop - 1, signal.SIGTERM)
        run_ranks(
            fit,
            world,
            offline,
            str(tmp_path / name),
            ["--data.batch_size", str(4 // world), "--trainer.max_steps", "6", *options],
            kill,
        )
        folder = tmp_path / name / "checkpoints"
        newest = newest_checkpoint(folder)
        assert [link.resolve() for link in folder.glob("last*")] == [newest]
        return newest

    one = torch.load(run("one", 1), weights_only=True)
    run("moving", 1, 1)
    run("moving", 2, 3, "--ckpt_path", "last")
    four = tensors_of(run("moving", 4, 4, "--ckpt_path", "last"))
    assert next(iter(four["optimizer_0"]["state"].values()))["step"] == 4
    last = torch.load(run("moving", 1, None, "--ckpt_path", "last"), weights_only=True)
    ours, theirs = logged(tmp_path / "one"), logged(tmp_path / "moving")
    assert list(ours) == list(theirs) == list("012345")
    for step, metrics in ours.items():  # the same groups at every step
        assert theirs[step] == pytest.approx(metrics, rel=1e-3, abs=1e-6)
    assert_same(one["state_dict"], last["state_dict"], exact=False)
    assert_same(one["optimizer_states"], last["optimizer_states"], exact=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path, config, number):
    folder, codes = str(tmp_path / "run"), [143, 143] if number == signal.SIGTERM else [0, 0]
    options = ["--data.batch_size", "2", "--trainer.max_steps", "50"]
    assert run_ranks(fit, 2, config(OFFLINE), folder, options, (1, 3, number)) == codes
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == "step-00000004.ckpt"
    assert f"{number.name}: stopped after step 4" in Path(f"{folder}.rank0.log").read_text()


def test_no_room_for_a_checkpoint_leaves_the_last_one_and_says_what_was_needed(tmp_path, config):
    folder = str(tmp_path / "run")
    options = ["--data.batch_size", "2", "--trainer.max_steps", "8"]
    run_ranks(fit, 2, config(OFFLINE), folder, options, None, (1, 3, 100_000))
    for rank in (0, 1):
        words = Path(f"{folder}.rank{rank}.log").read_text()
        assert re.search(
            r"no room to write step-00000004.ckpt: [\d,]{9,} bytes are needed, [\d,]+ are free", words
        )
        assert "because of rank" not in words  # rank 0 is well
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    assert newest == checkpoints / "step-00000002.ckpt" and (checkpoints / "last.ckpt").resolve() == newest


LIVE = """
trainer:
  accelerator: cpu
  val_check_interval: 1
  enable_progress_bar: false
  callbacks:
  - class_path: lightning.pytorch.callbacks.ModelCheckpoint
    init_args:
      dirpath: {folder}/best
      monitor: val/sampled_accuracy
      mode: max
      save_top_k: 2
      filename: "{{step}}"
model: {{optimizer: {{learning_rate: 1.0e-3, warmup_steps: 0}}}}
data:
  validation: {{path: quickstart-val, limit: 12}}
  batch_size: 4
  group_size: 3
  validation_samples: 2
  pass_at: [2]
  sources: [{{weight: 1, name: live}}]
"""


def test_the_best_checkpoints_are_kept(tmp_path, config):
    folder = str(tmp_path / "run")
    run_ranks(fit, 2, config(LIVE.format(folder=tmp_path)), folder, ["--trainer.max_steps", "4"], timeout=120)
    with open(f"{folder}/metrics.csv", newline="") as handle:
        rows = [row["val/sampled_accuracy"] for row in csv.DictReader(handle)]
    accuracies = [float(value) for value in rows if value]
    kept = sorted((tmp_path / "best").iterdir())
    assert len(accuracies) == 4 and len(kept) == 2
    assert all(read_marker(path)["ranks"] == 2 for path in kept)
    steps = [int(path.stem.partition("=")[2]) for path in kept]
    least = min(accuracies[step - 1] for step in steps)
    assert sum(value > least for value in accuracies) <= 1
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")  # those to go on from are kept besides
    assert newest is not None and newest.name == "step-00000004.ckpt"


GATHERING = """
trainer: {accelerator: cpu, val_check_interval: 2, enable_progress_bar: false}
model: {optimizer: {learning_rate: 1.0e-4, warmup_steps: 2}}
data:
  validation: {path: quickstart-val, limit: 5}
  batch_size: 1
  group_size: 3
  validation_samples: 2
  pass_at: [2]
  engine: {class_path: gathering_engine.GatheringEngine}
  sources:
  - {weight: 1, name: live}
  - {weight: 1, paths: [quickstart], repeat: true, name: offline}
"""


def test_an_engine_gets_each_versions_weights_once_from_all_ranks(tmp_path, config):
    # each step one rank samples and the other does not; one has three batches to validate, the other two
    folder = str(tmp_path / "run")
    options = ["--trainer.max_steps", "4"]
    assert run_ranks(fit, 2, config(GATHERING), folder, options, timeout=120) == [None, None]
    for rank in range(2):
        words = Path(f"{folder}.rank{rank}.log").read_text()
        assert re.findall(r"^pushed (\d+)$", words, re.MULTILINE) == ["0", "1", "2", "3", "4"], words


def test_other_strategies_are_refused_on_several_ranks(tmp_path, config):
    folder = str(tmp_path / "run")
    run_ranks(fit, 2, config(OFFLINE), folder, ["--trainer.strategy", "ddp", "--trainer.max_steps", "1"])
    words = Path(f"{folder}.rank1.log").read_text()
    assert "2 ranks under DDPStrategy" in words and "agro_lightning.training.strategy.Sharded" in words


@pytest.mark.parametrize("options", [("--trainer.num_nodes", "2"), ("--trainer.devices", "4")])
def test_devices_and_nodes_that_are_not_what_the_launcher_started_are_refused(tmp_path, config, options):
    folder = str(tmp_path / "run")
    assert run_ranks(fit, 2, config(OFFLINE), folder, [*options, "--trainer.max_steps", "1"]) == [2, 2]
    words = Path(f"{folder}.rank1.log").read_text()
    assert "the launcher started 2 processes; trainer.devices" in words and "is 4. Make them equal" in words


def test_rollouts_that_were_not_used_up_are_dealt_out_to_other_ranks():
    def saved(rank, first, pending, used):
        feed = {"pending": pending, "unfinished": [f"{one} begun" for one in pending], "micro_batch": 3}
        data = {"feed": feed, "completions_used": used}
        return {"data_rank": rank, "first": first, "data": data, "epoch": 0}

    other, mine = saved(1, True, ["c", "d"], 7), (["a", "b", "x"], 6)
    states = [other, saved(0, True, *mine), saved(0, False, *mine)]  # two ranks of one tensor group
    parts = [merge_ranks(states, DataRank(rank, 3, None, True)) for rank in range(3)]
    assert [part["data"]["feed"]["pending"] for part in parts] == [["a"], ["b", "x"], ["c", "d"]]
    assert [part["data"]["feed"]["unfinished"] for part in parts] == [
        ["a begun"],
        ["b begun", "x begun"],
        ["c begun", "d begun"],
    ]
    assert [part["data"]["completions_used"] for part in parts] == [5, 4, 4]
    assert all(part["data"]["feed"]["micro_batch"] == 3 and part["epoch"] == 0 for part in parts)


def test_half_written_checkpoints_are_never_picked_up(tmp_path):
    for name, complete in (
        ("step-1.ckpt", True),
        ("step-2.ckpt", True),
        (".step-3.ckpt.partial", True),
        ("step-4.ckpt", False),
    ):
        (tmp_path / name).mkdir()
        if complete:
            (tmp_path / name / MARKER).write_text(json.dumps({"ranks": 2}))
            os.utime(tmp_path / name / MARKER, ns=(0, 10 + int(name.split("-")[1][0])))
    (tmp_path / "last.ckpt").symlink_to("step-4.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "step-2.ckpt"
    with pytest.raises(ValueError, match="is not complete"):
        read_marker(tmp_path / "step-4.ckpt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_marker(tmp_path / "step-9.ckpt")
    remove_folder(tmp_path / "step-2.ckpt")
    assert newest_checkpoint(tmp_path) == tmp_path / "step-1.ckpt"
    assert newest_checkpoint(tmp_path / "nowhere") is None
