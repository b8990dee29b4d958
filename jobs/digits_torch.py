"""The PyTorch module that digits_torch.toml trains; needs the extra `torch`."""

from __future__ import annotations

from torch.nn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential


def build(channels: int) -> Sequential:
    """Return the module for images of 8 × 8 pixels; its initial values follow from the job's seed."""
    return Sequential(
        Conv2d(1, channels, 3, padding=1), ReLU(), Conv2d(channels, channels, 3, padding=1), ReLU(), MaxPool2d(2),
        Flatten(), Linear(16 * channels, 64), ReLU(), Linear(64, 10),
    )  # fmt: skip
