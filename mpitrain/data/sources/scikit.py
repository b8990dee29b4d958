"""The small real data sets that scikit-learn carries."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mpitrain._errors import MissingExtraError
from mpitrain._typing import Array
from mpitrain.data.dataset import Dataset


def digits(*, flat: bool = False) -> Dataset:
    """Return 1,797 handwritten digits: float32 images (n, 8, 8, 1), or (n, 64) if ``flat``, scaled to [0, 1]."""
    found = _bunch("digits")
    images = (found.images / 16).astype(np.float32)  # sixteenths: exact in float32
    inputs = images.reshape(-1, 64) if flat else images[..., np.newaxis]
    return Dataset(inputs, found.target, "classification", "digits", class_names=_names(found.target_names))


def breast_cancer() -> Dataset:
    """Return the Wisconsin breast cancer set: 569 rows of 30 features, 2 classes."""
    return _table("breast_cancer", "classification")


def wine() -> Dataset:
    """Return the wine set: 178 rows of 13 features, 3 classes."""
    return _table("wine", "classification")


def diabetes() -> Dataset:
    """Return the diabetes set: 442 rows of 10 features in their own units, one quantity to predict."""
    return _table("diabetes", "regression", scaled=False)


def _table(name: str, task: Literal["classification", "regression"], **options: Any) -> Dataset:
    found = _bunch(name, **options)
    features = _names(found.feature_names)
    if task == "regression":
        return Dataset(found.data, found.target[:, np.newaxis], task, name, feature_names=features)
    return Dataset(found.data, found.target, task, name, _names(found.target_names), features)


def _names(names: Array) -> tuple[str, ...]:
    return tuple(str(name) for name in names)


def _bunch(name: str, **options: Any) -> Any:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingExtraError(
            f"the data set {name!r} comes with scikit-learn, which cannot be imported", got=str(error),
            remedy="pip install 'mpitrain[datasets]'",
        ) from error  # fmt: skip
    return getattr(datasets, f"load_{name}")(**options)
