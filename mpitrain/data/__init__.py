"""Data: where samples come from, how they are split, who owns them, and which of them a step takes."""

from mpitrain.data.batches import Batches
from mpitrain.data.dataset import Dataset, Task
from mpitrain.data.loader import Loader, evaluation_batches
from mpitrain.data.partition import PARTITIONS, missing_classes, partition
from mpitrain.data.rows import Selection
from mpitrain.data.sampling import SAMPLINGS
from mpitrain.data.sources import DATASETS, load
from mpitrain.data.sources.inputs import read_inputs
from mpitrain.data.split import folds, split, split_end
from mpitrain.data.standardise import Scaling, Standardise
from mpitrain.data.tokenizer import Tokenizer, Unit

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "SAMPLINGS",
    "Batches",
    "Dataset",
    "Loader",
    "Scaling",
    "Selection",
    "Standardise",
    "Task",
    "Tokenizer",
    "Unit",
    "evaluation_batches",
    "folds",
    "load",
    "missing_classes",
    "partition",
    "read_inputs",
    "split",
    "split_end",
]
