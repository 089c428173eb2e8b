"""The command `import`: another tool's logs become a buffer."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from agro_lightning.data.buffer.schema import tokenizer_id
from agro_lightning.data.buffer.writer import append_rollouts
from agro_lightning.data.chat import ChatWriter
from agro_lightning.data.logs.importing import ImportedLogs, import_logs
from agro_lightning.data.logs.reading import FormName
from agro_lightning.data.logs.tokens import LogTokens
from agro_lightning.data.prompts.formats import PromptWriter, check_template
from agro_lightning.models.pretrained import load_tokenizer, vocabulary_size
from agro_lightning.primitives.atomic_files import atomic_path


def import_log(
    source: str | list[str],
    out: str,
    policy: str = "quickstart",
    form: FormName | None = None,
    reward: str | None = None,
    chat: bool = False,
    template: str = "{prompt}",
    system_prompt: str | None = None,
    chat_template_options: dict[str, Any] | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
    on_bad_row: Literal["error", "drop"] = "error",
    on_bad_file: Literal["error", "skip"] = "error",
    trust_remote_code: bool = False,
) -> None:
    """Turns another tool's logs into a buffer to train on.

    It reads verifiers' traces.jsonl and OpenEnv's training traces (token ids as they were sampled), chats
    in OpenAI's form, inspect-ai's .eval, lm-eval's samples_*.jsonl, and graded answers in plain JSONL. Of
    several turns, those that the policy wrote are trained on. With --on_bad_row drop, what is refused is
    written beside the buffer, with file, row and reason.

    Args:
        source: a file, a folder, a glob, or a list of such.
        out: the buffer's file, which must end in .parquet.
        policy: the run's model folder or hub id, or "quickstart"; its tokenizer and chat template are used.
        form: what the logs are; by default told by each file's first row.
        reward: which of the log's numbers is the reward, as it is called there (`is_correct`, `metrics.f1`,
            `exact_match,strict-match`); by default reward, score, is_correct, correct or passed, or the only
            one. "none": rows without a reward, for a source with `score: true`.
        chat: data.train.chat of the run: whether prompts that are one text go through the chat template.
            Logged chats always do.
        template: data.train.template of the run, for prompts that are one text.
        system_prompt: data.train.system_prompt of the run, for prompts that are one text.
        chat_template_options: data.train.chat_template_options of the run.
        max_prompt_tokens: refuse longer prompts.
        max_completion_tokens: refuse longer completions.
        on_bad_row: what happens to a row that cannot be used: "error", or "drop" (written down and counted).
        on_bad_file: what happens to a torn or foreign file: "error", or "skip" (written down and counted).
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ValueError: a row or file that cannot be used (named), or none that can.
    """
    target, sources = Path(out), [source] if isinstance(source, str) else source
    if target.suffix != ".parquet" or target.name.startswith((".", "_")):
        raise ValueError(
            f"out is {out!r}; a file name that ends in .parquet is needed, not starting with . or _"
        )
    check_template(template)
    tokenizer = load_tokenizer(policy, trust_remote_code=trust_remote_code)
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError(f"the tokenizer of {policy} has no EOS token, with which completions end; set one")
    if chat and not tokenizer.chat_template:
        raise ValueError(f"chat is true, but the tokenizer of {policy} has no chat template")
    with ChatWriter(tokenizer, chat_template_options) as chats:
        tokens = LogTokens(
            tokenizer=tokenizer,
            vocab_size=vocabulary_size(policy, trust_remote_code=trust_remote_code),
            chats=chats,
            texts=PromptWriter(
                prompt_column="prompt",
                template=template,
                system_prompt=system_prompt,
                chat=chats if chat else None,
                prefill=False,
            ),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
        )
        found = import_logs(
            sources,
            tokens,
            form=form,
            reward=reward,
            strict_rows=on_bad_row == "error",
            strict_files=on_bad_file == "error",
        )
    path = append_rollouts(
        target.parent,
        found.prompt_groups,
        name=target.stem,
        tokenizer_id=tokenizer_id(tokenizer),
        unscored=True,
    )
    print(_report(found, path, _write_refused(found, path)))


def _write_refused(found: ImportedLogs, path: Path) -> Path | None:
    """A file beside the buffer that no buffer reads, with a line for everything that was refused."""
    if not found.refused:
        return None
    beside = path.with_name(f"_refused_{path.stem}.jsonl")
    with atomic_path(beside) as aside:
        aside.write_text("".join(f"{json.dumps(asdict(refusal))}\n" for refusal in found.refused))
    return beside


def _report(found: ImportedLogs, path: Path, refused: Path | None) -> str:
    """What became of the logs, in words."""
    groups = found.prompt_groups
    rows = [completion for group in groups for completion in group.completions]
    rewards = np.array([row.reward for row in rows])
    forms = ", ".join(f"{count} {form}" for form, count in sorted(Counter(found.forms.values()).items()))
    scored = rewards[~np.isnan(rewards)]
    mean = (
        f"mean reward {scored.mean():.3f}"
        if len(scored)
        else "without rewards: set score: true on its source"
    )
    lines = [f"{len(rows)} rows of {len(groups)} prompts from {len(found.forms)} files ({forms}), {mean}"]
    if turns := sum(row.policy_mask is not None for row in rows):
        lines.append(
            f"{turns} rows have tokens that the policy did not choose; they are read and not trained on"
        )
    if singles := sum(len(group) == 1 for group in groups):
        lines.append(
            f"{singles} prompts have one row: alone they train nothing (on_bad_row: drop leaves them out); "
            "with data.mixing within_group they join live completions of the same prompt"
        )
    lines += [f"passed over: {count} {what}" for what, count in sorted(found.passed_over.items())]
    if refused is not None:
        reasons = Counter(refusal.reason for refusal in found.refused)
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        first = found.refused[0]
        place = first.file if first.row is None else f"{first.file}: row {first.row}"
        lines.append(
            f"refused: {len(found.refused)} ({counts}), listed in {refused}; "
            f"the first: {place}: {first.message}"
        )
    return "\n".join([*lines, f"wrote {path}; look at it: python -m agro_lightning inspect {path}"])
