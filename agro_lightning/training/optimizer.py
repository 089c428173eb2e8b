"""Which optimiser steps which parameters, and how the learning rate goes: the settings `model.optimizer`."""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from agro_lightning.training.optimizer_class import check_options, optimizer_class
from agro_lightning.training.two_optimizers import TwoOptimizers

ADAMW = "torch.optim.AdamW"
_OURS = {"learning_rate": "lr", "betas": "betas", "weight_decay": "weight_decay"}
"""Settings that are options of the class too, by torch's name."""


@dataclass(kw_only=True)
class ParameterGroup:
    """Parameters, found by their names, that are stepped with options of their own."""

    pattern: str
    """Regular expression that is searched in each parameter's name as `from_pretrained` knows it
    (`model.layers.0.input_layernorm.weight`); the first group whose pattern is found takes the parameter."""
    learning_rate: float | None = None
    """Peak learning rate of the group; null: that of the optimiser."""
    weight_decay: float | None = None
    """Weight decay of the group; null: that of the optimiser."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the class for this group, such as betas."""

    def given(self) -> dict[str, Any]:
        """What the group sets, by torch's names."""
        given = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        return {name: value for name, value in given.items() if value is not None} | plain(self.options)


class Bucket(NamedTuple):
    """Parameters of one class and one pattern."""

    kind: type[Optimizer]
    group: ParameterGroup | None
    parameters: dict[str, nn.Parameter]


@dataclass(kw_only=True)
class OptimizerSettings:
    """The optimiser, its options and its schedule; AdamW where nothing else is said."""

    class_path: str = ADAMW
    """An optimiser of torch.optim (short names do), of torchao or bitsandbytes (extra `lowbit`), or your own.

    Muon steps the matrices within the layers; embeddings, head and all parameters that are not matrices go to
    AdamW, at the same learning rate."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Further options of the class. Adam, AdamW and SGD are `fused` where parameters are on a GPU. Muon's
    adjust_lr_fn is match_rms_adamw here, so that one learning rate does for both its parts."""
    groups: list[ParameterGroup] = field(default_factory=list)
    """Parameters with options of their own; the others have those above."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and square, and those of other classes that have `betas`."""
    weight_decay: float = 0.0
    """Weight decay, decoupled in AdamW."""
    warmup_steps: int = 10
    """Optimiser steps over which the rate rises linearly."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: stay, or fall to final_fraction of the peak at trainer.max_steps."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        for name, right, accepted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers of at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("final_fraction", 0 <= self.final_fraction <= 1, "from 0 to 1"),
        ):
            if not right:
                raise ValueError(f"model.optimizer.{name} is {getattr(self, name)}; it must be {accepted}")
        kind, where = optimizer_class(self.class_path), "model.optimizer.init_args"
        self._refuse_twice(kind)
        check_options(kind, plain(self.init_args), where, self.options(kind))
        for place, group in enumerate(self.groups):
            where = f"model.optimizer.groups[{place}]"
            try:
                re.compile(group.pattern)
            except re.error as error:
                raise ValueError(
                    f"{where}.pattern {group.pattern!r} is no regular expression: {error}"
                ) from None
            for part in {kind, *([AdamW] if issubclass(kind, Muon) and not group.options else [])}:
                check_options(part, group.given(), where, self.options(part) | group.given())

    def _refuse_twice(self, kind: type[Optimizer]) -> None:
        """Refuses what settings and init_args say differently, and what the class does not have."""
        accepted = inspect.signature(kind).parameters
        for name, option in _OURS.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            given = plain(self.init_args).get(option, value)
            if value != default and given != value:
                raise ValueError(
                    f"model.optimizer.{name} is {value} and init_args.{option} is {given}; give one of them"
                )
            if value != default and option not in accepted and not issubclass(kind, Muon):
                raise ValueError(
                    f"model.optimizer.{name} is {value}, and {kind.__name__} has no {option}; leave it out"
                )

    @property
    def peak(self) -> float:
        """The highest learning rate of parameters in no group."""
        return float(self.init_args.get("lr", self.learning_rate))

    def options(self, kind: type[Optimizer], *, on_gpu: bool = False) -> dict[str, Any]:
        """What the class is made with."""
        accepted = inspect.signature(kind).parameters
        found = {option: getattr(self, name) for name, option in _OURS.items() if option in accepted}
        chosen, own = optimizer_class(self.class_path), plain(self.init_args)
        if kind is not chosen:  # AdamW beside Muon
            own = {name: value for name, value in own.items() if name in _OURS.values()}
        if not {"fused", "foreach"} & own.keys():
            if on_gpu and kind in (Adam, AdamW, SGD):  # those with a GPU kernel
                found["fused"] = True
            elif "foreach" in accepted:
                found |= {"foreach": True} | ({"fused": False} if "fused" in accepted else {})
        if issubclass(kind, Muon):
            found["adjust_lr_fn"] = "match_rms_adamw"
        return found | own

    def factor(self, step: int, total: int) -> float:
        """The learning rate at `step`, as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, total - self.warmup_steps))
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * done))

    # ------------------------------------------------------------------ who steps what

    def plan(self, parameters: Mapping[str, nn.Parameter], ends: Iterable[nn.Parameter] = ()) -> list[Bucket]:
        """The trained parameters, in the order in which the optimiser holds them.

        Args:
            parameters: by transformers' names.
            ends: weights of embedding and head, which Muon leaves to AdamW.

        Raises:
            ValueError: a pattern finds nothing, or only what groups before it have taken.
        """
        kind, outside = optimizer_class(self.class_path), {id(parameter) for parameter in ends}
        kinds = [kind, AdamW] if issubclass(kind, Muon) else [kind]
        buckets = {
            (part, place): Bucket(part, group, {})
            for part in kinds
            for place, group in [(-1, None), *enumerate(self.groups)]
        }
        found = Counter[int]()
        for name, parameter in parameters.items():
            if not parameter.requires_grad:
                continue
            fitting = [i for i, group in enumerate(self.groups) if re.search(group.pattern, name)]
            found.update(fitting)
            part = kinds[-1] if parameter.dim() != 2 or id(parameter) in outside else kind
            buckets[part, fitting[0] if fitting else -1].parameters[name] = parameter
        for place, group in enumerate(self.groups):
            if not any(buckets[part, place].parameters for part in kinds):
                trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
                why = (
                    "finds only parameters that the groups before it have taken; put it first"
                    if found[place]
                    else "is found in no trained parameter's name; names are such as "
                    + ", ".join(_some(trained))
                )
                raise ValueError(f"model.optimizer.groups[{place}].pattern {group.pattern!r} {why}")
        return [bucket for bucket in buckets.values() if bucket.parameters]

    def optimizer(
        self, buckets: list[Bucket], total: Callable[[], int], *, on_gpu: bool = False
    ) -> tuple[Optimizer, LambdaLR]:
        """The optimiser and its schedule over `total` steps, which is asked at each step."""
        made: list[Optimizer] = []
        for kind in dict.fromkeys(bucket.kind for bucket in buckets):
            groups = [
                {"params": list(b.parameters.values()), **({} if b.group is None else b.group.given())}
                for b in buckets
                if b.kind is kind
            ]
            made.append(kind(groups, **self.options(kind, on_gpu=on_gpu)))
        optimizer = made[0] if len(made) == 1 else TwoOptimizers(*made)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, total()))

    def take_over(self, schedule: LambdaLR, buckets: list[Bucket], *, on_gpu: bool = False) -> None:
        """Puts these settings in the place of those that came with a checkpoint's optimiser."""
        fresh, _ = self.optimizer(buckets, lambda: 1, on_gpu=on_gpu)
        factor = schedule.lr_lambdas[0](schedule.last_epoch)
        schedule.base_lrs = [group["initial_lr"] for group in fresh.param_groups]
        for group, now in zip(schedule.optimizer.param_groups, fresh.param_groups, strict=True):
            now = {name: value for name, value in now.items() if name != "params"}
            group.update(now, lr=now["initial_lr"] * factor)


