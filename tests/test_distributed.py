"""The real trainer on gloo ranks: gradients, clipping, skipped steps and generation as on one process."""

import logging
import os
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from ranks import run_ranks
from test_sharding import full, make_groups, mesh_of
from tiny_models import tiny_lm

from agro_lightning.distributed.fsdp import ShardingSettings, data_rank
from agro_lightning.models.batch import pack_groups
from agro_lightning.models.config import PolicySettings
from agro_lightning.models.reference import FrozenReference
from agro_lightning.models.sharded_loading import sharded_policy, sharded_reference
from agro_lightning.objectives import Agro
from agro_lightning.objectives.rloo import Rloo
from agro_lightning.rollout.engines.base import Sampling
from agro_lightning.rollout.engines.batched import BatchedDecoding
from agro_lightning.rollout.engines.continuous import ContinuousBatching
from agro_lightning.rollout.engines.hf_generate import HFGenerate
from agro_lightning.training.module import AgroModule
from agro_lightning.training.optimizer import OptimizerSettings
from agro_lightning.training.strategy import Sharded

GROUPS = 16
"""Prompt groups of a step, over all ranks and micro-batches."""


class Record(L.Callback):
    """Gradients as the optimiser gets them, before and after clipping, by step."""

    def __init__(self):
        self.gradients, self.norms, self.skipped = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(
            {n: full(p.grad) for n, p in pl_module.policy.named_parameters() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.norms.append(float(pl_module.last_gradient_norm))
            self.skipped.append(pl_module.step_skipped)


class Batches:
    """A sized loader."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def batches_of(rank, ranks, accumulate, steps, poison=None):
    """This rank's micro-batches: of different sizes over ranks and micro-batches, every group once."""
    out = []
    for step in range(steps):
        groups = make_groups(GROUPS, seed=step)
        cuts = torch.linspace(0, GROUPS, ranks * accumulate + 1).round().long()
        cuts[1:-1] += torch.arange(ranks * accumulate - 1) % 2  # uneven
        for part in range(accumulate):
            at = part * ranks + rank
            batch = pack_groups(groups[cuts[at] : cuts[at + 1]], num_groups=GROUPS)
            if poison == (step, at):
                batch.rewards[0] = float("nan")
            out.append(batch)
    return Batches(out)


def fit(rank, world, path, options):
    """Trains some steps on fixed groups; returns what is compared."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    tensor, accumulate = options.get("tensor", 1), options.get("accumulate", 1)
    steps, ranks = options.get("steps", 2), world // tensor
    module = AgroModule(
        policy=PolicySettings(path=path),
        objective=options.get("objective", Agro(beta=0.05)),
        optimizer=OptimizerSettings(learning_rate=1e-3, warmup_steps=0, schedule="constant"),
        max_tokens=options.get("max_tokens"),
        reference_reset_every=options.get("reset", 0),
        temperature=0.7,
        sharding=ShardingSettings(replicate=options.get("replicate", 1)),
    )
    record = Record()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=steps,
        max_epochs=1,
        logger=False,
        strategy="auto" if world == 1 else Sharded(tensor_parallel_size=tensor),
        accumulate_grad_batches=accumulate,
        gradient_clip_val=options.get("clip"),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[record],
        use_distributed_sampler=False,
    )
    trainer.fit(
        module, train_dataloaders=batches_of(rank // tensor, ranks, accumulate, steps, options.get("poison"))
    )
    return {
        "gradients": record.gradients,
        "norms": record.norms,
        "skipped": record.skipped,
        "weights": {n: full(p) for n, p in module.policy.named_parameters()},
        "reference_id": module.reference.reference_id,
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_lm("qwen3").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(model_folder):
    """One process, all groups in one batch; by options that change the result."""
    known = {}

    def of(**options):
        key = repr(sorted(options.items()))
        if key not in known:
            (known[key],) = run_ranks(fit, 1, model_folder, options)
        return known[key]

    return of


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs|, both over all tensors together."""
    difference = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs)
    return (difference / sum(float(theirs[name].square().sum()) for name in theirs)) ** 0.5


CASES = {
    "2 ranks": (2, {}),
    "4 ranks, accumulation": (4, {"accumulate": 2}),
    "2 ranks, above the token budget": (2, {"max_tokens": 20}),
    "2 ranks of tensor parallelism": (2, {"tensor": 2}),
    "2 x 2 ranks, accumulation, above the budget": (4, {"tensor": 2, "accumulate": 2, "max_tokens": 20}),
    "2 x 2 replicas": (4, {"replicate": 2}),
    "2 whole replicas": (2, {"replicate": 2, "max_tokens": 20}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_clipping_equal_one_process(model_folder, expected, case):
    world, options = CASES[case]
    one = expected(clip=0.1)
    for result in run_ranks(fit, world, model_folder, {**options, "clip": 0.1}):
        assert result["gradients"][0].keys() == one["gradients"][0].keys()
        assert relative_error(result["gradients"][0], one["gradients"][0]) <= 1e-6
        assert result["norms"] == pytest.approx(one["norms"], rel=1e-4)
        assert one["norms"][0] > 0.1  # or nothing was clipped
        assert relative_error(result["weights"], one["weights"]) <= 1e-4
        assert result["reference_id"] == one["reference_id"]


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"tensor": 2}], ids=["ranks", "tensor_parallel"])
@pytest.mark.parametrize("objective", [Rloo(0.05), Agro(0.05, 0.3), Agro(0.05, 0.3, taper=True)], ids=repr)
def test_weights_and_other_objectives_equal_one_process(model_folder, expected, objective, options):
    one = expected(objective=objective)
    for result in run_ranks(fit, 2, model_folder, {"objective": objective, **options}):
        assert relative_error(result["gradients"][0], one["gradients"][0]) <= 1e-6


