"""SourceOpener: the files behind a run's sources, opened as buffers and streams."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from agro_lightning.data.buffer.buffer import RolloutBuffer
from agro_lightning.data.buffer.files import offline_paths
from agro_lightning.data.sources import Offline, Source, Stream
from agro_lightning.data.stream import StreamReader, stream_dir


@dataclass(frozen=True, kw_only=True)
class SourceOpener:
    """Opens files by the run's tokenizer and its rules for what cannot be used."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    on_bad_row: Literal["error", "drop"]
    on_bad_file: Literal["error", "skip"]
    run_dir: Path

    def buffer(self, paths: Sequence[str], name: str, *, live: bool, unscored: bool = False) -> RolloutBuffer:
        """Rollout files as one buffer, see RolloutBuffer."""
        return RolloutBuffer(
            paths,
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            on_bad_row=self.on_bad_row,
            on_bad_file=self.on_bad_file,
            unscored=unscored,
            source_name=name,
            live=live,
        )

    def offline(self, sources: Iterable[Source]) -> dict[str, RolloutBuffer]:
        """The buffer of each offline source, by its name."""
        return {
            source.name: self.buffer(
                offline_paths(source.paths), source.name, live=False, unscored=source.score
            )
            for source in sources
            if isinstance(source, Offline)
        }

    def streams(
        self, sources: Iterable[Source], reports: bool, agree: Callable[[Any], Any]
    ) -> dict[str, StreamReader]:
        """The reader of each Stream source, by its name.

        Args:
            sources: of the run.
            reports: whether this process logs what a stream waits for.
            agree: gives every rank the value of rank 0.
        """
        readers = {}
        for source in sources:
            if isinstance(source, Stream):
                folder = stream_dir(source, self.run_dir)
                buffer = self.buffer([str(folder)], source.name, live=True)
                readers[source.name] = StreamReader(source, folder, buffer, reports=reports, agree=agree)
        return readers
