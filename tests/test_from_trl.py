"""`from-trl`: every key of TRL's GRPOConfig is mapped or explained, and `fit` takes what comes out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from agro_lightning.commands.from_trl import Translation, from_trl, read_script
from agro_lightning.commands.main import main
from agro_lightning.commands.trl_keys import COMPUTED, DIRECT, REASONS

FIELDS = json.loads((Path(__file__).parent / "data" / "trl_grpo_config.json").read_text())
"""TRL 1.16's fields and defaults, by dataclasses.fields(GRPOConfig)."""
SCRIPT = """
import os
os.abort()  # a script is read, not run

from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

def right(completions, **kwargs):
    return [1.0 for _ in completions]

args = GRPOConfig(output_dir="out", learning_rate=2e-6, num_generations=4, epsilon=0.1, beta=0.01, seed=SEED)
trainer = GRPOTrainer(
    model="Qwen/Qwen3-0.6B",
    args=args,
    reward_funcs=[right],
    train_dataset=load_dataset("openai/gsm8k", "main", split="train"),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM"),
)
"""


def translated(tmp_path, given, **options):
    """The YAML that a configuration becomes, as text and as settings."""
    source, out = tmp_path / "trl.yaml", tmp_path / "ours.yaml"
    source.write_text(yaml.safe_dump(given))
    from_trl(str(source), out=str(out), **options)
    return out.read_text(), yaml.safe_load(out.read_text())


def parsed(path, capsys):
    """What `fit` makes of a configuration; SystemExit 2 where it refuses it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), "--print_config"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    return yaml.safe_load(said.out)


def test_every_field_of_trl_is_known_once():
    assert not set(FIELDS) - {*DIRECT, *COMPUTED, *REASONS}
    assert not (DIRECT.keys() & COMPUTED.keys()) | (REASONS.keys() & {*DIRECT, *COMPUTED})


def test_trls_own_defaults_are_those_that_missing_keys_get(tmp_path, capsys):
    given = {key: value for key, value in FIELDS.items() if value is not None}
    text, settings = translated(tmp_path, given)
    assert settings == translated(tmp_path, {"learning_rate": 1e-6})[1]
    for key in given:
        assert f"#   {key} -> " in text or f"#   {key}: " in text, key
    config = parsed(tmp_path / "ours.yaml", capsys)
    assert config["model"]["optimizer"]["learning_rate"] == 1e-6
    assert config["data"]["sampling"]["max_new_tokens"] == 512
    assert config["data"]["validation"] is None


@pytest.mark.parametrize(
    ("completions", "pieces", "group", "processes"), [(8, 1, 8, 1), (8, 4, 8, 2), (4, 4, 8, 1), (64, 3, 4, 2)]
)
def test_a_step_has_as_many_completions_as_trls(tmp_path, completions, pieces, group, processes):
    given = {"per_device_train_batch_size": completions, "gradient_accumulation_steps": pieces}
    _, ours = translated(tmp_path, given | {"num_generations": group}, processes=processes)
    groups = (
        ours["data"]["batch_size"] * ours["trainer"]["accumulate_grad_batches"] * ours["trainer"]["devices"]
    )
    assert groups * ours["data"]["group_size"] == completions * pieces * processes


def test_epochs_become_steps_where_the_prompts_are_counted(tmp_path):
    given = {"num_train_epochs": 2, "per_device_train_batch_size": 32, "warmup_steps": 0.1}
    _, ours = translated(tmp_path, given, prompts=1000, processes=2)
    assert ours["trainer"]["max_steps"] == 250  # 2 × 1000 prompts by 2 × 4 groups
    assert ours["model"]["optimizer"]["warmup_steps"] == 25


def test_a_script_is_read_and_not_run(tmp_path, capsys):
    (tmp_path / "train.py").write_text(SCRIPT)
    from_trl(str(tmp_path / "train.py"), out=str(tmp_path / "ours.yaml"))
    text = (tmp_path / "ours.yaml").read_text()
    assert "seed = SEED; set it by hand" in text and "['right']" in text and "epsilon: 0.1 (" in text
    config = parsed(tmp_path / "ours.yaml", capsys)
    assert config["model"]["policy"]["lora"] == {"rank": 8, "alpha": 16, "target_modules": ["q_proj"]}
    assert config["model"]["policy"]["path"] == "Qwen/Qwen3-0.6B"
    assert (config["data"]["train"]["path"], config["data"]["train"]["subset"]) == ("openai/gsm8k", "main")
    assert config["model"]["objective"]["init_args"]["beta"] == 0.01


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "n7"}, "url", "http://n7:8000"),
        ({"use_vllm": True}, "options", ["--gpu-memory-utilization", "0.3"]),
    ],
)
def test_engines(tmp_path, capsys, given, key, value):
    translated(tmp_path, given)
    assert parsed(tmp_path / "ours.yaml", capsys)["data"]["engine"]["init_args"][key] == value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"leraning_rate": 1e-6}, "no key 'leraning_rate'. Did you mean learning_rate?"),
        ({"num_generation": 8}, "Did you mean num_generations?"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; TRL takes a number there"),
        ({"num_generations": 2.5}, "num_generations is 2.5; TRL takes a whole number there"),
        ({"bf16": "yes please"}, "bf16 is 'yes please'; TRL takes true or false"),
        ({"per_device_train_batch_size": 6}, "no whole number of groups of num_generations 8"),
        ({}, "holds no keys"),
    ],
)
def test_what_cannot_be_translated_is_said(tmp_path, capsys, given, said):
    (tmp_path / "trl.json").write_text(json.dumps(given))
    with pytest.raises(SystemExit) as ended:
        main(["from-trl", str(tmp_path / "trl.json")])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_script_needs_one_config(tmp_path):
    (tmp_path / "train.py").write_text("GRPOConfig()\nGRPOConfig()\n")
    with pytest.raises(ValueError, match=r"has 2 \(lines: 1, 2\)"):
        read_script(tmp_path / "train.py")


def test_a_number_may_be_text():
    given = {"learning_rate": "1e-6", "chat_template_kwargs": '{"enable_thinking": false}'}
    settings = Translation(given, [], processes=1, prompts=None, validation=None).settings
    assert settings["model.optimizer.learning_rate"] == 1e-6
    assert settings["data.train.chat_template_options"] == {"enable_thinking": False}


def test_what_comes_out_trains(tmp_path):
    given = {"max_steps": 2, "max_completion_length": 5, "num_generations": 4, "bf16": False, "use_cpu": True}
    translated(tmp_path, given | {"output_dir": str(tmp_path / "run"), "learning_rate": "1e-4"})
    command = [sys.executable, "-m", "agro_lightning", "fit", "--config", tmp_path / "ours.yaml"]
    subprocess.run(command, check=True, capture_output=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["completions"] == 16
