"""Malformed configurations: one line that names what is wrong, exit code 2, never a traceback."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agro_lightning.commands.cli_errors import explained
from agro_lightning.commands.fit import AgroCLI, AgroDataModule, AgroModule
from agro_lightning.commands.parser import AgroParser
from agro_lightning.commands.rollout import rollout

FIT = {
    "seed_everything": 1,
    "checkpoint_every": 5,
    "trainer": {"max_steps": 3, "accelerator": "cpu", "val_check_interval": 2, "gradient_clip_val": 0.5},
    "model": {
        "policy": {"path": "quickstart", "dtype": "float32", "packing": "auto", "lora": {"rank": 2}},
        "objective": {"class_path": "agro_lightning.objectives.Agro", "init_args": {"beta": 0.1}},
        "optimizer": {"learning_rate": 1e-4, "betas": [0.9, 0.99], "schedule": "cosine"},
        "reference": "auto",
        "max_tokens": 100,
    },
    "data": {
        "train": {"path": "quickstart-train", "limit": 10},
        "sources": [
            {"weight": 1.0},
            {"paths": ["quickstart"], "weight": 0.5},
            {"max_uses": 2, "max_staleness": 3},
        ],
        "rewards": [{"class_path": "agro_lightning.rewards.ExactMatch", "init_args": {"weight": 1.0}}],
        "batch_size": 2,
        "group_size": 4,
        "sampling": {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0},
        "mixing": "per_group",
        "pass_at": [2],
        "on_bad_row": "drop",
    },
}
ROLLOUT = {
    "out": "somewhere",
    "policy": {"path": "quickstart"},
    "prompts": {"path": "quickstart-val", "limit": 3, "template": "{prompt}"},
    "rewards": [{"class_path": "agro_lightning.rewards.ExactMatch"}],
    "n": 2,
    "sampling": {"max_new_tokens": 3},
    "shard": "0/1",
    "on_bad_row": "error",
    "seed": 3,
}


class _Built(Exception):
    """The parser is complete; nothing is to be run."""


@pytest.fixture(scope="module")
def parsers():
    return build_parsers()


def build_parsers():
    """The parsers of `fit` and `rollout`, as the command line builds them."""
    built = {}

    class Stopped(AgroCLI):
        def parse_arguments(self, parser, args):
            built["fit"] = parser
            raise _Built

    with pytest.raises(_Built):
        Stopped(AgroModule, AgroDataModule, args=["fit"], auto_configure_optimizers=False)
    built["rollout"] = AgroParser()
    built["rollout"].add_argument("-c", "--config", action="config")
    built["rollout"].add_function_arguments(rollout, as_group=False, fail_untyped=True)
    return built


def outcome(parsers, command: str, text: str, folder: Path) -> tuple[int, str]:
    """(exit code, what was said) of a configuration file."""
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    args = ["--config", str(path)]
    args = ["fit", *args] if command == "fit" else args
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            config = parsers[command].parse_args(args)
            with explained(building=True):
                parsers[command].instantiate_classes(config)
    except SystemExit as stopped:
        assert isinstance(stopped.code, int)
        return stopped.code, said.getvalue()
    return 0, said.getvalue()


def check(code: int, said: str) -> None:
    """Either it was accepted, or one line says what is wrong."""
    assert code in (0, 2), said
    if code:
        assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 15, said
        assert "Traceback" not in said


def paths(config, at=()) -> list[tuple]:
    """Where values stand in a nested configuration."""
    inner = (
        config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    )
    return [(*at, key) for key, _ in inner] + [
        path for key, value in inner for path in paths(value, (*at, key))
    ]


def changed(config, path: tuple, change) -> dict:
    """A copy in which `change` was applied to the container and key at `path`."""
    copy = json.loads(json.dumps(config))
    target = copy
    for key in path[:-1]:
        target = target[key]
    change(target, path[-1])
    return copy


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["nan", "quickstart", "1e400", "{prompt", "os.system", "builtins.eval", "../x", "0/0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def malformed(draw, config) -> str:
    """A configuration with a value replaced, a key added, misspelt or removed; or a text that is broken."""
    path = draw(st.sampled_from(paths(config)))
    kind = draw(st.sampled_from(["replace", "add", "misspell", "remove", "cut"]))
    junk = draw(JUNK)
    if kind == "replace":
        out = changed(config, path, lambda target, key: target.__setitem__(key, junk))
    elif kind == "remove":
        out = changed(config, path, lambda target, key: target.pop(key))
    elif kind == "cut":
        text = yaml.safe_dump(config)
        return text[: draw(st.integers(0, len(text)))] + draw(st.text(max_size=5))
    else:
        name = (
            draw(st.text(min_size=1, max_size=8))
            if kind == "add"
            else f"{path[-1]}{draw(st.sampled_from('sx_'))}"
        )

        def put(target, key):
            if isinstance(target, dict):
                target[name] = target.pop(key) if kind == "misspell" else junk
            else:
                target.append(junk)

        out = changed(config, path, put)
    return yaml.safe_dump(out, allow_unicode=True)


FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)


@pytest.mark.parametrize("command", ["fit", "rollout"])
def test_the_configurations_that_are_malformed_below_are_accepted(parsers, tmp_path, command):
    config = FIT if command == "fit" else ROLLOUT
    assert outcome(parsers, command, yaml.safe_dump(config), tmp_path) == (0, "")


@FUZZ
@example(text="model: {policy: [}")
@example(text="\x00")
@example(text="- 1\n- 2\n")
@example(text="data: {sources: {a: 1}}")
@example(text="data: 7")
@example(text="? [a, b]\n: 1\n")
@given(text=malformed(FIT))
def test_malformed_settings_of_a_run_are_named_in_one_line(parsers, tmp_path, text):
    check(*outcome(parsers, "fit", text, tmp_path))


@FUZZ
@example(text="n: {a: 1}")
@example(text="rewards: 3")
@example(text="prompts: quickstart")
@given(text=malformed(ROLLOUT))
def test_malformed_settings_of_a_rollout_are_named_in_one_line(parsers, tmp_path, text):
    check(*outcome(parsers, "rollout", text, tmp_path))


@pytest.mark.slow
@settings(FUZZ, max_examples=1000)
@given(text=malformed(FIT) | malformed(FIT["data"]).map(lambda text: f"data:\n{text}"))
def test_a_thousand_malformed_settings_are_named_in_one_line(parsers, tmp_path, text):
    check(*outcome(parsers, "fit", text, tmp_path))


SCALARS = [path for path in paths(FIT) if "class_path" not in path and "path" not in path]


@pytest.mark.parametrize("path", SCALARS, ids=lambda path: ".".join(map(str, path)))
def test_a_value_of_the_wrong_kind_is_named_by_its_key(parsers, tmp_path, path):
    text = yaml.safe_dump(changed(FIT, path, lambda target, key: target.__setitem__(key, {"what": [1]})))
    code, said = outcome(parsers, "fit", text, tmp_path)
    check(code, said)
    assert code == 2
    names = [str(part) for part in path if isinstance(part, str) and part != "init_args"]
    assert any(name in said for name in names[1:] or names), said