def test_nan_on_one_rank_is_skipped_on_all(model_folder, expected):
    results = run_ranks(fit, 2, model_folder, {"poison": (0, 1), "steps": 2})
    for result in results:
        assert result["skipped"] == [True, False]
        assert all(torch.isfinite(weight).all() for weight in result["weights"].values())
        assert relative_error(result["weights"], results[0]["weights"]) == 0.0


def reset_and_reload(rank, world, path, folder):
    """A reference that was reset, and one that read its file back, on other shards."""
    os.chdir(folder)
    result = fit(rank, world, path, {"reset": 2})
    place = mesh_of(world, tensor=2)
    settings, sharding = PolicySettings(path=path), ShardingSettings()
    policy = sharded_policy(settings, sharding, place, torch.device("cpu"), temperature=0.7)
    reference = FrozenReference(sharded_reference(policy, sharding, place, torch.device("cpu")))
    before = reference.reference_id
    reference.load(Path("reference-step-00000002.safetensors"))
    weights = {n: full(p) for n, p in reference.policy.named_parameters()}
    return result, before, reference.reference_id, weights


def test_a_reset_reference_is_saved_once_and_read_back_in_other_shards(model_folder, tmp_path):
    for result, before, identity, weights in run_ranks(reset_and_reload, 2, model_folder, str(tmp_path)):
        assert result["reference_id"] == identity != before
        assert relative_error(weights, result["weights"]) == 0.0
    assert [path.name for path in tmp_path.iterdir()] == ["reference-step-00000002.safetensors"]


def generate(rank, world, path, engine, tensor):
    """Unequal lengths before and after a training step."""
    from agro_lightning.models.pretrained import load_tokenizer

    warnings.simplefilter("ignore")
    groups = make_groups(4)
    prompts = [group.prompt.prompt_ids for group in groups]
    module = AgroModule(
        policy=PolicySettings(path=path),
        objective=Agro(beta=0.05),
        optimizer=OptimizerSettings(learning_rate=0.05, warmup_steps=0, schedule="constant"),
    )
    outputs = []

    class Rollout(L.Callback):
        def on_train_start(self, trainer, pl_module):
            engine.attach(pl_module.policy, load_tokenizer("quickstart"))
            self.generate(pl_module)

        def generate(self, pl_module):
            place = data_rank(pl_module.device_mesh)
            mine = slice(place.rank, None, place.size)
            engine.update_weights(pl_module.global_step)
            rows = engine.generate(
                prompts[mine], Sampling(max_new_tokens=3 + 6 * place.rank, temperature=0.0), n=1, seed=3
            )
            outputs.append([generation.completion_ids[:3] for row in rows for generation in row])
            outputs.append([len(generation.completion_ids) for row in rows for generation in row])

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.generate(pl_module)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=2,
        max_epochs=1,
        logger=False,
        strategy="auto" if world == 1 else Sharded(tensor_parallel_size=tensor),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Rollout()],
        use_distributed_sampler=False,
    )
    trainer.fit(module, train_dataloaders=batches_of(rank // tensor, world // tensor, 1, 2))
    return outputs


@pytest.mark.parametrize(
    ("engine", "world", "tensor"),
    [(HFGenerate, 2, 1), (BatchedDecoding, 2, 1), (ContinuousBatching, 2, 1), (BatchedDecoding, 4, 2)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_generation_of_unequal_lengths_before_and_after_steps(model_folder, engine, world, tensor):
    (one,) = run_ranks(generate, 1, model_folder, engine(), 1)
    results = run_ranks(generate, world, model_folder, engine(), tensor)
    ranks = world // tensor
    for moment in (0, 2, 4):
        for rank, result in enumerate(results):
            assert result[moment] == one[moment][rank // tensor :: ranks]
    assert one[0] != one[4]  # the steps changed what is generated
    assert max(results[0][1]) < max(results[-1][1])  # ranks stopped at different lengths
