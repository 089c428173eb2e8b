"""Rollout files: reading, checking, drawing from and writing them."""

from agro_lightning.data.buffer.buffer import BufferCounts, RolloutBuffer, Selection

__all__ = ["BufferCounts", "RolloutBuffer", "Selection"]
