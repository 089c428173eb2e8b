"""The command line: configs that parse and instantiate, the printed config, and errors of one line."""

import functools
import importlib
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from tiny_models import save_with_tokenizer, tiny_lm

from agro_lightning.commands import fit
from agro_lightning.commands import main as cli
from agro_lightning.commands.doctor.command import load

CONFIGS = Path(__file__).parent.parent / "configs"
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def output_of(*args):
    """What the command prints on stdout and stderr, and its exit status."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main([str(arg) for arg in args])
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return out.getvalue(), err.getvalue(), code


def printed_config(*args):
    out, err, code = output_of("fit", *args, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


def test_quickstart_yaml_equals_the_defaults():
    assert printed_config("--config", CONFIGS / "quickstart.yaml") == printed_config()


def test_quickstart_yaml_is_complete():
    """Every key of model and data stands in it, so that it can be read as the list of what there is."""
    written = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    assert written["model"] == printed_config()["model"]
    assert written["data"] == printed_config()["data"]


@pytest.mark.parametrize(
    "args",
    [
        ("fit",),
        ("validate",),
        ("doctor",),
        ("rollout", "--prompts.path", "quickstart-train", "--out", "buffer"),
        ("annotate", "--buffer", "quickstart", "--out", "copy"),
        ("inspect", "--buffer", "quickstart"),
        ("export", "--ckpt", "last.ckpt", "--out", "model"),
    ],
    ids=lambda args: args[0],
)
def test_a_printed_config_says_the_same_when_it_is_read(args, tmp_path):
    printed, _, code = output_of(*args, "--print_config")
    assert code == 0 and "serialize" not in printed
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    again, err, code = output_of(args[0], "--config", path, "--print_config")
    assert code == 0, err
    assert yaml.safe_load(again) == yaml.safe_load(printed)


@pytest.fixture(scope="module")
def local_copies(tmp_path_factory, quickstart_tokenizer):
    """A model folder and data files of the public schemas, in place of hub ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("local")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=64, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=[], show_progress=False
    )
    backend.train_from_iterator(["3 + 4 = 7, one two."], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )
    save_with_tokenizer(tiny_lm("llama"), tokenizer, folder / "model")
    rows = {
        "plain": {"prompt": "What is 3 + 4?", "answer": "7"},
        "gsm8k": {"question": "What is 3 + 4?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        "math": {
            "problem": "What is $3+4$?",
            "solution": "It is $\\boxed{7}$.",
            "level": "Level 1",
            "type": "Algebra",
        },
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def localised(config, local):
    """The config with local folders for hub ids, on one CPU."""
    for part in ("train", "validation"):
        prompts = config["data"][part]
        prompts["path"] = str(local / f"{prompts.get('format', 'plain')}.jsonl")
        prompts.pop("subset", None)
        prompts.pop("split", None)
    config["model"]["policy"]["path"] = str(local / "model")
    config["trainer"] |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    config["trainer"].pop("strategy", None)
    config["trainer"].pop("precision", None)
    return config


# The calculator's needs its own tokenizer, whose template writes tool calls: its test runs it.
@pytest.mark.parametrize(
    "name",
    sorted(path.name for path in CONFIGS.glob("*.yaml") if path.stem not in ("quickstart", "calculator")),
)
def test_every_config_parses_and_instantiates(name, local_copies, tmp_path):
    assert output_of("fit", "--config", CONFIGS / name, "--print_config")[2] == 0
    config = localised(yaml.safe_load((CONFIGS / name).read_text()), local_copies)
    path = tmp_path / name
    path.write_text(yaml.safe_dump(config))
    made = fit.AgroCLI(
        fit.AgroModule,
        fit.AgroDataModule,
        run=False,
        args=["--config", str(path)],
        save_config_callback=None,
        auto_configure_optimizers=False,
        seed_everything_default=0,
    )
    made.model.configure_model()
    assert made.model.policy.vocab_size == 64
    made.datamodule.trainer = made.trainer
    made.trainer.strategy.connect(made.model)
    made.datamodule.setup("fit")
    assert made.datamodule.val_prompts[0].answer == "7"


def test_a_mistyped_key_gets_the_nearest_one_and_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trainer:\n  max_steps: 3\ndata:\n  bach_size: 4\n")
    out, err, code = output_of("fit", "--config", path)
    assert code == 2 and out == ""
    assert err.strip() == f"error: unknown key data.bach_size ({path}:4); did you mean data.batch_size?"


def test_a_key_like_no_other_gets_the_valid_ones():
    _, err, code = output_of("fit", "--model.policy.lora.r", "4")
    assert code == 2
    assert err == "error: unknown key model.policy.lora.r; LoraSettings takes rank, alpha, target_modules\n"
    _, err, code = output_of("fit", "--foo", "4")
    assert code == 2 and err.startswith("error: unknown key foo; the top level takes ") and " trainer" in err
    _, err, code = output_of("rollout", "buffer")
    assert code == 2 and err.startswith(
        "error: unexpected buffer; values are given by name, as in --key value"
    )


@pytest.mark.parametrize(
    ("text", "key", "line", "near"),
    [
        ("modle: {}\n", "modle", 1, "model"),
        ("modle:\n", "modle", 1, "model"),
        ("model:\n  optimizer:\n    lerning: {}\n", "model.optimizer.lerning", 3, "learning_rate"),
    ],
)
def test_a_mistyped_section_without_content_is_refused_too(text, key, line, near, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    out, err, code = output_of("fit", "--config", path)
    assert code == 2 and out == ""
    assert err.startswith(f"error: unknown key {key} ({path}:{line}); did you mean ") and near in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            ("--data.engine", "BatchDecoding"),
            "data.engine: there is no class BatchDecoding; did you mean Bat",
        ),
        (("--model.objective", "Ppo"), "one of your own, or one of Agro, AgroScoreTerm, Grpo, "),
        (
            ("--data.rewards+=Foo",),
            "one of EnvironmentReward, ExactMatch, GymReward, MathVerify, NumericMatch, PythonReward, ",
        ),
        (("--data.rewards", "ExactMtch"), "did you mean ExactMatch?"),
        (('--data.rewards=[{"class_path": "a.B"}]',), "No module named 'a'"),
        (("--trainer.callbacks+=EarlyStoping",), "did you mean EarlyStopping?"),
        (("--model.objective.betaa", "3"), "unknown key model.objective.betaa; did you mean beta?"),
        (("--data.engine", "HFGenerate", "--data.engine.foo", "1"), "foo; HFGenerate takes memory_bytes"),
        (("--data.rewards.extrct", "x"), "unknown key data.rewards.extrct; did you mean extract?"),
    ],
)
def test_a_class_or_option_that_is_not_there_is_answered_by_what_is(args, said):
    _, err, code = output_of("fit", *args)
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_rewards_go_by_their_short_names(tmp_path):
    def rewards(*args):
        return [
            (reward["class_path"].removeprefix("agro_lightning.rewards."), reward["init_args"]["weight"])
            for reward in printed_config(*args)["data"]["rewards"]
        ]

    assert rewards("--data.rewards", "NumericMatch") == [("NumericMatch", 1.0)]
    assert rewards("--data.rewards+=NumericMatch") == [("ExactMatch", 1.0), ("NumericMatch", 1.0)]
    assert rewards("--data.rewards=[NumericMatch, MathVerify]")[1] == ("MathVerify", 1.0)
    path = tmp_path / "run.yaml"
    path.write_text("data: {rewards: [{class_path: NumericMatch, init_args: {weight: 3.0}}]}")
    assert rewards("--config", path) == [("NumericMatch", 3.0)]
    assert rewards("--config", path, "--data.rewards.weight", 2.0) == [("NumericMatch", 2.0)]


