"""AgroModule under a real Lightning trainer, fed with fixed batches."""

import logging

import lightning as L
import pytest
import torch
from test_policy import make_groups
from test_policy_mask import masked
from tiny_models import tiny_lm

from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import frozen_copy
from agro_lightning.objectives import Agro, AgroScoreTerm, Grpo, RegularizedPG, Rloo
from agro_lightning.training.callbacks.non_finite import NonFiniteError, NonFiniteGuard
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
SHAPES = ((5, (4, 1, 7)), (1, (3, 2)), (9, (6, 5)), (3, (12, 5, 6, 2)))
SGD_LIKE = OptimizerSettings(learning_rate=1e-2, warmup_steps=0, schedule="constant")


class Batches:
    """Fixed batches as a sized iterable."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def module(lm_seed=0, **kwargs):
    made = AgroModule(**{"objective": Agro(beta=0.1), "optimizer": SGD_LIKE, **kwargs})
    reference = frozen_copy(Policy(made.policy_settings, lm=tiny_lm("llama", seed=7)))
    made.attach(Policy(made.policy_settings, lm=tiny_lm("llama", seed=lm_seed)), reference)
    return made


def fit(made, batches, tmp_path, callbacks=(), **kwargs):
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        enable_model_summary=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **kwargs,
        limit_val_batches=0,
    )
    trainer.fit(made, Batches(batches))
    return trainer


def weights(made):
    return torch.cat([p.detach().flatten() for p in made.policy.parameters()])


def one_gradient(made, batches, tmp_path, **kwargs):
    """The gradient of the first step, taken before the optimiser uses it."""
    kept = []

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            kept.append(torch.cat([p.grad.flatten() for p in made.policy.parameters()]))

    fit(made, batches, tmp_path, [Keep()], **kwargs)
    return kept[0]


@pytest.mark.parametrize("made", [make_groups, lambda **changes: masked(make_groups(**changes))])
@pytest.mark.parametrize(
    "objective",
    [Agro(0.1), Agro(0.1, 0.3), Agro(0.1, 0.3, True), Rloo(0.1), RegularizedPG(0.1), AgroScoreTerm(0.1)],
)
def test_accumulation_equals_one_big_batch(objective, made, tmp_path):
    groups = made(groups=SHAPES)
    whole = one_gradient(module(objective=objective), [pack_groups(groups, num_groups=4)], tmp_path)
    parts = [pack_groups(groups[:1], num_groups=4), pack_groups(groups[1:], num_groups=4)]
    split = one_gradient(module(objective=objective), parts, tmp_path, accumulate_grad_batches=2)
    assert whole.norm() > 1e-3
    assert (split - whole).norm() / whole.norm() < 1e-6


@pytest.mark.filterwarnings("ignore:some prompts and completions have more tokens:UserWarning")
@pytest.mark.parametrize("made", [make_groups, lambda **changes: masked(make_groups(**changes))])
@pytest.mark.parametrize("max_tokens", [12, 25])
@pytest.mark.parametrize(
    "objective", [Agro(0.1), Agro(0.1, 0.3), Agro(0.1, 0.3, True), Rloo(0.1), Grpo(), AgroScoreTerm(0.1)]
)
def test_groups_above_the_token_budget_give_the_same_gradient(objective, max_tokens, made, tmp_path):
    batch = pack_groups(made(groups=SHAPES), num_groups=4)
    assert batch.num_tokens > 2 * max_tokens
    whole = one_gradient(module(objective=objective), [batch], tmp_path)
    pieces = one_gradient(module(objective=objective, max_tokens=max_tokens), [batch], tmp_path)
    assert whole.norm() > 1e-3
    assert (pieces - whole).norm() / whole.norm() < 1e-5


def test_completions_above_the_token_budget_are_named(tmp_path):
    batch = pack_groups(make_groups(groups=SHAPES), num_groups=4)
    whole = one_gradient(module(), [batch], tmp_path)
    with pytest.warns(UserWarning, match="model.max_tokens = 3: each is computed alone, above that limit"):
        pieces = one_gradient(module(max_tokens=3), [batch], tmp_path)
    assert (pieces - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_fused_loss_is_the_composed_one(weight, tmp_path):
    batch = pack_groups(make_groups(groups=SHAPES), num_groups=4)

    class Composed(Agro):  # another type, so that the module takes the general path
        pass

    fused = one_gradient(module(objective=Agro(0.3, weight)), [batch], tmp_path)
    composed = one_gradient(module(objective=Composed(0.3, weight)), [batch], tmp_path)
    assert (fused - composed).norm() / composed.norm() < 1e-5


def poison(batch: TokenBatch, completion: int) -> TokenBatch:
    from dataclasses import replace

    ref = torch.zeros(batch.targets.numel())
    ref[batch.sequence_ids == completion] = float("nan")
    return replace(batch, ref_logprobs=ref)


class PoisonedLogprobs(L.Callback):
    """Makes the policy's weights NaN for one step, as an overflow would, and mends them after it."""

    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        norm = pl_module.policy.base.model.norm.weight
        self.saved = norm.detach().clone()
        if batch_idx in self.steps:
            with torch.no_grad():
                norm[0] = float("nan")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx in self.steps:
            with torch.no_grad():
                pl_module.policy.base.model.norm.weight.copy_(self.saved)


