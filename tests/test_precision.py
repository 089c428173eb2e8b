"""One type for every forward: gradients in pieces, reused rollouts, rollouts in a thread of their own."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from test_module import SHAPES, fit, one_gradient
from test_policy import make_groups
from tiny_models import tiny_lm

from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.sources import Live, Replay
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.head_check import check_logprobs
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import AdapterOffReference, frozen_copy, with_ref_logprobs
from agro_lightning.objectives import Agro, Rloo
from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.batched import BatchedDecoding
from agro_lightning.rollout.engines.continuous import ContinuousBatching
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
TYPES = {
    "float32": PolicySettings(),
    "mixed": PolicySettings(compute_dtype="bfloat16"),
    "bfloat16": PolicySettings(dtype="bfloat16"),
}
STILL = OptimizerSettings(learning_rate=1e-30, warmup_steps=0, schedule="constant")
"""Steps that leave fp32 and bf16 weights exactly as they are."""


def tiny(settings, seed=0):
    return tiny_lm("llama", seed=seed).to(getattr(torch, settings.dtype))


def module(settings, reference_seed=7, **kwargs):
    made = AgroModule(**{"policy": settings, "objective": Agro(beta=0.1), "optimizer": STILL, **kwargs})
    reference = Policy(replace(settings, lora=None), lm=tiny(settings, reference_seed))
    made.attach(Policy(settings, lm=tiny(settings)), frozen_copy(reference))
    return made


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("objective", [Agro(beta=0.1), Rloo(beta=0.1)])
@pytest.mark.parametrize("name", TYPES)
def test_gradients_in_pieces_are_those_of_one_pass(name, objective, cached, tmp_path):
    groups = make_groups(groups=SHAPES)
    exact = one_gradient(module(TYPES["float32"], objective=objective), [pack(groups)], tmp_path)
    if cached:
        reference = module(TYPES[name]).reference
        groups = with_ref_logprobs(groups, reference, device=torch.device("cpu"), max_tokens=None)
    batch = pack_groups(groups, num_groups=4, reference_id=reference.reference_id if cached else None)
    whole = one_gradient(module(TYPES[name], objective=objective), [batch], tmp_path)
    pieces = one_gradient(module(TYPES[name], objective=objective, max_tokens=25), [batch], tmp_path)
    tolerance = 1e-5 if name == "float32" else 0.04
    assert (pieces - whole).norm() / whole.norm() < tolerance
    assert (whole - exact).norm() / exact.norm() < tolerance
    assert name == "float32" or (whole - exact).norm() / exact.norm() > 1e-4  # another type indeed


def pack(groups):
    return pack_groups(groups, num_groups=len(groups))


@pytest.mark.parametrize("max_tokens", [None, 25])
@pytest.mark.parametrize("name", TYPES)
def test_log_ratios_are_0_where_policy_and_reference_are_one(name, max_tokens, tmp_path):
    groups = make_groups(groups=SHAPES)
    made = module(TYPES[name], reference_seed=0, max_tokens=max_tokens)
    # as a replayed rollout has them: taken in another batch than the one that is trained on
    known = [
        g
        for group in groups
        for g in with_ref_logprobs([group], made.reference, device=torch.device("cpu"), max_tokens=None)
    ]
    batch = pack_groups(known, num_groups=4, reference_id=made.reference.reference_id)
    fit(made, [batch], tmp_path)
    ratios = made.last_log_ratios
    assert ratios.numel() == batch.num_completions
    if name == "float32":
        assert ratios.abs().max() < 1e-5
    else:
        assert torch.equal(ratios, torch.zeros_like(ratios))
    fit(made, [pack(groups)], tmp_path)
    assert torch.equal(made.last_log_ratios, torch.zeros_like(ratios))


class Ratios(L.Callback):
    def __init__(self):
        self.found, self.sources = [], set()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(pl_module.last_log_ratios)
        self.sources |= set(batch.sources)


@pytest.mark.parametrize("max_tokens", [None, 40])
@pytest.mark.parametrize("reuse", ["updates_per_rollout", "replay"])
@pytest.mark.parametrize("name", TYPES)
def test_reused_rollouts_have_log_ratios_of_0_while_the_policy_stays(name, reuse, max_tokens, tmp_path):
    sources = [Live()] if reuse == "updates_per_rollout" else [Live(), Replay(capacity=100)]
    made = AgroModule(policy=TYPES[name], optimizer=STILL, max_tokens=max_tokens)
    data = AgroDataModule(
        sources=sources,
        batch_size=4,
        group_size=3,
        updates_per_rollout=2 if len(sources) == 1 else 1,
        validation=PromptSettings(path="quickstart-val", limit=2),
        max_logprob_gap=0.02,
    )
    ratios = Ratios()
    trainer = L.Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        callbacks=[ratios],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        limit_val_batches=0,
        num_sanity_val_steps=0,
    )
    trainer.fit(made, data)
    assert len(ratios.found) == 4 and ratios.sources == {source.name for source in sources}
    largest = max(float(found.abs().max()) for found in ratios.found)
    assert largest < 1e-5 if name == "float32" else largest == 0


@pytest.mark.parametrize("engine", [BatchedDecoding, HFGenerate, ContinuousBatching])
@pytest.mark.parametrize("name", TYPES)
def test_rollouts_compute_in_the_policys_type(name, engine, quickstart_tokenizer):
    """Also where the engine generates in a thread of its own, which autocast around it would not reach."""
    settings = TYPES[name]
    policy = Policy(settings, lm=tiny(settings))
    made = engine()
    made.attach(policy, quickstart_tokenizer)
    prompts = [[5, 6, 7, 8, 9], [3], [10, 11, 12]]
    answers = made.generate(prompts, Sampling(max_new_tokens=8), n=4, seed=0)
    seen = set()
    for module_ in policy.base.modules():
        if isinstance(module_, torch.nn.Linear):
            module_.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    again = made.generate(prompts, Sampling(max_new_tokens=8), n=4, seed=0)
    assert seen == {policy.compute_dtype}
    assert [[g.completion_ids for g in row] for row in answers] == [
        [g.completion_ids for g in row] for row in again
    ]


def test_a_policy_with_an_adapter_and_checkpointing_computes_in_its_type():
    settings = PolicySettings(
        compute_dtype="bfloat16", lora=LoraSettings(rank=4), gradient_checkpointing=True
    )
    policy, plain = (
        Policy(settings, lm=tiny(settings)),
        Policy(replace(settings, gradient_checkpointing=False), lm=tiny(settings)),
    )
    batch = pack(make_groups())
    reference = AdapterOffReference(policy)
    logprobs = policy.logprobs(batch).logprobs
    assert torch.equal(reference.logprobs(batch), logprobs.detach())
    assert reference.reference_id.endswith(".bfloat16@1")
    logprobs.square().sum().backward()
    plain.load_state_dict(policy.state_dict())
    plain.logprobs(batch).logprobs.square().sum().backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (policy, plain)]
    assert gradients[0] and all(
        "lora_" in name and g.dtype == torch.float32 for name, g in gradients[0].items()
    )
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_the_start_up_check_passes_in_mixed_precision():
    policy = Policy(TYPES["mixed"], lm=tiny(TYPES["mixed"]))
    assert 0 < check_logprobs(policy) < 0.03
    assert policy.packing == "shared" and {p.dtype for p in policy.parameters()} == {torch.float32}


def test_the_reference_id_names_the_type():
    ids = {name: frozen_copy(Policy(s, lm=tiny(s))).reference_id for name, s in TYPES.items()}
    assert len(set(ids.values())) == 3
    assert ids["mixed"] == ids["float32"].replace("@", ".bfloat16@")


@pytest.mark.parametrize(
    ("settings", "precision", "said"),
    [
        (
            PolicySettings(),
            "bf16-mixed",
            "precision is bf16-mixed; leave it out and set model.policy.compute_dtype",
        ),
        (PolicySettings(), "bf16-true", "precision is bf16-true; leave it out and set model.policy.dtype"),
        (PolicySettings(), "64-true", "precision is 64-true"),
        (PolicySettings(compute_dtype="float16"), "32-true", "model.policy.compute_dtype is float16"),
        (PolicySettings(dtype="float16"), "32-true", "model.policy.dtype is float16"),
    ],
)
def test_other_precisions_are_refused_with_the_key_to_set(settings, precision, said, tmp_path):
    made = AgroModule(policy=settings)
    with pytest.raises(ValueError, match=said):
        fit(made, [pack(make_groups())], tmp_path, precision=precision)


def test_half_precision_weights_do_not_compute_in_another_type():
    with pytest.raises(ValueError, match="compute_dtype is float16 and dtype is bfloat16"):
        PolicySettings(dtype="bfloat16", compute_dtype="float16")


def test_a_frozen_reference_in_mixed_precision_stays_when_the_policy_moves():
    """The copy's forward is its own, not that of the policy that it was copied from."""
    policy = Policy(TYPES["mixed"], lm=tiny(TYPES["mixed"]))
    batch = pack(make_groups())
    reference = frozen_copy(policy)
    before = reference.logprobs(batch)
    assert torch.equal(before, policy.logprobs(batch).logprobs.detach())
    with torch.no_grad():
        policy.decoder.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert torch.equal(reference.logprobs(batch), before)
    assert (policy.logprobs(batch).logprobs - before).abs().max() > 0.01
