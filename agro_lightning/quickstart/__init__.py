"""What ships with the package for a first run: a policy, prompts, and another policy's answers."""

from pathlib import Path

FOLDER = Path(__file__).parent
