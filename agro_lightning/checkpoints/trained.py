"""The policy of a run as it is now, and the reference that it was trained against, for looking at both."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from agro_lightning.checkpoints.export import read_policy
from agro_lightning.checkpoints.files import MARKER, newest_checkpoint
from agro_lightning.models.compat import no_init_weights
from agro_lightning.models.config import LoraSettings, PolicySettings
from agro_lightning.models.policy import Policy
from agro_lightning.models.reference import AdapterOffReference, FrozenReference
from agro_lightning.models.sharded_loading import parameters_on_meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A policy, from a checkpoint or a model folder."""

    policy: Policy
    settings: PolicySettings
    """Those that the run started from; their path is where the tokenizer is."""
    step: int | None
    """Optimiser steps of the checkpoint; None for a model folder."""
    checkpoint: Path | None
    """Where the weights come from; None for a model folder."""
    about: dict[str, Any]
    """What the checkpoint says besides weights."""

    def reference(self) -> FrozenReference | AdapterOffReference:
        """The reference that the checkpoint was trained against.

        Raises:
            ValueError: it comes from a model folder, or the model that the run started from has changed.
            FileNotFoundError: the reference was reset, and the file of its weights is gone.
        """
        if self.checkpoint is None:
            raise ValueError(
                "a model folder has no reference; give a run's folder, or one of its checkpoints"
            )
        if self.settings.lora is not None:
            reference: FrozenReference | AdapterOffReference = AdapterOffReference(self.policy)
        else:
            reference = FrozenReference(Policy(self.settings, temperature=self.policy.temperature))
            if name := self.about["reference_file"]:
                folders = (self.checkpoint.parent.parent, self.checkpoint.parent)
                found = next((folder / name for folder in folders if (folder / name).is_file()), None)
                if found is None:
                    raise FileNotFoundError(
                        f"{self.checkpoint} was trained against a reset reference, and {name} is in none of "
                        f"{', '.join(map(str, folders))}; copy it there from the folder of its run"
                    )
                reference.load(found)
            reference.policy.use_packing(self.policy.packing)
        known = reference.reference_id
        if "compute_dtype" not in self.about["policy"]:  # version 0.1 did not name the type
            known = re.sub(r"\.\w+@", "@", known)
        if known != self.about["reference_id"]:
            raise ValueError(
                f"{self.checkpoint} was trained against reference {self.about['reference_id']}, and "
                f"{self.settings.path} is {known}: that model has changed since. Give the former one"
            )
        return reference


def load_trained(path: str, *, device: torch.device) -> Trained:
    """The policy of a run's newest checkpoint, of a checkpoint, or of a model folder.

    Args:
        path: a run's folder; a checkpoint, file or folder of shards; a model folder or hub id.
        device: where the policy goes.

    Raises:
        FileNotFoundError: the run has no checkpoint yet, or there is no such folder.
        ValueError: the checkpoint is damaged or foreign.
    """
    place = Path(path).expanduser()
    if (place / "config.yaml").is_file() or (place / "checkpoints").is_dir():
        newest = newest_checkpoint(place / "checkpoints")
        if newest is None:
            raise FileNotFoundError(
                f"run {path} has no complete checkpoint in checkpoints/ yet; give another"
            )
        place = newest
    elif not (place.is_file() or place.suffix == ".ckpt" or (place / MARKER).is_file()):
        settings = PolicySettings(path=path)
        policy = Policy(settings).to(device)
        return Trained(policy=policy, settings=settings, step=None, checkpoint=None, about={})
    place = place.resolve()
    about, weights = read_policy(place)
    lora = about["policy"]["lora"]
    settings = PolicySettings(**{**about["policy"], "lora": LoraSettings(**lora) if lora else None})
    made_at = re.fullmatch(r".*@([\d.e+-]+)", about["reference_id"] or "")
    with no_init_weights(), parameters_on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(**about["model_config"])
        lm: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
        lm.tie_weights()
        policy = Policy(
            replace(settings, gradient_checkpointing=False),
            temperature=float(made_at[1]) if made_at else 1.0,
            lm=lm.eval(),
        )
    policy.lm.load_state_dict(weights, strict=True, assign=True)
    policy.base.tie_weights()
    if about["generation_config"]:
        lm.generation_config = GenerationConfig.from_dict(about["generation_config"])
    return Trained(
        policy=policy.to(device), settings=settings, step=about["global_step"], checkpoint=place, about=about
    )
