"""Where things are kept that can be made anew."""

import os
from pathlib import Path

from platformdirs import user_cache_path

CACHE_VARIABLE = "AGRO_LIGHTNING_CACHE"


def cache_folder(name: str) -> Path:
    """`name` in the folder that AGRO_LIGHTNING_CACHE names, else in the user's cache directory."""
    named = os.environ.get(CACHE_VARIABLE)
    return (Path(named).expanduser() if named else user_cache_path("agro-lightning")) / name
