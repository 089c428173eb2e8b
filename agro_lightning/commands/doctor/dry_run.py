"""The doctor's two short runs in a scratch folder: a step that is saved, then a resume; and the export."""

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import AutoModelForCausalLM

from agro_lightning.checkpoints.export import export
from agro_lightning.checkpoints.files import newest_checkpoint
from agro_lightning.checkpoints.single_file import DurableCheckpointIO
from agro_lightning.commands.doctor.report import CheckFailed, Checks
from agro_lightning.commands.inspect import sample_text
from agro_lightning.data.prompts.dataset import PromptDataset
from agro_lightning.data.sources import Live, Source, Stream
from agro_lightning.distributed.fsdp import reshard
from agro_lightning.distributed.launch import number_of_ranks, slurm_plugins
from agro_lightning.models.batch import TokenBatch, pack_groups
from agro_lightning.models.head_check import check_logprobs
from agro_lightning.models.policy import Policy
from agro_lightning.primitives.compat import local_tensor
from agro_lightning.rewards.environment import with_environment_reward
from agro_lightning.rollout.collect import completion_of, is_usable
from agro_lightning.rollout.logprob_gap import check_logprob_gap, logprob_gap
from agro_lightning.training.checkpointing import RunCheckpoint
from agro_lightning.training.datamodule import AgroDataModule
from agro_lightning.training.module import AgroModule
from agro_lightning.training.strategy import Sharded
from agro_lightning.types import PromptGroup

SAMPLES = 4


class Builder(Protocol):
    """Gives new objects from the configuration."""

    def build(self) -> tuple[AgroModule, AgroDataModule, dict[str, Any]]: ...


class Runs:
    """Two short runs in the scratch folder: one step that is saved, and a resume from it."""

    def __init__(
        self, cli: Builder, checks: Checks, folder: Path, launched: bool, prompts: PromptDataset | None
    ) -> None:
        self._cli, self._checks, self._folder, self._launched = cli, checks, folder, launched
        self._prompts = prompts
        self._first: _First | None = None
        self._saved: Path | None = None

    def first(self) -> None:
        """Policy, sample, log-probs, step, save."""
        checks = self._checks
        if self._prompts is None:
            if not self._launched:
                checks.run("policy", self._policy_alone, advice="Look at model.policy")
            for name in ("sample", "log-probs", "step", "save"):
                checks.skip(name, "needs: prompts")
            return
        module, data, config = self._cli.build()
        said = _without_streams(data)
        probe = self._first = _First(checks, data, self._prompts, said)
        try:
            self._trainer(config, 1, probe).fit(module, datamodule=data)
        except Exception as error:  # whatever goes wrong is the finding of the check that was under way
            checks.fail(probe.stage, error, probe.advice)
            for name in probe.missing():
                checks.skip(name, f"needs: {probe.stage}")
            return
        checks.run("save", self._find_saved, needs=["step"])

    def _policy_alone(self) -> str:
        module, _, _ = self._cli.build()
        return _describe(Policy(module.policy_settings, temperature=module.temperature))

    def _find_saved(self) -> str:
        saved = newest_checkpoint(self._folder / "checkpoints")
        if saved is None:
            raise CheckFailed("the run ended without a checkpoint; look at the log above")
        self._saved = saved
        files = [path for path in saved.rglob("*") if path.is_file()] if saved.is_dir() else [saved]
        return f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB in {len(files)} files"

    def second(self) -> None:
        """Resume, and a step from there."""
        self._checks.run("resume", self._resume, needs=["save"])

    def _resume(self) -> str:
        assert self._first is not None
        module, data, config = self._cli.build()
        _without_streams(data)
        data.max_logprob_gap = math.inf  # the first run has judged it
        probe = _Second(self._first.digest)
        self._trainer(config, 2, probe).fit(module, datamodule=data, ckpt_path=str(self._saved))
        if not probe.equal:
            raise CheckFailed("weights or optimiser are not those that were saved; please report this")
        if not probe.stepped:
            raise CheckFailed("no step was taken after the resume; please report this")
        return "weights and optimiser are bitwise those that were saved; the next step was taken"

    def exported(self) -> None:
        """The folder that from_pretrained loads."""
        self._checks.run("export", self._export, needs=["save"])

    def _export(self) -> str:
        assert self._first is not None and self._first.ids is not None and self._first.logits is not None
        if self._checks.rank:
            return "done by the first rank"
        out = self._folder / "model"
        with contextlib.redirect_stdout(None):
            export(str(self._saved), str(out))
        lm = AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            gap = float((lm(input_ids=self._first.ids).logits.float() - self._first.logits).abs().max())
        limit = 1e-3 if self._first.in_fp32 else 0.5
        if not gap <= limit:
            raise CheckFailed(f"the exported model's logits differ by up to {gap:.3g} (limit {limit:g})")
        return f"a {lm.num_parameters():,} parameter folder; logits differ by at most {gap:.2g}"

    def _trainer(self, config: dict[str, Any], steps: int, probe: Callback) -> L.Trainer:
        """The configured trainer, without loggers, validation and callbacks of the config."""
        config = {
            **config,
            "default_root_dir": str(self._folder),
            "logger": False,
            "max_steps": steps,
            "limit_val_batches": 0,
            "val_check_interval": 1.0,
            "check_val_every_n_epoch": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [RunCheckpoint(self._folder / "checkpoints", every=1), probe],
        }
        plugins = config.get("plugins") or []
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), *slurm_plugins()]
        if not self._launched:
            config.update(devices=1, num_nodes=1, strategy="auto")
        elif config.get("strategy") in ("auto", None) and number_of_ranks(config) > 1:
            config["strategy"] = Sharded()
        if config.get("strategy") in ("auto", None):
            plugins.append(DurableCheckpointIO())
        return L.Trainer(**{**config, "plugins": plugins})


