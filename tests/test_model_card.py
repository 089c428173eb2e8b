"""`export` of a run: its model card, and the push onto a hub."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from fake_hub import FakeHub
from transformers import AutoModelForCausalLM

from agro_lightning.checkpoints.model_card import model_card
from agro_lightning.commands.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "run"
    options = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.batch_size", "4"]
    options += ["--data.validation.limit", "6", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--run_dir", str(folder), *options])
    return folder


def export(hub, *args, code=0, **env):
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **env}
    command = [sys.executable, "-m", "agro_lightning", "export", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_a_run_is_exported_with_its_card_and_pushed(run, tmp_path):
    hub = FakeHub()
    try:
        options = ("--out", tmp_path / "secret" / "model", "--push", "me/sums")
        (tmp_path / "secret").mkdir()
        output = export(hub, "--ckpt", run, *options, HF_TOKEN="hf_test")
    finally:
        hub.close()
    assert f"{hub.url}/me/sums/commit/" in output
    assert hub.repositories["me/sums"]["visibility"] == "private" and hub.message == "agro-lightning export"
    assert hub.tokens == {"Bearer hf_test"}
    written = {file.name: file.read_bytes() for file in (tmp_path / "secret" / "model").iterdir()}
    assert hub.files == written and {"model.safetensors", "config.json", "README.md"} <= written.keys()
    for name, content in hub.files.items():  # what the hub has is a model
        (tmp_path / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path)

    text = written["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["agro", "agro-lightning", "reinforcement-learning"],
    }
    assert body.startswith("\n# me/sums\n") and "| base | quickstart |" in body and "| steps | 2 |" in body
    assert "| objective | Agro(beta=0.02, negative_weight=1.0, taper=False) |" in body
    assert "| live | 87.5% | – |" in body and "| offline | 12.5% | quickstart |" in body
    after = json.loads((run / "summary.json").read_text())["after"]["greedy_accuracy"]
    assert re.search(rf"\| greedy accuracy \| 0[.\d]* \| {after:.4g} \|", body)
    assert "| val/reward/exact\\_match |" in body or "| val/reward/exact_match |" in body
    assert "python -m agro_lightning export --ckpt run --out model --push me/sums" in body
    assert re.search(r"agro-lightning.*PyTorch .*transformers ", body)
    assert str(tmp_path) not in text and str(run.parent) not in text  # no path of this machine is published


def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(run, tmp_path):
    hub = FakeHub(refuse=403)
    try:
        last = run / "checkpoints" / "last.ckpt"
        error = export(
            hub, last, "--out", tmp_path / "model", "--push", "them/sums", code=1, HF_TOKEN="hf_test"
        )
        offline = export(hub, last, "--out", tmp_path / "m2", "--push", "a/b", code=1, HF_HUB_OFFLINE="1")
    finally:
        hub.close()
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "the hub did not take them/sums" in lines[0] and "403" in lines[0]
    assert f"hf upload them/sums {tmp_path / 'model'}" in lines[0] and "Traceback" not in error
    assert "HF_HUB_OFFLINE is set" in offline and (tmp_path / "m2" / "model.safetensors").is_file()
    assert (tmp_path / "model" / "README.md").is_file() and not hub.files


def test_a_wrong_repository_is_refused_before_anything_is_written(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "model"), "--push", "just-a-name"])
    assert "it must be OWNER/NAME" in capsys.readouterr().err and not (tmp_path / "model").exists()


def test_card_of_a_lora_run_whose_folder_is_gone():
    about = {
        "policy": {"path": "Qwen/Qwen3-0.6B", "lora": {"rank": 8}},
        "reference_id": "abc@1",
        "global_step": 7,
    }
    text = model_card(about, None, command="python -m agro_lightning export", adapter=True, name="x")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen3-0.6B" and front["library_name"] == "peft"
    assert "| base | Qwen/Qwen3-0.6B, LoRA of rank 8 |" in text and "| steps | 7 |" in text


def test_texts_of_a_config_cannot_break_the_card(tmp_path):
    bad = "a|b\n## <script>`"
    config = {"data": {"sources": [{"name": bad, "weight": 3, "paths": ["/home/me/x.jsonl"]}, {"weight": 1}]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    about = {"policy": {"path": "/home/me/models/base", "lora": None}, "reference_id": None, "global_step": 1}
    text = model_card(about, tmp_path, command="c", adapter=False, name="x")
    assert "| a\\|b ## &lt;script>\\` | 75.0% | x.jsonl |" in text
    assert "/home/me" not in text and "base_model" not in text
