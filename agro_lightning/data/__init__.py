"""Prompts, buffers and the sources that a step draws from. Nothing here needs torch."""
