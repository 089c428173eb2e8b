"""The command `chat`: answers typed prompts with a run's policy, as the run's own prompts are answered."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, TextStreamer

from agro_lightning.checkpoints.trained import load_trained
from agro_lightning.data.buffer.tokenization import encode_prompts
from agro_lightning.data.chat import ChatWriter
from agro_lightning.data.prompts.dataset import PromptSettings
from agro_lightning.data.prompts.formats import FORMATS, PromptWriter
from agro_lightning.models.policy import Policy
from agro_lightning.models.pretrained import load_tokenizer
from agro_lightning.primitives.device import choose_device
from agro_lightning.primitives.quiet import without_progress_bars
from agro_lightning.rollout import Sampling
from agro_lightning.rollout.engines.hf_generate import HFGenerate

ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but tab and line feed."""


def chat(
    ckpt: str,
    reference: bool = False,
    prompts: PromptSettings = PromptSettings(path="typed"),  # noqa: B008 - settings, read by the command line
    chat: bool | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Answers prompts that are typed, or that come one a line on standard input, token by token.

    Each prompt is answered by itself, written and sampled as those of the run are: its config.yaml gives the
    prompts' template and the sampling where no option says otherwise.

    Args:
        ckpt: a run's folder, one of its checkpoints, or a model folder.
        reference: let the reference that the run was trained against answer, too.
        prompts: how prompts are written (template, system_prompt, ...); by default as in the run.
        chat: write them with the tokenizer's chat template; by default as the run does, and for a model
            folder where there is such a template.
        sampling: how answers are sampled; by default as in the run. An answer ends where the context does.
        seed: of the first answer; each prompt has the next one.
        device: where the policy runs; "auto" is the GPU if there is one.

    Raises:
        FileNotFoundError: no such run, checkpoint or model.
        ValueError: a checkpoint is damaged, a prompt too long, or a model folder is asked for its reference.
    """
    place = choose_device(device)
    with without_progress_bars():
        trained = load_trained(ckpt, device=place)
        other = trained.reference().policy.to(place) if reference else None
    path, trusted = trained.settings.path, trained.settings.trust_remote_code
    tokenizer = load_tokenizer(path, trust_remote_code=trusted)
    speakers = {"policy": _Speaker(trained.policy, tokenizer)}
    if other is not None:
        guard = other.adapters_off if other is trained.policy else nullcontext
        speakers["reference"] = _Speaker(other, tokenizer, guard)
    if chat is None:
        chat = tokenizer.chat_template is not None if trained.checkpoint is None else prompts.chat
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {path} has no chat template; give --chat false")
    room = trained.policy.max_positions
    count = failed = 0
    with _writer(replace(prompts, chat=chat), tokenizer) as write:
        for count, line in enumerate(_lines(), 1):
            try:
                ids = write(line)
                new = max(1, min(sampling.max_new_tokens, room - len(ids)))
                for name, speaker in speakers.items():
                    print(f"{name}: " if reference else "", end="", flush=True)
                    speaker.answer(ids, replace(sampling, max_new_tokens=new), seed + count - 1)
            except ValueError as error:
                failed += 1
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    if failed and not sys.stdin.isatty():
        raise ValueError(f"{failed} of {count} prompts could not be answered")


class _Printer(TextStreamer):
    """Prints an answer as it comes, without characters that a terminal would take for orders."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(ORDERS.sub("�", text), stream_end)


class _Speaker:
    """Answers with one policy, and prints the answer as it comes."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.engine, self.tokenizer, self.guard = HFGenerate(), tokenizer, guard
        self.engine.attach(policy, tokenizer)

    def answer(self, prompt_ids: Sequence[int], sampling: Sampling, seed: int) -> None:
        tokenizer: Any = self.tokenizer
        streamer = _Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with self.guard():
            made = self.engine.stream(prompt_ids, sampling, seed=seed, streamer=streamer)
        if made.finish_reason == "error":
            raise ValueError("the model's logits are not finite")


@contextmanager
def _writer(
    settings: PromptSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Callable[[str], list[int]]]:
    """Turns a typed prompt into the tokens that the run would make of it."""
    chat = ChatWriter(tokenizer, settings.chat_template_options) if settings.chat else None
    column = settings.prompt_column or FORMATS[settings.format].prompt_column
    writer = PromptWriter(
        prompt_column=column if "." not in column else "prompt",
        template=settings.template,
        system_prompt=settings.system_prompt,
        chat=chat,
        prefill=False,
    )

    def write(line: str) -> list[int]:
        text, _ = writer.write({writer.prompt_column: line})
        if chat is not None:
            return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return encode_prompts(tokenizer, [text])[0]

    with chat or nullcontext():
        yield write


def _lines() -> Iterator[str]:
    """What is typed, or the lines of standard input; empty ones are no prompts."""
    typed = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not typed and not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")
