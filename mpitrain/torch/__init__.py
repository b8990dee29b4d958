"""For PyTorch code that keeps its own training loop: a module's gradients reduced in memory that a node shares.

What stands here knows nothing of jobs and methods.  A module under those is `mpitrain.adapters.TorchModel`.
"""

from mpitrain._errors import MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise MissingExtraError(
        "PyTorch cannot be imported", operation="mpitrain.torch", got=str(error),
        remedy="pip install 'mpitrain[torch]'",
    ) from error  # fmt: skip

from mpitrain.torch.broadcast import broadcast_parameters
from mpitrain.torch.optimizer import DistributedOptimizer
from mpitrain.torch.sampler import DistributedSampler

__all__ = ["DistributedOptimizer", "DistributedSampler", "broadcast_parameters"]
