"""What is reached of Lightning's CLI and strategies under private names (lightning 2.6)."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningCLI

from agro_lightning.commands.cli_errors import explained


class ExplainedCLI(LightningCLI):
    """A LightningCLI whose errors take one line, and whose settings stand in the config alone."""

    def make_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """The trainer of its settings; a subclass may change them."""
        return super()._instantiate_trainer(config, callbacks)

    def get(self, key: str) -> Any:
        """An option's value, once classes are instantiated."""
        return self._get(self.config_init, key)

    def text(self, key: str) -> Any:
        """An option's value as it was given."""
        return self._get(self.config, key)

    def instantiate_classes(self) -> None:
        with explained(building=True):
            super().instantiate_classes()

    def _set_seed(self) -> None:
        with explained(building=True):
            super()._set_seed()

    def _run_subcommand(self, subcommand: str) -> None:
        with explained(writes_to=Path(self.trainer.default_root_dir)):
            super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """No-op: Lightning would merge settings out of the checkpoint."""

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> L.Trainer:
        return self.make_trainer(config, callbacks)


def tensor_parallel_size(strategy: Any) -> int:
    """Ranks that share a matrix under the strategy; 1 where it has none, or leaves it to Lightning."""
    size = getattr(strategy, "_tensor_parallel_size", 1)
    return size if isinstance(size, int) else 1
