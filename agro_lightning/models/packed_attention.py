"""Attention over packed prompt groups: each completion sees its group's prompt and itself, nothing else.

transformers looks its attention functions up by name; the one registered here, `packed_prompt_groups`, takes
a `packed_layout` that the policy passes through the model's forward. A group's prompt is thus computed once,
however many completions it has, and no padding enters any linear layer.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from agro_lightning.models.batch import TokenBatch
from agro_lightning.models.pieces import length_buckets

NAME = "packed_prompt_groups"
FLEX_BLOCK = 128
"""Tokens of one side of a block of flex_attention's masks."""
SMALL_BLOCK = 4096
"""Places of a dense block below which padding costs less than another block."""
_PASSIVE_OPTIONS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "is_causal",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",
    "logits_to_keep",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Queries of one kind (prompts, or completions) and the keys that they may see, as padded index
    tables."""

    queries: Int[Tensor, "rows queries"]
    keys: Int[Tensor, "rows keys"]
    visible: Bool[Tensor, "rows 1 queries keys"]

    def within(self, window: int, positions: Int[Tensor, " T"]) -> Bool[Tensor, "rows 1 queries keys"]:
        """What is visible and at most so many tokens away."""
        distance = positions[self.queries][:, None, :, None] - positions[self.keys][:, None, None]
        return self.visible & (distance < window)

    def to(self, device: torch.device) -> "_Block":
        return _Block(
            queries=self.queries.to(device),
            keys=self.keys.to(device),
            visible=self.visible.to(device),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayout:
    """Who sees whom in one packed row. Holds dense blocks on the CPU, or flex_attention's data on a GPU."""

    blocks: tuple[_Block, ...]
    inverse: Int[Tensor, " T"]
    """For each token, its place among the blocks' queries laid end to end."""
    segments: Int[Tensor, " T"]
    """2 * group for prompt tokens, 2 * sequence + 1 for those of a completion's sequence."""
    groups: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    flex: bool
    masks: dict[int | None, BlockMask]
    """flex_attention's block masks by sliding window, filled at first use and shared by all layers."""


def plan_layout(batch: TokenBatch, *, flex: bool) -> PackedLayout:
    """Plans the attention of a packed batch once for all layers.

    Args:
        batch: whole groups, as TokenBatch lays them out.
        flex: use flex_attention with block-sparse masks (GPUs, long sequences) instead of padded dense
            blocks.
    """
    device = batch.input_ids.device
    prompts, completions = batch.prompt_lengths, batch.completion_lengths
    group_of = batch.sequence_groups
    num_groups = prompts.numel()
    per_group = torch.zeros(num_groups, dtype=torch.long).index_add_(0, group_of, completions)
    starts = torch.cumsum(prompts + per_group, 0) - prompts - per_group
    within = torch.cumsum(completions, 0) - completions
    before = torch.cumsum(per_group, 0) - per_group
    completion_starts = (starts + prompts)[group_of] + within - before[group_of]

    order = torch.argsort(torch.cat([starts, completion_starts]), stable=True)
    lengths = torch.cat([prompts, completions])[order]
    segment_names = torch.cat([2 * torch.arange(num_groups), 2 * torch.arange(completions.numel()) + 1])[
        order
    ]
    group_names = torch.cat([torch.arange(num_groups), group_of])[order]
    segments = torch.repeat_interleave(segment_names, lengths).to(device)
    groups = torch.repeat_interleave(group_names, lengths).to(device)
    blocks: tuple[_Block, ...] = ()
    inverse = torch.empty(0, dtype=torch.long)
    if not flex:
        some = torch.nonzero(completions > 0).flatten()
        shorter = [torch.tensor(rows) for rows in length_buckets(prompts.tolist(), least=SMALL_BLOCK)]
        longer = [some[rows] for rows in length_buckets(completions[some].tolist(), least=SMALL_BLOCK)]
        blocks = tuple(_block(starts[rows], prompts[rows]) for rows in shorter)
        for rows in longer:
            owner = group_of[rows]
            blocks += (_block(completion_starts[rows], completions[rows], starts[owner], prompts[owner]),)
        real = [*(prompts[rows] for rows in shorter), *(completions[rows] for rows in longer)]
        inverse = _inverse(blocks, tuple(real), batch.num_tokens)
        blocks = tuple(block.to(device) for block in blocks)
    return PackedLayout(
        blocks=blocks,
        inverse=inverse.to(device),
        segments=segments,
        groups=groups,
        positions=batch.position_ids,
        flex=flex,
        masks={},
    )


def _inverse(blocks: tuple[_Block, ...], lengths: tuple[Tensor, ...], num_tokens: int) -> Tensor:
    """(T,) the place of each token among the blocks' queries laid end to end, their padding included."""
    inverse = torch.empty(num_tokens, dtype=torch.long)
    before = 0
    for block, real in zip(blocks, lengths, strict=False):
        kept = torch.arange(block.queries.shape[1])[None] < real[:, None]
        places = before + torch.arange(block.queries.numel()).view_as(block.queries)
        inverse[block.queries[kept]] = places[kept]
        before += block.queries.numel()
    return inverse


