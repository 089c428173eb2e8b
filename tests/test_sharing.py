"""Containers, workflows, job examples and the citation: they parse, and name what exists."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from agro_lightning.commands.main import COMMANDS

ROOT = Path(__file__).parents[1]
if not (ROOT / "docker").is_dir():
    pytest.skip("these files are in the checkout alone", allow_module_level=True)
EXTRAS = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in dockerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_dockerfile(name):
    steps = instructions(ROOT / "docker" / f"{name}.Dockerfile")
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert {step for step, _ in steps} <= known and steps[0][0] == "FROM" and ":" in steps[0][1]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for step, arguments in steps:
        if step == "COPY":
            for source in shlex.split(arguments)[:-1]:
                assert (ROOT / source).exists() and f"!{source.removeprefix('./')}" in ignored
        elif step in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(arguments))
        elif step == "RUN":
            subprocess.run(["bash", "-n", "-c", arguments], check=True)
            for extra in re.findall(r"\.\[([\w,]+)\]", arguments):
                assert set(extra.split(",")) <= set(EXTRAS)
    assert [arguments for step, arguments in steps if step == "USER"] == ["1000"]
    assert json.loads(dict(steps)["ENTRYPOINT"])[-1] == "agro_lightning"
    if hadolint := shutil.which("hadolint"):
        subprocess.run([hadolint, ROOT / "docker" / f"{name}.Dockerfile"], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda p: p.name)
def test_workflow(path):
    flow = yaml.safe_load(path.read_text())
    triggers = flow[True]  # YAML 1.1 reads `on` so
    assert triggers.keys() == ({"push"} if path.name == "release.yml" else {"push", "pull_request"})
    assert flow["permissions"] == {"contents": "read"}
    commands = []
    for job in flow["jobs"].values():
        needed = job.get("needs", [])
        assert {needed} <= flow["jobs"].keys() if isinstance(needed, str) else needed == []
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            assert "uses" not in step or re.fullmatch(r"[\w-]+/[\w-]+@[\w./-]+", step["uses"])
            commands += [step["run"]] if "run" in step else []
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        for target in re.findall(r"^make (\w+)", command, re.M):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert ".ci/run" in commands and os.access(ROOT / ".ci" / "run", os.X_OK)


def fit_command(words: list[str]) -> dict[str, str]:
    """The options of `fit` in a command line, --name value or --name=value."""
    at = words.index("agro_lightning") + 1
    assert words[at - 1 : at + 1] == ["agro_lightning", "fit"] and "fit" in COMMANDS
    text = " ".join(words[at + 1 :]).replace("=", " ").split()
    return dict(zip(text[::2], text[1::2], strict=True))


def nodes_and_devices(config: str) -> tuple[int, int]:
    trainer = yaml.safe_load((ROOT / "configs" / Path(config).name).read_text())["trainer"]
    return trainer["num_nodes"], trainer["devices"]


def test_skypilot_job():
    job = yaml.safe_load((ROOT / "configs" / "skypilot" / "fit.yaml").read_text())
    _, count = job["resources"]["accelerators"].split(":")
    assert (job["num_nodes"], int(count)) == nodes_and_devices(job["envs"]["CONFIG"])
    for script in (job["setup"], job["run"]):
        subprocess.run(["bash", "-n", "-c", script], check=True)
    options = fit_command(shlex.split(job["run"].replace("\\\n", " ")))
    assert options["--ckpt_path"] == "last" and options["--run_dir"].startswith(*job["file_mounts"])
    assert set(re.findall(r"\.\[([\w,]+)\]", job["setup"])[0].split(",")) <= set(EXTRAS)


def test_kubernetes_job():
    text = (ROOT / "configs" / "kubernetes" / "fit.yaml").read_text()
    service, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [container["command"][0], *container["args"]]
    flags = dict(word.removeprefix("--").split("=") for word in words if word.startswith("--"))
    options = fit_command(words)
    nodes, devices = nodes_and_devices(options["--config"])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(flags["nnodes"]) == nodes
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(flags["nproc-per-node"]) == devices
    assert flags["master-addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert {str(Path(options[name]).parent) for name in ("--config", "--run_dir")} <= mounts
    assert options["--ckpt_path"] == "last"


def test_citation():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert cited["version"] == version[1] and cited["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()


def test_agents_page_names_what_exists():
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 70
    for path in re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:md|toml|txt))`", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"make (\w+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    packages = re.findall(r"^\| \d \| (.*) \|$", text, re.M)
    named = {name for cell in packages for name in re.findall(r"\w+", cell)}
    rooms = {p.name for p in (ROOT / "agro_lightning").iterdir() if (p / "__init__.py").exists()}
    assert rooms <= named
