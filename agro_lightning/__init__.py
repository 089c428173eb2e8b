"""RL fine-tuning of language models from any generation, live or offline, with one loss (AGRO, arXiv
2503.19612)."""

__version__ = "0.1.0"
