"""A fitted estimator as a model file, which `xent predict` and `load_model` read.

z = (W (x − mean)/scale + b)/T        of an estimator: mean 0, scale 1
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils.validation import check_is_fitted

from xent._util.text import json_text, quoted
from xent.data import model_file
from xent.data.labels import kind_of
from xent.data.model_file import Model
from xent.errors import BadInput


class Saved:
    """The method of an estimator that writes what has been fitted to a file."""

    classes_: np.ndarray  # (C,)
    coef_: np.ndarray  # (C, D), of two classes (1, D)
    intercept_: np.ndarray  # (C,), of two classes (1,)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model as a ``.safetensors`` file: numbers and JSON, nothing that can run.

        :func:`xent.load_model` and ``xent predict`` read it. Features without names count as the columns of
        an array.

        Args:
            path: the file to write.

        Raises:
            sklearn.exceptions.NotFittedError: a call before ``fit``.
            BadInput: a ValueError; classes that are not text, whole numbers or booleans, weights that are not
                finite, a path that is not a file's.

        Example:
            >>> import tempfile, xent
            >>> from sklearn.datasets import load_iris
            >>> X, y = load_iris(return_X_y=True)
            >>> model = xent.SoftmaxRegression().fit(X, y)
            >>> path = tempfile.mkdtemp() + "/iris.safetensors"
            >>> model.save(path)
            >>> bool((xent.load_model(path).predict(X) == model.predict(X)).all())
            True
        """
        model_file.save(self._as_model(), Path(path))

    def _as_model(self) -> Model:
        """Return what has been fitted as the model of a file."""
        check_is_fitted(self)
        classes = _plain(self.classes_)
        count = self.coef_.shape[1]
        names = getattr(self, "feature_names_in_", None)
        parameters = self.get_params(deep=False)  # type: ignore[attr-defined]
        if hasattr(self, "C_"):
            parameters = parameters | {"C": self.C_}  # as chosen
        return Model(
            weight=self.coef_,
            bias=self.intercept_,
            mean=np.zeros(count, self.coef_.dtype),
            scale=np.ones(count, self.coef_.dtype),
            classes=classes,
            feature_names=tuple(f"x{j}" for j in range(count)) if names is None else tuple(map(str, names)),
            settings=json.loads(json_text({name: _json(value) for name, value in parameters.items()})),
            kind=kind_of(classes),
            width=count if names is None else None,
            temperature=float(getattr(self, "temperature_", 1.0)),
        )


def _plain(classes: np.ndarray) -> np.ndarray:
    """Return classes (C,) as text, int64 or bool."""
    values = classes.tolist()
    for kind, dtype in ((str, np.dtype(str)), (bool, np.dtype(bool)), (int, np.dtype(np.int64))):
        if all(type(value) is kind for value in values):
            try:
                return np.array(values, dtype=dtype)
            except OverflowError:
                break
    odd = next((value for value in values if type(value) not in (str, bool)), values[0])
    raise BadInput(
        f"the class {quoted(odd)} cannot be written: classes are text, whole numbers of 64 bits or booleans, "
        "all of one kind; cast y and fit again"
    )


def _json(value: Any) -> Any:
    """Return a parameter as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, np.generic):
        value = value.item()
    return value if isinstance(value, str | int | float | bool | None) else str(value)
