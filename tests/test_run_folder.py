"""What a run keeps in its folder: metrics.csv, TensorBoard's file, the lock; damaged, full, and in use."""

import csv
import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys

import lightning as L
import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger

from agro_lightning.primitives.atomic_files import DiskFullError
from agro_lightning.training.callbacks import run_lock
from agro_lightning.training.callbacks.config_file import RunConfig
from agro_lightning.training.callbacks.csv_log import MetricsFile, whole_rows
from agro_lightning.training.callbacks.run_lock import RunLock
from agro_lightning.training.callbacks.samples import tables_after
from agro_lightning.training.callbacks.summary import plot_rewards
from agro_lightning.training.callbacks.tensorboard_log import TensorBoardErrors


def rows_of(path):
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def write(folder, steps, *, after=0, names=("train/reward/live", "train/kl")):
    """Logs `steps` steps as a run does, from the checkpoint of step `after` on."""
    metrics = MetricsFile(folder)
    metrics.resume_at(after)
    for step in range(after, after + steps):
        metrics.log_metrics({name: step + 0.5 for name in names}, step)
        metrics.save()
    return metrics


def test_metrics_are_appended_and_a_new_metric_gets_a_column(tmp_path):
    metrics = write(tmp_path, 3)
    before = metrics.path.read_bytes()
    metrics.log_metrics({"train/reward/live": 7.0}, 3)
    metrics.save()
    assert metrics.path.read_bytes() == before + b"3,7.0,\n"
    metrics.log_metrics({"val/greedy_accuracy": 0.25, "epoch": 0}, 3)  # more of the same step, and a new name
    metrics.finalize("success")
    rows = rows_of(metrics.path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert rows[3] == {
        "step": "3",
        "train/reward/live": "7.0",
        "train/kl": "",
        "val/greedy_accuracy": "0.25",
    }
    assert rows[1]["train/kl"] == "1.5" and rows[1]["val/greedy_accuracy"] == ""


def test_little_is_held_and_written_a_step(tmp_path):
    metrics = write(tmp_path, 200)
    inode = metrics.path.stat().st_ino
    held = len(str(vars(metrics)))
    for step in range(200, 1000):
        metrics.log_metrics({"train/reward/live": 1.0, "train/kl": 2.0}, step)
        metrics.save()
    assert metrics.path.stat().st_ino == inode  # appended to, never written anew
    assert len(str(vars(metrics))) < held + 20
    assert len(rows_of(metrics.path)) == 1000


def test_a_run_that_goes_on_writes_later_rows_again(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 2, after=3)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == list("01234")
    write(tmp_path, 1)  # from the start
    assert [row["step"] for row in rows_of(tmp_path / "metrics.csv")] == ["0"]


def damage(kind, lines):
    if kind == "a byte that is no UTF-8":
        lines[2] = lines[2].replace(b"1.5", b"1\xff5", 1)
        return lines, [3], ["0", "2", "3"]
    if kind == "two lines merged":
        return [*lines[:2], lines[2].rstrip() + lines[3], lines[4]], [3], ["0", "3"]
    if kind == "a torn line":
        return [*lines[:4], b"3,3."], [5], ["0", "1", "2"]
    if kind == "a line torn in the middle":
        return [*lines[:2], b"1,1\n", *lines[3:]], [3], ["0", "2", "3"]
    if kind == "words":
        return [*lines[:2], b"1,one,1.5,1.5\n", *lines[3:]], [3], ["0", "2", "3"]
    if kind == "nulls":
        return [*lines[:3], b"\0" * 40 + b"\n", *lines[3:]], [4], ["0", "1", "2", "3"]
    if kind == "a torn header":
        return [b"step,train/reward/live,train/k\n", *lines[1:]], [1], ["0", "1", "2", "3"]
    assert kind == "a header that merged with a row"
    return [lines[0].rstrip() + lines[1], *lines[2:]], [1], ["1", "2", "3"]


KINDS = (
    "a byte that is no UTF-8",
    "two lines merged",
    "a torn line",
    "a line torn in the middle",
    "words",
    "nulls",
    "a torn header",
    "a header that merged with a row",
)


@pytest.mark.parametrize("kind", KINDS)
def test_of_a_damaged_metrics_file_what_is_whole_is_kept(tmp_path, caplog, kind):
    path = write(tmp_path, 4, names=("train/reward/live", "train/kl", "train/entropy")).path
    lines, lost, steps = damage(kind, path.read_bytes().splitlines(keepends=True))
    path.write_bytes(torn := b"".join(lines))
    numbers: list[int] = []
    rows = list(whole_rows(path, numbers))[1:]
    assert numbers == lost and [row["step"] for row in rows] == steps
    plot_rewards(path, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").stat().st_size > 1000
    with caplog.at_level(logging.WARNING):
        write(tmp_path, 1, after=4)
    (record,) = caplog.records
    assert f"{path} is damaged in line {lost[0]}" in record.getMessage()
    assert (tmp_path / "metrics-damaged-1.csv").read_bytes() == torn
    after = rows_of(path)
    assert [row["step"] for row in after] == [*steps, "4"]
    assert after[0]["train/reward/live"] == f"{int(steps[0])}.5" and after[-1]["train/kl"] == "4.5"


def test_a_metrics_file_without_any_whole_name_is_put_aside(tmp_path, caplog):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"0,1.0\n1,2.0\n")
    write(tmp_path, 1, after=2)
    assert [row["step"] for row in rows_of(path)] == ["2"]
    assert (tmp_path / "metrics-damaged-1.csv").read_bytes() == b"0,1.0\n1,2.0\n"


class NoRoom:
    """No file may grow beyond so many bytes: what a full disk and a quota do, too."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_no_room_for_a_row_leaves_the_rows_before(tmp_path):
    metrics = write(tmp_path, 4)
    before = metrics.path.read_bytes()
    metrics.log_metrics({"train/kl": 1.0}, 4)
    with (
        NoRoom(len(before) + 3),
        pytest.raises(DiskFullError, match="metrics.csv: .* needed"),
    ):
        metrics.save()
    assert metrics.path.read_bytes() == before


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder)).Reload()
    return [event.step for event in accumulator.Scalars("a")]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_no_room_under_tensorboard(tmp_path, capfd, caplog, on_error):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=logger, accelerator="cpu", enable_checkpointing=False
    )
    errors = TensorBoardErrors(on_error)
    errors.watch(trainer.loggers)
    errors.setup(trainer, L.LightningModule(), "fit")
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
        logger.save()
    (path,) = tmp_path.glob("events.out*")
    whole = path.read_bytes()
    with NoRoom(len(whole) + 10):
        logger.log_metrics({"a": 1.0}, 3)
        if on_error == "stop":
            with pytest.raises(DiskFullError) as caught:
                logger.save()
            words = str(caught.value.strerror)
            assert f"no room to write {path.name}" in words and "bytes are needed" in words
            assert "Last complete checkpoint: none was saved yet" in words
            assert "--on_tensorboard_error continue" in words
        else:
            with caplog.at_level(logging.WARNING):
                logger.save()
            assert "goes on without TensorBoard; metrics.csv has every metric" in caplog.text
        logger.log_metrics({"a": 1.0}, 4)  # nothing more is tried or said
        logger.finalize("failed")
    assert path.read_bytes() == whole and events(tmp_path) == [0, 1, 2]
    assert "Traceback" not in capfd.readouterr().err


HOLD = """
import sys, time
import lightning as L
from agro_lightning.training.callbacks.run_lock import RunLock
trainer = L.Trainer(default_root_dir=sys.argv[1], accelerator="cpu", logger=False, enable_checkpointing=False)
lock = RunLock()
lock.setup(trainer, None, "fit")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains in the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def lock(folder):
    trainer = L.Trainer(default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False)
    made = RunLock()
    made.setup(trainer, L.LightningModule(), "fit")
    made.teardown(trainer, L.LightningModule(), "fit")


def without_locks(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_run_in_a_folder_is_refused_until_the_first_has_died(
    tmp_path, holder, monkeypatch, caplog, locks
):
    if not locks:
        monkeypatch.setattr("fcntl.flock", without_locks)
    with pytest.raises(ValueError, match=rf"is in use: process {holder.pid} on \S+, started 20.*, trains"):
        lock(tmp_path)
    assert ("has no locks" in caplog.text) != locks
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    caplog.clear()
    lock(tmp_path)
    assert f"was left by process {holder.pid}" in caplog.text
    caplog.clear()
    lock(tmp_path)  # and left nothing
    assert "was left by" not in caplog.text


def test_a_process_of_another_host_lives_as_long_as_it_touches_its_file(tmp_path, monkeypatch, holder):
    about = tmp_path / ".lock.json"
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 3.0)
    monkeypatch.setattr("fcntl.flock", without_locks)
    other = {**json.loads(about.read_text()), "host": "elsewhere"}
    about.write_text(json.dumps(other))  # the holder touches it every 5 seconds
    with pytest.raises(ValueError, match="on elsewhere"):
        lock(tmp_path)
    holder.kill()
    holder.wait()
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.2)
    lock(tmp_path)


