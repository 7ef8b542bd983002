"""A model file as an estimator, in the units of the columns that it was fitted on.

z = (W (x − mean)/scale + b)/T = (W′ x + b′)/T        W′ = W/scale,  b′ = b − W′ mean
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.validation import check_array

from xent.data import model_file
from xent.data.model_file import Model
from xent.data.rows import blocks
from xent.linear_model.frames import FrameEncoder, features_of, is_frame
from xent.linear_model.inputs import read_features
from xent.linear_model.softmax_regression import FLOATING, SoftmaxRegression

PARAMETERS = ("fit_intercept", "class_weight", "tol", "max_iter", "solver", "stopping")
"""Parameters of an estimator, beside its strength, that a file tells of."""


class LoadedModel(SoftmaxRegression):
    """A ``SoftmaxRegression`` that was read from a file; see :func:`load_model`."""

    _model: Model | None = None
    _path: Path

    def fit(self, X: Any, y: Any, sample_weight: Any = None, **options: Any) -> LoadedModel:
        """Fit anew, as ``SoftmaxRegression.fit``; what the file said of columns no longer counts."""
        self._model = None
        self.__dict__.pop("feature_names_in_", None)
        super().fit(X, y, sample_weight, **options)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return logits (N, C) of a frame with the file's columns, or of an array of features (N, D)."""
        if self._model is None or not is_frame(X) or self._model.width is not None:
            return super().decision_function(X)
        table = features_of(X, self._model, self._path)
        logits = np.empty((len(table), len(self.coef_)))
        for here, x in blocks(table.rows):
            logits[here] = (x.double().numpy() @ self.coef_.T + self.intercept_) / self.temperature_
        return logits[:, 0] if logits.shape[1] == 1 else logits

    def to_sklearn(self) -> Pipeline:
        """Return a pipeline with a fitted ``LogisticRegression``, as ``SoftmaxRegression.to_sklearn`` does.

        Of a model with categories or filled gaps its first step, ``"frameencoder"``, encodes a frame with the
        columns of the file as in the fit, and passes an array of features (N, D) on; it needs xent where the
        pipeline is used. Fitting the pipeline again keeps categories and medians.
        """
        pipeline = super().to_sklearn()
        if self._model is None or self._model.encoding is None:
            return pipeline
        last = pipeline.steps[-1][1]
        del last.feature_names_in_  # names are the encoder's, which gives it an array
        return make_pipeline(FrameEncoder(self._model, self._path), last)

    def _dense(self, X: Any) -> np.ndarray:
        if self._model is None:
            return super()._dense(X)
        return self._of_features(check_array(read_features(X), dtype=FLOATING, input_name="X"))

    def _compressed(self, X: Any, reset: bool) -> Any:
        if self._model is None:
            return super()._compressed(X, reset)
        return self._of_features(check_array(X, accept_sparse="csr", dtype=FLOATING[:2], input_name="X"))

    def _of_features(self, X: Any) -> Any:
        if X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {self._path} has {self.n_features_in_}"
                + (": feature_names_in_ in their order" if hasattr(self, "feature_names_in_") else "")
            )
        return X

    def _as_model(self) -> Model:
        read = self._model
        if read is None:
            return super()._as_model()
        read = dataclasses.replace(read, temperature=float(self.temperature_))
        weight, bias = _in_units(read)
        if np.array_equal(self.coef_, weight) and np.array_equal(self.intercept_, bias):
            return read
        zero, one = np.zeros(len(read.mean)), np.ones(len(read.mean))
        return dataclasses.replace(read, weight=self.coef_, bias=self.intercept_, mean=zero, scale=one)


def _in_units(read: Model) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights (C, D) and biases (C,) for features that are not standardised, in float64."""
    weight = read.weight.astype(np.float64) / read.scale
    return weight, read.bias - weight @ read.mean.astype(np.float64)


def load_model(path: str | os.PathLike[str]) -> LoadedModel:
    """Return the estimator of a file that ``xent fit`` or ``SoftmaxRegression.save`` wrote.

    It predicts for a data frame (pandas, polars, Arrow) that has the columns of the fit, in any order and
    among others: categories are encoded and gaps are filled as in the fit. An array (N, D) holds the features
    themselves, in the order of ``feature_names_in_``. ``coef_`` is in the units of the columns.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        A fitted :class:`xent.SoftmaxRegression`, with ``classes_``, ``coef_`` (C, D), ``intercept_`` (C,),
        ``temperature_``, ``n_features_in_`` and, where columns have names, ``feature_names_in_``. For two
        classes ``coef_`` is (1, D).

    Raises:
        BadInput: a ValueError; there is no such file, or it is not a model, or it is damaged.
        TypeError: a path that is neither a str nor an os.PathLike.

    Example:
        >>> import tempfile, xent
        >>> from sklearn.datasets import load_iris
        >>> data = load_iris(as_frame=True)
        >>> path = tempfile.mkdtemp() + "/iris.safetensors"
        >>> xent.SoftmaxRegression().fit(data.data, data.target_names[data.target]).save(path)
        >>> model = xent.load_model(path)
        >>> model.predict(data.data[::60]).tolist(), model.feature_names_in_[0]
        (['setosa', 'versicolor', 'virginica'], 'sepal length (cm)')
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or an os.PathLike, got {type(path).__name__}")
    read = model_file.load(Path(path))
    l2 = read.settings.get("l2")
    inverse = read.settings.get("C", 1.0) if l2 is None else 1 / l2 if l2 else np.inf
    kept = {name: read.settings[name] for name in PARAMETERS if name in read.settings}
    model = LoadedModel(C=float("inf") if inverse is None else inverse, **kept)
    model._model, model._path = read, Path(path)
    model.classes_ = read.classes
    model.coef_, model.intercept_ = _in_units(read)
    model.temperature_ = read.temperature
    model.n_features_in_ = model.coef_.shape[1]
    model.n_iter_ = 0
    if read.width is None:
        model.feature_names_in_ = np.array(read.feature_names, dtype=object)
    return model
