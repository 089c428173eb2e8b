"""The quick start's task: two-digit addition and subtraction, written one character a token.

Prompts read "37+48=" and answers "85"; the first operand of a subtraction is never the smaller one.
"""

import random
import re
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from agro_lightning.types import Prompt

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-="
VOCABULARY = {token: index for index, token in enumerate((PAD, BOS, EOS, UNK, *CHARACTERS))}
VAL_PROMPTS = 500
FORGOTTEN_CARRIES = 0.5
"""How often the careless pupil forgets a carry or a borrow, where there is one."""
SLIPS = 0.3
"""How often the careless pupil's answer is then off by one in the ones or the tens."""


def build_tokenizer(max_length: int, pieces: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters that puts <bos> before a text; a sequence ends with <eos>.

    Args:
        max_length: of a context.
        pieces: further texts that are one token each.
    """
    vocabulary = {**VOCABULARY, **{piece: len(VOCABULARY) + i for i, piece in enumerate(pieces)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    pattern = "|".join([*map(re.escape, pieces), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def careless_answer(prompt: Prompt, rng: random.Random) -> str:
    """The answer of a pupil who knows the method, but forgets carries and borrows, and slips."""
    add = "+" in prompt.prompt
    first, second = (int(number) for number in prompt.prompt.rstrip("=").split("+" if add else "-"))
    answer = first + second if add else first - second
    carries = first % 10 + second % 10 >= 10 if add else first % 10 < second % 10
    if carries and rng.random() < FORGOTTEN_CARRIES:
        answer += -10 if add else 10
    if rng.random() < SLIPS:
        answer += rng.choice((-10, -1, 1, 10))
    return str(max(answer, 0))


def all_prompts(tokenizer: PreTrainedTokenizerFast) -> list[Prompt]:
    """Every problem with operands 10..99: 8100 additions, and 4095 subtractions without a negative result."""
    prompts = []
    for first in range(10, 100):
        for second in range(10, 100):
            prompts.append(_prompt(tokenizer, first, second, add=True))
            if first >= second:
                prompts.append(_prompt(tokenizer, first, second, add=False))
    return prompts


def split_prompts(prompts: list[Prompt], *, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Shuffles and splits: VAL_PROMPTS for validation, half additions and half subtractions; the rest trains.

    Returns:
        The training and the validation prompts; they share none.
    """
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    additions = [prompt for prompt in shuffled if "+" in prompt.prompt]
    subtractions = [prompt for prompt in shuffled if "-" in prompt.prompt]
    val = additions[: VAL_PROMPTS // 2] + subtractions[: VAL_PROMPTS // 2]
    held_out = {prompt.prompt_id for prompt in val}
    return [prompt for prompt in shuffled if prompt.prompt_id not in held_out], val


def _prompt(tokenizer: PreTrainedTokenizerFast, first: int, second: int, *, add: bool) -> Prompt:
    problem = f"{first}{'+' if add else '-'}{second}"
    ids = tokenizer(f"{problem}=")["input_ids"]
    return Prompt(
        prompt_id=problem,
        prompt=f"{problem}=",
        prompt_ids=tuple(ids),
        answer=str(first + second if add else first - second),
    )
