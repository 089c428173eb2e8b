"""The block masks of packed prompt groups are those that flex_attention's own function makes."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from agro_lightning.models.packed_attention import block_mask


def visibility(size, seed, window):
    """Random segments with causal order inside each, and every third token seen by all that follow it."""
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(0, 2, (size,), generator=generator).cumsum(0) // 40
    positions = torch.arange(size)

    def sees(batch, head, q, k):
        gap = positions[q] - positions[k]
        near = (segments[q] == segments[k]) | (segments[k] % 3 == 0)
        return near & (gap >= 0) if window is None else near & (gap >= 0) & (gap < window)

    return sees


@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 1337])
def test_block_masks_equal_those_of_flex_attention(size, window):
    sees = visibility(size, size, window)
    ours = block_mask(sees, size, torch.device("cpu"))
    theirs = create_block_mask(sees, None, None, size, size, device="cpu")
    assert ours.shape == theirs.shape and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("kv_indices", "full_kv_indices", "q_indices", "full_q_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())