def test_a_torn_lock_file_is_no_holder(tmp_path):
    (tmp_path / ".lock.json").write_text('{"host": "a", "pro')
    lock(tmp_path)
    assert not (tmp_path / ".lock.json").exists()


def test_a_byte_order_mark_and_an_endless_cell_lose_no_other_row(tmp_path):
    path = write(tmp_path, 4).path
    whole = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + whole + b"9" * 200_000 + b"\n")
    damaged = []
    names, *rows = whole_rows(path, damaged)
    assert list(names)[0] == "step" and [row["step"] for row in rows] == list("0123")
    assert damaged == [6]


@pytest.mark.filterwarnings("ignore")  # of names that Lightning calls
def test_settings_that_are_no_text_are_put_aside(tmp_path):
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_checkpointing=False
    )
    parser = ArgumentParser()
    parser.add_argument("--a", type=int, default=1)
    RunConfig(parser, parser.get_defaults()).save_config(trainer, L.LightningModule(), "fit")
    assert "a: 1" in (tmp_path / "config.yaml").read_text()
    assert (tmp_path / "config-1.yaml").read_bytes() == b"\xff\xfe\x00"


def test_only_the_runs_own_sample_tables_are_dropped(tmp_path):
    names = ("training-step-00000002", "validation-step-00000003", "training-step-x", "mine")
    for name in names:
        (tmp_path / f"{name}.parquet").touch()
    assert [file.stem for file in tables_after(tmp_path, 2)] == ["validation-step-00000003"]
