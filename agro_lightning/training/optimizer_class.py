"""The class that `model.optimizer.class_path` names, and whether it takes the options that are given."""

import difflib
import importlib.util
import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

LOWBIT = ("torchao", "bitsandbytes")
"""Packages of the extra `lowbit`."""
_REFUSED = {
    "LBFGS": "evaluates the loss several times a step",
    "SparseAdam": "takes sparse gradients alone",
}
_UNSHARDED = {
    "torch.optim.Adafactor": "keeps rows and columns of each whole matrix",
    "torch.optim.Rprop": "uses operators that torch does not have for shards",
    "bitsandbytes": "quantises blocks of whole tensors",
    "torchao": "was not tried on shards",
}
"""Optimisers that do not step shards, or their packages."""
_KEY = "model.optimizer.class_path"


def optimizer_class(path: str) -> type[Optimizer]:
    """The class by its import path; a name without dots is one of torch.optim.

    Raises:
        ImportError: its package is not installed; names the extra.
        ValueError: there is no such class, it is no optimiser, or it cannot step a policy.
    """
    module, _, name = (path if "." in path else f"torch.optim.{path}").rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if package in LOWBIT and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{_KEY} {path} needs {package}: pip install 'agro-lightning[lowbit]'"
            ) from None
        raise ValueError(f"{_KEY} is {path}; there is no module {error.name}. {_accepted(path)}") from None
    if found is None:
        owner = importlib.import_module(module)
        raise ValueError(f"{_KEY} is {path}; {module} has no {name}. {_accepted(name, owner)}")
    if not (inspect.isclass(found) and issubclass(found, Optimizer)) or found is Optimizer:
        raise ValueError(f"{_KEY} is {path}, which is no optimiser. {_accepted(name)}")
    if why := next((_REFUSED[name] for name in _torchs(found) if name in _REFUSED), None):
        raise ValueError(f"{_KEY} is {path}, which {why}; a policy cannot be trained with it")
    if "closure" not in inspect.signature(found.step).parameters:
        raise ValueError(
            f"{_KEY} is {path}, whose step takes no closure, and Lightning computes gradients in one. Write "
            "`def step(self, closure=None)` and call it first, with gradients enabled, where it is not None"
        )
    return found


def _torchs(kind: type[Optimizer]) -> list[str]:
    """Names of the classes of torch.optim that a class is, or is made from."""
    return [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.optim")]


def check_sharded(kind: type[Optimizer]) -> None:
    """Refuses under the strategy Sharded what steps whole parameters alone.

    Raises:
        ValueError: names the class, why, and what steps shards.
    """
    paths = [kind.__module__.partition(".")[0], *(f"torch.optim.{name}" for name in _torchs(kind))]
    if why := next((_UNSHARDED[path] for path in paths if path in _UNSHARDED), None):
        raise ValueError(
            f"{_KEY} is {kind.__name__}, which {why}, and the strategy Sharded splits parameters over "
            "ranks. Take AdamW, Muon, SGD or another of torch.optim, or train on one device"
        )


def lowbit_bytes(kind: type[Optimizer], sizes: Iterable[int]) -> int | None:
    """Bytes of the state that an optimiser of `lowbit` keeps; None for others, whose state any step makes.

    Both packages keep tensors below 4,096 elements in fp32, and a scale for each block of 256.

    Args:
        kind: the class, whose name says its bits.
        sizes: elements of each parameter.
    """
    if kind.__module__.partition(".")[0] not in LOWBIT:
        return None
    name = kind.__name__.lower().removeprefix("paged")
    states = 1 if name.startswith(("lion", "sgd", "rms", "adagrad")) else 2
    bits = 8 if re.search("8bit|fp8", name) else 4 if "4bit" in name else 32
    small = 4096
    return states * sum(n * 4 if n < small or bits == 32 else n * bits // 8 + n // 256 * 4 for n in sizes)


def _accepted(name: str, owner: Any = torch.optim) -> str:
    known = _optimizers(owner) or _optimizers(torch.optim)
    near = difflib.get_close_matches(name.rpartition(".")[2], known, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Give the import path of a torch.optim.Optimizer, or one of {', '.join(known)}"


def _optimizers(owner: Any) -> list[str]:
    found = [n for n, v in vars(owner).items() if inspect.isclass(v) and issubclass(v, Optimizer)]
    return sorted(set(found) - {"Optimizer", *_REFUSED})


def check_options(
    kind: type[Optimizer], given: dict[str, Any], where: str, everything: dict[str, Any]
) -> None:
    """Makes an optimiser of one small matrix, so that a wrong option is found before a model is loaded.

    Args:
        kind: the class.
        given: options, by the class's names.
        where: the key that they stand under.
        everything: all that the class would be made with.

    Raises:
        ValueError: an option that the class does not have, or a value that it refuses.
    """
    parameters = inspect.signature(kind).parameters
    known = [name for name in parameters if name not in ("self", "params")]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in given:
        if name not in known and not takes_any:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{where} has {name}, which {kind.__name__} does not take; {hint}")
    try:
        kind([nn.Parameter(torch.zeros(2, 2))], **everything)
    except Exception as error:  # whatever a class makes of values that it does not expect
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{where} does not suit {kind.__name__}: {words}; it has {given}") from error