def _without_streams(data: AgroDataModule) -> str:
    """Has this process sample what another one would; returns what to say of it."""
    streams = [source for source in data.sources if isinstance(source, Stream)]
    if not streams:
        return ""
    rest: list[Source] = [source for source in data.sources if not isinstance(source, Stream)]
    if not any(isinstance(source, Live) for source in rest):
        rest.append(Live(weight=streams[0].weight, name=streams[0].name))
    data.sources = rest
    return f"; source {streams[0].name} is sampled here, since no rollout process serves the doctor"


class _First(Callback):
    """Looks into the run that takes one step and saves."""

    def __init__(self, checks: Checks, data: AgroDataModule, prompts: PromptDataset, said: str) -> None:
        self._checks, self._data, self._prompts, self._said = checks, data, prompts, said
        self.stage, self.digest = "policy", ""
        self.advice = "Look at model.policy"
        self._group: PromptGroup | None = None
        self.ids: Tensor | None = None
        self.logits: Tensor | None = None
        self.in_fp32 = True

    def missing(self) -> list[str]:
        """Checks after the one that failed."""
        order = ["policy", "sample", "log-probs", "step", "save"]
        later = order[order.index(self.stage) + 1 :]
        return [name for name in later if name not in (*self._checks.passed, *self._checks.failed)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AgroModule) and pl_module.policy is not None
        policy, checks = pl_module.policy, self._checks
        checks.ok("policy", _describe(policy))
        self.stage, self.advice = "step", "Look at data.sources and the step's settings"
        checks.run("sample", lambda: self._sample(policy), advice="Look at data.engine and data.sampling")
        checks.run("log-probs", lambda: self._compare(pl_module, policy), needs=["sample"])
        self._data.max_logprob_gap = math.inf  # judged above; the step is to be seen, too
        self._before = digest(policy, None)

    def _sample(self, policy: Policy) -> str:
        """Samples answers to one prompt, and shows the first with its mask."""
        data, prompt = self._data, self._prompts[0]
        engine, tokenizer = data.engine, data.tokenizer
        data.live.attach(policy)
        engine.update_weights(0)
        if data.episodes is None:
            (row,) = engine.generate([prompt.prompt_ids], data.sampling, n=SAMPLES, seed=data.seed)
        else:
            (row,) = data.episodes.play(
                engine,
                [prompt],
                data.sampling,
                n=SAMPLES,
                seed=data.seed,
                max_positions=policy.max_positions,
            )
        made = [g for g in row if is_usable(g)]
        if len(made) < 2:
            raise CheckFailed(
                f"{SAMPLES - len(made)} of {SAMPLES} completions failed in {type(engine).__name__}"
            )
        texts = [str(tokenizer.decode(list(g.completion_ids), skip_special_tokens=True)) for g in made]
        scores = data.rewards.score_quietly(
            [with_environment_reward(prompt, g.environment_reward) for g in made], texts
        )
        completions = tuple(
            replace(
                completion_of(generation, text, score, data.sampling, source="doctor", policy_version=0),
                row_id="of the policy",
            )
            for generation, text, score in zip(made, texts, scores, strict=True)
        )
        self._group = group = PromptGroup(prompt=prompt, completions=completions)
        _check_mask(pack_groups([group], num_groups=1), group)
        failed = sum(score.reward is None for score in scores)
        lost = f"; {failed} could not be scored" if failed else ""
        cut = sum(completion.finish_reason == "length" for completion in completions)
        return (
            f"{len(made)} completions, {cut} cut off at {data.sampling.max_new_tokens} tokens{lost}; tokens "
            f"in [brackets] are trained on:\n{sample_text(group, completions[0], tokenizer)}"
        )

    @torch.no_grad()
    def _compare(self, module: AgroModule, policy: Policy) -> str:
        """The engine's log-probs against the trainer's."""
        assert self._group is not None
        batch = pack_groups([self._group], num_groups=1).to(module.device)
        if batch.behavior_logprobs is None:
            return f"{type(self._data.engine).__name__} gives none; nothing to compare"
        gap = logprob_gap(batch.behavior_logprobs, policy.logprobs(batch).logprobs, batch.sequence_ids)
        assert gap is not None
        check_logprob_gap(
            gap.mean_abs,
            self._data.max_logprob_gap,
            max_abs=gap.max_abs,
            completion_max_abs=gap.completion_max_abs,
            sampling=self._data.sampling,
            engine=type(self._data.engine).__name__,
        )
        return (
            f"engine and trainer differ by {gap.mean_abs:.2g} nats a token on average, at most "
            f"{gap.max_abs:.2g} (limit {self._data.max_logprob_gap:g} on average)"
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, AgroModule) and pl_module.policy is not None
        policy, norm = pl_module.policy, float(pl_module.last_gradient_norm)
        if pl_module.step_skipped:
            raise CheckFailed(
                f"the gradient is not finite (norm {norm}); try model.policy.dtype: float32, or look at the "
                "data's rewards"
            )
        after = digest(policy, None)
        if after == self._before and norm:
            raise CheckFailed("the step left every weight as it was; look at model.optimizer.learning_rate")
        reward = float(batch.rewards.mean())
        moved = "weights moved" if norm else "no group's rewards differ, so that nothing was learnt from them"
        self._checks.ok(
            "step",
            f"{batch.num_completions} completions, {batch.num_tokens} tokens in the last micro-batch; mean "
            f"reward {reward:.3g}, gradient norm {norm:.3g}, {moved}{self._said}",
        )
        self.stage, self.advice = "save", ""
        self.digest = digest(policy, trainer.optimizers[0])
        self._keep_logits(policy, batch)

    @torch.no_grad()
    def _keep_logits(self, policy: Policy, batch: TokenBatch) -> None:
        """The stepped policy's logits of a few tokens, which the exported model must repeat."""
        self.ids = batch.input_ids[: min(64, batch.num_tokens)][None].cpu()
        with policy.generating() as lm:
            logits = lm(input_ids=self.ids.to(policy.head.weight.device), use_cache=False).logits
        self.logits, self.in_fp32 = logits.float().cpu(), policy.compute_dtype == torch.float32


