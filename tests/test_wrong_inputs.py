"""Wrong inputs of every command: one line that names the folder, key or file, and no traceback."""

import json
import shutil
import subprocess
from pathlib import Path

import forked
import pytest
from test_cli import output_of

from agro_lightning.quickstart import FOLDER

FIT = ("fit", "--trainer.accelerator", "cpu", "--data.batch_size", "2", "--trainer.max_steps", "1")


def broken_folders(root: Path) -> None:
    """Files and folders that are not what a command takes them for."""
    (root / "file.txt").write_text("this is a text\n")
    (root / "empty").mkdir()
    (root / "empty.jsonl").write_text("")
    (root / "torn.parquet").write_bytes(b"PAR1 and no more")
    (root / "torn.yaml").write_bytes(b"\xff\xfe\x00 data: [")
    (root / "bad.jsonl").write_text('{"prompt": "1=", "completion": "1", "reward": "high"}\n')
    lm_eval = {"doc_id": 0, "doc": {"question": "1+1"}, "target": "2", "resps": [["2"]], "exact_match": 1.0}
    (root / "samples_gsm8k.jsonl").write_text(json.dumps(lm_eval) + "\n")
    for name in ("no-config", "torn-config", "no-tokenizer", "unknown-type", "no-weights"):
        shutil.copytree(FOLDER / "policy", root / name)
    (root / "no-config" / "config.json").unlink()
    (root / "torn-config" / "config.json").write_text("{")
    for file in (root / "no-tokenizer").glob("tokenizer*"):
        file.unlink()
    (root / "unknown-type" / "config.json").write_text('{"model_type": "martian"}')
    (root / "no-weights" / "model.safetensors").unlink()
    for name, file, key, value in (
        ("no-layers", "config.json", "num_hidden_layers", -1),
        ("end-text", "generation_config.json", "eos_token_id", "x"),
    ):
        shutil.copytree(FOLDER / "policy", root / name)
        path = root / name / file
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, key: value}))


CASES = [
    ("inspect", "nowhere.jsonl"),
    ("inspect", "empty"),
    ("inspect", "empty.jsonl"),
    ("inspect", "torn.parquet"),
    ("inspect", "file.txt"),
    ("inspect", "bad.jsonl"),
    ("inspect", "samples_gsm8k.jsonl"),
    ("inspect", "quickstart", "--tokenizer", "nowhere"),
    ("inspect", "quickstart", "--tokenizer", "no-tokenizer"),
    ("inspect", "quickstart", "--tokenizer", "file.txt"),
    ("annotate", "--out=copy", "--buffer", "nowhere.jsonl"),
    ("annotate", "--buffer=quickstart", "--out=copy", "--policy.path", "nowhere"),
    ("annotate", "--buffer=quickstart", "--out=copy", "--policy.path", "torn-config"),
    ("annotate", "--buffer=quickstart", "--out=copy", "--device", "cuda:99"),
    ("annotate", "--buffer=quickstart", "--out=copy", "--shard", "3/2"),
    ("annotate", "--buffer=quickstart", "--out", "file.txt/copy"),
    ("rollout", "--n", "2"),
    ("rollout", "--out=buffer", "--prompts.path", "nowhere.jsonl"),
    ("rollout", "--out=buffer", "--prompts.path", "torn.parquet"),
    ("rollout", "--out=buffer", "--policy.path", "no-config"),
    ("rollout", "--out=buffer", "--policy.path", "unknown-type"),
    ("rollout", "--out", "file.txt/buffer", "--groups", "2"),
    ("rollout", "--timeout_s=0", "--follow", "nowhere"),
    ("export", "--out=model", "--ckpt", "nowhere.ckpt"),
    ("export", "--out=model", "--ckpt", "empty"),
    ("export", "--out=model", "--ckpt", "file.txt"),
    ("validate", "--ckpt_path", "nowhere.ckpt"),
    ("validate", "--ckpt_path", "file.txt"),
    (*FIT, "--model.policy.path", "nowhere"),
    (*FIT, "--model.policy.path", "no-config"),
    (*FIT, "--model.policy.path", "torn-config"),
    (*FIT, "--model.policy.path", "no-tokenizer"),
    (*FIT, "--model.policy.path", "unknown-type"),
    (*FIT, "--model.policy.path", "no-weights"),
    (*FIT, "--model.policy.path", "no-layers"),
    (*FIT, "--model.policy.path", "end-text"),
    (*FIT, "--data.train.path", "nowhere.jsonl"),
    (*FIT, "--data.train.path", "empty"),
    (*FIT, "--data.validation.path", "torn.parquet"),
    (*FIT, '--data.sources=[{"paths": ["bad.jsonl"]}]'),
    (*FIT, "--run_dir", "file.txt/run"),
    (*FIT, "--config", "torn.yaml"),
    (*FIT, "--config", "empty"),
    (*FIT, "--model.policy.lora", '{"rank": 2, "target_modules": ["q_prj"]}'),
    (*FIT, "--trainer.logger", "WandbLogger"),
]
NAMES = {"--n": "--out", "WandbLogger": "wandb", "empty.jsonl": "empty.jsonl"}