def test_a_mistyped_flag_gets_the_nearest_one():
    _, err, code = output_of("fit", "--data.grup_size", "4")
    assert code == 2
    assert err.count("\n") == 1 and "did you mean" in err and "data.group_size" in err


def test_a_wrong_type_names_the_key_and_the_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  group_size: many\n")
    _, err, code = output_of("fit", "--config", path)
    assert code == 2
    assert err.count("\n") == 1 and "group_size" in err and "many" in err and f"{path}:2" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--config", "x.yaml", "fit"], "stands before the command"),
        (["fitt"], "Did you mean fit?"),
        (["fit", "--config", "no/such.yaml"], "no/such.yaml"),
    ],
)
def test_other_slips(args, said):
    _, err, code = output_of(*args)
    assert code == 2 and said in err and err.count("\n") == 1


def test_help_lists_every_command():
    out, _, code = output_of("--help")
    assert code == 0
    for command in ("fit", "validate", "export", "rollout", "annotate", "inspect"):
        assert f"  {command}" in out


@pytest.mark.parametrize(
    "engine", ["AutoEngine", "BatchedDecoding", "ContinuousBatching", "HFGenerate", "engines.vllm.VLLMEngine"]
)
def test_every_engine_can_be_asked_for(engine):
    asked = printed_config("--data.engine", f"agro_lightning.rollout.{engine}")["data"]["engine"]
    assert asked["class_path"] == f"agro_lightning.rollout.{engine}"


