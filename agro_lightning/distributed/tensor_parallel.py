"""Tensor parallelism: which linear layers are split by columns or rows, and the vocabulary-parallel head."""

import re

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

_STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    # norms of single heads: each rank has its heads, and the weight's gradient is summed over ranks
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}
"""Names in transformers' base_model_tp_plan, and what carries them out."""


def parallelize(lm: PreTrainedModel, mesh: DeviceMesh) -> ProcessGroup:
    """Splits attention, MLP, embedding and head over the ranks of the mesh, in place; returns their group.

    Args:
        lm: on the meta device, or with the same weights on all ranks.
        mesh: 1-D.

    Raises:
        ValueError: the architecture has no plan, one that is not carried out here, or heads that the ranks
            cannot share evenly.
    """
    plan = _plan(lm, mesh.size())
    decoder = lm.get_decoder()
    parallelize_module(decoder, mesh, plan)
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    assert isinstance(embedding, nn.Module) and isinstance(head, nn.Module)
    tied = head.weight is embedding.weight
    parallelize_module(
        embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
    )
    parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()))
    if tied:
        head.weight = embedding.weight
    return mesh.get_group()


def _plan(lm: PreTrainedModel, ranks: int) -> dict[str, ParallelStyle]:
    """The style of each decoder submodule, from the architecture's own plan."""
    name, config = type(lm).__name__, lm.get_decoder().config
    known = getattr(config, "base_model_tp_plan", None)
    if not known:
        raise ValueError(
            f"{name} has no tensor-parallel plan in transformers; set tensor_parallel_size: 1 and use "
            "data_parallel_size for all ranks"
        )
    heads = config.num_attention_heads
    for what, count in (
        ("attention", heads),
        ("key-value", getattr(config, "num_key_value_heads", None) or heads),
    ):
        if count % ranks:
            raise ValueError(
                f"tensor_parallel_size is {ranks}, which does not divide the {count} {what} heads of "
                f"{name}; give a divisor"
            )
    plan: dict[str, ParallelStyle] = {}
    for path, module in lm.get_decoder().named_modules():
        style = _style_of(path, known)
        if style is None:
            continue
        if style not in _STYLES or not isinstance(module, nn.Module):
            raise ValueError(
                f"{name}'s tensor-parallel plan asks for {style!r} at {path}; only "
                f"{', '.join(_STYLES)} are carried out here. Set tensor_parallel_size: 1"
            )
        plan[path] = _STYLES[style]()
    return plan


def _style_of(path: str, plan: dict[str, str]) -> str | None:
    for pattern, style in plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path):
            return style
    return None
