"""Optimisers of one's choice: what is stepped by which, resumed bitwise, sharded, estimated, and refused."""

import io
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_module import fit, module
from test_module import weights as flat_weights
from test_sharding import full, make_groups, mesh_of
from tiny_models import tiny_lm
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from agro_lightning.checkpoints import sharded as sharded_checkpoint
from agro_lightning.commands.doctor.memory.estimate import Workload, simulate
from agro_lightning.distributed.fsdp import ShardingSettings, data_rank, reshard
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.sharded_loading import sharded_policy
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings, ParameterGroup, check_same, describe
from agro_lightning.training.optimizer_class import check_sharded, optimizer_class

EVERY = [
    "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
]  # fmt: skip
OWN = "test_optimizer.SignDescent"
GROUPS = [
    ParameterGroup(pattern="norm|bias", weight_decay=0.0),
    ParameterGroup(pattern="embed_tokens", learning_rate=1e-4),
]


def settings_of(name, **more):
    options = {"SGD": {"momentum": 0.9}}.get(name, {})
    decay = {} if name == "Rprop" else {"weight_decay": 0.01, "groups": GROUPS}
    if name == "Rprop":
        decay = {"groups": GROUPS[1:]}
    return OptimizerSettings(
        class_path=name if "." in name else f"torch.optim.{name}",
        **{"init_args": options, "learning_rate": 1e-2, "warmup_steps": 0, **decay, **more},
    )


def stepper(policy, settings):
    """The optimiser, its schedule, and what was planned."""
    module = AgroModule(optimizer=settings)
    module.policy = policy
    buckets = module._buckets()
    return (*settings.optimizer(buckets, lambda: 10), buckets)


def step(policy, optimizer, schedule, batch, ranks=1):
    optimizer.zero_grad()
    (policy.logprobs(batch).logprobs.square().mean() * ranks).backward()
    reshard(policy)
    optimizer.step()
    schedule.step()


def policy_of(name="llama"):
    return Policy(PolicySettings(), lm=tiny_lm(name, times=6.0))


def weights(policy):
    return {name: full(p) for name, p in policy.named_parameters()}


def batch_of(groups=4, seed=0):
    made = make_groups(groups, seed)
    return pack_groups(made, num_groups=len(made))


