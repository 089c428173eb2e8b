"""TRL's side of the race: `python -m bench._trl_peer TASK`, in TRL's environment."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from bench._trl_task import Reporter, Task, greedy_accuracy, parity, rows


class Phases:
    """Seconds of each phase, by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._backward_ended = 0.0

    def wrap(self, owner: Any, method: str, name: Callable[..., str]) -> None:
        """Times a method of an object."""
        inner = getattr(owner, method)

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.lap(name(*arguments)):
                return inner(*arguments, **options)

        setattr(owner, method, timed)

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self._now[name] += end - start
        if name == "backward":
            self._backward_ended = end

    def end_step(self) -> None:
        self._now["optimizer"] = time.perf_counter() - self._backward_ended
        self.steps.append(dict(self._now))
        self._now.clear()


class LockStep(TrainerCallback):
    """Reports each step, and waits between blocks."""

    def __init__(self, reporter: Reporter, phases: Phases, grade: Callable[[], float]) -> None:
        self.reporter, self.phases, self.grade = reporter, phases, grade

    def on_train_begin(self, *arguments: Any, **options: Any) -> None:
        self.reporter.wait(self.grade)

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        self.phases.end_step()
        self.reporter.stepped(self.grade)


def settings(task: Task) -> dict[str, Any]:
    """The arguments that both of TRL's trainers take."""
    return dict(
        output_dir=task.folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=task.prompts * task.group_size,
        num_generations=task.group_size,
        max_completion_length=task.max_new_tokens,
        max_steps=task.steps,
        temperature=1.0,
        beta=task.beta,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        weight_decay=0.0,
        max_grad_norm=task.clip,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        seed=task.seed,
    )


def main() -> None:
    task = Task.from_json(sys.argv[1])
    reporter = Reporter(task)
    tokenizer = AutoTokenizer.from_pretrained(task.policy)
    lm = AutoModelForCausalLM.from_pretrained(task.policy, dtype=torch.float32)
    validation = rows(task.validation)

    def reward(completions: list[str], answer: list[str], **fields: Any) -> list[float]:
        if task.reward == "parity":
            return parity(completions)
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    phases = Phases()
    grade = lambda: greedy_accuracy(trainer.model, tokenizer, validation, task.max_new_tokens)  # noqa: E731
    kind, config = (
        (RLOOTrainer, RLOOConfig(**settings(task)))
        if task.objective == "rloo"
        else (GRPOTrainer, GRPOConfig(**settings(task), loss_type="grpo"))
    )
    trainer = kind(
        model=lm,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows(task.train)),
        processing_class=tokenizer,
        callbacks=[LockStep(reporter, phases, grade)],
    )

    def logprobs_of(model: Any, *arguments: Any) -> str:
        if torch.is_grad_enabled():
            return "forward_head"  # a part of compute_loss
        return "reference" if model is trainer.ref_model else "behavior"

    phases.wrap(trainer, "_generate", lambda *_: "generate")
    phases.wrap(trainer, "_calculate_rewards", lambda *_: "score")
    phases.wrap(trainer, "_get_per_token_logps_and_entropies", logprobs_of)
    phases.wrap(trainer, "compute_loss", lambda *_: "forward")
    phases.wrap(trainer.accelerator, "backward", lambda *_: "backward")
    trainer.train()
    names = sorted({name for step in phases.steps for name in step} - {"forward_head"})
    size, logged = task.prompts * task.group_size, trainer.state.log_history
    lengths = [entry[name] for entry in logged if (name := "completions/mean_length") in entry]
    reporter.finish(
        {name: [step.get(name, 0.0) for step in phases.steps] for name in names},
        [length * size for length in lengths],
    )


if __name__ == "__main__":
    main()
