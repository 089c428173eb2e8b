"""Prompt data sets: files, hub sets and environments, as Prompt records."""

from agro_lightning.data.prompts.dataset import PromptDataset, PromptSettings

__all__ = ["PromptDataset", "PromptSettings"]