def _block(
    starts: Tensor, lengths: Tensor, prefix_starts: Tensor | None = None, prefix_lengths: Tensor | None = None
) -> _Block:
    """Rows of `lengths` queries from `starts`; each sees its prefix (a prompt), where there is one, and
    itself."""
    own = torch.arange(int(lengths.max()))
    queries = torch.where(own < lengths[:, None], starts[:, None] + own, starts[:, None])
    visible = (own[:, None] >= own) & (own < lengths[:, None, None])  # (rows, queries, own keys)
    keys = queries
    if prefix_starts is not None and prefix_lengths is not None:
        prefix = torch.arange(int(prefix_lengths.max()))
        inside = prefix < prefix_lengths[:, None]  # (rows, prefix keys)
        keys = torch.cat(
            [torch.where(inside, prefix_starts[:, None] + prefix, prefix_starts[:, None]), keys], 1
        )
        visible = torch.cat([inside[:, None].expand(-1, len(own), -1), visible], 2)
    return _Block(queries=queries, keys=keys, visible=visible[:, None])


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    heads, width, dtype = query.shape[1], value.shape[-1], query.dtype
    if not query.is_cuda and dtype.itemsize < 4:  # whose backward takes 5 times as long on a CPU
        query, key, value = query.float(), key.float(), value.float()
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, width)
    outputs = []
    for block in layout.blocks:
        q = query[block.queries].transpose(1, 2)  # (rows, heads, queries, width)
        k = key[block.keys].transpose(1, 2)
        v = value[block.keys].transpose(1, 2)
        visible = block.visible if window is None else block.within(window, layout.positions)
        if softcap is None:
            out = scaled_dot_product_attention(
                q, k, v, attn_mask=visible, scale=scaling, enable_gqa=k.shape[1] != q.shape[1]
            )
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
            scores = softcap * torch.tanh(scores / softcap)
            out = scores.float().masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype) @ v
        outputs.append(out.transpose(1, 2).reshape(-1, heads, width))
    return torch.cat(outputs)[layout.inverse][None].to(dtype)


def block_mask(sees: Callable[..., Tensor], size: int, device: torch.device) -> BlockMask:
    """What flex's create_block_mask gives for one row of `size` tokens, in a strip of queries at a time.

    That function, uncompiled, makes (T, T) tensors of integers: 10 GiB at 32,768 tokens.

    Args:
        sees: (batch, head, query, key) -> whether the query sees the key; takes index tensors.
        size: T.
        device: of the tensors that `sees` reads.
    """
    blocks, strip = -(-size // FLEX_BLOCK), 4 * FLEX_BLOCK
    keys = torch.arange(size, device=device)[None]
    counts = []
    for start in range(0, size, strip):
        queries = keys[0, start : start + strip, None]
        visible = sees(0, 0, queries, keys)
        rows = -(-visible.shape[0] // FLEX_BLOCK)
        padding = (0, blocks * FLEX_BLOCK - size, 0, rows * FLEX_BLOCK - visible.shape[0])
        padded = torch.nn.functional.pad(visible, padding)
        counts.append(padded.view(rows, FLEX_BLOCK, blocks, FLEX_BLOCK).sum((1, 3), dtype=torch.int32))
    pairs = torch.cat(counts)  # (blocks, blocks) pairs of tokens that see each other
    full = pairs == FLEX_BLOCK**2
    tables = [_listed(kind) for kind in ((pairs > 0) & ~full, full)]
    return BlockMask.from_kv_blocks(
        *tables[0], *tables[1], BLOCK_SIZE=FLEX_BLOCK, mask_mod=sees, seq_lengths=(size, size)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks are chosen for each query block, and which: they come first in its row."""
    indices = chosen.to(torch.int32).argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


@functools.cache
def _compiled_flex():
    return torch.compile(flex_attention, dynamic=True)


def _flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackedLayout,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if window not in layout.masks:
        segments, groups, positions = layout.segments, layout.groups, layout.positions

        def sees(batch, head, q, k):
            mine = (segments[q] == segments[k]) | ((segments[k] % 2 == 0) & (groups[q] == groups[k]))
            gap = positions[q] - positions[k]
            return mine & (gap >= 0) if window is None else mine & (gap >= 0) & (gap < window)

        layout.masks[window] = block_mask(sees, query.shape[2], query.device)

    # A tensor: the compiler makes a symbol of a float, and then cannot make the backward of `cap`.
    limit = None if softcap is None else torch.full((), softcap, device=query.device)

    def cap(score, batch, head, q, k):
        assert limit is not None
        return limit * torch.tanh(score / limit)

    attend = _compiled_flex() if query.is_cuda else flex_attention
    # The compiler's other kernel, for short rows, has no tile for 128 / heads per key head tokens and more.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True} if query.is_cuda else None
    out = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=layout.masks[window],
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        kernel_options=options,
    )
    return out.transpose(1, 2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: PackedLayout | None = None,
    **options,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer.

    Args:
        query, key, value: (1, heads, T, width); key and value may have fewer heads (grouped queries).
        packed_layout: who sees whom; the policy passes it to the model's forward.

    Returns:
        (1, T, heads, width), and no attention weights.

    Raises:
        ValueError: without a layout, or when the model asks for something this attention does not compute.
    """
    unknown = sorted(
        name for name, value in options.items() if value is not None and name not in _PASSIVE_OPTIONS
    )
    if packed_layout is None or unknown or dropout:
        asked = ", ".join(unknown) or ("dropout" if dropout else "no packed_layout")
        raise ValueError(
            f"{type(module).__name__} called attention {NAME!r} with {asked}; it computes causal "
            "attention with sliding windows and soft-capping only. Set `model.policy.packing: plain`"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings leave fp32
    if packed_layout.flex:
        return _flex_attention(query, key, value, packed_layout, scaling, sliding_window, softcap), None
    with torch.autocast(query.device.type, enabled=False):
        return _dense_attention(query, key, value, packed_layout, scaling, sliding_window, softcap), None


AttentionInterface.register(NAME, packed_attention)