def _describe(policy: Policy) -> str:
    """What the policy is, once its fused log-probs were compared with its own logits; raises where they
    differ."""
    gap = check_logprobs(policy)
    count = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    packing = {"shared": "prompts computed once", "plain": "prompts repeated", "single": "one sequence a row"}
    computed = str(policy.compute_dtype).removeprefix("torch.")
    return (
        f"{count:,} parameters, {trained:,} trained, {policy.settings.dtype} on {policy.head.weight.device}, "
        f"computed in {computed}; "
        f"fused log-probs are within {gap:.1g} nats of the model's logits, {packing[policy.packing]}"
    )


class _Second(Callback):
    """Looks into the run that goes on."""

    def __init__(self, expected: str) -> None:
        self._expected, self.equal, self.stepped = expected, False, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, AgroModule) and pl_module.policy is not None
        self.equal = digest(pl_module.policy, trainer.optimizers[0]) == self._expected

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stepped = trainer.global_step == 2


def _check_mask(batch: TokenBatch, group: PromptGroup) -> None:
    """Raises CheckFailed unless exactly the tokens that the policy chose are targets."""
    runs = [run for completion in group.completions for run in completion.runs()]
    wanted = [token for chosen, ids in runs if chosen for token in ids]
    if batch.targets.tolist() != wanted:
        raise CheckFailed(
            "the tokens that are trained on are not those that the policy chose; please report this"
        )


def digest(policy: Policy, optimizer: torch.optim.Optimizer | None) -> str:
    """A hash of this rank's part of the weights, and of the optimiser's state where one is given."""
    found = hashlib.sha256()

    def add(tensors: Iterator[Tensor]) -> None:
        for tensor in tensors:
            # a copy: numpy would forbid FSDP to resize the tensor itself
            plain = local_tensor(tensor).detach().cpu().contiguous().clone()
            found.update(plain.view(-1).view(torch.uint8).numpy().tobytes())

    reshard(policy)
    add(policy.parameters())
    if optimizer is not None:
        for state in optimizer.state.values():
            add(value for value in state.values() if isinstance(value, Tensor))
    return found.hexdigest()
