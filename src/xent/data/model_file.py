"""A fitted model as one ``.safetensors`` file: numbers as tensors, the rest as JSON, nothing that can run.

    z = (W (x − mean)/scale + b)/T        W (C, D), b (C,); for two classes W (1, D), b (1,) and logits (0, z)

Tensors ``weight``, ``bias``, ``mean``, ``scale``; the metadata's one entry ``xent`` is a JSON object with the
format version, the classes, their type and kind, the feature names, the width of the arrays fitted on, the
label's name, the settings of the fit, the temperature T and the encoding that makes x of a table's columns.
Version 1 has neither of the last two, and is written where T is 1 and the columns are the features. Files
without kind and width are of earlier versions of xent: what their text means is text, and their width is
known where their features are x0, x1, ... without a gap.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from xent._util.atomic_write import atomic_write
from xent._util.text import json_text, quoted
from xent.data.encoding import Encoding
from xent.data.labels import Kind, array_of_texts, kind_of
from xent.data.layout import PLAIN, Layout
from xent.data.limits import text_fault
from xent.data.reading import reading
from xent.data.table import Table, Wanted
from xent.errors import BadInput, needs

VERSION = 2
TENSORS = ("weight", "bias", "mean", "scale")
HEADER_LIMIT = 16 << 20
"""Bytes of header read at most: room for a million short names. A file that claims more is refused."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A softmax classifier on named, standardised features.

    >>> zero, one = np.zeros(3), np.ones(3)
    >>> model = Model(np.eye(3), zero, zero, one, np.array(["a", "b", "c"]), ("u", "v", "w"))
    >>> model.log_proba(np.array([[0.0, 0.0, 0.0]])).round(4).tolist()
    [[-1.0986, -1.0986, -1.0986]]
    """

    weight: np.ndarray  # (C, D); (1, D) for two classes
    bias: np.ndarray  # (C,); (1,) for two classes
    mean: np.ndarray  # (D,)
    scale: np.ndarray  # (D,), positive
    classes: np.ndarray  # (C,) str, int or bool
    feature_names: tuple[str, ...]  # D
    label_name: str | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    kind: Kind = "text"  # of the labels, which decides what of a file's labels is a class
    width: int | None = None  # columns of the arrays it was fitted on; None for columns with names
    lists: dict[str, int] = dataclasses.field(default_factory=dict)  # lengths of lists it was fitted on
    temperature: float = 1.0  # T, by which logits are divided
    encoding: Encoding | None = None  # the way from columns to features; None where they are the same

    def encoded(self, table: Table, strict: bool = True) -> Table:
        """Return a table of the model's features, of one of the columns that it was fitted on.

        Raises ``BadInput`` for a category that is missing where that is an error, unless not ``strict``.
        """
        return table if self.encoding is None else self.encoding.encoded(table, strict)

    @property
    def array_width(self) -> int | None:
        """The number of columns of an array for this model; None where it is not known."""
        count = len(self.feature_names)
        every = self.feature_names == tuple(f"x{j}" for j in range(count))
        return count if self.width is None and every else self.width

    @property
    def fingerprint(self) -> str:
        """A text that is equal for equal numbers, classes and features."""
        found = hashlib.sha256()
        about = None if self.encoding is None else self.encoding.about()
        found.update(f"{self.temperature!r} {about}".encode())
        for array in (self.weight, self.bias, self.mean, self.scale, self.classes):
            found.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        return found.hexdigest() + repr((self.feature_names, self.kind, self.width))

    def logits(self, x: np.ndarray) -> np.ndarray:  # (N, D) -> (N, C)
        """Return the logits of features that are not yet standardised."""
        z = ((x - self.mean) / self.scale) @ self.weight.T + self.bias
        z = z if self.temperature == 1 else z / z.dtype.type(self.temperature)
        return np.concatenate([np.zeros_like(z), z], axis=1) if z.shape[1] == 1 else z

    def log_proba(self, x: np.ndarray) -> np.ndarray:  # (N, D) -> (N, C), nats
        """Return the log-probabilities of features that are not yet standardised."""
        z = self.logits(x)
        z = z - z.max(axis=1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def wanted_for(
    model: Model, model_path: Path, label: str | None, layout: Layout = PLAIN, skip_bad: bool = False
) -> Wanted:
    """Return what is to be read for a model: its columns, and the label's where it is there."""
    encoding = model.encoding
    return Wanted(
        label=label or model.label_name,
        features=model.feature_names if encoding is None else encoding.numbers,
        label_optional=label is None,
        model=model_path,
        width=model.array_width,
        lists=model.lists,
        layout=layout,
        categorical=[] if encoding is None else list(encoding.categories),
        known={} if encoding is None else encoding.categories,
        missing="error" if encoding is None or encoding.fill is None else "impute",
        skip_bad=skip_bad,
    )


