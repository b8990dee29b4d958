"""The ``[method]`` and ``[train]`` sections: how the ranks work together, how long, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from threading import TIMEOUT_MAX  # 292 years on 64-bit Linux; a timer of more ends in an OverflowError
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from mpitrain._names import did_you_mean
from mpitrain.train.job.codec import CodecSection
from mpitrain.train.job.section import Count, NonNegative, PathText, Positive, Problem, Section, rejected

_BATCH_WORDS = 'integer ≥ 1 or "full"'
_LOWER_IS_BETTER = ("loss", "error", "mse", "mae", "perplexity")
_CUT_WORDS = '"counted", "measured" or array of ascending (integer ≥ 1)'


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value is an improvement: of losses, errors and lengths of codes, by the name."""
    return metric.endswith(_LOWER_IS_BETTER) or metric.startswith("bits_per_")


def _batch_size(value: Any) -> int | Literal["full"]:
    if value == "full":
        return "full"
    if type(value) is int and value >= 1:
        return value
    raise rejected(Problem("", "is not a batch size", value, _BATCH_WORDS))


def _cuts(value: Any) -> tuple[int, ...] | str:
    if isinstance(value, str) and value in ("counted", "measured"):
        return value
    if not isinstance(value, list | tuple):
        remedy = did_you_mean(value, ("counted", "measured")) if isinstance(value, str) else ""
        raise rejected(Problem("", "is not where a model can be cut", value, _CUT_WORDS, remedy))
    if any(type(each) is not int for each in value) or any(a >= b for a, b in pairwise((0, *value))):
        raise rejected(Problem("", "are not numbers of layers in ascending order", list(value), _CUT_WORDS))
    return tuple(value)


class MethodSection(Section):
    """How gradients become parameters on many ranks."""

    kind: Literal["data_parallel", "gradient", "pipeline"] = Field(
        "data_parallel",
        description="`data_parallel`: each rank computes a share of each batch by a replica of the model, its own or "
        "its node's. `gradient`: the same steps, with optimizer state, from stage 2 on gradients, and in stage 3 "
        "parameters, divided among the ranks. `pipeline`: each rank holds some of the layers, through which "
        "microbatches flow; so it is where `mesh.pipe` is more than 1, with `data_parallel`, and with `gradient`, "
        "which divides each stage's optimizer state over `mesh.data`.",
    )
    stage: int = Field(
        1,
        ge=1,
        le=3,
        description='Of `kind = "gradient"`: 1 divides the optimizer state, 2 the gradients too, 3 the parameters too; '
        "1 in a pipeline.",
    )
    schedule: Literal["gpipe", "1f1b", "interleaved", "zb-h1"] = Field(
        "1f1b", description="Of a pipeline: the order in which a rank computes its microbatches."
    )
    chunks: Count = Field(
        1, description='Of `schedule = "interleaved"`: stages of each rank; microbatches divide by the ranks.'
    )
    cuts: Annotated[Literal["counted", "measured"] | tuple[int, ...], PlainValidator(_cuts), _CUT_WORDS] = Field(
        "counted",
        description="Of a pipeline: where the model is cut into stages. `counted` and `measured` balance the work of "
        "its layers, counted from shapes, or timed by the ranks before training; an array has the number, from 0, of "
        "the first layer of each stage but the first.",
    )
    microbatches: Count = Field(
        1,
        description="Parts that a batch, or a lane of it, is computed in, one after the other: less memory. A pipeline "
        "needs several times as many as ranks; lanes count.",
    )
    bucket_bytes: Count = Field(
        4 << 20,
        description="Largest piece in which gradients are reduced, and in stage 3 parameters gathered; a codec, and "
        "stage 1, reduce all at once.",
    )
    average_every: int = Field(
        0,
        ge=0,
        description="0: gradients are reduced at each step. Else local SGD: each rank trains on its own and the models "
        "are averaged every so many steps.",
    )
    codec: CodecSection | None = None

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        divides, data_parallel = self.kind != "data_parallel", 'kind = "data_parallel"'
        if self.codec and self.average_every:
            what = "compresses gradients, which average_every > 0 does not send"
            yield Problem("codec.kind", what, self.codec.kind, "average_every = 0")
        if self.codec and divides:
            what = f'gives every rank all gradients, which kind = "{self.kind}" divides'
            yield Problem("codec.kind", what, self.codec.kind, data_parallel)
        if self.average_every and divides:
            what = f'averages whole models, of which kind = "{self.kind}" updates parts'
            yield Problem("average_every", what, self.average_every, data_parallel)
        if self.stage != 1 and self.kind != "gradient":
            what = f'says what is divided, which kind = "{self.kind}" does not'
            yield Problem("stage", what, self.stage, 'kind = "gradient"')
        if self.chunks != 1 and self.schedule != "interleaved":
            yield Problem("chunks", "are stages that only one schedule has", self.chunks, 'schedule = "interleaved"')


