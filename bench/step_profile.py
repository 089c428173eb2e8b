"""Where the time of one training step goes on this machine: sampling, reference, attention, MLP, head.

The policy has the shape of SmolLM2-135M (30 layers, hidden size 576, vocabulary 49,152) and random weights. A
step samples completions with a cache, asks the reference (the same model, without gradients), makes the AGRO
loss of packed groups, its backward, and AdamW's update. Marks at the modules' inputs and outputs read the
clock in the forward and in the backward; `head` is everything between the last hidden state and the loss,
`rest` norms, embeddings and residuals. Medians over steps after a warm-up; `share` is of their sum. `--quick`
is a tiny model.
"""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from bench._records import emit, parser, record
from bench.agro_step import Case, Step

BENCH = "step_profile"
CASE, QUICK = "135M:2x8:64+64", "tiny:2x4:16+8"
Seconds = dict[str, float]


class Mark(torch.autograd.Function):
    """The identity; its backward adds the clock to a module's time, with the sign given."""

    @staticmethod
    def forward(ctx, x: Tensor, seconds: Seconds, name: str, sign: int) -> Tensor:
        ctx.parts = seconds, name, sign
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        seconds, name, sign = ctx.parts
        seconds[name] += sign * time.perf_counter()
        return grads[0], None, None, None


def watch(module: nn.Module, name: str, seconds: Seconds) -> None:
    """Adds the module's time to `seconds`, forward under its name, backward under `name:backward`."""

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        back = f"{name}:backward"
        if args:
            args = (Mark.apply(args[0], seconds, back, 1), *args[1:])
        elif "hidden_states" in kwargs:
            kwargs = kwargs | {"hidden_states": Mark.apply(kwargs["hidden_states"], seconds, back, 1)}
        seconds[name] -= time.perf_counter()
        return args, kwargs

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        seconds[name] += time.perf_counter()
        back = f"{name}:backward"
        if isinstance(output, Tensor):
            return Mark.apply(output, seconds, back, -1)
        if isinstance(output, tuple):
            return (Mark.apply(output[0], seconds, back, -1), *output[1:])
        output.last_hidden_state = Mark.apply(output.last_hidden_state, seconds, back, -1)
        return output

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def take(step: Step, seconds: Seconds, new_tokens: int) -> Seconds:
    """One step; the seconds of its parts."""
    ids, mask, left = step.padded
    seconds.clear()
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    with torch.no_grad():
        with step.policy.generating() as model:
            model.generate(
                ids[:, :left], attention_mask=mask[:, :left], do_sample=True, pad_token_id=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens,
            )  # fmt: skip
        found = {"sampling": lap()}
        step.policy.logprobs(step.batch)
        found["reference"] = lap()
    seconds.clear()
    loss = step.loss("ours")
    forward = lap()
    begun = clock[-1]
    loss.backward()
    backward = lap()
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=False)
    found["optimizer"] = lap()
    inner = {name: seconds[name] + seconds[f"{name}:backward"] for name in ("attention", "mlp")}
    # The backward reaches the last hidden state where the head's has ended.
    head = forward - seconds["backbone"] + (-seconds["backbone:backward"] - begun)
    return found | inner | {"head": head, "rest": forward + backward - head - sum(inner.values())}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=3, help="steps that count, after one that warms up")
    arguments.add_argument("--case", type=Case.parse, metavar="SIZE:GxN:P+C", help="another step")
    options = arguments.parse_args()
    case = options.case or Case.parse(QUICK if options.quick else CASE)
    step, seconds = Step(case, "cpu", torch.float32), defaultdict(float)
    for layer in step.policy.layers:
        watch(layer.self_attn, "attention", seconds)
        watch(layer.mlp, "mlp", seconds)
    watch(step.policy.decoder, "backbone", seconds)
    taken = [take(step, seconds, case.completion) for _ in range(options.steps + 1)][1:]
    medians = {name: statistics.median(item[name] for item in taken) for name in taken[0]}
    records = []
    for name, value in medians.items():
        records.append(record(BENCH, case.name, "ours", f"seconds/{name}", value, "s"))
        records.append(
            record(BENCH, case.name, "ours", f"share/{name}", value / sum(medians.values()), "ratio")
        )
    emit(records, options.json)


if __name__ == "__main__":
    main()
