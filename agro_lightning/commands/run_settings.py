"""The settings of a finished or running run, read back from RUN/config.yaml."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

CONFIG_FILE = "config.yaml"


def config_of_checkpoint(args: list[str]) -> list[str]:
    """`--config RUN/config.yaml` for a command line that names a run's folder or checkpoint and no config."""
    if values_of(args, "--config", "-c"):
        return []
    for value in values_of(args, "--ckpt_path", "--run_dir"):
        if folder := run_folder_of(value):
            return ["--config", str(folder / CONFIG_FILE)]
    return []


def run_folder_of(path: str) -> Path | None:
    """The run's folder, of itself or of a checkpoint in it; None where there is no config.yaml."""
    place = Path(path).expanduser()
    return next((f for f in (place, *place.absolute().parents[:2]) if (f / CONFIG_FILE).is_file()), None)


def run_defaults(run_dir: str, keys: dict[str, str]) -> dict[str, Any]:
    """Options of a command as a run had them.

    Args:
        run_dir: the run's folder.
        keys: the command's option -> the key of the run's config.

    Raises:
        FileNotFoundError: the folder has no config.yaml.
        ValueError: it is damaged.
    """
    path = Path(run_dir).expanduser() / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a run that `fit` has started")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]})") from None
    found = {option: _at(config, key.split(".")) for option, key in keys.items()}
    return {option: value for option, value in found.items() if value is not None}


def _at(config: Any, names: Iterable[str]) -> Any:
    for name in names:
        config = config.get(name) if isinstance(config, dict) else None
    return config


def values_of(args: list[str], *names: str) -> list[str]:
    """What the command line gives options of these names, as `--name value` or `--name=value`."""
    found = []
    for index, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in names and equals:
            found.append(value)
        elif name in names and index + 1 < len(args):
            found.append(args[index + 1])
    return found
