"""The settings of a run, kept in its folder."""

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from agro_lightning.primitives.atomic_files import next_free, replace_text, writing
from agro_lightning.training.checkpointing import run_dir


class RunConfig(SaveConfigCallback):
    """Writes what a `fit` was told to RUN/config.yaml.

    Where a run goes on with other settings, the former ones stay as config-1.yaml, config-2.yaml and so on,
    the oldest first.
    """

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lightning's hook, on rank 0."""
        if stage != "fit":
            return
        path = run_dir(trainer) / "config.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.parser.dump(self.config, skip_none=False)
        if path.exists() and _settings(path.read_text(encoding="utf-8", errors="replace")) != _settings(text):
            with writing(path):
                path.rename(next_free(path))
        replace_text(path, text)


def _settings(text: str) -> list[str]:
    """The lines that decide how a run goes on; where it goes on from is none of them."""
    return [line for line in text.splitlines() if not line.startswith("ckpt_path:")]