def describe(buckets: list[Bucket]) -> list[dict[str, Any]]:
    """What a checkpoint says of its optimiser: its state fits one of the same description alone."""
    return [
        {
            "class": f"{bucket.kind.__module__}.{bucket.kind.__qualname__}",
            "pattern": None if bucket.group is None else bucket.group.pattern,
            "parameters": len(bucket.parameters),
            "elements": sum(parameter.numel() for parameter in bucket.parameters.values()),
        }
        for bucket in buckets
    ]


def in_words(described: list[dict[str, Any]]) -> str:
    """A description for a reader: class, pattern, and how much each part steps."""
    return ", ".join(
        f"{part['class'].rpartition('.')[2]} on {part['parameters']} tensors "
        + (f"found by {part['pattern']!r} " if part["pattern"] is not None else "")
        + f"({part['elements']:,} elements)"
        for part in described
    )


def check_same(saved: list[dict[str, Any]] | None, now: list[dict[str, Any]]) -> None:
    """Refuses to go on with the state of another optimiser.

    Args:
        saved: the checkpoint's description; None from before there was any other than one group of AdamW.
        now: this run's.

    Raises:
        ValueError: names both.
    """
    adamw = f"{AdamW.__module__}.{AdamW.__qualname__}"
    same = saved == now if saved is not None else [part["class"] for part in now] == [adamw]
    if not same:
        before = "AdamW on all parameters" if saved is None else in_words(saved)
        raise ValueError(
            f"the checkpoint's optimiser is {before}; this run's is {in_words(now)}. Set model.optimizer's "
            "class_path and groups as they were, or export the checkpoint and start a new run from the model"
        )


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with tuples for lists, as torch keeps them."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}


def _some(names: list[str]) -> list[str]:
    """The names of the first layer, and what is outside of layers: each kind once."""
    kinds = {re.sub(r"\d+", "*", name): name for name in reversed(names)}
    return list(reversed(kinds.values()))[:12]
