"""From gradients to new parameters: optimizers, learning-rate schedules, clipping."""

from mpitrain.optim.adam import Adam, AdamW
from mpitrain.optim.adaptive import AdaGrad, RMSprop
from mpitrain.optim.clipping import clip_value, finite, scale, squared_norm, squares_finite
from mpitrain.optim.elementwise import Elementwise
from mpitrain.optim.lamb import LAMB
from mpitrain.optim.optimizer import Optimizer, State
from mpitrain.optim.registry import OPTIMIZERS, make_optimizer
from mpitrain.optim.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Schedule,
    StepDecay,
    WarmUp,
    linear_scaling,
    make_schedule,
)
from mpitrain.optim.sgd import SGD, GradientDescent, Momentum, Nesterov
from mpitrain.optim.terms import Terms

__all__ = [
    "LAMB",
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "Elementwise",
    "GradientDescent",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "State",
    "StepDecay",
    "Terms",
    "WarmUp",
    "clip_value",
    "finite",
    "linear_scaling",
    "make_optimizer",
    "make_schedule",
    "scale",
    "squared_norm",
    "squares_finite",
]
