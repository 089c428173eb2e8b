"""What ships with the package for a first run: policies, prompts, and another policy's answers."""

from pathlib import Path

FOLDER = Path(__file__).parent
POLICIES = {"quickstart": "policy", "calculator": "calculator"}
"""Folders of policies, by what `model.policy.path` says to mean them."""
