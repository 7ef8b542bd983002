"""A fitted softmax regression in the forms of other libraries, each with the same probabilities.

    p = softmax((W x + b)/T) = softmax(W′ x + b′)        W′ = W/T,  b′ = b/T

T is the estimator's ``temperature_``, 1 where it has none. Two classes are one vector, logits (0, s). PyTorch
and ONNX, whose softmax has a column for each class, get (0, W′) and (0, b′); scikit-learn has the one vector
too.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.validation import check_is_fitted

from xent._util.atomic_write import atomic_write, check_file, check_writable
from xent._util.text import json_text, quoted
from xent.errors import BadInput, needs

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET, IR_VERSION = 13, 7
"""The versions of ONNX 1.8 (2020): what is written needs nothing newer, and old runtimes read it."""

MOST_BYTES = 1 << 31  # of a protobuf message
ALIKE = ("C", "fit_intercept", "class_weight", "max_iter")
"""The parameters that mean the same to ``LogisticRegression``."""


class Exports:
    """The methods of an estimator that write what has been fitted in the form of another library."""

    classes_: np.ndarray  # (C,)
    coef_: np.ndarray  # (C, D), of two classes (1, D)
    intercept_: np.ndarray  # (C,), of two classes (1,)

    def to_torch(self) -> torch.nn.Linear:
        """Return a layer of PyTorch whose softmax gives the probabilities.

        Returns:
            A :class:`torch.nn.Linear` from features (N, D) to logits (N, C), columns in the order of
            ``classes_``. Its weight (C, D) and bias (C,) are copies on the CPU, of the type of ``coef_``,
            divided by ``temperature_``; training them leaves the estimator as it is. For two classes the
            first row is zeros.

        Raises:
            sklearn.exceptions.NotFittedError: a call before ``fit``.
            BadInput: a ValueError; a weight, divided by ``temperature_``, leaves the range of its type.

        Example:
            >>> import torch, xent
            >>> from sklearn.datasets import load_iris
            >>> X, y = load_iris(return_X_y=True)
            >>> model = xent.SoftmaxRegression().fit(X, y)
            >>> layer = model.to_torch()
            >>> with torch.no_grad():
            ...     p = layer(torch.from_numpy(X)).softmax(1)
            >>> bool(abs(p.numpy() - model.predict_proba(X)).max() < 1e-12)
            True
        """
        weight, bias = _with_zeros(*_divided(self))
        classes, features = weight.shape
        with torch.inference_mode(False):  # parameters that a caller in inference mode can train later
            # on "meta" no random numbers are drawn, of which the caller would miss some
            layer = torch.nn.Linear(features, classes, device="meta")
            layer.weight = torch.nn.Parameter(torch.from_numpy(weight))
            layer.bias = torch.nn.Parameter(torch.from_numpy(bias))
        return layer

    def to_sklearn(self) -> Pipeline:
        """Return a pipeline of one step, a fitted ``LogisticRegression`` with the same probabilities.

        Its parameters are this estimator's where both have them, with ``C`` as chosen, so that fitting it
        again minimises the same objective. ``temperature_`` is in its coefficients.

        Returns:
            A :class:`sklearn.pipeline.Pipeline` with the step ``"logisticregression"``, whose ``coef_`` is
            (C, D), for two classes (1, D), a copy in the type of ``coef_``. Steps may be put before it.

        Raises:
            sklearn.exceptions.NotFittedError: a call before ``fit``.
            BadInput: a ValueError; a weight, divided by ``temperature_``, leaves the range of its type.

        Example:
            >>> import xent
            >>> from sklearn.datasets import load_iris
            >>> X, y = load_iris(return_X_y=True)
            >>> model = xent.SoftmaxRegression().fit(X, y)
            >>> pipeline = model.to_sklearn()
            >>> [name for name, _ in pipeline.steps], pipeline.predict(X[:3]).tolist()
            (['logisticregression'], [0, 0, 0])
        """
        weight, bias = _divided(self)
        parameters: dict[str, Any] = self.get_params(deep=False)  # type: ignore[attr-defined]
        if hasattr(self, "C_"):
            parameters = parameters | {"C": self.C_}
        peer = LogisticRegression(**{name: parameters[name] for name in ALIKE if name in parameters})
        peer.classes_, peer.coef_, peer.intercept_ = self.classes_.copy(), weight, bias
        peer.n_iter_ = np.array([getattr(self, "n_iter_", 0)], dtype=np.int32)
        peer.n_features_in_ = weight.shape[1]
        if hasattr(self, "feature_names_in_"):
            peer.feature_names_in_ = self.feature_names_in_.copy()
        return make_pipeline(peer)

    def to_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the model as an ONNX file, which runtimes of 2020 (opset 13) and later read.

        The input is ``features``, float32 (N, D). The outputs are ``probabilities``, float32 (N, C), columns
        in the order of ``classes_``, and ``label`` (N,): int64 for whole numbers, string for text, bool for
        booleans, double for other numbers. All is computed in float32, and the weights are divided by
        ``temperature_``. The metadata hold the classes and the names of the features, if they have names, as
        JSON.

        Args:
            path: the file to write, in a folder that exists. A file of that name is replaced. The file is
                written whole or not at all.

        Raises:
            sklearn.exceptions.NotFittedError: a call before ``fit``.
            MissingExtra: an ImportError; onnx is not installed.
            BadInput: a ValueError; a weight beyond float32, classes of a type that ONNX has no tensor for,
                more weights than the 2 GiB of a file hold, a path that cannot be written to.

        Example:
            >>> import onnx, tempfile, xent
            >>> from sklearn.datasets import load_iris
            >>> X, y = load_iris(return_X_y=True)
            >>> model = xent.SoftmaxRegression().fit(X, y)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.to_onnx(f"{folder}/iris.onnx")
            ...     written = onnx.load(f"{folder}/iris.onnx")
            >>> [output.name for output in written.graph.output]
            ['probabilities', 'label']
            >>> {entry.key: entry.value for entry in written.metadata_props}["classes"]
            '[0, 1, 2]'
        """
        weight, bias = _with_zeros(*_divided(self, np.dtype(np.float32)))
        names = getattr(self, "feature_names_in_", None)
        written = _onnx_model(weight, bias, self.classes_, None if names is None else names.tolist())
        path = Path(path)
        check_file(path)
        if not path.parent.exists():
            raise BadInput(f"cannot write to {path}: there is no folder {path.parent}; make it first")
        check_writable(path.parent)
        with atomic_write(path) as temporary:
            temporary.write_bytes(written.SerializeToString(deterministic=True))


