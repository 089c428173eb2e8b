"""Module names of version 0.1, which configs and scripts of users still name. They go with version 0.3."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "agro_lightning.attention": "agro_lightning.models.packed_attention",
    "agro_lightning.callbacks": "agro_lightning.training.callbacks.step_metrics",
    "agro_lightning.cli": "agro_lightning.commands.main",
    "agro_lightning.data.datamodule": "agro_lightning.training.datamodule",
    "agro_lightning.data.mixing": "agro_lightning.data.sources",
    "agro_lightning.data.packing": "agro_lightning.models.batch",
    "agro_lightning.data.schema": "agro_lightning.data.buffer.schema",
    "agro_lightning.data.writer": "agro_lightning.data.buffer.writer",
    "agro_lightning.export": "agro_lightning.checkpoints.export",
    "agro_lightning.module": "agro_lightning.training.module",
    "agro_lightning.optimizer_settings": "agro_lightning.training.optimizer",
    "agro_lightning.policy": "agro_lightning.models.policy",
    "agro_lightning.policy_settings": "agro_lightning.models.config",
    "agro_lightning.publish": "agro_lightning.training.callbacks.publish",
    "agro_lightning.records": "agro_lightning.types",
    "agro_lightning.reference": "agro_lightning.models.reference",
    "agro_lightning.rewards.answers": "agro_lightning.rewards.answer_parsing",
    "agro_lightning.rewards.mathverify": "agro_lightning.rewards.math_verify",
    "agro_lightning.rewards.python_reward": "agro_lightning.rewards.python.reward",
    "agro_lightning.rollout.base": "agro_lightning.rollout.engines.base",
    "agro_lightning.rollout.vllm_engine": "agro_lightning.rollout.engines.vllm",
    "agro_lightning.sharding": "agro_lightning.distributed.fsdp",
    "agro_lightning.strategy": "agro_lightning.training.strategy",
}
"""Old module name -> where its public classes and functions are now."""


class _MovedModules(MetaPathFinder, Loader):
    """Imports an old name as the module that took its place, with a warning that names both."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(
            f"{spec.name} is now {new}; the old name goes with version 0.3", FutureWarning, stacklevel=2
        )
        module = import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """No-op, besides giving the module its own spec back: importlib wrote the old name's into it."""
        module.__spec__ = self._spec


def install() -> None:
    """Makes the old names importable; called when the package is imported."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
