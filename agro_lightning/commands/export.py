"""The command `export`: a checkpoint as a model folder with its card, and onto a hub."""

import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Literal

from agro_lightning.checkpoints.export import export as write_model
from agro_lightning.checkpoints.files import newest_checkpoint
from agro_lightning.checkpoints.model_card import model_card
from agro_lightning.commands.run_settings import run_folder_of
from agro_lightning.primitives.quiet import without_progress_bars


def export(
    ckpt: str,
    out: str,
    adapter_only: bool = False,
    max_shard_size: str = "5GB",
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    push: str | None = None,
    private: bool = True,
) -> None:
    """Writes the trained policy as safetensors with config, tokenizer and a model card, without a GPU.

    The card, README.md, says what the model is made of: base, data and shares, objective, metrics, command
    and commit, from the run's config.yaml, summary.json and metrics.csv.

    Args:
        ckpt: a run's folder, or one of its checkpoints: a file, or a folder of shards.
        out: the folder to write, new or empty; it appears whole or not at all.
        adapter_only: for a LoRA policy, write the adapter instead of the merged model.
        max_shard_size: largest safetensors file.
        tokenizer: where the tokenizer comes from, when the model that the run started from has moved.
        dtype: type of the written weights; by default the one they were trained in.
        push: OWNER/NAME of a model repository of the hub (of HF_ENDPOINT, with HF_TOKEN) to put the folder
            into; it is made where it does not exist.
        private: whether a repository that `push` makes is private.

    Raises:
        FileNotFoundError: no such checkpoint.
        FileExistsError: `out` holds a model, or anything else.
        OSError: there is no room for it, it cannot be written to, or the hub did not take it.
        ValueError: the checkpoint is not one of agro-lightning's, is damaged, or has no adapter to write.
    """
    if push is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", push):
        raise ValueError(f"push is {push!r}; it must be OWNER/NAME, such as me/my-model")
    place, run = Path(ckpt).expanduser(), run_folder_of(ckpt)
    if place.is_dir() and (place / "checkpoints").is_dir():
        newest = newest_checkpoint(place / "checkpoints")
        if newest is None:
            raise FileNotFoundError(f"run {ckpt} has no complete checkpoint in checkpoints/ yet")
        place = newest
    given = sys.argv[2:] if sys.argv[1:2] == ["export"] else []  # else called from Python
    card = partial(
        model_card,
        run=run,
        command=shlex.join(["python", "-m", "agro_lightning", "export", *_without_folders(given)]),
        adapter=adapter_only,
        name=push or Path(out).name,
    )
    with without_progress_bars():
        write_model(str(place), out, adapter_only, max_shard_size, tokenizer, dtype, card=card)
    if push is not None:
        push_folder(Path(out).expanduser(), push, private=private)


def _without_folders(words: list[str]) -> list[str]:
    """The command line with local paths by their last name: the card may be published."""
    return [re.sub(r"(?:^|(?<==))[~/.][^=]*/(?=[^/])", "", word) for word in words]


def push_folder(folder: Path, repository: str, *, private: bool) -> None:
    """Uploads a model folder to the hub as one commit.

    Raises:
        OSError: the hub did not take it; the folder stays.
    """
    from huggingface_hub import HfApi, constants

    again = f"{folder} is whole; push it again with: hf upload {repository} {folder}"
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"HF_HUB_OFFLINE is set, and nothing was pushed to {repository}. {again}")
    try:
        hub = HfApi(library_name="agro-lightning")
        hub.create_repo(repository, private=private, exist_ok=True)
        message = "agro-lightning export"
        made = hub.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except Exception as error:  # of HTTP, of the hub's checks, of the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        login = "" if os.environ.get("HF_TOKEN") else " Log in with `hf auth login`, or set HF_TOKEN."
        raise OSError(f"the hub did not take {repository}: {reason}.{login} {again}") from error
    print(f"{folder} -> {made.commit_url}")