def _divided(model: Exports, dtype: np.dtype | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return new arrays W′ (K, D) and b′ (K,), K = C or, of two classes, 1; in ``coef_``'s type or `dtype`.

    Raises ``BadInput`` for the first number that is not finite there.
    """
    check_is_fitted(model, "coef_")
    temperature = float(getattr(model, "temperature_", 1.0))
    if not 0 < temperature < math.inf:
        raise BadInput(f"temperature_ is {temperature}; it must be a positive number, or be deleted")
    dtype = model.coef_.dtype if dtype is None else dtype
    divided = []
    for name, given in (("coef_", model.coef_), ("intercept_", model.intercept_)):
        with np.errstate(over="ignore", under="ignore"):
            exact = given.astype(np.float64) / temperature
            rounded = exact.astype(dtype, order="C")
        finite = np.isfinite(rounded)
        if not finite.all():
            at = tuple(np.argwhere(~finite)[0].tolist())
            if not np.isfinite(given[at]):
                raise BadInput(f"{name}{list(at)} is {given[at]}; fit again, on features of a smaller scale")
            over = "" if temperature == 1 else f", divided by temperature_ {temperature:.6g},"
            raise BadInput(
                f"{name}{list(at)} is {given[at]:.6g}{over} beyond {dtype}; fit features of a larger scale, "
                f"or with a smaller C"
            )
        divided.append(rounded)
    return divided[0], divided[1]


def _with_zeros(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a row for each class, (C, D) and (C,): of two classes, the first is zeros."""
    if len(bias) > 1:
        return weight, bias
    return np.concatenate([np.zeros_like(weight), weight]), np.concatenate([np.zeros_like(bias), bias])


def _onnx_model(
    weight: np.ndarray,  # (C, D) float32
    bias: np.ndarray,  # (C,) float32
    classes: np.ndarray,  # (C,)
    names: list[str] | None,  # of the features
) -> ModelProto:
    """Return the graph of softmax(x Wᵀ + b) and of the class with the largest logit."""
    with needs("onnx"):
        from onnx import TensorProto, helper
    (n_classes, n_features), kind = weight.shape, _onnx_kind(classes)
    values = [value.encode() for value in classes.tolist()] if kind == "STRING" else classes.tolist()
    about = {"format": "xent.softmax_regression", "classes": json_text(classes.tolist())}
    if names is not None:
        about["features"] = json_text(names)
    size = weight.nbytes + bias.nbytes + sum(map(len, about.values()))
    if size >= MOST_BYTES:
        raise BadInput(f"the model takes {size >> 20} MiB, and an ONNX file holds 2048; use to_torch()")
    of_label = getattr(TensorProto, kind)
    nodes = [
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        # of logits: probabilities of 1 may be equal where these are not; of equal ones the first, as in NumPy
        helper.make_node("ArgMax", ["logits"], ["position"], axis=1, keepdims=0),
        helper.make_node("Gather", ["classes", "position"], ["label"], axis=0),
    ]
    graph = helper.make_graph(
        nodes,
        "softmax_regression",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", n_features])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", n_classes]),
            helper.make_tensor_value_info("label", of_label, ["N"]),
        ],
        initializer=[
            helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, _raw(weight), raw=True),
            helper.make_tensor("bias", TensorProto.FLOAT, bias.shape, _raw(bias), raw=True),
            helper.make_tensor("classes", of_label, [n_classes], values),
        ],
    )
    model = helper.make_model(
        graph,
        producer_name="xent",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(model, about)
    return model


def _raw(array: np.ndarray) -> bytes:
    """Return numbers as ONNX stores them, little-endian."""
    return array.astype("<f4").tobytes()


def _onnx_kind(classes: np.ndarray) -> str:  # (C,)
    """Return the name of the ONNX type that holds the classes; raise ``BadInput`` where none does."""
    kind, values = classes.dtype.kind, classes.tolist()
    if all(isinstance(value, str) for value in values):
        for value in values:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadInput(
                    f"class {quoted(value)} is no valid Unicode, which ONNX text is; rename it"
                ) from None
        return "STRING"
    if kind == "u" and classes.max() >= 2**63:
        raise BadInput(f"class {classes.max()} is beyond int64, the whole numbers of ONNX; rename it")
    if kind not in "biuf":
        raise BadInput(
            f"class {quoted(values[0])} is of type {type(values[0]).__name__}, for which ONNX has no tensor; "
            f"fit labels that are text or numbers"
        )
    return {"b": "BOOL", "i": "INT64", "u": "INT64", "f": "DOUBLE"}[kind]
