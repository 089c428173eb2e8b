"""An engine that wants the weights from all ranks at once, as vLLM's does, and says when it got them."""

import sys

import torch.distributed as dist

from agro_lightning.rollout import BatchedDecoding
from agro_lightning.rollout.weight_sync import whole_weights


class GatheringEngine(BatchedDecoding):
    """BatchedDecoding behind a collective push of the weights."""

    def update_weights(self, policy_version: int) -> None:
        assert self._policy is not None
        whole_weights(self._policy)
        dist.barrier()
        sys.stderr.write(f"pushed {policy_version}\n")