def save(model: Model, path: Path) -> None:
    """Write the model, whole or not at all.

    Raises ``OSError`` where the disk refuses, ``BadInput`` for a model that ``load`` would refuse.
    """
    with needs("probe"):
        from safetensors.numpy import save as to_bytes
    fault = _fault(model)
    if fault is not None:
        raise BadInput(
            f"{path}: not written, because {fault}; raise --l2, standardise or rescale the features"
        )
    kind = {"U": "str", "i": "int", "u": "int", "b": "bool"}[model.classes.dtype.kind]
    about: dict[str, Any] = {
        "format": "xent.softmax_regression",
        "version": 1 if model.encoding is None and model.temperature == 1 else VERSION,
        "classes": {"type": kind, "kind": model.kind, "values": model.classes.tolist()},
        "features": list(model.feature_names),
        "width": model.width,
        "lists": model.lists,
        "label": model.label_name,
        "settings": model.settings,
    }
    if about["version"] > 1:
        about["temperature"] = float(model.temperature)
        about["encoding"] = None if model.encoding is None else model.encoding.about()
    # one entry, because safetensors writes several in an order that changes from run to run
    text = json_text(about)
    if len(text.encode()) > HEADER_LIMIT // 2:
        raise BadInput(f"{path}: the names of features and classes take {len(text) >> 20} MiB; shorten them")
    tensors = {name: np.ascontiguousarray(getattr(model, name)) for name in TENSORS}
    with atomic_write(path) as temporary:
        temporary.write_bytes(to_bytes(tensors, metadata={"xent": text}))


def load(path: str | Path) -> Model:
    """Read a model and check it: sizes, shapes, finite numbers. Raises ``BadInput``, one line, otherwise."""
    path = Path(path)
    with needs("probe"):
        import safetensors  # noqa: F401
    with reading(path, "a model"):
        if not path.is_file():
            raise BadInput(f"{path}: no such model file")
        _check_header(path)
        model = _model(path)
    fault = _fault(model)
    if fault is not None:
        raise BadInput(f"{path}: {fault}; the file is damaged, write the model again")
    return model


def _model(path: Path) -> Model:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get("xent")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); write the model again") from error
    foreign = BadInput(f"{path}: a safetensors file, but not a model that `xent fit` wrote")
    if text is None:
        raise foreign
    try:
        about = json.loads(text)
        if about["format"] != "xent.softmax_regression":
            raise foreign
        if type(about["version"]) is not int or about["version"] < 1:
            raise foreign
        if about["version"] > VERSION:
            raise BadInput(
                f"{path}: format version {about['version']}, this xent reads up to {VERSION}; upgrade xent"
            )
        classes = _classes(path, about["classes"])
        return Model(
            **{name: tensors[name] for name in TENSORS},
            classes=classes,
            feature_names=tuple(_texts(about["features"])),
            label_name=None if about["label"] is None else _texts([about["label"]])[0],
            settings=dict(about["settings"]),
            kind=_kind(about["classes"].get("kind"), classes),
            width=_width(about.get("width"), about),
            lists=_lists(about.get("lists", {})),
            temperature=float(about.get("temperature", 1.0)),
            encoding=None if about.get("encoding") is None else Encoding.of(about["encoding"]),
        )
    except BadInput:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, AttributeError) as error:
        raise foreign from error


