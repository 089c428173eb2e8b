"""Prompts, buffers, mixing and the data module."""
