"""Checkpoints of one process and of many ranks, and export."""
