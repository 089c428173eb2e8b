"""A sequence-classification model as a reward."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from agro_lightning.rewards.base import RewardUsageError, Score
from agro_lightning.types import Prompt

if TYPE_CHECKING:
    import torch  # imported on demand: worker processes and the commands on buffers do without


class RewardModel:
    """The scalar that a sequence-classification model gives to prompt + completion.

    The text is tokenised by the model's own tokenizer. A text that is longer than the model takes is a
    failure of kind `error`, never cut; a NaN or infinite output one of kind `non_finite`. The weights load at
    the first call, from safetensors only, and no code from the folder is run.

    Args:
        path: a local folder with config.json, *.safetensors and the tokenizer.
        name: the key of this reward in reward_parts and in metrics.
        weight: its factor in the total.
        label: which output is the reward; needed where the model has several.
        batch_size: texts per forward pass.
        max_length: most tokens of a text; null for what the model's configuration allows.
        device: such as `cpu` or `cuda:0`; `auto` is the device of the rank that trains.
        dtype: number format of the weights; `auto` is the one they were saved in.

    Raises:
        ValueError: the folder or a file in it is missing, or an option is out of range.
    """

    def __init__(
        self,
        path: str,
        name: str = "reward_model",
        weight: float = 1.0,
        label: int | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    ) -> None:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"reward model {path!r} is no local folder with a config.json")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"reward model {path!r} has no *.safetensors; pickled weights are not loaded")
        if batch_size < 1:
            raise ValueError(f"batch_size of reward model {path!r} is {batch_size}; it must be at least 1")
        self.name = name
        self.weight = weight
        self.path = path
        self.label = label
        self.batch_size = batch_size
        self.max_length = max_length
        self.device = device
        self.dtype = dtype
        self._loaded: tuple[Any, Any, int] | None = None
        self._pad_id: int | None = None
        self._rank_device: str | None = None
        self._local_rank = 0

    def __getstate__(self) -> dict[str, Any]:
        """A copied or pickled reward loads the weights again."""
        return {**self.__dict__, "_loaded": None}

    def place(self, local_rank: int, local_ranks: int, device: str | None = None) -> None:
        """Notes this rank's device for `device: auto`."""
        self._local_rank, self._rank_device = local_rank, device

    def start(self) -> None:
        """Loads the model and its tokenizer.

        Raises:
            RewardUsageError: a file in the folder cannot be used; names the folder.
        """
        if self._loaded is not None:
            return
        try:
            self._loaded = self._load()
        except RewardUsageError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split()).split(". ")[0][:200]
            raise RewardUsageError(
                f"reward model {self.path!r} cannot be loaded: {type(error).__name__}: {reason}"
            ) from error

    def close(self) -> None:
        """Frees the model; the next call would load it again."""
        self._loaded = None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Score]:
        self.start()
        assert self._loaded is not None
        model, tokenizer, max_length = self._loaded
        texts = [prompt.prompt + text for prompt, text in zip(prompts, completions, strict=True)]
        rows = [self._token_ids(tokenizer, text) for text in texts]
        scores: list[Score] = [Score(reward=None)] * len(rows)
        fitting = []
        for index, row in enumerate(rows):
            if 0 < len(row) <= max_length:
                fitting.append(index)
            else:
                message = f"prompt {prompts[index].prompt_id!r} and its completion have {len(row)} tokens"
                message += f"; reward model {self.path!r} takes 1 to {max_length}"
                scores[index] = Score(reward=None, failure="error", message=message)
        fitting.sort(key=lambda index: len(rows[index]))  # little padding
        for start in range(0, len(fitting), self.batch_size):
            chunk = fitting[start : start + self.batch_size]
            values = self._forward(model, [rows[index] for index in chunk])
            for index, value in zip(chunk, values, strict=True):
                scores[index] = Score(reward=value)
                if not math.isfinite(value):
                    message = f"reward model {self.path!r} gave {value} for {prompts[index].prompt_id!r}"
                    scores[index] = Score(reward=None, failure="non_finite", message=message)
        return scores

    def _load(self) -> tuple[Any, Any, int]:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=self.dtype
        )
        labels = model.config.num_labels
        if labels > 1 and self.label is None or not 0 <= (self.label or 0) < labels:
            raise RewardUsageError(
                f"reward model {self.path!r} has {labels} outputs and label is {self.label}; "
                f"set label to one of 0..{labels - 1}"
            )
        text_config = model.config.get_text_config()
        self._pad_id = text_config.pad_token_id
        limits = [self.max_length, getattr(text_config, "max_position_embeddings", None)]
        max_length = min(limit for limit in [*limits, tokenizer.model_max_length] if limit is not None)
        return model.eval().requires_grad_(False).to(self._device()), tokenizer, max_length

    def _device(self) -> "torch.device":
        import torch

        if self.device != "auto" or self._rank_device is not None:
            return torch.device(self._rank_device or "cpu" if self.device == "auto" else self.device)
        if torch.cuda.is_available():
            return torch.device("cuda", self._local_rank % torch.cuda.device_count())
        return torch.device("cpu")

    def _token_ids(self, tokenizer: Any, text: str) -> list[int]:
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not has_bos, truncation=False, verbose=False).input_ids

    def _forward(self, model: Any, rows: list[list[int]]) -> list[float]:
        """The rewards of token rows of any lengths, in one forward pass."""
        import torch

        config = model.config.get_text_config()
        pad = self._pad_id if self._pad_id is not None else _absent_from_ends(rows)
        config.pad_token_id = pad
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, pad)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        with torch.no_grad():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.long().to(model.device)).logits
        return logits[:, self.label or 0].float().tolist()


def _absent_from_ends(rows: list[list[int]]) -> int:
    """An id that no row ends with: causal classifiers take a row to end before its trailing pad ids."""
    ends = {row[-1] for row in rows}
    return next(token for token in range(len(ends) + 1) if token not in ends)