def _check_header(path: Path) -> None:
    """Raise ``BadInput`` unless eight bytes of length stand before that many bytes, the first of JSON.

    Nothing is parsed before.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(9)
    length = struct.unpack("<Q", start[:8])[0] if len(start) == 9 else 0
    if len(start) < 9 or start[8:] != b"{":
        raise BadInput(f"{path}: not a safetensors file; models are written by `xent fit`")
    if length > HEADER_LIMIT:
        raise BadInput(
            f"{path}: its header claims {length} bytes, more than the {HEADER_LIMIT} that are read"
        )
    if length + 8 > size:
        raise BadInput(f"{path}: the file ends inside its header; it is truncated, write the model again")


def _classes(path: Path, about: dict[str, Any]) -> np.ndarray:
    types = {"str": str, "int": int, "bool": bool}
    kind = types[about["type"]]
    values = _texts(about["values"]) if kind is str else about["values"]
    if not all(type(value) is kind for value in values):
        raise TypeError("a class is not of the type given")
    if kind is str:
        return array_of_texts(str(path), values)
    return np.array(values, dtype=np.int64 if kind is int else kind)


def _kind(given: Any, classes: np.ndarray) -> Kind:
    """Return the kind of the labels, which their type tells where no text is involved."""
    if given is None and classes.dtype.kind == "U":
        return "text"
    kind = kind_of(classes)
    if given not in (None, "text", kind):
        raise ValueError("the classes are not of the kind given")
    return "text" if given == "text" else kind


def _width(given: Any, about: dict[str, Any]) -> int | None:
    encoding = about.get("encoding")
    columns = len(about["features"] if encoding is None else encoding["numbers"])
    if given is not None and (type(given) is not int or given < columns):
        raise ValueError("the arrays are narrower than the model")
    return given


def _lists(given: Any) -> dict[str, int]:
    if not all(type(length) is int and length > 0 for length in given.values()):
        raise ValueError("the lengths of lists are whole numbers")
    return dict(given)


def _texts(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("names are a list of texts")
    # a lone surrogate, which JSON can hold and no file or terminal can, is a ValueError
    "".join(values).encode()
    return values


def _fault(model: Model) -> str | None:
    """Return what is wrong with the model, if anything is."""
    features, classes = len(model.feature_names), len(model.classes)
    rows = 1 if classes == 2 else classes
    shapes = {"weight": (rows, features), "bias": (rows,), "mean": (features,), "scale": (features,)}
    for name, shape in shapes.items():
        tensor = getattr(model, name)
        if tensor.shape != shape or tensor.dtype.kind != "f":
            return (
                f"{name} is {tensor.dtype} {tensor.shape} where {classes} classes and {features} "
                f"features need real numbers {shape}"
            )
        if not np.isfinite(tensor).all():
            return f"{name} holds nan or inf"
    if not (model.scale > 0).all():
        return "it has a scale that is not positive"
    if classes < 2:
        return "it has one class"
    if not (np.isfinite(model.temperature) and model.temperature > 0):
        return f"its temperature is {model.temperature}, not a positive number"
    if model.encoding is not None and model.encoding.names != tuple(model.feature_names):
        return "its encoding is of other features"
    for what, names in (("class", model.classes.tolist()), ("feature", model.feature_names)):
        name, times = collections.Counter(names).most_common(1)[0] if len(names) else ("", 1)
        if times > 1:
            return f"{what} {quoted(name)} is there {times} times"
        for name in names:
            fault = text_fault(name) if isinstance(name, str) else None
            if fault is not None:
                return f"{what} {quoted(name)} {fault}"
    return None
