"""RL fine-tuning of language models from any generation, live or offline, with one loss (AGRO, arXiv
2503.19612)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agro_lightning import aliases

if TYPE_CHECKING:
    from agro_lightning.training.datamodule import AgroDataModule
    from agro_lightning.training.module import AgroModule

__version__ = "0.1.0"
__all__ = ["AgroDataModule", "AgroModule"]

_HOMES = {
    "AgroDataModule": "agro_lightning.training.datamodule",
    "AgroModule": "agro_lightning.training.module",
}

aliases.install()


def __getattr__(name: str) -> Any:
    """Imports the two on demand: they bring all of torch and Lightning along."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
