"""The private names of torch and agro_kernels that the estimate needs: where an upgrade looks."""

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from agro_kernels import _linear_logprobs as kernels

__all__ = [
    "CollectiveOp",
    "DataDependentOutputException",
    "FakeStore",
    "FakeTensor",
    "FakeTensorMode",
    "ShardingPropagator",
    "TorchDispatchMode",
    "collective_ops",
    "is_traceable_wrapper_subclass",
    "kernels",
    "unset_fake_temporarily",
]
