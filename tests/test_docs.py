"""What the documentation says is so: commands parse, settings load, metrics and keys exist."""

import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from test_readme import METRICS, PAGES, ROOT

from agro_lightning.commands.cli_errors import valid_keys
from agro_lightning.commands.main import COMMANDS, main

NAVIGATION = (ROOT / "mkdocs.yml").read_text()
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
ELSEWHERE = re.compile(
    r"gsm8k|llama3|math_llama3|HOST|sbatch|srun|vllm|bench\.|tensorboard|make |--help|chat "
)
"""Commands that need a GPU, other hosts, a hub, a person, or long: they are parsed and not run."""


def blocks(text, *languages):
    """The fenced blocks of a page in one of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text):
    """Each command of a page's bash blocks as its words, comments and line ends left out."""
    found = []
    for block in blocks(text, "bash", "console", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(words)
    return found


def ours(words):
    """The words after `-m agro_lightning`, or none."""
    return words[words.index("agro_lightning") + 1 :] if "agro_lightning" in words and "-m" in words else []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which what the pages name exists: the configs, a run, a GRPOConfig, data, a reward."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "trl.yaml").write_text("learning_rate: 1.0e-6\n")
    for name in ("ours.yaml", "run.yaml"):
        (folder / name).write_text("trainer: {max_steps: 2}\n")
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "completion": str(n + k), "reward": float(k == 1)}
        for n in range(10, 30)
        for k in (1, 2)
    ]
    for name in ("my_answers.jsonl", "my_prompts.jsonl", "FILE"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for run in ("RUN", "runs/first", "runs/mine", "runs/async", "runs/two", "runs/stream"):
        (folder / run).mkdir(parents=True, exist_ok=True)
        (folder / run / "config.yaml").write_text((ROOT / "configs" / "quickstart.yaml").read_text())
    return folder


def test_every_page_is_in_the_navigation():
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if not re.search(rf"[ /-]{re.escape(page)}\s", NAVIGATION)] == []


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_parse(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for words in commands(page.read_text()):
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        for module in [word for word in words if word.startswith("bench.")]:
            assert importlib.util.find_spec(module), words
        if args := ours(words):
            assert args[0] in COMMANDS, words
            asked = [] if {"--help", "--print_config"} & {*args} else ["--print_config"]
            with pytest.raises(SystemExit) as ended:
                main([*args, *asked])
            assert ended.value.code == 0, f"{' '.join(words)}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_settings_load(page, place, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(place)
    for number, block in enumerate(blocks(page.read_text(), "yaml")):
        if not {"model", "data", "trainer"} & yaml.safe_load(block).keys():
            continue
        (tmp_path / f"{number}.yaml").write_text(block)
        with pytest.raises(SystemExit) as ended:
            main(["fit", "--config", str(tmp_path / f"{number}.yaml"), "--print_config"])
        assert ended.value.code == 0, f"{block}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_python_compiles_and_its_imports_exist(page, tmp_path):
    for block in blocks(page.read_text(), "python"):
        compile(block, page.name, "exec")
        imports = [line for line in block.splitlines() if re.match(r"(from agro_|import agro_)", line)]
        exec("\n".join(imports), {})


def test_metrics_that_pages_name_have_their_line():
    known = set(re.findall(r"`([^`]+)`", METRICS))
    known |= {name.removeprefix("train/") for name in known}
    text = (ROOT / "docs" / "troubleshooting.md").read_text() + (ROOT / "docs" / "off_policy.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    named = {
        name
        for row in rows
        for name in re.findall(r"`(\w+_\w+|\w+/\w+)`", row[2] if len(row) > 5 else row[1])
    }
    keys = {key.rpartition(".")[2] for key in fit_keys()}
    unknown = {name for name in named - known - keys if not name.startswith("val/")}
    assert unknown == set()
    everywhere = {
        name for page in PAGES for name in re.findall(r"`((?:train|val)/[\w/]+)`", page.read_text())
    }
    assert {name for name in everywhere if name.removeprefix("train/") not in known} == set()


def fit_keys():
    """Every key of `fit`, those of the classes in its defaults and of the shipped configs included."""
    from agro_lightning.commands.fit import AgroCLI

    found: set[str] = set()

    class Keys(AgroCLI):
        def parse_arguments(self, parser, args):
            found.update(valid_keys(parser))
            raise StopIteration

    with pytest.raises(StopIteration):
        from agro_lightning.training.datamodule import AgroDataModule
        from agro_lightning.training.module import AgroModule

        Keys(AgroModule, AgroDataModule, args=["fit"], auto_configure_optimizers=False)
    return {key.removeprefix("fit.") for key in found}


def test_keys_that_pages_name_exist():
    from agro_lightning.training.strategy import Sharded

    keys = fit_keys() | {f"trainer.strategy.{name}" for name in inspect.signature(Sharded).parameters}
    assert "data.sampling.max_new_tokens" in keys
    for page in PAGES:
        text = page.read_text()
        if page.name.startswith("from_"):  # other columns hold other trainers' keys
            text = "\n".join(line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("| "))
        for key in re.findall(r"`((?:data|model|trainer)\.[a-z_.]+)(?::[^`]*)?`", text):
            parts = key.split(".")
            open_ended = any(
                ".".join(parts[:n]) in keys for n in range(2, len(parts)) if "init_args" in parts
            )
            assert key in keys or any(k.startswith(key + ".") for k in keys) or open_ended, (page.name, key)


@pytest.mark.slow
def test_the_site_builds_and_asks_nothing_of_the_network(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    pages = {path: path.read_text() for path in (tmp_path / "site").rglob("*.html")}
    loads = r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(https?://[^\"]+)"
    assert {url for text in pages.values() for url in re.findall(loads, text)} == set()
    api = "".join(text for path, text in pages.items() if "api" in path.parts)
    import agro_kernels
    import agro_lightning
    from agro_lightning import objectives, rewards, rollout

    for package in (agro_lightning, objectives, rewards, rollout, agro_kernels):
        for name in package.__all__:
            assert re.search(rf"id=\"[\w.]*\.{name}\"", api), name


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_run(page, place):
    for words in commands(page.read_text()):
        if (
            (args := ours(words))
            and not ELSEWHERE.search(" ".join(words))
            and "FILE" not in args
            and "RUN" not in str(args)
        ):
            done = subprocess.run(
                [sys.executable, "-m", "agro_lightning", *args], cwd=place, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{' '.join(words)}\n{done.stderr[-2000:]}"
