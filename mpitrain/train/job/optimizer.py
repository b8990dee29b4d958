"""The ``[optimizer]`` section: the update rule with its hyperparameters, the learning rate's course, and clipping."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from mpitrain.train.job.section import (
    Count,
    Fraction,
    KindSection,
    NonNegative,
    Positive,
)


class Schedule(KindSection):
    """How the learning rate changes over the steps; after a linear warm-up, if there is one."""

    not_options: ClassVar[frozenset[str]] = frozenset({"kind", "scale_with_batch_from"})

    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate first rises linearly to `lr`.")
    warmup_start: Fraction = Field(0.0, description="Where the rise starts, as a fraction of `lr`.")
    scale_with_batch_from: Count | None = Field(
        None,
        description="The linear-scaling rule: the batch size that `lr` is meant for; the rate is multiplied by the "
        "batch size over this one.",
    )


class Constant(Schedule):
    """The learning rate stays as it is."""

    kind: Literal["constant"]


class Step(Schedule):
    """The learning rate is multiplied by `factor` every `every` steps."""

    kind: Literal["step"]
    every: Count = Field(description="Steps between two changes.")
    factor: float = Field(0.1, gt=0, le=1, description="What the rate is multiplied by.")


class Cosine(Schedule):
    """The learning rate falls along half a cosine, whose end comes one step after the last, as in PyTorch."""

    kind: Literal["cosine"]
    final: Fraction = Field(0.0, description="Where the cosine ends, as a fraction of the highest rate.")


def _constant_by_default(value: Any) -> Any:
    return {"kind": "constant", **value} if isinstance(value, dict) else value


ScheduleSection = Annotated[
    Constant | Step | Cosine, Field(discriminator="kind"), BeforeValidator(_constant_by_default)
]


class Optimizer(KindSection):
    """How gradients change the parameters."""

    not_options: ClassVar[frozenset[str]] = frozenset({"kind", "lr", "schedule", "clip_norm", "clip_value"})

    lr: Positive
    weight_decay: NonNegative = Field(0.0, description="Strength of the decay; biases and norms do not decay.")
    clip_norm: Positive | None = Field(None, description="Largest global norm of the gradient; a longer one is scaled.")
    clip_value: Positive | None = Field(None, description="Largest size of any element of the gradient.")
    schedule: ScheduleSection = Constant(kind="constant")


Betas = Annotated[tuple[Fraction, Fraction], Field(strict=False)]
Epsilon = Annotated[float, Field(ge=1e-30)]


def _lr(default: float) -> Any:
    return Field(default, description="Learning rate.")


def _eps(default: float) -> Any:
    return Field(default, description="Keeps the denominator from zero.")


_DECOUPLED = "Strength of the decay, decoupled from the gradient; biases and norms do not decay."


class Gd(Optimizer):
    """Gradient descent on the full batch."""

    kind: Literal["gd"]
    lr: Positive = _lr(0.1)


class Sgd(Optimizer):
    """Stochastic gradient descent."""

    kind: Literal["sgd"]
    lr: Positive = _lr(0.1)


class Momentum(Optimizer):
    """Stochastic gradient descent with heavy-ball momentum."""

    kind: Literal["momentum"]
    lr: Positive = _lr(0.05)
    momentum: Fraction = Field(0.9, description="Fraction of the velocity that is kept.")


class Nesterov(Optimizer):
    """Stochastic gradient descent with Nesterov's momentum."""

    kind: Literal["nesterov"]
    lr: Positive = _lr(0.05)
    momentum: float = Field(0.9, gt=0, lt=1, description="Fraction of the velocity that is kept.")


class Adagrad(Optimizer):
    """AdaGrad: each element's rate falls with the squares of its gradients."""

    kind: Literal["adagrad"]
    lr: Positive = _lr(0.01)
    eps: Epsilon = _eps(1e-10)


class Rmsprop(Optimizer):
    """RMSprop: each gradient over a running root mean square."""

    kind: Literal["rmsprop"]
    lr: Positive = _lr(0.001)
    alpha: Fraction = Field(0.99, description="Fraction of the running mean square that is kept.")
    eps: Epsilon = _eps(1e-8)


class _AdamLike(Optimizer):
    lr: Positive = _lr(0.001)
    betas: Betas = Field((0.9, 0.999), description="Fractions of the running mean and mean square that are kept.")
    eps: Epsilon = _eps(1e-8)


class Adam(_AdamLike):
    """Adam."""

    kind: Literal["adam"]


class AdamW(_AdamLike):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"]
    weight_decay: NonNegative = Field(0.01, description=_DECOUPLED)


class Lamb(_AdamLike):
    """LAMB: Adam's step, scaled for each tensor by the norm of its weights."""

    kind: Literal["lamb"]
    eps: Epsilon = _eps(1e-6)
    weight_decay: NonNegative = Field(0.01, description=_DECOUPLED)
    adapt: Literal["decay", "trained"] = Field(
        "decay", description="Which tensors are scaled: those that decay (no biases and norms), or all."
    )


OptimizerSection = Annotated[
    Gd | Sgd | Momentum | Nesterov | Adagrad | Rmsprop | Adam | AdamW | Lamb, Field(discriminator="kind")
]