REWARD = "agro_lightning.rewards"
OBJECTIVE = "agro_lightning.objectives"


def test_a_list_takes_nothing_from_the_list_it_replaces(tmp_path):
    path = tmp_path / "run.yaml"
    data = {
        "rewards": [{"class_path": f"{REWARD}.NumericMatch", "init_args": {"marker": "A:"}}],
        "sources": [{"paths": ["a.jsonl"]}, {"max_uses": 1}],
    }
    path.write_text(yaml.safe_dump({"data": data}))
    made = printed_config("--config", path)["data"]
    (reward,) = made["rewards"]
    assert (reward["init_args"]["name"], reward["init_args"]["extract"]) == ("numeric_match", "auto")
    assert reward["init_args"]["marker"] == "A:"
    assert [(s["name"], s["weight"]) for s in made["sources"]] == [("offline", 1.0), ("stream", 1.0)]

    (reward,) = printed_config("--config", path, "--data.rewards", f"[{{class_path: {REWARD}.ExactMatch}}]")[
        "data"
    ]["rewards"]
    assert reward["init_args"] == printed_config()["data"]["rewards"][0]["init_args"]
    both = printed_config("--config", path, "--data.rewards+", f"{{class_path: {REWARD}.ExactMatch}}")
    assert [reward["init_args"]["name"] for reward in both["data"]["rewards"]] == [
        "numeric_match",
        "exact_match",
    ]


