"""Models of other libraries under the contract of `mpitrain.nn.Model`, so that any method trains them.

The libraries are imported when an adapter is first asked for.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mpitrain._errors import MissingExtraError

if TYPE_CHECKING:
    from mpitrain.adapters.jax_model import JaxModel
    from mpitrain.adapters.torch_loss import TorchLoss
    from mpitrain.adapters.torch_model import TorchModel
    from mpitrain.adapters.torch_random import seeded

_HOMES = {
    "JaxModel": ("jax_model", "jax"),
    "TorchLoss": ("torch_loss", "torch"),
    "TorchModel": ("torch_model", "torch"),
    "seeded": ("torch_random", "torch"),
}

__all__ = ["JaxModel", "TorchLoss", "TorchModel", "is_torch_module", "seeded"]


def is_torch_module(x: object) -> bool:
    """Tell whether ``x`` is a PyTorch module; PyTorch is not imported, for who has one has imported it."""
    module = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", None)
    return module is not None and isinstance(x, module)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpitrain.adapters' has no attribute {name!r}")
    home, extra = _HOMES[name]
    try:
        return getattr(import_module(f"mpitrain.adapters.{home}"), name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} needs a library that is not there", operation="mpitrain.adapters", got=str(error),
            remedy=f"pip install 'mpitrain[{extra}]'",
        ) from error  # fmt: skip
