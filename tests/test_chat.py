"""The command `chat`: a run's policy and reference answer typed prompts as the run's own are answered."""

import io

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from agro_lightning.checkpoints.trained import load_trained
from agro_lightning.commands.chat import _Printer
from agro_lightning.commands.main import main
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.models.reference import FrozenReference
from agro_lightning.rollout import BatchedDecoding, Sampling

CPU = torch.device("cpu")


def train(folder, *options):
    small = ["--trainer.max_steps", "2", "--data.batch_size", "4", "--data.validation", "null"]
    quiet = ["--trainer.enable_progress_bar", "false", "--model.optimizer.warmup_steps", "0"]
    main(["fit", "--run_dir", str(folder), *small, *quiet, *options])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights have moved far, so that policy and reference answer differently."""
    fast = ["--model.optimizer.learning_rate", "0.01", "--data.train.template", "{prompt}="]
    return train(tmp_path_factory.mktemp("chat") / "run", *fast)


def answers(monkeypatch, capsys, lines, *args):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    main(["chat", *map(str, args)])
    return capsys.readouterr().out.splitlines()


def expected(policy, prompt, *, seed, temperature=1.0):
    """What another engine draws with the same seed."""
    tokenizer = load_tokenizer("quickstart")
    engine = BatchedDecoding()
    engine.attach(policy, tokenizer)
    sampling = Sampling(max_new_tokens=5, temperature=temperature)
    ((made,),) = engine.generate([tokenizer(prompt).input_ids], sampling, n=1, seed=seed)
    return str(tokenizer.decode(list(made.completion_ids), skip_special_tokens=True))


def test_policy_and_reference_answer_each_line_as_the_run_does(run, monkeypatch, capsys):
    trained = load_trained(str(run), device=CPU)
    reference = trained.reference()
    assert isinstance(reference, FrozenReference) and trained.step == 2
    wanted = []
    for place, prompt in enumerate(("10+20=", "77-11=")):
        for name, policy in (("policy", trained.policy), ("reference", reference.policy)):
            wanted.append(f"{name}: {expected(policy, prompt, seed=3 + place)}".rstrip())
    lines = ["10+20", "", "77-11"]  # the run's template adds the equals sign
    found = answers(monkeypatch, capsys, lines, run, "--reference", "true", "--seed", 3)
    assert [line.rstrip() for line in found] == wanted
    assert wanted[0].split()[1:] != wanted[1].split()[1:]


def test_options_go_before_the_runs_settings_and_a_checkpoint_is_named(run, monkeypatch, capsys):
    ckpt = run / "checkpoints" / "last.ckpt"
    options = ["--sampling.temperature", 0, "--prompts.template", "{prompt}"]
    greedy = expected(load_trained(str(ckpt), device=CPU).policy, "1+1=", seed=0, temperature=0.0)
    assert answers(monkeypatch, capsys, ["1+1="], "--ckpt", ckpt, *options) == [greedy]


def test_a_model_folder_answers_with_its_chat_template(tmp_path, monkeypatch, capsys):
    tokenizer = load_tokenizer("quickstart")
    template = "{% for m in messages %}{{ bos_token }}{{ m.content }}={% endfor %}"
    model = load_trained("quickstart", device=CPU)
    for chat in (False, True):
        tokenizer.chat_template = template if chat else None
        folder = tmp_path / f"chat-{chat}"
        model.policy.base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        line = "12+30" if chat else "12+30="
        found = answers(monkeypatch, capsys, [line], folder, "--sampling.temperature", 0)
        assert found == ["42"]


def test_a_lora_runs_reference_is_its_base(tmp_path, monkeypatch, capsys):
    adapted = ["--model.policy.lora", "{rank: 2}", "--model.optimizer.learning_rate", "0.03"]
    folder = train(tmp_path / "run", *adapted)
    greedy = ["--reference", "true", "--sampling.temperature", 0]
    trained = load_trained(str(folder), device=CPU)
    for prompt in ("11+12=", "97-95="):
        base = expected(load_trained("quickstart", device=CPU).policy, prompt, seed=0, temperature=0.0)
        policy = expected(trained.policy, prompt, seed=0, temperature=0.0)
        found = answers(monkeypatch, capsys, [prompt], folder, *greedy)
        assert [line.rstrip() for line in found] == [
            f"policy: {policy}".rstrip(),
            f"reference: {base}".rstrip(),
        ]
    assert trained.reference().reference_id == trained.about["reference_id"]


def test_a_reset_reference_is_found_in_the_run(tmp_path):
    folder = train(tmp_path / "run", "--model.reference_reset_every", "2")
    trained = load_trained(str(folder), device=CPU)
    theirs, ours = trained.reference().policy.state_dict(), trained.policy.state_dict()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    next(folder.glob("reference-step-*.safetensors")).unlink()
    with pytest.raises(
        FileNotFoundError, match="trained against a reset reference, and reference-step-00000002"
    ):
        trained.reference()


def test_a_base_that_has_changed_is_refused(tmp_path, monkeypatch, capsys):
    base = tmp_path / "base"
    load_trained("quickstart", device=CPU).policy.base.save_pretrained(base)
    load_tokenizer("quickstart").save_pretrained(base)
    folder = train(tmp_path / "run", "--model.policy.path", str(base))
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: 2 * value for name, value in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SystemExit):
        answers(monkeypatch, capsys, ["1+1="], folder, "--reference", "true")
    assert "that model has changed since" in capsys.readouterr().err


def test_an_answer_gives_the_terminal_no_orders(capsys):
    tokenizer = load_tokenizer("quickstart")
    printer = _Printer(tokenizer)
    printer.on_finalized_text("a\x1b]0;owned\x07\tb\x9b2J\r\nc", stream_end=True)
    assert capsys.readouterr().out == "a�]0;owned�\tb�2J�\nc\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: ckpt"),
        (["nowhere/at/all"], "model folder nowhere/at/all does not exist"),
        (["quickstart", "--reference", "true"], "a model folder has no reference"),
        (["quickstart", "--prompts.template", "{question}"], "1 of 1 prompts could not be answered"),
        (["quickstart", "--prompts.template", "{prompt}" + "+1" * 40], "exceeds the model's"),
    ],
)
def test_what_cannot_be_answered_is_one_line(args, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n"))
    with pytest.raises(SystemExit) as stopped:
        main(["chat", *args])
    assert stopped.value.code == (1 if "nowhere" in message else 2)
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert all(line.startswith("error: ") for line in err.splitlines() if line)


def test_a_run_without_a_checkpoint_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {}}))
    with pytest.raises(SystemExit):
        main(["chat", str(tmp_path)])
    assert f"run {tmp_path} has no complete checkpoint" in capsys.readouterr().err
