"""``.safetensors`` files to a ``Table``: tensors by name, mapped where they lie in the file.

bfloat16, which NumPy does not have, is mapped as its bits; labels and weights of it are read as float32.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from xent._processes.group import Share
from xent._util.text import quoted
from xent.data.arrays import Stored, chosen, from_arrays
from xent.data.table import Table, Wanted
from xent.errors import BadInput, needs

TYPES = {
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(bool),
}
"""The types of NumPy by their names in the file."""


def read_safetensors(path: Path, wanted: Wanted, share: Share) -> Table:
    """Return the share's rows of a file of tensors: the features, and the label's."""
    with needs("probe"):
        from safetensors import safe_open
    with safe_open(path, framework="numpy") as file:  # which checks the header against the file
        names = list(file.keys())
    with open(path, "rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        about = json.loads(raw.read(length))
    features, beside = chosen(path, wanted, names, lambda name: _stored(path, about, name, 8 + length))
    return from_arrays(path, wanted, share, features, beside)


def _stored(path: Path, about: dict[str, Any], name: str, data: int) -> Stored:
    """Return a tensor of the file, whose data begin at a byte."""
    kind, shape = about[name]["dtype"], tuple(about[name]["shape"])
    where, start = f"{path}: tensor {quoted(name)}", data + about[name]["data_offsets"][0]
    dtype = np.dtype("<u2") if kind == "BF16" else TYPES.get(kind)
    if dtype is None:
        raise BadInput(f"{where} is of type {kind}, which is not read; save it as float16 or float32")

    def load() -> np.ndarray:
        if not math.prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="r", offset=start, shape=shape)

    if kind == "BF16":
        bits = load if math.prod(shape) else None
        return Stored(where, shape, np.dtype(np.float32), lambda: _bfloat16(path, name), bits)
    return Stored(where, shape, dtype, load)


def _bfloat16(path: Path, name: str) -> np.ndarray:
    """Return a tensor of bfloat16 in float32."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).float().numpy()