@pytest.mark.parametrize("args", CASES, ids=lambda args: " ".join(args).replace(" ".join(FIT), "fit"))
def test_a_wrong_input_is_named_in_one_line(args, tmp_path, monkeypatch):
    broken_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGRO_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out, err, code = output_of(*args)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in (1, 2) and len(errors) == 1 and err.splitlines()[-1] == errors[0], err
    assert "Traceback" not in out + err and "The traceback is in" not in err
    given = args[-2] if args[-2] in NAMES else args[-1]
    given = json.loads(given)["target_modules"][0] if "target_modules" in given else given
    name = NAMES.get(given, "bad.jsonl" if "bad.jsonl" in given else given.partition("/")[0])
    assert name in errors[0], errors[0]


@pytest.fixture
def mounted(tmp_path, request):
    """A file system of its own, with the options of the test's parameter."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("mounted", ["ro", "size=8k"], indirect=True, ids=["read-only", "full"])
def test_a_file_system_without_room_or_read_only_is_named(mounted, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    quick = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=9")
    code = output_of(*FIT, "--run_dir=run", *quick)[2]
    assert code == 0
    full = "full" in request.node.callspec.id
    words = ("no room to write",) if full else ("ead-only file system", "cannot be written to")
    for args in (
        ("rollout", "--groups=40", "--out", mounted / "buffer"),
        ("export", "--ckpt", "run/checkpoints/last.ckpt", "--out", mounted / "model"),
        ("annotate", "--buffer=quickstart", "--out", mounted / "copy"),
        *([] if full else [(*FIT, "--run_dir", mounted / "run")]),
    ):
        _, err, code = output_of(*args)
        line = err.splitlines()[-1]
        assert code in (1, 2) and str(mounted) in line and line.startswith("error: "), err
        assert any(word in line for word in words), err
        assert not any((mounted / "model").glob("*")) and "Traceback" not in err, err


START = (*FIT, "--trainer.limit_val_batches=0", "--trainer.val_check_interval=9", "--run_dir=mounted/run")


@pytest.mark.parametrize(
    ("mounted", "name"),
    [
        ("size=4k", "config.yaml"),
        ("size=1m,nr_inodes=2", ".lock"),
        ("size=12k", "run"),
        ("size=64k", "run"),
    ],
    indirect=["mounted"],
)
def test_a_run_folder_without_room_is_named_at_any_moment_of_the_start(mounted, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said = forked.run([*START], tmp_path / "log")
    assert code == 1 and "Traceback" not in said and "Errno" not in said, said
    *before, line = said.splitlines()
    assert line.startswith("error: ") and not any(other.startswith("error: ") for other in before), said
    assert name in line and "mounted" in line and ("are needed" in line or "free" in line), line
    assert "Files already there are untouched" in line and "checkpoint: none was saved yet" in line, line