def test_a_non_finite_step_is_skipped_and_its_prompts_named(tmp_path, caplog):
    batch = pack_groups(make_groups(groups=SHAPES), num_groups=4)
    plain = module()
    fit(plain, [batch, batch], tmp_path)
    guarded = module()
    with caplog.at_level(logging.WARNING):
        fit(guarded, [batch, batch, batch], tmp_path, [PoisonedLogprobs({1}), NonFiniteGuard()])
    assert torch.equal(weights(guarded), weights(plain))
    assert any("skipped on all ranks" in r.message and "p0" in r.message for r in caplog.records)
    assert len(list((tmp_path / "nonfinite").glob("*.json"))) == 1


def test_a_nan_in_one_completion_names_its_prompt_alone(tmp_path, caplog):
    batch = poison(pack_groups(make_groups(groups=SHAPES), num_groups=4), completion=3)
    made = module()
    before = None

    class Start(L.Callback):
        def on_train_start(self, trainer, pl_module):
            nonlocal before
            before = weights(made)

    with caplog.at_level(logging.WARNING):
        fit(made, [batch], tmp_path, [Start(), NonFiniteGuard()])
    assert torch.equal(weights(made), before)
    message = next(r.message for r in caplog.records if "skipped" in r.message)
    assert "p1" in message and "p0" not in message


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    batch = poison(pack_groups(make_groups(groups=SHAPES), num_groups=4), completion=0)
    with pytest.raises(NonFiniteError, match="3 steps in a row.*last good checkpoint"):
        fit(module(max_skipped_steps=3), [batch] * 5, tmp_path, [NonFiniteGuard()])


def test_the_reference_resets_every_k_steps_and_is_saved(tmp_path):
    batch = pack_groups(make_groups(groups=SHAPES), num_groups=4)
    made = module(reference_reset_every=2)
    before = made.reference.reference_id
    fit(made, [batch] * 3, tmp_path)
    assert made.reference.reference_id != before
    saved = tmp_path / "reference-step-00000002.safetensors"
    assert saved.exists()
    drifted = (made.reference.logprobs(batch) - made.policy.logprobs(batch).logprobs).abs().max()
    assert 0 < drifted < 5


def test_checkpoints_leave_the_reference_out(tmp_path):
    made = module()
    trainer = fit(made, [pack_groups(make_groups(groups=SHAPES), num_groups=4)], tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    names = set(saved["state_dict"])
    assert names == {f"policy.{name}" for name, _ in made.policy.named_parameters()} | {
        f"policy.{name}" for name in made.policy.state_dict()
    }
    assert saved["agro_lightning"]["reference_id"] == made.reference.reference_id


def test_a_checkpoint_against_another_reference_is_refused(tmp_path):
    made = module()
    batches = [pack_groups(make_groups(groups=SHAPES), num_groups=4)]
    fit(made, batches, tmp_path).save_checkpoint(tmp_path / "a.ckpt")
    other = module()
    with torch.no_grad():
        other.reference.policy.base.lm_head.weight.add_(1.0)
    other.attach(other.policy, frozen_copy(other.reference.policy))
    trainer = L.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    with pytest.raises(ValueError, match="was trained against reference"):
        trainer.fit(other, Batches(batches), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_schedules():
    cosine = OptimizerSettings(warmup_steps=4, final_fraction=0.1)
    assert [cosine.factor(step, 104) for step in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert cosine.factor(4, 104) == 1.0
    assert cosine.factor(54, 104) == pytest.approx(0.55)
    assert cosine.factor(104, 104) == pytest.approx(0.1)
    assert OptimizerSettings(warmup_steps=0, schedule="constant").factor(50, 60) == 1.0


def test_cached_reference_needs_its_id_and_its_temperature():
    made = AgroModule(policy=PolicySettings(), reference="cached")
    with pytest.raises(ValueError, match="annotate"):
        made.configure_model()
    with pytest.raises(ValueError, match=r"at temperature 1, and data.sampling.temperature is 0.7"):
        AgroModule(policy=PolicySettings(), reference="cached", reference_id="ab@1", temperature=0.7)
    with pytest.raises(ValueError, match="reference is frozen: only cached uses an id"):
        AgroModule(policy=PolicySettings(), reference="frozen", reference_id="ab@1")
    for own_name in ("ab@0.7", "made elsewhere", "someone@example"):
        AgroModule(policy=PolicySettings(), reference="cached", reference_id=own_name, temperature=0.7)