def test_another_class_takes_nothing_from_the_former_one(tmp_path):
    def objective(*args):
        return printed_config(*args)["model"]["objective"]["init_args"]

    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{objective: {{class_path: {OBJECTIVE}.Grpo, init_args: {{clip_low: 0.1, beta: 0.3}}}}}}"
    )
    own = {"beta": 0.0, "clip_low": 0.2, "clip_high": 0.2, "scale_rewards": True}
    assert objective("--model.objective", "Grpo") == own
    assert objective("--model.objective.class_path", "Grpo", "--model.objective.clip_high", 0.4) == own | {
        "clip_high": 0.4
    }
    assert objective("--config", path) == own | {"clip_low": 0.1, "beta": 0.3}
    assert objective("--config", path, "--model.objective.clip_low", 0.3)["beta"] == 0.3  # the same class
    path.write_text(f"model: {{objective: {{class_path: {OBJECTIVE}.Grpo}}}}")
    assert objective("--config", path) == own
    path.write_text(f"model: {{objective: {{class_path: {OBJECTIVE}.Rloo}}}}")
    _, err, code = output_of("fit", "--config", path)
    assert code == 2 and "required: beta" in err and err.count("\n") == 1
    assert objective("--model.objective.beta", 0.5) == {"beta": 0.5, "negative_weight": 1.0, "taper": False}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.optimizer.learning_rate", -1.0, "positive and finite"),
        ("model.optimizer.betas", [0.9, 1.0], "below 1"),
        ("model.optimizer.warmup_steps", -1, "at least 0"),
        ("model.max_tokens", 0, "at least 1"),
        ("model.reference_reset_every", -1, "at least 0"),
        ("data.seed", -1, "at least 0"),
        ("trainer.max_steps", -1, "give the number of optimiser steps"),
        ("trainer.accumulate_grad_batches", 0, "at least 1 micro-batch"),
        ("trainer.gradient_clip_val", -0.5, "must be positive"),
        ("trainer.val_check_interval", 0, "trainer.limit_val_batches: 0"),
        ("model.policy.attention", "flex", "auto or dense"),
        ("trainer.precision", "bf16-true", "model.policy.dtype"),
        ("ckpt_path", "no/such.ckpt", "no/such.ckpt does not exist"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(key, value, said, tmp_path):
    options = ["--run_dir", tmp_path, "--trainer.accelerator", "cpu", "--data.batch_size", 2]
    _, err, code = output_of("fit", *options, f"--{key}", json.dumps(value).strip('"'))
    last = err.strip().splitlines()[-1]
    assert code == (1 if key == "ckpt_path" else 2)
    name = "checkpoint" if key == "ckpt_path" else key
    assert last.startswith(f"error: {name} ") and said in last


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("group_size", 1, "must be at least 2"),
        ("batch_size", 0, "must be at least 1"),
        ("pass_at", [9], "pass@k needs"),
        ("sampling", {"temperature": 0.0}, "positive temperature"),
        ("sources", [], "data.sources is empty"),
        ("sources", [{"capacity": 5, "name": "replay"}], "add a Live source"),
        ("sources", [{"weight": -1.0}], "weights must be positive"),
    ],
)
def test_senseless_settings_are_refused(key, value, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": {key: value}}))
    with pytest.raises(BaseException) as caught:
        out, err, code = output_of("fit", "--config", path)
        raise AssertionError(err)
    assert said in str(caught.value)


# ---------------------------------------------------------------------- paths, and the settings of a run


@pytest.mark.parametrize(
    "args",
    [
        ("fit", "--run_dir=~/x"),
        ("fit", "--run_dir", "~/x"),
        ("fit", "--ckpt_path=~/x"),
        ("fit", "--data.train.path=~/x"),
        ("fit", "--data.validation.path=~/x"),
        ("fit", "--data.sources", '[{"paths": ["~/x"]}]'),
        ("fit", "--model.policy.path=~/x"),
        ("fit", "--trainer.default_root_dir=~/x"),
        ("doctor", "--model_config=~/x"),
        ("rollout", "--out=~/x"),
        ("rollout", "--follow=~/x"),
        ("rollout", "--prompts.path=~/x"),
        ("annotate", "--out=a", "--buffer=~/x"),
        ("annotate", "--buffer=a", "--out=~/x"),
        ("inspect", "~/x"),
        ("inspect", "--tokenizer=~/x", "--buffer=a"),
        ("export", "--out=a", "--ckpt=~/x"),
        ("export", "--ckpt=a", "--out=~/x"),
    ],
    ids=" ".join,
)
def test_every_path_setting_expands_the_home_folder_in_flags_and_files(args, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of-somebody")
    printed, err, code = output_of(*args, "--print_config")
    assert code == 0, err
    path = tmp_path / "again.yaml"
    path.write_text(printed.replace("/home/of-somebody", "~"))
    for given in (args, (args[0], "--config", str(path))):
        settings = settings_of(given, monkeypatch)
        assert "/home/of-somebody/x" in settings and "~" not in settings


def settings_of(args, monkeypatch):
    """What a command is called with, as text."""
    if args[0] == "fit":
        return output_of(*args, "--print_config")[0]
    if args[0] == "doctor":
        return str(load(list(args[1:])).get("model_config"))
    module, _, name = cli.COMMANDS[args[0]][0].partition(":")
    owner = importlib.import_module(f"agro_lightning.{module}")
    seen = {}

    @functools.wraps(getattr(owner, name))
    def noted(**given):
        seen.update(given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, noted)
        _, err, code = output_of(*args)
    assert code == 0, err
    return str(seen)


def test_a_config_file_is_found_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("data: {batch_size: 3}")
    assert printed_config("--config=~/a.yaml")["data"]["batch_size"] == 3
    (tmp_path / "a.yaml").write_text("data: {bach_size: 3}")
    assert f"({tmp_path}/a.yaml:1)" in output_of("fit", "--config=~/a.yaml")[1]


@pytest.fixture
def run_folder(tmp_path):
    """A run's folder as `fit` leaves it, with settings that are not the quick start's."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    config = {
        "model": {"policy": {"path": "quickstart", "lora": {"rank": 2}}, "max_tokens": 77},
        "data": {"sampling": {"temperature": 0.5, "max_new_tokens": 7}, "train": {"max_prompt_tokens": 9}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("named", ["--run_dir={}", "--ckpt_path={}/checkpoints/last.ckpt"])
def test_validate_reads_the_settings_of_the_run(run_folder, named):
    given = named.format(run_folder)
    out, err, code = output_of("validate", given, "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)
    assert found["data"]["sampling"]["temperature"] == 0.5 and found["model"]["policy"]["lora"]["rank"] == 2
    out, _, _ = output_of("validate", given, "--data.sampling.temperature", "0.7", "--print_config")
    assert yaml.safe_load(out)["data"]["sampling"]["temperature"] == 0.7
    own = output_of("validate", given, "--config", CONFIGS / "quickstart.yaml", "--print_config")
    assert yaml.safe_load(own[0])["data"]["sampling"]["temperature"] == 1.0


def test_annotate_and_inspect_read_the_settings_of_a_run(run_folder):
    out, err, code = output_of("annotate", "--buffer=a", "--out=b", "--run_dir", run_folder, "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)
    assert (found["temperature"], found["max_tokens"], found["policy"]["lora"]) == (0.5, 77, None)
    out, err, code = output_of("inspect", "a", "--run_dir", run_folder, "--print_config")
    assert code == 0 and yaml.safe_load(out)["max_prompt_tokens"] == 9, err
    _, err, code = output_of("inspect", "a", "--run_dir", "no/run")
    assert code == 2 and err.startswith("error: no/run/config.yaml does not exist") and err.count("\n") == 1