def _either(section: Section, first: str, second: str) -> Iterator[Problem]:
    """Yield a problem where both of two keys are given that exclude each other."""
    if getattr(section, first) is not None and getattr(section, second) is not None:
        yield Problem(second, f"cannot go together with {first}", getattr(section, second), "one of the two")


class Checkpoint(Section):
    """When the state is saved, and what is kept; it is saved in any case when training ends."""

    every_epochs: Count | None = Field(None, description="Epochs between two checkpoints; 1 if neither is given.")
    every_steps: Count | None = Field(None, description="Steps between two checkpoints.")
    keep: Count = Field(3, description="How many of the latest checkpoints are kept.")
    best: str = Field(
        "loss",
        min_length=1,
        description="Test metric whose best checkpoint is kept besides: `loss`, `accuracy`, `r2` …; the lowest if its "
        "name ends with `loss`, `error`, `mse`, `mae` or `perplexity`, or begins with `bits_per_`, else the highest. "
        "Only checkpoints of steps that are evaluated count.",
    )

    @model_validator(mode="before")
    @classmethod
    def _every_epoch_by_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and not {"every_epochs", "every_steps"} & set(value):
            return {"every_epochs": 1, **value}
        return value

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        yield from _either(self, "every_epochs", "every_steps")


class Target(Section):
    """A value of a test metric at which training ends."""

    metric: str = Field(min_length=1, description="Name of the metric, e.g. `accuracy`.")
    at_least: float | None = Field(None, description="Training ends when the metric is this or more.")
    at_most: float | None = Field(None, description="Training ends when the metric is this or less.")

    def reached(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether the metric has this value, or a better one."""
        value = metrics[self.metric]
        return bool(value <= self.at_most if self.at_least is None else value >= self.at_least)

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        yield from _either(self, "at_least", "at_most")
        if self.at_least is None and self.at_most is None:
            yield Problem("", "has no value", expected="at_least or at_most")


class Stop(Section):
    """What ends training before its last step."""

    target: Target | None = None
    metric: str = Field("loss", min_length=1, description="Test metric that `patience` watches.")
    patience: Count | None = Field(
        None, description="Convergence: how many evaluations may pass without an improvement of `metric`."
    )
    min_delta: NonNegative = Field(0.0, description="Smallest change that counts as an improvement.")
    wall_time_s: Annotated[Positive, Field(le=TIMEOUT_MAX)] | None = Field(
        None, description="Seconds after which training ends with a checkpoint."
    )

    @property
    def minimise(self) -> bool:
        """Whether a smaller `metric` is an improvement."""
        return lower_is_better(self.metric)


class Train(Section):
    """How long training takes, and when it is evaluated, logged, saved and ended."""

    batch_size: Annotated[int | Literal["full"], PlainValidator(_batch_size), _BATCH_WORDS] = Field(
        32, description="Samples of a step over all ranks; `full`: all of the training part."
    )
    epochs: Count | None = Field(None, description="Passes over the training part; either this or `steps`.")
    steps: Count | None = Field(None, description="Updates of the parameters; either this or `epochs`.")
    drop_last: bool = Field(False, description="Whether an epoch leaves out a last batch that is not full.")
    evaluate_every_epochs: Count | None = Field(
        None, description="Epochs between two evaluations; 1 if neither is given."
    )
    evaluate_every_steps: Count | None = Field(None, description="Steps between two evaluations.")
    log_every_steps: Count = Field(10, description="Steps between two records of the training loss.")
    warm_start: PathText | None = Field(
        None, description="Directory of a run whose weights training starts from; relative to the job file's folder."
    )
    checkpoint: Checkpoint = Checkpoint(every_epochs=1)
    stop: Stop = Stop()

    @model_validator(mode="before")
    @classmethod
    def _evaluate_every_epoch_by_default(cls, value: Any) -> Any:
        if isinstance(value, dict) and not {"evaluate_every_epochs", "evaluate_every_steps"} & set(value):
            return {"evaluate_every_epochs": 1, **value}
        return value

    def problems(self) -> Iterator[Problem]:
        """Yield what does not fit together."""
        yield from _either(self, "epochs", "steps")
        yield from _either(self, "evaluate_every_epochs", "evaluate_every_steps")
        if self.epochs is None and self.steps is None:
            yield Problem("epochs", "is missing", expected="epochs or steps")