class SignDescent(torch.optim.Optimizer):
    """A user's own: steps by the sign of an average of gradients."""

    def __init__(self, params, lr=1e-3, decay=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "decay": decay, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["decay"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(mean.sign(), alpha=group["lr"])
        return loss


class Stubborn(SignDescent):
    def step(self):
        return super().step()


class Newton(torch.optim.LBFGS):
    """A class of one's own around one that is refused."""


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec")
def test_a_run_trains_with_a_users_own_class(tmp_path):
    made = module(optimizer=settings_of(OWN, init_args={"decay": 0.5}, groups=GROUPS[1:]))
    before = flat_weights(made)
    fit(made, [pack_groups(make_groups(4), num_groups=4)], tmp_path)
    moved = (flat_weights(made) - before).abs()
    assert moved.max() == pytest.approx(1e-2, rel=0.1) and (moved > 0).float().mean() > 0.5


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", [*EVERY, OWN])
def test_a_step_after_a_resume_is_bitwise_that_of_a_run_that_was_not_interrupted(name):
    settings, batch = settings_of(name), batch_of()
    policy = policy_of()
    optimizer, schedule, _ = stepper(policy, settings)
    before = weights(policy)
    for _ in range(3):
        step(policy, optimizer, schedule, batch)
    file = io.BytesIO()
    torch.save([policy.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    step(policy, optimizer, schedule, batch)
    again = policy_of()
    optimizer, schedule, _ = stepper(again, settings)
    saved = torch.load(file, weights_only=True)
    for part, state in zip((again, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    settings.take_over(schedule, stepper(again, settings)[2])
    step(again, optimizer, schedule, batch)
    for key, value in weights(policy).items():
        assert torch.equal(value, weights(again)[key]), key
        assert not torch.equal(value, before[key]), key


def test_a_run_that_goes_on_takes_the_settings_of_now_group_by_group():
    policy, batch = policy_of(), batch_of()
    optimizer, schedule, _ = stepper(policy, settings_of("Muon", schedule="constant"))
    step(policy, optimizer, schedule, batch)
    groups = [ParameterGroup(pattern="norm|bias", weight_decay=0.5), GROUPS[1]]
    now = settings_of("Muon", schedule="constant", learning_rate=3e-3, groups=groups)
    now.init_args = {"momentum": 0.5}
    now.take_over(schedule, stepper(policy, now)[2])
    step(policy, optimizer, schedule, batch)
    found = [(g["lr"], g["weight_decay"], g.get("momentum")) for g in optimizer.param_groups]
    assert found == [(3e-3, 0.01, 0.5), (3e-3, 0.01, None), (3e-3, 0.5, None), (1e-4, 0.01, None)]
    assert [g["lr"] for part in optimizer._parts for g in part.param_groups] == [row[0] for row in found]


def test_the_state_of_another_optimiser_is_refused():
    policy = policy_of()
    adamw = describe(stepper(policy, OptimizerSettings())[2])
    muon = describe(stepper(policy, settings_of("Muon"))[2])
    check_same(adamw, adamw)
    check_same(None, adamw)
    for saved in (adamw, None):
        with pytest.raises(ValueError, match=r"optimiser is AdamW on .*this run's is Muon on 14 tensors"):
            check_same(saved, muon)


# ---------------------------------------------------------------------- who steps what


def test_muon_steps_the_matrices_of_layers_and_adamw_the_rest():
    policy = policy_of("qwen3_moe")
    _, _, buckets = stepper(policy, OptimizerSettings(class_path="Muon"))
    muon, adamw = ({name: p for name, p in b.parameters.items()} for b in buckets)
    assert all(p.dim() == 2 and ".layers." in name for name, p in muon.items())
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(adamw)
    assert any(name.endswith("experts.down_proj") and p.dim() == 3 for name, p in adamw.items())
    assert len(muon) + len(adamw) == len(list(policy.parameters()))


def test_adapters_are_stepped_by_muon():
    pytest.importorskip("peft")
    policy = Policy(PolicySettings(lora=LoraSettings(rank=2)), lm=tiny_lm("llama"))
    _, _, buckets = stepper(policy, OptimizerSettings(class_path="Muon"))
    assert len(buckets) == 1 and all("lora_" in name for name in buckets[0].parameters)


def test_groups_are_those_that_torch_would_be_given_by_hand():
    policy, batch = policy_of(), batch_of()
    settings = settings_of("AdamW")
    optimizer, schedule, _ = stepper(policy, settings)
    other = policy_of()
    named = {name.removeprefix("lm."): p for name, p in other.named_parameters()}
    norms = [p for name, p in named.items() if "norm" in name]
    embedding = named["model.embed_tokens.weight"]
    rest = [p for p in named.values() if not any(p is q for q in [*norms, embedding])]
    by_hand = torch.optim.AdamW(
        [
            {"params": rest},
            {"params": norms, "weight_decay": 0.0},
            {"params": [embedding], "lr": 1e-4},
        ],
        lr=1e-2, betas=(0.9, 0.95), weight_decay=0.01, foreach=True,
    )  # fmt: skip
    step(policy, optimizer, schedule, batch)
    other.logprobs(batch).logprobs.square().mean().backward()
    by_hand.step()
    for name, value in weights(policy).items():
        assert torch.equal(value, weights(other)[name]), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_path": "torch.optim.SDG"}, "torch.optim has no SDG. Did you mean SGD"),
        ({"class_path": "torch.nn.Linear"}, "is torch.nn.Linear, which is no optimiser"),
        ({"class_path": "torch.optim.LBFGS"}, "evaluates the loss several times"),
        ({"class_path": "test_optimizer.Newton"}, "evaluates the loss several times"),
        ({"class_path": "test_optimizer.Stubborn"}, "whose step takes no closure, .*Write `def step"),
        ({"class_path": OWN, "init_args": {"decya": 0.5}}, "did you mean decay"),
        ({"class_path": "nowhere.Adam"}, "no module nowhere"),
        ({"class_path": "SGD", "init_args": {"momentun": 0.9}}, "did you mean momentum"),
        ({"class_path": "SGD", "init_args": {"momentum": -1}}, "Invalid momentum value: -1"),
        ({"class_path": "SGD", "betas": (0.1, 0.2)}, "SGD has no betas"),
        ({"init_args": {"lr": 1e-2}, "learning_rate": 1e-3}, "give one of them"),
        ({"init_args": {"betas": "x"}}, "init_args does not suit AdamW"),
        ({"groups": [ParameterGroup(pattern="(")]}, r"groups\[0\].pattern '\(' is no regular expression"),
        ({"groups": [ParameterGroup(pattern="a", options={"foo": 1})]}, r"groups\[0\] has foo"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes, said):
    with pytest.raises(ValueError, match=said) as caught:
        OptimizerSettings(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["nrom"], r"groups\[0\].pattern 'nrom' is found in no trained.*model.embed_tokens.weight"),
        (["norm", "input_layernorm"], r"groups\[1\].pattern 'input_layernorm' finds only.*put it first"),
    ],
)
def test_a_pattern_that_finds_nothing_is_named(patterns, said):
    settings = OptimizerSettings(groups=[ParameterGroup(pattern=pattern) for pattern in patterns])
    with pytest.raises(ValueError, match=said):
        stepper(policy_of(), settings)


@pytest.mark.parametrize("path", ["torchao.optim.AdamW8bit", "bitsandbytes.optim.AdamW8bit"])
def test_a_missing_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, path.partition(".")[0], None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"pip install 'agro-lightning\[lowbit\]'"):
        OptimizerSettings(class_path=path)


# ---------------------------------------------------------------------- ranks, memory, commands


def sharded_steps(rank, world, path, names, folder):
    """Weights after three steps of each optimiser, and whether a resume before the last one gave them too."""
    mesh, results = mesh_of(world), {}
    saver = sharded_checkpoint.ShardedSaver(data_rank(mesh), asynchronous=False, timeout=timedelta(60))

    def new(name):
        policy = sharded_policy(
            PolicySettings(path=path), ShardingSettings(), mesh, torch.device("cpu"), temperature=1.0
        )
        return (policy, *stepper(policy, settings_of(name))[:2])

    mine = pack_groups(make_groups(4)[rank::world], num_groups=4)
    everything = batch_of().targets.numel()

    def one(policy, optimizer, schedule):
        optimizer.zero_grad()
        (policy.logprobs(mine).logprobs.square().sum() / everything * world).backward()
        reshard(policy)
        optimizer.step()
        schedule.step()

    for name in names:
        policy, optimizer, schedule = new(name)
        one(policy, optimizer, schedule)
        one(policy, optimizer, schedule)
        tensors = {
            "state_dict": get_model_state_dict(policy),
            "optimizer_0": get_optimizer_state_dict(policy, optimizer),
        }
        target = Path(folder) / name
        saver.save(tensors, {"schedule": schedule.state_dict()}, target)
        one(policy, optimizer, schedule)
        other, optimizer, schedule = new(name)
        rest = sharded_checkpoint.load(target, other, [optimizer], data_rank(mesh))
        schedule.load_state_dict(rest["schedule"])
        one(other, optimizer, schedule)
        mine_now, again = weights(policy), weights(other)
        results[name] = mine_now, all(torch.equal(mine_now[key], again[key]) for key in mine_now)
    return results


UNSHARDED = ["Adafactor", "Rprop"]
SHARDED = [name for name in EVERY if name not in UNSHARDED]


@pytest.mark.parametrize("name", UNSHARDED)
def test_what_steps_whole_parameters_alone_is_refused_on_ranks(name):
    with pytest.raises(ValueError, match=rf"is {name}, which .* Take AdamW, Muon, SGD"):
        check_sharded(optimizer_class(name))


def test_two_ranks_step_as_one_process_and_resume_bitwise(tmp_path):
    tiny_lm("llama", times=6.0).save_pretrained(tmp_path / "model")
    results = run_ranks(sharded_steps, 2, str(tmp_path / "model"), SHARDED, str(tmp_path), timeout=120)
    for name in SHARDED:
        policy = policy_of()
        optimizer, schedule, _ = stepper(policy, settings_of(name))
        start = weights(policy)
        for _ in range(3):
            step(policy, optimizer, schedule, batch_of())
        moved = {key: value - start[key] for key, value in weights(policy).items()}
        size = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
        for found, resumed in (result[name] for result in results):
            assert resumed, name
            error = sum(float((found[k] - start[k] - moved[k]).square().sum()) for k in moved) ** 0.5
            assert error < (2e-2 if name in ("Muon", "Rprop") else 1e-3) * size, (name, error / size)


@pytest.mark.parametrize("name", EVERY)
def test_the_estimate_knows_the_optimisers_state(name, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path)
    module = AgroModule(policy=PolicySettings(path=str(tmp_path)), optimizer=settings_of(name))
    load = Workload(groups=2, group_size=2, prompt_tokens=4, completion_tokens=4, gpu=False)
    policy = policy_of()
    optimizer, schedule, _ = stepper(policy, settings_of(name))
    step(policy, optimizer, schedule, batch_of())
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    wanted = sum(v.numel() * v.element_size() for v in held)
    assert simulate(module, load).state["optimiser"] == pytest.approx(wanted, rel=0.02)
    assert simulate(module, Workload(**{**vars_of(load), "gpu": True})).state["optimiser"] == pytest.approx(
        wanted, rel=0.02
    )


@pytest.mark.filterwarnings("ignore")  # of other packages, when they are imported and compiled
@pytest.mark.parametrize(
    "path", ["torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit", "bitsandbytes.optim.AdamW8bit"]
)
def test_few_bits_are_resumed_bitwise_and_estimated(path, tmp_path):
    pytest.importorskip(path.partition(".")[0])
    settings = OptimizerSettings(class_path=path, learning_rate=1e-3, warmup_steps=0, groups=GROUPS)
    lm = tiny_lm("llama", times=6.0, hidden_size=128, intermediate_size=256)
    lm.save_pretrained(tmp_path)

    def new():
        policy = Policy(PolicySettings(path=str(tmp_path)))
        return (policy, *stepper(policy, settings)[:2])

    policy, optimizer, schedule = new()
    step(policy, optimizer, schedule, batch_of())
    file = io.BytesIO()
    torch.save([policy.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    step(policy, optimizer, schedule, batch_of())
    again = new()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    step(*again, batch_of())
    for key, value in weights(policy).items():
        assert torch.equal(value, weights(again[0])[key]), key
    module = AgroModule(policy=PolicySettings(path=str(tmp_path)), optimizer=settings)
    load = Workload(groups=2, group_size=2, prompt_tokens=4, completion_tokens=4, gpu=True)
    whole = simulate(AgroModule(policy=PolicySettings(path=str(tmp_path))), load).state["optimiser"]
    share = 0.16 if "4bit" in path else 0.26  # small tensors stay in fp32
    assert simulate(module, load).state["optimiser"] == pytest.approx(share * whole, rel=0.2)


def vars_of(load):
    return {name: getattr(load, name) for name in load.__dataclass_fields__}


def test_the_doctor_is_well_with_muon_and_groups_from_a_file(tmp_path):
    config = tmp_path / "muon.yaml"
    config.write_text(
        "model:\n  optimizer:\n    class_path: torch.optim.Muon\n    init_args: {momentum: 0.9}\n"
        "    groups: [{pattern: norm, weight_decay: 0.0}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "agro_lightning", "doctor", "--config", config, "--trainer.accelerator=cpu"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights and optimiser are bitwise those that were saved" in done.stdout
