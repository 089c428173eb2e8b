"""`doctor --propose`: a configuration that fits, which fit and doctor take."""

import pytest
import yaml
from tiny_models import tiny_lm

from agro_lightning.commands.doctor.command import doctor, load

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_lm("llama", max_position_embeddings=4096).save_pretrained(path)
    return str(path)


def propose(capsys, *args):
    doctor(["--propose", *map(str, args)])
    return capsys.readouterr().out


def test_the_proposal_fits_and_is_taken_by_the_commands(folder, tmp_path, capsys):
    given = tmp_path / "mine.yaml"
    given.write_text(
        f"model: {{policy: {{path: {folder}}}, objective: {{class_path: Agro, init_args: {{beta: 0.5}}}}}}\n"
        "data: {group_size: 4, batch_size: 16}\n"
    )
    lengths = ("--devices", 2, "--prompt-tokens", 64, "--completion_tokens", 128)
    options = ("--model.policy.lora.rank", 4, "--model.optimizer.class_path=Muon", "--checkpoint_every", 7)
    said = propose(capsys, "--config", given, "--gpu_memory", 0.05, *lengths, *options)
    found = yaml.safe_load(said)
    assert found["model"]["policy"]["lora"] == {"rank": 4} and found["checkpoint_every"] == 7
    assert found["model"]["optimizer"] == {"class_path": "Muon"} and "devices" not in found
    assert found["model"]["objective"]["init_args"] == {"beta": 0.5}
    assert found["data"]["batch_size"] * found["trainer"]["accumulate_grad_batches"] >= 16
    assert found["data"]["sampling"]["max_new_tokens"] == 128 and found["trainer"]["devices"] == 2
    assert 192 <= found["model"]["max_tokens"] <= 16 * (64 + 4 * 127)
    ready = tmp_path / "ready.yaml"
    ready.write_text(said)
    cli = load(["--config", str(ready)])
    assert cli.model.max_tokens == found["model"]["max_tokens"] and cli.datamodule.group_size == 4
    doctor(["--config", str(ready), "--simulate_ranks", "2", "--gpu_memory_gib", "0.05"])
    assert capsys.readouterr().out.startswith("ok")


@pytest.mark.slow
def test_less_memory_means_shorter_passes_and_recomputed_layers_and_at_last_what_to_do(folder, capsys):
    args = ("--model.policy.path", folder, "--data.group_size", 4, "--prompt_tokens", 64)
    args += ("--completion_tokens", 512)
    passes = [
        yaml.safe_load(propose(capsys, *args, "--gpu_memory_gib", size))["model"]["max_tokens"]
        for size in (1, 0.05, 0.02)
    ]
    assert passes == sorted(passes, reverse=True) and passes[0] > passes[-1]
    with pytest.raises(ValueError, match="Give more --devices or --gpu_memory_gib, shorter"):
        propose(capsys, *args, "--gpu_memory_gib", 0.001)


@pytest.mark.parametrize("option", ["--devices", "--prompt_tokens", "--completion_tokens"])
def test_no_tokens_and_no_devices_are_named(option, capsys):
    with pytest.raises(ValueError, match=f"{option} is 0; it must be positive"):
        propose(capsys, option, 0)
